//! How actions are put into the queue, and which observation they come from.

use chiral_proto::{Observation, Timestamp};

/// What `put_chunk` does with the rows that are still queued.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PutMode {
    /// Keeps them; the new rows follow.
    #[default]
    Append,
    /// Drops them; the new rows are next.
    Replace,
}

/// The observation that an action was chosen from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ObservationRef {
    pub(crate) episode: u64,
    /// Its sequence number; 0 before the first.
    pub(crate) seq: u64,
    /// The oldest capture time in it, on the clock of the robot's host.
    pub(crate) captured_at: Option<Timestamp>,
}

impl From<&Observation> for ObservationRef {
    fn from(obs: &Observation) -> ObservationRef {
        let cameras = obs.cameras.iter().map(|camera| camera.captured_at);
        let proprios = obs.proprios.iter().map(|proprio| proprio.captured_at);
        let captured_at = cameras.min().or(proprios.min());
        ObservationRef { episode: obs.episode, seq: obs.seq, captured_at }
    }
}
