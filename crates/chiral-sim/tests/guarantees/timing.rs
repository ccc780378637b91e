//! Time: nothing late, nothing in a burst, and a hold when nothing comes. In real time, since the robot's
//! thread has a part in all of it; which rows are late is decided by the server, so a busy machine changes
//! how many, but not what holds of them. The rules themselves are tested on virtual time, in
//! `chiral-server/src/control/core/tests.rs`.

use std::sync::{Arc, OnceLock, atomic::Ordering};

use chiral_client::{Code, Error, PolicyClient};
use chiral_proto::{ActionChunk, Clock, Observation, Timestamp};
use chiral_server::{
    ControlEvent, Error as ServerError, HoldReason, NextEvent, ObservationSource, ObserveError, OnTimeout,
    PolicyServer, PolicyServerBuilder, Sensors, ServerHandle, monotonic,
};
use chiral_sim::link::{LinkOptions, link};
use tokio::time::sleep;

use crate::{
    ROW, ms,
    support::{
        harness::{DIMENSION, Event, Gate, Harness, Script, ScriptedRobot},
        in_time,
    },
};

/// A robot with a control rate, whose server times actions as by default.
fn timed(
    control_hz: u32,
    configure: impl FnOnce(PolicyServerBuilder) -> PolicyServerBuilder,
) -> (Harness, Arc<Script>) {
    let script = Arc::new(Script::default());
    script.control_hz.store(control_hz, Ordering::Relaxed);
    script.has_stopper.store(true, Ordering::Relaxed);
    let defaults =
        |builder: PolicyServerBuilder| builder.command_timeout(ms(500)).max_action_lateness(ms(250));
    let harness = Harness::with(Arc::clone(&script), 8, 8, |builder| configure(defaults(builder)));
    (harness, script)
}

fn rows(count: usize) -> ActionChunk {
    ActionChunk::new(DIMENSION, (0..count * DIMENSION).map(|i| i as f32).collect()).unwrap()
}

#[tokio::test]
async fn the_robot_holds_when_the_policy_hangs_while_its_client_pings() {
    let (harness, script) = timed(50, |builder| builder);
    let env = harness.connect().await;
    env.start_action_dispatch(50.0).unwrap();
    for _ in 0..10 {
        env.put_action(ROW).await.unwrap();
    }
    harness.wait_until("the robot holds", |_| script.events().last() == Some(&Event::Held)).await;
    assert_eq!(harness.handle.stats().sessions, 1, "the session goes on");
    env.put_action(ROW).await.unwrap();
    harness
        .wait_until("the next action goes on", |_| {
            matches!(script.events().last(), Some(Event::Applied { .. }))
        })
        .await;
    harness.wait_until("and the robot holds", |_| script.events().last() == Some(&Event::Held)).await;
}

#[tokio::test]
async fn a_hold_may_require_a_reset() {
    let (harness, script) = timed(50, |builder| builder.on_timeout(OnTimeout::RequireReset));
    let env = harness.connect().await;
    env.send_action(ROW).await.unwrap();
    harness.wait_until("the robot holds", |_| script.events().last() == Some(&Event::Held)).await;
    match env.step(ROW).await {
        Err(Error::Rejected(fault)) => assert_eq!((fault.code, fault.retryable), (Code::Holding, false)),
        other => panic!("{other:?}"),
    }
    env.reset().await.unwrap();
    env.step(ROW).await.unwrap();
}

#[tokio::test]
async fn after_a_stall_of_the_link_nothing_late_is_applied_and_the_policy_goes_on() {
    let (harness, script) = timed(50, |builder| builder);
    let (env, link) = harness.connect_over(LinkOptions::default()).await;
    env.start_action_dispatch(50.0).unwrap();
    let mut events = harness.handle.events();
    for i in 0..100 {
        match i {
            20 => link.stall(),
            70 => link.recover(),
            _ => {}
        }
        env.put_action([i as f32; DIMENSION]).await.unwrap();
        sleep(ms(20)).await;
    }
    harness.wait_until("all rows are sent", |_| env.stats().actions_queued == 0).await;
    let sent = env.stats().actions_sent;
    let accounted = || {
        let stats = harness.handle.stats();
        (stats.rows_applied + stats.rows_late + stats.rows_superseded, stats)
    };
    harness.wait_until("all rows are accounted for", |_| accounted().0 == sent).await;
    let (_, stats) = accounted();
    assert!(stats.rows_late > 0, "{stats:?}");
    assert_eq!(stats.actions_refused, 0, "none of it is the policy's fault");
    let applied: Vec<f32> = script.applied().iter().map(|row| row[0]).collect();
    assert!(applied.is_sorted_by(|a, b| a < b), "{applied:?}");
    loop {
        match events.next().await {
            Some(NextEvent::Event(ControlEvent::Admitted { lateness, .. })) => {
                assert!(lateness.unwrap() <= ms(250), "{lateness:?}")
            }
            Some(NextEvent::Event(ControlEvent::Late { .. })) => break,
            Some(_) => {}
            None => panic!("the server is gone"),
        }
    }
}

#[tokio::test]
async fn a_chunk_of_50_rows_is_accepted_and_paced() {
    let (harness, script) = timed(200, |builder| builder);
    let env = harness.connect().await;
    let mut events = harness.handle.events();
    env.send_action(rows(50)).await.unwrap();
    harness
        .wait_until("all rows are accounted for", |harness| {
            let stats = harness.handle.stats();
            // A busy machine may wake the robot's thread so late that a row is overtaken by the next.
            stats.rows_applied + stats.rows_superseded + stats.rows_late == 50
        })
        .await;
    assert!(!script.applied().is_empty());
    let mut last: Option<Timestamp> = None;
    for _ in 0..harness.handle.stats().rows_applied {
        let at = loop {
            if let Some(NextEvent::Event(ControlEvent::Applied { at, .. })) = events.next().await {
                break at;
            }
        };
        assert!(last.is_none_or(|last| at.since(last) >= ms(5) / 2), "closer than half a period");
        last = Some(at);
    }
}

#[tokio::test]
async fn a_silent_network_is_a_hold_long_before_the_session_ends() {
    let (harness, script) = timed(50, |builder| builder.command_timeout(None));
    let mut events = harness.handle.events();
    let (env, link) = harness.connect_over(LinkOptions::default()).await;
    env.send_action(ROW).await.unwrap();
    harness.wait_until("the row is applied", |_| !script.applied().is_empty()).await;
    link.stall();
    harness.wait_until("the robot holds", |_| script.events().last() == Some(&Event::Held)).await;
    assert!(harness.handle.stats().silent_for.unwrap() >= ms(2000));
    assert_eq!(harness.handle.stats().sessions, 1);
    link.recover();
    env.reset().await.unwrap();
    let mut held = Vec::new();
    loop {
        match events.next().await.unwrap() {
            NextEvent::Event(ControlEvent::Held { reason, .. }) => held.push(reason),
            NextEvent::Event(ControlEvent::EpisodeBegan { episode: 1, .. }) => break,
            _ => {}
        }
    }
    assert_eq!(held, [HoldReason::Silence]);
}

#[tokio::test]
async fn a_robot_that_blocks_is_stopped_when_a_hold_is_due() {
    let (harness, script) = timed(50, |builder| builder);
    let env = harness.connect().await;
    script.apply_gate.close();
    env.send_action(ROW).await.unwrap();
    harness.wait_until("the robot holds", |_| script.events().last() == Some(&Event::Held)).await;
    let events = script.events();
    assert!(matches!(events[..], [Event::Stopped, Event::Applied { .. }, Event::Held]), "{events:?}");

    script.reset_gate.close();
    let resetting = env.clone();
    let resetting = tokio::spawn(async move { resetting.reset().await });
    harness.wait_until("the reset blocks", |_| script.reset_gate.is_blocking()).await;
    sleep(ms(700)).await;
    assert_eq!(script.events().last(), Some(&Event::ResetStarted), "a reset may take as long as it takes");
    env.close().await.unwrap();
    harness.wait_until("the robot holds", |_| script.events().last() == Some(&Event::Disconnected)).await;
    let stopped = script.events().iter().filter(|event| **event == Event::Stopped).count();
    assert_eq!(stopped, 2, "the loss of the controller stops a reset, too");
    assert!(resetting.await.unwrap().is_err());
}

#[tokio::test]
async fn a_robot_that_blocks_right_after_a_steps_reply_is_stopped_too() {
    let (harness, script) = timed(50, |builder| builder);
    let env = harness.connect().await;
    // Its reply arms the watchdog, before the action that blocks.
    env.step(ROW).await.unwrap();
    script.apply_gate.close();
    env.send_action(ROW).await.unwrap();
    harness.wait_until("the robot is stopped", |_| script.events().contains(&Event::Stopped)).await;
    harness.wait_until("the robot holds", |_| script.events().last() == Some(&Event::Held)).await;
}

/// A source of observations that waits as long as the test likes.
struct GatedSource(Arc<Gate>, Sensors);

impl ObservationSource for GatedSource {
    fn observe(
        &self,
        after: Option<Timestamp>,
        timeout: std::time::Duration,
    ) -> Result<Observation, ObserveError> {
        self.0.wait();
        self.1.observe(after, timeout)
    }
}

#[tokio::test]
async fn a_hold_does_not_wait_for_the_observation_of_a_reply() {
    let gate = Arc::new(Gate::default());
    let observed = Arc::clone(&gate);
    let script = Arc::new(Script::default());
    let sensors = Sensors::new([], []).unwrap();
    let server = PolicyServer::builder(ScriptedRobot(Arc::clone(&script)), sensors.clone())
        .observations(GatedSource(observed, sensors))
        .build()
        .unwrap();
    let harness = Harness::new();
    let (client_end, server_end, _link) = chiral_sim::link::link(LinkOptions::default());
    let serving = server.clone();
    tokio::spawn(async move { serving.serve_connection(server_end).await });
    let env = harness.builder().connect_over(client_end).await.unwrap();
    gate.close();
    let resetting = env.clone();
    let resetting = tokio::spawn(async move { resetting.reset().await });
    harness.wait_until("the source blocks", |_| gate.is_blocking()).await;
    env.close().await.unwrap();
    harness.wait_until("the robot holds", |_| script.events().last() == Some(&Event::Disconnected)).await;
    gate.open();
    assert!(resetting.await.unwrap().is_err());
}

#[tokio::test]
async fn the_host_can_end_a_session_and_follow_what_happens() {
    let (harness, _script) = timed(50, |builder| builder);
    let mut events = harness.handle.events();
    let env = harness.connect().await;
    let began = events.next().await.unwrap();
    let NextEvent::Event(ControlEvent::SessionBegan { session, name, .. }) = began else {
        panic!("{began:?}")
    };
    assert_eq!(name, "tester");
    assert!(harness.handle.end_session(session, "the shift is over"));
    let error = loop {
        if let Err(error) = env.get_obs().await {
            break error;
        }
    };
    assert!(error.to_string().contains("the shift is over"), "{error}");
    harness.wait_until_robot_is_free().await;
    assert!(!harness.handle.end_session(session, "again"));
    loop {
        if let NextEvent::Event(ControlEvent::SessionEnded { why, .. }) = events.next().await.unwrap() {
            assert!(why.contains("the shift is over"), "{why}");
            break;
        }
    }
}

#[tokio::test]
async fn a_slow_subscriber_is_told_how_many_events_it_lost() {
    let (harness, script) = timed(0, |builder| builder);
    let mut slow = harness.handle.events();
    let env = harness.connect().await;
    for _ in 0..3000 {
        env.send_action(ROW).await.unwrap();
        // Not more than the robot's queue holds.
        while env.stats().actions_sent > script.applied().len() as u64 + 100 {
            sleep(ms(1)).await;
        }
    }
    harness.wait_until("all rows are applied", |_| script.applied().len() == 3000).await;
    match slow.next().await.unwrap() {
        NextEvent::Lost(lost) => assert!(lost > 1000, "{lost}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_server_starts_on_a_thread_of_its_own_and_says_where_it_listens() {
    let sensors = || Sensors::new([], []).unwrap();
    let builder = || PolicyServer::builder(ScriptedRobot(Arc::default()), sensors());
    let handle = builder().bind(([127, 0, 0, 1], 0)).build().unwrap().start().unwrap();
    let address = handle.local_addr().unwrap();
    assert_ne!(address.port(), 0);
    let taken = builder().bind(address).build().unwrap().start();
    assert!(matches!(taken, Err(ServerError::Bind { .. })), "{taken:?}");
    let env = chiral_client::blocking::PolicyClient::connect(&format!("ws://{address}")).unwrap();
    handle.shutdown_blocking().unwrap();
    assert_eq!(handle.stats().sessions, 0);
    while !matches!(env.get_metadata(), Err(Error::Disconnected { .. })) {}
}

#[tokio::test]
async fn a_server_starts_within_a_runtime_too() {
    let server = PolicyServer::builder(ScriptedRobot(Arc::default()), Sensors::new([], []).unwrap());
    let handle = server.bind(([127, 0, 0, 1], 0)).build().unwrap().start().unwrap();
    assert!(handle.local_addr().is_some());
    handle.shutdown_and_wait().await;
}

#[tokio::test]
async fn the_hosts_clock_is_not_called_under_a_lock() {
    let handle: Arc<OnceLock<ServerHandle>> = Arc::default();
    let for_clock = Arc::clone(&handle);
    let time = monotonic();
    let clock = Clock::new(move || {
        // Locks what the server locks.
        let _ = for_clock.get().map(ServerHandle::stats);
        time.now()
    });
    let server = PolicyServer::builder(ScriptedRobot(Arc::default()), Sensors::new([], []).unwrap());
    let server = server.clock(clock).build().unwrap();
    assert!(handle.set(server.handle()).is_ok());
    let (client_end, server_end, _) = link(LinkOptions::default());
    tokio::spawn(async move { server.serve_connection(server_end).await });
    let driving = async {
        let env = PolicyClient::builder("link").connect_over(client_end).await.unwrap();
        env.reset().await.unwrap();
        env.step(ROW).await.unwrap();
        env.send_action(ROW).await.unwrap();
        env.close().await.unwrap();
    };
    in_time(driving).await;
}
