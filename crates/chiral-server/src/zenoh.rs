//! A robot on a Zenoh network: announcing it, and a thread for each connection. How peers find each other and
//! how frames travel is `chiral-transport`'s.

use std::{net::IpAddr, sync::Arc};

use bytes::Bytes;
use chiral_proto::{Codec, Message, Reply, error::chain, pool::Pool};
use chiral_transport::IdleTimeout;
use chiral_transport::zenoh::{
    ZenohError, ZenohListener, ZenohOptions, ZenohSession, ZenohSessionOptions, ZenohTransport,
};

use crate::{
    accept::Acceptor,
    core::{ServerCore, connection_runtime},
    error::Error,
};

/// A server whose robot is announced on a Zenoh network.
pub(crate) struct ZenohServer {
    acceptor: Arc<Acceptor>,
    network: ZenohSession,
    listener: ZenohListener,
}

impl ZenohServer {
    /// Joins the network and announces the robot there.
    pub(crate) async fn join(acceptor: &Arc<Acceptor>) -> Result<ZenohServer, Error> {
        let ServerCore { robot, options, .. } = &*acceptor.core;
        let (name, options) = (&robot.name, &options.network);
        let network = join(options).await.map_err(error)?;
        let listener = match network.announce(name).await {
            Ok(listener) => listener,
            Err(failed) => {
                network.close().await;
                return Err(error(failed));
            }
        };
        log_serving(name, options);
        Ok(ZenohServer { acceptor: Arc::clone(acceptor), network, listener })
    }

    /// The locators at which others can join the network here.
    pub(crate) async fn locators(&self) -> Vec<String> {
        self.network.locators().await
    }

    /// Serves clients until the server is shut down.
    pub(crate) async fn serve(self) {
        let ZenohServer { acceptor, network, mut listener } = self;
        let core = &acceptor.core;
        // Frames from clients are small, so no buffers are kept.
        let options = ZenohOptions {
            max_frame: core.options.max_frame,
            pool: Pool::new(0),
            codec: Codec::Protobuf,
            shared_memory: core.shared_memory.clone(),
            // Of each lane its own: which lanes belong together, only their hellos say.
            idle_timeout: IdleTimeout::new(core.options.idle_timeout),
        };
        let _legacy = crate::legacy::zenoh::start(core, &network).await;
        let accepting = async {
            while let Some(transport) = listener.accept(&options, || info(core)).await {
                serve_connection(&acceptor, transport);
            }
            core.stop_requested().await;
        };
        tokio::select! {
            () = accepting => {}
            () = core.stop_requested() => {}
        }
        drop(listener);
        core.wait_until_stopped().await;
        network.close().await;
    }
}

fn serve_connection(acceptor: &Arc<Acceptor>, transport: ZenohTransport) {
    let acceptor = Arc::clone(acceptor);
    connection_runtime().spawn(async move {
        let idle_timeout = transport.idle_timeout();
        acceptor.serve(transport, idle_timeout).await
    });
}

/// Joins the network. If only multicast discovery fails, joins without it.
async fn join(options: &ZenohSessionOptions) -> Result<ZenohSession, ZenohError> {
    let multicast_error = match ZenohSession::open(options).await {
        Err(error @ (ZenohError::Listen { .. } | ZenohError::Open { .. }))
            if options.discovery && !options.legacy =>
        {
            error
        }
        joined => return joined,
    };
    let network = ZenohSession::open(&ZenohSessionOptions { discovery: false, ..options.clone() }).await?;
    tracing::warn!(
        "multicast discovery is off, so clients need the robot's address: {}",
        chain(&multicast_error)
    );
    Ok(network)
}

/// The description of the robot that discovery returns: a welcome without a session, as a frame.
fn info(core: &ServerCore) -> Vec<u8> {
    let welcome = Message::Reply { id: 1, reply: Reply::Welcome(Box::new(core.welcome(0, Bytes::new()))) };
    Codec::Protobuf.encode(&welcome).map(|frame| frame.into_bytes().to_vec()).unwrap_or_default()
}

fn log_serving(name: &str, options: &ZenohSessionOptions) {
    let ZenohSessionOptions { listen, connect, config, .. } = options;
    match config {
        Some(file) => {
            tracing::info!(
                "serving robot {name:?} on Zenoh with {}, listening at {listen:?}, connecting to {connect:?}",
                file.display()
            )
        }
        None => {
            tracing::info!(
                "serving robot {name:?} on Zenoh, listening at {listen:?}, connecting to {connect:?}"
            );
            if !(connect.is_empty() && listen.iter().all(|locator| is_local(locator))) {
                tracing::warn!(
                    "any host on this network can move the robot, unless a configuration file restricts \
                     access"
                );
            }
        }
    }
}

/// Whether only this host reaches a listener at this locator.
fn is_local(locator: &str) -> bool {
    let (protocol, rest) = locator.split_once('/').unwrap_or_default();
    let address = rest.split(['?', '#']).next().unwrap_or_default();
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    protocol == "unixsock-stream"
        || host == "localhost"
        || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

fn error(error: ZenohError) -> Error {
    match error {
        ZenohError::NameTaken { robot, server } => Error::NameTaken { name: robot, holder: server },
        error => Error::Zenoh(Box::new(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_and_sockets_in_the_file_system_are_local() {
        for local in [
            "tcp/127.0.0.1:7447",
            "tcp/[::1]:7447",
            "quic/localhost:7447",
            "tcp/127.0.0.2:1#so_sndbuf=65536",
            "unixsock-stream//run/robot.sock",
        ] {
            assert!(is_local(local), "{local}");
        }
        for open in ["tcp/0.0.0.0:7447", "tcp/[::]:7447", "tcp/10.0.0.1:7447", "quic/robot:7447", "tcp/"] {
            assert!(!is_local(open), "{open}");
        }
    }
}
