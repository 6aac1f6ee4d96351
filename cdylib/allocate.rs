//! Allocating and freeing through the engine: the one path that hooks, PyTorch's entry points and the C ABI share.

use crate::boundary::invalid;
use crate::capture;
use crate::config;
use crate::process::Process;
use crate::torch;
use sire_core::driver::{Addr, Device, ProgramStream};
use sire_core::engine::{RegionId, Request, Reuse};
use sire_core::error::{Error, Result, Status};
use std::ffi::{c_int, c_void};

/// What a hooked function allocates in a region: as `SIRE_SLABS` says.
pub(crate) fn in_region(
    process: &Process,
    region: RegionId,
    device: c_int,
    bytes: usize,
    stream: *mut c_void,
) -> Result<*mut c_void> {
    let allocate = if config::get()?.slabs { from_cache } else { allocate };
    allocate(process, region, device, bytes, stream)
}

/// `bytes` (more than 0) on `device`, in `region`.
pub(crate) fn allocate(
    process: &Process,
    region: RegionId,
    device: c_int,
    bytes: usize,
    stream: *mut c_void,
) -> Result<*mut c_void> {
    let request = request(region, device, bytes, stream)?;
    process.engine.allocate(request).map(pointer)
}

/// The same from the engine's cache.
pub(crate) fn from_cache(
    process: &Process,
    region: RegionId,
    device: c_int,
    bytes: usize,
    stream: *mut c_void,
) -> Result<*mut c_void> {
    let request = request(region, device, bytes, stream)?;
    let pool = torch::pool(request.device, stream);
    process.engine.allocate_cached(request, pool).map(pointer)
}

fn request(region: RegionId, device: c_int, bytes: usize, stream: *mut c_void) -> Result<Request> {
    Ok(Request {
        region,
        device: self::device(device)?,
        size: bytes as u64,
        stream: ProgramStream(stream as u64),
        capturing: capture::in_progress(),
    })
}

/// A device by C's number.
pub(crate) fn device(number: c_int) -> Result<Device> {
    u32::try_from(number).map(Device).map_err(|_| invalid(format!("device {number} does not exist")))
}

/// Frees an address that the engine owns. Who frees so does not say which streams used it: in the engine's cache it waits for the device.
pub(crate) fn free(process: &Process, ptr: *const c_void) -> Result<()> {
    free_as(process, ptr, Reuse::AfterDevice)
}

/// The same; memory of the engine's cache is used again as `reuse` says.
pub(crate) fn free_as(process: &Process, ptr: *const c_void, reuse: Reuse) -> Result<()> {
    process.engine.free_cached(address(ptr), reuse, capture::in_progress())
}

/// Frees memory of the engine's cache, which is used again as `reuse` says; None: it is no such memory.
pub(crate) fn free_if_cached(
    process: &Process,
    ptr: *const c_void,
    reuse: impl FnOnce() -> Reuse,
) -> Option<Result<()>> {
    process.engine.free_if_cached(address(ptr), reuse, capture::in_progress())
}

/// Whether the engine owns the address. Wait-free.
pub(crate) fn owns(process: &Process, ptr: *const c_void) -> bool {
    process.engine.owns(address(ptr))
}

/// The error for an address that is not ours.
pub(crate) fn unknown(ptr: *const c_void) -> Error {
    Error::new(
        Status::UnknownAddress,
        format!("{ptr:p} is not an allocation of Sire's; was it freed, or never in a region?"),
    )
}

pub(crate) fn address(ptr: *const c_void) -> Addr {
    Addr(ptr as u64)
}

/// Device addresses are handed to C as pointers; nobody here follows them.
pub(crate) fn pointer(addr: Addr) -> *mut c_void {
    std::ptr::without_provenance_mut(addr.0 as usize)
}
