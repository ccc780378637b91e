//! One connection over a Zenoh network as a transport: a publisher, with a thread for what is large, and a
//! subscriber into a queue.

use std::{
    fmt,
    sync::{
        Arc, Condvar, Mutex as StdMutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
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

use crate::IdleTimeout;

use super::{
    packet::Packet,
    reassembly::{Reassembly, SMALL, WINDOW, cost, violation},
    send_queue::{MAX_LOST, Path, Put, SendQueue},
    session::{ZenohError, ZenohSession, cause, failed},
    shm::{SharedMemory, is_seen, segments},
};

/// The client says so often that it is there, until it is answered.
const BEGIN_PERIOD: Duration = Duration::from_millis(20);
/// For a last word each way.
const CLOSE_LIMIT: Duration = Duration::from_millis(500);
/// A frame that was sent by reference and has not arrived after one to two of these is sent by the network.
const REFERENCE_LIMIT: Duration = Duration::from_millis(500);
/// So many frames up to [`SMALL`] bytes may wait without their senders; what is larger may be an observation,
/// which must not.
const QUEUE: u64 = 8;
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
    /// Where pixels may lie that are sent by reference.
    pub shared_memory: Option<SharedMemory>,
    /// For how long nothing may arrive: the limit of [`ZenohTransport::idle_timeout`].
    pub idle_timeout: Duration,
}

/// Frames on two keys of a Zenoh network, one for each direction.
pub struct ZenohTransport {
    inbox: Mutex<Inbox>,
    /// Held by who sends.
    turn: Mutex<()>,
    shared: Arc<Shared>,
    codec: Codec,
    _subscriber: Subscriber<()>,
    _watch: Subscriber<()>,
    _token: LivelinessToken,
    _place: Option<OwnedSemaphorePermit>,
    // Goes last.
    _network: ZenohSession,
}

struct Inbox {
    events: mpsc::UnboundedReceiver<Event>,
    incoming: Reassembly,
}

/// What came. As much waits as the window allows, and one end.
enum Event {
    Put { word: Packet, payload: ZBytes },
    Closed,
    Broken(TransportError),
}

/// What Zenoh's threads, the sending thread and the transport share.
struct Shared {
    publisher: Publisher<'static>,
    memory: Option<SharedMemory>,
    peer: String,
    work: StdMutex<Work>,
    changed: Condvar,
    progress: watch::Sender<Progress>,
    /// What came and was not taken yet, as `cost` counts.
    queued: AtomicU64,
    /// The last event was told.
    is_over: AtomicBool,
    idle_timeout: IdleTimeout,
}

#[derive(Default)]
struct Work {
    outbox: SendQueue,
    pushed: u64,
    /// Somebody puts, and looks for more afterwards.
    is_putting: bool,
    was_silence_told: bool,
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
    /// It was the other side's last word.
    was_told: bool,
    /// Why nothing more can be sent.
    failed: Option<TransportError>,
}

impl ZenohTransport {
    /// This end of a connection: from now on it hears the other.
    pub(super) async fn declare(
        network: &ZenohSession,
        robot: &str,
        connection: &str,
        end: End,
        kind: LaneKind,
        options: ZenohOptions,
        place: Option<OwnedSemaphorePermit>,
    ) -> Result<ZenohTransport, ZenohError> {
        let session = network.session();
        let publisher = session.declare_publisher(keys::frames(robot, connection, end));
        let publisher =
            publisher.congestion_control(CongestionControl::Block).priority(kind.priority()).express(true);
        let (sender, events) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared {
            publisher: publisher.await.map_err(failed)?,
            memory: options.shared_memory,
            peer: format!("{robot}/{}", &connection[..8.min(connection.len())]),
            work: StdMutex::default(),
            changed: Condvar::new(),
            progress: watch::Sender::new(Progress::default()),
            queued: AtomicU64::new(0),
            is_over: AtomicBool::new(false),
            idle_timeout: IdleTimeout::new(options.idle_timeout),
        });
        let key = keys::frames(robot, connection, end.other());
        let ear =
            SampleHandler { key: key.clone(), end, events: sender.clone(), shared: Arc::clone(&shared) };
        let subscriber = session.declare_subscriber(key).callback(move |sample| ear.hear(&sample));
        let subscriber = subscriber.await.map_err(failed)?;
        let other = keys::end(robot, connection, end.other());
        let ear = SampleHandler { key: other.clone(), end, events: sender, shared: Arc::clone(&shared) };
        let watch = session
            .liveliness()
            .declare_subscriber(other)
            .history(true)
            .callback(move |sample| ear.watch(&sample));
        let watch = watch.await.map_err(failed)?;
        let token = session.liveliness().declare_token(keys::end(robot, connection, end));
        let token = token.await.map_err(failed)?;
        let putting = Arc::clone(&shared);
        let name = format!("chiral-{}", kind.word());
        thread::Builder::new().name(name).spawn(move || putting.put_all()).map_err(ZenohError::Thread)?;
        Ok(ZenohTransport {
            inbox: Mutex::new(Inbox { events, incoming: Reassembly::new(options.max_frame, options.pool) }),
            turn: Mutex::default(),
            shared,
            codec: options.codec,
            _subscriber: subscriber,
            _watch: watch,
            _token: token,
            _place: place,
            _network: network.clone(),
        })
    }

    /// Expires when nothing has arrived for too long; whoever uses the transport waits for it.
    pub fn idle_timeout(&self) -> IdleTimeout {
        self.shared.idle_timeout.clone()
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
        let regions = self.shared.memory.as_ref().map_or_else(Vec::new, |memory| memory.regions(&frame));
        let pushed = {
            let mut work = self.shared.lock();
            work.outbox.push(frame, regions);
            work.pushed += 1;
            work.pushed
        };
        self.shared.flush();
        self.shared
            .until(|progress| progress.finished + may_wait >= pushed || progress.failed.is_some())
            .await;
        let progress = self.shared.progress.borrow();
        match &progress.failed {
            // What Zenoh has taken over is sent, also if the other side has left since.
            Some(failed) if progress.finished < pushed => Err(failed.clone()),
            _ => Ok(()),
        }
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
            self.shared.queued.fetch_sub(load(word, &payload), Ordering::Relaxed);
            let frame = if let Packet::Reference { number } = word {
                let frame = inbox.incoming.take_reference(number, segments(&payload))?;
                self.shared.lock().outbox.tell_mapped(number);
                frame
            } else {
                inbox.incoming.take(word, payload.len(), payload.slices())?
            };
            if let Some(taken) = inbox.incoming.tell() {
                self.shared.lock().outbox.tell(taken);
            }
            self.shared.flush();
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
        &self.shared.peer
    }
}

impl Drop for ZenohTransport {
    fn drop(&mut self) {
        let has_referred = self.shared.work(|work| {
            work.is_dropped = true;
            work.outbox.has_referred()
        });
        // A peer that said goodbye has given back what it had, or will.
        if let Some(memory) = &self.shared.memory
            && has_referred
            && !self.shared.progress.borrow().was_told
        {
            memory.spoil();
        }
    }
}

impl fmt::Debug for ZenohTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ZenohTransport").field("peer", &self.shared.peer).finish_non_exhaustive()
    }
}

/// Has Linux let whoever runs go on when the calling thread wakes up (`SCHED_BATCH`). Elsewhere, or if Linux
/// refuses, it is merely slower.
///
/// Zenoh's writing thread frees a batch and wakes who waits to fill it, hundreds of times an observation.
/// Where each time interrupts the writing, the two need a third longer on a core that they share; nor should
/// an action wait until pixels are copied.
pub(super) fn give_way() {
    #[cfg(target_os = "linux")]
    {
        use thread_priority::{
            NormalThreadSchedulePolicy::Batch, ThreadPriority::Crossplatform, ThreadSchedulePolicy::Normal,
            unix,
        };
        // What sets the policy sets a niceness with it, of which 48 stands for 0: who has chosen another one
        // keeps all as it is.
        if rustix::process::getpriority_process(None) == Ok(0)
            && let Ok(usual) = 48_u8.try_into()
        {
            let _ = unix::set_thread_priority_and_policy(
                unix::thread_native_id(),
                Crossplatform(usual),
                Normal(Batch),
            );
        }
    }
}

impl Shared {
    /// Changes what there is to do, and wakes the sending thread if that is anything.
    fn work<T>(&self, change: impl FnOnce(&mut Work) -> T) -> T {
        let mut work = self.lock();
        let changed = change(&mut work);
        if work.is_dropped || work.outbox.has_work() {
            self.changed.notify_one();
        }
        changed
    }

    fn lock(&self) -> MutexGuard<'_, Work> {
        crate::lock(&self.work)
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

    /// Puts what is small, without waking another thread for it. What is large is left to the sending thread,
    /// since it waits for the network.
    fn flush(&self) {
        loop {
            let put = {
                let mut work = self.lock();
                if work.is_putting || work.is_dropped {
                    return;
                }
                let put = work.outbox.next(SMALL);
                work.is_putting = put.is_some();
                if put.is_none() && work.outbox.has_work() {
                    self.changed.notify_one();
                }
                put
            };
            let Some(put) = put else { return };
            self.put(put);
            self.lock().is_putting = false;
        }
    }

    /// The sending thread.
    fn put_all(&self) {
        give_way();
        let mut asked_at = None;
        while let Some(put) = self.next() {
            self.put(put);
            let mut work = self.lock();
            work.is_putting = false;
            if work.outbox.path() != Path::Asked {
                asked_at = None;
            } else if asked_at.get_or_insert_with(Instant::now).elapsed() > REFERENCE_LIMIT
                && !work.was_silence_told
            {
                // Its Zenoh drops what it cannot see, without a word.
                work.was_silence_told = true;
                let peer = &self.peer;
                tracing::info!(
                    "observations to {peer} travel by the network: no word whether it sees this host's shared memory"
                );
            }
        }
    }

    /// Waits for the next put; `None` once the transport is dropped.
    fn next(&self) -> Option<Put> {
        let mut awaited = None;
        let mut work = self.lock();
        loop {
            if work.is_dropped {
                return None;
            }
            if !work.is_putting
                && let Some(put) = work.outbox.next(usize::MAX)
            {
                work.is_putting = true;
                return Some(put);
            }
            let waited = self.changed.wait_timeout(work, REFERENCE_LIMIT);
            let (now, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
            work = now;
            if timeout.timed_out() {
                let before = std::mem::replace(&mut awaited, work.outbox.awaited());
                if before.is_some_and(|number| work.outbox.give_up(number)) {
                    tracing::warn!(
                        "what was sent to {} by shared memory did not arrive in time, and goes by the network",
                        self.peer
                    );
                }
            }
        }
    }

    fn put(&self, put: Put) {
        let is_large = put.completes
            && (matches!(put.word, Packet::Chunk { .. })
                || put.payload.iter().any(|part| part.len() > SMALL));
        let payload = match (put.word, &self.memory) {
            (Packet::Reference { .. }, Some(memory)) => {
                memory.count(true);
                memory.refer(put.payload)
            }
            // A region that has gone meanwhile has no pixels left to ask for.
            (Packet::Probe { region }, Some(memory)) => memory.probe(region).unwrap_or_default(),
            (_, memory) => {
                if let Some(memory) = memory.as_ref().filter(|_| is_large) {
                    memory.count(false);
                }
                let mut payload = ZBytes::writer();
                for part in put.payload {
                    payload.append(ZBytes::from(part));
                }
                payload.finish()
            }
        };
        if let Err(error) = self.publisher.put(payload).attachment(put.word.encode()).wait() {
            return self.fail(TransportError::lost(cause(&error)));
        }
        self.progress.send_if_modified(|progress| {
            progress.finished += u64::from(put.completes);
            progress.said_close |= put.word == Packet::Close;
            put.completes || put.word == Packet::Close
        });
    }

    /// The other side has said whether it sees a region of shared memory.
    fn probed(&self, region: u64, is_shared: bool) {
        let (before, after) = self.work(|work| {
            let before = work.outbox.path();
            work.outbox.probed(region, is_shared);
            (before, work.outbox.path())
        });
        if before == after {
            return;
        }
        match after {
            Path::Reference => tracing::info!("observations to {} travel by shared memory", self.peer),
            _ => tracing::info!(
                "observations to {} travel by the network: it does not see this host's shared memory",
                self.peer
            ),
        }
    }

    /// The other side has a frame that was sent by reference.
    fn mapped(&self, number: u64) {
        if self.work(|work| work.outbox.mapped(number)) {
            self.progress.send_modify(|progress| progress.finished += 1);
        }
    }
}

/// What a put that waits counts, as [`cost`] does: a reference weighs nothing.
fn load(word: Packet, payload: &ZBytes) -> u64 {
    if matches!(word, Packet::Reference { .. }) { cost(0) } else { cost(payload.len()) }
}

/// What Zenoh's own threads call; it never waits.
struct SampleHandler {
    /// What is heard on any other key was put on several at once, and is nothing of ours.
    key: String,
    end: End,
    events: mpsc::UnboundedSender<Event>,
    shared: Arc<Shared>,
}

impl SampleHandler {
    /// A put on the connection.
    fn hear(&self, sample: &Sample) {
        if sample.kind() != SampleKind::Put || sample.key_expr().as_str() != self.key {
            return;
        }
        self.shared.idle_timeout.record();
        let word = sample
            .attachment()
            .filter(|word| word.len() <= MAX_WORD)
            .and_then(|word| Packet::decode(&word.to_bytes()));
        match word {
            Some(Packet::Begin) if self.end == End::Server => self.shared.work(|work| work.outbox.begin()),
            Some(Packet::Begin) => self.shared.progress.send_modify(|progress| progress.begun = true),
            Some(Packet::Taken { cost }) => self.shared.work(|work| work.outbox.taken(cost)),
            Some(Packet::Close) => {
                self.tell(Event::Closed);
                self.shared.progress.send_modify(|progress| progress.was_told = true);
                self.part("the other side closed the connection");
            }
            Some(Packet::Mapped { number }) => self.shared.mapped(number),
            Some(Packet::Probe { region }) => {
                let is_shared = is_seen(sample.payload());
                self.shared.work(|work| work.outbox.tell_probed(region, is_shared));
            }
            Some(Packet::Probed { region, is_shared }) => self.shared.probed(region, is_shared == 1),
            // It would get past the window, and no client has anything that large to say.
            Some(Packet::Reference { .. }) if self.end == End::Server => {
                self.tell(Event::Broken(violation("a client's frames by the network", "one by reference")));
            }
            Some(word @ (Packet::Frame { .. } | Packet::Chunk { .. } | Packet::Reference { .. })) => {
                self.put(word, sample.payload())
            }
            None => self.tell(Event::Broken(violation("frames", "bytes that are none"))),
        }
    }

    fn put(&self, word: Packet, payload: &ZBytes) {
        let load = load(word, payload);
        let queued = self.shared.queued.fetch_add(load, Ordering::Relaxed).saturating_add(load);
        // References are put whatever the window: one that is waited for, and those that were given up.
        if queued <= WINDOW + u64::from(MAX_LOST + 1) * cost(0) {
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

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use thread_priority::{NormalThreadSchedulePolicy, ThreadSchedulePolicy, unix};

    use super::*;

    #[test]
    fn a_thread_that_gives_way_keeps_its_niceness() {
        let gives_way = thread::spawn(|| {
            give_way();
            (unix::thread_schedule_policy().unwrap(), rustix::process::getpriority_process(None).unwrap())
        });
        let niceness = rustix::process::getpriority_process(None).unwrap();
        let policy =
            if niceness == 0 { NormalThreadSchedulePolicy::Batch } else { NormalThreadSchedulePolicy::Other };
        assert_eq!(gives_way.join().unwrap(), (ThreadSchedulePolicy::Normal(policy), niceness));
    }
}
