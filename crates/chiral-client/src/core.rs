//! A session's state and the notifications for tasks that wait on it, shared by the caller's calls, the
//! connections' loops and the dispatch thread. Nothing here sends or receives.

use std::{
    mem::take,
    sync::{Arc, Mutex, MutexGuard},
};

use chiral_proto::{Clock, Observation, Reply, Timestamp, lock};
use tokio::sync::{Notify, oneshot, watch};

use crate::{
    dispatch::waker::DispatchWaker,
    error::Error,
    state::{State, Stream},
};

/// A session's state, and the notifications for tasks that wait on it.
#[derive(Debug)]
pub(crate) struct Core {
    state: Mutex<State>,
    clock: Clock,
    /// The newest observation of the stream in this episode.
    pub(crate) latest: watch::Sender<Option<Arc<Observation>>>,
    /// Notified when the action queue may have room, or will never have again.
    pub(crate) room: Notify,
    pub(crate) dispatch: DispatchWaker,
    ended: watch::Sender<bool>,
}

impl Core {
    pub(crate) fn new(state: State, clock: Clock) -> Core {
        Core {
            state: Mutex::new(state),
            clock,
            latest: watch::Sender::new(None),
            room: Notify::new(),
            dispatch: DispatchWaker::default(),
            ended: watch::Sender::new(false),
        }
    }

    pub(crate) fn now(&self) -> Timestamp {
        self.clock.now()
    }

    /// Locks the state. Release it before notifying a task: it takes the lock next.
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// An observation of the stream has arrived.
    pub(crate) fn add_arrival(&self, observation: Arc<Observation>) {
        let is_current = self.state().add_arrival(&observation, self.now());
        if is_current {
            self.latest.send_replace(Some(observation));
        }
    }

    /// The stream has ended, and not by its caller.
    pub(crate) fn fail_stream(&self, reason: String) {
        self.state().stream = Stream::Failed(Error::StreamEnded { reason });
        self.latest.send_modify(|_| ());
    }

    /// A request has its reply, or failed.
    ///
    /// # Errors
    /// If there was no such request.
    pub(crate) fn complete_request(&self, id: u64, outcome: Result<Reply, Error>) -> Result<(), Error> {
        let mut state = self.state();
        let (episode, was_resetting) = (state.episode, state.actions.is_resetting());
        let reply_to = state.complete(id, &outcome, self.now())?;
        let is_new_episode = state.episode > episode;
        drop(state);
        if is_new_episode {
            // What arrived before the reset is not the latest any more.
            self.latest.send_replace(None);
        }
        if was_resetting {
            self.room.notify_waiters();
            self.dispatch.wake();
        }
        if let Some(reply_to) = reply_to {
            // Fails if the caller has given up.
            let _ = reply_to.send(outcome);
        }
        Ok(())
    }

    /// Ends the session: every call from now on, and every one that waits, fails with this error or an
    /// earlier one.
    pub(crate) fn end(&self, error: Error) {
        if !self.state().end(error.clone()) {
            return;
        }
        match &error {
            Error::Closed => tracing::debug!("closed"),
            error => tracing::warn!("{error}"),
        }
        self.ended.send_replace(true);
        self.latest.send_modify(|_| ());
        self.room.notify_waiters();
        self.dispatch.wake();
    }

    /// Returns when the session has ended.
    pub(crate) async fn ended(&self) {
        let _ = self.ended.subscribe().wait_for(|ended| *ended).await;
    }
}

/// The reply to a request, to be waited for. Dropped before it has arrived, the request is given up.
pub(crate) struct PendingReply {
    core: Arc<Core>,
    id: u64,
    reply: oneshot::Receiver<Result<Reply, Error>>,
    is_pending: bool,
}

impl PendingReply {
    /// The reply to the request with this id, which arrives at the receiver.
    pub(crate) fn new(core: &Arc<Core>, id: u64, reply: oneshot::Receiver<Result<Reply, Error>>) -> Self {
        PendingReply { core: Arc::clone(core), id, reply, is_pending: true }
    }

    pub(crate) async fn wait(mut self) -> Result<Reply, Error> {
        let outcome = (&mut self.reply).await;
        self.is_pending = false;
        outcome.unwrap_or(Err(Error::Closed))
    }
}

impl Drop for PendingReply {
    fn drop(&mut self) {
        if take(&mut self.is_pending) {
            self.core.state().give_up(self.id, self.core.now());
        }
    }
}
