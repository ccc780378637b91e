//! A robot on a Zenoh network: its presence there, and a thread for each connection. How peers meet, and what carries frames, is `chiral-link`'s.

use std::sync::Arc;

use bytes::Bytes;
use chiral_link::{
    Host,
    zenoh::{Network, NetworkError, NetworkOptions, ZenohOptions, ZenohTransport},
};
use chiral_proto::{Codec, Message, Reply, error::chain, pool::Pool};

use crate::{
    error::Error,
    server::{Inner, PolicyServer},
    session,
};

impl PolicyServer {
    /// Serves until it is shut down, on the Zenoh network that the server was built for and nowhere else: for a host that takes the WebSocket route into
    /// an application of its own. Needs a tokio runtime, of any kind.
    ///
    /// # Errors
    /// [`Error::NameTaken`] if a robot of this name is alive on the network, [`Error::Zenoh`] if it cannot be joined.
    pub async fn serve_zenoh(self) -> Result<(), Error> {
        let inner = self.inner;
        let name = &inner.robot.name;
        let network = join(&inner.options.network).await.map_err(error)?;
        let mut presence = match network.announce(name).await {
            Ok(presence) => presence,
            Err(refused) => {
                network.close().await;
                return Err(error(refused));
            }
        };
        let NetworkOptions { listen, connect, config, .. } = &inner.options.network;
        match config {
            Some(file) => {
                tracing::info!("serving robot {name:?} on Zenoh as {} says, at {listen:?} and by {connect:?}", file.display())
            }
            None => {
                tracing::info!("serving robot {name:?} on Zenoh, at {listen:?} and by {connect:?}");
                tracing::warn!(
                    "on Zenoh, whoever reaches the network can move the robot, unless a configuration file says who may"
                );
            }
        }
        // What a client says is small.
        let options = ZenohOptions {
            max_frame: inner.options.max_frame,
            pool: Pool::new(0),
            codec: Codec::Protobuf,
            shared_memory: inner.shared_memory.clone(),
        };
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
        Ok(())
    }
}

/// Joins the network; without an answer to those who search by multicast, where only that cannot be had.
async fn join(options: &NetworkOptions) -> Result<Network, NetworkError> {
    let refused = match Network::open(options).await {
        Err(refused @ NetworkError::Open { .. }) if options.discovery => refused,
        joined => return joined,
    };
    let network = Network::open(&NetworkOptions { discovery: false, ..options.clone() }).await?;
    tracing::warn!("the robot cannot be found without its address: {}", chain(&refused));
    Ok(network)
}

/// What is told of the robot to whoever asks: a welcome without a session, as a frame.
fn info(inner: &Inner) -> Vec<u8> {
    let welcome = Message::Reply { id: 1, reply: Reply::Welcome(Box::new(inner.welcome(0, Bytes::new()))) };
    Codec::Protobuf.encode(&welcome).map(|frame| frame.into_bytes().to_vec()).unwrap_or_default()
}

fn serve_connection(inner: &Arc<Inner>, transport: ZenohTransport) {
    let host = Host::thread("chiral-connection").unwrap_or_else(|error| {
        tracing::warn!("no thread for a connection: {error}");
        Host::current()
    });
    let inner = Arc::clone(inner);
    host.spawn(async move { session::serve(&inner, transport).await });
}

fn error(error: NetworkError) -> Error {
    match error {
        NetworkError::NameTaken { robot, server } => Error::NameTaken { name: robot, holder: server },
        error => Error::Zenoh(Box::new(error)),
    }
}
