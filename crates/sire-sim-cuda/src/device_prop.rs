//! `struct cudaDeviceProp` as CUDA 11, 12 and 13 lay it out, written by hand: each field once, with the versions that have it. Fields that
//! only textures and surfaces use are an array of numbers. Every size is asserted, and offsets where a mistake could hide.

use std::ffi::{c_char, c_int, c_uint};
use std::mem::{offset_of, size_of};

/// Takes fields one by one and puts them into the struct of CUDA 11 (`eleven`), that of 13 (`thirteen`) or `both`; 12's begins with 11's.
/// What both have is copied from the one to the other.
macro_rules! layouts {
    ({$($old:tt)*} {$($new:tt)*} {$($same:ident)*} both $field:ident: $kind:ty, $($rest:tt)*) => {
        layouts!({$($old)* pub $field: $kind,} {$($new)* pub $field: $kind,} {$($same)* $field} $($rest)*);
    };
    ({$($old:tt)*} $new:tt $same:tt eleven $field:ident: $kind:ty, $($rest:tt)*) => {
        layouts!({$($old)* pub $field: $kind,} $new $same $($rest)*);
    };
    ($old:tt {$($new:tt)*} $same:tt thirteen $field:ident: $kind:ty, $($rest:tt)*) => {
        layouts!($old {$($new)* pub $field: $kind,} $same $($rest)*);
    };
    ({$($old:tt)*} {$($new:tt)*} {$($same:ident)*}) => {
        /// That of CUDA 11. CUDA 12's runtime has it still, under the plain name `cudaGetDeviceProperties`.
        #[repr(C)]
        #[derive(Clone, Copy)]
        pub struct DeviceProp11 { $($old)* }

        /// That of CUDA 13.
        #[repr(C)]
        #[derive(Clone, Copy)]
        pub struct DeviceProp { $($new)* }

        fn copy_same(from: &DeviceProp, to: &mut DeviceProp11) {
            $(to.$same = from.$same;)*
        }
    };
}

layouts! {
    {} {} {}
    both name: [c_char; 256],
    both uuid: [u8; 16],
    both luid: [c_char; 8],
    both luid_device_node_mask: c_uint,
    both total_global_mem: usize,
    both shared_mem_per_block: usize,
    both regs_per_block: c_int,
    both warp_size: c_int,
    both mem_pitch: usize,
    both max_threads_per_block: c_int,
    both max_threads_dim: [c_int; 3],
    both max_grid_size: [c_int; 3],
    eleven clock_rate: c_int,
    both total_const_mem: usize,
    both major: c_int,
    both minor: c_int,
    both texture_alignment: usize,
    both texture_pitch_alignment: usize,
    eleven device_overlap: c_int,
    both multi_processor_count: c_int,
    eleven kernel_exec_timeout_enabled: c_int,
    both integrated: c_int,
    both can_map_host_memory: c_int,
    eleven compute_mode: c_int,
    eleven texture_limits: [c_int; 40],
    thirteen texture_limits: [c_int; 39],
    both surface_alignment: usize,
    both concurrent_kernels: c_int,
    both ecc_enabled: c_int,
    both pci_bus_id: c_int,
    both pci_device_id: c_int,
    both pci_domain_id: c_int,
    both tcc_driver: c_int,
    both async_engine_count: c_int,
    both unified_addressing: c_int,
    eleven memory_clock_rate: c_int,
    both memory_bus_width: c_int,
    both l2_cache_size: c_int,
    both persisting_l2_cache_max_size: c_int,
    both max_threads_per_multi_processor: c_int,
    both stream_priorities_supported: c_int,
    both global_l1_cache_supported: c_int,
    both local_l1_cache_supported: c_int,
    both shared_mem_per_multiprocessor: usize,
    both regs_per_multiprocessor: c_int,
    both managed_memory: c_int,
    both is_multi_gpu_board: c_int,
    both multi_gpu_board_group_id: c_int,
    both host_native_atomic_supported: c_int,
    eleven single_to_double_precision_perf_ratio: c_int,
    both pageable_memory_access: c_int,
    both concurrent_managed_access: c_int,
    both compute_preemption_supported: c_int,
    both can_use_host_pointer_for_registered_mem: c_int,
    both cooperative_launch: c_int,
    eleven cooperative_multi_device_launch: c_int,
    both shared_mem_per_block_optin: usize,
    both pageable_memory_access_uses_host_page_tables: c_int,
    both direct_managed_mem_access_from_host: c_int,
    both max_blocks_per_multi_processor: c_int,
    both access_policy_max_window_size: c_int,
    both reserved_shared_mem_per_block: usize,
    thirteen since_12: Since12,
    thirteen device_numa_config: c_int,
    thirteen device_numa_id: c_int,
    thirteen mps_enabled: c_int,
    thirteen host_numa_id: c_int,
    thirteen gpu_pci_device_id: c_uint,
    thirteen gpu_pci_subsystem_id: c_uint,
    thirteen host_numa_multinode_ipc_supported: c_int,
    thirteen reserved: [c_int; 56],
}

/// What CUDA 12 and 13 say beyond CUDA 11.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Since12 {
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
}

/// That of CUDA 12, which `cudaGetDeviceProperties_v2` fills.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct DeviceProp12 {
    pub eleven: DeviceProp11,
    pub since_12: Since12,
    pub reserved: [c_int; 63],
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

const _: () = {
    assert!(size_of::<DeviceProp12>() == 1032);
    assert!(offset_of!(DeviceProp12, since_12.host_register_supported) == 728);
    assert!(offset_of!(DeviceProp12, since_12.memory_pools_supported) == 744);
    assert!(offset_of!(DeviceProp12, since_12.cluster_launch) == 772);
    assert!(offset_of!(DeviceProp12, reserved) == 780);
};

const _: () = {
    assert!(size_of::<DeviceProp>() == 1008);
    assert!(offset_of!(DeviceProp, total_global_mem) == 288);
    assert!(offset_of!(DeviceProp, major) == 360);
    assert!(offset_of!(DeviceProp, multi_processor_count) == 384);
    assert!(offset_of!(DeviceProp, surface_alignment) == 552);
    assert!(offset_of!(DeviceProp, pci_bus_id) == 568);
    assert!(offset_of!(DeviceProp, max_threads_per_multi_processor) == 604);
    assert!(offset_of!(DeviceProp, shared_mem_per_multiprocessor) == 624);
    assert!(offset_of!(DeviceProp, shared_mem_per_block_optin) == 672);
    assert!(offset_of!(DeviceProp, reserved_shared_mem_per_block) == 696);
    assert!(offset_of!(DeviceProp, since_12.memory_pools_supported) == 720);
    assert!(offset_of!(DeviceProp, reserved) == 784);
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

/// The same device in CUDA 11's words.
pub fn eleven(prop: &DeviceProp, dropped: Dropped) -> DeviceProp11 {
    // SAFETY: the struct consists of integers and arrays of integers, for which all zeros is a value.
    let mut old: DeviceProp11 = unsafe { std::mem::zeroed() };
    copy_same(prop, &mut old);
    old.clock_rate = dropped.clock_rate;
    old.memory_clock_rate = dropped.memory_clock_rate;
    old.device_overlap = dropped.device_overlap;
    old.single_to_double_precision_perf_ratio = dropped.single_to_double_precision_perf_ratio;
    old
}

/// The same device in CUDA 12's words.
pub fn twelve(prop: &DeviceProp, dropped: Dropped) -> DeviceProp12 {
    DeviceProp12 { eleven: eleven(prop, dropped), since_12: prop.since_12, reserved: [0; 63] }
}
