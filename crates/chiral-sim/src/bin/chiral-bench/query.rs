//! Zenoh's own baseline: a query of 56 bytes, and a reply of the observation's size, sent from the query's
//! callback. Priority and congestion control are those of Chiral's observations.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};

use anyhow::{Context, Result, anyhow, ensure};
use bytes::Bytes;
use zenoh::bytes::ZBytes;
use zenoh::qos::{CongestionControl, Priority};
use zenoh::{Config, Session, Wait};

use crate::raw::REQUEST;

const KEY: &str = "chiral-bench/query";

/// An address on loopback that was free a moment ago. Port 0 would not do: Zenoh does not report which port
/// it was given.
pub(crate) fn free_address() -> Result<SocketAddr> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .and_then(|listener| listener.local_addr())
        .context("reserving a port")
}

/// Replies at this address until the returned session is dropped.
pub(crate) fn serve(address: SocketAddr, reply: &Bytes) -> Result<Session> {
    let session = open("peer", "listen/endpoints", address)?;
    let reply = ZBytes::from(reply.clone());
    let reply_to = move |query: zenoh::query::Query| {
        // The reply has the query's priority. An error means that the client has disconnected.
        let _ = query.reply(KEY, reply.clone()).express(true).wait();
    };
    session.declare_queryable(KEY).callback(reply_to).background().wait().map_err(failed)?;
    Ok(session)
}

/// The requesting side.
pub(crate) struct Client {
    session: Session,
    reply_len: usize,
}

impl Client {
    pub(crate) fn connect(address: SocketAddr, reply_len: usize) -> Result<Client> {
        Ok(Client { session: open("client", "connect/endpoints", address)?, reply_len })
    }

    pub(crate) fn request(&mut self) -> Result<()> {
        let query = self.session.get(KEY).payload(&REQUEST[..]).congestion_control(CongestionControl::Block);
        let replies = query.priority(Priority::Data).express(true).wait().map_err(failed)?;
        let reply = replies.recv().map_err(|_| anyhow!("no reply to a query"))?;
        let found = reply.result().map_err(|error| anyhow!("{error:?}"))?.payload().len();
        ensure!(found == self.reply_len, "expected a reply of {} bytes, found {found}", self.reply_len);
        Ok(())
    }
}

/// Opens a session without scouting and shared memory, and with a queue as long as Chiral's; all else is
/// default.
pub(crate) fn open(mode: &str, end: &str, address: SocketAddr) -> Result<Session> {
    let mut config = Config::default();
    let settings = [
        ("mode", format!("{mode:?}")),
        (end, format!("[\"tcp/{address}\"]")),
        ("scouting/multicast/enabled", "false".to_owned()),
        ("transport/shared_memory/enabled", "false".to_owned()),
        ("transport/link/tx/queue/size/data", "16".to_owned()),
    ];
    for (key, value) in settings {
        config.insert_json5(key, &value).map_err(failed)?;
    }
    zenoh::open(config).wait().map_err(failed)
}

pub(crate) fn failed(error: zenoh::Error) -> anyhow::Error {
    anyhow!("zenoh: {error}")
}
