//! The control connection, on which the measuring client requests what only the server process knows. A
//! request is a line of text, the reply a JSON object on one line.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::raw;
use crate::server_info::ServerInfo;
use crate::usage::Usage;
use crate::workload::Arrivals;
use chiral_proto::lock;

/// The state of the server process that requests read and change.
pub(crate) struct ServerState {
    pub(crate) info: Value,
    pub(crate) arrivals: Arrivals,
    pub(crate) cameras: Arc<Mutex<Cameras>>,
}

/// How the cameras publish.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Cameras {
    /// The rate; 0: they do not publish.
    pub(crate) hz: f64,
    /// Whether the Zenoh robot's cameras draw each picture into a fresh buffer, as real cameras do. If not,
    /// the other robot's cameras publish prepared pictures, which costs nothing.
    pub(crate) draw: bool,
}

impl Cameras {
    pub(crate) const OFF: Cameras = Cameras { hz: 0.0, draw: false };
}

/// Serves one client after the other; never returns without an error.
pub(crate) fn serve(listener: &TcpListener, state: &ServerState) -> Result<()> {
    loop {
        let (stream, _) = listener.accept().context("accepting a control connection")?;
        stream.set_nodelay(true).context("setting TCP_NODELAY")?;
        let mut writer = stream.try_clone().context("sharing a control connection")?;
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            let reply = reply(state, &line)?;
            if writeln!(writer, "{reply}").is_err() {
                break;
            }
        }
    }
}

fn reply(state: &ServerState, line: &str) -> Result<Value> {
    let arrivals = || lock(&state.arrivals);
    Ok(match line.split_once(' ').unwrap_or((line, "")) {
        ("info", _) => state.info.clone(),
        ("usage", _) => {
            let Usage { cpu_s, minor_faults, resident_bytes, peak_resident_bytes } = Usage::now()?;
            json!({
                "cpu_s": cpu_s, "minor_faults": minor_faults, "resident_bytes": resident_bytes,
                "peak": peak_resident_bytes,
            })
        }
        ("cameras", settings) => {
            let (hz, draw) = settings.split_once(' ').context("cameras")?;
            let cameras =
                Cameras { hz: hz.parse().context("cameras")?, draw: draw.parse().context("cameras")? };
            *lock(&state.cameras) = cameras;
            json!({})
        }
        ("count", _) => json!({"count": arrivals().len()}),
        ("arrivals", _) => json!({"arrivals": std::mem::take(&mut *arrivals())}),
        _ => bail!("unknown request on the control connection: {line:?}"),
    })
}

/// The client's end of a control connection.
pub(crate) struct Control {
    reader: BufReader<TcpStream>,
}

impl Control {
    /// How long no action may arrive before the missing ones count as lost.
    const ARRIVAL_TIMEOUT: Duration = Duration::from_secs(2);

    pub(crate) fn connect(address: SocketAddr) -> Result<Control> {
        Ok(Control { reader: BufReader::new(raw::connect(address)?) })
    }

    pub(crate) fn info(&mut self) -> Result<ServerInfo> {
        let info = self.request("info")?;
        let address =
            |path: &str| text(&info[path])?.parse().with_context(|| format!("the address of {path}"));
        Ok(ServerInfo {
            workload: text(&info["workload"])?.to_owned(),
            bytes: number(&info["bytes"])? as usize,
            raw_blocking: address("raw_blocking")?,
            raw_tokio: address("raw_tokio")?,
            naive: address("naive")?,
            chiral: address("chiral")?,
            zenoh: address("zenoh")?,
            zenoh_query: address("zenoh_query")?,
            zenoh_put: address("zenoh_put")?,
        })
    }

    /// What the server process has used so far.
    pub(crate) fn usage(&mut self) -> Result<Usage> {
        let usage = self.request("usage")?;
        let get = |key: &str| number(&usage[key]);
        Ok(Usage {
            cpu_s: get("cpu_s")?,
            minor_faults: get("minor_faults")?,
            resident_bytes: get("resident_bytes")?,
            peak_resident_bytes: get("peak")?,
        })
    }

    /// Makes the cameras publish prepared pictures at this rate; 0: nothing.
    pub(crate) fn set_cameras_hz(&mut self, hz: f64) -> Result<()> {
        self.set_cameras(Cameras { hz, draw: false })
    }

    pub(crate) fn set_cameras(&mut self, Cameras { hz, draw }: Cameras) -> Result<()> {
        self.request(&format!("cameras {hz} {draw}")).map(drop)
    }

    /// Returns the actions that arrived since the last call, each with its time, in order of arrival. Waits
    /// until there are `count` or no more arrive.
    pub(crate) fn arrivals(&mut self, count: usize) -> Result<Vec<(usize, i64)>> {
        let (mut arrived, mut grew) = (0, Instant::now());
        while arrived < count && grew.elapsed() < Self::ARRIVAL_TIMEOUT {
            std::thread::sleep(Duration::from_millis(10));
            let now = number(&self.request("count")?["count"])? as usize;
            if now > arrived {
                (arrived, grew) = (now, Instant::now());
            }
        }
        let reply = self.request("arrivals")?;
        let arrivals = reply["arrivals"].as_array().context("expected a list of arrivals")?;
        let pair = |pair: &Value| {
            Ok((number(&pair[0])? as usize, pair[1].as_i64().context("expected nanoseconds")?))
        };
        arrivals.iter().map(pair).collect()
    }

    fn request(&mut self, line: &str) -> Result<Value> {
        self.reader
            .get_mut()
            .write_all(format!("{line}\n").as_bytes())
            .context("sending a request to the server process")?;
        let mut reply = String::new();
        self.reader.read_line(&mut reply).context("receiving from the server process")?;
        serde_json::from_str(&reply)
            .with_context(|| format!("expected JSON in reply to {line:?}, found {reply:?}"))
    }
}

fn number(value: &Value) -> Result<f64> {
    value.as_f64().with_context(|| format!("expected a number, found {value}"))
}

fn text(value: &Value) -> Result<&str> {
    value.as_str().with_context(|| format!("expected a string, found {value}"))
}
