//! Handles for other processes, as the driver makes them for memory of its own `cudaMalloc` alone (`cudaIpcGetMemHandle`). For memory of
//! regions the driver would say no more than "invalid value": here it is said which memory that is, and what to do. Handles that are opened
//! here, and memory that is imported, are the other process's: never hooked, never paused.

use super::entry::{Code, original as driver};
use super::runtime::report;
use super::{cudaError, original};
use crate::process;
use sire_core::driver::Addr;
use sire_core::error::{Error, Status};
use std::ffi::c_void;

pub(super) unsafe extern "C" fn runtime_get_mem_handle(out: *mut c_void, ptr: *mut c_void, caller: usize) -> cudaError {
    refused("cudaIpcGetMemHandle", ptr as u64).unwrap_or_else(|| {
        // SAFETY: the program's own arguments, as it passed them.
        unsafe { original::runtime(caller).ipc_get_mem_handle(out, ptr) }
    })
}

pub(super) unsafe extern "C" fn get_mem_handle(out: *mut c_void, ptr: u64) -> Code {
    refused("cuIpcGetMemHandle", ptr).unwrap_or_else(|| {
        // SAFETY: the program's own arguments, as it passed them.
        unsafe { driver::get_mem_handle(out, ptr) }
    })
}

/// The error for memory that can be paused; None: it is not ours.
fn refused(function: &str, ptr: u64) -> Option<cudaError> {
    let process = process::started().filter(|process| ptr != 0 && process.engine.owns(Addr(ptr)))?;
    let region =
        process.engine.tag_at(Addr(ptr)).map_or_else(|| "a region".to_owned(), |tag| format!("region '{tag}'"));
    let message = format!(
        "memory at {ptr:#x} is in {region}, and {function} cannot hand such memory to another process; allocate what is shared \
         outside regions, send a copy, or map it yourself and export it (cuMemExportToShareableHandle)"
    );
    Some(report("a handle for another process", &Error::new(Status::Unsupported, message)))
}
