//! The beginning of a session on the protobuf wire: the client's hello and the server's welcome.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use chiral_proto::{
    Code, Fault, Message, Notice, PROTOCOL_VERSION, Reply, Request,
    message::{Hello, Welcome},
};
use tokio::time::timeout;

use super::options::Identity;
use crate::{error::Error, native::lost, transport::DynTransport};

/// For the server's welcome.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);

/// Sends a hello and returns the welcome. On a session's second connection, `attach_token` is that of the
/// first one's welcome; on the first it is empty.
pub(crate) async fn exchange_hello(
    transport: &Arc<dyn DynTransport>,
    identity: &Identity,
    attach_token: Bytes,
) -> Result<Welcome, Error> {
    let hello = Message::Request {
        id: 1,
        request: Request::Hello(Hello {
            protocol: PROTOCOL_VERSION,
            software: concat!("chiral-client ", env!("CARGO_PKG_VERSION")).to_owned(),
            role: identity.role,
            client_name: identity.name.clone(),
            auth: identity.auth.clone(),
            attach_token,
        }),
    };
    let exchange = async {
        // A server that refuses may reply and close before all is sent: its reply matters more than a failed
        // send.
        let sent = Arc::clone(transport).send(transport.codec().encode(&hello)?).await;
        match transport.recv().await {
            Ok(Some(frame)) => transport.codec().decode(frame).map_err(Error::Malformed),
            Err(error) => Err(lost(error)),
            Ok(None) => {
                sent.map_err(lost)?;
                let reason = "the server closed the connection at the hello".to_owned();
                Err(Error::Disconnected { reason, cause: None })
            }
        }
    };
    let reply = timeout(HELLO_TIMEOUT, exchange).await;
    let reply =
        reply.map_err(|_| Error::Timeout { what: "the server's welcome", waited: HELLO_TIMEOUT })??;
    match reply {
        Message::Reply { reply: Reply::Welcome(welcome), .. } if welcome.protocol == PROTOCOL_VERSION => {
            Ok(*welcome)
        }
        Message::Reply { reply: Reply::Welcome(welcome), .. } => {
            let text = format!("it replied in version {}", welcome.protocol);
            Err(Error::VersionMismatch(Fault::new(Code::VersionMismatch, text)))
        }
        Message::Reply { reply: Reply::Error(fault), .. } | Message::Notice(Notice::Error(fault)) => {
            Err(match fault.code {
                Code::Busy => Error::Busy(fault),
                Code::VersionMismatch => Error::VersionMismatch(fault),
                _ => Error::Rejected(fault),
            })
        }
        _ => Err(Error::Protocol { expected: "a welcome" }),
    }
}
