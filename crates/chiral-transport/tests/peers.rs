//! Our frames against a well-kept library's, and against peers that break the rules.

#![allow(clippy::unwrap_used, reason = "helpers of tests, too, fail by panicking")]

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

fn ours(stream: DuplexStream, role: Role) -> WebSocketTransport<DuplexStream> {
    ours_after(&[], stream, role)
}

/// Our end, of which `read_already` came with the handshake.
fn ours_after(read_already: &[u8], stream: DuplexStream, role: Role) -> WebSocketTransport<DuplexStream> {
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

/// The library's end of a connection whose other end is `role`.
async fn theirs(stream: DuplexStream, role: Role) -> WebSocketStream<DuplexStream> {
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
async fn messages_of_every_size_go_both_ways() {
    for role in [Role::Client, Role::Server] {
        let (a, b) = duplex(64 * 1024);
        let (ours, mut theirs) = (ours(a, role), theirs(b, role).await);
        let echo = tokio::spawn(async move {
            while let Some(Ok(message)) = theirs.next().await {
                if message.is_binary() {
                    theirs.send(message).await.unwrap();
                }
            }
        });
        for len in [0, 1, 125, 126, 4096, 4097, 65_535, 65_536, 3_000_001] {
            let sent = data(len);
            // In segments, some of them empty.
            let cut = len / 3;
            let segments = vec![Bytes::new(), sent.slice(..cut), Bytes::new(), sent.slice(cut..)];
            let (sending, received) = tokio::join!(ours.send(Frame::from(segments)), ours.recv());
            sending.unwrap();
            assert_eq!(received.unwrap().unwrap().into_bytes(), sent, "{role:?}, {len} bytes");
        }
        ours.close().await;
        drop(ours);
        echo.await.unwrap();
    }
}

#[tokio::test]
async fn a_large_message_lies_aligned_in_memory_that_is_used_again() {
    let (a, b) = duplex(1 << 20);
    let (ours, mut theirs) = (ours(a, Role::Client), theirs(b, Role::Client).await);
    let sending = tokio::spawn(async move {
        for _ in 0..3 {
            theirs.send(Message::Binary(data(100_000))).await.unwrap();
        }
        theirs
    });
    let mut places = Vec::new();
    for _ in 0..3 {
        let frame = ours.recv().await.unwrap().unwrap();
        assert_eq!(frame.segments().len(), 1);
        places.push(frame.segments()[0].as_ptr());
    }
    assert_eq!(places[0].align_offset(64), 0);
    assert_eq!(places, [places[0]; 3], "a message that nobody holds any more makes room for the next");
    sending.await.unwrap();
}

#[tokio::test]
async fn what_was_read_with_the_handshake_comes_first_wherever_it_ends() {
    for role in [Role::Client, Role::Server] {
        // As the library writes them. More than we read ahead, in messages with headers of every size.
        let sizes = [5, 300, 9_000, 0, 70_000, 1];
        let (a, mut b) = duplex(1 << 20);
        let mut library = theirs(a, role).await;
        // Where each message begins, in bytes of the stream.
        let (mut bytes, mut begins) = (Vec::new(), Vec::new());
        for size in sizes {
            begins.push(bytes.len());
            library.send(Message::Binary(data(size))).await.unwrap();
            let header = if size > 0xffff { 10 } else { 2 + 2 * usize::from(size > 125) }
                + 4 * usize::from(role == Role::Server);
            let mut written = vec![0; header + size];
            b.read_exact(&mut written).await.unwrap();
            bytes.extend_from_slice(&written);
        }
        let within_headers = begins.iter().flat_map(|begin| (0..15).map(move |more| begin + more));
        let ends =
            within_headers.chain([4_000, 8 * 1024 - 1, 8 * 1024, 8 * 1024 + 1, 50_000]).chain([bytes.len()]);
        for end in ends.filter(|end| *end <= bytes.len()) {
            let (read_already, rest) = bytes.split_at(end);
            let (a, mut b) = duplex(1 << 20);
            b.write_all(rest).await.unwrap();
            b.shutdown().await.unwrap();
            let ours = ours_after(read_already, a, role);
            for size in sizes {
                let received = ours.recv().await.unwrap().unwrap();
                assert!(
                    received.into_bytes() == data(size),
                    "{role:?}, {end} bytes read already: the message of {size}"
                );
            }
            assert!(ours.recv().await.is_err(), "{role:?}, {end} bytes read already: there is no more");
        }
    }
}

#[tokio::test]
async fn after_a_message_was_given_up_half_written_nothing_more_is_written() {
    for role in [Role::Client, Role::Server] {
        let (a, b) = duplex(1024);
        let (ours, mut theirs) = (ours(a, role), theirs(b, role).await);
        theirs.send(Message::Ping("are you there".into())).await.unwrap();
        assert!(ours.send(data(100_000).into()).now_or_never().is_none(), "half of it does not fit");
        let hearing = tokio::spawn(async move { theirs.collect::<Vec<_>>().await });
        // Now there is room again, but for nothing that the other side could make sense of: no message, no
        // pong, no close.
        let refused = ours.send(data(3).into()).await.unwrap_err();
        assert!(chain(&refused).contains("half written"), "{refused:?}");
        assert!(ours.recv().await.is_err(), "the ping cannot be answered");
        ours.close().await;
        drop(ours);
        let heard = hearing.await.unwrap();
        assert!(matches!(&heard[..], [Err(_)]), "{role:?}: {heard:?}");
    }
}

#[tokio::test]
async fn a_message_that_was_given_up_before_its_turn_leaves_no_trace() {
    let (a, b) = duplex(1024);
    let (ours, mut theirs) = (ours(a, Role::Server), theirs(b, Role::Server).await);
    let sending = ours.send(data(100_000).into());
    tokio::pin!(sending);
    assert!(sending.as_mut().now_or_never().is_none());
    assert!(ours.send(data(2).into()).now_or_never().is_none(), "it is not its turn");
    let hearing = async {
        [theirs.next().await, theirs.next().await].map(|message| message.unwrap().unwrap().into_data().len())
    };
    let rest = async {
        sending.await.unwrap();
        ours.send(data(3).into()).await.unwrap();
    };
    assert_eq!(tokio::join!(hearing, rest).0, [100_000, 3]);
}

#[tokio::test]
async fn a_ping_is_answered_and_a_close_echoed() {
    let (a, b) = duplex(1 << 16);
    let (ours, mut theirs) = (ours(a, Role::Server), theirs(b, Role::Server).await);
    theirs.send(Message::Ping("are you there".into())).await.unwrap();
    theirs.send(Message::Pong("unasked".into())).await.unwrap();
    theirs.close(None).await.unwrap();
    assert!(ours.recv().await.unwrap().is_none());
    assert_eq!(theirs.next().await.unwrap().unwrap(), Message::Pong("are you there".into()));
    assert!(theirs.next().await.unwrap().unwrap().is_close());
}

#[tokio::test]
async fn pings_that_come_while_a_large_message_is_half_written_do_no_harm() {
    // So little fits between the two that every message is half written most of the time.
    let (a, b) = duplex(32 * 1024);
    let (ours, theirs) = (ours(a, Role::Server), theirs(b, Role::Server).await);
    let (mut say, mut hear) = theirs.split();
    let pinging = tokio::spawn(async move {
        for n in 0..1000_u32 {
            say.send(Message::Ping(n.to_le_bytes().to_vec().into())).await.unwrap();
        }
        say
    });
    let sent = data(17_200_000);
    let sending = async {
        for _ in 0..3 {
            ours.send(Frame::from(sent.clone())).await.unwrap();
        }
    };
    let receiving = async {
        let (mut messages, mut pongs) = (0, 0);
        while messages < 3 || pongs == 0 {
            match hear.next().await.unwrap().unwrap() {
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
        received = ours.recv() => panic!("nothing was said but pings: {received:?}"),
    }
    drop(pinging.await.unwrap());
}

/// What a server makes of these bytes: the message, or the error's text.
async fn check(bytes: &[u8]) -> Result<Option<Vec<u8>>, String> {
    check_as(Role::Server, bytes).await
}

async fn check_as(role: Role, bytes: &[u8]) -> Result<Option<Vec<u8>>, String> {
    let (a, mut b) = duplex(1 << 20);
    let ours = ours(a, role);
    b.write_all(bytes).await.unwrap();
    b.shutdown().await.unwrap();
    let received = ours.recv().await.map_err(|error| match error {
        TransportError::Protocol { expected, found } => format!("expected {expected}, found {found}"),
        error => error.to_string(),
    });
    let mut answer = Vec::new();
    drop(ours);
    b.read_to_end(&mut answer).await.unwrap();
    Ok(received?.map(|frame| frame.into_bytes().to_vec()))
}

/// A frame from a client; the mask of zeros leaves the payload as it is.
fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    [&[first, 0x80 | payload.len() as u8, 0, 0, 0, 0], payload].concat()
}

#[tokio::test]
async fn fragments_are_joined_and_control_frames_may_lie_between() {
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
    assert_eq!(check(&many).await.unwrap().unwrap(), b"one and one", "empty ones take no room");
    assert_eq!(
        check(&[0x82, 0x83, 1, 2, 3, 4, b'a' ^ 1, b'b' ^ 2, b'c' ^ 3]).await.unwrap().unwrap(),
        b"abc",
        "masked"
    );
    assert_eq!(check_as(Role::Client, &[0x82, 0x03, b'a', b'b', b'c']).await.unwrap().unwrap(), b"abc");
}

#[tokio::test]
async fn what_breaks_the_rules_is_an_error_that_says_which() {
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
        ("found one that is not", vec![0x82, 0x01, b'a']),
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
