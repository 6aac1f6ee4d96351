//! Allocating and freeing through the engine: the one path that hooks, PyTorch's entry points and the C ABI share.

use crate::boundary::invalid;
use crate::capture::{self, Relaxed};
use crate::process::Process;
use sire_core::driver::{Addr, Device, ProgramStream};
use sire_core::engine::{RegionId, Request};
use sire_core::error::{Error, Result, Status};
use std::ffi::{c_int, c_void};

/// `bytes` (more than 0) on `device`, in `region`.
pub(crate) fn allocate(
    process: &Process,
    region: RegionId,
    device: c_int,
    bytes: usize,
    stream: *mut c_void,
) -> Result<*mut c_void> {
    let device = u32::try_from(device).map_err(|_| invalid(format!("device {device} does not exist")))?;
    let request = Request {
        region,
        device: Device(device),
        size: bytes as u64,
        stream: ProgramStream(stream as u64),
        capturing: capture::in_progress(),
    };
    let _relaxed = Relaxed::enter(process);
    process.engine.allocate(request).map(pointer)
}

/// Frees an address that the engine owns.
pub(crate) fn free(process: &Process, ptr: *const c_void) -> Result<()> {
    let _relaxed = Relaxed::enter(process);
    process.engine.free(address(ptr), capture::in_progress())
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
