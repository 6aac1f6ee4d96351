//! Copies and fills.

use super::stream_of;
use crate::abi::{Handle, MemLocation, Memcpy2d};
use crate::boundary::{In, export};
use crate::runtime::{advise, of_device, prefetch};
use crate::state::{self, Context};
use sire_sim::{Code, Copy2d, CopyKind, Machine, Pattern, Result};
use std::ffi::{c_int, c_uchar, c_uint, c_ushort};

fn copy_now(machine: &Machine, dst: u64, src: u64, size: usize, kind: CopyKind) -> Result<()> {
    // SAFETY: the caller of a synchronous copy vouches for its host ranges during the call.
    unsafe { machine.memcpy(state::context_device(machine)?, dst, src, size as u64, kind) }
}

fn copy_later(machine: &Machine, dst: u64, src: u64, size: usize, kind: CopyKind, stream: Handle) -> Result<()> {
    let stream = stream_of(machine, stream)?;
    // SAFETY: the caller of an asynchronous copy keeps its host ranges valid until the stream has passed it.
    unsafe { machine.memcpy_async(dst, src, size as u64, kind, stream) }
}

/// `CU_MEMORYTYPE_*`: 1 host, 2 device, 3 array, 4 unified.
fn side(kind: c_uint, host: u64, device: u64) -> Result<u64> {
    match kind {
        1 => Ok(host),
        2 | 4 => Ok(device),
        _ => Err(Code::NOT_SUPPORTED.because("not simulated: copies of CUDA arrays")),
    }
}

fn copy_2d(copy: &Memcpy2d) -> Result<Copy2d> {
    let src = side(copy.src_type, copy.src_host, copy.src_device)?;
    let dst = side(copy.dst_type, copy.dst_host, copy.dst_device)?;
    Ok(Copy2d {
        dst: dst + (copy.dst_y * copy.dst_pitch + copy.dst_x) as u64,
        dst_pitch: copy.dst_pitch as u64,
        src: src + (copy.src_y * copy.src_pitch + copy.src_x) as u64,
        src_pitch: copy.src_pitch as u64,
        width: copy.width as u64,
        height: copy.height as u64,
    })
}

fn fill_now(machine: &Machine, dst: u64, pattern: Pattern, count: usize) -> Result<()> {
    machine.memset(state::context_device(machine)?, dst, pattern, count as u64)
}

fn fill_later(machine: &Machine, dst: u64, pattern: Pattern, count: usize, stream: Handle) -> Result<()> {
    machine.memset_async(dst, pattern, count as u64, stream_of(machine, stream)?)
}

export! { Driver:
    fn cuMemcpy(dst: u64, src: u64, size: usize) bytes(size) |machine| { copy_now(machine, dst, src, size, CopyKind::Default) }
    fn cuMemcpyHtoD_v2(dst: u64, src: u64, size: usize) bytes(size) |machine| { copy_now(machine, dst, src, size, CopyKind::HostToDevice) }
    fn cuMemcpyDtoH_v2(dst: u64, src: u64, size: usize) bytes(size) |machine| { copy_now(machine, dst, src, size, CopyKind::DeviceToHost) }
    fn cuMemcpyDtoD_v2(dst: u64, src: u64, size: usize) bytes(size) |machine| { copy_now(machine, dst, src, size, CopyKind::DeviceToDevice) }
    fn cuMemcpyAsync(dst: u64, src: u64, size: usize, stream: Handle) bytes(size) |machine| {
        copy_later(machine, dst, src, size, CopyKind::Default, stream)
    }
    fn cuMemcpyHtoDAsync_v2(dst: u64, src: u64, size: usize, stream: Handle) bytes(size) |machine| {
        copy_later(machine, dst, src, size, CopyKind::HostToDevice, stream)
    }
    fn cuMemcpyDtoHAsync_v2(dst: u64, src: u64, size: usize, stream: Handle) bytes(size) |machine| {
        copy_later(machine, dst, src, size, CopyKind::DeviceToHost, stream)
    }
    fn cuMemcpyDtoDAsync_v2(dst: u64, src: u64, size: usize, stream: Handle) bytes(size) |machine| {
        copy_later(machine, dst, src, size, CopyKind::DeviceToDevice, stream)
    }
    fn cuMemcpyPeerAsync(dst: u64, dst_context: Handle, src: u64, src_context: Handle, size: usize, stream: Handle) bytes(size) |machine| {
        let to = Context(dst_context as u64).device(machine)?;
        let from = Context(src_context as u64).device(machine)?;
        machine.memcpy_peer_async(dst, to, src, from, size as u64, stream_of(machine, stream)?)
    }
    fn cuMemcpy2D_v2(copy: In<Memcpy2d>) |machine| {
        let copy = copy_2d(&copy.get()?)?;
        // SAFETY: as for `copy_now`.
        unsafe { machine.memcpy_2d(state::context_device(machine)?, copy, CopyKind::Default) }
    }
    fn cuMemcpy2DAsync_v2(copy: In<Memcpy2d>, stream: Handle) |machine| {
        let (copy, stream) = (copy_2d(&copy.get()?)?, stream_of(machine, stream)?);
        // SAFETY: as for `copy_later`.
        unsafe { machine.memcpy_2d_async(copy, CopyKind::Default, stream) }
    }
    fn cuMemsetD8_v2(dst: u64, value: c_uchar, count: usize) bytes(count) |machine| { fill_now(machine, dst, Pattern::U8(value), count) }
    fn cuMemsetD16_v2(dst: u64, value: c_ushort, count: usize) bytes(2 * count) |machine| { fill_now(machine, dst, Pattern::U16(value), count) }
    fn cuMemsetD32_v2(dst: u64, value: c_uint, count: usize) bytes(4 * count) |machine| { fill_now(machine, dst, Pattern::U32(value), count) }
    fn cuMemsetD8Async(dst: u64, value: c_uchar, count: usize, stream: Handle) bytes(count) |machine| {
        fill_later(machine, dst, Pattern::U8(value), count, stream)
    }
    fn cuMemsetD16Async(dst: u64, value: c_ushort, count: usize, stream: Handle) bytes(2 * count) |machine| {
        fill_later(machine, dst, Pattern::U16(value), count, stream)
    }
    fn cuMemsetD32Async(dst: u64, value: c_uint, count: usize, stream: Handle) bytes(4 * count) |machine| {
        fill_later(machine, dst, Pattern::U32(value), count, stream)
    }
    fn cuMemsetD2D8Async(dst: u64, pitch: usize, value: c_uchar, width: usize, height: usize, stream: Handle) |machine| {
        machine.memset_2d_async(dst, pitch as u64, Pattern::U8(value), width as u64, height as u64, stream_of(machine, stream)?)
    }
    fn cuStreamWriteValue32_v2(stream: Handle, address: u64, value: c_uint, _flags: c_uint) |machine| {
        fill_later(machine, address, Pattern::U32(value), 1, stream)
    }

    fn cuMemPrefetchAsync(ptr: u64, size: usize, device: c_int, _stream: Handle) bytes(size) |machine| {
        state::context_device(machine)?;
        prefetch(machine, ptr, of_device(device))
    }
    fn cuMemPrefetchAsync_v2(ptr: u64, size: usize, location: MemLocation, _flags: c_uint, _stream: Handle) bytes(size) |machine| {
        state::context_device(machine)?;
        prefetch(machine, ptr, location)
    }
    fn cuMemAdvise(ptr: u64, _size: usize, advice: c_int, device: c_int) |machine| {
        state::context_device(machine)?;
        advise(machine, ptr, advice, of_device(device))
    }
    fn cuMemAdvise_v2(ptr: u64, _size: usize, advice: c_int, location: MemLocation) |machine| {
        state::context_device(machine)?;
        advise(machine, ptr, advice, location)
    }
}
