//! Peers that the program enabled: remembered, so that memory of ours that comes later is accessible too.

use super::cudaError;
use super::entry::AccessDescription;
use super::guard::Guard;
use super::original::{self, Runtime};
use crate::log;
use crate::process::{self, Process};
use sire_core::driver::Device;
use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};

/// `CU_MEM_LOCATION_TYPE_DEVICE`.
const ON_DEVICE: c_int = 1;

/// Devices that fit in the table; CUDA machines have at most 16 today.
const MOST: usize = 64;

/// Bit `accessor` of row `owner`: `accessor` may touch memory on `owner`.
static ENABLED: [AtomicU64; MOST] = [const { AtomicU64::new(0) }; MOST];

/// `accessor` was given access to memory on `owner`.
pub(super) fn enable(owner: usize, accessor: usize) {
    if owner >= MOST || accessor >= MOST {
        log::warning!("device {owner} or {accessor} is beyond {MOST}: its peer access is not replayed");
        return;
    }
    ENABLED[owner].fetch_or(1 << accessor, Ordering::AcqRel);
    if let Some(process) = process::started() {
        allow(process, owner, accessor);
    }
}

/// The runtime's `cudaMemPoolSetAccess`: access to the pool of a device's `cudaMallocAsync` is access to what Sire gives in its place.
pub(super) unsafe extern "C" fn set_pool_access(
    pool: *mut c_void,
    access: *const c_void,
    count: usize,
    caller: usize,
) -> cudaError {
    let runtime = original::runtime(caller);
    // SAFETY: the program's own arguments, as it passed them.
    let code = unsafe { runtime.set_pool_access(pool, access, count) };
    if code == 0
        && let Some(_guard) = Guard::enter()
        && let Some(owner) = device_of_pool(runtime, pool)
    {
        // SAFETY: the runtime has just read so many descriptions there.
        unsafe { enable_described(owner, access.cast(), count) };
    }
    code
}

/// The device that allocates from the pool, by default or by the program's wish.
fn device_of_pool(runtime: &Runtime, pool: *mut c_void) -> Option<c_int> {
    let mut count = 0;
    // SAFETY: writes one int.
    let known = unsafe { runtime.get_device_count(&raw mut count) };
    let is_its = |device: &c_int| {
        let (mut current, mut default) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: each writes one pointer.
        let found = unsafe {
            (runtime.get_pool(&raw mut current, *device), runtime.get_default_pool(&raw mut default, *device))
        };
        (found.0 == 0 && current == pool) || (found.1 == 0 && default == pool)
    };
    (0..if known == 0 { count } else { 0 }).find(is_its)
}

/// Devices that may read or write a pool of `owner`'s were given access to memory there. (The table knows no reading alone; more is
/// allowed then than was asked for, so that nothing which worked stops working.)
///
/// # Safety
/// `count` descriptions lie at `access`, or it is NULL.
pub(super) unsafe fn enable_described(owner: c_int, access: *const AccessDescription, count: usize) {
    let Ok(owner) = usize::try_from(owner) else { return };
    for at in 0..if access.is_null() { 0 } else { count } {
        // SAFETY: the caller's promise.
        let described = unsafe { access.add(at).read_unaligned() };
        let accessor = usize::try_from(described.location.id).ok().filter(|_| described.location.kind == ON_DEVICE);
        if let Some(accessor) = accessor.filter(|accessor| described.flags != 0 && *accessor != owner) {
            enable(owner, accessor);
        }
    }
}

/// Tells a freshly started engine what was enabled before. Repeating it does no harm.
pub(crate) fn replay(process: &Process) {
    for (owner, row) in ENABLED.iter().enumerate() {
        let accessors = row.load(Ordering::Acquire);
        for accessor in (0..MOST).filter(|accessor| accessors & (1 << accessor) != 0) {
            allow(process, owner, accessor);
        }
    }
}

fn allow(process: &Process, owner: usize, accessor: usize) {
    if let Err(error) = process.engine.allow_peer(Device(owner as u32), Device(accessor as u32)) {
        log::warning!("device {accessor} was not given access to regions on device {owner}: {error}");
    }
}
