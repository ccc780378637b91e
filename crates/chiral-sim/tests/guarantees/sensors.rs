//! Sensors as peers see them: cameras that stop or never begin, and a host's own observations.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use chiral_client::{Camera, Error, Image, Observation, PolicyClient, StreamOptions};
use chiral_proto::{
    ActionSpec, Clock, Code, DType, Encoding, Fault, Proprio, Tensor, Timestamp, action::Action,
};
use chiral_server::{
    ActionContext, CameraFrame, CameraSpec, MaxAge, ObservationSource, ObserveError, OnStale, PolicyServer,
    PolicyServerBuilder, ProprioSpec, ResetOutcome, ResetRequest, Robot, RobotError, Sensors,
};
use chiral_sim::link::{LinkOptions, link};

use crate::{
    ms,
    support::{TEST_TIMEOUT, harness::ScriptedRobot},
};

/// Two cameras without a sensor thread.
fn two_cameras() -> Sensors {
    Sensors::new(["left", "right"].map(|name| CameraSpec::rgb(name, 1, 2)), []).unwrap()
}

fn publish_once(sensors: &Sensors, camera: &str) {
    sensors.update_image(camera, &[7; 6]).unwrap();
}

async fn connect(
    sensors: Sensors,
    configure: impl FnOnce(PolicyServerBuilder) -> PolicyServerBuilder,
) -> PolicyClient {
    let builder = PolicyServer::builder(ScriptedRobot(Arc::default()), sensors).observe_timeout(ms(50));
    let server = configure(builder).build().unwrap();
    let (client_end, server_end, _) = link(LinkOptions::default());
    tokio::spawn(async move { server.serve_connection(server_end).await });
    PolicyClient::builder("link").connect_over(client_end).await.unwrap()
}

#[track_caller]
fn rejected<T: std::fmt::Debug>(outcome: Result<T, Error>) -> Fault {
    match outcome {
        Err(Error::Rejected(fault)) => fault,
        other => panic!("expected a rejection, found {other:?}"),
    }
}

#[tokio::test]
async fn a_stream_of_chosen_cameras_waits_for_those_only() {
    let sensors = two_cameras();
    publish_once(&sensors, "right");
    let env = connect(sensors, |builder| builder).await;
    env.start_obs_stream(StreamOptions::hz(100.0).cameras(["right"])).await.unwrap();
    let obs = env.next_obs(TEST_TIMEOUT).await.unwrap();
    assert_eq!(obs.cameras.iter().map(|camera| &*camera.name).collect::<Vec<_>>(), ["right"]);
    for outcome in [env.get_obs().await.map(drop), env.start_obs_stream(30.0).await] {
        assert_eq!(rejected(outcome).field, "camera left");
    }
}

#[tokio::test]
async fn a_stale_camera_is_marked_or_an_error_for_those_who_want_it() {
    let sensors = two_cameras();
    publish_once(&sensors, "left");
    publish_once(&sensors, "right");
    // Older than that with the clock's next reading.
    sensors.camera("left").unwrap().set_max_age(MaxAge::Fixed(Duration::ZERO));

    let env = connect(sensors.clone(), |builder| builder).await;
    let obs = env.get_obs().await.unwrap();
    assert_eq!((obs["left"].is_stale, obs["right"].is_stale), (true, false));

    let env = connect(sensors, |builder| builder.on_stale(OnStale::Fail)).await;
    let fault = rejected(env.get_obs().await);
    assert_eq!((fault.code, &*fault.field), (Code::SensorTimeout, "camera left"));
    assert!(fault.text.starts_with("camera left: expected an image within its max_age, found"), "{fault}");

    env.start_obs_stream(StreamOptions::hz(100.0).cameras(["right"])).await.unwrap();
    for _ in 0..5 {
        env.next_obs(TEST_TIMEOUT).await.unwrap();
    }
    env.start_obs_stream(100.0).await.unwrap();
    match env.next_obs(TEST_TIMEOUT).await {
        Err(Error::StreamEnded { reason }) => assert!(reason.starts_with("camera left"), "{reason}"),
        other => panic!("expected the end of the stream, found {other:?}"),
    }
}

/// A robot that only counts its resets. The number is locked while the camera captures it.
struct Counting(Arc<Mutex<u8>>);

impl Robot for Counting {
    fn action_spec(&self) -> ActionSpec {
        ActionSpec::joint_positions(1, 10.0)
    }

    fn reset(&mut self, _request: &ResetRequest) -> Result<ResetOutcome, RobotError> {
        *self.0.lock().unwrap() += 1;
        Ok(ResetOutcome::default())
    }

    fn apply_action(&mut self, _action: &Action, _context: &ActionContext) -> Result<(), RobotError> {
        Ok(())
    }
}

#[tokio::test]
async fn a_reset_returns_a_new_image_whatever_the_cameras_capture_times_count_from() {
    const S: i64 = 1_000_000_000;
    // The host has been up for more than 10 days.
    let up = 864_000 * S;
    let clock = Clock::new(move || chiral_server::monotonic().now().shifted(up));
    // Counted from power-up, a little and a lot ahead, and Unix time.
    for error in [-up, S / 25, 2 * S, 1_700_000_000 * S] {
        let sensors = Sensors::with_clock([CameraSpec::rgb("eye", 1, 1)], [], clock.clone()).unwrap();
        let resets = Arc::new(Mutex::new(0));
        let camera = sensors.camera("eye").unwrap();
        let (number, now) = (Arc::clone(&resets), clock.clone());
        let publishing = tokio::spawn(async move {
            loop {
                {
                    let number = number.lock().unwrap();
                    let captured_at = Some(now.now().shifted(error));
                    let image = vec![*number; 3].into();
                    camera.publish(CameraFrame { image, captured_at, ..Default::default() }).unwrap();
                }
                tokio::time::sleep(ms(5)).await;
            }
        });
        let server = PolicyServer::builder(Counting(resets), sensors).clock(clock.clone()).build().unwrap();
        let (client_end, server_end, _) = link(LinkOptions::default());
        tokio::spawn(async move { server.serve_connection(server_end).await });
        let env = PolicyClient::builder("link").connect_over(client_end).await.unwrap();
        for number in 1..=5 {
            let (obs, _) = env.reset().await.unwrap();
            assert_eq!(obs["eye"].image.data()[..], [number; 3], "captured_at is off by {error} ns");
        }
        publishing.abort();
    }
}

/// Returns the same observation again and again.
struct Fixed(Observation);

impl ObservationSource for Fixed {
    fn observe(&self, _after: Option<Timestamp>, _timeout: Duration) -> Result<Observation, ObserveError> {
        Ok(self.0.clone())
    }
}

fn camera(name: &str) -> Camera {
    Camera::new(name, Tensor::from_vec([1, 2, 3], vec![7_u8; 6]).unwrap())
}

fn joints(values: Vec<f32>) -> Arc<Proprio> {
    let data = Tensor::from_vec([values.len()], values).unwrap();
    Arc::new(Proprio { name: "joint_pos".into(), captured_at: Timestamp(0), data })
}

/// A server of two cameras, the right one with depth, and joints, whose observations are these.
async fn with_source(cameras: Vec<Camera>, proprios: Vec<Arc<Proprio>>) -> PolicyClient {
    let specs = [CameraSpec::rgb("left", 1, 2), CameraSpec::rgb("right", 1, 2).with_depth(1, 1)];
    let sensors = Sensors::new(specs, [ProprioSpec::new("joint_pos", 2, "rad")]).unwrap();
    let cameras = cameras.into_iter().map(Arc::new).collect();
    let source = Fixed(Observation { cameras, proprios, ..Observation::default() });
    connect(sensors, |builder| builder.observations(source)).await
}

fn right() -> Camera {
    let depth = Image::from(Tensor::from_vec([1, 1], vec![0.5_f32]).unwrap());
    let right = camera("right");
    Camera { depth: Some(depth), depth_intrinsics: Some(right.intrinsics), ..right }
}

#[tokio::test]
async fn a_hosts_own_observations_are_checked_against_the_declaration() {
    async fn check(cameras: Vec<Camera>, proprios: Vec<Arc<Proprio>>, expected: &str) {
        let env = with_source(cameras, proprios).await;
        let expected = format!("the observation source returned {expected}");
        for outcome in
            [env.get_obs().await.map(drop), env.start_obs_stream(30.0).await, env.reset().await.map(drop)]
        {
            let fault = rejected(outcome);
            assert_eq!((fault.code, &*fault.text), (Code::RobotFailed, &*expected));
            assert!(expected.contains(&fault.field), "{:?}", fault.field);
        }
    }
    let joints = || vec![joints(vec![0.1, 0.2])];
    let wide = Camera { image: Tensor::from_vec([1, 3, 3], vec![7_u8; 9]).unwrap().into(), ..camera("left") };
    let float =
        Camera { image: Tensor::from_vec([1, 2, 3], vec![0.5_f32; 6]).unwrap().into(), ..camera("left") };
    let without_k = Camera { depth_intrinsics: None, ..right() };

    check(vec![camera("left")], joints(), "camera right: expected it, since it is declared, found none")
        .await;
    check(
        vec![camera("left"), right(), camera("up")],
        joints(),
        "camera up: expected none, since it is not declared, found one",
    )
    .await;
    check(vec![right(), camera("left")], joints(), "camera right: expected left in its place, as declared")
        .await;
    check(
        vec![camera("left"), right(), right()],
        joints(),
        "camera right: expected nothing more in its place, as declared",
    )
    .await;
    check(
        vec![wide, right()],
        joints(),
        "camera left: expected an image of uint8 of shape [1, 2, 3], found uint8 of shape [1, 3, 3]",
    )
    .await;
    check(
        vec![float, right()],
        joints(),
        "camera left: expected an image of uint8 of shape [1, 2, 3], found float32 of shape [1, 2, 3]",
    )
    .await;
    check(
        vec![camera("left"), camera("right")],
        joints(),
        "camera right: expected depth: float32 of shape [1, 1], found none",
    )
    .await;
    check(
        vec![camera("left"), without_k],
        joints(),
        "camera right: expected depth_intrinsics, since its depth is not of the image's size, found none",
    )
    .await;
    check(
        vec![camera("left"), right()],
        vec![],
        "proprio joint_pos: expected it, since it is declared, found none",
    )
    .await;
    check(
        vec![camera("left"), right()],
        vec![self::joints(vec![0.1])],
        "proprio joint_pos: expected float32 of shape [2], found float32 of shape [1]",
    )
    .await;
    let env = with_source(vec![camera("left"), right()], joints()).await;
    assert_eq!(env.get_obs().await.unwrap()["right"].depth.as_ref().unwrap().shape(), [1, 1]);
}

/// A robot whose reset returns this observation.
struct Observing(Observation);

impl Robot for Observing {
    fn action_spec(&self) -> ActionSpec {
        ActionSpec::joint_positions(2, 20.0)
    }

    fn reset(&mut self, _request: &ResetRequest) -> Result<ResetOutcome, RobotError> {
        Ok(ResetOutcome::default().with_observation(self.0.clone()))
    }

    fn apply_action(&mut self, _action: &Action, _context: &ActionContext) -> Result<(), RobotError> {
        Ok(())
    }
}

#[tokio::test]
async fn a_robots_own_observation_is_checked_too() {
    for (cameras, expected) in [
        (vec![camera("left")], None),
        (vec![], Some("the robot returned camera left: expected it, since it is declared, found none")),
    ] {
        let cameras = cameras.into_iter().map(Arc::new).collect();
        let robot = Observing(Observation { cameras, ..Observation::default() });
        let sensors = Sensors::new([CameraSpec::rgb("left", 1, 2)], []).unwrap();
        let server = PolicyServer::builder(robot, sensors).build().unwrap();
        let (client_end, server_end, _) = link(LinkOptions::default());
        tokio::spawn(async move { server.serve_connection(server_end).await });
        let env = PolicyClient::builder("link").connect_over(client_end).await.unwrap();
        match (env.reset().await, expected) {
            (Ok((obs, _)), None) => assert_eq!(obs.episode, 1),
            (outcome, Some(expected)) => assert_eq!(rejected(outcome).text, expected),
            (outcome, None) => panic!("{outcome:?}"),
        }
    }
}

#[tokio::test]
async fn an_image_of_an_unknown_encoding_spoils_nothing_but_itself() {
    let newer = Image::new(Encoding(7), DType::U8, [1, 2, 3], vec![1, 2, 3, 4]).unwrap();
    let left = Camera { image: newer, ..camera("left") };
    let env = with_source(vec![left, right()], vec![joints(vec![0.1, 0.2])]).await;
    let obs = env.get_obs().await.unwrap();
    let error = obs["left"].image.pixels().unwrap_err();
    assert_eq!(error.to_string(), "expected an image that is raw, found encoding 7");
    assert_eq!(
        (obs["left"].image.shape(), &obs["left"].image.data()[..]),
        (&[1, 2, 3][..], &[1, 2, 3, 4][..])
    );
    assert_eq!(obs["right"].image.values::<u8>().unwrap()[..], [7; 6]);
}
