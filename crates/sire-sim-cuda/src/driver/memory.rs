//! The heap, host memory and pointer attributes.

use crate::boundary::{In, Out, export};
use crate::runtime::{free_block, host_info};
use crate::state::{self, Context};
use crate::visible;
use sire_sim::{Code, Machine, PointerInfo, PointerKind, Result};
use std::ffi::{c_int, c_uint, c_void};

export! { Driver:
    fn cuMemGetInfo_v2(free: Out<usize>, total: Out<usize>) |machine| {
        let info = machine.memory_info(state::context_device(machine)?)?;
        free.set_if(info.0 as usize);
        total.set_if(info.1 as usize);
        Ok(())
    }
    fn cuMemAlloc_v2(out: Out<u64>, size: usize) bytes(size) |machine| {
        let (out, device) = (out.required()?, state::context_device(machine)?);
        if size == 0 {
            return Err(Code::INVALID_VALUE.because("an allocation of 0 bytes"));
        }
        out.set(machine.malloc(device, size as u64)?)
    }
    fn cuMemAllocManaged(out: Out<u64>, size: usize, _flags: c_uint) bytes(size) |machine| {
        let (out, device) = (out.required()?, state::context_device(machine)?);
        if size == 0 {
            return Err(Code::INVALID_VALUE.because("an allocation of 0 bytes"));
        }
        out.set(machine.malloc_managed(device, size as u64)?)
    }
    fn cuMemFree_v2(address: u64) |machine| { free_block(machine, address, || machine.free(address)) }
    fn cuMemAllocPitch_v2(out: Out<u64>, pitch: Out<usize>, width: usize, height: usize, element: c_uint) bytes(width * height) |machine| {
        let (out, pitch, device) = (out.required()?, pitch.required()?, state::context_device(machine)?);
        let rows = width.next_multiple_of(512);
        let size = rows.checked_mul(height).filter(|size| *size > 0 && matches!(element, 4 | 8 | 16));
        let size = size.ok_or_else(|| Code::INVALID_VALUE.because("width, height and element size (4, 8 or 16) of an allocation with a pitch"))?;
        out.set(machine.malloc(device, size as u64)?)?;
        pitch.set(rows)
    }

    fn cuMemAllocHost_v2(out: Out<u64>, size: usize) bytes(size) |machine| {
        state::context_device(machine)?;
        out.required()?.set(machine.host_alloc(state::current_device(machine), size as u64, 0)?)
    }
    fn cuMemHostAlloc(out: Out<u64>, size: usize, flags: c_uint) bytes(size) |machine| {
        state::context_device(machine)?;
        out.required()?.set(machine.host_alloc(state::current_device(machine), size as u64, flags)?)
    }
    fn cuMemFreeHost(address: u64) |machine| { machine.host_free(address) }
    fn cuMemHostRegister_v2(address: u64, size: usize, flags: c_uint) bytes(size) |machine| {
        state::context_device(machine)?;
        // SAFETY: the caller of cuMemHostRegister keeps the range mapped until it unregisters it.
        unsafe { machine.host_register(state::current_device(machine), address, size as u64, flags) }
    }
    fn cuMemHostUnregister(address: u64) |machine| { machine.host_unregister(address) }
    fn cuMemHostGetFlags(flags: Out<c_uint>, address: u64) |machine| { flags.set(host_info(machine, address)?.flags) }
    fn cuMemHostGetDevicePointer_v2(out: Out<u64>, address: u64, _flags: c_uint) |machine| {
        host_info(machine, address)?;
        out.set(address)
    }

    fn cuPointerGetAttribute(data: *mut c_void, attribute: c_int, address: u64) |machine| {
        let info = known(machine, address)?;
        write_attribute(machine, data, attribute, address, &info)
    }
    fn cuPointerGetAttributes(count: c_uint, attributes: In<c_int>, data: In<*mut c_void>, address: u64) |machine| {
        let (attributes, data) = (attributes.all(count as usize)?, data.all(count as usize)?);
        let info = machine.pointer(address);
        attributes.into_iter().zip(data).try_for_each(|(attribute, data)| write_attribute(machine, data, attribute, address, &info))
    }
}

fn known(machine: &Machine, address: u64) -> Result<PointerInfo> {
    let info = machine.pointer(address);
    match info.kind {
        PointerKind::Pageable => {
            Err(Code::INVALID_VALUE.because(format!("{address:#x} is not a pointer of the device's")))
        }
        _ => Ok(info),
    }
}

/// Attributes whose value is a 4-byte number.
fn small_attribute(machine: &Machine, attribute: c_int, address: u64, info: &PointerInfo) -> Option<u32> {
    let host = matches!(info.kind, PointerKind::Pinned | PointerKind::Registered);
    let foreign = info.kind == PointerKind::Pageable;
    Some(match attribute {
        2 if foreign => 0,
        2 if host => 1,
        2 => 2, // memory type
        8 => u32::from(info.kind == PointerKind::Managed),
        9 if foreign => u32::MAX - 1,
        9 => visible::to_program(machine, info.device) as u32, // device ordinal
        10 => u32::from(machine.ipc_capable(address)),         // legacy IPC
        13 => u32::from(!foreign),                             // mapped
        15 => 1,                                               // GPUDirect RDMA
        16 if info.vmm => 3,                                   // access flags
        16 => 0,
        _ => return None,
    })
}

fn write_attribute(
    machine: &Machine,
    data: *mut c_void,
    attribute: c_int,
    address: u64,
    info: &PointerInfo,
) -> Result<()> {
    if let Some(value) = small_attribute(machine, attribute, address, info) {
        // Booleans (managed, IPC-capable, mapped) are a byte wide in some headers and 4 in others; 4 is what the driver writes.
        return Out::<u32>::from_caller(data.cast()).set(value);
    }
    let value = match attribute {
        1 => Context::primary(info.device).0, // context
        3 | 4 => address,                     // device and host pointer
        7 => info.base,                       // buffer id
        11 | 19 => info.base,                 // start of range, of mapping
        12 | 18 => info.size,                 // its size
        17 => 0,                              // memory pool
        _ => return Err(Code::INVALID_VALUE.because(format!("not simulated: pointer attribute {attribute}"))),
    };
    Out::<u64>::from_caller(data.cast()).set(value)
}
