//! Latest-value slots that sensor threads write and sessions read. Neither waits for the other: a snapshot
//! clones reference counts.

use std::{
    sync::{Arc, Condvar, Mutex, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;
#[cfg(feature = "zenoh")]
use chiral_proto::pool::ALIGNMENT;
use chiral_proto::{
    Camera, CameraSpec, Clock, DType, Image, Observation, Proprio, ProprioSpec, Tensor, Timestamp, ValueMap,
    error::UnknownName,
    lock,
    pool::{Buffer, Pool},
};
use chiral_transport::monotonic;
#[cfg(feature = "zenoh")]
use chiral_transport::zenoh::SharedMemory;
use nalgebra::{Matrix3, Matrix4};

use crate::error::{Error, ObserveError, SensorError};

/// The source of observations. [`Sensors`] is one; a host that assembles observations itself gives its own to
/// the server.
///
/// It is called on a thread that may block, apart from the [`Robot`](crate::Robot), so a busy robot does not
/// stop the stream.
pub trait ObservationSource: Send + Sync + 'static {
    /// Returns the newest observation. The server fills in `session`, `episode` and `seq`.
    ///
    /// With `after`, everything in it was captured later than that. This may block for up to `timeout`.
    ///
    /// # Errors
    /// [`ObserveError::Late`] names the sensor that published nothing in time.
    fn observe(&self, after: Option<Timestamp>, timeout: Duration) -> Result<Observation, ObserveError>;
}

/// The robot's cameras and proprioception, each a slot that holds its latest value. A clone shares the slots.
///
/// ```
/// use chiral_server::{CameraFrame, CameraSpec, ProprioSpec, Sensors};
///
/// let sensors = Sensors::new(
///     [CameraSpec::rgb("wrist_cam", 480, 640)],
///     [ProprioSpec::new("joint_pos", 7, "rad")],
/// )?;
/// let camera = sensors.camera("wrist_cam")?;
/// let mut image = camera.buffer(); // pooled memory: fill it in place, publishing copies nothing
/// image.fill(128);
/// camera.publish(CameraFrame { image: image.into(), ..CameraFrame::default() })?;
/// sensors.update_proprio("joint_pos", &[0.0; 7])?;
/// assert_eq!(sensors.snapshot().unwrap()["wrist_cam"].seq, 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Sensors {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    cameras: Vec<CameraSlot>,
    proprios: Vec<ProprioSlot>,
    application: Mutex<ApplicationValues>,
    publications: Publications,
    pool: Pool,
    clock: Clock,
}

/// The values that an application may add to observations.
#[derive(Debug, Default)]
struct ApplicationValues {
    timestamp: Option<f64>,
    extra: ValueMap,
}

#[derive(Debug)]
struct CameraSlot {
    spec: CameraSpec,
    name: Arc<str>,
    state: Mutex<CameraState>,
}

#[derive(Debug)]
struct CameraState {
    image: Option<(Tensor, Timestamp)>,
    depth: Option<(Tensor, Timestamp)>,
    intrinsics: Matrix3<f64>,
    depth_intrinsics: Option<Matrix3<f64>>,
    extrinsics: Matrix4<f64>,
    seq: u64,
    latest: Option<Arc<Camera>>,
}

#[derive(Debug)]
struct ProprioSlot {
    spec: ProprioSpec,
    name: Arc<str>,
    latest: Mutex<Option<Arc<Proprio>>>,
}

/// Wakes the threads that wait for a publication.
#[derive(Debug, Default)]
struct Publications {
    mutex: Mutex<()>,
    changed: Condvar,
}

impl Sensors {
    /// Idle buffers kept for each camera's image and depth: one being written, one latest, one or two being
    /// sent to peers.
    const IDLE_BUFFERS: usize = 8;

    /// Creates sensors from these declarations. Nothing is published yet.
    ///
    /// # Errors
    /// [`Error::Declaration`] if a name is empty or occurs twice.
    pub fn new(
        cameras: impl IntoIterator<Item = CameraSpec>,
        proprios: impl IntoIterator<Item = ProprioSpec>,
    ) -> Result<Sensors, Error> {
        Sensors::with_clock(cameras, proprios, monotonic())
    }

    /// The same as [`Sensors::new`], with the caller's clock.
    ///
    /// # Errors
    /// As [`Sensors::new`].
    pub fn with_clock(
        cameras: impl IntoIterator<Item = CameraSpec>,
        proprios: impl IntoIterator<Item = ProprioSpec>,
        clock: Clock,
    ) -> Result<Sensors, Error> {
        let cameras: Vec<_> = cameras.into_iter().map(CameraSlot::new).collect();
        let proprios: Vec<_> = proprios.into_iter().map(ProprioSlot::new).collect();
        check_names("camera", cameras.iter().map(|slot| &*slot.name))?;
        check_names("proprio", proprios.iter().map(|slot| &*slot.name))?;
        let pool = Pool::new(Self::IDLE_BUFFERS * cameras.len());
        let application = Mutex::default();
        let shared =
            Shared { cameras, proprios, application, publications: Publications::default(), pool, clock };
        Ok(Sensors { shared: Arc::new(shared) })
    }

    /// Puts the cameras' buffers into shared memory of this host, while the returned value is alive. Returns
    /// `None` without cameras, or if the system does not provide the memory, which is logged.
    #[cfg(feature = "zenoh")]
    pub(crate) fn use_shared_memory(&self) -> Option<SharedMemory> {
        let aligned = |len: usize| len.next_multiple_of(ALIGNMENT);
        let of_camera = |slot: &CameraSlot| aligned(slot.image_len()) + aligned(slot.depth_len());
        let observation: usize = self.shared.cameras.iter().map(of_camera).sum();
        if observation == 0 {
            return None;
        }
        // The rest is for the allocator itself, and for peers' probes.
        let len = Self::IDLE_BUFFERS * observation + (1 << 20);
        match SharedMemory::new(len) {
            Ok(memory) => {
                self.shared.pool.set_provider(&memory.provider());
                Some(memory)
            }
            Err(error) => {
                let megabytes = len as f64 * 1e-6;
                tracing::info!(
                    "no {megabytes:.0} MB of shared memory (/dev/shm, ulimit -l), \
                     so observations travel by the network: {error}"
                );
                None
            }
        }
    }

    /// Returns the declarations of the cameras.
    pub fn camera_specs(&self) -> impl Iterator<Item = &CameraSpec> {
        self.shared.cameras.iter().map(|slot| &slot.spec)
    }

    /// Returns the declarations of the proprioception.
    pub fn proprio_specs(&self) -> impl Iterator<Item = &ProprioSpec> {
        self.shared.proprios.iter().map(|slot| &slot.spec)
    }

    /// Returns the camera of this name, to publish its frames.
    ///
    /// # Errors
    /// [`UnknownName`], which lists the known names.
    pub fn camera(&self, name: &str) -> Result<CameraSensor, UnknownName> {
        let names = || self.shared.cameras.iter().map(|slot| &*slot.name);
        let index = names()
            .position(|known| known == name)
            .ok_or_else(|| UnknownName::new("camera", name, names()))?;
        Ok(CameraSensor { shared: Arc::clone(&self.shared), index })
    }

    /// Copies in an image (H, W, C), with now as its capture time. The camera's matrices stay as they are:
    /// [`CameraSensor::publish`] swaps everything at once.
    ///
    /// # Errors
    /// [`SensorError`] if there is no such camera or the image does not have the declared size.
    pub fn update_image(&self, camera: &str, image: &[u8]) -> Result<(), SensorError> {
        let camera = self.camera(camera)?;
        let image = camera.slot().image(camera.copy(image))?;
        camera.update(|state, now| state.image = Some((image, now)));
        Ok(())
    }

    /// Copies in a depth image (H, W) in metres, with now as its capture time.
    ///
    /// # Errors
    /// [`SensorError`] if there is no such camera, it was declared without depth, or the image does not have
    /// the declared size.
    pub fn update_depth(&self, camera: &str, depth: &[f32]) -> Result<(), SensorError> {
        let camera = self.camera(camera)?;
        let depth = camera.slot().depth(Some(camera.copy(bytemuck::cast_slice(depth))))?;
        camera.update(|state, now| state.depth = depth.map(|depth| (depth, now)));
        Ok(())
    }

    /// Sets a camera's matrix K.
    ///
    /// # Errors
    /// [`SensorError::Unknown`] if there is no such camera.
    pub fn update_intrinsics(&self, camera: &str, intrinsics: Matrix3<f64>) -> Result<(), SensorError> {
        self.camera(camera)?.update(|state, _| state.intrinsics = intrinsics);
        Ok(())
    }

    /// Sets the matrix K of a camera's depth, where it is not that of the image.
    ///
    /// # Errors
    /// [`SensorError::Unknown`] if there is no such camera.
    pub fn update_depth_intrinsics(&self, camera: &str, intrinsics: Matrix3<f64>) -> Result<(), SensorError> {
        self.camera(camera)?.update(|state, _| state.depth_intrinsics = Some(intrinsics));
        Ok(())
    }

    /// Sets a camera's pose T, camera to world.
    ///
    /// # Errors
    /// [`SensorError::Unknown`] if there is no such camera.
    pub fn update_extrinsics(&self, camera: &str, extrinsics: Matrix4<f64>) -> Result<(), SensorError> {
        self.camera(camera)?.update(|state, _| state.extrinsics = extrinsics);
        Ok(())
    }

    /// Copies in proprioception, with now as its capture time.
    ///
    /// # Errors
    /// [`SensorError`] if there is no such proprio, or the number of values is not the declared one.
    pub fn update_proprio(&self, name: &str, values: &[f32]) -> Result<(), SensorError> {
        self.publish_proprio(name, values, self.shared.clock.now())
    }

    /// Copies in proprioception that was captured at `captured_at`.
    ///
    /// # Errors
    /// As [`Sensors::update_proprio`].
    pub fn publish_proprio(
        &self,
        name: &str,
        values: &[f32],
        captured_at: Timestamp,
    ) -> Result<(), SensorError> {
        let slots = &self.shared.proprios;
        let names = || slots.iter().map(|slot| &*slot.name);
        let slot = slots
            .iter()
            .find(|slot| &*slot.name == name)
            .ok_or_else(|| UnknownName::new("proprio", name, names()))?;
        let data = Tensor::from_vec([slot.spec.size], values.to_vec())
            .map_err(|source| SensorError::Shape { sensor: format!("proprio {name}"), source })?;
        *lock(&slot.latest) = Some(Arc::new(Proprio { name: Arc::clone(&slot.name), captured_at, data }));
        self.shared.publications.notify();
        Ok(())
    }

    /// Sets the `timestamp` of observations, for an application that keeps its own time. Unless set, it is
    /// the monotonic clock's seconds.
    pub fn set_timestamp(&self, seconds: f64) {
        lock(&self.shared.application).timestamp = Some(seconds);
    }

    /// Sets the `extra` of observations.
    pub fn set_extra(&self, extra: ValueMap) {
        lock(&self.shared.application).extra = extra;
    }

    /// Returns the latest value of every sensor; `None` until each has published once.
    pub fn snapshot(&self) -> Option<Observation> {
        self.try_observe(None).ok()
    }

    /// Returns the latest value of every sensor, or the name of the first that has none later than `after`.
    fn try_observe(&self, after: Option<Timestamp>) -> Result<Observation, String> {
        let fresh = |captured_at: Timestamp| after.is_none_or(|after| captured_at > after);
        let Shared { cameras, proprios, application, clock, .. } = &*self.shared;
        let camera = |slot: &CameraSlot| {
            let latest = lock(&slot.state).latest.clone();
            latest.filter(|camera| fresh(camera.captured_at)).ok_or_else(|| format!("camera {}", slot.name))
        };
        let proprio = |slot: &ProprioSlot| {
            let latest = lock(&slot.latest).clone();
            latest
                .filter(|proprio| fresh(proprio.captured_at))
                .ok_or_else(|| format!("proprio {}", slot.name))
        };
        let cameras = cameras.iter().map(camera).collect::<Result<_, _>>()?;
        let proprios = proprios.iter().map(proprio).collect::<Result<_, _>>()?;
        let application = lock(application);
        Ok(Observation {
            timestamp: application.timestamp.unwrap_or_else(|| clock.now().as_secs_f64()),
            cameras,
            proprios,
            extra: application.extra.clone(),
            ..Observation::default()
        })
    }
}

impl ObservationSource for Sensors {
    fn observe(&self, after: Option<Timestamp>, timeout: Duration) -> Result<Observation, ObserveError> {
        let deadline = Instant::now() + timeout;
        let Publications { mutex, changed } = &self.shared.publications;
        let mut guard = lock(mutex);
        loop {
            // The mutex is locked, so no publication is missed between this check and the wait.
            let late = match self.try_observe(after) {
                Ok(observation) => return Ok(observation),
                Err(late) => late,
            };
            let remaining = deadline.saturating_duration_since(Instant::now());
            if remaining.is_zero() {
                return Err(ObserveError::Late { sensor: late, waited: timeout });
            }
            guard = changed.wait_timeout(guard, remaining).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// What one camera captured at one instant, published as a whole so that its parts cannot tear.
#[derive(Clone, Debug)]
pub struct CameraFrame {
    /// (H, W, C) as declared, row-major.
    pub image: Bytes,
    /// (H, W) of little-endian `f32` in metres, where the camera was declared with depth.
    pub depth: Option<Bytes>,
    /// The camera matrix K, in pixels.
    pub intrinsics: Matrix3<f64>,
    /// The camera matrix K of the depth, in its own pixels; `None` if it is that of the image. Required where
    /// the depth was declared with another size than the image.
    pub depth_intrinsics: Option<Matrix3<f64>>,
    /// The pose T, camera to world, in metres.
    pub extrinsics: Matrix4<f64>,
    /// The capture time; by default the time of publishing.
    pub captured_at: Option<Timestamp>,
}

impl Default for CameraFrame {
    /// No pixels, and identity matrices.
    fn default() -> CameraFrame {
        CameraFrame {
            image: Bytes::new(),
            depth: None,
            intrinsics: Matrix3::identity(),
            depth_intrinsics: None,
            extrinsics: Matrix4::identity(),
            captured_at: None,
        }
    }
}

/// The writing end of one camera. A clone writes to the same camera.
#[derive(Clone, Debug)]
pub struct CameraSensor {
    shared: Arc<Shared>,
    index: usize,
}

impl CameraSensor {
    /// Returns the declaration of the camera.
    pub fn spec(&self) -> &CameraSpec {
        &self.slot().spec
    }

    /// Returns pooled, aligned memory for one image, with arbitrary content. Never waits.
    pub fn buffer(&self) -> Buffer {
        self.shared.pool.take(self.slot().image_len())
    }

    /// Returns memory for one depth image, as [`CameraSensor::buffer`] does; write it through
    /// `depth_buffer().values_mut::<f32>()`. It is empty if the camera was declared without depth.
    pub fn depth_buffer(&self) -> Buffer {
        self.shared.pool.take(self.slot().depth_len())
    }

    /// Swaps in image, depth, K, T and capture time at once. Nothing is copied: the memory is shared until
    /// the last reader has dropped it.
    ///
    /// # Errors
    /// [`SensorError`] if the image or the depth does not have the declared size, if depth is given but not
    /// declared, or declared but not given, or if its K is missing although it has another size.
    pub fn publish(&self, frame: CameraFrame) -> Result<(), SensorError> {
        let image = self.slot().image(frame.image)?;
        let depth = self.slot().depth(frame.depth)?;
        self.slot().check_depth_intrinsics(frame.depth_intrinsics.as_ref())?;
        self.update(|state, now| {
            let captured_at = frame.captured_at.unwrap_or(now);
            state.image = Some((image, captured_at));
            state.depth = depth.map(|depth| (depth, captured_at));
            state.intrinsics = frame.intrinsics;
            state.depth_intrinsics = frame.depth_intrinsics;
            state.extrinsics = frame.extrinsics;
        });
        Ok(())
    }

    fn slot(&self) -> &CameraSlot {
        &self.shared.cameras[self.index]
    }

    fn copy(&self, data: &[u8]) -> Bytes {
        let mut buffer = self.shared.pool.take(data.len());
        buffer.copy_from_slice(data);
        buffer.freeze()
    }

    fn update(&self, change: impl FnOnce(&mut CameraState, Timestamp)) {
        let now = self.shared.clock.now();
        let slot = self.slot();
        let mut state = lock(&slot.state);
        change(&mut state, now);
        state.assemble(slot);
        drop(state);
        self.shared.publications.notify();
    }
}

impl CameraSlot {
    fn new(spec: CameraSpec) -> CameraSlot {
        let state = CameraState {
            image: None,
            depth: None,
            intrinsics: Matrix3::identity(),
            depth_intrinsics: spec.has_own_depth_size().then(Matrix3::identity),
            extrinsics: Matrix4::identity(),
            seq: 0,
            latest: None,
        };
        CameraSlot { name: spec.name.as_str().into(), spec, state: Mutex::new(state) }
    }

    fn image_len(&self) -> usize {
        self.spec.image_shape.iter().product::<usize>() * self.spec.image_dtype.size()
    }

    fn depth_len(&self) -> usize {
        self.spec.depth_shape.map_or(0, |[height, width]| height * width * size_of::<f32>())
    }

    fn image(&self, data: Bytes) -> Result<Tensor, SensorError> {
        Tensor::new(self.spec.image_dtype, self.spec.image_shape, data)
            .map_err(|source| SensorError::Shape { sensor: format!("camera {}, image", self.name), source })
    }

    fn depth(&self, data: Option<Bytes>) -> Result<Option<Tensor>, SensorError> {
        match (data, self.spec.depth_shape) {
            (None, None) => Ok(None),
            (Some(data), Some(shape)) => Tensor::new(DType::F32, shape, data).map(Some).map_err(|source| {
                SensorError::Shape { sensor: format!("camera {}, depth", self.name), source }
            }),
            (_, declared) => {
                Err(SensorError::Depth { camera: self.spec.name.clone(), declared: declared.is_some() })
            }
        }
    }

    fn check_depth_intrinsics(&self, found: Option<&Matrix3<f64>>) -> Result<(), SensorError> {
        match self.spec.has_own_depth_size() && found.is_none() {
            true => Err(SensorError::DepthIntrinsics { camera: self.spec.name.clone() }),
            false => Ok(()),
        }
    }
}

impl CameraState {
    /// Assembles the parts into one camera, once all declared parts are present.
    fn assemble(&mut self, slot: &CameraSlot) {
        let Some((image, image_at)) = self.image.clone() else { return };
        let depth = self.depth.clone();
        if slot.spec.depth_shape.is_some() && depth.is_none() {
            return;
        }
        self.seq += 1;
        self.latest = Some(Arc::new(Camera {
            name: Arc::clone(&slot.name),
            seq: self.seq,
            captured_at: depth.as_ref().map_or(image_at, |(_, depth_at)| image_at.min(*depth_at)),
            image: Image::from(image),
            depth: depth.map(|(depth, _)| Image::from(depth)),
            intrinsics: self.intrinsics,
            depth_intrinsics: self.depth_intrinsics,
            extrinsics: self.extrinsics,
            is_stale: false,
        }));
    }
}

impl ProprioSlot {
    fn new(spec: ProprioSpec) -> ProprioSlot {
        ProprioSlot { name: spec.name.as_str().into(), spec, latest: Mutex::default() }
    }
}

impl Publications {
    fn notify(&self) {
        drop(lock(&self.mutex));
        self.changed.notify_all();
    }
}

fn check_names<'a>(kind: &str, names: impl Iterator<Item = &'a str>) -> Result<(), Error> {
    let mut seen = std::collections::BTreeSet::new();
    for name in names {
        if name.is_empty() || !seen.insert(name) {
            return Err(Error::Declaration(format!(
                "expected {kind} names that are unique and not empty, found {name:?}"
            )));
        }
    }
    Ok(())
}
