//! What Zenoh's connection itself costs, which no protocol on it can undercut: as many bytes as an
//! observation has, put as soon as a put of 56 bytes asks for them, in pieces as large as Chiral's, which are
//! counted and dropped. Nothing is acknowledged, put together or decoded.

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

const ASK: &str = "chiral-bench/put/ask";
const ANSWER: &str = "chiral-bench/put/answer";
/// Four of Zenoh's batches, less what their headers take.
const PIECE: usize = 4 * 65_000;
/// Nothing of this takes so long.
const LIMIT: Duration = Duration::from_secs(5);

/// Answers at this address as long as what is returned is there.
pub(crate) fn serve(address: SocketAddr, answer: &Bytes) -> Result<Session> {
    let session = open("peer", "listen/endpoints", address)?;
    let publisher = session
        .declare_publisher(ANSWER)
        .congestion_control(CongestionControl::Block)
        .priority(Priority::Data);
    let publisher = publisher.express(true).wait().map_err(failed)?;
    let (sender, asked) = sync_channel(1);
    let heard = session.declare_subscriber(ASK).callback(move |_| {
        let _ = sender.try_send(());
    });
    heard.background().wait().map_err(failed)?;
    let pieces: Vec<ZBytes> = (0..answer.len())
        .step_by(PIECE)
        .map(|at| answer.slice(at..answer.len().min(at + PIECE)).into())
        .collect();
    std::thread::spawn(move || {
        for () in asked {
            for piece in &pieces {
                let _ = publisher.put(piece.clone()).wait();
            }
        }
    });
    Ok(session)
}

/// Who asks.
pub(crate) struct Client {
    session: Session,
    arrived: Receiver<usize>,
    answer_len: usize,
}

impl Client {
    pub(crate) fn connect(address: SocketAddr, answer_len: usize) -> Result<Client> {
        let session = open("client", "connect/endpoints", address)?;
        let (sender, arrived) = sync_channel(1024);
        let count = move |sample: zenoh::sample::Sample| {
            let _ = sender.try_send(sample.payload().len());
        };
        session.declare_subscriber(ANSWER).callback(count).background().wait().map_err(failed)?;
        let client = Client { session, arrived, answer_len };
        // What is put before the other side knows of the subscription is lost.
        for _ in 0..50 {
            client.arrived.try_iter().for_each(drop);
            client.put_request()?;
            if client.wait(Duration::from_millis(100)).is_ok() {
                return Ok(client);
            }
        }
        anyhow::bail!("nothing arrives from {address}")
    }

    pub(crate) fn ask(&mut self) -> Result<()> {
        self.put_request()?;
        self.wait(LIMIT)
    }

    fn put_request(&self) -> Result<()> {
        let put = self.session.put(ASK, &REQUEST[..]).congestion_control(CongestionControl::Block);
        put.priority(Priority::Data).express(true).wait().map_err(failed)
    }

    fn wait(&self, limit: Duration) -> Result<()> {
        let mut missing = self.answer_len;
        while missing > 0 {
            missing -= self.arrived.recv_timeout(limit).context("waiting for a piece")?.min(missing);
        }
        Ok(())
    }
}
