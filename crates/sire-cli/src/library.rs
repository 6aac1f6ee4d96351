//! Where Sire's shared libraries are: named by a variable, beside the command, or in the package that brought it.

use std::ffi::OsStr;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use crate::failure::Failure;

const SIRE: &str = "libsire_alloc.so";
const DRIVER: &str = "libsire_driver.so";
const STAND_IN: &str = "libsire_sim_cuda.so";

/// `libsire_alloc.so`: SIRE_LIBRARY, else the places beside this command.
pub fn sire() -> Result<PathBuf, Failure> {
    locate(SIRE, None, "SIRE_LIBRARY", "cargo build --release")
}

/// `libsire_driver.so`, for driver-level hooks: the one beside `libsire_alloc.so`, as both are of one build.
pub fn driver() -> Result<PathBuf, Failure> {
    let path = sire()?.with_file_name(DRIVER);
    if is_library(&path) {
        return Ok(path);
    }
    Err(Failure::new(format!("driver-level hooks need {DRIVER}, which is not at {}", path.display()))
        .advice("Build it with 'cargo build --release -p sire-driver-hooks' in a checkout, or reinstall the sire-alloc package."))
}

/// The software device's library: `named` on the command line, SIRE_SIM_LIBRARY, else the places beside this command.
pub fn stand_in(named: Option<&Path>) -> Result<PathBuf, Failure> {
    locate(STAND_IN, named, "SIRE_SIM_LIBRARY", "cargo build --release -p sire-sim-cuda")
}

fn locate(file: &str, named: Option<&Path>, variable: &str, build: &str) -> Result<PathBuf, Failure> {
    if let Some(path) = named {
        return existing(path, "the command line");
    }
    if let Some(path) = std::env::var_os(variable).filter(|value| !value.is_empty()) {
        return existing(Path::new(&path), variable);
    }
    let places = places(file);
    let found = places.iter().find(|place| is_library(place));
    found.map(|place| place.canonicalize().unwrap_or_else(|_| place.clone())).ok_or_else(|| {
        let looked = places.iter().map(|place| place.display().to_string()).collect::<Vec<_>>().join("\n        ");
        Failure::new(format!("{file} was not found. Looked for:\n        {looked}")).advice(format!(
            "Name it in {variable}, build it with '{build}' in a checkout, or reinstall the sire-alloc package."
        ))
    })
}

/// A path that a person gave: never replaced by a guess.
fn existing(path: &Path, source: &str) -> Result<PathBuf, Failure> {
    if is_library(path) {
        return Ok(path.canonicalize().unwrap_or_else(|_| path.to_path_buf()));
    }
    let why = match path.metadata() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => "not there",
        Ok(data) if data.is_dir() => "a directory, not a library",
        _ => "not a shared library that can be read",
    };
    Err(Failure::new(format!("{} (from {source}) is {why}", path.display()))
        .advice(format!("Give the path of an existing library in {source}, or leave it out to let sire look for one.")))
}

fn is_library(path: &Path) -> bool {
    let mut magic = [0; 4];
    std::fs::File::open(path).and_then(|mut file| file.read_exact(&mut magic)).is_ok() && magic == *b"\x7fELF"
}

/// Where the library may be, for a command in target/, in bin/ beside lib/, or in a virtual environment's bin/.
fn places(file: &str) -> Vec<PathBuf> {
    let Some(bin) = std::env::current_exe().ok().and_then(|exe| exe.parent().map(Path::to_path_buf)) else {
        return Vec::new();
    };
    let mut places = vec![bin.join(file)];
    if let Some(up) = bin.parent() {
        places.push(up.join("lib").join(file));
        places.push(up.join("lib/sire").join(file));
        places.extend(site_packages(up).into_iter().map(|site| site.join("sire/_native").join(file)));
        if up.file_name() == Some(OsStr::new("target")) {
            places.push(up.join("release").join(file));
        }
    }
    places
}

/// `lib/python3.*/site-packages` of an environment.
pub fn site_packages(prefix: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in prefix.join("lib").read_dir().into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with("python3") && entry.path().join("site-packages").is_dir() {
            found.push(entry.path().join("site-packages"));
        }
    }
    found.sort();
    found
}
