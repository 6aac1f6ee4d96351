//! Memory that the recorded program mapped itself, mapped here: the program's addresses and handles are names, this keeps what they
//! mean. What of it has bytes is an allocation of the player's like any other.

use std::collections::{BTreeMap, HashMap};

use sire_core::driver::{Access, Addr, Device as Ordinal, Properties, Rights};
use sire_core::engine::{Backup, RegionId, State};
use sire_core::error::Result;
use sire_core::segments::{Handle, NewMemory};
use sire_core::trace::SegmentCall;

use super::player::{Allocation, Player};

/// Addresses of the trace, here.
#[derive(Debug)]
struct Reservation {
    here: Addr,
    size: u64,
    region: Option<u32>,
}

/// Physical memory of the trace, here.
#[derive(Debug)]
struct Memory {
    handle: Handle,
    region: Option<u32>,
    device: u32,
    references: u64,
}

/// Memory at a recorded address.
#[derive(Debug)]
struct View {
    handle: u64,
    size: u64,
}

/// See the [module documentation](self). By recorded names.
#[derive(Debug, Default)]
pub struct Views {
    reservations: BTreeMap<u64, Reservation>,
    memory: HashMap<u64, Memory>,
    mapped: BTreeMap<u64, View>,
}

impl Views {
    /// Where recorded addresses are here, if they lie in one reservation.
    fn here(&self, name: u64, size: u64) -> Option<Addr> {
        let (offset, found) = self.reservation(name)?;
        (size <= found.size && offset <= found.size - size).then(|| found.here.offset(offset))
    }

    /// The reservation at or below a recorded address, and how far inside.
    fn reservation(&self, name: u64) -> Option<(u64, &Reservation)> {
        let (start, found) = self.reservations.range(..=name).next_back()?;
        Some((name - start, found))
    }
}

impl Player<'_> {
    /// Makes a call about memory that the program mapped itself.
    pub(super) fn segment(&mut self, call: &SegmentCall) -> Result<()> {
        match *call {
            SegmentCall::Reserve { addr, size, region } => self.reserve(addr, size, region),
            SegmentCall::Unreserve { addr, size } => self.unreserve(addr, size),
            SegmentCall::Create { handle, region, device, size, shareable, rdma, status: 0 } => {
                let region = region.filter(|region| self.region_here(Some(*region)).is_some());
                self.create(handle, region, (device, size), Properties { shareable, rdma });
            }
            SegmentCall::Release { handle } => self.release(handle),
            SegmentCall::Map { handle, addr, size, offset, status: 0 } => self.map(handle, addr, size, offset),
            SegmentCall::Unmap { addr, size } => self.unmap(addr, size),
            SegmentCall::Grant { addr, size, ref access, status: 0 } => return self.grant(addr, size, access),
            SegmentCall::Retain { addr } => self.retain(addr),
            _ => self.played.left_out += 1,
        }
        Ok(())
    }

    fn region_here(&self, region: Option<u32>) -> Option<RegionId> {
        self.regions.get(&region?).map(|region| region.id)
    }

    fn reserve(&mut self, name: u64, size: u64, region: Option<u32>) {
        let (driver, id) = (&self.device.driver, self.region_here(region));
        let reserved = self.timed("reserve", |engine| {
            let here = driver.reserve(size, 0)?;
            engine.segments().reserved(here, size, id);
            Ok(here)
        });
        if let Some(here) = reserved {
            self.views.reservations.insert(name, Reservation { here, size, region });
        }
    }

    fn unreserve(&mut self, name: u64, size: u64) {
        match self.views.reservations.remove(&name) {
            Some(found) if found.size == size => {
                self.timed("unreserve", |engine| engine.segments().unreserve(found.here, size));
            }
            _ => self.played.left_out += 1,
        }
    }

    fn create(&mut self, name: u64, region: Option<u32>, (device, size): (u32, u64), properties: Properties) {
        // What a replay shares with nobody needs no handle that can be shared; a device here may not be able to make it.
        let (id, device) = (self.region_here(region), self.ordinal(device));
        let properties = Properties { shareable: 0, ..properties };
        let memory = NewMemory { region: id, device, size, properties, capturing: false };
        match self.timed("create", |engine| engine.segments().create(memory)) {
            Some(Some(handle)) => {
                self.views.memory.insert(name, Memory { handle, region, device: device.0, references: 1 });
            }
            Some(None) => self.played.left_out += 1,
            None => {}
        }
    }

    fn release(&mut self, name: u64) {
        let Some(memory) = self.views.memory.get_mut(&name).filter(|memory| memory.references > 0) else {
            self.played.left_out += 1;
            return;
        };
        memory.references -= 1;
        let handle = memory.handle;
        self.timed("release", |engine| engine.segments().release(handle));
    }

    /// What is mapped in a way that nobody follows (twice, or in part) is left out.
    fn map(&mut self, handle: u64, name: u64, size: u64, offset: u64) {
        let places = self.views.memory.get(&handle).map(|memory| memory.handle).zip(self.views.here(name, size));
        let Some((there, here)) = places.filter(|_| offset == 0) else {
            self.played.left_out += 1;
            return;
        };
        match self.timed("map", |engine| engine.segments().map(here, size, offset, there, false)) {
            Some(None) => {
                // Memory of no region joins that of the addresses.
                let joined = self.views.reservation(name).and_then(|(_, found)| found.region);
                if let Some(memory) = self.views.memory.get_mut(&handle) {
                    memory.region = memory.region.or(joined);
                }
                self.views.mapped.insert(name, View { handle, size });
            }
            Some(Some(_)) => self.played.left_out += 1,
            None => {}
        }
    }

    fn unmap(&mut self, name: u64, size: u64) {
        let Some(here) = self.views.here(name, size) else {
            self.played.left_out += 1;
            return;
        };
        let there = name..name.saturating_add(size);
        self.views.mapped.retain(|at, _| !there.contains(at));
        self.allocations.retain(|at, found| !(found.mapped && there.contains(at)));
        self.timed("unmap", |engine| engine.segments().unmap(here, size));
    }

    fn grant(&mut self, name: u64, size: u64, access: &[(u32, bool)]) -> Result<()> {
        let Some(here) = self.views.here(name, size) else {
            self.played.left_out += 1;
            return Ok(());
        };
        let mut rights: Vec<Access> = Vec::new();
        for (device, writable) in access.iter().map(|(device, writable)| (self.ordinal(*device), *writable)) {
            // Devices that share one here have the rights of them all.
            match rights.iter_mut().find(|access| access.device == device) {
                Some(found) if writable => found.rights = Rights::ReadWrite,
                Some(_) => {}
                None => rights.push(Access { device, rights: if writable { Rights::ReadWrite } else { Rights::Read } }),
            }
        }
        if self.timed("grant", |engine| engine.segments().grant(here, size, &rights)).is_none() {
            return Ok(());
        }
        self.fill_granted(name, size, &rights)
    }

    /// What its own device may write from now on has bytes.
    fn fill_granted(&mut self, name: u64, size: u64, rights: &[Access]) -> Result<()> {
        let there = name..name.saturating_add(size);
        let mut news = Vec::new();
        for (&at, view) in self.views.mapped.range(there) {
            let Some(memory) = self.views.memory.get(&view.handle) else { continue };
            let own = |access: &Access| access.device == Ordinal(memory.device) && access.rights == Rights::ReadWrite;
            let new = !self.allocations.get(&at).is_some_and(|found| found.mapped);
            if let (true, true, Some(addr)) = (new, rights.iter().any(own), self.views.here(at, view.size)) {
                news.push((at, addr, view.size, memory.device, memory.region));
            }
        }
        for (at, addr, size, device, region) in news {
            let backup = region.and_then(|region| self.regions.get(&region)).map(|region| region.policy.backup);
            // What was recorded between the call's end and its record may have been a pause: such memory is left as it is.
            let id = self.region_here(region);
            let away = id.is_some_and(|id| !matches!(self.engine.state(id), Ok(State::Resident)));
            let is_kept = !away && backup.is_some_and(|backup| backup != Backup::None);
            let kept = is_kept.then_some(0..size).into_iter().collect();
            let region = region.unwrap_or(u32::MAX);
            self.allocations.insert(at, Allocation { addr, size, device, region, key: at, kept, mapped: true });
            if !away {
                self.write(at)?;
            }
        }
        Ok(())
    }

    fn retain(&mut self, name: u64) {
        let here = self.views.here(name, 1);
        let view = self.views.mapped.get(&name).and_then(|view| self.views.memory.get_mut(&view.handle));
        let (Some(memory), Some(here)) = (view, here) else {
            self.played.left_out += 1;
            return;
        };
        memory.references += 1;
        self.timed("retain", |engine| Ok(engine.segments().retain(here)));
    }

    /// Unmaps, releases and gives back all that is left.
    pub(super) fn clear_views(&mut self) {
        let views = std::mem::take(&mut self.views);
        let segments = self.engine.segments();
        for (name, view) in &views.mapped {
            if let Some(here) = views.here(*name, view.size) {
                let _ = segments.unmap(here, view.size);
            }
        }
        for memory in views.memory.values() {
            (0..memory.references).for_each(|_| drop(segments.release(memory.handle)));
        }
        for found in views.reservations.values() {
            let _ = segments.unreserve(found.here, found.size);
        }
    }
}
