//! The driver's functions that Sire answers with its own when a program looks them up, and the originals that they pass calls on to: one
//! table, by exact name. Those for virtual memory are answered to who asks a CUDA runtime, which is PyTorch's way; all of them to who is heard
//! at driver level ([`lookup`]). A name that is not here, that nobody knows, or that is asked for in a version with other arguments, is left
//! as it was found.

use super::{ipc, linear, lookup, pool, reset, segments, streams};
use std::ffi::{CStr, c_char, c_int, c_uint, c_ulonglong, c_void};
use std::mem::offset_of;
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

/// A `CUresult`.
pub(super) type Code = c_int;

/// The driver was found to have no such function (`CUDA_ERROR_NOT_FOUND`).
const NOT_FOUND: Code = 500;

/// What is asked for without a version comes in the version of a CUDA 12 runtime: later ones have no such question.
pub(super) const UNVERSIONED: c_uint = 12_000;

/// `CUmemLocation`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Location {
    pub(super) kind: c_int,
    pub(super) id: c_int,
}

/// `CUmemAllocationProp`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct MemoryProperties {
    pub(super) kind: c_int,
    pub(super) shareable: c_int,
    pub(super) location: Location,
    pub(super) win32: *mut c_void,
    pub(super) compression: u8,
    pub(super) rdma: u8,
    pub(super) usage: u16,
    pub(super) reserved: [u8; 4],
}

/// `CUmemAccessDesc`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct AccessDescription {
    pub(super) location: Location,
    pub(super) flags: c_int,
}

const _: () = assert!(size_of::<MemoryProperties>() == 32 && offset_of!(MemoryProperties, rdma) == 25);
const _: () = assert!(size_of::<AccessDescription>() == 12);

/// `CUmemPoolProps`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct PoolProperties {
    pub(super) kind: c_int,
    pub(super) shareable: c_int,
    pub(super) location: Location,
    pub(super) rest: [u64; 9],
}

const _: () = assert!(size_of::<PoolProperties>() == 88);

/// `CU_GET_PROC_ADDRESS_PER_THREAD_DEFAULT_STREAM`.
const PER_THREAD: c_ulonglong = 2;

/// To whom a function is answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum To {
    /// Who asks a CUDA runtime, too.
    Everybody,
    /// Who is heard at driver level.
    Driver,
    /// The same, for stream 0 as the legacy stream.
    Legacy,
    /// The same, for stream 0 as the thread's own.
    PerThread,
}

impl To {
    fn has(self, flags: c_ulonglong) -> bool {
        match self {
            To::Everybody | To::Driver => true,
            To::Legacy => flags & PER_THREAD == 0,
            To::PerThread => flags & PER_THREAD != 0,
        }
    }
}

struct Answer {
    /// Without the suffix that tells variants apart, as `cuGetProcAddress` wants it.
    base: &'static CStr,
    /// As the driver exports it.
    exported: &'static CStr,
    to: To,
    /// The first version of the driver's interface that has these arguments, and the first that has others.
    versions: [c_uint; 2],
    ours: *const c_void,
    original: &'static AtomicPtr<c_void>,
}

// SAFETY: the address is that of a function.
unsafe impl Sync for Answer {}

macro_rules! answers {
    ($($module:ident::$ours:ident = $base:literal as $exported:literal to $to:ident $versions:tt ($($argument:ident: $type:ty),* $(,)?);)*) => {
        /// The driver's own functions, as the program would have found them.
        pub(super) mod original {
            use super::*;
            $(
                /// The driver's function.
                ///
                /// # Safety
                /// As CUDA's function of this name.
                pub(in super::super) unsafe fn $ours($($argument: $type),*) -> Code {
                    let found = slots::$ours.load(Ordering::Acquire);
                    if found.is_null() {
                        return NOT_FOUND;
                    }
                    // SAFETY: the runtime gave the address for this name, in a version with these arguments.
                    let function = unsafe {
                        std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($type),*) -> Code>(found)
                    };
                    // SAFETY: the caller's promise.
                    unsafe { function($($argument),*) }
                }
            )*
        }

        #[allow(non_upper_case_globals, reason = "named like the functions")]
        mod slots {
            use super::*;
            $(pub(super) static $ours: AtomicPtr<c_void> = AtomicPtr::new(ptr::null_mut());)*
        }

        static ANSWERS: &[Answer] = &[$({
            let ours: unsafe extern "C" fn($($type),*) -> Code = $module::$ours;
            Answer {
                base: $base,
                exported: $exported,
                to: To::$to,
                versions: $versions,
                ours: ours as *const c_void,
                original: &slots::$ours,
            }
        }),*];
    };
}

answers! {
    segments::reserve = c"cuMemAddressReserve" as c"cuMemAddressReserve" to Everybody [10_020, 99_999]
        (out: *mut u64, size: usize, align: usize, wanted: u64, flags: c_ulonglong);
    segments::unreserve = c"cuMemAddressFree" as c"cuMemAddressFree" to Everybody [10_020, 99_999] (addr: u64, size: usize);
    segments::create = c"cuMemCreate" as c"cuMemCreate" to Everybody [10_020, 99_999]
        (out: *mut u64, size: usize, properties: *const MemoryProperties, flags: c_ulonglong);
    segments::release = c"cuMemRelease" as c"cuMemRelease" to Everybody [10_020, 99_999] (handle: u64);
    segments::map = c"cuMemMap" as c"cuMemMap" to Everybody [10_020, 99_999]
        (addr: u64, size: usize, offset: usize, handle: u64, flags: c_ulonglong);
    segments::unmap = c"cuMemUnmap" as c"cuMemUnmap" to Everybody [10_020, 99_999] (addr: u64, size: usize);
    segments::set_access = c"cuMemSetAccess" as c"cuMemSetAccess" to Everybody [10_020, 99_999]
        (addr: u64, size: usize, access: *const AccessDescription, count: usize);
    segments::retain = c"cuMemRetainAllocationHandle" as c"cuMemRetainAllocationHandle" to Everybody [11_000, 99_999]
        (out: *mut u64, addr: *mut c_void);
    segments::properties = c"cuMemGetAllocationPropertiesFromHandle" as c"cuMemGetAllocationPropertiesFromHandle" to Everybody
        [10_020, 99_999] (out: *mut MemoryProperties, handle: u64);
    segments::export = c"cuMemExportToShareableHandle" as c"cuMemExportToShareableHandle" to Everybody [10_020, 99_999]
        (out: *mut c_void, handle: u64, kind: c_int, flags: c_ulonglong);
    segments::address_range = c"cuMemGetAddressRange" as c"cuMemGetAddressRange_v2" to Everybody [3_020, 99_999]
        (base: *mut u64, size: *mut usize, addr: u64);
    segments::bind_memory = c"cuMulticastBindMem" as c"cuMulticastBindMem" to Everybody [12_010, 13_010]
        (group: u64, at: usize, handle: u64, offset: usize, size: usize, flags: c_ulonglong);
    segments::bind_address = c"cuMulticastBindAddr" as c"cuMulticastBindAddr" to Everybody [12_010, 13_010]
        (group: u64, at: usize, addr: u64, size: usize, flags: c_ulonglong);
    segments::bind_memory_of_device = c"cuMulticastBindMem" as c"cuMulticastBindMem_v2" to Everybody [13_010, 99_999]
        (group: u64, device: c_int, at: usize, handle: u64, offset: usize, size: usize, flags: c_ulonglong);
    segments::bind_address_of_device = c"cuMulticastBindAddr" as c"cuMulticastBindAddr_v2" to Everybody [13_010, 99_999]
        (group: u64, device: c_int, at: usize, addr: u64, size: usize, flags: c_ulonglong);
    segments::range_handle = c"cuMemGetHandleForAddressRange" as c"cuMemGetHandleForAddressRange" to Everybody [11_070, 99_999]
        (out: *mut c_void, addr: u64, size: usize, kind: c_int, flags: c_ulonglong);

    lookup::proc_address = c"cuGetProcAddress" as c"cuGetProcAddress" to Driver [11_030, 12_000]
        (name: *const c_char, out: *mut *mut c_void, version: c_int, flags: c_ulonglong);
    lookup::proc_address_with_status = c"cuGetProcAddress" as c"cuGetProcAddress_v2" to Driver [12_000, 99_999]
        (name: *const c_char, out: *mut *mut c_void, version: c_int, flags: c_ulonglong, status: *mut c_int);
    linear::alloc = c"cuMemAlloc" as c"cuMemAlloc_v2" to Driver [3_020, 99_999] (out: *mut u64, bytes: usize);
    linear::alloc_pitch = c"cuMemAllocPitch" as c"cuMemAllocPitch_v2" to Driver [3_020, 99_999]
        (out: *mut u64, pitch: *mut usize, width: usize, height: usize, element: c_uint);
    linear::alloc_managed = c"cuMemAllocManaged" as c"cuMemAllocManaged" to Driver [6_000, 99_999]
        (out: *mut u64, bytes: usize, flags: c_uint);
    linear::free = c"cuMemFree" as c"cuMemFree_v2" to Driver [3_020, 99_999] (ptr: u64);
    linear::alloc_async = c"cuMemAllocAsync" as c"cuMemAllocAsync" to Legacy [11_020, 99_999]
        (out: *mut u64, bytes: usize, stream: *mut c_void);
    linear::alloc_async_per_thread = c"cuMemAllocAsync" as c"cuMemAllocAsync_ptsz" to PerThread [11_020, 99_999]
        (out: *mut u64, bytes: usize, stream: *mut c_void);
    linear::free_async = c"cuMemFreeAsync" as c"cuMemFreeAsync" to Legacy [11_020, 99_999] (ptr: u64, stream: *mut c_void);
    linear::free_async_per_thread = c"cuMemFreeAsync" as c"cuMemFreeAsync_ptsz" to PerThread [11_020, 99_999]
        (ptr: u64, stream: *mut c_void);
    pool::alloc_from_pool = c"cuMemAllocFromPoolAsync" as c"cuMemAllocFromPoolAsync" to Legacy [11_020, 99_999]
        (out: *mut u64, bytes: usize, pool: *mut c_void, stream: *mut c_void);
    pool::alloc_from_pool_per_thread = c"cuMemAllocFromPoolAsync" as c"cuMemAllocFromPoolAsync_ptsz" to PerThread [11_020, 99_999]
        (out: *mut u64, bytes: usize, pool: *mut c_void, stream: *mut c_void);
    pool::pool_create = c"cuMemPoolCreate" as c"cuMemPoolCreate" to Driver [11_020, 99_999]
        (out: *mut *mut c_void, properties: *const PoolProperties);
    pool::pool_destroy = c"cuMemPoolDestroy" as c"cuMemPoolDestroy" to Driver [11_020, 99_999] (pool: *mut c_void);
    pool::default_pool = c"cuDeviceGetDefaultMemPool" as c"cuDeviceGetDefaultMemPool" to Driver [11_020, 99_999]
        (out: *mut *mut c_void, device: c_int);
    pool::pool_set_access = c"cuMemPoolSetAccess" as c"cuMemPoolSetAccess" to Driver [11_020, 99_999]
        (pool: *mut c_void, access: *const AccessDescription, count: usize);
    ipc::get_mem_handle = c"cuIpcGetMemHandle" as c"cuIpcGetMemHandle" to Driver [4_010, 99_999] (out: *mut c_void, ptr: u64);
    reset::primary_context_before_11 = c"cuDevicePrimaryCtxReset" as c"cuDevicePrimaryCtxReset" to Driver [7_000, 11_000] (device: c_int);
    reset::primary_context = c"cuDevicePrimaryCtxReset" as c"cuDevicePrimaryCtxReset_v2" to Driver [11_000, 99_999] (device: c_int);
    streams::begin_capture = c"cuStreamBeginCapture" as c"cuStreamBeginCapture_v2" to Legacy [10_010, 99_999]
        (stream: *mut c_void, mode: c_int);
    streams::begin_capture_per_thread = c"cuStreamBeginCapture" as c"cuStreamBeginCapture_v2_ptsz" to PerThread [10_010, 99_999]
        (stream: *mut c_void, mode: c_int);
    streams::begin_capture_to_graph = c"cuStreamBeginCaptureToGraph" as c"cuStreamBeginCaptureToGraph" to Legacy [12_030, 99_999]
        (stream: *mut c_void, graph: *mut c_void, dependencies: *const *mut c_void, edges: *const c_void, count: usize, mode: c_int);
    streams::begin_capture_to_graph_per_thread = c"cuStreamBeginCaptureToGraph" as c"cuStreamBeginCaptureToGraph_ptsz" to PerThread
        [12_030, 99_999]
        (stream: *mut c_void, graph: *mut c_void, dependencies: *const *mut c_void, edges: *const c_void, count: usize, mode: c_int);
    streams::begin_recapture = c"cuStreamBeginRecaptureToGraph" as c"cuStreamBeginRecaptureToGraph" to Legacy [13_030, 99_999]
        (stream: *mut c_void, mode: c_int, graph: *mut c_void, callback: *mut c_void, data: *mut c_void);
    streams::begin_recapture_per_thread = c"cuStreamBeginRecaptureToGraph" as c"cuStreamBeginRecaptureToGraph_ptsz" to PerThread
        [13_030, 99_999]
        (stream: *mut c_void, mode: c_int, graph: *mut c_void, callback: *mut c_void, data: *mut c_void);
    streams::end_capture = c"cuStreamEndCapture" as c"cuStreamEndCapture" to Legacy [10_000, 99_999]
        (stream: *mut c_void, graph: *mut *mut c_void);
    streams::end_capture_per_thread = c"cuStreamEndCapture" as c"cuStreamEndCapture_ptsz" to PerThread [10_000, 99_999]
        (stream: *mut c_void, graph: *mut *mut c_void);
    streams::stream_destroy = c"cuStreamDestroy" as c"cuStreamDestroy_v2" to Driver [4_000, 99_999] (stream: *mut c_void);
    streams::enable_peer_access = c"cuCtxEnablePeerAccess" as c"cuCtxEnablePeerAccess" to Driver [4_000, 99_999]
        (peer: *mut c_void, flags: c_uint);
    streams::disable_peer_access = c"cuCtxDisablePeerAccess" as c"cuCtxDisablePeerAccess" to Driver [4_000, 99_999]
        (peer: *mut c_void);
}

/// How a program asks.
pub(super) enum Question<'a> {
    /// A CUDA runtime, or `cuGetProcAddress`: for the function of this name in this version.
    Versioned(&'a CStr, c_uint, c_ulonglong),
    /// By the very name that the driver exports.
    Exported(&'a CStr),
}

impl Question<'_> {
    fn is_for(&self, answer: &Answer) -> bool {
        match self {
            Question::Exported(name) => answer.exported == *name,
            Question::Versioned(name, version, flags) => {
                let [first, beyond] = answer.versions;
                answer.base == *name && answer.to.has(*flags) && (first..beyond).contains(version)
            }
        }
    }
}

/// What the program gets where `found` was found; `all`: it is heard at driver level.
pub(super) fn replace(question: &Question<'_>, found: *mut c_void, all: bool) -> *mut c_void {
    match answer(question, found, all) {
        Some(answer) => {
            let _ = answer.original.compare_exchange(ptr::null_mut(), found, Ordering::AcqRel, Ordering::Acquire);
            answer.ours.cast_mut()
        }
        None => found,
    }
}

/// The same where `found` is the next definition in the order of loading. It may be another interposer's, and then it is the one that
/// wants to hear of every call, whichever way the call was found.
pub(super) fn replace_next(name: &CStr, found: *mut c_void) -> *mut c_void {
    match answer(&Question::Exported(name), found, true) {
        Some(answer) => {
            answer.original.store(found, Ordering::Release);
            answer.ours.cast_mut()
        }
        None => found,
    }
}

/// Whether functions of the table are asked for by this name and a version. What is none of them then is one with other arguments.
pub(super) fn has_versions(name: &CStr) -> bool {
    ANSWERS.iter().any(|answer| answer.base == name)
}

/// Some function of the driver's; null before one was answered.
pub(super) fn any_original() -> *mut c_void {
    let originals = ANSWERS.iter().map(|answer| answer.original.load(Ordering::Acquire));
    originals.into_iter().find(|original| !original.is_null()).unwrap_or(ptr::null_mut())
}

fn answer(question: &Question<'_>, found: *mut c_void, all: bool) -> Option<&'static Answer> {
    let answer = ANSWERS.iter().find(|answer| (all || answer.to == To::Everybody) && question.is_for(answer))?;
    // What is ours has an original already; to be one's own would be to call oneself for ever.
    (!found.is_null() && !lookup::is_replaced(found)).then_some(answer)
}
