//! What Zenoh's threads call when a sample of a lane arrives. Nothing here waits.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

use chiral_proto::{TransportError, keys::End};
use tokio::sync::mpsc;
use zenoh::{
    bytes::ZBytes,
    sample::{Sample, SampleKind},
};

use super::{
    packet::Packet,
    publisher::LanePublisher,
    reassembly::{WINDOW, cost, violation},
    send_queue::MAX_LOST,
    shm::is_shared_probe,
};
use crate::liveness::IdleTimeout;

/// Longer than any attachment that a peer sends.
const MAX_ATTACHMENT: usize = 64;

/// What the transport receives. As many puts are queued as the window allows, and at most one end.
pub(super) enum Event {
    Put { packet: Packet, payload: ZBytes },
    Closed,
    Broken(TransportError),
}

/// What the transport and the callbacks know of the events between them.
pub(super) struct ReceiveState {
    /// The load of the puts that the transport has not received yet, as [`load`] counts.
    queued: AtomicU64,
    /// An end was queued.
    is_over: AtomicBool,
    idle_timeout: IdleTimeout,
}

/// The callbacks for one key.
pub(super) struct SampleHandler {
    /// Samples on any other key were put on several keys at once, and are ignored.
    pub(super) key: String,
    /// Our end.
    pub(super) end: End,
    /// Owned by callbacks only: the channel closes when Zenoh drops them with its session.
    pub(super) events: mpsc::UnboundedSender<Event>,
    pub(super) state: Arc<ReceiveState>,
    pub(super) publisher: Arc<LanePublisher>,
}

impl ReceiveState {
    pub(super) fn new(idle_timeout: IdleTimeout) -> ReceiveState {
        ReceiveState { queued: AtomicU64::new(0), is_over: AtomicBool::new(false), idle_timeout }
    }

    /// The transport has taken a put from the queue.
    pub(super) fn take(&self, packet: Packet, payload: &ZBytes) {
        self.queued.fetch_sub(load(packet, payload), Ordering::Relaxed);
    }
}

impl SampleHandler {
    /// Handles a put on the lane.
    pub(super) fn on_put(&self, sample: &Sample) {
        if sample.kind() != SampleKind::Put || sample.key_expr().as_str() != self.key {
            return;
        }
        self.state.idle_timeout.record();
        let packet = sample
            .attachment()
            .filter(|attachment| attachment.len() <= MAX_ATTACHMENT)
            .and_then(|attachment| Packet::decode(&attachment.to_bytes()));
        match packet {
            Some(Packet::Ready) if self.end == End::Server => {
                self.publisher.update(|queue| queue.queue_ready())
            }
            Some(Packet::Ready) => self.publisher.on_ready(),
            Some(Packet::Acknowledge { cost }) => self.publisher.update(|queue| queue.on_acknowledge(cost)),
            Some(Packet::Close) => {
                self.push(Event::Closed);
                self.publisher.on_close();
                self.publisher.on_peer_left("the peer closed the connection");
            }
            Some(Packet::Mapped { number }) => self.publisher.on_mapped(number),
            Some(Packet::Probe { region }) => {
                let is_shared = is_shared_probe(sample.payload());
                self.publisher.update(|queue| queue.queue_probed(region, is_shared));
            }
            Some(Packet::Probed { region, is_shared }) => self.publisher.on_probed(region, is_shared == 1),
            // It would bypass the window, and a client sends nothing that large.
            Some(Packet::Reference { .. }) if self.end == End::Server => {
                self.push(Event::Broken(violation("frames of a client by the network", "one by reference")));
            }
            Some(packet @ (Packet::Frame { .. } | Packet::Chunk { .. } | Packet::Reference { .. })) => {
                self.push_put(packet, sample.payload())
            }
            None => self.push(Event::Broken(violation("a packet", "an attachment of another kind"))),
        }
    }

    /// Handles a change of the peer's liveliness token.
    pub(super) fn on_liveliness(&self, sample: &Sample) {
        if sample.kind() == SampleKind::Delete && sample.key_expr().as_str() == self.key {
            let why = "the peer is not alive any more";
            self.push(Event::Broken(TransportError::lost(why)));
            self.publisher.on_peer_left(why);
        }
    }

    fn push_put(&self, packet: Packet, payload: &ZBytes) {
        let load = load(packet, payload);
        let queued = self.state.queued.fetch_add(load, Ordering::Relaxed).saturating_add(load);
        // References are put regardless of the window: the awaited one, and those that were given up.
        if queued <= WINDOW + u64::from(MAX_LOST + 1) * cost(0) {
            self.push(Event::Put { packet, payload: payload.clone() });
        } else {
            self.push(Event::Broken(violation("no more than the window", format!("{queued} bytes"))));
        }
    }

    /// Nothing follows an end, so that a flood of packets cannot fill the memory.
    fn push(&self, event: Event) {
        let is_over = match event {
            Event::Put { .. } => self.state.is_over.load(Ordering::Acquire),
            Event::Closed | Event::Broken(_) => self.state.is_over.swap(true, Ordering::AcqRel),
        };
        if !is_over {
            let _ = self.events.send(event);
        }
    }
}

/// What a queued put counts, as [`cost`] does: the payload of a reference weighs nothing.
fn load(packet: Packet, payload: &ZBytes) -> u64 {
    if matches!(packet, Packet::Reference { .. }) { cost(0) } else { cost(payload.len()) }
}
