//! Peers that the program enabled: remembered, so that memory of ours that comes later is accessible too.

use crate::log;
use crate::process::{self, Process};
use sire_core::driver::Device;
use std::sync::atomic::{AtomicU64, Ordering};

/// Devices that fit in the table; CUDA machines have at most 16 today.
const MOST: usize = 64;

/// Bit `accessor` of row `owner`: `accessor` may touch memory on `owner`.
static ENABLED: [AtomicU64; MOST] = [const { AtomicU64::new(0) }; MOST];

/// `accessor` was given access to memory on `owner`.
pub(super) fn enable(owner: usize, accessor: usize) {
    if owner >= MOST || accessor >= MOST {
        log::warning!("device {owner} or {accessor} is beyond {MOST}: its peer access is not replayed");
        return;
    }
    ENABLED[owner].fetch_or(1 << accessor, Ordering::AcqRel);
    if let Some(process) = process::started() {
        allow(process, owner, accessor);
    }
}

/// Tells a freshly started engine what was enabled before. Repeating it does no harm.
pub(crate) fn replay(process: &Process) {
    for (owner, row) in ENABLED.iter().enumerate() {
        let accessors = row.load(Ordering::Acquire);
        for accessor in (0..MOST).filter(|accessor| accessors & (1 << accessor) != 0) {
            allow(process, owner, accessor);
        }
    }
}

fn allow(process: &Process, owner: usize, accessor: usize) {
    if let Err(error) = process.engine.allow_peer(Device(owner as u32), Device(accessor as u32)) {
        log::warning!("device {accessor} was not given access to regions on device {owner}: {error}");
    }
}
