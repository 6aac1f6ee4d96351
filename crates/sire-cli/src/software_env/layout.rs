//! Where things are in an environment.

use std::path::{Path, PathBuf};

use crate::failure::{Failure, While as _};
use crate::library;

/// The file name of the software device's library, in the environment as in target/.
pub const STAND_IN: &str = "libsire_sim_cuda.so";

/// The names under which the library is looked up, one in a line.
pub const SONAMES: &str = include_str!("../../../sire-sim-cuda/sonames.txt");

/// The Python part of the software device, as (path below site-packages, content).
pub const OP_LAYER: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/op_layer.rs"));

/// An environment's directory, absolute.
#[derive(Debug)]
pub struct Layout {
    pub dir: PathBuf,
}

impl Layout {
    /// A directory that must exist.
    pub fn existing(dir: &Path) -> Result<Self, Failure> {
        if !dir.is_dir() {
            let why = if dir.exists() { "is not a directory" } else { "does not exist" };
            return Err(Failure::new(format!("{} {why}", dir.display())));
        }
        Ok(Self { dir: dir.canonicalize().while_(|| format!("resolve {}", dir.display()))? })
    }

    /// The directory of `python` and of every installed command.
    pub fn bin(&self) -> PathBuf {
        self.dir.join("bin")
    }

    /// The environment's Python.
    pub fn python(&self) -> PathBuf {
        self.bin().join("python")
    }

    /// Where packages are installed.
    pub fn site_packages(&self) -> Result<PathBuf, Failure> {
        library::site_packages(&self.dir).into_iter().next().ok_or_else(|| {
            Failure::new(format!("{} has no lib/python3*/site-packages", self.dir.display()))
                .advice("Remove the directory and build it again.")
        })
    }

    /// The directory in which PyTorch's own search path (RPATH, relative to torch/lib) finds the device's library.
    pub fn libraries(&self) -> Result<PathBuf, Failure> {
        Ok(self.site_packages()?.join("nvidia/cu13/lib"))
    }
}

/// The sonames, without comments and blank lines.
pub fn sonames() -> impl Iterator<Item = &'static str> {
    SONAMES.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'))
}
