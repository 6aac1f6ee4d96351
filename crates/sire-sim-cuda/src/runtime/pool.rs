//! Memory pools: the default pool of each device and pools that a program makes. A pool is a label and a
//! count here; the memory comes from the device's heap and goes back at once (a release threshold is kept
//! but saves nothing).

use super::memory::stream_of;
use crate::abi::{AccessDesc, Handle, LOCATION_DEVICE, PoolProps};
use crate::boundary::{In, Out, export};
use crate::state::{self, STRIDE, lock};
use sire_sim::{Code, Machine, PointerKind, Result, StreamId};
use std::collections::HashMap;
use std::ffi::c_int;
use std::sync::{LazyLock, Mutex};

const DEFAULT: u64 = 0x5154_0000_0000;
const CREATED: u64 = 0x5155_0000_0000;

#[derive(Default, Clone, Copy)]
struct Pool {
    device: u32,
    flags: [c_int; 3],
    threshold: u64,
    used: u64,
    most_used: u64,
}

#[derive(Default)]
struct Pools {
    created: u64,
    pools: HashMap<u64, Pool>,
    /// Pool and bytes of live allocations.
    blocks: HashMap<u64, (u64, u64)>,
    /// Which pool a device allocates from, where it is not the default one.
    current: HashMap<u32, u64>,
}

static POOLS: LazyLock<Mutex<Pools>> = LazyLock::new(Mutex::default);

impl Pools {
    /// The pool of a handle; default pools come into being when first asked for.
    fn get(&mut self, machine: &Machine, handle: u64) -> Result<&mut Pool> {
        if let Some(device) = state::device_of_family(machine, DEFAULT, handle) {
            return Ok(self.pools.entry(handle).or_insert(Pool { device, flags: [1; 3], ..Pool::default() }));
        }
        self.pools
            .get_mut(&handle)
            .ok_or_else(|| Code::INVALID_HANDLE.because(format!("{handle:#x} is not a memory pool")))
    }

    fn current(&self, device: u32) -> u64 {
        self.current.get(&device).copied().unwrap_or(default_pool(device))
    }
}

fn default_pool(device: u32) -> u64 {
    DEFAULT + u64::from(device) * STRIDE
}

/// Notes a block that came from `device`'s current pool.
pub fn note_block(machine: &Machine, device: u32, ptr: u64, size: u64) {
    let pool = lock(&POOLS).current(device);
    note_block_of(machine, pool, ptr, size);
}

fn note_block_of(machine: &Machine, handle: u64, ptr: u64, size: u64) {
    let mut pools = lock(&POOLS);
    if let Ok(pool) = pools.get(machine, handle) {
        pool.used += size;
        pool.most_used = pool.most_used.max(pool.used);
        pools.blocks.insert(ptr, (handle, size));
    }
}

/// Frees a block with `free`, and no longer counts it. It is forgotten first: once freed, its address may be another's.
pub fn free_block(machine: &Machine, ptr: u64, free: impl FnOnce() -> Result<()>) -> Result<()> {
    let noted = forget_block(ptr);
    let freed = free();
    if let (Err(_), Some((handle, size))) = (&freed, noted) {
        note_block_of(machine, handle, ptr, size);
    }
    freed
}

fn forget_block(ptr: u64) -> Option<(u64, u64)> {
    let mut pools = lock(&POOLS);
    let (handle, size) = pools.blocks.remove(&ptr)?;
    if let Some(pool) = pools.pools.get_mut(&handle) {
        pool.used -= size;
    }
    Some((handle, size))
}

/// Refuses pointers that are not managed memory.
pub fn managed(machine: &Machine, ptr: u64) -> Result<()> {
    match machine.pointer(ptr).kind {
        PointerKind::Managed => Ok(()),
        _ => Err(Code::INVALID_VALUE.because(format!("{ptr:#x} is not managed memory"))),
    }
}

/// One attribute, as CUDA numbers them: 1 to 3 are ints, the others 64-bit.
fn read_attribute(pool: &Pool, attribute: c_int, value: Out<u64>) -> Result<()> {
    match attribute {
        1..=3 => Out::<c_int>::set(value.cast(), pool.flags[attribute as usize - 1]),
        4 => value.set(pool.threshold),
        5 | 7 => value.set(pool.used),
        6 | 8 => value.set(pool.most_used),
        _ => Err(Code::INVALID_VALUE.because(format!("{attribute} is not a pool attribute"))),
    }
}

fn write_attribute(pool: &mut Pool, attribute: c_int, value: In<u64>) -> Result<()> {
    match attribute {
        1..=3 => pool.flags[attribute as usize - 1] = In::<c_int>::get(value.cast())?,
        4 => pool.threshold = value.get()?,
        6 | 8 if value.get()? == 0 => pool.most_used = pool.used,
        _ => return Err(Code::INVALID_VALUE.because(format!("pool attribute {attribute} cannot be set to this"))),
    }
    Ok(())
}

/// The default pool of a device.
pub fn default_of(machine: &Machine, out: Out<Handle>, device: c_int) -> Result<()> {
    out.set(default_pool(state::check_device(machine, device)?) as Handle)
}

/// The pool that a device allocates from.
pub fn current_of(machine: &Machine, out: Out<Handle>, device: c_int) -> Result<()> {
    let device = state::check_device(machine, device)?;
    out.set(lock(&POOLS).current(device) as Handle)
}

/// Makes a pool the one that its device allocates from.
pub fn make_current(machine: &Machine, device: c_int, pool: Handle) -> Result<()> {
    let device = state::check_device(machine, device)?;
    let mut pools = lock(&POOLS);
    if pools.get(machine, pool as u64)?.device != device {
        return Err(Code::INVALID_VALUE.because(format!("the pool is not on device {device}")));
    }
    pools.current.insert(device, pool as u64);
    Ok(())
}

pub fn create(machine: &Machine, out: Out<Handle>, props: In<PoolProps>) -> Result<()> {
    let (out, props) = (out.required()?, props.get()?);
    if props.location.kind != LOCATION_DEVICE {
        return Err(Code::NOT_SUPPORTED.because("not simulated: memory pools that are not on a device"));
    }
    let device = state::check_device(machine, props.location.id)?;
    let mut pools = lock(&POOLS);
    pools.created += 1;
    let handle = CREATED + pools.created * STRIDE;
    pools.pools.insert(handle, Pool { device, flags: [1; 3], ..Pool::default() });
    out.set(handle as Handle)
}

pub fn destroy(machine: &Machine, pool: Handle) -> Result<()> {
    let mut pools = lock(&POOLS);
    pools.get(machine, pool as u64)?;
    if (pool as u64) < CREATED {
        return Err(Code::INVALID_VALUE.because("a default memory pool cannot be destroyed"));
    }
    pools.pools.remove(&(pool as u64));
    pools.current.retain(|_, current| *current != pool as u64);
    Ok(())
}

pub fn set_attribute(machine: &Machine, pool: Handle, attribute: c_int, value: In<u64>) -> Result<()> {
    write_attribute(lock(&POOLS).get(machine, pool as u64)?, attribute, value)
}

pub fn get_attribute(machine: &Machine, pool: Handle, attribute: c_int, value: Out<u64>) -> Result<()> {
    read_attribute(lock(&POOLS).get(machine, pool as u64)?, attribute, value)
}

/// What is free has gone back already.
pub fn trim(machine: &Machine, pool: Handle) -> Result<()> {
    lock(&POOLS).get(machine, pool as u64).map(drop)
}

/// Lets devices touch a pool's memory.
pub fn set_access(machine: &Machine, pool: Handle, descriptions: In<AccessDesc>, count: usize) -> Result<()> {
    let owner = lock(&POOLS).get(machine, pool as u64)?.device;
    for description in descriptions.all(count)? {
        let device = state::check_device(machine, description.location.id)?;
        if device != owner && description.flags != 0 {
            match machine.enable_peer(device, owner) {
                Err(error) if error.code != Code::PEER_ACCESS_ALREADY_ENABLED => return Err(error),
                _ => {}
            }
        }
    }
    Ok(())
}

/// An allocation from a pool, in the order of a stream.
pub fn allocate(machine: &Machine, out: Out<u64>, size: usize, pool: Handle, stream: StreamId) -> Result<()> {
    let out = out.required()?;
    let device = lock(&POOLS).get(machine, pool as u64)?.device;
    let ptr = machine.malloc_async(device, size as u64, stream)?;
    note_block_of(machine, pool as u64, ptr, size as u64);
    out.set(ptr)
}

export! { Runtime:
    fn cudaDeviceGetDefaultMemPool(out: Out<Handle>, device: c_int) |machine| { default_of(machine, out, device) }
    fn cudaDeviceGetMemPool(out: Out<Handle>, device: c_int) |machine| { current_of(machine, out, device) }
    fn cudaDeviceSetMemPool(device: c_int, pool: Handle) |machine| { make_current(machine, device, pool) }
    fn cudaMemPoolCreate(out: Out<Handle>, props: In<PoolProps>) |machine| { create(machine, out, props) }
    fn cudaMemPoolDestroy(pool: Handle) |machine| { destroy(machine, pool) }
    fn cudaMemPoolSetAttribute(pool: Handle, attribute: c_int, value: In<u64>) |machine| { set_attribute(machine, pool, attribute, value) }
    fn cudaMemPoolGetAttribute(pool: Handle, attribute: c_int, value: Out<u64>) |machine| { get_attribute(machine, pool, attribute, value) }
    fn cudaMemPoolTrimTo(pool: Handle, _bytes_to_keep: usize) |machine| { trim(machine, pool) }
    fn cudaMemPoolSetAccess(pool: Handle, descriptions: In<AccessDesc>, count: usize) |machine| {
        set_access(machine, pool, descriptions, count)
    }
    fn cudaMallocFromPoolAsync(out: Out<u64>, size: usize, pool: Handle, stream: Handle) bytes(size) |machine| {
        allocate(machine, out, size, pool, stream_of(machine, stream)?)
    }
}
