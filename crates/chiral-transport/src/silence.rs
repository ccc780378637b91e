//! Notices a peer from which nothing comes any more.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::time::{Instant, sleep};

/// A limit that became shorter is noticed within this.
const LOOK_PERIOD: Duration = Duration::from_secs(1);

/// How long a silence may last, as long as who knows what is waited for says nothing else. A clone is the
/// same.
#[derive(Clone, Debug, Default)]
pub struct Patience(Arc<AtomicU64>);

impl Patience {
    /// For so long.
    pub fn new(limit: Duration) -> Patience {
        let patience = Patience::default();
        patience.set(limit);
        patience
    }

    /// For so long from now on.
    pub fn set(&self, limit: Duration) {
        self.0.store(limit.as_nanos().try_into().unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    pub(crate) fn limit(&self) -> Duration {
        Duration::from_nanos(self.0.load(Ordering::Relaxed))
    }
}

/// Since when nothing was heard. A word costs no timer, only the silence does.
#[derive(Debug)]
pub struct Silence {
    began: Instant,
    /// Nanoseconds from then to the last word.
    last_word: AtomicU64,
}

impl Silence {
    /// Nothing was heard yet.
    pub fn begin() -> Silence {
        Silence { began: Instant::now(), last_word: AtomicU64::new(0) }
    }

    /// Something was heard.
    pub fn end(&self) {
        self.last_word.store(self.began.elapsed().as_nanos() as u64, Ordering::Relaxed);
    }

    /// Returns once it has lasted for `limit`.
    pub async fn lasts(&self, limit: Duration) {
        self.outlasts(&Patience::new(limit)).await;
    }

    /// Returns once it has lasted for as long as `patience` says by then.
    pub(crate) async fn outlasts(&self, patience: &Patience) {
        loop {
            let silent_for = self
                .began
                .elapsed()
                .saturating_sub(Duration::from_nanos(self.last_word.load(Ordering::Relaxed)));
            match patience.limit().checked_sub(silent_for) {
                None | Some(Duration::ZERO) => return,
                Some(rest) => sleep(rest.min(LOOK_PERIOD)).await,
            }
        }
    }
}
