//! Memory pools, the driver's and the runtime's, which are the same: inside a region, what a program takes from a pool of its own is Sire's, on the pool's
//! device. A pool whose memory can be handed to other processes, or that we have not seen, keeps its allocations.
//!
//! Access to a pool is access to what Sire gives in its place. It is followed for every pool whose device is known: those that were seen being made, and
//! every pool that was its device's current or default one when the program said something of it, also when it is not any more.

use super::cudaError;
use super::entry::{AccessDescription, Code, PoolProperties, original};
use super::forwarded::DRIVER;
use super::guard::Guard;
use super::linear::{allocated, per_thread};
use super::original::{self as found_by, Runtime};
use super::peer;
use super::runtime::{allocate_on, pass_in_order, serve};
use std::collections::BTreeMap;
use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::{Mutex, MutexGuard, PoisonError};

const SUCCESS: Code = 0;
/// `CU_MEM_LOCATION_TYPE_DEVICE`.
const ON_DEVICE: c_int = 1;
/// `CU_MEM_ALLOCATION_TYPE_PINNED`.
const PINNED: c_int = 1;

/// What is known of a pool.
#[derive(Clone, Copy)]
struct Pool {
    device: c_int,
    /// Sire may take the place of its memory: no other process can be given it.
    replaceable: bool,
}

/// By the pool's handle.
static POOLS: Mutex<BTreeMap<usize, Pool>> = Mutex::new(BTreeMap::new());

fn pools() -> MutexGuard<'static, BTreeMap<usize, Pool>> {
    POOLS.lock().unwrap_or_else(PoisonError::into_inner)
}

fn known(pool: *mut c_void) -> Option<Pool> {
    pools().get(&(pool as usize)).copied()
}

/// The device on which Sire takes the place of the pool's memory.
fn replaced_on(pool: Option<Pool>) -> Option<c_int> {
    pool.filter(|pool| pool.replaceable).map(|pool| pool.device)
}

/// Remembers the pool that the driver has written to `out`.
///
/// # Safety
/// `out` is NULL or the program's place for the result.
unsafe fn remember(out: *const *mut c_void, pool: Pool) {
    if !out.is_null() {
        // SAFETY: not NULL, and the driver has just written there.
        pools().insert(unsafe { out.read_unaligned() } as usize, pool);
    }
}

/// Remembers the pool that was just made after `properties`, if it is one of a device's.
///
/// # Safety
/// `out` is NULL or the program's place for the result; `properties` is NULL or a description.
unsafe fn made(code: Code, out: *const *mut c_void, properties: *const PoolProperties) {
    // SAFETY: the caller's promise.
    let asked = unsafe { properties.as_ref() }.filter(|asked| code == SUCCESS && asked.location.kind == ON_DEVICE);
    if let Some(asked) = asked {
        // The host may touch memory of the other kinds (managed).
        let replaceable = asked.shareable == 0 && asked.kind == PINNED;
        // SAFETY: the caller's promise.
        unsafe { remember(out, Pool { device: asked.location.id, replaceable }) };
    }
}

/// Follows what was just said of access to a pool.
///
/// # Safety
/// `count` descriptions lie at `access`, or it is NULL.
unsafe fn accessed(
    owner: impl FnOnce() -> Option<Pool>,
    pool: *mut c_void,
    access: *const AccessDescription,
    count: usize,
) {
    if let Some(_guard) = Guard::enter()
        && let Some(owner) = owner()
    {
        // SAFETY: the caller's promise.
        unsafe { peer::follow_described(owner.device, pool, access, count) };
    }
}

/// Destroys a pool with `destroy`. Forgotten first: once destroyed, its handle may be another pool's.
fn destroyed(pool: *mut c_void, destroy: impl FnOnce() -> Code) -> Code {
    let Some(was) = pools().remove(&(pool as usize)) else { return destroy() };
    let through = peer::forget_pool(pool);
    let code = destroy();
    if code == SUCCESS {
        peer::without_pool(through);
    } else {
        pools().insert(pool as usize, was);
        peer::with_pool(pool, through);
    }
    code
}

// ---- the driver's ---------------------------------------------------------------------------------------------------

pub(super) unsafe extern "C" fn pool_create(out: *mut *mut c_void, properties: *const PoolProperties) -> Code {
    // SAFETY: the program's own arguments, as it passed them.
    let code = unsafe { original::pool_create(out, properties) };
    // SAFETY: the program's own arguments: a place for the result, and a description.
    unsafe { made(code, out, properties) };
    code
}

pub(super) unsafe extern "C" fn default_pool(out: *mut *mut c_void, device: c_int) -> Code {
    // SAFETY: the program's own arguments, as it passed them.
    let code = unsafe { original::default_pool(out, device) };
    if code == SUCCESS {
        // SAFETY: the program's own place for the result.
        unsafe { remember(out, Pool { device, replaceable: true }) };
    }
    code
}

pub(super) unsafe extern "C" fn pool_set_access(
    pool: *mut c_void,
    access: *const AccessDescription,
    count: usize,
) -> Code {
    // SAFETY: the program's own arguments, as it passed them.
    let code = unsafe { original::pool_set_access(pool, access, count) };
    if code == SUCCESS {
        // SAFETY: the driver has just read so many descriptions there.
        unsafe { accessed(|| known(pool), pool, access, count) };
    }
    code
}

pub(super) unsafe extern "C" fn pool_destroy(pool: *mut c_void) -> Code {
    // SAFETY: the program's own argument, as it passed it.
    destroyed(pool, || unsafe { original::pool_destroy(pool) })
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
    match replaced_on(known(pool)) {
        // SAFETY: the caller's promise.
        Some(device) => unsafe { allocated(out, bytes, stream, Some(device), || DRIVER.allocate.note(), ask) },
        None => {
            DRIVER.pool.note();
            ask()
        }
    }
}

// ---- the runtime's --------------------------------------------------------------------------------------------------

/// What is known of a pool, or what its runtime says of it now; then it is known.
fn asked(runtime: &Runtime, pool: *mut c_void) -> Option<Pool> {
    known(pool).or_else(|| {
        let found = current_or_default(runtime, pool)?;
        pools().insert(pool as usize, found);
        Some(found)
    })
}

/// The device that allocates from the pool, by default or by the program's wish. Nobody has seen the latter being made.
fn current_or_default(runtime: &Runtime, pool: *mut c_void) -> Option<Pool> {
    let mut count = 0;
    // SAFETY: writes one int.
    let code = unsafe { runtime.get_device_count(&raw mut count) };
    let of_device = |device| {
        let (mut current, mut default) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: each writes one pointer.
        let codes =
            unsafe { (runtime.get_pool(&raw mut current, device), runtime.get_default_pool(&raw mut default, device)) };
        if codes != (0, 0) {
            // A device without pools. The program has not asked, and shall not hear of it at its next kernel.
            // SAFETY: takes nothing.
            let _ = unsafe { runtime.get_last_error() };
        }
        let replaceable = codes.1 == 0 && default == pool;
        (replaceable || (codes.0 == 0 && current == pool)).then_some(Pool { device, replaceable })
    };
    (0..if code == 0 { count } else { 0 }).find_map(of_device)
}

pub(super) unsafe extern "C" fn runtime_create(
    out: *mut *mut c_void,
    properties: *const c_void,
    caller: usize,
) -> cudaError {
    // SAFETY: the program's own arguments, as it passed them.
    let code = unsafe { found_by::runtime(caller).create_pool(out, properties) };
    // SAFETY: the program's own arguments; the runtime's description is laid out as the driver's.
    unsafe { made(code, out, properties.cast()) };
    code
}

pub(super) unsafe extern "C" fn runtime_destroy(pool: *mut c_void, caller: usize) -> cudaError {
    let runtime = found_by::runtime(caller);
    // SAFETY: the program's own argument, as it passed it.
    destroyed(pool, || unsafe { runtime.destroy_pool(pool) })
}

pub(super) unsafe extern "C" fn runtime_set_access(
    pool: *mut c_void,
    access: *const c_void,
    count: usize,
    caller: usize,
) -> cudaError {
    let runtime = found_by::runtime(caller);
    // SAFETY: the program's own arguments, as it passed them.
    let code = unsafe { runtime.set_pool_access(pool, access, count) };
    if code == SUCCESS {
        // SAFETY: the runtime has just read so many descriptions there.
        unsafe { accessed(|| asked(runtime, pool), pool, access.cast(), count) };
    }
    code
}

pub(super) unsafe extern "C" fn runtime_malloc(
    out: *mut *mut c_void,
    bytes: usize,
    pool: *mut c_void,
    stream: *mut c_void,
    caller: usize,
) -> cudaError {
    // SAFETY: the program's own arguments, as it passed them.
    let ask = |runtime: &Runtime| unsafe { runtime.malloc_from_pool(out, bytes, pool, stream) };
    // SAFETY: the program's own place for the result.
    unsafe { runtime_taken(out, bytes, pool, stream, caller, ask) }
}

pub(super) unsafe extern "C" fn runtime_malloc_per_thread(
    out: *mut *mut c_void,
    bytes: usize,
    pool: *mut c_void,
    stream: *mut c_void,
    caller: usize,
) -> cudaError {
    // SAFETY: the program's own arguments, as it passed them.
    let ask = |runtime: &Runtime| unsafe { runtime.malloc_from_pool_per_thread(out, bytes, pool, stream) };
    // SAFETY: the program's own place for the result.
    unsafe { runtime_taken(out, bytes, pool, per_thread(stream), caller, ask) }
}

/// # Safety
/// `out` is NULL or the program's place for the result.
unsafe fn runtime_taken(
    out: *mut *mut c_void,
    bytes: usize,
    pool: *mut c_void,
    stream: *mut c_void,
    caller: usize,
    ask: impl Fn(&Runtime) -> cudaError,
) -> cudaError {
    let runtime = found_by::runtime(caller);
    let device = || replaced_on(asked(runtime, pool));
    let make = |region| device().map_or(Ok(None), |device| allocate_on(device, region, bytes, stream, runtime));
    // SAFETY: the caller's promise.
    unsafe { serve(out, bytes, &device, make) }.unwrap_or_else(|| {
        let device = known(pool).map(|pool| pool.device);
        pass_in_order(bytes, runtime, device, ask)
    })
}
