//! One episode in lock-step: look, decide, `step`, until the robot says that it is over or fifty steps were
//! taken.
//!
//! ```text
//! cargo run -p chiral-client --example guide_episode [URI]
//! ```

use std::{env, time::Instant};

use chiral_client::{ActionChunk, Observation, Value, ValueMap, blocking::PolicyClient};

const STEP_LIMIT: u32 = 50;

fn main() -> anyhow::Result<()> {
    let uri = env::args().nth(1).unwrap_or_else(|| "ws://localhost:8765".to_owned());
    run_episode(&uri)
}

fn run_episode(uri: &str) -> anyhow::Result<()> {
    let env = PolicyClient::connect(uri)?;

    // Metadata is specific to the robot: request it once, with a default for what may be missing.
    let metadata = env.get_metadata()?;
    let cameras = cameras(&metadata);
    let (rows, dimension) = action_shape(&metadata).unwrap_or((1, env.robot().action_spec.dimension));
    println!("Server metadata: cameras={cameras:?}  action_shape=[{rows}, {dimension}]");

    let (mut obs, _info) = env.reset()?;
    println!("Reset: {} cameras  timestamp={:.4}", obs.cameras.len(), obs.timestamp);

    let started = Instant::now();
    let (mut steps, mut total_reward, mut steps_per_second) = (0, 0.0, 0.0);
    while steps < STEP_LIMIT {
        // K and T belong to this image. Read them from every observation: cameras move.
        let camera = obs.camera("wrist_cam")?;
        let focal_length = camera.intrinsics[(0, 0)];
        let position = camera.extrinsics.fixed_view::<3, 1>(0, 3).into_owned();

        let actions = predict(&obs, rows, dimension)?;
        let asked = Instant::now();
        let result = env.step(actions)?;
        let latency_ms = asked.elapsed().as_secs_f64() * 1e3;

        steps += 1;
        total_reward += result.reward;
        steps_per_second = f64::from(steps) / started.elapsed().as_secs_f64();
        println!(
            "step={steps:4}  latency={latency_ms:5.1}ms  fps={steps_per_second:5.1}  reward={:.3}  \
             fx={focal_length:.0}  pos=[{:.2} {:.2} {:.2}]",
            result.reward, position.x, position.y, position.z
        );
        obs = result.obs;
        if result.terminated || result.truncated {
            break;
        }
    }
    println!("\nDone: steps={steps}  total_reward={total_reward:.2}  avg_fps={steps_per_second:.1}");
    env.close()?;
    Ok(())
}

/// Stands for a policy: `rows` actions of zeros, which the robot clamps to what it can do.
fn predict(_obs: &Observation, rows: usize, dimension: usize) -> anyhow::Result<ActionChunk> {
    Ok(ActionChunk::new(dimension, vec![0.0; rows * dimension])?)
}

fn cameras(metadata: &ValueMap) -> Vec<&str> {
    let names = metadata.get("cameras").and_then(Value::as_list).unwrap_or_default();
    names.iter().filter_map(Value::as_str).collect()
}

fn action_shape(metadata: &ValueMap) -> Option<(usize, usize)> {
    match metadata.get("action_shape")?.as_list()? {
        [rows, dimension] => Some((rows.as_i64()?.try_into().ok()?, dimension.as_i64()?.try_into().ok()?)),
        _ => None,
    }
}
