//! The legacy wire on a Zenoh network as a transport: one put is one frame, on two keys that the whole
//! network shares.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use chiral_proto::{
    Codec, Frame, Transport, TransportError,
    keys::{self, End},
    pool::Pool,
};
use tokio::{
    sync::{Mutex, mpsc},
    task::spawn_blocking,
};
use zenoh::{
    Wait,
    bytes::ZBytes,
    pubsub::{Publisher, Subscriber},
    qos::CongestionControl,
    sample::{Sample, SampleKind},
};

use super::{
    error::{ZenohError, cause, failed},
    reassembly::{SMALL, cost, gather},
    session::ZenohSession,
    thread::schedule_as_batch,
};

/// Dropped frames are logged at most this often.
const LOG_PERIOD: Duration = Duration::from_secs(1);

/// One end of the legacy wire. All peers of the network receive what is put on it: there are no connections,
/// so peers cannot be distinguished, and a frame does not reach a peer that has not subscribed yet. Zenoh
/// reports when the last subscriber has left; while another one is subscribed, nothing reports that a peer
/// left.
///
/// Frames that are not received in time are dropped, and so are frames that are too large. The log counts
/// them.
pub struct LegacyTransport {
    inbox: Mutex<Inbox>,
    dropped: Arc<AtomicU64>,
    publisher: Arc<FramePublisher>,
    key: String,
    _subscriber: Subscriber<()>,
}

struct Inbox {
    /// `None`: the last subscriber has left.
    events: mpsc::UnboundedReceiver<Option<ZBytes>>,
    queued: Arc<AtomicU64>,
    pool: Pool,
    logged_at: Option<Instant>,
}

struct FramePublisher {
    publisher: Publisher<'static>,
    // Dropped last.
    _network: ZenohSession,
}

impl ZenohSession {
    /// Opens one end of the legacy wire. Received frames larger than `max_frame` are dropped, and no more
    /// than one of that size is queued. The memory of large frames comes from `pool`.
    ///
    /// # Errors
    /// [`ZenohError::Failed`].
    pub async fn legacy(
        &self,
        end: End,
        max_frame: usize,
        pool: Pool,
    ) -> Result<LegacyTransport, ZenohError> {
        let publisher = self.session().declare_publisher(keys::legacy(end));
        let publisher =
            publisher.congestion_control(CongestionControl::Block).express(true).await.map_err(failed)?;
        let (sender, events) = mpsc::unbounded_channel();
        let on_left = sender.clone();
        let matching = publisher.matching_listener().callback(move |status| {
            if !status.matching() {
                let _ = on_left.send(None);
            }
        });
        matching.background().await.map_err(failed)?;
        let (queued, dropped) = <(Arc<AtomicU64>, Arc<AtomicU64>)>::default();
        let key = keys::legacy(end.other());
        let handler = SampleHandler {
            key,
            sender,
            limit: cost(max_frame),
            queued: Arc::clone(&queued),
            dropped: Arc::clone(&dropped),
        };
        let subscriber =
            self.session().declare_subscriber(key).callback(move |sample| handler.on_put(&sample));
        Ok(LegacyTransport {
            inbox: Mutex::new(Inbox { events, queued, pool, logged_at: None }),
            dropped,
            publisher: Arc::new(FramePublisher { publisher, _network: self.clone() }),
            key: key.to_owned(),
            _subscriber: subscriber.await.map_err(failed)?,
        })
    }
}

impl Transport for LegacyTransport {
    /// Returns once Zenoh has taken the frame over, which then reaches all subscribers.
    async fn send(&self, frame: Frame) -> Result<(), TransportError> {
        if frame.len() <= SMALL {
            return self.publisher.put(&frame);
        }
        // Putting waits for the network, which must not block the other tasks of this runtime.
        let publisher = Arc::clone(&self.publisher);
        let put = spawn_blocking(move || {
            schedule_as_batch();
            publisher.put(&frame)
        });
        let put = put.await;
        put.unwrap_or_else(|_| Err(TransportError::lost("the runtime is shutting down")))
    }

    /// Returns the next frame, or `None` when the last subscriber has left; others may subscribe later, and
    /// their frames are then received. Cancel-safe: a call that is dropped loses no frame.
    async fn recv(&self) -> Result<Option<Frame>, TransportError> {
        let mut inbox = self.inbox.lock().await;
        let payload = match inbox.events.recv().await {
            Some(Some(payload)) => payload,
            Some(None) => return Ok(None),
            None => return Err(TransportError::lost("the Zenoh session is closed")),
        };
        inbox.queued.fetch_sub(cost(payload.len()), Ordering::Relaxed);
        if inbox.logged_at.is_none_or(|logged_at| logged_at.elapsed() >= LOG_PERIOD) {
            let dropped = self.dropped.swap(0, Ordering::Relaxed);
            if dropped > 0 {
                inbox.logged_at = Some(Instant::now());
                tracing::warn!(
                    "dropped {dropped} frames on {}: too large, or not received in time",
                    self.key
                );
            }
        }
        Ok(Some(gather(&inbox.pool, payload.len(), payload.slices()).into()))
    }

    /// Does nothing: there is no connection, and no close frame.
    async fn close(&self) {}

    fn codec(&self) -> Codec {
        Codec::Msgpack
    }

    /// Returns the key on which frames arrive.
    fn peer(&self) -> &str {
        &self.key
    }
}

impl fmt::Debug for LegacyTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LegacyTransport").field("key", &self.key).finish_non_exhaustive()
    }
}

impl FramePublisher {
    fn put(&self, frame: &Frame) -> Result<(), TransportError> {
        let mut payload = ZBytes::writer();
        for segment in frame.segments() {
            payload.append(ZBytes::from(segment.clone()));
        }
        self.publisher.put(payload.finish()).wait().map_err(|error| TransportError::lost(cause(&error)))
    }
}

/// The callback that Zenoh's threads call. It never waits.
struct SampleHandler {
    /// Samples on any other key were put on several keys at once, and are ignored.
    key: &'static str,
    sender: mpsc::UnboundedSender<Option<ZBytes>>,
    /// The most that may be queued, as [`cost`] counts.
    limit: u64,
    queued: Arc<AtomicU64>,
    dropped: Arc<AtomicU64>,
}

impl SampleHandler {
    fn on_put(&self, sample: &Sample) {
        if sample.kind() != SampleKind::Put || sample.key_expr().as_str() != self.key {
            return;
        }
        let payload = sample.payload();
        let load = cost(payload.len());
        if self.queued.fetch_add(load, Ordering::Relaxed).saturating_add(load) > self.limit {
            self.queued.fetch_sub(load, Ordering::Relaxed);
            self.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        // A slice of a few bytes would keep the whole batch in memory that it arrived in.
        let payload = if payload.len() <= SMALL {
            ZBytes::from(payload.to_bytes().into_owned())
        } else {
            payload.clone()
        };
        let _ = self.sender.send(Some(payload));
    }
}
