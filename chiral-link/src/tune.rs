//! What a TCP socket should be told before frames go over it.

use std::net::SocketAddr;

use rustix::{fd::AsFd, net::sockopt};

/// Sends at once what is to be sent; and between two processes of one host does without a congestion control made for networks (BBR takes 2.5 times as
/// long there as Reno). As far as the system allows: a socket that refuses works all the same.
pub fn tune(socket: &impl AsFd, peer: SocketAddr) {
    let _ = sockopt::set_tcp_nodelay(socket, true);
    #[cfg(target_os = "linux")]
    if peer.ip().to_canonical().is_loopback() {
        let _ = sockopt::set_tcp_congestion(socket, "reno");
    }
}
