//! Since which CUDA a driver's function is there, and in which forms: what `cuGetProcAddress` compares the version with that it is asked for.

use std::ffi::c_uint;

/// The forms of a function, as exported, and the first version that has each, newest first.
type Forms = &'static [(c_uint, &'static str)];

/// Functions of which more than one form is simulated, or whose only one has another name than they have.
const FORMS: &[(&str, Forms)] = &[
    ("cuCtxCreate", &[(12_050, "cuCtxCreate_v4"), (11_040, "cuCtxCreate_v3"), (3_020, "cuCtxCreate_v2")]),
    ("cuDeviceGetUuid", &[(11_040, "cuDeviceGetUuid_v2"), (9_020, "cuDeviceGetUuid")]),
    ("cuDevicePrimaryCtxRelease", &[(11_000, "cuDevicePrimaryCtxRelease_v2"), (7_000, "cuDevicePrimaryCtxRelease")]),
    ("cuDevicePrimaryCtxReset", &[(11_000, "cuDevicePrimaryCtxReset_v2"), (7_000, "cuDevicePrimaryCtxReset")]),
    ("cuEventElapsedTime", &[(12_080, "cuEventElapsedTime_v2"), (2_000, "cuEventElapsedTime")]),
    ("cuGetProcAddress", &[(12_000, "cuGetProcAddress_v2"), (11_030, "cuGetProcAddress")]),
    ("cuMemAdvise", &[(12_020, "cuMemAdvise_v2"), (8_000, "cuMemAdvise")]),
    ("cuMemPrefetchAsync", &[(12_020, "cuMemPrefetchAsync_v2"), (8_000, "cuMemPrefetchAsync")]),
    ("cuMulticastBindAddr", &[(13_010, "cuMulticastBindAddr_v2"), (12_010, "cuMulticastBindAddr")]),
    ("cuMulticastBindMem", &[(13_010, "cuMulticastBindMem_v2"), (12_010, "cuMulticastBindMem")]),
    (
        "cuStreamGetCaptureInfo",
        &[
            (12_030, "cuStreamGetCaptureInfo_v3"),
            (11_030, "cuStreamGetCaptureInfo_v2"),
            (10_010, "cuStreamGetCaptureInfo"),
        ],
    ),
];

/// The first version that has the one form of a function that is simulated. What is as old as CUDA 2.0 is not listed.
const SINCE: &[(c_uint, &[&str])] = &[
    (2_020, &["cuDriverGetVersion", "cuMemHostAlloc"]),
    (2_030, &["cuMemHostGetFlags"]),
    (
        3_020,
        &[
            "cuCtxGetApiVersion",
            "cuDeviceTotalMem",
            "cuMemAlloc",
            "cuMemAllocHost",
            "cuMemAllocPitch",
            "cuMemFree",
            "cuMemGetAddressRange",
            "cuMemGetInfo",
            "cuMemHostGetDevicePointer",
            "cuMemcpy2D",
            "cuMemcpy2DAsync",
            "cuMemcpyDtoD",
            "cuMemcpyDtoDAsync",
            "cuMemcpyDtoH",
            "cuMemcpyDtoHAsync",
            "cuMemcpyHtoD",
            "cuMemcpyHtoDAsync",
            "cuMemsetD16",
            "cuMemsetD16Async",
            "cuMemsetD2D8Async",
            "cuMemsetD32",
            "cuMemsetD32Async",
            "cuMemsetD8",
            "cuMemsetD8Async",
            "cuStreamWaitEvent",
        ],
    ),
    (
        4_000,
        &[
            "cuCtxDestroy",
            "cuCtxDisablePeerAccess",
            "cuCtxEnablePeerAccess",
            "cuCtxGetCurrent",
            "cuCtxPopCurrent",
            "cuCtxPushCurrent",
            "cuCtxSetCurrent",
            "cuDeviceCanAccessPeer",
            "cuEventDestroy",
            "cuLaunchKernel",
            "cuMemHostUnregister",
            "cuMemcpy",
            "cuMemcpyAsync",
            "cuMemcpyPeerAsync",
            "cuPointerGetAttribute",
            "cuStreamDestroy",
        ],
    ),
    (
        4_010,
        &[
            "cuDeviceGetByPCIBusId",
            "cuDeviceGetPCIBusId",
            "cuIpcCloseMemHandle",
            "cuIpcGetEventHandle",
            "cuIpcGetMemHandle",
            "cuIpcOpenEventHandle",
        ],
    ),
    (5_050, &["cuCtxGetStreamPriorityRange", "cuStreamCreateWithPriority", "cuStreamGetFlags", "cuStreamGetPriority"]),
    (6_000, &["cuGetErrorName", "cuGetErrorString", "cuMemAllocManaged"]),
    (6_050, &["cuMemHostRegister"]),
    (7_000, &["cuCtxGetFlags", "cuDevicePrimaryCtxGetState", "cuDevicePrimaryCtxRetain", "cuPointerGetAttributes"]),
    (9_020, &["cuStreamGetCtx"]),
    (
        10_000,
        &[
            "cuGraphCreate",
            "cuGraphDestroy",
            "cuGraphExecDestroy",
            "cuGraphLaunch",
            "cuLaunchHostFunc",
            "cuStreamEndCapture",
            "cuStreamIsCapturing",
        ],
    ),
    (10_010, &["cuStreamBeginCapture", "cuThreadExchangeStreamCaptureMode"]),
    (
        10_020,
        &[
            "cuMemAddressFree",
            "cuMemAddressReserve",
            "cuMemCreate",
            "cuMemExportToShareableHandle",
            "cuMemGetAccess",
            "cuMemGetAllocationGranularity",
            "cuMemGetAllocationPropertiesFromHandle",
            "cuMemImportFromShareableHandle",
            "cuMemMap",
            "cuMemRelease",
            "cuMemSetAccess",
            "cuMemUnmap",
        ],
    ),
    (11_000, &["cuDevicePrimaryCtxSetFlags", "cuIpcOpenMemHandle", "cuMemRetainAllocationHandle"]),
    (11_010, &["cuEventRecordWithFlags"]),
    (
        11_020,
        &[
            "cuDeviceGetDefaultMemPool",
            "cuDeviceGetMemPool",
            "cuDeviceSetMemPool",
            "cuMemAllocAsync",
            "cuMemAllocFromPoolAsync",
            "cuMemFreeAsync",
            "cuMemPoolCreate",
            "cuMemPoolDestroy",
            "cuMemPoolGetAttribute",
            "cuMemPoolSetAccess",
            "cuMemPoolSetAttribute",
            "cuMemPoolTrimTo",
        ],
    ),
    (11_040, &["cuGraphInstantiateWithFlags"]),
    (11_070, &["cuMemGetHandleForAddressRange", "cuStreamWriteValue32"]),
    (12_000, &["cuStreamGetId"]),
    (12_010, &["cuMulticastAddDevice", "cuMulticastCreate", "cuMulticastGetGranularity", "cuMulticastUnbind"]),
    (12_030, &["cuStreamBeginCaptureToGraph"]),
    (12_080, &["cuStreamGetDevice"]),
    (12_090, &["cuLogsRegisterCallback", "cuLogsUnregisterCallback"]),
    (13_030, &["cuStreamBeginRecaptureToGraph"]),
];

/// The forms of a function that has several; `None`: it has one.
pub(super) fn forms(name: &str) -> Option<Forms> {
    FORMS.iter().find(|(known, _)| *known == name).map(|(_, forms)| *forms)
}

/// Whether `version` of CUDA is too old for a function of one form.
pub(super) fn is_before(version: c_uint, name: &str) -> bool {
    let since = SINCE.iter().find(|(_, names)| names.contains(&name)).map_or(2_000, |(since, _)| *since);
    version < since
}
