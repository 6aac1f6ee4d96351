//! The driver's own `cudaMalloc`: `cuMemAlloc` and its relatives, as libraries call them that bring their own CUDA runtime or none. Inside a
//! region their memory is Sire's; what Sire does not hold (managed and pitched memory) is passed through and counted.
//!
//! The rules are those of [`super::runtime`]; CUDA's driver and runtime agree on the numbers of errors.

use super::context;
use super::entry::{Code, original};
use super::forwarded::DRIVER;
use super::runtime::{ask_again, is_recorded, known, serve, take_back};
use crate::allocate;
use crate::process;
use crate::reservation;
use sire_core::engine::RegionId;
use sire_core::error::Result;
use std::ffi::{c_int, c_uint, c_void};
use std::ptr;

/// `CU_STREAM_PER_THREAD`: what stream 0 is for who asked for the per-thread variants.
pub(super) fn per_thread(stream: *mut c_void) -> *mut c_void {
    if stream.is_null() { ptr::without_provenance_mut(2) } else { stream }
}

/// Serves an allocation inside a region, else says so with `note` and asks the driver with `ask`. `device`: None is the current
/// context's.
///
/// # Safety
/// `out` is NULL or the program's place for the result.
pub(super) unsafe fn allocated(
    out: *mut u64,
    bytes: usize,
    stream: *mut c_void,
    device: Option<c_int>,
    note: impl FnOnce(),
    ask: impl Fn() -> Code,
) -> Code {
    // SAFETY: an address is as wide as a pointer here; the caller's promise.
    let served = unsafe {
        serve(out.cast(), bytes, &|| device.or_else(context::device), |region| in_region(region, bytes, stream, device))
    };
    served.unwrap_or_else(|| {
        note();
        ask_again(ask, bytes, || known(device.or_else(context::device)?), || ())
    })
}

const _: () = assert!(size_of::<u64>() == size_of::<*mut c_void>());

fn in_region(
    region: RegionId,
    bytes: usize,
    stream: *mut c_void,
    device: Option<c_int>,
) -> Result<Option<*mut c_void>> {
    // Without a context there is nothing to allocate in: the driver shall say so itself.
    let Some(device) = device.or_else(context::device) else { return Ok(None) };
    let process = process::get()?;
    if is_recorded(process, device, stream) || !context::is_waited_for(process) {
        return Ok(None);
    }
    allocate::in_region(process, region, device, bytes, stream).map(Some)
}

pub(super) unsafe extern "C" fn alloc(out: *mut u64, bytes: usize) -> Code {
    // SAFETY: the program's own arguments, as it passed them.
    unsafe {
        allocated(out, bytes, ptr::null_mut(), None, || DRIVER.allocate.note_waiting(), || original::alloc(out, bytes))
    }
}

pub(super) unsafe extern "C" fn alloc_async(out: *mut u64, bytes: usize, stream: *mut c_void) -> Code {
    // SAFETY: the program's own arguments, as it passed them.
    unsafe {
        allocated(out, bytes, stream, None, || DRIVER.allocate.note(), || original::alloc_async(out, bytes, stream))
    }
}

pub(super) unsafe extern "C" fn alloc_async_per_thread(out: *mut u64, bytes: usize, stream: *mut c_void) -> Code {
    let ask = || {
        // SAFETY: the program's own arguments, as it passed them.
        unsafe { original::alloc_async_per_thread(out, bytes, stream) }
    };
    // SAFETY: the program's own place for the result.
    unsafe { allocated(out, bytes, per_thread(stream), None, || DRIVER.allocate.note(), ask) }
}

pub(super) unsafe extern "C" fn alloc_pitch(
    out: *mut u64,
    pitch: *mut usize,
    width: usize,
    height: usize,
    element: c_uint,
) -> Code {
    DRIVER.pitch.note_waiting();
    // SAFETY: the program's own arguments, as it passed them.
    let ask = || unsafe { original::alloc_pitch(out, pitch, width, height, element) };
    ask_again(ask, width.saturating_mul(height), || known(context::device()?), || ())
}

pub(super) unsafe extern "C" fn alloc_managed(out: *mut u64, bytes: usize, flags: c_uint) -> Code {
    DRIVER.managed.note_waiting();
    // SAFETY: the program's own arguments, as it passed them.
    unsafe { original::alloc_managed(out, bytes, flags) }
}

/// Frees what is ours, else says so with `note` and asks the driver with `ask`: `cudaMalloc` may have made it, out of what is reserved.
fn freed(ptr: u64, note: impl FnOnce(), ask: impl FnOnce() -> Code) -> Code {
    let place = ptr::without_provenance_mut(ptr as usize);
    take_back(place).unwrap_or_else(|| {
        note();
        reservation::free(place, ask)
    })
}

pub(super) unsafe extern "C" fn free(ptr: u64) -> Code {
    // SAFETY: the program's own argument, as it passed it.
    freed(ptr, || DRIVER.free.note_free(ptr == 0), || unsafe { original::free(ptr) })
}

pub(super) unsafe extern "C" fn free_async(ptr: u64, stream: *mut c_void) -> Code {
    // SAFETY: the program's own arguments, as it passed them.
    freed(ptr, || DRIVER.free.note(), || unsafe { original::free_async(ptr, stream) })
}

pub(super) unsafe extern "C" fn free_async_per_thread(ptr: u64, stream: *mut c_void) -> Code {
    // SAFETY: the program's own arguments, as it passed them.
    freed(ptr, || DRIVER.free.note(), || unsafe { original::free_async_per_thread(ptr, stream) })
}
