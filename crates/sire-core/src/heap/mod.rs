//! The heap: makes extents and gives them back. Large allocations have an extent of their own; small ones are slots of
//! slabs ([`slabs`]); what the program maps itself comes in by [`mappings`]. What cannot be given back at once (a capture is running, or the driver refused) waits in
//! the graveyard and is finished by a later call.

pub(crate) mod caching;
pub(crate) mod mappings;
mod peers;
pub(crate) mod reading;
mod slabs;
pub(crate) mod veils;

use crate::cache::Depot;
use crate::callers::Callers;
use crate::driver::{Addr, Device, Driver, DriverResult, Physical, Properties};
use crate::error::{Error, Result, Status};
use crate::extent::{Chunk, Claim, Extent, Freed, Slab, Unfinished};
use crate::notices::Notices;
use crate::region::Region;
use crate::registry::{PAGE, Pages, Registry};
use crate::settings::Settings;
use crate::stock::Stock;
use crate::sync::{Mutex, lock};
use crate::terms::Request;
use dashmap::DashMap;
use peers::Peers;
use slabs::Bins;
use std::collections::BTreeSet;
use std::sync::{Arc, OnceLock};
use veils::Veils;

/// Larger requests are refused without asking the driver.
pub(crate) const LARGEST: u64 = 1 << 44;
/// Requests of so many chunks are not compared with what the device has.
const FEW: u64 = 4;

/// What a new extent is to be.
struct Plan<'a> {
    device: Device,
    region: &'a Region,
    /// A multiple of the granularity.
    size: u64,
    requested: u64,
    slab: Option<Slab>,
}

/// Physical memory of no chunk.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Orphan {
    pub(crate) device: Device,
    pub(crate) size: u64,
    /// It has no properties of the program's.
    pub(crate) plain: bool,
    pub(crate) physical: Physical,
}

/// See the [module documentation](self).
#[derive(Debug)]
pub(crate) struct Heap {
    pub(crate) driver: Arc<dyn Driver>,
    pub(crate) stock: Arc<Stock>,
    pub(crate) settings: Arc<Settings>,
    pub(crate) registry: Registry,
    pub(crate) notices: Notices,
    bins: Bins,
    /// Caches, by device, and for each page of theirs, 1 + the device.
    depots: Box<[OnceLock<Arc<Depot>>]>,
    cached_pages: Pages,
    graveyard: Mutex<Vec<Arc<Extent>>>,
    /// Extents that are being read, see [`reading`].
    reading: Mutex<Vec<Arc<Extent>>>,
    /// Physical memory of no chunk, which the driver refused to take back.
    orphans: Mutex<Vec<Orphan>>,
    /// Reservations that the program gave back, and which could not go yet.
    left: Mutex<Vec<(Addr, u64)>>,
    /// Dummies behind paused addresses.
    pub(crate) veils: Veils,
    /// Calls that wait for a device: the program's own that went to the driver, and ours for the program.
    pub(crate) callers: Callers,
    granularities: DashMap<Device, u64>,
    peers: Peers,
    /// Whether a capture is in progress, if anybody knows.
    pub(crate) captures: OnceLock<fn() -> bool>,
}

impl Heap {
    /// An empty heap.
    pub(crate) fn new(stock: Arc<Stock>, settings: Arc<Settings>) -> Heap {
        Heap {
            driver: stock.clone(),
            stock,
            settings,
            registry: Registry::new(),
            notices: Notices::default(),
            bins: Bins::default(),
            depots: (0..caching::DEVICES).map(|_| OnceLock::new()).collect(),
            cached_pages: Pages::new(),
            graveyard: Mutex::new(Vec::new()),
            reading: Mutex::default(),
            orphans: Mutex::default(),
            left: Mutex::default(),
            veils: Veils::default(),
            callers: Callers::new(),
            granularities: DashMap::new(),
            peers: Peers::default(),
            captures: OnceLock::new(),
        }
    }

    /// Whether a capture is in progress now, whatever was so when the call was made.
    pub(crate) fn is_capturing(&self) -> bool {
        self.captures.get().is_some_and(|in_progress| in_progress())
    }

    /// Memory for the program. When memory is short, what is only cached is given back, once, before giving up.
    pub(crate) fn allocate(&self, request: &Request, region: &Region) -> Result<Addr> {
        if !request.capturing {
            self.exhume();
        }
        match self.try_allocate(request, region) {
            // Making room would unmap and wait, neither of which a capture survives.
            Err(e) if e.status == Status::OutOfDeviceMemory && request.size < LARGEST && !request.capturing => {
                self.reclaim();
                self.try_allocate(request, region)
            }
            other => other,
        }
    }

    fn try_allocate(&self, request: &Request, region: &Region) -> Result<Addr> {
        if request.size < self.settings.small {
            return self.allocate_slot(request, region);
        }
        let granularity = self.granularity(request.device)?;
        if request.size >= LARGEST {
            return Err(self.short_of(request.device, request.size, &doing("allocate in", region)));
        }
        let size = request.size.next_multiple_of(granularity);
        let plan = Plan { device: request.device, region, size, requested: request.size, slab: None };
        Ok(self.build(plan)?.base)
    }

    /// Whether `device` could not hold so many bytes if nothing else were there: then nothing is made, and nobody gives way. Small requests pay nothing for it.
    pub(crate) fn is_beyond(&self, device: Device, bytes: u64) -> bool {
        let asks = bytes > FEW * self.settings.chunk;
        bytes >= LARGEST || (asks && self.driver.memory_info(device).is_ok_and(|info| bytes > info.total))
    }

    /// The granularity of `device`, asked for once.
    pub(crate) fn granularity(&self, device: Device) -> Result<u64> {
        if let Some(known) = self.granularities.get(&device) {
            return Ok(*known);
        }
        let granularity = self.driver.granularity(device)?;
        self.granularities.insert(device, granularity);
        Ok(granularity)
    }

    fn build(&self, plan: Plan<'_>) -> Result<Arc<Extent>> {
        let chunk = if plan.region.policy.whole { plan.size } else { self.settings.chunk };
        let chunk = chunk.next_multiple_of(self.granularity(plan.device)?);
        let base = self.driver.reserve(plan.size, PAGE)?;
        let sizes = (plan.size, plan.requested, chunk);
        let (extent, mut claim) = Extent::new(base, sizes, plan.device, plan.region.id, plan.slab);
        let built = if self.registry.insert(&extent) {
            self.fill(&mut claim, plan.region)
        } else {
            Err(Error::new(Status::Driver, format!("the driver reserved {base:?}, beyond 57 bits of address")))
        };
        if let Err(error) = built {
            extent.free();
            self.destroy(claim);
            return Err(error);
        }
        self.put_back(claim);
        Ok(extent)
    }

    fn fill(&self, claim: &mut Claim, region: &Region) -> Result<()> {
        self.back(claim, region)?;
        self.each_mapped(claim, |addr, size| self.open(&claim.extent, addr, size))
    }

    /// Makes and maps memory for every chunk; nobody may touch it yet.
    fn back(&self, claim: &mut Claim, region: &Region) -> Result<()> {
        let Claim { extent, chunks, .. } = claim;
        for chunk in chunks.iter_mut() {
            let made = self.create(extent.device, chunk.size, None);
            let short = |_| self.short_of(extent.device, extent.requested, &doing("allocate in", region));
            chunk.physical = Some(made.map_err(|e| if e.status == Status::OutOfDeviceMemory { short(()) } else { e })?);
            self.map(extent.base, chunk)?;
        }
        Ok(())
    }

    /// Physical memory, if that leaves the margin free.
    pub(crate) fn create(&self, device: Device, size: u64, properties: Option<Properties>) -> Result<Physical> {
        let margin = self.settings.margin();
        if margin > 0 && self.driver.memory_info(device)?.free < size.saturating_add(margin) {
            return Err(Error::new(Status::OutOfDeviceMemory, format!("the margin of {margin} bytes would be used")));
        }
        Ok(self.make(device, size, properties)?)
    }

    /// Physical memory, whatever that leaves free.
    pub(crate) fn make(&self, device: Device, size: u64, properties: Option<Properties>) -> DriverResult<Physical> {
        match properties {
            Some(properties) => self.driver.create_with(device, size, properties),
            None => self.driver.create(device, size),
        }
    }

    /// Maps the chunk's physical memory.
    pub(crate) fn map(&self, base: Addr, chunk: &mut Chunk) -> Result<()> {
        if let (false, Some(physical)) = (chunk.mapped, chunk.physical) {
            self.driver.map(base.offset(chunk.offset), chunk.size, physical)?;
            chunk.mapped = true;
        }
        Ok(())
    }

    /// Unmaps the chunk.
    pub(crate) fn unmap(&self, base: Addr, chunk: &mut Chunk) -> DriverResult<()> {
        if chunk.mapped {
            self.driver.unmap(base.offset(chunk.offset), chunk.size)?;
            chunk.mapped = false;
        }
        Ok(())
    }

    /// Unmaps the chunk and gives its memory back. What the driver refuses stays noted in the chunk.
    pub(crate) fn strip(&self, device: Device, base: Addr, chunk: &mut Chunk) -> DriverResult<u64> {
        self.unmap(base, chunk)?;
        let Some(physical) = chunk.physical else { return Ok(0) };
        self.stock.take_back(device, chunk.size, chunk.properties.is_none(), physical)?;
        chunk.physical = None;
        Ok(chunk.size)
    }

    /// Gives memory of no chunk and no mapping back; false if the driver refused: then a later call tries again.
    pub(crate) fn release_or_keep(&self, orphan: Orphan) -> bool {
        let Orphan { device, size, plain, physical } = orphan;
        let released = self.stock.take_back(device, size, plain, physical).is_ok();
        if !released {
            lock(&self.orphans).push(orphan);
        }
        released
    }

    /// An error that says what was wanted and what there is.
    pub(crate) fn short_of(&self, device: Device, bytes: u64, doing: &str) -> Error {
        let have = match self.driver.memory_info(device) {
            Ok(info) => format!("{} of {} bytes are free", info.free, info.total),
            Err(_) => "the driver does not say how much is free".to_owned(),
        };
        let margin = match self.settings.margin() {
            0 => String::new(),
            margin => format!(", and {margin} must stay free"),
        };
        let message = format!(
            "cannot {doing}: {bytes} bytes are needed on {device}, where {have}{margin}; pause or free something there"
        );
        Error::new(Status::OutOfDeviceMemory, message)
    }

    /// What is done to each run of chunks that are mapped side by side.
    fn each_mapped(&self, claim: &Claim, with: impl Fn(Addr, u64) -> Result<()>) -> Result<()> {
        for run in claim.chunks.chunk_by(|a, b| a.mapped == b.mapped).filter(|run| run[0].mapped) {
            with(claim.extent.base.offset(run[0].offset), run.iter().map(|chunk| chunk.size).sum())?;
        }
        Ok(())
    }

    /// Ends a claim, after doing what arrived meanwhile.
    pub(crate) fn put_back(&self, claim: Claim) {
        self.settle(claim.put_back());
    }

    fn settle(&self, mut outcome: std::result::Result<(), Unfinished>) {
        loop {
            match outcome {
                Ok(()) => return,
                Err(Unfinished::Freed(claim)) => return self.finish_free(claim),
                Err(Unfinished::AccessStale(claim)) => {
                    claim.extent.mapping.iter().for_each(|mapping| drop(mapping.take_over()));
                    if let Err(e) = self.renew_access(&claim).or_else(|_| self.renew_access(&claim)) {
                        let base = claim.extent.base;
                        self.notices
                            .add(format!("what peers may do with the memory at {base:?} could not be set: {e}"));
                    }
                    outcome = claim.put_back();
                }
            }
        }
    }

    fn finish_free(&self, claim: Claim) {
        let may_go = match claim.extent.mapping {
            _ if !claim.may_be_in_use() => true,
            // The program vouches that nothing uses what it unmaps. But others' captures do not survive it.
            Some(_) => !self.is_capturing(),
            None => self.synchronize(claim.extent.device).is_ok(),
        };
        if may_go {
            self.destroy(claim);
        } else {
            self.bury(claim);
        }
    }

    /// Frees the allocation that starts at `addr`.
    pub(crate) fn free(&self, addr: Addr, capturing: bool) -> Result<()> {
        if !capturing {
            self.exhume();
        }
        let extent = self.registry.find(addr).ok_or_else(|| unknown(addr, "it lies in no memory of Sire's"))?;
        match &extent.slab {
            _ if extent.cached.is_some() => Err(unknown(addr, "a cache has it")),
            _ if extent.mapping.is_some() => Err(unknown(addr, "the program mapped it itself, and is to unmap it")),
            Some(slab) => self.free_slot(&extent, slab, addr),
            None if addr != extent.base => {
                Err(unknown(addr, &format!("it lies inside the allocation at {:?}, not at its start", extent.base)))
            }
            None => self.free_large(&extent, capturing),
        }
    }

    fn free_large(&self, extent: &Arc<Extent>, capturing: bool) -> Result<()> {
        let claim = match extent.free() {
            Freed::Already => return Err(unknown(extent.base, "it was freed before")),
            Freed::Deferred => return Ok(()),
            Freed::Claimed(claim) => claim,
        };
        if claim.may_be_in_use() {
            if capturing {
                self.bury(claim);
                return Ok(());
            }
            self.callers.note();
            match self.synchronize(extent.device) {
                Ok(()) => {}
                Err(error) if error.status == Status::Capturing => {
                    self.bury(claim);
                    return Ok(());
                }
                Err(error) => {
                    self.settle(claim.unfree());
                    return Err(error);
                }
            }
        }
        self.destroy(claim);
        Ok(())
    }

    /// Gives everything of a freed extent back. What the driver refuses is tried again later.
    fn destroy(&self, mut claim: Claim) -> u64 {
        let Claim { extent, chunks, .. } = &mut claim;
        let mut bytes = 0;
        for chunk in chunks.iter_mut() {
            chunk.segments.clear();
            bytes += self.strip(extent.device, extent.base, chunk).unwrap_or(0);
            // What the driver refuses stays noted in the chunk.
            let _ = self.unveil(extent.device, extent.base, chunk);
        }
        if chunks.iter().any(|chunk| chunk.mapped || chunk.physical.is_some() || chunk.veiled > 0) {
            self.bury(claim);
            return bytes;
        }
        self.registry.remove(extent);
        if let Some(depot) = &extent.cached {
            self.forget_piece(extent, depot);
            return bytes;
        }
        if extent.mapping.is_some() {
            self.unreserve_left();
            return bytes;
        }
        if self.driver.unreserve(extent.base, extent.size).is_err() {
            self.registry.insert(extent);
            self.bury(claim);
        }
        bytes
    }

    fn bury(&self, claim: Claim) {
        let extent = Arc::clone(&claim.extent);
        // At every moment a freed extent is claimed or in the graveyard, so that whoever waits for its addresses finds it.
        let mut graveyard = lock(&self.graveyard);
        claim.bury();
        graveyard.push(extent);
    }

    /// Claims those that wait in the graveyard, all at once.
    fn dig_out(&self, wanted: impl Fn(&Arc<Extent>) -> bool) -> Vec<Claim> {
        let mut graveyard = lock(&self.graveyard);
        let found = graveyard.extract_if(.., |extent| wanted(extent));
        found.filter_map(|extent| extent.claim_freed()).collect()
    }

    /// Finishes what waits in the graveyard. Not to be called during a capture. Returns physical bytes given back.
    pub(crate) fn exhume(&self) -> u64 {
        let orphans = std::mem::take(&mut *lock(&self.orphans));
        for orphan in orphans {
            self.release_or_keep(orphan);
        }
        self.destroy_dummies();
        let mut idle = BTreeSet::new();
        // Whoever maps at these addresses waits for this, and must not wait for a device.
        let vouched_for = self.dig_out(|extent| extent.mapping.is_some());
        let mut bytes = vouched_for.into_iter().map(|claim| self.destroy(claim)).sum();
        for claim in self.dig_out(|extent| extent.mapping.is_none()) {
            let device = claim.extent.device;
            if !claim.may_be_in_use() || idle.contains(&device) {
                bytes += self.destroy(claim);
            } else if self.synchronize(device).is_ok() {
                idle.insert(device);
                bytes += self.destroy(claim);
            } else {
                self.bury(claim);
            }
        }
        self.unreserve_left();
        bytes
    }

    /// Bytes of host memory that the tables and lists of the heap take, about.
    pub(crate) fn bookkeeping(&self) -> u64 {
        self.registry.table_bytes()
            + self.bins.list_bytes()
            + self.cached_pages.table_bytes() as u64
            + self.caches().map(|depot| depot.bookkeeping()).sum::<u64>()
    }

    /// Where the live allocations of a device start. What the program mapped itself is no allocation of ours.
    pub(crate) fn allocations_on(&self, device: Device) -> Vec<Addr> {
        let there = self.registry.extents(|extent| extent.device == device && extent.mapping.is_none());
        there.iter().flat_map(|extent| extent.starts()).collect()
    }

    /// Gives back what is only cached on a device that is being reset. Nothing is done during a capture: a later call finds it.
    pub(crate) fn retire(&self, device: Device) {
        if self.is_capturing() {
            return;
        }
        self.exhume();
        self.retire_cache(device);
        self.shed_on(device);
    }

    /// Gives back what is only cached: the graveyard, what caches hold free, and empty slabs. Returns physical bytes given back. Not to be called during a
    /// capture; if one has begun nevertheless, nothing is done.
    pub(crate) fn reclaim(&self) -> u64 {
        if self.is_capturing() {
            return 0;
        }
        self.await_readers_of_freed();
        let bytes = self.exhume() + self.trim_caches();
        for device in self.bins.quarantined_devices() {
            // A device that cannot be synchronised keeps its quarantine; its slabs are not empty then.
            let _ = self.synchronize(device);
        }
        bytes + self.shed(0)
    }
}

/// What is being done, for messages.
pub(crate) fn doing(what: &str, region: &Region) -> String {
    format!("{what} region '{}'", region.tag)
}

fn unknown(addr: Addr, why: &str) -> Error {
    Error::new(Status::UnknownAddress, format!("{addr:?} is not the start of a live allocation: {why}"))
}

/// Whether an error of a driver call may go away when memory is given back.
pub(crate) fn is_shortage(error: &Error) -> bool {
    error.status == Status::OutOfDeviceMemory
}
