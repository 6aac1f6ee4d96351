//! The entry points that PyTorch's `CUDAPluggableAllocator` and `MemPool` look up.
//!
//! A whole-process allocator that returned NULL would give tensors at address 0, so [`sire_torch_malloc`] raises:
//! `c10::OutOfMemoryError` where libc10 is loaded (Python's `torch.OutOfMemoryError`), else `std::bad_alloc`. A MemPool checks for
//! NULL, frees its cache and tries again, so [`sire_torch_pool_malloc`] returns it. See [`throw`] for how.
//!
//! A pool of PyTorch's caches by itself. The whole-process allocator gets every tensor at its exact size, so there the engine's own cache serves, and
//! PyTorch tells it what else it must know: [`install`], [`pools`].

mod function;
mod install;
mod library;
mod pools;
mod throw;

use crate::allocate;
use crate::boundary::{self, catch};
use crate::capture;
use crate::config;
use crate::interpose::runtime::{pass_allocate, pass_free};
use crate::log;
use crate::process::{self, Process};
use crate::region;
use function::Filter;
use sire_core::driver::{Device, ProgramStream};
use sire_core::engine::{Policy, PoolNumber, RegionId, Reuse};
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
    install::is_told();
    match catch(|| serve(bytes, device, stream, allocate::from_cache)) {
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
    or_null(catch(|| serve(bytes, device, stream, allocate::allocate)))
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
    // In a forked child the memory is the parent's, as everything on a device: there is nothing to free, whoever made it.
    if ptr.is_null() || process::is_forked() {
        return;
    }
    let freed = catch(|| match process::started() {
        Some(process) => match allocate::free_if_cached(process, ptr, reuse) {
            Some(freed) => freed,
            None if allocate::owns(process, ptr) => allocate::free(process, ptr),
            None => pass_on(ptr),
        },
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

/// When what PyTorch frees can be used again.
fn reuse() -> Reuse {
    if install::is_told() { Reuse::InStreamOrder } else { Reuse::AfterDevice }
}

/// Which private pool an allocation belongs to.
pub(crate) fn pool(device: Device, stream: *mut c_void) -> PoolNumber {
    pools::of(device, stream)
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

/// PyTorch's name of a private pool (`c10::cuda::MempoolId_t`).
#[repr(C)]
#[derive(Clone, Copy)]
pub struct sire_torch_pool_id {
    /// Its first half.
    pub first: u64,
    /// Its second half.
    pub second: u64,
}

/// `stream` uses the tensor at `ptr`, too: its memory is not used again before what the stream has been given until the free is done.
/// For `set_record_stream_fn`, as the next ones are for the setters of their names; PyTorch gets all of them with the first allocation.
#[unsafe(no_mangle)]
pub extern "C" fn sire_torch_record_stream(ptr: *mut c_void, stream: *mut c_void) {
    said(|| {
        if let Some(process) = process::started() {
            process.engine.record_stream(allocate::address(ptr), ProgramStream(stream as u64));
        }
        Ok(())
    });
}

/// From now on, allocations on `device` on streams that `filter` (a `std::function<bool(cudaStream_t)>`, or NULL for all) takes belong to the
/// private pool, and a capture is in progress.
///
/// # Safety
/// `filter` is NULL or such a function, and lives until this returns.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn sire_torch_begin_allocate_to_pool(
    device: c_int,
    pool: sire_torch_pool_id,
    filter: *const c_void,
) {
    said(|| {
        // SAFETY: the caller's promise.
        let filter = unsafe { Filter::copy(filter) };
        pools::begin(process::get()?, allocate::device(device)?, (pool.first, pool.second), filter)
    });
}

/// Not any more.
#[unsafe(no_mangle)]
pub extern "C" fn sire_torch_end_allocate_to_pool(device: c_int, pool: sire_torch_pool_id) {
    said(|| match pools::end(allocate::device(device)?, (pool.first, pool.second)) {
        true => Ok(()),
        false => Err(boundary::invalid(format!("nothing is allocated to pool ({}, {})", pool.first, pool.second))),
    });
}

/// Nobody needs the private pool any more: what is free in it can be given back.
#[unsafe(no_mangle)]
pub extern "C" fn sire_torch_release_pool(device: c_int, pool: sire_torch_pool_id) {
    said(|| match process::get()?.engine.release_pool(allocate::device(device)?, (pool.first, pool.second)) {
        true => Ok(()),
        false => Err(boundary::invalid(format!("there is no private pool ({}, {})", pool.first, pool.second))),
    });
}

/// Gives the driver what is cached (`torch.cuda.empty_cache`).
#[unsafe(no_mangle)]
pub extern "C" fn sire_torch_reset() {
    said(|| {
        process::started().filter(|_| !capture::in_progress()).map(|process| process.engine.empty_caches());
        Ok(())
    });
}

/// The most memory that may be cached and in use, as a part of what the device has.
#[unsafe(no_mangle)]
pub extern "C" fn sire_torch_set_memory_fraction(fraction: f64, device: c_int) {
    said(|| process::get()?.engine.set_memory_fraction(allocate::device(device)?, fraction));
}

/// The start of the allocation that holds `ptr`, and its bytes; `ptr` itself, and 0, if it is not Sire's.
///
/// # Safety
/// `out_bytes` is NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_torch_base_allocation(ptr: *mut c_void, out_bytes: *mut usize) -> *mut c_void {
    let found = process::started()
        .and_then(|process| catch(|| Ok(process.engine.allocation(allocate::address(ptr)))).ok().flatten());
    let (base, bytes) = found.map_or((ptr, 0), |(base, bytes, ..)| (allocate::pointer(base), bytes as usize));
    // SAFETY: the caller's promise.
    unsafe { boundary::put(out_bytes, bytes) };
    base
}

/// What PyTorch tells us has no answer: what went wrong is said in the log, and is the last error.
fn said(body: impl FnOnce() -> Result<()>) {
    if let Err(error) = catch(body) {
        boundary::remember(&error);
        log::warning!("{error}");
    }
}

type Allocate = fn(&'static Process, RegionId, c_int, usize, *mut c_void) -> Result<*mut c_void>;

fn serve(bytes: isize, device: c_int, stream: *mut c_void, allocate: Allocate) -> Result<*mut c_void> {
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
    let region = match region::current_on(&|| Some(device))? {
        Some(region) => region,
        None => default_region()?,
    };
    allocate(process::get()?, region, device, size, stream)
}

/// The region of tag "default", opened by the first who needs it.
fn default_region() -> Result<RegionId> {
    static DEFAULT: AtomicU32 = AtomicU32::new(region::NONE);
    let known = DEFAULT.load(Ordering::Acquire);
    if known != region::NONE {
        return Ok(RegionId(known));
    }
    let policy = Policy { backup: config::get()?.backup.unwrap_or_default(), ..Policy::default() };
    let opened = region::open(DEFAULT_TAG, policy)?;
    DEFAULT.store(opened.0, Ordering::Release);
    Ok(opened)
}
