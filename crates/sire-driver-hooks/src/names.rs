//! The driver's functions that programs find somewhere else than in the driver: one table of exact names, as the driver exports them.
//! A name that is not here (another version of a function, a library's own `cu…`) is never touched.

use std::ffi::CStr;

/// One exported function per line; [`EXPORTED`] has the same names in the same order.
macro_rules! driver_functions {
    ($do:ident) => {
        $do! {
            cuCtxDisablePeerAccess
            cuCtxEnablePeerAccess
            cuDeviceGetDefaultMemPool
            cuDevicePrimaryCtxReset
            cuDevicePrimaryCtxReset_v2
            cuGetProcAddress
            cuGetProcAddress_v2
            cuIpcGetMemHandle
            cuMemAddressFree
            cuMemAddressReserve
            cuMemAllocAsync
            cuMemAllocAsync_ptsz
            cuMemAllocFromPoolAsync
            cuMemAllocFromPoolAsync_ptsz
            cuMemAllocManaged
            cuMemAllocPitch_v2
            cuMemAlloc_v2
            cuMemCreate
            cuMemExportToShareableHandle
            cuMemFreeAsync
            cuMemFreeAsync_ptsz
            cuMemFree_v2
            cuMemGetAddressRange_v2
            cuMemGetAllocationPropertiesFromHandle
            cuMemGetHandleForAddressRange
            cuMemMap
            cuMemPoolCreate
            cuMemPoolDestroy
            cuMemPoolSetAccess
            cuMemRelease
            cuMemRetainAllocationHandle
            cuMemSetAccess
            cuMemUnmap
            cuMulticastBindAddr
            cuMulticastBindAddr_v2
            cuMulticastBindMem
            cuMulticastBindMem_v2
            cuStreamBeginCaptureToGraph
            cuStreamBeginCaptureToGraph_ptsz
            cuStreamBeginCapture_v2
            cuStreamBeginCapture_v2_ptsz
            cuStreamBeginRecaptureToGraph
            cuStreamBeginRecaptureToGraph_ptsz
            cuStreamDestroy_v2
            cuStreamEndCapture
            cuStreamEndCapture_ptsz
        }
    };
}
pub(crate) use driver_functions;

macro_rules! listed {
    ($($name:ident)*) => {
        /// The names, in the order of their bytes.
        pub(crate) const EXPORTED: &[&CStr] = &[$(
            // SAFETY: an identifier holds no NUL, and one is put behind it.
            unsafe { CStr::from_bytes_with_nul_unchecked(concat!(stringify!($name), "\0").as_bytes()) }
        ),*];
    };
}
driver_functions!(listed);

/// What `libsire_alloc.so` looks up to learn whether `dlsym` of this process leads here.
pub(crate) const PROBE: &CStr = c"cuSireHookProbe";

/// Where a name is in the table.
pub(crate) fn find(name: &CStr) -> Option<usize> {
    EXPORTED.binary_search(&name).ok()
}

const _: () = {
    // The search needs the order; who adds a line in another place hears of it here.
    let mut at = 1;
    while at < EXPORTED.len() {
        assert!(is_before(EXPORTED[at - 1].to_bytes(), EXPORTED[at].to_bytes()), "the table is not in order");
        at += 1;
    }
};

const fn is_before(first: &[u8], second: &[u8]) -> bool {
    let mut at = 0;
    while at < first.len() && at < second.len() {
        if first[at] != second[at] {
            return first[at] < second[at];
        }
        at += 1;
    }
    first.len() < second.len()
}
