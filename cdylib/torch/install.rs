//! Tells PyTorch what else to call. `change_current_allocator` hands over two functions, malloc and free; what a caching allocator needs besides (who else
//! uses a block, which allocations a graph captures, when to empty the cache) PyTorch takes in C++. So the first allocation finds
//! PyTorch's allocator object and sets them there, by the functions that libtorch_cuda exports for it, the same in all releases since 2.9.
//!
//! Where they are not found, nobody would tell us which streams use a block: then freed memory waits for the whole device.

use super::function::{Callee, Function};
use super::library::Library;
use super::{
    sire_torch_base_allocation, sire_torch_begin_allocate_to_pool, sire_torch_end_allocate_to_pool, sire_torch_pool_id,
    sire_torch_record_stream, sire_torch_release_pool, sire_torch_reset, sire_torch_set_memory_fraction,
};
use crate::log;
use std::ffi::{CStr, c_int, c_void};
use std::mem::MaybeUninit;
use std::sync::OnceLock;

/// Whether PyTorch tells us which streams use a block, so that stream order alone says when it can be given out again.
#[inline]
pub(super) fn is_told() -> bool {
    static TOLD: OnceLock<bool> = OnceLock::new();
    *TOLD.get_or_init(|| {
        let Some(library) = Library::loaded(c"libtorch_cuda.so") else { return false };
        let told = install(library).is_some();
        if !told {
            log::warning!(
                "PyTorch's setters for a pluggable allocator were not found: memory that is freed waits for the whole device before \
                 it is used again, and graphs have no private memory. Sire knows them in torch 2.9 and newer"
            );
        }
        told
    })
}

macro_rules! in_namespace {
    ($name:literal) => {
        concat!("_ZN5torch4cuda22CUDAPluggableAllocator", $name, "\0")
    };
}

/// Where each of our functions goes.
const SETTERS: [(&str, *const c_void); 7] = [
    (in_namespace!("22CUDAPluggableAllocator12set_reset_fnESt8functionIFvvEE"), reset as *const c_void),
    (
        in_namespace!("22CUDAPluggableAllocator22set_memory_fraction_fnESt8functionIFvdiEE"),
        set_memory_fraction as *const c_void,
    ),
    (
        in_namespace!("22CUDAPluggableAllocator17set_base_alloc_fnESt8functionIFPvS4_PmEE"),
        base_allocation as *const c_void,
    ),
    (
        in_namespace!("22CUDAPluggableAllocator20set_record_stream_fnESt8functionIFvPvP11CUstream_stEE"),
        record_stream as *const c_void,
    ),
    (
        in_namespace!(
            "22CUDAPluggableAllocator26set_begin_allocate_to_poolESt8functionIFviSt4pairIyyES3_IFbP11CUstream_stEEEE"
        ),
        begin_allocate_to_pool as *const c_void,
    ),
    (
        in_namespace!("22CUDAPluggableAllocator27set_end_allocate_to_pool_fnESt8functionIFviSt4pairIyyEEE"),
        end_allocate_to_pool as *const c_void,
    ),
    (
        in_namespace!("22CUDAPluggableAllocator16set_release_poolESt8functionIFviSt4pairIyyEEE"),
        release_pool as *const c_void,
    ),
];

fn install(library: Library) -> Option<()> {
    let allocator = library.current_allocator()?;
    let setters: Option<Vec<_>> = SETTERS.iter().map(|(name, ours)| Some((library.mangled(name)?, *ours))).collect();
    for (setter, ours) in setters? {
        type Set = unsafe extern "C-unwind" fn(*mut c_void, *mut Function);
        let mut function = Function::of(ours);
        // SAFETY: the mangled name spells this signature: a member that takes a std::function, which has a destructor and so is passed by
        // reference to the caller's own. The setter moves from it or copies it; ours holds nothing to be destroyed.
        unsafe { std::mem::transmute::<*mut c_void, Set>(setter)(allocator, &raw mut function) };
    }
    Some(())
}

impl Library {
    /// `name` ends with a NUL.
    fn mangled(self, name: &str) -> Option<*mut c_void> {
        self.symbol(CStr::from_bytes_with_nul(name.as_bytes()).ok()?)
    }

    /// The object behind `change_current_allocator`, if it is of PyTorch's own class.
    fn current_allocator(self) -> Option<*mut c_void> {
        /// `std::shared_ptr`: the object, and who counts.
        #[repr(C)]
        struct Shared(*mut *mut c_void, *mut c_void);
        /// Returned as C++ returns a shared_ptr, which has a destructor: to memory of the caller's, whose address is where the ABI passes that of a
        /// large result (x86-64: the hidden first argument; AArch64: x8). So it is declared larger than what registers return.
        #[repr(C)]
        struct Returned(Shared, MaybeUninit<[usize; 2]>);
        type Get = unsafe extern "C-unwind" fn() -> Returned;
        let get = self.mangled(in_namespace!("19getCurrentAllocatorEv"))?;
        // SAFETY: the function writes the shared_ptr to the start of the result, and nothing behind it, which nobody reads. The reference is never
        // given back: the allocator lives as long as the process.
        let Returned(shared, _) = unsafe { std::mem::transmute::<*mut c_void, Get>(get)() };
        let table = self.mangled("_ZTVN5torch4cuda22CUDAPluggableAllocator22CUDAPluggableAllocatorE\0")?;
        // SAFETY: an object with virtual functions begins with a pointer behind the two-word head of its class's table.
        let is_pluggable =
            !shared.0.is_null() && unsafe { *shared.0 == table.cast::<*mut c_void>().add(2).cast::<c_void>() };
        is_pluggable.then_some(shared.0.cast())
    }
}

// ---- what PyTorch calls: every argument by reference ----------------------------------------------------------------------------

unsafe extern "C-unwind" fn reset(_: *const Callee) {
    sire_torch_reset();
}

unsafe extern "C-unwind" fn set_memory_fraction(_: *const Callee, fraction: *const f64, device: *const c_int) {
    // SAFETY: libstdc++ passes references to the arguments.
    unsafe { sire_torch_set_memory_fraction(*fraction, *device) }
}

unsafe extern "C-unwind" fn base_allocation(
    _: *const Callee,
    ptr: *const *mut c_void,
    size: *const *mut usize,
) -> *mut c_void {
    // SAFETY: as above; PyTorch's `size` is NULL or writable.
    unsafe { sire_torch_base_allocation(*ptr, *size) }
}

unsafe extern "C-unwind" fn record_stream(_: *const Callee, ptr: *const *mut c_void, stream: *const *mut c_void) {
    // SAFETY: as above.
    unsafe { sire_torch_record_stream(*ptr, *stream) }
}

unsafe extern "C-unwind" fn begin_allocate_to_pool(
    _: *const Callee,
    device: *const c_int,
    pool: *const sire_torch_pool_id,
    filter: *const c_void,
) {
    // SAFETY: as above; the filter is a std::function that lives until we return.
    unsafe { sire_torch_begin_allocate_to_pool(*device, *pool, filter) }
}

unsafe extern "C-unwind" fn end_allocate_to_pool(
    _: *const Callee,
    device: *const c_int,
    pool: *const sire_torch_pool_id,
) {
    // SAFETY: as above.
    unsafe { sire_torch_end_allocate_to_pool(*device, *pool) }
}

unsafe extern "C-unwind" fn release_pool(_: *const Callee, device: *const c_int, pool: *const sire_torch_pool_id) {
    // SAFETY: as above.
    unsafe { sire_torch_release_pool(*device, *pool) }
}
