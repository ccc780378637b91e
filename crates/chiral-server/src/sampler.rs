//! Takes observations from their source, numbers them and labels them with their episode.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use chiral_proto::{Code, Fault, Observation, Timestamp};

use crate::{
    error::panic_text,
    sensors::{ObservationSource, Sensors},
};

pub(crate) struct Sampler {
    source: Source,
    timeout: Duration,
    episode: AtomicU64,
    seq: AtomicU64,
    /// Whether every sensor has published once.
    is_complete: AtomicBool,
}

/// Where observations come from: a snapshot of the sensors never waits, the host's own source may.
pub(crate) enum Source {
    Sensors(Sensors),
    Custom(Arc<dyn ObservationSource>),
}

impl Sampler {
    pub(crate) fn new(source: Source, timeout: Duration) -> Sampler {
        Sampler {
            source,
            timeout,
            episode: AtomicU64::new(0),
            seq: AtomicU64::new(0),
            is_complete: AtomicBool::new(false),
        }
    }

    pub(crate) fn episode(&self) -> u64 {
        self.episode.load(Ordering::Acquire)
    }

    /// Observations taken from now on belong to this episode.
    pub(crate) fn set_episode(&self, episode: u64) {
        self.episode.store(episode, Ordering::Release);
    }

    /// Returns the newest observation. Blocks until every sensor has published, and, with `after`, published
    /// something captured later than that.
    pub(crate) fn observe_blocking(&self, after: Option<Timestamp>) -> Result<Observation, Fault> {
        // Read before the observation is taken, which is then at least as new as its label.
        let episode = self.episode();
        let source: &dyn ObservationSource = match &self.source {
            Source::Sensors(sensors) => sensors,
            Source::Custom(source) => &**source,
        };
        let observed = catch_unwind(AssertUnwindSafe(|| source.observe(after, self.timeout)));
        let observation = observed.map_err(|panic| {
            Fault::new(Code::RobotFailed, format!("the observation source panicked: {}", panic_text(&*panic)))
        })??;
        Ok(self.label(observation, episode))
    }

    /// Whether an observation can be taken without waiting. Once true for sensors, it stays true and is not
    /// checked again.
    pub(crate) fn is_ready(&self) -> bool {
        let Source::Sensors(sensors) = &self.source else { return false };
        if !self.is_complete.load(Ordering::Relaxed) {
            self.is_complete.store(sensors.snapshot().is_some(), Ordering::Relaxed);
        }
        self.is_complete.load(Ordering::Relaxed)
    }

    /// Returns the newest observation. If it has to wait, it does so on a thread that may block.
    pub(crate) async fn observe(self: &Arc<Sampler>) -> Result<Observation, Fault> {
        let episode = self.episode();
        if let Source::Sensors(sensors) = &self.source
            && let Some(observation) = sensors.snapshot()
        {
            return Ok(self.label(observation, episode));
        }
        let sampler = Arc::clone(self);
        let observed = tokio::task::spawn_blocking(move || sampler.observe_blocking(None)).await;
        observed.unwrap_or_else(|_| Err(Fault::new(Code::ShuttingDown, "the server is shutting down")))
    }

    /// Numbers an observation of this episode.
    pub(crate) fn label(&self, observation: Observation, episode: u64) -> Observation {
        Observation { episode, seq: self.seq.fetch_add(1, Ordering::Relaxed) + 1, ..observation }
    }
}
