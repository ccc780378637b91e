//! What may be in the dependency tree, and how much of it. `deny.toml` says the same, and more, for who has
//! cargo-deny.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};

use crate::command::{self, cargo};

/// Never in the tree: TLS is rustls on ring, which needs no C toolchain beyond what ring brings, and no
/// system library.
const BANNED: &[&str] =
    &["aws-lc-fips-sys", "aws-lc-rs", "aws-lc-sys", "native-tls", "openssl", "openssl-sys"];

/// In the tree exactly once: a second copy would be built as well, and its types would not fit ours.
const SINGLE: &[&str] =
    &["axum", "bytes", "nalgebra", "ndarray", "prost", "rustls", "tokio", "tokio-tungstenite", "tungstenite"];

/// What a robot host that embeds the server takes in, at most, our own crates among it.
const BUDGET: usize = 130;

/// Reads Cargo.lock, which holds the tree of every platform and feature of ours.
pub(crate) fn check_banned() -> Result<()> {
    let path = command::root().join("Cargo.lock");
    let lock = std::fs::read_to_string(&path).context("reading Cargo.lock")?;
    let copies = copies(&lock);
    for name in BANNED {
        if copies.contains_key(name) {
            bail!(
                "the banned crate {name} is in the tree: `cargo tree --target all --invert {name}` tells who wants it"
            );
        }
    }
    for name in SINGLE {
        let versions = copies.get(name).map_or(&[][..], Vec::as_slice);
        if versions.len() != 1 {
            bail!("{name} must be in the tree exactly once, found: [{}]", versions.join(", "));
        }
    }
    let total: usize = copies.values().map(Vec::len).sum();
    println!("{total} crates in Cargo.lock, none of them banned, and one of each that must be single");
    Ok(())
}

/// Counts what the server alone brings into a robot host.
pub(crate) fn check_budget() -> Result<()> {
    let tree = ["tree", "-p", "chiral-server", "--no-default-features", "--features", "websocket"];
    let form = ["-e", "normal", "--prefix", "none", "--no-dedupe"];
    let text = command::output(cargo(tree).args(form))?;
    // Lines are told apart as they are, so that `(*)` and `(proc-macro)` count as `sort -u` counts them.
    let lines: std::collections::BTreeSet<&str> = text.lines().collect();
    println!("{} crates under chiral-server with websocket, at most {BUDGET}", lines.len());
    if lines.len() > BUDGET {
        bail!("{} crates under chiral-server, more than the {BUDGET} it may have", lines.len());
    }
    Ok(())
}

/// Every package's versions.
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
