//! Sensors on a clock of the test's own: what is new, how old it is, and whose fault it is if nothing is.
#![allow(clippy::unwrap_used, reason = "test helpers fail by panicking")]

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use chiral_server::{
    CameraFrame, CameraSpec, MaxAge, ObservationSource, ProprioSpec, SensorError, Sensors,
    proto::{Clock, Observation, Timestamp, bytes::Bytes, nalgebra::Matrix3},
};

const MS: i64 = 1_000_000;
const S: i64 = 1000 * MS;

/// Two cameras and joints, and their clock.
struct Bench {
    sensors: Sensors,
    now: Arc<AtomicI64>,
}

impl Bench {
    fn new() -> Bench {
        Bench::with([CameraSpec::rgb("left", 1, 2), CameraSpec::rgb("right", 1, 2)])
    }

    /// Starts when the host has been up for 10 days.
    fn with<const N: usize>(cameras: [CameraSpec; N]) -> Bench {
        let now = Arc::new(AtomicI64::new(864_000 * S));
        let clock = Arc::clone(&now);
        let clock = Clock::new(move || Timestamp(clock.load(Ordering::Relaxed)));
        let sensors = Sensors::with_clock(cameras, [ProprioSpec::new("joint_pos", 1, "rad")], clock).unwrap();
        Bench { sensors, now }
    }

    fn now(&self) -> Timestamp {
        Timestamp(self.now.load(Ordering::Relaxed))
    }

    fn advance(&self, nanos: i64) -> Timestamp {
        self.now.fetch_add(nanos, Ordering::Relaxed);
        self.now()
    }

    /// Publishes an image of this camera, which it says was captured then.
    fn publish(&self, camera: &str, captured_at: Option<Timestamp>) {
        let image = Bytes::from_static(&[0; 6]);
        self.sensors
            .camera(camera)
            .unwrap()
            .publish(CameraFrame { image, captured_at, ..Default::default() })
            .unwrap();
    }

    /// Publishes everything, as captured now.
    fn publish_all(&self) {
        self.sensors.camera_specs().for_each(|spec| self.publish(&spec.name, None));
        self.sensors.update_proprio("joint_pos", &[0.0]).unwrap();
    }

    /// What a reset that ended at `after` gets at once, or the text of the error.
    fn observe(&self, after: Timestamp) -> Result<Observation, String> {
        self.sensors.observe(Some(after), Duration::ZERO).map_err(|error| error.to_string())
    }
}

#[test]
fn an_image_of_before_the_move_is_not_new_although_it_was_published_after_it() {
    let bench = Bench::new();
    let after = bench.advance(S);
    bench.advance(20 * MS);
    bench.publish_all();
    bench.publish("right", Some(after.shifted(-10 * MS)));
    bench.advance(2 * MS);
    let error = bench.observe(after).unwrap_err();
    assert_eq!(error, "camera right published 2 times, but its captured_at is 0.032 s old");
    bench.publish("right", Some(after.shifted(MS)));
    assert_eq!(bench.observe(after).unwrap()["right"].captured_at, after.shifted(MS));
}

#[test]
fn a_capture_time_that_cannot_be_right_neither_delays_nor_replaces_what_is_new() {
    for error in [40 * MS, 2 * S, 1_700_000_000 * S, -864_000 * S, -61 * S] {
        let bench = Bench::new();
        bench.publish_all();
        bench.publish("right", Some(bench.now().shifted(error)));
        bench.sensors.publish_proprio("joint_pos", &[0.5], bench.now().shifted(error)).unwrap();
        let after = bench.advance(MS);
        bench.advance(33 * MS);
        bench.publish("left", None);
        let text = bench.observe(after).unwrap_err();
        assert_eq!(text, "camera right published nothing new within 0 s", "captured_at is off by {error} ns");
        bench.publish("right", Some(bench.now().shifted(error)));
        let text = bench.observe(after).unwrap_err();
        assert_eq!(text, "proprio joint_pos published nothing new within 0 s");
        bench.sensors.publish_proprio("joint_pos", &[0.5], bench.now().shifted(error)).unwrap();
        let obs = bench.observe(after).unwrap();
        let times = [obs["right"].captured_at, obs.proprios[0].captured_at];
        assert_eq!(
            times,
            [bench.now(); 2],
            "the time of publication, where captured_at is off by {error} ns"
        );
    }
}

#[test]
fn new_matrices_do_not_make_an_old_image_new() {
    let bench = Bench::new();
    bench.publish_all();
    let captured_at = bench.now();
    let after = bench.advance(100 * S);
    bench.advance(MS);
    bench.publish("left", None);
    bench.sensors.update_intrinsics("right", Matrix3::identity() * 2.0).unwrap();
    bench.sensors.update_proprio("joint_pos", &[0.0]).unwrap();
    assert_eq!(bench.observe(after).unwrap_err(), "camera right published nothing new within 0 s");
    let obs = bench.sensors.snapshot().unwrap();
    let right = &obs["right"];
    assert_eq!((right.captured_at, right.seq, right.intrinsics[0]), (captured_at, 2, 2.0));
}

#[test]
fn a_camera_that_stops_is_marked_until_it_publishes_again() {
    let bench = Bench::new();
    for _ in 0..10 {
        bench.advance(33 * MS);
        bench.publish_all();
    }
    bench.advance(S);
    bench.publish("left", None);
    let last = bench.sensors.snapshot().unwrap();
    assert!(!last["right"].is_stale, "exactly a second old");
    bench.advance(MS);
    let obs = bench.sensors.snapshot().unwrap();
    assert_eq!((obs["left"].is_stale, obs["right"].is_stale), (false, true));
    assert!(!last["right"].is_stale, "what was observed before is unchanged");
    let again = bench.sensors.snapshot().unwrap();
    assert!((0..2).all(|i| Arc::ptr_eq(&obs.cameras[i], &again.cameras[i])), "nothing is made anew");
    bench.publish("right", None);
    assert!(!bench.sensors.snapshot().unwrap()["right"].is_stale);
}

#[test]
fn each_camera_may_have_a_limit_of_its_own() {
    let bench = Bench::new();
    bench.publish_all();
    bench.sensors.camera("left").unwrap().set_max_age(MaxAge::Fixed(Duration::from_millis(100)));
    bench.sensors.camera("right").unwrap().set_max_age(MaxAge::Unlimited);
    let stale = |obs: Observation| [obs["left"].is_stale, obs["right"].is_stale];
    bench.advance(100 * MS);
    assert_eq!(stale(bench.sensors.snapshot().unwrap()), [false, false]);
    bench.advance(1000 * S);
    assert_eq!(stale(bench.sensors.snapshot().unwrap()), [true, false]);
}

/// Image and depth of one camera may come from two threads, each at its own rate.
#[test]
fn slow_depth_is_not_stale_and_depth_that_stops_is() {
    let bench = Bench::with([CameraSpec::rgbd("head", 1, 2)]);
    bench.sensors.update_proprio("joint_pos", &[0.0]).unwrap();
    let run = |seconds: i64, with_depth: bool| {
        let mut stale = 0;
        for i in 0..seconds * 30 {
            bench.advance(S / 30);
            if with_depth && i % 60 == 0 {
                bench.sensors.update_depth("head", &[1.0, 2.0]).unwrap();
            }
            bench.sensors.update_image("head", &[0; 6]).unwrap();
            let obs = bench.sensors.snapshot();
            stale += i32::from(obs.is_some_and(|obs| obs["head"].is_stale));
        }
        stale
    };
    assert_eq!(run(40, true), 0, "depth every 2 s");
    assert!(run(40, false) > 0, "no depth");
}

#[test]
fn depth_of_another_size_has_a_k_of_its_own() {
    let bench = Bench::with([CameraSpec::rgb("head", 2, 4).with_depth(1, 2)]);
    let camera = bench.sensors.camera("head").unwrap();
    let frame = CameraFrame { image: camera.buffer().into(), ..CameraFrame::default() };
    let with_depth = CameraFrame { depth: Some(camera.depth_buffer().into()), ..frame.clone() };
    let error = camera.publish(with_depth.clone()).unwrap_err();
    assert!(matches!(error, SensorError::DepthIntrinsics { .. }), "{error}");
    let error = camera.publish(CameraFrame { depth_intrinsics: Some(Matrix3::identity()), ..frame });
    assert!(matches!(error, Err(SensorError::Depth { declared: true, .. })), "{error:?}");

    let k = Matrix3::identity() * 0.5;
    camera.publish(CameraFrame { depth_intrinsics: Some(k), ..with_depth }).unwrap();
    bench.sensors.update_proprio("joint_pos", &[0.0]).unwrap();
    let check = |k: Matrix3<f64>| {
        let obs = bench.sensors.snapshot().unwrap();
        assert_eq!(obs["head"].depth.as_ref().unwrap().shape(), [1, 2]);
        assert_eq!(*obs["head"].intrinsics_of_depth(), k);
        assert_eq!(obs["head"].intrinsics, Matrix3::identity());
    };
    check(k);
    bench.sensors.update_depth_intrinsics("head", 2.0 * k).unwrap();
    bench.sensors.update_depth("head", &[1.0, 2.0]).unwrap();
    check(2.0 * k);
}
