//! WebSocket frames (RFC 6455, section 5): what the reader, the writer and the transport share. Opcodes,
//! limits, masking, and the encoding of headers; the reader decodes them.

use std::time::Duration;

use chiral_proto::{Codec, pool::Pool};

use crate::pacing::Pacing;

/// The longest payload of a control frame (section 5.5).
pub(super) const MAX_CONTROL_PAYLOAD: usize = 125;

const FIN: u8 = 0x80;
const MASKED: u8 = 0x80;
/// The longest header without its mask: two bytes and a length of eight.
const MAX_HEADER: usize = 10;

/// Which end of the connection this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Masks the frames it sends.
    Client,
    /// Accepts masked frames only.
    Server,
}

/// The kind of a frame (section 5.2). Text frames have none here: they are refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Opcode {
    Continuation = 0x0,
    Binary = 0x2,
    Close = 0x8,
    Ping = 0x9,
    Pong = 0xa,
}

impl Opcode {
    pub(super) fn is_control(self) -> bool {
        matches!(self, Opcode::Close | Opcode::Ping | Opcode::Pong)
    }
}

/// The options of a connection, known after its handshake.
#[derive(Clone, Debug)]
pub struct WebSocketOptions {
    /// Which end of the connection this is.
    pub role: Role,
    /// The longest message to accept, in bytes.
    pub max_message: usize,
    /// Supplies the memory of large messages.
    pub pool: Pool,
    /// Makes large messages yield to actions.
    pub pacing: Pacing,
    /// The codec agreed with the peer.
    pub codec: Codec,
    /// The peer's name for the log, such as its address.
    pub peer: String,
    /// The limit of the transport's idle timeout.
    pub idle_timeout: Duration,
    /// Whether to ping a peer from which nothing arrives: for peers that may have nothing to send. Progress
    /// of a large message to such a peer counts as an arrival, since no ping can overtake the message.
    pub pings: bool,
}

/// Encodes the header of a final frame, without its mask. Returns the header and its length.
pub(super) fn encode_header(opcode: Opcode, len: usize, is_masked: bool) -> ([u8; MAX_HEADER], usize) {
    let mut header = [0; MAX_HEADER];
    header[0] = FIN | opcode as u8;
    let header_len = match len {
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
    if is_masked {
        header[1] |= MASKED;
    }
    (header, header_len)
}

/// Masks or unmasks a payload (section 5.3).
pub(super) fn apply_mask(data: &mut [u8], mask: [u8; 4]) {
    let (words, rest) = data.as_chunks_mut::<8>();
    let wide = u64::from_ne_bytes([mask[0], mask[1], mask[2], mask[3], mask[0], mask[1], mask[2], mask[3]]);
    for word in words {
        *word = (u64::from_ne_bytes(*word) ^ wide).to_ne_bytes();
    }
    for (byte, key) in rest.iter_mut().zip(mask.into_iter().cycle()) {
        *byte ^= key;
    }
}
