//! Reads WebSocket frames (RFC 6455, section 5). A large message is read straight into pooled, aligned
//! memory, which the message then keeps.

use std::io;

use bytes::Bytes;
use chiral_proto::{Frame, TransportError, pool::Pool};
use tokio::io::{AsyncRead, AsyncReadExt};

use super::frame::{MAX_CONTROL_PAYLOAD, Opcode, Role, WebSocketOptions, apply_mask};
use crate::{liveness::IdleTimeout, pacing::Pacing};

/// How much is read ahead at most, so that small messages take one read and large ones little copying.
const READ_AHEAD_BYTES: usize = 8 * 1024;
/// Messages up to this size are allocated from the heap, not from the pool.
const MAX_UNPOOLED: usize = 4 * 1024;
/// The most fragments of a message: 64 MB of 4 KiB each.
const MAX_FRAGMENTS: usize = 16 * 1024;
/// What the peer sent.
#[derive(Debug)]
pub(super) enum Event {
    /// A binary message, with one segment per fragment.
    Message(Frame),
    Ping(Bytes),
    Pong,
    Close(Bytes),
}

/// The reading half of a stream. After a call of [`Reader::next`] was dropped unfinished, the stream may only
/// be closed.
#[derive(Debug)]
pub(super) struct Reader<R> {
    stream: R,
    role: Role,
    max_message: usize,
    pool: Pool,
    pacing: Pacing,
    idle: IdleTimeout,
    ahead: Box<[u8]>,
    /// Bytes that were read ahead and not consumed yet are `ahead[ahead_start..ahead_end]`.
    ahead_start: usize,
    ahead_end: usize,
    /// The fragments of a message that is not complete yet.
    fragments: Option<Vec<Bytes>>,
}

/// The header of a frame.
struct Header {
    is_final: bool,
    opcode: Opcode,
    len: usize,
    mask: Option<[u8; 4]>,
}

impl<R: AsyncRead + Unpin> Reader<R> {
    /// Creates a reader. `read_already` are the bytes that the handshake read beyond its end.
    pub(super) fn new(
        stream: R,
        read_already: &[u8],
        options: &WebSocketOptions,
        idle: IdleTimeout,
    ) -> Reader<R> {
        let WebSocketOptions { role, max_message, pool, pacing, .. } = options.clone();
        let mut ahead = vec![0; READ_AHEAD_BYTES.max(read_already.len())];
        ahead[..read_already.len()].copy_from_slice(read_already);
        Reader {
            stream,
            role,
            max_message,
            pool,
            pacing,
            idle,
            ahead: ahead.into(),
            ahead_start: 0,
            ahead_end: read_already.len(),
            fragments: None,
        }
    }

    /// Returns the next message or control frame. Control frames may arrive between the fragments of a
    /// message.
    pub(super) async fn next(&mut self) -> Result<Event, TransportError> {
        loop {
            let header = self.header().await?;
            if header.len > MAX_UNPOOLED || !header.is_final {
                self.idle.set_mid_message(true);
            }
            let payload = self.payload(&header).await.map_err(TransportError::lost)?;
            match header.opcode {
                Opcode::Ping => return Ok(Event::Ping(payload)),
                Opcode::Pong => return Ok(Event::Pong),
                Opcode::Close => return Ok(Event::Close(payload)),
                Opcode::Continuation | Opcode::Binary => {
                    let fragments = self.fragments.get_or_insert_default();
                    if fragments.len() == MAX_FRAGMENTS {
                        return Err(violation("a message of at most 16384 fragments", "more"));
                    }
                    // An endless row of empty fragments would fill the memory within any length limit.
                    if !payload.is_empty() {
                        fragments.push(payload);
                    }
                    if header.is_final {
                        self.idle.set_mid_message(false);
                        return Ok(Event::Message(self.fragments.take().unwrap_or_default().into()));
                    }
                }
            }
        }
    }

    /// Reads and discards everything up to the end of the stream.
    pub(super) async fn drain(&mut self) {
        while read(&mut self.stream, &mut self.ahead, &self.idle).await.is_ok_and(|read| read > 0) {}
    }

    async fn header(&mut self) -> Result<Header, TransportError> {
        let [first, second] = self.header_bytes().await?;
        if first & 0x70 != 0 {
            return Err(violation("no extension", "reserved bits"));
        }
        let is_final = first & 0x80 != 0;
        let opcode = self.opcode(first & 0x0f, is_final)?;
        let len = match second & 0x7f {
            126 => u64::from(u16::from_be_bytes(self.header_bytes().await?)),
            127 => u64::from_be_bytes(self.header_bytes().await?),
            len => u64::from(len),
        };
        let received: usize = self.fragments.iter().flatten().map(Bytes::len).sum();
        let limit = if opcode.is_control() {
            MAX_CONTROL_PAYLOAD
        } else {
            self.max_message - received.min(self.max_message)
        };
        let len = usize::try_from(len).ok().filter(|len| *len <= limit).ok_or_else(|| {
            let found = format!("{} bytes", len.saturating_add(received as u64));
            let expected = if opcode.is_control() {
                "control frames of at most 125 bytes"
            } else {
                "a message within the limit"
            };
            violation(expected, found)
        })?;
        let mask = match (self.role, second & 0x80 != 0) {
            (Role::Server, true) => Some(self.header_bytes().await?),
            (Role::Client, false) => None,
            (Role::Server, false) => return Err(violation("masked frames from a client", "an unmasked one")),
            (Role::Client, true) => return Err(violation("unmasked frames from a server", "a masked one")),
        };
        Ok(Header { is_final, opcode, len, mask })
    }

    fn opcode(&self, code: u8, is_final: bool) -> Result<Opcode, TransportError> {
        match (code, self.fragments.is_some()) {
            (0x0, true) => Ok(Opcode::Continuation),
            (0x0, false) => Err(violation("the beginning of a message", "its continuation")),
            (0x1, _) => Err(violation("binary messages", "a text message")),
            (0x2, false) => Ok(Opcode::Binary),
            (0x2, true) => Err(violation("the continuation of a message", "another message")),
            (0x8..=0xa, _) if !is_final => Err(violation("whole control frames", "a fragment")),
            (0x8, _) => Ok(Opcode::Close),
            (0x9, _) => Ok(Opcode::Ping),
            (0xa, _) => Ok(Opcode::Pong),
            _ => Err(violation("a known kind of frame", format!("opcode {code}"))),
        }
    }

    async fn payload(&mut self, header: &Header) -> io::Result<Bytes> {
        if header.len <= MAX_UNPOOLED {
            let mut payload = vec![0; header.len];
            self.fill(&mut payload, header.mask).await?;
            return Ok(payload.into());
        }
        let mut payload = self.pool.take(header.len);
        self.fill(&mut payload, header.mask).await?;
        Ok(payload.freeze())
    }

    async fn fill(&mut self, payload: &mut [u8], mask: Option<[u8; 4]>) -> io::Result<()> {
        let buffered = payload.len().min(self.ahead_end - self.ahead_start);
        payload[..buffered].copy_from_slice(&self.ahead[self.ahead_start..self.ahead_start + buffered]);
        self.ahead_start += buffered;
        let mut pacing = self.pacing.for_message();
        for (i, piece) in payload[buffered..].chunks_mut(pacing.max_copy).enumerate() {
            if i > 0 {
                pacing.yield_core();
            }
            let mut rest = piece;
            while !rest.is_empty() {
                let read = read(&mut self.stream, rest, &self.idle).await?;
                if read == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                rest = &mut rest[read..];
            }
        }
        if let Some(mask) = mask {
            apply_mask(payload, mask);
        }
        Ok(())
    }

    /// Returns the next `N` bytes of a header.
    async fn header_bytes<const N: usize>(&mut self) -> Result<[u8; N], TransportError> {
        while self.ahead_end - self.ahead_start < N {
            self.ahead.copy_within(self.ahead_start..self.ahead_end, 0);
            (self.ahead_start, self.ahead_end) = (0, self.ahead_end - self.ahead_start);
            let read = read(&mut self.stream, &mut self.ahead[self.ahead_end..], &self.idle).await;
            match read.map_err(TransportError::lost)? {
                0 => {
                    return Err(TransportError::lost("the peer closed the connection without a close frame"));
                }
                read => self.ahead_end += read,
            }
        }
        let mut bytes = [0; N];
        bytes.copy_from_slice(&self.ahead[self.ahead_start..self.ahead_start + N]);
        self.ahead_start += N;
        Ok(bytes)
    }
}

/// Reads what is there, and records the arrival, however few bytes it is. Returns 0 at the end of the stream.
async fn read(
    stream: &mut (impl AsyncRead + Unpin),
    buffer: &mut [u8],
    idle: &IdleTimeout,
) -> io::Result<usize> {
    let read = stream.read(buffer).await?;
    if read > 0 {
        idle.record();
    }
    Ok(read)
}

fn violation(expected: &'static str, found: impl Into<String>) -> TransportError {
    TransportError::Protocol { expected, found: found.into() }
}
