//! Servers embedded in a host's own HTTP application, with requests over plain TCP as a browser or a load
//! balancer sends them.
#![cfg(feature = "websocket")]
#![allow(clippy::unwrap_used, reason = "test helpers fail by panicking")]

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use axum::{Router, routing::get};
use chiral_server::{
    ActionContext, ActionSpec, PolicyServer, ResetOutcome, ResetRequest, Robot, RobotError, Sensors,
    ServerHandle, action::Action,
};
use tokio::{net::TcpListener, runtime::Runtime};

struct Still {
    broken: bool,
}

impl Robot for Still {
    fn action_spec(&self) -> ActionSpec {
        ActionSpec::joint_positions(1, 10.0)
    }

    fn reset(&mut self, _request: &ResetRequest) -> Result<ResetOutcome, RobotError> {
        Ok(ResetOutcome::default())
    }

    fn apply_action(&mut self, _action: &Action, _context: &ActionContext) -> Result<(), RobotError> {
        Ok(())
    }

    fn on_disconnect(&mut self) {
        assert!(!self.broken, "no encoder responds");
    }
}

/// A host with two robots, the right one out of service.
struct Host {
    runtime: Runtime,
    address: SocketAddr,
    left: ServerHandle,
    right: ServerHandle,
}

impl Host {
    fn start() -> Host {
        let server = |broken| PolicyServer::new(Still { broken }, Sensors::new([], []).unwrap()).unwrap();
        let (left, right) = (server(false), server(true));
        let handles = (left.handle(), right.handle());
        let app = Router::new()
            .route("/healthz", get(|| async { "the host is up\n" }))
            .nest("/robot/left", left.health_router().merge(left.into_router()))
            .nest("/robot/right", right.health_router().merge(right.into_router()));
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        runtime.spawn(async { axum::serve(listener, app).await.unwrap() });
        let host = Host { runtime, address, left: handles.0, right: handles.1 };
        host.break_the_right_robot();
        host
    }

    /// A legacy client connects and is gone, which is too much for the right robot.
    fn break_the_right_robot(&self) {
        let mut client = TcpStream::connect(self.address).unwrap();
        let mut request = format!("GET /robot/right HTTP/1.1\r\nHost: {}\r\n", self.address);
        for header in ["Connection: upgrade", UPGRADE[1], UPGRADE[2], UPGRADE[3]] {
            request += &format!("{header}\r\n");
        }
        client.write_all((request + "\r\n").as_bytes()).unwrap();
        assert!(client.read(&mut [0; 1024]).unwrap() > 0, "the upgrade's response");
        drop(client);
        let started = Instant::now();
        while self.right.stats().out_of_service.is_none() {
            assert!(started.elapsed() < Duration::from_secs(60), "the right robot is still in service");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Requests a path, and checks the status of the response and that it contains `text`.
    #[track_caller]
    fn check(&self, path: &str, headers: &[&str], status: u16, text: &str) {
        let mut request = format!("GET {path} HTTP/1.1\r\nHost: {}\r\n", self.address);
        for header in headers {
            request += &format!("{header}\r\n");
        }
        let mut connection = TcpStream::connect(self.address).unwrap();
        connection.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        connection.write_all((request + "\r\n").as_bytes()).unwrap();
        let mut response = String::new();
        connection.read_to_string(&mut response).unwrap();
        assert!(
            response.starts_with(&format!("HTTP/1.1 {status} ")),
            "{path}: expected status {status}, found {response}"
        );
        assert!(response.contains(text), "{path}: expected {text:?}, found {response}");
    }
}

const PLAIN: &[&str] = &["Connection: close"];

/// The headers of a browser's upgrade request, with a close, so that a server that declines closes the
/// connection after its response.
const UPGRADE: &[&str] = &[
    "Connection: upgrade, close",
    "Upgrade: websocket",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
];

#[test]
fn one_host_embeds_two_servers() {
    let host = Host::start();
    host.check("/healthz", PLAIN, 200, "the host is up\n");
    host.check("/robot/left/healthz", PLAIN, 200, "\r\n\r\nok\n");
    host.check(
        "/robot/right/healthz",
        PLAIN,
        503,
        "the robot panicked in on_disconnect and is out of service: no encoder responds\n",
    );
    for path in ["/robot/left", "/robot/right"] {
        host.check(path, PLAIN, 426, "this is a Chiral policy server: connect with a PolicyClient");
        let foreign = [UPGRADE, &["Sec-WebSocket-Protocol: mqtt"]].concat();
        host.check(path, &foreign, 400, "expected WebSocket subprotocol chiral.v1");
    }
    host.check("/robot", PLAIN, 404, "");
}

#[test]
fn the_host_goes_on_after_its_servers_shut_down() {
    let host = Host::start();
    host.runtime.block_on(host.left.shutdown_and_wait());
    host.check("/healthz", PLAIN, 200, "the host is up\n");
}
