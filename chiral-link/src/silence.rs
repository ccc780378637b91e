//! Notices a peer from which nothing comes any more.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use tokio::time::{Instant, sleep_until};

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
        loop {
            let over = self.began + Duration::from_nanos(self.last_word.load(Ordering::Relaxed)) + limit;
            if Instant::now() >= over {
                return;
            }
            sleep_until(over).await;
        }
    }
}
