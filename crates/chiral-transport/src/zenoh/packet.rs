//! The packets of a lane. One Zenoh put carries one packet: its payload, and its kind and numbers in the
//! attachment, one byte of kind, then `u64`s, little-endian.

/// A packet without its payload. Frames are numbered from 1: a number beyond the next one means a loss, an
/// earlier one a repetition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Packet {
    /// This end of the lane is subscribed. The client repeats it until the server answers it: packets that
    /// are put before the peer is known to be subscribed are lost silently.
    Ready,
    /// A whole frame.
    Frame { number: u64 },
    /// A whole frame, parts of which lie in shared memory. The peer answers with `Mapped`, or gets the frame
    /// again by the network.
    Reference { number: u64 },
    /// A frame that was sent by reference has arrived.
    Mapped { number: u64 },
    /// Part of a frame of `total` bytes, from `offset`.
    Chunk { number: u64, offset: u64, total: u64 },
    /// The `reassembly::cost` of all that was received on the lane since it was opened.
    Acknowledge { cost: u64 },
    /// The payload lies in this region of shared memory. The peer answers with `Probed`.
    Probe { region: u64 },
    /// Whether the payload of a `Probe` could be read in shared memory: 1 if so.
    Probed { region: u64, is_shared: u64 },
    /// Nothing follows.
    Close,
}

impl Packet {
    /// Encodes the packet as an attachment.
    pub(super) fn encode(self) -> Vec<u8> {
        let (kind, numbers): (u8, &[u64]) = match self {
            Packet::Ready => (1, &[]),
            Packet::Frame { number } => (2, &[number]),
            Packet::Chunk { number, offset, total } => (3, &[number, offset, total]),
            Packet::Acknowledge { cost } => (4, &[cost]),
            Packet::Close => (5, &[]),
            Packet::Reference { number } => (6, &[number]),
            Packet::Mapped { number } => (7, &[number]),
            Packet::Probe { region } => (8, &[region]),
            Packet::Probed { region, is_shared } => (9, &[region, is_shared]),
        };
        let mut bytes = vec![kind];
        bytes.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
        bytes
    }

    /// Decodes an attachment; `None` if it is not that of a packet.
    pub(super) fn decode(bytes: &[u8]) -> Option<Packet> {
        let (kind, rest) = bytes.split_first()?;
        let (numbers, []) = rest.as_chunks::<8>() else { return None };
        let numbers: Vec<u64> = numbers.iter().take(4).map(|bytes| u64::from_le_bytes(*bytes)).collect();
        match (kind, numbers.as_slice()) {
            (1, []) => Some(Packet::Ready),
            (2, &[number]) => Some(Packet::Frame { number }),
            (3, &[number, offset, total]) => Some(Packet::Chunk { number, offset, total }),
            (4, &[cost]) => Some(Packet::Acknowledge { cost }),
            (5, []) => Some(Packet::Close),
            (6, &[number]) => Some(Packet::Reference { number }),
            (7, &[number]) => Some(Packet::Mapped { number }),
            (8, &[region]) => Some(Packet::Probe { region }),
            (9, &[region, is_shared]) => Some(Packet::Probed { region, is_shared }),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_encoded_packets_are_decoded() {
        let packets = [
            Packet::Ready,
            Packet::Frame { number: 1 },
            Packet::Chunk { number: 2, offset: 1 << 40, total: u64::MAX },
            Packet::Acknowledge { cost: 7 },
            Packet::Close,
            Packet::Reference { number: 3 },
            Packet::Mapped { number: 3 },
            Packet::Probe { region: 4 },
            Packet::Probed { region: 4, is_shared: 1 },
        ];
        for packet in packets {
            let bytes = packet.encode();
            assert_eq!(Packet::decode(&bytes), Some(packet));
            assert_eq!(Packet::decode(&bytes[..bytes.len() - 1]), None);
            assert_eq!(Packet::decode(&[&bytes[..], &[0]].concat()), None);
            assert_eq!(Packet::decode(&[&bytes[..], &[0; 64]].concat()), None);
        }
        assert_eq!(Packet::decode(&[0]), None);
        assert_eq!(Packet::decode(&[10]), None);
    }
}
