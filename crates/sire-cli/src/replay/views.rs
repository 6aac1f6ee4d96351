//! Memory that the recorded program mapped itself, mapped here: the program's addresses and handles are names, this keeps what they
//! mean. What of it has bytes is an allocation of the player's like any other.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use sire_core::driver::{Access, Addr, Device as Ordinal, Driver, Physical, Properties, Rights};
use sire_core::engine::{Backup, Engine, RegionId, State};
use sire_core::error::Result;
use sire_core::segments::{Handle, Lent, NewMemory};
use sire_core::trace::SegmentCall;

use super::needs::taken;
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
    size: u64,
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

/// What the engine does not follow: memory that was imported, or mapped for a second time or in part.
#[derive(Debug)]
struct Stranger {
    here: Addr,
    size: u64,
    /// Made here, in place of what nobody but the recorded program has.
    made: Option<Physical>,
}

/// Why memory stays on the device, in what the engine reports.
const HANDED_OUT: &str = "it was handed out when this was recorded";

/// See the [module documentation](self). By recorded names.
#[derive(Debug, Default)]
pub struct Views {
    reservations: BTreeMap<u64, Reservation>,
    memory: HashMap<u64, Memory>,
    mapped: BTreeMap<u64, View>,
    strangers: BTreeMap<u64, Stranger>,
    /// What the engine has asked its caller to map, by the address.
    pending: HashMap<u64, (Physical, u64)>,
}

impl Stranger {
    fn drop_from(&self, driver: &dyn Driver) -> Result<()> {
        driver.unmap(self.here, self.size)?;
        Ok(self.made.map_or(Ok(()), |physical| driver.release(physical))?)
    }
}

impl Views {
    fn memory_of(&self, handle: u64) -> Option<&Memory> {
        self.memory.get(&handle)
    }

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
            SegmentCall::Mapped { addr, size } => self.map_stranger(addr, size),
            SegmentCall::Lend { handle, status: 0 } => return self.lend(handle),
            SegmentCall::LendRange { addr, size, status: 0 } => self.lend_range(addr, size),
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
                self.views.memory.insert(name, Memory { handle, size, region, device: device.0, references: 1 });
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

    fn map(&mut self, handle: u64, name: u64, size: u64, offset: u64) {
        let places = self.views.memory.get(&handle).map(|memory| memory.handle).zip(self.views.here(name, size));
        let Some((there, here)) = places else {
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
            // Twice, or in part: the record of the caller's own mapping follows.
            Some(Some(physical)) => {
                let whole = self.views.memory_of(handle).is_some_and(|memory| offset == 0 && memory.size == size);
                if whole {
                    self.views.pending.insert(name, (physical, size));
                }
            }
            None => {}
        }
    }

    /// What the program mapped itself, as it did: the memory that the engine named, or as much of this replay's own.
    fn map_stranger(&mut self, name: u64, size: u64) {
        let pending = self.views.pending.remove(&name).filter(|(_, bytes)| *bytes == size);
        let free = !self.views.mapped.contains_key(&name) && !self.views.strangers.contains_key(&name);
        let Some(here) = self.views.here(name, size).filter(|_| free) else {
            self.played.left_out += 1;
            return;
        };
        let driver = Arc::clone(&self.device.driver);
        let mapped = self.timed("map", |engine| {
            let made = if pending.is_some() { None } else { Some(driver.create(Ordinal(0), size)?) };
            let physical = made.or(pending.map(|(physical, _)| physical));
            if let Err(error) = physical.map_or(Ok(()), |physical| driver.map(here, size, physical)) {
                made.map_or(Ok(()), |physical| driver.release(physical))?;
                return Err(error.into());
            }
            engine.segments().mapped(here, size);
            Ok(made)
        });
        if let Some(made) = mapped {
            self.views.strangers.insert(name, Stranger { here, size, made });
        }
    }

    /// What was handed out stays where it is, whatever its region's policy: its bytes are compared from now on.
    fn lend(&mut self, name: u64) -> Result<()> {
        let Some(memory) = self.views.memory_of(name) else {
            self.played.left_out += 1;
            return Ok(());
        };
        let handle = memory.handle;
        let lend = |engine: &Engine| engine.segments().lend(handle, HANDED_OUT).map(|(_, lent)| lent.keep());
        if self.timed("lend", lend).is_none() {
            return Ok(());
        }
        let at = self.views.mapped.iter().find(|(_, view)| view.handle == name).map(|(at, _)| *at);
        let Some(at) = at.filter(|at| self.allocations.get(at).is_some_and(|found| found.mapped)) else {
            return Ok(());
        };
        self.allocations.entry(at).and_modify(|found| {
            found.kept = std::iter::once(0..found.size).collect();
            found.attached.clear(); // What the file says is overwritten below.
        });
        self.write(at)
    }

    fn lend_range(&mut self, name: u64, size: u64) {
        let mapped = self.views.here(name, size);
        let allocated = || self.find(name).map(|(found, offset)| found.addr.offset(offset));
        let Some(here) = mapped.or_else(allocated) else {
            self.played.left_out += 1;
            return;
        };
        self.timed("lend", |engine| engine.segments().lend_range(here, size, HANDED_OUT).map(Lent::keep));
    }

    fn unmap(&mut self, name: u64, size: u64) {
        let Some(here) = self.views.here(name, size) else {
            self.played.left_out += 1;
            return;
        };
        let there = name..name.saturating_add(size);
        self.views.mapped.retain(|at, _| !there.contains(at));
        self.allocations.retain(|at, found| !(found.mapped && there.contains(at)));
        let gone = taken(&mut self.views.strangers, there);
        let driver = Arc::clone(&self.device.driver);
        self.timed("unmap", |engine| {
            engine.segments().unmap(here, size)?;
            gone.iter().try_for_each(|(_, found)| found.drop_from(&*driver))
        });
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
            self.allocations.insert(
                at,
                Allocation { addr, size, device, region, key: at, kept, attached: Vec::new(), mapped: true },
            );
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
        for found in views.strangers.values() {
            let _ = segments.unmap(found.here, found.size);
            let _ = found.drop_from(&*self.device.driver);
        }
        for memory in views.memory.values() {
            (0..memory.references).for_each(|_| drop(segments.release(memory.handle)));
        }
        for found in views.reservations.values() {
            let _ = segments.unreserve(found.here, found.size);
        }
    }
}
