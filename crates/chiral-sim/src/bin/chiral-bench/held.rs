//! What a policy that holds one observation costs in memory: page faults in steady state, and the resident
//! bytes added since before it connected.

use anyhow::{Context, Result};

use crate::control::Control;
use crate::report::Report;
use crate::server_info::{Path, ServerInfo};
use crate::usage::Usage;

const WARM_UP: usize = 100;
const OBSERVATIONS: usize = 300;

pub(crate) fn run(control: &mut Control, info: &ServerInfo, report: &Report, rounds: usize) -> Result<()> {
    let before = Usage::now()?;
    let client = info.connect_observer(Path::WebSocket)?;
    let mut held = client.get_obs().context("get_obs")?;
    for _ in 1..WARM_UP {
        held = client.get_obs().context("get_obs")?;
    }
    let (mut faults, mut server_faults) = (Vec::new(), Vec::new());
    let per_round = OBSERVATIONS.div_ceil(rounds);
    for _ in 0..rounds {
        let (server, client_usage) = (control.usage()?, Usage::now()?);
        for _ in 0..per_round {
            held = client.get_obs().context("get_obs")?;
        }
        faults.push((Usage::now()? - client_usage).minor_faults / per_round as f64);
        server_faults.push((control.usage()? - server).minor_faults / per_round as f64);
    }
    let added = Usage::now()? - before;
    drop(held);
    report.print("page_faults", "chiral", "client_per_obs", &faults);
    report.print("page_faults", "chiral", "server_per_obs", &server_faults);
    report.print("rss", "chiral", "client_added_mb", &[added.resident_bytes * 1e-6]);
    report.print("rss", "chiral", "client_peak_added_mb", &[added.peak_resident_bytes * 1e-6]);
    report.print("rss", "chiral", "server_mb", &[control.usage()?.resident_bytes * 1e-6]);
    client.close().context("closing")
}
