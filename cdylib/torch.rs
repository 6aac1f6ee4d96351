//! The entry points that PyTorch's `CUDAPluggableAllocator` and `MemPool` look up.
//!
//! A whole-process allocator that returned NULL would give tensors at address 0, so [`sire_torch_malloc`] raises:
//! `c10::OutOfMemoryError` where libc10 is loaded (Python's `torch.OutOfMemoryError`), else `std::bad_alloc`. A MemPool checks for
//! NULL, frees its cache and tries again, so [`sire_torch_pool_malloc`] returns it. See [`throw`] for how.

mod throw;

use crate::allocate;
use crate::boundary::{self, catch};
use crate::config;
use crate::interpose::runtime::{pass_allocate, pass_free};
use crate::log;
use crate::process;
use crate::region;
use sire_core::engine::{Policy, RegionId};
use sire_core::error::{Error, Result, Status};
use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};

/// The tag of what an allocator function makes outside any region.
const DEFAULT_TAG: &str = "default";

/// For the whole process: `change_current_allocator(CUDAPluggableAllocator(path, "sire_torch_malloc", "sire_torch_free"))`.
/// Raises a C++ exception if memory is short. No bytes: NULL.
///
/// # Safety
/// The caller can take a C++ exception.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn sire_torch_malloc(bytes: isize, device: c_int, stream: *mut c_void) -> *mut c_void {
    match catch(|| serve(bytes, device, stream)) {
        Ok(address) => address,
        Err(error) => {
            boundary::remember(&error);
            throw::raise(error, bytes, device)
        }
    }
}

/// For a MemPool: NULL if memory is short, and on every other failure (see `sire_last_error`).
///
/// # Safety
/// None beyond being called from C.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_torch_pool_malloc(bytes: isize, device: c_int, stream: *mut c_void) -> *mut c_void {
    or_null(catch(|| serve(bytes, device, stream)))
}

/// Frees what either of the two made. NULL is nothing to do.
///
/// # Safety
/// None beyond being called from C; a pointer that is not Sire's goes to the CUDA runtime.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_torch_free(ptr: *mut c_void, _bytes: isize, _device: c_int, _stream: *mut c_void) {
    give_back(ptr);
}

/// The address, or NULL with the reason in the log and in the last error.
pub(crate) fn or_null(made: Result<*mut c_void>) -> *mut c_void {
    made.unwrap_or_else(|error| {
        boundary::remember(&error);
        match error.status {
            Status::OutOfDeviceMemory => log::info!("an allocation failed: {error}"),
            _ => log::warning!("an allocation failed: {error}"),
        }
        ptr::null_mut()
    })
}

/// Frees an allocator function's memory; there is nobody to return an error to.
pub(crate) fn give_back(ptr: *mut c_void) {
    if ptr.is_null() {
        return;
    }
    let freed = catch(|| match process::started().filter(|process| allocate::owns(process, ptr)) {
        Some(process) => allocate::free(process, ptr),
        None => pass_on(ptr),
    });
    if let Err(error) = freed {
        boundary::remember(&error);
        match error.status {
            // At exit the driver may be gone before the last frees.
            Status::NoDriver => log::debug!("a free came too late: {error}"),
            _ => log::warning!("a free failed: {error}"),
        }
    }
}

fn pass_on(ptr: *mut c_void) -> Result<()> {
    match pass_free(ptr, 0) {
        // Success, and a runtime that unloads at exit.
        0 | 4 => Ok(()),
        code => {
            Err(allocate::unknown(ptr).context(format!("the CUDA runtime does not know it either (cudaError {code})")))
        }
    }
}

fn serve(bytes: isize, device: c_int, stream: *mut c_void) -> Result<*mut c_void> {
    let Some(size) = usize::try_from(bytes).ok().filter(|size| *size > 0) else {
        return if bytes == 0 {
            Ok(ptr::null_mut())
        } else {
            Err(boundary::invalid(format!("{bytes} bytes were asked for")))
        };
    };
    if region::suspended() {
        // PyTorch has made `device` current before it calls.
        let address = pass_allocate(size, 0);
        return if address.is_null() {
            Err(Error::new(Status::OutOfDeviceMemory, format!("{size} bytes on device {device}, outside Sire")))
        } else {
            Ok(address)
        };
    }
    let region = match region::current()? {
        Some(region) => region,
        None => default_region()?,
    };
    allocate::allocate(process::get()?, region, device, size, stream)
}

/// The region of tag "default", opened by the first who needs it.
fn default_region() -> Result<RegionId> {
    static DEFAULT: AtomicU32 = AtomicU32::new(region::NONE);
    let known = DEFAULT.load(Ordering::Acquire);
    if known != region::NONE {
        return Ok(RegionId(known));
    }
    let policy = Policy { backup: config::get()?.backup.unwrap_or_default(), ..Policy::default() };
    let opened = process::get()?.engine.region(DEFAULT_TAG, policy)?;
    DEFAULT.store(opened.0, Ordering::Release);
    Ok(opened)
}
