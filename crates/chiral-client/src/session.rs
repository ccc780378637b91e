//! A session with a server: its connections' loops, and its end. On each connection one loop receives and one
//! sends, and neither waits for the other.

use std::{future::pending, pin::pin, sync::Arc, time::Duration};

use chiral_proto::{Message, Notice, TransportError, pool::Pool};
use chiral_transport::Pacing;
use tokio::time::{sleep, timeout};

use crate::{
    connection::{Connection, Lane, Link},
    core::Core,
    dispatch::thread::{self, ActionSink, Wait},
    error::Error,
    stats::ClientStats,
    transport::DynTransport,
    wire::Wire,
};

/// For the goodbye and an orderly close.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
/// Buffers that no observation used for this long, or at most twice as long, are freed.
const TRIM_PERIOD: Duration = Duration::from_secs(4);

/// A server that sends nothing for this long is reported as silent: pongs arrive every second.
const SILENCE_THRESHOLD: Duration = Duration::from_secs(2);

/// What the caller's calls need of a session. Dropped, it ends the session.
pub(crate) struct Session {
    pub(crate) core: Arc<Core>,
    pub(crate) wire: Arc<dyn Wire>,
    /// Where actions are sent.
    pub(crate) sink: Arc<dyn ActionSink>,
    pub(crate) control: Arc<Connection>,
    /// The same as `control` if there is only one connection.
    pub(crate) observations: Arc<Connection>,
}

/// A session's connections, before anything runs on them.
pub(crate) struct Connections {
    pub(crate) core: Arc<Core>,
    pub(crate) control: Arc<Connection>,
    /// The same as `control` if there is only one connection.
    pub(crate) observations: Arc<Connection>,
    transports: Vec<(Arc<Connection>, Arc<dyn DynTransport>)>,
}

impl Connections {
    /// One connection that carries everything, or one for each lane. `lost` says what the failure of one
    /// means.
    pub(crate) fn new(
        core: Arc<Core>,
        control: Link,
        observations: Option<Link>,
        pacing: &Pacing,
        lost: fn(TransportError) -> Error,
    ) -> Connections {
        let mut transports = Vec::new();
        let mut connect = |lane, link: Link| {
            let connection = Arc::new(Connection::new(Arc::clone(&core), lane, &link, pacing.clone(), lost));
            transports.push((Arc::clone(&connection), link.transport));
            connection
        };
        let control = connect(if observations.is_some() { Lane::Control } else { Lane::Both }, control);
        let observations = observations.map(|link| connect(Lane::Observations, link));
        let observations = observations.unwrap_or_else(|| Arc::clone(&control));
        Connections { core, control, observations, transports }
    }
}

impl Session {
    /// Starts the loops of the connections, and dispatch. Received observations lie in `pool`.
    pub(crate) fn start(
        connections: Connections,
        wire: Arc<dyn Wire>,
        sink: Arc<dyn ActionSink>,
        pool: &Pool,
        wait: Wait,
    ) -> Result<Session, Error> {
        let Connections { core, control, observations, transports } = connections;
        for (connection, transport) in transports {
            let runtime = connection.runtime.clone();
            let loops = Loops {
                core: Arc::clone(&core),
                wire: Arc::clone(&wire),
                connection,
                transport,
                pool: pool.clone(),
            };
            runtime.spawn(async move { loops.run().await });
        }
        thread::start(Arc::clone(&core), Arc::clone(&sink), control.runtime.clone(), wait)
            .inspect_err(|error| core.end(error.clone()))?;
        Ok(Session { core, wire, sink, control, observations })
    }

    pub(crate) fn stats(&self) -> ClientStats {
        let state = self.core.state();
        let is_alive = state.check_alive().is_ok();
        let stats = state.stats(self.core.now());
        drop(state);
        let silences =
            [&self.control, &self.observations].map(|connection| connection.idle_timeout.idle_time());
        let silent_for = silences.into_iter().flatten().max();
        ClientStats {
            silent_for: silent_for.filter(|silent_for| is_alive && *silent_for >= SILENCE_THRESHOLD),
            ..stats
        }
    }

    /// Ends the session and returns when its connections are closed, which has a timeout.
    pub(crate) async fn close(&self) {
        self.core.end(Error::Closed);
        self.control.closed().await;
        self.observations.closed().await;
        self.core.state().close();
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.core.end(Error::Closed);
    }
}

/// What the loops of one connection need of a session. Whatever becomes of them, also if their runtime is
/// shut down, the session does not outlive them.
struct Loops {
    core: Arc<Core>,
    wire: Arc<dyn Wire>,
    connection: Arc<Connection>,
    transport: Arc<dyn DynTransport>,
    pool: Pool,
}

impl Loops {
    /// Runs both loops until the session ends or the connection fails, which ends the session; then closes.
    async fn run(&self) {
        let mut receiving = pin!(self.receive());
        let has_received_end = tokio::select! {
            biased;
            end = &mut receiving => {
                self.core.end(end);
                true
            }
            end = self.wire.run_sender(&self.connection) => {
                self.core.end(end);
                false
            }
            () = self.trim() => false,
            () = self.core.ended() => false,
        };
        let closing = async {
            self.close().await;
            if !has_received_end && self.wire.awaits_close() {
                // Until the server has closed too: only then the robot is free for the next client.
                receiving.await;
            }
        };
        let _ = timeout(CLOSE_TIMEOUT, closing).await;
    }

    async fn receive(&self) -> Error {
        let idle_timeout = &self.connection.idle_timeout;
        idle_timeout.watch(self.receive_frames()).await.unwrap_or_else(|| {
            let limit = idle_timeout.limit().as_secs_f64();
            let reason = format!("nothing received from the server for {limit} s");
            Error::Disconnected { reason, cause: None }
        })
    }

    async fn receive_frames(&self) -> Error {
        loop {
            let frame = match self.transport.recv().await {
                Ok(Some(frame)) => frame,
                Ok(None) => {
                    let reason = "the server closed the connection".to_owned();
                    return Error::Disconnected { reason, cause: None };
                }
                Err(error) => return self.connection.lost(error),
            };
            // Our transports have recorded every byte of it; a transport of the caller's has not.
            self.connection.idle_timeout.record();
            if let Err(end) = self.wire.receive(&self.connection, frame) {
                return end;
            }
        }
    }

    /// Frees buffers that no observation uses, if observations arrive here. Never returns.
    async fn trim(&self) {
        if self.connection.lane == Lane::Control {
            return pending().await;
        }
        loop {
            sleep(TRIM_PERIOD).await;
            self.pool.trim();
        }
    }

    /// Sends a goodbye with the reason, where the wire has one, and closes.
    async fn close(&self) {
        let reason = match self.core.state().check_alive() {
            Err(Error::Closed) | Ok(()) => "the client was closed".to_owned(),
            Err(error) => error.to_string(),
        };
        if let Ok(goodbye) = self.connection.codec.encode(&Message::Notice(Notice::Goodbye { reason })) {
            let _ = self.connection.try_send(goodbye).await;
        }
        self.transport.close().await;
    }
}

impl Drop for Loops {
    fn drop(&mut self) {
        let reason = "the runtime of the connection was shut down".to_owned();
        self.core.end(Error::Disconnected { reason, cause: None });
        self.connection.close();
    }
}
