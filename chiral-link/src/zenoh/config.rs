//! What a Zenoh session is told. Defaults of Zenoh's that would not do are replaced, everything else is left as it is.

use zenoh::Config;

use super::network::NetworkOptions;

/// A neighbour from which nothing comes for so long is lost, in milliseconds; a sign of life is sent four times as often.
const LEASE_MS: u32 = 2_000;
/// Batches of 64 KiB that may wait for the socket; 16 is the most there can be. Fewer, and large messages are slower.
const DATA_QUEUE: u32 = 16;
/// Zenoh closes a connection on which a message could not be sent for so long, in microseconds: long after the lease. Its "for ever" panics.
const WAIT_BEFORE_CLOSE_US: u32 = 60_000_000;
/// For the handshake with a neighbour, in milliseconds.
const OPEN_MS: u32 = 3_000;

/// The configuration of a session: it finds nobody by itself, and talks to whom it is told to.
pub(super) fn config(options: &NetworkOptions) -> zenoh::Result<Config> {
    let mode = if options.listen.is_empty() { "client" } else { "peer" };
    let mut config = Config::default();
    let settings = [
        ("mode", format!("{mode:?}")),
        ("listen/endpoints", format!("{:?}", options.listen)),
        ("connect/endpoints", format!("{:?}", options.connect)),
        // One attempt: who waits for somebody does so by himself, and says so.
        ("connect/timeout_ms", "0".to_owned()),
        ("connect/exit_on_failure", "true".to_owned()),
        ("scouting/multicast/enabled", "false".to_owned()),
        ("scouting/gossip/enabled", "false".to_owned()),
        ("transport/unicast/open_timeout", OPEN_MS.to_string()),
        ("transport/unicast/accept_timeout", OPEN_MS.to_string()),
        ("transport/link/tx/lease", LEASE_MS.to_string()),
        ("transport/link/tx/queue/size/data", DATA_QUEUE.to_string()),
        ("transport/link/tx/queue/congestion_control/block/wait_before_close", WAIT_BEFORE_CLOSE_US.to_string()),
        ("transport/shared_memory/enabled", options.shared_memory.to_string()),
        // Copies what lies elsewhere into shared memory, where it may be overwritten under a slow reader.
        ("transport/shared_memory/transport_optimization/enabled", "false".to_owned()),
    ];
    for (key, value) in settings {
        config.insert_json5(key, &value)?;
    }
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zenoh_knows_every_setting() {
        for listen in [vec![], vec!["tcp/127.0.0.1:0".to_owned()]] {
            let options = NetworkOptions { listen, connect: vec!["tcp/localhost:7447".to_owned()], ..NetworkOptions::default() };
            let config = config(&options).unwrap();
            assert_eq!(config.get_json("transport/link/tx/lease").unwrap(), "2000");
        }
    }

    #[test]
    fn what_is_no_locator_is_refused() {
        assert!(config(&NetworkOptions { listen: vec!["nonsense".to_owned()], ..NetworkOptions::default() }).is_err());
    }
}
