//! CUDA's structs as the machine lays them out (CUDA 13, x86-64 and aarch64 alike), written by hand; `device_prop` has the one
//! that CUDA 12 lays out otherwise.
//! Only what crosses the boundary belongs here; every size is asserted, and offsets where a
//! mistake could hide.

use std::ffi::{c_char, c_int, c_uint, c_ulonglong, c_void};
use std::mem::{offset_of, size_of};

/// An opaque handle (`cudaStream_t`, `CUcontext`, ...).
pub type Handle = *mut c_void;
/// A function to call on the host (`cudaHostFn_t`).
pub type HostFn = Option<unsafe extern "C" fn(*mut c_void)>;
/// `cudaStreamCallback_t`.
pub type StreamCallback = Option<unsafe extern "C" fn(Handle, c_int, *mut c_void)>;

/// The start of `struct cudaPointerAttributes`: the part that CUDA 12 and 13 share. CUDA 13's reserved
/// tail is never written, because a caller built for CUDA 12 has no room for it.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct PointerAttributes {
    pub kind: c_int,
    pub device: c_int,
    pub device_pointer: u64,
    pub host_pointer: u64,
}

const _: () = assert!(size_of::<PointerAttributes>() == 24);

/// `CUmemLocation` and `struct cudaMemLocation`.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct MemLocation {
    pub kind: c_int,
    pub id: c_int,
}

/// `CU_MEM_LOCATION_TYPE_DEVICE`.
pub const LOCATION_DEVICE: c_int = 1;
/// `CU_MEM_LOCATION_TYPE_HOST`.
pub const LOCATION_HOST: c_int = 2;
/// `CU_MEM_LOCATION_TYPE_HOST_NUMA_CURRENT`, after that of a NUMA node.
pub const LOCATION_HOST_NUMA_CURRENT: c_int = 4;

/// `CUmemAllocationProp`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct AllocationProp {
    pub kind: c_int,
    pub handle_types: c_int,
    pub location: MemLocation,
    pub win32_meta_data: usize,
    pub compression: u8,
    pub gpu_direct_rdma_capable: u8,
    pub usage: u16,
    pub reserved: [u8; 4],
}

const _: () = assert!(size_of::<AllocationProp>() == 32 && offset_of!(AllocationProp, compression) == 24);

/// `CUmemAccessDesc` and `struct cudaMemAccessDesc`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct AccessDesc {
    pub location: MemLocation,
    pub flags: c_int,
}

const _: () = assert!(size_of::<AccessDesc>() == 12);

/// `CUmemPoolProps` and `struct cudaMemPoolProps`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct PoolProps {
    pub kind: c_int,
    pub handle_types: c_int,
    pub location: MemLocation,
    pub win32_attributes: usize,
    pub max_size: usize,
    pub usage: u16,
    pub reserved: [u8; 54],
}

const _: () = assert!(size_of::<PoolProps>() == 88 && offset_of!(PoolProps, max_size) == 24);

/// `struct cudaFuncAttributes`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct FuncAttributes {
    pub shared_size_bytes: usize,
    pub const_size_bytes: usize,
    pub local_size_bytes: usize,
    pub max_threads_per_block: c_int,
    pub num_regs: c_int,
    pub ptx_version: c_int,
    pub binary_version: c_int,
    pub cache_mode_ca: c_int,
    pub max_dynamic_shared_size_bytes: c_int,
    pub preferred_shmem_carveout: c_int,
    pub cluster: [c_int; 6],
    pub reserved: [c_int; 16],
}

const _: () =
    assert!(size_of::<FuncAttributes>() == 144 && offset_of!(FuncAttributes, max_dynamic_shared_size_bytes) == 44);

/// `dim3`.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Dim3 {
    pub x: c_uint,
    pub y: c_uint,
    pub z: c_uint,
}

/// `cudaLaunchConfig_t`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct LaunchConfig {
    pub grid: Dim3,
    pub block: Dim3,
    pub dynamic_smem_bytes: usize,
    pub stream: Handle,
    pub attributes: *const c_void,
    pub attribute_count: c_uint,
}

const _: () = assert!(size_of::<LaunchConfig>() == 56 && offset_of!(LaunchConfig, stream) == 32);

/// `cudaIpcMemHandle_t`, `cudaIpcEventHandle_t` and `CUipc*Handle`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct IpcHandle {
    pub bytes: [u8; 64],
}

/// `CUuuid`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Uuid {
    pub bytes: [u8; 16],
}

/// `CUDA_MEMCPY2D`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Memcpy2d {
    pub src_x: usize,
    pub src_y: usize,
    pub src_type: c_uint,
    pub src_host: u64,
    pub src_device: u64,
    pub src_array: Handle,
    pub src_pitch: usize,
    pub dst_x: usize,
    pub dst_y: usize,
    pub dst_type: c_uint,
    pub dst_host: u64,
    pub dst_device: u64,
    pub dst_array: Handle,
    pub dst_pitch: usize,
    pub width: usize,
    pub height: usize,
}

const _: () = assert!(size_of::<Memcpy2d>() == 128);

/// The start of `struct cudaKernelNodeParams` (`func`) and of the driver's (`CUfunction`).
#[repr(C)]
#[derive(Clone, Copy)]
pub struct KernelNodeParams {
    pub function: *const c_void,
    pub grid: Dim3,
    pub block: Dim3,
    pub shared_mem_bytes: c_uint,
    pub params: *mut *mut c_void,
    pub extra: *mut *mut c_void,
}

const _: () = assert!(size_of::<KernelNodeParams>() == 56);

/// `nvmlMemory_t`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct NvmlMemory {
    pub total: c_ulonglong,
    pub free: c_ulonglong,
    pub used: c_ulonglong,
}

/// `nvmlMemory_v2_t`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct NvmlMemoryV2 {
    pub version: c_uint,
    pub total: c_ulonglong,
    pub reserved: c_ulonglong,
    pub free: c_ulonglong,
    pub used: c_ulonglong,
}

const _: () = assert!(size_of::<NvmlMemory>() == 24 && size_of::<NvmlMemoryV2>() == 40);

/// `nvmlProcessInfo_v1_t`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct NvmlProcessV1 {
    pub pid: c_uint,
    pub used_gpu_memory: c_ulonglong,
}

/// `nvmlProcessInfo_v2_t`, which is also the current `nvmlProcessInfo_t`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct NvmlProcess {
    pub pid: c_uint,
    pub used_gpu_memory: c_ulonglong,
    pub gpu_instance_id: c_uint,
    pub compute_instance_id: c_uint,
}

const _: () = assert!(size_of::<NvmlProcessV1>() == 16 && size_of::<NvmlProcess>() == 24);

/// `nvmlPciInfo_t`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct NvmlPci {
    pub bus_id_legacy: [c_char; 16],
    pub domain: c_uint,
    pub bus: c_uint,
    pub device: c_uint,
    pub pci_device_id: c_uint,
    pub pci_subsystem_id: c_uint,
    pub bus_id: [c_char; 32],
}

const _: () = assert!(size_of::<NvmlPci>() == 68 && offset_of!(NvmlPci, bus_id) == 36);

/// `nvmlGpuFabricInfoV_t` up to `state`, which its second and third versions share.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct NvmlFabric {
    pub version: c_uint,
    pub cluster_uuid: [u8; 16],
    pub status: c_uint,
    pub clique_id: c_uint,
    pub state: u8,
}

const _: () = assert!(size_of::<NvmlFabric>() == 32 && offset_of!(NvmlFabric, state) == 28);

/// `nvmlUtilization_t`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct NvmlUtilization {
    pub gpu: c_uint,
    pub memory: c_uint,
}
