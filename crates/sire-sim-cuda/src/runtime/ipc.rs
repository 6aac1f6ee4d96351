//! Sharing with other processes by the legacy handles: not simulated, and said so.

use crate::abi::{Handle, IpcHandle};
use crate::boundary::{Out, export};
use sire_sim::{Code, Result};
use std::ffi::c_uint;

fn refuse(name: &str) -> Result<()> {
    let message = format!("not simulated: {name} (device memory cannot be handed to another process by an IPC handle)");
    crate::state::say(name, &message);
    Err(Code::NOT_SUPPORTED.because(message))
}

export! { Runtime:
    fn cudaIpcGetMemHandle(_out: Out<IpcHandle>, _ptr: u64) |_machine| { refuse("cudaIpcGetMemHandle") }
    fn cudaIpcOpenMemHandle(_out: Out<u64>, _handle: IpcHandle, _flags: c_uint) |_machine| { refuse("cudaIpcOpenMemHandle") }
    fn cudaIpcCloseMemHandle(_ptr: u64) |_machine| { refuse("cudaIpcCloseMemHandle") }
    fn cudaIpcGetEventHandle(_out: Out<IpcHandle>, _event: Handle) |_machine| { refuse("cudaIpcGetEventHandle") }
    fn cudaIpcOpenEventHandle(_out: Out<Handle>, _handle: IpcHandle) |_machine| { refuse("cudaIpcOpenEventHandle") }
}
