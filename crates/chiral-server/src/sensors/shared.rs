//! What all sensors of one robot share.

use std::sync::{Condvar, Mutex};

use chiral_proto::{Clock, ValueMap, lock, pool::Pool};

use super::{
    slots::{CameraSlot, ProprioSlot},
    times::Implausible,
};
use crate::staleness::MaxAge;

/// The slots, and what they share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) cameras: Vec<CameraSlot>,
    pub(super) proprios: Vec<ProprioSlot>,
    pub(super) application: Mutex<ApplicationValues>,
    pub(super) publications: Publications,
    pub(super) pool: Pool,
    pub(super) clock: Clock,
    /// For cameras without a limit of their own.
    pub(super) max_age: Mutex<MaxAge>,
}

/// The values that an application may add to observations.
#[derive(Debug, Default)]
pub(super) struct ApplicationValues {
    pub(super) timestamp: Option<f64>,
    pub(super) extra: ValueMap,
}

/// Wakes the threads that wait for a publication.
#[derive(Debug, Default)]
pub(super) struct Publications {
    pub(super) mutex: Mutex<()>,
    pub(super) changed: Condvar,
}

impl Publications {
    pub(super) fn notify(&self) {
        drop(lock(&self.mutex));
        self.changed.notify_all();
    }
}

/// Logs that a sensor's capture times cannot be right. Called once per sensor.
pub(super) fn report(sensor: &str, implausible: Implausible) {
    tracing::warn!(
        "{sensor}: {implausible}; where its capture time cannot be right, the time of publication is used"
    );
}
