//! Legacy clients at our server: what they say in either generation, over WebSocket and over Zenoh, and
//! what keeps the robot safe from them.
#![allow(clippy::unwrap_used, reason = "helpers of tests, too, fail by panicking")]

mod support;

use std::{net::SocketAddr, sync::Arc, thread, time::Duration};

use bytes::Bytes;
use chiral_client::{Error, PolicyClient, PolicyClientBuilder};
use chiral_proto::{
    ActionChunk, Frame, Message, Notice, Reply, Request, ValueMap,
    codec::msgpack,
    keys::{self, End},
    message::ActionMessage,
};
use chiral_server::PolicyServerBuilder;
use futures_util::{SinkExt, StreamExt};
use support::harness::{CAMERA, DIMENSION, Event, GUARD, Harness, Script, free_address, session};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    time::timeout,
};
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream, connect_async_with_config,
    tungstenite::{
        self,
        protocol::{
            WebSocketConfig,
            frame::{
                Frame as WebSocketFrame,
                coding::{Data, OpCode},
            },
        },
    },
};
use zenoh::Wait;

fn reset() -> Request {
    Request::Reset { seed: None, options: ValueMap::new() }
}

fn step(rows: usize) -> Request {
    let actions = ActionChunk::new(DIMENSION, vec![0.5; rows * DIMENSION]).unwrap();
    Request::Step { session: 0, episode: 0, actions }
}

fn frame_of(request: Request) -> Bytes {
    msgpack::encode(&Message::Request { id: msgpack::ID, request }, &ValueMap::new()).unwrap().into_bytes()
}

fn apply_action(actions: impl Into<ActionChunk>) -> Bytes {
    let said = ActionMessage { session: 0, episode: 0, seq: 0, actions: actions.into(), observation_seq: 0 };
    msgpack::encode(&Message::Notice(Notice::Action(said)), &ValueMap::new()).unwrap().into_bytes()
}

/// An `apply_action` whose payload is shorter than its shape says.
fn lying_apply_action() -> Bytes {
    let frame = apply_action([0.5; DIMENSION]);
    frame.slice(..frame.len() - 4)
}

fn reply_of(frame: Bytes) -> Reply {
    match msgpack::decode(Frame::from(frame)).unwrap().message {
        Message::Reply { reply, .. } => reply,
        other => panic!("expected a reply, found {other:?}"),
    }
}

/// What kind of reply it is, in the wire's word.
fn kind(reply: &Reply) -> &'static str {
    match reply {
        Reply::Metadata(_) => "metadata_response",
        Reply::Reset { .. } => "reset_response",
        Reply::Observation(_) => "obs_response",
        Reply::Step(_) => "step_response",
        other => panic!("expected a reply of this wire, found {other:?}"),
    }
}

fn has_held(stand: &Harness) -> bool {
    stand.script.events().ends_with(&[Event::Held, Event::Disconnected])
}

// ---- WebSocket --------------------------------------------------------------------------------------------

async fn serve(stand: &Harness) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(stand.server.clone().serve_on(listener));
    address
}

fn stand_with(configure: impl FnOnce(PolicyServerBuilder) -> PolicyServerBuilder) -> Harness {
    Harness::with(Arc::default(), 8, 8, configure)
}

fn client(uri: impl std::fmt::Display) -> PolicyClientBuilder {
    PolicyClient::builder(&uri.to_string()).quiet().deadline(GUARD)
}

/// A client as they are in the field, by a WebSocket library.
struct Peer(WebSocketStream<MaybeTlsStream<TcpStream>>);

impl Peer {
    async fn connect(address: SocketAddr) -> Peer {
        // Messages of any size, as the wire's description has it.
        let config = WebSocketConfig::default().max_message_size(None).max_frame_size(None);
        Peer(connect_async_with_config(format!("ws://{address}"), Some(config), true).await.unwrap().0)
    }

    async fn say(&mut self, frame: Bytes) {
        self.0.send(tungstenite::Message::Binary(frame)).await.unwrap();
    }

    /// The next message, but for the server's pings, which the library answers.
    async fn hear(&mut self) -> tungstenite::Message {
        loop {
            let message = timeout(GUARD, self.0.next())
                .await
                .expect("an answer")
                .expect("the connection is open")
                .unwrap();
            if !message.is_ping() {
                return message;
            }
        }
    }

    async fn reply(&mut self) -> Reply {
        match self.hear().await {
            tungstenite::Message::Binary(frame) => reply_of(frame),
            other => panic!("expected a frame, found {other:?}"),
        }
    }

    async fn ask(&mut self, request: Request) -> Reply {
        self.say(frame_of(request)).await;
        self.reply().await
    }

    /// The code and the reason with which the server closes.
    async fn closed(&mut self) -> (u16, String) {
        match self.hear().await {
            tungstenite::Message::Close(Some(frame)) => (frame.code.into(), frame.reason.to_string()),
            other => panic!("expected the server to close, found {other:?}"),
        }
    }
}

#[tokio::test]
async fn both_generations_in_one_session() {
    let stand = Harness::new();
    let mut peer = Peer::connect(serve(&stand).await).await;
    let Reply::Metadata(data) = peer.ask(Request::GetMetadata).await else { panic!("expected metadata") };
    assert_eq!(data["kind"].as_str(), Some("scripted"));

    let Reply::Reset { obs, .. } = peer.ask(reset()).await else { panic!("expected a reset") };
    assert_eq!(obs.camera(CAMERA).unwrap().image.shape(), [8, 8, 3]);
    peer.say(apply_action([0.25; DIMENSION])).await;
    stand.until("the action was applied", |stand| stand.script.applied() == [[0.25; DIMENSION]]).await;
    let Reply::Observation(obs) = peer.ask(Request::GetObs).await else { panic!("expected an observation") };
    let camera = obs.camera(CAMERA).unwrap();
    assert!(stand.clock.now().since(camera.captured_at) < GUARD, "seconds on the wire, of the robot's clock");
    assert!(camera.image.data().iter().all(|byte| *byte == 1));
    assert_eq!(camera.depth.as_ref().unwrap().shape(), [8, 8]);
    assert_eq!(obs.proprio("joint_pos").unwrap().data.shape(), [DIMENSION]);

    let Reply::Step(result) = peer.ask(step(2)).await else { panic!("expected a step") };
    assert_eq!((result.reward, result.terminated, result.truncated), (2.0, false, false));
    assert_eq!(stand.script.applied().len(), 3);

    // Whose turn it is does not depend on what is asked; and what is unknown is passed over.
    peer.say(Bytes::from_static(b"\x0e\x00\x00\x00\x81\xa4type\xa7unheard")).await;
    let episodes =
        |stand: &Harness| stand.script.events().iter().filter(|event| **event == Event::ResetDone).count();
    assert_eq!(kind(&peer.ask(reset()).await), "reset_response");
    assert_eq!(episodes(&stand), 2);
    peer.0.close(None).await.unwrap();
    stand.until("the robot holds", has_held).await;
    assert_eq!(stand.handle.stats().actions_refused, 0);
}

#[tokio::test]
async fn requests_that_do_not_wait_are_answered_in_their_order() {
    let stand = Harness::new();
    let mut peer = Peer::connect(serve(&stand).await).await;
    let asked =
        [Request::GetMetadata, reset(), step(1), Request::GetObs, reset(), step(2), Request::GetMetadata];
    for request in asked {
        peer.say(frame_of(request)).await;
    }
    for expected in ["metadata", "reset", "step", "obs", "reset", "step", "metadata"] {
        let reply = peer.reply().await;
        assert_eq!(kind(&reply), format!("{expected}_response"));
    }
    assert_eq!(stand.handle.stats().actions_refused, 0);
}

#[tokio::test]
async fn an_action_that_is_refused_is_dropped_and_counted() {
    let stand = Harness::new();
    let mut peer = Peer::connect(serve(&stand).await).await;
    peer.ask(reset()).await;
    for refused in
        [apply_action([0.5; DIMENSION + 1]), apply_action([f32::NAN; DIMENSION]), lying_apply_action()]
    {
        peer.say(refused).await;
    }
    stand.until("they are counted", |stand| stand.handle.stats().actions_refused == 3).await;

    // One while a reset waits for its turn, behind a step, and one while it runs.
    stand.script.apply_gate.close();
    stand.script.reset_gate.close();
    peer.say(frame_of(step(1))).await;
    stand.until("the robot moves", |stand| stand.script.apply_gate.is_waited_at()).await;
    peer.say(frame_of(reset())).await;
    peer.say(apply_action([0.25; DIMENSION])).await;
    stand.until("it would overtake the reset", |stand| stand.handle.stats().actions_refused == 4).await;
    stand.script.apply_gate.open();
    stand.until("the robot homes", |stand| stand.script.reset_gate.is_waited_at()).await;
    peer.say(apply_action([0.25; DIMENSION])).await;
    stand.until("this, too", |stand| stand.handle.stats().actions_refused == 5).await;
    stand.script.reset_gate.open();
    assert_eq!(kind(&peer.reply().await), "step_response");
    assert_eq!(kind(&peer.reply().await), "reset_response");
    peer.say(apply_action([0.5; DIMENSION])).await;
    stand.until("the session goes on", |stand| stand.script.applied() == [[0.5; DIMENSION]; 2]).await;
}

#[tokio::test]
async fn a_robot_that_fails_at_an_action_is_no_end() {
    let stand = Harness::new();
    let mut peer = Peer::connect(serve(&stand).await).await;
    peer.ask(reset()).await;
    *stand.script.panics_in.lock().unwrap() = Some("apply_action");
    peer.say(apply_action([0.5; DIMENSION])).await;
    stand.until("it is counted", |stand| stand.handle.stats().actions_failed == 1).await;
    // Observations go on; but whoever waits for the robot is told.
    assert_eq!(kind(&peer.ask(Request::GetObs).await), "obs_response");
    peer.say(frame_of(step(1))).await;
    let (code, reason) = peer.closed().await;
    assert!(code == 1011 && reason.contains("out of service"), "{code}: {reason}");
}

/// The server closes with this code and reason on hearing these frames, after having answered the reset
/// before them; and then serves another.
async fn check_closes(what: &str, script: impl FnOnce(&Script), frames: &[Bytes], code: u16, reason: &str) {
    let stand = Harness::new();
    let address = serve(&stand).await;
    let mut peer = Peer::connect(address).await;
    peer.ask(reset()).await;
    script(&stand.script);
    peer.say(frame_of(Request::GetObs)).await;
    for frame in frames {
        peer.say(frame.clone()).await;
    }
    assert_eq!(kind(&peer.reply().await), "obs_response", "{what}: what was asked before is answered");
    let (found, why) = peer.closed().await;
    assert!(
        found == code && why.contains(reason),
        "{what}: expected {code} and {reason:?}, found {found} and {why:?}"
    );
    assert!(why.len() <= 123);
    stand.until("the robot holds", has_held).await;
    assert_eq!(
        kind(&Peer::connect(address).await.ask(Request::GetMetadata).await),
        "metadata_response",
        "{what}"
    );
}

#[tokio::test]
async fn a_refused_request_closes_with_the_reason() {
    let none = |_: &Script| {};
    let dimension = ActionChunk::from([0.5; DIMENSION + 1]);
    let dimension = frame_of(Request::Step { session: 0, episode: 0, actions: dimension });
    check_closes("another dimension", none, &[dimension], 1008, "expected actions of dimension 3, found 4")
        .await;
    let nan = ActionChunk::from([f32::NAN; DIMENSION]);
    let nan = frame_of(Request::Step { session: 0, episode: 0, actions: nan });
    check_closes("no number", none, &[nan], 1008, "expected finite values, found NaN").await;
    let answer = Message::Reply { id: 1, reply: Reply::Metadata(ValueMap::new()) };
    let answer = msgpack::encode(&answer, &ValueMap::new()).unwrap().into_bytes();
    check_closes("what servers say", none, &[answer], 1008, "expected what a client says").await;

    let fails = |text: String| move |script: &Script| *script.reset_fails.lock().unwrap() = Some(text);
    check_closes(
        "a reset that fails",
        fails("no gripper".to_owned()),
        &[frame_of(reset())],
        1011,
        "no gripper",
    )
    .await;
    // Cut between two characters, not within one.
    check_closes("with many words", fails("ä".repeat(200)), &[frame_of(reset())], 1011, "ää").await;
    let panics = |script: &Script| *script.panics_in.lock().unwrap() = Some("step");
    let stand = Harness::new();
    let mut peer = Peer::connect(serve(&stand).await).await;
    panics(&stand.script);
    peer.say(frame_of(step(1))).await;
    let (code, reason) = peer.closed().await;
    assert!(code == 1011 && reason.contains("the robot panicked in step"), "{code}: {reason}");
}

#[tokio::test]
async fn hostile_frames_close_and_harm_nobody() {
    let none = |_: &Script| {};
    let whole = frame_of(step(3));
    let hostile: &[(&str, Bytes, &str)] = &[
        ("nothing", Bytes::new(), "expected at least 4 bytes"),
        ("a prefix", whole.slice(..3), "expected at least 4 bytes"),
        ("half a header", whole.slice(..20), "header_len"),
        ("half a payload", whole.slice(..whole.len() - 5), "payload"),
        ("a header of 4 GiB", Bytes::from_static(&[0xff, 0xff, 0xff, 0xff, 0x81]), "header_len"),
        ("no map", Bytes::from_static(&[1, 0, 0, 0, 0xc0]), "found"),
        ("10^9 fields", Bytes::from_static(&[5, 0, 0, 0, 0xdf, 0x3b, 0x9a, 0xca, 0x00]), ""),
        ("a map of maps of maps", [&[0xff, 0xff, 0, 0][..], &[0x81; 0xffff]].concat().into(), ""),
        ("no type", Bytes::from_static(&[1, 0, 0, 0, 0x80]), "type"),
    ];
    for (what, frame, reason) in hostile {
        check_closes(what, none, std::slice::from_ref(frame), 1008, reason).await;
    }
}

#[tokio::test]
async fn what_is_no_message_of_this_wire_closes_too() {
    let stand = stand_with(|builder| builder.max_frame(64 * 1024));
    let address = serve(&stand).await;
    for message in [tungstenite::Message::text("{}"), tungstenite::Message::Binary(vec![0; 8 << 20].into())] {
        let mut peer = Peer::connect(address).await;
        peer.0.send(message).await.unwrap();
        let (code, reason) = peer.closed().await;
        assert!(code == 1008 && reason.contains("expected"), "{code}: {reason}");
        stand.until("the robot is free", |stand| stand.handle.stats().sessions == 0).await;
    }
}

#[tokio::test]
async fn one_controller_whatever_it_speaks() {
    let stand = Harness::new();
    let address = serve(&stand).await;
    let uri = format!("ws://{address}");
    let mut first = Peer::connect(address).await;
    first.ask(reset()).await;
    let (code, reason) = Peer::connect(address).await.closed().await;
    assert!(code == 1013 && reason.contains("a legacy client at 127.0.0.1:"), "{code}: {reason}");
    let error = client(&uri).connect().await.unwrap_err();
    assert!(matches!(&error, Error::Busy(fault) if fault.text.contains("a legacy client at")), "{error}");
    let watcher = client(&uri).observer().connect().await.unwrap();
    assert_eq!(watcher.get_obs().await.unwrap().episode, 1);
    // Still served.
    assert_eq!(kind(&first.ask(step(1)).await), "step_response");
    drop(first);
    stand.until("the robot holds", has_held).await;

    let ours = client(&uri).name("the night shift").connect().await.unwrap();
    let (code, reason) = Peer::connect(address).await.closed().await;
    assert!(code == 1013 && reason.contains("the night shift"), "{code}: {reason}");
    ours.reset().await.unwrap();
}

#[tokio::test]
async fn more_requests_than_may_wait_close() {
    let stand = Harness::new();
    let mut peer = Peer::connect(serve(&stand).await).await;
    stand.script.reset_gate.close();
    peer.say(frame_of(reset())).await;
    stand.until("the robot homes", |stand| stand.script.reset_gate.is_waited_at()).await;
    for _ in 0..=4096 {
        peer.0.feed(tungstenite::Message::Binary(frame_of(Request::GetObs))).await.unwrap();
    }
    peer.0.flush().await.unwrap();
    let (code, reason) = peer.closed().await;
    assert!(code == 1013 && reason.contains("4096 requests"), "{code}: {reason}");
}

#[tokio::test]
async fn a_server_that_stops_says_so() {
    let stand = Harness::new();
    let mut peer = Peer::connect(serve(&stand).await).await;
    peer.ask(reset()).await;
    stand.handle.shutdown();
    let (code, reason) = peer.closed().await;
    assert!(code == 1001 && reason.contains("shutting down"), "{code}: {reason}");
    stand.until("the robot holds", has_held).await;
}

/// The head of the answer to a handshake with these headers besides, and the connection.
async fn shake_hands(address: SocketAddr, headers: &str) -> (String, TcpStream) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let asked = format!(
        "GET / HTTP/1.1\r\nHost: {address}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
         Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{headers}\r\n"
    );
    stream.write_all(asked.as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(timeout(GUARD, stream.read_u8()).await.expect("an answer").unwrap());
    }
    (String::from_utf8(head).unwrap().to_lowercase(), stream)
}

#[tokio::test]
async fn compression_is_declined_and_no_subprotocol_is_made_up() {
    let stand = Harness::new();
    let address = serve(&stand).await;
    let (head, stream) =
        shake_hands(address, "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n")
            .await;
    assert!(head.starts_with("http/1.1 101"), "{head}");
    assert!(!head.contains("sec-websocket-extensions") && !head.contains("sec-websocket-protocol"), "{head}");
    let stream = MaybeTlsStream::Plain(stream);
    let mut peer =
        Peer(WebSocketStream::from_raw_socket(stream, tungstenite::protocol::Role::Client, None).await);
    assert_eq!(kind(&peer.ask(Request::GetMetadata).await), "metadata_response");
    // Who offers subprotocols, but not ours, is neither.
    let (head, _) = shake_hands(address, "Sec-WebSocket-Protocol: mqtt\r\n").await;
    assert!(head.starts_with("http/1.1 400"), "{head}");
    let (head, _) = shake_hands(address, "Sec-WebSocket-Protocol: mqtt, chiral.v1\r\n").await;
    assert!(head.starts_with("http/1.1 101") && head.contains("sec-websocket-protocol: chiral.v1"), "{head}");
}

#[tokio::test]
async fn pings_are_answered_while_the_robot_is_busy() {
    let stand = Harness::new();
    let mut peer = Peer::connect(serve(&stand).await).await;
    stand.script.reset_gate.close();
    for request in [reset(), Request::GetObs] {
        peer.say(frame_of(request)).await;
    }
    stand.until("the robot homes", |stand| stand.script.reset_gate.is_waited_at()).await;
    for payload in [&b"one"[..], b"two"] {
        peer.0.send(tungstenite::Message::Ping(Bytes::from_static(payload))).await.unwrap();
        assert_eq!(peer.hear().await, tungstenite::Message::Pong(Bytes::from_static(payload)));
    }
    stand.script.reset_gate.open();
    assert_eq!(kind(&peer.reply().await), "reset_response");
    assert_eq!(kind(&peer.reply().await), "obs_response");
}

#[tokio::test]
async fn messages_may_come_in_fragments() {
    let stand = Harness::new();
    let mut peer = Peer::connect(serve(&stand).await).await;
    peer.ask(reset()).await;
    // 48 KiB of rows, and little of it at once at the beginning: within the header's length, and within the
    // header.
    let message = frame_of(step(4096));
    let cuts = [0, 2, 9, 32 * 1024, 32 * 1024, message.len()];
    for (i, range) in cuts.windows(2).map(|cut| cut[0]..cut[1]).enumerate() {
        let opcode = if i == 0 { Data::Binary } else { Data::Continue };
        let fragment =
            WebSocketFrame::message(message.slice(range), OpCode::Data(opcode), i == cuts.len() - 2);
        peer.0.send(tungstenite::Message::Frame(fragment)).await.unwrap();
        peer.0.send(tungstenite::Message::Ping(Bytes::from_static(b"between"))).await.unwrap();
    }
    let mut pongs = 0;
    let result = loop {
        match peer.hear().await {
            tungstenite::Message::Pong(_) => pongs += 1,
            tungstenite::Message::Binary(frame) => break reply_of(frame),
            other => panic!("expected an answer, found {other:?}"),
        }
    };
    assert!(matches!(result, Reply::Step(result) if result.reward == 4096.0));
    assert!(pongs > 0);
}

#[tokio::test]
async fn a_connection_that_breaks_or_goes_silent_lets_the_robot_hold() {
    let limit = Duration::from_millis(250);
    let stand = stand_with(|builder| builder.idle_timeout(limit));
    let address = serve(&stand).await;
    let mut peer = Peer::connect(address).await;
    peer.ask(reset()).await;
    // Broken without a word.
    drop(peer);
    stand.until("the robot holds", has_held).await;

    // One that thinks for long but is there, which its library says for it: the server's pings are what ends
    // the wait below.
    let mut thinker = Peer::connect(address).await;
    thinker.ask(reset()).await;
    let mut pings = 0;
    while pings < 6 {
        let message =
            timeout(GUARD, thinker.0.next()).await.expect("a ping").expect("the connection is open").unwrap();
        assert!(message.is_ping(), "found {message:?}");
        pings += 1;
    }
    // And that is too busy to answer pings, for a while.
    tokio::time::sleep(2 * limit).await;
    assert_eq!(kind(&thinker.ask(Request::GetObs).await), "obs_response");
    drop(thinker);
    stand.until("the robot is free", |stand| stand.handle.stats().sessions == 0).await;

    // One that is there no more, though its connection is.
    let (_, unplugged) = shake_hands(address, "").await;
    stand.until("it is connected", |stand| stand.handle.stats().sessions == 1).await;
    stand.until("and given up", |stand| stand.handle.stats().sessions == 0).await;
    drop(unplugged);
}

// ---- Zenoh ------------------------------------------------------------------------------------------------

/// A stand that serves on a network of its own, and where.
fn serve_zenoh(configure: impl FnOnce(PolicyServerBuilder) -> PolicyServerBuilder) -> (Harness, String) {
    let uri = format!("tcp/{}", free_address());
    let stand = stand_with(|builder| configure(builder.name("arm").listen_zenoh(&uri).discovery(false)));
    tokio::spawn(stand.server.clone().serve());
    (stand, uri)
}

/// Whoever speaks on the keys that all share: one client, or two that know nothing of each other.
struct Voice {
    session: Option<zenoh::Session>,
    heard: mpsc::UnboundedReceiver<Bytes>,
}

impl Voice {
    /// On the network, once somebody listens there.
    async fn on(uri: &str) -> Voice {
        until_open(uri).await;
        let session = session("peer", uri);
        let (sender, heard) = mpsc::unbounded_channel();
        let hear = move |sample: zenoh::sample::Sample| {
            drop(sender.send(sample.payload().to_bytes().into_owned().into()))
        };
        session.declare_subscriber(keys::legacy(End::Server)).callback(hear).background().wait().unwrap();
        Voice { session: Some(session), heard }
    }

    fn say(&self, frame: Bytes) {
        self.session.as_ref().unwrap().put(keys::legacy(End::Client), frame.to_vec()).wait().unwrap();
    }

    fn ask(&self, request: Request) {
        self.say(frame_of(request));
    }

    async fn reply(&mut self) -> Reply {
        reply_of(timeout(GUARD, self.heard.recv()).await.expect("an answer").unwrap())
    }

    /// The next answer's kind.
    async fn kind(&mut self) -> &'static str {
        kind(&self.reply().await)
    }

    /// Probes until it is answered, and drops the answers, as clients do. Afterwards no more come: the last
    /// was asked after all others were answered.
    async fn begin(&mut self) {
        let mut asked = 0;
        loop {
            self.ask(Request::GetMetadata);
            asked += 1;
            assert!(asked < 100, "no answer to any probe");
            if let Ok(answer) = timeout(Duration::from_millis(500), self.heard.recv()).await {
                assert_eq!(kind(&reply_of(answer.unwrap())), "metadata_response");
                break;
            }
        }
        // Late ones.
        self.ask(Request::GetObs);
        while self.kind().await != "obs_response" {}
    }
}

impl Drop for Voice {
    fn drop(&mut self) {
        let session = self.session.take();
        thread::spawn(move || drop(session)).join().unwrap();
    }
}

/// Waits until somebody listens there.
async fn until_open(uri: &str) {
    let address = uri.strip_prefix("tcp/").unwrap();
    let open = async {
        while TcpStream::connect(address).await.is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(GUARD, open).await.expect("the server listens");
}

#[tokio::test]
async fn both_generations_over_zenoh() {
    let (stand, uri) = serve_zenoh(|builder| builder);
    let mut voice = Voice::on(&uri).await;
    voice.begin().await;
    voice.ask(reset());
    assert_eq!(voice.kind().await, "reset_response");
    voice.say(apply_action([0.25; DIMENSION]));
    stand.until("the action was applied", |stand| stand.script.applied() == [[0.25; DIMENSION]]).await;
    voice.ask(step(2));
    assert!(matches!(voice.reply().await, Reply::Step(result) if result.reward == 2.0));
    let error = client(&uri).connect().await.unwrap_err();
    assert!(
        matches!(&error, Error::Busy(fault) if fault.text.contains("a legacy client at chiral/c2s")),
        "{error}"
    );

    // What is wrong is dropped, and the session goes on.
    *stand.script.reset_fails.lock().unwrap() = Some("no gripper".to_owned());
    for wrong in [lying_apply_action(), Bytes::from_static(b"garbage"), frame_of(reset())] {
        voice.say(wrong);
    }
    let resets =
        |stand: &Harness| stand.script.events().iter().filter(|event| **event == Event::ResetBegan).count();
    stand.until("the reset has failed", |stand| resets(stand) == 2).await;
    assert_eq!(stand.handle.stats().actions_refused, 1);
    // Asked again until it is heard: nobody is told when the failed one is over.
    let obs = loop {
        voice.ask(Request::GetObs);
        if let Ok(answer) = timeout(Duration::from_millis(100), voice.heard.recv()).await {
            break reply_of(answer.unwrap());
        }
    };
    assert_eq!(kind(&obs), "obs_response");
}

/// 17 MB of colour and depth, as [`harness::publish`] fills them.
fn check_pixels(reply: &Reply) {
    let Reply::Observation(obs) = reply else { panic!("expected an observation") };
    let camera = obs.camera(CAMERA).unwrap();
    let depth = camera.depth.as_ref().unwrap();
    assert_eq!(camera.image.data().len() + depth.data().len(), 1228 * 2000 * 7);
    assert!(camera.image.data().iter().all(|byte| *byte == 1));
    assert!(depth.values::<f32>().unwrap().iter().all(|depth| *depth == 1.0));
}

#[tokio::test]
async fn an_observation_of_17_mb_arrives_as_it_was_taken() {
    let uri = format!("tcp/{}", free_address());
    let stand = Harness::with(Arc::default(), 1228, 2000, |builder| {
        builder.name("arm").listen_zenoh(&uri).discovery(false)
    });
    let mut peer = Peer::connect(serve(&stand).await).await;
    for _ in 0..3 {
        peer.say(frame_of(Request::GetObs)).await;
        peer.0.send(tungstenite::Message::Ping(Bytes::from_static(b"meanwhile"))).await.unwrap();
    }
    let (mut pongs, mut observations) = (0, 0);
    while pongs == 0 || observations < 3 {
        match peer.hear().await {
            tungstenite::Message::Pong(_) => pongs += 1,
            tungstenite::Message::Binary(frame) => {
                check_pixels(&reply_of(frame));
                observations += 1;
            }
            other => panic!("expected an observation or a pong, found {other:?}"),
        }
    }
    drop(peer);
    stand.until("the robot is free", |stand| stand.handle.stats().sessions == 0).await;
    let mut voice = Voice::on(&uri).await;
    voice.begin().await;
    for _ in 0..3 {
        voice.ask(Request::GetObs);
        check_pixels(&voice.reply().await);
    }
}

#[tokio::test]
async fn a_second_clients_words_over_zenoh_are_not_answered() {
    let (stand, uri) = serve_zenoh(|builder| builder);
    let mut voice = Voice::on(&uri).await;
    voice.begin().await;
    // Out of turn: while the first is owed its answer.
    stand.script.reset_gate.close();
    voice.ask(reset());
    stand.until("the robot homes", |stand| stand.script.reset_gate.is_waited_at()).await;
    for request in [reset(), Request::GetObs, step(1), Request::GetMetadata, Request::GetMetadata] {
        voice.ask(request);
    }
    // Heard after all of these, and counted: actions come while a reset runs.
    voice.say(apply_action([0.5; DIMENSION]));
    stand.until("they were heard", |stand| stand.handle.stats().actions_refused == 1).await;
    stand.script.reset_gate.open();
    assert_eq!(voice.kind().await, "reset_response");
    voice.ask(step(1));
    assert_eq!(voice.kind().await, "step_response", "and no answer to anything else");
    let resets = stand.script.events().iter().filter(|event| **event == Event::ResetBegan).count();
    assert_eq!((resets, stand.script.applied().len()), (1, 1));

    // A probe while somebody plays; the next request says that nobody waited for it.
    voice.ask(Request::GetMetadata);
    voice.ask(step(1));
    assert_eq!(voice.kind().await, "step_response");
    // The client's own question, after which it waits; not soon after somebody probed.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    voice.ask(Request::GetMetadata);
    assert_eq!(voice.kind().await, "metadata_response");
    voice.ask(step(1));
    assert_eq!(voice.kind().await, "step_response");
}

#[tokio::test]
async fn whoever_asks_as_soon_as_it_is_answered_is_in_turn() {
    let uri = format!("tcp/{}", free_address());
    let stand = Harness::with(Arc::default(), 128, 96, |builder| {
        builder.name("arm").listen_zenoh(&uri).discovery(false)
    });
    tokio::spawn(stand.server.clone().serve());
    let mut voice = Voice::on(&uri).await;
    voice.begin().await;
    // On a busy machine the answer is often heard before the server knows that it is sent.
    let busy = Arc::new(());
    for _ in 0..3 {
        let busy = Arc::downgrade(&busy);
        thread::spawn(move || while busy.strong_count() > 0 {});
    }
    for _ in 0..1000 {
        voice.ask(Request::GetObs);
        assert_eq!(voice.kind().await, "obs_response");
    }
}

#[tokio::test]
async fn silence_over_zenoh_frees_the_robot() {
    let (stand, uri) = serve_zenoh(|builder| builder.idle_timeout(Duration::from_millis(2500)));
    let mut voice = Voice::on(&uri).await;
    voice.begin().await;
    voice.ask(reset());
    assert_eq!(voice.kind().await, "reset_response");
    stand.until("the robot holds", has_held).await;
    let ours = client(&uri).name("the night shift").connect().await.unwrap();
    assert_eq!(ours.reset().await.unwrap().0.episode, 2);

    // Held by another: not answered, and the robot is not moved. By its own pings, ours outlives the legacy
    // client's limit.
    voice.say(apply_action([0.5; DIMENSION]));
    voice.ask(step(1));
    assert!(timeout(Duration::from_millis(500), voice.heard.recv()).await.is_err());
    assert_eq!(ours.step([0.25; DIMENSION]).await.unwrap().reward, 1.0);
    assert_eq!(stand.script.applied(), [[0.25; DIMENSION]]);
    ours.close().await.unwrap();
    voice.begin().await;
}

#[tokio::test]
async fn a_client_that_leaves_zenoh_frees_the_robot_at_once() {
    let (stand, uri) = serve_zenoh(|builder| builder.idle_timeout(Duration::from_secs(3600)));
    for _ in 0..3 {
        let mut voice = Voice::on(&uri).await;
        voice.begin().await;
        voice.ask(reset());
        assert_eq!(voice.kind().await, "reset_response");
        drop(voice);
        stand.until("the robot holds", has_held).await;
    }
}

#[tokio::test]
async fn where_there_are_two_robots_none_takes_an_legacy_clients_word() {
    let (arm, uri) = serve_zenoh(|builder| builder);
    until_open(&uri).await;
    let leg = stand_with(|builder| builder.name("leg").join_zenoh(&uri));
    tokio::spawn(leg.server.clone().serve());
    let alive = async {
        loop {
            let error = client(&uri)
                .robot("nobody")
                .deadline(Duration::from_millis(900))
                .connect()
                .await
                .unwrap_err();
            if ["arm", "leg"].iter().all(|name| error.to_string().contains(name)) {
                break;
            }
        }
    };
    timeout(GUARD, alive).await.expect("both are alive");
    let mut voice = Voice::on(&uri).await;
    for _ in 0..10 {
        voice.ask(reset());
        assert!(timeout(Duration::from_millis(100), voice.heard.recv()).await.is_err(), "nobody answers");
    }
    assert!([&arm, &leg].iter().all(|stand| stand.script.events().is_empty()));
    // Alone again.
    leg.handle.shutdown();
    voice.begin().await;
}
