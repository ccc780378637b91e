//! The receiving side of a lane: reassembles frames from chunks, and acknowledges what was received. Pure: no
//! socket, no thread.

use bytes::{Bytes, BytesMut};
use chiral_proto::{
    Frame, TransportError,
    pool::{Buffer, Pool},
};

use super::packet::Packet;

/// The most that one put carries, in bytes: four of Zenoh's batches of 64 KiB, with room for what it writes
/// before each. Larger messages would hold up a router's other traffic, and are no faster.
pub(super) const CHUNK: usize = 4 * 65_000;
/// How much, by [`cost`], may be put and not acknowledged: eight chunks, or some hundred small frames.
pub(super) const WINDOW: u64 = 8 * cost(CHUNK);
/// An acknowledgement is sent after this much: half of the window, since each costs both ends several context
/// switches.
const ACKNOWLEDGE_AFTER: u64 = WINDOW / 2;
/// Frames up to this size are allocated from the heap, not from the pool.
pub(super) const SMALL: usize = 4 * 1024;

/// Returns what a put of `len` bytes counts in the window: its bytes and the overhead of queueing it, so that
/// the window bounds small frames, too.
pub(super) const fn cost(len: usize) -> u64 {
    len as u64 + 4096
}

/// The receiving side of a lane.
#[derive(Debug)]
pub(super) struct Reassembly {
    max_frame: usize,
    pool: Pool,
    /// Frames that have arrived completely.
    completed: u64,
    partial: Option<Partial>,
    /// The cost of all puts received, and how much of it was acknowledged.
    received: u64,
    acknowledged: u64,
}

/// A frame whose last chunks have not arrived.
#[derive(Debug)]
struct Partial {
    buffer: Buffer,
    filled: usize,
}

impl Reassembly {
    pub(super) fn new(max_frame: usize, pool: Pool) -> Reassembly {
        Reassembly { max_frame, pool, completed: 0, partial: None, received: 0, acknowledged: 0 }
    }

    /// Receives a frame or chunk, whose payload of `len` bytes is in `slices`. Returns the frame if it is
    /// complete.
    pub(super) fn receive<'a>(
        &mut self,
        packet: Packet,
        len: usize,
        slices: impl Iterator<Item = &'a [u8]>,
    ) -> Result<Option<Frame>, TransportError> {
        self.received += cost(len);
        let (number, offset, total) = match packet {
            Packet::Frame { number } => (number, 0, len as u64),
            Packet::Chunk { number, offset, total } => (number, offset, total),
            other => return Err(violation("a frame or chunk", format!("{other:?}"))),
        };
        if !self.is_next(number)? {
            return Ok(None);
        }
        let partial = self.partial.take();
        let filled = partial.as_ref().map_or(0, |partial| partial.filled);
        let whole = partial.as_ref().map_or(total, |partial| partial.buffer.len() as u64);
        // Sums do not overflow: `offset` is compared with `filled` before anything is added to it.
        if offset != filled as u64
            || total != whole
            || len as u64 > total - offset
            || (len == 0 && offset < total)
        {
            let found = format!("{len} bytes at {offset} of {total} after {filled} of {whole}");
            return Err(violation("chunks of a frame in order", found));
        }
        let total = self.within_limit(total)?;
        if partial.is_none() && len == total {
            self.completed += 1;
            return Ok(Some(gather(&self.pool, len, slices).into()));
        }
        let Partial { mut buffer, mut filled } =
            partial.unwrap_or_else(|| Partial { buffer: self.pool.take(total), filled: 0 });
        for slice in slices {
            buffer[filled..filled + slice.len()].copy_from_slice(slice);
            filled += slice.len();
        }
        if filled == total {
            self.completed += 1;
            return Ok(Some(buffer.freeze().into()));
        }
        self.partial = Some(Partial { buffer, filled });
        Ok(None)
    }

    /// Receives a frame that was sent by reference, in its segments. `None` if it has arrived by the network
    /// meanwhile.
    pub(super) fn receive_reference(
        &mut self,
        number: u64,
        segments: Vec<Bytes>,
    ) -> Result<Option<Frame>, TransportError> {
        if !self.is_next(number)? {
            return Ok(None);
        }
        let frame = Frame::from(segments);
        self.within_limit(frame.len() as u64)?;
        if self.partial.is_some() {
            return Err(violation("the rest of a frame", "another frame"));
        }
        self.completed += 1;
        Ok(Some(frame))
    }

    /// Whether this is the next frame; false if it is a repetition.
    fn is_next(&self, number: u64) -> Result<bool, TransportError> {
        if number > self.completed + 1 {
            return Err(violation(
                "frames without a gap",
                format!("frame {number} after frame {}", self.completed),
            ));
        }
        Ok(number > self.completed)
    }

    fn within_limit(&self, len: u64) -> Result<usize, TransportError> {
        let allowed = usize::try_from(len).ok().filter(|len| *len <= self.max_frame);
        allowed.ok_or_else(|| violation("a frame within the limit", format!("{len} bytes")))
    }

    /// Returns the cost to acknowledge, if an acknowledgement is due.
    pub(super) fn acknowledge(&mut self) -> Option<u64> {
        let is_due = self.received - self.acknowledged >= ACKNOWLEDGE_AFTER;
        is_due.then(|| {
            self.acknowledged = self.received;
            self.received
        })
    }
}

/// Gathers the `len` bytes of all slices in one buffer, from the pool unless it is small.
pub(super) fn gather<'a>(pool: &Pool, len: usize, slices: impl Iterator<Item = &'a [u8]>) -> Bytes {
    if len <= SMALL {
        let mut gathered = BytesMut::with_capacity(len);
        slices.for_each(|slice| gathered.extend_from_slice(slice));
        return gathered.freeze();
    }
    let mut gathered = pool.take(len);
    let mut filled = 0;
    for slice in slices {
        gathered[filled..filled + slice.len()].copy_from_slice(slice);
        filled += slice.len();
    }
    gathered.freeze()
}

/// Returns the error for a peer that breaks the rules of the lane.
pub(super) fn violation(expected: &'static str, found: impl Into<String>) -> TransportError {
    TransportError::Protocol { expected, found: found.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Receives these packets, each with a payload of this length. Expects this length of the last frame, or
    /// an error that contains this text.
    fn check(packets: &[(Packet, usize)], expected: Result<Option<usize>, &str>) {
        let mut reassembly = Reassembly::new(1 << 20, Pool::new(0));
        let mut last = Ok(None);
        for (packet, len) in packets {
            let payload = vec![7; *len];
            last = reassembly.receive(*packet, *len, payload.chunks(100));
            if last.is_err() {
                break;
            }
        }
        match (last, expected) {
            (Ok(frame), Ok(len)) => assert_eq!(frame.map(|frame| frame.len()), len, "{packets:?}"),
            (Err(error), Err(text)) => assert!(error.to_string().contains(text), "{error}"),
            (found, expected) => panic!("{packets:?}: expected {expected:?}, found {found:?}"),
        }
    }

    #[test]
    fn a_frame_is_made_of_chunks_in_order() {
        let frame = |number| Packet::Frame { number };
        let chunk = |number, offset, total| Packet::Chunk { number, offset, total };
        check(&[(frame(1), 10)], Ok(Some(10)));
        check(&[(frame(1), 0)], Ok(Some(0)));
        check(&[(frame(1), 9000), (frame(2), 9000)], Ok(Some(9000)));
        check(&[(chunk(1, 0, 9000), 5000)], Ok(None));
        check(&[(chunk(1, 0, 9000), 5000), (chunk(1, 5000, 9000), 4000)], Ok(Some(9000)));
        check(&[(chunk(1, 0, 100), 50), (chunk(1, 50, 100), 50), (frame(2), 1)], Ok(Some(1)));
        for gap in [frame(2), chunk(7, 0, 9), frame(u64::MAX)] {
            check(&[(gap, 5)], Err("without a gap"));
        }
        check(&[(chunk(1, 0, 9000), 5000), (frame(1), 5)], Err("in order"));
        check(&[(chunk(1, 0, 9000), 5000), (frame(2), 5)], Err("without a gap"));
        check(&[(chunk(1, 5, 9000), 5)], Err("in order"));
        check(&[(chunk(1, 0, 10), 11)], Err("in order"));
        check(&[(chunk(1, 0, 10), 0)], Err("in order"));
        check(&[(chunk(1, u64::MAX, u64::MAX), 1)], Err("in order"));
        check(&[(chunk(1, 0, 9000), 5000), (chunk(1, 5000, 9001), 4000)], Err("in order"));
        check(&[(chunk(1, 0, 9000), 5000), (chunk(1, 5000, 9000), 4001)], Err("in order"));
        check(&[(chunk(1, 0, u64::MAX), 5)], Err("within the limit"));
        check(&[(frame(1), (1 << 20) + 1)], Err("within the limit"));
        check(&[(Packet::Close, 0)], Err("a frame or chunk"));
    }

    #[test]
    fn repeated_frames_are_ignored() {
        check(&[(Packet::Frame { number: 1 }, 10), (Packet::Frame { number: 1 }, 10)], Ok(None));
        let again = Packet::Chunk { number: 1, offset: 0, total: 9000 };
        let rest = Packet::Chunk { number: 1, offset: 5000, total: 9000 };
        check(
            &[
                (Packet::Frame { number: 1 }, 9000),
                (again, 5000),
                (rest, 4000),
                (Packet::Frame { number: 2 }, 3),
            ],
            Ok(Some(3)),
        );
    }

    #[test]
    fn references_share_the_numbering_of_frames() {
        let mut reassembly = Reassembly::new(100, Pool::new(0));
        let segments = |len| vec![Bytes::from_static(b"head"), Bytes::from(vec![0; len])];
        assert_eq!(reassembly.receive_reference(1, segments(50)).unwrap().map(|frame| frame.len()), Some(54));
        assert_eq!(
            reassembly.receive_reference(1, segments(50)).unwrap(),
            None,
            "frame 1 has arrived already"
        );
        assert!(
            reassembly.receive_reference(3, segments(50)).unwrap_err().to_string().contains("without a gap")
        );
        assert!(
            reassembly
                .receive_reference(2, segments(97))
                .unwrap_err()
                .to_string()
                .contains("within the limit")
        );
        let chunk = Packet::Chunk { number: 2, offset: 0, total: 100 };
        reassembly.receive(chunk, 50, std::iter::once(&[0; 50][..])).unwrap();
        assert!(
            reassembly
                .receive_reference(2, segments(50))
                .unwrap_err()
                .to_string()
                .contains("the rest of a frame")
        );
    }

    #[test]
    fn the_window_is_acknowledged_before_it_is_full() {
        let mut reassembly = Reassembly::new(1 << 20, Pool::new(0));
        let (mut acknowledged, mut put) = (0, 0);
        for number in 1..10_000 {
            reassembly.receive(Packet::Frame { number }, 1, [&[1_u8][..]].into_iter()).unwrap();
            put += cost(1);
            acknowledged = reassembly.acknowledge().unwrap_or(acknowledged);
            assert!(put - acknowledged + cost(CHUNK) <= WINDOW);
        }
    }
}
