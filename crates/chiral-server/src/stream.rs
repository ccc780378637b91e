//! When the next observation of a stream is due, and what it contains. Pure: `now` is passed in.

use std::{sync::Arc, time::Duration};

use chiral_proto::{Camera, Observation, Timestamp, clock::Ticker, message::Subscribe};

/// One client's observation stream.
#[derive(Debug)]
pub(crate) struct Stream {
    cameras: Arc<[String]>,
    depth: bool,
    ticker: Ticker,
    sent: u64,
    received: u64,
    window: u32,
}

impl Stream {
    pub(crate) fn new(subscribe: Subscribe, now: Timestamp) -> Stream {
        Stream {
            ticker: Ticker::new(subscribe.rate, now),
            sent: 0,
            received: 0,
            window: subscribe.window,
            cameras: subscribe.cameras.into(),
            depth: subscribe.depth,
        }
    }

    /// The cameras that were subscribed to; none means all.
    pub(crate) fn cameras(&self) -> Arc<[String]> {
        Arc::clone(&self.cameras)
    }

    /// Records how many observations the client has received, and how many may be unacknowledged.
    pub(crate) fn set_credit(&mut self, received: u64, window: u32) {
        self.received = self.received.max(received);
        self.window = window;
    }

    /// How long until the next observation is due; `None` while the client's credit is used up.
    pub(crate) fn due_in(&self, now: Timestamp) -> Option<Duration> {
        let has_credit = self.sent.saturating_sub(self.received) < u64::from(self.window);
        has_credit.then(|| self.ticker.due_in(now))
    }

    /// Records that an observation is being sent. Skips the ticks that have passed meanwhile, so that none is
    /// sent in a burst, and returns how many.
    pub(crate) fn advance(&mut self, now: Timestamp) -> u64 {
        self.sent += 1;
        self.ticker.take(now).skipped
    }

    /// Removes the cameras and the depth that were not subscribed to.
    pub(crate) fn select(&self, observation: Observation) -> Observation {
        let wanted = |camera: &Arc<Camera>| {
            self.cameras.is_empty() || self.cameras.iter().any(|name| **name == *camera.name)
        };
        let strip = |camera: Arc<Camera>| match (self.depth, &camera.depth) {
            (false, Some(_)) => Arc::new(camera.without_depth()),
            _ => camera,
        };
        let cameras = observation.cameras.into_iter().filter(wanted).map(strip).collect();
        Observation { cameras, ..observation }
    }
}

#[cfg(test)]
mod tests {
    use chiral_proto::clock::Rate;

    use super::*;

    /// Runs a stream whose observations each take `transfer_ms`, with credit on arrival. Returns the times at
    /// which they were taken, in ms. Every tick is taken or skipped.
    fn check(hz: f64, window: u32, transfer_ms: i64, until_ms: i64) -> Vec<i64> {
        let subscribe = Subscribe { rate: Rate::new(hz).unwrap(), cameras: vec![], depth: true, window };
        let mut stream = Stream::new(subscribe, Timestamp(0));
        let mut taken = Vec::new();
        let mut skipped = 0;
        let mut now = 0;
        while now < until_ms {
            let at = Timestamp(now * 1_000_000);
            match stream.due_in(at) {
                Some(Duration::ZERO) => {
                    skipped += stream.advance(at);
                    taken.push(now);
                    assert_eq!(
                        taken.len() as u64 + skipped,
                        (stream.ticker.deadline().as_secs_f64() * hz).round() as u64
                    );
                    now += transfer_ms;
                    stream.set_credit(taken.len() as u64, window);
                }
                _ => now += 1,
            }
        }
        taken
    }

    #[test]
    fn deadlines_are_absolute_and_missed_ones_skipped() {
        assert_eq!(check(100.0, 1, 1, 1000).len(), 100);
        assert_eq!(check(10.0, 1, 1, 1000), (0..10).map(|k| k * 100).collect::<Vec<_>>());
        assert_eq!(
            check(10.0, 1, 150, 700),
            [0, 150, 300, 450, 600],
            "a link slower than the rate is kept busy, without a backlog"
        );
    }

    #[test]
    fn without_credit_nothing_is_due() {
        let subscribe = Subscribe { rate: Rate::new(10.0).unwrap(), cameras: vec![], depth: true, window: 2 };
        let mut stream = Stream::new(subscribe, Timestamp(0));
        let late = Timestamp(10_000_000_000);
        stream.advance(late);
        stream.advance(late);
        assert_eq!(stream.due_in(late), None);
        stream.set_credit(1, 2);
        assert!(stream.due_in(late).is_some());
    }
}
