//! The driver's side of [`crate::runtime::ipc`].

use crate::abi::{Handle, IpcHandle};
use crate::boundary::{Out, export};
use crate::runtime::ipc;
use crate::state;
use std::ffi::c_uint;

export! { Driver:
    fn cuIpcGetMemHandle(out: Out<IpcHandle>, address: u64) |machine| { ipc::memory_handle(machine, out, address) }
    fn cuIpcOpenMemHandle_v2(out: Out<u64>, handle: IpcHandle, flags: c_uint) |machine| {
        ipc::open_memory(machine, out, &handle, state::context_device(machine)?, flags)
    }
    fn cuIpcCloseMemHandle(address: u64) |machine| { ipc::close_memory(machine, address) }
    fn cuIpcGetEventHandle(out: Out<IpcHandle>, event: Handle) |machine| { ipc::event_handle(machine, out, event) }
    fn cuIpcOpenEventHandle(out: Out<Handle>, handle: IpcHandle) |machine| { ipc::open_event(machine, out, &handle) }
}
