//! Mappings that the program makes itself, in its own reservations: they come in as extents when they are mapped, and go when they are
//! unmapped. The program vouches for the order (nothing on the device uses what it unmaps), so nothing here waits for a device.

use super::Heap;
use crate::clock;
use crate::driver::{Access, Addr, Device, Physical, Properties};
use crate::error::{Error, Result, Status};
use crate::extent::{Claim, Extent, Freed, Holding};
use crate::mapping::{Handle, Mapping};
use crate::region::Region;
use crate::sync::lock;
use std::sync::Arc;
use std::time::Duration;

/// Memory that the program made and is about to map.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Made {
    pub(crate) handle: Handle,
    pub(crate) device: Device,
    pub(crate) size: u64,
    pub(crate) physical: Physical,
    pub(crate) properties: Properties,
}

/// What became of a mapping that the program unmaps.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Unmapped {
    /// It was unmapped before.
    Before,
    /// There is no memory that the caller could keep.
    Gone,
    /// This is the caller's to keep or release.
    Memory(Physical),
}

/// Memory that no pause takes while this is there, because the driver is being asked to hand it out; see [`Hold::keep`].
#[derive(Debug)]
pub(crate) struct Hold {
    extent: Arc<Extent>,
    why: &'static str,
    keeps: bool,
}

impl Hold {
    /// The driver did: no later pause takes it either.
    pub(crate) fn keep(mut self) {
        self.keeps = true;
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.extent.settle(self.why, self.keeps);
    }
}

impl Heap {
    /// Physical memory for the program. When it is short, what is only cached is given back, once, before giving up.
    pub(crate) fn create_in(
        &self,
        region: Option<&Region>,
        (device, size, properties): (Device, u64, Properties),
        capturing: bool,
    ) -> Result<Physical> {
        let tag = region.map_or_else(String::new, |region| format!(" in region '{}'", region.tag));
        let doing = format!("make physical memory{tag}");
        if self.is_beyond(device, size) {
            return Err(self.short_of(device, size, &doing));
        }
        if !capturing {
            self.exhume();
        }
        let made = match self.create(device, size, Some(properties)) {
            Err(e) if e.status == Status::OutOfDeviceMemory && !capturing => {
                self.reclaim();
                self.create(device, size, Some(properties))
            }
            made => made,
        };
        made.map_err(|error| match error.status {
            Status::OutOfDeviceMemory => self.short_of(device, size, &doing),
            _ => error.context(format!("making physical memory{tag}")),
        })
    }

    /// Maps what the program made at `addr`, where the program has nothing mapped. Waits for whoever still has to unmap there.
    pub(crate) fn take_in(&self, addr: Addr, made: Made, region: &Region) -> Result<Arc<Extent>> {
        self.await_free(addr, made.size)?;
        let mapping = Mapping::of(made.handle);
        let memory = (made.physical, made.properties);
        let (extent, mut claim) = Extent::of_mapping((addr, made.size), made.device, region.id, memory, mapping);
        let chunk = &mut claim.chunks[0];
        self.map(addr, chunk).or_else(|_| self.map(addr, chunk))?;
        if !self.registry.insert(&extent) {
            self.unmap(addr, chunk)?;
            return Err(Error::new(Status::InvalidArgument, format!("{addr:?} is beyond 57 bits of address")));
        }
        self.put_back(claim);
        Ok(extent)
    }

    /// Waits until nothing of ours is mapped in a range. What is there was unmapped by the program already: a transition has it, which will unmap it,
    /// or it is buried, because the driver refused once or a capture was in progress. That is tried here again, also during a capture of the program's own.
    fn await_free(&self, addr: Addr, size: u64) -> Result<()> {
        let range = addr.0..addr.0.saturating_add(size);
        let mut refused = 0;
        loop {
            let there = self.registry.within(range.clone());
            if there.is_empty() {
                return Ok(());
            }
            if let Some(extent) = there.iter().find(|extent| !extent.is_freed()) {
                let message = format!("{size} bytes cannot be mapped at {addr:?}: {:?} is mapped", extent.base);
                return Err(Error::new(Status::InvalidArgument, message));
            }
            let is_there = |extent: &Arc<Extent>| there.iter().any(|one| Arc::ptr_eq(one, extent));
            for claim in self.dig_out(|extent| extent.mapping.is_some() && is_there(extent)) {
                self.destroy(claim);
            }
            if self.registry.within(range.clone()).iter().any(|extent| extent.is_in_use()) {
                clock::sleep(Duration::from_micros(50));
                continue;
            }
            // What is there now was refused, or was buried since it was looked for.
            refused += 1;
            if refused > 2 {
                let message = format!("{size} bytes at {addr:?} were unmapped, but the driver still refuses to");
                return Err(Error::new(Status::Driver, message));
            }
        }
    }

    /// The program unmaps an extent. Whoever reads it, or tends its backups while
    /// its region is resident, is waited for, as long as pieces take that are under way: the program may map the memory elsewhere.
    pub(crate) fn let_go(&self, extent: &Arc<Extent>, is_resident: impl Fn() -> bool) -> Unmapped {
        let mut claim = match extent.free_alone(is_resident) {
            Freed::Claimed(claim) => claim,
            Freed::Deferred => return Unmapped::Gone,
            Freed::Already => return Unmapped::Before,
        };
        let mut physical = None;
        if let Some(chunk) = claim.chunks.first_mut()
            && chunk.mapped
            && self.unmap(extent.base, chunk).or_else(|_| self.unmap(extent.base, chunk)).is_ok()
        {
            physical = chunk.physical.take();
        }
        self.destroy(claim);
        physical.map_or(Unmapped::Gone, Unmapped::Memory)
    }

    /// Gives access to extents that lie side by side, in one call per run of what is mapped. What is claimed gets it from
    /// whoever has claimed it, what is paused when it is resumed.
    pub(crate) fn grant(&self, extents: &[Arc<Extent>], access: &[Access]) -> Result<()> {
        let count = self.driver.device_count().unwrap_or(u32::MAX);
        if let Some(one) = access.iter().find(|one| one.device.0 >= count) {
            return Err(Error::new(
                Status::InvalidArgument,
                format!("access for {}: there are {count} devices", one.device),
            ));
        }
        let (mut claims, mut before) = (Vec::new(), Vec::new());
        for extent in extents {
            self.peers.name(extent.device, access);
            extent.mapping.iter().for_each(|mapping| mapping.allow(access));
            let claim = extent.refresh_access();
            let mapping = claim.as_ref().and_then(|claim| claim.extent.mapping.as_ref());
            before.push(mapping.map(Mapping::take_over));
            claims.extend(claim);
        }
        let is_mapped = |claim: &Claim| claim.chunks.iter().all(|chunk| chunk.mapped);
        let joined =
            |a: &Claim, b: &Claim| is_mapped(a) == is_mapped(b) && a.extent.base.0 + a.extent.size == b.extent.base.0;
        let runs = claims.chunk_by(joined).filter(|run| is_mapped(&run[0]));
        let granted = runs
            .map(|run| (run[0].extent.base, run.iter().map(|claim| claim.extent.size).sum()))
            .try_for_each(|(addr, size)| {
                let grant = || self.driver.set_access(addr, size, access);
                grant().or_else(|_| grant())
            });
        if granted.is_err() {
            let mappings = extents.iter().map(|extent| extent.mapping.as_ref());
            mappings.zip(before).for_each(|both| {
                if let (Some(mapping), Some(before)) = both {
                    mapping.put_back(before)
                }
            });
        }
        claims.into_iter().for_each(|claim| self.put_back(claim));
        Ok(granted?)
    }

    /// The extent, which is in `region`, stays on the device as long as the [`Hold`] says; returns its first chunk's memory, too. In a resident region nobody
    /// keeps a claim for longer than a driver call.
    pub(crate) fn hold(&self, extent: &Arc<Extent>, region: &Region, why: &'static str) -> Result<(Physical, Hold)> {
        let refusal = |status, what| Err(Error::new(status, format!("the memory at {:?} is {what}", extent.base)));
        loop {
            match extent.hold(why) {
                Holding::There(physical) => {
                    return Ok((physical, Hold { extent: Arc::clone(extent), why, keeps: false }));
                }
                Holding::Away => return refusal(Status::Paused, "paused; resume its region first"),
                Holding::Claimed if extent.is_freed() => return refusal(Status::Busy, "being unmapped"),
                Holding::Claimed if region.is_resident() => clock::sleep(Duration::from_micros(50)),
                Holding::Claimed => return refusal(Status::Busy, "being paused or resumed"),
            }
        }
    }

    /// The program gives a reservation back. It goes when nothing of ours is mapped there any more, at the latest with a later call.
    pub(crate) fn unreserve(&self, addr: Addr, size: u64) {
        lock(&self.left).push((addr, size));
        self.unreserve_left();
    }

    /// Gives back what reservations can go now.
    pub(super) fn unreserve_left(&self) {
        let left = std::mem::take(&mut *lock(&self.left));
        for (addr, size) in left {
            let used = !self.registry.within(addr.0..addr.0 + size).is_empty();
            if used || self.driver.unreserve(addr, size).is_err() {
                lock(&self.left).push((addr, size));
            }
        }
    }
}
