//! Finds robots without an address: by multicast scouting, then by a short session on each network that
//! answers.

use std::{collections::HashSet, sync::mpsc as std_mpsc, time::Duration};

use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{Instant, sleep_until, timeout_at},
};
use zenoh::{Wait, config::WhatAmI, scouting::Hello};

use super::{
    config::{Purpose, ZenohSessionOptions, configure},
    error::{ZenohError, failed},
    session::ZenohSession,
    thread::run_on_thread,
};

/// Where a robot on this host listens by default. It is tried even where there is no multicast.
const LOCAL_DEFAULT: &str = "tcp/127.0.0.1:7447";

/// A robot that was reached by one locator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScoutedRobot {
    /// Its name.
    pub robot: String,
    /// Where it was reached.
    pub locator: String,
    /// Whether its own server listens there. Otherwise another host leads to it, such as a router.
    pub is_direct: bool,
    /// Its server's information about it; see [`super::ZenohListener::accept`].
    pub info: Vec<u8>,
}

/// A search for robots. It ends when this is dropped.
#[derive(Debug)]
pub struct Scout {
    options: ZenohSessionOptions,
    deadline: Instant,
    answers: mpsc::UnboundedReceiver<Hello>,
    looked_up: HashSet<(String, String)>,
    lookups: JoinSet<()>,
    found: mpsc::UnboundedReceiver<ScoutedRobot>,
    /// For lookups that are still to be started.
    found_sender: mpsc::UnboundedSender<ScoutedRobot>,
    /// The scouting thread ends when this is dropped.
    _thread_end: std_mpsc::Sender<()>,
}

impl Scout {
    /// Starts a search of this duration: by multicast, on this host, and at the locators that the
    /// configuration file connects to. Only that file of the options is used.
    ///
    /// # Errors
    /// [`ZenohError::Config`], [`ZenohError::Failed`] if multicast cannot be used,
    /// [`ZenohError::Thread`].
    pub async fn start(options: &ZenohSessionOptions, duration: Duration) -> Result<Scout, ZenohError> {
        let deadline = Instant::now() + duration;
        let options =
            ZenohSessionOptions { config: options.config.clone(), ..ZenohSessionOptions::default() };
        let scouting = configure(&options, Purpose::Scout)?.config;
        let (answer, answers) = mpsc::unbounded_channel();
        let (started, starting) = tokio::sync::oneshot::channel();
        let (end, ended) = std_mpsc::channel();
        // Scouting starts and ends on a thread of its own, as sessions do.
        run_on_thread(move || {
            let scout = zenoh::scout(WhatAmI::Peer | WhatAmI::Router, scouting);
            let scout = scout.callback(move |hello| drop(answer.send(hello))).wait();
            let is_started = scout.as_ref().map(drop).map_err(|error| failed(error.to_string().into()));
            let _ = started.send(is_started);
            let _: Result<(), _> = ended.recv_timeout(duration);
            drop(scout);
        })?;
        if let Ok(Ok(started)) = timeout_at(deadline, starting).await {
            started?;
        }
        let (found_sender, found) = mpsc::unbounded_channel();
        let (looked_up, lookups) = (HashSet::new(), JoinSet::new());
        let mut scout =
            Scout { options, deadline, answers, looked_up, lookups, found, found_sender, _thread_end: end };
        scout.look_up(None, LOCAL_DEFAULT);
        // A file without locators adds nothing.
        if let Ok(configured) = configure(&scout.options, Purpose::Member) {
            configured.connect.iter().for_each(|locator| scout.look_up(None, locator));
        }
        Ok(scout)
    }

    /// Returns the next robot that was reached. A robot may be reached more than once, by several locators.
    /// `None` once the duration is over.
    pub async fn next(&mut self) -> Option<ScoutedRobot> {
        loop {
            tokio::select! {
                () = sleep_until(self.deadline) => return None,
                Some(hello) = self.answers.recv() => {
                    let server = hello.zid().to_string();
                    hello.locators().iter().for_each(|locator| self.look_up(Some(&server), locator.as_str()));
                }
                Some(robot) = self.found.recv() => return Some(robot),
            }
        }
    }

    /// Starts a lookup at this locator, once.
    fn look_up(&mut self, server: Option<&str>, locator: &str) {
        if self.looked_up.insert((server.unwrap_or_default().to_owned(), locator.to_owned())) {
            let (options, found_sender) = (self.options.clone(), self.found_sender.clone());
            self.lookups.spawn(look_up(options, server.map(str::to_owned), locator.to_owned(), found_sender));
        }
    }
}

/// Reports the robots that are alive at a locator as they answer: one that does not answer hides no other.
async fn look_up(
    options: ZenohSessionOptions,
    server: Option<String>,
    locator: String,
    found_sender: mpsc::UnboundedSender<ScoutedRobot>,
) {
    let Ok(configured) = configure(&options, Purpose::Lookup(&locator)) else { return };
    let Ok(network) = ZenohSession::open_configured(configured).await else { return };
    let mut queries = JoinSet::new();
    for (robot, alive) in network.robots().await.unwrap_or_default() {
        let (network, locator, found_sender) = (network.clone(), locator.clone(), found_sender.clone());
        let is_direct = server.as_deref() == alive.split('@').next();
        queries.spawn(async move {
            if let Some(info) = network.info(&robot).await {
                let _ = found_sender.send(ScoutedRobot { robot, locator, is_direct, info });
            }
        });
    }
    while queries.join_next().await.is_some() {}
    network.close().await;
}
