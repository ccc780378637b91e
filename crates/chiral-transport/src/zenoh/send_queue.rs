//! The sending side of a lane: what to put next. Pure: no socket, no thread.

use std::collections::VecDeque;

use bytes::Bytes;
use chiral_proto::Frame;

use super::{
    packet::Packet,
    reassembly::{CHUNK, SMALL, WINDOW, cost},
};

/// The most answers to probes that are queued. A peer has at most two regions at a time.
const MAX_PENDING_ANSWERS: usize = 4;

/// A packet is put without waiting for the network while no more bytes than this are put and not acknowledged:
/// less than one of Zenoh's batches of 64 KiB, which takes packets up while the network is busy.
const UNHINDERED_BYTES: u64 = 48 * 1024;
/// What Zenoh writes beside the payload of a packet: keys, lengths, the attachment.
const PACKET_OVERHEAD: u64 = 64;

/// After this many references that did not arrive, none is sent any more: each has blocked the lane.
pub(super) const MAX_LOST: u32 = 3;

/// The sending side of a lane.
#[derive(Debug, Default)]
pub(super) struct SendQueue {
    /// The first one is being sent.
    frames: VecDeque<QueuedFrame>,
    /// How many bytes of the first frame were put.
    offset: usize,
    /// The first frame was put by reference, and the peer has not confirmed it yet.
    awaits_mapped: bool,
    /// Some frame was put by reference, so that the peer may hold shared memory.
    has_sent_references: bool,
    /// Frames that were sent.
    finished: u64,
    /// The cost of all puts that count in the window, and how much of it the peer has acknowledged.
    sent_cost: u64,
    acknowledged: u64,
    /// The puts that are not acknowledged, oldest first: up to which cost, and the bytes that they take.
    unacknowledged: VecDeque<(u64, u64)>,
    unacknowledged_bytes: u64,
    regions: PeerRegions,
    // Packets to put before any frame, and the close packet after them.
    pending_ready: bool,
    pending_acknowledge: Option<u64>,
    pending_mapped: Option<u64>,
    pending_probed: Vec<(u64, bool)>,
    pending_close: bool,
}

#[derive(Debug)]
struct QueuedFrame {
    frame: Frame,
    /// The regions of shared memory that all of its pixels lie in; none if some do not.
    regions: Vec<u64>,
}

/// Which regions of shared memory the peer can map.
#[derive(Debug, Default)]
struct PeerRegions {
    /// A probe was put.
    probed: Vec<u64>,
    /// The peer has answered.
    answered: Vec<u64>,
    /// The peer can map the region.
    shared: Vec<u64>,
    /// References that did not arrive.
    lost: u32,
}

/// How pixels in shared memory travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Path {
    /// There were none yet.
    Unprobed,
    /// By the network, since the peer has not answered a probe yet.
    Probing,
    /// By the network, since the peer cannot map the memory.
    Unshared,
    /// By reference.
    Reference,
    /// By the network, since references did not arrive.
    GivenUp,
}

/// One packet to put.
#[derive(Debug, PartialEq)]
pub(super) struct Put {
    pub(super) packet: Packet,
    pub(super) payload: Vec<Bytes>,
    /// Whether it is the last packet of a frame.
    pub(super) completes_frame: bool,
}

impl SendQueue {
    /// Queues a frame. `regions` are the regions of shared memory that all of its pixels lie in, if it may be
    /// sent by reference.
    pub(super) fn push(&mut self, frame: Frame, regions: Vec<u64>) {
        self.frames.push_back(QueuedFrame { frame, regions });
    }

    /// Queues a `Ready` packet.
    pub(super) fn queue_ready(&mut self) {
        self.pending_ready = true;
    }

    /// Queues an acknowledgement of this cost, in place of an earlier one.
    pub(super) fn queue_acknowledge(&mut self, cost: u64) {
        self.pending_acknowledge = Some(cost);
    }

    /// Queues a confirmation of a frame that arrived by reference.
    pub(super) fn queue_mapped(&mut self, number: u64) {
        self.pending_mapped = Some(number);
    }

    /// Queues the answer to a probe.
    pub(super) fn queue_probed(&mut self, region: u64, is_shared: bool) {
        if self.pending_probed.len() < MAX_PENDING_ANSWERS {
            self.pending_probed.push((region, is_shared));
        }
    }

    /// The peer has acknowledged this cost. More than was put is ignored.
    pub(super) fn on_acknowledge(&mut self, cost: u64) {
        if cost <= self.sent_cost {
            self.acknowledged = self.acknowledged.max(cost);
        }
        while let Some(&(end, bytes)) = self.unacknowledged.front()
            && end <= self.acknowledged
        {
            self.unacknowledged.pop_front();
            self.unacknowledged_bytes -= bytes;
        }
    }

    /// The peer has answered whether it can map a region. Answers without a probe are ignored.
    pub(super) fn on_probed(&mut self, region: u64, is_shared: bool) {
        let PeerRegions { probed, answered, shared, .. } = &mut self.regions;
        if !probed.contains(&region) || answered.contains(&region) {
            return;
        }
        answered.push(region);
        if is_shared {
            shared.push(region);
        }
    }

    /// Returns how pixels in shared memory travel now.
    pub(super) fn path(&self) -> Path {
        let PeerRegions { probed, answered, shared, lost } = &self.regions;
        match () {
            () if *lost == MAX_LOST => Path::GivenUp,
            () if !shared.is_empty() => Path::Reference,
            () if !answered.is_empty() => Path::Unshared,
            () if !probed.is_empty() => Path::Probing,
            () => Path::Unprobed,
        }
    }

    /// Whether any frame was put by reference.
    pub(super) fn has_sent_references(&self) -> bool {
        self.has_sent_references
    }

    /// Whether there is something to put, regardless of the window.
    pub(super) fn has_work(&self) -> bool {
        let SendQueue {
            pending_ready,
            pending_acknowledge,
            pending_mapped,
            pending_probed,
            pending_close,
            ..
        } = self;
        let has_pending = *pending_ready
            || pending_acknowledge.is_some()
            || pending_mapped.is_some()
            || !pending_probed.is_empty();
        has_pending || (!self.awaits_mapped && (*pending_close || !self.frames.is_empty()))
    }

    /// The peer has confirmed a frame that was put by reference. Returns whether it is the awaited one.
    pub(super) fn on_mapped(&mut self, number: u64) -> bool {
        let is_awaited = self.awaits_mapped && number == self.finished + 1;
        if is_awaited {
            self.finish_frame();
        }
        is_awaited
    }

    /// Returns the number of the frame that was put by reference and is not confirmed yet.
    pub(super) fn awaited_reference(&self) -> Option<u64> {
        self.awaits_mapped.then_some(self.finished + 1)
    }

    /// Stops waiting for the confirmation of this frame: it is sent by the network, and so are those that
    /// follow, until the peer has answered another probe. Returns whether it was awaited.
    pub(super) fn give_up_reference(&mut self, number: u64) -> bool {
        let is_awaited = self.awaited_reference() == Some(number);
        if is_awaited {
            self.awaits_mapped = false;
            self.regions = PeerRegions { lost: self.regions.lost + 1, ..PeerRegions::default() };
        }
        is_awaited
    }

    /// Queues the close packet after the queued frames. If the first frame is partly put, its sender has
    /// given up: all frames are discarded.
    pub(super) fn queue_close(&mut self) {
        self.pending_close = true;
        if self.offset > 0 || self.awaits_mapped {
            self.discard_frames();
        }
    }

    /// Discards all frames.
    pub(super) fn discard_frames(&mut self) {
        self.frames.clear();
        self.offset = 0;
        self.awaits_mapped = false;
    }

    /// Returns the next packet to put, if that cannot wait for the network.
    pub(super) fn next_unhindered(&mut self) -> Option<Put> {
        let free = UNHINDERED_BYTES.saturating_sub(self.unacknowledged_bytes + PACKET_OVERHEAD);
        self.next(SMALL.min(free as usize))
    }

    /// Returns the next packet to put, if the window permits one; of no more than `max_len` bytes for the
    /// network to carry.
    pub(super) fn next(&mut self, max_len: usize) -> Option<Put> {
        let bare = |packet| Some(Put { packet, payload: Vec::new(), completes_frame: false });
        if std::mem::take(&mut self.pending_ready) {
            return bare(Packet::Ready);
        }
        if let Some(cost) = self.pending_acknowledge.take() {
            return bare(Packet::Acknowledge { cost });
        }
        if let Some(number) = self.pending_mapped.take() {
            return bare(Packet::Mapped { number });
        }
        if let Some((region, is_shared)) = self.pending_probed.pop() {
            return bare(Packet::Probed { region, is_shared: is_shared.into() });
        }
        if self.awaits_mapped {
            return None;
        }
        let Some(QueuedFrame { frame, regions }) = self.frames.front() else {
            return if std::mem::take(&mut self.pending_close) { bare(Packet::Close) } else { None };
        };
        let number = self.finished + 1;
        if self.offset == 0 && !regions.is_empty() && self.regions.lost < MAX_LOST {
            let PeerRegions { probed, shared, .. } = &mut self.regions;
            if regions.iter().all(|region| shared.contains(region)) {
                (self.awaits_mapped, self.has_sent_references) = (true, true);
                return Some(Put {
                    packet: Packet::Reference { number },
                    payload: frame.segments().to_vec(),
                    completes_frame: false,
                });
            }
            if let Some(&region) = regions.iter().find(|region| !probed.contains(region)) {
                probed.push(region);
                return bare(Packet::Probe { region });
            }
        }
        let total = frame.len();
        let len = (total - self.offset).min(CHUNK);
        if len > max_len || self.sent_cost - self.acknowledged + cost(len) > WINDOW {
            return None;
        }
        let packet = match len == total {
            true => Packet::Frame { number },
            false => Packet::Chunk { number, offset: self.offset as u64, total: total as u64 },
        };
        let payload = slice_segments(frame.segments(), self.offset, len);
        self.sent_cost += cost(len);
        let bytes = len as u64 + PACKET_OVERHEAD;
        self.unacknowledged.push_back((self.sent_cost, bytes));
        self.unacknowledged_bytes += bytes;
        self.offset += len;
        let completes_frame = self.offset == total;
        if completes_frame {
            self.finish_frame();
        }
        Some(Put { packet, payload, completes_frame })
    }

    /// The first frame was sent.
    fn finish_frame(&mut self) {
        self.frames.pop_front();
        self.finished += 1;
        self.offset = 0;
        self.awaits_mapped = false;
    }
}

/// Slices `len` bytes of `segments` from `offset`, without copying.
fn slice_segments(segments: &[Bytes], mut offset: usize, mut len: usize) -> Vec<Bytes> {
    let mut slices = Vec::new();
    for segment in segments {
        let begin = offset.min(segment.len());
        let end = segment.len().min(begin + len);
        if end > begin {
            slices.push(segment.slice(begin..end));
        }
        offset -= begin;
        len -= end - begin;
    }
    slices
}

#[cfg(test)]
mod tests {
    use chiral_proto::pool::Pool;

    use super::*;
    use crate::zenoh::reassembly::Reassembly;

    fn frame(lens: &[usize]) -> Frame {
        lens.iter()
            .map(|len| (0..*len).map(|i| (i * 7 + len) as u8).collect::<Vec<_>>().into())
            .collect::<Vec<Bytes>>()
            .into()
    }

    #[test]
    fn frames_of_any_size_arrive_whole_within_the_window() {
        let mut queue = SendQueue::default();
        let mut reassembly = Reassembly::new(64 << 20, Pool::new(2));
        let frames = [
            frame(&[10]),
            frame(&[100, 5_000_000, 3]),
            frame(&[]),
            frame(&[CHUNK]),
            frame(&[CHUNK, 1]),
            frame(&[1, CHUNK, CHUNK]),
        ];
        let mut arrived = Vec::new();
        for sent in &frames {
            queue.push(sent.clone(), Vec::new());
            while let Some(put) = queue.next(CHUNK) {
                let len = put.payload.iter().map(Bytes::len).sum();
                assert!(len <= CHUNK);
                arrived.extend(
                    reassembly.receive(put.packet, len, put.payload.iter().map(|part| &part[..])).unwrap(),
                );
                if let Some(cost) = reassembly.acknowledge() {
                    queue.on_acknowledge(cost);
                }
            }
        }
        assert_eq!(arrived, frames);
    }

    /// Takes all packets that can be put now.
    fn packets(queue: &mut SendQueue) -> Vec<Packet> {
        std::iter::from_fn(|| queue.next(CHUNK)).map(|put| put.packet).collect()
    }

    #[test]
    fn only_pending_packets_are_put_beyond_the_window() {
        let mut queue = SendQueue::default();
        queue.push(frame(&[20 * CHUNK]), Vec::new());
        assert_eq!(queue.next(CHUNK - 1), None, "it is larger than the caller may put");
        assert_eq!(packets(&mut queue).len(), 8);
        queue.on_acknowledge(u64::MAX);
        assert_eq!(queue.next(CHUNK), None, "more than was put cannot be acknowledged");
        queue.queue_acknowledge(5);
        assert_eq!(packets(&mut queue), [Packet::Acknowledge { cost: 5 }]);
        queue.on_acknowledge(cost(CHUNK));
        let offset = 8 * CHUNK as u64;
        assert_eq!(packets(&mut queue), [Packet::Chunk { number: 1, offset, total: 20 * CHUNK as u64 }]);
        queue.queue_close();
        assert_eq!(packets(&mut queue), [Packet::Close], "a partly put frame is not finished");
    }

    #[test]
    fn a_put_that_may_wait_for_the_network_is_left_to_the_sending_thread() {
        // The reassembly acknowledges after half of the window.
        let unacknowledged_frames = WINDOW / 2 / cost(0);
        for (len, expected) in [(100, unacknowledged_frames), (SMALL, 11), (SMALL + 1, 0)] {
            let mut queue = SendQueue::default();
            let mut put = 0;
            while put < unacknowledged_frames {
                queue.push(frame(&[len]), Vec::new());
                if queue.next_unhindered().is_none() {
                    break;
                }
                put += 1;
            }
            assert_eq!(put, expected, "frames of {len} bytes");
            while queue.next(usize::MAX).is_some() {}
            queue.on_acknowledge(queue.sent_cost);
            assert_eq!((queue.unacknowledged_bytes, queue.unacknowledged.len()), (0, 0));
            queue.push(frame(&[100]), Vec::new());
            assert!(queue.next_unhindered().is_some());
        }
        let mut queue = SendQueue::default();
        queue.push(frame(&[2 * CHUNK]), Vec::new());
        while queue.next(usize::MAX).is_some() {}
        queue.push(frame(&[1]), Vec::new());
        queue.queue_acknowledge(5);
        assert_eq!(queue.next_unhindered().map(|put| put.packet), Some(Packet::Acknowledge { cost: 5 }));
        assert_eq!(queue.next_unhindered(), None);
    }

    #[test]
    fn queued_frames_are_put_before_the_close_packet() {
        let mut queue = SendQueue::default();
        queue.push(frame(&[3]), Vec::new());
        queue.queue_close();
        assert_eq!(packets(&mut queue), [Packet::Frame { number: 1 }, Packet::Close]);
    }

    #[test]
    fn references_are_sent_once_the_peer_has_mapped_the_region() {
        let mut queue = SendQueue::default();
        let push = |queue: &mut SendQueue, regions: &[u64]| queue.push(frame(&[9, CHUNK]), regions.to_vec());
        let chunks = |number| {
            let total = CHUNK as u64 + 9;
            [
                Packet::Chunk { number, offset: 0, total },
                Packet::Chunk { number, offset: CHUNK as u64, total },
            ]
        };
        push(&mut queue, &[7]);
        assert_eq!(
            packets(&mut queue),
            [&[Packet::Probe { region: 7 }][..], &chunks(1)].concat(),
            "the frame does not wait for the answer"
        );
        queue.on_probed(8, true);
        assert_eq!(queue.path(), Path::Probing, "region 8 was not probed");
        queue.on_probed(7, true);
        queue.on_probed(7, false);
        assert_eq!(queue.path(), Path::Reference, "the first answer counts");
        push(&mut queue, &[7]);
        push(&mut queue, &[7]);
        assert_eq!(packets(&mut queue), [Packet::Reference { number: 2 }], "one at a time");
        assert!(!queue.on_mapped(3) && queue.on_mapped(2));
        assert_eq!(packets(&mut queue), [Packet::Reference { number: 3 }]);
        assert!(queue.on_mapped(3));
        queue.on_acknowledge(queue.sent_cost);
        push(&mut queue, &[7, 8]);
        assert_eq!(
            packets(&mut queue),
            [&[Packet::Probe { region: 8 }][..], &chunks(4)].concat(),
            "a new region is probed"
        );
        queue.on_acknowledge(queue.sent_cost);
        push(&mut queue, &[]);
        assert_eq!(packets(&mut queue), chunks(5), "pixels outside shared memory");
    }

    #[test]
    fn a_lost_reference_and_the_frames_after_it_are_sent_by_the_network() {
        let (mut queue, mut reassembly) = (SendQueue::default(), Reassembly::new(64 << 20, Pool::new(1)));
        let sent = frame(&[9, CHUNK]);
        let mut arrived = Vec::new();
        let mut arrive = |queue: &mut SendQueue| {
            while let Some(put) = queue.next(CHUNK) {
                let len = put.payload.iter().map(Bytes::len).sum();
                if let Packet::Frame { .. } | Packet::Chunk { .. } = put.packet {
                    arrived.extend(
                        reassembly
                            .receive(put.packet, len, put.payload.iter().map(|part| &part[..]))
                            .unwrap(),
                    );
                }
            }
            queue.on_acknowledge(queue.sent_cost);
        };
        for lost in 1..=MAX_LOST {
            queue.push(sent.clone(), vec![7]);
            arrive(&mut queue);
            queue.on_probed(7, true);
            queue.push(sent.clone(), vec![7]);
            let number = u64::from(lost) * 2;
            assert_eq!(packets(&mut queue), [Packet::Reference { number }]);
            assert!(!queue.give_up_reference(number - 1) && queue.give_up_reference(number));
            assert!(!queue.on_mapped(number), "the confirmation is too late");
            arrive(&mut queue);
        }
        assert_eq!(queue.path(), Path::GivenUp);
        queue.push(sent.clone(), vec![7]);
        arrive(&mut queue);
        assert_eq!(arrived, vec![sent; 7]);
    }
}
