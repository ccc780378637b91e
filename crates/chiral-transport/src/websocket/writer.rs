//! Writes WebSocket frames (RFC 6455, section 5). A server writes a message's segments as they are, in
//! vectored writes; a client masks a copy.

use std::{
    future::poll_fn,
    hash::{BuildHasher, RandomState},
    io::{self, IoSlice},
    pin::Pin,
};

use bytes::Bytes;
use tokio::io::{AsyncWrite, AsyncWriteExt};

use super::frame::{Opcode, Role, apply_mask, encode_header};
use crate::{
    liveness::IdleTimeout,
    pacing::{MessagePacing, Pacing},
};

/// The most segments in one vectored write.
const MAX_SLICES: usize = 32;

/// The writing half of a stream. After a write was dropped unfinished, nothing more is written: the peer
/// would take it for the rest of the frame.
#[derive(Debug)]
pub(super) struct Writer<W> {
    stream: W,
    masks: Option<Masks>,
    pacing: Pacing,
    /// Records when the peer accepts part of a message. Control frames do not count: they fit into the
    /// socket's buffer even if the peer is gone.
    progress: Option<IdleTimeout>,
    is_within_frame: bool,
}

/// Masks that applications cannot predict (section 10.3), from the standard library's random state.
#[derive(Debug)]
struct Masks {
    secret: RandomState,
    count: u64,
}

impl<W: AsyncWrite + Unpin> Writer<W> {
    pub(super) fn new(stream: W, role: Role, pacing: Pacing, progress: Option<IdleTimeout>) -> Writer<W> {
        let masks = match role {
            Role::Client => Some(Masks { secret: RandomState::new(), count: 0 }),
            Role::Server => None,
        };
        Writer { stream, masks, pacing, progress, is_within_frame: false }
    }

    /// Writes one binary message as a single frame.
    pub(super) async fn message(&mut self, segments: &[Bytes]) -> io::Result<()> {
        self.start_frame()?;
        let len = segments.iter().map(Bytes::len).sum();
        match &mut self.masks {
            // Masking takes a copy; what a client sends is small.
            Some(masks) => {
                let frame = masked_frame(Opcode::Binary, len, segments, masks.next());
                self.stream.write_all(&frame).await?;
            }
            None => {
                let (header, header_len) = encode_header(Opcode::Binary, len, false);
                let mut slices = Vec::with_capacity(1 + segments.len());
                slices.push(IoSlice::new(&header[..header_len]));
                slices.extend(segments.iter().map(|segment| IoSlice::new(segment)));
                write_all_vectored(
                    &mut self.stream,
                    &mut slices,
                    self.pacing.for_message(),
                    self.progress.as_ref(),
                )
                .await?;
            }
        }
        self.finish_frame().await
    }

    /// Writes a ping, pong or close; `payload` is at most 125 bytes.
    pub(super) async fn control(&mut self, opcode: Opcode, payload: &Bytes) -> io::Result<()> {
        self.start_frame()?;
        let mask = self.masks.as_mut().map(Masks::next);
        let frame = match mask {
            Some(mask) => masked_frame(opcode, payload.len(), std::slice::from_ref(payload), mask),
            None => {
                let (header, header_len) = encode_header(opcode, payload.len(), false);
                [&header[..header_len], payload].concat()
            }
        };
        self.stream.write_all(&frame).await?;
        self.finish_frame().await
    }

    fn start_frame(&mut self) -> io::Result<()> {
        if self.is_within_frame {
            return Err(io::Error::new(io::ErrorKind::BrokenPipe, "an earlier frame was left half written"));
        }
        self.is_within_frame = true;
        Ok(())
    }

    async fn finish_frame(&mut self) -> io::Result<()> {
        self.stream.flush().await?;
        self.is_within_frame = false;
        Ok(())
    }

    /// Shuts the stream down for writing.
    pub(super) async fn shutdown(&mut self) -> io::Result<()> {
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

/// Returns a whole masked frame.
fn masked_frame(opcode: Opcode, len: usize, segments: &[Bytes], mask: [u8; 4]) -> Vec<u8> {
    let (header, header_len) = encode_header(opcode, len, true);
    let mut frame = Vec::with_capacity(header_len + mask.len() + len);
    frame.extend_from_slice(&header[..header_len]);
    frame.extend_from_slice(&mask);
    let payload_start = frame.len();
    for segment in segments {
        frame.extend_from_slice(segment);
    }
    apply_mask(&mut frame[payload_start..], mask);
    frame
}

async fn write_all_vectored(
    stream: &mut (impl AsyncWrite + Unpin),
    mut slices: &mut [IoSlice<'_>],
    mut pacing: MessagePacing,
    progress: Option<&IdleTimeout>,
) -> io::Result<()> {
    // Empty leading slices would make a write of 0 bytes, which looks like a closed stream.
    IoSlice::advance_slices(&mut slices, 0);
    while !slices.is_empty() {
        let mut part = [IoSlice::new(&[]); MAX_SLICES];
        let part = first_bytes(slices, pacing.max_copy, &mut part);
        let written = poll_fn(|context| Pin::new(&mut *stream).poll_write_vectored(context, part)).await?;
        if written == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        if let Some(progress) = progress {
            progress.record();
        }
        IoSlice::advance_slices(&mut slices, written);
        if !slices.is_empty() && pacing.max_copy < usize::MAX {
            pacing.yield_core();
        }
    }
    Ok(())
}

/// Returns the first bytes of `slices`, at most `max_len` of them, in `part`.
fn first_bytes<'a, 'b>(
    slices: &'a [IoSlice<'_>],
    max_len: usize,
    part: &'b mut [IoSlice<'a>; MAX_SLICES],
) -> &'b [IoSlice<'a>] {
    let mut left = max_len;
    let mut count = 0;
    for (slice, place) in slices.iter().zip(part.iter_mut()) {
        let len = slice.len().min(left);
        *place = IoSlice::new(&slice[..len]);
        (left, count) = (left - len, count + 1);
        if left == 0 {
            break;
        }
    }
    &part[..count]
}
