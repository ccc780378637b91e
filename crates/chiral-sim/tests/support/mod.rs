//! What the two-peer tests share: waiting for something without measuring time with it, loopback addresses,
//! clients with the tests' settings. `harness` has the scripted server, `processes` the child
//! processes, `hosts` the network namespaces.

#![allow(
    dead_code,
    missing_docs,
    unreachable_pub,
    reason = "shared by several test binaries, each of which uses its part"
)]
#![allow(clippy::unwrap_used, reason = "helpers of tests, too, fail by panicking")]

pub mod harness;
pub mod hosts;
pub mod processes;

use std::time::{Duration, Instant};

use chiral_client::{PolicyClient, PolicyClientBuilder};
use tokio::time::timeout;

/// How long a test waits for something that must happen. No test measures time with it.
pub const TEST_TIMEOUT: Duration = Duration::from_secs(20);

/// Returns a loopback address that was free a moment ago, for listeners that do not report their port.
pub fn free_address() -> String {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

/// Like [`free_address`], as a Zenoh locator.
pub fn free_locator() -> String {
    format!("tcp/{}", free_address())
}

/// A client that logs nothing and gives up connecting after [`TEST_TIMEOUT`].
pub fn client_builder(uri: impl std::fmt::Display) -> PolicyClientBuilder {
    PolicyClient::builder(&uri.to_string()).quiet().deadline(TEST_TIMEOUT)
}

/// Polls until `condition` holds.
pub async fn wait_until(what: &str, condition: impl FnMut() -> bool) {
    wait_until_or_show(what, condition, String::new).await;
}

/// Like [`wait_until`]; a timeout also shows `details`.
pub async fn wait_until_or_show(
    what: &str,
    mut condition: impl FnMut() -> bool,
    details: impl Fn() -> String,
) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < TEST_TIMEOUT, "timed out waiting until {what}: {}", details());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Runs a future that must finish soon.
pub async fn in_time<T>(future: impl Future<Output = T>) -> T {
    timeout(TEST_TIMEOUT, future).await.expect("the future finishes before the test times out")
}
