//! Who makes way when memory is short: standings, leases, budgets, and asking for room.

use super::transition::selection;
use crate::allocate;
use crate::boundary::{self, call, invalid, sized_field};
use crate::process;
use crate::status::sire_status;
use sire_core::error::Result;
use sire_core::policy::{Budget, Standing};
use std::ffi::c_char;

/// What a program says about a region beside its policy. Set `struct_size` to `sizeof(sire_standing)`.
#[repr(C)]
#[derive(Debug)]
pub struct sire_standing {
    /// `sizeof(sire_standing)`.
    pub struct_size: usize,
    /// Regions of a higher one make way later; 0 if nobody said anything.
    pub priority: i32,
    /// It does not make way at all.
    pub pinned: bool,
    /// For how long after its last use it makes way only when nobody else is left, in seconds.
    pub keep_alive_seconds: f64,
}

/// What `sire_make_room` may use of a device. Set `struct_size` to `sizeof(sire_budget)`.
#[repr(C)]
#[derive(Debug)]
pub struct sire_budget {
    /// `sizeof(sire_budget)`.
    pub struct_size: usize,
    /// The most that regions may hold; 0: what there is.
    pub limit_bytes: u64,
    /// What stays free for others.
    pub headroom_bytes: u64,
    /// For how long after its last use every region is spared while another is left, in seconds.
    pub residency_seconds: f64,
}

fn milliseconds(what: &str, seconds: f64) -> Result<u64> {
    if seconds.is_nan() || seconds < 0.0 {
        return Err(invalid(format!("{what} is {seconds}; it must be a number of seconds, 0 or more")));
    }
    Ok((seconds * 1e3) as u64)
}

/// What is said about the tag and what is under it (NULL: everything) from now on.
///
/// # Safety
/// `tag` is NULL or NUL-terminated, `standing` NULL or a sized struct.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_standing_set(tag: *const c_char, standing: *const sire_standing) -> sire_status {
    call(|| {
        // SAFETY: the caller's promise.
        let (selection, standing) = unsafe { (selection(tag)?, read_standing(standing)?) };
        process::get()?.engine.set_standing(&selection, standing)
    })
}

/// # Safety
/// `standing` is NULL or a sized struct.
unsafe fn read_standing(standing: *const sire_standing) -> Result<Standing> {
    if standing.is_null() {
        return Err(invalid("the standing is NULL"));
    }
    // SAFETY: the caller's promise.
    let size = unsafe { boundary::struct_size("sire_standing", standing) }?;
    // SAFETY: `struct_size` bytes are readable.
    unsafe { boundary::refuse_unknown_fields("sire_standing", standing, size) }?;
    let priority = sized_field!(standing, size, sire_standing, priority: i32).unwrap_or(0);
    // Read as a byte: C may have left any value in a bool.
    let pinned = sized_field!(standing, size, sire_standing, pinned: u8).unwrap_or(0) != 0;
    let keep_alive = sized_field!(standing, size, sire_standing, keep_alive_seconds: f64).unwrap_or(0.0);
    Ok(Standing { priority, pinned, keep_alive: milliseconds("keep_alive_seconds", keep_alive)? })
}

/// Somebody uses the tag and what is under it (NULL: everything): until as many `sire_unlease` these regions do not make way for others. A pause
/// by name is not refused.
///
/// # Safety
/// `tag` is NULL or NUL-terminated.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_lease(tag: *const c_char) -> sire_status {
    // SAFETY: the caller's promise.
    call(|| process::get()?.engine.lease(&unsafe { selection(tag) }?))
}

/// Undoes one `sire_lease` of the same tag; the regions count as used now.
///
/// # Safety
/// `tag` is NULL or NUL-terminated.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_unlease(tag: *const c_char) -> sire_status {
    // SAFETY: the caller's promise.
    call(|| process::get()?.engine.unlease(&unsafe { selection(tag) }?))
}

/// What `sire_make_room` may use of a device from now on, and for how long everybody spares what was just used.
///
/// # Safety
/// `budget` is NULL or a sized struct.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_budget_set(device: i32, budget: *const sire_budget) -> sire_status {
    call(|| {
        let device = allocate::device(device)?;
        // SAFETY: the caller's promise.
        let budget = unsafe { read_budget(budget) }?;
        process::get()?.engine.set_budget(device, budget);
        Ok(())
    })
}

/// # Safety
/// `budget` is NULL or a sized struct.
unsafe fn read_budget(budget: *const sire_budget) -> Result<Budget> {
    if budget.is_null() {
        return Err(invalid("the budget is NULL"));
    }
    // SAFETY: the caller's promise.
    let size = unsafe { boundary::struct_size("sire_budget", budget) }?;
    // SAFETY: `struct_size` bytes are readable.
    unsafe { boundary::refuse_unknown_fields("sire_budget", budget, size) }?;
    let limit = sized_field!(budget, size, sire_budget, limit_bytes: u64).unwrap_or(0);
    let headroom = sized_field!(budget, size, sire_budget, headroom_bytes: u64).unwrap_or(0);
    let residency = sized_field!(budget, size, sire_budget, residency_seconds: f64).unwrap_or(0.0);
    let residency = milliseconds("residency_seconds", residency)?;
    Ok(Budget { limit: (limit > 0).then_some(limit), headroom, residency })
}

/// What was said of a device last, by `sire_budget_set` or from outside (`sire budget`); zeros if nobody has said anything.
///
/// # Safety
/// `out` is NULL or a sized struct that is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_budget_get(device: i32, out: *mut sire_budget) -> sire_status {
    call(|| {
        let device = allocate::device(device)?;
        if out.is_null() {
            return Err(invalid("the budget is NULL"));
        }
        // SAFETY: the caller's promise.
        let size = unsafe { boundary::struct_size("sire_budget", out) }?;
        let said = process::get()?.engine.budget(device);
        let budget = sire_budget {
            struct_size: size,
            limit_bytes: said.limit.unwrap_or(0),
            headroom_bytes: said.headroom,
            residency_seconds: said.residency as f64 / 1e3,
        };
        let len = size.min(size_of::<sire_budget>());
        // SAFETY: `struct_size` bytes are writable, and no more than the budget has are copied.
        unsafe { std::ptr::copy_nonoverlapping((&raw const budget).cast::<u8>(), out.cast::<u8>(), len) };
        Ok(())
    })
}

/// Makes room for `bytes` more on a device, within its budget: regions that were paused with `release` 1 and that nobody uses give their memory back,
/// those of low priority and those used least recently first, no more than necessary. Nothing is copied.
/// `SIRE_STATUS_OUT_OF_DEVICE_MEMORY` if that would not be enough: then nobody gave anything. `buf` gets the tags, one in each line.
///
/// # Safety
/// `out_bytes` is NULL or writable; `buf` is NULL or has room for `cap` bytes; `out_len` is NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_make_room(
    device: i32,
    bytes: usize,
    out_bytes: *mut usize,
    buf: *mut c_char,
    cap: usize,
    out_len: *mut usize,
) -> sire_status {
    call(|| {
        let made = process::get()?.engine.make_room(allocate::device(device)?, bytes as u64)?;
        let tags = made.iter().map(|each| each.tag.as_str()).collect::<Vec<_>>().join("\n");
        // SAFETY: the caller's promises.
        unsafe {
            boundary::put(out_bytes, made.iter().map(|each| each.bytes).sum::<u64>() as usize);
            boundary::put_whole_text(&tags, buf, cap, out_len);
        }
        Ok(())
    })
}
