//! Emulates the observation stream, which this wire does not have, by requesting observations one by one.
//! Pure: `now` is passed in.

use std::{sync::Arc, time::Duration};

use chiral_proto::{
    Observation, Timestamp,
    clock::{Rate, Ticker},
};

/// The stream that the caller started, if one runs. Each start has a number of its own, so that what comes of
/// an earlier one is recognized.
#[derive(Debug, Default)]
pub(crate) struct PolledStream {
    running: Option<Running>,
    starts: u64,
}

#[derive(Debug)]
struct Running {
    number: u64,
    ticker: Ticker,
    /// Only these; none means all.
    cameras: Vec<String>,
    depth: bool,
}

impl PolledStream {
    pub(crate) fn start(&mut self, rate: Rate, cameras: Vec<String>, depth: bool, now: Timestamp) {
        self.starts += 1;
        self.running = Some(Running { number: self.starts, ticker: Ticker::new(rate, now), cameras, depth });
    }

    pub(crate) fn stop(&mut self) {
        self.running = None;
    }

    /// The number of the stream that runs, and when its next observation is due.
    pub(crate) fn due_in(&self, now: Timestamp) -> Option<(u64, Duration)> {
        self.running.as_ref().map(|running| (running.number, running.ticker.due_in(now)))
    }

    /// An observation is about to be requested. Ticks that passed while other requests were in progress are
    /// skipped. Returns whether this stream still runs.
    pub(crate) fn take_tick(&mut self, number: u64, now: Timestamp) -> bool {
        match self.get(number) {
            Some(running) => {
                running.ticker.skip_due(now);
                true
            }
            None => false,
        }
    }

    /// What the caller wants of an observation; `None` if this stream does not run any more.
    pub(crate) fn select(&mut self, number: u64, observation: Arc<Observation>) -> Option<Arc<Observation>> {
        let Running { cameras, depth, .. } = self.get(number)?;
        if cameras.is_empty() && *depth {
            return Some(observation);
        }
        let mut selected = Observation::clone(&observation);
        let is_wanted = |name: &str| cameras.is_empty() || cameras.iter().any(|wanted| wanted == name);
        selected.cameras.retain(|camera| is_wanted(&camera.name));
        if !*depth {
            selected.cameras.iter_mut().for_each(|camera| *camera = Arc::new(camera.without_depth()));
        }
        Some(Arc::new(selected))
    }

    /// Ends this stream, if it still runs; whether it did.
    pub(crate) fn fail(&mut self, number: u64) -> bool {
        self.running.take_if(|running| running.number == number).is_some()
    }

    fn get(&mut self, number: u64) -> Option<&mut Running> {
        self.running.as_mut().filter(|running| running.number == number)
    }
}
