//! A fake legacy server: either it replies as a server of one generation does, or the test drives each
//! connection message by message.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use chiral_client::{
    Camera, Codec, Observation, PolicyClient, PolicyClientBuilder, Timestamp, ValueMap,
    proto::{
        Image, Message, Notice, Proprio, Reply, Request, StepResult, Tensor,
        codec::msgpack::{self, ID, TimedMessage},
        value,
    },
};
use futures_util::{SinkExt, StreamExt};
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinHandle,
    time::{Instant, timeout, timeout_at},
};
use tokio_tungstenite::{WebSocketStream, accept_async, tungstenite};

use crate::support::{TEST_TIMEOUT, client_builder, in_time, wait_until_or_show};

/// What a fake server supports, and what it received.
#[derive(Clone, Default)]
pub(crate) struct FakeServer {
    /// Replies to `obs_request`.
    pub(crate) observes: bool,
    /// Replies to `action`.
    pub(crate) steps: bool,
    /// How long each reply takes.
    pub(crate) reply_delay: Duration,
    pub(crate) received: Arc<Mutex<Vec<TimedMessage>>>,
    /// The kinds of the requests that arrived while another was pending.
    pub(crate) overlapping: Arc<Mutex<Vec<&'static str>>>,
}

impl FakeServer {
    /// A server of the streaming generation.
    pub(crate) fn streaming() -> FakeServer {
        FakeServer { observes: true, ..FakeServer::default() }
    }

    /// A server of the gym-like generation.
    pub(crate) fn gym() -> FakeServer {
        FakeServer { steps: true, ..FakeServer::default() }
    }

    /// Serves one client after the other on an ephemeral port.
    pub(crate) async fn serve(&self) -> (String, JoinHandle<()>) {
        let (listener, uri) = listener().await;
        let server = self.clone();
        let serving = tokio::spawn(async move {
            loop {
                ServerConnection::accept(&listener).await.serve(&server).await;
            }
        });
        (uri, serving)
    }

    pub(crate) fn kinds(&self) -> Vec<&'static str> {
        self.received.lock().unwrap().iter().map(|decoded| kind(&decoded.message)).collect()
    }

    /// The capture times that came with the actions.
    pub(crate) fn capture_times(&self) -> Vec<ValueMap> {
        let received = self.received.lock().unwrap();
        let actions = received.iter().filter(|decoded| kind(&decoded.message).contains("action"));
        actions.map(|decoded| decoded.capture_times.clone()).collect()
    }

    pub(crate) fn count(&self, wanted: &str) -> usize {
        self.kinds().iter().filter(|kind| **kind == wanted).count()
    }

    pub(crate) async fn wait_until(&self, what: &str, condition: impl Fn(&FakeServer) -> bool) {
        wait_until_or_show(what, || condition(self), || format!("{:?}", self.kinds())).await;
    }
}

/// The server's end of one connection.
pub(crate) struct ServerConnection {
    pub(crate) socket: WebSocketStream<TcpStream>,
    observations: u64,
}

impl ServerConnection {
    pub(crate) fn new(socket: WebSocketStream<TcpStream>) -> ServerConnection {
        ServerConnection { socket, observations: 0 }
    }

    /// Accepts the next client without selecting a subprotocol.
    pub(crate) async fn accept(listener: &TcpListener) -> ServerConnection {
        let (stream, _) = listener.accept().await.unwrap();
        ServerConnection::new(accept_async(stream).await.unwrap())
    }

    /// Returns the client's next message and answers its pings meanwhile; `None` at the connection's end.
    pub(crate) async fn receive(&mut self) -> Option<TimedMessage> {
        loop {
            match timeout(TEST_TIMEOUT, self.socket.next()).await.expect("a message")? {
                Ok(tungstenite::Message::Binary(frame)) => {
                    return Some(msgpack::decode(frame.into()).unwrap());
                }
                Ok(tungstenite::Message::Close(_)) | Err(_) => return None,
                Ok(_) => {}
            }
        }
    }

    pub(crate) async fn expect(&mut self, wanted: &str) -> TimedMessage {
        let decoded = self.receive().await.expect("the client is connected");
        assert_eq!(kind(&decoded.message), wanted);
        decoded
    }

    /// Answers pings for this long. Nothing else may arrive.
    pub(crate) async fn answer_pings(&mut self, duration: Duration) {
        let end = Instant::now() + duration;
        while let Ok(message) = timeout_at(end, self.socket.next()).await {
            let message = message.unwrap().unwrap();
            assert!(message.is_ping(), "expected a ping, found {message:?}");
        }
    }

    pub(crate) async fn send(&mut self, reply: Reply) {
        let frame = msgpack::encode(&Message::Reply { id: ID, reply }, &ValueMap::new()).unwrap();
        self.send_bytes(frame.into_bytes().to_vec()).await;
    }

    pub(crate) async fn send_bytes(&mut self, bytes: Vec<u8>) {
        let _ = self.socket.send(tungstenite::Message::binary(bytes)).await;
    }

    /// Expects a request of this kind and replies to it.
    pub(crate) async fn reply_to(&mut self, wanted: &str, reply: Reply) -> TimedMessage {
        let decoded = self.expect(wanted).await;
        self.send(reply).await;
        decoded
    }

    /// The next observation, identified by its number.
    pub(crate) fn next_observation(&mut self) -> Arc<Observation> {
        self.observations += 1;
        observation(self.observations)
    }

    async fn serve(mut self, server: &FakeServer) {
        while let Some(decoded) = self.receive().await {
            server.received.lock().unwrap().push(decoded.clone());
            let reply = match kind(&decoded.message) {
                "metadata" => Reply::Metadata(value::map([("kind", "legacy".into())])),
                "reset" => {
                    Reply::Reset { obs: self.next_observation(), info: value::map([("begun", true.into())]) }
                }
                "obs_request" if server.observes => Reply::Observation(self.next_observation()),
                "action" if server.steps => Reply::Step(step_result(self.next_observation())),
                _ => continue,
            };
            let (mut replies, end) = (vec![reply], Instant::now() + server.reply_delay);
            while let Ok(Some(Ok(message))) = timeout_at(end, self.socket.next()).await {
                let tungstenite::Message::Binary(frame) = message else { continue };
                let decoded = msgpack::decode(frame.into()).unwrap();
                let kind = kind(&decoded.message);
                server.received.lock().unwrap().push(decoded);
                if kind != "apply_action" {
                    server.overlapping.lock().unwrap().push(kind);
                }
                if kind == "metadata" {
                    replies.push(Reply::Metadata(ValueMap::new()));
                }
            }
            for reply in replies {
                self.send(reply).await;
            }
        }
    }
}

/// Returns a listener and its address.
pub(crate) async fn listener() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let uri = format!("ws://{}", listener.local_addr().unwrap());
    (listener, uri)
}

/// Returns a client and the server's end of its connection, for a test that drives the server itself.
pub(crate) async fn connect(
    configure: impl FnOnce(PolicyClientBuilder) -> PolicyClientBuilder,
) -> (PolicyClient, ServerConnection) {
    let (listener, uri) = listener().await;
    let connecting = tokio::spawn(configure(client_builder(&uri)).connect());
    let mut server = ServerConnection::accept(&listener).await;
    server.reply_to("metadata", Reply::Metadata(ValueMap::new())).await;
    let client = in_time(connecting).await.unwrap().unwrap();
    assert_eq!(client.codec(), Codec::Msgpack);
    (client, server)
}

/// The kind of a client's message, as the legacy wire names it.
pub(crate) fn kind(message: &Message) -> &'static str {
    match message {
        Message::Request { request: Request::GetMetadata, .. } => "metadata",
        Message::Request { request: Request::Reset { .. }, .. } => "reset",
        Message::Request { request: Request::GetObs, .. } => "obs_request",
        Message::Request { request: Request::Step { .. }, .. } => "action",
        Message::Notice(Notice::Action(_)) => "apply_action",
        other => panic!("expected a client's message, found {other:?}"),
    }
}

/// The number of rows of an action.
pub(crate) fn rows(decoded: &TimedMessage) -> Option<usize> {
    match &decoded.message {
        Message::Request { request: Request::Step { actions, .. }, .. } => Some(actions.rows()),
        Message::Notice(Notice::Action(action)) => Some(action.actions.rows()),
        _ => None,
    }
}

pub(crate) fn step_result(obs: Arc<Observation>) -> StepResult {
    StepResult {
        obs,
        reward: 0.5,
        terminated: true,
        truncated: false,
        info: value::map([("success", true.into())]),
    }
}

/// An observation of two cameras, one of them with depth, and joints.
pub(crate) fn observation(n: u64) -> Arc<Observation> {
    let camera = |name: &str, depth| {
        Arc::new(Camera {
            captured_at: Timestamp(1_000_000_000 * n as i64 + 1),
            depth,
            ..Camera::new(name, Tensor::from_vec([2, 2, 3], vec![n as u8; 12]).unwrap())
        })
    };
    let depth = Image::from(Tensor::from_vec([2, 2], vec![n as f32; 4]).unwrap());
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
