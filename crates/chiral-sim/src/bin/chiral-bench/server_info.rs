//! What a server process serves and where, as the measuring client learns it, and Chiral clients for it.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use chiral_client::{PolicyClient, blocking};
use chiral_proto::Codec;

/// The workload of a server process, and an address for each way to request it.
#[derive(Clone, Debug)]
pub(crate) struct ServerInfo {
    pub(crate) workload: String,
    /// Bytes of an observation's tensors.
    pub(crate) bytes: usize,
    pub(crate) raw_blocking: SocketAddr,
    pub(crate) raw_tokio: SocketAddr,
    pub(crate) naive: SocketAddr,
    pub(crate) chiral: SocketAddr,
    pub(crate) zenoh: SocketAddr,
    pub(crate) zenoh_query: SocketAddr,
    pub(crate) zenoh_put: SocketAddr,
}

/// How Chiral's client reaches Chiral's server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Path {
    #[value(name = "chiral")]
    WebSocket,
    #[value(name = "msgpack")]
    Legacy,
    #[value(name = "zenoh_tcp")]
    ZenohTcp,
    #[value(name = "zenoh_shm")]
    ZenohSharedMemory,
    #[value(name = "zenoh_msgpack")]
    ZenohLegacy,
}

impl Path {
    pub(crate) const ALL: [Path; 5] =
        [Path::WebSocket, Path::Legacy, Path::ZenohTcp, Path::ZenohSharedMemory, Path::ZenohLegacy];

    /// The name in the figures.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Path::WebSocket => "chiral",
            // The legacy wire between our client and our server.
            Path::Legacy => "msgpack",
            Path::ZenohTcp => "zenoh_tcp",
            Path::ZenohSharedMemory => "zenoh_shm",
            // The legacy wire on the keys that all legacy peers share.
            Path::ZenohLegacy => "zenoh_msgpack",
        }
    }
}

impl ServerInfo {
    /// Connects the controller, of which there is only one.
    pub(crate) fn connect_controller(&self) -> Result<blocking::PolicyClient> {
        self.connect(Path::WebSocket, true)
    }

    /// Connects a client that only observes.
    pub(crate) fn connect_observer(&self, path: Path) -> Result<blocking::PolicyClient> {
        if path != Path::ZenohLegacy {
            return self.connect(path, false);
        }
        // On the legacy Zenoh keys observations can be requested only after a reset, in case the first
        // request was lost.
        let client = self.connect(path, true)?;
        client.reset().context("reset")?;
        Ok(client)
    }

    fn connect(&self, path: Path, is_controller: bool) -> Result<blocking::PolicyClient> {
        let uri = match path {
            Path::WebSocket | Path::Legacy => format!("ws://{}", self.chiral),
            Path::ZenohTcp | Path::ZenohSharedMemory | Path::ZenohLegacy => format!("tcp/{}", self.zenoh),
        };
        let builder = PolicyClient::builder(&uri).quiet().shared_memory(path == Path::ZenohSharedMemory);
        let builder = if is_controller { builder } else { builder.observer() };
        let is_legacy = matches!(path, Path::Legacy | Path::ZenohLegacy);
        let builder = if is_legacy { builder.codec(Codec::Msgpack) } else { builder };
        builder.connect_blocking().with_context(|| format!("connecting to {uri}"))
    }
}
