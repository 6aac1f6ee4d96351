//! Finding `libcuda`: the path that the user gives, a copy that the process has loaded already, the
//! dynamic loader's search, and last whatever the caller's own CUDA runtime hands out.

use crate::table::{EntryPoints, Symbol};
use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
use std::ffi::{CStr, c_void};
use std::path::Path;

/// The name that the driver package installs.
const SONAME: &str = "libcuda.so.1";

/// A caller's `cudaGetDriverEntryPoint`: (name without variant, CUDA version) to address or null.
pub type Resolver<'a> = &'a dyn Fn(&CStr, u32) -> *mut c_void;

/// A table of entry points. The library behind it is never closed: a driver has threads of its own.
pub(crate) struct Loaded {
    pub table: EntryPoints,
    /// Where it came from, for people.
    pub origin: String,
}

/// Finds the driver library. The error says what was tried and what to do.
pub(crate) fn load(path: Option<&Path>, resolver: Option<Resolver<'_>>) -> Result<Loaded, String> {
    if let Some(path) = path {
        // SAFETY: opening a library runs its initialisers; the user asked for this file.
        let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) }
            .map_err(|error| format!("SIRE_LIBCUDA names {}, which cannot be loaded ({error})", path.display()))?;
        return from_library(library, path.display().to_string());
    }
    match open_by_soname() {
        Ok((library, origin)) => from_library(library, origin),
        Err(why) => from_resolver(resolver).ok_or_else(|| {
            format!(
                "no CUDA driver was found ({why}); install NVIDIA's driver, name its library in SIRE_LIBCUDA, \
                 or use the software device (`sire software-env`)"
            )
        }),
    }
}

/// The copy that is loaded already, else the one that the loader finds.
fn open_by_soname() -> Result<(Library, String), libloading::Error> {
    // SAFETY: RTLD_NOLOAD runs no initialiser; it only counts a library that is already loaded.
    if let Ok(library) = unsafe { Library::open(Some(SONAME), RTLD_NOW | libc::RTLD_NOLOAD) } {
        return Ok((library, format!("{SONAME} (already loaded)")));
    }
    // SAFETY: opening a library runs its initialisers; libcuda's are made for being opened like this (cudart does).
    let library = unsafe { Library::open(Some(SONAME), RTLD_NOW | RTLD_LOCAL) }?;
    Ok((library, SONAME.to_owned()))
}

fn from_library(library: Library, origin: String) -> Result<Loaded, String> {
    let find = |symbol: Symbol| -> *mut c_void {
        // SAFETY: the address is only kept, not called, and not as any typed thing yet.
        unsafe { library.get::<*mut c_void>(symbol.exported.to_bytes_with_nul()) }
            .map_or(std::ptr::null_mut(), |found| found.as_raw_ptr())
    };
    // SAFETY: the library is libcuda (or says that it stands in for it), so its exported names are the functions.
    let table = unsafe { EntryPoints::resolve(&find) }.map_err(|name| {
        format!(
            "{origin} has no {}: the driver is too old (CUDA 11.4 or later is needed) or not a driver",
            name.to_string_lossy()
        )
    })?;
    // Kept open for good, also so that the addresses in the table stay valid.
    let _ = library.into_raw();
    Ok(Loaded { table, origin })
}

fn from_resolver(resolver: Option<Resolver<'_>>) -> Option<Loaded> {
    let resolver = resolver?;
    let find = |symbol: Symbol| resolver(symbol.base, symbol.version);
    // SAFETY: cudaGetDriverEntryPoint returns the variant of the version that it is asked for, or null.
    let table = unsafe { EntryPoints::resolve(&find) }.ok()?;
    Some(Loaded { table, origin: "the program's CUDA runtime".to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_that_does_not_exist_is_named() {
        let error = load(Some(Path::new("/nonexistent/libcuda.so.1")), None).err();
        assert!(error.is_some_and(|text| text.contains("SIRE_LIBCUDA") && text.contains("/nonexistent")));
    }

    #[test]
    fn a_library_without_the_functions_is_refused_by_name() {
        let error = load(Some(Path::new("libc.so.6")), None).err();
        assert!(error.is_some_and(|text| text.contains("cuInit")));
    }

    #[test]
    fn an_incomplete_resolver_is_no_driver() {
        let nothing = |_: &CStr, _: u32| std::ptr::null_mut();
        assert!(from_resolver(Some(&nothing)).is_none());
    }
}
