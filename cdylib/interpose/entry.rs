//! The driver's functions that Sire answers with its own when a program looks them up through its CUDA runtime, and the originals that they
//! pass calls on to: one table, by exact name. PyTorch reaches virtual memory only this way. A name that is not here, that the runtime
//! does not know, or that is asked for in a version with other arguments, is left as the runtime answered it.

use super::segments;
use std::ffi::{CStr, c_int, c_uint, c_ulonglong, c_void};
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

struct Answer {
    name: &'static CStr,
    /// The first version of the driver's interface that has these arguments, and the first that has others.
    versions: [c_uint; 2],
    ours: *const c_void,
    original: &'static AtomicPtr<c_void>,
}

macro_rules! answers {
    ($($ours:ident = $name:literal $versions:tt ($($argument:ident: $type:ty),* $(,)?);)*) => {
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

        /// What is answered under a name.
        fn answer(name: &CStr) -> Option<Answer> {
            $(
                if name == $name {
                    let ours: unsafe extern "C" fn($($type),*) -> Code = segments::$ours;
                    let ours = ours as *const c_void;
                    return Some(Answer { name: $name, versions: $versions, ours, original: &slots::$ours });
                }
            )*
            None
        }
    };
}

answers! {
    reserve = c"cuMemAddressReserve" [10_020, 99_999] (out: *mut u64, size: usize, align: usize, wanted: u64, flags: c_ulonglong);
    unreserve = c"cuMemAddressFree" [10_020, 99_999] (addr: u64, size: usize);
    create = c"cuMemCreate" [10_020, 99_999] (out: *mut u64, size: usize, properties: *const MemoryProperties, flags: c_ulonglong);
    release = c"cuMemRelease" [10_020, 99_999] (handle: u64);
    map = c"cuMemMap" [10_020, 99_999] (addr: u64, size: usize, offset: usize, handle: u64, flags: c_ulonglong);
    unmap = c"cuMemUnmap" [10_020, 99_999] (addr: u64, size: usize);
    set_access = c"cuMemSetAccess" [10_020, 99_999] (addr: u64, size: usize, access: *const AccessDescription, count: usize);
    retain = c"cuMemRetainAllocationHandle" [11_000, 99_999] (out: *mut u64, addr: *mut c_void);
    properties = c"cuMemGetAllocationPropertiesFromHandle" [10_020, 99_999] (out: *mut MemoryProperties, handle: u64);
    export = c"cuMemExportToShareableHandle" [10_020, 99_999] (out: *mut c_void, handle: u64, kind: c_int, flags: c_ulonglong);
    address_range = c"cuMemGetAddressRange" [3_020, 99_999] (base: *mut u64, size: *mut usize, addr: u64);
    bind_memory = c"cuMulticastBindMem" [12_010, 13_010] (group: u64, at: usize, handle: u64, offset: usize, size: usize, flags: c_ulonglong);
    bind_address = c"cuMulticastBindAddr" [12_010, 13_010] (group: u64, at: usize, addr: u64, size: usize, flags: c_ulonglong);
}

/// What the program gets for `name`, where the runtime answered `found`.
pub(super) fn replace(name: &CStr, version: c_uint, found: *mut c_void) -> *mut c_void {
    let Some(answer) = answer(name) else { return found };
    let [first, beyond] = answer.versions;
    // The runtime has judged whether it knows the name in an older version; such a function has the arguments of the first.
    if found.is_null() || version.max(first) >= beyond {
        return found;
    }
    debug_assert!(answer.name == name);
    let _ = answer.original.compare_exchange(ptr::null_mut(), found, Ordering::AcqRel, Ordering::Acquire);
    answer.ours.cast_mut()
}
