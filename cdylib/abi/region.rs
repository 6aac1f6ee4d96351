//! Regions: opening, entering and leaving them.

use crate::boundary::{self, call, invalid, sized_field};
use crate::preempt;
use crate::process;
use crate::region;
use crate::status::sire_status;
use sire_core::engine::{Backup, Clean, OnPaused, Policy, RegionId, State};
use sire_core::error::Result;
use std::ffi::c_char;

/// What a region promises about its content. Set `struct_size` to `sizeof(sire_region_options)`.
#[repr(C)]
#[derive(Debug)]
pub struct sire_region_options {
    /// `sizeof(sire_region_options)`.
    pub struct_size: usize,
    /// Where the content goes while the region is paused: 0 nowhere, 1 host memory, 2 disk, 3 a file that was
    /// attached (host memory for the rest), 4 chosen by the engine: such a file for what it
    /// holds, else host memory, the disk for what it has no room for.
    pub backup: i32,
    /// Bytes that were not backed up read as zero after resume.
    pub zero_fill: bool,
    /// The backup's space stays allocated after resume.
    pub retain: bool,
    /// Whether the backup of an earlier pause may stand for content that has not changed since: 0 no, every pause copies;
    /// 1 declared: the program does not write to what was backed up, or says so with `sire_changed`; 2 verified: a 128-bit hash of
    /// each page decides; 3 paranoid: each page is compared. Anything but 0 needs a backup, and retains it.
    pub clean: i32,
    /// The backup's host memory is left pageable: it does not count against what the process may lock, but copies are slower.
    pub pageable: bool,
    /// Each allocation of 1 MiB (`SIRE_SMALL`) and more is one piece of physical memory, whatever its size, so that one handle stands for all of it: for
    /// buffers that libraries register with others (docs/outside.md).
    pub whole: bool,
}

/// # Safety
/// `options` is NULL or a sized struct.
unsafe fn policy(options: *const sire_region_options) -> Result<Policy> {
    if options.is_null() {
        return Ok(Policy::default());
    }
    // SAFETY: the caller's promise.
    let size = unsafe { boundary::struct_size("sire_region_options", options) }?;
    // SAFETY: `struct_size` bytes are readable.
    unsafe { boundary::refuse_unknown_fields("sire_region_options", options, size) }?;
    let backup = match sized_field!(options, size, sire_region_options, backup: i32).unwrap_or(0) {
        0 => Backup::None,
        1 => Backup::Host,
        2 => Backup::Disk,
        3 => Backup::File,
        4 => Backup::Auto,
        other => {
            return Err(invalid(format!(
                "backup is {other}; it must be 0 (none), 1 (host), 2 (disk), 3 (file) or 4 (auto)"
            )));
        }
    };
    // Read as bytes: C may have left any value in a bool.
    let zero_fill = sized_field!(options, size, sire_region_options, zero_fill: u8).unwrap_or(0) != 0;
    let retain = sized_field!(options, size, sire_region_options, retain: u8).unwrap_or(0) != 0;
    let clean = match sized_field!(options, size, sire_region_options, clean: i32).unwrap_or(0) {
        0 => Clean::No,
        1 => Clean::Declared,
        2 => Clean::Verified,
        3 => Clean::Paranoid,
        other => {
            return Err(invalid(format!(
                "clean is {other}; it must be 0 (no), 1 (declared), 2 (verified) or 3 (paranoid)"
            )));
        }
    };
    if clean != Clean::No && backup == Backup::None {
        return Err(invalid("clean is set, but backup is 0 (none): there is nothing that could stand for the content"));
    }
    let pageable = sized_field!(options, size, sire_region_options, pageable: u8).unwrap_or(0) != 0;
    let whole = sized_field!(options, size, sire_region_options, whole: u8).unwrap_or(0) != 0;
    Ok(Policy { backup, zero_fill, retain, clean, pageable, whole })
}

/// The region of (tag, options), made if there is none. Tags are paths of `/`-separated segments, at most 255 bytes:
/// pausing "model" pauses "model/weights" too. Options NULL: content is thrown away by a pause.
///
/// # Safety
/// `tag` is NULL or NUL-terminated, `options` NULL or a sized struct, `out_region` NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_region_open(
    tag: *const c_char,
    options: *const sire_region_options,
    out_region: *mut u32,
) -> sire_status {
    call(|| {
        // SAFETY: the caller's promises.
        let (tag, policy) = unsafe { (boundary::string("the tag", tag)?, policy(options)?) };
        let opened = region::open(tag, policy)?;
        // SAFETY: the caller's promise.
        unsafe { boundary::put(out_region, opened.0) };
        Ok(())
    })
}

/// This thread goes inside the region: what it allocates belongs to it, and it cannot be paused until the thread leaves.
/// Nests. If the region is paused: `on_paused` 0 refuses (`SIRE_STATUS_PAUSED`), 1 resumes it first.
#[unsafe(no_mangle)]
pub extern "C" fn sire_region_enter(region: u32, on_paused: i32) -> sire_status {
    sire_region_enter_on(region, region::EVERY_DEVICE, on_paused)
}

/// As `sire_region_enter`, for what the thread allocates on one device (an ordinal; -1: on every device). What it allocates on another belongs to the
/// next region outside that takes it. For programs whose allocator keeps what it was given and hands it out again by device, as PyTorch's pools do: what
/// such an allocator takes for a device whose pool is not the region's is not the region's memory.
#[unsafe(no_mangle)]
pub extern "C" fn sire_region_enter_on(region: u32, device: i32, on_paused: i32) -> sire_status {
    call(|| {
        if device < region::EVERY_DEVICE {
            return Err(invalid(format!("device is {device}; it must be an ordinal, or -1 (every device)")));
        }
        let on_paused = match on_paused {
            0 => OnPaused::Refuse,
            1 => OnPaused::Resume,
            other => return Err(invalid(format!("on_paused is {other}; it must be 0 (refuse) or 1 (resume)"))),
        };
        region::enter(RegionId(region), device, on_paused)?;
        if on_paused == OnPaused::Resume {
            preempt::look_at_loans(&process::get()?.engine);
        }
        Ok(())
    })
}

/// This thread leaves the region, which must be its innermost one.
#[unsafe(no_mangle)]
pub extern "C" fn sire_region_leave(region: u32) -> sire_status {
    call(|| region::leave(RegionId(region)))
}

/// The region of this thread's next allocation: the innermost, else the process-wide one; `UINT32_MAX`: none.
///
/// # Safety
/// `out_region` is NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_region_current(out_region: *mut u32) -> sire_status {
    call(|| {
        let current = region::current()?.map_or(region::NONE, |region| region.0);
        // SAFETY: the caller's promise.
        unsafe { boundary::put(out_region, current) };
        Ok(())
    })
}

/// This thread's allocations pass through, whatever region it is in, until as many `sire_region_unsuspend`.
#[unsafe(no_mangle)]
pub extern "C" fn sire_region_suspend() -> sire_status {
    call(region::suspend)
}

/// Undoes one `sire_region_suspend` of this thread.
#[unsafe(no_mangle)]
pub extern "C" fn sire_region_unsuspend() -> sire_status {
    call(region::unsuspend)
}

/// The region of threads that are in none; `UINT32_MAX`: they pass through.
#[unsafe(no_mangle)]
pub extern "C" fn sire_process_region_set(region: u32) -> sire_status {
    call(|| region::set_process_wide(region))
}

/// Whether the region is resident (0) or paused (1).
///
/// # Safety
/// `out_state` is NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_region_state(region: u32, out_state: *mut i32) -> sire_status {
    call(|| {
        let state = match process::get()?.engine.state(RegionId(region))? {
            State::Resident => 0,
            State::Paused => 1,
        };
        // SAFETY: the caller's promise.
        unsafe { boundary::put(out_state, state) };
        Ok(())
    })
}
