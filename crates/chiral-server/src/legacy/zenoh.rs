//! The keys that all legacy clients of a Zenoh network share. There are no connections on them, and nobody can
//! be told from anybody else.

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

/// Serves legacy clients on this network, by a thread of its own, until what is returned is dropped.
pub(crate) async fn start(core: &Arc<ServerCore>, network: &ZenohSession) -> oneshot::Sender<Infallible> {
    let (serving, ended) = oneshot::channel();
    match network.legacy(End::Server, core.options.max_frame, Pool::new(0)).await {
        Ok(transport) => {
            let (core, network) = (Arc::clone(core), network.clone());
            connection_runtime().spawn(async move {
                tokio::select! {
                    () = serve(&core, &network, &transport) => {}
                    _ = ended => {}
                }
            });
        }
        Err(error) => tracing::warn!("legacy clients are not served on Zenoh: {}", chain(&error)),
    }
    serving
}

/// Serves whoever is heard on keys that all legacy clients share, one session after another; returns when
/// nothing more can be heard. A session begins with the first word while there is none, if `may_begin` has
/// nothing against it, and ends when nobody listens any more, or with a silence. `transport`'s `recv` may be
/// dropped.
async fn serve(core: &Arc<ServerCore>, network: &ZenohSession, transport: &LegacyTransport) {
    let dropped = LogThrottle::new(core.clock.clone());
    while let Ok(heard) = transport.recv().await {
        // Of those who leave, none has a session here.
        let Some(frame) = heard else { continue };
        let begun = match (check_client_message(frame.clone()), core.control.controller()) {
            (Err(fault), _) => Err(fault),
            // Asked before the network is.
            (Ok(()), Some(holder)) => {
                Err(Fault::new(Code::Busy, format!("the robot is controlled by {holder:?}")))
            }
            (Ok(()), None) => {
                check_alone(network, &core.robot.name).await.and_then(|()| open_session(core, transport))
            }
        };
        match begun {
            Ok(session) => {
                let requests = RequestQueue::for_shared_keys(core.options.idle_timeout, core.clock.now());
                let legacy = LegacySession::new(&session, transport, IdleTimeout::never(), requests);
                legacy.handle_frame(frame);
                legacy.run().await;
            }
            Err(fault) => {
                let peer = transport.peer();
                dropped.record(|count| {
                    tracing::warn!(peer, count, "dropped what a legacy client says: {fault}")
                });
            }
        }
    }
}

/// Whether it is what a client says: nothing else may claim the robot.
fn check_client_message(frame: Frame) -> Result<(), Fault> {
    match Codec::Msgpack.decode(frame)? {
        Message::Request { .. } | Message::Notice(Notice::Action(_)) => Ok(()),
        _ => Err(not_a_client_message()),
    }
}

/// A legacy client does not say which robot it means: no robot of ours takes its word where there are two.
async fn check_alone(network: &ZenohSession, robot: &str) -> Result<(), Fault> {
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
