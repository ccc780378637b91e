//! Our client at servers that were there before us: raw ones, which know nothing but their wire; and at our
//! own, which knows it, too.
#![allow(clippy::unwrap_used, reason = "helpers of tests, too, fail by panicking")]
#![allow(clippy::result_large_err, reason = "tungstenite's callback has such an error")]

mod support;

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use chiral_client::{
    Camera, Code, Codec, Error, Observation, PolicyClient, PolicyClientBuilder, PutMode, StreamOptions,
    Timestamp, Value, ValueMap, blocking,
    proto::{
        Frame, Message, Notice, Proprio, Reply, Request, StepResult, Tensor,
        codec::msgpack::{self, Decoded, ID},
        value,
    },
};
use futures_util::{FutureExt, SinkExt, StreamExt};
use nalgebra::{Matrix3, Matrix4};
use support::harness::{self, DIMENSION, Event, Harness, free_address};
use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, TcpStream},
    task::JoinHandle,
    time::{Instant, timeout},
};
use tokio_tungstenite::{
    WebSocketStream, accept_async, accept_hdr_async,
    tungstenite::{
        self,
        handshake::server::{ErrorResponse, Request as Upgrade, Response},
        protocol::{CloseFrame, frame::coding::CloseCode},
    },
};
use zenoh::Wait;

/// For what must come; no test measures time by it.
const GUARD: Duration = Duration::from_secs(20);
const ROW: [f32; 3] = [0.25, -0.5, 1.0];

/// What a server understands, and what it was told.
#[derive(Clone, Default)]
struct Legacy {
    observes: bool,
    steps: bool,
    /// How long each answer takes.
    pace: Duration,
    heard: Arc<Mutex<Vec<Decoded>>>,
    /// What came while an answer was owed.
    out_of_turn: Arc<Mutex<Vec<&'static str>>>,
}

/// The server's end of one connection.
struct Server {
    socket: WebSocketStream<TcpStream>,
    observations: u64,
}

/// A listener that no one has called yet, and its address.
async fn listener() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let uri = format!("ws://{}", listener.local_addr().unwrap());
    (listener, uri)
}

fn builder(uri: &str) -> PolicyClientBuilder {
    PolicyClient::builder(uri).quiet().deadline(GUARD)
}

/// A client, and a server that does what the test says and nothing by itself.
async fn met(configure: impl FnOnce(PolicyClientBuilder) -> PolicyClientBuilder) -> (PolicyClient, Server) {
    let (listener, uri) = listener().await;
    let connecting = tokio::spawn(configure(builder(&uri)).connect());
    let mut server = Server::accept(&listener).await;
    server.answer("metadata", Reply::Metadata(ValueMap::new())).await;
    let client = timeout(GUARD, connecting).await.unwrap().unwrap().unwrap();
    assert_eq!(client.codec(), Codec::Msgpack);
    (client, server)
}

/// A server that answers by itself, every client that comes.
async fn serve(legacy: &Legacy) -> (String, JoinHandle<()>) {
    let (listener, uri) = listener().await;
    let legacy = legacy.clone();
    let serving = tokio::spawn(async move {
        loop {
            Server::accept(&listener).await.run(&legacy).await;
        }
    });
    (uri, serving)
}

fn kind(message: &Message) -> &'static str {
    match message {
        Message::Request { request: Request::GetMetadata, .. } => "metadata",
        Message::Request { request: Request::Reset { .. }, .. } => "reset",
        Message::Request { request: Request::GetObs, .. } => "obs_request",
        Message::Request { request: Request::Step { .. }, .. } => "action",
        Message::Notice(Notice::Action(_)) => "apply_action",
        other => panic!("no client says {other:?}"),
    }
}

impl Legacy {
    fn streaming() -> Legacy {
        Legacy { observes: true, ..Legacy::default() }
    }

    fn gym() -> Legacy {
        Legacy { steps: true, ..Legacy::default() }
    }

    fn kinds(&self) -> Vec<&'static str> {
        self.heard.lock().unwrap().iter().map(|said| kind(&said.message)).collect()
    }

    /// The capture times that came with the actions.
    fn times(&self) -> Vec<ValueMap> {
        let heard = self.heard.lock().unwrap();
        let actions = heard.iter().filter(|said| kind(&said.message).contains("action"));
        actions.map(|said| said.capture_times.clone()).collect()
    }

    fn count(&self, wanted: &str) -> usize {
        self.kinds().iter().filter(|kind| **kind == wanted).count()
    }

    async fn until(&self, what: &str, holds: impl Fn(&Legacy) -> bool) {
        let began = Instant::now();
        while !holds(self) {
            assert!(began.elapsed() < GUARD, "{what}: {:?}", self.kinds());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

impl Server {
    /// The next client. No subprotocol is chosen.
    async fn accept(listener: &TcpListener) -> Server {
        let (stream, _) = listener.accept().await.unwrap();
        let socket = accept_async(stream).await.unwrap();
        Server { socket, observations: 0 }
    }

    /// What the client says next, its pings answered meanwhile; `None` at the connection's end.
    async fn hear(&mut self) -> Option<Decoded> {
        loop {
            match timeout(GUARD, self.socket.next()).await.expect("something is said")? {
                Ok(tungstenite::Message::Binary(frame)) => {
                    return Some(msgpack::decode(frame.into()).unwrap());
                }
                Ok(tungstenite::Message::Close(_)) | Err(_) => return None,
                Ok(_) => {}
            }
        }
    }

    async fn expect(&mut self, wanted: &str) -> Decoded {
        let said = self.hear().await.expect("the client is there");
        assert_eq!(kind(&said.message), wanted);
        said
    }

    /// For so long only pings may come, which are answered.
    async fn answer_pings(&mut self, duration: Duration) {
        let end = Instant::now() + duration;
        while let Ok(said) = tokio::time::timeout_at(end, self.socket.next()).await {
            let said = said.unwrap().unwrap();
            assert!(said.is_ping(), "{said:?}");
        }
    }

    async fn say(&mut self, reply: Reply) {
        let frame = msgpack::encode(&Message::Reply { id: ID, reply }, &ValueMap::new()).unwrap();
        self.say_bytes(frame.into_bytes().to_vec()).await;
    }

    async fn say_bytes(&mut self, bytes: Vec<u8>) {
        let _ = self.socket.send(tungstenite::Message::binary(bytes)).await;
    }

    async fn answer(&mut self, wanted: &str, reply: Reply) -> Decoded {
        let said = self.expect(wanted).await;
        self.say(reply).await;
        said
    }

    /// The next observation, told from others by its number.
    fn observe(&mut self) -> Arc<Observation> {
        self.observations += 1;
        observation(self.observations)
    }

    async fn run(mut self, legacy: &Legacy) {
        while let Some(said) = self.hear().await {
            legacy.heard.lock().unwrap().push(said.clone());
            let reply = match kind(&said.message) {
                "metadata" => Reply::Metadata(value::map([("kind", "legacy".into())])),
                "reset" => Reply::Reset { obs: self.observe(), info: value::map([("begun", true.into())]) },
                "obs_request" if legacy.observes => Reply::Observation(self.observe()),
                "action" if legacy.steps => Reply::Step(stepped(self.observe())),
                _ => continue,
            };
            let (mut replies, end) = (vec![reply], Instant::now() + legacy.pace);
            while let Ok(Some(Ok(more))) = tokio::time::timeout_at(end, self.socket.next()).await {
                let tungstenite::Message::Binary(frame) = more else { continue };
                let said = msgpack::decode(frame.into()).unwrap();
                let kind = kind(&said.message);
                legacy.heard.lock().unwrap().push(said);
                if kind != "apply_action" {
                    legacy.out_of_turn.lock().unwrap().push(kind);
                }
                if kind == "metadata" {
                    replies.push(Reply::Metadata(ValueMap::new()));
                }
            }
            for reply in replies {
                self.say(reply).await;
            }
        }
    }
}

fn stepped(obs: Arc<Observation>) -> StepResult {
    StepResult {
        obs,
        reward: 0.5,
        terminated: true,
        truncated: false,
        info: value::map([("success", true.into())]),
    }
}

/// Two cameras, one with depth, and joints.
fn observation(n: u64) -> Arc<Observation> {
    let camera = |name: &str, depth| {
        Arc::new(Camera {
            name: name.into(),
            seq: 0,
            captured_at: Timestamp(1_000_000_000 * n as i64 + 1),
            image: Tensor::from_vec([2, 2, 3], vec![n as u8; 12]).unwrap(),
            depth,
            intrinsics: Matrix3::identity(),
            extrinsics: Matrix4::identity(),
        })
    };
    let depth = Tensor::from_vec([2, 2], vec![n as f32; 4]).unwrap();
    let joints = Proprio {
        name: "joint_pos".into(),
        captured_at: Timestamp(0),
        data: Tensor::from_vec([3], vec![n as f32; 3]).unwrap(),
    };
    Arc::new(Observation {
        timestamp: n as f64,
        cameras: vec![camera("wrist_cam", Some(depth)), camera("head_cam", None)],
        proprios: vec![Arc::new(joints)],
        ..Observation::default()
    })
}

/// What must be over soon.
async fn within<T>(future: impl Future<Output = T>) -> T {
    timeout(GUARD, future).await.expect("it is over in time")
}

// ---- Which wire -------------------------------------------------------------------------------------------

#[tokio::test]
async fn a_server_that_chooses_no_subprotocol_is_an_legacy_one() {
    let legacy = Legacy::streaming();
    let (uri, _serving) = serve(&legacy).await;
    let env = builder(&uri).connect().await.unwrap();
    assert_eq!(
        (env.codec(), env.robot().name.as_str(), env.robot().action_spec.dimension),
        (Codec::Msgpack, uri.as_str(), 0)
    );
    assert_eq!(env.get_metadata().await.unwrap()["kind"].as_str(), Some("legacy"));
    env.close().await.unwrap();

    let error = builder(&uri).codec(Codec::Protobuf).connect().await.unwrap_err();
    assert!(matches!(error, Error::NotProtobuf), "{error:?}");
    assert!(error.to_string().contains("without the subprotocol chiral.v1"), "{error}");
}

#[tokio::test]
async fn a_client_that_is_to_speak_msgpack_offers_nothing_else_and_one_that_is_refused_for_its_offer_asks_again()
 {
    let (listener, uri) = listener().await;
    let serving = tokio::spawn(async move {
        let mut offers = Vec::new();
        for _ in 0..3 {
            let (stream, _) = listener.accept().await.unwrap();
            let strict = |upgrade: &Upgrade, response: Response| {
                offers.push(upgrade.headers().contains_key("Sec-WebSocket-Protocol"));
                if offers.last() == Some(&false) {
                    return Ok(response);
                }
                let mut refusal = ErrorResponse::new(Some("no such subprotocol".to_owned()));
                *refusal.status_mut() = tungstenite::http::StatusCode::BAD_REQUEST;
                Err(refusal)
            };
            let Ok(socket) = accept_hdr_async(stream, strict).await else { continue };
            let mut server = Server { socket, observations: 0 };
            server.answer("metadata", Reply::Metadata(ValueMap::new())).await;
            assert!(server.hear().await.is_none());
        }
        offers
    });
    for builder in [builder(&uri).codec(Codec::Msgpack), builder(&uri)] {
        let env = builder.connect().await.unwrap();
        assert_eq!(env.codec(), Codec::Msgpack);
        env.close().await.unwrap();
    }
    assert_eq!(within(serving).await.unwrap(), [false, true, false]);
}

#[tokio::test]
async fn what_answers_no_metadata_is_no_server() {
    let (listener, uri) = listener().await;
    let connecting = tokio::spawn(builder(&uri).request_timeout(Duration::from_millis(200)).connect());
    let mut server = Server::accept(&listener).await;
    server.expect("metadata").await;
    let error = within(connecting).await.unwrap().unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
}

// ---- Generations ------------------------------------------------------------------------------------------

#[tokio::test]
async fn a_streaming_server_is_found_by_its_observation_and_asked_for_each() {
    let legacy = Legacy::streaming();
    let (uri, _serving) = serve(&legacy).await;
    let env = builder(&uri).connect().await.unwrap();
    let (first, info) = env.reset().await.unwrap();
    assert_eq!((first.episode, first.seq, info["begun"].as_bool()), (1, 1, Some(true)));
    let obs = env.get_obs().await.unwrap();
    assert_eq!((obs.episode, obs.seq, obs.timestamp), (1, 2, 2.0));
    assert_eq!(legacy.kinds(), ["metadata", "reset", "obs_request", "metadata"]);
    assert_eq!(env.get_obs().await.unwrap().seq, 3, "it is known now");
    assert_eq!(obs["wrist_cam"].depth.as_ref().unwrap().values::<f32>().unwrap()[..], [2.0; 4]);
    assert_eq!(env.age(obs["wrist_cam"].captured_at), None, "the clocks cannot be compared");

    assert!(matches!(env.next_obs(GUARD).await, Err(Error::NotStreaming)));
    env.start_obs_stream(200.0).await.unwrap();
    let mut last = 3;
    for _ in 0..5 {
        let obs = env.next_obs(GUARD).await.unwrap();
        assert!(obs.seq > last && obs.episode == 1);
        last = obs.seq;
    }
    let (first, _) = env.reset().await.unwrap();
    assert_eq!(first.episode, 2);
    assert_eq!(env.next_obs(GUARD).await.unwrap().episode, 2, "nothing older is shown");
    env.stop_obs_stream().await.unwrap();
    // What was asked before may still be on its way.
    env.get_metadata().await.unwrap();
    let asked = legacy.count("obs_request");
    tokio::time::sleep(Duration::from_millis(50)).await;
    env.get_metadata().await.unwrap();
    assert_eq!(legacy.count("obs_request"), asked, "nobody asks any more");
    assert!(env.latest_obs().unwrap().is_some());

    let options = StreamOptions::hz(100.0).cameras(["wrist_cam"]).without_depth();
    env.start_obs_stream(options).await.unwrap();
    let obs = env.next_obs(GUARD).await.unwrap();
    assert_eq!((obs.cameras.len(), obs["wrist_cam"].depth.is_none()), (1, true));
    let error = env.start_obs_stream(StreamOptions::hz(100.0).cameras(["foot_cam"])).await.unwrap_err();
    assert!(error.to_string().contains("wrist_cam, head_cam"), "{error}");
}

#[tokio::test]
async fn a_gym_like_server_is_found_by_its_metadata_and_observes_in_reset_and_step() {
    let legacy = Legacy::gym();
    let (uri, _serving) = serve(&legacy).await;
    let env = builder(&uri).connect().await.unwrap();
    let nothing_yet = env.get_obs().await.unwrap_err();
    assert!(matches!(nothing_yet, Error::Unsupported { .. }), "{nothing_yet:?}");
    assert_eq!(legacy.kinds(), ["metadata", "obs_request", "metadata"]);
    let (first, _) = env.reset().await.unwrap();
    assert_eq!(env.get_obs().await.unwrap(), first, "there is none newer");
    let result = env.step([ROW, ROW]).await.unwrap();
    assert_eq!((result.reward, result.terminated, result.info["success"].as_bool()), (0.5, true, Some(true)));
    assert_eq!(env.get_obs().await.unwrap().seq, result.obs.seq);
    let error = env.start_obs_stream(30.0).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "the server cannot stream observations: it observes in reset and step only"
    );
    // Actions move it all the same, and what they led to is the newest.
    env.start_action_dispatch(200.0).unwrap();
    env.put_action(ROW).await.unwrap();
    legacy.until("the action", |legacy| legacy.count("action") == 2).await;
    env.send_action([ROW, ROW]).await.unwrap();
    assert_eq!(env.get_obs().await.unwrap().seq, 4);
    assert_eq!(legacy.kinds()[3..], ["reset", "action", "action", "action"]);
    let shapes: Vec<usize> = legacy.heard.lock().unwrap().iter().filter_map(rows).collect();
    assert_eq!(shapes, [2, 1, 2]);
}

fn rows(said: &Decoded) -> Option<usize> {
    match &said.message {
        Message::Request { request: Request::Step { actions, .. }, .. } => Some(actions.rows()),
        Message::Notice(Notice::Action(action)) => Some(action.actions.rows()),
        _ => None,
    }
}

#[tokio::test]
async fn steps_are_made_of_actions_and_observations_where_there_are_none() {
    let legacy = Legacy::streaming();
    let (uri, _serving) = serve(&legacy).await;
    let env = builder(&uri).connect().await.unwrap();
    env.reset().await.unwrap();
    for n in 2..4 {
        let result = env.step([ROW, ROW]).await.unwrap();
        assert_eq!(
            (result.obs.seq, result.reward, result.terminated, result.truncated),
            (n, 0.0, false, false)
        );
    }
    // What it ignores moves nothing.
    let first = ["action", "metadata", "apply_action", "obs_request", "metadata"];
    assert_eq!(legacy.kinds()[2..], [&first[..], &["apply_action", "obs_request"]].concat());
    assert_eq!(env.stats().actions_sent, 2);
}

#[tokio::test]
async fn of_a_server_that_speaks_both_each_call_takes_its_own() {
    let legacy = Legacy { observes: true, ..Legacy::gym() };
    let (uri, _serving) = serve(&legacy).await;
    let env = builder(&uri).connect().await.unwrap();
    env.reset().await.unwrap();
    assert_eq!(env.step(ROW).await.unwrap().reward, 0.5);
    assert_eq!(env.get_obs().await.unwrap().seq, 3);
    env.send_action(ROW).await.unwrap();
    env.step(ROW).await.unwrap();
    let expected =
        ["metadata", "reset", "action", "metadata", "obs_request", "metadata", "apply_action", "action"];
    assert_eq!(legacy.kinds(), expected);
}

// ---- Actions ----------------------------------------------------------------------------------------------

/// Whatever times a server puts into an observation come back with the actions that were chosen by it, and
/// not with others.
#[tokio::test]
async fn capture_times_come_back_bit_for_bit() {
    let frames: [&[u8]; 3] = [
        include_bytes!("../../chiral-proto/tests/msgpack/varied-nanos.bin"),
        include_bytes!("../../chiral-proto/tests/msgpack/varied-unix.bin"),
        include_bytes!("../../chiral-proto/tests/msgpack/obs_response.bin"),
    ];
    let (env, mut server) = met(|builder| builder).await;
    let reset = tokio::spawn({
        let env = env.clone();
        async move { env.reset().await.map(drop) }
    });
    let obs = server.observe();
    server.answer("reset", Reply::Reset { obs, info: ValueMap::new() }).await;
    reset.await.unwrap().unwrap();
    let reset_times =
        value::map([("wrist_cam", Value::Float(1.000_000_001)), ("head_cam", Value::Float(1.000_000_001))]);
    for (n, frame) in frames.into_iter().enumerate() {
        let expected = msgpack::decode(Frame::from(Bytes::from_static(frame))).unwrap().capture_times;
        assert!(!expected.is_empty());
        let observing = async {
            server.expect("obs_request").await;
            server.say_bytes(frame.to_vec()).await;
            if n == 0 {
                server.answer("metadata", Reply::Metadata(ValueMap::new())).await;
            }
        };
        // Queued before the observation is seen, sent after it.
        env.clear_actions();
        env.put_action(ROW).await.unwrap();
        let (obs, ()) = within(async { tokio::join!(env.get_obs(), observing) }).await;
        env.put_chunk([ROW, ROW], PutMode::Append).await.unwrap();
        drop(obs.unwrap());
        env.send_action(ROW).await.unwrap();
        let said = server.expect("apply_action").await;
        assert_eq!(bits(&said.capture_times), bits(&expected), "sent at once");
        env.start_action_dispatch(100.0).unwrap();
        let before = server.expect("apply_action").await.capture_times;
        assert!(bits(&before) != bits(&expected), "{before:?} is of the observation before");
        assert!(n > 0 || before == reset_times, "{before:?}");
        for _ in 0..2 {
            let said = server.expect("apply_action").await;
            assert_eq!(
                (bits(&said.capture_times), rows(&said)),
                (bits(&expected), Some(1)),
                "from the queue"
            );
        }
        env.stop_action_dispatch();
    }
}

fn bits(times: &ValueMap) -> Vec<(String, String, u64)> {
    let bits = |time: &Value| match time {
        Value::Int(time) => ("int".to_owned(), *time as u64),
        Value::Float(time) => ("float".to_owned(), time.to_bits()),
        other => panic!("{other:?} is no time"),
    };
    times.iter().map(|(camera, time)| (camera.clone(), bits(time).0, bits(time).1)).collect()
}

#[tokio::test]
async fn calls_and_the_stream_take_turns_and_actions_wait_for_neither() {
    let legacy = Legacy { pace: Duration::from_millis(5), ..Legacy::streaming() };
    let (uri, _serving) = serve(&legacy).await;
    let env = builder(&uri).connect().await.unwrap();
    env.reset().await.unwrap();
    env.start_obs_stream(1000.0).await.unwrap();
    env.start_action_dispatch(500.0).unwrap();
    for _ in 0..10 {
        env.next_obs(GUARD).await.unwrap();
        env.put_action(ROW).await.unwrap();
        env.get_metadata().await.unwrap();
        env.get_obs().await.unwrap();
    }
    legacy.until("all actions", |legacy| legacy.count("apply_action") == 10).await;
    assert!(legacy.times().iter().all(|times| times.len() == 2), "{:?}", legacy.times());
    assert_eq!(*legacy.out_of_turn.lock().unwrap(), ["metadata"], "only the question which generation it is");
}

#[tokio::test]
async fn actions_that_a_reset_overtakes_are_not_sent() {
    let (env, mut server) = met(|builder| builder).await;
    let obs = server.observe();
    let told = async {
        server.answer("obs_request", Reply::Observation(obs)).await;
        server.answer("metadata", Reply::Metadata(ValueMap::new())).await;
    };
    let (obs, ()) = tokio::join!(env.get_obs(), told);
    obs.unwrap();
    env.start_action_dispatch(1000.0).unwrap();
    // Given up by its caller, but the server will have done it.
    let resetting = env.reset().now_or_never();
    assert!(resetting.is_none());
    server.expect("reset").await;
    env.put_action(ROW).await.unwrap();
    let error = env.send_action(ROW).await.unwrap_err();
    assert!(matches!(&error, Error::ActionRefused(fault) if fault.code == Code::Stale), "{error:?}");
    let obs = server.observe();
    server.say(Reply::Reset { obs, info: ValueMap::new() }).await;
    let obs = server.observe();
    let observing = async { server.answer("obs_request", Reply::Observation(obs)).await };
    let (obs, _) = within(async { tokio::join!(env.get_obs(), observing) }).await;
    assert_eq!(obs.unwrap().episode, 1);
    env.put_action([9.0; 3]).await.unwrap();
    let said = server.expect("apply_action").await;
    let Message::Notice(Notice::Action(action)) = said.message else { panic!("{said:?}") };
    assert_eq!(action.actions.values(), [9.0; 3]);
    assert_eq!(env.stats().actions_discarded, 1);
}

// ---- What cannot be said ----------------------------------------------------------------------------------

#[tokio::test]
async fn what_the_wire_has_no_words_for_fails_and_says_so() {
    let legacy = Legacy::streaming();
    let (uri, _serving) = serve(&legacy).await;
    let env = builder(&uri).observer().connect().await.unwrap();
    for error in [env.reset().await.map(drop), env.step(ROW).await.map(drop), env.send_action(ROW).await] {
        let error = error.unwrap_err();
        assert!(matches!(&error, Error::Rejected(fault) if fault.code == Code::NotController), "{error:?}");
    }
    assert!(env.get_obs().await.is_ok());
    env.close().await.unwrap();

    let env = builder(&uri).connect().await.unwrap();
    let error = env.reset_with(Some(3), ValueMap::new()).await.unwrap_err();
    assert!(matches!(error, Error::EncodeError(_)), "{error:?}");
    assert!(error.to_string().contains("a reset with a seed or options"), "{error}");
    assert!(matches!(env.send_action([f32::NAN]).await, Err(Error::InvalidAction(_))));
    assert_eq!(env.reset().await.unwrap().0.episode, 1, "nothing was sent");
}

// ---- What goes wrong --------------------------------------------------------------------------------------

#[tokio::test]
async fn an_answer_that_comes_late_is_nobody_elses() {
    let (env, mut server) = met(|builder| builder.request_timeout(Duration::from_millis(1000))).await;
    let obs = server.observe();
    let told = async {
        server.answer("obs_request", Reply::Observation(obs)).await;
        server.answer("metadata", Reply::Metadata(ValueMap::new())).await;
    };
    let (obs, ()) = within(async { tokio::join!(env.get_obs(), told) }).await;
    assert_eq!(obs.unwrap().timestamp, 1.0);

    let (late, _) = within(async { tokio::join!(env.get_obs(), server.expect("obs_request")) }).await;
    assert!(matches!(late, Err(Error::Timeout { .. })), "{late:?}");
    // Of another kind: cannot be mistaken.
    let (late, next) = (server.observe(), server.observe());
    let telling = async {
        server.expect("metadata").await;
        server.say(Reply::Observation(late)).await;
        server.say(Reply::Metadata(value::map([("n", 2.into())]))).await;
    };
    let (metadata, ()) = within(async { tokio::join!(env.get_metadata(), telling) }).await;
    assert_eq!(metadata.unwrap()["n"].as_i64(), Some(2));

    // Of the same: asked for again only when it is certain which one comes, or that none does.
    for is_lost in [false, true] {
        let (late, _) = within(async { tokio::join!(env.get_obs(), server.expect("obs_request")) }).await;
        assert!(matches!(late, Err(Error::Timeout { .. })), "{late:?}");
        let late = server.observe();
        let next = next.clone();
        let telling = async {
            server.expect("metadata").await;
            if !is_lost {
                server.say(Reply::Observation(late)).await;
            }
            server.say(Reply::Metadata(ValueMap::new())).await;
            server.answer("obs_request", Reply::Observation(next)).await;
        };
        let (obs, ()) = within(async { tokio::join!(env.get_obs(), telling) }).await;
        assert_eq!(obs.unwrap().timestamp, 3.0, "lost: {is_lost}");
    }
}

#[tokio::test]
async fn a_stream_whose_server_does_not_answer_ends_with_an_error() {
    let (env, mut server) = met(|builder| builder.request_timeout(Duration::from_millis(1000))).await;
    let obs = server.observe();
    let told = async {
        server.answer("obs_request", Reply::Observation(obs)).await;
        server.answer("metadata", Reply::Metadata(ValueMap::new())).await;
    };
    let (started, ()) = within(async { tokio::join!(env.start_obs_stream(50.0), told) }).await;
    started.unwrap();
    let (obs, _) = tokio::join!(env.next_obs(GUARD), server.expect("obs_request"));
    let error = obs.unwrap_err();
    assert!(matches!(&error, Error::StreamEnded { reason } if reason.contains("within 1 s")), "{error:?}");
}

#[tokio::test]
async fn resets_and_steps_outlast_the_silence_limit_also_while_no_ping_is_answered_and_nothing_else_does() {
    let (env, mut server) = met(|builder| builder.idle_timeout(Duration::from_millis(1000))).await;
    for episode in 1..=2 {
        let obs = server.observe();
        let resetting = async {
            server.expect("reset").await;
            if episode == 1 {
                server.answer_pings(Duration::from_millis(2200)).await;
            } else {
                // As one whose only thread homes the robot.
                tokio::time::sleep(Duration::from_millis(2200)).await;
            }
            server.say(Reply::Reset { obs, info: ValueMap::new() }).await;
        };
        let (reset, ()) = within(async { tokio::join!(env.reset(), resetting) }).await;
        assert_eq!(reset.unwrap().0.episode, episode);
    }
    let obs = server.observe();
    let stepping = async {
        server.expect("action").await;
        server.expect("metadata").await;
        tokio::time::sleep(Duration::from_millis(2200)).await;
        server.say(Reply::Step(stepped(obs))).await;
        server.say(Reply::Metadata(ValueMap::new())).await;
    };
    let (step, ()) = within(async { tokio::join!(env.step(ROW), stepping) }).await;
    assert_eq!(step.unwrap().reward, 0.5);
    let error = within(env.get_obs()).await.unwrap_err();
    assert!(
        matches!(&error, Error::Disconnected { reason, .. } if reason.contains("nothing heard for 1 s")),
        "{error:?}"
    );
    assert!(env.latest_obs().is_err());
}

/// One drops what it finds wrong, and answers pings as before.
#[tokio::test]
async fn what_a_server_never_answers_fails_in_time_and_the_session_lives() {
    let (env, mut server) = met(|builder| builder.reply_timeout(Duration::from_millis(1000))).await;
    let passing_over = async {
        for _ in 0..2 {
            server.expect("reset").await;
            // Which of the two the next answer is to, this tells.
            server.answer("metadata", Reply::Metadata(ValueMap::new())).await;
        }
    };
    let asking = async {
        for _ in 0..2 {
            let error = env.reset().await.unwrap_err();
            assert_eq!(error.to_string(), "expected an answer to the reset within 1 s, found none");
            assert!(env.get_metadata().await.is_ok());
        }
    };
    within(async { tokio::join!(asking, passing_over) }).await;

    // A step that is passed over shows at once, by the metadata that is asked for behind it; and says nothing
    // of the next one.
    let passing_over = async {
        server.expect("action").await;
        server.answer("metadata", Reply::Metadata(ValueMap::new())).await;
        server.expect("apply_action").await;
        server.expect("obs_request").await;
        server.answer("metadata", Reply::Metadata(ValueMap::new())).await;
    };
    let (step, ()) = within(async { tokio::join!(env.step(ROW), passing_over) }).await;
    let error = step.unwrap_err();
    assert!(matches!(&error, Error::Unsupported { why, .. } if why.contains("passed over")), "{error:?}");
    let obs = server.observe();
    let (step, _) =
        within(async { tokio::join!(env.step(ROW), server.answer("action", Reply::Step(stepped(obs)))) })
            .await;
    assert_eq!(step.unwrap().reward, 0.5);
}

#[tokio::test]
async fn an_answer_that_comes_slowly_is_no_silence() {
    let (env, mut server) = met(|builder| builder.idle_timeout(Duration::from_millis(1000))).await;
    let reply = Reply::Metadata(value::map([("filler", Value::Bytes(vec![0; 8000].into()))]));
    let frame = msgpack::encode(&Message::Reply { id: ID, reply }, &ValueMap::new()).unwrap().into_bytes();
    let answering = async {
        server.expect("metadata").await;
        let stream = server.socket.get_mut();
        let len = u16::try_from(frame.len()).unwrap().to_be_bytes();
        stream.write_all(&[0x82, 126, len[0], len[1]]).await.unwrap();
        for piece in frame.chunks(frame.len() / 10) {
            tokio::time::sleep(Duration::from_millis(200)).await;
            stream.write_all(piece).await.unwrap();
        }
    };
    let (metadata, ()) = within(async { tokio::join!(env.get_metadata(), answering) }).await;
    assert_eq!(metadata.unwrap().len(), 1);
}

#[tokio::test]
async fn garbage_and_answers_that_nobody_asked_for_end_the_session_and_a_broken_answer_its_request() {
    for (said, expected) in [
        (b"garbage".to_vec(), "malformed"),
        (
            include_bytes!("../../chiral-proto/tests/msgpack/step_response.bin").to_vec(),
            "found a step_response",
        ),
        (include_bytes!("../../chiral-proto/tests/msgpack/reset.bin").to_vec(), "expected answers"),
    ] {
        let (env, mut server) = met(|builder| builder).await;
        let telling = async {
            server.expect("metadata").await;
            server.say_bytes(said).await;
        };
        let (metadata, ()) = within(async { tokio::join!(env.get_metadata(), telling) }).await;
        let error = metadata.unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
        assert_eq!(env.get_obs().await.unwrap_err().to_string(), error.to_string());
    }
    let (env, mut server) = met(|builder| builder).await;
    let broken: &[u8] = include_bytes!("../../../fuzz/seeds/msgpack/hostile-wrong_size.bin");
    let field = msgpack::decode(Frame::from(Bytes::from_static(broken))).unwrap_err().field;
    let answered = if field.starts_with("obs_response") { "obs_request" } else { "reset" };
    let telling = async {
        server.expect(answered).await;
        server.say_bytes(broken.to_vec()).await;
        if answered == "obs_request" {
            server.answer("metadata", Reply::Metadata(ValueMap::new())).await;
        }
    };
    let asking = async {
        if answered == "reset" { env.reset().await.map(drop) } else { env.get_obs().await.map(drop) }
    };
    let (outcome, ()) = within(async { tokio::join!(asking, telling) }).await;
    let error = outcome.unwrap_err();
    assert!(matches!(&error, Error::Malformed(error) if error.field == field), "{error:?}");
    let telling = async { server.answer("metadata", Reply::Metadata(ValueMap::new())).await };
    let (metadata, _) = within(async { tokio::join!(env.get_metadata(), telling) }).await;
    assert!(metadata.is_ok(), "the session lives: {metadata:?}");
}

#[tokio::test]
async fn why_a_server_closes_reaches_the_caller() {
    let holder = "the robot is controlled by \"the night shift\" (session 3)";
    for (code, reason, expected) in [
        (
            1008,
            "actions: expected finite values",
            "the other side closed the connection with 1008: actions: expected finite values",
        ),
        (1011, "no power", "the other side closed the connection with 1011: no power"),
        (1011, "", "the other side closed the connection with 1011"),
        (1013, "full", "the other side closed the connection with 1013: full"),
        (1013, holder, holder),
        (1000, "bye", "the server closed the connection"),
    ] {
        let (env, mut server) = met(|builder| builder).await;
        let closing = async {
            server.expect("reset").await;
            server
                .socket
                .close(Some(CloseFrame { code: CloseCode::from(code), reason: reason.into() }))
                .await
                .unwrap();
            // Until the client has gone, too.
            server.hear().await
        };
        let (reset, _) = within(async { tokio::join!(env.reset(), closing) }).await;
        let error = reset.unwrap_err();
        assert!(error.to_string().ends_with(expected), "{error}");
        assert_eq!(matches!(error, Error::Busy(_)), reason == holder, "{error:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_blocking_client_is_the_same() {
    let legacy = Legacy::streaming();
    let (uri, _serving) = serve(&legacy).await;
    let driving = tokio::task::spawn_blocking(move || {
        let env = blocking::PolicyClient::connect(&uri).unwrap();
        assert_eq!(env.codec(), Codec::Msgpack);
        env.reset().unwrap();
        env.start_obs_stream(100.0).unwrap();
        env.start_action_dispatch(100.0).unwrap();
        for _ in 0..5 {
            env.next_obs(GUARD).unwrap();
            env.put_action(ROW).unwrap();
        }
        assert!(env.step(ROW).is_ok());
        env.close().unwrap();
        assert!(matches!(env.latest_obs(), Err(Error::Closed)));
    });
    within(driving).await.unwrap();
    assert!(legacy.count("apply_action") >= 2);
}

// ---- Zenoh ------------------------------------------------------------------------------------------------

/// A server on a Zenoh network, where it is a peer that listens, as legacy ones are. It answers the third
/// time that it is asked for metadata, and the two times before no sooner than a reset; and of resets the
/// first. Each observation is followed by an answer to nobody. It stays until the process ends.
fn serve_zenoh(legacy: &Legacy) -> String {
    let uri = format!("tcp/{}", free_address());
    let (legacy, listen) = (legacy.clone(), uri.clone());
    std::thread::spawn(move || {
        let mut config = zenoh::Config::default();
        config.insert_json5("mode", r#""peer""#).unwrap();
        config.insert_json5("listen/endpoints", &format!("[{listen:?}]")).unwrap();
        config.insert_json5("scouting/multicast/enabled", "false").unwrap();
        let session = zenoh::open(config).wait().unwrap();
        let subscriber = session.declare_subscriber("chiral/c2s").wait().unwrap();
        let say = |reply| {
            let frame = msgpack::encode(&Message::Reply { id: ID, reply }, &ValueMap::new()).unwrap();
            session.put("chiral/s2c", frame.into_bytes().to_vec()).wait().unwrap();
        };
        let (mut observations, mut asked) = (0, 0);
        while let Ok(sample) = subscriber.recv() {
            let said = msgpack::decode(Bytes::from(sample.payload().to_bytes().into_owned()).into()).unwrap();
            let kind = kind(&said.message);
            legacy.heard.lock().unwrap().push(said);
            observations += 1;
            match kind {
                "metadata" => {
                    asked += 1;
                    if asked > 2 {
                        say(Reply::Metadata(ValueMap::new()));
                    }
                }
                "reset" if legacy.count("reset") == 1 => {
                    (0..2).for_each(|_| say(Reply::Metadata(ValueMap::new())));
                    say(Reply::Reset { obs: observation(observations), info: ValueMap::new() });
                }
                "obs_request" if legacy.observes => {
                    say(Reply::Observation(observation(observations)));
                    // To a question of somebody else's.
                    say(Reply::Metadata(ValueMap::new()));
                }
                "action" if legacy.steps => say(Reply::Step(stepped(observation(observations)))),
                _ => {}
            }
        }
    });
    uri
}

#[tokio::test]
async fn over_zenoh_a_server_is_probed_and_late_answers_are_known_for_what_they_are() {
    let legacy = Legacy::streaming();
    let uri = serve_zenoh(&legacy);
    let env = builder(&uri).reply_timeout(Duration::from_millis(2000)).connect().await.unwrap();
    // On a busy machine it may be asked once more before its answer has come.
    assert!(env.codec() == Codec::Msgpack && legacy.count("metadata") >= 3, "{:?}", legacy.kinds());
    let error = env.get_obs().await.unwrap_err();
    assert!(matches!(&error, Error::Unsupported { why, .. } if why.contains("reset first")), "{error:?}");
    env.reset().await.unwrap();
    assert_eq!(env.get_obs().await.unwrap().episode, 1);
    env.start_obs_stream(100.0).await.unwrap();
    let seq = env.next_obs(GUARD).await.unwrap().seq;
    assert!(env.next_obs(GUARD).await.unwrap().seq > seq);
    env.send_action(ROW).await.unwrap();
    assert_eq!(env.step([ROW, ROW]).await.unwrap().reward, 0.0);
    env.stop_obs_stream().await.unwrap();
    legacy.until("both actions", |legacy| legacy.count("apply_action") == 2).await;
    assert!(env.get_metadata().await.is_ok());

    let error = within(env.reset()).await.unwrap_err();
    assert_eq!(error.to_string(), "expected an answer to the reset within 2 s, found none");
    assert!(env.get_obs().await.is_ok(), "the session lives");
    within(env.close()).await.unwrap();
}

#[tokio::test]
async fn over_zenoh_a_gym_like_server_is_found_as_well_and_forced() {
    let legacy = Legacy::gym();
    let uri = serve_zenoh(&legacy);
    let error = builder(&uri)
        .codec(Codec::Protobuf)
        .deadline(Duration::from_millis(1500))
        .connect()
        .await
        .unwrap_err();
    assert!(matches!(error, Error::NoServer { .. }), "{error:?}");
    assert_eq!(legacy.kinds(), [""; 0], "it was never asked");
    let env = builder(&uri).codec(Codec::Msgpack).connect().await.unwrap();
    env.reset().await.unwrap();
    assert_eq!(env.step(ROW).await.unwrap().reward, 0.5);
    assert!(matches!(env.start_obs_stream(30.0).await, Err(Error::Unsupported { .. })));
    let named = builder(&uri).codec(Codec::Msgpack).robot("arm").connect().await.unwrap_err();
    assert!(matches!(named, Error::Address { .. }), "{named:?}");
}

// ---- Our own server ---------------------------------------------------------------------------------------

/// The whole loop by msgpack, both generations of it.
async fn check_everything_works(stand: &Harness, env: &PolicyClient) {
    assert_eq!(env.codec(), Codec::Msgpack);
    assert_eq!(env.get_metadata().await.unwrap()["kind"].as_str(), Some("scripted"));
    let (first, _) = env.reset().await.unwrap();
    assert_eq!((first.episode, first[harness::CAMERA].image.shape()), (1, &[8, 8, 3][..]));
    assert_eq!(env.step([[0.5; DIMENSION]; 2]).await.unwrap().reward, 2.0);
    assert!(env.get_obs().await.unwrap()[harness::CAMERA].captured_at > first[harness::CAMERA].captured_at);
    env.start_obs_stream(50.0).await.unwrap();
    env.start_action_dispatch(100.0).unwrap();
    for _ in 0..5 {
        env.next_obs(GUARD).await.unwrap();
        env.put_action([0.25; DIMENSION]).await.unwrap();
    }
    env.send_action([[0.125; DIMENSION]; 2]).await.unwrap();
    stand.until("all actions", |stand| stand.script.applied().len() == 9).await;
    env.stop_obs_stream().await.unwrap();
}

#[tokio::test]
async fn our_own_server_takes_our_client_for_an_legacy_one_if_told_to() {
    let stand = Harness::new();
    let (listener, uri) = listener().await;
    tokio::spawn(stand.server.clone().serve_on(listener));
    let env = builder(&uri).codec(Codec::Msgpack).connect().await.unwrap();
    check_everything_works(&stand, &env).await;
    for builder in [builder(&uri), builder(&uri).codec(Codec::Msgpack)] {
        let error = builder.connect().await.unwrap_err();
        assert!(
            matches!(&error, Error::Busy(fault) if fault.text.contains("a legacy client at")),
            "{error:?}"
        );
    }
    let watcher = builder(&uri).observer().connect().await.unwrap();
    assert_eq!(watcher.codec(), Codec::Protobuf);
    env.close().await.unwrap();
    stand
        .until("the robot is free", |stand| {
            stand.script.events().ends_with(&[Event::Held, Event::Disconnected])
        })
        .await;

    let env = builder(&uri).codec(Codec::Msgpack).connect().await.unwrap();
    *stand.script.reset_fails.lock().unwrap() = Some("no power".to_owned());
    let error = env.reset().await.unwrap_err();
    assert!(error.to_string().ends_with("closed the connection with 1011: no power"), "{error}");
    stand.handle.shutdown();
}

#[tokio::test]
async fn our_own_server_does_so_over_zenoh_as_well() {
    let uri = format!("tcp/{}", free_address());
    let stand = Harness::with(Arc::default(), 8, 8, |builder| {
        builder.name("arm").listen_zenoh(&uri).discovery(false)
    });
    let _serving = tokio::spawn(stand.server.clone().serve());
    let env = builder(&uri).codec(Codec::Msgpack).connect().await.unwrap();
    check_everything_works(&stand, &env).await;
    env.close().await.unwrap();
}
