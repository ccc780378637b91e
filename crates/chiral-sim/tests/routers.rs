//! Many robots and many policies through one router process: each policy drives its own robot and never sees
//! another.
#![allow(clippy::unwrap_used, reason = "helpers of tests, too, fail by panicking")]

mod support;

use std::{sync::Arc, thread};

use bytes::Bytes;
use chiral_client::{ActionChunk, Observation, ValueMap};
use chiral_server::{CameraFrame, ServerHandle};
use chiral_sim::policy::{EXECUTION_HORIZON, Policy};
use chiral_sim::robot::SimConfig;
use support::{
    client_builder, free_address,
    processes::{Process, RecordingRobot, SharedLog, wait_until_listening},
};

const PAIRS: u8 = 16;
const EPISODES: u64 = 5;

fn name(pair: u8) -> String {
    format!("robot-{pair}")
}

/// The seeds of a pair's episodes, which no other pair has.
fn seeds(pair: u8) -> impl Iterator<Item = u64> {
    (0..EPISODES).map(move |episode| u64::from(PAIRS) * episode + u64::from(pair))
}

/// The first pixel of a robot's images, in a colour that the scene does not have.
fn mark(pair: u8) -> [u8; 3] {
    [pair, 255 - pair, pair ^ 0b1010_1010]
}

/// Starts a robot on the router's network; all its images bear its mark.
fn serve(uri: &str, pair: u8) -> (ServerHandle, SharedLog) {
    let marked = move |_: &str, frame: CameraFrame| {
        let mut image = frame.image.to_vec();
        image[..3].copy_from_slice(&mark(pair));
        CameraFrame { image: Bytes::from(image), ..frame }
    };
    // Few images while no policy drives: sixteen renderers share the machine with the code under test.
    let config =
        SimConfig { width: 64, height: 48, fps: 2.0, tamper: Some(Arc::new(marked)), ..SimConfig::default() };
    let (builder, log) = RecordingRobot::start(config);
    let server = builder.name(name(pair)).join_zenoh(uri).build().unwrap();
    let handle = server.handle();
    thread::spawn(move || server.run().unwrap());
    (handle, log)
}

/// Runs episodes in lock-step, each of which must succeed; returns the rows that were sent.
fn drive(uri: &str, pair: u8) -> Vec<Vec<f32>> {
    let env = client_builder(uri).robot(name(pair)).connect_blocking().unwrap();
    assert_eq!(env.robot().name, name(pair));
    let mut sent = Vec::new();
    for seed in seeds(pair) {
        let (mut obs, _) = env.reset_with(Some(seed), ValueMap::new()).unwrap();
        let mut policy = Policy::new(env.robot().action_spec.control_hz);
        // The simulation ends every episode after at most six simulated seconds.
        loop {
            check_mark(&obs, pair);
            let plan = policy.plan(&obs);
            let rows: Vec<Vec<f32>> =
                plan.chunk.iter().take(EXECUTION_HORIZON).map(<[f32]>::to_vec).collect();
            let result = env.step(ActionChunk::new(7, rows.concat()).unwrap()).unwrap();
            sent.extend(rows);
            check_mark(&result.obs, pair);
            if result.terminated || result.truncated {
                assert_eq!(result.info["success"].as_bool(), Some(true), "pair {pair}, seed {seed}");
                break;
            }
            obs = result.obs;
        }
    }
    env.close().unwrap();
    sent
}

fn check_mark(obs: &Observation, pair: u8) {
    for camera in &obs.cameras {
        assert_eq!(
            camera.image.data()[..3],
            mark(pair),
            "pair {pair}, {}, observation {}",
            camera.name,
            obs.seq
        );
    }
}

#[test]
fn sixteen_policies_on_one_router_each_reach_only_their_own_robot() {
    let address = free_address();
    let uri = format!("tcp/{address}");
    let _router = Process::start(&["router", "--listen", &uri]);
    wait_until_listening(&address);
    let robots: Vec<_> = (0..PAIRS).map(|pair| serve(&uri, pair)).collect();
    let driven: Vec<_> = thread::scope(|scope| {
        let policies: Vec<_> = (0..PAIRS)
            .map(|pair| {
                scope.spawn({
                    let uri = &uri;
                    move || drive(uri, pair)
                })
            })
            .collect();
        policies.into_iter().map(|policy| policy.join().unwrap()).collect()
    });
    for ((pair, sent), (handle, log)) in (0..PAIRS).zip(driven).zip(robots) {
        handle.shutdown();
        let log = log.lock().unwrap();
        assert_eq!(log.seeds, seeds(pair).collect::<Vec<_>>(), "pair {pair}");
        let applied: Vec<_> = log.rows.iter().map(|(row, _)| row.clone()).collect();
        assert_eq!(applied, sent, "pair {pair}");
    }
}
