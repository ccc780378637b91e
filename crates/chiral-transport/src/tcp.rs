//! Options of the TCP sockets that carry frames.

use std::{net::SocketAddr, time::Duration};

use socket2::SockRef;
use tokio::net::TcpStream;

/// How many bytes may be in the socket without having been sent. More would only make the pixels older when
/// they are sent; much less, and the link would be idle while this process wakes up.
const MAX_UNSENT_BYTES: u32 = 256 * 1024;

/// Sets `TCP_NODELAY`, a small `TCP_NOTSENT_LOWAT`, and Reno congestion control between two processes of one
/// host (BBR, made for networks, takes 2.5 times as long there). An option that the system refuses is left as
/// it is: the socket works without it.
pub fn set_options(stream: &TcpStream, peer: SocketAddr) {
    let socket = SockRef::from(stream);
    let _ = socket.set_tcp_nodelay(true);
    #[cfg(target_os = "linux")]
    {
        let _ = socket.set_tcp_notsent_lowat(MAX_UNSENT_BYTES);
        if peer.ip().to_canonical().is_loopback() {
            let _ = socket.set_tcp_congestion(b"reno");
        }
    }
}

/// Breaks the connection once sent bytes have not been acknowledged for `timeout`: the other host is gone,
/// whatever its processes are doing. On systems without such a timeout the idle timeout expires, later.
pub fn set_user_timeout(stream: &TcpStream, timeout: Duration) {
    #[cfg(target_os = "linux")]
    {
        let _ = SockRef::from(stream).set_tcp_user_timeout(Some(timeout));
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (stream, timeout);
}
