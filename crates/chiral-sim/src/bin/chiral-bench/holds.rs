//! Stops policies while the arm moves, and makes them hang, again and again: how long after the last row does
//! the robot hold?

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use chiral_client::blocking::PolicyClient;
use chiral_proto::{Codec, action::Action};
use chiral_server::{
    ActionContext, ActionSpec, PolicyServer, ResetOutcome, ResetRequest, Robot, RobotError, Sensors,
    ServerHandle,
};
use rustix::process::{Pid, Signal, kill_process};

const CONTROL_HZ: f64 = 50.0;
/// The server's default.
const COMMAND_TIMEOUT: Duration = Duration::from_millis(500);
/// The most that a hold may take longer.
const TOLERANCE: Duration = Duration::from_millis(20);
/// Rows that the arm moves before it is stopped.
const ROWS_BEFORE: usize = 10;
/// For a row or a hold; only a robot that hangs takes as long.
const TIMEOUT: Duration = Duration::from_secs(20);
const JOINTS: usize = 7;

/// What the robot was called for, and when.
enum Call {
    Row(Instant),
    Hold(Instant),
}

/// Reports its calls, and moves nothing.
struct ReportingRobot(Sender<Call>);

impl Robot for ReportingRobot {
    fn action_spec(&self) -> ActionSpec {
        ActionSpec::joint_positions(JOINTS, CONTROL_HZ)
    }

    fn reset(&mut self, _request: &ResetRequest) -> Result<ResetOutcome, RobotError> {
        Ok(ResetOutcome::default())
    }

    fn apply_action(&mut self, _action: &Action, _context: &ActionContext) -> Result<(), RobotError> {
        self.0.send(Call::Row(Instant::now()))?;
        Ok(())
    }

    fn hold(&mut self) {
        // Fails if the soak is over.
        let _ = self.0.send(Call::Hold(Instant::now()));
    }
}

/// How a policy is interrupted.
#[derive(Clone, Copy)]
enum Interruption {
    /// Its process is stopped (SIGSTOP), and continued after the hold.
    Stop,
    /// Its own thread sleeps, while the client's threads go on pinging.
    Hang,
}

/// How a policy is connected.
struct Way {
    name: &'static str,
    uri: String,
    is_legacy: bool,
}

pub(crate) fn run(stops: u32, hangs: u32) -> Result<()> {
    let (sender, calls) = channel();
    let handle = PolicyServer::builder(ReportingRobot(sender), Sensors::new([], [])?)
        .name("soak")
        .bind(([127, 0, 0, 1], 0))
        .listen_zenoh("tcp/127.0.0.1:0")
        .discovery(false)
        .legacy_zenoh(true)
        .command_timeout(COMMAND_TIMEOUT)
        .build()?
        .start()?;
    let ways = ways(&handle)?;
    let each = |count: u32| count.div_ceil(ways.len() as u32);
    let mut worst = Duration::ZERO;
    for way in &ways {
        for (interruption, count, what) in
            [(Interruption::Stop, each(stops), "SIGSTOP"), (Interruption::Hang, each(hangs), "a hung policy")]
        {
            let largest = interrupt(way, interruption, count, &calls)?;
            println!(
                "{}, {what}, {count} times: the robot held at most {:.1} ms after the last row, its period and \
                 the command timeout",
                way.name,
                largest.as_secs_f64() * 1e3
            );
            worst = worst.max(largest);
        }
    }
    handle.shutdown();
    ensure!(worst <= TOLERANCE, "expected every hold within {TOLERANCE:?}, found {worst:?}");
    Ok(())
}

fn ways(handle: &ServerHandle) -> Result<[Way; 4]> {
    let websocket = handle.local_addr().context("the server listens on no address")?;
    let websocket = format!("ws://{websocket}");
    let locators = handle.zenoh_locators();
    let zenoh = locators.into_iter().next().context("the server listens on no locator")?;
    Ok([
        Way { name: "WebSocket", uri: websocket.clone(), is_legacy: false },
        Way { name: "WebSocket, legacy wire", uri: websocket, is_legacy: true },
        Way { name: "Zenoh", uri: zenoh.clone(), is_legacy: false },
        Way { name: "Zenoh, legacy wire", uri: zenoh, is_legacy: true },
    ])
}

/// Interrupts a policy so many times. Returns the largest time from when a hold was due to the hold.
fn interrupt(way: &Way, interruption: Interruption, count: u32, calls: &Receiver<Call>) -> Result<Duration> {
    let mut policy = Policy::start(way)?;
    let mut largest = Duration::ZERO;
    for i in 0..count {
        let mut last_row = None;
        for _ in 0..ROWS_BEFORE {
            last_row = Some(next_row(calls)?);
        }
        // At another phase of the control period each time.
        sleep(Duration::from_micros(u64::from(i) * 7919 % 20_000));
        policy.interrupt(interruption)?;
        let interrupted_at = Instant::now();
        let (held_at, last_row) = loop {
            ensure!(interrupted_at.elapsed() < TIMEOUT, "the policy goes on although it was interrupted");
            match calls.recv_timeout(TIMEOUT).context("waiting for the robot to hold")? {
                Call::Row(at) => last_row = Some(at),
                Call::Hold(at) => break (at, last_row.context("the robot held without a row")?),
            }
        };
        let due_at = last_row + Duration::from_secs_f64(1.0 / CONTROL_HZ) + COMMAND_TIMEOUT;
        largest = largest.max(held_at.saturating_duration_since(due_at));
        policy.go_on(interruption)?;
    }
    drop(policy);
    // The hold for the loss of the controller.
    while let Call::Row(_) = calls.recv_timeout(TIMEOUT).context("waiting for the last hold")? {}
    Ok(largest)
}

/// The next row that is applied, after a hold too.
fn next_row(calls: &Receiver<Call>) -> Result<Instant> {
    loop {
        if let Call::Row(at) = calls.recv_timeout(TIMEOUT).context("waiting for a row")? {
            return Ok(at);
        }
    }
}

/// A policy in a process of its own, which ends with this value.
struct Policy {
    child: Child,
    stdin: ChildStdin,
}

impl Policy {
    fn start(way: &Way) -> Result<Policy> {
        let program = std::env::current_exe().context("finding this program")?;
        let mut child = Command::new(program)
            .args(["hanging-policy", &way.uri])
            .args(way.is_legacy.then_some("--legacy"))
            .stdin(Stdio::piped())
            .spawn()
            .context("starting a policy")?;
        let stdin = child.stdin.take().context("the policy has no stdin")?;
        Ok(Policy { child, stdin })
    }

    fn interrupt(&mut self, interruption: Interruption) -> Result<()> {
        match interruption {
            Interruption::Stop => self.signal(Signal::STOP),
            Interruption::Hang => writeln!(self.stdin).context("making the policy hang"),
        }
    }

    fn go_on(&mut self, interruption: Interruption) -> Result<()> {
        match interruption {
            Interruption::Stop => self.signal(Signal::CONT),
            Interruption::Hang => writeln!(self.stdin).context("letting the policy go on"),
        }
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        kill_process(Pid::from_child(&self.child), signal).context("signalling the policy")
    }
}

impl Drop for Policy {
    fn drop(&mut self) {
        // Fails only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Drives the robot at its rate. A line on stdin makes its thread hang until the next line; the end of stdin
/// ends it.
pub(crate) fn policy(uri: &str, is_legacy: bool) -> Result<()> {
    let codec = if is_legacy { Codec::Msgpack } else { Codec::Protobuf };
    let client = PolicyClient::builder(uri).codec(codec).quiet().connect_blocking()?;
    client.reset()?;
    client.start_action_dispatch(CONTROL_HZ)?;
    let (sender, lines) = channel();
    thread::spawn(move || {
        for line in BufReader::new(std::io::stdin()).lines() {
            if line.is_err() || sender.send(()).is_err() {
                return;
            }
        }
    });
    loop {
        match lines.try_recv() {
            Err(TryRecvError::Empty) => {}
            Ok(()) => lines.recv().context("the soak is over")?,
            Err(TryRecvError::Disconnected) => return Ok(()),
        }
        // One row at a time, so that nothing is queued when the policy hangs.
        while client.stats().actions_queued > 0 {
            // Fails once the session has ended.
            client.latest_obs()?;
            sleep(Duration::from_millis(1));
        }
        client.put_action([0.0; JOINTS]).context("queueing a row")?;
    }
}
