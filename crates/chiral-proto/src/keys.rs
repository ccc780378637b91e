//! The names that peers meet by on a Zenoh network, and what a robot may be called there. Only names are
//! here; what is said under them is `chiral-transport`'s.
//!
//! ```text
//! chiral/v1/<robot>/alive/<server>        liveliness token of the robot's server, which is `<Zenoh id>@<host>`
//! chiral/v1/<robot>/open                  queryable: a connection is asked for, and its name is the answer
//! chiral/v1/<robot>/info                  queryable: a welcome without a session, which says what the robot is and who controls it
//! chiral/v1/<robot>/c/<connection>/c2s    frames of the client
//! chiral/v1/<robot>/c/<connection>/s2c    frames of the server
//! chiral/v1/<robot>/c/<connection>/client, .../server    liveliness tokens of the connection's two ends
//!
//! chiral/c2s, chiral/s2c                  frames of legacy peers, whoever they are
//! ```

/// All keys of our own wire begin with it.
const ROOT: &str = "chiral/v1";
/// Characters that a robot's name may have.
const MAX_NAME: usize = 64;

/// A name that no robot can have on a Zenoh network, where it is one chunk of a key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected a robot's name of 1 to {MAX_NAME} letters, digits, '-', '_' and '.', found {found:?}")]
pub struct InvalidName {
    /// The name.
    pub found: String,
}

/// Whether a robot can have this name on a Zenoh network: letters and digits of any script, `-`, `_` and `.`,
/// at most 64.
///
/// # Errors
/// [`InvalidName`] says what is allowed.
pub fn check_robot(name: &str) -> Result<(), InvalidName> {
    if (1..=MAX_NAME).contains(&name.chars().count()) && name.chars().all(is_allowed) {
        return Ok(());
    }
    Err(InvalidName { found: name.to_owned() })
}

/// A good name for the robot of a host that is called so: what cannot be in it is replaced, and `robot` is
/// taken where nothing is left.
pub fn robot_of_host(host: &str) -> String {
    let replaced = host.trim().chars().map(|char| if is_allowed(char) { char } else { '-' });
    let name: String = replaced.take(MAX_NAME).collect();
    let name = name.trim_matches('-');
    if name.is_empty() { "robot".to_owned() } else { name.to_owned() }
}

fn is_allowed(char: char) -> bool {
    char.is_alphanumeric() || matches!(char, '-' | '_' | '.')
}

/// The token of a robot's server; `*` for either means all.
pub fn alive(robot: &str, server: &str) -> String {
    format!("{ROOT}/{robot}/alive/{server}")
}

/// The robot and the server that a token of [`alive`] is about.
pub fn robot_and_server(alive: &str) -> Option<(&str, &str)> {
    let (robot, rest) = alive.strip_prefix(ROOT)?.strip_prefix('/')?.split_once('/')?;
    let server = rest.strip_prefix("alive/")?;
    (check_robot(robot).is_ok() && !server.is_empty() && !server.contains('/')).then_some((robot, server))
}

/// Where a connection to a robot is asked for.
pub fn open(robot: &str) -> String {
    format!("{ROOT}/{robot}/open")
}

/// Where a robot is asked what it is.
pub fn info(robot: &str) -> String {
    format!("{ROOT}/{robot}/info")
}

/// Which end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The policy's.
    Client,
    /// The robot's.
    Server,
}

impl End {
    /// The other one.
    pub fn other(self) -> End {
        match self {
            End::Client => End::Server,
            End::Server => End::Client,
        }
    }
}

/// What this end of a connection says.
pub fn frames(robot: &str, connection: &str, from: End) -> String {
    let direction = match from {
        End::Client => "c2s",
        End::Server => "s2c",
    };
    format!("{ROOT}/{robot}/c/{connection}/{direction}")
}

/// The token of this end of a connection.
pub fn end(robot: &str, connection: &str, end: End) -> String {
    let name = match end {
        End::Client => "client",
        End::Server => "server",
    };
    format!("{ROOT}/{robot}/c/{connection}/{name}")
}

/// What this end says where legacy peers are spoken to: all of a network share it, whatever the robot.
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
    fn a_robots_name_is_one_chunk_of_a_key() {
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
                error.starts_with("expected a robot's name of 1 to 64 letters, digits")
                    && error.contains(&format!("{bad:?}")),
                "{error}"
            );
        }
    }

    #[test]
    fn a_host_gives_its_robot_a_good_name() {
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
    fn keys_of_others_tell_of_no_robot() {
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
    fn the_two_ends_never_share_a_key() {
        let keys = [End::Client, End::Server]
            .map(|side| [frames("a", "1", side), end("a", "1", side), legacy(side).to_owned()]);
        let distinct: std::collections::BTreeSet<_> = keys.as_flattened().iter().collect();
        assert_eq!(distinct.len(), 6);
        assert_eq!(End::Client.other().other(), End::Client);
    }
}
