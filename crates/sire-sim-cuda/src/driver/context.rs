//! Start, versions, errors, devices and contexts.

use crate::abi::{Handle, Uuid};
use crate::boundary::{Out, Text, export, write_text};
use crate::state::{self, Context};
use crate::{names, properties, visible};
use sire_sim::{Code, Machine, Result};
use std::ffi::{c_char, c_int, c_uint, c_void};

fn reset_primary(machine: &Machine, device: c_int) -> Result<()> {
    let device = state::check_device(machine, device)?;
    machine.reset(device);
    state::reset_primary(device);
    Ok(())
}

export! { Driver:
    fn cuInit(flags: c_uint) |_machine| {
        if flags == 0 { Ok(()) } else { Err(Code::INVALID_VALUE.because("cuInit takes no flags")) }
    }
    fn cuDriverGetVersion(version: Out<c_int>) |_machine| { version.set(properties::CUDA_VERSION) }
    fn cuGetErrorName(error: c_int, out: Out<*const c_char>) |_machine| {
        match names::driver_name(error) {
            Some(name) => out.set(name.as_ptr()),
            None => out.set(std::ptr::null()).and(Err(Code::INVALID_VALUE.because(format!("{error} is not an error number")))),
        }
    }
    fn cuGetErrorString(error: c_int, out: Out<*const c_char>) |_machine| {
        match names::driver_name(error) {
            Some(_) => out.set(crate::boundary::error_text(error)),
            None => out.set(std::ptr::null()).and(Err(Code::INVALID_VALUE.because(format!("{error} is not an error number")))),
        }
    }

    fn cuDeviceGetCount(count: Out<c_int>) |machine| { count.set(visible::count(machine) as c_int) }
    fn cuDeviceGet(device: Out<c_int>, ordinal: c_int) |machine| {
        state::check_device(machine, ordinal)?;
        device.set(ordinal)
    }
    fn cuDeviceGetName(buffer: Out<c_char>, capacity: c_int, device: c_int) |machine| {
        state::check_device(machine, device)?;
        write_text(buffer.required()?, usize::try_from(capacity).unwrap_or(0), properties::name());
        Ok(())
    }
    fn cuDeviceTotalMem_v2(bytes: Out<usize>, device: c_int) |machine| {
        bytes.set(machine.memory_info(state::check_device(machine, device)?)?.1 as usize)
    }
    fn cuDeviceGetAttribute(value: Out<c_int>, attribute: c_int, device: c_int) |machine| {
        let device = state::check_device(machine, device)?;
        if !properties::is_attribute(attribute) {
            return Err(Code::INVALID_VALUE.because(format!("there is no attribute {attribute}")));
        }
        value.set(properties::attribute(attribute, device))
    }
    fn cuDeviceGetUuid(out: Out<Uuid>, device: c_int) |machine| {
        // The older form says which GPU it is also of a MIG device.
        out.set(Uuid { bytes: properties::gpu_uuid(properties::gpu_of(state::check_device(machine, device)?)) })
    }
    fn cuDeviceGetUuid_v2(out: Out<Uuid>, device: c_int) |machine| {
        out.set(Uuid { bytes: properties::uuid(state::check_device(machine, device)?) })
    }
    fn cuDeviceGetPCIBusId(buffer: Out<c_char>, capacity: c_int, device: c_int) |machine| {
        let device = state::check_device(machine, device)?;
        write_text(buffer.required()?, usize::try_from(capacity).unwrap_or(0), &properties::pci_address(properties::gpu_of(device)));
        Ok(())
    }
    fn cuDeviceGetByPCIBusId(out: Out<c_int>, address: Text) |machine| {
        let address = address.get()?;
        let device = properties::gpu_at(machine, address).and_then(|gpu| visible::part_of(machine, gpu));
        out.set(device.ok_or_else(|| Code::INVALID_VALUE.because(format!("no device at {address}")))?)
    }
    fn cuDeviceComputeCapability(major: Out<c_int>, minor: Out<c_int>, device: c_int) |machine| {
        let device = state::check_device(machine, device)?;
        major.set(properties::attribute(75, device))?;
        minor.set(properties::attribute(76, device))
    }
    fn cuDeviceCanAccessPeer(can: Out<c_int>, device: c_int, peer: c_int) |machine| {
        let (device, peer) = (state::check_device(machine, device)?, state::check_device(machine, peer)?);
        can.set(c_int::from(device != peer && machine.can_access_peer(device, peer)?))
    }

    fn cuDevicePrimaryCtxRetain(out: Out<Handle>, device: c_int) |machine| {
        let (out, device) = (out.required()?, state::check_device(machine, device)?);
        machine.check_alive(device)?;
        out.set(state::retain_primary(device).0 as Handle)
    }
    fn cuDevicePrimaryCtxRelease(device: c_int) |machine| { state::release_primary(state::check_device(machine, device)?) }
    fn cuDevicePrimaryCtxRelease_v2(device: c_int) |machine| { state::release_primary(state::check_device(machine, device)?) }
    fn cuDevicePrimaryCtxReset(device: c_int) |machine| { reset_primary(machine, device) }
    fn cuDevicePrimaryCtxReset_v2(device: c_int) |machine| { reset_primary(machine, device) }
    fn cuDevicePrimaryCtxSetFlags_v2(device: c_int, _flags: c_uint) |machine| { state::check_device(machine, device).map(drop) }
    fn cuDevicePrimaryCtxGetState(device: c_int, flags: Out<c_uint>, active: Out<c_int>) |machine| {
        let device = state::check_device(machine, device)?;
        flags.set_if(0);
        active.set_if(c_int::from(state::primary_is_active(device)));
        Ok(())
    }

    fn cuCtxCreate_v2(out: Out<Handle>, _flags: c_uint, device: c_int) |machine| { create(machine, out, device) }
    fn cuCtxCreate_v3(out: Out<Handle>, _affinities: *mut c_void, count: c_int, _flags: c_uint, device: c_int) |machine| {
        if count != 0 {
            return Err(Code::NOT_SUPPORTED.because("not simulated: cuCtxCreate with execution affinity"));
        }
        create(machine, out, device)
    }
    fn cuCtxCreate_v4(out: Out<Handle>, params: *mut c_void, _flags: c_uint, device: c_int) |machine| {
        if !params.is_null() {
            return Err(Code::NOT_SUPPORTED.because("not simulated: cuCtxCreate with parameters"));
        }
        create(machine, out, device)
    }
    fn cuCtxDestroy_v2(context: Handle) |_machine| {
        let context = Context(context as u64);
        context.destroy()?;
        if state::current_context() == Some(context) {
            state::pop_context()?;
        }
        Ok(())
    }
    fn cuCtxPushCurrent_v2(context: Handle) |machine| {
        let context = Context(context as u64);
        context.device(machine)?;
        state::push_context(context)
    }
    fn cuCtxPopCurrent_v2(out: Out<Handle>) |_machine| {
        let context = state::pop_context()?;
        out.set_if(context.0 as Handle);
        Ok(())
    }
    fn cuCtxSetCurrent(context: Handle) |machine| {
        if context.is_null() {
            state::set_current_context(None);
            return Ok(());
        }
        let context = Context(context as u64);
        context.device(machine)?;
        state::set_current_context(Some(context));
        Ok(())
    }
    fn cuCtxGetCurrent(out: Out<Handle>) |_machine| { out.set(state::current_context().map_or(0, |context| context.0) as Handle) }
    fn cuCtxGetDevice(device: Out<c_int>) |machine| { device.set(visible::to_program(machine, state::context_device(machine)?)) }
    fn cuCtxGetFlags(flags: Out<c_uint>) |machine| {
        state::context_device(machine)?;
        flags.set(0)
    }
    fn cuCtxGetApiVersion(context: Handle, version: Out<c_uint>) |machine| {
        Context(context as u64).device(machine)?;
        version.set(properties::CUDA_VERSION as c_uint)
    }
    fn cuCtxSynchronize() |machine| { machine.device_synchronize(state::context_device(machine)?) }
    fn cuCtxGetStreamPriorityRange(least: Out<c_int>, greatest: Out<c_int>) |machine| {
        state::context_device(machine)?;
        least.set_if(properties::STREAM_PRIORITIES.0);
        greatest.set_if(properties::STREAM_PRIORITIES.1);
        Ok(())
    }
    fn cuCtxEnablePeerAccess(peer: Handle, _flags: c_uint) |machine| {
        machine.enable_peer(state::context_device(machine)?, Context(peer as u64).device(machine)?)
    }
    fn cuCtxDisablePeerAccess(peer: Handle) |machine| {
        machine.disable_peer(state::context_device(machine)?, Context(peer as u64).device(machine)?)
    }

    fn cuLogsRegisterCallback(_callback: Handle, _data: *mut c_void, out: Out<Handle>) |_machine| {
        // The device logs to standard error; a callback is accepted and has nothing to hear.
        out.set_if(1 as Handle);
        Ok(())
    }
    fn cuLogsUnregisterCallback(_callback: Handle) |_machine| { Ok(()) }
}

fn create(machine: &Machine, out: Out<Handle>, device: c_int) -> Result<()> {
    let (out, device) = (out.required()?, state::check_device(machine, device)?);
    machine.check_alive(device)?;
    let context = Context::create(device);
    state::push_context(context)?;
    out.set(context.0 as Handle)
}
