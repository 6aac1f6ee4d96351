//! What the engine's cache counts and holds: the whole-process allocator's answers to what PyTorch asks its own.

use crate::allocate;
use crate::boundary::{self, call};
use crate::capture;
use crate::process;
use crate::status::sire_status;
use sire_core::error::{Error, Status};
use std::ffi::c_char;

/// What the cache of a device counts, as a JSON object with the names and meanings of `torch.cuda.memory_stats`
/// (`"allocated_bytes.all.current"`, ...). A text output: call with `cap` 0 to measure.
///
/// # Safety
/// `buf` is NULL or has room for `cap` bytes; `out_len` is NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_memory_stats_json(
    device: i32,
    buf: *mut c_char,
    cap: usize,
    out_len: *mut usize,
) -> sire_status {
    call(|| {
        let text = process::get()?.engine.memory_stats_json(allocate::device(device)?)?;
        // SAFETY: the caller's promises.
        unsafe { boundary::put_whole_text(&text, buf, cap, out_len) };
        Ok(())
    })
}

/// Every segment and block of the caches of all devices, as a JSON list in the shape of `torch.cuda.memory_snapshot`; each segment also has
/// the `tag` of its region. A text output: call with `cap` 0 to measure.
///
/// # Safety
/// `buf` is NULL or has room for `cap` bytes; `out_len` is NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_memory_snapshot_json(buf: *mut c_char, cap: usize, out_len: *mut usize) -> sire_status {
    call(|| {
        let text = process::get()?.engine.memory_snapshot_json();
        // SAFETY: the caller's promises.
        unsafe { boundary::put_whole_text(&text, buf, cap, out_len) };
        Ok(())
    })
}

/// The peaks of a device's cache are from now on what there is now; with `accumulated`, what has come and gone is counted anew instead.
#[unsafe(no_mangle)]
pub extern "C" fn sire_memory_stats_reset(device: i32, accumulated: bool) -> sire_status {
    call(|| process::get()?.engine.reset_memory_stats(allocate::device(device)?, accumulated))
}

/// Gives the driver what caches hold free; how many bytes goes to `out_bytes`. `SIRE_STATUS_CAPTURING` during a capture.
///
/// # Safety
/// `out_bytes` is NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_empty_cache(out_bytes: *mut usize) -> sire_status {
    call(|| {
        let process = process::get()?;
        if capture::in_progress() {
            let why = "cannot empty the cache while a CUDA graph is being captured: it would wait for the device; end the capture first";
            return Err(Error::new(Status::Capturing, why));
        }
        let bytes = process.engine.empty_caches();
        // SAFETY: the caller's promise.
        unsafe { boundary::put(out_bytes, bytes as usize) };
        Ok(())
    })
}
