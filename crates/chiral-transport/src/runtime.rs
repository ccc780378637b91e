//! The runtime that drives a connection: a thread of its own, or a runtime that exists already.

use std::{convert::Infallible, future::Future, io, sync::Arc, thread};

use tokio::{
    runtime::{Builder, Handle},
    sync::oneshot,
    task::JoinHandle,
};

/// The runtime that drives a connection. A thread started for it ends when the last clone is dropped, so a
/// task that must finish holds one.
#[derive(Clone, Debug)]
pub struct Runtime {
    handle: Handle,
    _keep_alive: Option<Arc<oneshot::Sender<Infallible>>>,
}

impl Runtime {
    /// Returns the runtime that this is called in.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn current() -> Runtime {
        Runtime { handle: Handle::current(), _keep_alive: None }
    }

    /// Starts a thread with a runtime of its own, so that its tasks neither delay the rest of this process
    /// nor are delayed by it.
    ///
    /// # Errors
    /// If the system cannot start a thread or a runtime.
    pub fn thread(name: &str) -> io::Result<Runtime> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let (keep_alive, ended) = oneshot::channel();
        let started = Runtime { handle: runtime.handle().clone(), _keep_alive: Some(Arc::new(keep_alive)) };
        let run = move || {
            let _ = runtime.block_on(ended);
        };
        thread::Builder::new().name(name.to_owned()).spawn(run)?;
        Ok(started)
    }

    /// Spawns a task, and keeps the thread running until it is done.
    pub fn spawn<T: Send + 'static>(&self, task: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
        let runtime = self.clone();
        self.handle.spawn(async move {
            let output = task.await;
            drop(runtime);
            output
        })
    }

    /// Blocks the calling thread, which must not belong to a tokio runtime, until the future is done.
    pub fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.handle.block_on(future)
    }
}
