//! How a blocking wait is given up from outside, such as by Ctrl-C.

use std::{fmt, future::Future, pin::pin, sync::Arc, time::Duration};

use chiral_transport::Runtime;
use tokio::time::timeout;

use crate::error::Error;

/// How often a wait asks whether it is to be given up.
const CHECK_PERIOD: Duration = Duration::from_millis(100);

/// A function of the caller's that says whether waiting is to be given up.
#[derive(Clone)]
pub(crate) struct InterruptCheck(Arc<dyn Fn() -> bool + Send + Sync>);

impl InterruptCheck {
    pub(crate) fn new(check: impl Fn() -> bool + Send + Sync + 'static) -> InterruptCheck {
        InterruptCheck(Arc::new(check))
    }
}

impl fmt::Debug for InterruptCheck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("InterruptCheck")
    }
}

/// Blocks the calling thread until the call is done or the check gives it up. The check runs on this thread,
/// outside the runtime, so that it may do anything that the caller's code may.
pub(crate) fn block_on<T>(
    runtime: &Runtime,
    check: Option<&InterruptCheck>,
    call: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    let Some(InterruptCheck(is_interrupted)) = check else { return runtime.block_on(call) };
    let mut call = pin!(call);
    loop {
        match runtime.block_on(async { timeout(CHECK_PERIOD, call.as_mut()).await }) {
            Ok(outcome) => return outcome,
            Err(_) if is_interrupted() => return Err(Error::Interrupted),
            Err(_) => {}
        }
    }
}
