//! Actions: an outdated or invalid one never reaches the robot, and dispatch keeps its rate and its order.

use std::sync::Arc;

use chiral_client::{Code, Error, PutMode};
use chiral_proto::{ActionChunk, Reply, Request};
use chiral_sim::link::LinkOptions;
use tokio::time::{Instant, sleep, timeout};

use crate::{
    ROW, ms, reset,
    support::harness::{DIMENSION, Event, Harness, connect_to_fake_server, on_paused_clock, tokio_clock},
};

#[tokio::test]
async fn actions_of_another_session_or_episode_never_reach_the_robot() {
    let harness = Harness::new();
    let script = Arc::clone(&harness.script);
    let mut raw = harness.connect_raw().await;
    let session = raw.welcome.session;

    raw.send_action(session + 1, 0, 1, ROW).await;
    raw.send_action(session, 7, 2, ROW).await;
    for seq in [1, 2] {
        let fault = raw.error_notice().await;
        assert_eq!((fault.code, fault.action_seq), (Code::Stale, seq), "{fault}");
    }

    // 100 Hz during a reset of 2 s.
    script.reset_gate.close();
    let id = raw.send_request(reset(1)).await;
    harness.wait_until("the reset starts", |harness| harness.script.events() == [Event::ResetStarted]).await;
    let acting = async {
        for seq in 3..203 {
            raw.send_action(session, 0, seq, ROW).await;
            sleep(ms(10)).await;
        }
    };
    on_paused_clock(acting).await;
    for seq in 3..203 {
        let fault = raw.error_notice().await;
        assert_eq!((fault.code, fault.action_seq, fault.retryable), (Code::Resetting, seq, true));
    }
    script.reset_gate.open();
    assert!(matches!(raw.reply_to(id).await, Reply::Reset { .. }));
    raw.send_action(session, 0, 203, ROW).await;
    assert_eq!(raw.error_notice().await.code, Code::Stale, "an action of the old episode");
    assert_eq!(harness.handle.stats().actions_refused, 203);
    assert!(script.applied().is_empty());

    // At most 256 rows wait.
    script.apply_gate.close();
    raw.send_action(session, 1, 204, ROW).await;
    harness.wait_until("the robot is busy", |harness| harness.script.apply_gate.is_blocking()).await;
    for seq in 205..465 {
        raw.send_action(session, 1, seq, ROW).await;
    }
    for seq in 461..465 {
        let fault = raw.error_notice().await;
        assert_eq!((fault.code, fault.action_seq), (Code::QueueFull, seq));
    }
    // A reset drops what is queued; only the row that the robot is busy with is applied.
    let step = raw.send_request(Request::Step { session, episode: 1, actions: ROW.into() }).await;
    let id = raw.send_request(reset(2)).await;
    assert!(matches!(raw.request(Request::GetMetadata).await, Reply::Metadata(_)), "the reset has arrived");
    script.apply_gate.open();
    match raw.reply_to(step).await {
        Reply::Error(fault) => assert_eq!(fault.code, Code::Stale, "a step queued before the reset: {fault}"),
        other => panic!("{other:?}"),
    }
    assert!(matches!(raw.reply_to(id).await, Reply::Reset { .. }));
    assert_eq!(script.applied().len(), 1);
    let long = ActionChunk::new(DIMENSION, vec![0.0; 4097 * DIMENSION]).unwrap();
    raw.send_action(session, 2, 465, long).await;
    let fault = raw.error_notice().await;
    assert_eq!((fault.code, fault.retryable), (Code::Invalid, false), "{fault}");
    drop(raw);
    dispatch_through_a_reset(&harness).await;
}

/// The same with a client whose policy keeps putting actions.
async fn dispatch_through_a_reset(harness: &Harness) {
    let script = &harness.script;
    harness
        .wait_until("the raw peer is disconnected", |harness| {
            harness.script.events().last() == Some(&Event::Disconnected)
        })
        .await;
    let env = harness.connect().await;
    let (obs, _) = env.reset().await.unwrap();
    env.start_action_dispatch(100.0).unwrap();
    let policy = env.clone();
    let policy = tokio::spawn(async move {
        while !matches!(policy.put_action(ROW).await, Err(Error::Disconnected { .. })) {}
    });
    sleep(ms(500)).await;
    script.reset_gate.close();
    script.events.lock().unwrap().clear();
    let resetting = env.clone();
    let resetting = tokio::spawn(async move { resetting.reset().await });
    harness
        .wait_until("the reset starts", |harness| harness.script.events().contains(&Event::ResetStarted))
        .await;
    on_paused_clock(sleep(ms(2000))).await;
    script.reset_gate.open();
    assert_eq!(resetting.await.unwrap().unwrap().0.episode, obs.episode + 1);
    harness
        .wait_until("actions flow again", |harness| {
            matches!(harness.script.events().last(), Some(Event::Applied { .. }))
        })
        .await;
    let events = script.events();
    let started = events.iter().position(|event| *event == Event::ResetStarted).unwrap();
    assert_eq!(events[started + 1], Event::ResetFinished, "no row is applied while the reset runs");
    let old = |event: &&Event| matches!(event, Event::Applied { episode, .. } if *episode != obs.episode + 1);
    assert_eq!(events[started..].iter().find(old), None);
    policy.abort();
}

#[tokio::test]
async fn actions_of_a_wrong_dimension_or_with_non_finite_values_are_refused_on_both_sides() {
    let harness = Harness::new();
    let env = harness.connect().await;
    let bad: [Vec<f32>; 5] =
        [vec![], vec![0.0; 2], vec![0.0; 4], vec![0.0, f32::NAN, 0.0], vec![0.0, 0.0, f32::NEG_INFINITY]];
    for values in &bad {
        assert!(matches!(env.put_action(values).await, Err(Error::InvalidAction(_))), "{values:?}");
        assert!(matches!(env.step(values).await, Err(Error::InvalidAction(_))), "{values:?}");
    }
    env.close().await.unwrap();
    harness
        .wait_until("the robot holds", |harness| {
            harness.script.events() == [Event::Held, Event::Disconnected]
        })
        .await;

    let mut raw = harness.connect_raw().await;
    let session = raw.welcome.session;
    for (values, seq) in bad.iter().zip(1..) {
        raw.send_action(session, 0, seq, values).await;
        let fault = raw.error_notice().await;
        assert_eq!((fault.code, fault.action_seq), (Code::Invalid, seq), "{values:?}: {fault}");
        match raw.request(Request::Step { session, episode: 0, actions: values.into() }).await {
            Reply::Error(fault) => assert_eq!(fault.code, Code::Invalid, "{fault}"),
            other => panic!("{other:?}"),
        }
    }
    raw.send_action(session, 0, 9, ROW).await;
    harness
        .wait_until("a valid action is applied", |harness| harness.script.applied() == [ROW.to_vec()])
        .await;
}

#[tokio::test]
async fn a_refusal_is_counted_and_returned_by_the_next_put() {
    let harness = Harness::new();
    let env = harness.connect().await;
    env.reset().await.unwrap();
    harness.script.apply_gate.close();
    env.send_action(ROW).await.unwrap();
    harness.wait_until("the robot is busy", |harness| harness.script.apply_gate.is_blocking()).await;
    for _ in 0..257 {
        env.send_action(ROW).await.unwrap();
    }
    harness.wait_until("the refusal arrives", |_| env.stats().actions_refused == 1).await;
    match env.put_action(ROW).await {
        Err(Error::ActionRefused(fault)) => {
            assert_eq!((fault.code, fault.action_seq), (Code::QueueFull, 258))
        }
        other => panic!("{other:?}"),
    }
    env.put_action(ROW).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn put_action_waits_for_room_while_dispatch_runs_and_fails_while_it_does_not() {
    let clock = tokio_clock();
    let (env, received, link) = connect_to_fake_server(&clock, LinkOptions::default()).await;
    for _ in 0..256 {
        env.put_action(ROW).await.unwrap();
    }
    let full = |outcome| {
        matches!(outcome, Err(Error::QueueFull { rows: 1, queued: 256, capacity: 256, dispatching: false }))
    };
    assert!(full(env.put_action(ROW).await));
    assert!(matches!(env.try_put_action(ROW), Err(Error::QueueFull { .. })));

    env.start_action_dispatch(10.0).unwrap();
    let started = Instant::now();
    for _ in 0..10 {
        env.put_action(ROW).await.unwrap();
    }
    assert!((ms(800)..=ms(1000)).contains(&started.elapsed()), "{:?}", started.elapsed());
    assert_eq!(received.lock().unwrap().len(), 10);
    let too_long =
        env.put_chunk(ActionChunk::new(DIMENSION, ROW.repeat(257)).unwrap(), PutMode::Replace).await;
    assert!(matches!(too_long, Err(Error::QueueFull { rows: 257, .. })));
    env.put_chunk([9.0; DIMENSION], PutMode::Replace).await.unwrap();
    sleep(ms(1000)).await;
    assert_eq!(received.lock().unwrap().last().unwrap().1, [9.0; DIMENSION]);
    assert_eq!(received.lock().unwrap().len(), 11, "replaced rows are not sent");

    while env.try_put_action(ROW).is_ok() {}
    let waiting = env.clone();
    let waiting = tokio::spawn(async move { while let Ok(()) = waiting.put_action(ROW).await {} });
    sleep(ms(250)).await;
    assert!(!waiting.is_finished());
    link.cut();
    timeout(ms(100), waiting).await.expect("a call that waits for room fails immediately").unwrap();
    assert!(matches!(env.put_action(ROW).await, Err(Error::Disconnected { .. })));
}

#[tokio::test(start_paused = true)]
async fn dispatch_at_100_hz_sends_6000_rows_in_60_s_and_never_a_burst() {
    let clock = tokio_clock();
    let (env, received, _link) = connect_to_fake_server(&clock, LinkOptions::default()).await;
    env.start_action_dispatch(100.0).unwrap();
    let policy = env.clone();
    tokio::spawn(async move { while policy.put_action(ROW).await.is_ok() {} });
    sleep(ms(60_000)).await;
    let sent = received.lock().unwrap().len();
    assert!((5999..=6001).contains(&sent), "{sent}");
    assert_eq!(env.stats().actions_skipped, 0);

    // The whole process is suspended for 25 ticks.
    tokio::time::advance(ms(255)).await;
    sleep(ms(60_000 - 255)).await;
    let received = received.lock().unwrap().clone();
    let (sent, skipped) = (received.len() - sent, env.stats().actions_skipped);
    assert!((5974..=5976).contains(&sent), "{sent}");
    assert!((24..=26).contains(&skipped), "{skipped}");
    let gaps = received.windows(2).map(|pair| pair[1].0.since(pair[0].0));
    assert!(
        gaps.min().unwrap() >= ms(4),
        "a row that is late by half a period is followed by one on time, never by a burst"
    );
}
