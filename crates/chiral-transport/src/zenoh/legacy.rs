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
    surroundings::{Change, NetworkEvent, OtherReceivers},
    thread::schedule_as_batch,
};

/// Dropped frames are logged at most this often.
const LOG_PERIOD: Duration = Duration::from_secs(1);

/// One end of the legacy wire. All peers of the network receive what is put on it: there are no connections,
/// and a frame does not reach a peer that has not subscribed yet. Zenoh reports when the last subscriber has
/// left; while another one is subscribed, nothing reports that a peer left.
///
/// Frames that are not received in time are dropped, and so are frames that are too large. The log counts
/// them.
pub struct LegacyTransport {
    inbox: Mutex<Inbox>,
    dropped: Arc<AtomicU64>,
    publisher: Arc<FramePublisher>,
    key: String,
    /// Of an end that watches its network.
    other_receivers: Option<OtherReceivers>,
    _subscriber: Subscriber<()>,
}

/// What arrives at an end of the legacy wire.
#[derive(Debug)]
#[non_exhaustive]
pub enum LegacyEvent {
    /// A frame, and by which connection it came; `None` if Zenoh does not show it.
    Frame(Frame, Option<LegacySender>),
    /// The last subscriber to this end's frames has left. Others may subscribe later, and their frames then
    /// arrive.
    AllLeft,
    /// The network has changed: only from [`ZenohSession::legacy_server`].
    Network(NetworkEvent),
}

/// A connection by which frames come: two frames have the same sender if they came by the same one.
///
/// A legacy frame does not say who sent it, and Zenoh does not report by which connection a sample came. But
/// each connection is read by a task of its own, which calls the subscriber; so this is the task.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LegacySender(tokio::task::Id);

struct Inbox {
    items: mpsc::UnboundedReceiver<Item>,
    queued: Arc<AtomicU64>,
    pool: Pool,
    logged_at: Option<Instant>,
}

/// What the callbacks report, in the order in which it happened.
enum Item {
    Put(ZBytes, Option<LegacySender>),
    AllLeft,
    Change(Change),
}

struct FramePublisher {
    publisher: Publisher<'static>,
    // Dropped last.
    _network: ZenohSession,
}

impl ZenohSession {
    /// Opens a client's end of the legacy wire. Received frames larger than `max_frame` are dropped, and no
    /// more than one of that size is queued. The memory of large frames comes from `pool`.
    ///
    /// # Errors
    /// [`ZenohError::Failed`].
    pub async fn legacy_client(&self, max_frame: usize, pool: Pool) -> Result<LegacyTransport, ZenohError> {
        let (sender, items) = mpsc::unbounded_channel();
        self.open_legacy(End::Client, max_frame, pool, (sender, items), None).await
    }

    /// Opens a server's end of the legacy wire, as [`ZenohSession::legacy_client`]. If it `watches` its
    /// network, its events report how that changes.
    ///
    /// # Errors
    /// [`ZenohError::Failed`].
    pub async fn legacy_server(
        &self,
        max_frame: usize,
        pool: Pool,
        watches: bool,
    ) -> Result<LegacyTransport, ZenohError> {
        let (sender, items) = mpsc::unbounded_channel();
        // Before the subscriber: a process is connected before its frames arrive.
        let report = sender.clone();
        let other_receivers = match watches {
            true => Some(self.watch(move |change| drop(report.send(Item::Change(change)))).await?),
            false => None,
        };
        self.open_legacy(End::Server, max_frame, pool, (sender, items), other_receivers).await
    }

    async fn open_legacy(
        &self,
        end: End,
        max_frame: usize,
        pool: Pool,
        (sender, items): (mpsc::UnboundedSender<Item>, mpsc::UnboundedReceiver<Item>),
        other_receivers: Option<OtherReceivers>,
    ) -> Result<LegacyTransport, ZenohError> {
        let publisher = self.session().declare_publisher(keys::legacy(end));
        let publisher =
            publisher.congestion_control(CongestionControl::Block).express(true).await.map_err(failed)?;
        let on_left = sender.clone();
        let matching = publisher.matching_listener().callback(move |status| {
            if !status.matching() {
                let _ = on_left.send(Item::AllLeft);
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
            inbox: Mutex::new(Inbox { items, queued, pool, logged_at: None }),
            dropped,
            publisher: Arc::new(FramePublisher { publisher, _network: self.clone() }),
            key: key.to_owned(),
            other_receivers,
            _subscriber: subscriber.await.map_err(failed)?,
        })
    }
}

impl LegacyTransport {
    /// Returns what arrived next. Cancel-safe: a call that is dropped loses nothing.
    ///
    /// # Errors
    /// [`TransportError::Lost`] once the Zenoh session is closed.
    pub async fn next_event(&self) -> Result<LegacyEvent, TransportError> {
        let mut inbox = self.inbox.lock().await;
        loop {
            // What is asked of Zenoh below is answered at once, so that no event is lost in a call that is
            // dropped.
            let item = inbox.items.recv().await;
            match item.ok_or_else(|| TransportError::lost("the Zenoh session is closed"))? {
                Item::Put(payload, sender) => {
                    self.note_received(&mut inbox, &payload);
                    let frame = gather(&inbox.pool, payload.len(), payload.slices()).into();
                    return Ok(LegacyEvent::Frame(frame, sender));
                }
                // Zenoh reports it on a thread of its own, maybe after another one has subscribed.
                Item::AllLeft if self.publisher.is_received().await => {}
                Item::AllLeft => return Ok(LegacyEvent::AllLeft),
                Item::Change(Change::Event(event)) => return Ok(LegacyEvent::Network(event)),
                Item::Change(Change::OtherReceivers) => {
                    if let Some(others) = &self.other_receivers {
                        return Ok(LegacyEvent::Network(others.event().await));
                    }
                }
            }
        }
    }

    /// A put was taken from the queue.
    fn note_received(&self, inbox: &mut Inbox, payload: &ZBytes) {
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
    }
}

impl Transport for LegacyTransport {
    /// Returns once Zenoh has taken the frame over, which then reaches all subscribers.
    async fn send(&self, frame: Frame) -> Result<(), TransportError> {
        // Putting waits for the network, which must not block the other tasks of this runtime.
        let publisher = Arc::clone(&self.publisher);
        let put = spawn_blocking(move || {
            if frame.len() > SMALL {
                schedule_as_batch();
            }
            publisher.put(&frame)
        });
        let put = put.await;
        put.unwrap_or_else(|_| Err(TransportError::lost("the runtime is shutting down")))
    }

    /// Returns the next frame, or `None` when the last subscriber has left; others may subscribe later, and
    /// their frames are then received. Cancel-safe: a call that is dropped loses no frame.
    async fn recv(&self) -> Result<Option<Frame>, TransportError> {
        loop {
            match self.next_event().await? {
                LegacyEvent::Frame(frame, _) => return Ok(Some(frame)),
                LegacyEvent::AllLeft => return Ok(None),
                LegacyEvent::Network(_) => {}
            }
        }
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
    /// Whether anybody subscribes to what is put.
    async fn is_received(&self) -> bool {
        self.publisher.matching_status().await.is_ok_and(|status| status.matching())
    }

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
    sender: mpsc::UnboundedSender<Item>,
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
        let _ = self.sender.send(Item::Put(payload, tokio::task::try_id().map(LegacySender)));
    }
}
