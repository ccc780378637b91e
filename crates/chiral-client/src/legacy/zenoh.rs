//! Finds legacy servers on a Zenoh network. They share two keys and have neither names nor tokens, so that
//! only a reply shows whether one is there.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use chiral_proto::{
    Codec, Message, Reply, Request, Transport, TransportError, codec::msgpack, error::chain, lock,
};
use chiral_transport::{IdleTimeout, Runtime, zenoh::LegacyTransport};
use tokio::time::timeout;

use crate::{
    connect::options::{ConnectError, ConnectOptions, Shared},
    connection::Link,
    zenoh::{Endpoint, Joined, failed},
};

/// For the reply to one probe, before the next.
const PROBE_TIMEOUT: Duration = Duration::from_millis(500);

/// Probes for legacy servers, over several attempts to connect.
#[derive(Default)]
pub(crate) struct Prober {
    /// How many probes were sent, on whatever session: legacy servers share their keys.
    probes: Arc<AtomicU64>,
    /// Where replies arrive, and since when its session exists: a reply may arrive after the attempt that
    /// asked.
    listening: Arc<Mutex<Option<(Instant, LegacyTransport)>>>,
}

impl Prober {
    /// Probes once on the network that `endpoint` has joined without finding a robot of ours, which is the
    /// `reason` to probe. Returns the link to a legacy server and how many probes were sent.
    pub(crate) async fn try_connect(
        &self,
        options: &ConnectOptions,
        endpoint: &Endpoint,
        runtime: &Runtime,
        shared: &Shared,
        reason: String,
    ) -> Result<(Link, u64), ConnectError> {
        let Some(Joined { session, since, .. }) = endpoint.joined_without_robot() else {
            return Err(ConnectError::Unavailable(reason));
        };
        let listening = lock(&self.listening).take().filter(|(of, _)| *of == since);
        let transport = match listening {
            Some((_, transport)) => transport,
            None => {
                let session = endpoint.legacy_session(session).await?;
                let declared = session.legacy_client(options.max_frame, shared.pool.clone()).await;
                declared.map_err(|error| ConnectError::Failed(failed(error)))?
            }
        };
        if !self.probe(&transport).await? {
            *lock(&self.listening) = Some((since, transport));
            return Err(ConnectError::Unavailable(reason));
        }
        // Only replies show that the server is alive, and requests have timeouts of their own.
        let link = Link {
            transport: Arc::new(transport),
            runtime: runtime.clone(),
            idle_timeout: IdleTimeout::never(),
        };
        Ok((link, self.probes.load(Ordering::Relaxed)))
    }

    /// Requests metadata, as legacy clients do to find a server.
    async fn probe(&self, transport: &LegacyTransport) -> Result<bool, ConnectError> {
        let request = Message::Request { id: msgpack::ID, request: Request::GetMetadata };
        let request = Codec::Msgpack.encode(&request).map_err(|error| ConnectError::Failed(error.into()))?;
        self.probes.fetch_add(1, Ordering::Relaxed);
        let probing = async {
            transport.send(request).await?;
            loop {
                // Anything else is for another client.
                if let Some(frame) = transport.recv().await?
                    && let Ok(Message::Reply { reply: Reply::Metadata(_), .. }) = Codec::Msgpack.decode(frame)
                {
                    return Ok::<_, TransportError>(());
                }
            }
        };
        match timeout(PROBE_TIMEOUT, probing).await {
            Ok(Ok(())) => Ok(true),
            Ok(Err(error)) => Err(ConnectError::Unavailable(chain(&error))),
            Err(_) => Ok(false),
        }
    }
}
