//! Which CUDA the process's programs were built for. One file stands in for the runtimes of CUDA 12 and 13, and some
//! functions have one name in both and other arguments: which are meant, the names beside the file tell.

use crate::properties;
use std::ffi::{CStr, OsStr, c_int, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::OnceLock;

/// A release of CUDA's runtime.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Release {
    /// CUDA 12.8.
    Twelve,
    /// CUDA 13.2.
    Thirteen,
}

/// The runtime that this process was given: CUDA 12's where only `libcudart.so.12` lies beside this library's file, else CUDA 13's.
pub fn of_process() -> Release {
    static RELEASE: OnceLock<Release> = OnceLock::new();
    *RELEASE.get_or_init(|| {
        own_file()
            .and_then(|file| Path::new(OsStr::from_bytes(file.to_bytes())).parent())
            .map_or(Release::Thirteen, of_directory)
    })
}

/// Whether this process has CUDA 12's runtime.
pub fn is_12() -> bool {
    of_process() == Release::Twelve
}

fn of_directory(directory: &Path) -> Release {
    let is_there = |name: &str| directory.join(name).exists();
    if is_there("libcudart.so.12") && !is_there("libcudart.so.13") { Release::Twelve } else { Release::Thirteen }
}

impl Release {
    /// As `cudaRuntimeGetVersion` says it. The driver is of CUDA 13 in any case: drivers serve older runtimes.
    pub fn version(self) -> c_int {
        match self {
            Release::Twelve => 12080,
            Release::Thirteen => properties::CUDA_VERSION,
        }
    }
}

/// The name under which the loader found this library.
pub fn own_file() -> Option<&'static CStr> {
    // SAFETY: `Dl_info` consists of pointers, for which null is a value.
    let mut info: libc::Dl_info = unsafe { std::mem::zeroed() };
    // SAFETY: any address may be asked about; `info` is valid for writing.
    let known = unsafe { libc::dladdr(own_file as *const c_void, &raw mut info) } != 0;
    // SAFETY: dladdr's name is NUL-terminated, and stays as long as this library, which is never unloaded while its code runs.
    (known && !info.dli_fname.is_null()).then(|| unsafe { CStr::from_ptr(info.dli_fname) })
}
