//! Where things are in an environment.

use std::fs;
use std::path::{Path, PathBuf};

use crate::failure::{Failure, While as _};
use crate::library;

/// The file name of the software device's library, in the environment as in target/.
pub const STAND_IN: &str = "libsire_sim_cuda.so";

/// What differs between the releases of CUDA that PyTorch's wheels are built for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cuda {
    /// The runtime's name, which is among `sonames` and decides how the library behaves.
    runtime: &'static str,
    /// Below site-packages: a directory of the search path (RPATH, relative to torch/lib) in PyTorch's libraries.
    directory: &'static str,
    /// The names under which the library is looked up, one in a line.
    sonames: &'static str,
}

/// Newest first.
const CUDAS: [Cuda; 2] = [
    Cuda {
        runtime: "libcudart.so.13",
        directory: "nvidia/cu13/lib",
        sonames: include_str!("../../../sire-sim-cuda/sonames-cuda13.txt"),
    },
    Cuda {
        runtime: "libcudart.so.12",
        directory: "nvidia/cuda_runtime/lib",
        sonames: include_str!("../../../sire-sim-cuda/sonames-cuda12.txt"),
    },
];

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

    /// The CUDA that the installed PyTorch was built for, by the runtime that its libraries name.
    pub fn cuda(&self) -> Result<Cuda, Failure> {
        let library = self.site_packages()?.join("torch/lib/libtorch_global_deps.so");
        let content = fs::read(&library).while_(|| format!("read {}", library.display()))?;
        let mut words = content.split(|byte| *byte == 0).filter_map(|word| str::from_utf8(word).ok());
        let found = words.find_map(|word| CUDAS.into_iter().find(|cuda| cuda.runtime == word));
        found.ok_or_else(|| {
            Failure::new(format!("{} links neither CUDA 13 nor CUDA 12", library.display())).advice(
                "Name a version of PyTorch whose wheel has CUDA 12.8 or newer: --torch 2.9.1, or 2.11 and newer.",
            )
        })
    }

    /// The directory in which PyTorch finds the device's library.
    pub fn libraries(&self) -> Result<PathBuf, Failure> {
        Ok(self.site_packages()?.join(self.cuda()?.directory))
    }

    /// Directories in which another PyTorch, installed here before, found the device's library.
    pub fn stale_libraries(&self) -> Result<Vec<PathBuf>, Failure> {
        let (site, cuda) = (self.site_packages()?, self.cuda()?);
        let others = CUDAS.into_iter().filter(|other| *other != cuda).map(|other| site.join(other.directory));
        Ok(others.filter(|directory| directory.join(STAND_IN).is_file()).collect())
    }
}

impl Cuda {
    /// The sonames, without comments and blank lines.
    pub fn sonames(self) -> impl Iterator<Item = &'static str> {
        self.sonames.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// An environment whose PyTorch links `runtime`.
    fn environment(name: &str, runtime: &str) -> Layout {
        let dir = std::env::temp_dir().join(format!("sire-layout-{}-{name}", std::process::id()));
        let lib = dir.join("lib/python3.11/site-packages/torch/lib");
        fs::create_dir_all(&lib).unwrap();
        fs::write(lib.join("libtorch_global_deps.so"), format!("ELF\0{runtime}\0libc.so.6\0")).unwrap();
        Layout { dir }
    }

    #[test]
    fn the_library_lies_where_the_wheel_looks() {
        for (runtime, directory) in
            [("libcudart.so.13", "nvidia/cu13/lib"), ("libcudart.so.12", "nvidia/cuda_runtime/lib")]
        {
            let layout = environment(runtime, runtime);
            assert!(layout.libraries().unwrap().ends_with(directory));
            assert!(layout.cuda().unwrap().sonames().any(|name| name == runtime));
            fs::remove_dir_all(&layout.dir).unwrap();
        }
    }

    #[test]
    fn another_cuda_is_refused() {
        let layout = environment("older", "libcudart.so.11.0");
        let message = layout.cuda().unwrap_err().to_string();
        assert!(message.contains("links neither CUDA 13 nor CUDA 12"), "{message}");
        fs::remove_dir_all(&layout.dir).unwrap();
    }

    #[test]
    fn what_an_earlier_pytorch_left_is_stale() {
        let layout = environment("stale", "libcudart.so.12");
        assert!(layout.stale_libraries().unwrap().is_empty());
        let old = layout.site_packages().unwrap().join("nvidia/cu13/lib");
        fs::create_dir_all(&old).unwrap();
        fs::write(old.join(STAND_IN), "").unwrap();
        assert_eq!(layout.stale_libraries().unwrap(), [old]);
        fs::remove_dir_all(&layout.dir).unwrap();
    }
}
