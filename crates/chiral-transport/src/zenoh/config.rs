//! The configuration of Zenoh sessions: the settings of the configuration file, if there is one; else Zenoh's
//! defaults, except those that do not suit.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;
use zenoh::Config;

use super::{
    error::{ZenohError, cause, failed},
    reassembly::WINDOW,
};

/// How many batches of 64 KiB may wait for the socket at each priority that lanes use; Zenoh allows 16 at most.
/// With fewer, large messages are slower, and small ones on a busy link wait, with the thread that puts them.
const QUEUE_BATCHES: u32 = 16;
/// For how many milliseconds Zenoh may wait for more small messages to send in one batch.
const BATCHING_MS: u32 = 0;
/// How many bytes from each neighbour may wait in reused memory: the window of a lane, and as much in
/// transit. Beyond it Zenoh allocates, clears and frees memory for every batch, which takes longer than
/// receiving it.
const RECEIVE_BUFFER_BYTES: u64 = 2 * WINDOW;
/// The same for a client, which has one neighbour: a whole observation from a legacy server, which is one put
/// of 17.2 MB with eight cameras, and what is in transit. Without the legacy wire [`RECEIVE_BUFFER_BYTES`]
/// would do.
const CLIENT_RECEIVE_BUFFER_BYTES: u64 = 24 << 20;
/// After how many microseconds Zenoh closes a connection on which a message cannot be sent: as long as its
/// lease. A put that waits holds a lock that closing a lost connection needs, so a longer time would delay
/// that. Its value for "never" panics.
const WAIT_BEFORE_CLOSE_US: u32 = 10_000_000;
/// The same with legacy peers, whose observations are one message each: 17.2 MB in ten seconds would be too
/// much for a slow link.
const LEGACY_WAIT_BEFORE_CLOSE_US: u32 = 60_000_000;
const WAIT_BEFORE_CLOSE: &str = "transport/link/tx/queue/congestion_control/block/wait_before_close";
/// How many milliseconds the handshake with a neighbour may take.
pub(super) const OPEN_TIMEOUT_MS: u32 = 3_000;

const LISTEN: &str = "listen/endpoints";
const CONNECT: &str = "connect/endpoints";
const MULTICAST: &str = "scouting/multicast/enabled";
const GOSSIP: &str = "scouting/gossip/enabled";

/// How a network is joined. Locators are Zenoh's, such as `tcp/0.0.0.0:7447`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ZenohSessionOptions {
    /// The locators to listen at. Without any, this is a client of the network, which forwards nothing for
    /// others.
    pub listen: Vec<String>,
    /// The locators to connect to: all of them, or at least one for a client.
    pub connect: Vec<String>,
    /// A Zenoh configuration file. Its settings take precedence; the locators are added to its own.
    pub config: Option<PathBuf>,
    /// Whether a session that listens answers multicast scouting. The file's setting for multicast takes
    /// precedence.
    pub discovery: bool,
    /// Whether to share memory with other processes of this host, unless the file disables it.
    pub shared_memory: bool,
    /// Whether this is for the legacy wire, whose messages name no robot. Nothing but the address may lead to
    /// a session that listens: it does not answer multicast scouting. One that does not is a peer all the same,
    /// not a client: what a client sends is passed on to whatever its neighbour has found.
    pub legacy: bool,
}

impl Default for ZenohSessionOptions {
    /// No locators, no discovery, no legacy clients, with shared memory.
    fn default() -> ZenohSessionOptions {
        ZenohSessionOptions {
            listen: Vec::new(),
            connect: Vec::new(),
            config: None,
            discovery: false,
            shared_memory: true,
            legacy: false,
        }
    }
}

/// What a configuration is for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Purpose<'a> {
    /// A session on the network, as the options say.
    Member,
    /// A session to query the robots at this locator, and nowhere else.
    Lookup(&'a str),
    /// Multicast scouting, which needs no session.
    Scout,
}

/// The configuration of a session, and the locators in it, those to listen at and those to connect to.
pub(super) struct Configured {
    pub(super) config: Config,
    pub(super) listen: Vec<String>,
    pub(super) connect: Vec<String>,
    /// What but its address leads to a session with this configuration, or connects it to others; `None` if
    /// nothing does.
    pub(super) other_way_in: Option<String>,
}

/// Returns the configuration for this purpose. Settings of the file take precedence; locators are added to
/// its own.
pub(super) fn configure(
    options: &ZenohSessionOptions,
    purpose: Purpose<'_>,
) -> Result<Configured, ZenohError> {
    let mut draft = Draft::read(options.config.as_deref())?;
    let only = |locator: &str| vec![Value::from(locator)];
    let (mode, listen, connect) = match purpose {
        Purpose::Member => draft.membership(options)?,
        Purpose::Lookup(locator) => ("client".to_owned(), Vec::new(), only(locator)),
        Purpose::Scout => ("client".to_owned(), Vec::new(), Vec::new()),
    };
    let [(listen, to_listen), (connect, to_connect)] =
        [listen, connect].map(|text| (locators(&text), Value::from(text).to_string()));
    let refused =
        |error| ZenohError::Locator { locators: [&listen[..], &connect[..]].concat(), source: cause(&error) };
    draft.config.insert_json5(LISTEN, &to_listen).map_err(refused)?;
    draft.config.insert_json5(CONNECT, &to_connect).map_err(refused)?;
    draft.set("mode", format!("{mode:?}"))?;

    match purpose {
        Purpose::Scout => draft.set(MULTICAST, true)?,
        Purpose::Lookup(_) => draft.set(MULTICAST, false)?,
        // A client cannot be found, since it does not listen. Found peers are not connected to automatically.
        Purpose::Member
            if options.discovery && !options.legacy && mode != "client" && !draft.is_set(MULTICAST) =>
        {
            draft.set(MULTICAST, true)?;
            draft.default("scouting/multicast/listen", true)?;
            draft.default("scouting/multicast/autoconnect", "[]")?;
        }
        Purpose::Member => draft.default(MULTICAST, false)?,
    }
    if connect.is_empty() {
        // There is no peer to wait for.
        draft.default("open/return_conditions/connect_scouted", false)?;
    }
    // One attempt: callers that wait for a peer retry, and log it.
    draft.default("connect/timeout_ms", 0)?;
    draft.default("connect/exit_on_failure", true)?;
    draft.default(GOSSIP, false)?;
    draft.default("transport/unicast/open_timeout", OPEN_TIMEOUT_MS)?;
    draft.default("transport/unicast/accept_timeout", OPEN_TIMEOUT_MS)?;
    for priority in ["real_time", "data"] {
        draft.default(&format!("transport/link/tx/queue/size/{priority}"), QUEUE_BATCHES)?;
    }
    draft.default("transport/link/tx/queue/batching/time_limit", BATCHING_MS)?;
    let receive_buffer = if mode == "client" { CLIENT_RECEIVE_BUFFER_BYTES } else { RECEIVE_BUFFER_BYTES };
    draft.default("transport/link/rx/buffer_size", receive_buffer)?;
    if !options.shared_memory || !matches!(purpose, Purpose::Member) {
        draft.set("transport/shared_memory/enabled", false)?;
    }
    // This optimization copies other payloads into shared memory, where they may be overwritten under a slow
    // reader.
    draft.set("transport/shared_memory/transport_optimization/enabled", false)?;
    let wait_before_close = if options.legacy { LEGACY_WAIT_BEFORE_CLOSE_US } else { WAIT_BEFORE_CLOSE_US };
    if draft.get(WAIT_BEFORE_CLOSE)?.as_i64().is_some_and(i64::is_negative) {
        draft.set(WAIT_BEFORE_CLOSE, wait_before_close)?;
    }
    draft.default(WAIT_BEFORE_CLOSE, wait_before_close)?;
    let other_way_in = draft.other_way_in(&mode, &connect)?;
    Ok(Configured { config: draft.config, listen, connect, other_way_in })
}

/// A configuration that is being built.
struct Draft<'a> {
    file: Option<&'a Path>,
    config: Config,
    /// Zenoh's defaults. A setting of the file that equals its default looks like one that is not set.
    defaults: Config,
}

impl<'a> Draft<'a> {
    fn read(file: Option<&'a Path>) -> Result<Draft<'a>, ZenohError> {
        let config = file.map_or_else(|| Ok(Config::default()), read)?;
        Ok(Draft { file, config, defaults: Config::default() })
    }

    /// Returns the mode, the endpoints to listen at and those to connect to.
    fn membership(
        &self,
        options: &ZenohSessionOptions,
    ) -> Result<(String, Vec<Value>, Vec<Value>), ZenohError> {
        let listens = !options.listen.is_empty() || self.is_set(LISTEN);
        let mode = self.get("mode")?;
        let is_peer = listens || options.legacy;
        let mode = mode.as_str().unwrap_or(if is_peer { "peer" } else { "client" }).to_owned();
        if let (Some(file), "client", false) = (self.file, mode.as_str(), options.listen.is_empty()) {
            let problem =
                format!("expected mode \"peer\" for listening at {:?}, found \"client\"", options.listen);
            return Err(ZenohError::Config { file: file.to_owned(), problem });
        }
        let listen = self.endpoints(LISTEN, &mode, &options.listen)?;
        let connect = self.endpoints(CONNECT, &mode, &options.connect)?;
        if listen.is_empty() && connect.is_empty() && self.get(MULTICAST)?.as_bool() != Some(true) {
            return Err(ZenohError::NoLocator);
        }
        Ok((mode, listen, connect))
    }

    /// Returns the file's endpoints for this mode, and the locators of the options.
    fn endpoints(&self, key: &str, mode: &str, added: &[String]) -> Result<Vec<Value>, ZenohError> {
        let mut endpoints = Vec::new();
        if self.is_set(key) {
            let text = self.get(key)?;
            endpoints.extend(text.get(mode).unwrap_or(&text).as_array().into_iter().flatten().cloned());
        }
        endpoints.extend(added.iter().map(|locator| Value::from(locator.as_str())));
        Ok(endpoints)
    }

    /// What but its address leads to the session, or connects it to others.
    fn other_way_in(&self, mode: &str, connect: &[String]) -> Result<Option<String>, ZenohError> {
        if mode != "peer" {
            return Ok(Some(format!("its Zenoh mode is {mode:?}")));
        }
        if let Some(locator) = connect.first() {
            return Ok(Some(format!("it connects to {locator}")));
        }
        for (key, what) in [(MULTICAST, "it uses multicast"), (GOSSIP, "it takes part in gossip")] {
            if self.get(key)?.as_bool() != Some(false) {
                return Ok(Some(format!("{what} ({key})")));
            }
        }
        Ok(None)
    }

    /// Whether the file sets this key.
    fn is_set(&self, key: &str) -> bool {
        self.config.get_json(key).ok() != self.defaults.get_json(key).ok()
    }

    fn get(&self, key: &str) -> Result<Value, ZenohError> {
        let json = self.config.get_json(key).map_err(failed)?;
        Ok(serde_json::from_str(&json).unwrap_or_default())
    }

    fn set(&mut self, key: &str, value: impl ToString) -> Result<(), ZenohError> {
        self.config.insert_json5(key, &value.to_string()).map_err(failed)
    }

    /// Sets a key unless the file sets it.
    fn default(&mut self, key: &str, value: impl ToString) -> Result<(), ZenohError> {
        if self.is_set(key) { Ok(()) } else { self.set(key, value) }
    }
}

/// Returns the locators in endpoints. An endpoint is one locator, or several of the same neighbour.
fn locators(endpoints: &[Value]) -> Vec<String> {
    let several = |endpoint: &Value| endpoint.get("locators").and_then(Value::as_array).cloned();
    let each =
        endpoints.iter().flat_map(|endpoint| several(endpoint).unwrap_or_else(|| vec![endpoint.clone()]));
    each.filter_map(|locator| locator.as_str().map(str::to_owned)).collect()
}

/// Reads a configuration file.
fn read(file: &Path) -> Result<Config, ZenohError> {
    let refuse = |problem| ZenohError::Config { file: file.to_owned(), problem };
    fs::read_to_string(file).map_err(|error| refuse(error.to_string()))?;
    Config::from_file(file).map_err(|error| refuse(problem(&error.to_string())))
}

/// Returns what is wrong with a file, and where, without its contents: Zenoh's own messages quote a line or
/// all of it, passwords included.
fn problem(text: &str) -> String {
    let what = if text.starts_with("Unsupported file type") || text.starts_with("Empty") {
        cause(&text.into()).to_string()
    } else if text.starts_with("Invalid configuration") {
        "a value is not within its limits".to_owned()
    } else if let Some(unknown) = text.find("unknown field") {
        until_quote(&text[unknown..]).to_owned()
    } else if let Some((_, expected)) = text.rsplit_once(", expected ") {
        format!("expected {}, found something else", until_quote(expected))
    } else {
        "expected JSON5, or YAML in a .yaml file, found something else".to_owned()
    };
    match line_number(text) {
        Some(line) => format!("line {line}: {what}"),
        None => what,
    }
}

/// Returns the text before a quotation mark or line break, where messages begin to quote the file.
fn until_quote(text: &str) -> &str {
    text.split(['"', '\n']).next().unwrap_or_default().trim_end_matches("\\n")
}

/// Returns the line number that a message names.
fn line_number(text: &str) -> Option<u32> {
    ["line: ", "--> ", "at line "].iter().find_map(|before| {
        let (_, after) = text.split_once(before)?;
        after.split(|char: char| !char.is_ascii_digit()).next()?.parse().ok()
    })
}

#[cfg(test)]
mod tests {
    use std::{env, process};

    use super::*;

    fn options(listen: &[&str], connect: &[&str]) -> ZenohSessionOptions {
        let [listen, connect] =
            [listen, connect].map(|locators| locators.iter().map(|locator| locator.to_string()).collect());
        ZenohSessionOptions { listen, connect, ..ZenohSessionOptions::default() }
    }

    /// Writes a file of this text into the temporary directory.
    fn file(name: &str, text: &str) -> PathBuf {
        let path = env::temp_dir().join(format!("chiral-{}-{name}", process::id()));
        fs::write(&path, text).unwrap();
        path
    }

    fn json(configured: &Configured, key: &str) -> String {
        configured.config.get_json(key).unwrap()
    }

    #[test]
    fn every_setting_exists_in_zenoh() {
        for (listen, mode) in [(&[][..], "\"client\""), (&["tcp/127.0.0.1:0"], "\"peer\"")] {
            let options = ZenohSessionOptions { discovery: true, ..options(listen, &["tcp/localhost:7447"]) };
            for purpose in [Purpose::Member, Purpose::Lookup("tcp/localhost:1"), Purpose::Scout] {
                let configured = configure(&options, purpose).unwrap();
                assert_eq!(json(&configured, "transport/link/tx/queue/size/real_time"), "16");
                assert_eq!(json(&configured, "transport/link/tx/queue/batching/time_limit"), "0");
            }
            let configured = configure(&options, Purpose::Member).unwrap();
            assert_eq!(json(&configured, "mode"), mode);
            assert_eq!(json(&configured, MULTICAST), (mode == "\"peer\"").to_string());
            let configured =
                configure(&ZenohSessionOptions { discovery: false, ..options }, Purpose::Member).unwrap();
            assert_eq!(json(&configured, MULTICAST), "false");
        }
    }

    #[test]
    fn nothing_but_its_address_leads_to_a_server_of_legacy_clients() {
        let way_in = |name: &str, text: &str, listen: &[&str], connect: &[&str]| {
            let path = file(name, text);
            let config = Some(path.clone());
            let options =
                ZenohSessionOptions { discovery: true, legacy: true, config, ..options(listen, connect) };
            let configured = configure(&options, Purpose::Member).unwrap();
            fs::remove_file(path).unwrap();
            configured.other_way_in
        };
        let listen = &["tcp/127.0.0.1:0"];
        assert_eq!(way_in("plain.json5", "{}", listen, &[]), None);
        let found = [
            way_in("connects.json5", "{}", listen, &["tcp/router:7447"]),
            way_in("client.json5", "{ mode: \"client\" }", &[], &["tcp/router:7447"]),
            way_in("router.json5", "{ mode: \"router\" }", listen, &[]),
            way_in("multicast.json5", "{ scouting: { multicast: { enabled: true } } }", listen, &[]),
        ];
        assert_eq!(
            found.map(Option::unwrap),
            [
                "it connects to tcp/router:7447",
                "its Zenoh mode is \"client\"",
                "its Zenoh mode is \"router\"",
                "it uses multicast (scouting/multicast/enabled)",
            ]
        );
    }

    #[test]
    fn invalid_locators_are_refused() {
        for bad in [options(&["nonsense"], &[]), options(&[], &["nonsense"])] {
            assert!(matches!(configure(&bad, Purpose::Member), Err(ZenohError::Locator { .. })));
        }
        assert!(matches!(configure(&options(&[], &[]), Purpose::Member), Err(ZenohError::NoLocator)));
    }

    #[test]
    fn settings_of_the_file_take_precedence_and_locators_are_added() {
        let text = r#"{
            connect: { endpoints: {
                client: ["tcp/router:7447", { strategy: "allOf", locators: ["tcp/a:1", "tcp/b:1"] }],
                peer: ["tcp/peer:7447"],
            } },
            scouting: { multicast: { enabled: true } },
            transport: { link: { tx: {
                lease: 5000,
                queue: { congestion_control: { block: { wait_before_close: -1 } } },
            } } },
        }"#;
        let path = file("settings.json5", text);
        let config = Some(path.clone());
        let client = ZenohSessionOptions { config: config.clone(), ..options(&[], &["tcp/mine:1"]) };
        let configured = configure(&client, Purpose::Member).unwrap();
        assert_eq!(configured.connect, ["tcp/router:7447", "tcp/a:1", "tcp/b:1", "tcp/mine:1"]);
        assert_eq!(json(&configured, "mode"), "\"client\"");
        assert_eq!(json(&configured, MULTICAST), "true");
        assert_eq!(json(&configured, "transport/link/tx/lease"), "5000");
        assert_eq!(json(&configured, WAIT_BEFORE_CLOSE), "10000000");
        assert_eq!(json(&configured, "transport/link/tx/queue/size/data"), "16");
        let server = ZenohSessionOptions { config: config.clone(), ..options(&["tcp/127.0.0.1:1"], &[]) };
        let configured = configure(&server, Purpose::Member).unwrap();
        assert_eq!(
            (configured.listen, configured.connect),
            (vec!["tcp/127.0.0.1:1".to_owned()], vec!["tcp/peer:7447".to_owned()])
        );
        let configured = configure(&client, Purpose::Lookup("tcp/only:1")).unwrap();
        assert_eq!(configured.connect, ["tcp/only:1"]);
        assert_eq!(json(&configured, MULTICAST), "false");
        fs::remove_file(path).unwrap();
    }

    #[test]
    fn errors_name_a_bad_file_but_not_its_secrets() {
        let secret = "transport: { auth: { usrpwd: { user: \"me\", password: \"secret\" } } }";
        let cases = [
            ("unclosed.json5", format!("{{\n{secret}, oops"), "line 2: "),
            ("same-line.json5", format!("{{ {secret} \"secret\" }}"), "line 1: "),
            (
                "unknown.json5",
                format!("{{ {secret},\n conect: {{}} }}"),
                "unknown field `conect`, expected one of",
            ),
            ("type.json5", format!("{{ {secret},\n listen: {{ timeout_ms: \"secret\" }} }}"), "expected "),
            (
                "number.json5",
                "{ transport: { auth: { usrpwd: { password: 1234567 } } } }".to_owned(),
                "expected a string",
            ),
            ("mode.json5", format!("{{ {secret}, mode: \"secret\" }}"), "expected "),
            ("limits.json5", format!("{{ {secret}, id: \"\" }}"), "expected "),
            (
                "limits.json",
                r#"{ "transport": {
                    "link": { "tx": { "queue": { "size": { "data": 17 } } } },
                    "auth": { "usrpwd": { "user": "a", "password": "secret" } }
                } }"#
                    .to_owned(),
                "a value is not within its limits",
            ),
            ("bad.yaml", "transport:\n  auth:\n    usrpwd: secret\n".to_owned(), "expected "),
            ("empty.json5", String::new(), "Empty"),
            ("type.ini", "secret".to_owned(), "Unsupported file type '.ini'"),
        ];
        for (name, text, expected) in cases {
            let path = file(name, &text);
            let options = ZenohSessionOptions { config: Some(path.clone()), ..options(&[], &["tcp/a:1"]) };
            let error = configure(&options, Purpose::Member).err().expect(name).to_string();
            fs::remove_file(&path).unwrap();
            assert!(
                error.contains(&path.display().to_string()) && error.contains(expected),
                "{name}: {error}"
            );
            assert!(
                !error.contains("secret") && !error.contains("1234567") && !error.contains(".rs"),
                "{name}: {error}"
            );
            println!("{error}");
        }
        let options =
            ZenohSessionOptions { config: Some("/nowhere.json5".into()), ..options(&[], &["tcp/a:1"]) };
        let error = configure(&options, Purpose::Member).err().unwrap().to_string();
        assert!(error.contains("/nowhere.json5") && error.contains("No such file"), "{error}");
        let path = file("client.json5", "{ mode: \"client\" }");
        let options = ZenohSessionOptions {
            config: Some(path.clone()),
            listen: vec!["tcp/127.0.0.1:0".to_owned()],
            ..options
        };
        let error = configure(&options, Purpose::Member).err().unwrap().to_string();
        assert!(error.contains("expected mode \"peer\""), "{error}");
        fs::remove_file(path).unwrap();
    }
}
