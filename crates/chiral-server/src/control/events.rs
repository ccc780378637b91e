//! What happens on the control side of a server, for whoever subscribes: metrics, a recorder, a host's log.
//!
//! Events are handed over in memory and never waited for: a subscriber that is too slow loses the oldest ones
//! and is told how many, and the robot notices nothing of it.

use std::{fmt, sync::Arc, time::Duration};

use chiral_proto::{Fault, Timestamp};
use tokio::sync::broadcast::{self, error::RecvError};

/// Something that happened to the robot's controller, its actions or its episode. Times are the server's
/// clock.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum ControlEvent {
    /// A session became the robot's controller.
    SessionBegan {
        /// When.
        at: Timestamp,
        /// The session's id.
        session: u64,
        /// The client's name, for people.
        name: String,
    },
    /// The controller's session ended. A [`ControlEvent::Held`] follows.
    SessionEnded {
        /// When.
        at: Timestamp,
        /// The session's id.
        session: u64,
        /// Why.
        why: String,
    },
    /// Nothing has arrived from the controller's host for two seconds.
    Silent {
        /// When it was noticed.
        at: Timestamp,
        /// The session's id.
        session: u64,
    },
    /// A reset was accepted. It ends the episode.
    ResetBegan {
        /// When.
        at: Timestamp,
        /// The session that requested it.
        session: u64,
        /// The episode that ends.
        episode: u64,
    },
    /// A reset has its reply, also if the robot failed at it. It begins an episode.
    EpisodeBegan {
        /// When.
        at: Timestamp,
        /// The new episode.
        episode: u64,
    },
    /// An action was accepted: its rows will be applied, unless something overtakes them.
    Admitted {
        /// When it arrived.
        at: Timestamp,
        /// Which action it is.
        action: ActionId,
        /// The number of rows.
        rows: usize,
        /// How much longer it was in transit than the quickest message of the session; `None` if the client
        /// does not say when it was sent.
        lateness: Option<Duration>,
    },
    /// An action or a step was refused, or an action was dropped or cut short by a hold, a reset or the end of
    /// its session.
    Refused {
        /// When.
        at: Timestamp,
        /// Which action it is.
        action: ActionId,
        /// Why.
        fault: Fault,
    },
    /// Rows were dropped since they were late.
    Late {
        /// When.
        at: Timestamp,
        /// The session that sent them.
        session: u64,
        /// The number of rows.
        rows: u64,
    },
    /// Rows were dropped since newer ones overtook them.
    Superseded {
        /// When.
        at: Timestamp,
        /// The session that sent them.
        session: u64,
        /// The number of rows.
        rows: u64,
    },
    /// The robot applied rows: one, or a chunk that it executes by itself.
    Applied {
        /// When the robot was called.
        at: Timestamp,
        /// When it returned.
        finished_at: Timestamp,
        /// Which action they belong to.
        action: ActionId,
        /// The number of rows.
        rows: usize,
        /// The values, row after row.
        values: Arc<[f32]>,
    },
    /// The robot's own code failed at an action.
    Failed {
        /// When it returned.
        at: Timestamp,
        /// Which action it is.
        action: ActionId,
        /// Why.
        fault: Fault,
    },
    /// The robot was made to hold.
    Held {
        /// When it was called.
        at: Timestamp,
        /// Why.
        reason: HoldReason,
    },
}

/// Names an action in events.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ActionId {
    /// The session that sent it.
    pub session: u64,
    /// The episode it was chosen in.
    pub episode: u64,
    /// The client's number of it; 0 in a step and on the legacy wire.
    pub seq: u64,
    /// `seq` of the observation that the policy used; 0 if unknown.
    pub observation_seq: u64,
    /// The oldest capture time in that observation; `None` if unknown.
    pub observed_at: Option<Timestamp>,
}

/// Why the robot holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum HoldReason {
    /// No action has been applied for the command timeout.
    CommandTimeout,
    /// Nothing has arrived from the controller's host for two seconds.
    Silence,
    /// The controller's session has ended.
    ControllerLost,
    /// The robot's own code has panicked, which takes it out of service.
    Panicked,
    /// The server shuts down.
    ShuttingDown,
}

impl fmt::Display for HoldReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            HoldReason::CommandTimeout => "no action was applied for the command timeout",
            HoldReason::Silence => "nothing arrives from the controller",
            HoldReason::ControllerLost => "the controller's session has ended",
            HoldReason::Panicked => "its own code has panicked",
            HoldReason::ShuttingDown => "the server shuts down",
        })
    }
}

/// Receives a server's [`ControlEvent`]s, from the moment of subscribing.
#[derive(Debug)]
pub struct ControlEvents {
    receiver: broadcast::Receiver<ControlEvent>,
}

/// What a subscriber receives next.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum NextEvent {
    /// An event.
    Event(ControlEvent),
    /// This many events were lost, since the subscriber was too slow.
    Lost(u64),
}

impl ControlEvents {
    /// How many events a subscriber may lag behind before it loses any.
    pub const CAPACITY: usize = 1024;

    /// Waits for the next event. `None` after the server is gone.
    pub async fn next(&mut self) -> Option<NextEvent> {
        next_event(self.receiver.recv().await)
    }

    /// The same as [`ControlEvents::next`], for code without a runtime; blocks.
    pub fn next_blocking(&mut self) -> Option<NextEvent> {
        next_event(self.receiver.blocking_recv())
    }
}

fn next_event(received: Result<ControlEvent, RecvError>) -> Option<NextEvent> {
    match received {
        Ok(event) => Some(NextEvent::Event(event)),
        Err(RecvError::Lagged(lost)) => Some(NextEvent::Lost(lost)),
        Err(RecvError::Closed) => None,
    }
}

/// The sending end, which never waits.
#[derive(Debug)]
pub(crate) struct EventTap {
    sender: broadcast::Sender<ControlEvent>,
}

impl EventTap {
    pub(crate) fn new() -> EventTap {
        EventTap { sender: broadcast::Sender::new(ControlEvents::CAPACITY) }
    }

    pub(crate) fn subscribe(&self) -> ControlEvents {
        ControlEvents { receiver: self.sender.subscribe() }
    }

    /// Hands events over to the subscribers, if there are any.
    pub(crate) fn publish(&self, events: Vec<ControlEvent>) {
        for event in events {
            // Fails if nobody subscribes.
            let _ = self.sender.send(event);
        }
    }
}
