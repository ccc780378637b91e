//! Options that need Zenoh, shared by the commands that have them.

use std::path::PathBuf;

use chiral_client::{PolicyClient, PolicyClientBuilder};
use chiral_server::PolicyServerBuilder;

/// How a client reaches its robot over Zenoh.
#[derive(clap::Args)]
pub(crate) struct ClientOptions {
    /// The robot's name, on a Zenoh network with several robots
    #[arg(long, value_name = "NAME")]
    robot: Option<String>,
    /// A Zenoh configuration file: TLS, user and password, where to connect
    #[arg(long, value_name = "FILE")]
    zenoh_config: Option<PathBuf>,
}

impl ClientOptions {
    /// The address used when none is given: `None` without any of these options.
    pub(crate) fn default_uri(&self) -> Option<&'static str> {
        match self {
            ClientOptions { zenoh_config: Some(_), .. } => Some("zenoh:"),
            ClientOptions { robot: Some(_), .. } => Some(PolicyClient::DEFAULT_ZENOH_URI),
            _ => None,
        }
    }

    pub(crate) fn apply(&self, mut builder: PolicyClientBuilder) -> PolicyClientBuilder {
        if let Some(robot) = &self.robot {
            builder = builder.robot(robot);
        }
        if let Some(file) = &self.zenoh_config {
            builder = builder.zenoh_config(file);
        }
        builder
    }
}

/// How a robot is reached over Zenoh.
#[derive(clap::Args)]
pub(crate) struct ServerOptions {
    /// Serve on a Zenoh network and accept connections here, such as tcp/0.0.0.0:7447; without a locator
    /// tcp/127.0.0.1:7447, for this host only
    #[arg(long, value_name = "LOCATOR", num_args = 0..=1, default_missing_value = "tcp/127.0.0.1:7447")]
    zenoh: Vec<String>,
    /// Join the Zenoh network of a router or another robot, such as tcp/router:7447
    #[arg(long, value_name = "LOCATOR")]
    zenoh_join: Vec<String>,
    /// Send observations over the network to peers on this host, too
    #[arg(long)]
    no_shared_memory: bool,
    /// Serve on a Zenoh network as this Zenoh configuration file says: TLS, users, access control, where to
    /// connect
    #[arg(long, value_name = "FILE")]
    zenoh_config: Option<PathBuf>,
    /// Do not answer clients that search the Zenoh network for robots
    #[arg(long)]
    no_discovery: bool,
    /// Serve legacy clients that are given the address of --zenoh. They name no robot, so this robot is then
    /// not found without its address
    #[arg(long, requires = "zenoh")]
    legacy_zenoh: bool,
}

impl ServerOptions {
    pub(crate) fn apply(&self, builder: PolicyServerBuilder) -> PolicyServerBuilder {
        let mut builder = builder.shared_memory(!self.no_shared_memory).discovery(!self.no_discovery);
        builder = builder.legacy_zenoh(self.legacy_zenoh);
        if let Some(file) = &self.zenoh_config {
            builder = builder.zenoh_config(file);
        }
        for locator in &self.zenoh {
            builder = builder.listen_zenoh(locator);
        }
        for locator in &self.zenoh_join {
            builder = builder.join_zenoh(locator);
        }
        builder
    }
}
