//! What a policy that holds one observation costs in memory: page faults in steady state, and resident bytes
//! above those before it connected.

use anyhow::{Context, Result};

use crate::control::Control;
use crate::server::{About, Path};
use crate::sheet::Sheet;
use crate::usage::Usage;

const WARM_UP: usize = 100;
const OBSERVATIONS: usize = 300;

pub(crate) fn run(control: &mut Control, about: &About, sheet: &Sheet, rounds: usize) -> Result<()> {
    let before = Usage::now()?;
    let client = about.watch(Path::WebSocket)?;
    let mut held = client.get_obs().context("get_obs")?;
    for _ in 1..WARM_UP {
        held = client.get_obs().context("get_obs")?;
    }
    let (mut faults, mut server_faults) = (Vec::new(), Vec::new());
    let a_round = OBSERVATIONS.div_ceil(rounds);
    for _ in 0..rounds {
        let (server, here) = (control.usage()?, Usage::now()?);
        for _ in 0..a_round {
            held = client.get_obs().context("get_obs")?;
        }
        faults.push((Usage::now()? - here).minor_faults / a_round as f64);
        server_faults.push((control.usage()? - server).minor_faults / a_round as f64);
    }
    let here = Usage::now()? - before;
    drop(held);
    sheet.put("page_faults", "chiral", "client_per_obs", &faults);
    sheet.put("page_faults", "chiral", "server_per_obs", &server_faults);
    sheet.put("rss", "chiral", "client_added_mb", &[here.resident_bytes * 1e-6]);
    sheet.put("rss", "chiral", "client_peak_added_mb", &[here.peak_resident_bytes * 1e-6]);
    sheet.put("rss", "chiral", "server_mb", &[control.usage()?.resident_bytes * 1e-6]);
    client.close().context("closing")
}
