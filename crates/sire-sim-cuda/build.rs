//! Turns `stubs/*.txt` (names that the device does not simulate) into calls of the `stub!` macro.
//!
//! A list has lines `# comment`, `library NAME` (for messages), `status NUMBER` (what the functions
//! return unless their line gives another number) and `function [NUMBER]`.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{env, fs, process};

fn main() {
    println!("cargo:rerun-if-changed=stubs");
    println!("cargo:rerun-if-changed=build.rs");
    if let Err(message) = generate() {
        eprintln!("{message}");
        process::exit(1);
    }
}

fn generate() -> Result<(), String> {
    let mut lists: Vec<PathBuf> = fs::read_dir("stubs")
        .map_err(|error| format!("stubs: {error}"))?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "txt"))
        .collect();
    lists.sort();
    let mut code = String::new();
    for list in &lists {
        append(&mut code, list)?;
    }
    let out = PathBuf::from(env::var("OUT_DIR").map_err(|error| format!("OUT_DIR: {error}"))?);
    fs::write(out.join("stubs.rs"), code).map_err(|error| format!("stubs.rs: {error}"))
}

fn append(code: &mut String, list: &Path) -> Result<(), String> {
    let text = fs::read_to_string(list).map_err(|error| format!("{}: {error}", list.display()))?;
    let (mut library, mut status) = (String::new(), String::new());
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        match line.split_once(' ') {
            Some(("library", name)) => library = name.to_string(),
            Some(("status", number)) => status = number.to_string(),
            Some((name, number)) => write_stub(code, name, &library, number)?,
            None => write_stub(code, line, &library, &status)?,
        }
    }
    Ok(())
}

fn write_stub(code: &mut String, name: &str, library: &str, status: &str) -> Result<(), String> {
    let number: i64 = status.trim().parse().map_err(|_| format!("{name}: {status} is not a number"))?;
    writeln!(code, "stub!({name}, \"{library}\", {number});").map_err(|error| error.to_string())
}
