//! Plain values: what can be asked without anything being able to fail.

use crate::allocate;
use crate::boundary;
use crate::process;
use crate::status;
use std::ffi::{c_char, c_void};

/// The number of this interface: it changes only when something in it breaks.
#[unsafe(no_mangle)]
pub extern "C" fn sire_abi_version() -> u32 {
    1
}

/// The library's version, such as "0.1.0".
#[unsafe(no_mangle)]
pub extern "C" fn sire_version() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}

/// 16 hex digits: a hash of the sources that this library was built from.
#[unsafe(no_mangle)]
pub extern "C" fn sire_build_id() -> *const c_char {
    concat!(env!("SIRE_BUILD_ID"), "\0").as_ptr().cast()
}

/// The constant's name, such as "SIRE_STATUS_OK"; "SIRE_STATUS_UNKNOWN" for a number that is none.
#[unsafe(no_mangle)]
pub extern "C" fn sire_status_name(status: i32) -> *const c_char {
    status::name(status).as_ptr()
}

/// The message of this thread's last failure. At most `cap` bytes are written, always NUL-terminated; returns the
/// full length without the NUL.
///
/// # Safety
/// `buf` is NULL or has room for `cap` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_last_error(buf: *mut c_char, cap: usize) -> usize {
    // SAFETY: the caller's promise.
    unsafe { boundary::last_error(buf, cap) }
}

/// Whether the address lies in memory of Sire's, resident or paused. Wait-free.
#[unsafe(no_mangle)]
pub extern "C" fn sire_owns(ptr: *const c_void) -> bool {
    process::started().is_some_and(|process| allocate::owns(process, ptr))
}
