//! The cost of Zenoh's connection alone, which no protocol over it can undercut: a put of 56 bytes requests
//! as many bytes as an observation has, which are put in pieces as large as Chiral's, counted and dropped.
//! Nothing is acknowledged, reassembled or decoded.

use std::net::SocketAddr;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::Bytes;
use zenoh::bytes::ZBytes;
use zenoh::qos::{CongestionControl, Priority};
use zenoh::{Session, Wait};

use crate::query::{failed, open};
use crate::raw::REQUEST;

const REQUEST_KEY: &str = "chiral-bench/put/request";
const REPLY_KEY: &str = "chiral-bench/put/reply";
/// Four of Zenoh's batches, less their headers.
const PIECE: usize = 4 * 65_000;
/// How long a piece may take to arrive.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Replies at this address until the returned session is dropped.
pub(crate) fn serve(address: SocketAddr, reply: &Bytes) -> Result<Session> {
    let session = open("peer", "listen/endpoints", address)?;
    let publisher = session
        .declare_publisher(REPLY_KEY)
        .congestion_control(CongestionControl::Block)
        .priority(Priority::Data);
    let publisher = publisher.express(true).wait().map_err(failed)?;
    let (sender, requests) = sync_channel(1);
    let subscriber = session.declare_subscriber(REQUEST_KEY).callback(move |_| {
        let _ = sender.try_send(());
    });
    subscriber.background().wait().map_err(failed)?;
    let pieces: Vec<ZBytes> = (0..reply.len())
        .step_by(PIECE)
        .map(|at| reply.slice(at..reply.len().min(at + PIECE)).into())
        .collect();
    std::thread::spawn(move || {
        for () in requests {
            for piece in &pieces {
                let _ = publisher.put(piece.clone()).wait();
            }
        }
    });
    Ok(session)
}

/// The requesting side.
pub(crate) struct Client {
    session: Session,
    arrived: Receiver<usize>,
    reply_len: usize,
}

impl Client {
    pub(crate) fn connect(address: SocketAddr, reply_len: usize) -> Result<Client> {
        let session = open("client", "connect/endpoints", address)?;
        let (sender, arrived) = sync_channel(1024);
        let count = move |sample: zenoh::sample::Sample| {
            let _ = sender.try_send(sample.payload().len());
        };
        session.declare_subscriber(REPLY_KEY).callback(count).background().wait().map_err(failed)?;
        let client = Client { session, arrived, reply_len };
        // Pieces put before the server knows of the subscription are lost: repeat until some arrive.
        for _ in 0..50 {
            client.arrived.try_iter().for_each(drop);
            client.put_request()?;
            if client.wait(Duration::from_millis(100)).is_ok() {
                return Ok(client);
            }
        }
        anyhow::bail!("nothing arrived from {address}")
    }

    pub(crate) fn request(&mut self) -> Result<()> {
        self.put_request()?;
        self.wait(TIMEOUT)
    }

    fn put_request(&self) -> Result<()> {
        let put = self.session.put(REQUEST_KEY, &REQUEST[..]).congestion_control(CongestionControl::Block);
        put.priority(Priority::Data).express(true).wait().map_err(failed)
    }

    fn wait(&self, timeout: Duration) -> Result<()> {
        let mut missing = self.reply_len;
        while missing > 0 {
            missing -= self.arrived.recv_timeout(timeout).context("waiting for a piece")?.min(missing);
        }
        Ok(())
    }
}
