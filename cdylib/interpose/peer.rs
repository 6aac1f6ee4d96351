//! Peers that the program enabled: remembered, so that memory of ours that comes later is accessible too; and forgotten, when it takes that back.
//! A device may have been given access in several ways at once: it has it until the last of them is taken back.

use super::entry::AccessDescription;
use crate::log;
use crate::process::{self, Process};
use sire_core::driver::Device;
use sire_core::error::Result;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{c_int, c_void};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// `CU_MEM_LOCATION_TYPE_DEVICE`.
const ON_DEVICE: c_int = 1;

/// How a device came by its access.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Way {
    /// `cudaDeviceEnablePeerAccess`, `cuCtxEnablePeerAccess`, in this context: each has its own.
    Context(usize),
    /// Access to the pool with this handle.
    Pool(usize),
    /// `sire_allow_peer`.
    Said,
}

/// Whose memory, who may touch it: in which ways. A pair without a way had one.
type Table = BTreeMap<(u32, u32), BTreeSet<Way>>;

static TABLE: Mutex<Table> = Mutex::new(Table::new());

fn table() -> MutexGuard<'static, Table> {
    TABLE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// `accessor` was given access to memory on `owner`.
pub(super) fn enable(owner: u32, accessor: u32, way: Way) {
    table().entry((owner, accessor)).or_default().insert(way);
    follow(owner, accessor);
}

/// `accessor` has access to memory on `owner` because the program has asked Sire for it.
pub(crate) fn note_said(owner: u32, accessor: u32) {
    enable(owner, accessor, Way::Said);
}

/// What was given in this way was taken back.
pub(super) fn disable(owner: u32, accessor: u32, way: Way) {
    // Also if this way was forgotten before: what could not be taken back then is tried again.
    let known = table().get_mut(&(owner, accessor)).map(|ways| ways.remove(&way)).is_some();
    if known {
        follow(owner, accessor);
    }
}

/// The pairs that have access through a pool, which is about to go: forgotten, before its handle may be another one's.
pub(super) fn forget_pool(pool: *mut c_void) -> Vec<(u32, u32)> {
    let way = Way::Pool(pool as usize);
    let mut table = table();
    let through = table.iter_mut().filter_map(|(pair, ways)| ways.remove(&way).then_some(*pair));
    through.collect()
}

/// It is gone, and with it what was given through it.
pub(super) fn without_pool(pairs: Vec<(u32, u32)>) {
    pairs.into_iter().for_each(|(owner, accessor)| follow(owner, accessor));
}

/// It is still there.
pub(super) fn with_pool(pool: *mut c_void, pairs: Vec<(u32, u32)>) {
    pairs.into_iter().for_each(|(owner, accessor)| enable(owner, accessor, Way::Pool(pool as usize)));
}

/// The primary context of `device` is gone, and with it what was given to it, or by it, in contexts.
pub(super) fn forget_contexts_of(device: Device) {
    let mut concerned = Vec::new();
    for (&(owner, accessor), ways) in
        table().iter_mut().filter(|((owner, accessor), _)| [*owner, *accessor].contains(&device.0))
    {
        ways.retain(|way| !matches!(way, Way::Context(_)));
        concerned.push((owner, accessor));
    }
    concerned.into_iter().for_each(|(owner, accessor)| follow(owner, accessor));
}

/// Tells the engine what holds for a pair of devices, if it runs.
fn follow(owner: u32, accessor: u32) {
    if let Some(process) = process::started()
        && let Err(error) = tell(process, owner, accessor)
    {
        log::warning!("what device {accessor} may do with regions on device {owner} could not be set: {error}");
    }
}

/// Tells the engine what holds for a pair, until that is what was told: whoever changes the table meanwhile tells it too, and nobody knows who comes last.
fn tell(process: &Process, owner: u32, accessor: u32) -> Result<()> {
    let may = || table().get(&(owner, accessor)).is_some_and(|ways| !ways.is_empty());
    let mut told = may();
    loop {
        let (device, peer) = (Device(owner), Device(accessor));
        if told {
            process.engine.allow_peer(device, peer)?
        } else {
            process.engine.refuse_peer(device, peer)?
        }
        if may() == told {
            return Ok(());
        }
        told = !told;
    }
}

/// Devices that may read or write a pool of `owner`'s were given access to memory there, or it was taken back. (The engine gives no peer reading alone;
/// more is allowed then than was asked for, so that nothing which worked stops working.)
///
/// # Safety
/// `count` descriptions lie at `access`, or it is NULL.
pub(super) unsafe fn follow_described(owner: c_int, pool: *mut c_void, access: *const AccessDescription, count: usize) {
    let Ok(owner) = u32::try_from(owner) else { return };
    for at in 0..if access.is_null() { 0 } else { count } {
        // SAFETY: the caller's promise.
        let described = unsafe { access.add(at).read_unaligned() };
        let accessor = u32::try_from(described.location.id).ok().filter(|_| described.location.kind == ON_DEVICE);
        let Some(accessor) = accessor.filter(|accessor| *accessor != owner) else { continue };
        let way = Way::Pool(pool as usize);
        if described.flags == 0 { disable(owner, accessor, way) } else { enable(owner, accessor, way) }
    }
}

/// Tells a freshly started engine what was enabled before. Repeating it does no harm.
pub(crate) fn replay(process: &Process) {
    let pairs: Vec<_> = table().iter().filter(|(_, ways)| !ways.is_empty()).map(|(pair, _)| *pair).collect();
    for (owner, accessor) in pairs {
        if let Err(error) = tell(process, owner, accessor) {
            log::warning!("device {accessor} was not given access to regions on device {owner}: {error}");
        }
    }
}
