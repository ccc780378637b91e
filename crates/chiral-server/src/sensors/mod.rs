//! Latest-value slots that sensor threads write and sessions read. Neither waits for the other: a snapshot
//! clones reference counts. [`Sensors`] is here, a camera's publishing end in `camera`, the slots in `slots`,
//! the judgement of times in `times`.

mod camera;
mod shared;
mod slots;
mod times;

use std::{
    sync::{Arc, PoisonError},
    time::{Duration, Instant},
};

#[cfg(feature = "zenoh")]
use chiral_proto::pool::ALIGNMENT;
use chiral_proto::{
    CameraSpec, Clock, Observation, ProprioSpec, Timestamp, ValueMap, error::UnknownName, lock, pool::Pool,
};
use chiral_transport::monotonic;
#[cfg(feature = "zenoh")]
use chiral_transport::zenoh::SharedMemory;
use nalgebra::{Matrix3, Matrix4};

pub use self::camera::{CameraFrame, CameraSensor};
use self::{
    shared::{Publications, Shared, report},
    slots::{CameraSlot, CameraState, ProprioSlot},
};
use crate::{
    error::{Error, ObserveError, SensorError},
    source::ObservationSource,
    staleness::MaxAge,
};

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
        let shared = Shared {
            cameras,
            proprios,
            application: Default::default(),
            publications: Publications::default(),
            pool,
            clock,
            max_age: Default::default(),
        };
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
        camera.update(|state, now| state.image.publish(image, None, now));
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
        camera.update(|state, now| depth.and_then(|depth| state.depth.publish(depth, None, now)));
        Ok(())
    }

    /// Sets a camera's matrix K.
    ///
    /// # Errors
    /// [`SensorError::Unknown`] if there is no such camera.
    pub fn update_intrinsics(&self, camera: &str, intrinsics: Matrix3<f64>) -> Result<(), SensorError> {
        self.set(camera, |state| state.intrinsics = intrinsics)
    }

    /// Sets the matrix K of a camera's depth, where it is not that of the image.
    ///
    /// # Errors
    /// [`SensorError::Unknown`] if there is no such camera.
    pub fn update_depth_intrinsics(&self, camera: &str, intrinsics: Matrix3<f64>) -> Result<(), SensorError> {
        self.set(camera, |state| state.depth_intrinsics = Some(intrinsics))
    }

    /// Sets a camera's pose T, camera to world.
    ///
    /// # Errors
    /// [`SensorError::Unknown`] if there is no such camera.
    pub fn update_extrinsics(&self, camera: &str, extrinsics: Matrix4<f64>) -> Result<(), SensorError> {
        self.set(camera, |state| state.extrinsics = extrinsics)
    }

    /// Copies in proprioception, with now as its capture time.
    ///
    /// # Errors
    /// [`SensorError`] if there is no such proprio, or the number of values is not the declared one.
    pub fn update_proprio(&self, name: &str, values: &[f32]) -> Result<(), SensorError> {
        self.set_proprio(name, values, None)
    }

    /// Copies in proprioception that was captured at `captured_at`, on the clock of the sensors. As in
    /// [`CameraFrame::captured_at`], the time of publishing stands in for one that cannot be right.
    ///
    /// # Errors
    /// As [`Sensors::update_proprio`].
    pub fn publish_proprio(
        &self,
        name: &str,
        values: &[f32],
        captured_at: Timestamp,
    ) -> Result<(), SensorError> {
        self.set_proprio(name, values, Some(captured_at))
    }

    fn set_proprio(
        &self,
        name: &str,
        values: &[f32],
        captured_at: Option<Timestamp>,
    ) -> Result<(), SensorError> {
        let slots = &self.shared.proprios;
        let names = || slots.iter().map(|slot| &*slot.name);
        let slot = slots
            .iter()
            .find(|slot| &*slot.name == name)
            .ok_or_else(|| UnknownName::new("proprio", name, names()))?;
        let implausible = slot.publish(values, captured_at, self.shared.clock.now())?;
        self.shared.publications.notify();
        if let Some(implausible) = implausible {
            report(&format!("proprio {name}"), implausible);
        }
        Ok(())
    }

    fn set(&self, camera: &str, change: impl FnOnce(&mut CameraState)) -> Result<(), SensorError> {
        self.camera(camera)?.update(|state, _| {
            change(state);
            None
        });
        Ok(())
    }

    /// Sets the limit for cameras that have none of their own.
    pub(crate) fn set_max_age(&self, max_age: MaxAge) {
        *lock(&self.shared.max_age) = max_age;
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
        self.snapshot_of(&[])
    }

    /// Returns the latest values with these cameras, none meaning all; `None` until each of them and every
    /// proprio has published once.
    pub(crate) fn snapshot_of(&self, cameras: &[String]) -> Option<Observation> {
        self.try_observe(None, cameras).ok()
    }

    /// Whether [`Sensors::snapshot_of`] these cameras returns an observation.
    pub(crate) fn have_published(&self, cameras: &[String]) -> bool {
        let Shared { cameras: slots, proprios, .. } = &*self.shared;
        let published = |slot: &CameraSlot| !is_wanted(cameras, slot) || slot.has_published();
        slots.iter().all(published) && proprios.iter().all(ProprioSlot::has_published)
    }

    /// Returns the latest values, or the error of the first sensor that has none newer than `after`.
    fn try_observe(&self, after: Option<Timestamp>, cameras: &[String]) -> Result<Observation, ObserveError> {
        let Shared { cameras: slots, proprios, application, clock, max_age, .. } = &*self.shared;
        let (now, max_age) = (clock.now(), *lock(max_age));
        let mut observation = Observation {
            cameras: Vec::with_capacity(slots.len()),
            proprios: Vec::with_capacity(proprios.len()),
            ..Observation::default()
        };
        for slot in slots.iter().filter(|slot| is_wanted(cameras, slot)) {
            observation.cameras.push(slot.observe(after, max_age, now)?);
        }
        for slot in proprios {
            observation.proprios.push(slot.observe(after, now)?);
        }
        let application = lock(application);
        observation.timestamp = application.timestamp.unwrap_or_else(|| now.as_secs_f64());
        observation.extra = application.extra.clone();
        Ok(observation)
    }

    /// Waits for [`Sensors::snapshot_of`] these cameras, at most for `timeout`; with `after`, for everything
    /// in it to be newer.
    pub(crate) fn wait(
        &self,
        after: Option<Timestamp>,
        cameras: &[String],
        timeout: Duration,
    ) -> Result<Observation, ObserveError> {
        let deadline = Instant::now().checked_add(timeout);
        let Publications { mutex, changed } = &self.shared.publications;
        let mut guard = lock(mutex);
        loop {
            // The mutex is locked, so no publication is missed between this check and the wait.
            let error = match self.try_observe(after, cameras) {
                Ok(observation) => return Ok(observation),
                Err(error) => error,
            };
            let remaining =
                deadline.map_or(timeout, |deadline| deadline.saturating_duration_since(Instant::now()));
            if remaining.is_zero() {
                return Err(error.after_waiting(timeout));
            }
            guard = changed.wait_timeout(guard, remaining).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl ObservationSource for Sensors {
    fn observe(&self, after: Option<Timestamp>, timeout: Duration) -> Result<Observation, ObserveError> {
        self.wait(after, &[], timeout)
    }
}

fn is_wanted(cameras: &[String], slot: &CameraSlot) -> bool {
    cameras.is_empty() || cameras.iter().any(|name| **name == *slot.name)
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
