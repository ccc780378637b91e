//! Three things at once, each at its own rate: observations arrive 30 times a second, a thread of ours
//! predicts chunks of ten actions, and the client sends one of them every 100 ms. Stops after five seconds.
//!
//! ```text
//! cargo run -p chiral-client --example guide_streaming [URI]
//! ```

use std::{
    env,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::anyhow;
use chiral_client::{ActionChunk, Observation, blocking::PolicyClient};

/// Actions predicted together.
const CHUNK_SIZE: usize = 10;
const RUN_FOR: Duration = Duration::from_secs(5);

fn main() -> anyhow::Result<()> {
    let uri = env::args().nth(1).unwrap_or_else(|| "ws://localhost:8765".to_owned());
    // A queue of two chunks: while one is carried out the next is predicted, and no action is older than
    // that.
    let env = PolicyClient::builder(&uri).queue_capacity(2 * CHUNK_SIZE).connect_blocking()?;

    let metadata: Vec<String> = env.get_metadata()?.into_keys().collect();
    println!("Server metadata: {}", metadata.join(", "));
    let (obs, _info) = env.reset()?;
    println!("Reset: {} cameras  timestamp={:.4}", obs.cameras.len(), obs.timestamp);

    env.start_obs_stream(30.0)?;
    env.start_action_dispatch(10.0)?;
    let stop = AtomicBool::new(false);
    let chunks = thread::scope(|scope| {
        let policy = scope.spawn(|| policy_loop(&env, &stop));
        thread::sleep(RUN_FOR);
        stop.store(true, Ordering::Relaxed);
        // Rows that are still queued are not sent; this also makes room for a `put_action` that waits.
        env.clear_actions();
        policy.join().map_err(|_| anyhow!("the policy panicked"))?
    })?;
    env.stop_action_dispatch();

    let stats = env.stats();
    env.stop_obs_stream()?;
    let age_ms = stats.observation_age_p50.map_or(f64::NAN, |age| age.as_secs_f64() * 1e3);
    println!(
        "Observations: {} at {:.1} Hz, age {age_ms:.1} ms (median)",
        stats.observations, stats.observation_hz
    );
    println!(
        "Actions: {chunks} chunks predicted, {} rows sent, {} refused",
        stats.actions_sent, stats.actions_refused
    );
    env.close()?;
    Ok(())
}

/// The policy's own loop, at the policy's own pace; how many chunks it predicted.
fn policy_loop(env: &PolicyClient, stop: &AtomicBool) -> anyhow::Result<u32> {
    let dimension = env.robot().action_spec.dimension;
    let mut chunks = 0;
    while !stop.load(Ordering::Relaxed) {
        let obs = match env.latest_obs()? {
            Some(obs) => obs,
            None => env.next_obs(Duration::from_secs(1))?,
        };
        let actions = predict(&obs, dimension)?;
        chunks += 1;
        for action in actions.iter() {
            // Waits for room while the queue is full: this is what paces the loop.
            env.put_action(action)?;
        }
    }
    Ok(chunks)
}

/// Stands for a policy: a chunk of zeros, which the robot clamps to what it can do.
fn predict(_obs: &Observation, dimension: usize) -> anyhow::Result<ActionChunk> {
    Ok(ActionChunk::new(dimension, vec![0.0; CHUNK_SIZE * dimension])?)
}
