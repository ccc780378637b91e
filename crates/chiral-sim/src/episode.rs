//! Episodes: the policy drives, the evaluator counts.
//!
//! Lives here: the two loops, over an observation stream and in step, and what is measured in them. Does not
//! live here: what is decided (`policy`), and how it is told (`main`).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use chiral_client::{ActionChunk, Codec, Error, Observation, PutMode, Value, ValueMap};
use nalgebra::Point3;

use crate::any_client::AnyClient;
use crate::policy::{EXECUTION_HORIZON, Policy};

/// After this long without an observation the stream counts as broken.
const PATIENCE: Duration = Duration::from_secs(5);
/// Rows a second for a robot that declares no rate, nor has one in its metadata.
const USUAL_HZ: f64 = 20.0;

/// How policy and robot are coupled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coupling {
    /// Observations stream in and actions stream out, in real time.
    Stream,
    /// `step` by `step`: the robot waits for the policy.
    Step,
}

/// What an episode was like.
#[derive(Clone, Debug)]
pub struct Episode {
    /// Its seed.
    pub seed: u64,
    /// Whether the robot said that the target was held.
    pub success: bool,
    /// Rows sent.
    pub steps: u64,
    /// Summed over the episode.
    pub reward: f64,
    /// From the reset to the end, on the wall's clock.
    pub seconds: f64,
    /// How old each observation was when the policy had it, ms; in [`Coupling::Stream`].
    pub ages_ms: Vec<f64>,
    /// From the call of each `step` to its result, ms; in [`Coupling::Step`].
    pub steps_ms: Vec<f64>,
    /// Observations that arrived a second; in [`Coupling::Stream`].
    pub obs_hz: Option<f64>,
    /// The first observation and where the policy believed the target to be.
    pub first: Snapshot,
    /// The last one.
    pub last: Snapshot,
}

impl Episode {
    /// Without its observations, which hold memory: for keeping many.
    #[must_use]
    pub fn without_pictures(self) -> Episode {
        Episode { first: Snapshot::default(), last: Snapshot::default(), ..self }
    }
}

/// What the policy saw and what it made of it.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// As it came over the wire.
    pub obs: Arc<Observation>,
    /// Where the target is, in the policy's belief; m.
    pub target: Option<Point3<f64>>,
}

/// Runs episodes over one client.
#[derive(Debug)]
pub struct Runner<'a> {
    client: &'a AnyClient,
    coupling: Coupling,
    /// Rows that the robot runs a second.
    control_hz: f64,
    /// An episode that takes longer is given up.
    limit: Duration,
    interrupted: &'a AtomicBool,
}

impl<'a> Runner<'a> {
    /// Begins: with [`Coupling::Stream`] starts the observation stream at `hz` and the dispatch at the
    /// robot's own rate. Once `interrupted` is set, the episode ends early, unsuccessful.
    ///
    /// # Errors
    /// The client's.
    pub async fn start(
        client: &'a AnyClient,
        coupling: Coupling,
        hz: f64,
        interrupted: &'a AtomicBool,
    ) -> Result<Runner<'a>, Error> {
        let mut control_hz = client.robot().action_spec.control_hz;
        if client.codec() == Codec::Msgpack {
            // Legacy servers declare nothing, and may not observe before their first reset.
            control_hz =
                client.get_metadata().await?.get("control_hz").and_then(Value::as_f64).unwrap_or(USUAL_HZ);
            client.reset_with(None, ValueMap::new()).await?;
        }
        if coupling == Coupling::Stream {
            client.start_obs_stream(hz).await?;
            client.start_action_dispatch(control_hz)?;
        }
        Ok(Runner { client, coupling, control_hz, limit: Duration::from_secs(30), interrupted })
    }

    /// Plays one episode.
    ///
    /// # Errors
    /// The client's. That the target was not reached is none.
    pub async fn play(&self, seed: u64) -> Result<Episode, Error> {
        let began = Instant::now();
        // The wire of legacy servers has no seeds.
        let said = (self.client.codec() != Codec::Msgpack).then_some(seed);
        let (obs, _info) = self.client.reset_with(said, ValueMap::new()).await?;
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
        let (mut policy, mut standing) = (Policy::new(self.control_hz), Standing::default());
        let (before, driving) = (self.client.stats(), Instant::now());
        loop {
            let plan = policy.plan(&episode.last.obs);
            episode.last.target = plan.target;
            if episode.first.obs.cameras.is_empty() {
                episode.first = episode.last.clone();
            }
            if standing.has_ended || began.elapsed() > self.limit || self.interrupted.load(Ordering::Relaxed)
            {
                break;
            }
            let obs = match self.coupling {
                Coupling::Stream => self.stream_on(plan.chunk, &mut episode).await?,
                Coupling::Step => self.step_on(&plan.chunk, &mut episode, &mut standing).await?,
            };
            standing.look_at(&obs);
            episode.last.obs = obs;
        }
        let after = self.client.stats();
        (episode.success, episode.reward) = (standing.success, standing.reward);
        episode.seconds = began.elapsed().as_secs_f64();
        if self.coupling == Coupling::Stream {
            episode.steps = after.actions_sent - before.actions_sent;
            episode.obs_hz =
                Some((after.observations - before.observations) as f64 / driving.elapsed().as_secs_f64());
        }
        Ok(episode)
    }

    /// Replaces what is queued by the new plan, and sees what comes of it.
    async fn stream_on(&self, chunk: ActionChunk, episode: &mut Episode) -> Result<Arc<Observation>, Error> {
        self.client.put_chunk(chunk, PutMode::Replace).await?;
        let obs = self.client.next_obs(PATIENCE).await?;
        episode.ages_ms.extend(age_ms(self.client, &obs));
        Ok(obs)
    }

    /// Has the first rows of the plan carried out.
    async fn step_on(
        &self,
        chunk: &ActionChunk,
        episode: &mut Episode,
        standing: &mut Standing,
    ) -> Result<Arc<Observation>, Error> {
        let rows = chunk.rows().min(EXECUTION_HORIZON);
        let chunk = ActionChunk::new(chunk.dimension(), chunk.values()[..rows * chunk.dimension()].to_vec())?;
        let asked = Instant::now();
        let result = self.client.step(chunk).await?;
        episode.steps_ms.push(asked.elapsed().as_secs_f64() * 1e3);
        episode.steps += rows as u64;
        standing.reward += result.reward;
        standing.has_ended |= result.terminated || result.truncated;
        standing.success |= says(&result.info, "success");
        Ok(result.obs)
    }
}

/// What the robot says of an episode: in every observation's `extra`, or, as some do, in the results of steps
/// only.
#[derive(Debug, Default)]
struct Standing {
    has_ended: bool,
    success: bool,
    reward: f64,
}

impl Standing {
    fn look_at(&mut self, obs: &Observation) {
        self.has_ended |= says(&obs.extra, "terminated") || says(&obs.extra, "truncated");
        self.success |= says(&obs.extra, "success");
        self.reward = obs.extra.get("reward").and_then(Value::as_f64).unwrap_or(self.reward);
    }
}

fn says(words: &ValueMap, name: &str) -> bool {
    words.get(name).and_then(Value::as_bool).unwrap_or(false)
}

/// How old the oldest picture of an observation is now, ms; `None` until the two clocks have been compared.
pub fn age_ms(client: &AnyClient, obs: &Observation) -> Option<f64> {
    let captured_at = obs.cameras.iter().map(|camera| camera.captured_at).min()?;
    client.age(captured_at).map(|age| age.as_secs_f64() * 1e3)
}

/// The value that `percent` of 100 stay under; `None` of nothing.
pub fn percentile(values: &[f64], percent: usize) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    sorted.get((sorted.len() * percent / 100).min(sorted.len().saturating_sub(1))).copied()
}
