//! What the hooked functions do: find out whose call it is, serve it or pass it through.
//!
//! Rules: a pointer that is not ours takes no lock; nothing here panics, exits, prints to standard output or calls
//! Python; memory that is short is `cudaErrorMemoryAllocation`, and nothing stays behind for `cudaGetLastError`.

use super::context;
use super::forwarded;
use super::guard::Guard;
use super::linear::per_thread;
use super::original::{self, Runtime};
use super::peer::{self, Way};
use super::{cudaError, probe, reset};
use crate::allocate;
use crate::boundary;
use crate::capture;
use crate::config;
use crate::log;
use crate::process::{self, Process};
use crate::region;
use crate::reservation;
use sire_core::driver::{Device, Driver, ProgramStream};
use sire_core::engine::RegionId;
use sire_core::error::{Error, Result, Status};
use std::cell::Cell;
use std::ffi::{c_int, c_uint, c_void};
use std::ptr;

const SUCCESS: cudaError = 0;
const MEMORY_ALLOCATION: cudaError = 2;
pub(super) const PEER_ACCESS_ALREADY_ENABLED: cudaError = 704;
pub(super) const PEER_ACCESS_NOT_ENABLED: cudaError = 705;

// ---- allocate -------------------------------------------------------------------------------------------------------

pub(super) unsafe extern "C" fn malloc(out: *mut *mut c_void, bytes: usize, caller: usize) -> cudaError {
    if let Some(arrived) = probe::answer(out) {
        return arrived;
    }
    // SAFETY: the program's own arguments.
    let served = unsafe { serve_on_current(out, bytes, ptr::null_mut(), caller) };
    served.unwrap_or_else(|| {
        forwarded::RUNTIME.allocate.note_waiting();
        let runtime = original::runtime(caller);
        // SAFETY: the program's own arguments, as it passed them.
        unsafe { forward(out, bytes, runtime) }
    })
}

/// Passes an allocation on. It comes out of what the process has reserved, if there is that.
///
/// # Safety
/// As for `cudaMalloc`.
unsafe fn forward(out: *mut *mut c_void, bytes: usize, runtime: &Runtime) -> cudaError {
    let guard = Guard::enter();
    let first = guard.as_ref().and_then(|_| reservation::spend(|| known(current_device(runtime).ok()?), bytes));
    drop(guard);
    // SAFETY: the caller's promise.
    let (code, later) = ask_runtime_again(|| unsafe { runtime.malloc(out, bytes) }, bytes, runtime, None);
    if first.is_some() || !later.is_empty() {
        // SAFETY: the runtime has just written it.
        let place = if code == SUCCESS { unsafe { out.read_unaligned() } } else { ptr::null_mut() };
        let _guard = Guard::enter();
        first.into_iter().chain(later).for_each(|spent| reservation::spent(place, spent));
    }
    code
}

/// [`ask_until_served`], of a runtime.
fn ask_runtime_again(
    ask: impl Fn() -> cudaError,
    bytes: usize,
    runtime: &Runtime,
    device: Option<c_int>,
) -> (cudaError, Spent) {
    let forget = || {
        // SAFETY: takes nothing. The program is not to hear of the failure, in case the next attempt succeeds.
        let _ = unsafe { runtime.get_last_error() };
    };
    ask_until_served(ask, bytes, || known(device.or_else(|| current_device(runtime).ok())?), forget)
}

/// What of the reservation was made free for an allocation.
type Spent = Vec<(Device, u64)>;

/// Makes an allocation outside regions. Where memory is short, what paused regions hold until somebody needs it makes way on the `device`, then
/// what is reserved, and the original is asked again, after it was made to `forget` its error.
fn ask_until_served(
    ask: impl Fn() -> cudaError,
    bytes: usize,
    device: impl Fn() -> Option<Device>,
    forget: impl Fn(),
) -> (cudaError, Spent) {
    let (mut code, mut spent) = (ask(), Spent::new());
    while code == MEMORY_ALLOCATION && make_way(bytes, &device, &mut spent) {
        forget();
        code = ask();
    }
    (code, spent)
}

/// As [`ask_until_served`], of an allocation whose end is not followed: what it had of the reservation counts as missing there, until something else
/// comes back. To call it taken would be to say for ever that it is owned.
pub(super) fn ask_again(
    ask: impl Fn() -> cudaError,
    bytes: usize,
    device: impl Fn() -> Option<Device>,
    forget: impl Fn(),
) -> cudaError {
    let (code, spent) = ask_until_served(ask, bytes, device, forget);
    give_back_unless_taken(code, spent)
}

fn give_back_unless_taken(code: cudaError, spent: Spent) -> cudaError {
    if !spent.is_empty() {
        let _guard = Guard::enter();
        let ends = if code == SUCCESS { reservation::give_up } else { |spent| reservation::spent(ptr::null(), spent) };
        spent.into_iter().for_each(ends);
    }
    code
}

/// The device of this ordinal, which CUDA has named; None: it has named none.
pub(super) fn known(device: c_int) -> Option<Device> {
    u32::try_from(device).map(Device).ok()
}

fn make_way(bytes: usize, device: &dyn Fn() -> Option<Device>, spent: &mut Spent) -> bool {
    let Some(process) = process::started().filter(|_| !capture::in_progress()) else { return false };
    let Some(_guard) = Guard::enter() else { return false };
    let made = boundary::catch(|| {
        let Some(device) = device() else { return Ok(false) };
        // What is reserved for this process is there for all of it, also where no hook says what it takes.
        if process.engine.make_way(device, bytes as u64) {
            return Ok(true);
        }
        let freed = process.engine.stock_spend(device, bytes as u64);
        spent.extend((freed > 0).then_some((device, freed)));
        Ok(freed > 0)
    });
    made.unwrap_or(false)
}

pub(super) unsafe extern "C" fn malloc_async(
    out: *mut *mut c_void,
    bytes: usize,
    stream: *mut c_void,
    caller: usize,
) -> cudaError {
    // SAFETY: the program's own arguments, as it passed them.
    unsafe { in_order(out, bytes, stream, caller, |runtime| runtime.malloc_async(out, bytes, stream)) }
}

pub(super) unsafe extern "C" fn malloc_async_per_thread(
    out: *mut *mut c_void,
    bytes: usize,
    stream: *mut c_void,
    caller: usize,
) -> cudaError {
    // SAFETY: the program's own arguments, as it passed them.
    let ask = |runtime: &Runtime| unsafe { runtime.malloc_async_per_thread(out, bytes, stream) };
    // SAFETY: the program's own place for the result.
    unsafe { in_order(out, bytes, per_thread(stream), caller, ask) }
}

/// Serves an allocation in the order of a stream inside a region, else passes it on.
///
/// # Safety
/// `out` is NULL or the program's place for the result.
unsafe fn in_order(
    out: *mut *mut c_void,
    bytes: usize,
    stream: *mut c_void,
    caller: usize,
    ask: impl Fn(&Runtime) -> cudaError,
) -> cudaError {
    // SAFETY: the caller's promise.
    let served = unsafe { serve_on_current(out, bytes, stream, caller) };
    served.unwrap_or_else(|| pass_in_order(bytes, original::runtime(caller), None, ask))
}

/// Passes an allocation in the order of a stream on; `device`: None is the current one.
pub(super) fn pass_in_order(
    bytes: usize,
    runtime: &Runtime,
    device: Option<c_int>,
    ask: impl Fn(&Runtime) -> cudaError,
) -> cudaError {
    forwarded::RUNTIME.allocate.note();
    let (code, spent) = ask_runtime_again(|| ask(runtime), bytes, runtime, device);
    give_back_unless_taken(code, spent)
}

/// Serves an allocation on the current device inside a region; None: it is to be passed through.
///
/// # Safety
/// `out` is NULL or the program's place for the result.
unsafe fn serve_on_current(
    out: *mut *mut c_void,
    bytes: usize,
    stream: *mut c_void,
    caller: usize,
) -> Option<cudaError> {
    let device = || current_device(original::runtime(caller)).ok();
    // SAFETY: the caller's promise.
    unsafe { serve(out, bytes, &device, |region| allocate_in(region, bytes, stream, caller)) }
}

/// Serves an allocation on a device inside a region with `make`; None: it is to be passed through.
///
/// # Safety
/// `out` is NULL or the program's place for the result.
pub(super) unsafe fn serve(
    out: *mut *mut c_void,
    bytes: usize,
    device: &dyn Fn() -> Option<c_int>,
    make: impl FnOnce(RegionId) -> Result<Option<*mut c_void>>,
) -> Option<cudaError> {
    // What CUDA says about no bytes and about no place to put them, it shall say itself.
    if out.is_null() || bytes == 0 {
        return None;
    }
    let _guard = Guard::enter()?;
    let made = boundary::catch(|| match wanted(device)? {
        Some(region) => make(region),
        None => Ok(None),
    });
    match made {
        Ok(None) => None,
        Ok(Some(address)) => {
            // SAFETY: not NULL, and the program's own place for the result.
            unsafe { out.write_unaligned(address) };
            Some(SUCCESS)
        }
        // Disabled, or a forked child: as if Sire were not there.
        Err(error) if error.status == Status::Inactive => None,
        Err(error) => Some(report("an allocation", &error)),
    }
}

/// The region of this thread's next allocation on a device, if hooks serve regions here.
pub(super) fn wanted(device: &dyn Fn() -> Option<c_int>) -> Result<Option<RegionId>> {
    match region::current_on(device)? {
        None => Ok(None),
        Some(region) => Ok(config::get()?.hooks.then_some(region)),
    }
}

fn allocate_in(region: RegionId, bytes: usize, stream: *mut c_void, caller: usize) -> Result<Option<*mut c_void>> {
    let runtime = original::runtime(caller);
    allocate_on(current_device(runtime)?, region, bytes, stream, runtime)
}

/// Memory of a region on a device that the runtime knows; None: it is not for us to serve.
pub(super) fn allocate_on(
    device: c_int,
    region: RegionId,
    bytes: usize,
    stream: *mut c_void,
    runtime: &Runtime,
) -> Result<Option<*mut c_void>> {
    let process = process::get_with(&|name, version| runtime.driver_function(name, version))?;
    if is_recorded(process, device, stream) {
        return Ok(None);
    }
    if current_device(runtime)? == device {
        start_runtime(runtime, device);
    }
    if !context::is_waited_for(process) {
        return Ok(None);
    }
    allocate::in_region(process, region, device, bytes, stream).map(Some)
}

/// Whether an allocation in the order of `stream` is recorded there instead of made: a graph's own memory, which CUDA makes and frees with each
/// replay. What we gave would be freed when the program frees it, and the graph would go on writing there. The legacy default stream (NULL, or 1)
/// never captures; the per-thread one is the current device's.
pub(super) fn is_recorded(process: &Process, device: c_int, stream: *mut c_void) -> bool {
    const LEGACY: usize = 1;
    let device = context::device().unwrap_or(device);
    let asked = || process.driver.is_capturing(known(device)?, ProgramStream(stream as u64)).ok();
    stream as usize > LEGACY && capture::in_progress() && asked().unwrap_or(true)
}

pub(super) fn current_device(runtime: &Runtime) -> Result<c_int> {
    let mut device = 0;
    // SAFETY: writes one int.
    match unsafe { runtime.get_device(&raw mut device) } {
        SUCCESS => Ok(device),
        code => {
            Err(Error::new(Status::NoDriver, format!("the CUDA runtime does not know its device (cudaError {code})")))
        }
    }
}

/// Does what a real cudaMalloc would have done besides: create this device's context and make it this thread's. Once per thread
/// and device, and again after a reset; not during a capture, where the thread has one already.
fn start_runtime(runtime: &Runtime, device: c_int) {
    thread_local! {
        static STARTED: Cell<(u64, u64)> = const { Cell::new((0, 0)) };
    }
    let bit = 1u64.checked_shl(device.cast_unsigned()).unwrap_or(0);
    let resets = reset::count();
    STARTED.with(|started| {
        let devices = Some(started.get()).filter(|(_, then)| *then == resets).map_or(0, |(devices, _)| devices);
        if devices & bit == 0 && !capture::in_progress() {
            started.set((devices | bit, resets));
            // SAFETY: freeing NULL is documented to do nothing, and is the customary way to create the context.
            let _ = unsafe { runtime.free(ptr::null_mut()) };
        }
    });
}

// ---- free -----------------------------------------------------------------------------------------------------------

pub(super) unsafe extern "C" fn free(ptr: *mut c_void, caller: usize) -> cudaError {
    take_back(ptr).unwrap_or_else(|| {
        forwarded::RUNTIME.free.note_free(ptr.is_null());
        // SAFETY: the program's own argument, as it passed it.
        reservation::free(ptr, || unsafe { original::runtime(caller).free(ptr) })
    })
}

pub(super) unsafe extern "C" fn free_async(ptr: *mut c_void, stream: *mut c_void, caller: usize) -> cudaError {
    take_back(ptr).unwrap_or_else(|| {
        forwarded::RUNTIME.free.note();
        // SAFETY: the program's own arguments, as it passed them.
        reservation::free(ptr, || unsafe { original::runtime(caller).free_async(ptr, stream) })
    })
}

pub(super) unsafe extern "C" fn free_async_per_thread(
    ptr: *mut c_void,
    stream: *mut c_void,
    caller: usize,
) -> cudaError {
    take_back(ptr).unwrap_or_else(|| {
        forwarded::RUNTIME.free.note();
        // SAFETY: the program's own arguments, as it passed them.
        reservation::free(ptr, || unsafe { original::runtime(caller).free_async_per_thread(ptr, stream) })
    })
}

/// Frees what is ours; None: it is to be passed through.
pub(super) fn take_back(ptr: *mut c_void) -> Option<cudaError> {
    let process = owner(ptr)?;
    let _guard = Guard::enter()?;
    Some(match boundary::catch(|| allocate::free(process, ptr)) {
        Ok(()) => SUCCESS,
        // The driver is gone before the program's last frees: at exit that is normal, and callers expect this number.
        Err(error) if error.status == Status::NoDriver => cuda_error(Status::Inactive),
        Err(error) => report("a free", &error),
    })
}

/// The engine, if the pointer is its. Wait-free.
fn owner(ptr: *const c_void) -> Option<&'static Process> {
    if ptr.is_null() {
        return None;
    }
    process::started().filter(|process| allocate::owns(process, ptr))
}

/// Passes an allocation or a free of an *allocator function* (not a hook) on to whichever runtime is loaded.
pub(crate) fn pass_allocate(bytes: usize, caller: usize) -> *mut c_void {
    let mut out = ptr::null_mut();
    forwarded::RUNTIME.allocate.note_waiting();
    let runtime = original::runtime(caller);
    let place = &raw mut out;
    // SAFETY: writes one pointer.
    let code = unsafe { forward(place, bytes, runtime) };
    if code == SUCCESS { out } else { ptr::null_mut() }
}

/// See [`pass_allocate`].
pub(crate) fn pass_free(ptr: *mut c_void, caller: usize) -> cudaError {
    forwarded::RUNTIME.free.note_free(ptr.is_null());
    // SAFETY: the runtime checks the pointer itself.
    reservation::free(ptr, || unsafe { original::runtime(caller).free(ptr) })
}

// ---- the rest -------------------------------------------------------------------------------------------------------

pub(super) unsafe extern "C" fn mem_get_info(free: *mut usize, total: *mut usize, caller: usize) -> cudaError {
    // SAFETY: the program's own arguments, as it passed them.
    unsafe { original::runtime(caller).mem_get_info(free, total) }
}

pub(super) unsafe extern "C" fn enable_peer_access(owner: c_int, flags: c_uint, caller: usize) -> cudaError {
    let runtime = original::runtime(caller);
    // SAFETY: the program's own arguments, as it passed them.
    let code = unsafe { runtime.enable_peer_access(owner, flags) };
    if code == SUCCESS || code == PEER_ACCESS_ALREADY_ENABLED {
        of_this_device(runtime, owner, |owner, accessor| {
            peer::enable(owner, accessor, Way::Context(context::current()))
        });
    }
    code
}

pub(super) unsafe extern "C" fn disable_peer_access(owner: c_int, caller: usize) -> cudaError {
    let runtime = original::runtime(caller);
    // SAFETY: the program's own argument, as it passed it.
    let code = unsafe { runtime.disable_peer_access(owner) };
    if code == SUCCESS || code == PEER_ACCESS_NOT_ENABLED {
        of_this_device(runtime, owner, |owner, accessor| {
            peer::disable(owner, accessor, Way::Context(context::current()))
        });
    }
    code
}

/// What was said of the peer `owner` and this thread's device.
fn of_this_device(runtime: &Runtime, owner: c_int, note: impl FnOnce(u32, u32)) {
    let Some(_guard) = Guard::enter() else { return };
    let told = boundary::catch(|| {
        if let (Ok(owner), Ok(accessor)) = (u32::try_from(owner), u32::try_from(current_device(runtime)?)) {
            note(owner, accessor);
        }
        Ok(())
    });
    if let Err(error) = told {
        log::warning!("peer access to regions on device {owner} is unknown: {error}");
    }
}

// ---- errors ---------------------------------------------------------------------------------------------------------

/// The CUDA error that tells a program best what happened; also kept as this thread's last error.
pub(super) fn report(what: &str, error: &Error) -> cudaError {
    boundary::remember(error);
    match error.status {
        // PyTorch frees its cache and tries again: nothing worth a line.
        Status::OutOfDeviceMemory => log::info!("{what} failed: {error}"),
        _ => log::warning!("{what} failed: {error}"),
    }
    cuda_error(error.status)
}

fn cuda_error(status: Status) -> cudaError {
    match status {
        Status::Ok => SUCCESS,
        // cudaErrorInvalidValue
        Status::InvalidArgument | Status::UnknownTag | Status::UnknownAddress => 1,
        // cudaErrorMemoryAllocation
        Status::OutOfDeviceMemory | Status::OutOfBackupSpace => 2,
        // cudaErrorCudartUnloading
        Status::Inactive => 4,
        // cudaErrorNoDevice
        Status::NoDriver => 100,
        // cudaErrorIllegalAddress
        Status::DeviceLost => 700,
        // cudaErrorNotPermitted
        Status::Paused | Status::Busy | Status::Cancelled => 800,
        // cudaErrorNotSupported
        Status::Unsupported | Status::VersionMismatch => 801,
        // cudaErrorStreamCaptureUnsupported
        Status::Capturing => 900,
        // cudaErrorUnknown
        Status::BackupIo | Status::Driver | Status::PausedAfterFailure | Status::Internal => 999,
    }
}
