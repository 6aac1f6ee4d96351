//! Marks: memory that gives way when another process needs it. docs/preemption.md says what holds between processes.

use super::control::{resumed_teller, sire_told};
use crate::boundary::{self, call, invalid, sized_field};
use crate::preempt::{self, Wish};
use crate::process;
use crate::status::sire_status;
use sire_control::desk::Terms;
use sire_core::error::Result;
use std::ffi::{c_char, c_void};
use std::time::Duration;

/// On which terms memory gives way. Set `struct_size` to `sizeof(sire_reclaimable_options)`; zeros mean: to every need of priority 0 and above, whenever the
/// program passes a safe point; the program waits there until the need is over, and the memory comes back by itself.
#[repr(C)]
#[derive(Debug)]
pub struct sire_reclaimable_options {
    /// `sizeof(sire_reclaimable_options)`.
    pub struct_size: usize,
    /// Needs of this priority and above.
    pub priority: i32,
    /// Not 0: it stays away until the program resumes it itself, and nobody waits for it at safe points.
    pub stay_away: i32,
    /// Not 0: threads that pass safe points go on meanwhile. The program uses nothing of it then before it has resumed it, or found that it is back.
    pub go_on: i32,
    /// Not 0: also regions without a backup, whose content is lost by that.
    pub discard: i32,
    /// Seconds for which it must not have been used.
    pub after_idle_seconds: f64,
}

fn seconds(name: &str, given: f64) -> Result<Duration> {
    Duration::try_from_secs_f64(given)
        .map_err(|_| invalid(format!("{name} is {given}; it must be a number of seconds, 0 or more")))
}

/// # Safety
/// `tag` is NULL or NUL-terminated; `options` is NULL or a sized struct.
unsafe fn read(tag: *const c_char, options: *const sire_reclaimable_options) -> Result<Wish> {
    // SAFETY: the caller's promise.
    let tag = unsafe { boundary::string("the tag", tag) }?.to_owned();
    let (mut priority, mut idle, mut flags) = (0, 0.0, [0; 3]);
    if !options.is_null() {
        // SAFETY: the caller's promise.
        let size = unsafe { boundary::struct_size("sire_reclaimable_options", options) }?;
        // SAFETY: `struct_size` bytes are readable.
        unsafe { boundary::refuse_unknown_fields("sire_reclaimable_options", options, size) }?;
        priority = sized_field!(options, size, sire_reclaimable_options, priority: i32).unwrap_or(0);
        idle = sized_field!(options, size, sire_reclaimable_options, after_idle_seconds: f64).unwrap_or(0.0);
        flags = [
            sized_field!(options, size, sire_reclaimable_options, stay_away: i32).unwrap_or(0),
            sized_field!(options, size, sire_reclaimable_options, go_on: i32).unwrap_or(0),
            sized_field!(options, size, sire_reclaimable_options, discard: i32).unwrap_or(0),
        ];
    }
    let [stay_away, go_on, discard] = flags.map(|flag| flag != 0);
    let terms = Terms { waits: !go_on && !stay_away, returns: !stay_away };
    Ok(Wish { tag, priority, after_idle: seconds("after_idle_seconds", idle)?, terms, discard })
}

/// From now on the memory of a tag, and of what is under it, gives way when another process of the same user needs it, waits for it with
/// `sire_reserve_options.preempt`, and finds nothing free: at a safe point of the program (`sire_safe_point`), backed up as its regions' policies say. When
/// the needer ends, however, it comes back at a safe point, as soon as there is room. Opens the control socket, unless `SIRE_CONTROL` forbids that
/// (`SIRE_STATUS_UNSUPPORTED`). `options` NULL: as zeros.
///
/// # Safety
/// `tag` is NULL or NUL-terminated; `options` is NULL or a sized struct; `out_mark` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_reclaimable_open(
    tag: *const c_char,
    options: *const sire_reclaimable_options,
    out_mark: *mut u64,
) -> sire_status {
    call(|| {
        if out_mark.is_null() {
            return Err(invalid("out_mark is NULL: nobody could take the consent back"));
        }
        // SAFETY: the caller's promise.
        let wish = unsafe { read(tag, options) }?;
        let number = preempt::open(process::get()?, wish)?;
        // SAFETY: the caller's promise.
        unsafe { boundary::put(out_mark, number) };
        Ok(())
    })
}

/// The program has used what a mark is about `seconds_ago` (0: now) for the last time: what its kernels do with memory that is there already Sire does
/// not see.
#[unsafe(no_mangle)]
pub extern "C" fn sire_reclaimable_used(mark: u64, seconds_ago: f64) -> sire_status {
    call(|| preempt::used(process::get()?, mark, seconds("seconds_ago", seconds_ago)?))
}

/// Takes the consent back. What is away by it comes back now; if there is no room, later, at a safe point, and the status says why. `told` (NULL: nobody)
/// hears in the calling thread of what was resumed. Of a mark that is closed already there is nothing to do.
///
/// # Safety
/// `told` is NULL or can be called with `told_context`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_reclaimable_close(mark: u64, told: sire_told, told_context: *mut c_void) -> sire_status {
    call(|| preempt::close(mark, resumed_teller(told, told_context)))
}

/// All marks of this process, as JSON (docs/preemption.md). A text output.
///
/// # Safety
/// `buf` is NULL or has room for `cap` bytes; `out_len` is NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_reclaimable_json(buf: *mut c_char, cap: usize, out_len: *mut usize) -> sire_status {
    call(|| {
        let text = preempt::described().to_string();
        // SAFETY: the caller's promises.
        unsafe { boundary::put_whole_text(&text, buf, cap, out_len) };
        Ok(())
    })
}
