//! What the device says of itself: attributes by number, the property struct, its name, UUID and PCI address.
//! The figures describe a compute-capability 9.0 device; memory is the machine's own.

use crate::device_prop::{DeviceProp, Dropped};
use crate::state;
use sire_sim::{Machine, Result};
use std::ffi::{c_char, c_int};
use std::ops::Range;

/// What `cudaDeviceProp::name` and NVML call the device.
pub const NAME: &str = "Sire software device";
/// CUDA version of the driver, and of the newest runtime (`release`).
pub const CUDA_VERSION: c_int = 13020;
/// NVML's driver version.
pub const DRIVER_VERSION: &str = "595.00 (software)";

/// What it calls a MIG device.
const MIG_NAME: &str = "Sire software device MIG";

const MULTIPROCESSORS: c_int = 16;
const L2_BYTES: c_int = 50 << 20;

/// Attributes by CUDA's number. Numbers that are not here are 0: the device does not have the thing.
/// Both numberings (`cudaDeviceAttr`, `CUdevice_attribute`) agree.
const ATTRIBUTES: &[(c_int, c_int)] = &[
    (1, 1024),         // threads per block
    (2, 1024),         // block x
    (3, 1024),         // block y
    (4, 64),           // block z
    (5, 0x7fff_ffff),  // grid x
    (6, 65535),        // grid y
    (7, 65535),        // grid z
    (8, 49152),        // shared memory per block
    (9, 65536),        // constant memory
    (10, 32),          // warp size
    (11, 0x7fff_ffff), // pitch
    (12, 65536),       // registers per block
    (13, 1_755_000),   // clock, kHz
    (14, 512),         // texture alignment
    (15, 1),           // copies overlap with kernels
    (19, 1),           // host memory can be mapped
    (30, 512),         // surface alignment
    (31, 1),           // concurrent kernels
    (36, 2_619_000),   // memory clock, kHz
    (37, 5120),        // memory bus, bits
    (38, L2_BYTES),
    (39, 2048),    // threads per multiprocessor
    (40, 3),       // copy engines
    (41, 1),       // unified addressing
    (51, 32),      // texture pitch alignment
    (75, 9),       // compute capability, major
    (76, 0),       // compute capability, minor
    (78, 1),       // stream priorities
    (79, 1),       // L1 caches globals
    (80, 1),       // L1 caches locals
    (81, 233_472), // shared memory per multiprocessor
    (82, 65536),   // registers per multiprocessor
    (83, 1),       // managed memory
    (87, 2),       // single to double precision
    (91, 1),       // registered host memory at the host's address
    (95, 1),       // cooperative launch
    (97, 232_448), // shared memory per block, opt-in
    (99, 1),       // host registration
    (102, 1),      // virtual memory management
    (106, 32),     // blocks per multiprocessor
    (110, 1),      // GPUDirect RDMA with virtual memory management
    (111, 1024),   // reserved shared memory per block
    (115, 1),      // memory pools
    (116, 1),      // GPUDirect RDMA
    (119, 1),      // memory pools as file descriptors
    (122, 1),      // 64-bit stream memory operations
    (123, 1),      // wait-value NOR
];

/// How many MIG devices a GPU is divided into; 0: it is not.
pub fn parts() -> u32 {
    state::existing_machine().map_or(0, |machine| machine.options().mig)
}

/// The GPU of which a device is all, or a part.
pub fn gpu_of(device: u32) -> u32 {
    device / parts().max(1)
}

/// The devices that a GPU is, or is divided into.
pub fn devices_of(gpu: u32) -> Range<u32> {
    let each = parts().max(1);
    gpu * each..(gpu + 1) * each
}

/// How many GPUs there are.
pub fn gpus(machine: &Machine) -> u32 {
    machine.device_count() / parts().max(1)
}

/// What the device is called.
pub fn name() -> &'static str {
    if parts() == 0 { NAME } else { MIG_NAME }
}

const MULTIPROCESSOR_COUNT: c_int = 16;
const PCI_BUS: c_int = 33;
const HOST_NUMA: c_int = 134;
const HANDLES_AS_DESCRIPTORS: c_int = 103;

/// Whether physical memory can be handed out as a file descriptor.
pub fn has_descriptors() -> bool {
    state::existing_machine().is_none_or(|machine| machine.options().descriptors)
}

/// The attribute `number` of `device`.
pub fn attribute(number: c_int, device: u32) -> c_int {
    match number {
        PCI_BUS => pci_bus(gpu_of(device)),
        MULTIPROCESSOR_COUNT => MULTIPROCESSORS / parts().max(1).cast_signed(),
        HOST_NUMA => -1,
        HANDLES_AS_DESCRIPTORS => c_int::from(has_descriptors()),
        _ => ATTRIBUTES.iter().find(|(known, _)| *known == number).map_or(0, |(_, value)| *value),
    }
}

/// Whether `number` is an attribute that some CUDA 13 has.
pub fn is_attribute(number: c_int) -> bool {
    (1..=160).contains(&number)
}

fn pci_bus(gpu: u32) -> c_int {
    gpu as c_int + 1
}

/// `0000:01:00.0`.
pub fn pci_address(gpu: u32) -> String {
    format!("0000:{:02X}:00.0", pci_bus(gpu))
}

/// The GPU of a PCI address in any of the usual spellings (`0000:01:00.0`, `00000000:01:00.0`, `01:00`).
pub fn gpu_at(machine: &Machine, address: &str) -> Option<u32> {
    let mut parts = address.rsplit(':');
    parts.next()?;
    let bus = u32::from_str_radix(parts.next()?, 16).ok()?;
    bus.checked_sub(1).filter(|gpu| *gpu < gpus(machine))
}

fn numbered(mut bytes: [u8; 16], number: u32) -> [u8; 16] {
    bytes[14] = (number >> 8) as u8;
    bytes[15] = number as u8;
    bytes
}

/// The GPU's UUID: the same in every process of an environment.
pub fn gpu_uuid(gpu: u32) -> [u8; 16] {
    numbered(*b"sire-software-\0\0", gpu)
}

/// The device's UUID: its GPU's, if that is not divided.
pub fn uuid(device: u32) -> [u8; 16] {
    if parts() == 0 { gpu_uuid(device) } else { numbered(*b"sire-MIG-parts\0\0", device) }
}

/// NVML's spelling of the GPU's UUID.
pub fn gpu_uuid_text(gpu: u32) -> String {
    spelled("GPU-", gpu_uuid(gpu))
}

/// NVML's spelling of the device's UUID.
pub fn uuid_text(device: u32) -> String {
    spelled(if parts() == 0 { "GPU-" } else { "MIG-" }, uuid(device))
}

fn spelled(kind: &str, bytes: [u8; 16]) -> String {
    let mut text = String::from(kind);
    for (at, byte) in bytes.iter().enumerate() {
        if [4, 6, 8, 10].contains(&at) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

/// Fills the property struct.
pub fn properties(machine: &Machine, device: u32) -> Result<DeviceProp> {
    let (_, total) = machine.memory_info(device)?;
    // SAFETY: `DeviceProp` consists of integers and arrays of integers, for which all zeros is a value.
    let mut prop: DeviceProp = unsafe { std::mem::zeroed() };
    let get = |number| attribute(number, device);
    let size = |number| attribute(number, device) as usize;
    for (to, from) in prop.name.iter_mut().zip(name().bytes()) {
        *to = from as c_char;
    }
    prop.uuid = uuid(device);
    prop.total_global_mem = total as usize;
    prop.shared_mem_per_block = size(8);
    prop.regs_per_block = get(12);
    prop.warp_size = get(10);
    prop.mem_pitch = size(11);
    prop.max_threads_per_block = get(1);
    prop.max_threads_dim = [get(2), get(3), get(4)];
    prop.max_grid_size = [get(5), get(6), get(7)];
    prop.total_const_mem = size(9);
    (prop.major, prop.minor) = (get(75), get(76));
    prop.texture_alignment = size(14);
    prop.texture_pitch_alignment = size(51);
    prop.multi_processor_count = get(16);
    prop.can_map_host_memory = get(19);
    prop.surface_alignment = size(30);
    prop.concurrent_kernels = get(31);
    prop.pci_bus_id = get(PCI_BUS);
    prop.async_engine_count = get(40);
    prop.unified_addressing = get(41);
    prop.memory_bus_width = get(37);
    prop.l2_cache_size = get(38);
    prop.max_threads_per_multi_processor = get(39);
    prop.stream_priorities_supported = get(78);
    prop.global_l1_cache_supported = get(79);
    prop.local_l1_cache_supported = get(80);
    prop.shared_mem_per_multiprocessor = size(81);
    prop.regs_per_multiprocessor = get(82);
    prop.managed_memory = get(83);
    prop.can_use_host_pointer_for_registered_mem = get(91);
    prop.cooperative_launch = get(95);
    prop.shared_mem_per_block_optin = size(97);
    prop.max_blocks_per_multi_processor = get(106);
    prop.reserved_shared_mem_per_block = size(111);
    prop.since_12.host_register_supported = get(99);
    prop.since_12.memory_pools_supported = get(115);
    prop.since_12.gpu_direct_rdma_supported = get(116);
    prop.since_12.memory_pool_supported_handle_types = get(119) as u32;
    prop.host_numa_id = get(HOST_NUMA);
    Ok(prop)
}

/// What only CUDA 12's struct says.
pub fn dropped() -> Dropped {
    let get = |number| attribute(number, 0);
    Dropped {
        clock_rate: get(13),
        memory_clock_rate: get(36),
        device_overlap: get(15),
        single_to_double_precision_perf_ratio: get(87),
    }
}

/// Lowest and highest stream priority.
pub const STREAM_PRIORITIES: (c_int, c_int) = (0, -5);
