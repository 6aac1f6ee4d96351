//! The driver's own `cudaMalloc`: `cuMemAlloc` and its relatives, as libraries call them that bring their own CUDA runtime or none. Inside a
//! region their memory is Sire's; what Sire does not hold (managed and pitched memory) is passed through and counted.
//!
//! The rules are those of [`super::runtime`]; CUDA's driver and runtime agree on the numbers of errors.

use super::context;
use super::entry::{Code, original};
use super::runtime::{ask_again, is_recorded, known, serve, take_back};
use crate::allocate;
use crate::process;
use crate::reservation;
use sire_core::engine::RegionId;
use sire_core::error::Result;
use std::ffi::{c_int, c_uint, c_void};
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};

/// Calls that went to the driver.
#[derive(Debug, Default)]
pub(crate) struct Passed {
    pub allocate: AtomicU64,
    pub free: AtomicU64,
    pub managed: AtomicU64,
    pub pitch: AtomicU64,
    pub pool: AtomicU64,
}

/// Calls at driver level that went to the driver.
pub(crate) static PASSED: Passed = Passed {
    allocate: AtomicU64::new(0),
    free: AtomicU64::new(0),
    managed: AtomicU64::new(0),
    pitch: AtomicU64::new(0),
    pool: AtomicU64::new(0),
};

/// `CU_STREAM_PER_THREAD`: what stream 0 is for who asked for the per-thread variants.
pub(super) fn per_thread(stream: *mut c_void) -> *mut c_void {
    if stream.is_null() { ptr::without_provenance_mut(2) } else { stream }
}

/// Serves an allocation inside a region, else asks the driver with `ask` and counts that in `passed`. `device`: None is the current
/// context's.
///
/// # Safety
/// `out` is NULL or the program's place for the result.
pub(super) unsafe fn allocated(
    out: *mut u64,
    bytes: usize,
    stream: *mut c_void,
    device: Option<c_int>,
    passed: &AtomicU64,
    ask: impl Fn() -> Code,
) -> Code {
    // SAFETY: an address is as wide as a pointer here; the caller's promise.
    let served = unsafe { serve(out.cast(), bytes, |region| in_region(region, bytes, stream, device)) };
    served.unwrap_or_else(|| {
        passed.fetch_add(1, Ordering::Relaxed);
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
    unsafe { allocated(out, bytes, ptr::null_mut(), None, &PASSED.allocate, || original::alloc(out, bytes)) }
}

pub(super) unsafe extern "C" fn alloc_async(out: *mut u64, bytes: usize, stream: *mut c_void) -> Code {
    // SAFETY: the program's own arguments, as it passed them.
    unsafe { allocated(out, bytes, stream, None, &PASSED.allocate, || original::alloc_async(out, bytes, stream)) }
}

pub(super) unsafe extern "C" fn alloc_async_per_thread(out: *mut u64, bytes: usize, stream: *mut c_void) -> Code {
    let ask = || {
        // SAFETY: the program's own arguments, as it passed them.
        unsafe { original::alloc_async_per_thread(out, bytes, stream) }
    };
    // SAFETY: the program's own place for the result.
    unsafe { allocated(out, bytes, per_thread(stream), None, &PASSED.allocate, ask) }
}

pub(super) unsafe extern "C" fn alloc_pitch(
    out: *mut u64,
    pitch: *mut usize,
    width: usize,
    height: usize,
    element: c_uint,
) -> Code {
    PASSED.pitch.fetch_add(1, Ordering::Relaxed);
    // SAFETY: the program's own arguments, as it passed them.
    let ask = || unsafe { original::alloc_pitch(out, pitch, width, height, element) };
    ask_again(ask, width.saturating_mul(height), || known(context::device()?), || ())
}

pub(super) unsafe extern "C" fn alloc_managed(out: *mut u64, bytes: usize, flags: c_uint) -> Code {
    PASSED.managed.fetch_add(1, Ordering::Relaxed);
    // SAFETY: the program's own arguments, as it passed them.
    unsafe { original::alloc_managed(out, bytes, flags) }
}

/// Frees what is ours, else asks the driver with `ask`.
fn freed(ptr: u64, ask: impl FnOnce() -> Code) -> Code {
    take_back(ptr::without_provenance_mut(ptr as usize)).unwrap_or_else(|| {
        PASSED.free.fetch_add(1, Ordering::Relaxed);
        ask()
    })
}

pub(super) unsafe extern "C" fn free(ptr: u64) -> Code {
    // `cudaMalloc` may have made it, out of what is reserved.
    let place = ptr::without_provenance(ptr as usize);
    // SAFETY: the program's own argument, as it passed it.
    freed(ptr, || reservation::free(place, || unsafe { original::free(ptr) }))
}

pub(super) unsafe extern "C" fn free_async(ptr: u64, stream: *mut c_void) -> Code {
    // SAFETY: the program's own arguments, as it passed them.
    freed(ptr, || unsafe { original::free_async(ptr, stream) })
}

pub(super) unsafe extern "C" fn free_async_per_thread(ptr: u64, stream: *mut c_void) -> Code {
    // SAFETY: the program's own arguments, as it passed them.
    freed(ptr, || unsafe { original::free_async_per_thread(ptr, stream) })
}
