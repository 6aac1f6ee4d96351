//! Two things that are made from the sources: the C header (into OUT_DIR; a test compares it with `include/sire.h`) and the
//! build id, by which the Python package knows whether a library is of its own build.

use std::env;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

/// Sources that decide what the library does.
const SOURCES: [&str; 5] =
    ["cdylib", "crates/sire-core/src", "crates/sire-control/src", "crates/sire-cuda/src", "crates/sire-ledger/src"];

fn main() -> Result<(), Box<dyn Error>> {
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let out = PathBuf::from(env::var("OUT_DIR")?);
    for watched in SOURCES.iter().chain(&["build.rs", "cbindgen.toml", "include/sire.h"]) {
        println!("cargo:rerun-if-changed={}", root.join(watched).display());
    }
    println!("cargo:rerun-if-env-changed=SIRE_UPDATE_HEADER");
    println!("cargo:rustc-env=SIRE_BUILD_ID={:016x}", build_id(&root)?);
    // The fork handler and the thread-exit handler point into the library: it must never be unloaded.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libsire_alloc.so");
    header(&root, &out)
}

/// FNV-1a over every source file's path and content, in the order of the paths.
fn build_id(root: &Path) -> Result<u64, Box<dyn Error>> {
    let mut files = Vec::new();
    for source in SOURCES {
        collect(&root.join(source), &mut files)?;
    }
    files.sort();
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut add = |bytes: &[u8]| {
        for byte in bytes {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    };
    for file in &files {
        add(file.strip_prefix(root)?.to_string_lossy().as_bytes());
        add(&fs::read(file)?);
    }
    Ok(hash)
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> Result<(), Box<dyn Error>> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, files)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    Ok(())
}

/// Only the files that define the interface are read; the hooks come out of a macro and are CUDA's to declare.
fn header(root: &Path, out: &Path) -> Result<(), Box<dyn Error>> {
    const INTERFACE: [&str; 15] = [
        "status.rs",
        "abi/values.rs",
        "abi/region.rs",
        "abi/memory.rs",
        "abi/cache.rs",
        "abi/transition.rs",
        "abi/progress.rs",
        "abi/standing.rs",
        "abi/reserve.rs",
        "abi/reclaimable.rs",
        "abi/slices.rs",
        "abi/control.rs",
        "abi/process.rs",
        "torch.rs",
        "tms.rs",
    ];
    let mut builder = cbindgen::Builder::new().with_config(cbindgen::Config::from_file(root.join("cbindgen.toml"))?);
    for file in INTERFACE {
        builder = builder.with_src(root.join("cdylib").join(file));
    }
    let generated = out.join("sire.h");
    let mut text = Vec::new();
    builder.generate()?.write(&mut text);
    // Rust's heading for what callers must see to, in words that fit a header.
    fs::write(&generated, String::from_utf8(text)?.replace("// # Safety\n", "// What the caller sees to:\n"))?;
    if env::var_os("SIRE_UPDATE_HEADER").is_some_and(|value| value == "1") {
        fs::copy(&generated, root.join("include/sire.h"))?;
    }
    Ok(())
}
