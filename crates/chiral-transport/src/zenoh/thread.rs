//! Threads on which Zenoh runs.

use std::thread;

use tokio::sync::oneshot;

use super::error::ZenohError;

/// Runs what Zenoh does not do within a runtime.
pub(super) fn run_on_thread<T: Send + 'static>(
    call: impl FnOnce() -> T + Send + 'static,
) -> Result<oneshot::Receiver<T>, ZenohError> {
    let (done, waiting) = oneshot::channel();
    let run = move || drop(done.send(call()));
    thread::Builder::new().name("chiral-zenoh".to_owned()).spawn(run).map_err(ZenohError::Thread)?;
    Ok(waiting)
}

/// Has Linux let whoever runs go on when the calling thread wakes up (`SCHED_BATCH`). Elsewhere, or if Linux
/// refuses, it is merely slower.
///
/// Zenoh's writing thread frees a batch and wakes who waits to fill it, hundreds of times an observation.
/// Where each time interrupts the writing, the two need a third longer on a core that they share; nor should
/// an action wait until pixels are copied.
pub(super) fn schedule_as_batch() {
    #[cfg(target_os = "linux")]
    {
        use thread_priority::{
            NormalThreadSchedulePolicy::Batch, ThreadPriority::Crossplatform, ThreadSchedulePolicy::Normal,
            unix,
        };
        // What sets the policy sets a niceness with it, of which 48 stands for 0: who has chosen another one
        // keeps all as it is.
        if rustix::process::getpriority_process(None) == Ok(0)
            && let Ok(usual) = 48_u8.try_into()
        {
            let _ = unix::set_thread_priority_and_policy(
                unix::thread_native_id(),
                Crossplatform(usual),
                Normal(Batch),
            );
        }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use thread_priority::{NormalThreadSchedulePolicy, ThreadSchedulePolicy, unix};

    use super::*;

    #[test]
    fn batch_scheduling_keeps_the_niceness() {
        let gives_way = thread::spawn(|| {
            schedule_as_batch();
            (unix::thread_schedule_policy().unwrap(), rustix::process::getpriority_process(None).unwrap())
        });
        let niceness = rustix::process::getpriority_process(None).unwrap();
        let policy =
            if niceness == 0 { NormalThreadSchedulePolicy::Batch } else { NormalThreadSchedulePolicy::Other };
        assert_eq!(gives_way.join().unwrap(), (ThreadSchedulePolicy::Normal(policy), niceness));
    }
}
