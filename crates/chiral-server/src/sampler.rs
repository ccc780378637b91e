//! Takes observations from their source, checks, numbers and labels them with their episode.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use chiral_proto::{Clock, Code, Fault, Observation, Timestamp};

use crate::{
    error::panic_text,
    sensors::Sensors,
    source::{Declaration, ObservationSource},
    staleness::OnStale,
};

pub(crate) struct Sampler {
    source: Source,
    options: SamplerOptions,
    clock: Clock,
    declaration: Declaration,
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

/// The options of a sampler.
#[derive(Clone, Debug)]
pub(crate) struct SamplerOptions {
    /// How long an observation waits for a late sensor.
    pub(crate) timeout: Duration,
    pub(crate) on_stale: OnStale,
}

impl Sampler {
    pub(crate) fn new(
        source: Source,
        declaration: Declaration,
        options: SamplerOptions,
        clock: Clock,
    ) -> Sampler {
        Sampler {
            source,
            options,
            clock,
            declaration,
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
    /// something newer than that.
    pub(crate) fn observe_blocking(&self, after: Option<Timestamp>) -> Result<Observation, Fault> {
        self.wait(after, &[])
    }

    /// Returns an observation that the robot itself has made, if it is as declared.
    pub(crate) fn checked(&self, observation: Observation) -> Result<Observation, Fault> {
        self.declaration.check("the robot", &observation)?;
        Ok(observation)
    }

    /// Whether an observation with these cameras, none meaning all, can be taken without waiting.
    pub(crate) fn is_ready(&self, cameras: &[String]) -> bool {
        let Source::Sensors(sensors) = &self.source else { return false };
        // What has been published stays, so that the slots are looked at only in the beginning.
        if self.is_complete.load(Ordering::Relaxed) {
            return true;
        }
        let is_ready = sensors.have_published(cameras);
        if is_ready && cameras.is_empty() {
            self.is_complete.store(true, Ordering::Relaxed);
        }
        is_ready
    }

    /// Returns the newest observation with at least these cameras, none meaning all. If it has to wait for
    /// them, it does so on a thread that may block. Fails where one of them is stale and the options say so.
    pub(crate) async fn observe(self: &Arc<Sampler>, cameras: &[String]) -> Result<Observation, Fault> {
        let episode = self.episode();
        let observation = match &self.source {
            Source::Sensors(sensors) if let Some(observation) = sensors.snapshot_of(cameras) => {
                self.label(observation, episode)
            }
            _ => {
                let (sampler, cameras) = (Arc::clone(self), cameras.to_vec());
                let observed = tokio::task::spawn_blocking(move || sampler.wait(None, &cameras)).await;
                observed.map_err(|_| Fault::new(Code::ShuttingDown, "the server is shutting down"))??
            }
        };
        match self.options.on_stale {
            OnStale::Mark => {}
            OnStale::Fail => self.check_stale(&observation, cameras)?,
        }
        Ok(observation)
    }

    fn wait(&self, after: Option<Timestamp>, cameras: &[String]) -> Result<Observation, Fault> {
        // Read before the observation is taken, which is then at least as new as its label.
        let (episode, timeout) = (self.episode(), self.options.timeout);
        let observation = match &self.source {
            Source::Sensors(sensors) => sensors.wait(after, cameras, timeout)?,
            Source::Custom(source) => {
                let observed = catch_unwind(AssertUnwindSafe(|| source.observe(after, timeout)));
                let observation = observed.map_err(|panic| {
                    let text = format!("the observation source panicked: {}", panic_text(&*panic));
                    Fault::new(Code::RobotFailed, text)
                })??;
                self.declaration.check("the observation source", &observation)?;
                observation
            }
        };
        Ok(self.label(observation, episode))
    }

    fn check_stale(&self, observation: &Observation, cameras: &[String]) -> Result<(), Fault> {
        let is_wanted = |name: &str| cameras.is_empty() || cameras.iter().any(|wanted| wanted == name);
        let stale = observation.cameras.iter().find(|camera| camera.is_stale && is_wanted(&camera.name));
        let Some(camera) = stale else { return Ok(()) };
        let age = self.clock.now().since(camera.captured_at).as_secs_f64();
        let sensor = format!("camera {}", camera.name);
        let text =
            format!("{sensor}: expected an image within its max_age, found one captured {age:.3} s ago");
        Err(Fault::new(Code::SensorTimeout, text).field(sensor).retryable())
    }

    /// Numbers an observation of this episode.
    pub(crate) fn label(&self, observation: Observation, episode: u64) -> Observation {
        Observation { episode, seq: self.seq.fetch_add(1, Ordering::Relaxed) + 1, ..observation }
    }
}
