//! Observations: each is one instant per camera, and neither the robot nor a slow link delays the stream.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use chiral_client::{Observation, PolicyClient};
use chiral_proto::{ActionChunk, ValueMap};
use chiral_server::PolicyServer;
use chiral_sim::{
    arm,
    camera::Mount,
    link::{LinkOptions, link},
    render,
    robot::SimConfig,
    scene::Scene,
};
use tokio::time::sleep;

use crate::{
    ROW, ms,
    support::harness::{CAMERA, Event, Harness, on_paused_clock, publish},
};

#[tokio::test]
async fn each_camera_of_an_observation_shows_one_instant_while_sensors_publish_fast() {
    let harness = Harness::with(Arc::default(), 48, 64, |builder| builder);
    let env = harness.connect().await;
    let (sensors, done) = (harness.sensors.clone(), Arc::new(AtomicBool::new(false)));
    let stop = Arc::clone(&done);
    let writer = thread::spawn(move || {
        for n in (1..=250).cycle() {
            publish(&sensors, n);
            if stop.load(Ordering::Relaxed) {
                break;
            }
        }
    });
    let (mut instants, mut seen) = (BTreeSet::new(), 0);
    // On a busy machine the two threads may share a core; it then takes longer to see this many instants.
    while seen < 10_000 || instants.len() < 1000 {
        seen += 1;
        let obs = env.get_obs().await.unwrap();
        let camera = &obs[CAMERA];
        let n = camera.intrinsics[0];
        assert!(
            camera.image.data().iter().all(|&pixel| f64::from(pixel) == n),
            "image and K of different instants"
        );
        let depth = camera.depth.as_ref().unwrap().values::<f32>().unwrap();
        assert!(depth.iter().all(|&metres| f64::from(metres) == n), "depth and K of different instants");
        assert!(
            camera.intrinsics.iter().chain(camera.extrinsics.iter()).all(|&value| value == n),
            "K and T of different instants"
        );
        instants.insert(camera.seq);
    }
    done.store(true, Ordering::Relaxed);
    writer.join().unwrap();
}

#[tokio::test]
async fn the_stream_keeps_its_rate_and_every_request_gets_a_reply_while_reset_blocks() {
    let harness = Harness::new();
    let env = harness.connect().await;
    env.start_obs_stream(30.0).await.unwrap();
    let spawn_reset = |seed| {
        let env = env.clone();
        tokio::spawn(async move { env.reset_with(Some(seed), ValueMap::new()).await })
    };

    harness.script.reset_gate.close();
    let first = spawn_reset(7);
    harness.wait_until("the reset starts", |harness| harness.script.events() == [Event::ResetStarted]).await;
    let (count, oldest, ()) = on_paused_clock(count_stream(&env, &harness, sleep(ms(10_000)))).await;
    assert!((299..=301).contains(&count), "{count} observations in 10 s");
    assert!(oldest <= ms(20), "{oldest:?}");

    let second = spawn_reset(8);
    assert_eq!(env.get_metadata().await.unwrap()["kind"].as_str(), Some("scripted"));
    assert!(!first.is_finished() && !second.is_finished());
    harness.script.reset_gate.open();
    let replies = [first.await.unwrap().unwrap(), second.await.unwrap().unwrap()];
    assert_eq!(
        replies.each_ref().map(|(obs, info)| (obs.episode, info["seed"].as_i64())),
        [(1, Some(7)), (2, Some(8))]
    );

    harness.script.reset_gate.close();
    let long = spawn_reset(9);
    let (count, _, ()) = on_paused_clock(count_stream(&env, &harness, sleep(ms(45_000)))).await;
    assert!((1349..=1351).contains(&count), "{count} observations in 45 s");
    assert!(!long.is_finished());
    harness.script.reset_gate.open();
    assert_eq!(long.await.unwrap().unwrap().0.episode, 3);
}

#[tokio::test]
async fn an_apply_action_of_100_ms_does_not_delay_observations() {
    let harness = Harness::new();
    let env = harness.connect().await;
    env.start_obs_stream(100.0).await.unwrap();
    for n in 0..20 {
        harness.script.apply_gate.close();
        env.send_action(ROW).await.unwrap();
        let (count, oldest, ()) = on_paused_clock(count_stream(&env, &harness, sleep(ms(100)))).await;
        assert!((9..=11).contains(&count), "{count} observations in 100 ms");
        assert!(oldest <= ms(20), "{oldest:?}: older than one sensor period plus one stream period");
        assert_eq!(harness.script.applied().len(), n, "the robot was busy throughout");
        harness.script.apply_gate.open();
        harness.wait_until("the action is applied", |harness| harness.script.applied().len() == n + 1).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_round_trip_of_40_ms_does_not_lower_a_stream_of_30_hz() {
    let harness = Harness::new();
    let (env, _link) = harness.connect_over(LinkOptions { latency: ms(20), bandwidth: None }).await;
    env.start_obs_stream(30.0).await.unwrap();
    let (count, oldest, ()) = count_stream(&env, &harness, sleep(ms(60_000))).await;
    assert!(count as f64 / 60.0 >= 29.5, "{count} observations in 60 s");
    assert!(oldest <= ms(20 + 12), "{oldest:?}");
}

#[tokio::test(start_paused = true)]
async fn over_10_mbit_s_an_observation_is_never_older_than_two_transfers_and_the_round_trip() {
    let harness = Harness::with(Arc::default(), 120, 160, |builder| builder);
    let options = LinkOptions { latency: ms(20), bandwidth: Some(10e6) };
    let (env, _link) = harness.connect_over(options).await;
    let transfer = Duration::from_secs_f64((120 * 160 * (3 + 4)) as f64 * 8.0 / 10e6);
    env.start_obs_stream(30.0).await.unwrap();
    let (count, oldest, ()) = count_stream(&env, &harness, sleep(ms(30_000))).await;
    assert!(oldest <= 2 * transfer + ms(40), "{oldest:?}, a transfer takes {transfer:?}");
    let possible = 30.0 / transfer.as_secs_f64();
    assert!(count as f64 >= 0.95 * possible, "{count} observations of {possible} that the link can carry");
    let skipped = harness.handle.stats().observations_skipped;
    // Some are still being sent.
    assert!((count + skipped).abs_diff(900) <= 12, "{count} sent and {skipped} skipped in 900 ticks");
}

/// Counts the observations that arrive while `during` runs, and returns the greatest age on arrival.
async fn count_stream<T>(
    env: &PolicyClient,
    harness: &Harness,
    during: impl Future<Output = T>,
) -> (u64, Duration, T) {
    // Discard what arrived before: it has aged since.
    env.latest_obs().unwrap();
    let before = env.stats().observations;
    let mut oldest = Duration::ZERO;
    tokio::pin!(during);
    let outcome = loop {
        tokio::select! {
            biased;
            obs = env.next_obs(Duration::from_secs(5)) => oldest = oldest.max(age(harness, &obs.unwrap())),
            outcome = &mut during => break outcome,
        }
    };
    (env.stats().observations - before, oldest, outcome)
}

fn age(harness: &Harness, obs: &Observation) -> Duration {
    harness.clock.now().since(obs[CAMERA].captured_at)
}

#[tokio::test]
async fn the_image_in_a_step_reply_shows_the_arm_after_the_action() {
    const SEED: u64 = 5;
    const SIZE: (usize, usize) = (160, 120);
    let config = SimConfig { width: SIZE.0, height: SIZE.1, ..SimConfig::default() };
    let (robot, sensors) = chiral_sim::robot::start(config).unwrap();
    let server = PolicyServer::new(robot, sensors).unwrap();
    let (client_end, server_end, _) = link(LinkOptions::default());
    tokio::spawn(async move { server.serve_connection(server_end).await });
    let env = PolicyClient::builder("link").connect_over(client_end).await.unwrap();

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
        // Five rows of 50 ms: the arm moves visibly.
        let result = env.step(ActionChunk::new(7, action.repeat(5)).unwrap()).await.unwrap();
        let (now, then) = (joints(&result.obs), joints(&before));
        assert!((now[0] - then[0]).abs() > 0.05, "expected the arm to move, found {then:?} then {now:?}");
        let (as_now, as_then) =
            (share_moved(&depth(&result.obs), &drawn(&now)), share_moved(&depth(&result.obs), &drawn(&then)));
        assert!(
            as_now < 0.005 && as_then > 10.0 * as_now.max(0.001),
            "share of wrong pixels: {as_now} against the new posture, {as_then} against the old one"
        );
        // The wrist camera is where these joints put it.
        let wrist = Mount::Wrist.camera(&arm::Links::at(&now), SIZE.0, SIZE.1).extrinsics;
        assert!((wrist - result.obs["wrist_cam"].extrinsics).norm() < 1e-5);
        before = result.obs;
    }
}

/// The share of pixels whose depth differs by more than a centimetre.
fn share_moved(seen: &[f32], expected: &[f32]) -> f64 {
    let moved = seen.iter().zip(expected).filter(|(a, b)| (*a - *b).abs() > 0.01).count();
    moved as f64 / seen.len() as f64
}
