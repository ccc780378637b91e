//! An in-memory transport with latency and bandwidth, that can be cut or go silent: for tests on a virtual
//! clock, where the network is not the subject.
//!
//! All waiting is tokio's, so under `tokio::time::pause` nothing here takes real time.

use std::{sync::Arc, time::Duration};

use chiral_proto::{Codec, Frame, Transport, TransportError};
use tokio::{
    sync::{Mutex, mpsc, watch},
    time::{Instant, sleep_until},
};

/// What a link is like, the same in both directions.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LinkOptions {
    /// From one end to the other, one way.
    pub latency: Duration,
    /// Bits a second; `None` means that sending takes no time.
    pub bandwidth: Option<f64>,
}

/// What has become of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Alive,
    /// What is sent vanishes, and nobody is told: a cable pulled, a host without power.
    Silent,
    /// Both ends are told: a connection reset.
    Cut,
}

/// Breaks a link.
#[derive(Clone, Debug)]
pub struct LinkControl {
    fate: Arc<watch::Sender<Fate>>,
}

impl LinkControl {
    /// Breaks the connection; both ends get an error.
    pub fn cut(&self) {
        self.fate.send_replace(Fate::Cut);
    }

    /// From now on what is sent vanishes, and nobody is told.
    pub fn silence(&self) {
        self.fate.send_replace(Fate::Silent);
    }
}

/// One end of a link. Dropping it is a clean close, as the other end sees it.
#[derive(Debug)]
pub struct LinkEnd {
    options: LinkOptions,
    fate: watch::Receiver<Fate>,
    outgoing: Mutex<Outgoing>,
    incoming: Mutex<Reassembly>,
    peer: &'static str,
}

#[derive(Debug)]
struct Outgoing {
    frames: Option<mpsc::UnboundedSender<(Instant, Frame)>>,
    /// When the line has carried what was sent.
    free_at: Instant,
}

#[derive(Debug)]
struct Reassembly {
    frames: mpsc::UnboundedReceiver<(Instant, Frame)>,
    /// A frame that has been sent and not arrived.
    under_way: Option<(Instant, Frame)>,
}

/// A link and the means to break it.
pub fn link(options: LinkOptions) -> (LinkEnd, LinkEnd, LinkControl) {
    let (fate, watched) = watch::channel(Fate::Alive);
    let (to_b, from_a) = mpsc::unbounded_channel();
    let (to_a, from_b) = mpsc::unbounded_channel();
    let end = |frames, incoming, peer| LinkEnd {
        options,
        fate: watched.clone(),
        outgoing: Mutex::new(Outgoing { frames: Some(frames), free_at: Instant::now() }),
        incoming: Mutex::new(Reassembly { frames: incoming, under_way: None }),
        peer,
    };
    (end(to_b, from_b, "link end b"), end(to_a, from_a, "link end a"), LinkControl { fate: Arc::new(fate) })
}

/// Tokio's own sleep takes a millisecond even for what is past.
async fn wait_until(instant: Instant) {
    if Instant::now() < instant {
        sleep_until(instant).await;
    }
}

impl LinkEnd {
    /// Returns once the link is cut.
    async fn cut(&self) -> TransportError {
        let mut fate = self.fate.clone();
        if fate.wait_for(|fate| *fate == Fate::Cut).await.is_err() {
            // Nobody is left who could cut it.
            std::future::pending::<()>().await;
        }
        TransportError::lost("the link was cut")
    }
}

impl Transport for LinkEnd {
    async fn send(&self, frame: Frame) -> Result<(), TransportError> {
        let deliver = async {
            let mut outgoing = self.outgoing.lock().await;
            // In one piece, as a socket would bring it.
            let frame = Frame::from(frame.into_bytes());
            let duration =
                self.options.bandwidth.map_or(0.0, |bandwidth| frame.len() as f64 * 8.0 / bandwidth);
            outgoing.free_at = outgoing.free_at.max(Instant::now()) + Duration::from_secs_f64(duration);
            wait_until(outgoing.free_at).await;
            if *self.fate.borrow() == Fate::Alive {
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
            if incoming.under_way.is_none() {
                incoming.under_way = incoming.frames.recv().await;
            }
            if let Some((arrival, _)) = &incoming.under_way {
                wait_until(*arrival).await;
            }
            match incoming.under_way.take() {
                Some((_, frame)) => Ok(Some(frame)),
                // A dead cable does not carry the news of a close either.
                None if *self.fate.borrow() == Fate::Silent => std::future::pending().await,
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
