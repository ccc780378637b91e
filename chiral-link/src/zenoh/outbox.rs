//! What a lane has to put, and in which order. Pure: no socket, no thread.

use std::collections::VecDeque;

use bytes::Bytes;
use chiral_proto::Frame;

use super::{
    flow::{CHUNK, WINDOW, cost},
    word::Word,
};

/// The sending side of a lane.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    /// The first one is on its way.
    frames: VecDeque<Frame>,
    /// Of the first frame, so many bytes were put.
    offset: usize,
    /// Of the last frame or chunk.
    number: u64,
    put: u64,
    /// What the other side has taken of it.
    taken: u64,
    owes_begin: bool,
    owes_taken: Option<u64>,
    owes_close: bool,
}

/// One put.
#[derive(Debug, PartialEq)]
pub(super) struct Put {
    pub(super) word: Word,
    pub(super) payload: Vec<Bytes>,
    /// Whether a frame is complete with it.
    pub(super) completes: bool,
}

impl Outbox {
    pub(super) fn push(&mut self, frame: Frame) {
        self.frames.push_back(frame);
    }

    /// The other side is to hear that this one is there.
    pub(super) fn begin(&mut self) {
        self.owes_begin = true;
    }

    /// The other side is to hear how much was taken.
    pub(super) fn tell(&mut self, taken: u64) {
        self.owes_taken = Some(taken);
    }

    /// The other side has taken so much. What cannot be is ignored.
    pub(super) fn taken(&mut self, taken: u64) {
        if taken <= self.put {
            self.taken = self.taken.max(taken);
        }
    }

    /// The last word is to be said, after the frames that wait; but a frame that was begun, and given up, is not finished first.
    pub(super) fn close(&mut self) {
        self.owes_close = true;
        if self.offset > 0 {
            self.abandon();
        }
    }

    /// Nobody will take the frames any more.
    pub(super) fn abandon(&mut self) {
        self.frames.clear();
        self.offset = 0;
    }

    /// The next put, if there is one that the window lets through.
    pub(super) fn next(&mut self) -> Option<Put> {
        let bare = |word| Some(Put { word, payload: Vec::new(), completes: false });
        if std::mem::take(&mut self.owes_begin) {
            return bare(Word::Begin);
        }
        if let Some(cost) = self.owes_taken.take() {
            return bare(Word::Taken { cost });
        }
        let Some(frame) = self.frames.front() else {
            return if std::mem::take(&mut self.owes_close) { bare(Word::Close) } else { None };
        };
        let total = frame.len();
        let len = (total - self.offset).min(CHUNK);
        if self.put - self.taken + cost(len) > WINDOW {
            return None;
        }
        self.put += cost(len);
        self.number += 1;
        let word = match len == total {
            true => Word::Frame { number: self.number },
            false => Word::Chunk { number: self.number, offset: self.offset as u64, total: total as u64 },
        };
        let payload = part(frame.segments(), self.offset, len);
        self.offset += len;
        let completes = self.offset == total;
        if completes {
            self.frames.pop_front();
            self.offset = 0;
        }
        Some(Put { word, payload, completes })
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
    use crate::zenoh::flow::Incoming;

    fn frame(lens: &[usize]) -> Frame {
        lens.iter().map(|len| (0..*len).map(|i| (i * 7 + len) as u8).collect::<Vec<_>>().into()).collect::<Vec<Bytes>>().into()
    }

    #[test]
    fn frames_of_any_size_arrive_whole_within_the_window() {
        let mut outbox = Outbox::default();
        let mut incoming = Incoming::new(64 << 20, Pool::new(2));
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
            outbox.push(sent.clone());
            while let Some(put) = outbox.next() {
                let len = put.payload.iter().map(Bytes::len).sum();
                assert!(len <= CHUNK);
                arrived.extend(incoming.take(put.word, len, put.payload.iter().map(|part| &part[..])).unwrap());
                if let Some(taken) = incoming.tell() {
                    outbox.taken(taken);
                }
            }
        }
        assert_eq!(arrived, frames);
    }

    #[test]
    fn nothing_is_put_beyond_the_window_but_what_is_owed() {
        let mut outbox = Outbox::default();
        outbox.push(frame(&[20 * CHUNK]));
        let puts = std::iter::from_fn(|| outbox.next()).count();
        assert_eq!(puts, 8);
        outbox.taken(u64::MAX);
        assert_eq!(outbox.next(), None, "more than was put cannot have been taken");
        outbox.tell(5);
        assert_eq!(outbox.next().map(|put| put.word), Some(Word::Taken { cost: 5 }));
        outbox.taken(cost(CHUNK));
        assert!(matches!(outbox.next().map(|put| put.word), Some(Word::Chunk { number: 9, .. })));
        assert_eq!(outbox.next(), None);
        outbox.close();
        assert_eq!(outbox.next().map(|put| put.word), Some(Word::Close), "a frame that was given up is not finished");
        assert_eq!(outbox.next(), None);
    }

    #[test]
    fn what_waits_is_put_before_the_last_word() {
        let mut outbox = Outbox::default();
        outbox.push(frame(&[3]));
        outbox.close();
        let words: Vec<_> = std::iter::from_fn(|| outbox.next()).map(|put| put.word).collect();
        assert_eq!(words, [Word::Frame { number: 1 }, Word::Close]);
    }
}
