//! `chiral-sim router`: a Zenoh router and nothing else, for tests and for a look at networks of several
//! hosts.

use std::path::PathBuf;

use anyhow::{Context, Result, anyhow};
use zenoh::{Config, Wait};

use super::asked_to_end;

/// Route between the robots and policies of a Zenoh network, until Ctrl-C. In a lab, run zenohd instead.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Let others in here, such as tcp/0.0.0.0:7447
    #[arg(long, value_name = "LOCATOR")]
    listen: Vec<String>,
    /// Connect to another router
    #[arg(long, value_name = "LOCATOR")]
    connect: Vec<String>,
    /// A configuration file of Zenoh's
    #[arg(long, value_name = "FILE")]
    zenoh_config: Option<PathBuf>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    super::log("info");
    let config = config(arguments)?;
    // On this very thread, since Zenoh's sessions can neither be opened nor dropped in a runtime of one
    // thread.
    let session = zenoh::open(config).wait().map_err(|error| anyhow!("no router: {error}"))?;
    tracing::info!("routing, at {:?} and by {:?}", arguments.listen, arguments.connect);
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting a runtime")?;
    runtime.block_on(asked_to_end());
    session.close().wait().map_err(|error| anyhow!("closing: {error}"))
}

fn config(arguments: &Arguments) -> Result<Config> {
    let zenoh = |error: zenoh::Error| anyhow!("{error}");
    let mut config = match &arguments.zenoh_config {
        Some(path) => Config::from_file(path).map_err(zenoh)?,
        None => Config::default(),
    };
    // What the file says stands, but for the mode.
    let untouched = Config::default();
    let unsaid = [
        ("scouting/multicast/enabled", "false"),
        ("transport/link/tx/lease", "2000"),
        ("transport/link/tx/queue/size/data", "16"),
        ("transport/link/tx/queue/congestion_control/block/wait_before_close", "60000000"),
    ];
    let unsaid =
        unsaid.into_iter().filter(|(key, _)| config.get_json(key).ok() == untouched.get_json(key).ok());
    let mut settings: Vec<(&str, String)> = unsaid.map(|(key, value)| (key, value.to_owned())).collect();
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
