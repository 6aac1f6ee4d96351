//! Time slices: processes that share a device by turns. docs/time-slices.md says what holds between them.

use crate::allocate;
use crate::boundary::{self, call, invalid, sized_field};
use crate::process;
use crate::slices::{self, Wish};
use crate::status::sire_status;
use sire_core::error::Result;
use std::ffi::c_char;
use std::path::PathBuf;
use std::time::Duration;

/// How to take turns. Set `struct_size` to `sizeof(sire_time_slice_options)`.
#[repr(C)]
#[derive(Debug)]
pub struct sire_time_slice_options {
    /// `sizeof(sire_time_slice_options)`.
    pub struct_size: usize,
    /// How long a turn lasts at least, in seconds, more than 0.
    pub quantum_seconds: f64,
    /// How long to wait for the first turn, in seconds (INFINITY: for as long as it takes; 0: only if it can be had at once).
    pub timeout_seconds: f64,
    /// Processes of the same group take turns; NULL: the group without a name.
    pub group: *const c_char,
    /// Where processes find each other; NULL: `TORCHTOOLS_LOCK_DIR`, or else `/tmp`.
    pub directory: *const c_char,
}

/// # Safety
/// `options` is NULL or a sized struct whose strings are NULL or NUL-terminated.
unsafe fn read(device: i32, options: *const sire_time_slice_options) -> Result<(Wish, PathBuf)> {
    if options.is_null() {
        return Err(invalid("the options are NULL: nobody would know how long a turn lasts"));
    }
    // SAFETY: the caller's promise.
    let size = unsafe { boundary::struct_size("sire_time_slice_options", options) }?;
    // SAFETY: `struct_size` bytes are readable.
    unsafe { boundary::refuse_unknown_fields("sire_time_slice_options", options, size) }?;
    let quantum = sized_field!(options, size, sire_time_slice_options, quantum_seconds: f64).unwrap_or(0.0);
    let timeout = sized_field!(options, size, sire_time_slice_options, timeout_seconds: f64).unwrap_or(0.0);
    let group = sized_field!(options, size, sire_time_slice_options, group: *const c_char);
    let directory = sized_field!(options, size, sire_time_slice_options, directory: *const c_char);
    // SAFETY: the caller's promise about the struct's strings.
    let group = unsafe { boundary::optional_string("the group", group.unwrap_or(std::ptr::null())) }?;
    // SAFETY: as above.
    let directory = unsafe { super::reserve::place(directory.unwrap_or(std::ptr::null())) }?;
    let wish = Wish {
        device: allocate::device(device)?,
        quantum: quantum_of(quantum)?,
        group: group.unwrap_or_default().to_owned(),
        timeout: super::reserve::timeout(timeout)?,
    };
    Ok((wish, directory))
}

fn quantum_of(seconds: f64) -> Result<Duration> {
    let quantum = Duration::try_from_secs_f64(seconds).ok().filter(|quantum| !quantum.is_zero());
    quantum.ok_or_else(|| invalid(format!("quantum_seconds is {seconds}; it must be a number of seconds, more than 0")))
}

/// From now on this process uses the device in turns with others of its group, of whatever user; waits for the first turn. When a turn lasted its quantum, and
/// somebody waits, everything that this process has in regions is paused at the next safe point (`sire_safe_point`), backed up whatever the
/// regions' policies say, and threads wait there for the next turn. `SIRE_STATUS_BUSY` if the first was not to be had in time; `sire_cancel`
/// ends the wait. One at a time in a process.
///
/// # Safety
/// `options` is a sized struct whose strings are NULL or NUL-terminated.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_time_slice_open(device: i32, options: *const sire_time_slice_options) -> sire_status {
    call(|| {
        // SAFETY: the caller's promise.
        let (wish, directory) = unsafe { read(device, options) }?;
        slices::open(process::get()?, &directory, wish)
    })
}

/// This process takes turns no more, and leaves the device to others: what it still has there is in their way. In another's turn what is paused comes
/// back if there is room, before threads at safe points go on; if not, it stays paused as if that was asked from outside (`sire resume`,
/// `sire_control_give_up`), and the status says so. In a forked child it does nothing.
#[unsafe(no_mangle)]
pub extern "C" fn sire_time_slice_close() -> sire_status {
    call(slices::close)
}

/// Where this process is in its turns, as in `time_slice` of `sire_stats_json`; `null` if it takes none. A text output.
///
/// # Safety
/// `buf` is NULL or has room for `cap` bytes; `out_len` is NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_time_slice_json(buf: *mut c_char, cap: usize, out_len: *mut usize) -> sire_status {
    call(|| {
        let text = slices::figures().to_string();
        // SAFETY: the caller's promises.
        unsafe { boundary::put_whole_text(&text, buf, cap, out_len) };
        Ok(())
    })
}
