//! The test stand: a robot that does as it is told, sensors on the test's clock, and peers that say anything.

#![allow(
    dead_code,
    missing_docs,
    unreachable_pub,
    reason = "shared by several test binaries, each of which uses its part"
)]
#![allow(clippy::unwrap_used, reason = "helpers of tests, too, fail by panicking")]

use std::{
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use chiral_client::{PolicyClient, PolicyClientBuilder, PutMode};
use chiral_proto::{
    ActionChunk, ActionSpec, CameraSpec, Clock, Codec, Frame, Message, Notice, PROTOCOL_VERSION, ProprioSpec,
    Reply, Request, Timestamp, Transport, Value, ValueMap,
    action::Action,
    message::{ActionMessage, Hello, Role, Welcome},
    value,
};
use chiral_server::{
    ActionContext, CameraFrame, PolicyServer, PolicyServerBuilder, Robot, RobotError, Sensors, ServerHandle,
    StepOutcome,
};
use chiral_sim::link::{LinkControl, LinkEnd, LinkOptions, link};
use nalgebra::{Matrix3, Matrix4};
use tokio::{task::JoinHandle, time::Instant};
use zenoh::Wait;

/// Joints of the robot on the stand.
pub const DIMENSION: usize = 3;
/// The camera of the stand.
pub const CAMERA: &str = "wrist_cam";

/// What the robot saw happen, in order.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    ResetBegan,
    ResetDone,
    Applied { values: Vec<f32>, episode: u64, received_at: Timestamp },
    Held,
    Disconnected,
}

/// Shared by the robot and the test: what happens, and what is to happen.
#[derive(Default)]
pub struct Script {
    pub events: Mutex<Vec<Event>>,
    pub reset_gate: Gate,
    pub apply_gate: Gate,
    pub reset_fails: Mutex<Option<String>>,
    pub panics_in: Mutex<Option<&'static str>>,
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

    fn note(&self, event: Event) {
        self.events.lock().unwrap().push(event);
    }

    fn maybe_panic(&self, method: &'static str) {
        let chosen = *self.panics_in.lock().unwrap() == Some(method);
        assert!(!chosen, "as the script says");
    }
}

/// A gate that the robot waits at while it is closed.
#[derive(Default)]
pub struct Gate {
    closed: Mutex<bool>,
    changed: Condvar,
    waiting: AtomicBool,
}

impl Gate {
    pub fn close(&self) {
        *self.closed.lock().unwrap() = true;
    }

    pub fn open(&self) {
        *self.closed.lock().unwrap() = false;
        self.changed.notify_all();
    }

    /// Whether the robot stands before it.
    pub fn is_waited_at(&self) -> bool {
        self.waiting.load(Ordering::Acquire)
    }

    fn pass(&self) {
        let mut closed = self.closed.lock().unwrap();
        while *closed {
            self.waiting.store(true, Ordering::Release);
            closed = self.changed.wait(closed).unwrap();
        }
        self.waiting.store(false, Ordering::Release);
    }
}

pub struct ScriptedRobot(pub Arc<Script>);

impl Robot for ScriptedRobot {
    fn action_spec(&self) -> ActionSpec {
        self.0.maybe_panic("action_spec");
        ActionSpec::joint_positions(DIMENSION, 1000.0)
    }

    fn reset(&mut self, seed: Option<u64>, _options: &ValueMap) -> Result<ValueMap, RobotError> {
        self.0.note(Event::ResetBegan);
        self.0.maybe_panic("reset");
        self.0.reset_gate.pass();
        if let Some(text) = self.0.reset_fails.lock().unwrap().clone() {
            return Err(text.into());
        }
        self.0.note(Event::ResetDone);
        Ok(value::map([("seed", seed.map_or(Value::Null, |seed| Value::Int(seed as i64)))]))
    }

    fn apply_action(&mut self, action: &Action, context: &ActionContext) -> Result<(), RobotError> {
        self.0.maybe_panic("apply_action");
        self.0.apply_gate.pass();
        let ActionContext { episode, received_at, .. } = *context;
        self.0.note(Event::Applied { values: action.values.clone(), episode, received_at });
        Ok(())
    }

    fn apply_chunk(&mut self, chunk: &ActionChunk, context: &ActionContext) -> Result<(), RobotError> {
        self.0.maybe_panic("apply_chunk");
        for row in chunk.iter() {
            self.apply_action(&row.into(), context)?;
        }
        Ok(())
    }

    fn step(&mut self, chunk: &ActionChunk, context: &ActionContext) -> Result<StepOutcome, RobotError> {
        self.0.maybe_panic("step");
        self.apply_chunk(chunk, context)?;
        Ok(StepOutcome { reward: chunk.rows() as f64, ..StepOutcome::default() })
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
        self.0.note(Event::Held);
        self.0.maybe_panic("hold");
    }

    fn on_disconnect(&mut self) {
        self.0.note(Event::Disconnected);
        self.0.maybe_panic("on_disconnect");
    }
}

/// An address on loopback that was free a moment ago, for who does not tell which port he was given.
pub fn free_address() -> String {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

/// A Zenoh session of somebody else's.
pub fn session(mode: &str, uri: &str) -> zenoh::Session {
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

/// For what must come; no test measures time by it.
pub const GUARD: Duration = Duration::from_secs(20);

/// The loop that the guide shows, start to end.
pub async fn drive(env: &PolicyClient) {
    assert_eq!(env.get_metadata().await.unwrap()["kind"].as_str(), Some("scripted"));
    let (obs, info) = env.reset_with(Some(3), Default::default()).await.unwrap();
    assert_eq!(info["seed"].as_i64(), Some(3));
    assert_eq!(env.step([0.5; DIMENSION]).await.unwrap().reward, 1.0);
    env.start_obs_stream(50.0).await.unwrap();
    assert!(env.next_obs(GUARD).await.unwrap().seq > obs.seq);
    env.start_action_dispatch(100.0).unwrap();
    for _ in 0..5 {
        env.put_action([0.25; DIMENSION]).await.unwrap();
    }
    while env.stats().actions_sent < 5 {
        env.next_obs(GUARD).await.unwrap();
    }
    env.put_chunk([0.125; DIMENSION], PutMode::Replace).await.unwrap();
    assert!(env.get_obs().await.unwrap().seq > obs.seq);
    env.stop_obs_stream().await.unwrap();
    env.stop_action_dispatch();
}

/// The time that tokio shows, paused or not, readable on any thread.
pub fn tokio_clock() -> Clock {
    let runtime = tokio::runtime::Handle::current();
    let began = Instant::now();
    Clock::new(move || {
        let _context = runtime.enter();
        Timestamp(1_000_000_000 + i64::try_from(began.elapsed().as_nanos()).unwrap())
    })
}

/// A server with a scripted robot.
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
    /// A camera of 8 x 8 and joints, published at 100 Hz.
    pub fn new() -> Harness {
        Harness::with(Arc::default(), 8, 8, |builder| builder)
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
            .name("stand")
            .clock(clock.clone());
        let server = configure(builder).build().unwrap();
        let publishing = sensors.clone();
        let publisher = tokio::spawn(async move {
            let mut ticks = tokio::time::interval(Duration::from_millis(10));
            loop {
                ticks.tick().await;
                publish(&publishing, 1);
            }
        });
        Harness { handle: server.handle(), server, script, sensors, clock, publisher }
    }

    /// The other end of a link to this server.
    pub fn dial(&self, options: LinkOptions) -> (LinkEnd, LinkControl) {
        let (ours, theirs, control) = link(options);
        let server = self.server.clone();
        tokio::spawn(async move { server.serve_connection(theirs).await });
        (ours, control)
    }

    pub fn builder(&self) -> PolicyClientBuilder {
        PolicyClient::builder("link").clock(self.clock.clone()).name("tester")
    }

    pub async fn connect(&self) -> PolicyClient {
        self.connect_over(LinkOptions::default()).await.0
    }

    pub async fn connect_over(&self, options: LinkOptions) -> (PolicyClient, LinkControl) {
        let (end, control) = self.dial(options);
        (self.builder().connect_over(end).await.unwrap(), control)
    }

    pub async fn raw(&self) -> Raw {
        Raw::greet(self.dial(LinkOptions::default()).0).await
    }

    /// Waits for what must come, and never for longer than a test may hang.
    pub async fn until(&self, what: &str, mut holds: impl FnMut(&Harness) -> bool) {
        let began = std::time::Instant::now();
        while !holds(self) {
            assert!(began.elapsed() < Duration::from_secs(20), "{what}: {:?}", self.script.events());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
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
        captured_at: None,
    };
    camera.publish(frame).unwrap();
    sensors.update_proprio("joint_pos", &[n as f32; DIMENSION]).unwrap();
}

/// A peer that says anything.
pub struct Raw {
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

impl Raw {
    /// A peer that has said nothing yet.
    pub fn silent(end: LinkEnd) -> Raw {
        Raw { end, welcome: welcome(), last_id: 1 }
    }

    pub async fn greet(end: LinkEnd) -> Raw {
        let request = Message::Request { id: 1, request: Request::Hello(hello(Role::Controller)) };
        end.send(Codec::Protobuf.encode(&request).unwrap()).await.unwrap();
        let frame = end.recv().await.unwrap().expect("a welcome");
        match Codec::Protobuf.decode(frame).unwrap() {
            Message::Reply { id: 1, reply: Reply::Welcome(welcome) } => {
                Raw { end, welcome: *welcome, last_id: 1 }
            }
            other => panic!("expected a welcome, found {other:?}"),
        }
    }

    pub async fn say(&self, message: &Message) {
        self.say_frame(Codec::Protobuf.encode(message).unwrap()).await;
    }

    pub async fn say_frame(&self, frame: impl Into<Frame>) {
        self.end.send(frame.into()).await.unwrap();
    }

    /// Sends one row of this episode.
    pub async fn act(&self, session: u64, episode: u64, seq: u64, actions: impl Into<ActionChunk>) {
        let actions = actions.into();
        self.say(&Message::Notice(Notice::Action(ActionMessage {
            session,
            episode,
            seq,
            actions,
            observation_seq: 0,
        })))
        .await;
    }

    pub async fn hear(&self) -> Message {
        let frame =
            tokio::time::timeout(Duration::from_secs(3600), self.end.recv()).await.expect("an answer");
        Codec::Protobuf.decode(frame.unwrap().expect("the connection is open")).unwrap()
    }

    /// Asks, and returns the answer, whatever comes before it.
    pub async fn ask(&mut self, request: Request) -> Reply {
        let id = self.request(request).await;
        self.answer(id).await
    }

    pub async fn request(&mut self, request: Request) -> u64 {
        self.last_id += 1;
        self.say(&Message::Request { id: self.last_id, request }).await;
        self.last_id
    }

    pub async fn answer(&self, asked: u64) -> Reply {
        loop {
            if let Message::Reply { id, reply } = self.hear().await
                && id == asked
            {
                return reply;
            }
        }
    }

    /// The next error that answers no request.
    pub async fn fault(&self) -> chiral_proto::Fault {
        loop {
            if let Message::Notice(Notice::Error(fault)) = self.hear().await {
                return fault;
            }
        }
    }
}

/// The actions that arrived at a [`listen`]er, with the time they did.
pub type Arrivals = Arc<Mutex<Vec<(Timestamp, Vec<f32>)>>>;

/// A server that is none: it welcomes a client, answers its pings and notes its actions. No thread is
/// involved, so virtual time is exact.
pub async fn listen(clock: &Clock, options: LinkOptions) -> (PolicyClient, Arrivals, LinkControl) {
    let (ours, theirs, control) = link(options);
    let arrivals = Arrivals::default();
    let (noted, now) = (Arc::clone(&arrivals), clock.clone());
    tokio::spawn(async move {
        while let Ok(Some(frame)) = theirs.recv().await {
            let answer = match Codec::Protobuf.decode(frame).unwrap() {
                Message::Request { id, request: Request::Hello(_) } => {
                    Message::Reply { id, reply: Reply::Welcome(welcome().into()) }
                }
                Message::Notice(Notice::Ping { t1 }) => {
                    Message::Notice(Notice::Pong { t1, t2: now.now(), t3: now.now() })
                }
                Message::Notice(Notice::Action(action)) => {
                    noted.lock().unwrap().push((now.now(), action.actions.values().to_vec()));
                    continue;
                }
                _ => continue,
            };
            let _ = theirs.send(Codec::Protobuf.encode(&answer).unwrap()).await;
        }
    });
    let client = PolicyClient::builder("link").clock(clock.clone()).connect_over(ours).await.unwrap();
    (client, arrivals, control)
}

fn welcome() -> Welcome {
    let robot = chiral_client::RobotInfo {
        name: "listener".to_owned(),
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
    }
}
