//! The wire of legacy peers on a Zenoh network, as a transport: one put is one frame, on two keys that all
//! of the network shares.

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

/// What was dropped is told so often at most.
const LOG_PERIOD: Duration = Duration::from_secs(1);

/// What legacy peers put on a network, to be heard by all of them and by us: there are no connections, so
/// nobody can be told from anybody else, and a put is lost on whoever does not listen yet. Zenoh says when
/// the last one who listened has left; while somebody else listens, nothing says that.
///
/// What nobody takes in time is dropped, and so is what is larger than may be: the log says how much.
pub struct LegacyTransport {
    inbox: Mutex<Inbox>,
    dropped: Arc<AtomicU64>,
    publisher: Arc<FramePublisher>,
    key: String,
    _subscriber: Subscriber<()>,
}

struct Inbox {
    /// `None`: nobody listens any more.
    events: mpsc::UnboundedReceiver<Option<ZBytes>>,
    queued: Arc<AtomicU64>,
    pool: Pool,
    logged_at: Option<Instant>,
}

struct FramePublisher {
    publisher: Publisher<'static>,
    // Goes last.
    _network: ZenohSession,
}

impl ZenohSession {
    /// One end of the wire that legacy peers share. Frames of the other end's that are larger than
    /// `max_frame` are dropped, and no more than one of that size waits to be taken; the memory of large ones
    /// is `pool`'s.
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
        let leaving = sender.clone();
        let matching = publisher.matching_listener().callback(move |status| {
            if !status.matching() {
                let _ = leaving.send(None);
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
    /// Returns once Zenoh has taken the frame over: whoever listens gets it, sooner or later.
    async fn send(&self, frame: Frame) -> Result<(), TransportError> {
        if frame.len() <= SMALL {
            return self.publisher.put(&frame);
        }
        // Waits for the network, which this runtime's other tasks must not.
        let publisher = Arc::clone(&self.publisher);
        let put = spawn_blocking(move || {
            schedule_as_batch();
            publisher.put(&frame)
        });
        let put = put.await;
        put.unwrap_or_else(|_| Err(TransportError::lost("the runtime is shutting down")))
    }

    /// May be dropped, and called again: a frame is taken or it is not. After `None` others may come and be
    /// heard.
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
                    "dropped {dropped} frames on {}: larger than may be, or not taken in time",
                    self.key
                );
            }
        }
        Ok(Some(gather(&inbox.pool, payload.len(), payload.slices()).into()))
    }

    /// There is nothing to be closed, and no word for it.
    async fn close(&self) {}

    fn codec(&self) -> Codec {
        Codec::Msgpack
    }

    /// The key that the other end's frames come on.
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

/// What Zenoh's own threads call; it never waits.
struct SampleHandler {
    /// What is heard on any other key was put on several at once, and is nothing for us.
    key: &'static str,
    sender: mpsc::UnboundedSender<Option<ZBytes>>,
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
        // A slice of a few bytes would keep the whole batch that it arrived in.
        let payload = if payload.len() <= SMALL {
            ZBytes::from(payload.to_bytes().into_owned())
        } else {
            payload.clone()
        };
        let _ = self.sender.send(Some(payload));
    }
}
