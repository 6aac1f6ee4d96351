//! Virtual memory: reservations, physical memory, mappings, access, handles.

use crate::abi::{AccessDesc, AllocationProp, LOCATION_DEVICE, MemLocation};
use crate::boundary::{In, Out, export};
use crate::{properties, state, visible};
use sire_sim::{Code, Machine, PhysicalId, Prot, Result};
use std::ffi::{c_int, c_ulonglong, c_void};

/// `CU_MEM_ALLOCATION_TYPE_PINNED`.
const PINNED: c_int = 1;
/// `CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR`.
const HANDLE_FD: c_int = 1;

/// The device of a description of physical memory, or why the device cannot have such memory.
fn location(machine: &Machine, prop: &AllocationProp) -> Result<u32> {
    if prop.kind != PINNED {
        return Err(Code::INVALID_VALUE.because(format!("allocation type {}: only pinned (1) exists", prop.kind)));
    }
    if prop.handle_types & !HANDLE_FD != 0 {
        return Err(Code::NOT_SUPPORTED
            .because(format!("handle types {:#x}: the device has file descriptors (1) only", prop.handle_types)));
    }
    if prop.handle_types != 0 && !properties::has_descriptors() {
        return Err(
            Code::NOT_SUPPORTED.because("the device has no handles as file descriptors (SIRE_SIM_DESCRIPTORS=0)")
        );
    }
    if prop.location.kind != LOCATION_DEVICE {
        return Err(Code::NOT_SUPPORTED
            .because(format!("not simulated: physical memory at location type {}", prop.location.kind)));
    }
    state::check_device(machine, prop.location.id)
}

/// The properties and the thread's label as the number that the machine keeps with the memory:
/// handle types (16 bits), RDMA (8), compression (8), usage (16), label (16).
fn to_tag(prop: &AllocationProp) -> u64 {
    u64::from(prop.handle_types as u16)
        | u64::from(prop.gpu_direct_rdma_capable) << 16
        | u64::from(prop.compression) << 24
        | u64::from(prop.usage) << 32
        | u64::from(state::label()) << LABEL_SHIFT
}

/// Where the label is in a tag.
pub const LABEL_SHIFT: u32 = 48;

fn from_tag(tag: u64, device: c_int) -> AllocationProp {
    AllocationProp {
        kind: PINNED,
        handle_types: c_int::from(tag as u16),
        location: MemLocation { kind: LOCATION_DEVICE, id: device },
        win32_meta_data: 0,
        compression: (tag >> 24) as u8,
        gpu_direct_rdma_capable: (tag >> 16) as u8,
        usage: (tag >> 32) as u16,
        reserved: [0; 4],
    }
}

fn no_flags(flags: c_ulonglong) -> Result<()> {
    if flags == 0 { Ok(()) } else { Err(Code::INVALID_VALUE.because(format!("flags {flags:#x} must be 0"))) }
}

fn access_of(machine: &Machine, description: AccessDesc) -> Result<sire_sim::AccessDesc> {
    if description.location.kind != LOCATION_DEVICE {
        return Err(Code::NOT_SUPPORTED
            .because(format!("not simulated: access for location type {}", description.location.kind)));
    }
    let device = state::check_device(machine, description.location.id)?;
    let prot = match description.flags {
        0 => Prot::None,
        1 => Prot::Read,
        3 => Prot::ReadWrite,
        flags => return Err(Code::INVALID_VALUE.because(format!("{flags} is not an access"))),
    };
    Ok(sire_sim::AccessDesc { device, prot })
}

/// What to hand out is there, but the device has nobody to hand it to.
fn nobody_takes(what: &str) -> Result<()> {
    Err(Code::NOT_SUPPORTED.because(format!("not simulated: {what}")))
}

fn bind_memory(machine: &Machine, memory: u64) -> Result<()> {
    machine.physical_info(PhysicalId(memory))?;
    nobody_takes("multicast objects")
}

fn bind_address(machine: &Machine, address: u64) -> Result<()> {
    machine.address_range(address)?;
    nobody_takes("multicast objects")
}

export! { Driver:
    fn cuMemGetAllocationGranularity(out: Out<usize>, prop: In<AllocationProp>, _option: c_int) |machine| {
        let device = location(machine, &prop.get()?)?;
        out.set(machine.granularity(device)? as usize)
    }
    fn cuMemAddressReserve(out: Out<u64>, size: usize, alignment: usize, address: u64, flags: c_ulonglong) |machine| {
        no_flags(flags)?;
        out.required()?.set(machine.reserve(size as u64, alignment as u64, address)?)
    }
    fn cuMemAddressFree(address: u64, size: usize) |machine| { machine.unreserve(address, size as u64) }
    fn cuMemCreate(out: Out<u64>, size: usize, prop: In<AllocationProp>, flags: c_ulonglong) bytes(size) |machine| {
        no_flags(flags)?;
        let (out, prop) = (out.required()?, prop.get()?);
        let device = location(machine, &prop)?;
        out.set(machine.create(device, size as u64, to_tag(&prop))?.0)
    }
    fn cuMemRelease(handle: u64) |machine| { machine.release(PhysicalId(handle)) }
    fn cuMemMap(address: u64, size: usize, offset: usize, handle: u64, flags: c_ulonglong) |machine| {
        no_flags(flags)?;
        machine.map(address, size as u64, offset as u64, PhysicalId(handle))
    }
    fn cuMemUnmap(address: u64, size: usize) |machine| { machine.unmap_range(address, size as u64) }
    fn cuMemSetAccess(address: u64, size: usize, descriptions: In<AccessDesc>, count: usize) |machine| {
        let access: Vec<_> = descriptions.all(count)?.into_iter().map(|one| access_of(machine, one)).collect::<Result<_>>()?;
        if access.is_empty() {
            return Err(Code::INVALID_VALUE.because("no access is described"));
        }
        machine.set_access(address, size as u64, &access)
    }
    fn cuMemGetAccess(flags: Out<c_ulonglong>, location: In<MemLocation>, address: u64) |machine| {
        let device = state::check_device(machine, location.get()?.id)?;
        flags.set(machine.get_access(address, device)? as c_ulonglong)
    }
    fn cuMemRetainAllocationHandle(out: Out<u64>, address: u64) |machine| { out.required()?.set(machine.retain(address)?.0) }
    fn cuMemGetAllocationPropertiesFromHandle(out: Out<AllocationProp>, handle: u64) |machine| {
        let info = machine.physical_info(PhysicalId(handle))?;
        out.set(from_tag(info.tag, visible::to_program(machine, info.device)))
    }
    fn cuMemExportToShareableHandle(out: Out<c_int>, handle: u64, kind: c_int, flags: c_ulonglong) |machine| {
        no_flags(flags)?;
        let out = out.required()?;
        let allowed = machine.physical_info(PhysicalId(handle))?.tag as u16 as c_int;
        if kind != HANDLE_FD || allowed & HANDLE_FD == 0 {
            return Err(Code::INVALID_VALUE.because(format!("handle type {kind} was not asked for when the memory was made ({allowed:#x})")));
        }
        out.set(machine.export_physical(PhysicalId(handle))?)
    }
    fn cuMemImportFromShareableHandle(out: Out<u64>, os_handle: *mut c_void, kind: c_int) |machine| {
        if kind != HANDLE_FD {
            return Err(Code::NOT_SUPPORTED.because(format!("handle type {kind}: the device has file descriptors (1) only")));
        }
        let descriptor = c_int::try_from(os_handle as isize).map_err(|_| Code::INVALID_VALUE.because("that is no file descriptor"))?;
        out.required()?.set(machine.import_physical(descriptor)?.0)
    }
    fn cuMemGetAddressRange_v2(base: Out<u64>, size: Out<usize>, address: u64) |machine| {
        let range = machine.address_range(address)?;
        base.set_if(range.0);
        size.set_if(range.1 as usize);
        Ok(())
    }
    fn cuMulticastBindMem(_group: u64, _at: usize, memory: u64, _offset: usize, _size: usize, _flags: c_ulonglong) |machine| {
        bind_memory(machine, memory)
    }
    fn cuMulticastBindMem_v2(
        _group: u64, _device: c_int, _at: usize, memory: u64, _offset: usize, _size: usize, _flags: c_ulonglong
    ) |machine| { bind_memory(machine, memory) }
    fn cuMulticastBindAddr(_group: u64, _at: usize, address: u64, _size: usize, _flags: c_ulonglong) |machine| {
        bind_address(machine, address)
    }
    fn cuMulticastBindAddr_v2(
        _group: u64, _device: c_int, _at: usize, address: u64, _size: usize, _flags: c_ulonglong
    ) |machine| { bind_address(machine, address) }
    fn cuMemGetHandleForAddressRange(_out: *mut c_void, address: u64, _size: usize, _kind: c_int, _flags: c_ulonglong) |machine| {
        machine.address_range(address)?;
        nobody_takes("dma-buf handles")
    }
}
