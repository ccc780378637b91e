//! The WebSocket transport against tungstenite as the peer, and against peers that break the rules.

#![allow(clippy::unwrap_used, reason = "test helpers, too, fail by panicking")]

use bytes::Bytes;
use chiral_proto::{Codec, Frame, Transport, TransportError, error::chain, pool::Pool};
use chiral_transport::{Pacing, Role, WebSocketOptions, WebSocketTransport};
use futures_util::{FutureExt, SinkExt, StreamExt};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Message, protocol},
};

const LIMIT: usize = 20 << 20;

fn transport(stream: DuplexStream, role: Role) -> WebSocketTransport<DuplexStream> {
    transport_after(&[], stream, role)
}

/// Creates the transport under test, after a handshake that read `read_already` beyond its end.
fn transport_after(
    read_already: &[u8],
    stream: DuplexStream,
    role: Role,
) -> WebSocketTransport<DuplexStream> {
    let peer = "a test".to_owned();
    let options = WebSocketOptions {
        role,
        max_message: LIMIT,
        pool: Pool::new(3),
        pacing: Pacing::default(),
        codec: Codec::Protobuf,
        peer,
        idle_timeout: std::time::Duration::MAX,
        pings: false,
    };
    WebSocketTransport::new(stream, read_already, options)
}

/// Creates tungstenite's end of a connection whose other end is `role`.
async fn tungstenite_peer(stream: DuplexStream, role: Role) -> WebSocketStream<DuplexStream> {
    let role = match role {
        Role::Client => protocol::Role::Server,
        Role::Server => protocol::Role::Client,
    };
    let config =
        protocol::WebSocketConfig::default().max_frame_size(Some(LIMIT)).max_message_size(Some(LIMIT));
    WebSocketStream::from_raw_socket(stream, role, Some(config)).await
}

fn data(len: usize) -> Bytes {
    (0..len).map(|i| (i * 7 + i / 251) as u8).collect()
}

#[tokio::test]
async fn messages_of_all_sizes_travel_in_both_directions() {
    for role in [Role::Client, Role::Server] {
        let (a, b) = duplex(64 * 1024);
        let (transport, mut peer) = (transport(a, role), tungstenite_peer(b, role).await);
        let echo = tokio::spawn(async move {
            while let Some(Ok(message)) = peer.next().await {
                if message.is_binary() {
                    peer.send(message).await.unwrap();
                }
            }
        });
        for len in [0, 1, 125, 126, 4096, 4097, 65_535, 65_536, 3_000_001] {
            let sent = data(len);
            // In segments, some of them empty.
            let cut = len / 3;
            let segments = vec![Bytes::new(), sent.slice(..cut), Bytes::new(), sent.slice(cut..)];
            let (sending, received) = tokio::join!(transport.send(Frame::from(segments)), transport.recv());
            sending.unwrap();
            assert_eq!(received.unwrap().unwrap().into_bytes(), sent, "{role:?}, {len} bytes");
        }
        transport.close().await;
        drop(transport);
        echo.await.unwrap();
    }
}

#[tokio::test]
async fn large_messages_are_read_into_aligned_memory_that_is_reused() {
    let (a, b) = duplex(1 << 20);
    let (transport, mut peer) = (transport(a, Role::Client), tungstenite_peer(b, Role::Client).await);
    let sending = tokio::spawn(async move {
        for _ in 0..3 {
            peer.send(Message::Binary(data(100_000))).await.unwrap();
        }
        peer
    });
    let mut places = Vec::new();
    for _ in 0..3 {
        let frame = transport.recv().await.unwrap().unwrap();
        assert_eq!(frame.segments().len(), 1);
        places.push(frame.segments()[0].as_ptr());
    }
    assert_eq!(places[0].align_offset(64), 0);
    assert_eq!(places, [places[0]; 3], "the memory of a dropped message is reused for the next");
    sending.await.unwrap();
}

#[tokio::test]
async fn bytes_read_with_the_handshake_come_first_wherever_they_end() {
    for role in [Role::Client, Role::Server] {
        // As tungstenite writes them. More than is read ahead, in messages with headers of all sizes.
        let sizes = [5, 300, 9_000, 0, 70_000, 1];
        let (a, mut b) = duplex(1 << 20);
        let mut library = tungstenite_peer(a, role).await;
        // The offset of each message in the stream.
        let (mut bytes, mut offsets) = (Vec::new(), Vec::new());
        for size in sizes {
            offsets.push(bytes.len());
            library.send(Message::Binary(data(size))).await.unwrap();
            let header = if size > 0xffff { 10 } else { 2 + 2 * usize::from(size > 125) }
                + 4 * usize::from(role == Role::Server);
            let mut written = vec![0; header + size];
            b.read_exact(&mut written).await.unwrap();
            bytes.extend_from_slice(&written);
        }
        let within_headers = offsets.iter().flat_map(|offset| (0..15).map(move |more| offset + more));
        let ends =
            within_headers.chain([4_000, 8 * 1024 - 1, 8 * 1024, 8 * 1024 + 1, 50_000]).chain([bytes.len()]);
        for end in ends.filter(|end| *end <= bytes.len()) {
            let (read_already, rest) = bytes.split_at(end);
            let (a, mut b) = duplex(1 << 20);
            b.write_all(rest).await.unwrap();
            b.shutdown().await.unwrap();
            let transport = transport_after(read_already, a, role);
            for size in sizes {
                let received = transport.recv().await.unwrap().unwrap();
                assert!(
                    received.into_bytes() == data(size),
                    "{role:?}, {end} bytes read already: the message of {size}"
                );
            }
            assert!(
                transport.recv().await.is_err(),
                "{role:?}, {end} bytes read already: the stream has ended"
            );
        }
    }
}

#[tokio::test]
async fn nothing_is_written_after_a_message_was_left_half_written() {
    for role in [Role::Client, Role::Server] {
        let (a, b) = duplex(1024);
        let (transport, mut peer) = (transport(a, role), tungstenite_peer(b, role).await);
        peer.send(Message::Ping("are you there".into())).await.unwrap();
        assert!(transport.send(data(100_000).into()).now_or_never().is_none(), "it fits only partly");
        let receiving = tokio::spawn(async move { peer.collect::<Vec<_>>().await });
        // There is room again, but the peer would take anything for the rest of the message: no message, pong
        // or close may be written.
        let refused = transport.send(data(3).into()).await.unwrap_err();
        assert!(chain(&refused).contains("half written"), "{refused:?}");
        assert!(transport.recv().await.is_err(), "the ping cannot be answered");
        transport.close().await;
        drop(transport);
        let received = receiving.await.unwrap();
        assert!(matches!(&received[..], [Err(_)]), "{role:?}: {received:?}");
    }
}

#[tokio::test]
async fn a_message_dropped_before_its_turn_is_not_sent() {
    let (a, b) = duplex(1024);
    let (transport, mut peer) = (transport(a, Role::Server), tungstenite_peer(b, Role::Server).await);
    let sending = transport.send(data(100_000).into());
    tokio::pin!(sending);
    assert!(sending.as_mut().now_or_never().is_none());
    assert!(transport.send(data(2).into()).now_or_never().is_none(), "another message is being sent");
    let receiving = async {
        [peer.next().await, peer.next().await].map(|message| message.unwrap().unwrap().into_data().len())
    };
    let rest = async {
        sending.await.unwrap();
        transport.send(data(3).into()).await.unwrap();
    };
    assert_eq!(tokio::join!(receiving, rest).0, [100_000, 3]);
}

#[tokio::test]
async fn pings_are_answered_and_a_close_is_echoed() {
    let (a, b) = duplex(1 << 16);
    let (transport, mut peer) = (transport(a, Role::Server), tungstenite_peer(b, Role::Server).await);
    peer.send(Message::Ping("are you there".into())).await.unwrap();
    peer.send(Message::Pong("unsolicited".into())).await.unwrap();
    peer.close(None).await.unwrap();
    assert!(transport.recv().await.unwrap().is_none());
    assert_eq!(peer.next().await.unwrap().unwrap(), Message::Pong("are you there".into()));
    assert!(peer.next().await.unwrap().unwrap().is_close());
}

#[tokio::test]
async fn pings_during_a_half_written_message_do_not_break_it() {
    // The buffer is so small that a message is half written most of the time.
    let (a, b) = duplex(32 * 1024);
    let (transport, peer) = (transport(a, Role::Server), tungstenite_peer(b, Role::Server).await);
    let (mut peer_sender, mut peer_receiver) = peer.split();
    let pinging = tokio::spawn(async move {
        for n in 0..1000_u32 {
            peer_sender.send(Message::Ping(n.to_le_bytes().to_vec().into())).await.unwrap();
        }
        peer_sender
    });
    let sent = data(17_200_000);
    let sending = async {
        for _ in 0..3 {
            transport.send(Frame::from(sent.clone())).await.unwrap();
        }
    };
    let receiving = async {
        let (mut messages, mut pongs) = (0, 0);
        while messages < 3 || pongs == 0 {
            match peer_receiver.next().await.unwrap().unwrap() {
                Message::Binary(received) => {
                    assert_eq!(received, sent);
                    messages += 1;
                }
                Message::Pong(_) => pongs += 1,
                other => panic!("{other:?}"),
            }
        }
    };
    tokio::select! {
        ((), ()) = async { tokio::join!(sending, receiving) } => {}
        received = transport.recv() => panic!("only pings were sent: {received:?}"),
    }
    drop(pinging.await.unwrap());
}

/// Sends these bytes to a server, and returns the message that it receives, or the text of its error.
async fn check(bytes: &[u8]) -> Result<Option<Vec<u8>>, String> {
    check_as(Role::Server, bytes).await
}

async fn check_as(role: Role, bytes: &[u8]) -> Result<Option<Vec<u8>>, String> {
    let (a, mut b) = duplex(1 << 20);
    let transport = transport(a, role);
    b.write_all(bytes).await.unwrap();
    b.shutdown().await.unwrap();
    let received = transport.recv().await.map_err(|error| match error {
        TransportError::Protocol { expected, found } => format!("expected {expected}, found {found}"),
        error => error.to_string(),
    });
    let mut answer = Vec::new();
    drop(transport);
    b.read_to_end(&mut answer).await.unwrap();
    Ok(received?.map(|frame| frame.into_bytes().to_vec()))
}

/// Encodes a frame of a client; the mask of zeros leaves the payload as it is.
fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    [&[first, 0x80 | payload.len() as u8, 0, 0, 0, 0], payload].concat()
}

#[tokio::test]
async fn fragments_are_joined_with_control_frames_between_them() {
    let bytes = [
        frame(0x02, b"one "),
        frame(0x89, b"ping"),
        frame(0x00, b"and "),
        frame(0x8a, b""),
        frame(0x80, b"one"),
    ]
    .concat();
    assert_eq!(check(&bytes).await.unwrap().unwrap(), b"one and one");
    let many = [frame(0x02, b"one"), frame(0x00, b"").repeat(20_000), frame(0x80, b" and one")].concat();
    assert_eq!(check(&many).await.unwrap().unwrap(), b"one and one", "empty fragments take no memory");
    assert_eq!(
        check(&[0x82, 0x83, 1, 2, 3, 4, b'a' ^ 1, b'b' ^ 2, b'c' ^ 3]).await.unwrap().unwrap(),
        b"abc",
        "masked"
    );
    assert_eq!(check_as(Role::Client, &[0x82, 0x03, b'a', b'b', b'c']).await.unwrap().unwrap(), b"abc");
}

#[tokio::test]
async fn protocol_violations_are_errors_that_name_the_rule() {
    let too_long = [&[0x82, 0xff][..], &(LIMIT as u64 + 1).to_be_bytes(), &[0; 4]].concat();
    let too_long_in_sum =
        [frame(0x02, b"a"), [&[0x80, 0xff][..], &(LIMIT as u64).to_be_bytes(), &[0; 4]].concat()].concat();
    let huge = [&[0x82, 0xff][..], &[0xff; 8], &[0; 4]].concat();
    let too_many = [frame(0x02, b"a"), frame(0x00, b"a").repeat(16 * 1024)].concat();
    let cases: [(&str, Vec<u8>); 15] = [
        ("found a text message", frame(0x81, b"hello")),
        ("found reserved bits", frame(0xc2, b"")),
        ("found opcode 3", frame(0x83, b"")),
        ("found opcode 11", frame(0x8b, b"")),
        ("found its continuation", frame(0x80, b"")),
        ("found another message", [frame(0x02, b"a"), frame(0x82, b"b")].concat()),
        ("found a fragment", frame(0x09, b"")),
        ("found 126 bytes", vec![0x89, 0xfe, 0, 126]),
        ("found an unmasked one", vec![0x82, 0x01, b'a']),
        ("expected a message within the limit", too_long),
        ("expected a message within the limit", too_long_in_sum),
        ("expected a message within the limit", huge),
        ("at most 16384 fragments", too_many),
        ("connection lost", vec![]),
        ("connection lost", vec![0x82, 0x85, 0, 0, 0, 0, b'a']),
    ];
    for (expected, bytes) in cases {
        let error = check(&bytes).await.unwrap_err();
        assert!(error.contains(expected), "{:?}: {error}", &bytes[..bytes.len().min(20)]);
    }
    let error = check_as(Role::Client, &frame(0x82, b"a")).await.unwrap_err();
    assert!(error.contains("found a masked one"), "{error}");
}
