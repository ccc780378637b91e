//! What a session sees of the network around it: the processes that are connected to it, other robots, and
//! who else receives what legacy clients send.

use std::sync::Arc;

use chiral_proto::keys::{self, End};
use zenoh::{
    Session, Wait,
    config::WhatAmI,
    pubsub::Publisher,
    sample::{Locality, Sample, SampleKind},
    session::Transport,
};

use super::{
    error::{ZenohError, failed},
    session::ZenohSession,
    thread::run_on_thread,
};

/// What a process is to the Zenoh network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NeighbourKind {
    /// It forwards between all that are connected to it.
    Router,
    /// It speaks for itself, and for the clients that are connected to it.
    Peer,
    /// It speaks for itself only.
    Client,
}

/// A process that is connected to a session.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Neighbour {
    /// Its Zenoh id.
    pub id: String,
    /// What it is to the network.
    pub kind: NeighbourKind,
}

impl Neighbour {
    /// A neighbour with this Zenoh id.
    pub fn new(id: impl Into<String>, kind: NeighbourKind) -> Neighbour {
        Neighbour { id: id.into(), kind }
    }
}

/// A change of the network around a session.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NetworkEvent {
    /// A process was connected. Whatever it sends comes later.
    Connected(Neighbour),
    /// A process was connected by this locator of its own.
    Located {
        /// The process's Zenoh id.
        id: String,
        /// Its end of the connection.
        locator: String,
    },
    /// A process has left, or is lost: nothing that it sent comes later.
    Disconnected {
        /// Its Zenoh id.
        id: String,
    },
    /// Whether a robot of ours, other than this session's, is alive.
    Robot {
        /// Its name, its server's Zenoh id, and its host.
        robot: String,
        /// Whether it is alive.
        is_alive: bool,
    },
    /// Whether another process receives what legacy clients send.
    OtherReceiver(bool),
}

/// Tells whether another process receives what legacy clients send.
pub(super) struct OtherReceivers(Publisher<'static>);

impl OtherReceivers {
    /// What is the case now.
    pub(super) async fn event(&self) -> NetworkEvent {
        let is_receiving = self.0.matching_status().await.is_ok_and(|status| status.matching());
        NetworkEvent::OtherReceiver(is_receiving)
    }
}

/// A change, or the news that [`OtherReceivers::event`] may have changed.
pub(super) enum Change {
    Event(NetworkEvent),
    OtherReceivers,
}

impl ZenohSession {
    /// Returns the processes that are connected to this session.
    ///
    /// # Errors
    /// [`ZenohError::Thread`], [`ZenohError::Failed`].
    pub async fn neighbours(&self) -> Result<Vec<Neighbour>, ZenohError> {
        let session = self.session().clone();
        // Zenoh lists them in its own runtime, for which it waits.
        let listing = run_on_thread(move || {
            session.info().transports().wait().map(|transport| neighbour(&transport)).collect()
        });
        listing?.await.map_err(|_| failed("the thread that lists the neighbours ended".into()))
    }

    /// Calls `on_change` with what is the case, and with what changes until the session is closed. It never
    /// waits.
    pub(super) async fn watch(
        &self,
        on_change: impl Fn(Change) + Send + Sync + 'static,
    ) -> Result<OtherReceivers, ZenohError> {
        let session = self.session().clone();
        let watching = run_on_thread(move || watch(&session, Arc::new(on_change)).map_err(failed))?;
        watching.await.unwrap_or_else(|_| Err(failed("the thread that watches the network ended".into())))
    }
}

/// Waits for Zenoh's own runtime, which it must not do within another.
fn watch(
    session: &Session,
    on_change: Arc<impl Fn(Change) + Send + Sync + 'static>,
) -> zenoh::Result<OtherReceivers> {
    let info = session.info();
    let report = Arc::clone(&on_change);
    let transports = info.transport_events_listener().history(true).callback(move |event| {
        let neighbour = neighbour(event.transport());
        report(Change::Event(match event.kind() {
            SampleKind::Put => NetworkEvent::Connected(neighbour),
            SampleKind::Delete => NetworkEvent::Disconnected { id: neighbour.id },
        }));
    });
    transports.background().wait()?;
    let report = Arc::clone(&on_change);
    let links = info.link_events_listener().history(true).callback(move |event| {
        if event.kind() == SampleKind::Put {
            let (id, locator) = (event.link().zid().to_string(), event.link().dst().to_string());
            report(Change::Event(NetworkEvent::Located { id, locator }));
        }
    });
    links.background().wait()?;
    let (own_id, report) = (session.zid().to_string(), Arc::clone(&on_change));
    let on_token = move |sample: Sample| {
        let Some((robot, server)) = keys::robot_and_server(sample.key_expr().as_str()) else { return };
        if server.split('@').next() != Some(&*own_id) {
            let is_alive = sample.kind() == SampleKind::Put;
            report(Change::Event(NetworkEvent::Robot { robot: format!("{robot} ({server})"), is_alive }));
        }
    };
    let robots = session.liveliness().declare_subscriber(keys::alive("*", "*")).history(true);
    robots.callback(on_token).background().wait()?;
    let receivers = session.declare_publisher(keys::legacy(End::Client));
    let receivers = receivers.allowed_destination(Locality::Remote).wait()?;
    let report = Arc::clone(&on_change);
    let matching = receivers.matching_listener().callback(move |_| report(Change::OtherReceivers));
    matching.background().wait()?;
    on_change(Change::OtherReceivers);
    Ok(OtherReceivers(receivers))
}

fn neighbour(transport: &Transport) -> Neighbour {
    let kind = match transport.whatami() {
        WhatAmI::Router => NeighbourKind::Router,
        WhatAmI::Peer => NeighbourKind::Peer,
        WhatAmI::Client => NeighbourKind::Client,
    };
    Neighbour::new(transport.zid().to_string(), kind)
}
