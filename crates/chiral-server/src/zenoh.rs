//! A robot on a Zenoh network: its presence there, and a thread for each connection. How peers meet, and what
//! carries frames, is `chiral-transport`'s.

use std::{convert::Infallible, sync::Arc};

use bytes::Bytes;
use chiral_proto::{Code, Codec, Fault, Message, Reply, error::chain, keys::End, pool::Pool};
use chiral_transport::{
    Runtime,
    zenoh::{
        LegacyTransport, ZenohError, ZenohListener, ZenohOptions, ZenohSession, ZenohSessionOptions,
        ZenohTransport,
    },
};
use tokio::sync::oneshot;

use crate::{
    error::Error,
    legacy,
    server::{Inner, PolicyServer},
    session,
};

impl PolicyServer {
    /// Serves until it is shut down, on the Zenoh network that the server was built for and nowhere else: for
    /// a host that takes the WebSocket route into an application of its own. Needs a tokio runtime, of any
    /// kind.
    ///
    /// # Errors
    /// [`Error::NameTaken`] if a robot of this name is alive on the network, [`Error::Zenoh`] if it cannot be
    /// joined.
    pub async fn serve_zenoh(self) -> Result<(), Error> {
        self.enter_zenoh().await?.serve().await;
        Ok(())
    }

    /// Joins the network and makes the robot known there.
    pub(crate) async fn enter_zenoh(&self) -> Result<OnZenoh, Error> {
        let inner = Arc::clone(&self.inner);
        let name = &inner.robot.name;
        let network = join(&inner.options.network).await.map_err(error)?;
        let presence = match network.announce(name).await {
            Ok(presence) => presence,
            Err(refused) => {
                network.close().await;
                return Err(error(refused));
            }
        };
        let ZenohSessionOptions { listen, connect, config, .. } = &inner.options.network;
        match config {
            Some(file) => {
                tracing::info!(
                    "serving robot {name:?} on Zenoh as {} says, at {listen:?} and by {connect:?}",
                    file.display()
                )
            }
            None => {
                tracing::info!("serving robot {name:?} on Zenoh, at {listen:?} and by {connect:?}");
                tracing::warn!(
                    "on Zenoh, whoever reaches the network can move the robot, unless a configuration file says who may"
                );
            }
        }
        Ok(OnZenoh { inner, network, presence })
    }
}

/// A server whose robot is alive on a Zenoh network.
pub(crate) struct OnZenoh {
    inner: Arc<Inner>,
    network: ZenohSession,
    presence: ZenohListener,
}

impl OnZenoh {
    /// Serves whoever comes, until the server is shut down.
    pub(crate) async fn serve(self) {
        let OnZenoh { inner, network, mut presence } = self;
        // What a client says is small.
        let options = ZenohOptions {
            max_frame: inner.options.max_frame,
            pool: Pool::new(0),
            codec: Codec::Protobuf,
            shared_memory: inner.shared_memory.clone(),
            idle_timeout: inner.options.idle_timeout,
        };
        let (_serving, ended) = oneshot::channel();
        match network.legacy(End::Server, inner.options.max_frame, Pool::new(0)).await {
            Ok(transport) => serve_legacy(&inner, &network, transport, ended),
            Err(error) => tracing::warn!("legacy clients are not served on Zenoh: {}", chain(&error)),
        }
        let accepting = async {
            while let Some(transport) = presence.accept(&options, || info(&inner)).await {
                serve_connection(&inner, transport);
            }
            inner.stopping().await;
        };
        tokio::select! {
            () = accepting => {}
            () = inner.stopping() => {}
        }
        drop(presence);
        inner.wind_down().await;
        network.close().await;
    }
}

/// Joins the network; without an answer to those who search by multicast, where only that cannot be had.
async fn join(options: &ZenohSessionOptions) -> Result<ZenohSession, ZenohError> {
    let refused = match ZenohSession::open(options).await {
        Err(refused @ ZenohError::Open { .. }) if options.discovery => refused,
        joined => return joined,
    };
    let network = ZenohSession::open(&ZenohSessionOptions { discovery: false, ..options.clone() }).await?;
    tracing::warn!("the robot cannot be found without its address: {}", chain(&refused));
    Ok(network)
}

/// What is told of the robot to whoever asks: a welcome without a session, as a frame.
fn info(inner: &Inner) -> Vec<u8> {
    let welcome = Message::Reply { id: 1, reply: Reply::Welcome(Box::new(inner.welcome(0, Bytes::new()))) };
    Codec::Protobuf.encode(&welcome).map(|frame| frame.into_bytes().to_vec()).unwrap_or_default()
}

/// Serves legacy clients, by a thread of its own, until the other end of `ended` is dropped.
fn serve_legacy(
    inner: &Arc<Inner>,
    network: &ZenohSession,
    transport: LegacyTransport,
    ended: oneshot::Receiver<Infallible>,
) {
    let (inner, network) = (Arc::clone(inner), network.clone());
    host().spawn(async move {
        let serving =
            legacy::session::serve_shared(&inner, &transport, || is_alone(&network, &inner.robot.name));
        tokio::select! {
            () = serving => {}
            _ = ended => {}
        }
    });
}

/// A legacy client does not say which robot it means: no robot of ours takes its word where there are two.
async fn is_alone(network: &ZenohSession, robot: &str) -> Result<(), Fault> {
    let robots = network.robots().await;
    let robots = robots.map_err(|error| {
        Fault::new(Code::Busy, format!("which robots there are is not known: {}", chain(&error)))
    })?;
    match robots.into_iter().find(|(name, _)| name != robot) {
        None => Ok(()),
        Some((other, _)) => {
            let text = format!(
                "expected robot {robot:?} to be alone on this network, where legacy clients name none, found {other:?}"
            );
            Err(Fault::new(Code::Busy, text).retryable())
        }
    }
}

fn serve_connection(inner: &Arc<Inner>, transport: ZenohTransport) {
    let inner = Arc::clone(inner);
    host().spawn(async move {
        {
            let idle_timeout = transport.idle_timeout();
            session::serve(&inner, transport, idle_timeout).await
        }
    });
}

fn host() -> Runtime {
    Runtime::thread("chiral-connection").unwrap_or_else(|error| {
        tracing::warn!("no thread for a connection: {error}");
        Runtime::current()
    })
}

fn error(error: ZenohError) -> Error {
    match error {
        ZenohError::NameTaken { robot, server } => Error::NameTaken { name: robot, holder: server },
        error => Error::Zenoh(Box::new(error)),
    }
}
