//! The driver's memory pools: inside a region, what a program takes from a pool of its own is Sire's, on the pool's device. A pool whose memory
//! can be handed to other processes, or that we have not seen, keeps its allocations.

use super::entry::{AccessDescription, Code, PoolProperties, original};
use super::guard::Guard;
use super::linear::{PASSED, allocated, per_thread};
use super::peer;
use std::collections::BTreeMap;
use std::ffi::{c_int, c_void};
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard, PoisonError};

const SUCCESS: Code = 0;
/// `CU_MEM_LOCATION_TYPE_DEVICE`.
const ON_DEVICE: c_int = 1;

/// The devices of pools whose memory Sire may take the place of, by the pool's handle.
static POOLS: Mutex<BTreeMap<usize, c_int>> = Mutex::new(BTreeMap::new());

fn pools() -> MutexGuard<'static, BTreeMap<usize, c_int>> {
    POOLS.lock().unwrap_or_else(PoisonError::into_inner)
}

fn device_of(pool: *mut c_void) -> Option<c_int> {
    pools().get(&(pool as usize)).copied()
}

/// Remembers the pool that the driver has written to `out`.
///
/// # Safety
/// `out` is NULL or the program's place for the result.
unsafe fn remember(out: *const *mut c_void, device: c_int) {
    if !out.is_null() {
        // SAFETY: not NULL, and the driver has just written there.
        pools().insert(unsafe { out.read_unaligned() } as usize, device);
    }
}

pub(super) unsafe extern "C" fn pool_create(out: *mut *mut c_void, properties: *const PoolProperties) -> Code {
    // SAFETY: the program's own arguments, as it passed them.
    let code = unsafe { original::pool_create(out, properties) };
    // SAFETY: the driver has just read a description there.
    match unsafe { properties.as_ref() } {
        Some(asked) if code == SUCCESS && asked.shareable == 0 && asked.location.kind == ON_DEVICE => {
            // SAFETY: the program's own place for the result.
            unsafe { remember(out, asked.location.id) };
        }
        _ => {}
    }
    code
}

pub(super) unsafe extern "C" fn default_pool(out: *mut *mut c_void, device: c_int) -> Code {
    // SAFETY: the program's own arguments, as it passed them.
    let code = unsafe { original::default_pool(out, device) };
    if code == SUCCESS {
        // SAFETY: the program's own place for the result.
        unsafe { remember(out, device) };
    }
    code
}

/// Access to a pool is access to what Sire gives in its place.
pub(super) unsafe extern "C" fn pool_set_access(
    pool: *mut c_void,
    access: *const AccessDescription,
    count: usize,
) -> Code {
    // SAFETY: the program's own arguments, as it passed them.
    let code = unsafe { original::pool_set_access(pool, access, count) };
    if code == SUCCESS
        && let Some(_guard) = Guard::enter()
        && let Some(owner) = device_of(pool)
    {
        // SAFETY: the driver has just read so many descriptions there.
        unsafe { peer::follow_described(owner, pool, access, count) };
    }
    code
}

/// Forgotten first: once destroyed, its handle may be another pool's.
pub(super) unsafe extern "C" fn pool_destroy(pool: *mut c_void) -> Code {
    let Some(device) = pools().remove(&(pool as usize)) else {
        // SAFETY: the program's own argument, as it passed it.
        return unsafe { original::pool_destroy(pool) };
    };
    let through = peer::forget_pool(pool);
    // SAFETY: the program's own argument, as it passed it.
    let code = unsafe { original::pool_destroy(pool) };
    if code == SUCCESS {
        peer::without_pool(through);
    } else {
        pools().insert(pool as usize, device);
        peer::with_pool(pool, through);
    }
    code
}

pub(super) unsafe extern "C" fn alloc_from_pool(
    out: *mut u64,
    bytes: usize,
    pool: *mut c_void,
    stream: *mut c_void,
) -> Code {
    // SAFETY: the program's own arguments, as it passed them.
    unsafe { taken(out, bytes, pool, stream, || original::alloc_from_pool(out, bytes, pool, stream)) }
}

pub(super) unsafe extern "C" fn alloc_from_pool_per_thread(
    out: *mut u64,
    bytes: usize,
    pool: *mut c_void,
    stream: *mut c_void,
) -> Code {
    let ask = || {
        // SAFETY: the program's own arguments, as it passed them.
        unsafe { original::alloc_from_pool_per_thread(out, bytes, pool, stream) }
    };
    // SAFETY: the program's own place for the result.
    unsafe { taken(out, bytes, pool, per_thread(stream), ask) }
}

/// # Safety
/// `out` is NULL or the program's place for the result.
unsafe fn taken(out: *mut u64, bytes: usize, pool: *mut c_void, stream: *mut c_void, ask: impl Fn() -> Code) -> Code {
    match device_of(pool) {
        // SAFETY: the caller's promise.
        Some(device) => unsafe { allocated(out, bytes, stream, Some(device), &PASSED.allocate, ask) },
        None => {
            PASSED.pool.fetch_add(1, Ordering::Relaxed);
            ask()
        }
    }
}
