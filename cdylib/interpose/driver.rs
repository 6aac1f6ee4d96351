//! The way to the driver through a CUDA runtime: every question is passed on, and for the functions of [`super::entry`] the answer is ours.

use super::entry::{Question, UNVERSIONED, replace};
use super::{cudaError, lookup, original};
use crate::config;
use crate::log;
use std::ffi::{CStr, c_char, c_int, c_uint, c_ulonglong, c_void};
use std::sync::atomic::{AtomicBool, Ordering};

pub(super) unsafe extern "C" fn entry_point(
    symbol: *const c_char,
    out: *mut *mut c_void,
    flags: c_ulonglong,
    status: *mut c_int,
    caller: usize,
) -> cudaError {
    // SAFETY: the program's own arguments, as it passed them.
    unsafe {
        let code = original::runtime(caller).driver_entry_point(symbol, out, flags, status);
        answer(code, symbol, out, UNVERSIONED, flags, caller)
    }
}

pub(super) unsafe extern "C" fn entry_point_by_version(
    symbol: *const c_char,
    out: *mut *mut c_void,
    version: c_uint,
    flags: c_ulonglong,
    status: *mut c_int,
    caller: usize,
) -> cudaError {
    // SAFETY: the program's own arguments, as it passed them.
    unsafe {
        let code = original::runtime(caller).driver_entry_point_by_version(symbol, out, version, flags, status);
        answer(code, symbol, out, version, flags, caller)
    }
}

/// `cudaEnablePerThreadDefaultStream`, which is what "as compiled" means to who calls the variants for per-thread default streams.
const PER_THREAD: c_ulonglong = 2;

fn compiled_per_thread(flags: c_ulonglong) -> c_ulonglong {
    if flags == 0 { PER_THREAD } else { flags }
}

pub(super) unsafe extern "C" fn entry_point_per_thread(
    symbol: *const c_char,
    out: *mut *mut c_void,
    flags: c_ulonglong,
    status: *mut c_int,
    caller: usize,
) -> cudaError {
    // SAFETY: the program's own arguments, as it passed them.
    unsafe {
        let code = original::runtime(caller).driver_entry_point_per_thread(symbol, out, flags, status);
        answer(code, symbol, out, UNVERSIONED, compiled_per_thread(flags), caller)
    }
}

pub(super) unsafe extern "C" fn entry_point_by_version_per_thread(
    symbol: *const c_char,
    out: *mut *mut c_void,
    version: c_uint,
    flags: c_ulonglong,
    status: *mut c_int,
    caller: usize,
) -> cudaError {
    // SAFETY: the program's own arguments, as it passed them.
    unsafe {
        let runtime = original::runtime(caller);
        let code = runtime.driver_entry_point_by_version_per_thread(symbol, out, version, flags, status);
        answer(code, symbol, out, version, compiled_per_thread(flags), caller)
    }
}

/// Puts our function in the place of the driver's, if the runtime found one and hooks serve regions here.
unsafe fn answer(
    code: cudaError,
    symbol: *const c_char,
    out: *mut *mut c_void,
    version: c_uint,
    flags: c_ulonglong,
    caller: usize,
) -> cudaError {
    if code != 0 || symbol.is_null() || out.is_null() {
        return code;
    }
    let Ok(settings) = config::get() else { return code };
    // SAFETY: the runtime has just read a NUL-terminated name there.
    let name = unsafe { CStr::from_ptr(symbol) };
    if settings.disabled || !settings.hooks {
        notice(name, settings);
        return code;
    }
    let all = lookup::live() && lookup::hears(caller);
    // SAFETY: the runtime has just written there.
    unsafe { out.write_unaligned(replace(&Question::Versioned(name, version, flags), out.read_unaligned(), all)) };
    code
}

/// Says once that a process-wide region will miss PyTorch's expandable segments: they come this way, not by cudaMalloc.
fn notice(name: &CStr, settings: &config::Settings) {
    static SAID: AtomicBool = AtomicBool::new(false);
    let wide = settings.region.is_some() || settings.tms.enable;
    let (true, false, Some(variable)) = (wide, settings.disabled, settings.expandable_segments) else { return };
    if name == c"cuMemCreate" && !SAID.swap(true, Ordering::Relaxed) {
        log::error!(
            "a process-wide region was asked for, but {variable} has expandable_segments:True: in the hook mode torch such memory is \
             not seen and will not be paused; use the hook mode preload"
        );
    }
}
