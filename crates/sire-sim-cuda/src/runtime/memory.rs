//! Memory: device, managed, pinned and registered; pointer attributes; stream-ordered allocation.

use super::pool;
use crate::abi::{Handle, PointerAttributes};
use crate::boundary::{Out, export};
use crate::{state, visible};
use sire_sim::{Code, Machine, PointerInfo, PointerKind, Result, StreamId};
use std::ffi::{c_int, c_uint};

/// The stream that a `cudaStream_t` means in this thread.
pub fn stream_of(machine: &Machine, stream: Handle) -> Result<StreamId> {
    machine.resolve_stream(state::current_device(machine), stream as u64)
}

/// A successful allocation of nothing is a null pointer, as in CUDA.
fn allocate(out: Out<u64>, size: usize, get: impl FnOnce(u64) -> Result<u64>) -> Result<()> {
    let out = out.required()?;
    out.set(if size == 0 { 0 } else { get(size as u64)? })
}

export! { Runtime:
    fn cudaMalloc(out: Out<u64>, size: usize) bytes(size) |machine| {
        allocate(out, size, |size| machine.malloc(state::current_device(machine), size))
    }
    fn cudaMallocManaged(out: Out<u64>, size: usize, flags: c_uint) bytes(size) |machine| {
        if size == 0 || !(flags == 1 || flags == 2) {
            return Err(Code::INVALID_VALUE.because("managed memory needs a size, and flags 1 (global) or 2 (host)"));
        }
        allocate(out, size, |size| machine.malloc_managed(state::current_device(machine), size))
    }
    fn cudaMallocPitch(out: Out<u64>, pitch: Out<usize>, width: usize, height: usize) bytes(width * height) |machine| {
        let rows = width.next_multiple_of(512);
        let size = rows.checked_mul(height).ok_or_else(|| Code::INVALID_VALUE.because("width times height is too large"))?;
        allocate(out, size, |size| machine.malloc(state::current_device(machine), size))?;
        pitch.set(rows)
    }
    fn cudaFree(ptr: u64) |machine| {
        pool::free_block(machine, ptr, || machine.free(ptr))
    }
    fn cudaMallocAsync(out: Out<u64>, size: usize, stream: Handle) bytes(size) |machine| {
        let stream = stream_of(machine, stream)?;
        let device = machine.stream_device(stream)?;
        allocate(out, size, |size| {
            let ptr = machine.malloc_async(device, size, stream)?;
            pool::note_block(machine, device, ptr, size);
            Ok(ptr)
        })
    }
    fn cudaFreeAsync(ptr: u64, stream: Handle) |machine| {
        if ptr == 0 {
            return Ok(());
        }
        let stream = stream_of(machine, stream)?;
        pool::free_block(machine, ptr, || machine.free_async(ptr, stream))
    }

    fn cudaHostAlloc(out: Out<u64>, size: usize, flags: c_uint) bytes(size) |machine| {
        allocate(out, size, |size| machine.host_alloc(state::current_device(machine), size, flags))
    }
    fn cudaMallocHost(out: Out<u64>, size: usize) bytes(size) |machine| {
        allocate(out, size, |size| machine.host_alloc(state::current_device(machine), size, 0))
    }
    fn cudaFreeHost(ptr: u64) |machine| {
        if ptr == 0 { Ok(()) } else { machine.host_free(ptr) }
    }
    fn cudaHostRegister(ptr: u64, size: usize, flags: c_uint) bytes(size) |machine| {
        // SAFETY: the caller of cudaHostRegister keeps the range mapped until it unregisters it.
        unsafe { machine.host_register(state::current_device(machine), ptr, size as u64, flags) }
    }
    fn cudaHostUnregister(ptr: u64) |machine| { machine.host_unregister(ptr) }
    fn cudaHostGetFlags(flags: Out<c_uint>, ptr: u64) |machine| { flags.set(host_info(machine, ptr)?.flags) }
    fn cudaHostGetDevicePointer(out: Out<u64>, ptr: u64, _flags: c_uint) |machine| {
        host_info(machine, ptr)?;
        out.set(ptr)
    }
    fn cudaPointerGetAttributes(out: Out<PointerAttributes>, ptr: u64) |machine| { out.set(attributes(machine, ptr)) }

    fn cudaMemGetInfo(free: Out<usize>, total: Out<usize>) |machine| {
        let info = machine.memory_info(state::current_device(machine))?;
        free.set_if(info.0 as usize);
        total.set_if(info.1 as usize);
        Ok(())
    }
}

/// What is known about pinned or registered host memory.
pub fn host_info(machine: &Machine, ptr: u64) -> Result<PointerInfo> {
    let info = machine.pointer(ptr);
    match info.kind {
        PointerKind::Pinned | PointerKind::Registered => Ok(info),
        _ => Err(Code::INVALID_VALUE.because(format!("{ptr:#x} is not pinned or registered host memory"))),
    }
}

fn attributes(machine: &Machine, ptr: u64) -> PointerAttributes {
    let info = machine.pointer(ptr);
    let (kind, device, device_pointer, host_pointer): (c_int, c_int, u64, u64) = match info.kind {
        PointerKind::Pageable => (0, -2, 0, ptr),
        PointerKind::Pinned | PointerKind::Registered => {
            (1, visible::to_program(machine, state::current_device(machine)), ptr, ptr)
        }
        PointerKind::Device => (2, visible::to_program(machine, info.device), ptr, 0),
        PointerKind::Managed => (3, visible::to_program(machine, info.device), ptr, ptr),
    };
    PointerAttributes { kind, device, device_pointer, host_pointer }
}
