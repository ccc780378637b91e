//! A WebSocket after its handshake, as a transport: one task reads, one writes, and neither waits for the other.

use std::sync::{Mutex as StdMutex, PoisonError};

use bytes::Bytes;
use chiral_proto::{Codec, Frame, Transport, TransportError, pool::Pool};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadHalf, WriteHalf},
    sync::Mutex,
};

use crate::{
    courtesy::Courtesy,
    read::{Event, Reader},
    write::Writer,
};

/// "Normal closure" (RFC 6455, section 7.4.1).
const NORMAL_CLOSURE: [u8; 2] = 1000_u16.to_be_bytes();

/// Which end of the connection this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Masks what it says.
    Client,
    /// Takes only what is masked.
    Server,
}

/// Kinds of frames (RFC 6455, section 5.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Opcode {
    Continuation = 0x0,
    Binary = 0x2,
    Close = 0x8,
    Ping = 0x9,
    Pong = 0xa,
}

impl Opcode {
    pub(crate) fn is_control(self) -> bool {
        matches!(self, Opcode::Close | Opcode::Ping | Opcode::Pong)
    }
}

/// What a connection is, as its handshake left it.
#[derive(Clone, Debug)]
pub struct WebSocketOptions {
    /// Which end this is.
    pub role: Role,
    /// Larger messages are refused, in bytes.
    pub max_message: usize,
    /// Where the memory of large messages comes from.
    pub pool: Pool,
    /// Whether its large messages give way to actions.
    pub courtesy: Courtesy,
    /// What was agreed with the peer.
    pub codec: Codec,
    /// The peer's name for the log, such as its address.
    pub peer: String,
}

/// Frames as binary messages over one byte stream, whose opening handshake is done.
#[derive(Debug)]
pub struct WebSocketTransport<S> {
    reader: Mutex<Reader<ReadHalf<S>>>,
    writer: Mutex<Writer<WriteHalf<S>>>,
    /// What is owed to the other side: written by whoever holds the writer, between two messages and never within one.
    owed: StdMutex<Owed>,
    codec: Codec,
    peer: String,
}

/// The newest ping needs an answer, older ones do not (section 5.5.3).
#[derive(Debug, Default)]
struct Owed {
    pong: Option<Bytes>,
    close: Option<Bytes>,
}

impl<S: AsyncRead + AsyncWrite> WebSocketTransport<S> {
    /// The transport over `stream`, of which `read_already` was read with the handshake.
    pub fn new(stream: S, read_already: &[u8], options: WebSocketOptions) -> WebSocketTransport<S> {
        let (read, write) = tokio::io::split(stream);
        WebSocketTransport {
            reader: Mutex::new(Reader::new(read, read_already, &options)),
            writer: Mutex::new(Writer::new(write, options.role, options.courtesy)),
            owed: StdMutex::default(),
            codec: options.codec,
            peer: options.peer,
        }
    }

    fn next_owed(&self) -> Option<(Opcode, Bytes)> {
        let mut owed = self.owed.lock().unwrap_or_else(PoisonError::into_inner);
        let pong = owed.pong.take().map(|payload| (Opcode::Pong, payload));
        pong.or_else(|| owed.close.take().map(|payload| (Opcode::Close, payload)))
    }

    fn owe(&self, change: impl FnOnce(&mut Owed)) {
        change(&mut self.owed.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Writes what is owed, unless somebody else holds the writer, who then does it.
    async fn pay(&self) -> Result<(), TransportError> {
        // Looked at again after the writer is free: a ping may have come between its holder's last look and its letting go.
        while self.owes()
            && let Ok(mut writer) = self.writer.try_lock()
        {
            while let Some((opcode, payload)) = self.next_owed() {
                writer.control(opcode, &payload).await.map_err(TransportError::lost)?;
            }
        }
        Ok(())
    }

    fn owes(&self) -> bool {
        let owed = self.owed.lock().unwrap_or_else(PoisonError::into_inner);
        owed.pong.is_some() || owed.close.is_some()
    }
}

impl<S: AsyncRead + AsyncWrite + Send + 'static> Transport for WebSocketTransport<S> {
    async fn send(&self, frame: Frame) -> Result<(), TransportError> {
        let mut writer = self.writer.lock().await;
        writer.message(frame.segments()).await.map_err(TransportError::lost)?;
        drop(writer);
        self.pay().await
    }

    async fn recv(&self) -> Result<Option<Frame>, TransportError> {
        let mut reader = self.reader.lock().await;
        loop {
            match reader.next().await? {
                Event::Message(frame) => return Ok(Some(frame)),
                Event::Ping(payload) => self.owe(|owed| owed.pong = Some(payload)),
                Event::Pong => {}
                Event::Close(payload) => {
                    // Its code is sent back (section 5.5.1).
                    self.owe(|owed| owed.close = Some(payload.slice(..payload.len().min(2))));
                    let _ = self.pay().await;
                    return Ok(None);
                }
            }
            self.pay().await?;
        }
    }

    async fn close(&self) {
        let mut writer = self.writer.lock().await;
        let _ = writer.control(Opcode::Close, &Bytes::from_static(&NORMAL_CLOSURE)).await;
        let _ = writer.shutdown().await;
    }

    fn codec(&self) -> Codec {
        self.codec
    }

    fn peer(&self) -> &str {
        &self.peer
    }
}
