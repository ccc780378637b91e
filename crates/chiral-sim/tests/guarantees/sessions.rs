//! Sessions: what happens when either peer is lost, and which peers may begin one.

use std::time::Duration;

use chiral_client::{Code, Error};
use chiral_proto::{
    Message, Reply, Request,
    message::{Hello, Role},
};
use chiral_sim::link::LinkOptions;
use tokio::time::{Instant, sleep};

use crate::{
    ROW, ms,
    support::harness::{Event, Harness, RawPeer, hello},
};

#[tokio::test]
async fn when_the_server_is_lost_every_call_fails_with_a_typed_error_and_nothing_hangs() {
    let harness = Harness::new();
    let (env, link) = harness.connect_over(LinkOptions::default()).await;
    env.reset().await.unwrap();
    env.start_obs_stream(30.0).await.unwrap();
    env.next_obs(ms(1000)).await.unwrap();
    harness.script.reset_gate.close();
    let waiting = env.clone();
    let waiting = tokio::spawn(async move { waiting.reset().await.map(drop) });
    sleep(ms(10)).await;
    link.cut();
    assert!(matches!(waiting.await.unwrap(), Err(Error::Disconnected { .. })));
    assert!(matches!(env.latest_obs(), Err(Error::Disconnected { .. })));
    tokio::time::pause();
    let started = Instant::now();
    let outcomes = [
        env.next_obs(ms(1000)).await.map(drop),
        env.get_obs().await.map(drop),
        env.get_metadata().await.map(drop),
        env.step(ROW).await.map(drop),
        env.put_action(ROW).await,
        env.send_action(ROW).await,
        env.start_obs_stream(30.0).await,
        env.start_action_dispatch(10.0),
    ];
    assert!(
        outcomes.iter().all(|outcome| matches!(outcome, Err(Error::Disconnected { .. }))),
        "{outcomes:?}"
    );
    assert_eq!(started.elapsed(), Duration::ZERO, "the calls fail immediately");
    env.close().await.unwrap();
}

#[tokio::test]
async fn when_the_client_is_lost_the_robot_holds_and_the_next_client_connects_within_100_ms() {
    let harness = Harness::new();
    let (env, link) = harness.connect_over(LinkOptions::default()).await;
    env.reset().await.unwrap();
    // Lost during an action, with more queued.
    harness.script.apply_gate.close();
    for _ in 0..3 {
        env.send_action(ROW).await.unwrap();
    }
    harness.wait_until("the robot is busy", |harness| harness.script.apply_gate.is_blocking()).await;
    let started = Instant::now();
    link.cut();
    let next = loop {
        match harness.builder().connect_over(harness.open_link(LinkOptions::default()).0).await {
            Ok(next) => break next,
            Err(error) => assert!(matches!(error, Error::Busy(_)), "{error}"),
        }
    };
    assert!(started.elapsed() < ms(100), "{:?}", started.elapsed());
    harness.script.apply_gate.open();
    next.reset().await.unwrap();
    let events: Vec<_> = harness.script.events().into_iter().skip(2).collect();
    assert!(matches!(events[0], Event::Applied { .. }));
    assert_eq!(events[1..], [Event::Held, Event::Disconnected, Event::ResetStarted, Event::ResetFinished]);
}

#[tokio::test(start_paused = true)]
async fn both_sides_detect_a_link_that_goes_silent() {
    let harness = Harness::new();
    let (env, link) = harness.connect_over(LinkOptions::default()).await;
    env.start_obs_stream(30.0).await.unwrap();
    link.go_silent();
    let started = Instant::now();
    let error = loop {
        if let Err(error) = env.next_obs(ms(60_000)).await {
            break error;
        }
    };
    assert!(error.to_string().contains("nothing received from the server for 10 s"), "{error}");
    assert!(started.elapsed() < ms(11_000), "{:?}", started.elapsed());
    harness
        .wait_until("the robot holds", |harness| {
            harness.script.events() == [Event::Held, Event::Disconnected]
        })
        .await;
}

#[tokio::test]
async fn hold_and_on_disconnect_follow_every_controller_that_disconnects() {
    let harness = Harness::new();
    let first = harness.connect().await;
    // The robot stays busy while controllers connect and disconnect one after the other.
    harness.script.apply_gate.close();
    first.send_action(ROW).await.unwrap();
    harness.wait_until("the robot is busy", |harness| harness.script.apply_gate.is_blocking()).await;
    first.close().await.unwrap();
    for _ in 0..2 {
        harness.wait_until_robot_is_free().await;
        harness.connect().await.close().await.unwrap();
    }
    harness.wait_until_robot_is_free().await;
    harness.script.apply_gate.open();
    let ends = std::iter::repeat_n([Event::Held, Event::Disconnected], 3).flatten().collect::<Vec<_>>();
    harness
        .wait_until("three controllers have ended", |harness| {
            harness.script.events().get(1..) == Some(&ends[..])
        })
        .await;
}

#[tokio::test]
async fn a_second_controller_gets_the_name_of_the_first_and_observers_may_connect() {
    let harness = Harness::new();
    let env = harness.connect().await;
    let second =
        harness.builder().name("second").connect_over(harness.open_link(LinkOptions::default()).0).await;
    match second {
        Err(Error::Busy(fault)) => assert!(fault.text.contains("tester") && fault.retryable, "{fault}"),
        other => panic!("{other:?}"),
    }
    let observer =
        harness.builder().observer().connect_over(harness.open_link(LinkOptions::default()).0).await.unwrap();
    assert_eq!(observer.get_obs().await.unwrap().cameras.len(), 1);
    match observer.reset().await {
        Err(Error::Rejected(fault)) => assert_eq!(fault.code, Code::NotController),
        other => panic!("{other:?}"),
    }
    observer.close().await.unwrap();
    env.reset().await.unwrap();
    assert!(!harness.script.events().contains(&Event::Held), "an observer that disconnects stops nothing");
}

#[tokio::test]
async fn a_wrong_version_or_first_message_is_refused_with_the_reason() {
    let harness = Harness::new();
    let (end, _link) = harness.open_link(LinkOptions::default());
    let newer = Hello { protocol: 99, ..hello(Role::Controller) };
    let raw = RawPeer::without_hello(end);
    raw.send(&Message::Request { id: 1, request: Request::Hello(newer) }).await;
    match raw.receive().await {
        Message::Reply { id: 1, reply: Reply::Error(fault) } => {
            assert_eq!(fault.code, Code::VersionMismatch);
            assert!(fault.text.contains("expected protocol version 1, found 99"), "{fault}");
        }
        other => panic!("{other:?}"),
    }
    let raw = RawPeer::without_hello(harness.open_link(LinkOptions::default()).0);
    raw.send(&Message::Request { id: 3, request: Request::GetObs }).await;
    match raw.receive().await {
        Message::Reply { id: 3, reply: Reply::Error(fault) } => assert_eq!(fault.code, Code::Protocol),
        other => panic!("{other:?}"),
    }
}
