//! The transport over a WebSocket: one task reads, one writes, and neither waits for the other. Control
//! frames are answered here.

use std::{pin::pin, sync::Mutex as StdMutex, time::Duration};

use bytes::{BufMut, Bytes, BytesMut};
use chiral_proto::{Code, Codec, Fault, Frame, Transport, TransportError, lock};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadHalf, WriteHalf},
    sync::Mutex,
    time::sleep,
};

use super::{
    frame::{MAX_CONTROL_PAYLOAD, Opcode, WebSocketOptions},
    reader::{Event, Reader},
    writer::Writer,
};
use crate::liveness::IdleTimeout;

/// The close code "normal closure" (RFC 6455, section 7.4.1).
const NORMAL_CLOSURE: u16 = 1000;
/// The close code "going away".
const GOING_AWAY: u16 = 1001;
/// The longest reason in a close frame, beside its code of two bytes (section 5.5).
const MAX_REASON: usize = MAX_CONTROL_PAYLOAD - 2;
/// How long nothing may arrive before a ping is sent, unless a quarter of the idle timeout is shorter.
const PING_PERIOD: Duration = Duration::from_secs(1);

/// Carries frames as binary messages over one byte stream, after the opening handshake.
#[derive(Debug)]
pub struct WebSocketTransport<S> {
    reader: Mutex<Reader<ReadHalf<S>>>,
    writer: Mutex<Writer<WriteHalf<S>>>,
    /// Control frames to send. The task that holds the writer sends them, between two messages and never
    /// within one.
    pending_control: StdMutex<PendingControl>,
    idle_timeout: IdleTimeout,
    pings: bool,
    codec: Codec,
    peer: String,
}

/// Control frames to send. Only the newest ping needs a pong (section 5.5.3).
#[derive(Debug, Default)]
struct PendingControl {
    pong: Option<Bytes>,
    ping: bool,
    close: Option<Bytes>,
}

impl<S: AsyncRead + AsyncWrite> WebSocketTransport<S> {
    /// Creates the transport over `stream`. `read_already` are the bytes that the handshake read beyond its
    /// end.
    pub fn new(stream: S, read_already: &[u8], options: WebSocketOptions) -> WebSocketTransport<S> {
        let (read, write) = tokio::io::split(stream);
        let idle_timeout = IdleTimeout::new(options.idle_timeout);
        let progress = options.pings.then(|| idle_timeout.clone());
        WebSocketTransport {
            reader: Mutex::new(Reader::new(read, read_already, &options, idle_timeout.clone())),
            writer: Mutex::new(Writer::new(write, options.role, options.pacing, progress)),
            pending_control: StdMutex::default(),
            idle_timeout,
            pings: options.pings,
            codec: options.codec,
            peer: options.peer,
        }
    }

    /// Returns the idle timeout. The transport records arrivals; its user waits for the expiry.
    pub fn idle_timeout(&self) -> IdleTimeout {
        self.idle_timeout.clone()
    }

    /// Returns the next event. While none arrives, pings the peer if the options say so.
    async fn next(&self, reader: &mut Reader<ReadHalf<S>>) -> Result<Event, TransportError> {
        let mut next = pin!(reader.next());
        loop {
            tokio::select! {
                biased;
                event = &mut next => return event,
                () = sleep(PING_PERIOD.min(self.idle_timeout.limit() / 4)), if self.pings => {}
            }
            self.queue_control(|pending| pending.ping = true);
            self.flush_control().await?;
        }
    }

    async fn close_with(&self, code: u16, reason: &str) {
        let mut payload = BytesMut::with_capacity(2 + MAX_REASON);
        payload.put_u16(code);
        payload.put_slice(&reason.as_bytes()[..reason.floor_char_boundary(MAX_REASON)]);
        let mut writer = self.writer.lock().await;
        let _ = writer.control(Opcode::Close, &payload.freeze()).await;
        let _ = writer.shutdown().await;
    }

    fn next_control(&self) -> Option<(Opcode, Bytes)> {
        let mut pending = lock(&self.pending_control);
        if let Some(payload) = pending.pong.take() {
            return Some((Opcode::Pong, payload));
        }
        if std::mem::take(&mut pending.ping) {
            return Some((Opcode::Ping, Bytes::new()));
        }
        pending.close.take().map(|payload| (Opcode::Close, payload))
    }

    fn queue_control(&self, change: impl FnOnce(&mut PendingControl)) {
        change(&mut lock(&self.pending_control));
    }

    /// Sends the pending control frames, unless another task holds the writer: that task then sends them.
    async fn flush_control(&self) -> Result<(), TransportError> {
        // Check again once the writer is free: a ping may have arrived after its holder's last check and
        // before its release.
        while self.has_pending_control()
            && let Ok(mut writer) = self.writer.try_lock()
        {
            while let Some((opcode, payload)) = self.next_control() {
                writer.control(opcode, &payload).await.map_err(TransportError::lost)?;
            }
        }
        Ok(())
    }

    fn has_pending_control(&self) -> bool {
        let pending = lock(&self.pending_control);
        pending.pong.is_some() || pending.ping || pending.close.is_some()
    }
}

impl<S: AsyncRead + AsyncWrite + Send + 'static> Transport for WebSocketTransport<S> {
    async fn send(&self, frame: Frame) -> Result<(), TransportError> {
        let mut writer = self.writer.lock().await;
        writer.message(frame.segments()).await.map_err(TransportError::lost)?;
        drop(writer);
        self.flush_control().await
    }

    async fn recv(&self) -> Result<Option<Frame>, TransportError> {
        let mut reader = self.reader.lock().await;
        loop {
            match self.next(&mut reader).await? {
                Event::Message(frame) => return Ok(Some(frame)),
                Event::Ping(payload) => self.queue_control(|pending| pending.pong = Some(payload)),
                Event::Pong => {}
                Event::Close(payload) => {
                    // Echo its code (section 5.5.1).
                    self.queue_control(|pending| pending.close = Some(payload.slice(..payload.len().min(2))));
                    let _ = self.flush_control().await;
                    return close_result(&payload);
                }
            }
            self.flush_control().await?;
        }
    }

    async fn close(&self) {
        self.close_with(NORMAL_CLOSURE, "").await;
    }

    async fn refuse(&self, fault: &Fault) {
        self.close_with(close_code(fault.code), &fault.to_string()).await;
        // Drain before closing: unread input makes TCP send RST, which would discard our close frame.
        self.reader.lock().await.drain().await;
    }

    fn codec(&self) -> Codec {
        self.codec
    }

    fn peer(&self) -> &str {
        &self.peer
    }
}

/// Returns what `recv` returns after a close frame: `None` after an orderly close, else the reason.
fn close_result(payload: &Bytes) -> Result<Option<Frame>, TransportError> {
    let Some((code, reason)) = payload.split_first_chunk() else { return Ok(None) };
    match u16::from_be_bytes(*code) {
        NORMAL_CLOSURE => Ok(None),
        GOING_AWAY if reason.is_empty() => Ok(None),
        code => Err(TransportError::Closed { code, reason: String::from_utf8_lossy(reason).into_owned() }),
    }
}

/// Returns the close code for a fault (section 7.4.1, and IANA's registry for 1013).
fn close_code(code: Code) -> u16 {
    match code {
        Code::ShuttingDown => GOING_AWAY,
        // Internal error.
        Code::Unspecified | Code::RobotFailed | Code::OutOfService | Code::SensorTimeout => 1011,
        // Try again later.
        Code::Busy | Code::QueueFull | Code::Resetting => 1013,
        // Policy violation: anything wrong with a request.
        _ => 1008,
    }
}
