//! Waits for the ticks of the action queue, and sends what is due at each. Which row that is, `dispatch`
//! decides.

use std::{
    hint::spin_loop,
    sync::{Arc, OnceLock},
    thread::{self, Thread},
    time::Duration,
};

use tokio::{sync::Notify, time::sleep};

use crate::{error::Error, session::Shared, state::Due};

/// How ticks are waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pace {
    /// By a thread of its own, which sleeps until shortly before a tick and spins from there: a sleeping
    /// thread is woken 50 µs to 1 ms late.
    Spin(Duration),
    /// By the runtime's timers, in milliseconds: for a clock that is the caller's, which no thread could
    /// sleep by.
    Timers,
}

/// Who waits for the ticks.
pub(crate) struct DispatchThread {
    pace: Pace,
    thread: OnceLock<Thread>,
    changed: Notify,
}

impl DispatchThread {
    pub(crate) fn new(pace: Pace) -> DispatchThread {
        DispatchThread { pace, thread: OnceLock::new(), changed: Notify::new() }
    }

    /// A row may be due sooner than was thought, or the session has ended.
    pub(crate) fn wake(&self) {
        match self.thread.get() {
            Some(thread) => thread.unpark(),
            None => self.changed.notify_one(),
        }
    }
}

/// Has the session's ticks waited for, until it ends. To be called once.
pub(crate) fn start(shared: &Arc<Shared>) -> Result<(), Error> {
    let waiting = Arc::clone(shared);
    match shared.dispatcher.pace {
        Pace::Spin(spin) => {
            let spawned = thread::Builder::new()
                .name("chiral-dispatch".to_owned())
                .spawn(move || by_thread(&waiting, spin));
            spawned.map_err(|error| Error::Thread(Arc::new(error)))?;
        }
        Pace::Timers => {
            shared.control.host.spawn(by_timers(waiting));
        }
    }
    Ok(())
}

fn by_thread(shared: &Shared, spin: Duration) {
    // Before the first look at what is due: who changes that afterwards finds whom to wake.
    let _ = shared.dispatcher.thread.set(thread::current());
    loop {
        match shared.due() {
            Due::Now(row) => shared.control.host.block_on(shared.dispatch(row)),
            Due::In(wait) if wait > spin => thread::park_timeout(wait - spin),
            Due::In(wait) => {
                let tick = shared.now() + wait;
                while shared.now() < tick {
                    spin_loop();
                }
            }
            Due::Never => thread::park(),
            Due::Ended => return,
        }
    }
}

async fn by_timers(shared: Arc<Shared>) {
    loop {
        match shared.due() {
            Due::Now(row) => shared.dispatch(row).await,
            Due::In(wait) => tokio::select! {
                () = shared.dispatcher.changed.notified() => {}
                () = sleep(wait) => {}
            },
            Due::Never => shared.dispatcher.changed.notified().await,
            Due::Ended => return,
        }
    }
}
