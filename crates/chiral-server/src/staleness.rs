//! The options for cameras that stop publishing.

use std::time::Duration;

/// How long ago a camera may have captured its latest image before the camera counts as stale.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum MaxAge {
    /// Ten times the camera's period, as measured, and at least 1 s; no limit before the camera has published
    /// ten times. For a robot in lock-step, which publishes only on request, it is no limit at all.
    #[default]
    Measured,
    /// This long.
    Fixed(Duration),
    /// No limit.
    Unlimited,
}

/// What becomes of observations with a stale camera.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum OnStale {
    /// They are sent, and the camera is marked: `Camera::is_stale`.
    #[default]
    Mark,
    /// `get_obs` fails and streams with this camera end; the error names the camera.
    Fail,
}
