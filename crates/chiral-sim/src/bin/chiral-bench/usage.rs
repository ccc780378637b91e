//! CPU time, page faults and memory of this process.

use std::ops::Sub;

use anyhow::{Context, Result};
use rustix::time::{ClockId, clock_gettime};

/// What the whole process has used so far, including threads that have ended.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Usage {
    pub(crate) cpu_s: f64,
    pub(crate) minor_faults: f64,
    pub(crate) resident_bytes: f64,
    pub(crate) peak_resident_bytes: f64,
}

impl Usage {
    pub(crate) fn now() -> Result<Usage> {
        let cpu = clock_gettime(ClockId::ProcessCPUTime);
        let stat = std::fs::read_to_string("/proc/self/stat").context("reading /proc/self/stat")?;
        // The second field is the program's name in brackets and may contain anything, so fields are counted
        // from its end. The tenth field is minflt (proc_pid_stat(5)).
        let mut fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace();
        let minor_faults =
            fields.nth(7).and_then(|field| field.parse().ok()).context("looking for minflt")?;
        let status = std::fs::read_to_string("/proc/self/status").context("reading /proc/self/status")?;
        let bytes = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key)?.trim().strip_suffix(" kB"));
            line.and_then(|kilobytes| kilobytes.parse::<f64>().ok()).map(|kilobytes| kilobytes * 1024.0)
        };
        Ok(Usage {
            cpu_s: cpu.tv_sec as f64 + cpu.tv_nsec as f64 * 1e-9,
            minor_faults,
            resident_bytes: bytes("VmRSS:").context("looking for VmRSS")?,
            peak_resident_bytes: bytes("VmHWM:").context("looking for VmHWM")?,
        })
    }
}

impl Sub for Usage {
    type Output = Usage;

    fn sub(self, earlier: Usage) -> Usage {
        Usage {
            cpu_s: self.cpu_s - earlier.cpu_s,
            minor_faults: self.minor_faults - earlier.minor_faults,
            resident_bytes: self.resident_bytes - earlier.resident_bytes,
            peak_resident_bytes: self.peak_resident_bytes - earlier.peak_resident_bytes,
        }
    }
}
