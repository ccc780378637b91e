//! Plain threads for the calls that Zenoh cannot make within a runtime, and how they are scheduled.

use std::thread;

use tokio::sync::oneshot;

use super::error::ZenohError;

/// Runs a call on a thread of its own: Zenoh opens, closes and drops sessions there.
pub(super) fn run_on_thread<T: Send + 'static>(
    call: impl FnOnce() -> T + Send + 'static,
) -> Result<oneshot::Receiver<T>, ZenohError> {
    let (done, result) = oneshot::channel();
    let run = move || drop(done.send(call()));
    thread::Builder::new().name("chiral-zenoh".to_owned()).spawn(run).map_err(ZenohError::Thread)?;
    Ok(result)
}

/// Makes the calling thread wake up without interrupting the thread that is running (Linux's `SCHED_BATCH`).
/// Elsewhere, or if Linux refuses, sending is merely slower.
///
/// Zenoh's writing thread frees a batch and wakes the thread that fills it, hundreds of times per
/// observation. If each wake-up interrupts the writing, the two take a third longer on a core that they
/// share; nor should an action wait until pixels are copied.
pub(super) fn schedule_as_batch() {
    #[cfg(target_os = "linux")]
    {
        use thread_priority::{
            NormalThreadSchedulePolicy::Batch, ThreadPriority::Crossplatform, ThreadSchedulePolicy::Normal,
            unix,
        };
        // The call that sets the policy also sets a niceness, where 48 means 0. A thread with any other
        // niceness is left as it is.
        if rustix::process::getpriority_process(None) == Ok(0)
            && let Ok(priority) = 48_u8.try_into()
        {
            let _ = unix::set_thread_priority_and_policy(
                unix::thread_native_id(),
                Crossplatform(priority),
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
        let batch = thread::spawn(|| {
            schedule_as_batch();
            (unix::thread_schedule_policy().unwrap(), rustix::process::getpriority_process(None).unwrap())
        });
        let niceness = rustix::process::getpriority_process(None).unwrap();
        let policy =
            if niceness == 0 { NormalThreadSchedulePolicy::Batch } else { NormalThreadSchedulePolicy::Other };
        assert_eq!(batch.join().unwrap(), (ThreadSchedulePolicy::Normal(policy), niceness));
    }
}
