//! Copies and fills.

use super::memory::stream_of;
use crate::abi::{Handle, LOCATION_DEVICE, LOCATION_HOST, LOCATION_HOST_NUMA_CURRENT, MemLocation};
use crate::boundary::export;
use crate::{release, state};
use sire_sim::{Code, Copy2d, CopyKind, Machine, Pattern, Result};
use std::ffi::{c_int, c_uint};

fn kind_of(kind: c_int) -> Result<CopyKind> {
    Ok(match kind {
        0 => CopyKind::HostToHost,
        1 => CopyKind::HostToDevice,
        2 => CopyKind::DeviceToHost,
        3 => CopyKind::DeviceToDevice,
        4 => CopyKind::Default,
        _ => return Err(Code(21).because(format!("{kind} is not a cudaMemcpyKind"))),
    })
}

fn copy_2d(dst: u64, dst_pitch: usize, src: u64, src_pitch: usize, width: usize, height: usize) -> Result<Copy2d> {
    if height > 1 && (width > dst_pitch || width > src_pitch) {
        return Err(
            Code(12).because(format!("rows of {width} bytes do not fit pitches of {dst_pitch} and {src_pitch}"))
        );
    }
    Ok(Copy2d {
        dst,
        dst_pitch: dst_pitch as u64,
        src,
        src_pitch: src_pitch as u64,
        width: width as u64,
        height: height as u64,
    })
}

/// CUDA 12's way to say where: a device, or -1 for the host.
pub fn of_device(device: c_int) -> MemLocation {
    if device == -1 {
        MemLocation { kind: LOCATION_HOST, id: 0 }
    } else {
        MemLocation { kind: LOCATION_DEVICE, id: device }
    }
}

/// Managed memory is the host's and every device's alike, so that moving it is doing nothing. What is no place is refused.
pub fn prefetch(machine: &Machine, ptr: u64, location: MemLocation) -> Result<()> {
    match location.kind {
        LOCATION_DEVICE => state::check_device(machine, location.id).map(drop)?,
        LOCATION_HOST..=LOCATION_HOST_NUMA_CURRENT => {}
        kind => return Err(Code::INVALID_VALUE.because(format!("{kind} is not a kind of place"))),
    }
    super::pool::managed(machine, ptr)
}

/// `cudaMemAdviseSetReadMostly` to `cudaMemAdviseUnsetAccessedBy`; the place counts for those that name one.
pub fn advise(machine: &Machine, ptr: u64, advice: c_int, location: MemLocation) -> Result<()> {
    match advice {
        1 | 2 | 4 => super::pool::managed(machine, ptr),
        3 | 5 | 6 => prefetch(machine, ptr, location),
        _ => Err(Code::INVALID_VALUE.because(format!("{advice} is not an advice"))),
    }
}

export! { Runtime:
    fn cudaMemcpy(dst: u64, src: u64, size: usize, kind: c_int) bytes(size) |machine| {
        // SAFETY: the caller of cudaMemcpy vouches for its host ranges during the call.
        unsafe { machine.memcpy(state::current_device(machine), dst, src, size as u64, kind_of(kind)?) }
    }
    fn cudaMemcpyAsync(dst: u64, src: u64, size: usize, kind: c_int, stream: Handle) bytes(size) |machine| {
        let stream = stream_of(machine, stream)?;
        // SAFETY: the caller of cudaMemcpyAsync keeps its host ranges valid until the stream has passed the copy.
        unsafe { machine.memcpy_async(dst, src, size as u64, kind_of(kind)?, stream) }
    }
    fn cudaMemcpy2D(dst: u64, dst_pitch: usize, src: u64, src_pitch: usize, width: usize, height: usize, kind: c_int) bytes(width * height) |machine| {
        let copy = copy_2d(dst, dst_pitch, src, src_pitch, width, height)?;
        // SAFETY: as for cudaMemcpy.
        unsafe { machine.memcpy_2d(state::current_device(machine), copy, kind_of(kind)?) }
    }
    fn cudaMemcpy2DAsync(dst: u64, dst_pitch: usize, src: u64, src_pitch: usize, width: usize, height: usize, kind: c_int, stream: Handle) bytes(width * height) |machine| {
        let copy = copy_2d(dst, dst_pitch, src, src_pitch, width, height)?;
        let stream = stream_of(machine, stream)?;
        // SAFETY: as for cudaMemcpyAsync.
        unsafe { machine.memcpy_2d_async(copy, kind_of(kind)?, stream) }
    }
    fn cudaMemcpyPeerAsync(dst: u64, dst_device: c_int, src: u64, src_device: c_int, size: usize, stream: Handle) bytes(size) |machine| {
        let (to, from) = (state::check_device(machine, dst_device)?, state::check_device(machine, src_device)?);
        machine.memcpy_peer_async(dst, to, src, from, size as u64, stream_of(machine, stream)?)
    }
    fn cudaMemcpyPeer(dst: u64, dst_device: c_int, src: u64, src_device: c_int, size: usize) bytes(size) |machine| {
        let (to, from) = (state::check_device(machine, dst_device)?, state::check_device(machine, src_device)?);
        let stream = machine.legacy_stream(state::current_device(machine))?;
        machine.memcpy_peer_async(dst, to, src, from, size as u64, stream)?;
        machine.stream_synchronize(stream)
    }

    fn cudaMemset(dst: u64, value: c_int, count: usize) bytes(count) |machine| {
        machine.memset(state::current_device(machine), dst, Pattern::U8(value as u8), count as u64)
    }
    fn cudaMemsetAsync(dst: u64, value: c_int, count: usize, stream: Handle) bytes(count) |machine| {
        machine.memset_async(dst, Pattern::U8(value as u8), count as u64, stream_of(machine, stream)?)
    }
    fn cudaMemset2DAsync(dst: u64, pitch: usize, value: c_int, width: usize, height: usize, stream: Handle) bytes(width * height) |machine| {
        let stream = stream_of(machine, stream)?;
        machine.memset_2d_async(dst, pitch as u64, Pattern::U8(value as u8), width as u64, height as u64, stream)
    }
    fn cudaMemset2D(dst: u64, pitch: usize, value: c_int, width: usize, height: usize) bytes(width * height) |machine| {
        let stream = machine.legacy_stream(state::current_device(machine))?;
        machine.memset_2d_async(dst, pitch as u64, Pattern::U8(value as u8), width as u64, height as u64, stream)
    }
    /// CUDA 12 has (address, size, device, stream) under this name: the device is where the location is now.
    fn cudaMemPrefetchAsync(ptr: u64, count: usize, location: MemLocation, _flags: c_uint, _stream: Handle) bytes(count) |machine| {
        let location = if release::is_12() { of_device(location.kind) } else { location };
        prefetch(machine, ptr, location)
    }
    fn cudaMemPrefetchAsync_v2(ptr: u64, count: usize, location: MemLocation, _flags: c_uint, _stream: Handle) bytes(count) |machine| {
        prefetch(machine, ptr, location)
    }
    /// As with `cudaMemPrefetchAsync`.
    fn cudaMemAdvise(ptr: u64, _count: usize, advice: c_int, location: MemLocation) |machine| {
        let location = if release::is_12() { of_device(location.kind) } else { location };
        advise(machine, ptr, advice, location)
    }
    fn cudaMemAdvise_v2(ptr: u64, _count: usize, advice: c_int, location: MemLocation) |machine| {
        advise(machine, ptr, advice, location)
    }
}
