//! Versions, errors, devices and their properties, peers, entry points of the driver.

use crate::abi::Handle;
use crate::boundary::{Out, Text, contain, error_text, export, last_error, take_last_error, write_text};
use crate::device_prop::{self, DeviceProp, DeviceProp12};
use crate::driver::entry;
use crate::{names, properties, release, state, visible};
use sire_sim::Code;
use std::ffi::{c_char, c_int, c_uint, c_ulonglong};

/// The thread's last error, forgotten.
#[unsafe(no_mangle)]
pub extern "C" fn cudaGetLastError() -> c_int {
    contain("cudaGetLastError", 999, || sticky().unwrap_or_else(take_last_error))
}

/// The thread's last error.
#[unsafe(no_mangle)]
pub extern "C" fn cudaPeekAtLastError() -> c_int {
    contain("cudaPeekAtLastError", 999, || sticky().unwrap_or_else(last_error))
}

/// The error that the thread's device cannot get rid of, once this thread has seen an error at all.
fn sticky() -> Option<c_int> {
    if last_error() == 0 {
        return None;
    }
    let machine = state::existing_machine().filter(|_| !state::is_down())?;
    machine.check_alive(state::current_device(machine)).err().map(|error| error.code.0)
}

/// The constant's name.
#[unsafe(no_mangle)]
pub extern "C" fn cudaGetErrorName(error: c_int) -> *const c_char {
    names::runtime_name(error).as_ptr()
}

/// The error in words.
#[unsafe(no_mangle)]
pub extern "C" fn cudaGetErrorString(error: c_int) -> *const c_char {
    error_text(error)
}

export! { RuntimeQuery:
    fn cudaDriverGetVersion(version: Out<c_int>) |_machine| { version.set(properties::CUDA_VERSION) }
    fn cudaRuntimeGetVersion(version: Out<c_int>) |_machine| { version.set(release::of_process().version()) }

    fn cudaGetDeviceCount(count: Out<c_int>) |machine| {
        let devices = visible::count(machine);
        count.set(devices as c_int)?;
        if devices == 0 { Err(state::no_device()) } else { Ok(()) }
    }
    fn cudaGetDevice(device: Out<c_int>) |machine| {
        state::check_device(machine, 0)?;
        device.set(visible::to_program(machine, state::current_device(machine)))
    }
    fn cudaSetDevice(device: c_int) |machine| {
        let device = state::check_device(machine, device)?;
        machine.check_alive(device)?;
        state::use_device(device);
        Ok(())
    }
    fn cudaInitDevice(device: c_int, _device_flags: c_uint, _flags: c_uint) |machine| {
        let device = state::check_device(machine, device)?;
        machine.check_alive(device)
    }
    fn cudaSetValidDevices(devices: crate::boundary::In<c_int>, count: c_int) |machine| {
        for device in devices.all(usize::try_from(count).unwrap_or(0))? {
            state::check_device(machine, device)?;
        }
        Ok(())
    }
    fn cudaSetDeviceFlags(_flags: c_uint) |_machine| { Ok(()) }
    fn cudaGetDeviceFlags(flags: Out<c_uint>) |_machine| { flags.set(0) }
    fn cudaGetDeviceProperties(prop: Out<DeviceProp>, device: c_int) |machine| {
        let device = state::check_device(machine, device)?;
        let (prop, all) = (prop.required()?, properties::properties(machine, device)?);
        if release::is_12() {
            // The plain name is CUDA 11's there, and its struct shorter.
            return prop.cast().set(device_prop::eleven(&all, properties::dropped()));
        }
        prop.set(all)
    }
    fn cudaGetDeviceProperties_v2(prop: Out<DeviceProp12>, device: c_int) |machine| {
        let device = state::check_device(machine, device)?;
        prop.required()?.set(device_prop::twelve(&properties::properties(machine, device)?, properties::dropped()))
    }
    fn cudaDeviceGetAttribute(value: Out<c_int>, attribute: c_int, device: c_int) |machine| {
        let device = state::check_device(machine, device)?;
        if !properties::is_attribute(attribute) {
            return Err(Code::INVALID_VALUE.because(format!("there is no attribute {attribute}")));
        }
        value.set(properties::attribute(attribute, device))
    }
    fn cudaDeviceGetPCIBusId(buffer: Out<c_char>, capacity: c_int, device: c_int) |machine| {
        let device = state::check_device(machine, device)?;
        let capacity = usize::try_from(capacity).unwrap_or(0);
        let address = properties::pci_address(properties::gpu_of(device));
        if capacity <= address.len() {
            return Err(Code::INVALID_VALUE.because(format!("{capacity} bytes are too few for {address}")));
        }
        write_text(buffer.required()?, capacity, &address);
        Ok(())
    }
    fn cudaDeviceGetByPCIBusId(device: Out<c_int>, address: Text) |machine| {
        let address = address.get()?;
        let found = properties::gpu_at(machine, address).and_then(|gpu| visible::part_of(machine, gpu));
        device.set(found.ok_or_else(|| Code::INVALID_VALUE.because(format!("no device at {address}")))?)
    }
    fn cudaDeviceCanAccessPeer(can: Out<c_int>, device: c_int, peer: c_int) |machine| {
        let (device, peer) = (state::check_device(machine, device)?, state::check_device(machine, peer)?);
        can.set(c_int::from(device != peer && machine.can_access_peer(device, peer)?))
    }
    fn cudaDeviceReset() |machine| {
        let device = state::current_device(machine);
        machine.reset(device);
        state::reset_primary(device);
        Ok(())
    }
    fn cudaGetDriverEntryPointByVersion(symbol: Text, pointer: Out<Handle>, version: c_uint, flags: c_ulonglong, status: Out<c_int>) |_machine| {
        entry_point(symbol, pointer, version, flags, status)
    }
    fn cudaGetDriverEntryPoint(symbol: Text, pointer: Out<Handle>, flags: c_ulonglong, status: Out<c_int>) |_machine| {
        entry_point(symbol, pointer, release::of_process().version() as c_uint, flags, status)
    }
}

/// cudart succeeds even if the symbol is absent, and says so in `status`.
fn entry_point(
    symbol: Text,
    pointer: Out<Handle>,
    version: c_uint,
    flags: c_ulonglong,
    status: Out<c_int>,
) -> sire_sim::Result<()> {
    let pointer = pointer.required()?;
    let found = entry::look_up(symbol.get()?, version, flags)?;
    status.set_if(found.status());
    pointer.set(found.address())
}

export! { Runtime:
    fn cudaDeviceSynchronize() |machine| { machine.device_synchronize(state::current_device(machine)) }
    fn cudaThreadSynchronize() |machine| { machine.device_synchronize(state::current_device(machine)) }
    fn cudaDeviceGetStreamPriorityRange(least: Out<c_int>, greatest: Out<c_int>) |_machine| {
        least.set_if(properties::STREAM_PRIORITIES.0);
        greatest.set_if(properties::STREAM_PRIORITIES.1);
        Ok(())
    }
    fn cudaDeviceEnablePeerAccess(peer: c_int, _flags: c_uint) |machine| {
        let peer = state::check_device(machine, peer)?;
        machine.enable_peer(state::current_device(machine), peer)
    }
    fn cudaDeviceDisablePeerAccess(peer: c_int) |machine| {
        let peer = state::check_device(machine, peer)?;
        machine.disable_peer(state::current_device(machine), peer)
    }
    fn cudaDeviceGetP2PAttribute(value: Out<c_int>, attribute: c_int, source: c_int, destination: c_int) |machine| {
        let (source, destination) = (state::check_device(machine, source)?, state::check_device(machine, destination)?);
        let access = c_int::from(machine.can_access_peer(source, destination)?);
        // 1 performance rank, 2 access, 3 native atomics, 4 arrays
        value.set(if attribute == 2 { access } else { 0 })
    }
    fn cudaDeviceGetLimit(value: Out<usize>, limit: c_int) |_machine| {
        let bytes = LIMITS.iter().find(|(known, _)| *known == limit).map(|(_, bytes)| *bytes);
        value.set(bytes.ok_or_else(|| Code(215).because(format!("the device has no limit {limit}")))?)
    }
    fn cudaDeviceSetLimit(limit: c_int, _value: usize) |_machine| {
        let known = LIMITS.iter().any(|(known, _)| *known == limit);
        if known { Ok(()) } else { Err(Code(215).because(format!("the device has no limit {limit}"))) }
    }
    fn cudaDeviceGetCacheConfig(config: Out<c_int>) |_machine| { config.set(0) }
    fn cudaDeviceSetCacheConfig(_config: c_int) |_machine| { Ok(()) }
    fn cudaCtxResetPersistingL2Cache() |_machine| { Ok(()) }
    fn cudaProfilerStart() |_machine| { Ok(()) }
    fn cudaProfilerStop() |_machine| { Ok(()) }
}

/// Stack, printf buffer and device heap: the limits that no kernel of ours can reach.
const LIMITS: &[(c_int, usize)] = &[(0, 1024), (1, 1 << 20), (2, 8 << 20)];
