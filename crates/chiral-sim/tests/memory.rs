//! What observations cost in memory: server and client in this process, over real sockets. What is allocated
//! for each is counted by the allocator; what is held is what the system says, since large buffers are mapped
//! without it.
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
use support::harness::ScriptedRobot;
use tokio::{net::TcpListener, sync::Mutex, task::JoinHandle, time::sleep};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// For what must come; no test measures time by it.
const GUARD: Duration = Duration::from_secs(20);
const MB: usize = 1_000_000;

/// All that is allocated, in bytes.
fn in_use() -> usize {
    let stats = ALLOCATOR.stats();
    stats.bytes_allocated - stats.bytes_deallocated
}

/// Has one test run at a time, since the allocator's counters are the whole process's; and what it took it
/// must give back.
async fn alone(test: impl Future<Output = ()>) {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());
    let _turn = ONE_AT_A_TIME.lock().await;
    let before = in_use();
    test.await;
    let began = Instant::now();
    while in_use() > before + MB {
        assert!(began.elapsed() < GUARD, "{} bytes are left of a session that is over", in_use() - before);
        sleep(Duration::from_millis(1)).await;
    }
}

/// Where the pixels that are published lie.
#[derive(Clone, Copy, Debug)]
enum Pixels {
    /// In memory of the application's, prepared once.
    Prepared,
    /// In a camera's pooled buffers.
    Pooled,
}

/// How the policy gets its observations.
#[derive(Clone, Copy, Debug)]
enum Way {
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
    /// One that has published.
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

    /// A new instant of every camera.
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
        PolicyClient::builder(&format!("ws://{}", self.address))
            .quiet()
            .deadline(GUARD)
            .connect()
            .await
            .unwrap()
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

/// What one more observation has both ends allocate, in bytes, and how many pixels it has.
async fn allocated_per_observation(size: [usize; 2], pixels: Pixels, way: Way) -> (usize, usize) {
    const WARM_UP: usize = 50;
    const ROUNDS: usize = 5;
    const A_ROUND: u64 = 20;

    let robot = Robot::serve(2, size, pixels).await;
    let env = robot.connect().await;
    if let Way::Stream = way {
        env.start_obs_stream(100.0).await.unwrap();
    }
    let next = async || {
        robot.publish();
        match way {
            Way::GetObs => env.get_obs().await.unwrap(),
            Way::Stream => env.next_obs(GUARD).await.unwrap(),
        }
    };
    let mut held = next().await;
    for _ in 0..WARM_UP {
        held = next().await;
    }
    // The least of some rounds: where the machine is busy, the policy now and then holds more observations
    // than in the last seconds, and the pool's spare buffer is not there any more. That is not once per
    // observation; what is, is in every round.
    let mut least = usize::MAX;
    for _ in 0..ROUNDS {
        let (first, before) = (held.seq, ALLOCATOR.stats().bytes_allocated);
        while held.seq < first + A_ROUND {
            held = next().await;
        }
        let allocated = ALLOCATOR.stats().bytes_allocated - before;
        // A stream may skip some, which have arrived nevertheless.
        least = least.min(allocated / (held.seq - first) as usize);
    }
    let pixel_bytes = pixel_bytes(&held);
    drop(held);
    robot.stop(env).await;
    (least, pixel_bytes)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_observation_has_memory_allocated_that_grows_with_its_pixels() {
    /// Some 7 kB an observation are headers, requests and reference counts, the same at every size. What
    /// differs are pings, which come by the second, and what it takes to wait where the link was not ready at
    /// once: some hundred bytes. One copy of the larger image would be 218,880.
    const MARGIN: usize = 2_000;
    /// An observation of these is less than the 1 MiB from which on buffers are mapped, which the allocator
    /// would not count.
    const LARGE: [usize; 2] = [240, 304];
    alone(async {
        for way in [Way::GetObs, Way::Stream] {
            for pixels in [Pixels::Prepared, Pixels::Pooled] {
                let (small, small_pixels) = allocated_per_observation([48, 64], pixels, way).await;
                let (large, large_pixels) = allocated_per_observation(LARGE, pixels, way).await;
                assert!(
                    small.abs_diff(large) < MARGIN,
                    "{way:?}, {pixels:?}: expected the same, found {small} bytes for {small_pixels} of pixels, {large} for {large_pixels}"
                );
            }
        }
    })
    .await;
}

// ---- Held -------------------------------------------------------------------------------------------------

/// This process's memory that is in RAM and is no file's, in bytes: large buffers are mapped, and the
/// allocator knows nothing of them.
fn resident() -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<usize>().unwrap() * 1024
}

/// A policy holds one observation, then `KEPT` more, then one again. Streamed ones go on arriving all the
/// time; for others it then does not ask any more.
async fn check_what_is_held(way: Way) {
    const WARM_UP: usize = 30;
    const KEPT: usize = 10;
    /// What connections, requests and the allocator itself take.
    const SMALL_THINGS: usize = 4 * MB;

    // As large as the bench's largest. Publishing what was prepared takes nothing, so that what is measured
    // is the client's.
    let robot = Robot::serve(8, [480, 640], Pixels::Prepared).await;
    let before = resident();
    let since_connect = || resident().saturating_sub(before);
    let env = robot.connect().await;
    if let Way::Stream = way {
        env.start_obs_stream(30.0).await.unwrap();
    }
    let next = async || match way {
        Way::GetObs => env.get_obs().await.unwrap(),
        Way::Stream => env.next_obs(GUARD).await.unwrap(),
    };
    let mut held = next().await;
    let one = pixel_bytes(&held);
    let bound = 3 * one + 32 * MB;
    for _ in 0..WARM_UP {
        held = next().await;
        let found = since_connect();
        assert!(
            found <= bound,
            "{way:?}, holding one of {one} bytes: expected at most {bound} resident, found {found}"
        );
    }

    // The pool never blocks: that they come at all shows it.
    let mut kept = Vec::new();
    for _ in 0..KEPT {
        kept.push(next().await);
    }
    let (expected, found) = ((KEPT + 1) * one..=KEPT * one + bound, since_connect());
    assert!(
        expected.contains(&found),
        "{way:?}, holding {KEPT} more of {one} bytes: expected {expected:?} resident, found {found}"
    );

    // That the pool keeps few idle buffers is enough for the bound. That it frees these, too, shows only
    // below it: what is left is what is held, and with a stream also its latest and one that arrives.
    drop(kept);
    let left = SMALL_THINGS
        + match way {
            Way::GetObs => one,
            Way::Stream => 3 * one,
        };
    assert!(left <= bound);
    let let_go = Instant::now();
    while since_connect() > left {
        let found = since_connect();
        assert!(
            let_go.elapsed() < GUARD,
            "{way:?}, holding one of {one} bytes again: expected at most {left} resident, found {found}"
        );
        if let Way::Stream = way {
            held = next().await;
        }
        sleep(Duration::from_millis(10)).await;
    }
    drop(held);
    robot.stop(env).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn observations_that_are_kept_cost_their_memory_and_it_is_given_back_while_others_arrive() {
    alone(check_what_is_held(Way::Stream)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn observations_that_are_kept_cost_their_memory_and_it_is_given_back_though_none_arrives() {
    alone(check_what_is_held(Way::GetObs)).await;
}
