//! What must hold of observations in memory that two processes share: nobody copies them, nobody tears them,
//! and no peer's end costs memory for ever.
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

use chiral_client::{Observation, PolicyClient, PolicyClientBuilder};
use chiral_proto::CameraSpec;
use chiral_server::{CameraFrame, PolicyServer, Sensors, ServerHandle};
use nalgebra::Matrix3;
use rustix::process::Signal;
use support::harness::{self, Event, Script, ScriptedRobot};
use support::processes::{GUARD, Process, free_address, until};

const HEIGHT: usize = 240;
const WIDTH: usize = 320;
/// Pixels and depth of two cameras, eight times, are a region; with what Zenoh needs besides.
const REGION: usize = 8 * 2 * HEIGHT * WIDTH * 7 + (1 << 20);
/// Of Zenoh's own, for what it notes about its memory.
const BESIDES: usize = 4 << 20;

/// A robot whose every picture is of one level, which its K and its depth say, too.
struct Painter {
    uri: String,
    script: Arc<Script>,
    handle: ServerHandle,
    is_over: Arc<AtomicBool>,
}

impl Painter {
    fn start() -> Painter {
        let uri = format!("tcp/{}", free_address());
        let sensors =
            Sensors::new(["left", "right"].map(|name| CameraSpec::rgbd(name, HEIGHT, WIDTH)), []).unwrap();
        let (script, is_over) = (Arc::<Script>::default(), Arc::<AtomicBool>::default());
        let builder = PolicyServer::builder(ScriptedRobot(Arc::clone(&script)), sensors.clone());
        let server = builder.name("painter").listen_zenoh(&uri).discovery(false).build().unwrap();
        let handle = server.handle();
        tokio::spawn(server.serve());
        let over = Arc::clone(&is_over);
        thread::spawn(move || {
            for level in (1..=250_u8).cycle() {
                if over.load(Ordering::Relaxed) {
                    break;
                }
                paint(&sensors, level);
                thread::sleep(Duration::from_millis(5));
            }
        });
        Painter { uri, script, handle, is_over }
    }

    fn builder(&self) -> PolicyClientBuilder {
        PolicyClient::builder(&self.uri).quiet().deadline(GUARD)
    }
}

impl Drop for Painter {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
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

/// Whether each camera is one instant.
fn is_whole(obs: &Observation) -> bool {
    obs.cameras.iter().all(|camera| {
        let level = camera.intrinsics[(0, 0)] as u8;
        let depth = camera.depth.as_ref().unwrap().data();
        let is_of_level = |depth: &[u8]| f32::from_le_bytes(depth.try_into().unwrap()) == f32::from(level);
        camera.image.data().iter().all(|pixel| *pixel == level) && depth.chunks(4).all(is_of_level)
    })
}

/// Where Zenoh's shared memory lies in this process.
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

/// Bytes of it.
fn shared_bytes() -> usize {
    mapped().iter().map(ExactSizeIterator::len).sum()
}

fn is_shared(obs: &Observation) -> bool {
    let mapped = mapped();
    let tensors = obs.cameras.iter().flat_map(|camera| [&camera.image, camera.depth.as_ref().unwrap()]);
    let lies = |address: usize| mapped.iter().any(|range| range.contains(&address));
    tensors.into_iter().all(|tensor| lies(tensor.data().as_ptr().addr()))
}

/// The next observation that has come by reference.
async fn next_shared(env: &PolicyClient) -> Arc<Observation> {
    let began = Instant::now();
    loop {
        let obs = env.next_obs(GUARD).await.unwrap();
        assert!(is_whole(&obs));
        if is_shared(&obs) {
            return obs;
        }
        assert!(began.elapsed() < GUARD, "none is in shared memory");
    }
}

#[tokio::test]
async fn pixels_are_read_where_the_sensors_wrote_them() {
    let painter = Painter::start();
    let env = painter.builder().connect().await.unwrap();
    let began = Instant::now();
    while !is_shared(&env.get_obs().await.unwrap()) {
        assert!(began.elapsed() < GUARD);
    }
    let before = painter.handle.stats().shared_memory;
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
        let obs = env.next_obs(GUARD).await.unwrap();
        assert!(is_whole(&obs) && is_shared(&obs));
    }
    let after = painter.handle.stats().shared_memory;
    assert_eq!((after.by_network, after.exhausted), (before.by_network, before.exhausted));
    assert!(after.by_reference >= before.by_reference + 42);
    env.close().await.unwrap();
    assert!(is_whole(&obs) && is_whole(&stepped.obs), "they outlive the session");
}

#[tokio::test]
async fn a_client_that_wants_none_gets_the_same_by_the_network() {
    let painter = Painter::start();
    let env = painter.builder().shared_memory(false).connect().await.unwrap();
    env.start_obs_stream(50.0).await.unwrap();
    for _ in 0..20 {
        let obs = env.next_obs(GUARD).await.unwrap();
        assert!(is_whole(&obs) && !is_shared(&obs));
    }
    let counts = painter.handle.stats().shared_memory;
    assert_eq!(counts.by_reference, 0);
    assert!(counts.by_network >= 20);
}

#[tokio::test]
async fn where_the_room_ends_the_network_takes_over_and_gives_back() {
    let painter = Painter::start();
    let env = painter.builder().connect().await.unwrap();
    env.start_obs_stream(100.0).await.unwrap();
    let mut kept = vec![next_shared(&env).await];
    let began = Instant::now();
    while painter.handle.stats().shared_memory.exhausted == 0 || is_shared(kept.last().unwrap()) {
        kept.push(env.next_obs(GUARD).await.unwrap());
        assert!(began.elapsed() < GUARD && is_whole(kept.last().unwrap()));
    }
    assert!(kept.iter().all(|obs| is_whole(obs)), "not one was written over");
    drop(kept);
    next_shared(&env).await;
}

/// A client that looks at every observation and says what it finds, in a process of its own.
struct Reader {
    process: Process,
    lines: std::io::Lines<BufReader<ChildStdout>>,
}

/// Where the process of a [`Reader`] connects to.
const READS: &str = "CHIRAL_TEST_READS";

impl Reader {
    fn start(uri: &str) -> Reader {
        let mut command = Command::new(env::current_exe().unwrap());
        command.args(["--exact", "a_readers_process", "--ignored", "--nocapture"]).env(READS, uri);
        let mut process = Process::spawn(command.stdout(Stdio::piped()));
        let lines = BufReader::new(process.0.stdout.take().unwrap()).lines();
        Reader { process, lines }
    }

    /// Its next word. It says one at least every few milliseconds, and ends after [`GUARD`].
    fn next(&mut self) -> Option<String> {
        let mut words = self.lines.by_ref().map_while(Result::ok);
        words.find_map(|line| line.strip_prefix("reader: ").map(str::to_owned))
    }

    /// Reads on until it says this; nothing else may be found but whole observations.
    fn until(&mut self, word: &str) {
        let found =
            std::iter::from_fn(|| self.next()).find(|found| found == word || found.starts_with("torn"));
        assert_eq!(found.as_deref(), Some(word));
    }

    fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }
}

#[tokio::test]
#[ignore = "the process of a reader, started by other tests"]
async fn a_readers_process() {
    let Ok(uri) = env::var(READS) else { return };
    let env = PolicyClient::builder(&uri).quiet().deadline(GUARD).connect().await.unwrap();
    env.start_obs_stream(100.0).await.unwrap();
    let began = Instant::now();
    let mut last: Option<Arc<Observation>> = None;
    while began.elapsed() < GUARD {
        // What is held is looked at again, long after it has come.
        let word = match env.next_obs(GUARD).await {
            Err(error) => format!("ended: {error}"),
            Ok(obs) if !is_whole(&obs) => "torn as it came".to_owned(),
            Ok(_) if last.as_ref().is_some_and(|held| !is_whole(held)) => "torn while it was held".to_owned(),
            Ok(obs) => {
                let word = if is_shared(&obs) { "shared" } else { "network" };
                last = Some(obs);
                word.to_owned()
            }
        };
        println!("reader: {word}");
        if word.starts_with("ended") {
            if last.is_some_and(|held| !is_whole(&held)) {
                println!("reader: torn after the end");
            }
            break;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_killed_50_times_leave_shared_memory_as_it_was() {
    let painter = Painter::start();
    Reader::start(&painter.uri).until("shared");
    let mut most = 0;
    for _ in 0..50 {
        let mut reader = Reader::start(&painter.uri);
        reader.until("shared");
        most = most.max(shared_bytes());
        // In the midst of its stream: dropping kills.
    }
    assert!(most <= 2 * REGION + BESIDES, "{most} bytes are more than two regions");
    until("the old region goes", || shared_bytes() <= REGION + BESIDES).await;
    Reader::start(&painter.uri).until("shared");
    assert_eq!(painter.handle.stats().shared_memory.exhausted, 0);
    let ends = |event| painter.script.events().iter().filter(|found| **found == event).count();
    until("every end is told to the robot", || ends(Event::Disconnected) == 52).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_stopped_for_5_s_reads_whole_observations_or_an_error() {
    let painter = Painter::start();
    let mut reader = Reader::start(&painter.uri);
    reader.until("shared");
    reader.signal(Signal::STOP);
    let stopped = Instant::now();
    until("the robot's side notices", || painter.script.events().contains(&Event::Disconnected)).await;
    // Other readers use what the server shares meanwhile.
    let mut other = Reader::start(&painter.uri);
    other.until("shared");
    tokio::time::sleep(Duration::from_secs(5).saturating_sub(stopped.elapsed())).await;
    reader.signal(Signal::CONT);
    let mut words: Vec<String> = std::iter::from_fn(|| reader.next()).collect();
    assert!(!words.iter().any(|word| word.starts_with("torn")), "{words:?}");
    assert!(words.pop().is_some_and(|last| last.starts_with("ended")), "the session was lost meanwhile");
    other.until("shared");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_stopped_for_a_second_goes_on() {
    let painter = Painter::start();
    let mut reader = Reader::start(&painter.uri);
    reader.until("shared");
    let counts = || painter.handle.stats().shared_memory;
    let mut was_lost = false;
    for _ in 0..10 {
        let before = counts();
        reader.signal(Signal::STOP);
        tokio::time::sleep(Duration::from_millis(1200)).await;
        reader.signal(Signal::CONT);
        // What did not arrive in time comes by the network, and then shared memory is asked for anew.
        until("references again", || counts().by_reference > before.by_reference + 50).await;
        reader.until("shared");
        was_lost = counts().by_network > before.by_network;
        // Otherwise nothing was on its way to it when it was stopped.
        if was_lost {
            break;
        }
    }
    assert!(was_lost);
    assert!(!painter.script.events().contains(&Event::Disconnected));
}
