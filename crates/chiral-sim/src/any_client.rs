//! The async and the blocking client behind one interface, so that the code that runs an episode exists once.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use chiral_client::{
    ActionChunk, ClientStats, Codec, Error, Observation, PolicyClient, PutMode, RobotInfo, StepResult,
    Timestamp, ValueMap, blocking,
};

type Result<T, E = Error> = std::result::Result<T, E>;

/// Either client. The blocking client's futures are ready when they are first polled, so that [`run_now`] can
/// run them without a runtime.
#[derive(Clone, Debug)]
pub enum AnyClient {
    /// For use in a tokio runtime.
    Async(PolicyClient),
    /// For use without a runtime.
    Blocking(blocking::PolicyClient),
}

/// Calls a method of the same name on either client: awaits the async one, blocks on the other.
macro_rules! either {
    ($any_client:expr, $client:ident => $call:expr) => {
        match $any_client {
            AnyClient::Async($client) => $call.await,
            AnyClient::Blocking($client) => $call,
        }
    };
}

impl AnyClient {
    /// See [`PolicyClient::robot`].
    pub fn robot(&self) -> &RobotInfo {
        match self {
            AnyClient::Async(client) => client.robot(),
            AnyClient::Blocking(client) => client.robot(),
        }
    }

    /// See [`PolicyClient::codec`].
    pub fn codec(&self) -> Codec {
        match self {
            AnyClient::Async(client) => client.codec(),
            AnyClient::Blocking(client) => client.codec(),
        }
    }

    /// See [`PolicyClient::age`].
    pub fn age(&self, captured_at: Timestamp) -> Option<Duration> {
        match self {
            AnyClient::Async(client) => client.age(captured_at),
            AnyClient::Blocking(client) => client.age(captured_at),
        }
    }

    /// See [`PolicyClient::stats`].
    pub fn stats(&self) -> ClientStats {
        match self {
            AnyClient::Async(client) => client.stats(),
            AnyClient::Blocking(client) => client.stats(),
        }
    }

    /// See [`PolicyClient::start_action_dispatch`].
    ///
    /// # Errors
    /// Those of the client's method of this name, here and in every method below.
    pub fn start_action_dispatch(&self, hz: f64) -> Result<()> {
        match self {
            AnyClient::Async(client) => client.start_action_dispatch(hz),
            AnyClient::Blocking(client) => client.start_action_dispatch(hz),
        }
    }

    /// See [`PolicyClient::get_metadata`].
    pub async fn get_metadata(&self) -> Result<ValueMap> {
        either!(self, client => client.get_metadata())
    }

    /// See [`PolicyClient::reset_with`].
    pub async fn reset_with(
        &self,
        seed: Option<u64>,
        options: ValueMap,
    ) -> Result<(Arc<Observation>, ValueMap)> {
        either!(self, client => client.reset_with(seed, options))
    }

    /// See [`PolicyClient::step`].
    pub async fn step(&self, chunk: ActionChunk) -> Result<StepResult> {
        either!(self, client => client.step(chunk))
    }

    /// See [`PolicyClient::start_obs_stream`].
    pub async fn start_obs_stream(&self, hz: f64) -> Result<()> {
        either!(self, client => client.start_obs_stream(hz))
    }

    /// See [`PolicyClient::next_obs`].
    pub async fn next_obs(&self, timeout: Duration) -> Result<Arc<Observation>> {
        either!(self, client => client.next_obs(timeout))
    }

    /// See [`PolicyClient::put_chunk`].
    pub async fn put_chunk(&self, chunk: ActionChunk, mode: PutMode) -> Result<()> {
        either!(self, client => client.put_chunk(chunk, mode))
    }

    /// See [`PolicyClient::close`].
    pub async fn close(&self) -> Result<()> {
        either!(self, client => client.close())
    }
}

/// Runs a future that never waits, such as every call of [`AnyClient::Blocking`].
///
/// # Panics
/// If the future waits.
pub fn run_now<F: Future>(future: F) -> F::Output {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(output) => output,
        Poll::Pending => panic!("expected a future that never waits"),
    }
}
