//! An in-memory transport with latency and bandwidth that can be cut, stalled or made silent, for tests on a
//! virtual clock whose subject is not the network.
//!
//! All waits are tokio's, so under `tokio::time::pause` they take no real time.

use std::{sync::Arc, time::Duration};

use chiral_proto::{Codec, Frame, Transport, TransportError};
use tokio::{
    sync::{Mutex, mpsc, watch},
    time::{Instant, sleep_until},
};

/// The properties of a link, the same in both directions.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LinkOptions {
    /// The one-way delay.
    pub latency: Duration,
    /// Bits per second; `None` means that sending takes no time.
    pub bandwidth: Option<f64>,
}

/// The state of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LinkState {
    Alive,
    /// Frames are lost and neither end gets an error, as with a pulled cable or a host without power.
    Silent,
    /// Frames wait, and arrive together when the link recovers, as with Wi-Fi that retransmits.
    Stalled,
    /// Both ends get an error, as with a connection reset.
    Cut,
}

/// Breaks a link.
#[derive(Clone, Debug)]
pub struct LinkControl {
    state: Arc<watch::Sender<LinkState>>,
}

impl LinkControl {
    /// Cuts the link; both ends get an error.
    pub fn cut(&self) {
        self.state.send_replace(LinkState::Cut);
    }

    /// Holds all frames back until [`LinkControl::recover`].
    pub fn stall(&self) {
        self.state.send_replace(LinkState::Stalled);
    }

    /// Delivers what was held back, and everything after it as usual.
    pub fn recover(&self) {
        self.state.send_replace(LinkState::Alive);
    }

    /// Loses all frames from now on; neither end gets an error.
    pub fn go_silent(&self) {
        self.state.send_replace(LinkState::Silent);
    }
}

/// One end of a link. If it is dropped, the other end sees a clean close.
#[derive(Debug)]
pub struct LinkEnd {
    options: LinkOptions,
    state: watch::Receiver<LinkState>,
    outgoing: Mutex<Outgoing>,
    incoming: Mutex<Incoming>,
    peer: &'static str,
}

#[derive(Debug)]
struct Outgoing {
    frames: Option<mpsc::UnboundedSender<(Instant, Frame)>>,
    /// When the last frame has been sent.
    free_at: Instant,
}

#[derive(Debug)]
struct Incoming {
    frames: mpsc::UnboundedReceiver<(Instant, Frame)>,
    /// A frame that was sent and has not arrived.
    in_flight: Option<(Instant, Frame)>,
}

/// Creates a link and the control that breaks it.
pub fn link(options: LinkOptions) -> (LinkEnd, LinkEnd, LinkControl) {
    let (state, state_receiver) = watch::channel(LinkState::Alive);
    let (to_b, from_a) = mpsc::unbounded_channel();
    let (to_a, from_b) = mpsc::unbounded_channel();
    let end = |frames, incoming, peer| LinkEnd {
        options,
        state: state_receiver.clone(),
        outgoing: Mutex::new(Outgoing { frames: Some(frames), free_at: Instant::now() }),
        incoming: Mutex::new(Incoming { frames: incoming, in_flight: None }),
        peer,
    };
    (end(to_b, from_b, "link end b"), end(to_a, from_a, "link end a"), LinkControl { state: Arc::new(state) })
}

/// Sleeps until `instant`, not at all if it is past: tokio's sleep would still take a millisecond.
async fn wait_until(instant: Instant) {
    if Instant::now() < instant {
        sleep_until(instant).await;
    }
}

impl LinkEnd {
    /// Returns once the link is cut.
    async fn cut(&self) -> TransportError {
        let mut state = self.state.clone();
        if state.wait_for(|state| *state == LinkState::Cut).await.is_err() {
            // The control was dropped: the link can no longer be cut.
            std::future::pending::<()>().await;
        }
        TransportError::lost("the link was cut")
    }
}

impl LinkEnd {
    /// Returns once the link is not stalled.
    async fn recovered(&self) {
        let mut state = self.state.clone();
        // Fails if the control was dropped, which leaves the link as it is.
        if state.wait_for(|state| *state != LinkState::Stalled).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

impl Transport for LinkEnd {
    async fn send(&self, frame: Frame) -> Result<(), TransportError> {
        let deliver = async {
            let mut outgoing = self.outgoing.lock().await;
            // In one piece, as a frame arrives from a socket.
            let frame = Frame::from(frame.into_bytes());
            let duration =
                self.options.bandwidth.map_or(0.0, |bandwidth| frame.len() as f64 * 8.0 / bandwidth);
            outgoing.free_at = outgoing.free_at.max(Instant::now()) + Duration::from_secs_f64(duration);
            wait_until(outgoing.free_at).await;
            if *self.state.borrow() != LinkState::Silent {
                let arrival = outgoing.free_at + self.options.latency;
                let sent = outgoing.frames.as_ref().map(|frames| frames.send((arrival, frame)));
                sent.and_then(Result::ok).ok_or_else(|| TransportError::lost("the other end is closed"))?;
            }
            Ok(())
        };
        tokio::select! {
            error = self.cut() => Err(error),
            sent = deliver => sent,
        }
    }

    async fn recv(&self) -> Result<Option<Frame>, TransportError> {
        let arrive = async {
            let mut incoming = self.incoming.lock().await;
            if incoming.in_flight.is_none() {
                incoming.in_flight = incoming.frames.recv().await;
            }
            if let Some((arrival, _)) = &incoming.in_flight {
                wait_until(*arrival).await;
                self.recovered().await;
            }
            match incoming.in_flight.take() {
                Some((_, frame)) => Ok(Some(frame)),
                // A silent link does not deliver a close either.
                None if *self.state.borrow() == LinkState::Silent => std::future::pending().await,
                None => Ok(None),
            }
        };
        tokio::select! {
            biased;
            error = self.cut() => Err(error),
            frame = arrive => frame,
        }
    }

    async fn close(&self) {
        self.outgoing.lock().await.frames = None;
    }

    fn codec(&self) -> Codec {
        Codec::Protobuf
    }

    fn peer(&self) -> &str {
        self.peer
    }
}
