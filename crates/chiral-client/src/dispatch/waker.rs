//! Wakes whatever waits for the next tick.

use std::{
    sync::OnceLock,
    thread::{self, Thread},
};

use tokio::sync::Notify;

/// Wakes the dispatch thread, or the task that takes its place.
#[derive(Debug, Default)]
pub(crate) struct DispatchWaker {
    thread: OnceLock<Thread>,
    changed: Notify,
}

impl DispatchWaker {
    /// A row may be due sooner than it was, or the session has ended.
    pub(crate) fn wake(&self) {
        match self.thread.get() {
            Some(thread) => thread.unpark(),
            None => self.changed.notify_one(),
        }
    }

    /// From now on [`DispatchWaker::wake`] unparks the calling thread.
    pub(crate) fn register_thread(&self) {
        let _ = self.thread.set(thread::current());
    }

    /// Returns at the next [`DispatchWaker::wake`], for a task.
    pub(crate) async fn woken(&self) {
        self.changed.notified().await;
    }
}
