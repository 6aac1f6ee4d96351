//! The way to the driver: passed through for now. What is looked up here tells one thing worth saying.

use super::{cudaError, original};
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
        notice(symbol);
        original::runtime(caller).driver_entry_point(symbol, out, flags, status)
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
        notice(symbol);
        original::runtime(caller).driver_entry_point_by_version(symbol, out, version, flags, status)
    }
}

/// Says once that a process-wide region will miss PyTorch's expandable segments: they come this way, not by cudaMalloc.
unsafe fn notice(symbol: *const c_char) {
    static SAID: AtomicBool = AtomicBool::new(false);
    // SAFETY: the runtime requires a NUL-terminated name here too.
    if symbol.is_null() || SAID.load(Ordering::Relaxed) || unsafe { CStr::from_ptr(symbol) } != c"cuMemCreate" {
        return;
    }
    SAID.store(true, Ordering::Relaxed);
    let Ok(settings) = config::get() else { return };
    let wide = settings.region.is_some() || settings.tms.enable;
    if let (true, false, Some(variable)) = (wide, settings.disabled, settings.expandable_segments) {
        log::error!(
            "a process-wide region was asked for, but {variable} has expandable_segments:True: such memory is not seen \
             and will not be paused; remove expandable_segments from {variable}"
        );
    }
}
