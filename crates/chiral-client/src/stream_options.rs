//! What is asked of an observation stream.

/// What an observation stream sends.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct StreamOptions {
    /// Observations a second.
    pub hz: f64,
    /// Only these cameras; none means all.
    pub cameras: Vec<CameraRequest>,
    /// Whether depth images are wanted.
    pub depth: bool,
}

impl StreamOptions {
    /// Every camera, with depth, at this rate in hertz.
    pub fn hz(hz: f64) -> StreamOptions {
        StreamOptions { hz, cameras: Vec::new(), depth: true }
    }

    /// Only these cameras, such as `["wrist_cam"]`.
    #[must_use]
    pub fn cameras(mut self, cameras: impl IntoIterator<Item = impl Into<CameraRequest>>) -> StreamOptions {
        self.cameras = cameras.into_iter().map(Into::into).collect();
        self
    }

    /// No depth images.
    #[must_use]
    pub fn without_depth(mut self) -> StreamOptions {
        self.depth = false;
        self
    }
}

/// A camera of an observation stream.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CameraRequest {
    /// Its name.
    pub name: String,
}

impl From<String> for CameraRequest {
    fn from(name: String) -> CameraRequest {
        CameraRequest { name }
    }
}

impl From<&str> for CameraRequest {
    fn from(name: &str) -> CameraRequest {
        CameraRequest { name: name.to_owned() }
    }
}

impl From<&String> for CameraRequest {
    fn from(name: &String) -> CameraRequest {
        CameraRequest { name: name.clone() }
    }
}

impl From<f64> for StreamOptions {
    fn from(hz: f64) -> StreamOptions {
        StreamOptions::hz(hz)
    }
}
