//! Calls the robot's stopper when a hold is due while one of the robot's methods blocks.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use super::{command::StopDue, shared::Shared};
use crate::{error::panic_text, robot::Stopper};

/// Runs until the control thread ends. Without a stopper, only the action that blocks is marked as over.
pub(super) fn run(shared: &Arc<Shared>, stopper: Option<&Stopper>) {
    loop {
        let now = shared.clock.now();
        let mut core = shared.core();
        match core.stop_due(now) {
            StopDue::At(at) => shared.wait_for_stop(core, now, Some(at)),
            StopDue::Never => shared.wait_for_stop(core, now, None),
            StopDue::End => return,
            StopDue::Now => {
                core.note_stopped();
                drop(core);
                let Some(stopper) = stopper else { continue };
                tracing::warn!("the robot is busy while a hold is due: stopping it");
                if let Err(panic) = catch_unwind(AssertUnwindSafe(|| stopper())) {
                    tracing::error!("the robot's stopper panicked: {}", panic_text(&*panic));
                }
            }
        }
    }
}
