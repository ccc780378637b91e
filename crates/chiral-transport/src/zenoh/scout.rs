//! Robots found without an address: by multicast, and then a short look at each network that answers.

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
    thread::on_thread,
};

/// Where a robot of this very host lets others in unless it was told otherwise; found even where there is no
/// multicast.
const THIS_HOST: &str = "tcp/127.0.0.1:7447";

/// A robot that was reached, by one locator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScoutedRobot {
    /// Its name.
    pub robot: String,
    /// Where it was reached.
    pub locator: String,
    /// Whether its own server listens there; otherwise somebody who leads to it, such as a router.
    pub is_own: bool,
    /// What its server says of it; see [`super::ZenohListener::accept`].
    pub info: Vec<u8>,
}

/// A search that is under way. It ends when it is dropped.
#[derive(Debug)]
pub struct Scout {
    options: ZenohSessionOptions,
    until: Instant,
    answers: mpsc::UnboundedReceiver<Hello>,
    seen: HashSet<(String, String)>,
    looks: JoinSet<()>,
    sightings: mpsc::UnboundedReceiver<ScoutedRobot>,
    /// For the looks that are still to begin.
    sighted: mpsc::UnboundedSender<ScoutedRobot>,
    /// Its thread ends with it.
    _end: std_mpsc::Sender<()>,
}

impl Scout {
    /// Begins to look, for so long: by multicast, at this host, and wherever the configuration file connects
    /// to. Of the options only that file counts.
    ///
    /// # Errors
    /// [`ZenohError::Config`], [`ZenohError::Failed`] if multicast cannot be used,
    /// [`ZenohError::Thread`].
    pub async fn begin(options: &ZenohSessionOptions, limit: Duration) -> Result<Scout, ZenohError> {
        let until = Instant::now() + limit;
        let options =
            ZenohSessionOptions { config: options.config.clone(), ..ZenohSessionOptions::default() };
        let scouting = configure(&options, Purpose::Scout)?.config;
        let (found, answers) = mpsc::unbounded_channel();
        let (started, starting) = tokio::sync::oneshot::channel();
        let (end, ended) = std_mpsc::channel();
        // It begins and ends on a thread of its own, as sessions do.
        on_thread(move || {
            let scout = zenoh::scout(WhatAmI::Peer | WhatAmI::Router, scouting);
            let scout = scout.callback(move |hello| drop(found.send(hello))).wait();
            let is_started = scout.as_ref().map(drop).map_err(|error| failed(error.to_string().into()));
            let _ = started.send(is_started);
            let _: Result<(), _> = ended.recv_timeout(limit);
            drop(scout);
        })?;
        if let Ok(Ok(started)) = timeout_at(until, starting).await {
            started?;
        }
        let (sighted, sightings) = mpsc::unbounded_channel();
        let (seen, looks) = (HashSet::new(), JoinSet::new());
        let mut search = Scout { options, until, answers, seen, looks, sightings, sighted, _end: end };
        search.look(None, THIS_HOST);
        // A file without locators is as good as none.
        if let Ok(configured) = configure(&search.options, Purpose::Member) {
            configured.connect.iter().for_each(|locator| search.look(None, locator));
        }
        Ok(search)
    }

    /// The next robot that was reached; one may come more than once, by several locators. `None` when time is
    /// over.
    pub async fn next(&mut self) -> Option<ScoutedRobot> {
        loop {
            tokio::select! {
                () = sleep_until(self.until) => return None,
                Some(hello) = self.answers.recv() => {
                    let server = hello.zid().to_string();
                    hello.locators().iter().for_each(|locator| self.look(Some(&server), locator.as_str()));
                }
                Some(sighting) = self.sightings.recv() => return Some(sighting),
            }
        }
    }

    /// Has a look at who is there, once.
    fn look(&mut self, server: Option<&str>, locator: &str) {
        if self.seen.insert((server.unwrap_or_default().to_owned(), locator.to_owned())) {
            let (options, sighted) = (self.options.clone(), self.sighted.clone());
            self.looks.spawn(look(options, server.map(str::to_owned), locator.to_owned(), sighted));
        }
    }
}

/// Tells of the robots that are alive there as they answer: one that does not answer hides no other.
async fn look(
    options: ZenohSessionOptions,
    server: Option<String>,
    locator: String,
    sighted: mpsc::UnboundedSender<ScoutedRobot>,
) {
    let Ok(configured) = configure(&options, Purpose::Look(&locator)) else { return };
    let Ok(network) = ZenohSession::enter(configured).await else { return };
    let mut asking = JoinSet::new();
    for (robot, alive) in network.robots().await.unwrap_or_default() {
        let (network, locator, sighted) = (network.clone(), locator.clone(), sighted.clone());
        let is_own = server.as_deref() == alive.split('@').next();
        asking.spawn(async move {
            if let Some(info) = network.info(&robot).await {
                let _ = sighted.send(ScoutedRobot { robot, locator, is_own, info });
            }
        });
    }
    while asking.join_next().await.is_some() {}
    network.close().await;
}
