//! Hosts that tests make: network namespaces with a /dev/shm of their own, which end with the processes in
//! them, and cables between them. A process is on one host: a test runs itself again on the robot's host, and
//! starts other processes on theirs.

use std::{
    env, fs,
    future::Future,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use chiral_client::Timestamp;

use super::{TEST_TIMEOUT, processes::Process};

/// Set while a test runs in its namespace; on the policy's host it is the robot's address.
pub const INSIDE: &str = "CHIRAL_TEST_NAMESPACE";
/// A limit of a link's rate, to find out whether there can be one.
const LINK_LIMIT: &str = "tbf rate 100mbit burst 64kb latency 200ms";

/// Encodes the time as an action. Each value holds 16 bits exactly.
pub fn encode_time(now: Timestamp) -> [f32; 7] {
    let part = |shift: u32| ((now.0 >> shift) & 0xffff) as f32;
    [part(0), part(16), part(32), part(48), 0.0, 0.0, 0.0]
}

pub fn decode_time(row: &[f32]) -> Timestamp {
    Timestamp((0..4).map(|i| (row[i] as i64) << (16 * i)).sum())
}

/// Runs `check` in the robot's namespace. For that the test starts itself again there.
pub fn in_namespace(test: &str, check: impl Future<Output = ()>) {
    if env::var_os(INSIDE).is_some() {
        return tokio::runtime::Runtime::new().unwrap().block_on(check);
    }
    for required in
        ["ip link add here type veth peer name there", &format!("tc qdisc add dev lo root {LINK_LIMIT}")]
    {
        let tried = on_a_new_host(required.split(' ')).output();
        if !tried.as_ref().is_ok_and(|output| output.status.success()) {
            return println!("skipped: `{required}` fails in a new network namespace: {tried:?}");
        }
    }
    let this_test = env::current_exe().unwrap();
    run(on_a_new_host([this_test.to_str().unwrap(), "--exact", test, "--include-ignored", "--nocapture"])
        .env(INSIDE, "robot"));
}

/// A program in new namespaces. They have no shared memory in common, so that Zenoh cannot use any.
pub fn on_a_new_host<'a>(program: impl IntoIterator<Item = &'a str>) -> Command {
    let mut command = Command::new("unshare");
    command
        .args(["--net", "--mount", "sh", "-c", "mount -t tmpfs none /dev/shm && exec \"$@\"", "sh"])
        .args(program);
    command
}

pub fn run(command: &mut Command) {
    let status = command.status().unwrap();
    assert!(status.success(), "{command:?}: {status}");
}

/// A host: this process's own, or another, which exists as long as its process.
pub struct Host(pub Option<Process>);

impl Host {
    pub fn new() -> Host {
        const PROGRAM: &str = "sleep";
        let process = Process::spawn(&mut on_a_new_host([PROGRAM, "600"]));
        let (name, started) = (format!("/proc/{}/comm", process.0.id()), Instant::now());
        while fs::read_to_string(&name).unwrap().trim() != PROGRAM {
            assert!(started.elapsed() < TEST_TIMEOUT, "timed out waiting for the namespace");
            thread::sleep(Duration::from_millis(1));
        }
        Host(Some(process))
    }

    /// A program on this host.
    pub fn command(&self, program: &str) -> Command {
        let Some(process) = &self.0 else { return Command::new(program) };
        let mut command = Command::new("nsenter");
        command.args(["--net", "--mount", "--target", &process.0.id().to_string(), program]);
        command
    }

    pub fn ip(&self, arguments: &str) {
        run(self.command("ip").args(arguments.split(' ')));
    }

    /// Connects two hosts with a cable; each end gets this name and address.
    pub fn connect(
        &self,
        (name, address): (&str, &str),
        other: &Host,
        (other_name, other_address): (&str, &str),
    ) {
        let namespace = other.0.as_ref().unwrap().0.id();
        self.ip(&format!("link add {name} type veth peer name {other_name} netns {namespace}"));
        for (host, name, address) in [(self, name, address), (other, other_name, other_address)] {
            host.ip(&format!("addr add {address}/24 dev {name}"));
            host.ip(&format!("link set {name} up"));
        }
    }
}
