//! Calls the robot's stopper when a hold is due while one of the robot's methods blocks.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use super::{command::StopDue, shared::Shared};
use crate::{error::panic_text, log_throttle::LogThrottle, robot::Stopper};

/// Runs until the control thread ends. Without a stopper, only the action that blocks is marked as over.
pub(super) fn run(shared: &Arc<Shared>, stopper: Option<&Stopper>) {
    let stops = LogThrottle::new(shared.clock.clone());
    loop {
        let now = shared.clock.now();
        let mut core = shared.core();
        match core.stop_due(now) {
            StopDue::At(at) => shared.wait_for_stop(core, now, Some(at)),
            StopDue::Never => shared.wait_for_stop(core, now, None),
            StopDue::End => return,
            StopDue::Now => {
                core.begin_stop(stopper.is_some(), now);
                drop(core);
                let Some(stopper) = stopper else { continue };
                let stopped = catch_unwind(AssertUnwindSafe(|| stopper()));
                shared.core().end_stop();
                shared.wake_robot();
                // Last, since a log may block.
                stops.record(|count| {
                    tracing::warn!(count, "the robot was busy while a hold was due: stopped")
                });
                if let Err(panic) = stopped {
                    tracing::error!("the robot's stopper panicked: {}", panic_text(&*panic));
                }
            }
        }
    }
}
