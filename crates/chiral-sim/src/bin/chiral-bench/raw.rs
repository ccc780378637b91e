//! The baseline: a request of 56 bytes and a reply of the observation's size over TCP, from and into warm
//! memory; with blocking calls, and on tokio.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::thread;

use anyhow::{Context, Result};
use bytes::Bytes;
use rustix::net::sockopt::set_tcp_congestion;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::runtime::{Builder, Runtime};

/// A request.
pub(crate) const REQUEST: [u8; 56] = [7; 56];

/// A listener whose connections inherit a congestion control that suits loopback, if the kernel has it.
pub(crate) fn listen() -> Result<TcpListener> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("listening")?;
    tune_for_loopback(&listener);
    Ok(listener)
}

/// The client's end of such a connection.
pub(crate) fn connect(address: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect(address).with_context(|| format!("connecting to {address}"))?;
    tune_for_loopback(&stream);
    stream.set_nodelay(true).context("setting TCP_NODELAY")?;
    Ok(stream)
}

/// Best effort: without it in the kernel, all paths run with the system's default.
fn tune_for_loopback(socket: impl AsFd) {
    let _ = set_tcp_congestion(socket, "reno");
}

/// Serves until the process ends, with one thread per connection.
pub(crate) fn serve_blocking(listener: TcpListener, reply: &Bytes) -> Result<()> {
    loop {
        let (mut stream, _) = listener.accept().context("accepting")?;
        let reply = reply.clone();
        thread::spawn(move || {
            let mut request = REQUEST;
            let _ = stream.set_nodelay(true);
            while stream.read_exact(&mut request).and_then(|()| stream.write_all(&reply)).is_ok() {}
        });
    }
}

/// The same, on a runtime of one thread.
pub(crate) fn serve_tokio(listener: TcpListener, reply: &Bytes) -> Result<()> {
    runtime()?.block_on(async {
        let listener = from_std(listener)?;
        loop {
            let (mut stream, _) = listener.accept().await.context("accepting")?;
            let reply = reply.clone();
            tokio::spawn(async move {
                let mut request = REQUEST;
                let _ = stream.set_nodelay(true);
                while stream.read_exact(&mut request).await.is_ok() && stream.write_all(&reply).await.is_ok()
                {
                }
            });
        }
    })
}

/// Converts a listener to tokio's; must run within a runtime.
pub(crate) fn from_std(listener: TcpListener) -> Result<tokio::net::TcpListener> {
    listener.set_nonblocking(true).context("making a listener non-blocking")?;
    tokio::net::TcpListener::from_std(listener).context("handing a listener to tokio")
}

/// A runtime of one thread.
pub(crate) fn runtime() -> Result<Runtime> {
    Builder::new_current_thread().enable_all().build().context("starting a runtime")
}

/// A blocking client.
pub(crate) struct Blocking {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Blocking {
    pub(crate) fn connect(address: SocketAddr, reply_len: usize) -> Result<Blocking> {
        Ok(Blocking { stream: connect(address)?, buffer: vec![1; reply_len] })
    }

    pub(crate) fn request(&mut self) -> Result<()> {
        self.stream.write_all(&REQUEST).context("sending a request")?;
        self.stream.read_exact(&mut self.buffer).context("reading the reply")
    }
}

/// A client on tokio.
pub(crate) struct Tokio {
    runtime: Runtime,
    stream: tokio::net::TcpStream,
    buffer: Vec<u8>,
}

impl Tokio {
    pub(crate) fn connect(address: SocketAddr, reply_len: usize) -> Result<Tokio> {
        let (runtime, stream) = (runtime()?, connect(address)?);
        stream.set_nonblocking(true).context("making a stream non-blocking")?;
        let stream = runtime
            .block_on(async { tokio::net::TcpStream::from_std(stream) })
            .context("handing a stream to tokio")?;
        Ok(Tokio { runtime, stream, buffer: vec![1; reply_len] })
    }

    pub(crate) fn request(&mut self) -> Result<()> {
        let Tokio { runtime, stream, buffer } = self;
        runtime.block_on(async {
            stream.write_all(&REQUEST).await.context("sending a request")?;
            stream.read_exact(buffer).await.context("reading the reply")?;
            Ok(())
        })
    }
}
