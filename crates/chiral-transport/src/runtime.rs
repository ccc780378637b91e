//! Where a connection lives: a thread of its own, or a runtime that is there already.

use std::{convert::Infallible, future::Future, io, sync::Arc, thread};

use tokio::{
    runtime::{Builder, Handle},
    sync::oneshot,
    task::JoinHandle,
};

/// The runtime that drives a connection. A thread made for it ends when the last clone is dropped; so a task
/// that is to be finished keeps one.
#[derive(Clone, Debug)]
pub struct Runtime {
    runtime: Handle,
    _alive: Option<Arc<oneshot::Sender<Infallible>>>,
}

impl Runtime {
    /// The runtime that this is called in.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn current() -> Runtime {
        Runtime { runtime: Handle::current(), _alive: None }
    }

    /// A thread of its own: what it does is not delayed by anything else in this process, and delays nothing.
    ///
    /// # Errors
    /// If the system has no thread or no runtime to give.
    pub fn thread(name: &str) -> io::Result<Runtime> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let (alive, ended) = oneshot::channel();
        let host = Runtime { runtime: runtime.handle().clone(), _alive: Some(Arc::new(alive)) };
        let run = move || {
            let _ = runtime.block_on(ended);
        };
        thread::Builder::new().name(name.to_owned()).spawn(run)?;
        Ok(host)
    }

    /// Runs a task, and keeps its thread until it is done.
    pub fn spawn<T: Send + 'static>(&self, task: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
        let host = self.clone();
        self.runtime.spawn(async move {
            let done = task.await;
            drop(host);
            done
        })
    }

    /// Waits on the calling thread, which must be none of a tokio runtime's.
    pub fn block_on<T>(&self, call: impl Future<Output = T>) -> T {
        self.runtime.block_on(call)
    }
}
