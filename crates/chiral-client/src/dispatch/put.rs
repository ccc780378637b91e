//! How actions are put into the queue: the options of `put_chunk`.

use std::time::Duration;

use chiral_proto::{Observation, Timestamp};

/// What `put_chunk` does with the rows that are still queued.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum PutMode {
    /// Keeps them; the new rows follow.
    #[default]
    Append,
    /// Drops them; the new rows are next.
    Replace,
}

/// How the rows of a chunk are queued: `PutMode::Replace`, or more:
///
/// ```
/// use std::time::Duration;
/// use chiral_client::{Observation, PutMode, PutOptions};
///
/// # let obs = Observation::default();
/// # let captured_at = chiral_client::Timestamp(0);
/// let options = PutOptions::new(PutMode::Append)
///     .predicted_from(&obs)
///     .start_at(captured_at + Duration::from_millis(100))
///     .valid_for(Duration::from_millis(80));
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PutOptions {
    /// What becomes of the rows that are still queued.
    pub mode: PutMode,
    /// The observation that the chunk was predicted from; `None` for the newest one that this client or a
    /// clone of it was given.
    pub from: Option<ObservationRef>,
    /// When the first row is sent, on the clock of `captured_at`; `None` for as soon as its turn comes.
    pub start_at: Option<Timestamp>,
    /// How long after it was sent each row may be carried out, beyond the usual transit; `None` or zero for
    /// the server's own limit alone.
    pub valid_for: Option<Duration>,
}

impl PutOptions {
    /// Only a mode.
    pub fn new(mode: PutMode) -> PutOptions {
        PutOptions { mode, ..PutOptions::default() }
    }

    /// The chunk was predicted from this observation. Needed where threads share a client: otherwise a chunk
    /// counts as chosen from the newest observation that any of them was given. Rows from an observation of
    /// an older episode are dropped.
    #[must_use]
    pub fn predicted_from(mut self, obs: &Observation) -> PutOptions {
        self.from = Some(obs.into());
        self
    }

    /// Row i is sent at the first tick of dispatch at or after `start_at` + i periods of dispatch, in place of
    /// an older row that would be sent then. Rows whose tick has passed are dropped and counted; if that is
    /// all of them, nothing else changes. With [`PutMode::Append`] the other queued rows stay, with
    /// [`PutMode::Replace`] they are dropped.
    ///
    /// The time is on the clock of the robot's host, such as `camera.captured_at` plus a duration, never
    /// `obs.timestamp`. Rows that are put without a time behind such rows follow the last of them. If dispatch
    /// is stopped, or its rate changed, rows with a time are dropped and counted.
    #[must_use]
    pub fn start_at(mut self, start_at: Timestamp) -> PutOptions {
        self.start_at = Some(start_at);
        self
    }

    /// The robot carries each row out within this time after it was sent, beyond the usual transit, or not at
    /// all.
    #[must_use]
    pub fn valid_for(mut self, valid_for: Duration) -> PutOptions {
        self.valid_for = Some(valid_for);
        self
    }
}

impl From<PutMode> for PutOptions {
    fn from(mode: PutMode) -> PutOptions {
        PutOptions::new(mode)
    }
}

/// Names an observation, without keeping its images.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub struct ObservationRef {
    /// The session it was sent in; 0 if unknown.
    pub session: u64,
    /// Its episode.
    pub episode: u64,
    /// Its sequence number; 0 if unknown.
    pub seq: u64,
    /// The oldest capture time of its cameras or, without cameras, its proprioception, on the clock of the
    /// robot's host.
    pub captured_at: Option<Timestamp>,
}

impl From<&Observation> for ObservationRef {
    fn from(obs: &Observation) -> ObservationRef {
        let cameras = obs.cameras.iter().map(|camera| camera.captured_at);
        let proprios = obs.proprios.iter().map(|proprio| proprio.captured_at);
        let captured_at = cameras.min().or(proprios.min());
        ObservationRef { session: obs.session, episode: obs.episode, seq: obs.seq, captured_at }
    }
}
