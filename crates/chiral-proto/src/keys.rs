//! The Zenoh keys of the protocol, and the rules for robot names, which are part of keys. Only names are
//! here: what is sent under them is in `chiral-transport`.
//!
//! ```text
//! chiral/v1/<robot>/alive/<server>        liveliness token of the robot's server, `<Zenoh id>@<host>`
//! chiral/v1/<robot>/open                  queryable: opens a connection; the reply is its name
//! chiral/v1/<robot>/info                  queryable: a welcome without a session, which describes the robot
//!                                         and names its controller
//! chiral/v1/<robot>/c/<connection>/c2s    frames that the client sends
//! chiral/v1/<robot>/c/<connection>/s2c    frames that the server sends
//! chiral/v1/<robot>/c/<connection>/client, .../server    liveliness tokens of the connection's two ends
//!
//! chiral/c2s, chiral/s2c                  frames of all legacy peers
//! ```

/// The prefix of all keys except those of legacy peers.
const ROOT: &str = "chiral/v1";
/// The greatest length of a robot's name, in characters.
const MAX_NAME: usize = 64;

/// The error for a name that a robot cannot have on a Zenoh network, where it is one chunk of a key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected a robot name of 1 to {MAX_NAME} letters, digits, '-', '_' and '.', found {found:?}")]
pub struct InvalidName {
    /// The invalid name.
    pub found: String,
}

/// Checks that a robot can have this name on a Zenoh network: 1 to 64 letters and digits of any script, `-`,
/// `_` and `.`.
///
/// # Errors
/// [`InvalidName`], whose text lists what is allowed.
pub fn check_robot(name: &str) -> Result<(), InvalidName> {
    if (1..=MAX_NAME).contains(&name.chars().count()) && name.chars().all(is_allowed) {
        return Ok(());
    }
    Err(InvalidName { found: name.to_owned() })
}

/// Returns the default name of a robot on the host with this name: characters that are not allowed are
/// replaced by `-`. The name is `robot` if nothing else is left.
pub fn robot_of_host(host: &str) -> String {
    let replaced = host.trim().chars().map(|char| if is_allowed(char) { char } else { '-' });
    let name: String = replaced.take(MAX_NAME).collect();
    let name = name.trim_matches('-');
    if name.is_empty() { "robot".to_owned() } else { name.to_owned() }
}

fn is_allowed(char: char) -> bool {
    char.is_alphanumeric() || matches!(char, '-' | '_' | '.')
}

/// The liveliness token of a robot's server; `*` for either matches all.
pub fn alive(robot: &str, server: &str) -> String {
    format!("{ROOT}/{robot}/alive/{server}")
}

/// Returns the robot and the server of a key made by [`alive`].
pub fn robot_and_server(alive: &str) -> Option<(&str, &str)> {
    let (robot, rest) = alive.strip_prefix(ROOT)?.strip_prefix('/')?.split_once('/')?;
    let server = rest.strip_prefix("alive/")?;
    (check_robot(robot).is_ok() && !server.is_empty() && !server.contains('/')).then_some((robot, server))
}

/// The queryable that opens a connection to a robot.
pub fn open(robot: &str) -> String {
    format!("{ROOT}/{robot}/open")
}

/// The queryable that describes a robot.
pub fn info(robot: &str) -> String {
    format!("{ROOT}/{robot}/info")
}

/// An end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The policy's end.
    Client,
    /// The robot's end.
    Server,
}

impl End {
    /// The opposite end.
    pub fn other(self) -> End {
        match self {
            End::Client => End::Server,
            End::Server => End::Client,
        }
    }
}

/// The key of the frames that this end of a connection sends.
pub fn frames(robot: &str, connection: &str, from: End) -> String {
    let direction = match from {
        End::Client => "c2s",
        End::Server => "s2c",
    };
    format!("{ROOT}/{robot}/c/{connection}/{direction}")
}

/// The liveliness token of this end of a connection.
pub fn end(robot: &str, connection: &str, end: End) -> String {
    let name = match end {
        End::Client => "client",
        End::Server => "server",
    };
    format!("{ROOT}/{robot}/c/{connection}/{name}")
}

/// The key of the frames that this end sends on the legacy wire. All peers on a network share it; it names no
/// robot.
pub fn legacy(from: End) -> &'static str {
    match from {
        End::Client => "chiral/c2s",
        End::Server => "chiral/s2c",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_robot_name_is_one_chunk_of_a_key() {
        let longest = "a".repeat(64);
        for good in ["panda", "left_arm-2.1", "Bär", "腕", &longest] {
            assert_eq!(check_robot(good), Ok(()));
            assert_eq!(robot_and_server(&alive(good, "1f")), Some((good, "1f")));
        }
        let too_long = "a".repeat(65);
        for bad in
            ["", "left arm", "a/b", "*", "**", "a*", "$*", "a#", "a?b", "@a", "a\n", "a\u{0}", &too_long]
        {
            let error = check_robot(bad).unwrap_err().to_string();
            assert!(
                error.starts_with("expected a robot name of 1 to 64 letters, digits")
                    && error.contains(&format!("{bad:?}")),
                "{error}"
            );
        }
    }

    #[test]
    fn a_robot_is_named_after_its_host() {
        let long = "h".repeat(300);
        for (host, expected) in [
            ("lab-pc", "lab-pc"),
            ("left.robots.example", "left.robots.example"),
            (" what a/host ", "what-a-host"),
            ("(none)", "none"),
            ("***", "robot"),
            ("", "robot"),
            (&long, &long[..64]),
        ] {
            assert_eq!(robot_of_host(host), expected);
            assert_eq!(check_robot(expected), Ok(()));
        }
    }

    #[test]
    fn other_keys_are_not_liveliness_tokens_of_robots() {
        for key in [
            "",
            "chiral/v1",
            "chiral/v1/a",
            "chiral/v1/a/open",
            "chiral/v1/a/alive/",
            "chiral/v1/a/alive/b/c",
            "chiral/v2/a/alive/b",
        ] {
            assert_eq!(robot_and_server(key), None, "{key}");
        }
    }

    #[test]
    fn the_two_ends_have_different_keys() {
        let keys = [End::Client, End::Server]
            .map(|side| [frames("a", "1", side), end("a", "1", side), legacy(side).to_owned()]);
        let distinct: std::collections::BTreeSet<_> = keys.as_flattened().iter().collect();
        assert_eq!(distinct.len(), 6);
        assert_eq!(End::Client.other().other(), End::Client);
    }
}
