//! Embeds the Python part of the software device (crates/sire-sim-cuda/python) into the command, so that an installed
//! `sire` needs no checkout to build an environment: a table of (relative path, bytes).

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{env, fs, io};

fn main() -> io::Result<()> {
    let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default());
    let layer = manifest.join("../sire-sim-cuda/python");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed={}", layer.display());

    let mut files = Vec::new();
    if layer.is_dir() {
        collect(&layer, &layer, &mut files)?;
    }
    files.sort();
    let mut table = String::from("&[\n");
    for (relative, absolute) in &files {
        let _ = writeln!(table, "    ({relative:?}, include_bytes!({absolute:?}) as &[u8]),");
    }
    table.push(']');
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default());
    fs::write(out.join("op_layer.rs"), table)
}

/// Every file below `directory` that belongs to the package: no byte code, no caches, no hidden files.
fn collect(root: &Path, directory: &Path, files: &mut Vec<(String, String)>) -> io::Result<()> {
    println!("cargo::rerun-if-changed={}", directory.display());
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with('.') || name == "__pycache__" || name.ends_with(".pyc") || name.ends_with(".egg-info") {
            continue;
        }
        if path.is_dir() {
            collect(root, &path, files)?;
        } else if let (Ok(relative), Ok(absolute)) = (path.strip_prefix(root), path.canonicalize()) {
            files.push((relative.to_string_lossy().into_owned(), absolute.to_string_lossy().into_owned()));
        }
    }
    Ok(())
}
