//! The sending side of a lane: Zenoh's publisher, the send queue, and the thread that puts large frames. What
//! to put, and in which order, is decided in `send_queue`.

use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use chiral_proto::{Frame, TransportError, lock};
use tokio::sync::watch;
use zenoh::{Wait, bytes::ZBytes, pubsub::Publisher};

use super::{
    error::{ZenohError, cause},
    packet::Packet,
    reassembly::SMALL,
    send_queue::{Path, Put, SendQueue},
    shm::SharedMemory,
    thread::schedule_as_batch,
};

/// A frame sent by reference that is not confirmed after one to two of these periods is sent by the network.
const REFERENCE_PERIOD: Duration = Duration::from_millis(500);
/// How many frames of up to [`SMALL`] bytes may be queued while their senders go on. Larger ones may be
/// observations, which are never queued.
const MAX_QUEUED: u64 = 8;

/// Sends the packets of one lane. Shared by the transport, Zenoh's callbacks and the sending thread.
pub(super) struct LanePublisher {
    publisher: Publisher<'static>,
    memory: Option<SharedMemory>,
    peer: String,
    state: Mutex<State>,
    /// Notified when the sending thread has something to do.
    changed: Condvar,
    progress: watch::Sender<Progress>,
}

#[derive(Default)]
struct State {
    queue: SendQueue,
    /// Frames pushed so far.
    pushed: u64,
    /// A thread is putting a packet, and looks for more afterwards.
    is_putting: bool,
    has_logged_no_answer: bool,
    is_stopped: bool,
}

/// What tasks wait for.
#[derive(Default)]
pub(super) struct Progress {
    /// The peer has sent its first packet.
    pub(super) is_peer_ready: bool,
    /// Our close packet was put.
    pub(super) is_close_sent: bool,
    /// The peer has sent its close packet.
    pub(super) has_peer_closed: bool,
    /// The peer has closed, or is lost.
    pub(super) has_peer_left: bool,
    /// Frames that Zenoh has taken over.
    finished: u64,
    /// Why nothing more can be sent.
    failed: Option<TransportError>,
}

impl LanePublisher {
    pub(super) fn new(
        publisher: Publisher<'static>,
        memory: Option<SharedMemory>,
        peer: String,
    ) -> LanePublisher {
        LanePublisher {
            publisher,
            memory,
            peer,
            state: Mutex::default(),
            changed: Condvar::new(),
            progress: watch::Sender::new(Progress::default()),
        }
    }

    /// Starts the sending thread, which runs until [`LanePublisher::stop`].
    pub(super) fn spawn_thread(self: &Arc<Self>, name: String) -> Result<(), ZenohError> {
        let publisher = Arc::clone(self);
        let run = move || publisher.run_thread();
        thread::Builder::new().name(name).spawn(run).map_err(ZenohError::Thread)?;
        Ok(())
    }

    /// The peer's name for the log.
    pub(super) fn peer(&self) -> &str {
        &self.peer
    }

    /// Sends a frame. Returns once Zenoh has taken it over, or at once if it is small and few are queued. One
    /// call at a time.
    pub(super) async fn send(&self, frame: Frame) -> Result<(), TransportError> {
        let may_queue = if frame.len() <= SMALL { MAX_QUEUED } else { 0 };
        let regions = self.memory.as_ref().map_or_else(Vec::new, |memory| memory.regions(&frame));
        let pushed = {
            let mut state = self.lock();
            state.queue.push(frame, regions);
            state.pushed += 1;
            state.pushed
        };
        self.flush();
        self.wait_for(|progress| progress.finished + may_queue >= pushed || progress.failed.is_some()).await;
        let progress = self.progress.borrow();
        match &progress.failed {
            // A frame that Zenoh has taken over counts as sent, even if the peer has left since.
            Some(failed) if progress.finished < pushed => Err(failed.clone()),
            _ => Ok(()),
        }
    }

    /// Changes the queue, and wakes the sending thread if there is something to put.
    pub(super) fn update<T>(&self, change: impl FnOnce(&mut SendQueue) -> T) -> T {
        let mut state = self.lock();
        let changed = change(&mut state.queue);
        if state.queue.has_work() {
            self.changed.notify_one();
        }
        changed
    }

    /// Changes the queue without waking the sending thread: the caller calls [`LanePublisher::flush`] next.
    pub(super) fn update_before_flush(&self, change: impl FnOnce(&mut SendQueue)) {
        change(&mut self.lock().queue);
    }

    /// Puts packets on the calling thread, which saves waking another, unless that may wait for the network:
    /// those are left to the sending thread.
    pub(super) fn flush(&self) {
        loop {
            let put = {
                let mut state = self.lock();
                if state.is_putting || state.is_stopped {
                    return;
                }
                let put = state.queue.next_unhindered();
                state.is_putting = put.is_some();
                if put.is_none() && state.queue.has_work() {
                    self.changed.notify_one();
                }
                put
            };
            let Some(put) = put else { return };
            self.put(put);
            self.lock().is_putting = false;
        }
    }

    /// Waits until `holds` is true of the progress.
    pub(super) async fn wait_for(&self, holds: impl Fn(&Progress) -> bool) {
        // Fails only once the sender is gone, which `self` owns.
        let _ = self.progress.subscribe().wait_for(holds).await;
    }

    /// The peer has sent its first packet.
    pub(super) fn on_ready(&self) {
        self.progress.send_modify(|progress| progress.is_peer_ready = true);
    }

    /// The peer has answered whether it can map a region of shared memory.
    pub(super) fn on_probed(&self, region: u64, is_shared: bool) {
        let (before, after) = self.update(|queue| {
            let before = queue.path();
            queue.on_probed(region, is_shared);
            (before, queue.path())
        });
        if before == after {
            return;
        }
        match after {
            Path::Reference => tracing::info!("observations to {} travel by shared memory", self.peer),
            _ => tracing::info!(
                "observations to {} travel by the network: it cannot map this host's shared memory",
                self.peer
            ),
        }
    }

    /// The peer has received a frame that was sent by reference.
    pub(super) fn on_mapped(&self, number: u64) {
        if self.update(|queue| queue.on_mapped(number)) {
            self.progress.send_modify(|progress| progress.finished += 1);
        }
    }

    /// The peer has sent its close packet. [`LanePublisher::on_peer_left`] follows.
    pub(super) fn on_close(&self) {
        self.progress.send_modify(|progress| progress.has_peer_closed = true);
    }

    /// The peer has closed or is lost.
    pub(super) fn on_peer_left(&self, why: &'static str) {
        self.fail(TransportError::lost(why));
        self.progress.send_modify(|progress| progress.has_peer_left = true);
    }

    /// Ends the sending thread. If the peer left without closing, whatever shared memory it held is lost.
    pub(super) fn stop(&self) {
        let has_sent_references = {
            let mut state = self.lock();
            state.is_stopped = true;
            self.changed.notify_one();
            state.queue.has_sent_references()
        };
        // A peer that closed has returned what it held, or will.
        if let Some(memory) = &self.memory
            && has_sent_references
            && !self.progress.borrow().has_peer_closed
        {
            memory.report_lost_reader();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Nothing more can be sent but the close packet.
    fn fail(&self, error: TransportError) {
        self.update(SendQueue::discard_frames);
        self.progress.send_modify(|progress| {
            progress.failed.get_or_insert(error);
        });
    }

    /// The sending thread.
    fn run_thread(&self) {
        schedule_as_batch();
        let mut probing_since = None;
        while let Some(put) = self.next() {
            self.put(put);
            let mut state = self.lock();
            state.is_putting = false;
            if state.queue.path() != Path::Probing {
                probing_since = None;
            } else if probing_since.get_or_insert_with(Instant::now).elapsed() > REFERENCE_PERIOD
                && !state.has_logged_no_answer
            {
                // A Zenoh session that cannot map shared memory drops the probe without an answer.
                state.has_logged_no_answer = true;
                let peer = &self.peer;
                tracing::info!(
                    "observations to {peer} travel by the network: it does not answer whether it can map \
                     this host's shared memory"
                );
            }
        }
    }

    /// Waits for the next put; `None` once the publisher is stopped.
    fn next(&self) -> Option<Put> {
        let mut awaited = None;
        let mut state = self.lock();
        loop {
            if state.is_stopped {
                return None;
            }
            if !state.is_putting
                && let Some(put) = state.queue.next(usize::MAX)
            {
                state.is_putting = true;
                return Some(put);
            }
            let waited = self.changed.wait_timeout(state, REFERENCE_PERIOD);
            let (locked, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
            state = locked;
            if timeout.timed_out() {
                let before = std::mem::replace(&mut awaited, state.queue.awaited_reference());
                if before.is_some_and(|number| state.queue.give_up_reference(number)) {
                    tracing::warn!(
                        "an observation to {} did not arrive by shared memory in time: sent by the network",
                        self.peer
                    );
                }
            }
        }
    }

    fn put(&self, put: Put) {
        let is_large = put.completes_frame
            && (matches!(put.packet, Packet::Chunk { .. })
                || put.payload.iter().any(|part| part.len() > SMALL));
        let payload = match (put.packet, &self.memory) {
            (Packet::Reference { .. }, Some(memory)) => {
                memory.count(true);
                memory.payload_by_reference(put.payload)
            }
            // A region that was replaced meanwhile: nothing new lies in it.
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
        if let Err(error) = self.publisher.put(payload).attachment(put.packet.encode()).wait() {
            return self.fail(TransportError::lost(cause(&error)));
        }
        self.progress.send_if_modified(|progress| {
            progress.finished += u64::from(put.completes_frame);
            progress.is_close_sent |= put.packet == Packet::Close;
            put.completes_frame || put.packet == Packet::Close
        });
    }
}
