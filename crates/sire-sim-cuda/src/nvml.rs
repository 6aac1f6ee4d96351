//! NVML (libnvidia-ml): what tools and PyTorch ask about memory, processes and links. Its memory figures are
//! the machine's, all processes together. It has its own error numbers. Of GPUs that are divided (MIG) it knows the whole and
//! the parts.

use crate::abi::{Handle, NvmlFabric, NvmlMemory, NvmlMemoryV2, NvmlPci, NvmlProcess, NvmlProcessV1, NvmlUtilization};
use crate::boundary::{Out, Text, export, write_text};
use crate::{properties, state};
use sire_sim::{Code, Machine, Result};
use std::ffi::{c_char, c_int, c_uint, c_void};
use std::ops::Range;

/// Handles of GPUs, by their numbers.
const GPUS: u64 = 0x5156_0000_0000;
/// Handles of MIG devices, by their numbers among all of the machine.
const PARTS: u64 = 0x5158_0000_0000;

/// Numbers of NVML that CUDA has no equal of, kept apart until they are returned.
const OWN: i32 = 1_000_000;
const INSUFFICIENT_SIZE: Code = Code(OWN + 7);
const NOT_FOUND: Code = Code(OWN + 6);
const VERSION_MISMATCH: Code = Code(OWN + 25);

/// NVML's number for one of ours.
pub fn number(code: c_int) -> c_int {
    match code {
        0 => 0,
        3 | 4 => 1,
        1 | 100 | 101 | 400 => 2,
        801 => 3,
        500 => 6,
        2 => 20,
        own if own >= OWN => own - OWN,
        _ => 999,
    }
}

fn handle(family: u64, number: u32) -> Handle {
    (family + u64::from(number) * state::STRIDE) as Handle
}

/// What a handle names.
struct Named {
    gpu: u32,
    /// All of it, or the one part that is meant.
    devices: Range<u32>,
    is_part: bool,
}

fn named(machine: &Machine, device: Handle) -> Result<Named> {
    let part = state::device_of_family(machine, PARTS, device as u64).filter(|_| properties::parts() > 0);
    if let Some(part) = part {
        return Ok(Named { gpu: properties::gpu_of(part), devices: part..part + 1, is_part: true });
    }
    let gpu = state::device_of_family(machine, GPUS, device as u64).filter(|gpu| *gpu < properties::gpus(machine));
    let gpu = gpu.ok_or_else(|| Code::INVALID_VALUE.because(format!("{device:?} is not a device handle")))?;
    Ok(Named { gpu, devices: properties::devices_of(gpu), is_part: false })
}

/// One device of what a handle names.
fn device_of(machine: &Machine, device: Handle) -> Result<u32> {
    Ok(named(machine, device)?.devices.start)
}

/// The number of a MIG device among its GPU's.
fn number_of_part(machine: &Machine, device: Handle) -> Result<c_uint> {
    let named = named(machine, device)?;
    if !named.is_part {
        return Err(Code::INVALID_VALUE.because(format!("{device:?} is not a MIG device")));
    }
    Ok(named.devices.start - properties::devices_of(named.gpu).start)
}

fn uuid(machine: &Machine, device: Handle) -> Result<String> {
    let named = named(machine, device)?;
    Ok(if named.is_part { properties::uuid_text(named.devices.start) } else { properties::gpu_uuid_text(named.gpu) })
}

/// Free and total bytes of all that a handle names.
fn memory(machine: &Machine, device: Handle) -> Result<(u64, u64)> {
    named(machine, device)?.devices.try_fold((0, 0), |(free, total), device| {
        let each = machine.memory_info(device)?;
        Ok((free + each.0, total + each.1))
    })
}

fn text(out: Out<c_char>, capacity: c_uint, value: &str) -> Result<()> {
    if capacity as usize <= value.len() {
        return Err(INSUFFICIENT_SIZE.because(format!("{capacity} bytes are too few for {value}")));
    }
    write_text(out.required()?, capacity as usize, value);
    Ok(())
}

fn found(out: Out<Handle>, device: Option<Handle>) -> Result<()> {
    out.set(device.ok_or_else(|| NOT_FOUND.because("no such device"))?)
}

fn at_address(machine: &Machine, address: Text, out: Out<Handle>) -> Result<()> {
    found(out, properties::gpu_at(machine, address.get()?).map(|gpu| handle(GPUS, gpu)))
}

fn by_uuid(machine: &Machine, uuid: &str) -> Option<Handle> {
    let gpu = (0..properties::gpus(machine)).find(|gpu| properties::gpu_uuid_text(*gpu) == uuid);
    let part = || (0..machine.device_count()).find(|device| properties::uuid_text(*device) == uuid);
    gpu.map(|gpu| handle(GPUS, gpu)).or_else(|| part().map(|device| handle(PARTS, device)))
}

/// Lists processes in NVML's manner: a count that is room on the way in and need on the way out.
fn processes<T: Copy>(
    machine: &Machine,
    device: Handle,
    count: Out<c_uint>,
    out: Out<T>,
    make: impl Fn(u32, u64) -> T,
) -> Result<()> {
    let mut list = Vec::new();
    let devices = named(machine, device)?.devices;
    for each in devices.filter(|_| !machine.options().hidden) {
        list.append(&mut machine.processes(each)?);
    }
    let room = count.get()? as usize;
    count.set(list.len() as c_uint)?;
    if list.len() > room {
        return Err(INSUFFICIENT_SIZE.because(format!("{} processes, room for {room}", list.len())));
    }
    let entries: Vec<T> = list.into_iter().map(|(pid, used)| make(pid, used)).collect();
    if !entries.is_empty() {
        out.required()?.set_all(&entries);
    }
    Ok(())
}

fn process(pid: u32, used: u64) -> NvmlProcess {
    NvmlProcess { pid, used_gpu_memory: used, gpu_instance_id: c_uint::MAX, compute_instance_id: c_uint::MAX }
}

fn pci(gpu: u32) -> NvmlPci {
    // SAFETY: `NvmlPci` consists of integers, for which all zeros is a value.
    let mut info: NvmlPci = unsafe { std::mem::zeroed() };
    let short = properties::pci_address(gpu);
    for (to, from) in info.bus_id_legacy.iter_mut().zip(short.bytes()) {
        *to = from as c_char;
    }
    for (to, from) in info.bus_id.iter_mut().zip(format!("0000{short}").bytes()) {
        *to = from as c_char;
    }
    info.bus = properties::attribute(33, properties::devices_of(gpu).start) as c_uint;
    info.pci_device_id = 0x5152_10DE;
    info
}

/// NVML's sentence for one of its numbers.
#[unsafe(no_mangle)]
pub extern "C" fn nvmlErrorString(error: c_int) -> *const c_char {
    let sentence = match error {
        0 => c"Success",
        1 => c"Uninitialized",
        2 => c"Invalid Argument",
        3 => c"Not Supported",
        6 => c"Not Found",
        7 => c"Insufficient Size",
        20 => c"Insufficient Memory",
        25 => c"Argument Version Mismatch",
        _ => c"Unknown Error",
    };
    sentence.as_ptr()
}

export! { Nvml:
    fn nvmlInit() |_machine| { Ok(()) }
    fn nvmlInit_v2() |_machine| { Ok(()) }
    fn nvmlInitWithFlags(_flags: c_uint) |_machine| { Ok(()) }
    fn nvmlShutdown() |_machine| { Ok(()) }
    fn nvmlSystemGetDriverVersion(out: Out<c_char>, capacity: c_uint) |_machine| { text(out, capacity, properties::DRIVER_VERSION) }
    fn nvmlSystemGetNVMLVersion(out: Out<c_char>, capacity: c_uint) |_machine| { text(out, capacity, properties::DRIVER_VERSION) }
    fn nvmlSystemGetCudaDriverVersion(version: Out<c_int>) |_machine| { version.set(properties::CUDA_VERSION) }
    fn nvmlSystemGetCudaDriverVersion_v2(version: Out<c_int>) |_machine| { version.set(properties::CUDA_VERSION) }
    fn nvmlSystemGetProcessName(pid: c_uint, out: Out<c_char>, capacity: c_uint) |_machine| {
        let name = std::fs::read_link(format!("/proc/{pid}/exe")).map_err(|error| NOT_FOUND.because(format!("process {pid}: {error}")))?;
        text(out, capacity, &name.to_string_lossy())
    }

    fn nvmlDeviceGetCount(count: Out<c_uint>) |machine| { count.set(properties::gpus(machine)) }
    fn nvmlDeviceGetCount_v2(count: Out<c_uint>) |machine| { count.set(properties::gpus(machine)) }
    fn nvmlDeviceGetHandleByIndex(index: c_uint, out: Out<Handle>) |machine| { by_index(machine, index, out) }
    fn nvmlDeviceGetHandleByIndex_v2(index: c_uint, out: Out<Handle>) |machine| { by_index(machine, index, out) }
    fn nvmlDeviceGetHandleByPciBusId(address: Text, out: Out<Handle>) |machine| { at_address(machine, address, out) }
    fn nvmlDeviceGetHandleByPciBusId_v2(address: Text, out: Out<Handle>) |machine| { at_address(machine, address, out) }
    fn nvmlDeviceGetHandleByUUID(uuid: Text, out: Out<Handle>) |machine| {
        found(out, by_uuid(machine, uuid.get()?))
    }
    fn nvmlDeviceGetIndex(device: Handle, index: Out<c_uint>) |machine| { index.set(named(machine, device)?.gpu) }
    fn nvmlDeviceGetMinorNumber(device: Handle, minor: Out<c_uint>) |machine| { minor.set(named(machine, device)?.gpu) }
    fn nvmlDeviceGetName(device: Handle, out: Out<c_char>, capacity: c_uint) |machine| {
        let is_part = named(machine, device)?.is_part;
        text(out, capacity, if is_part { properties::name() } else { properties::NAME })
    }
    fn nvmlDeviceGetUUID(device: Handle, out: Out<c_char>, capacity: c_uint) |machine| {
        text(out, capacity, &uuid(machine, device)?)
    }
    fn nvmlDeviceGetPciInfo_v3(device: Handle, out: Out<NvmlPci>) |machine| { out.set(pci(named(machine, device)?.gpu)) }
    fn nvmlDeviceGetCudaComputeCapability(device: Handle, major: Out<c_int>, minor: Out<c_int>) |machine| {
        let device = device_of(machine, device)?;
        major.set(properties::attribute(75, device))?;
        minor.set(properties::attribute(76, device))
    }

    fn nvmlDeviceGetMemoryInfo(device: Handle, out: Out<NvmlMemory>) |machine| {
        let (free, total) = memory(machine, device)?;
        out.set(NvmlMemory { total, free, used: total - free })
    }
    fn nvmlDeviceGetMemoryInfo_v2(device: Handle, out: Out<NvmlMemoryV2>) |machine| {
        let (free, total) = memory(machine, device)?;
        let version = Out::<c_uint>::get(out.cast())?;
        let expected = std::mem::size_of::<NvmlMemoryV2>() as c_uint | 2 << 24;
        if version != expected {
            return Err(VERSION_MISMATCH.because(format!("struct version {version:#x}, expected {expected:#x}")));
        }
        out.set(NvmlMemoryV2 { version, total, reserved: 0, free, used: total - free })
    }
    fn nvmlDeviceGetComputeRunningProcesses(device: Handle, count: Out<c_uint>, out: Out<NvmlProcessV1>) |machine| {
        processes(machine, device, count, out, |pid, used| NvmlProcessV1 { pid, used_gpu_memory: used })
    }
    fn nvmlDeviceGetComputeRunningProcesses_v2(device: Handle, count: Out<c_uint>, out: Out<NvmlProcess>) |machine| {
        processes(machine, device, count, out, process)
    }
    fn nvmlDeviceGetComputeRunningProcesses_v3(device: Handle, count: Out<c_uint>, out: Out<NvmlProcess>) |machine| {
        processes(machine, device, count, out, process)
    }
    fn nvmlDeviceGetGraphicsRunningProcesses_v3(device: Handle, count: Out<c_uint>, _out: Out<NvmlProcess>) |machine| {
        device_of(machine, device)?;
        count.set(0)
    }

    fn nvmlDeviceGetUtilizationRates(device: Handle, out: Out<NvmlUtilization>) |machine| {
        device_of(machine, device)?;
        out.set(NvmlUtilization { gpu: 0, memory: 0 })
    }

    fn nvmlDeviceGetMigMode(device: Handle, current: Out<c_uint>, pending: Out<c_uint>) |machine| {
        if properties::parts() == 0 {
            return absent(machine, device, "MIG");
        }
        device_of(machine, device)?;
        current.set(1)?;
        pending.set(1)
    }
    fn nvmlDeviceGetMaxMigDeviceCount(device: Handle, count: Out<c_uint>) |machine| {
        device_of(machine, device)?;
        count.set(properties::parts())
    }
    fn nvmlDeviceGetMigDeviceHandleByIndex(device: Handle, index: c_uint, out: Out<Handle>) |machine| {
        let named = named(machine, device)?;
        let part = named.devices.start.checked_add(index).filter(|part| !named.is_part && named.devices.contains(part));
        found(out, part.filter(|_| properties::parts() > 0).map(|part| handle(PARTS, part)))
    }
    fn nvmlDeviceIsMigDeviceHandle(device: Handle, out: Out<c_uint>) |machine| { out.set(named(machine, device)?.is_part.into()) }
    fn nvmlDeviceGetDeviceHandleFromMigDeviceHandle(device: Handle, out: Out<Handle>) |machine| {
        number_of_part(machine, device)?;
        out.set(handle(GPUS, named(machine, device)?.gpu))
    }
    fn nvmlDeviceGetGpuInstanceId(device: Handle, out: Out<c_uint>) |machine| { out.set(number_of_part(machine, device)? + 1) }
    fn nvmlDeviceGetComputeInstanceId(device: Handle, out: Out<c_uint>) |machine| {
        number_of_part(machine, device)?;
        out.set(0)
    }
    fn nvmlDeviceGetNvLinkState(device: Handle, _link: c_uint, _active: Out<c_uint>) |machine| { absent(machine, device, "NVLink") }
    fn nvmlDeviceGetNvLinkRemoteDeviceType(device: Handle, _link: c_uint, _kind: Out<c_uint>) |machine| { absent(machine, device, "NVLink") }
    fn nvmlDeviceGetNvLinkRemotePciInfo_v2(device: Handle, _link: c_uint, _pci: Out<NvmlPci>) |machine| { absent(machine, device, "NVLink") }
    fn nvmlDeviceGetGpuFabricInfoV(device: Handle, out: Out<NvmlFabric>) |machine| {
        device_of(machine, device)?;
        let version = Out::<c_uint>::get(out.cast())?;
        // NVML_GPU_FABRIC_STATE_NOT_SUPPORTED
        out.set(NvmlFabric { version, cluster_uuid: [0; 16], status: 3, clique_id: 0, state: 0 })
    }
    fn nvmlDeviceGetGpuFabricInfo(device: Handle, _out: *mut c_void) |machine| { absent(machine, device, "a fabric") }
}

fn by_index(machine: &Machine, index: c_uint, out: Out<Handle>) -> Result<()> {
    if index >= properties::gpus(machine) {
        return Err(Code::INVALID_VALUE.because(format!("device {index} of {}", properties::gpus(machine))));
    }
    out.set(handle(GPUS, index))
}

fn absent(machine: &Machine, device: Handle, what: &str) -> Result<()> {
    device_of(machine, device)?;
    Err(Code::NOT_SUPPORTED.because(format!("the software device has no {what}")))
}
