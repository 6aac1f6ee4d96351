//! Sharing with other processes of the environment by the legacy handles: memory of `cudaMalloc`, and interprocess events. The driver's
//! functions of the same purpose are the same.

use crate::abi::{Handle, IpcHandle};
use crate::boundary::{Out, export};
use crate::{state, visible};
use sire_sim::{Code, EventId, Machine, Result, SimError};
use std::ffi::c_uint;

/// `cudaIpcMemLazyEnablePeerAccess`, the only flag, and one that must be given.
const LAZY_PEER_ACCESS: c_uint = 1;

/// The handle of an allocation.
pub fn memory_handle(machine: &Machine, out: Out<IpcHandle>, ptr: u64) -> Result<()> {
    let out = out.required()?;
    out.set(IpcHandle { bytes: machine.ipc_handle(ptr)? })
}

/// Another process's allocation, usable by `device`.
pub fn open_memory(machine: &Machine, out: Out<u64>, handle: &IpcHandle, device: u32, flags: c_uint) -> Result<()> {
    let out = out.required()?;
    if flags != LAZY_PEER_ACCESS {
        return Err(Code::INVALID_VALUE.because(format!("{flags:#x} must be cudaIpcMemLazyEnablePeerAccess (1)")));
    }
    let address =
        machine.ipc_open(&handle.bytes, device).inspect_err(|error| explain("cudaIpcOpenMemHandle", error))?;
    let home = machine.pointer(address).device;
    if visible::to_program(machine, home) < 0 {
        machine.ipc_close(address)?;
        return Err(Code::INVALID_DEVICE.because("the memory is on a device that this process does not see"));
    }
    out.set(address)
}

/// CUDA has one number for all that can be wrong with a handle; a process that has forgotten `SIRE_SIM_DIR` should hear of it.
fn explain(function: &str, error: &SimError) {
    if error.code == Code::INVALID_HANDLE {
        state::say(function, &error.message);
    }
}

/// Takes [`open_memory`] back.
pub fn close_memory(machine: &Machine, ptr: u64) -> Result<()> {
    let home = machine.pointer(ptr).device;
    if machine.options().unmap_syncs {
        machine.device_synchronize(home)?;
    }
    machine.ipc_close(ptr)
}

/// The handle of an event.
pub fn event_handle(machine: &Machine, out: Out<IpcHandle>, event: Handle) -> Result<()> {
    let out = out.required()?;
    out.set(IpcHandle { bytes: machine.ipc_event_handle(EventId(event as u64))? })
}

/// Another process's event.
pub fn open_event(machine: &Machine, out: Out<Handle>, handle: &IpcHandle) -> Result<()> {
    let out = out.required()?;
    let current = state::current_device(machine);
    let opened =
        machine.ipc_open_event(current, &handle.bytes).inspect_err(|error| explain("cudaIpcOpenEventHandle", error))?;
    out.set(opened.0 as Handle)
}

export! { Runtime:
    fn cudaIpcGetMemHandle(out: Out<IpcHandle>, ptr: u64) |machine| { memory_handle(machine, out, ptr) }
    fn cudaIpcOpenMemHandle(out: Out<u64>, handle: IpcHandle, flags: c_uint) |machine| {
        open_memory(machine, out, &handle, state::current_device(machine), flags)
    }
    fn cudaIpcCloseMemHandle(ptr: u64) |machine| { close_memory(machine, ptr) }
    fn cudaIpcGetEventHandle(out: Out<IpcHandle>, event: Handle) |machine| { event_handle(machine, out, event) }
    fn cudaIpcOpenEventHandle(out: Out<Handle>, handle: IpcHandle) |machine| { open_event(machine, out, &handle) }
}
