//! `chiral-sim router`: a plain Zenoh router, for tests and for experiments with networks of several hosts.

use std::path::PathBuf;

use anyhow::{Context, Result, anyhow};
use zenoh::{Config, Wait};

use super::shutdown_signal;

/// Route between the robots and policies of a Zenoh network, until Ctrl-C. In a lab, run zenohd instead.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Accept connections here, such as tcp/0.0.0.0:7447
    #[arg(long, value_name = "LOCATOR")]
    listen: Vec<String>,
    /// Connect to another router
    #[arg(long, value_name = "LOCATOR")]
    connect: Vec<String>,
    /// A Zenoh configuration file
    #[arg(long, value_name = "FILE")]
    zenoh_config: Option<PathBuf>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    super::log("info");
    let config = config(arguments)?;
    // Outside the runtime: Zenoh sessions can neither be opened nor dropped in a single-threaded one.
    let session = zenoh::open(config).wait().map_err(|error| anyhow!("cannot start the router: {error}"))?;
    tracing::info!("routing, listening on {:?}, connected to {:?}", arguments.listen, arguments.connect);
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting a runtime")?;
    runtime.block_on(shutdown_signal());
    session.close().wait().map_err(|error| anyhow!("closing the Zenoh session: {error}"))
}

fn config(arguments: &Arguments) -> Result<Config> {
    let zenoh = |error: zenoh::Error| anyhow!("{error}");
    let mut config = match &arguments.zenoh_config {
        Some(path) => Config::from_file(path).map_err(zenoh)?,
        None => Config::default(),
    };
    // Settings in the file take precedence, except for the mode.
    let untouched = Config::default();
    let defaults = [
        ("scouting/multicast/enabled", "false"),
        ("transport/link/tx/queue/size/real_time", "16"),
        ("transport/link/tx/queue/size/data", "16"),
        ("transport/link/tx/queue/batching/time_limit", "0"),
        ("transport/link/tx/queue/congestion_control/block/wait_before_close", "10000000"),
    ];
    let unset =
        defaults.into_iter().filter(|(key, _)| config.get_json(key).ok() == untouched.get_json(key).ok());
    let mut settings: Vec<(&str, String)> = unset.map(|(key, value)| (key, value.to_owned())).collect();
    settings.push(("mode", "\"router\"".to_owned()));
    for (key, locators) in
        [("listen/endpoints", &arguments.listen), ("connect/endpoints", &arguments.connect)]
    {
        if !locators.is_empty() {
            settings.push((key, format!("{locators:?}")));
        }
    }
    for (key, value) in settings {
        config.insert_json5(key, &value).map_err(zenoh).with_context(|| key.to_owned())?;
    }
    Ok(config)
}
