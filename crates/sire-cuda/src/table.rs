//! The entry points of `libcuda` that Sire uses: one line each.
//!
//! Types and constants come from cudarc's generated bindings. Results are plain integers, because a
//! Rust enum must not hold a number that a newer driver has invented. A newer *variant* of a function (`_v2`, `_v3`) is
//! never picked up by itself: each line names the exported symbol, and the name and version under which
//! `cudaGetDriverEntryPoint` hands out the same function.

use cudarc::driver::sys::{CUmemAccessDesc, CUmemAllocationProp};
use std::ffi::{CStr, c_char, c_int, c_uint, c_ulonglong, c_void};

/// A `CUresult`.
pub(crate) type Code = c_int;
/// A `CUdevice`: the driver's handle of a device.
pub(crate) type DeviceHandle = c_int;
/// A `CUdeviceptr`.
pub(crate) type DevicePtr = c_ulonglong;
/// A `CUcontext`, `CUstream` or `CUevent`.
pub(crate) type Opaque = *mut c_void;

/// Where an entry point can be had.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Symbol {
    /// The name that the library exports.
    pub exported: &'static CStr,
    /// The name without its variant, as `cudaGetDriverEntryPoint` wants it.
    pub base: &'static CStr,
    /// The CUDA version whose variant that is.
    pub version: u32,
}

macro_rules! entry_points {
    ($($field:ident: $exported:literal = $base:literal @ $version:literal ($($argument:ty),* $(,)?);)*) => {
        /// The addresses of the entry points.
        #[derive(Clone, Copy)]
        pub(crate) struct EntryPoints {
            $(pub $field: unsafe extern "C" fn($($argument),*) -> Code,)*
        }

        impl EntryPoints {
            /// Looks every entry point up; the error is the name of the first that is missing.
            ///
            /// # Safety
            /// A non-null answer of `find` is the address of that function of `libcuda`.
            pub(crate) unsafe fn resolve(find: &dyn Fn(Symbol) -> *mut c_void) -> Result<EntryPoints, &'static CStr> {
                Ok(EntryPoints {$(
                    $field: {
                        let symbol = Symbol { exported: $exported, base: $base, version: $version };
                        let address = find(symbol);
                        if address.is_null() {
                            return Err(symbol.exported);
                        }
                        // SAFETY: the caller vouches that the address is this function, whose signature in cuda.h
                        // is the one written in the table.
                        unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($argument),*) -> Code>(address) }
                    },
                )*})
            }
        }
    };
}

entry_points! {
    init: c"cuInit" = c"cuInit" @ 2000 (c_uint);
    driver_get_version: c"cuDriverGetVersion" = c"cuDriverGetVersion" @ 2020 (*mut c_int);
    get_error_name: c"cuGetErrorName" = c"cuGetErrorName" @ 6000 (Code, *mut *const c_char);
    get_error_string: c"cuGetErrorString" = c"cuGetErrorString" @ 6000 (Code, *mut *const c_char);

    device_get_count: c"cuDeviceGetCount" = c"cuDeviceGetCount" @ 2000 (*mut c_int);
    device_get: c"cuDeviceGet" = c"cuDeviceGet" @ 2000 (*mut DeviceHandle, c_int);
    device_get_attribute: c"cuDeviceGetAttribute" = c"cuDeviceGetAttribute" @ 2000 (*mut c_int, c_int, DeviceHandle);
    device_get_uuid_of_gpu: c"cuDeviceGetUuid" = c"cuDeviceGetUuid" @ 9020 (*mut [u8; 16], DeviceHandle);
    device_get_uuid: c"cuDeviceGetUuid_v2" = c"cuDeviceGetUuid" @ 11040 (*mut [u8; 16], DeviceHandle);
    device_can_access_peer: c"cuDeviceCanAccessPeer" = c"cuDeviceCanAccessPeer" @ 4000 (*mut c_int, DeviceHandle, DeviceHandle);

    primary_ctx_retain: c"cuDevicePrimaryCtxRetain" = c"cuDevicePrimaryCtxRetain" @ 7000 (*mut Opaque, DeviceHandle);
    primary_ctx_get_state: c"cuDevicePrimaryCtxGetState" = c"cuDevicePrimaryCtxGetState" @ 7000
        (DeviceHandle, *mut c_uint, *mut c_int);
    primary_ctx_release: c"cuDevicePrimaryCtxRelease_v2" = c"cuDevicePrimaryCtxRelease" @ 11000 (DeviceHandle);
    ctx_push_current: c"cuCtxPushCurrent_v2" = c"cuCtxPushCurrent" @ 4000 (Opaque);
    ctx_pop_current: c"cuCtxPopCurrent_v2" = c"cuCtxPopCurrent" @ 4000 (*mut Opaque);
    ctx_synchronize: c"cuCtxSynchronize" = c"cuCtxSynchronize" @ 2000 ();

    mem_get_info: c"cuMemGetInfo_v2" = c"cuMemGetInfo" @ 3020 (*mut usize, *mut usize);
    mem_get_allocation_granularity: c"cuMemGetAllocationGranularity" = c"cuMemGetAllocationGranularity" @ 10020
        (*mut usize, *const CUmemAllocationProp, c_uint);
    mem_address_reserve: c"cuMemAddressReserve" = c"cuMemAddressReserve" @ 10020
        (*mut DevicePtr, usize, usize, DevicePtr, c_ulonglong);
    mem_address_free: c"cuMemAddressFree" = c"cuMemAddressFree" @ 10020 (DevicePtr, usize);
    mem_create: c"cuMemCreate" = c"cuMemCreate" @ 10020 (*mut c_ulonglong, usize, *const CUmemAllocationProp, c_ulonglong);
    mem_release: c"cuMemRelease" = c"cuMemRelease" @ 10020 (c_ulonglong);
    mem_map: c"cuMemMap" = c"cuMemMap" @ 10020 (DevicePtr, usize, usize, c_ulonglong, c_ulonglong);
    mem_unmap: c"cuMemUnmap" = c"cuMemUnmap" @ 10020 (DevicePtr, usize);
    mem_set_access: c"cuMemSetAccess" = c"cuMemSetAccess" @ 10020 (DevicePtr, usize, *const CUmemAccessDesc, usize);
    mem_host_register: c"cuMemHostRegister_v2" = c"cuMemHostRegister" @ 6050 (*mut c_void, usize, c_uint);
    mem_host_unregister: c"cuMemHostUnregister" = c"cuMemHostUnregister" @ 4000 (*mut c_void);

    stream_create: c"cuStreamCreate" = c"cuStreamCreate" @ 2000 (*mut Opaque, c_uint);
    stream_destroy: c"cuStreamDestroy_v2" = c"cuStreamDestroy" @ 4000 (Opaque);
    stream_is_capturing: c"cuStreamIsCapturing" = c"cuStreamIsCapturing" @ 10000 (Opaque, *mut c_int);
    exchange_capture_mode: c"cuThreadExchangeStreamCaptureMode" = c"cuThreadExchangeStreamCaptureMode" @ 10010 (*mut c_int);
    stream_wait_event: c"cuStreamWaitEvent" = c"cuStreamWaitEvent" @ 3020 (Opaque, Opaque, c_uint);
    event_create: c"cuEventCreate" = c"cuEventCreate" @ 2000 (*mut Opaque, c_uint);
    event_destroy: c"cuEventDestroy_v2" = c"cuEventDestroy" @ 4000 (Opaque);
    event_record: c"cuEventRecord" = c"cuEventRecord" @ 2000 (Opaque, Opaque);
    event_synchronize: c"cuEventSynchronize" = c"cuEventSynchronize" @ 2000 (Opaque);
    event_query: c"cuEventQuery" = c"cuEventQuery" @ 2000 (Opaque);

    memcpy_dtoh_async: c"cuMemcpyDtoHAsync_v2" = c"cuMemcpyDtoHAsync" @ 3020 (*mut c_void, DevicePtr, usize, Opaque);
    memcpy_htod_async: c"cuMemcpyHtoDAsync_v2" = c"cuMemcpyHtoDAsync" @ 3020 (DevicePtr, *const c_void, usize, Opaque);
    mem_alloc: c"cuMemAlloc_v2" = c"cuMemAlloc" @ 3020 (*mut DevicePtr, usize);
    mem_free: c"cuMemFree_v2" = c"cuMemFree" @ 3020 (DevicePtr);
    module_load_data: c"cuModuleLoadData" = c"cuModuleLoadData" @ 2000 (*mut Opaque, *const c_void);
    module_get_function: c"cuModuleGetFunction" = c"cuModuleGetFunction" @ 2000 (*mut Opaque, Opaque, *const c_char);
    launch_kernel: c"cuLaunchKernel" = c"cuLaunchKernel" @ 4000
        (Opaque, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Opaque, *mut *mut c_void, *mut *mut c_void);
    memset_d8_async: c"cuMemsetD8Async" = c"cuMemsetD8Async" @ 3020 (DevicePtr, u8, usize, Opaque);
}

#[cfg(target_pointer_width = "64")]
const _: () = {
    // The layouts of cuda.h on 64-bit machines; they are part of the driver's ABI.
    assert!(size_of::<CUmemAllocationProp>() == 32);
    assert!(size_of::<CUmemAccessDesc>() == 12);
};
