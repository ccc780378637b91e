//! The idle timeout: detects a peer from which nothing arrives any more, on either wire.

use std::{
    future::{Future, poll_fn},
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::Poll,
    time::Duration,
};

use tokio::time::{Instant, sleep};

/// A lowered limit takes effect within this.
const CHECK_PERIOD: Duration = Duration::from_secs(1);

/// Expires when nothing has arrived from a peer for as long as its limit. A clone is the same timeout: the
/// transport records every arrival, and the session waits for [`IdleTimeout::expired`]. Recording sets no
/// timer.
#[derive(Clone, Debug)]
pub struct IdleTimeout {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    started: Instant,
    /// Nanoseconds from `started` to the last arrival.
    last_arrival_ns: AtomicU64,
    limit_ns: AtomicU64,
    is_mid_message: AtomicBool,
}

impl IdleTimeout {
    /// Creates a timeout that expires after `limit` without an arrival, counted from now.
    pub fn new(limit: Duration) -> IdleTimeout {
        let timeout = IdleTimeout::never();
        timeout.set_limit(limit);
        timeout
    }

    /// Creates a timeout that does not expire until a limit is set.
    pub fn never() -> IdleTimeout {
        let shared = Shared {
            started: Instant::now(),
            last_arrival_ns: AtomicU64::new(0),
            limit_ns: AtomicU64::new(u64::MAX),
            is_mid_message: AtomicBool::new(false),
        };
        IdleTimeout { shared: Arc::new(shared) }
    }

    /// Changes the limit. The time since the last arrival still counts.
    pub fn set_limit(&self, limit: Duration) {
        let limit_ns = limit.as_nanos().try_into().unwrap_or(u64::MAX);
        self.shared.limit_ns.store(limit_ns, Ordering::Relaxed);
    }

    /// Returns the limit.
    pub fn limit(&self) -> Duration {
        Duration::from_nanos(self.shared.limit_ns.load(Ordering::Relaxed))
    }

    /// Records that something arrived: some bytes are enough.
    pub fn record(&self) {
        let elapsed_ns = self.shared.started.elapsed().as_nanos() as u64;
        self.shared.last_arrival_ns.store(elapsed_ns, Ordering::Relaxed);
    }

    /// Records that the beginning of a large message has arrived and its end has not, or that it is complete.
    pub fn set_mid_message(&self, is_mid_message: bool) {
        self.shared.is_mid_message.store(is_mid_message, Ordering::Relaxed);
    }

    /// Whether a large message is arriving: on a slow link, a reply may be that message or wait behind it.
    pub fn is_mid_message(&self) -> bool {
        self.shared.is_mid_message.load(Ordering::Relaxed)
    }

    /// How long nothing has arrived, counted from the timeout's creation; `None` without a limit, where a
    /// silent peer may well be alive.
    pub fn idle_time(&self) -> Option<Duration> {
        let last_arrival = Duration::from_nanos(self.shared.last_arrival_ns.load(Ordering::Relaxed));
        let idle = self.shared.started.elapsed().saturating_sub(last_arrival);
        (self.limit() < Duration::from_nanos(u64::MAX)).then_some(idle)
    }

    /// Runs a receive loop; `None` if nothing has arrived for too long before it ended. Its start counts as an
    /// arrival.
    pub async fn watch<T>(&self, receiving: impl Future<Output = T>) -> Option<T> {
        self.record();
        let (mut receiving, mut expired) = (pin!(receiving), pin!(self.expired()));
        poll_fn(|context| match receiving.as_mut().poll(context) {
            Poll::Ready(output) => Poll::Ready(Some(output)),
            Poll::Pending => expired.as_mut().poll(context).map(|()| None),
        })
        .await
    }

    /// Waits until nothing has arrived for this long. Never returns without a limit.
    pub async fn until_idle_for(&self, duration: Duration) {
        while let Some(rest) = self.rest_of(duration) {
            sleep(rest.min(CHECK_PERIOD)).await;
        }
    }

    /// Waits until nothing has arrived for as long as the limit.
    pub async fn expired(&self) {
        while let Some(rest) = self.rest_of(self.limit()) {
            sleep(rest.min(CHECK_PERIOD)).await;
        }
    }

    /// What is left of a duration without arrivals; `None` if it has passed.
    fn rest_of(&self, duration: Duration) -> Option<Duration> {
        match self.idle_time() {
            None => Some(CHECK_PERIOD),
            Some(idle) => duration.checked_sub(idle).filter(|rest| !rest.is_zero()),
        }
    }
}
