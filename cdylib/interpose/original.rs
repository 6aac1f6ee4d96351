//! The originals: the next definition of a function, as *its caller* would have reached it without us.
//!
//! `dlsym(RTLD_NEXT)` is not enough: it does not see a runtime that came in by an RTLD_LOCAL `dlopen`, and with two runtimes in
//! one process (.12 and .13) it finds the same one for everybody. So: return address -> the library that holds it -> that
//! library's own search order. The answer is kept per call site, in a table that is read without a lock and only grows.

use super::{cudaError, guard};
use crate::log;
use std::ffi::{CStr, c_char, c_int, c_uint, c_ulonglong, c_void};
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// The runtime does not have the function (`cudaErrorSharedObjectSymbolNotFound`).
const SYMBOL_NOT_FOUND: cudaError = 302;

/// Runtimes that a process may have loaded, newest first; the last place to look.
const RUNTIMES: [&CStr; 3] = [c"libcudart.so.13", c"libcudart.so.12", c"libcudart.so.11.0"];

macro_rules! originals {
    ($($field:ident = $name:literal ($($argument:ident: $type:ty),*);)*) => {
        /// One CUDA runtime, as one library reaches it.
        #[derive(Debug)]
        pub(crate) struct Runtime {
            $($field: Option<unsafe extern "C" fn($($type),*) -> cudaError>,)*
        }

        impl Runtime {
            /// No runtime at all: every call answers that the function is missing.
            const fn nothing() -> Runtime {
                Runtime { $($field: None),* }
            }

            fn find(search: &dyn Fn(&CStr) -> *mut c_void) -> Runtime {
                Runtime {$(
                    $field: {
                        let found = search($name);
                        // SAFETY: the address was found under the function's name; the signature is the runtime's.
                        // A null address becomes None.
                        unsafe {
                            std::mem::transmute::<*mut c_void, Option<unsafe extern "C" fn($($type),*) -> cudaError>>(found)
                        }
                    },
                )*}
            }

            $(
                /// The original function; `cudaErrorSharedObjectSymbolNotFound` if this runtime has none.
                ///
                /// # Safety
                /// As CUDA's function.
                pub(crate) unsafe fn $field(&self, $($argument: $type),*) -> cudaError {
                    match self.$field {
                        // SAFETY: the caller's promise.
                        Some(function) => unsafe { function($($argument),*) },
                        None => missing($name),
                    }
                }
            )*
        }
    };
}

originals! {
    malloc = c"cudaMalloc" (out: *mut *mut c_void, bytes: usize);
    free = c"cudaFree" (ptr: *mut c_void);
    malloc_async = c"cudaMallocAsync" (out: *mut *mut c_void, bytes: usize, stream: *mut c_void);
    malloc_async_per_thread = c"cudaMallocAsync_ptsz" (out: *mut *mut c_void, bytes: usize, stream: *mut c_void);
    malloc_from_pool = c"cudaMallocFromPoolAsync" (out: *mut *mut c_void, bytes: usize, pool: *mut c_void, stream: *mut c_void);
    malloc_from_pool_per_thread = c"cudaMallocFromPoolAsync_ptsz" (out: *mut *mut c_void, bytes: usize, pool: *mut c_void,
        stream: *mut c_void);
    free_async = c"cudaFreeAsync" (ptr: *mut c_void, stream: *mut c_void);
    free_async_per_thread = c"cudaFreeAsync_ptsz" (ptr: *mut c_void, stream: *mut c_void);
    mem_get_info = c"cudaMemGetInfo" (free: *mut usize, total: *mut usize);
    enable_peer_access = c"cudaDeviceEnablePeerAccess" (peer: c_int, flags: c_uint);
    disable_peer_access = c"cudaDeviceDisablePeerAccess" (peer: c_int);
    device_reset = c"cudaDeviceReset" ();
    create_pool = c"cudaMemPoolCreate" (out: *mut *mut c_void, properties: *const c_void);
    destroy_pool = c"cudaMemPoolDestroy" (pool: *mut c_void);
    set_pool_access = c"cudaMemPoolSetAccess" (pool: *mut c_void, access: *const c_void, count: usize);
    get_pool = c"cudaDeviceGetMemPool" (pool: *mut *mut c_void, device: c_int);
    get_default_pool = c"cudaDeviceGetDefaultMemPool" (pool: *mut *mut c_void, device: c_int);
    get_device_count = c"cudaGetDeviceCount" (count: *mut c_int);
    begin_capture = c"cudaStreamBeginCapture" (stream: *mut c_void, mode: c_int);
    begin_capture_per_thread = c"cudaStreamBeginCapture_ptsz" (stream: *mut c_void, mode: c_int);
    begin_capture_to_graph = c"cudaStreamBeginCaptureToGraph" (stream: *mut c_void, graph: *mut c_void,
        dependencies: *const *mut c_void, edges: *const c_void, count: usize, mode: c_int);
    begin_capture_to_graph_per_thread = c"cudaStreamBeginCaptureToGraph_ptsz" (stream: *mut c_void, graph: *mut c_void,
        dependencies: *const *mut c_void, edges: *const c_void, count: usize, mode: c_int);
    begin_recapture = c"cudaStreamBeginRecaptureToGraph" (stream: *mut c_void, mode: c_int, graph: *mut c_void,
        callback: *mut c_void);
    begin_recapture_per_thread = c"cudaStreamBeginRecaptureToGraph_ptsz" (stream: *mut c_void, mode: c_int, graph: *mut c_void,
        callback: *mut c_void);
    end_capture = c"cudaStreamEndCapture" (stream: *mut c_void, graph: *mut *mut c_void);
    end_capture_per_thread = c"cudaStreamEndCapture_ptsz" (stream: *mut c_void, graph: *mut *mut c_void);
    stream_destroy = c"cudaStreamDestroy" (stream: *mut c_void);
    driver_entry_point = c"cudaGetDriverEntryPoint" (symbol: *const c_char, out: *mut *mut c_void, flags: c_ulonglong,
        status: *mut c_int);
    driver_entry_point_per_thread = c"cudaGetDriverEntryPoint_ptsz" (symbol: *const c_char, out: *mut *mut c_void, flags: c_ulonglong,
        status: *mut c_int);
    driver_entry_point_by_version_per_thread = c"cudaGetDriverEntryPointByVersion_ptsz" (symbol: *const c_char, out: *mut *mut c_void,
        version: c_uint, flags: c_ulonglong, status: *mut c_int);
    driver_entry_point_by_version = c"cudaGetDriverEntryPointByVersion" (symbol: *const c_char, out: *mut *mut c_void,
        version: c_uint, flags: c_ulonglong, status: *mut c_int);
    ipc_get_mem_handle = c"cudaIpcGetMemHandle" (out: *mut c_void, ptr: *mut c_void);
    get_device = c"cudaGetDevice" (device: *mut c_int);
    get_last_error = c"cudaGetLastError" ();
}

impl Runtime {
    /// What this runtime says the driver's function is: the last place where the driver is looked for.
    pub(crate) fn driver_function(&self, name: &CStr, version: u32) -> *mut c_void {
        const DEFAULT_STREAM_AS_COMPILED: c_ulonglong = 0;
        let mut out = ptr::null_mut();
        let mut status = 0;
        // SAFETY: writes one pointer and one int; an unknown name is an error, not a fault.
        let code = guard::own_question(|| unsafe {
            if self.driver_entry_point_by_version.is_some() {
                self.driver_entry_point_by_version(
                    name.as_ptr(),
                    &raw mut out,
                    version.max(2000),
                    DEFAULT_STREAM_AS_COMPILED,
                    &raw mut status,
                )
            } else {
                self.driver_entry_point(name.as_ptr(), &raw mut out, DEFAULT_STREAM_AS_COMPILED, &raw mut status)
            }
        });
        if code == 0 && status == 0 { out } else { ptr::null_mut() }
    }
}

#[cold]
fn missing(name: &CStr) -> cudaError {
    log::error!("the program called {}, but no CUDA runtime that has it is loaded", name.to_string_lossy());
    SYMBOL_NOT_FOUND
}

// ---- from a return address to a runtime -----------------------------------------------------------------------------

/// A call site whose runtime is known.
struct Site {
    caller: usize,
    runtime: &'static Runtime,
}

const SITES: usize = 1024;
/// How many neighbours of its own place a call site may take.
const PROBES: usize = 16;

/// Open addressing; an entry, once written, stays. A full neighbourhood only makes that call site slower.
static TABLE: [AtomicPtr<Site>; SITES] = [const { AtomicPtr::new(ptr::null_mut()) }; SITES];

/// The runtime of the code at `caller`; 0: of whoever asks.
pub(crate) fn runtime(caller: usize) -> &'static Runtime {
    let first = (caller.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32) % SITES;
    for probe in 0..PROBES {
        let place = &TABLE[(first + probe) % SITES];
        let known = place.load(Ordering::Acquire);
        if known.is_null() {
            return remember(place, caller);
        }
        // SAFETY: entries are leaked boxes, published by a release store and never freed or changed.
        let site = unsafe { &*known };
        if site.caller == caller {
            return site.runtime;
        }
    }
    look_up(caller)
}

#[cold]
fn remember(place: &AtomicPtr<Site>, caller: usize) -> &'static Runtime {
    let runtime = look_up(caller);
    if runtime.malloc.is_none() {
        return runtime;
    }
    let site = Box::into_raw(Box::new(Site { caller, runtime }));
    if place.compare_exchange(ptr::null_mut(), site, Ordering::AcqRel, Ordering::Acquire).is_err() {
        // SAFETY: it was not published, so this is the only pointer to it. The site is remembered another time.
        drop(unsafe { Box::from_raw(site) });
    }
    runtime
}

/// One runtime per calling library, by the library's base address.
static LIBRARIES: Mutex<Vec<(usize, &'static Runtime)>> = Mutex::new(Vec::new());

fn look_up(caller: usize) -> &'static Runtime {
    let library = library_of(caller);
    let base = library.map_or(0, |library| library.dli_fbase as usize);
    let known = || {
        let libraries = LIBRARIES.lock().unwrap_or_else(PoisonError::into_inner);
        libraries.iter().find(|(other, _)| *other == base).map(|(_, runtime)| *runtime)
    };
    if let Some(runtime) = known() {
        return runtime;
    }
    // Searched without the lock: the loader has its own, and a library's constructor may be calling us.
    let own = open_again(library.as_ref());
    let found = Runtime::find(&|name| search(own, base, name));
    if found.malloc.is_none() {
        // Nothing yet; a runtime may still come, so this is not remembered.
        static NOTHING: Runtime = Runtime::nothing();
        return &NOTHING;
    }
    known().unwrap_or_else(|| {
        let runtime: &'static Runtime = Box::leak(Box::new(found));
        LIBRARIES.lock().unwrap_or_else(PoisonError::into_inner).push((base, runtime));
        runtime
    })
}

/// The library that holds an address.
fn library_of(address: usize) -> Option<libc::Dl_info> {
    let mut info = MaybeUninit::<libc::Dl_info>::zeroed();
    // SAFETY: dladdr takes any address and fills the struct if it knows it.
    let found = unsafe { libc::dladdr(ptr::without_provenance(address), info.as_mut_ptr()) } != 0;
    // SAFETY: the struct was zeroed, and all-zero is a valid value of it.
    found.then(|| unsafe { info.assume_init() })
}

/// A handle of a library that is loaded already. Kept for good: the functions found through it must stay.
fn open_again(library: Option<&libc::Dl_info>) -> *mut c_void {
    match library {
        Some(library) if !library.dli_fname.is_null() => {
            // SAFETY: the name is the loader's own; RTLD_NOLOAD loads nothing and runs nothing.
            unsafe { libc::dlopen(library.dli_fname, libc::RTLD_NOW | libc::RTLD_NOLOAD) }
        }
        _ => ptr::null_mut(),
    }
}

/// What code of the `caller`'s library would have reached without us. Another interposer behind us comes first: the global order does. Then the
/// runtime that the library links, then the one in the global order, then any that is loaded.
fn search(own: *mut c_void, base: usize, name: &CStr) -> *mut c_void {
    let find = |handle: *mut c_void| {
        // SAFETY: the handle is open, or the loader's for "the next definition after this library".
        let found = unsafe { libc::dlsym(handle, name.as_ptr()) };
        is_foreign(found).then_some(found)
    };
    let next = find(libc::RTLD_NEXT);
    let interposed = next.filter(|next| !is_runtime(*next));
    // An interposer before us that calls on is not its own next.
    let linked = || if own.is_null() { None } else { find(own).filter(|found| base_of(*found as usize) != base) };
    let any = || RUNTIMES.iter().map(|runtime| loaded(runtime)).filter(|handle| !handle.is_null()).find_map(find);
    interposed.or_else(linked).or(next).or_else(any).unwrap_or(ptr::null_mut())
}

/// Whether an address is in a CUDA runtime: it has what nobody has a reason to interpose.
fn is_runtime(address: *mut c_void) -> bool {
    let library = open_library_of(address as usize);
    // SAFETY: the handle is open.
    let found = if library.is_null() { library } else { unsafe { libc::dlsym(library, c"cudaGetLastError".as_ptr()) } };
    !found.is_null() && base_of(found as usize) == base_of(address as usize)
}

/// A handle of a library that is loaded under this name, or null. Kept for good, as above.
pub(super) fn loaded(name: &CStr) -> *mut c_void {
    // SAFETY: RTLD_NOLOAD loads nothing and runs nothing.
    unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_NOLOAD) }
}

/// A handle of the library that holds an address, or null. Kept for good, as above.
pub(super) fn open_library_of(address: usize) -> *mut c_void {
    open_again(library_of(address).as_ref())
}

/// The path of the library that holds an address, as the loader has it.
pub(super) fn path_of(address: usize) -> Option<&'static CStr> {
    let library = library_of(address).filter(|library| !library.dli_fname.is_null())?;
    // SAFETY: the name is the loader's, NUL-terminated, and stays as long as the library; whoever calls us does not go meanwhile.
    Some(unsafe { CStr::from_ptr(library.dli_fname) })
}

/// Whether an address is there and not in this very library. (The main program's search order begins with what is preloaded.)
fn is_foreign(address: *mut c_void) -> bool {
    !address.is_null() && base_of(address as usize) != own_base()
}

/// Where the library that holds an address is loaded; 0: nobody's.
pub(super) fn base_of(address: usize) -> usize {
    library_of(address).map_or(0, |library| library.dli_fbase as usize)
}

/// Where this library is loaded.
pub(super) fn own_base() -> usize {
    static BASE: AtomicUsize = AtomicUsize::new(0);
    let known = BASE.load(Ordering::Relaxed);
    if known != 0 {
        return known;
    }
    let base = base_of(own_base as *const () as usize);
    BASE.store(base, Ordering::Relaxed);
    base
}

/// Whether the address belongs to this library.
pub(super) fn is_ours(address: *mut c_void) -> bool {
    !address.is_null() && !is_foreign(address)
}
