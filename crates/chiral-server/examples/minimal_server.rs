//! A minimal robot: a camera with a moving picture, and seven joints that reach their targets at once.
//!
//! ```text
//! cargo run -p chiral-server --example minimal_server   # at 127.0.0.1:8765 or the given address
//! cargo run -p chiral-client --example guide_episode                     # in another terminal
//! ```

use std::{
    env,
    error::Error,
    net::SocketAddr,
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use chiral_server::{
    ActionContext, ActionSpec, CameraFrame, CameraSpec, PolicyServer, ProprioSpec, ResetOutcome,
    ResetRequest, Robot, RobotError, SensorError, Sensors, ValueMap, action::Action, value,
};
use nalgebra::Matrix3;

const JOINTS: usize = 7;
const HEIGHT: usize = 120;
const WIDTH: usize = 160;

/// The positions of the joints: written by the robot, read by its sensors.
type Joints = Arc<Mutex<[f32; JOINTS]>>;

struct Arm {
    joints: Joints,
}

impl Arm {
    fn move_to(&mut self, positions: &[f32]) {
        let mut joints = self.joints.lock().expect("nobody panics while holding it");
        for (joint, position) in joints.iter_mut().zip(positions) {
            *joint = position.clamp(-3.0, 3.0);
        }
    }
}

impl Robot for Arm {
    fn action_spec(&self) -> ActionSpec {
        ActionSpec {
            low: vec![-3.0; JOINTS],
            high: vec![3.0; JOINTS],
            ..ActionSpec::joint_positions(JOINTS, 20.0)
        }
    }

    fn reset(&mut self, _request: &ResetRequest) -> Result<ResetOutcome, RobotError> {
        self.move_to(&[0.0; JOINTS]);
        Ok(value::map([("homed", true.into())]).into())
    }

    fn apply_action(&mut self, action: &Action, _context: &ActionContext) -> Result<(), RobotError> {
        self.move_to(&action.values);
        Ok(())
    }

    fn metadata(&self) -> ValueMap {
        value::map([("cameras", vec!["wrist_cam"].into()), ("action_shape", vec![1, JOINTS as i64].into())])
    }
}

/// Publishes the image and the joint positions thirty times a second, as a driver's thread would.
fn sense(sensors: &Sensors, joints: &Joints) -> Result<(), SensorError> {
    let camera = sensors.camera("wrist_cam")?;
    let intrinsics = Matrix3::new(150.0, 0.0, 79.5, 0.0, 150.0, 59.5, 0.0, 0.0, 1.0);
    for tick in 0_usize.. {
        let mut image = camera.buffer();
        for (i, pixel) in image.chunks_exact_mut(3).enumerate() {
            let (row, column) = (i / WIDTH, i % WIDTH);
            pixel.copy_from_slice(&[(column + 2 * tick) as u8, (row + tick) as u8, (row ^ column) as u8]);
        }
        camera.publish(CameraFrame { image: image.into(), intrinsics, ..CameraFrame::default() })?;
        let positions = *joints.lock().expect("nobody panics while holding it");
        sensors.update_proprio("joint_pos", &positions)?;
        thread::sleep(Duration::from_millis(33));
    }
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let address: SocketAddr = env::args().nth(1).as_deref().unwrap_or("127.0.0.1:8765").parse()?;
    let sensors = Sensors::new(
        [CameraSpec::rgb("wrist_cam", HEIGHT, WIDTH)],
        [ProprioSpec::new("joint_pos", JOINTS, "rad")],
    )?;
    let joints = Joints::default();

    let (publisher, read) = (sensors.clone(), Arc::clone(&joints));
    thread::spawn(move || sense(&publisher, &read).expect("the sensors were declared as they are used"));

    println!("serving at ws://{address}; stop with Ctrl-C");
    PolicyServer::builder(Arm { joints }, sensors).name("minimal").bind(address).build()?.run()?;
    Ok(())
}
