//! What makes the simulation a valid test: only pixels and depth reveal where the target is, and every fault
//! in a camera's data makes the policy fail.

#![allow(clippy::unwrap_used, reason = "helpers of tests, too, fail by panicking")]

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use chiral_client::{Observation, PolicyClient, Value, ValueMap, value};
use chiral_server::{CameraFrame, PolicyServer, ServerHandle};
use chiral_sim::any_client::AnyClient;
use chiral_sim::arm::{Joints, Links};
use chiral_sim::camera::Mount;
use chiral_sim::episode::{Coupling, Runner};
use chiral_sim::robot::{self, SimConfig, Tamper};
use tokio::net::TcpListener;

const SEEDS: std::ops::Range<u64> = 0..10;

const WIDTH: usize = 160;
const HEIGHT: usize = 120;

/// Small images, and hardly any but those that `reset` and `step` publish.
fn small() -> SimConfig {
    SimConfig { width: WIDTH, height: HEIGHT, fps: 1.0, ..SimConfig::default() }
}

/// Serves a robot on an ephemeral port and connects a client to it.
async fn connect(config: SimConfig) -> (PolicyClient, ServerHandle) {
    let (robot, sensors) = robot::start(config).unwrap();
    let server = PolicyServer::new(robot, sensors).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let uri = format!("ws://{}", listener.local_addr().unwrap());
    let handle = server.handle();
    tokio::spawn(server.serve_on(listener));
    (PolicyClient::connect(&uri).await.unwrap(), handle)
}

/// Plays the seeds with a fault in the cameras; returns how many episodes succeed.
async fn count_successes(tamper: Option<Tamper>) -> usize {
    let (client, server) = connect(SimConfig { tamper, ..small() }).await;
    let (client, interrupted) = (AnyClient::Async(client), AtomicBool::new(false));
    let runner = Runner::start(&client, Coupling::Step, 30.0, &interrupted).await.unwrap();
    let mut successes = 0;
    for seed in SEEDS {
        let episode = runner.play(seed).await.unwrap();
        successes += usize::from(episode.success);
    }
    client.close().await.unwrap();
    server.shutdown_and_wait().await;
    successes
}

/// A fault that changes each frame on its own.
fn fault(change: impl Fn(&mut CameraFrame) + Send + Sync + 'static) -> Option<Tamper> {
    Some(Arc::new(move |_, mut frame| {
        change(&mut frame);
        frame
    }))
}

/// A fault that puts part of the frame that the same camera published `LAG` frames earlier into each frame.
fn lagging(change: impl Fn(&mut CameraFrame, &CameraFrame) + Send + Sync + 'static) -> Option<Tamper> {
    const LAG: usize = 10;
    let earlier: Mutex<HashMap<String, VecDeque<CameraFrame>>> = Mutex::default();
    Some(Arc::new(move |camera, mut frame| {
        let mut earlier = earlier.lock().unwrap();
        let earlier = earlier.entry(camera.to_owned()).or_default();
        earlier.push_back(frame.clone());
        if earlier.len() > LAG + 1 {
            earlier.pop_front();
        }
        change(&mut frame, &earlier[0]);
        frame
    }))
}

async fn check_fault(name: &str, tamper: Option<Tamper>) {
    let successes = count_successes(tamper).await;
    let most = SEEDS.end as usize - 8;
    assert!(successes <= most, "{name}: expected at most {most} episodes to succeed, found {successes}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_fault_every_episode_succeeds() {
    assert_eq!(count_successes(None).await, SEEDS.count());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn swapped_channels_are_caught() {
    let swap = |frame: &mut CameraFrame| {
        let mut image = frame.image.to_vec();
        image.chunks_exact_mut(3).for_each(|rgb| rgb.swap(0, 2));
        frame.image = image.into();
    };
    check_fault("R and B swapped", fault(swap)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stale_extrinsics_are_caught() {
    check_fault("T stale by 10 frames", lagging(|frame, earlier| frame.extrinsics = earlier.extrinsics))
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn transposed_extrinsics_are_caught() {
    check_fault("T transposed", fault(|frame| frame.extrinsics.transpose_mut())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_focal_length_is_caught() {
    check_fault("fx scaled by 1.3", fault(|frame| frame.intrinsics[(0, 0)] *= 1.3)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scaled_depth_is_caught() {
    let scale = |frame: &mut CameraFrame| {
        // The simulation publishes aligned depth.
        let depth: &[f32] = bytemuck::cast_slice(frame.depth.as_ref().unwrap());
        let scaled: Vec<f32> = depth.iter().map(|z| z * 1.2).collect();
        frame.depth = Some(bytemuck::cast_slice(&scaled).to_vec().into());
    };
    check_fault("depth scaled by 1.2", fault(scale)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn depth_of_another_instant_is_caught() {
    check_fault("depth of 10 frames ago", lagging(|frame, earlier| frame.depth = earlier.depth.clone()))
        .await;
}

/// Everything in an observation but pixels, depth, sequence numbers and capture times.
fn without_pixels(obs: &Observation) -> String {
    let cameras: Vec<_> =
        obs.cameras.iter().map(|c| (&c.name, c.image.shape(), &c.intrinsics, &c.extrinsics)).collect();
    let proprios: Vec<_> = obs.proprios.iter().map(|p| (&p.name, p.data.shape(), p.data.data())).collect();
    format!("{cameras:?} {proprios:?} {:?} {:?}", obs.timestamp.to_bits(), obs.extra)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn moving_the_target_changes_nothing_but_pixels_and_depth() {
    let (client, server) = connect(small()).await;
    for seed in 0..4 {
        let mut seen = Vec::new();
        for target in [vec![0.5, 0.1, 0.2], vec![0.45, -0.15, 0.3], vec![0.5, 0.1, 0.2]] {
            let options = value::map([("target", target.into())]);
            let (obs, info) = client.reset_with(Some(seed), options).await.unwrap();
            let metadata = client.get_metadata().await.unwrap();
            assert_eq!(obs.timestamp, 0.0);
            seen.push((obs, info, metadata));
        }
        let other_data = |(obs, info, metadata): &(Arc<Observation>, ValueMap, ValueMap)| {
            (without_pixels(obs), format!("{info:?}"), format!("{metadata:?}"))
        };
        assert_eq!(other_data(&seen[0]), other_data(&seen[1]));
        assert_eq!(other_data(&seen[0]), other_data(&seen[2]));
        let pixels =
            |i: usize, camera: &str| (seen[i].0[camera].image.clone(), seen[i].0[camera].depth.clone());
        assert_ne!(pixels(0, "head_cam"), pixels(1, "head_cam"), "the target has moved");
        assert_eq!(
            pixels(0, "head_cam"),
            pixels(2, "head_cam"),
            "the same seed and target give the same image"
        );
        assert_eq!(pixels(0, "wrist_cam"), pixels(2, "wrist_cam"));
        assert!(!format!("{:?}", other_data(&seen[0])).contains("target"));
    }
    server.shutdown_and_wait().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_invalid_target_is_refused() {
    let (client, server) = connect(small()).await;
    for target in [Value::Null, vec![0.5, 0.1].into(), vec![0.5, f64::NAN, 0.1].into(), "there".into()] {
        let error = client.reset_with(Some(0), value::map([("target", target)])).await.unwrap_err();
        assert!(error.to_string().contains("expected a list of three finite numbers"), "{error}");
    }
    client.reset().await.unwrap();
    server.shutdown_and_wait().await;
}

/// Moves the arm about in lock-step; returns all observations.
async fn wander(client: &PolicyClient, seed: u64) -> Vec<Arc<Observation>> {
    let (first, _) = client.reset_with(Some(seed), ValueMap::new()).await.unwrap();
    let from = first.proprio("joint_pos").unwrap().values().into_owned();
    let mut seen = vec![first];
    for k in 1..20 {
        let row: Vec<f32> =
            from.iter().enumerate().map(|(i, q)| q + 0.3 * (0.2 * (k * (i + 1)) as f32).sin()).collect();
        seen.push(client.step(row).await.unwrap().obs);
    }
    seen
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_lock_step_all_sensors_show_one_instant() {
    // Camera threads that render all the time must not publish in between.
    let (width, height) = (32, 24);
    let (client, server) = connect(SimConfig { width, height, fps: 1000.0, ..SimConfig::default() }).await;
    for seed in 0..20 {
        for (k, obs) in wander(&client, seed).await.iter().enumerate() {
            assert!(
                (obs.timestamp - 0.05 * k as f64).abs() < 1e-9,
                "step advances the time by 1 / control_hz"
            );
            let joints: Joints =
                std::array::from_fn(|i| f64::from(obs.proprio("joint_pos").unwrap().values()[i]));
            for mount in Mount::first(2) {
                let camera = &obs[mount.name().as_str()];
                let expected = mount.camera(&Links::at(&joints), width, height);
                // Joints are f32 on the wire.
                assert!(
                    (camera.extrinsics - expected.extrinsics).amax() < 1e-5,
                    "{}: {}",
                    mount.name(),
                    camera.extrinsics
                );
                assert_eq!(camera.intrinsics, expected.intrinsics);
            }
        }
    }
    server.shutdown_and_wait().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_seed_and_actions_reproduce_an_episode() {
    let (client, server) = connect(small()).await;
    let everything = |obs: &Arc<Observation>| {
        let pixels: Vec<_> =
            obs.cameras.iter().map(|camera| (camera.image.clone(), camera.depth.clone())).collect();
        (without_pixels(obs), pixels)
    };
    let runs = [wander(&client, 7).await, wander(&client, 8).await, wander(&client, 7).await];
    let [first, other, again] = runs.map(|run| run.iter().map(everything).collect::<Vec<_>>());
    assert!(first == again && first != other);
    server.shutdown_and_wait().await;
}
