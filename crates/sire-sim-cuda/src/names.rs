//! Names and sentences of error numbers. The runtime's and the driver's numbers agree; their names do not.

use std::ffi::{CStr, c_int};

struct Entry {
    number: c_int,
    runtime: &'static CStr,
    driver: &'static CStr,
    text: &'static CStr,
}

macro_rules! table {
    ($($number:literal $runtime:literal $driver:literal $text:literal)*) => {
        &[$(Entry { number: $number, runtime: $runtime, driver: $driver, text: $text }),*]
    };
}

/// Sorted by number.
static TABLE: &[Entry] = table! {
    0 c"cudaSuccess" c"CUDA_SUCCESS" c"no error"
    1 c"cudaErrorInvalidValue" c"CUDA_ERROR_INVALID_VALUE" c"invalid argument"
    2 c"cudaErrorMemoryAllocation" c"CUDA_ERROR_OUT_OF_MEMORY" c"out of memory"
    3 c"cudaErrorInitializationError" c"CUDA_ERROR_NOT_INITIALIZED" c"initialization error"
    4 c"cudaErrorCudartUnloading" c"CUDA_ERROR_DEINITIALIZED" c"driver shutting down"
    5 c"cudaErrorProfilerDisabled" c"CUDA_ERROR_PROFILER_DISABLED" c"profiler disabled while using external profiling tool"
    9 c"cudaErrorInvalidConfiguration" c"CUDA_ERROR_UNKNOWN" c"invalid configuration argument"
    12 c"cudaErrorInvalidPitchValue" c"CUDA_ERROR_UNKNOWN" c"invalid pitch argument"
    13 c"cudaErrorInvalidSymbol" c"CUDA_ERROR_UNKNOWN" c"invalid device symbol"
    17 c"cudaErrorInvalidDevicePointer" c"CUDA_ERROR_UNKNOWN" c"invalid device pointer"
    21 c"cudaErrorInvalidMemcpyDirection" c"CUDA_ERROR_UNKNOWN" c"invalid copy direction for memcpy"
    34 c"cudaErrorStubLibrary" c"CUDA_ERROR_STUB_LIBRARY" c"CUDA driver is a stub library"
    35 c"cudaErrorInsufficientDriver" c"CUDA_ERROR_UNKNOWN" c"CUDA driver version is insufficient for CUDA runtime version"
    36 c"cudaErrorCallRequiresNewerDriver" c"CUDA_ERROR_CALL_REQUIRES_NEWER_DRIVER" c"API call is not supported in the installed CUDA driver"
    46 c"cudaErrorDevicesUnavailable" c"CUDA_ERROR_DEVICE_UNAVAILABLE" c"CUDA-capable device(s) is/are busy or unavailable"
    52 c"cudaErrorMissingConfiguration" c"CUDA_ERROR_UNKNOWN" c"__global__ function call is not configured"
    98 c"cudaErrorInvalidDeviceFunction" c"CUDA_ERROR_UNKNOWN" c"invalid device function"
    100 c"cudaErrorNoDevice" c"CUDA_ERROR_NO_DEVICE" c"no CUDA-capable device is detected"
    101 c"cudaErrorInvalidDevice" c"CUDA_ERROR_INVALID_DEVICE" c"invalid device ordinal"
    200 c"cudaErrorInvalidKernelImage" c"CUDA_ERROR_INVALID_IMAGE" c"device kernel image is invalid"
    201 c"cudaErrorDeviceUninitialized" c"CUDA_ERROR_INVALID_CONTEXT" c"invalid device context"
    205 c"cudaErrorMapBufferObjectFailed" c"CUDA_ERROR_MAP_FAILED" c"mapping of buffer object failed"
    206 c"cudaErrorUnmapBufferObjectFailed" c"CUDA_ERROR_UNMAP_FAILED" c"unmapping of buffer object failed"
    208 c"cudaErrorAlreadyMapped" c"CUDA_ERROR_ALREADY_MAPPED" c"resource already mapped"
    209 c"cudaErrorNoKernelImageForDevice" c"CUDA_ERROR_NO_BINARY_FOR_GPU" c"no kernel image is available for execution on the device"
    211 c"cudaErrorNotMapped" c"CUDA_ERROR_NOT_MAPPED" c"resource not mapped"
    214 c"cudaErrorECCUncorrectable" c"CUDA_ERROR_ECC_UNCORRECTABLE" c"uncorrectable ECC error encountered"
    215 c"cudaErrorUnsupportedLimit" c"CUDA_ERROR_UNSUPPORTED_LIMIT" c"limit is not supported on this architecture"
    217 c"cudaErrorPeerAccessUnsupported" c"CUDA_ERROR_PEER_ACCESS_UNSUPPORTED" c"peer access is not supported between these two devices"
    304 c"cudaErrorOperatingSystem" c"CUDA_ERROR_OPERATING_SYSTEM" c"OS call failed or operation not supported on this OS"
    400 c"cudaErrorInvalidResourceHandle" c"CUDA_ERROR_INVALID_HANDLE" c"invalid resource handle"
    401 c"cudaErrorIllegalState" c"CUDA_ERROR_ILLEGAL_STATE" c"the operation cannot be performed in the present state"
    500 c"cudaErrorSymbolNotFound" c"CUDA_ERROR_NOT_FOUND" c"named symbol not found"
    600 c"cudaErrorNotReady" c"CUDA_ERROR_NOT_READY" c"device not ready"
    700 c"cudaErrorIllegalAddress" c"CUDA_ERROR_ILLEGAL_ADDRESS" c"an illegal memory access was encountered"
    701 c"cudaErrorLaunchOutOfResources" c"CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES" c"too many resources requested for launch"
    702 c"cudaErrorLaunchTimeout" c"CUDA_ERROR_LAUNCH_TIMEOUT" c"the launch timed out and was terminated"
    704 c"cudaErrorPeerAccessAlreadyEnabled" c"CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED" c"peer access is already enabled"
    705 c"cudaErrorPeerAccessNotEnabled" c"CUDA_ERROR_PEER_ACCESS_NOT_ENABLED" c"peer access has not been enabled"
    708 c"cudaErrorSetOnActiveProcess" c"CUDA_ERROR_PRIMARY_CONTEXT_ACTIVE" c"cannot set while device is active in this process"
    709 c"cudaErrorContextIsDestroyed" c"CUDA_ERROR_CONTEXT_IS_DESTROYED" c"context is destroyed"
    710 c"cudaErrorAssert" c"CUDA_ERROR_ASSERT" c"device-side assert triggered"
    712 c"cudaErrorHostMemoryAlreadyRegistered" c"CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED" c"part or all of the requested memory range is already mapped"
    713 c"cudaErrorHostMemoryNotRegistered" c"CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED" c"pointer does not correspond to a registered memory region"
    714 c"cudaErrorHardwareStackError" c"CUDA_ERROR_HARDWARE_STACK_ERROR" c"hardware stack error"
    715 c"cudaErrorIllegalInstruction" c"CUDA_ERROR_ILLEGAL_INSTRUCTION" c"an illegal instruction was encountered"
    716 c"cudaErrorMisalignedAddress" c"CUDA_ERROR_MISALIGNED_ADDRESS" c"misaligned address"
    719 c"cudaErrorLaunchFailure" c"CUDA_ERROR_LAUNCH_FAILED" c"unspecified launch failure"
    800 c"cudaErrorNotPermitted" c"CUDA_ERROR_NOT_PERMITTED" c"operation not permitted"
    801 c"cudaErrorNotSupported" c"CUDA_ERROR_NOT_SUPPORTED" c"operation not supported"
    802 c"cudaErrorSystemNotReady" c"CUDA_ERROR_SYSTEM_NOT_READY" c"system not yet initialized"
    900 c"cudaErrorStreamCaptureUnsupported" c"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED" c"operation not permitted when stream is capturing"
    901 c"cudaErrorStreamCaptureInvalidated" c"CUDA_ERROR_STREAM_CAPTURE_INVALIDATED" c"operation failed due to a previous error during capture"
    902 c"cudaErrorStreamCaptureMerge" c"CUDA_ERROR_STREAM_CAPTURE_MERGE" c"operation would result in a merge of separate capture sequences"
    903 c"cudaErrorStreamCaptureUnmatched" c"CUDA_ERROR_STREAM_CAPTURE_UNMATCHED" c"capture was not ended in the same stream as it began"
    904 c"cudaErrorStreamCaptureUnjoined" c"CUDA_ERROR_STREAM_CAPTURE_UNJOINED" c"capturing stream has unjoined work"
    905 c"cudaErrorStreamCaptureIsolation" c"CUDA_ERROR_STREAM_CAPTURE_ISOLATION" c"dependency created on uncaptured work in another stream"
    906 c"cudaErrorStreamCaptureImplicit" c"CUDA_ERROR_STREAM_CAPTURE_IMPLICIT" c"operation would make the legacy stream depend on a capturing blocking stream"
    907 c"cudaErrorCapturedEvent" c"CUDA_ERROR_CAPTURED_EVENT" c"operation not permitted on an event last recorded in a capturing stream"
    908 c"cudaErrorStreamCaptureWrongThread" c"CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD" c"attempt to terminate a thread-local capture sequence from another thread"
    909 c"cudaErrorTimeout" c"CUDA_ERROR_TIMEOUT" c"wait operation timed out"
    910 c"cudaErrorGraphExecUpdateFailure" c"CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE" c"the graph update was not performed because it included changes which violated constraints specific to instantiated graph update"
    911 c"cudaErrorExternalDevice" c"CUDA_ERROR_EXTERNAL_DEVICE" c"an async error has occurred in external entity outside of CUDA"
    999 c"cudaErrorUnknown" c"CUDA_ERROR_UNKNOWN" c"unknown error"
};

fn find(number: c_int) -> Option<&'static Entry> {
    TABLE.binary_search_by_key(&number, |entry| entry.number).ok().map(|at| &TABLE[at])
}

/// `cudaGetErrorName`.
pub fn runtime_name(number: c_int) -> &'static CStr {
    find(number).map_or(c"unrecognized error code", |entry| entry.runtime)
}

/// `cudaGetErrorString`.
pub fn text(number: c_int) -> &'static CStr {
    find(number).map_or(c"unrecognized error code", |entry| entry.text)
}

/// `cuGetErrorName`; `None` for a number that the driver does not have.
pub fn driver_name(number: c_int) -> Option<&'static CStr> {
    find(number).map(|entry| entry.driver).filter(|name| number == 999 || *name != c"CUDA_ERROR_UNKNOWN")
}
