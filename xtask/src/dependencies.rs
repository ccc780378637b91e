//! Which crates the dependency tree may contain, and how many. `deny.toml` has the same rules, and more, for
//! cargo-deny.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};

use crate::command::{self, cargo};

/// Never in the tree: TLS is rustls on ring, which needs a C compiler but neither cmake nor a system library.
const BANNED: &[&str] =
    &["aws-lc-fips-sys", "aws-lc-rs", "aws-lc-sys", "native-tls", "openssl", "openssl-sys"];

/// In the tree exactly once: a second copy would cost build time, and its types would not match ours.
const SINGLE: &[&str] =
    &["axum", "bytes", "nalgebra", "ndarray", "prost", "rustls", "tokio", "tokio-tungstenite", "tungstenite"];

/// The most crates that a robot host takes in with the server, including our own.
const BUDGET: usize = 130;

/// Checks Cargo.lock, which has the tree for every platform and feature.
pub(crate) fn check_banned() -> Result<()> {
    let path = command::root().join("Cargo.lock");
    let lock = std::fs::read_to_string(&path).context("reading Cargo.lock")?;
    let copies = copies(&lock);
    for name in BANNED {
        if copies.contains_key(name) {
            bail!("the banned crate {name} is in the tree, see `cargo tree --target all --invert {name}`");
        }
    }
    for name in SINGLE {
        let versions = copies.get(name).map_or(&[][..], Vec::as_slice);
        if versions.len() != 1 {
            bail!("{name} must be in the tree exactly once, found: [{}]", versions.join(", "));
        }
    }
    let total: usize = copies.values().map(Vec::len).sum();
    println!("{total} crates in Cargo.lock: none banned, no second copy of those that must be single");
    Ok(())
}

/// Counts the crates that the server alone brings into a robot host.
pub(crate) fn check_budget() -> Result<()> {
    let tree = ["tree", "-p", "chiral-server", "--no-default-features", "--features", "websocket"];
    let form = ["-e", "normal", "--prefix", "none", "--no-dedupe"];
    let text = command::output(cargo(tree).args(form))?;
    // Lines are compared whole, so that `(*)` and `(proc-macro)` count as in `sort -u`.
    let lines: std::collections::BTreeSet<&str> = text.lines().collect();
    println!("chiral-server with websocket: {} crates, at most {BUDGET}", lines.len());
    if lines.len() > BUDGET {
        bail!("chiral-server with websocket has {} crates, expected at most {BUDGET}", lines.len());
    }
    Ok(())
}

/// The versions of each package.
fn copies(lock: &str) -> BTreeMap<&str, Vec<&str>> {
    let mut copies = BTreeMap::<&str, Vec<&str>>::new();
    let mut name = None;
    for line in lock.lines() {
        let value = |key| line.strip_prefix(key)?.strip_suffix('"');
        if let Some(found) = value("name = \"") {
            name = Some(found);
        } else if let (Some(version), Some(name)) = (value("version = \""), name.take()) {
            copies.entry(name).or_default().push(version);
        }
    }
    copies
}

#[cfg(test)]
mod tests {
    use super::copies;

    #[test]
    fn a_lock_file_is_read() {
        let lock = "version = 4\n\n[[package]]\nname = \"a\"\nversion = \"1.0.0\"\ndependencies = [\n \"b\",\n]\n\n\
                    [[package]]\nname = \"a\"\nversion = \"2.0.0\"\n\n[[package]]\nname = \"b\"\nversion = \"0.1.0\"\n";
        let copies = copies(lock);
        assert_eq!(copies["a"], ["1.0.0", "2.0.0"]);
        assert_eq!(copies["b"], ["0.1.0"]);
        assert_eq!(copies.len(), 2);
    }
}
