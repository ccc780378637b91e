//! A robot host with its own HTTP application, which serves two arms next to its own routes, on its own
//! listener and runtime.
//!
//! ```text
//! cargo run -p chiral-server --example embedded_host   # at 127.0.0.1:8765 or the given address
//! cargo run -p chiral-client --example guide_streaming ws://localhost:8765/robot/left
//! curl http://localhost:8765/healthz http://localhost:8765/robot/right/healthz
//! ```

use std::{env, error::Error, net::SocketAddr, thread, time::Duration};

use axum::{Router, routing::get};
use chiral_server::{
    ActionContext, ActionSpec, PolicyServer, ProprioSpec, ResetOutcome, ResetRequest, Robot, RobotError,
    Sensors, action::Action,
};
use tokio::net::TcpListener;

const JOINTS: usize = 7;

struct Arm {
    side: &'static str,
}

impl Robot for Arm {
    fn action_spec(&self) -> ActionSpec {
        ActionSpec::joint_positions(JOINTS, 20.0)
    }

    fn reset(&mut self, _request: &ResetRequest) -> Result<ResetOutcome, RobotError> {
        println!("{}: homing", self.side);
        Ok(ResetOutcome::default())
    }

    fn apply_action(&mut self, action: &Action, _context: &ActionContext) -> Result<(), RobotError> {
        println!("{}: to {:?}", self.side, action.values);
        Ok(())
    }

    fn hold(&mut self) {
        println!("{}: holding", self.side);
    }
}

/// Starts one arm's encoders and builds its server, which does not listen yet.
fn serve_arm(side: &'static str) -> Result<PolicyServer, chiral_server::Error> {
    let sensors = Sensors::new([], [ProprioSpec::new("joint_pos", JOINTS, "rad")])?;
    let encoders = sensors.clone();
    thread::spawn(move || {
        loop {
            encoders.update_proprio("joint_pos", &[0.0; JOINTS]).expect("it is declared above");
            thread::sleep(Duration::from_millis(2));
        }
    });
    PolicyServer::builder(Arm { side }, sensors).name(side).build()
}

/// Waits for Ctrl-C, which the library leaves to the host.
async fn interrupted() {
    if let Err(error) = tokio::signal::ctrl_c().await {
        eprintln!("cannot wait for Ctrl-C, stopping: {error}");
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let address = env::args().nth(1).unwrap_or_else(|| "127.0.0.1:8765".to_owned());
    let (left, right) = (serve_arm("left")?, serve_arm("right")?);
    let handles = [left.handle(), right.handle()];

    let app = Router::new()
        .route("/healthz", get(|| async { "the host is up\n" }))
        .nest("/robot/left", left.health_router().merge(left.into_router()))
        .nest("/robot/right", right.health_router().merge(right.into_router()));
    let listener = TcpListener::bind(address).await?;
    println!(
        "serving at ws://{0}/robot/left and ws://{0}/robot/right; stop with Ctrl-C",
        listener.local_addr()?
    );

    // With the connect info, the servers log the peers' addresses.
    let service = app.into_make_service_with_connect_info::<SocketAddr>();
    let server = axum::serve(listener, service).with_graceful_shutdown(interrupted());
    server.await?;

    // The host no longer listens. Now end the sessions of both arms, which then hold.
    for handle in handles {
        handle.shutdown_and_wait().await;
    }
    Ok(())
}
