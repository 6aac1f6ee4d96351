//! Reservations: bytes of a GPU that other processes leave alone. docs/reservations.md says what holds between processes.

use crate::allocate;
use crate::boundary::{self, call, invalid, sized_field};
use crate::process;
use crate::reservation::{self, Fence, Reservation, Wish};
use crate::status::sire_status;
use sire_core::error::Result;
use sire_ledger::Want;
use std::ffi::c_char;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// A reservation. Every function that takes one may be called from any thread.
#[derive(Debug)]
pub struct sire_reservation(Arc<Reservation>);

/// How to reserve. Set `struct_size` to `sizeof(sire_reserve_options)`; zeros mean: the whole device, only if it can be had at once, with no fence.
#[repr(C)]
#[derive(Debug)]
pub struct sire_reserve_options {
    /// `sizeof(sire_reserve_options)`.
    pub struct_size: usize,
    /// Bytes to reserve. 0: the device for this process alone: once nobody has reserved anything there, all that is free but `margin_bytes`.
    pub bytes: u64,
    /// With `bytes` 0: what stays free.
    pub margin_bytes: u64,
    /// How long to wait in the queue, in seconds (INFINITY: for as long as it takes).
    pub timeout_seconds: f64,
    /// 0: only the ledger says whose the bytes are. 1: the process also takes them from the driver at once, so that nobody at all can have
    /// them; where that is not possible, the ledger alone does, and the log says so. 2: where it is not possible, reserving fails.
    pub fence: i32,
    /// Where processes find each other's ledgers; NULL: `TORCHTOOLS_LOCK_DIR`, or else `/tmp`.
    pub directory: *const c_char,
    /// Not 0: while it waits, and it is its turn, other processes of the same user are asked to give way with what they have marked for that
    /// (`sire_reclaimable_open`), and get it back when the reservation ends. Not with `bytes` 0.
    pub preempt: i32,
    /// With `preempt`: marks of at most this priority give way.
    pub priority: i32,
}

/// What a reservation is. Set `struct_size` to `sizeof(sire_reservation_report)`.
#[repr(C)]
#[derive(Debug)]
pub struct sire_reservation_report {
    /// `sizeof(sire_reservation_report)`.
    pub struct_size: usize,
    /// Bytes that the ledger says are ours.
    pub reserved_bytes: u64,
    /// Of those, bytes that the process has taken from the driver (whole granules: it may be somewhat more).
    pub fenced_bytes: u64,
    /// Of the fences of all this process's reservations on the device, bytes that nothing uses yet.
    pub unused_bytes: u64,
}

pub(super) fn timeout(seconds: f64) -> Result<Option<Duration>> {
    if seconds.is_nan() || seconds < 0.0 {
        return Err(invalid(format!("timeout_seconds is {seconds}; it must be a number of seconds, 0 or more")));
    }
    // What is too long for a duration is for ever.
    Ok(Duration::try_from_secs_f64(seconds).ok())
}

fn fence(number: i32) -> Result<Fence> {
    match number {
        0 => Ok(Fence::None),
        1 => Ok(Fence::IfPossible),
        2 => Ok(Fence::Strict),
        other => Err(invalid(format!("fence is {other}; it must be 0, 1 or 2"))),
    }
}

/// # Safety
/// `directory` is NULL or NUL-terminated.
pub(super) unsafe fn place(directory: *const c_char) -> Result<PathBuf> {
    if directory.is_null() {
        return Ok(sire_ledger::directory());
    }
    // SAFETY: the caller's promise.
    unsafe { boundary::path("the directory", directory) }.map(PathBuf::from)
}

/// # Safety
/// `options` is NULL or a sized struct.
unsafe fn read(device: i32, options: *const sire_reserve_options) -> Result<(Wish, PathBuf)> {
    if options.is_null() {
        return Err(invalid("the options are NULL: nobody would know what to reserve"));
    }
    // SAFETY: the caller's promise.
    let size = unsafe { boundary::struct_size("sire_reserve_options", options) }?;
    // SAFETY: `struct_size` bytes are readable.
    unsafe { boundary::refuse_unknown_fields("sire_reserve_options", options, size) }?;
    let bytes = sized_field!(options, size, sire_reserve_options, bytes: u64).unwrap_or(0);
    let margin = sized_field!(options, size, sire_reserve_options, margin_bytes: u64).unwrap_or(0);
    let seconds = sized_field!(options, size, sire_reserve_options, timeout_seconds: f64).unwrap_or(0.0);
    let number = sized_field!(options, size, sire_reserve_options, fence: i32).unwrap_or(0);
    let directory = sized_field!(options, size, sire_reserve_options, directory: *const c_char);
    let preempt = sized_field!(options, size, sire_reserve_options, preempt: i32).unwrap_or(0);
    let priority = sized_field!(options, size, sire_reserve_options, priority: i32).unwrap_or(0);
    if preempt != 0 && bytes == 0 {
        return Err(invalid("nobody can give way for a whole device: say how many bytes are needed"));
    }
    let want = if bytes == 0 { Want::Rest { margin } } else { Want::Bytes(bytes) };
    // SAFETY: the caller's promise about the struct's strings.
    let directory = unsafe { place(directory.unwrap_or(std::ptr::null())) }?;
    let wish = Wish {
        device: allocate::device(device)?,
        want,
        timeout: timeout(seconds)?,
        fence: fence(number)?,
        preempt: (preempt != 0).then_some(priority),
    };
    Ok((wish, directory))
}

/// # Safety
/// `reservation` is NULL or came from `sire_reserve` and was not released yet.
unsafe fn known<'a>(reservation: *const sire_reservation) -> Result<&'a Reservation> {
    // SAFETY: the caller's promise.
    let found = unsafe { reservation.as_ref() };
    found.map(|reservation| &*reservation.0).ok_or_else(|| invalid("the reservation is NULL"))
}

/// Reserves bytes of a device among all processes of the machine that do so, of whatever user: waits for its turn (who came first is served
/// first) and for room. It lasts until `sire_reservation_release`, or the end of this process, however it ends. `SIRE_STATUS_BUSY` if it was not to
/// be had in time, `SIRE_STATUS_OUT_OF_DEVICE_MEMORY` if the device does not have so much (or the fence could not be built),
/// `SIRE_STATUS_UNSUPPORTED` if the ledger cannot be used; `sire_cancel` ends the wait.
///
/// # Safety
/// `options` is a sized struct whose strings are NULL or NUL-terminated; `out_reservation` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_reserve(
    device: i32,
    options: *const sire_reserve_options,
    out_reservation: *mut *mut sire_reservation,
) -> sire_status {
    call(|| {
        if out_reservation.is_null() {
            return Err(invalid("out_reservation is NULL: nobody could end the reservation"));
        }
        // SAFETY: the caller's promise.
        let (wish, directory) = unsafe { read(device, options) }?;
        let made = Reservation::make(process::get()?, &directory, wish)?;
        // SAFETY: the caller's promise. `sire_reservation_release` takes the box back.
        unsafe { boundary::put(out_reservation, Box::into_raw(Box::new(sire_reservation(made)))) };
        Ok(())
    })
}

/// Makes a reservation `bytes` (more than 0) in all. For more it waits as `sire_reserve` does, and keeps what it has meanwhile and afterwards.
///
/// # Safety
/// `reservation` was not released yet.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_reservation_resize(
    reservation: *const sire_reservation,
    bytes: u64,
    timeout_seconds: f64,
    fence: i32,
) -> sire_status {
    call(|| {
        if bytes == 0 {
            return Err(invalid("0 bytes are no reservation; release it instead"));
        }
        let (timeout, fence) = (timeout(timeout_seconds)?, self::fence(fence)?);
        // SAFETY: the caller's promise.
        unsafe { known(reservation) }?.resize(process::get()?, bytes, timeout, fence)
    })
}

/// Says how many of a reservation's bytes this process owns by other means than the fence, so that others do not count them twice. More is to be
/// said after it was allocated, less before it is given back.
///
/// # Safety
/// `reservation` was not released yet.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_reservation_note_owned(reservation: *const sire_reservation, bytes: u64) -> sire_status {
    // SAFETY: the caller's promise.
    call(|| unsafe { known(reservation) }?.note_owned(bytes))
}

/// What a reservation is now.
///
/// # Safety
/// `reservation` was not released yet; `out` is NULL or a sized struct.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_reservation_get(
    reservation: *const sire_reservation,
    out: *mut sire_reservation_report,
) -> sire_status {
    call(|| {
        // SAFETY: the caller's promise.
        let reservation = unsafe { known(reservation) }?;
        if out.is_null() {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        let size = unsafe { boundary::struct_size("sire_reservation_report", out) }?;
        let standing = reservation.standing();
        let unused_bytes = process::get()?.engine.stocked(reservation.device()).lying;
        let report = sire_reservation_report {
            struct_size: size,
            reserved_bytes: standing.reserved,
            fenced_bytes: standing.fenced,
            unused_bytes,
        };
        let len = size.min(size_of::<sire_reservation_report>());
        // SAFETY: `struct_size` bytes are writable, and no more than the report has are copied.
        unsafe { std::ptr::copy_nonoverlapping((&raw const report).cast::<u8>(), out.cast::<u8>(), len) };
        Ok(())
    })
}

/// Ends a reservation: first in the ledger, then what of its fence nothing uses goes back to the driver. NULL is nothing to do.
///
/// # Safety
/// `reservation` is NULL or was not released yet, and no other thread is using it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_reservation_release(reservation: *mut sire_reservation) -> sire_status {
    call(|| {
        if !reservation.is_null() {
            // SAFETY: the caller's promise: a box that `sire_reserve` leaked, taken back once.
            drop(unsafe { Box::from_raw(reservation) });
        }
        Ok(())
    })
}

/// A device's UUID, and everybody in its ledger, as JSON (docs/reservations.md). `directory` as in the options. A text
/// output: call with `cap` 0 to measure.
///
/// # Safety
/// `directory` is NULL or NUL-terminated; `buf` is NULL or has room for `cap` bytes; `out_len` is NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_reservations_json(
    device: i32,
    directory: *const c_char,
    buf: *mut c_char,
    cap: usize,
    out_len: *mut usize,
) -> sire_status {
    call(|| {
        // SAFETY: the caller's promise.
        let directory = unsafe { place(directory) }?;
        let text = reservation::list(process::get()?, &directory, allocate::device(device)?)?.to_string();
        // SAFETY: the caller's promises.
        unsafe { boundary::put_whole_text(&text, buf, cap, out_len) };
        Ok(())
    })
}
