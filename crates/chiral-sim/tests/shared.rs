//! Observations in memory shared by two processes: they are neither copied nor torn, and no peer's end leaks
//! memory.
#![allow(clippy::unwrap_used, reason = "helpers of tests, too, fail by panicking")]

mod support;

use std::{
    env, fs,
    io::{BufRead, BufReader},
    process::{ChildStdout, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use chiral_client::{Observation, PolicyClient};
use chiral_proto::CameraSpec;
use chiral_server::{CameraFrame, PolicyServer, Sensors, ServerHandle};
use nalgebra::Matrix3;
use rustix::process::Signal;
use support::{
    TEST_TIMEOUT, client_builder, free_locator,
    harness::{self, Event, Script, ScriptedRobot},
    processes::Process,
    wait_until,
};

const HEIGHT: usize = 240;
const WIDTH: usize = 320;
/// A region holds image and depth of two cameras eight times, plus what Zenoh needs.
const REGION: usize = 8 * 2 * HEIGHT * WIDTH * 7 + (1 << 20);
/// Zenoh's bookkeeping for its memory.
const BOOKKEEPING: usize = 4 << 20;

/// A robot whose images have one grey level each; their K and depth carry the same level.
struct PaintedRobot {
    uri: String,
    script: Arc<Script>,
    handle: ServerHandle,
    is_stopped: Arc<AtomicBool>,
}

impl PaintedRobot {
    fn start() -> PaintedRobot {
        let uri = free_locator();
        let sensors =
            Sensors::new(["left", "right"].map(|name| CameraSpec::rgbd(name, HEIGHT, WIDTH)), []).unwrap();
        let (script, is_stopped) = (Arc::<Script>::default(), Arc::<AtomicBool>::default());
        let builder = PolicyServer::builder(ScriptedRobot(Arc::clone(&script)), sensors.clone());
        let server = builder.name("robot").listen_zenoh(&uri).discovery(false).build().unwrap();
        let handle = server.handle();
        tokio::spawn(server.serve());
        let stopped = Arc::clone(&is_stopped);
        thread::spawn(move || {
            for level in (1..=250_u8).cycle() {
                if stopped.load(Ordering::Relaxed) {
                    break;
                }
                paint(&sensors, level);
                thread::sleep(Duration::from_millis(5));
            }
        });
        PaintedRobot { uri, script, handle, is_stopped }
    }
}

impl Drop for PaintedRobot {
    fn drop(&mut self) {
        self.is_stopped.store(true, Ordering::Relaxed);
        self.handle.shutdown();
    }
}

fn paint(sensors: &Sensors, level: u8) {
    for name in ["left", "right"] {
        let camera = sensors.camera(name).unwrap();
        let (mut image, mut depth) = (camera.buffer(), camera.depth_buffer());
        image.fill(level);
        depth.values_mut::<f32>().fill(level.into());
        let intrinsics = Matrix3::identity() * f64::from(level);
        let frame = CameraFrame {
            image: image.into(),
            depth: Some(depth.into()),
            intrinsics,
            ..CameraFrame::default()
        };
        camera.publish(frame).unwrap();
    }
}

/// Whether each camera shows one instant.
fn is_whole(obs: &Observation) -> bool {
    obs.cameras.iter().all(|camera| {
        let level = camera.intrinsics[(0, 0)] as u8;
        let depth = camera.depth.as_ref().unwrap().data();
        let is_of_level = |depth: &[u8]| f32::from_le_bytes(depth.try_into().unwrap()) == f32::from(level);
        camera.image.data().iter().all(|pixel| *pixel == level) && depth.chunks(4).all(is_of_level)
    })
}

/// The address ranges of Zenoh's shared memory in this process.
fn mapped() -> Vec<std::ops::Range<usize>> {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let shared = maps.lines().filter(|line| line.contains(".zenoh"));
    let range = |line: &str| {
        let (start, rest) = line.split_once('-').unwrap();
        let address = |hex| usize::from_str_radix(hex, 16).unwrap();
        address(start)..address(rest.split_once(' ').unwrap().0)
    };
    shared.map(range).collect()
}

/// The size of Zenoh's shared memory in this process.
fn shared_bytes() -> usize {
    mapped().iter().map(ExactSizeIterator::len).sum()
}

fn is_shared(obs: &Observation) -> bool {
    let mapped = mapped();
    let tensors = obs.cameras.iter().flat_map(|camera| [&camera.image, camera.depth.as_ref().unwrap()]);
    let is_mapped = |address: usize| mapped.iter().any(|range| range.contains(&address));
    tensors.into_iter().all(|tensor| is_mapped(tensor.data().as_ptr().addr()))
}

/// Returns the next observation that arrived by reference.
async fn next_shared(env: &PolicyClient) -> Arc<Observation> {
    let started = Instant::now();
    loop {
        let obs = env.next_obs(TEST_TIMEOUT).await.unwrap();
        assert!(is_whole(&obs));
        if is_shared(&obs) {
            return obs;
        }
        assert!(started.elapsed() < TEST_TIMEOUT, "timed out waiting for an observation in shared memory");
    }
}

#[tokio::test]
async fn pixels_are_read_where_the_sensors_wrote_them() {
    let robot = PaintedRobot::start();
    let env = client_builder(&robot.uri).connect().await.unwrap();
    let started = Instant::now();
    while !is_shared(&env.get_obs().await.unwrap()) {
        assert!(started.elapsed() < TEST_TIMEOUT);
    }
    let before = robot.handle.stats().shared_memory;
    for _ in 0..20 {
        let obs = env.get_obs().await.unwrap();
        assert!(is_whole(&obs) && is_shared(&obs));
    }
    let (obs, _) = env.reset().await.unwrap();
    assert!(is_shared(&obs));
    let stepped = env.step([0.5; harness::DIMENSION]).await.unwrap();
    assert!(is_shared(&stepped.obs));
    env.start_obs_stream(50.0).await.unwrap();
    for _ in 0..20 {
        let obs = env.next_obs(TEST_TIMEOUT).await.unwrap();
        assert!(is_whole(&obs) && is_shared(&obs));
    }
    let after = robot.handle.stats().shared_memory;
    assert_eq!((after.by_network, after.exhausted), (before.by_network, before.exhausted));
    assert!(after.by_reference >= before.by_reference + 42);
    env.close().await.unwrap();
    assert!(is_whole(&obs) && is_whole(&stepped.obs), "observations outlive the session");
}

#[tokio::test]
async fn a_client_without_shared_memory_receives_observations_over_the_network() {
    let robot = PaintedRobot::start();
    let env = client_builder(&robot.uri).shared_memory(false).connect().await.unwrap();
    env.start_obs_stream(50.0).await.unwrap();
    for _ in 0..20 {
        let obs = env.next_obs(TEST_TIMEOUT).await.unwrap();
        assert!(is_whole(&obs) && !is_shared(&obs));
    }
    let counts = robot.handle.stats().shared_memory;
    assert_eq!(counts.by_reference, 0);
    assert!(counts.by_network >= 20);
}

#[tokio::test]
async fn observations_go_over_the_network_only_while_the_shared_region_is_full() {
    let robot = PaintedRobot::start();
    let env = client_builder(&robot.uri).connect().await.unwrap();
    env.start_obs_stream(100.0).await.unwrap();
    let mut kept = vec![next_shared(&env).await];
    let started = Instant::now();
    while robot.handle.stats().shared_memory.exhausted == 0 || is_shared(kept.last().unwrap()) {
        kept.push(env.next_obs(TEST_TIMEOUT).await.unwrap());
        assert!(started.elapsed() < TEST_TIMEOUT && is_whole(kept.last().unwrap()));
    }
    assert!(kept.iter().all(|obs| is_whole(obs)), "no kept observation was overwritten");
    drop(kept);
    next_shared(&env).await;
}

/// A client in a process of its own that checks every observation and prints what it finds.
struct Reader {
    process: Process,
    lines: std::io::Lines<BufReader<ChildStdout>>,
}

/// The address that a [`Reader`]'s process connects to.
const READER_URI: &str = "CHIRAL_TEST_READER_URI";

impl Reader {
    fn start(uri: &str) -> Reader {
        let mut command = Command::new(env::current_exe().unwrap());
        command.args(["--exact", "reader_process", "--ignored", "--nocapture"]).env(READER_URI, uri);
        let mut process = Process::spawn(command.stdout(Stdio::piped()));
        let lines = BufReader::new(process.0.stdout.take().unwrap()).lines();
        Reader { process, lines }
    }

    /// Its next finding. It prints one at least every few milliseconds, and exits after [`TEST_TIMEOUT`].
    fn next(&mut self) -> Option<String> {
        let mut lines = self.lines.by_ref().map_while(Result::ok);
        lines.find_map(|line| line.strip_prefix("reader: ").map(str::to_owned))
    }

    /// Skips its findings until this one. A torn observation fails the test.
    fn wait_until(&mut self, wanted: &str) {
        let found =
            std::iter::from_fn(|| self.next()).find(|found| found == wanted || found.starts_with("torn"));
        assert_eq!(found.as_deref(), Some(wanted));
    }

    fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }
}

#[tokio::test]
#[ignore = "started by other tests"]
async fn reader_process() {
    let Ok(uri) = env::var(READER_URI) else { return };
    let env = client_builder(&uri).connect().await.unwrap();
    env.start_obs_stream(100.0).await.unwrap();
    let started = Instant::now();
    let mut last: Option<Arc<Observation>> = None;
    while started.elapsed() < TEST_TIMEOUT {
        // The last observation is checked again long after it arrived.
        let finding = match env.next_obs(TEST_TIMEOUT).await {
            Err(error) => format!("ended: {error}"),
            Ok(obs) if !is_whole(&obs) => "torn on arrival".to_owned(),
            Ok(_) if last.as_ref().is_some_and(|held| !is_whole(held)) => "torn while held".to_owned(),
            Ok(obs) => {
                let path = if is_shared(&obs) { "shared" } else { "network" };
                last = Some(obs);
                path.to_owned()
            }
        };
        println!("reader: {finding}");
        if finding.starts_with("ended") {
            if last.is_some_and(|held| !is_whole(&held)) {
                println!("reader: torn after the end");
            }
            break;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn killing_50_readers_leaks_no_shared_memory() {
    let robot = PaintedRobot::start();
    Reader::start(&robot.uri).wait_until("shared");
    let mut most = 0;
    for _ in 0..50 {
        let mut reader = Reader::start(&robot.uri);
        reader.wait_until("shared");
        most = most.max(shared_bytes());
        // Dropping kills the reader during its stream.
    }
    assert!(most <= 2 * REGION + BOOKKEEPING, "expected at most two regions, found {most} bytes");
    wait_until("the old region is freed", || shared_bytes() <= REGION + BOOKKEEPING).await;
    Reader::start(&robot.uri).wait_until("shared");
    assert_eq!(robot.handle.stats().shared_memory.exhausted, 0);
    let ends = |event| robot.script.events().iter().filter(|found| **found == event).count();
    wait_until("the robot receives every disconnect", || ends(Event::Disconnected) == 52).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_suspended_for_5_s_reads_whole_observations_or_an_error() {
    let robot = PaintedRobot::start();
    let mut reader = Reader::start(&robot.uri);
    reader.wait_until("shared");
    reader.signal(Signal::STOP);
    let suspended = Instant::now();
    wait_until("the server detects the loss", || robot.script.events().contains(&Event::Disconnected)).await;
    // Meanwhile another reader uses what the server shares.
    let mut other = Reader::start(&robot.uri);
    other.wait_until("shared");
    tokio::time::sleep(Duration::from_secs(5).saturating_sub(suspended.elapsed())).await;
    reader.signal(Signal::CONT);
    let mut findings: Vec<String> = std::iter::from_fn(|| reader.next()).collect();
    assert!(!findings.iter().any(|finding| finding.starts_with("torn")), "{findings:?}");
    assert!(findings.pop().is_some_and(|last| last.starts_with("ended")), "the session ended meanwhile");
    other.wait_until("shared");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_suspended_for_one_second_continues_its_session() {
    let robot = PaintedRobot::start();
    let mut reader = Reader::start(&robot.uri);
    reader.wait_until("shared");
    let counts = || robot.handle.stats().shared_memory;
    let mut used_network = false;
    for _ in 0..10 {
        let before = counts();
        reader.signal(Signal::STOP);
        tokio::time::sleep(Duration::from_millis(1200)).await;
        reader.signal(Signal::CONT);
        // What is late arrives over the network; then the client requests shared memory again.
        wait_until("observations arrive by reference again", || {
            counts().by_reference > before.by_reference + 50
        })
        .await;
        reader.wait_until("shared");
        used_network = counts().by_network > before.by_network;
        // Otherwise no observation was being sent when the reader was suspended.
        if used_network {
            break;
        }
    }
    assert!(used_network);
    assert!(!robot.script.events().contains(&Event::Disconnected));
}
