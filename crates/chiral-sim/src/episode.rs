//! Episodes: runs the policy against a robot, over an observation stream or in lock-step, and measures them.
//!
//! The decisions are in `policy`, the printed reports in the command line.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use chiral_client::{ActionChunk, Codec, Error, Observation, PutMode, Value, ValueMap};
use nalgebra::Point3;

use crate::any_client::AnyClient;
use crate::policy::{EXECUTION_HORIZON, Policy};

/// A stream without an observation for this long counts as broken. Longer than the idle timeout, which tells a
/// lost robot from a camera that is off.
const OBSERVATION_TIMEOUT: Duration = Duration::from_secs(15);
/// The rate for a robot that neither declares one nor has one in its metadata, rows per second.
const DEFAULT_HZ: f64 = 20.0;

/// How policy and robot are coupled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coupling {
    /// Observations stream in and actions stream out, in real time.
    Stream,
    /// The policy calls `step`, and the robot waits for it.
    Step,
}

/// The result of an episode.
#[derive(Clone, Debug)]
pub struct Episode {
    /// The seed of its reset.
    pub seed: u64,
    /// Whether the robot reported success.
    pub success: bool,
    /// The number of rows sent.
    pub steps: u64,
    /// The sum of the rewards.
    pub reward: f64,
    /// Wall-clock time from the reset to the end, s.
    pub seconds: f64,
    /// The age of each observation when the policy received it, ms; in [`Coupling::Stream`].
    pub ages_ms: Vec<f64>,
    /// The duration of each `step` call, ms; in [`Coupling::Step`].
    pub steps_ms: Vec<f64>,
    /// Observations received per second; in [`Coupling::Stream`].
    pub obs_hz: Option<f64>,
    /// The first observation and the target that the policy found in it.
    pub first: Snapshot,
    /// The last observation and its target.
    pub last: Snapshot,
}

impl Episode {
    /// Drops the observations, which hold memory. For keeping many episodes.
    #[must_use]
    pub fn without_pictures(self) -> Episode {
        Episode { first: Snapshot::default(), last: Snapshot::default(), ..self }
    }
}

/// An observation and the target that the policy found in it.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// The observation as received.
    pub obs: Arc<Observation>,
    /// Where the policy believes the target to be, m.
    pub target: Option<Point3<f64>>,
}

/// Runs episodes over one client.
#[derive(Debug)]
pub struct Runner<'a> {
    client: &'a AnyClient,
    coupling: Coupling,
    /// Rows that the robot executes per second.
    control_hz: f64,
    /// An episode that takes longer is aborted.
    timeout: Duration,
    interrupted: &'a AtomicBool,
}

impl<'a> Runner<'a> {
    /// Prepares the client. With [`Coupling::Stream`] this starts the observation stream at `hz` and dispatch
    /// at the robot's rate. Once `interrupted` is set, the current episode ends early without success.
    ///
    /// # Errors
    /// Those of the client.
    pub async fn start(
        client: &'a AnyClient,
        coupling: Coupling,
        hz: f64,
        interrupted: &'a AtomicBool,
    ) -> Result<Runner<'a>, Error> {
        let mut control_hz = client.robot().action_spec.control_hz;
        if control_hz == 0.0 {
            // The robot declares none.
            control_hz =
                client.get_metadata().await?.get("control_hz").and_then(Value::as_f64).unwrap_or(DEFAULT_HZ);
        }
        if client.codec() == Codec::Msgpack {
            // Legacy servers may not observe before their first reset.
            client.reset_with(None, ValueMap::new()).await?;
        }
        if coupling == Coupling::Stream {
            client.start_obs_stream(hz).await?;
            client.start_action_dispatch(control_hz)?;
        }
        Ok(Runner { client, coupling, control_hz, timeout: Duration::from_secs(30), interrupted })
    }

    /// Plays one episode.
    ///
    /// # Errors
    /// Those of the client. A target that is not reached is not an error.
    pub async fn play(&self, seed: u64) -> Result<Episode, Error> {
        let started = Instant::now();
        // The legacy wire has no seeds.
        let sent_seed = (self.client.codec() != Codec::Msgpack).then_some(seed);
        let (obs, _info) = self.client.reset_with(sent_seed, ValueMap::new()).await?;
        let mut episode = Episode {
            seed,
            success: false,
            steps: 0,
            reward: 0.0,
            seconds: 0.0,
            ages_ms: Vec::new(),
            steps_ms: Vec::new(),
            obs_hz: None,
            first: Snapshot::default(),
            last: Snapshot { obs, target: None },
        };
        let (mut policy, mut progress) = (Policy::new(self.control_hz), Progress::default());
        let (before, loop_started) = (self.client.stats(), Instant::now());
        loop {
            let plan = policy.plan(&episode.last.obs);
            episode.last.target = plan.target;
            if episode.first.obs.cameras.is_empty() {
                episode.first = episode.last.clone();
            }
            if progress.has_ended
                || started.elapsed() > self.timeout
                || self.interrupted.load(Ordering::Relaxed)
            {
                break;
            }
            let obs = match self.coupling {
                Coupling::Stream => self.stream_once(plan.chunk, &mut episode).await?,
                Coupling::Step => self.step_once(&plan.chunk, &mut episode, &mut progress).await?,
            };
            progress.update(&obs);
            episode.last.obs = obs;
        }
        let after = self.client.stats();
        (episode.success, episode.reward) = (progress.success, progress.reward);
        episode.seconds = started.elapsed().as_secs_f64();
        if self.coupling == Coupling::Stream {
            episode.steps = after.actions_sent - before.actions_sent;
            episode.obs_hz = Some(
                (after.observations - before.observations) as f64 / loop_started.elapsed().as_secs_f64(),
            );
        }
        Ok(episode)
    }

    /// Replaces the queued rows by the new plan; returns the next observation.
    async fn stream_once(
        &self,
        chunk: ActionChunk,
        episode: &mut Episode,
    ) -> Result<Arc<Observation>, Error> {
        self.client.put_chunk(chunk, PutMode::Replace).await?;
        let obs = self.client.next_obs(OBSERVATION_TIMEOUT).await?;
        episode.ages_ms.extend(age_ms(self.client, &obs));
        Ok(obs)
    }

    /// Executes the first rows of the plan; returns the observation after them.
    async fn step_once(
        &self,
        chunk: &ActionChunk,
        episode: &mut Episode,
        progress: &mut Progress,
    ) -> Result<Arc<Observation>, Error> {
        let rows = chunk.rows().min(EXECUTION_HORIZON);
        let chunk = ActionChunk::new(chunk.dimension(), chunk.values()[..rows * chunk.dimension()].to_vec())?;
        let called = Instant::now();
        let result = self.client.step(chunk).await?;
        episode.steps_ms.push(called.elapsed().as_secs_f64() * 1e3);
        episode.steps += rows as u64;
        progress.reward += result.reward;
        progress.has_ended |= result.terminated || result.truncated;
        progress.success |= flag(&result.info, "success");
        Ok(result.obs)
    }
}

/// The state of an episode as the robot reports it: in every observation's `extra` or, for some robots, only
/// in the results of steps.
#[derive(Debug, Default)]
struct Progress {
    has_ended: bool,
    success: bool,
    reward: f64,
}

impl Progress {
    fn update(&mut self, obs: &Observation) {
        self.has_ended |= flag(&obs.extra, "terminated") || flag(&obs.extra, "truncated");
        self.success |= flag(&obs.extra, "success");
        self.reward = obs.extra.get("reward").and_then(Value::as_f64).unwrap_or(self.reward);
    }
}

fn flag(values: &ValueMap, name: &str) -> bool {
    values.get(name).and_then(Value::as_bool).unwrap_or(false)
}

/// The age of the oldest image of an observation now, ms; `None` until the two clocks have been compared.
pub fn age_ms(client: &AnyClient, obs: &Observation) -> Option<f64> {
    let captured_at = obs.cameras.iter().map(|camera| camera.captured_at).min()?;
    client.age(captured_at).map(|age| age.as_secs_f64() * 1e3)
}

/// The given percentile of `values`; `None` if there are none.
pub fn percentile(values: &[f64], percent: usize) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    sorted.get((sorted.len() * percent / 100).min(sorted.len().saturating_sub(1))).copied()
}
