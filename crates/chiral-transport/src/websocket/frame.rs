//! What both halves of a WebSocket know of frames (RFC 6455, section 5): kinds, limits, headers to be written, and masks.

use std::time::Duration;

use chiral_proto::{Codec, pool::Pool};

use crate::pacing::Pacing;

/// The longest control frame (section 5.5).
pub(super) const MAX_CONTROL_PAYLOAD: usize = 125;

const FIN: u8 = 0x80;
const MASKED: u8 = 0x80;
/// The longest header there is: two bytes, a length of eight, a mask of four.
const MAX_HEADER: usize = 14;

/// Which end of the connection this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Masks what it says.
    Client,
    /// Takes only what is masked.
    Server,
}

/// Kinds of frames (RFC 6455, section 5.2).
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

/// What a connection is, as its handshake left it.
#[derive(Clone, Debug)]
pub struct WebSocketOptions {
    /// Which end this is.
    pub role: Role,
    /// Larger messages are refused, in bytes.
    pub max_message: usize,
    /// Where the memory of large messages comes from.
    pub pool: Pool,
    /// Whether its large messages give way to actions.
    pub pacing: Pacing,
    /// What was agreed with the peer.
    pub codec: Codec,
    /// The peer's name for the log, such as its address.
    pub peer: String,
    /// For how long nothing may arrive: the limit of the transport's idle timeout.
    pub idle_timeout: Duration,
    /// Whether to ping a peer from which nothing arrives, for peers that may rightly have nothing to send.
    /// What such a peer takes of a large message counts as an arrival, since no ping can overtake it.
    pub pings: bool,
}

/// The header of a final frame, and its length.
pub(super) fn encode_header(opcode: Opcode, len: usize, is_masked: bool) -> ([u8; MAX_HEADER], usize) {
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
    if is_masked {
        header[1] |= MASKED;
    }
    (header, end)
}

/// Masks, and unmasks (section 5.3).
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
