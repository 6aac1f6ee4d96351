//! Dummies: one granule of a device's memory that lies behind many paused addresses at once, so that a kernel which strays there meets junk instead of an illegal address. A chunk
//! whose addresses lead to the dummy is *veiled*. A veil is no content and no promise: it is put on after a pause has ended and taken off before memory comes back,
//! and if the driver refuses either, what is true about the chunk stays true.

use super::{Heap, Orphan};
use crate::driver::{Access, Addr, Device, DriverResult, Physical, Rights};
use crate::error::Result;
use crate::extent::{Chunk, Extent};
use crate::registry::PAGE;
use crate::sync::{AtomicU64, Mutex, Ordering, lock};
use std::collections::HashMap;

/// Memory behind veils, and an address of its own at which it can be looked at.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dummy {
    pub(crate) device: Device,
    pub(crate) physical: Physical,
    pub(crate) home: Addr,
    pub(crate) size: u64,
}

#[derive(Debug)]
struct Shared {
    dummy: Dummy,
    /// Chunks that are veiled with it, and those that are about to be.
    users: u64,
}

/// The dummies of all devices.
#[derive(Debug, Default)]
pub(crate) struct Veils {
    all: Mutex<HashMap<Device, Shared>>,
    /// Dummies of which the driver has not let go yet.
    ended: Mutex<Vec<Dummy>>,
    bytes: AtomicU64,
    /// How often something was found written.
    pub(crate) strays: AtomicU64,
}

impl Veils {
    /// Paused bytes behind which a dummy lies.
    pub(crate) fn veiled_bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Memory of the dummies themselves.
    pub(crate) fn dummy_bytes(&self) -> u64 {
        lock(&self.all).values().map(|shared| shared.dummy.size).sum()
    }

    /// The dummy of a device, if anything is veiled there.
    pub(crate) fn dummy(&self, device: Device) -> Option<Dummy> {
        lock(&self.all).get(&device).map(|shared| shared.dummy)
    }

    fn join(&self, device: Device) -> Option<Dummy> {
        let mut all = lock(&self.all);
        let shared = all.get_mut(&device)?;
        shared.users += 1;
        Some(shared.dummy)
    }

    /// The dummy of the device is this one, unless somebody was faster; the one that it is not is returned.
    fn add(&self, device: Device, dummy: Dummy) -> Option<Dummy> {
        let mut all = lock(&self.all);
        let mine = dummy.physical;
        let shared = all.entry(device).or_insert(Shared { dummy, users: 0 });
        (shared.dummy.physical != mine).then_some(dummy)
    }

    /// One user fewer; the dummy, if that was the last.
    fn leave(&self, device: Device) -> Option<Dummy> {
        let mut all = lock(&self.all);
        let shared = all.get_mut(&device)?;
        shared.users = shared.users.saturating_sub(1);
        if shared.users == 0 { all.remove(&device).map(|shared| shared.dummy) } else { None }
    }
}

impl Heap {
    /// Makes sure that the device has a dummy, and counts one more user of it. `make_ready` is called with a new one before anybody else sees it.
    pub(crate) fn use_dummy(&self, device: Device, make_ready: impl Fn(Dummy) -> Result<()>) -> Result<Dummy> {
        loop {
            if let Some(dummy) = self.veils.join(device) {
                return Ok(dummy);
            }
            let dummy = self.make_dummy(device)?;
            if let Err(error) = make_ready(dummy) {
                self.destroy_dummy(dummy);
                return Err(error);
            }
            if let Some(superfluous) = self.veils.add(device, dummy) {
                self.destroy_dummy(superfluous);
            }
        }
    }

    /// Ends what [`Heap::use_dummy`] began.
    pub(crate) fn leave_dummy(&self, device: Device) {
        if let Some(dummy) = self.veils.leave(device) {
            self.destroy_dummy(dummy);
        }
    }

    fn make_dummy(&self, device: Device) -> Result<Dummy> {
        let size = self.granularity(device)?;
        let physical = self.driver.create(device, size)?;
        let home = self.driver.reserve(size, PAGE).inspect_err(|_| {
            self.release_or_keep(Orphan { device, size, plain: true, physical });
        })?;
        let dummy = Dummy { device, physical, home, size };
        if let Err(error) = self.driver.map(home, size, physical) {
            self.forget_dummy(dummy);
            return Err(error.into());
        }
        let opened = self.driver.set_access(home, size, &[Access { device, rights: Rights::ReadWrite }]);
        Ok(opened.map(|()| dummy).inspect_err(|_| self.destroy_dummy(dummy))?)
    }

    fn destroy_dummy(&self, dummy: Dummy) {
        match self.driver.unmap(dummy.home, dummy.size) {
            Ok(()) => self.forget_dummy(dummy),
            Err(_) => lock(&self.veils.ended).push(dummy),
        }
    }

    /// A dummy that is mapped nowhere goes.
    fn forget_dummy(&self, dummy: Dummy) {
        let Dummy { device, physical, size, .. } = dummy;
        self.release_or_keep(Orphan { device, size, plain: true, physical });
        self.unreserve(dummy.home, dummy.size);
    }

    /// Dummies go that the driver refused to unmap.
    pub(super) fn destroy_dummies(&self) {
        let ended = std::mem::take(&mut *lock(&self.veils.ended));
        ended.into_iter().for_each(|dummy| self.destroy_dummy(dummy));
    }

    /// Puts a veil on a chunk that is away. Nothing has changed after an error, except that the driver may have refused to take a part off again:
    /// that part stays noted.
    pub(crate) fn veil(&self, extent: &Extent, chunk: &mut Chunk, dummy: Dummy) -> Result<()> {
        let start = extent.base.offset(chunk.offset);
        while chunk.veiled < chunk.size {
            if let Err(error) = self.driver.map(start.offset(chunk.veiled), dummy.size, dummy.physical) {
                let _ = self.unveil_parts(start, chunk, dummy.size);
                return Err(error.into());
            }
            chunk.veiled += dummy.size;
            self.veils.bytes.fetch_add(dummy.size, Ordering::Relaxed);
        }
        self.open(extent, start, chunk.size).inspect_err(|_| drop(self.unveil_parts(start, chunk, dummy.size)))
    }

    /// Takes the veil off a chunk, if it has one. The device is idle, or nothing runs there that could stray.
    pub(crate) fn unveil(&self, device: Device, base: Addr, chunk: &mut Chunk) -> DriverResult<()> {
        if chunk.veiled == 0 {
            return Ok(());
        }
        let granule = self.veils.dummy(device).map_or(chunk.size, |dummy| dummy.size);
        self.unveil_parts(base.offset(chunk.offset), chunk, granule)?;
        self.leave_dummy(device);
        Ok(())
    }

    fn unveil_parts(&self, start: Addr, chunk: &mut Chunk, granule: u64) -> DriverResult<()> {
        while chunk.veiled > 0 {
            self.driver.unmap(start.offset(chunk.veiled - granule), granule)?;
            chunk.veiled -= granule;
            self.veils.bytes.fetch_sub(granule, Ordering::Relaxed);
        }
        Ok(())
    }
}
