//! The test harness: a server with a scripted robot and sensors on the test's clock, and peers that send
//! whatever a test wants.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use chiral_client::{PolicyClient, PolicyClientBuilder, PutMode, RobotInfo};
use chiral_proto::{
    ActionChunk, ActionSpec, CameraSpec, Clock, Codec, Frame, Message, Notice, PROTOCOL_VERSION, ProprioSpec,
    Reply, Request, Timestamp, Transport, Value, ValueMap,
    action::Action,
    message::{ActionMessage, Hello, Role, Welcome},
    value,
};
use chiral_server::{
    ActionContext, CameraFrame, Error, Execution, PolicyServer, PolicyServerBuilder, ResetOutcome,
    ResetRequest, Robot, RobotError, Sensors, ServerHandle, StepOutcome, Stopper,
};
use chiral_sim::link::{LinkControl, LinkEnd, LinkOptions, link};
use nalgebra::{Matrix3, Matrix4};
use tokio::{net::TcpListener, task::JoinHandle, time::Instant};
use zenoh::Wait;

use super::{TEST_TIMEOUT, client_builder, wait_until_or_show};

/// Joints of the scripted robot.
pub const DIMENSION: usize = 3;
/// Name of its camera.
pub const CAMERA: &str = "wrist_cam";

/// A call that the robot received.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    ResetStarted,
    ResetFinished,
    Applied { values: Vec<f32>, episode: u64, received_at: Timestamp },
    Held,
    Stopped,
    Disconnected,
}

/// Shared by the robot and the test: the calls so far, and how the robot reacts to the next ones.
#[derive(Default)]
pub struct Script {
    pub events: Mutex<Vec<Event>>,
    pub reset_gate: Gate,
    pub apply_gate: Gate,
    pub reset_error: Mutex<Option<String>>,
    pub panics_in: Mutex<Option<&'static str>>,
    /// Whether the robot executes chunks by itself, its control rate in hertz, and whether it has a stopper,
    /// which opens the gate of `apply_action`. Asked when the server is built.
    pub executes_chunks: AtomicBool,
    pub control_hz: AtomicU32,
    pub has_stopper: AtomicBool,
}

impl Script {
    pub fn events(&self) -> Vec<Event> {
        self.events.lock().unwrap().clone()
    }

    pub fn applied(&self) -> Vec<Vec<f32>> {
        let rows = self.events().into_iter();
        rows.filter_map(|event| if let Event::Applied { values, .. } = event { Some(values) } else { None })
            .collect()
    }

    fn record(&self, event: Event) {
        self.events.lock().unwrap().push(event);
    }

    fn maybe_panic(&self, method: &'static str) {
        let chosen = *self.panics_in.lock().unwrap() == Some(method);
        assert!(!chosen, "the script asks for a panic");
    }
}

/// A gate that blocks the robot while it is closed.
#[derive(Default)]
pub struct Gate {
    closed: Mutex<bool>,
    changed: Condvar,
    blocking: AtomicBool,
}

impl Gate {
    pub fn close(&self) {
        *self.closed.lock().unwrap() = true;
    }

    pub fn open(&self) {
        *self.closed.lock().unwrap() = false;
        self.changed.notify_all();
    }

    /// Whether the robot is blocked by this gate now.
    pub fn is_blocking(&self) -> bool {
        self.blocking.load(Ordering::Acquire)
    }

    pub fn wait(&self) {
        let mut closed = self.closed.lock().unwrap();
        while *closed {
            self.blocking.store(true, Ordering::Release);
            closed = self.changed.wait(closed).unwrap();
        }
        self.blocking.store(false, Ordering::Release);
    }
}

/// A robot that does what its [`Script`] asks for.
pub struct ScriptedRobot(pub Arc<Script>);

impl Robot for ScriptedRobot {
    fn action_spec(&self) -> ActionSpec {
        self.0.maybe_panic("action_spec");
        ActionSpec::joint_positions(DIMENSION, f64::from(self.0.control_hz.load(Ordering::Relaxed)))
    }

    fn reset(&mut self, request: &ResetRequest) -> Result<ResetOutcome, RobotError> {
        self.0.record(Event::ResetStarted);
        self.0.maybe_panic("reset");
        self.0.reset_gate.wait();
        if let Some(text) = self.0.reset_error.lock().unwrap().clone() {
            return Err(text.into());
        }
        self.0.record(Event::ResetFinished);
        let seed = request.seed.map_or(Value::Null, |seed| Value::Int(seed as i64));
        Ok(value::map([("seed", seed)]).into())
    }

    fn apply_action(&mut self, action: &Action, context: &ActionContext) -> Result<(), RobotError> {
        self.0.maybe_panic("apply_action");
        self.0.apply_gate.wait();
        let ActionContext { episode, received_at, .. } = *context;
        self.0.record(Event::Applied { values: action.values.clone(), episode, received_at });
        Ok(())
    }

    fn execution(&self) -> Execution {
        self.0.maybe_panic("execution");
        match self.0.executes_chunks.load(Ordering::Relaxed) {
            true => Execution::Chunks,
            false => Execution::Rows,
        }
    }

    fn apply_chunk(&mut self, chunk: &ActionChunk, context: &ActionContext) -> Result<(), RobotError> {
        self.0.maybe_panic("apply_chunk");
        for row in chunk.iter() {
            self.apply_action(&row.into(), context)?;
        }
        Ok(())
    }

    fn stopper(&self) -> Option<Stopper> {
        self.0.maybe_panic("stopper");
        let script = Arc::clone(&self.0);
        let stop = move || {
            script.record(Event::Stopped);
            script.apply_gate.open();
            script.reset_gate.open();
        };
        self.0.has_stopper.load(Ordering::Relaxed).then(|| Arc::new(stop) as Stopper)
    }

    fn step(
        &mut self,
        chunk: &ActionChunk,
        context: &ActionContext,
    ) -> Result<Option<StepOutcome>, RobotError> {
        self.0.maybe_panic("step");
        for row in chunk.iter() {
            self.apply_action(&row.into(), context)?;
        }
        Ok(Some(StepOutcome::new(chunk.rows() as f64)))
    }

    fn metadata(&self) -> ValueMap {
        self.0.maybe_panic("metadata");
        value::map([("kind", "scripted".into())])
    }

    fn is_lock_step(&self) -> bool {
        self.0.maybe_panic("is_lock_step");
        false
    }

    fn hold(&mut self) {
        self.0.record(Event::Held);
        self.0.maybe_panic("hold");
    }

    fn on_disconnect(&mut self) {
        self.0.record(Event::Disconnected);
        self.0.maybe_panic("on_disconnect");
    }
}

/// Opens a Zenoh session that is not Chiral's.
pub fn zenoh_session(mode: &str, uri: &str) -> zenoh::Session {
    let end = if mode == "router" { "listen/endpoints" } else { "connect/endpoints" };
    let mut config = zenoh::Config::default();
    for (key, value) in [("mode", mode), ("scouting/multicast/enabled", "false"), (end, uri)] {
        let json = match key {
            "mode" => format!("{value:?}"),
            "scouting/multicast/enabled" => value.to_owned(),
            _ => format!("[{value:?}]"),
        };
        config.insert_json5(key, &json).unwrap();
    }
    std::thread::spawn(move || zenoh::open(config).wait().unwrap()).join().unwrap()
}

/// Runs the loop of the client guide from start to end.
pub async fn run_guide_loop(env: &PolicyClient) {
    assert_eq!(env.get_metadata().await.unwrap()["kind"].as_str(), Some("scripted"));
    let (obs, info) = env.reset_with(Some(3), Default::default()).await.unwrap();
    assert_eq!(info["seed"].as_i64(), Some(3));
    assert_eq!(env.step([0.5; DIMENSION]).await.unwrap().reward, 1.0);
    env.start_obs_stream(50.0).await.unwrap();
    assert!(env.next_obs(TEST_TIMEOUT).await.unwrap().seq > obs.seq);
    env.start_action_dispatch(100.0).unwrap();
    for _ in 0..5 {
        env.put_action([0.25; DIMENSION]).await.unwrap();
    }
    while env.stats().actions_sent < 5 {
        env.next_obs(TEST_TIMEOUT).await.unwrap();
    }
    env.put_chunk([0.125; DIMENSION], PutMode::Replace).await.unwrap();
    assert!(env.get_obs().await.unwrap().seq > obs.seq);
    env.stop_obs_stream().await.unwrap();
    env.stop_action_dispatch();
}

/// Tokio's time, paused or not, readable on any thread.
pub fn tokio_clock() -> Clock {
    let runtime = tokio::runtime::Handle::current();
    let started = Instant::now();
    Clock::new(move || {
        let _context = runtime.enter();
        Timestamp(1_000_000_000 + i64::try_from(started.elapsed().as_nanos()).unwrap())
    })
}

/// Runs a future on a paused clock, so that its waits take no real time. The robot's thread must have no part
/// in it: a paused clock jumps ahead while that thread works.
pub async fn on_paused_clock<T>(future: impl Future<Output = T>) -> T {
    tokio::time::pause();
    let outcome = future.await;
    tokio::time::resume();
    outcome
}

/// A server with a scripted robot, and the sensors and clock that it uses.
pub struct Harness {
    pub server: PolicyServer,
    pub handle: ServerHandle,
    pub script: Arc<Script>,
    pub sensors: Sensors,
    pub clock: Clock,
    publisher: JoinHandle<()>,
}

impl Drop for Harness {
    fn drop(&mut self) {
        self.script.reset_gate.open();
        self.script.apply_gate.open();
        self.publisher.abort();
    }
}

impl Harness {
    /// One camera of 8 x 8 pixels and joints, published at 100 Hz.
    pub fn new() -> Harness {
        Harness::configured(|builder| builder)
    }

    pub fn configured(configure: impl FnOnce(PolicyServerBuilder) -> PolicyServerBuilder) -> Harness {
        Harness::with(Arc::default(), 8, 8, configure)
    }

    pub fn with(
        script: Arc<Script>,
        height: usize,
        width: usize,
        configure: impl FnOnce(PolicyServerBuilder) -> PolicyServerBuilder,
    ) -> Harness {
        let clock = tokio_clock();
        let cameras = [CameraSpec::rgbd(CAMERA, height, width)];
        let proprios = [ProprioSpec::new("joint_pos", DIMENSION, "rad")];
        let sensors = Sensors::with_clock(cameras, proprios, clock.clone()).unwrap();
        let builder = PolicyServer::builder(ScriptedRobot(Arc::clone(&script)), sensors.clone())
            .name("test-robot")
            // A paused clock jumps ahead, so nothing is judged by it unless a test asks for it.
            .command_timeout(None)
            .max_action_lateness(None)
            .clock(clock.clone());
        let server = configure(builder).build().unwrap();
        let published = sensors.clone();
        let publisher = tokio::spawn(async move {
            let mut ticks = tokio::time::interval(Duration::from_millis(10));
            loop {
                ticks.tick().await;
                publish(&published, 1);
            }
        });
        Harness { handle: server.handle(), server, script, sensors, clock, publisher }
    }

    /// Serves WebSocket on an ephemeral port. The task ends after a shutdown.
    pub async fn serve_websocket(&self) -> (SocketAddr, JoinHandle<Result<(), Error>>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        (address, tokio::spawn(self.server.clone().serve_on(listener)))
    }

    /// Opens a link to this server and returns the client's end.
    pub fn open_link(&self, options: LinkOptions) -> (LinkEnd, LinkControl) {
        let (client_end, server_end, control) = link(options);
        let server = self.server.clone();
        tokio::spawn(async move { server.serve_connection(server_end).await });
        (client_end, control)
    }

    pub fn builder(&self) -> PolicyClientBuilder {
        PolicyClient::builder("link").clock(self.clock.clone()).name("tester")
    }

    pub async fn connect(&self) -> PolicyClient {
        self.connect_over(LinkOptions::default()).await.0
    }

    pub async fn connect_over(&self, options: LinkOptions) -> (PolicyClient, LinkControl) {
        let (end, control) = self.open_link(options);
        (self.builder().connect_over(end).await.unwrap(), control)
    }

    pub async fn connect_raw(&self) -> RawPeer {
        RawPeer::connect(self.open_link(LinkOptions::default()).0).await
    }

    /// Polls until `condition` holds.
    pub async fn wait_until(&self, what: &str, mut condition: impl FnMut(&Harness) -> bool) {
        wait_until_or_show(what, || condition(self), || format!("{:?}", self.script.events())).await;
    }

    pub async fn wait_until_robot_is_free(&self) {
        self.wait_until("no session is left", |harness| harness.handle.stats().sessions == 0).await;
    }
}

/// Publishes one instant: image, depth, K and T all drawn from `n`.
pub fn publish(sensors: &Sensors, n: u64) {
    let camera = sensors.camera(CAMERA).unwrap();
    let mut image = camera.buffer();
    image.fill(n as u8);
    let mut depth = camera.depth_buffer();
    depth.values_mut().fill(n as f32);
    let frame = CameraFrame {
        image: image.into(),
        depth: Some(depth.into()),
        intrinsics: Matrix3::from_element(n as f64),
        extrinsics: Matrix4::from_element(n as f64),
        ..CameraFrame::default()
    };
    camera.publish(frame).unwrap();
    sensors.update_proprio("joint_pos", &[n as f32; DIMENSION]).unwrap();
}

/// A controller that sends whatever a test wants, over one connection.
pub struct RawPeer {
    pub end: LinkEnd,
    pub welcome: Welcome,
    last_id: u64,
}

pub fn hello(role: Role) -> Hello {
    Hello {
        protocol: PROTOCOL_VERSION,
        software: "raw".to_owned(),
        role,
        client_name: "raw peer".to_owned(),
        auth: Default::default(),
        attach_token: Default::default(),
    }
}

impl RawPeer {
    /// A peer that has not sent its hello.
    pub fn without_hello(end: LinkEnd) -> RawPeer {
        RawPeer { end, welcome: welcome(), last_id: 1 }
    }

    /// Sends a hello and receives the welcome.
    pub async fn connect(end: LinkEnd) -> RawPeer {
        let request = Message::Request { id: 1, request: Request::Hello(hello(Role::Controller)) };
        end.send(Codec::Protobuf.encode(&request).unwrap()).await.unwrap();
        let frame = end.recv().await.unwrap().expect("a welcome");
        match Codec::Protobuf.decode(frame).unwrap() {
            Message::Reply { id: 1, reply: Reply::Welcome(welcome) } => {
                RawPeer { end, welcome: *welcome, last_id: 1 }
            }
            other => panic!("expected a welcome, found {other:?}"),
        }
    }

    pub async fn send(&self, message: &Message) {
        self.send_frame(Codec::Protobuf.encode(message).unwrap()).await;
    }

    pub async fn send_frame(&self, frame: impl Into<Frame>) {
        self.end.send(frame.into()).await.unwrap();
    }

    pub async fn send_action(&self, session: u64, episode: u64, seq: u64, actions: impl Into<ActionChunk>) {
        let actions = actions.into();
        let action = ActionMessage { session, episode, seq, actions, ..ActionMessage::default() };
        self.send(&Message::Notice(Notice::Action(action))).await;
    }

    /// Sends a request and returns its id.
    pub async fn send_request(&mut self, request: Request) -> u64 {
        self.last_id += 1;
        self.send(&Message::Request { id: self.last_id, request }).await;
        self.last_id
    }

    /// Sends a request and returns its reply. Drops the messages before it.
    pub async fn request(&mut self, request: Request) -> Reply {
        let id = self.send_request(request).await;
        self.reply_to(id).await
    }

    /// Returns the next message that is no ping: when those come is up to the server.
    pub async fn receive(&self) -> Message {
        loop {
            let frame =
                tokio::time::timeout(Duration::from_secs(3600), self.end.recv()).await.expect("a message");
            let message = Codec::Protobuf.decode(frame.unwrap().expect("the connection is open")).unwrap();
            if !matches!(message, Message::Notice(Notice::Ping { .. })) {
                return message;
            }
        }
    }

    /// Returns the reply to the request with this id. Drops the messages before it.
    pub async fn reply_to(&self, request_id: u64) -> Reply {
        loop {
            if let Message::Reply { id, reply } = self.receive().await
                && id == request_id
            {
                return reply;
            }
        }
    }

    /// Returns the next error that is no reply. Drops the messages before it.
    pub async fn error_notice(&self) -> chiral_proto::Fault {
        loop {
            if let Message::Notice(Notice::Error(fault)) = self.receive().await {
                return fault;
            }
        }
    }
}

/// The actions that a fake server received, each with its arrival time.
pub type ReceivedActions = Arc<Mutex<Vec<(Timestamp, Vec<f32>)>>>;

/// Connects a client to a fake server, which sends a welcome, answers pings and records actions. It runs on
/// the test's runtime and starts no thread, so that virtual time is exact.
pub async fn connect_to_fake_server(
    clock: &Clock,
    options: LinkOptions,
) -> (PolicyClient, ReceivedActions, LinkControl) {
    let (client_end, server_end, control) = link(options);
    let actions = ReceivedActions::default();
    let (received, server_clock) = (Arc::clone(&actions), clock.clone());
    tokio::spawn(async move {
        while let Ok(Some(frame)) = server_end.recv().await {
            let now = server_clock.now();
            let response = match Codec::Protobuf.decode(frame).unwrap() {
                Message::Request { id, request: Request::Hello(_) } => {
                    Message::Reply { id, reply: Reply::Welcome(welcome().into()) }
                }
                Message::Notice(Notice::Ping { t1 }) => {
                    Message::Notice(Notice::Pong { t1, t2: now, t3: now })
                }
                Message::Notice(Notice::Action(action)) => {
                    received.lock().unwrap().push((now, action.actions.values().to_vec()));
                    continue;
                }
                _ => continue,
            };
            let _ = server_end.send(Codec::Protobuf.encode(&response).unwrap()).await;
        }
    });
    let client = PolicyClient::builder("link").clock(clock.clone()).connect_over(client_end).await.unwrap();
    (client, actions, control)
}

pub fn welcome() -> Welcome {
    let robot = RobotInfo {
        name: "fake".to_owned(),
        cameras: vec![],
        proprios: vec![],
        action_spec: ActionSpec::joint_positions(DIMENSION, 100.0),
    };
    Welcome {
        protocol: PROTOCOL_VERSION,
        software: "raw".to_owned(),
        session: 1,
        episode: 0,
        robot,
        attach_token: Default::default(),
        controller: String::new(),
        max_chunk_rows: 256,
    }
}

/// Waits until the Zenoh network at `uri` knows at least these robots.
pub async fn wait_until_alive(uri: &str, names: &[&str]) {
    wait_until_refused(uri, |text| names.iter().all(|name| text.contains(name))).await;
}

/// Waits until the Zenoh network at `uri` knows no robot.
pub async fn wait_until_none_alive(uri: &str) {
    wait_until_refused(uri, |text| text.contains("no robot is alive there")).await;
}

/// Connects to a robot that does not exist until the error's text, which lists the live ones, is accepted.
async fn wait_until_refused(uri: &str, accepted: impl Fn(&str) -> bool) {
    let started = std::time::Instant::now();
    loop {
        let builder = client_builder(uri).robot("nobody").deadline(Duration::from_millis(900));
        let text = builder.connect().await.unwrap_err().to_string();
        if accepted(&text) {
            return;
        }
        assert!(started.elapsed() < TEST_TIMEOUT, "{text}");
    }
}
