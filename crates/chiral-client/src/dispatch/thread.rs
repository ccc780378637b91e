//! The thread that waits for the ticks of the action queue and sends the row that `queue` returns at each.

use std::{hint::spin_loop, sync::Arc, thread, time::Duration};

use chiral_proto::{Code, Fault, message::ActionMessage};
use chiral_transport::Runtime;
use tokio::time::sleep;

use super::actions::Due;
use crate::{core::Core, error::Error, transport::BoxFuture};

/// Where actions are sent: all that dispatch needs of a session's connections.
pub(crate) trait ActionSink: Send + Sync {
    /// Sends actions to the robot. Returns once the link has taken them.
    fn send_actions(&self, message: ActionMessage) -> BoxFuture<'_, Result<(), Error>>;
}

/// How ticks are waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    /// On a thread of its own, which sleeps until this long before a tick and spins from there: a sleeping
    /// thread is woken 50 µs to 1 ms late.
    Spin(Duration),
    /// With the runtime's timers, in milliseconds: for a clock of the caller's, which no thread could sleep
    /// by.
    Timers,
}

/// Sends a session's queued actions at their ticks, until the session ends. To be called once.
pub(crate) fn start(
    core: Arc<Core>,
    sink: Arc<dyn ActionSink>,
    runtime: Runtime,
    wait: Wait,
) -> Result<(), Error> {
    match wait {
        Wait::Spin(spin) => {
            let run = move || run_on_thread(&core, &*sink, &runtime, spin);
            let spawned = thread::Builder::new().name("chiral-dispatch".to_owned()).spawn(run);
            spawned.map_err(|error| Error::Thread(Arc::new(error)))?;
        }
        Wait::Timers => {
            runtime.spawn(async move { run_on_timers(&core, &*sink).await });
        }
    }
    Ok(())
}

fn run_on_thread(core: &Core, sink: &dyn ActionSink, runtime: &Runtime, spin: Duration) {
    // Registered before the first look at the queue, so that no later change is missed.
    core.dispatch.register_thread();
    loop {
        match due(core) {
            Due::Now(message) => runtime.block_on(send(core, sink, message)),
            Due::In(wait) if wait > spin => thread::park_timeout(wait - spin),
            Due::In(wait) => {
                let tick = core.now() + wait;
                while core.now() < tick {
                    spin_loop();
                }
            }
            Due::Idle => thread::park(),
            Due::Ended => return,
        }
    }
}

async fn run_on_timers(core: &Core, sink: &dyn ActionSink) {
    loop {
        match due(core) {
            Due::Now(message) => send(core, sink, message).await,
            Due::In(wait) => tokio::select! {
                () = core.dispatch.woken() => {}
                () = sleep(wait) => {}
            },
            Due::Idle => core.dispatch.woken().await,
            Due::Ended => return,
        }
    }
}

fn due(core: &Core) -> Due {
    let mut state = core.state();
    let (episode, queued) = (state.episode, state.actions.queued());
    let due = state.actions.due(episode, core.now());
    let has_dropped = state.actions.queued() < queued && !matches!(due, Due::Now(_));
    drop(state);
    if has_dropped {
        core.room.notify_waiters();
    }
    due
}

/// Sends a row that is due. Callers that wait for room in the queue are woken only afterwards.
async fn send(core: &Core, sink: &dyn ActionSink, message: ActionMessage) {
    let action_seq = message.seq;
    if let Err(error) = sink.send_actions(message).await {
        tracing::debug!("an action was not sent: {error}");
        let mut state = core.state();
        // If the session goes on, the caller learns of it as of any other refusal.
        if state.check_alive().is_ok() {
            state.actions.refused(match error {
                Error::ActionRefused(fault) => fault,
                Error::Rejected(fault) => Fault { action_seq, ..fault },
                error => Fault { action_seq, ..Fault::new(Code::Unspecified, error.to_string()) },
            });
        }
    }
    core.room.notify_waiters();
}
