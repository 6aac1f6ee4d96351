//! CUDA 12's structs, where CUDA 13's (`abi`) are laid out otherwise, written by hand. Every size is asserted, and offsets
//! where a mistake could hide.

use crate::abi::DeviceProp;
use std::ffi::{c_char, c_int, c_uint};
use std::mem::{offset_of, size_of};

/// `struct cudaDeviceProp` of CUDA 11, with which CUDA 12's begins. CUDA 12's runtime has it still, under the plain name
/// `cudaGetDeviceProperties`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct DeviceProp11 {
    pub name: [c_char; 256],
    pub uuid: [u8; 16],
    pub luid: [c_char; 8],
    pub luid_device_node_mask: c_uint,
    pub total_global_mem: usize,
    pub shared_mem_per_block: usize,
    pub regs_per_block: c_int,
    pub warp_size: c_int,
    pub mem_pitch: usize,
    pub max_threads_per_block: c_int,
    pub max_threads_dim: [c_int; 3],
    pub max_grid_size: [c_int; 3],
    pub clock_rate: c_int,
    pub total_const_mem: usize,
    pub major: c_int,
    pub minor: c_int,
    pub texture_alignment: usize,
    pub texture_pitch_alignment: usize,
    pub device_overlap: c_int,
    pub multi_processor_count: c_int,
    pub kernel_exec_timeout_enabled: c_int,
    pub integrated: c_int,
    pub can_map_host_memory: c_int,
    pub compute_mode: c_int,
    /// From `maxTexture1D` to `maxSurfaceCubemapLayered`, one more than CUDA 13 has.
    pub texture_limits: [c_int; 40],
    pub surface_alignment: usize,
    pub concurrent_kernels: c_int,
    pub ecc_enabled: c_int,
    pub pci_bus_id: c_int,
    pub pci_device_id: c_int,
    pub pci_domain_id: c_int,
    pub tcc_driver: c_int,
    pub async_engine_count: c_int,
    pub unified_addressing: c_int,
    pub memory_clock_rate: c_int,
    pub memory_bus_width: c_int,
    pub l2_cache_size: c_int,
    pub persisting_l2_cache_max_size: c_int,
    pub max_threads_per_multi_processor: c_int,
    pub stream_priorities_supported: c_int,
    pub global_l1_cache_supported: c_int,
    pub local_l1_cache_supported: c_int,
    pub shared_mem_per_multiprocessor: usize,
    pub regs_per_multiprocessor: c_int,
    pub managed_memory: c_int,
    pub is_multi_gpu_board: c_int,
    pub multi_gpu_board_group_id: c_int,
    pub host_native_atomic_supported: c_int,
    pub single_to_double_precision_perf_ratio: c_int,
    pub pageable_memory_access: c_int,
    pub concurrent_managed_access: c_int,
    pub compute_preemption_supported: c_int,
    pub can_use_host_pointer_for_registered_mem: c_int,
    pub cooperative_launch: c_int,
    pub cooperative_multi_device_launch: c_int,
    pub shared_mem_per_block_optin: usize,
    pub pageable_memory_access_uses_host_page_tables: c_int,
    pub direct_managed_mem_access_from_host: c_int,
    pub max_blocks_per_multi_processor: c_int,
    pub access_policy_max_window_size: c_int,
    pub reserved_shared_mem_per_block: usize,
}

const _: () = {
    assert!(size_of::<DeviceProp11>() == 728);
    assert!(offset_of!(DeviceProp11, clock_rate) == 348);
    assert!(offset_of!(DeviceProp11, major) == 360);
    assert!(offset_of!(DeviceProp11, multi_processor_count) == 388);
    assert!(offset_of!(DeviceProp11, compute_mode) == 404);
    assert!(offset_of!(DeviceProp11, surface_alignment) == 568);
    assert!(offset_of!(DeviceProp11, memory_clock_rate) == 608);
    assert!(offset_of!(DeviceProp11, max_threads_per_multi_processor) == 624);
    assert!(offset_of!(DeviceProp11, shared_mem_per_multiprocessor) == 640);
    assert!(offset_of!(DeviceProp11, single_to_double_precision_perf_ratio) == 668);
    assert!(offset_of!(DeviceProp11, shared_mem_per_block_optin) == 696);
    assert!(offset_of!(DeviceProp11, reserved_shared_mem_per_block) == 720);
};

/// `struct cudaDeviceProp` of CUDA 12, which `cudaGetDeviceProperties_v2` fills.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct DeviceProp12 {
    pub eleven: DeviceProp11,
    pub host_register_supported: c_int,
    pub sparse_cuda_array_supported: c_int,
    pub host_register_read_only_supported: c_int,
    pub timeline_semaphore_interop_supported: c_int,
    pub memory_pools_supported: c_int,
    pub gpu_direct_rdma_supported: c_int,
    pub gpu_direct_rdma_flush_writes_options: c_uint,
    pub gpu_direct_rdma_writes_ordering: c_int,
    pub memory_pool_supported_handle_types: c_uint,
    pub deferred_mapping_cuda_array_supported: c_int,
    pub ipc_event_supported: c_int,
    pub cluster_launch: c_int,
    pub unified_function_pointers: c_int,
    pub reserved: [c_int; 63],
}

const _: () = {
    assert!(size_of::<DeviceProp12>() == 1032);
    assert!(offset_of!(DeviceProp12, host_register_supported) == 728);
    assert!(offset_of!(DeviceProp12, memory_pools_supported) == 744);
    assert!(offset_of!(DeviceProp12, cluster_launch) == 772);
    assert!(offset_of!(DeviceProp12, reserved) == 780);
};

/// What CUDA 13 no longer says about a device.
#[derive(Clone, Copy)]
pub struct Dropped {
    /// kHz.
    pub clock_rate: c_int,
    /// kHz.
    pub memory_clock_rate: c_int,
    pub device_overlap: c_int,
    pub single_to_double_precision_perf_ratio: c_int,
}

/// Copies the fields of the same name.
macro_rules! same {
    ($from:expr => $to:expr; $($field:ident)*) => {$($to.$field = $from.$field;)*};
}

/// The same device in CUDA 11's words.
pub fn eleven(prop: &DeviceProp, dropped: Dropped) -> DeviceProp11 {
    // SAFETY: the struct consists of integers and arrays of integers, for which all zeros is a value.
    let mut old: DeviceProp11 = unsafe { std::mem::zeroed() };
    same!(prop => old;
        name uuid luid luid_device_node_mask total_global_mem shared_mem_per_block regs_per_block warp_size mem_pitch
        max_threads_per_block max_threads_dim max_grid_size total_const_mem major minor texture_alignment
        texture_pitch_alignment multi_processor_count integrated can_map_host_memory surface_alignment
        concurrent_kernels ecc_enabled pci_bus_id pci_device_id pci_domain_id tcc_driver async_engine_count
        unified_addressing memory_bus_width l2_cache_size persisting_l2_cache_max_size
        max_threads_per_multi_processor stream_priorities_supported global_l1_cache_supported
        local_l1_cache_supported shared_mem_per_multiprocessor regs_per_multiprocessor managed_memory
        is_multi_gpu_board multi_gpu_board_group_id host_native_atomic_supported pageable_memory_access
        concurrent_managed_access compute_preemption_supported can_use_host_pointer_for_registered_mem
        cooperative_launch shared_mem_per_block_optin pageable_memory_access_uses_host_page_tables
        direct_managed_mem_access_from_host max_blocks_per_multi_processor access_policy_max_window_size
        reserved_shared_mem_per_block);
    same!(dropped => old; clock_rate memory_clock_rate device_overlap single_to_double_precision_perf_ratio);
    old
}

/// The same device in CUDA 12's words.
pub fn twelve(prop: &DeviceProp, dropped: Dropped) -> DeviceProp12 {
    // SAFETY: as in `eleven`.
    let mut old: DeviceProp12 = unsafe { std::mem::zeroed() };
    old.eleven = eleven(prop, dropped);
    same!(prop => old;
        host_register_supported sparse_cuda_array_supported host_register_read_only_supported
        timeline_semaphore_interop_supported memory_pools_supported gpu_direct_rdma_supported
        gpu_direct_rdma_flush_writes_options gpu_direct_rdma_writes_ordering memory_pool_supported_handle_types
        deferred_mapping_cuda_array_supported ipc_event_supported cluster_launch unified_function_pointers);
    old
}
