//! How clients connect to a robot: the robot's server holds a liveliness token under the robot's name, and
//! gives each lane a name of its own.

use std::{fmt, sync::Arc, time::Duration};

use chiral_proto::{error::chain, keys};
use tokio::sync::{Semaphore, mpsc};
use zenoh::{
    liveliness::LivelinessToken,
    qos::{CongestionControl, Priority},
    query::{Query, Queryable},
};

use crate::host_name::host_name;
use crate::liveness::IdleTimeout;

use super::{
    error::{ZenohError, failed},
    session::{QUERY_TIMEOUT, ZenohSession},
    transport::{LaneKind, ZenohOptions, ZenohTransport},
};

/// How long a server may take to answer a request for a lane, and a lane to become ready.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// The most queries that wait to be answered. Further ones are dropped.
const MAX_PENDING_QUERIES: usize = 64;
/// The most lanes of a server at once.
const MAX_CONNECTIONS: usize = 256;

/// Accepts connections to a robot, which is alive on the network until this is dropped.
pub struct ZenohListener {
    network: ZenohSession,
    robot: String,
    queries: mpsc::Receiver<ClientQuery>,
    slots: Arc<Semaphore>,
    _queryables: [Queryable<()>; 2],
    _token: LivelinessToken,
}

/// A query of a client.
enum ClientQuery {
    /// Requests a lane.
    Connection(Query),
    /// Requests information about the robot.
    Info(Query),
}

impl fmt::Debug for ZenohListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ZenohListener").field("robot", &self.robot).finish_non_exhaustive()
    }
}

impl ZenohSession {
    /// Announces a robot on this network, under a name that [`keys::check_robot`] accepts.
    ///
    /// # Errors
    /// [`ZenohError::NameTaken`] if a robot of this name is alive already (two that are announced at the same
    /// time may both be refused), [`ZenohError::LivelinessTimeout`] if the network does not answer, else
    /// [`ZenohError::Failed`].
    pub async fn announce(&self, robot: &str) -> Result<ZenohListener, ZenohError> {
        // The id makes it unique, the host is for people.
        let own_id = format!("{}@{}", self.session().zid(), keys::robot_of_host(&host_name()));
        let tokens = keys::alive(robot, "*");
        let name_taken = |(robot, server)| ZenohError::NameTaken { robot, server };
        let find_other =
            async || Ok(self.alive(&tokens).await?.into_iter().find(|(_, server)| *server != own_id));
        if let Some(other) = find_other().await? {
            return Err(name_taken(other));
        }
        let (open_sender, queries) = mpsc::channel(MAX_PENDING_QUERIES);
        let info_sender = open_sender.clone();
        let open_queryable = self.session().declare_queryable(keys::open(robot)).complete(true);
        let open_queryable = open_queryable
            .callback(move |query| drop(open_sender.try_send(ClientQuery::Connection(query))))
            .await
            .map_err(failed)?;
        let info_queryable = self.session().declare_queryable(keys::info(robot)).complete(true);
        let info_queryable = info_queryable
            .callback(move |query| drop(info_sender.try_send(ClientQuery::Info(query))))
            .await
            .map_err(failed)?;
        let token =
            self.session().liveliness().declare_token(keys::alive(robot, &own_id)).await.map_err(failed)?;
        // Of two robots announced at the same time, at least one finds the other now. Both must then give up:
        // if one stayed, the other might have checked before the token was visible, and stay as well.
        if let Some(other) = find_other().await? {
            return Err(name_taken(other));
        }
        Ok(ZenohListener {
            network: self.clone(),
            robot: robot.to_owned(),
            queries,
            slots: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
            _queryables: [open_queryable, info_queryable],
            _token: token,
        })
    }

    /// Requests information about a robot: the bytes that its server passes to [`ZenohListener::accept`].
    /// `None` if it does not answer within a second.
    pub async fn info(&self, robot: &str) -> Option<Vec<u8>> {
        let query = self.session().get(keys::info(robot)).timeout(QUERY_TIMEOUT);
        let answer = query.await.ok()?.recv_async().await.ok()?;
        Some(answer.result().ok()?.payload().to_bytes().into_owned())
    }

    /// Opens a lane to a robot.
    ///
    /// # Errors
    /// [`ZenohError::NoAnswer`], [`ZenohError::Refused`], [`ZenohError::Failed`].
    pub async fn connect(
        &self,
        robot: &str,
        kind: LaneKind,
        options: ZenohOptions,
    ) -> Result<ZenohTransport, ZenohError> {
        let no_answer = || ZenohError::NoAnswer { robot: robot.to_owned(), waited: CONNECT_TIMEOUT };
        let refused = |reason: String| ZenohError::Refused { robot: robot.to_owned(), reason };
        let query = self.session().get(keys::open(robot)).payload(kind.as_str()).timeout(CONNECT_TIMEOUT);
        let query =
            query.congestion_control(CongestionControl::Block).priority(Priority::RealTime).express(true);
        let answers = query.await.map_err(failed)?;
        // If no server has the key, or it is gone, the channel ends without an item.
        let answer = answers.recv_async().await.map_err(|_| no_answer())?;
        let connection = match answer.result() {
            Ok(sample) => String::from_utf8_lossy(&sample.payload().to_bytes()).into_owned(),
            Err(error) if *error.payload().to_bytes() == *b"Timeout" => return Err(no_answer()),
            Err(error) => {
                return Err(refused(String::from_utf8_lossy(&error.payload().to_bytes()).into_owned()));
            }
        };
        if !is_connection_name(&connection) {
            return Err(refused(format!(
                "expected a connection name of 32 hexadecimal digits, found {connection:?}"
            )));
        }
        let transport =
            ZenohTransport::declare(self, robot, &connection, keys::End::Client, kind, options, None).await?;
        if transport.handshake(CONNECT_TIMEOUT).await { Ok(transport) } else { Err(no_answer()) }
    }
}

impl ZenohListener {
    /// Returns the next lane that a client opens. Meanwhile, requests for information are answered with
    /// `info`. `None` once the session is closed.
    pub async fn accept(
        &mut self,
        options: &ZenohOptions,
        info: impl Fn() -> Vec<u8>,
    ) -> Option<ZenohTransport> {
        loop {
            let query = match self.queries.recv().await? {
                ClientQuery::Connection(query) => query,
                ClientQuery::Info(query) => {
                    let _ = query.reply(keys::info(&self.robot), info()).await;
                    continue;
                }
            };
            let idle_timeout = IdleTimeout::new(options.idle_timeout.limit());
            let options = ZenohOptions { idle_timeout, ..options.clone() };
            match self.open_connection(&query, options).await {
                Ok((transport, connection)) => {
                    if query.reply(keys::open(&self.robot), connection).express(true).await.is_ok() {
                        return Some(transport);
                    }
                }
                Err(reason) => drop(query.reply_err(reason).await),
            }
        }
    }

    /// Opens the server's end of a lane, which receives from now on. Returns it and its name, or why it is
    /// refused.
    async fn open_connection(
        &self,
        query: &Query,
        options: ZenohOptions,
    ) -> Result<(ZenohTransport, String), String> {
        let kind = query.payload().and_then(|payload| LaneKind::parse(&payload.to_bytes()));
        let kind = kind.ok_or("expected lane kind control or observations, found another")?;
        let slot = Arc::clone(&self.slots).try_acquire_owned();
        let slot = slot.map_err(|_| format!("expected at most {MAX_CONNECTIONS} connections, found more"))?;
        let mut random = [0; 16];
        getrandom::fill(&mut random).map_err(|error| format!("no random bits: {error}"))?;
        let connection = format!("{:032x}", u128::from_le_bytes(random));
        let end = keys::End::Server;
        let transport =
            ZenohTransport::declare(&self.network, &self.robot, &connection, end, kind, options, Some(slot))
                .await;
        Ok((transport.map_err(|error| chain(&error))?, connection))
    }
}

/// Whether a name is 128 bits in hexadecimal.
fn is_connection_name(name: &str) -> bool {
    name.len() == 32 && name.bytes().all(|byte| byte.is_ascii_hexdigit())
}
