//! One connection over a Zenoh network as a transport: a publisher on a thread of its own, and a subscriber into a queue.

use std::{
    fmt,
    sync::{
        Arc, Condvar, Mutex as StdMutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use chiral_proto::{
    Codec, Frame, Transport, TransportError,
    keys::{self, End},
    pool::Pool,
};
use tokio::{
    sync::{Mutex, OwnedSemaphorePermit, mpsc, watch},
    time::{sleep, timeout},
};
use zenoh::{
    Wait,
    bytes::ZBytes,
    liveliness::LivelinessToken,
    pubsub::{Publisher, Subscriber},
    qos::{CongestionControl, Priority},
    sample::{Sample, SampleKind},
};

use super::{
    flow::{Incoming, WINDOW, cost, violation},
    network::{Network, NetworkError, cause, failed},
    outbox::{Outbox, Put},
    word::Word,
};

/// The client says so often that it is there, until it is answered.
const BEGIN_PERIOD: Duration = Duration::from_millis(20);
/// For a last word each way.
const CLOSE_LIMIT: Duration = Duration::from_millis(500);
/// So many frames up to [`SMALL`] bytes may wait without their senders; what is larger may be an observation, which must not.
const QUEUE: u64 = 8;
const SMALL: usize = 4 * 1024;
/// No attachment of ours is as long.
const MAX_WORD: usize = 64;

/// What a connection is for, which says how urgent it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LaneKind {
    /// Everything without an observation in it: goes before everything else on the network.
    Control,
    /// What carries observations.
    Observations,
}

impl LaneKind {
    /// As it is asked for.
    pub(super) fn word(self) -> &'static str {
        match self {
            LaneKind::Control => "control",
            LaneKind::Observations => "observations",
        }
    }

    pub(super) fn from_word(word: &[u8]) -> Option<LaneKind> {
        [LaneKind::Control, LaneKind::Observations].into_iter().find(|kind| kind.word().as_bytes() == word)
    }

    fn priority(self) -> Priority {
        match self {
            LaneKind::Control => Priority::RealTime,
            LaneKind::Observations => Priority::Data,
        }
    }
}

/// What a connection is told.
#[derive(Clone, Debug)]
pub struct ZenohOptions {
    /// Larger frames are refused, in bytes.
    pub max_frame: usize,
    /// Where the memory of received frames comes from.
    pub pool: Pool,
    /// What was agreed with the peer.
    pub codec: Codec,
}

/// Frames on two keys of a Zenoh network, one for each direction.
pub struct ZenohTransport {
    inbox: Mutex<Inbox>,
    /// Held by who sends.
    turn: Mutex<()>,
    shared: Arc<Shared>,
    codec: Codec,
    peer: String,
    _subscriber: Subscriber<()>,
    _watch: Subscriber<()>,
    _token: LivelinessToken,
    _place: Option<OwnedSemaphorePermit>,
    // Goes last.
    _network: Network,
}

struct Inbox {
    events: mpsc::UnboundedReceiver<Event>,
    incoming: Incoming,
}

/// What came. As much waits as the window allows, and one end.
enum Event {
    Put { word: Word, payload: ZBytes },
    Closed,
    Broken(TransportError),
}

/// What Zenoh's threads, the sending thread and the transport share.
struct Shared {
    work: StdMutex<Work>,
    changed: Condvar,
    progress: watch::Sender<Progress>,
    /// What came and was not taken yet, as `cost` counts.
    queued: AtomicU64,
    /// The last event was told.
    is_over: AtomicBool,
}

#[derive(Default)]
struct Work {
    outbox: Outbox,
    pushed: u64,
    is_dropped: bool,
}

/// What somebody may wait for.
#[derive(Default)]
struct Progress {
    /// The other side was heard of.
    begun: bool,
    /// Frames that Zenoh has taken over.
    finished: u64,
    said_close: bool,
    /// The other side said its last word, or is gone.
    has_parted: bool,
    /// Why nothing more can be sent.
    failed: Option<TransportError>,
}

impl ZenohTransport {
    /// This end of a connection: from now on it hears the other.
    pub(super) async fn declare(
        network: &Network,
        robot: &str,
        connection: &str,
        end: End,
        kind: LaneKind,
        options: ZenohOptions,
        place: Option<OwnedSemaphorePermit>,
    ) -> Result<ZenohTransport, NetworkError> {
        let session = network.session();
        let (sender, events) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared {
            work: StdMutex::default(),
            changed: Condvar::new(),
            progress: watch::Sender::new(Progress::default()),
            queued: AtomicU64::new(0),
            is_over: AtomicBool::new(false),
        });
        let key = keys::frames(robot, connection, end.other());
        let ear = Ear { key: key.clone(), end, events: sender.clone(), shared: Arc::clone(&shared) };
        let subscriber = session.declare_subscriber(key).callback(move |sample| ear.hear(&sample));
        let subscriber = subscriber.await.map_err(failed)?;
        let other = keys::end(robot, connection, end.other());
        let ear = Ear { key: other.clone(), end, events: sender, shared: Arc::clone(&shared) };
        let watch = session.liveliness().declare_subscriber(other).history(true).callback(move |sample| ear.watch(&sample));
        let watch = watch.await.map_err(failed)?;
        let token = session.liveliness().declare_token(keys::end(robot, connection, end));
        let token = token.await.map_err(failed)?;
        let publisher = session.declare_publisher(keys::frames(robot, connection, end));
        let publisher = publisher.congestion_control(CongestionControl::Block).priority(kind.priority()).express(true);
        let publisher = publisher.await.map_err(failed)?;
        let putting = Arc::clone(&shared);
        let name = format!("chiral-{}", kind.word());
        thread::Builder::new().name(name).spawn(move || putting.put_all(&publisher)).map_err(NetworkError::Thread)?;
        Ok(ZenohTransport {
            inbox: Mutex::new(Inbox { events, incoming: Incoming::new(options.max_frame, options.pool) }),
            turn: Mutex::default(),
            shared,
            codec: options.codec,
            peer: format!("{robot}/{}", &connection[..8.min(connection.len())]),
            _subscriber: subscriber,
            _watch: watch,
            _token: token,
            _place: place,
            _network: network.clone(),
        })
    }

    /// Says that this end is there until the other has answered, for so long at most; whether it has.
    pub(super) async fn begin(&self, limit: Duration) -> bool {
        let saying = async {
            loop {
                self.shared.work(|work| work.outbox.begin());
                sleep(BEGIN_PERIOD).await;
            }
        };
        let begun = self.shared.until(|progress| progress.begun);
        let met = async {
            tokio::select! {
                () = saying => {}
                () = begun => {}
            }
        };
        timeout(limit, met).await.is_ok()
    }
}

impl Transport for ZenohTransport {
    async fn send(&self, frame: Frame) -> Result<(), TransportError> {
        let _turn = self.turn.lock().await;
        let may_wait = if frame.len() <= SMALL { QUEUE } else { 0 };
        let pushed = self.shared.work(|work| {
            work.outbox.push(frame);
            work.pushed += 1;
            work.pushed
        });
        self.shared.until(|progress| progress.finished + may_wait >= pushed || progress.failed.is_some()).await;
        let failed = self.shared.progress.borrow().failed.clone();
        failed.map_or(Ok(()), Err)
    }

    async fn recv(&self) -> Result<Option<Frame>, TransportError> {
        let mut inbox = self.inbox.lock().await;
        loop {
            let (word, payload) = match inbox.events.recv().await {
                Some(Event::Put { word, payload }) => (word, payload),
                Some(Event::Closed) => return Ok(None),
                Some(Event::Broken(error)) => return Err(error),
                None => return Err(TransportError::lost("the Zenoh session is closed")),
            };
            self.shared.queued.fetch_sub(cost(payload.len()), Ordering::Relaxed);
            let frame = inbox.incoming.take(word, payload.len(), payload.slices())?;
            if let Some(taken) = inbox.incoming.tell() {
                self.shared.work(|work| work.outbox.tell(taken));
            }
            if frame.is_some() {
                return Ok(frame);
            }
        }
    }

    async fn close(&self) {
        self.shared.work(|work| work.outbox.close());
        // Were this end's token gone before its last word has come, the other side would think it lost.
        let parted = self.shared.until(|progress| progress.said_close && progress.has_parted);
        let _ = timeout(CLOSE_LIMIT, parted).await;
    }

    fn codec(&self) -> Codec {
        self.codec
    }

    fn peer(&self) -> &str {
        &self.peer
    }
}

impl Drop for ZenohTransport {
    fn drop(&mut self) {
        self.shared.work(|work| work.is_dropped = true);
    }
}

impl fmt::Debug for ZenohTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ZenohTransport").field("peer", &self.peer).finish_non_exhaustive()
    }
}

impl Shared {
    /// Changes what the sending thread has to do, and wakes it.
    fn work<T>(&self, change: impl FnOnce(&mut Work) -> T) -> T {
        let changed = change(&mut self.lock());
        self.changed.notify_one();
        changed
    }

    fn lock(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn until(&self, holds: impl Fn(&Progress) -> bool) {
        // It is an error only once the sender is gone, which is in `self`.
        let _ = self.progress.subscribe().wait_for(holds).await;
    }

    /// Nothing more can be sent, but for a last word.
    fn fail(&self, error: TransportError) {
        self.work(|work| work.outbox.abandon());
        self.progress.send_modify(|progress| {
            progress.failed.get_or_insert(error);
        });
    }

    /// The sending thread, since a put waits for the network.
    fn put_all(&self, publisher: &Publisher<'_>) {
        while let Some(put) = self.next() {
            let mut payload = ZBytes::writer();
            for part in put.payload {
                payload.append(ZBytes::from(part));
            }
            if let Err(error) = publisher.put(payload.finish()).attachment(put.word.encode()).wait() {
                return self.fail(TransportError::lost(cause(&error)));
            }
            self.progress.send_if_modified(|progress| {
                progress.finished += u64::from(put.completes);
                progress.said_close |= put.word == Word::Close;
                put.completes || put.word == Word::Close
            });
        }
    }

    /// Waits for the next put; `None` once the transport is dropped.
    fn next(&self) -> Option<Put> {
        let mut work = self.lock();
        loop {
            if work.is_dropped {
                return None;
            }
            if let Some(put) = work.outbox.next() {
                return Some(put);
            }
            work = self.changed.wait(work).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// What Zenoh's own threads call; it never waits.
struct Ear {
    /// What is heard on any other key was put on several at once, and is nothing of ours.
    key: String,
    end: End,
    events: mpsc::UnboundedSender<Event>,
    shared: Arc<Shared>,
}

impl Ear {
    /// A put on the connection.
    fn hear(&self, sample: &Sample) {
        if sample.kind() != SampleKind::Put || sample.key_expr().as_str() != self.key {
            return;
        }
        let word = sample.attachment().filter(|word| word.len() <= MAX_WORD).and_then(|word| Word::decode(&word.to_bytes()));
        match word {
            Some(Word::Begin) if self.end == End::Server => self.shared.work(|work| work.outbox.begin()),
            Some(Word::Begin) => self.shared.progress.send_modify(|progress| progress.begun = true),
            Some(Word::Taken { cost }) => self.shared.work(|work| work.outbox.taken(cost)),
            Some(Word::Close) => {
                self.tell(Event::Closed);
                self.part("the other side closed the connection");
            }
            Some(word @ (Word::Frame { .. } | Word::Chunk { .. })) => self.put(word, sample.payload()),
            None => self.tell(Event::Broken(violation("frames", "bytes that are none"))),
        }
    }

    fn put(&self, word: Word, payload: &ZBytes) {
        let cost = cost(payload.len());
        let queued = self.shared.queued.fetch_add(cost, Ordering::Relaxed).saturating_add(cost);
        if queued <= WINDOW {
            self.tell(Event::Put { word, payload: payload.clone() });
        } else {
            self.tell(Event::Broken(violation("no more than the window allows", format!("{queued} bytes"))));
        }
    }

    /// The other side's token came or went.
    fn watch(&self, sample: &Sample) {
        if sample.kind() == SampleKind::Delete && sample.key_expr().as_str() == self.key {
            self.tell(Event::Broken(TransportError::lost("the other side is not alive any more")));
            self.part("the other side is not alive any more");
        }
    }

    fn part(&self, why: &'static str) {
        self.shared.fail(TransportError::lost(why));
        self.shared.progress.send_modify(|progress| progress.has_parted = true);
    }

    /// Nothing follows an end, so that no flood of them fills the memory.
    fn tell(&self, event: Event) {
        let is_over = match event {
            Event::Put { .. } => self.shared.is_over.load(Ordering::Acquire),
            Event::Closed | Event::Broken(_) => self.shared.is_over.swap(true, Ordering::AcqRel),
        };
        if !is_over {
            let _ = self.events.send(event);
        }
    }
}
