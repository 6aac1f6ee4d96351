//! What a [cache](crate::cache) decides, done: memory mapped into its addresses and given back, points in the program's streams marked and asked about.
//! A piece of a cache is an extent like any other, so pause, resume, tiers and switch know nothing of caches, except that what the program does not use
//! needs no backup.
//!
//! The fast path is [`Heap::take_cached`] and [`Heap::free_cached`]: one lock, and no driver call while no freed block waits for another stream.
//! Everything else happens when that finds nothing.

use super::{Heap, doing};
use crate::cache::{Depot, Door, Freed, Growth, Key, Quick, Step, Waiting};
use crate::driver::{Addr, Device, Event, ProgramStream};
use crate::error::{Error, Result, Status};
use crate::extent::{Claim, Extent, Freed as FreedExtent};
use crate::ranges::Ranges;
use crate::region::Region;
use crate::registry::{PAGE, PAGE_BITS};
use crate::sync::lock;
use crate::terms::{Request, Reuse};
use std::ops::Range;
use std::sync::Arc;

/// Devices that caches are kept for.
pub(super) const DEVICES: usize = 64;
/// When so many bytes wait for the device, it is waited for.
const LONGEST_QUARANTINE: u64 = 64 << 20;
/// Addresses for small blocks are reserved in steps of at least this.
const SMALL_RESERVATION: u64 = 1 << 30;

impl Heap {
    /// The cache of `device`, if it was ever used.
    fn known_depot(&self, device: u32) -> Option<&Arc<Depot>> {
        self.depots.get(device as usize)?.get()
    }

    /// The cache of `device`.
    pub(crate) fn depot(&self, device: Device) -> Result<&Arc<Depot>> {
        if let Some(depot) = self.known_depot(device.0) {
            return Ok(depot);
        }
        let granule = self.granularity(device)?.max(PAGE);
        let slot = self.depots.get(device.0 as usize);
        let slot = slot.ok_or_else(|| Error::new(Status::InvalidArgument, format!("{device} does not exist")))?;
        Ok(slot.get_or_init(|| Arc::new(Depot::new(device, granule))))
    }

    /// Every cache that was ever used.
    pub(crate) fn caches(&self) -> impl Iterator<Item = &Arc<Depot>> {
        self.depots.iter().filter_map(|slot| slot.get())
    }

    /// The cache whose memory `addr` is. Wait-free.
    #[inline]
    pub(crate) fn cache_of(&self, addr: Addr) -> Option<&Arc<Depot>> {
        let device = self.cached_pages.get(addr.0 >> PAGE_BITS)? - 1;
        self.known_depot(device)
    }

    /// Memory out of what a cache holds free: one lock, and no driver call unless freed blocks wait for other streams. `None` if there is none, or the region is not resident: the
    /// long way knows more.
    #[inline]
    pub(crate) fn take_cached(&self, request: &Request, pool: u32) -> Option<Addr> {
        let depot = self.known_depot(request.device.0)?;
        if depot.has_waiting() && !request.capturing {
            self.look_at_streams(depot);
        }
        let key = Key::of(request.region, request.stream, pool, request.size);
        match depot.take(key, request.size) {
            Quick::Taken(addr, tells) => {
                if tells {
                    self.tell(addr, request.size);
                }
                Some(addr)
            }
            Quick::Closed | Quick::Nothing => None,
        }
    }

    /// Addresses of a region that is told hold something new.
    fn tell(&self, addr: Addr, size: u64) {
        self.each_part(addr, size, |extent, part| extent.note_changed(&Ranges::of(part)));
    }

    /// The extents of a block, and which of their offsets are its.
    fn each_part(&self, addr: Addr, size: u64, with: impl Fn(&Extent, Range<u64>)) {
        for extent in self.registry.within(addr.0..addr.0 + size) {
            let Range { start, end } = extent.addresses();
            with(&extent, addr.0.max(start) - start..(addr.0 + size).min(end) - start);
        }
    }

    /// Memory from a cache that has to grow for it, or make room. To be called when [`Heap::take_cached`] found none; the region is resident, and stays so.
    pub(crate) fn allocate_cached(&self, request: &Request, pool: u32, region: &Arc<Region>) -> Result<Addr> {
        if !request.capturing {
            self.exhume();
        }
        let depot = Arc::clone(self.depot(request.device)?);
        let key = Key::of(request.region, request.stream, pool, request.size);
        let arena = depot.arena(key, || Door { open: region.door(), tells: region.may_be_clean() });
        // A program that frees more than it can reuse waits for the device before it takes more.
        if !request.capturing
            && depot.has_quarantine()
            && self.collect(&depot).is_ok()
            && let Some(addr) = self.take_cached(request, pool)
        {
            return Ok(addr);
        }
        let mut pressure = 0;
        loop {
            let (missing, error) = match depot.grow(arena, request.size, pressure > 0) {
                Step::Reserve(bytes) => {
                    self.reserve_for(&depot, arena, bytes, key.large)?;
                    continue;
                }
                Step::OverLimit(missing) => (missing, self.over_limit(request, region)),
                Step::Map(growth) => {
                    let missing = growth.map.end - growth.map.start;
                    match self.map_growth(&depot, growth, region) {
                        Err(error) if error.status == Status::OutOfDeviceMemory => (missing, error),
                        outcome => return outcome,
                    }
                }
            };
            pressure += 1;
            if request.capturing || pressure > 2 {
                return Err(error);
            }
            self.make_room(&depot, if pressure == 1 { missing } else { u64::MAX });
            if let Some(addr) = self.take_cached(request, pool) {
                return Ok(addr);
            }
        }
    }

    /// Gives back `enough` bytes of what is free, and at last everything that is only cached.
    fn make_room(&self, depot: &Arc<Depot>, enough: u64) {
        depot.counts(|counts| counts.retries += 1);
        // What still runs, or a device that is lost, shows in what can be given back.
        let _ = self.collect(depot);
        self.trim_cache(depot, enough);
        if enough == u64::MAX {
            self.reclaim();
        }
    }

    fn over_limit(&self, request: &Request, region: &Region) -> Error {
        let what = doing("allocate in", region);
        let message = format!(
            "cannot {what}: {} bytes more on {} would exceed the share of memory that was set for this process; free something, or set a larger one",
            request.size, request.device
        );
        Error::new(Status::OutOfDeviceMemory, message)
    }

    fn reserve_for(&self, depot: &Depot, arena: u32, bytes: u64, large: bool) -> Result<()> {
        let total = self.driver.memory_info(depot.device)?.total;
        // Holes can be fragmented as memory cannot: a little more than there is memory.
        let wish = if large { total.saturating_add(total / 8) } else { (total / 16).max(SMALL_RESERVATION).min(total) };
        let wish = wish.max(bytes).next_multiple_of(depot.granule);
        let reserve = |size: u64| self.driver.reserve(size, PAGE.max(depot.granule)).map(|base| (base, size));
        let (base, size) = reserve(wish).or_else(|_| reserve(bytes))?;
        depot.add_reservation(arena, base, size);
        Ok(())
    }

    /// Maps memory for a growth, as pieces of at most a chunk.
    fn map_growth(&self, depot: &Arc<Depot>, growth: Growth, region: &Arc<Region>) -> Result<Addr> {
        let map = growth.map.clone();
        let chunk = self.settings.chunk.next_multiple_of(depot.granule);
        let pieces: Vec<Range<u64>> =
            (map.start..map.end).step_by(chunk as usize).map(|start| start..(start + chunk).min(map.end)).collect();
        let mut claims = Vec::new();
        let made = pieces.iter().try_for_each(|piece| self.map_piece(depot, piece, region, &mut claims));
        let opened = made.and_then(|()| self.open(&claims[0].extent, Addr(map.start), map.end - map.start));
        match opened {
            Ok(()) => {
                let number = depot.device.0 + 1;
                (map.start >> PAGE_BITS..map.end.div_ceil(PAGE)).for_each(|page| self.cached_pages.set(page, number));
                claims.into_iter().for_each(|claim| self.put_back(claim));
                Ok(depot.grown(growth, &pieces))
            }
            Err(error) => {
                self.undo_growth(depot, growth, claims);
                Err(error)
            }
        }
    }

    /// One piece: its extent, findable, with memory that nobody can touch yet.
    fn map_piece(
        &self,
        depot: &Arc<Depot>,
        piece: &Range<u64>,
        region: &Region,
        claims: &mut Vec<Claim>,
    ) -> Result<()> {
        let (extent, claim) = Extent::of_piece(piece.clone(), region.id, depot);
        claims.push(claim);
        let Some(claim) = claims.last_mut() else { return Ok(()) };
        if !self.registry.insert(&extent) {
            let message = format!("the driver reserved {:#x}, beyond 57 bits of address", piece.start);
            return Err(Error::new(Status::Driver, message));
        }
        self.back(claim, region)
    }

    fn undo_growth(&self, depot: &Depot, growth: Growth, claims: Vec<Claim>) {
        let extents: Vec<Arc<Extent>> = claims.iter().map(|claim| Arc::clone(&claim.extent)).collect();
        for claim in claims {
            // Nobody but us knows it: the claim is ours, and a free leaves it to us.
            claim.extent.free();
            self.destroy(claim);
        }
        let is_there = |extent: &&Arc<Extent>| self.registry.find(extent.base).is_some();
        let stuck: Vec<Range<u64>> = extents.iter().filter(is_there).map(|extent| extent.addresses()).collect();
        depot.give_up(growth, &stuck);
        for piece in stuck.iter().filter(|piece| self.registry.find(Addr(piece.start)).is_none()) {
            depot.gone(Addr(piece.start));
        }
    }

    /// A piece of a cache is unmapped: its addresses can be used again.
    pub(super) fn forget_piece(&self, extent: &Extent, depot: &Depot) {
        let Range { start, end } = extent.addresses();
        (start >> PAGE_BITS..end.div_ceil(PAGE)).for_each(|page| self.cached_pages.clear(page));
        depot.gone(extent.base);
    }

    /// Takes a cached block back; `None` if `addr` is no cache's.
    #[inline]
    pub(crate) fn free_cached(&self, addr: Addr, reuse: Reuse, capturing: bool) -> Option<Result<()>> {
        Some(self.free_in(self.cache_of(addr)?, addr, reuse, capturing))
    }

    /// The same; `depot` is the cache whose memory `addr` is.
    #[inline]
    pub(crate) fn free_in(&self, depot: &Arc<Depot>, addr: Addr, reuse: Reuse, capturing: bool) -> Result<()> {
        if depot.has_remarks() {
            self.forget_remarks(depot, addr);
        }
        let freed = match reuse {
            Reuse::InStreamOrder => depot.free(addr).map(|freed| self.after(depot, addr, freed, capturing)),
            Reuse::AfterDevice => depot.free_later(addr).map(|bytes| {
                if bytes > LONGEST_QUARANTINE && !capturing {
                    // What cannot be waited for now is waited for later.
                    let _ = self.collect(depot);
                }
            }),
        };
        let unknown = || super::unknown(addr, "it was freed before, or lies inside an allocation");
        freed.ok_or_else(unknown)
    }

    fn forget_remarks(&self, depot: &Depot, addr: Addr) {
        if let Some(size) = depot.requested(addr) {
            self.each_part(addr, size, |extent, part| extent.clear_override(&part));
        }
    }

    /// Sees to it that a freed block waits for the streams that have used it.
    fn after(&self, depot: &Arc<Depot>, addr: Addr, freed: Freed, capturing: bool) {
        let Freed::After(streams) = freed else { return };
        if capturing {
            depot.defer(addr.0, streams);
        } else {
            self.mark(depot, addr.0, &streams);
        }
    }

    /// Marks where `streams` are now. Where that cannot be done, the block waits for the whole device.
    fn mark(&self, depot: &Depot, start: u64, streams: &[ProgramStream]) {
        let mut points = Vec::new();
        for &stream in streams {
            match self.mark_one(depot, stream) {
                Ok(event) => points.push((event, stream)),
                Err(_) => {
                    points.into_iter().for_each(|(event, _)| depot.put_event(event));
                    return depot.quarantine(start);
                }
            }
        }
        depot.wait_for(start, points);
    }

    fn mark_one(&self, depot: &Depot, stream: ProgramStream) -> Result<Event> {
        let event = match depot.spare_event() {
            Some(event) => event,
            None => self.driver.open_event(depot.device)?,
        };
        self.driver.record_on(event, stream).inspect_err(|_| depot.put_event(event))?;
        Ok(event)
    }

    /// Gives out again what streams have passed. Not to be called during a capture.
    #[cold]
    fn look_at_streams(&self, depot: &Depot) {
        if self.is_capturing() {
            return;
        }
        let (waiting, deferred) = depot.take_asked();
        if waiting.is_empty() && deferred.is_empty() {
            return;
        }
        let (mut passed, mut left): (Vec<Waiting>, Vec<Waiting>) = (Vec::new(), Vec::new());
        for point in waiting {
            // Points of one stream pass in order.
            let is_behind = left.iter().any(|other| other.stream == point.stream);
            // Who cannot say, as a lost device, has not passed.
            let is_done = !is_behind && self.driver.query(point.event).unwrap_or(false);
            if is_done { passed.push(point) } else { left.push(point) }
        }
        depot.put_waiting(&passed, left);
        for (start, streams) in deferred {
            self.mark(depot, start, &streams);
        }
    }

    /// Waits for the device: then nothing waits any more.
    fn collect(&self, depot: &Depot) -> Result<()> {
        if !depot.has_waiting() {
            return Ok(());
        }
        let backlog = depot.take_backlog();
        let waited = self.synchronize(depot.device);
        depot.put_backlog(backlog, waited.is_ok());
        waited
    }

    /// Gives the driver `enough` bytes of what is free in a cache, if there are so many. Returns how many. Not to be called during a capture.
    pub(crate) fn trim_cache(&self, depot: &Depot, enough: u64) -> u64 {
        if self.is_capturing() {
            return 0;
        }
        let pieces = depot.take_releasable(enough);
        if !pieces.is_empty() && self.synchronize(depot.device).is_err() {
            depot.keep(&pieces);
            return 0;
        }
        let mut bytes = 0;
        for piece in pieces {
            match self.registry.find(Addr(piece.start)).map(|extent| extent.free()) {
                Some(FreedExtent::Claimed(claim)) => bytes += self.destroy(claim),
                // Whoever has it gives it back.
                Some(FreedExtent::Deferred | FreedExtent::Already) => {}
                None => depot.gone(Addr(piece.start)),
            }
        }
        for (start, size) in depot.take_empty() {
            if self.driver.unreserve(Addr(start), size).is_err() {
                lock(&self.left).push((Addr(start), size));
            }
        }
        bytes
    }

    /// Gives the driver what the cache of a device that is being reset holds free, and its events.
    pub(super) fn retire_cache(&self, device: Device) {
        let Some(depot) = self.known_depot(device.0) else { return };
        let _ = self.collect(depot);
        for event in depot.retire() {
            // One that cannot be closed goes with its context.
            let _ = self.driver.close_event(event);
        }
        self.trim_cache(depot, u64::MAX);
    }

    /// The same for every cache, with everything that is free, after waiting for what still uses it.
    pub(crate) fn trim_caches(&self) -> u64 {
        let mut bytes = 0;
        for depot in self.caches() {
            let _ = self.collect(depot);
            bytes += self.trim_cache(depot, u64::MAX);
        }
        bytes
    }
}
