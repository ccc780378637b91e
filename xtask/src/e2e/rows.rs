//! The rows of `cargo xtask e2e` as data: links, robots and clients, and how their programs are started.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;

use super::report::RowSpec;
use crate::command;

/// How robot and client connect.
pub(super) struct Link {
    pub(super) transport: &'static str,
    /// The transport that the policy reports: it knows its address, but not shared memory or routers.
    pub(super) reported: &'static str,
    /// Whether a Zenoh router listens at the address and the robot joins it there.
    pub(super) is_routed: bool,
    /// Text that the robot's log must contain.
    pub(super) logged: Option<&'static str>,
    /// The arguments of `chiral-sim serve`.
    pub(super) serve: fn(SocketAddr) -> Vec<String>,
    /// The address that the client is given.
    pub(super) uri: fn(SocketAddr) -> String,
}

/// A robot program.
pub(super) struct Robot {
    pub(super) name: &'static str,
    /// How long each reset takes, in seconds. With a long reset only one episode is played.
    pub(super) homing: u32,
    pub(super) command: fn(&Programs, &Link, SocketAddr) -> Command,
}

/// A client program, which drives the robot and prints a [`Report`](super::report::Report).
pub(super) struct Client {
    pub(super) name: &'static str,
    /// The command with the robot's address. Arguments that all clients share are added by the caller.
    pub(super) command: fn(&Programs, &str, &RowSpec) -> Command,
}

/// A group of rows: each client in each mode over each link.
pub(super) struct Rows {
    pub(super) codec: &'static str,
    pub(super) links: &'static [&'static Link],
    pub(super) robot: &'static Robot,
    pub(super) clients: &'static [&'static Client],
    pub(super) modes: &'static [&'static str],
}

/// Where the programs are.
pub(super) struct Programs {
    /// The directory with cargo's binaries.
    pub(super) built: PathBuf,
    /// A Python interpreter with the packages that the Python peers need.
    pub(super) python: PathBuf,
}

/// The seed of the first episode of every row.
pub(super) const SEED: u32 = 1;

pub(super) const ROWS: &[Rows] = &[
    Rows {
        codec: "protobuf",
        links: &[&WEBSOCKET, &ZENOH_TCP, &ZENOH_SHM, &ZENOH_ROUTER],
        robot: &RUST,
        clients: &[&ASYNC, &BLOCKING],
        modes: &["stream", "step"],
    },
    Rows {
        codec: "msgpack",
        links: &[&WEBSOCKET, &ZENOH_TCP],
        robot: &RUST,
        clients: &[&PYTHON],
        modes: &["stream", "step"],
    },
    // Neither the client, the robot nor the router gives up on a long reset.
    Rows {
        codec: "protobuf",
        links: &[&ZENOH_ROUTER],
        robot: &RUST_HOMING_LONG,
        clients: &[&BLOCKING],
        modes: &["step"],
    },
    // Pings must be answered while the robot homes.
    Rows {
        codec: "msgpack",
        links: &[&WEBSOCKET],
        robot: &RUST_HOMING_LONGER,
        clients: &[&PYTHON],
        modes: &["step"],
    },
    // This robot has no `step`: the client emulates it.
    Rows {
        codec: "msgpack",
        links: &[&WEBSOCKET, &ZENOH_TCP],
        robot: &PYTHON_STREAMING,
        clients: &[&ASYNC, &BLOCKING],
        modes: &["stream", "step"],
    },
    // This robot cannot stream.
    Rows {
        codec: "msgpack",
        links: &[&WEBSOCKET, &ZENOH_TCP],
        robot: &PYTHON_GYM,
        clients: &[&ASYNC, &BLOCKING],
        modes: &["step"],
    },
];

const WEBSOCKET: Link = Link {
    transport: "websocket",
    reported: "websocket",
    is_routed: false,
    logged: None,
    serve: |address| vec!["--bind".to_owned(), address.to_string()],
    uri: |address| format!("ws://{address}"),
};

const ZENOH_TCP: Link = Link {
    transport: "zenoh-tcp",
    reported: "zenoh-tcp",
    is_routed: false,
    logged: None,
    serve: |address| {
        vec![
            "--zenoh".to_owned(),
            format!("tcp/{address}"),
            "--legacy-zenoh".to_owned(),
            "--no-shared-memory".to_owned(),
        ]
    },
    uri: |address| format!("tcp/{address}"),
};

const ZENOH_SHM: Link = Link {
    transport: "zenoh-shm",
    reported: "zenoh-tcp",
    is_routed: false,
    logged: Some("travel by shared memory"),
    serve: |address| vec!["--zenoh".to_owned(), format!("tcp/{address}"), "--no-discovery".to_owned()],
    uri: |address| format!("tcp/{address}"),
};

const ZENOH_ROUTER: Link = Link {
    transport: "zenoh-router",
    reported: "zenoh-tcp",
    is_routed: true,
    logged: None,
    serve: |address| vec!["--zenoh-join".to_owned(), format!("tcp/{address}")],
    uri: |address| format!("tcp/{address}"),
};

const RUST: Robot = Robot {
    name: "rust",
    homing: 0,
    command: |programs, link, address| robot(programs, (link.serve)(address)),
};
const RUST_HOMING_LONG: Robot = Robot {
    name: "rust-homing",
    homing: HOMING_LONG,
    command: |programs, link, address| homing_robot(programs, (link.serve)(address), HOMING_LONG),
};
const RUST_HOMING_LONGER: Robot = Robot {
    name: "rust-homing",
    homing: HOMING_LONGER,
    command: |programs, link, address| homing_robot(programs, (link.serve)(address), HOMING_LONGER),
};
const PYTHON_STREAMING: Robot = Robot {
    name: "python-streaming",
    homing: 0,
    command: |programs, link, address| robot_in_python(programs, &(link.uri)(address), "streaming"),
};
const PYTHON_GYM: Robot = Robot {
    name: "python-gym",
    homing: 0,
    command: |programs, link, address| robot_in_python(programs, &(link.uri)(address), "gym"),
};

const ASYNC: Client = Client { name: "async", command: policy_in_rust };
const BLOCKING: Client = Client { name: "blocking", command: policy_in_rust };
const PYTHON: Client = Client { name: "python", command: policy_in_python };

/// Longer than Zenoh's timeout for queries, 10 s.
const HOMING_LONG: u32 = 15;
/// Longer than two ping periods of a legacy client during a reset, which are 20 s each.
const HOMING_LONGER: u32 = 45;

pub(super) fn robot(programs: &Programs, link: Vec<String>) -> Command {
    let mut command = Command::new(programs.built.join("chiral-sim"));
    // Level info logs which way observations travel.
    command
        .arg("serve")
        .args(link)
        .args(["--width", "160", "--height", "120"])
        .env("RUST_LOG", "info,zenoh=error");
    command
}

fn homing_robot(programs: &Programs, link: Vec<String>, seconds: u32) -> Command {
    robot(programs, [link, vec![format!("--homing={seconds}")]].concat())
}

pub(super) fn router(programs: &Programs, address: SocketAddr) -> Command {
    let mut command = Command::new(programs.built.join("chiral-sim"));
    command.args(["router", "--listen", &format!("tcp/{address}")]);
    command
}

fn policy_in_rust(programs: &Programs, uri: &str, spec: &RowSpec) -> Command {
    let mut command = Command::new(programs.built.join("chiral-sim"));
    command.arg("policy").arg(uri).args(["--mode", spec.mode, "--client", spec.client]);
    command
}

fn policy_in_python(programs: &Programs, uri: &str, spec: &RowSpec) -> Command {
    let generation = if spec.mode == "stream" { "streaming" } else { "gym" };
    peer_in_python(programs, "client.py", uri, generation)
}

fn robot_in_python(programs: &Programs, uri: &str, generation: &str) -> Command {
    let mut command = peer_in_python(programs, "server.py", uri, generation);
    command.args(["--seed", &SEED.to_string()]);
    command
}

fn peer_in_python(programs: &Programs, script: &str, uri: &str, generation: &str) -> Command {
    let mut command = Command::new(&programs.python);
    command.arg(command::root().join("tests/peers").join(script)).args([uri, "--generation", generation]);
    command
}
