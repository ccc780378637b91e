//! What must hold, each promise one test. Rates, deadlines and long waits run on tokio's paused clock over
//! the in-memory link; limits of wall-clock time only guard against hanging.
//!
//! A paused clock leaps ahead whenever the runtime is idle, also while the robot's own thread has work to do.
//! So tests in which that thread answers run in real time, and pause the clock only for their long waits.
#![allow(clippy::unwrap_used, reason = "helpers of tests, too, fail by panicking")]

mod support;

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use chiral_client::{Code, Error, Observation, PolicyClient, PutMode};
use chiral_proto::{ActionChunk, Codec, Frame, Message, Notice, Reply, Request, ValueMap, message::Role};
use chiral_server::Robot as _;
use chiral_sim::{arm, camera::Mount, link::LinkOptions, render, robot::SimConfig, scene::Scene};
use support::harness::{
    self, CAMERA, DIMENSION, Event, Harness, Raw, Script, ScriptedRobot, listen, publish, tokio_clock,
};
use tokio::time::{Instant, sleep, timeout};

const ROW: [f32; DIMENSION] = [0.1, 0.2, 0.3];

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn reset(seed: u64) -> Request {
    Request::Reset { seed: Some(seed), options: ValueMap::new() }
}

/// Counts the observations that a stream brings while `during` runs; also their greatest age on arrival.
async fn count_stream<T>(
    env: &PolicyClient,
    stand: &Harness,
    during: impl Future<Output = T>,
) -> (u64, Duration, T) {
    // What arrived before has aged since.
    env.latest_obs().unwrap();
    let before = env.stats().observations;
    let mut oldest = Duration::ZERO;
    tokio::pin!(during);
    let outcome = loop {
        tokio::select! {
            biased;
            obs = env.next_obs(Duration::from_secs(5)) => oldest = oldest.max(age(stand, &obs.unwrap())),
            outcome = &mut during => break outcome,
        }
    };
    (env.stats().observations - before, oldest, outcome)
}

/// Lets this much time pass in no time.
async fn pass(duration: Duration) {
    virtually(sleep(duration)).await;
}

/// Runs on a paused clock what the robot's thread has no part in.
async fn virtually<T>(future: impl Future<Output = T>) -> T {
    tokio::time::pause();
    let outcome = future.await;
    tokio::time::resume();
    outcome
}

fn age(stand: &Harness, obs: &Observation) -> Duration {
    stand.clock.now().since(obs[CAMERA].captured_at)
}

#[tokio::test]
async fn an_observation_is_one_instant_per_camera_however_fast_the_sensor_writes() {
    let stand = Harness::with(Arc::default(), 48, 64, |builder| builder);
    let env = stand.connect().await;
    let (sensors, done) = (stand.sensors.clone(), Arc::new(AtomicBool::new(false)));
    let stop = Arc::clone(&done);
    let writer = std::thread::spawn(move || {
        for n in (1..=250).cycle() {
            publish(&sensors, n);
            if stop.load(Ordering::Relaxed) {
                break;
            }
        }
    });
    let (mut instants, mut seen) = (BTreeSet::new(), 0);
    // On a busy machine the two threads may share a core; then it takes longer to see as many instants.
    while seen < 10_000 || instants.len() < 1000 {
        seen += 1;
        let obs = env.get_obs().await.unwrap();
        let camera = &obs[CAMERA];
        let n = camera.intrinsics[0];
        assert!(
            camera.image.data().iter().all(|&pixel| f64::from(pixel) == n),
            "image of another instant than K"
        );
        let depth = camera.depth.as_ref().unwrap().values::<f32>().unwrap();
        assert!(depth.iter().all(|&metres| f64::from(metres) == n), "depth of another instant than K");
        assert!(
            camera.intrinsics.iter().chain(camera.extrinsics.iter()).all(|&value| value == n),
            "K and T of two instants"
        );
        instants.insert(camera.seq);
    }
    done.store(true, Ordering::Relaxed);
    writer.join().unwrap();
}

#[tokio::test]
async fn the_stream_holds_its_rate_while_reset_blocks_and_every_request_is_answered() {
    let stand = Harness::new();
    let env = stand.connect().await;
    env.start_obs_stream(30.0).await.unwrap();
    let spawn_reset = |seed| {
        let env = env.clone();
        tokio::spawn(async move { env.reset_with(Some(seed), ValueMap::new()).await })
    };

    stand.script.reset_gate.close();
    let first = spawn_reset(7);
    stand.until("the reset begins", |stand| stand.script.events() == [Event::ResetBegan]).await;
    let (count, oldest, ()) = virtually(count_stream(&env, &stand, sleep(ms(10_000)))).await;
    assert!((299..=301).contains(&count), "{count} observations in 10 s");
    assert!(oldest <= ms(20), "{oldest:?}");

    let second = spawn_reset(8);
    assert_eq!(env.get_metadata().await.unwrap()["kind"].as_str(), Some("scripted"));
    assert!(!first.is_finished() && !second.is_finished());
    stand.script.reset_gate.open();
    let answers = [first.await.unwrap().unwrap(), second.await.unwrap().unwrap()];
    assert_eq!(
        answers.each_ref().map(|(obs, info)| (obs.episode, info["seed"].as_i64())),
        [(1, Some(7)), (2, Some(8))]
    );

    stand.script.reset_gate.close();
    let long = spawn_reset(9);
    let (count, _, ()) = virtually(count_stream(&env, &stand, sleep(ms(45_000)))).await;
    assert!((1349..=1351).contains(&count), "{count} observations in 45 s");
    assert!(!long.is_finished());
    stand.script.reset_gate.open();
    assert_eq!(long.await.unwrap().unwrap().0.episode, 3);
}

#[tokio::test]
async fn actions_that_are_not_of_now_never_reach_the_robot() {
    let stand = Harness::new();
    let script = Arc::clone(&stand.script);
    let mut raw = stand.raw().await;
    let session = raw.welcome.session;

    raw.act(session + 1, 0, 1, ROW).await;
    raw.act(session, 7, 2, ROW).await;
    for seq in [1, 2] {
        let fault = raw.fault().await;
        assert_eq!((fault.code, fault.action_seq), (Code::Stale, seq), "{fault}");
    }

    // At 100 Hz through a reset of 2 s.
    script.reset_gate.close();
    let id = raw.request(reset(1)).await;
    stand.until("the reset begins", |stand| stand.script.events() == [Event::ResetBegan]).await;
    let acting = async {
        for seq in 3..203 {
            raw.act(session, 0, seq, ROW).await;
            sleep(ms(10)).await;
        }
    };
    virtually(acting).await;
    for seq in 3..203 {
        let fault = raw.fault().await;
        assert_eq!((fault.code, fault.action_seq, fault.retryable), (Code::Resetting, seq, true));
    }
    script.reset_gate.open();
    assert!(matches!(raw.answer(id).await, Reply::Reset { .. }));
    raw.act(session, 0, 203, ROW).await;
    assert_eq!(raw.fault().await.code, Code::Stale, "the old episode's");
    assert_eq!(stand.handle.stats().actions_refused, 203);
    assert!(script.applied().is_empty());

    // At most 16 rows wait, whole chunks included.
    script.apply_gate.close();
    for seq in 204..224 {
        raw.act(session, 1, seq, ROW).await;
    }
    for seq in 220..224 {
        let fault = raw.fault().await;
        assert_eq!((fault.code, fault.action_seq), (Code::QueueFull, seq));
    }
    stand.until("the robot is busy", |stand| stand.script.apply_gate.is_waited_at()).await;
    // What waits when a reset comes is dropped; only the row that the robot is busy with already is carried
    // out.
    let step = raw.request(Request::Step { session, episode: 1, actions: ROW.into() }).await;
    let id = raw.request(reset(2)).await;
    assert!(matches!(raw.ask(Request::GetMetadata).await, Reply::Metadata(_)), "the reset has arrived");
    script.apply_gate.open();
    match raw.answer(step).await {
        Reply::Error(fault) => assert_eq!(fault.code, Code::Stale, "a step that the reset overtook: {fault}"),
        other => panic!("{other:?}"),
    }
    assert!(matches!(raw.answer(id).await, Reply::Reset { .. }));
    assert_eq!(script.applied().len(), 1);
    raw.act(session, 2, 224, ActionChunk::new(DIMENSION, vec![0.0; 17 * DIMENSION]).unwrap()).await;
    assert_eq!(raw.fault().await.code, Code::QueueFull);
    drop(raw);
    dispatch_through_a_reset(&stand).await;
}

/// The same with a client whose policy never stops putting actions.
async fn dispatch_through_a_reset(stand: &Harness) {
    let script = &stand.script;
    stand
        .until("the raw peer has left", |stand| stand.script.events().last() == Some(&Event::Disconnected))
        .await;
    let env = stand.connect().await;
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
    stand.until("the reset begins", |stand| stand.script.events().contains(&Event::ResetBegan)).await;
    pass(ms(2000)).await;
    script.reset_gate.open();
    assert_eq!(resetting.await.unwrap().unwrap().0.episode, obs.episode + 1);
    stand
        .until("actions flow again", |stand| {
            matches!(stand.script.events().last(), Some(Event::Applied { .. }))
        })
        .await;
    let events = script.events();
    let began = events.iter().position(|event| *event == Event::ResetBegan).unwrap();
    assert_eq!(events[began + 1], Event::ResetDone, "no row was applied while the reset ran");
    let old = |event: &&Event| matches!(event, Event::Applied { episode, .. } if *episode != obs.episode + 1);
    assert_eq!(events[began..].iter().find(old), None);
    policy.abort();
}

#[tokio::test]
async fn an_apply_action_of_100_ms_does_not_delay_observations() {
    let stand = Harness::new();
    let env = stand.connect().await;
    env.start_obs_stream(100.0).await.unwrap();
    for n in 0..20 {
        stand.script.apply_gate.close();
        env.send_action(ROW).await.unwrap();
        let (count, oldest, ()) = virtually(count_stream(&env, &stand, sleep(ms(100)))).await;
        assert!((9..=11).contains(&count), "{count} observations in 100 ms");
        assert!(oldest <= ms(20), "{oldest:?}: more than a period of the sensor and one of the stream");
        assert_eq!(stand.script.applied().len(), n, "the robot was busy all the while");
        stand.script.apply_gate.open();
        stand.until("the action is applied", |stand| stand.script.applied().len() == n + 1).await;
    }
}

#[tokio::test]
async fn when_the_server_is_lost_every_call_fails_with_a_typed_error_and_nothing_hangs() {
    let stand = Harness::new();
    let (env, link) = stand.connect_over(LinkOptions::default()).await;
    env.reset().await.unwrap();
    env.start_obs_stream(30.0).await.unwrap();
    env.next_obs(ms(1000)).await.unwrap();
    stand.script.reset_gate.close();
    let waiting = env.clone();
    let waiting = tokio::spawn(async move { waiting.reset().await.map(drop) });
    sleep(ms(10)).await;
    link.cut();
    assert!(matches!(waiting.await.unwrap(), Err(Error::Disconnected { .. })));
    assert!(matches!(env.latest_obs(), Err(Error::Disconnected { .. })));
    tokio::time::pause();
    let began = Instant::now();
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
    assert_eq!(began.elapsed(), Duration::ZERO, "at once");
    env.close().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_link_that_goes_silent_is_noticed_on_both_sides() {
    let stand = Harness::new();
    let (env, link) = stand.connect_over(LinkOptions::default()).await;
    env.start_obs_stream(30.0).await.unwrap();
    link.silence();
    let began = Instant::now();
    let error = loop {
        if let Err(error) = env.next_obs(ms(60_000)).await {
            break error;
        }
    };
    assert!(error.to_string().contains("nothing heard from the server for 10 s"), "{error}");
    assert!(began.elapsed() < ms(11_000), "{:?}", began.elapsed());
    stand.until("the robot holds", |stand| stand.script.events() == [Event::Held, Event::Disconnected]).await;
}

#[tokio::test]
async fn when_the_client_is_lost_the_robot_holds_and_the_next_client_connects_within_100_ms() {
    let stand = Harness::new();
    let (env, link) = stand.connect_over(LinkOptions::default()).await;
    env.reset().await.unwrap();
    // Lost in the middle of an action, with more behind it.
    stand.script.apply_gate.close();
    for _ in 0..3 {
        env.send_action(ROW).await.unwrap();
    }
    stand.until("the robot is busy", |stand| stand.script.apply_gate.is_waited_at()).await;
    let began = Instant::now();
    link.cut();
    let next = loop {
        match stand.builder().connect_over(stand.dial(LinkOptions::default()).0).await {
            Ok(next) => break next,
            Err(error) => assert!(matches!(error, Error::Busy(_)), "{error}"),
        }
    };
    assert!(began.elapsed() < ms(100), "{:?}", began.elapsed());
    stand.script.apply_gate.open();
    next.reset().await.unwrap();
    let events: Vec<_> = stand.script.events().into_iter().skip(2).collect();
    assert!(matches!(events[0], Event::Applied { .. }));
    assert_eq!(events[1..], [Event::Held, Event::Disconnected, Event::ResetBegan, Event::ResetDone]);
}

#[tokio::test]
async fn every_controller_that_leaves_is_followed_by_hold_and_on_disconnect() {
    let stand = Harness::new();
    let first = stand.connect().await;
    // The robot is still busy while one controller after the other comes and goes.
    stand.script.apply_gate.close();
    first.send_action(ROW).await.unwrap();
    stand.until("the robot is busy", |stand| stand.script.apply_gate.is_waited_at()).await;
    first.close().await.unwrap();
    for _ in 0..2 {
        stand.until("the robot is free", |stand| stand.handle.stats().sessions == 0).await;
        stand.connect().await.close().await.unwrap();
    }
    stand.until("the robot is free", |stand| stand.handle.stats().sessions == 0).await;
    stand.script.apply_gate.open();
    let ends = std::iter::repeat_n([Event::Held, Event::Disconnected], 3).flatten().collect::<Vec<_>>();
    stand.until("three ends", |stand| stand.script.events().get(1..) == Some(&ends[..])).await;
}

#[tokio::test]
async fn a_second_controller_is_told_who_holds_the_robot_and_observers_may_watch() {
    let stand = Harness::new();
    let env = stand.connect().await;
    let second = stand.builder().name("second").connect_over(stand.dial(LinkOptions::default()).0).await;
    match second {
        Err(Error::Busy(fault)) => assert!(fault.text.contains("tester") && fault.retryable, "{fault}"),
        other => panic!("{other:?}"),
    }
    let observer =
        stand.builder().observer().connect_over(stand.dial(LinkOptions::default()).0).await.unwrap();
    assert_eq!(observer.get_obs().await.unwrap().cameras.len(), 1);
    match observer.reset().await {
        Err(Error::Rejected(fault)) => assert_eq!(fault.code, Code::NotController),
        other => panic!("{other:?}"),
    }
    observer.close().await.unwrap();
    env.reset().await.unwrap();
    assert!(!stand.script.events().contains(&Event::Held), "an observer that leaves stops nothing");
}

#[tokio::test]
async fn malformed_and_unknown_messages_get_an_error_and_the_server_serves_on() {
    let stand = Harness::new();
    let mut raw = stand.raw().await;
    let session = raw.welcome.session;
    let action = chiral_proto::message::ActionMessage {
        session,
        episode: 0,
        seq: 1,
        actions: ROW.into(),
        observation_seq: 0,
    };
    let action = Codec::Protobuf.encode(&Message::Notice(Notice::Action(action))).unwrap().into_bytes();
    let lying = |change: fn(&mut Vec<u8>)| {
        let mut bytes = action.to_vec();
        change(&mut bytes);
        bytes
    };
    let malformed = [
        vec![],
        vec![1, 0],
        vec![255; 64],
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        lying(|bytes| bytes[0] = 255),
        lying(|bytes| bytes.truncate(70)),
        lying(|bytes| bytes[8] ^= 0xff),
    ];
    for bytes in malformed {
        raw.say_frame(Frame::from(bytes::Bytes::from(bytes.clone()))).await;
        let fault = raw.fault().await;
        assert_eq!(fault.code, Code::Malformed, "{bytes:?}: {fault}");
        assert!(fault.text.contains("expected"), "{fault}");
    }

    // Header { id: 9, and a field 99 that no version has }.
    static UNKNOWN: [u8; 9] = [5, 0, 0, 0, 0x08, 9, 0x9a, 0x06, 0];
    raw.say_frame(Frame::from(bytes::Bytes::from_static(&UNKNOWN))).await;
    match raw.answer(9).await {
        Reply::Error(fault) => assert_eq!(fault.code, Code::Unsupported),
        other => panic!("{other:?}"),
    }

    assert!(matches!(raw.ask(Request::GetObs).await, Reply::Observation(_)));
    assert!(matches!(raw.ask(reset(1)).await, Reply::Reset { .. }));
    assert!(stand.script.applied().is_empty());
}

#[tokio::test]
async fn actions_of_a_wrong_shape_or_not_finite_are_refused_on_both_sides() {
    let stand = Harness::new();
    let env = stand.connect().await;
    let bad: [Vec<f32>; 5] =
        [vec![], vec![0.0; 2], vec![0.0; 4], vec![0.0, f32::NAN, 0.0], vec![0.0, 0.0, f32::NEG_INFINITY]];
    for values in &bad {
        assert!(matches!(env.put_action(values).await, Err(Error::InvalidAction(_))), "{values:?}");
        assert!(matches!(env.step(values).await, Err(Error::InvalidAction(_))), "{values:?}");
    }
    env.close().await.unwrap();
    stand.until("the robot holds", |stand| stand.script.events() == [Event::Held, Event::Disconnected]).await;

    let mut raw = stand.raw().await;
    let session = raw.welcome.session;
    for (values, seq) in bad.iter().zip(1..) {
        raw.act(session, 0, seq, values).await;
        let fault = raw.fault().await;
        assert_eq!((fault.code, fault.action_seq), (Code::Invalid, seq), "{values:?}: {fault}");
        match raw.ask(Request::Step { session, episode: 0, actions: values.into() }).await {
            Reply::Error(fault) => assert_eq!(fault.code, Code::Invalid, "{fault}"),
            other => panic!("{other:?}"),
        }
    }
    raw.act(session, 0, 9, ROW).await;
    stand.until("a good one passes", |stand| stand.script.applied() == [ROW.to_vec()]).await;
}

#[tokio::test]
async fn what_the_robot_fails_at_is_told_and_the_server_serves_on() {
    let stand = Harness::new();
    *stand.script.reset_fails.lock().unwrap() = Some("the brake of joint 3 does not release".to_owned());
    let env = stand.connect().await;
    match env.reset().await {
        Err(Error::Rejected(fault)) => {
            assert_eq!(fault.code, Code::RobotFailed);
            assert!(fault.text.contains("joint 3"), "{fault}");
        }
        other => panic!("{other:?}"),
    }
    *stand.script.reset_fails.lock().unwrap() = None;
    env.reset().await.unwrap();
    assert_eq!(env.step(ROW).await.unwrap().reward, 1.0);
}

#[tokio::test]
async fn a_panic_in_any_robot_method_is_told_and_the_server_serves_on() {
    let script = Arc::new(Script::default());
    *script.panics_in.lock().unwrap() = Some("action_spec");
    let built = chiral_server::PolicyServer::new(
        ScriptedRobot(Arc::clone(&script)),
        chiral_server::Sensors::new([], []).unwrap(),
    );
    assert!(built.unwrap_err().to_string().contains("panicked in action_spec"));

    for method in
        ["metadata", "reset", "is_lock_step", "apply_action", "apply_chunk", "step", "hold", "on_disconnect"]
    {
        let script = Arc::new(Script::default());
        *script.panics_in.lock().unwrap() = Some(method);
        let stand = Harness::with(Arc::clone(&script), 8, 8, |builder| builder);
        let env = stand.connect().await;
        let told = match method {
            "metadata" => env.get_metadata().await.unwrap_err(),
            "reset" | "is_lock_step" => env.reset().await.unwrap_err(),
            "step" => env.step(ROW).await.unwrap_err(),
            "apply_action" | "apply_chunk" => {
                let rows = if method == "apply_action" { 1 } else { 2 };
                env.send_action(ActionChunk::new(DIMENSION, ROW.repeat(rows)).unwrap()).await.unwrap();
                stand.until("the refusal", |_| env.stats().actions_refused == 1).await;
                env.put_action(ROW).await.unwrap_err()
            }
            _ => {
                env.close().await.unwrap();
                stand.until("the panic", |stand| stand.handle.stats().out_of_service.is_some()).await;
                stand.connect().await.reset().await.unwrap_err()
            }
        };
        match &told {
            Error::Rejected(fault) | Error::ActionRefused(fault) => {
                assert_eq!(fault.code, Code::OutOfService, "{method}: {fault}")
            }
            other => panic!("{method}: {other}"),
        }
        assert!(told.to_string().contains(&format!("panicked in {method}")), "{method}: {told}");
        assert!(script.applied().is_empty(), "{method}");
        let watching =
            stand.builder().observer().connect_over(stand.dial(LinkOptions::default()).0).await.unwrap();
        assert!(watching.get_obs().await.is_ok(), "{method}: observations are still served");
        assert!(stand.handle.stats().out_of_service.unwrap().contains(method));
    }
    assert_eq!(ScriptedRobot(Arc::default()).action_spec().dimension, DIMENSION);
}

#[tokio::test(start_paused = true)]
async fn a_round_trip_of_40_ms_does_not_lower_30_hz() {
    let stand = Harness::new();
    let (env, _link) = stand.connect_over(LinkOptions { latency: ms(20), bandwidth: None }).await;
    env.start_obs_stream(30.0).await.unwrap();
    let (count, oldest, ()) = count_stream(&env, &stand, sleep(ms(60_000))).await;
    assert!(count as f64 / 60.0 >= 29.5, "{count} observations in 60 s");
    assert!(oldest <= ms(20 + 12), "{oldest:?}");
}

#[tokio::test(start_paused = true)]
async fn over_10_mbit_s_an_observation_is_never_older_than_two_transfers_and_the_round_trip() {
    let stand = Harness::with(Arc::default(), 120, 160, |builder| builder);
    let options = LinkOptions { latency: ms(20), bandwidth: Some(10e6) };
    let (env, _link) = stand.connect_over(options).await;
    let transfer = Duration::from_secs_f64((120 * 160 * (3 + 4)) as f64 * 8.0 / 10e6);
    env.start_obs_stream(30.0).await.unwrap();
    let (count, oldest, ()) = count_stream(&env, &stand, sleep(ms(30_000))).await;
    assert!(oldest <= 2 * transfer + ms(40), "{oldest:?}, a transfer takes {transfer:?}");
    let possible = 30.0 / transfer.as_secs_f64();
    assert!(count as f64 >= 0.95 * possible, "{count} observations of {possible} that the link can carry");
    let skipped = stand.handle.stats().observations_skipped;
    // Some are on their way.
    assert!((count + skipped).abs_diff(900) <= 12, "{count} sent and {skipped} left out of 900 ticks");
}

#[tokio::test(start_paused = true)]
async fn dispatch_at_100_hz_for_60_s_sends_6000_and_never_a_burst() {
    let clock = tokio_clock();
    let (env, arrivals, _link) = listen(&clock, LinkOptions::default()).await;
    env.start_action_dispatch(100.0).unwrap();
    let policy = env.clone();
    tokio::spawn(async move { while policy.put_action(ROW).await.is_ok() {} });
    sleep(ms(60_000)).await;
    let sent = arrivals.lock().unwrap().len();
    assert!((5999..=6001).contains(&sent), "{sent}");
    assert_eq!(env.stats().actions_skipped, 0);

    // The whole process sleeps through 25 ticks.
    tokio::time::advance(ms(255)).await;
    sleep(ms(60_000 - 255)).await;
    let arrivals = arrivals.lock().unwrap().clone();
    let (sent, skipped) = (arrivals.len() - sent, env.stats().actions_skipped);
    assert!((5974..=5976).contains(&sent), "{sent}");
    assert!((24..=26).contains(&skipped), "{skipped}");
    let gaps = arrivals.windows(2).map(|pair| pair[1].0.since(pair[0].0));
    assert!(
        gaps.min().unwrap() >= ms(4),
        "one that is late by half a period is followed by one in time, never by a burst"
    );
}

#[tokio::test(start_paused = true)]
async fn put_action_waits_for_room_while_dispatch_runs_and_fails_when_it_does_not() {
    let clock = tokio_clock();
    let (env, arrivals, link) = listen(&clock, LinkOptions::default()).await;
    for _ in 0..256 {
        env.put_action(ROW).await.unwrap();
    }
    let full = |outcome| {
        matches!(outcome, Err(Error::QueueFull { rows: 1, queued: 256, capacity: 256, dispatching: false }))
    };
    assert!(full(env.put_action(ROW).await));
    assert!(matches!(env.try_put_action(ROW), Err(Error::QueueFull { .. })));

    env.start_action_dispatch(10.0).unwrap();
    let began = Instant::now();
    for _ in 0..10 {
        env.put_action(ROW).await.unwrap();
    }
    assert!((ms(800)..=ms(1000)).contains(&began.elapsed()), "{:?}", began.elapsed());
    assert_eq!(arrivals.lock().unwrap().len(), 10);
    let never = env.put_chunk(ActionChunk::new(DIMENSION, ROW.repeat(257)).unwrap(), PutMode::Replace).await;
    assert!(matches!(never, Err(Error::QueueFull { rows: 257, .. })));
    env.put_chunk([9.0; DIMENSION], PutMode::Replace).await.unwrap();
    sleep(ms(1000)).await;
    assert_eq!(arrivals.lock().unwrap().last().unwrap().1, [9.0; DIMENSION]);
    assert_eq!(arrivals.lock().unwrap().len(), 11, "what was replaced is not sent");

    while env.try_put_action(ROW).is_ok() {}
    let waiting = env.clone();
    let waiting = tokio::spawn(async move { while let Ok(()) = waiting.put_action(ROW).await {} });
    sleep(ms(250)).await;
    assert!(!waiting.is_finished());
    link.cut();
    timeout(ms(100), waiting).await.expect("the call that waits for room fails at once").unwrap();
    assert!(matches!(env.put_action(ROW).await, Err(Error::Disconnected { .. })));
}

#[tokio::test]
async fn a_refusal_is_returned_by_the_next_put_and_counted() {
    let stand = Harness::new();
    let env = stand.connect().await;
    env.reset().await.unwrap();
    stand.script.apply_gate.close();
    for _ in 0..17 {
        env.send_action(ROW).await.unwrap();
    }
    stand.until("the refusal", |_| env.stats().actions_refused == 1).await;
    match env.put_action(ROW).await {
        Err(Error::ActionRefused(fault)) => assert_eq!((fault.code, fault.action_seq), (Code::QueueFull, 17)),
        other => panic!("{other:?}"),
    }
    env.put_action(ROW).await.unwrap();
}

#[tokio::test]
async fn a_sensor_that_never_publishes_is_named() {
    let stand = Harness::with(Arc::default(), 8, 8, |builder| builder.observe_timeout(ms(50)));
    let sensors =
        chiral_server::Sensors::new([chiral_server::CameraSpec::rgb("left_cam", 2, 2)], []).unwrap();
    let silent = chiral_server::PolicyServer::builder(ScriptedRobot(Arc::default()), sensors)
        .observe_timeout(ms(50))
        .build()
        .unwrap();
    let (ours, theirs, _) = chiral_sim::link::link(LinkOptions::default());
    tokio::spawn(async move { silent.serve_connection(theirs).await });
    let env = stand.builder().connect_over(ours).await.unwrap();
    for outcome in
        [env.get_obs().await.map(drop), env.start_obs_stream(30.0).await, env.reset().await.map(drop)]
    {
        match outcome {
            Err(Error::Rejected(fault)) => {
                assert_eq!((fault.code, &*fault.field), (Code::SensorTimeout, "camera left_cam"))
            }
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn another_version_or_first_message_is_refused_with_the_reason() {
    let stand = Harness::new();
    let (end, _link) = stand.dial(LinkOptions::default());
    let newer = chiral_proto::message::Hello { protocol: 99, ..harness::hello(Role::Controller) };
    let raw = Raw::silent(end);
    raw.say(&Message::Request { id: 1, request: Request::Hello(newer) }).await;
    match raw.hear().await {
        Message::Reply { id: 1, reply: Reply::Error(fault) } => {
            assert_eq!(fault.code, Code::VersionMismatch);
            assert!(fault.text.contains("expected protocol version 1, found 99"), "{fault}");
        }
        other => panic!("{other:?}"),
    }
    let raw = Raw::silent(stand.dial(LinkOptions::default()).0);
    raw.say(&Message::Request { id: 3, request: Request::GetObs }).await;
    match raw.hear().await {
        Message::Reply { id: 3, reply: Reply::Error(fault) } => assert_eq!(fault.code, Code::Protocol),
        other => panic!("{other:?}"),
    }
}

/// The share of pixels whose depth differs by more than a centimetre.
fn share_moved(seen: &[f32], expected: &[f32]) -> f64 {
    let moved = seen.iter().zip(expected).filter(|(a, b)| (*a - *b).abs() > 0.01).count();
    moved as f64 / seen.len() as f64
}

#[tokio::test]
async fn the_picture_in_a_step_reply_shows_the_arm_after_the_action() {
    const SEED: u64 = 5;
    const SIZE: (usize, usize) = (160, 120);
    let config = SimConfig { width: SIZE.0, height: SIZE.1, ..SimConfig::default() };
    let (robot, sensors) = chiral_sim::robot::start(config).unwrap();
    let server = chiral_server::PolicyServer::new(robot, sensors).unwrap();
    let (ours, theirs, _) = chiral_sim::link::link(LinkOptions::default());
    tokio::spawn(async move { server.serve_connection(theirs).await });
    let env = PolicyClient::builder("link").connect_over(ours).await.unwrap();

    let scene = Scene::sample(SEED);
    let joints = |obs: &Observation| -> arm::Joints {
        std::array::from_fn(|i| f64::from(obs.proprio("joint_pos").unwrap().values()[i]))
    };
    let depth =
        |obs: &Observation| obs["head_cam"].depth.as_ref().unwrap().values::<f32>().unwrap().into_owned();
    let drawn = |joints: &arm::Joints| {
        let links = arm::Links::at(joints);
        let (mut rgb, mut depth) = (vec![0; SIZE.0 * SIZE.1 * 3], vec![0.0; SIZE.0 * SIZE.1]);
        render::Instant::new(scene.bodies(&links)).render(
            &Mount::Head.camera(&links, SIZE.0, SIZE.1),
            &mut rgb,
            &mut depth,
        );
        depth
    };

    let (obs, _) = env.reset_with(Some(SEED), ValueMap::new()).await.unwrap();
    let (mut before, mut action) = (obs, [0.0f32; 7]);
    for n in 0..6 {
        for (i, joint) in joints(&before).iter().enumerate() {
            action[i] = *joint as f32;
        }
        action[0] += if n % 2 == 0 { 0.6 } else { -0.6 };
        // Five rows of 50 ms: the arm swings visibly.
        let result = env.step(ActionChunk::new(7, action.repeat(5)).unwrap()).await.unwrap();
        let (now, then) = (joints(&result.obs), joints(&before));
        assert!((now[0] - then[0]).abs() > 0.05, "the arm moved: {then:?} to {now:?}");
        let (as_now, as_then) =
            (share_moved(&depth(&result.obs), &drawn(&now)), share_moved(&depth(&result.obs), &drawn(&then)));
        assert!(
            as_now < 0.005 && as_then > 10.0 * as_now.max(0.001),
            "off by {as_now} from the arm as it is, {as_then} as it was"
        );
        // And the hand's camera is where these joints put it.
        let wrist = Mount::Wrist.camera(&arm::Links::at(&now), SIZE.0, SIZE.1).extrinsics;
        assert!((wrist - result.obs["wrist_cam"].extrinsics).norm() < 1e-5);
        before = result.obs;
    }
}
