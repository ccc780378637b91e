//! The one door.
mod codegen;
fn main() -> anyhow::Result<()> {
    for (path, bytes) in codegen::generate(std::path::Path::new("."))? {
        std::fs::write(path, bytes)?;
    }
    Ok(())
}
