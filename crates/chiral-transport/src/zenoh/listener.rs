//! How a robot and its clients meet: the robot's server is alive under the robot's name, and gives each
//! connection a name of its own.

use std::{fmt, sync::Arc, time::Duration};

use chiral_proto::{error::chain, keys};
use tokio::sync::{Semaphore, mpsc};
use zenoh::{
    liveliness::LivelinessToken,
    qos::{CongestionControl, Priority},
    query::{Query, Queryable},
};

use crate::host_name::host_name;

use super::{
    error::{ZenohError, failed},
    session::{QUERY_TIMEOUT, ZenohSession},
    transport::{LaneKind, ZenohOptions, ZenohTransport},
};

/// Within this a server must answer who asks for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Who asks for a connection while so many others wait for theirs is not heard.
const MAX_PENDING_QUERIES: usize = 64;
/// A server has no more connections than that at once.
const MAX_CONNECTIONS: usize = 256;

/// A robot that is alive on a network. It is not any more when this is dropped.
pub struct ZenohListener {
    network: ZenohSession,
    robot: String,
    queries: mpsc::Receiver<ClientQuery>,
    slots: Arc<Semaphore>,
    _queryables: [Queryable<()>; 2],
    _token: LivelinessToken,
}

/// What somebody asks the robot's server.
enum ClientQuery {
    /// For a connection.
    Connection(Query),
    /// What the robot is.
    Info(Query),
}

impl fmt::Debug for ZenohListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ZenohListener").field("robot", &self.robot).finish_non_exhaustive()
    }
}

impl ZenohSession {
    /// Makes a robot known to this network, under a name that [`keys::check_robot`] has found good.
    ///
    /// # Errors
    /// [`ZenohError::NameTaken`] if a robot of this name is alive already (two that come at the same time
    /// may both be refused), [`ZenohError::LivelinessTimeout`] if the network does not tell, else
    /// [`ZenohError::Failed`].
    pub async fn announce(&self, robot: &str) -> Result<ZenohListener, ZenohError> {
        // The id is its own, the host is for people.
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
        // Whoever came at the same time is seen now, by one of the two at least; were one of them to stay all
        // the same, the other may have looked before.
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

    /// What a robot's server says of the robot, as it gave it to [`ZenohListener::accept`]; nothing if it
    /// does not answer within a second.
    pub async fn info(&self, robot: &str) -> Option<Vec<u8>> {
        let query = self.session().get(keys::info(robot)).timeout(QUERY_TIMEOUT);
        let answer = query.await.ok()?.recv_async().await.ok()?;
        Some(answer.result().ok()?.payload().to_bytes().into_owned())
    }

    /// Asks a robot for a connection.
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
        // Where nobody serves the key, or the server is gone, there is no item at all.
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
                "expected a connection's name of 32 hexadecimal digits, found {connection:?}"
            )));
        }
        let transport =
            ZenohTransport::declare(self, robot, &connection, keys::End::Client, kind, options, None).await?;
        if transport.handshake(CONNECT_TIMEOUT).await { Ok(transport) } else { Err(no_answer()) }
    }
}

impl ZenohListener {
    /// The next connection that a client asks for; meanwhile, who asks what the robot is gets `info`. `None`
    /// never comes while the network is there.
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
            match self.open_connection(&query, options.clone()).await {
                Ok((transport, connection)) => {
                    if query.reply(keys::open(&self.robot), connection).express(true).await.is_ok() {
                        return Some(transport);
                    }
                }
                Err(reason) => drop(query.reply_err(reason).await),
            }
        }
    }

    /// A new connection, which listens already, and its name; or why there is none.
    async fn open_connection(
        &self,
        query: &Query,
        options: ZenohOptions,
    ) -> Result<(ZenohTransport, String), String> {
        let kind = query.payload().and_then(|payload| LaneKind::parse(&payload.to_bytes()));
        let kind = kind.ok_or("expected a kind of connection, control or observations, found another")?;
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

/// 128 bits in hexadecimal.
fn is_connection_name(name: &str) -> bool {
    name.len() == 32 && name.bytes().all(|byte| byte.is_ascii_hexdigit())
}
