//! Streams: life, order, callbacks.

use super::memory::stream_of;
use crate::abi::{Handle, HostFn, StreamCallback};
use crate::boundary::{Out, export};
use crate::{state, visible};
use sire_sim::{Code, EventId, Machine, Result};
use std::ffi::{c_int, c_uint, c_ulonglong, c_void};
use std::sync::Arc;

const NON_BLOCKING: c_uint = 1;
/// `cudaEventWaitExternal`.
const WAIT_EXTERNAL: c_uint = 1;

/// Makes a stream on the current device.
pub fn create(machine: &Machine, out: Out<Handle>, device: u32, flags: c_uint, priority: c_int) -> Result<()> {
    let out = out.required()?;
    if flags > NON_BLOCKING {
        return Err(
            Code::INVALID_VALUE.because(format!("stream flags {flags:#x}: only cudaStreamNonBlocking (1) exists"))
        );
    }
    let stream = machine.stream_create(device, flags != NON_BLOCKING, priority)?;
    out.set(stream.0 as Handle)
}

/// Refuses the default streams, which nobody may destroy or capture.
pub fn own_stream(machine: &Machine, stream: Handle) -> Result<sire_sim::StreamId> {
    if stream as u64 <= 2 {
        return Err(Code::INVALID_HANDLE.because("a default stream cannot be destroyed"));
    }
    stream_of(machine, stream)
}

/// A caller's pointer that travels to a worker thread.
#[derive(Clone, Copy)]
struct Shipped(*mut c_void);
// SAFETY: CUDA's callers give these pointers precisely so that another thread uses them, in stream order.
unsafe impl Send for Shipped {}
// SAFETY: as above.
unsafe impl Sync for Shipped {}

/// Queues a call of `function(data)` on the host.
pub fn host_function(machine: &Machine, stream: Handle, function: HostFn, data: *mut c_void) -> Result<()> {
    let function = function.ok_or_else(|| Code::INVALID_VALUE.because("the host function is null"))?;
    let data = Shipped(data);
    let call = Arc::new(move || {
        let data = data;
        // SAFETY: the caller of cudaLaunchHostFunc says that the function may be called with this argument.
        unsafe { function(data.0) }
    });
    machine.launch_host(stream_of(machine, stream)?, call)
}

export! { Runtime:
    fn cudaStreamCreate(out: Out<Handle>) |machine| { create(machine, out, state::current_device(machine), 0, 0) }
    fn cudaStreamCreateWithFlags(out: Out<Handle>, flags: c_uint) |machine| {
        create(machine, out, state::current_device(machine), flags, 0)
    }
    fn cudaStreamCreateWithPriority(out: Out<Handle>, flags: c_uint, priority: c_int) |machine| {
        create(machine, out, state::current_device(machine), flags, priority)
    }
    fn cudaStreamDestroy(stream: Handle) |machine| { machine.stream_destroy(own_stream(machine, stream)?) }
    fn cudaStreamSynchronize(stream: Handle) |machine| { machine.stream_synchronize(stream_of(machine, stream)?) }
    fn cudaStreamQuery(stream: Handle) |machine| {
        let done = machine.stream_query(stream_of(machine, stream)?)?;
        if done { Ok(()) } else { Err(Code::NOT_READY.because("work is queued")) }
    }
    fn cudaStreamWaitEvent(stream: Handle, event: Handle, flags: c_uint) |machine| {
        if flags > WAIT_EXTERNAL {
            return Err(Code::INVALID_VALUE.because(format!("{flags:#x} is not a flag of cudaStreamWaitEvent")));
        }
        machine.stream_wait_event(stream_of(machine, stream)?, EventId(event as u64))
    }
    fn cudaStreamGetPriority(stream: Handle, priority: Out<c_int>) |machine| {
        priority.set(machine.stream_priority(stream_of(machine, stream)?)?)
    }
    fn cudaStreamGetFlags(stream: Handle, flags: Out<c_uint>) |machine| {
        flags.set(c_uint::from(!machine.stream_is_blocking(stream_of(machine, stream)?)?))
    }
    fn cudaStreamGetId(stream: Handle, id: Out<c_ulonglong>) |machine| { id.set(stream_of(machine, stream)?.0) }
    fn cudaStreamGetDevice(stream: Handle, device: Out<c_int>) |machine| {
        device.set(visible::to_program(machine, machine.stream_device(stream_of(machine, stream)?)?))
    }
    fn cudaStreamAttachMemAsync(_stream: Handle, ptr: u64, _length: usize, _flags: c_uint) |machine| {
        super::pool::managed(machine, ptr)
    }
    fn cudaLaunchHostFunc(stream: Handle, function: HostFn, data: *mut c_void) |machine| {
        host_function(machine, stream, function, data)
    }
    fn cudaStreamAddCallback(stream: Handle, callback: StreamCallback, data: *mut c_void, _flags: c_uint) |machine| {
        let callback = callback.ok_or_else(|| Code::INVALID_VALUE.because("the callback is null"))?;
        let (raw, data) = (Shipped(stream), Shipped(data));
        let stream = stream_of(machine, stream)?;
        let call = Arc::new(move || {
            let (raw, data) = (raw, data);
            // SAFETY: the caller of cudaStreamAddCallback says that the callback may be called with these arguments.
            unsafe { callback(raw.0, 0, data.0) }
        });
        machine.launch_host(stream, call)
    }
}
