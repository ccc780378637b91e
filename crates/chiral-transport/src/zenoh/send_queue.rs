//! What a lane has to put, and in which order. Pure: no socket, no thread.

use std::collections::VecDeque;

use bytes::Bytes;
use chiral_proto::Frame;

use super::{
    packet::Packet,
    reassembly::{CHUNK, WINDOW, cost},
};

/// Probes that wait for their answers; there are at most two regions at a time.
const MAX_ANSWERS: usize = 4;

/// After so many references that did not arrive there are no more of them: each has held up the lane.
pub(super) const MAX_LOST: u32 = 3;

/// The sending side of a lane.
#[derive(Debug, Default)]
pub(super) struct SendQueue {
    /// The first one is on its way.
    frames: VecDeque<QueuedFrame>,
    /// Of the first frame, so many bytes were put.
    offset: usize,
    /// The first frame was put by reference, and has not arrived yet.
    is_referred_to: bool,
    /// Some frame was, so that the other side may hold shared memory.
    has_referred: bool,
    /// Frames that are done with.
    sent: u64,
    put: u64,
    /// What the other side has taken of it.
    taken: u64,
    regions: Regions,
    owes_begin: bool,
    owes_taken: Option<u64>,
    owes_mapped: Option<u64>,
    owes_probed: Vec<(u64, bool)>,
    owes_close: bool,
}

#[derive(Debug)]
struct QueuedFrame {
    frame: Frame,
    /// The regions of shared memory that all of its pixels lie in; none if some do not.
    regions: Vec<u64>,
}

/// What of shared memory the other side sees.
#[derive(Debug, Default)]
struct Regions {
    asked: Vec<u64>,
    answered: Vec<u64>,
    seen: Vec<u64>,
    /// References that did not arrive.
    lost: u32,
}

/// How pixels in shared memory travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Path {
    /// There were none yet.
    Unasked,
    /// By the network, since the other side has not said yet whether it sees them.
    Asked,
    /// By the network, since the other side does not see them.
    Unseen,
    /// By reference.
    Reference,
    /// By the network, since references did not arrive.
    GivenUp,
}

/// One put.
#[derive(Debug, PartialEq)]
pub(super) struct Put {
    pub(super) word: Packet,
    pub(super) payload: Vec<Bytes>,
    /// Whether a frame is done with it.
    pub(super) completes: bool,
}

impl SendQueue {
    /// A frame, and the regions of shared memory that all of its pixels lie in, if it may be sent by
    /// reference.
    pub(super) fn push(&mut self, frame: Frame, regions: Vec<u64>) {
        self.frames.push_back(QueuedFrame { frame, regions });
    }

    /// The other side is to hear that this one is there.
    pub(super) fn begin(&mut self) {
        self.owes_begin = true;
    }

    /// The other side is to hear how much was taken.
    pub(super) fn tell(&mut self, taken: u64) {
        self.owes_taken = Some(taken);
    }

    /// The other side is to hear that a reference arrived.
    pub(super) fn tell_mapped(&mut self, number: u64) {
        self.owes_mapped = Some(number);
    }

    /// The other side is to hear whether this one sees a region.
    pub(super) fn tell_probed(&mut self, region: u64, is_shared: bool) {
        if self.owes_probed.len() < MAX_ANSWERS {
            self.owes_probed.push((region, is_shared));
        }
    }

    /// The other side has taken so much. What cannot be is ignored.
    pub(super) fn taken(&mut self, taken: u64) {
        if taken <= self.put {
            self.taken = self.taken.max(taken);
        }
    }

    /// The other side was asked, and sees a region of shared memory or does not.
    pub(super) fn probed(&mut self, region: u64, is_shared: bool) {
        let Regions { asked, answered, seen, .. } = &mut self.regions;
        if !asked.contains(&region) || answered.contains(&region) {
            return;
        }
        answered.push(region);
        if is_shared {
            seen.push(region);
        }
    }

    /// How far shared memory has come.
    pub(super) fn path(&self) -> Path {
        let Regions { asked, answered, seen, lost } = &self.regions;
        match () {
            () if *lost == MAX_LOST => Path::GivenUp,
            () if !seen.is_empty() => Path::Reference,
            () if !answered.is_empty() => Path::Unseen,
            () if !asked.is_empty() => Path::Asked,
            () => Path::Unasked,
        }
    }

    /// Whether anything was ever put by reference.
    pub(super) fn has_referred(&self) -> bool {
        self.has_referred
    }

    /// Whether there is something to put, were there no window.
    pub(super) fn has_work(&self) -> bool {
        let SendQueue { owes_begin, owes_taken, owes_mapped, owes_probed, owes_close, .. } = self;
        let owes = *owes_begin || owes_taken.is_some() || owes_mapped.is_some() || !owes_probed.is_empty();
        owes || (!self.is_referred_to && (*owes_close || !self.frames.is_empty()))
    }

    /// The other side has a frame that was put by reference; whether it is the one that is waited for.
    pub(super) fn mapped(&mut self, number: u64) -> bool {
        let is_awaited = self.is_referred_to && number == self.sent + 1;
        if is_awaited {
            self.done();
        }
        is_awaited
    }

    /// The number of the frame that was put by reference and has not arrived yet.
    pub(super) fn awaited(&self) -> Option<u64> {
        self.is_referred_to.then_some(self.sent + 1)
    }

    /// This frame is not waited for any longer, if it still is: it is sent by the network, and so are those
    /// that follow, until the other side has said again that it sees shared memory. Whether it is so.
    pub(super) fn give_up(&mut self, number: u64) -> bool {
        let is_awaited = self.awaited() == Some(number);
        if is_awaited {
            self.is_referred_to = false;
            self.regions = Regions { lost: self.regions.lost + 1, ..Regions::default() };
        }
        is_awaited
    }

    /// The last word is to be said, after the frames that wait; but a frame that was begun, and given up, is
    /// not finished first.
    pub(super) fn close(&mut self) {
        self.owes_close = true;
        if self.offset > 0 || self.is_referred_to {
            self.abandon();
        }
    }

    /// Nobody will take the frames any more.
    pub(super) fn abandon(&mut self) {
        self.frames.clear();
        self.offset = 0;
        self.is_referred_to = false;
    }

    /// The next put, if there is one that the window lets through; of no more than `max_len` bytes for the
    /// network to carry.
    pub(super) fn next(&mut self, max_len: usize) -> Option<Put> {
        let bare = |word| Some(Put { word, payload: Vec::new(), completes: false });
        if std::mem::take(&mut self.owes_begin) {
            return bare(Packet::Begin);
        }
        if let Some(cost) = self.owes_taken.take() {
            return bare(Packet::Taken { cost });
        }
        if let Some(number) = self.owes_mapped.take() {
            return bare(Packet::Mapped { number });
        }
        if let Some((region, is_shared)) = self.owes_probed.pop() {
            return bare(Packet::Probed { region, is_shared: is_shared.into() });
        }
        if self.is_referred_to {
            return None;
        }
        let Some(QueuedFrame { frame, regions }) = self.frames.front() else {
            return if std::mem::take(&mut self.owes_close) { bare(Packet::Close) } else { None };
        };
        let number = self.sent + 1;
        if self.offset == 0 && !regions.is_empty() && self.regions.lost < MAX_LOST {
            let Regions { asked, seen, .. } = &mut self.regions;
            if regions.iter().all(|region| seen.contains(region)) {
                (self.is_referred_to, self.has_referred) = (true, true);
                return Some(Put {
                    word: Packet::Reference { number },
                    payload: frame.segments().to_vec(),
                    completes: false,
                });
            }
            if let Some(&region) = regions.iter().find(|region| !asked.contains(region)) {
                asked.push(region);
                return bare(Packet::Probe { region });
            }
        }
        let total = frame.len();
        let len = (total - self.offset).min(CHUNK);
        if len > max_len || self.put - self.taken + cost(len) > WINDOW {
            return None;
        }
        let word = match len == total {
            true => Packet::Frame { number },
            false => Packet::Chunk { number, offset: self.offset as u64, total: total as u64 },
        };
        let payload = part(frame.segments(), self.offset, len);
        self.put += cost(len);
        self.offset += len;
        let completes = self.offset == total;
        if completes {
            self.done();
        }
        Some(Put { word, payload, completes })
    }

    /// The first frame is.
    fn done(&mut self) {
        self.frames.pop_front();
        self.sent += 1;
        self.offset = 0;
        self.is_referred_to = false;
    }
}

/// The bytes of `segments` from `offset`, by reference.
fn part(segments: &[Bytes], mut offset: usize, mut len: usize) -> Vec<Bytes> {
    let mut parts = Vec::new();
    for segment in segments {
        let begin = offset.min(segment.len());
        let end = segment.len().min(begin + len);
        if end > begin {
            parts.push(segment.slice(begin..end));
        }
        offset -= begin;
        len -= end - begin;
    }
    parts
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
        let mut outbox = SendQueue::default();
        let mut incoming = Reassembly::new(64 << 20, Pool::new(2));
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
            outbox.push(sent.clone(), Vec::new());
            while let Some(put) = outbox.next(CHUNK) {
                let len = put.payload.iter().map(Bytes::len).sum();
                assert!(len <= CHUNK);
                arrived
                    .extend(incoming.take(put.word, len, put.payload.iter().map(|part| &part[..])).unwrap());
                if let Some(taken) = incoming.tell() {
                    outbox.taken(taken);
                }
            }
        }
        assert_eq!(arrived, frames);
    }

    /// The words of all puts that there are now.
    fn words(outbox: &mut SendQueue) -> Vec<Packet> {
        std::iter::from_fn(|| outbox.next(CHUNK)).map(|put| put.word).collect()
    }

    #[test]
    fn nothing_is_put_beyond_the_window_but_what_is_owed() {
        let mut outbox = SendQueue::default();
        outbox.push(frame(&[20 * CHUNK]), Vec::new());
        assert_eq!(outbox.next(CHUNK - 1), None, "it is for who may put that much");
        assert_eq!(words(&mut outbox).len(), 8);
        outbox.taken(u64::MAX);
        assert_eq!(outbox.next(CHUNK), None, "more than was put cannot have been taken");
        outbox.tell(5);
        assert_eq!(words(&mut outbox), [Packet::Taken { cost: 5 }]);
        outbox.taken(cost(CHUNK));
        let offset = 8 * CHUNK as u64;
        assert_eq!(words(&mut outbox), [Packet::Chunk { number: 1, offset, total: 20 * CHUNK as u64 }]);
        outbox.close();
        assert_eq!(words(&mut outbox), [Packet::Close], "a frame that was given up is not finished");
    }

    #[test]
    fn what_waits_is_put_before_the_last_word() {
        let mut outbox = SendQueue::default();
        outbox.push(frame(&[3]), Vec::new());
        outbox.close();
        assert_eq!(words(&mut outbox), [Packet::Frame { number: 1 }, Packet::Close]);
    }

    #[test]
    fn shared_memory_is_referred_to_once_the_other_side_has_seen_it() {
        let mut outbox = SendQueue::default();
        let push =
            |outbox: &mut SendQueue, regions: &[u64]| outbox.push(frame(&[9, CHUNK]), regions.to_vec());
        let chunks = |number| {
            let total = CHUNK as u64 + 9;
            [
                Packet::Chunk { number, offset: 0, total },
                Packet::Chunk { number, offset: CHUNK as u64, total },
            ]
        };
        push(&mut outbox, &[7]);
        assert_eq!(
            words(&mut outbox),
            [&[Packet::Probe { region: 7 }][..], &chunks(1)].concat(),
            "nobody waits for the answer"
        );
        outbox.probed(8, true);
        assert_eq!(outbox.path(), Path::Asked, "nobody asked for that one");
        outbox.probed(7, true);
        outbox.probed(7, false);
        assert_eq!(outbox.path(), Path::Reference, "the first answer counts");
        push(&mut outbox, &[7]);
        push(&mut outbox, &[7]);
        assert_eq!(words(&mut outbox), [Packet::Reference { number: 2 }], "one at a time");
        assert!(!outbox.mapped(3) && outbox.mapped(2));
        assert_eq!(words(&mut outbox), [Packet::Reference { number: 3 }]);
        assert!(outbox.mapped(3));
        outbox.taken(outbox.put);
        push(&mut outbox, &[7, 8]);
        assert_eq!(
            words(&mut outbox),
            [&[Packet::Probe { region: 8 }][..], &chunks(4)].concat(),
            "a region that is new"
        );
        outbox.taken(outbox.put);
        push(&mut outbox, &[]);
        assert_eq!(words(&mut outbox), chunks(5), "pixels that are elsewhere");
    }

    #[test]
    fn a_reference_that_does_not_arrive_is_sent_by_the_network_and_so_is_what_follows() {
        let (mut outbox, mut incoming) = (SendQueue::default(), Reassembly::new(64 << 20, Pool::new(1)));
        let sent = frame(&[9, CHUNK]);
        let mut arrived = Vec::new();
        let mut arrive = |outbox: &mut SendQueue| {
            while let Some(put) = outbox.next(CHUNK) {
                let len = put.payload.iter().map(Bytes::len).sum();
                if let Packet::Frame { .. } | Packet::Chunk { .. } = put.word {
                    arrived.extend(
                        incoming.take(put.word, len, put.payload.iter().map(|part| &part[..])).unwrap(),
                    );
                }
            }
            outbox.taken(outbox.put);
        };
        for lost in 1..=MAX_LOST {
            outbox.push(sent.clone(), vec![7]);
            arrive(&mut outbox);
            outbox.probed(7, true);
            outbox.push(sent.clone(), vec![7]);
            let number = u64::from(lost) * 2;
            assert_eq!(words(&mut outbox), [Packet::Reference { number }]);
            assert!(!outbox.give_up(number - 1) && outbox.give_up(number));
            assert!(!outbox.mapped(number), "it is too late");
            arrive(&mut outbox);
        }
        assert_eq!(outbox.path(), Path::GivenUp);
        outbox.push(sent.clone(), vec![7]);
        arrive(&mut outbox);
        assert_eq!(arrived, vec![sent; 7]);
    }
}
