//! One lane over a Zenoh network as a transport: a publisher for one direction, a subscriber into a queue for
//! the other.

use std::{fmt, sync::Arc, time::Duration};

use chiral_proto::{
    Codec, Frame, Transport, TransportError,
    keys::{self, End},
    pool::Pool,
};
use tokio::{
    sync::{Mutex, OwnedSemaphorePermit, mpsc},
    time::{sleep, timeout},
};
use zenoh::{
    liveliness::LivelinessToken,
    pubsub::Subscriber,
    qos::{CongestionControl, Priority},
};

use super::{
    error::{ZenohError, failed},
    on_sample::{Event, ReceiveState, SampleHandler},
    packet::Packet,
    publisher::LanePublisher,
    reassembly::Reassembly,
    session::ZenohSession,
    shm::{SharedMemory, received_segments},
};
use crate::liveness::IdleTimeout;

/// How often the client sends its first packet until it is answered.
const READY_PERIOD: Duration = Duration::from_millis(20);
/// How long to wait for the close packets of both ends.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(500);

/// What a lane carries, which decides its priority.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LaneKind {
    /// The control lane: everything without observations. It has priority over everything else on the
    /// network.
    Control,
    /// The observations lane.
    Observations,
}

impl LaneKind {
    /// Returns the name by which a client requests it.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            LaneKind::Control => "control",
            LaneKind::Observations => "observations",
        }
    }

    pub(super) fn parse(name: &[u8]) -> Option<LaneKind> {
        [LaneKind::Control, LaneKind::Observations].into_iter().find(|kind| kind.as_str().as_bytes() == name)
    }

    fn priority(self) -> Priority {
        match self {
            LaneKind::Control => Priority::RealTime,
            LaneKind::Observations => Priority::Data,
        }
    }
}

/// The options of a lane.
#[derive(Clone, Debug)]
pub struct ZenohOptions {
    /// The longest frame to accept, in bytes.
    pub max_frame: usize,
    /// Supplies the memory of received frames.
    pub pool: Pool,
    /// The codec agreed with the peer.
    pub codec: Codec,
    /// The shared memory whose pixels are sent by reference.
    pub shared_memory: Option<SharedMemory>,
    /// Records what arrives. A session's two lanes share it where they share a link: on a slow one, what
    /// arrives on the control lane waits behind observations, and neither is idle.
    pub idle_timeout: IdleTimeout,
}

/// Carries frames on two keys of a Zenoh network, one for each direction.
pub struct ZenohTransport {
    inbox: Mutex<Inbox>,
    /// Held while sending, so that frames keep their order.
    send_turn: Mutex<()>,
    publisher: Arc<LanePublisher>,
    received: Arc<ReceiveState>,
    idle_timeout: IdleTimeout,
    codec: Codec,
    _subscriber: Subscriber<()>,
    _liveliness_subscriber: Subscriber<()>,
    _token: LivelinessToken,
    /// Counts against the listener's limit of lanes.
    _slot: Option<OwnedSemaphorePermit>,
    // Dropped last.
    _network: ZenohSession,
}

struct Inbox {
    events: mpsc::UnboundedReceiver<Event>,
    reassembly: Reassembly,
}

impl ZenohTransport {
    /// Opens this end of a lane. It receives from now on.
    pub(super) async fn declare(
        network: &ZenohSession,
        robot: &str,
        connection: &str,
        end: End,
        kind: LaneKind,
        options: ZenohOptions,
        slot: Option<OwnedSemaphorePermit>,
    ) -> Result<ZenohTransport, ZenohError> {
        let session = network.session();
        let publisher = session.declare_publisher(keys::frames(robot, connection, end));
        // Not express: such a message takes one of Zenoh's batches by itself, and a put waits if there is none.
        let publisher = publisher.congestion_control(CongestionControl::Block).priority(kind.priority());
        let peer = format!("{robot}/{}", &connection[..8.min(connection.len())]);
        let publisher =
            Arc::new(LanePublisher::new(publisher.await.map_err(failed)?, options.shared_memory, peer));
        let idle_timeout = options.idle_timeout.clone();
        let received = Arc::new(ReceiveState::new(idle_timeout.clone()));
        let (sender, events) = mpsc::unbounded_channel();
        let handler = |key: &str| SampleHandler {
            key: key.to_owned(),
            end,
            events: sender.clone(),
            state: Arc::clone(&received),
            publisher: Arc::clone(&publisher),
        };
        let key = keys::frames(robot, connection, end.other());
        let on_sample = handler(&key);
        let subscriber = session.declare_subscriber(key).callback(move |sample| on_sample.on_put(&sample));
        let subscriber = subscriber.await.map_err(failed)?;
        let key = keys::end(robot, connection, end.other());
        let on_sample = handler(&key);
        let liveliness_subscriber = session
            .liveliness()
            .declare_subscriber(key)
            .history(true)
            .callback(move |sample| on_sample.on_liveliness(&sample));
        let liveliness_subscriber = liveliness_subscriber.await.map_err(failed)?;
        let token = session.liveliness().declare_token(keys::end(robot, connection, end));
        let token = token.await.map_err(failed)?;
        publisher.spawn_thread(format!("chiral-{}", kind.as_str()))?;
        Ok(ZenohTransport {
            inbox: Mutex::new(Inbox { events, reassembly: Reassembly::new(options.max_frame, options.pool) }),
            send_turn: Mutex::default(),
            publisher,
            received,
            idle_timeout,
            codec: options.codec,
            _subscriber: subscriber,
            _liveliness_subscriber: liveliness_subscriber,
            _token: token,
            _slot: slot,
            _network: network.clone(),
        })
    }

    /// Returns the idle timeout. The transport records arrivals; its user waits for the expiry.
    pub fn idle_timeout(&self) -> IdleTimeout {
        self.idle_timeout.clone()
    }

    /// Sends the first packet until the peer has answered it, within `limit`. Returns whether it has.
    pub(super) async fn handshake(&self, limit: Duration) -> bool {
        let announce = async {
            loop {
                self.publisher.update(|queue| queue.queue_ready());
                sleep(READY_PERIOD).await;
            }
        };
        let ready = self.publisher.wait_for(|progress| progress.is_peer_ready);
        let handshake = async {
            tokio::select! {
                () = announce => {}
                () = ready => {}
            }
        };
        timeout(limit, handshake).await.is_ok()
    }
}

impl Transport for ZenohTransport {
    async fn send(&self, frame: Frame) -> Result<(), TransportError> {
        let _turn = self.send_turn.lock().await;
        self.publisher.send(frame).await
    }

    async fn recv(&self) -> Result<Option<Frame>, TransportError> {
        let mut inbox = self.inbox.lock().await;
        loop {
            let (packet, payload) = match inbox.events.recv().await {
                Some(Event::Put { packet, payload }) => (packet, payload),
                Some(Event::Closed) => return Ok(None),
                Some(Event::Broken(error)) => return Err(error),
                None => return Err(TransportError::lost("the Zenoh session is closed")),
            };
            self.received.take(packet, &payload);
            let frame = if let Packet::Reference { number } = packet {
                let frame = inbox.reassembly.receive_reference(number, received_segments(&payload))?;
                self.publisher.update_before_flush(|queue| queue.queue_mapped(number));
                frame
            } else {
                let frame = inbox.reassembly.receive(packet, payload.len(), payload.slices())?;
                // Both lanes record it: a small message on one is not the end of a large one on the other.
                if matches!(packet, Packet::Chunk { .. }) {
                    self.idle_timeout.set_mid_message(frame.is_none());
                }
                frame
            };
            if let Some(cost) = inbox.reassembly.acknowledge() {
                self.publisher.update_before_flush(|queue| queue.queue_acknowledge(cost));
            }
            self.publisher.flush();
            if frame.is_some() {
                return Ok(frame);
            }
        }
    }

    async fn close(&self) {
        self.publisher.update(|queue| queue.queue_close());
        // If this end's token were gone before its close packet arrived, the peer would report a lost
        // connection.
        let closed = self.publisher.wait_for(|progress| progress.is_close_sent && progress.has_peer_left);
        let _ = timeout(CLOSE_TIMEOUT, closed).await;
    }

    fn codec(&self) -> Codec {
        self.codec
    }

    fn peer(&self) -> &str {
        self.publisher.peer()
    }
}

impl Drop for ZenohTransport {
    fn drop(&mut self) {
        self.publisher.stop();
    }
}

impl fmt::Debug for ZenohTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ZenohTransport").field("peer", &self.peer()).finish_non_exhaustive()
    }
}
