//! The connection by which the measuring client asks the server process for what only that knows: a word a
//! line there, a JSON object a line back.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::raw;
use crate::server::About;
use crate::usage::Usage;
use crate::workload::Arrivals;

/// What the server process answers from.
pub(crate) struct Runtime {
    pub(crate) about: Value,
    pub(crate) arrivals: Arrivals,
    pub(crate) cameras: Arc<Mutex<Cameras>>,
}

/// What the cameras do.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Cameras {
    /// They publish at this rate; at 0, not at all.
    pub(crate) hz: f64,
    /// Those of the robot on Zenoh, into fresh buffers, as cameras do. The other robot's publish what was
    /// drawn before, which costs nothing.
    pub(crate) draw: bool,
}

impl Cameras {
    pub(crate) const OFF: Cameras = Cameras { hz: 0.0, draw: false };
}

/// Answers one client after the other, for ever.
pub(crate) fn serve(listener: &TcpListener, host: &Runtime) -> Result<()> {
    loop {
        let (stream, _) = listener.accept().context("accepting a control connection")?;
        stream.set_nodelay(true).context("setting TCP_NODELAY")?;
        let mut writer = stream.try_clone().context("sharing a control connection")?;
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            let answer = answer(host, &line)?;
            if writeln!(writer, "{answer}").is_err() {
                break;
            }
        }
    }
}

fn answer(host: &Runtime, line: &str) -> Result<Value> {
    let arrivals = || host.arrivals.lock().unwrap_or_else(PoisonError::into_inner);
    Ok(match line.split_once(' ').unwrap_or((line, "")) {
        ("about", _) => host.about.clone(),
        ("usage", _) => {
            let Usage { cpu_s, minor_faults, resident_bytes, peak_resident_bytes } = Usage::now()?;
            json!({"cpu_s": cpu_s, "minor_faults": minor_faults, "resident_bytes": resident_bytes, "peak": peak_resident_bytes})
        }
        ("cameras", how) => {
            let (hz, draw) = how.split_once(' ').context("cameras")?;
            let cameras =
                Cameras { hz: hz.parse().context("cameras")?, draw: draw.parse().context("cameras")? };
            *host.cameras.lock().unwrap_or_else(PoisonError::into_inner) = cameras;
            json!({})
        }
        ("count", _) => json!({"count": arrivals().len()}),
        ("arrivals", _) => json!({"arrivals": std::mem::take(&mut *arrivals())}),
        _ => bail!("the control connection says {line:?}"),
    })
}

/// The client's end.
pub(crate) struct Control {
    reader: BufReader<TcpStream>,
}

impl Control {
    /// After how long without an arrival those that are missing count as lost.
    const SILENCE: Duration = Duration::from_secs(2);

    pub(crate) fn connect(address: SocketAddr) -> Result<Control> {
        Ok(Control { reader: BufReader::new(raw::connect(address)?) })
    }

    pub(crate) fn about(&mut self) -> Result<About> {
        let about = self.ask("about")?;
        let address =
            |path: &str| text(&about[path])?.parse().with_context(|| format!("the address of {path}"));
        Ok(About {
            workload: text(&about["workload"])?.to_owned(),
            bytes: number(&about["bytes"])? as usize,
            raw_blocking: address("raw_blocking")?,
            raw_tokio: address("raw_tokio")?,
            naive: address("naive")?,
            chiral: address("chiral")?,
            zenoh: address("zenoh")?,
            zenoh_query: address("zenoh_query")?,
            zenoh_put: address("zenoh_put")?,
        })
    }

    /// What the server process has used.
    pub(crate) fn usage(&mut self) -> Result<Usage> {
        let usage = self.ask("usage")?;
        let get = |key: &str| number(&usage[key]);
        Ok(Usage {
            cpu_s: get("cpu_s")?,
            minor_faults: get("minor_faults")?,
            resident_bytes: get("resident_bytes")?,
            peak_resident_bytes: get("peak")?,
        })
    }

    /// Has the cameras publish at this rate what was drawn before; at 0, not at all.
    pub(crate) fn set_cameras_hz(&mut self, hz: f64) -> Result<()> {
        self.set_cameras(Cameras { hz, draw: false })
    }

    pub(crate) fn set_cameras(&mut self, Cameras { hz, draw }: Cameras) -> Result<()> {
        self.ask(&format!("cameras {hz} {draw}")).map(drop)
    }

    /// When which actions arrived, in the order they did, since this was asked last; waits until there are
    /// `count`, or no more come.
    pub(crate) fn arrivals(&mut self, count: usize) -> Result<Vec<(usize, i64)>> {
        let (mut arrived, mut grew) = (0, Instant::now());
        while arrived < count && grew.elapsed() < Self::SILENCE {
            std::thread::sleep(Duration::from_millis(10));
            let now = number(&self.ask("count")?["count"])? as usize;
            if now > arrived {
                (arrived, grew) = (now, Instant::now());
            }
        }
        let answer = self.ask("arrivals")?;
        let arrivals = answer["arrivals"].as_array().context("expected a list of arrivals")?;
        let pair = |pair: &Value| {
            Ok((number(&pair[0])? as usize, pair[1].as_i64().context("expected nanoseconds")?))
        };
        arrivals.iter().map(pair).collect()
    }

    fn ask(&mut self, line: &str) -> Result<Value> {
        self.reader
            .get_mut()
            .write_all(format!("{line}\n").as_bytes())
            .context("asking the server process")?;
        let mut answer = String::new();
        self.reader.read_line(&mut answer).context("hearing from the server process")?;
        serde_json::from_str(&answer)
            .with_context(|| format!("the server process answered {answer:?} to {line:?}"))
    }
}

fn number(value: &Value) -> Result<f64> {
    value.as_f64().with_context(|| format!("expected a number, found {value}"))
}

fn text(value: &Value) -> Result<&str> {
    value.as_str().with_context(|| format!("expected a text, found {value}"))
}
