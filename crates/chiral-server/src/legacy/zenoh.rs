//! The keys that all legacy clients of a Zenoh network share. There are no connections on them, and clients
//! cannot be told apart.

use std::{convert::Infallible, sync::Arc};

use chiral_proto::{
    Code, Codec, Fault, Frame, Message, Notice, Transport, error::chain, keys::End, pool::Pool,
};
use chiral_transport::{
    IdleTimeout,
    zenoh::{LegacyTransport, ZenohSession},
};
use tokio::sync::oneshot;

use crate::{
    core::{ServerCore, connection_runtime},
    legacy::{
        requests::RequestQueue,
        session::{LegacySession, not_a_client_message, open_session},
    },
    log_throttle::LogThrottle,
};

/// Serves legacy clients on this network, on a thread of its own, until the returned sender is dropped.
pub(crate) async fn start(core: &Arc<ServerCore>, network: &ZenohSession) -> oneshot::Sender<Infallible> {
    let (guard, dropped) = oneshot::channel();
    match network.legacy(End::Server, core.options.max_frame, Pool::new(0)).await {
        Ok(transport) => {
            let (core, network) = (Arc::clone(core), network.clone());
            connection_runtime().spawn(async move {
                tokio::select! {
                    () = serve(&core, &network, &transport) => {}
                    _ = dropped => {}
                }
            });
        }
        Err(error) => tracing::warn!("legacy clients are not served on Zenoh: {}", chain(&error)),
    }
    guard
}

/// Serves one session after another; returns when the Zenoh session is closed. A message opens a session if
/// there is none and the robot is alone on the network. The session ends when no client subscribes any more,
/// or when its client is idle.
async fn serve(core: &Arc<ServerCore>, network: &ZenohSession, transport: &LegacyTransport) {
    let refusals = LogThrottle::new(core.clock.clone());
    while let Ok(received) = transport.recv().await {
        // The last subscriber has gone; it had no session here.
        let Some(frame) = received else { continue };
        let session = match (check_client_message(frame.clone()), core.control.controller()) {
            (Err(fault), _) => Err(fault),
            // Checked first, since it needs no request on the network.
            (Ok(()), Some(holder)) => {
                Err(Fault::new(Code::Busy, format!("the robot is controlled by {holder:?}")))
            }
            (Ok(()), None) => {
                check_alone(network, &core.robot.name).await.and_then(|()| open_session(core, transport))
            }
        };
        match session {
            Ok(session) => {
                let requests = RequestQueue::for_shared_keys(core.options.idle_timeout, core.clock.now());
                // Not the idle timeout of the transport: frames of a second client must not count as this
                // one's. The request queue, which tells them apart, decides when the session is idle.
                let session = LegacySession::new(&session, transport, IdleTimeout::never(), requests);
                session.handle_frame(frame);
                session.run().await;
            }
            Err(fault) => {
                let peer = transport.peer();
                refusals.record(|count| {
                    tracing::warn!(peer, count, "dropped a legacy client's message: {fault}")
                });
            }
        }
    }
}

/// Fails unless a client sent the frame: nothing else may claim the robot.
fn check_client_message(frame: Frame) -> Result<(), Fault> {
    match Codec::Msgpack.decode(frame)? {
        Message::Request { .. } | Message::Notice(Notice::Action(_)) => Ok(()),
        _ => Err(not_a_client_message()),
    }
}

/// Fails unless the robot is the only one on this network: legacy messages name no robot, so with two robots
/// no server acts on them.
async fn check_alone(network: &ZenohSession, robot: &str) -> Result<(), Fault> {
    let robots = network.robots().await;
    let robots = robots.map_err(|error| {
        Fault::new(Code::Busy, format!("cannot list the robots on this network: {}", chain(&error)))
    })?;
    match robots.into_iter().find(|(name, _)| name != robot) {
        None => Ok(()),
        Some((other, _)) => {
            let text = format!(
                "expected robot {robot:?} to be alone on this network, since legacy clients name no robot, \
                 found {other:?}"
            );
            Err(Fault::new(Code::Busy, text).retryable())
        }
    }
}
