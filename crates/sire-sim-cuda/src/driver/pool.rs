//! Memory pools, and what takes memory in the order of a stream.

use super::{per_thread, stream_of};
use crate::abi::{AccessDesc, Handle, PoolProps};
use crate::boundary::{In, Out, export};
use crate::runtime::{free_block, note_block, pool};
use sire_sim::{Machine, Result};
use std::ffi::c_int;

/// From the current pool of the stream's device.
fn allocate(machine: &Machine, out: Out<u64>, size: usize, stream: Handle) -> Result<()> {
    let (out, stream) = (out.required()?, stream_of(machine, stream)?);
    let device = machine.stream_device(stream)?;
    let address = machine.malloc_async(device, size as u64, stream)?;
    note_block(machine, device, address, size as u64);
    out.set(address)
}

fn free(machine: &Machine, address: u64, stream: Handle) -> Result<()> {
    let stream = stream_of(machine, stream)?;
    free_block(machine, address, || machine.free_async(address, stream))
}

export! { Driver:
    fn cuMemAllocAsync(out: Out<u64>, size: usize, stream: Handle) bytes(size) |machine| { allocate(machine, out, size, stream) }
    fn cuMemAllocAsync_ptsz(out: Out<u64>, size: usize, stream: Handle) bytes(size) |machine| {
        allocate(machine, out, size, per_thread(stream))
    }
    fn cuMemFreeAsync(address: u64, stream: Handle) |machine| { free(machine, address, stream) }
    fn cuMemFreeAsync_ptsz(address: u64, stream: Handle) |machine| { free(machine, address, per_thread(stream)) }
    fn cuMemAllocFromPoolAsync(out: Out<u64>, size: usize, from: Handle, stream: Handle) bytes(size) |machine| {
        pool::allocate(machine, out, size, from, stream_of(machine, stream)?)
    }
    fn cuMemAllocFromPoolAsync_ptsz(out: Out<u64>, size: usize, from: Handle, stream: Handle) bytes(size) |machine| {
        pool::allocate(machine, out, size, from, stream_of(machine, per_thread(stream))?)
    }

    fn cuDeviceGetDefaultMemPool(out: Out<Handle>, device: c_int) |machine| { pool::default_of(machine, out, device) }
    fn cuDeviceGetMemPool(out: Out<Handle>, device: c_int) |machine| { pool::current_of(machine, out, device) }
    fn cuDeviceSetMemPool(device: c_int, pool: Handle) |machine| { pool::make_current(machine, device, pool) }
    fn cuMemPoolCreate(out: Out<Handle>, props: In<PoolProps>) |machine| { pool::create(machine, out, props) }
    fn cuMemPoolDestroy(pool: Handle) |machine| { pool::destroy(machine, pool) }
    fn cuMemPoolSetAttribute(pool: Handle, attribute: c_int, value: In<u64>) |machine| {
        pool::set_attribute(machine, pool, attribute, value)
    }
    fn cuMemPoolGetAttribute(pool: Handle, attribute: c_int, value: Out<u64>) |machine| {
        pool::get_attribute(machine, pool, attribute, value)
    }
    fn cuMemPoolTrimTo(pool: Handle, _bytes_to_keep: usize) |machine| { pool::trim(machine, pool) }
    fn cuMemPoolSetAccess(pool: Handle, descriptions: In<AccessDesc>, count: usize) |machine| {
        pool::set_access(machine, pool, descriptions, count)
    }
}
