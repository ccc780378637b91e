//! The memory that observations cost, with server and client in this process over real sockets. The allocator
//! counts what is allocated for each. The operating system counts what is held, since large buffers are
//! mapped without the allocator.
#![allow(clippy::unwrap_used, reason = "helpers of tests, too, fail by panicking")]

mod support;

use std::{
    alloc::System,
    fs,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use chiral_client::{Observation, PolicyClient};
use chiral_server::{CameraFrame, CameraSpec, PolicyServer, Sensors, ServerHandle};
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};
use support::{TEST_TIMEOUT, client_builder, harness::ScriptedRobot};
use tokio::{net::TcpListener, sync::Mutex, task::JoinHandle, time::sleep};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const MB: usize = 1_000_000;

/// The bytes that are allocated now.
fn in_use() -> usize {
    let stats = ALLOCATOR.stats();
    stats.bytes_allocated - stats.bytes_deallocated
}

/// Runs one test at a time, since the allocator's counters are the whole process's. Checks that the test
/// frees all it allocated.
async fn alone(test: impl Future<Output = ()>) {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());
    let _guard = ONE_AT_A_TIME.lock().await;
    let before = in_use();
    test.await;
    let started = Instant::now();
    while in_use() > before + MB {
        assert!(
            started.elapsed() < TEST_TIMEOUT,
            "{} bytes are still allocated after the session",
            in_use() - before
        );
        sleep(Duration::from_millis(1)).await;
    }
}

/// The memory of the published pixels.
#[derive(Clone, Copy, Debug)]
enum Pixels {
    /// Memory of the application, prepared once.
    Prepared,
    /// A camera's pooled buffers.
    Pooled,
}

/// How the policy gets its observations.
#[derive(Clone, Copy, Debug)]
enum Delivery {
    GetObs,
    Stream,
}

/// A server with cameras and depth.
struct Robot {
    sensors: Sensors,
    pixels: Pixels,
    prepared: [Bytes; 2],
    address: SocketAddr,
    handle: ServerHandle,
    serving: JoinHandle<()>,
}

impl Robot {
    /// Serves a robot that has published once.
    async fn serve(cameras: usize, [height, width]: [usize; 2], pixels: Pixels) -> Robot {
        let specs = (0..cameras).map(|i| CameraSpec::rgbd(format!("cam_{i}"), height, width));
        let sensors = Sensors::new(specs, []).unwrap();
        let server = PolicyServer::new(ScriptedRobot(Arc::default()), sensors.clone()).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, handle) = (listener.local_addr().unwrap(), server.handle());
        let serving = tokio::spawn(async move { server.serve_on(listener).await.unwrap() });
        let prepared = [vec![1; height * width * 3].into(), vec![0; height * width * 4].into()];
        let robot = Robot { sensors, pixels, prepared, address, handle, serving };
        robot.publish();
        robot
    }

    /// Publishes a new instant of every camera.
    fn publish(&self) {
        for spec in self.sensors.camera_specs() {
            let camera = self.sensors.camera(&spec.name).unwrap();
            let [image, depth] = match self.pixels {
                Pixels::Prepared => self.prepared.clone(),
                Pixels::Pooled => {
                    let (mut image, mut depth) = (camera.buffer(), camera.depth_buffer());
                    image.fill(1);
                    depth.values_mut().fill(1.0_f32);
                    [image.into(), depth.into()]
                }
            };
            camera.publish(CameraFrame { image, depth: Some(depth), ..CameraFrame::default() }).unwrap();
        }
    }

    async fn connect(&self) -> PolicyClient {
        client_builder(format!("ws://{}", self.address)).connect().await.unwrap()
    }

    async fn stop(self, env: PolicyClient) {
        env.close().await.unwrap();
        self.handle.shutdown_and_wait().await;
        self.serving.await.unwrap();
    }
}

fn pixel_bytes(observation: &Observation) -> usize {
    let tensors = observation.cameras.iter().flat_map(|camera| [Some(&camera.image), camera.depth.as_ref()]);
    tensors.flatten().map(|tensor| tensor.data().len()).sum()
}

// ---- Allocated --------------------------------------------------------------------------------------------

/// Returns the bytes that both ends allocate for one more observation, and the bytes of its pixels.
async fn allocated_per_observation(size: [usize; 2], pixels: Pixels, delivery: Delivery) -> (usize, usize) {
    const WARM_UP: usize = 50;
    const ROUNDS: usize = 5;
    const PER_ROUND: u64 = 20;

    let robot = Robot::serve(2, size, pixels).await;
    let env = robot.connect().await;
    if let Delivery::Stream = delivery {
        env.start_obs_stream(100.0).await.unwrap();
    }
    let next = async || {
        robot.publish();
        match delivery {
            Delivery::GetObs => env.get_obs().await.unwrap(),
            Delivery::Stream => env.next_obs(TEST_TIMEOUT).await.unwrap(),
        }
    };
    let mut held = next().await;
    for _ in 0..WARM_UP {
        held = next().await;
    }
    // Take the lowest of several rounds. On a busy machine the policy sometimes holds more observations than
    // in the last seconds, and the pool has already freed its spare buffer. An allocation per observation
    // appears in every round.
    let mut least = usize::MAX;
    for _ in 0..ROUNDS {
        let (first, before) = (held.seq, ALLOCATOR.stats().bytes_allocated);
        while held.seq < first + PER_ROUND {
            held = next().await;
        }
        let allocated = ALLOCATOR.stats().bytes_allocated - before;
        // `next_obs` may skip some of a stream, which have arrived nevertheless.
        least = least.min(allocated / (held.seq - first) as usize);
    }
    let pixel_bytes = pixel_bytes(&held);
    drop(held);
    robot.stop(env).await;
    (least, pixel_bytes)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_allocated_per_observation_does_not_grow_with_its_pixels() {
    /// Headers, requests and reference counts take about 7 kB per observation at every size. What differs is
    /// some hundred bytes: pings, which are sent every second, and waiting for a link that is not ready at
    /// once. One copy of the larger image would be 218,880 bytes.
    const MARGIN: usize = 2_000;
    /// An observation of this size is below 1 MiB, from which on buffers are mapped and the allocator would
    /// not count them.
    const LARGE: [usize; 2] = [240, 304];
    alone(async {
        for delivery in [Delivery::GetObs, Delivery::Stream] {
            for pixels in [Pixels::Prepared, Pixels::Pooled] {
                let (small, small_pixels) = allocated_per_observation([48, 64], pixels, delivery).await;
                let (large, large_pixels) = allocated_per_observation(LARGE, pixels, delivery).await;
                assert!(
                    small.abs_diff(large) < MARGIN,
                    "{delivery:?}, {pixels:?}: expected the same, found {small} bytes for \
                     {small_pixels} of pixels, {large} for {large_pixels}"
                );
            }
        }
    })
    .await;
}

// ---- Held -------------------------------------------------------------------------------------------------

/// This process's anonymous resident memory, in bytes. It includes large buffers, which are mapped without
/// the allocator.
fn resident() -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<usize>().unwrap() * 1024
}

/// A policy holds one observation, then `KEPT` more, then one again. A stream continues in the last phase;
/// with `get_obs` the policy requests no more then.
async fn check_held_memory(delivery: Delivery) {
    const WARM_UP: usize = 30;
    const KEPT: usize = 10;
    /// What connections, requests and the allocator itself take.
    const OVERHEAD: usize = 4 * MB;

    // The size of the largest case in the bench. Publishing prepared pixels allocates nothing, so that only
    // the client's memory is measured.
    let robot = Robot::serve(8, [480, 640], Pixels::Prepared).await;
    let before = resident();
    let since_connect = || resident().saturating_sub(before);
    let env = robot.connect().await;
    if let Delivery::Stream = delivery {
        env.start_obs_stream(30.0).await.unwrap();
    }
    let next = async || match delivery {
        Delivery::GetObs => env.get_obs().await.unwrap(),
        Delivery::Stream => env.next_obs(TEST_TIMEOUT).await.unwrap(),
    };
    let mut held = next().await;
    let one = pixel_bytes(&held);
    let bound = 3 * one + 32 * MB;
    for _ in 0..WARM_UP {
        held = next().await;
        let found = since_connect();
        assert!(
            found <= bound,
            "{delivery:?}, holding one of {one} bytes: expected at most {bound} resident, found {found}"
        );
    }

    // That these observations arrive at all shows that the pool never blocks.
    let mut kept = Vec::new();
    for _ in 0..KEPT {
        kept.push(next().await);
    }
    let (expected, found) = ((KEPT + 1) * one..=KEPT * one + bound, since_connect());
    assert!(
        expected.contains(&found),
        "{delivery:?}, holding {KEPT} more of {one} bytes: expected {expected:?} resident, found {found}"
    );

    // The bound above holds if the pool keeps few idle buffers. This lower one shows that it frees them too:
    // what is left is what the policy holds and, with a stream, the latest observation and the one that
    // arrives.
    drop(kept);
    let left = OVERHEAD
        + match delivery {
            Delivery::GetObs => one,
            Delivery::Stream => 3 * one,
        };
    assert!(left <= bound);
    let dropped = Instant::now();
    while since_connect() > left {
        let found = since_connect();
        assert!(
            dropped.elapsed() < TEST_TIMEOUT,
            "{delivery:?}, holding one of {one} bytes again: expected at most {left} resident, found {found}"
        );
        if let Delivery::Stream = delivery {
            held = next().await;
        }
        sleep(Duration::from_millis(10)).await;
    }
    drop(held);
    robot.stop(env).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_of_kept_observations_is_freed_while_a_stream_continues() {
    alone(check_held_memory(Delivery::Stream)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_of_kept_observations_is_freed_while_none_arrives() {
    alone(check_held_memory(Delivery::GetObs)).await;
}
