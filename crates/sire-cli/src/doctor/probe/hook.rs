//! Whether a preloaded library is in this process and answers for it.

use std::ffi::{CStr, c_char, c_int, c_void};

use serde::{Deserialize, Serialize};

use super::cuda::file_of;

/// What the preloaded library said.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct HookReport {
    /// The file that provides `sire_abi_version`, if one is loaded.
    pub library: Option<String>,
    /// The file that a program's cudaMalloc would reach first.
    pub malloc: Option<String>,
    /// The version of the C interface.
    pub abi: u32,
    /// The library's version.
    pub version: Option<String>,
    /// The library's build.
    pub build_id: Option<String>,
    /// The library's own opinion on whether it is heard.
    pub live: Option<bool>,
    /// The same at driver level.
    pub driver_live: Option<bool>,
}

/// Looks through the process's own global symbols.
pub fn look() -> HookReport {
    let mut report = HookReport { malloc: symbol(c"cudaMalloc").and_then(file_of), ..HookReport::default() };
    let Some(abi) = symbol(c"sire_abi_version") else {
        return report;
    };
    report.library = file_of(abi);
    // SAFETY: docs/abi.md gives this function this signature.
    report.abi = unsafe { std::mem::transmute::<*const c_void, extern "C" fn() -> u32>(abi) }();
    report.version = symbol(c"sire_version").and_then(text_from);
    report.build_id = symbol(c"sire_build_id").and_then(text_from);
    report.live = symbol(c"sire_hook_probe").and_then(asked);
    report.driver_live = symbol(c"sire_driver_hook_probe").and_then(asked);
    report
}

/// The answer of one of the library's probes.
fn asked(probe: *const c_void) -> Option<bool> {
    // SAFETY: docs/abi.md gives the functions that are asked for here this signature.
    let probe = unsafe { std::mem::transmute::<*const c_void, unsafe extern "C" fn(*mut c_int) -> c_int>(probe) };
    let mut live = 0;
    // SAFETY: the output is a valid int.
    (unsafe { probe(&raw mut live) } == 0).then_some(live == 1)
}

fn symbol(name: &CStr) -> Option<*const c_void> {
    // SAFETY: the name is a C string; RTLD_DEFAULT asks for the process's global symbols.
    let address = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    (!address.is_null()).then_some(address.cast_const())
}

/// Calls a function that returns a static C string.
fn text_from(function: *const c_void) -> Option<String> {
    // SAFETY: docs/abi.md gives the functions that are asked for here this signature.
    let text = unsafe { std::mem::transmute::<*const c_void, extern "C" fn() -> *const c_char>(function) }();
    if text.is_null() {
        return None;
    }
    // SAFETY: a non-null result is a static, NUL-terminated string.
    Some(unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
}
