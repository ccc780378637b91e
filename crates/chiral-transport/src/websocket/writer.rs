//! Writes WebSocket frames (RFC 6455, section 5): a message's segments as they are, in one vectored write as
//! far as the stream takes it.

use std::{
    future::poll_fn,
    hash::{BuildHasher, RandomState},
    io::{self, IoSlice},
    pin::Pin,
};

use bytes::Bytes;
use tokio::io::{AsyncWrite, AsyncWriteExt};

use super::transport::{Opcode, Role};
use crate::{
    liveness::IdleTimeout,
    pacing::{Pacing, Pieces},
};

const FIN: u8 = 0x80;
const MASKED: u8 = 0x80;
/// The longest header there is: two bytes, a length of eight, a mask of four.
const MAX_HEADER: usize = 14;
/// A write is handed to the kernel in as many segments at once.
const MAX_SLICES: usize = 32;

/// The writing half of a socket. After a write was dropped half done nothing more is written, since nobody
/// could make sense of it.
#[derive(Debug)]
pub(crate) struct Writer<W> {
    stream: W,
    masks: Option<Masks>,
    pacing: Pacing,
    /// Of the other side, which ends whenever it takes some of a message. Pings are no messages: they would
    /// fit into the socket for ever.
    progress: Option<IdleTimeout>,
    is_within_frame: bool,
}

/// Masks that the other side's proxies cannot foresee (section 10.3), without a generator of our own.
#[derive(Debug)]
struct Masks {
    secret: RandomState,
    count: u64,
}

impl<W: AsyncWrite + Unpin> Writer<W> {
    pub(crate) fn new(stream: W, role: Role, pacing: Pacing, progress: Option<IdleTimeout>) -> Writer<W> {
        let masks = match role {
            Role::Client => Some(Masks { secret: RandomState::new(), count: 0 }),
            Role::Server => None,
        };
        Writer { stream, masks, pacing, progress, is_within_frame: false }
    }

    /// Writes one binary message, unfragmented.
    pub(crate) async fn message(&mut self, segments: &[Bytes]) -> io::Result<()> {
        self.begin()?;
        let len = segments.iter().map(Bytes::len).sum();
        match &mut self.masks {
            // What a client says is small: masking it takes a copy.
            Some(masks) => {
                let frame = masked(Opcode::Binary, len, segments, masks.next());
                self.stream.write_all(&frame).await?;
            }
            None => {
                let (header, header_len) = header(Opcode::Binary, len, 0);
                let mut slices = Vec::with_capacity(1 + segments.len());
                slices.push(IoSlice::new(&header[..header_len]));
                slices.extend(segments.iter().map(|segment| IoSlice::new(segment)));
                write_all_vectored(
                    &mut self.stream,
                    &mut slices,
                    self.pacing.pieces(),
                    self.progress.as_ref(),
                )
                .await?;
            }
        }
        self.end().await
    }

    /// Writes a ping, pong or close; `payload` is at most 125 bytes.
    pub(crate) async fn control(&mut self, opcode: Opcode, payload: &Bytes) -> io::Result<()> {
        self.begin()?;
        let mask = self.masks.as_mut().map(Masks::next);
        let frame = match mask {
            Some(mask) => masked(opcode, payload.len(), std::slice::from_ref(payload), mask),
            None => {
                let (header, header_len) = header(opcode, payload.len(), 0);
                [&header[..header_len], payload].concat()
            }
        };
        self.stream.write_all(&frame).await?;
        self.end().await
    }

    fn begin(&mut self) -> io::Result<()> {
        if self.is_within_frame {
            return Err(io::Error::new(
                io::ErrorKind::BrokenPipe,
                "an earlier message was given up half written",
            ));
        }
        self.is_within_frame = true;
        Ok(())
    }

    async fn end(&mut self) -> io::Result<()> {
        self.stream.flush().await?;
        self.is_within_frame = false;
        Ok(())
    }

    /// Ends the stream.
    pub(crate) async fn shutdown(&mut self) -> io::Result<()> {
        self.stream.shutdown().await
    }
}

impl Masks {
    fn next(&mut self) -> [u8; 4] {
        self.count += 1;
        let [a, b, c, d, ..] = self.secret.hash_one(self.count).to_le_bytes();
        [a, b, c, d]
    }
}

/// The header of a final frame, and its length.
fn header(opcode: Opcode, len: usize, masked: u8) -> ([u8; MAX_HEADER], usize) {
    let mut header = [0; MAX_HEADER];
    header[0] = FIN | opcode as u8;
    let end = match len {
        0..=125 => {
            header[1] = len as u8;
            2
        }
        126..=0xffff => {
            header[1] = 126;
            header[2..4].copy_from_slice(&(len as u16).to_be_bytes());
            4
        }
        _ => {
            header[1] = 127;
            header[2..10].copy_from_slice(&(len as u64).to_be_bytes());
            10
        }
    };
    header[1] |= masked;
    (header, end)
}

fn masked(opcode: Opcode, len: usize, segments: &[Bytes], mask: [u8; 4]) -> Vec<u8> {
    let (header, header_len) = header(opcode, len, MASKED);
    let mut frame = Vec::with_capacity(header_len + mask.len() + len);
    frame.extend_from_slice(&header[..header_len]);
    frame.extend_from_slice(&mask);
    let begin = frame.len();
    for segment in segments {
        frame.extend_from_slice(segment);
    }
    apply_mask(&mut frame[begin..], mask);
    frame
}

/// Masks, and unmasks (section 5.3).
pub(crate) fn apply_mask(data: &mut [u8], mask: [u8; 4]) {
    let (words, rest) = data.as_chunks_mut::<8>();
    let wide = u64::from_ne_bytes([mask[0], mask[1], mask[2], mask[3], mask[0], mask[1], mask[2], mask[3]]);
    for word in words {
        *word = (u64::from_ne_bytes(*word) ^ wide).to_ne_bytes();
    }
    for (byte, key) in rest.iter_mut().zip(mask.into_iter().cycle()) {
        *byte ^= key;
    }
}

async fn write_all_vectored(
    stream: &mut (impl AsyncWrite + Unpin),
    mut slices: &mut [IoSlice<'_>],
    mut pieces: Pieces,
    progress: Option<&IdleTimeout>,
) -> io::Result<()> {
    // Leading slices that are empty would look like a stream that takes nothing.
    IoSlice::advance_slices(&mut slices, 0);
    while !slices.is_empty() {
        let mut piece = [IoSlice::new(&[]); MAX_SLICES];
        let piece = head(slices, pieces.size, &mut piece);
        let written = poll_fn(|context| Pin::new(&mut *stream).poll_write_vectored(context, piece)).await?;
        if written == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        if let Some(progress) = progress {
            progress.record();
        }
        IoSlice::advance_slices(&mut slices, written);
        if !slices.is_empty() && pieces.size < usize::MAX {
            pieces.give_way();
        }
    }
    Ok(())
}

/// The first bytes of `slices`, at most `size` of them.
fn head<'a, 'b>(
    slices: &'a [IoSlice<'_>],
    size: usize,
    piece: &'b mut [IoSlice<'a>; MAX_SLICES],
) -> &'b [IoSlice<'a>] {
    let mut left = size;
    let mut count = 0;
    for (slice, place) in slices.iter().zip(piece.iter_mut()) {
        let len = slice.len().min(left);
        *place = IoSlice::new(&slice[..len]);
        (left, count) = (left - len, count + 1);
        if left == 0 {
            break;
        }
    }
    &piece[..count]
}
