//! Where observations come from: the trait that a host may implement in place of the sensors' snapshot, and
//! the check of what it returns.

use std::time::Duration;

use chiral_proto::{
    Camera, CameraSpec, Code, DType, Fault, Image, Observation, Proprio, ProprioSpec, Timestamp,
};

use crate::error::ObserveError;

/// The source of observations. [`Sensors`](crate::Sensors) is one; a host that assembles observations itself
/// gives its own to the server.
///
/// It is called on a thread that may block, apart from the [`Robot`](crate::Robot), so a busy robot does not
/// stop the stream.
pub trait ObservationSource: Send + Sync + 'static {
    /// Returns the newest observation, with every camera and proprio as declared and in that order. Anything
    /// else is an error for the peer that names what is wrong. The server fills in `session`, `episode` and
    /// `seq`.
    ///
    /// With `after`, everything in it was captured later than that. This may block for up to `timeout`.
    ///
    /// # Errors
    /// [`ObserveError::Late`] names the sensor that published nothing in time.
    fn observe(&self, after: Option<Timestamp>, timeout: Duration) -> Result<Observation, ObserveError>;
}

/// What the server told its peers that observations contain.
#[derive(Debug)]
pub(crate) struct Declaration {
    pub(crate) cameras: Vec<CameraSpec>,
    pub(crate) proprios: Vec<ProprioSpec>,
}

impl Declaration {
    /// Fails, naming the camera or proprio, if an observation that `source` has made is not as declared.
    pub(crate) fn check(&self, source: &str, observation: &Observation) -> Result<(), Fault> {
        let checked = self.check_all(observation);
        checked.map_err(|fault| Fault { text: format!("{source} returned {}", fault.text), ..fault })
    }

    fn check_all(&self, observation: &Observation) -> Result<(), Fault> {
        let Declaration { cameras, proprios } = self;
        check_names(
            "camera",
            cameras.iter().map(|spec| &*spec.name),
            observation.cameras.iter().map(|camera| &*camera.name),
        )?;
        check_names(
            "proprio",
            proprios.iter().map(|spec| &*spec.name),
            observation.proprios.iter().map(|proprio| &*proprio.name),
        )?;
        cameras.iter().zip(&observation.cameras).try_for_each(|(spec, camera)| check_camera(spec, camera))?;
        proprios
            .iter()
            .zip(&observation.proprios)
            .try_for_each(|(spec, proprio)| check_proprio(spec, proprio))
    }
}

fn check_names<'a>(
    kind: &str,
    declared: impl Iterator<Item = &'a str> + Clone,
    found: impl Iterator<Item = &'a str> + Clone,
) -> Result<(), Fault> {
    if declared.clone().eq(found.clone()) {
        return Ok(());
    }
    if let Some(missing) = declared.clone().find(|name| !found.clone().any(|other| other == *name)) {
        return Err(fault(kind, missing, format_args!("expected it, since it is declared, found none")));
    }
    if let Some(unknown) = found.clone().find(|name| !declared.clone().any(|other| other == *name)) {
        return Err(fault(kind, unknown, format_args!("expected none, since it is not declared, found one")));
    }
    // The same names, some of them twice or in another order.
    let moved = found.clone().zip(declared.clone().map(Some).chain(std::iter::repeat(None)));
    let (name, expected) = moved
        .filter(|(found, declared)| *declared != Some(*found))
        .map(|(found, declared)| (found, declared.unwrap_or("nothing more")))
        .next()
        .unwrap_or_default();
    Err(fault(kind, name, format_args!("expected {expected} in its place, as declared")))
}

fn check_camera(spec: &CameraSpec, camera: &Camera) -> Result<(), Fault> {
    let check = |part: &str, image: Option<&Image>, expected: Option<(DType, &[usize])>| {
        let found = image.map(|image| (image.dtype(), image.shape()));
        if found == expected {
            return Ok(());
        }
        let text = |found: Option<(DType, &[usize])>| {
            found.map_or("none".to_owned(), |(dtype, shape)| format!("{dtype} of shape {shape:?}"))
        };
        let (expected, found) = (text(expected), text(found));
        Err(fault("camera", &spec.name, format_args!("expected {part} {expected}, found {found}")))
    };
    check("an image of", Some(&camera.image), Some((spec.image_dtype, &spec.image_shape)))?;
    let depth = spec.depth_shape.as_ref().map(|shape| (DType::F32, &shape[..]));
    check("depth:", camera.depth.as_ref(), depth)?;
    if spec.has_own_depth_size() && camera.depth_intrinsics.is_none() {
        let text = "expected depth_intrinsics, since its depth is not of the image's size, found none";
        return Err(fault("camera", &spec.name, format_args!("{text}")));
    }
    Ok(())
}

fn check_proprio(spec: &ProprioSpec, proprio: &Proprio) -> Result<(), Fault> {
    let (expected, found) = ([spec.size], &proprio.data);
    if (found.dtype(), found.shape()) == (DType::F32, &expected[..]) {
        return Ok(());
    }
    Err(fault(
        "proprio",
        &spec.name,
        format_args!(
            "expected {} of shape {expected:?}, found {} of shape {:?}",
            DType::F32,
            found.dtype(),
            found.shape()
        ),
    ))
}

fn fault(kind: &str, name: &str, problem: std::fmt::Arguments<'_>) -> Fault {
    let sensor = format!("{kind} {name}");
    Fault::new(Code::RobotFailed, format!("{sensor}: {problem}")).field(sensor)
}
