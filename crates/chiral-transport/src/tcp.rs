//! What a TCP socket should be told before frames go over it.

use std::{net::SocketAddr, time::Duration};

use socket2::SockRef;
use tokio::net::TcpStream;

/// So much may wait in the socket without having been sent. More would only be older pixels when its turn
/// comes; much less, and the link would idle while this process is woken.
const MAX_UNSENT: u32 = 256 * 1024;

/// Sends at once what is to be sent, takes no more than is about to be sent, and between two processes of one
/// host does without a congestion control made for networks (BBR takes 2.5 times as long there as Reno). As
/// far as the system allows: a socket that refuses works all the same.
pub fn set_options(stream: &TcpStream, peer: SocketAddr) {
    let socket = SockRef::from(stream);
    let _ = socket.set_tcp_nodelay(true);
    #[cfg(target_os = "linux")]
    {
        let _ = socket.set_tcp_notsent_lowat(MAX_UNSENT);
        if peer.ip().to_canonical().is_loopback() {
            let _ = socket.set_tcp_congestion(b"reno");
        }
    }
}

/// Breaks the connection once what was sent has not been acknowledged for so long: the other host is gone,
/// whatever its processes are doing. Where the system knows no such limit, a silence tells, later.
pub fn set_user_timeout(stream: &TcpStream, limit: Duration) {
    #[cfg(target_os = "linux")]
    {
        let _ = SockRef::from(stream).set_tcp_user_timeout(Some(limit));
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (stream, limit);
}
