//! An extent: one reservation, cut into chunks, and the truth about each chunk: which physical memory it has,
//! whether that is mapped, and whether its bytes are on the device or in a backup. A large allocation is an
//! extent; small ones are slots of an extent that is a slab; a [`Mapping`] of the program's own is an extent of one chunk.
//!
//! Chunks are changed only by whoever has *claimed* the extent. A [`Claim`] owns the chunks while it
//! lives, so no lock is held while the driver works; what arrives meanwhile (a free, a new peer) is
//! noted and handed to the claimant when it puts the chunks back.

mod chunk;
mod claim;
mod reading;
mod slab;

use crate::cache::Depot;
use crate::clock;
use crate::driver::{Access, Addr, Device, Physical, Properties};
use crate::mapping::Mapping;
use crate::ranges::Ranges;
use crate::sync::{AtomicU64, Mutex, Ordering, lock};
use crate::terms::RegionId;
use crate::tier::Segment;
use crate::tier::file::Attached;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

pub(crate) use chunk::{Chunk, Held, Truth, addresses, contiguous, held};
pub(crate) use claim::{Claim, Unfinished};
pub(crate) use slab::Slab;

/// Overrides of the region's policy, as offsets.
#[derive(Debug, Default)]
struct Overrides {
    keep: Ranges,
    discard: Ranges,
    /// Allocations that no pause takes; with one of them, the whole extent stays.
    resident: Ranges,
}

#[derive(Debug)]
struct Inner {
    chunks: Vec<Chunk>,
    claimed: bool,
    freed: bool,
    /// Whoever reads the memory while it is the program's, see [`reading`].
    readers: usize,
    /// The program is about to unmap it and keeps the memory: nobody begins to read.
    wanted: bool,
    /// Access rights changed while the extent was claimed.
    access_stale: bool,
    overrides: Overrides,
    /// Offsets that the program says it has written to.
    changed: Ranges,
    /// The same, from before the device was synchronised for whoever reads: it finds what was written.
    settling: Ranges,
    /// Why a pause cannot follow what the program does with the memory, and leaves it.
    held: Option<&'static str>,
    /// Whether that is for good.
    handed_out: bool,
    /// Calls in progress that may hand the memory out; until they end it is held.
    lending: u32,
    /// Whether the last pause of its region left it, so that nothing of it was saved.
    passed_by: bool,
    /// Offsets that files are said to hold; no two overlap.
    attached: Vec<Attached>,
}

/// See the [module documentation](self).
#[derive(Debug)]
pub(crate) struct Extent {
    pub(crate) base: Addr,
    /// Bytes of the reservation.
    pub(crate) size: u64,
    /// Bytes that the program asked for (of a slab: `size`).
    pub(crate) requested: u64,
    /// Bytes of each chunk; the last one may be shorter.
    chunk: u64,
    pub(crate) device: Device,
    pub(crate) region: RegionId,
    pub(crate) slab: Option<Slab>,
    /// Set where the program made the mapping itself: then the addresses are its own too.
    pub(crate) mapping: Option<Mapping>,
    /// Set where it is a piece of a cache, in addresses of the cache's.
    pub(crate) cached: Option<Arc<Depot>>,
    inner: Mutex<Inner>,
    resident: AtomicU64,
    backed_up: AtomicU64,
    stored: AtomicU64,
}

/// How a free found the extent.
#[derive(Debug)]
pub(crate) enum Freed {
    /// The caller is to give its memory back.
    Claimed(Claim),
    /// Whoever has claimed it, or reads it, will do so.
    Deferred,
    /// It was freed before.
    Already,
}

/// What came of [`Extent::hold`].
#[derive(Clone, Copy, Debug)]
pub(crate) enum Holding {
    /// It is held, with this memory at its start.
    There(Physical),
    /// Its bytes are in a backup.
    Away,
    /// Somebody has claimed it, or it was freed.
    Claimed,
}

impl Extent {
    /// A new extent without physical memory, claimed by the caller.
    pub(crate) fn new(
        base: Addr,
        sizes: (u64, u64, u64),
        device: Device,
        region: RegionId,
        slab: Option<Slab>,
    ) -> (Arc<Extent>, Claim) {
        let (size, requested, chunk) = sizes;
        let chunks = (0..size).step_by(chunk as usize).map(|at| Chunk::new(at, chunk.min(size - at))).collect();
        let extent = Extent { base, size, requested, chunk, device, region, slab, ..Extent::claimed_by_maker() };
        let extent = Arc::new(extent);
        let claim = Claim { extent: Arc::clone(&extent), chunks, dead: Ranges::new(), held: true };
        (extent, claim)
    }

    /// A mapping that the program is making of `physical`, claimed by the caller; not mapped yet.
    pub(crate) fn of_mapping(
        (base, size): (Addr, u64),
        device: Device,
        region: RegionId,
        (physical, properties): (Physical, Properties),
        mapping: Mapping,
    ) -> (Arc<Extent>, Claim) {
        let mapping = Some(mapping);
        let sizes = Extent { base, size, requested: size, chunk: size, ..Extent::claimed_by_maker() };
        let extent = Extent { device, region, mapping, ..sizes };
        let extent = Arc::new(extent);
        let (physical, properties) = (Some(physical), Some(properties));
        let chunks = vec![Chunk { physical, properties, ..Chunk::new(0, size) }];
        let claim = Claim { extent: Arc::clone(&extent), chunks, dead: Ranges::new(), held: true };
        (extent, claim)
    }

    /// A piece of a cache, claimed by the caller; nothing is mapped yet.
    pub(crate) fn of_piece(addresses: Range<u64>, region: RegionId, depot: &Arc<Depot>) -> (Arc<Extent>, Claim) {
        let (base, size) = (Addr(addresses.start), addresses.end - addresses.start);
        let (device, cached) = (depot.device, Some(Arc::clone(depot)));
        let sizes = Extent { base, size, requested: size, chunk: size, ..Extent::claimed_by_maker() };
        let extent = Extent { device, region, cached, ..sizes };
        let extent = Arc::new(extent);
        let chunks = vec![Chunk::new(0, size)];
        let claim = Claim { extent: Arc::clone(&extent), chunks, dead: Ranges::new(), held: true };
        (extent, claim)
    }

    /// Nothing yet, claimed.
    fn claimed_by_maker() -> Extent {
        let inner = Inner {
            chunks: Vec::new(),
            claimed: true,
            freed: false,
            readers: 0,
            wanted: false,
            access_stale: false,
            overrides: Overrides::default(),
            changed: Ranges::new(),
            settling: Ranges::new(),
            held: None,
            handed_out: false,
            lending: 0,
            passed_by: false,
            attached: Vec::new(),
        };
        Extent {
            base: Addr(0),
            size: 0,
            requested: 0,
            chunk: 0,
            device: Device(0),
            region: RegionId(0),
            slab: None,
            mapping: None,
            cached: None,
            inner: Mutex::new(inner),
            resident: AtomicU64::new(0),
            backed_up: AtomicU64::new(0),
            stored: AtomicU64::new(0),
        }
    }

    /// Its addresses.
    pub(crate) fn addresses(&self) -> Range<u64> {
        self.base.0..self.base.0 + self.size
    }

    /// Those of its chunk that holds `addr`, which is one of its own.
    pub(crate) fn chunk_around(&self, addr: Addr) -> Range<u64> {
        let start = self.base.0 + (addr.0 - self.base.0) / self.chunk * self.chunk;
        start..self.addresses().end.min(start + self.chunk)
    }

    /// Whether its owner may touch it. Where the program maps memory itself, that takes a call of its own; before, there is no content, unless others may
    /// touch it: then it is [held](Extent::held).
    pub(crate) fn is_open(&self) -> bool {
        self.mapping.as_ref().is_none_or(|mapping| mapping.is_open_to(self.device))
    }

    /// Whether one call may give both access: who may touch them is the same.
    pub(crate) fn opens_like(&self, other: &Extent) -> bool {
        match (&self.mapping, &other.mapping) {
            (Some(mine), Some(theirs)) => self.device == other.device && mine.access() == theirs.access(),
            _ => false,
        }
    }

    /// Who may touch it, as the program said; `None` where that is the engine's to say.
    pub(crate) fn access(&self) -> Option<Vec<Access>> {
        self.mapping.as_ref().map(Mapping::access)
    }

    /// Whether no pause takes it, because the program said so.
    pub(crate) fn always_stays(&self) -> bool {
        self.stays_resident(&(0..self.size))
    }

    /// A pause leaves it, or takes it.
    pub(crate) fn pass_by(&self, left: bool) {
        lock(&self.inner).passed_by = left;
    }

    /// Whether the last pause left it, whatever is the reason, and whether there still is one.
    pub(crate) fn was_passed_by(&self) -> bool {
        lock(&self.inner).passed_by
    }

    /// Whether it may be given back while its region is paused lazily.
    pub(crate) fn may_be_given_back(&self) -> bool {
        self.stays_because().is_none() && !self.was_passed_by()
    }

    /// Whether the last pause left it, and another one would take it.
    pub(crate) fn may_go_after_all(&self) -> bool {
        self.was_passed_by() && self.stays_because().is_none() && !self.is_freed() && self.resident() > 0
    }

    /// Why no pause takes it; `None` if pauses do.
    pub(crate) fn stays_because(&self) -> Option<&'static str> {
        self.held().or_else(|| self.always_stays().then_some("the program keeps it resident"))
    }

    /// Why a pause cannot follow what the program does with the memory.
    pub(crate) fn held(&self) -> Option<&'static str> {
        self.handed_out().or_else(|| self.is_others_alone().then_some("only other devices may touch it"))
    }

    /// The same, where the program has handed it out, or is just doing so.
    pub(crate) fn handed_out(&self) -> Option<&'static str> {
        lock(&self.inner).held
    }

    /// Whether there is memory that somebody may touch, and its own device, which would copy it, may not.
    fn is_others_alone(&self) -> bool {
        let closed = |mapping: &Mapping| mapping.is_open_at_all() && !mapping.is_open_to(self.device);
        self.resident() > 0 && self.mapping.as_ref().is_some_and(closed)
    }

    /// Until [`Extent::settle`] a pause leaves it, if its bytes are on the device. Whoever only reads it does not mind.
    pub(crate) fn hold(&self, why: &'static str) -> Holding {
        let mut inner = lock(&self.inner);
        if inner.claimed || inner.freed {
            return Holding::Claimed;
        }
        let is_there = inner.chunks.iter().all(|chunk| chunk.mapped && chunk.truth == Truth::Device);
        let first = inner.chunks.first().and_then(|chunk| chunk.physical).filter(|_| is_there);
        if first.is_some() {
            inner.lending += 1;
            inner.held.get_or_insert(why);
        }
        first.map_or(Holding::Away, Holding::There)
    }

    /// Ends one [`Extent::hold`]: with `keeps` every later pause leaves it, too.
    pub(crate) fn settle(&self, why: &'static str, keeps: bool) {
        let mut inner = lock(&self.inner);
        inner.lending -= 1;
        if keeps && !inner.handed_out {
            inner.handed_out = true;
            inner.held = Some(why);
        }
        if inner.lending == 0 && !inner.handed_out {
            inner.held = None;
        }
    }

    /// Claims a live extent; `None` if it is claimed, freed or being read.
    pub(crate) fn claim(self: &Arc<Self>) -> Option<Claim> {
        let mut inner = lock(&self.inner);
        (!inner.freed).then(|| self.claimed(&mut inner)).flatten()
    }

    /// Claims a freed extent; `None` if it is claimed or being read.
    pub(crate) fn claim_freed(self: &Arc<Self>) -> Option<Claim> {
        let mut inner = lock(&self.inner);
        inner.freed.then(|| self.claimed(&mut inner)).flatten()
    }

    fn claimed(self: &Arc<Self>, inner: &mut Inner) -> Option<Claim> {
        if inner.readers > 0 { None } else { self.claimed_beside_readers(inner) }
    }

    fn claimed_beside_readers(self: &Arc<Self>, inner: &mut Inner) -> Option<Claim> {
        if std::mem::replace(&mut inner.claimed, true) {
            return None;
        }
        Some(Claim {
            extent: Arc::clone(self),
            chunks: std::mem::take(&mut inner.chunks),
            dead: Ranges::new(),
            held: true,
        })
    }

    /// Marks the extent freed.
    pub(crate) fn free(self: &Arc<Self>) -> Freed {
        self.freed(&mut lock(&self.inner))
    }

    fn freed(self: &Arc<Self>, inner: &mut Inner) -> Freed {
        if std::mem::replace(&mut inner.freed, true) {
            return Freed::Already;
        }
        self.claimed(inner).map_or(Freed::Deferred, Freed::Claimed)
    }

    /// As [`Extent::free`], for who keeps the memory: waits for whoever reads it, and where `waits` says so for whoever has claimed it.
    pub(crate) fn free_alone(self: &Arc<Self>, waits: impl Fn() -> bool) -> Freed {
        loop {
            let waits = waits();
            let mut inner = lock(&self.inner);
            let is_busy = inner.readers > 0 || (inner.claimed && waits);
            if inner.freed || !is_busy {
                return self.freed(&mut inner);
            }
            inner.wanted = true;
            drop(inner);
            clock::sleep(Duration::from_micros(50));
        }
    }

    /// Whether whoever reads it is to stop.
    pub(crate) fn is_wanted(&self) -> bool {
        let inner = lock(&self.inner);
        inner.freed || inner.wanted
    }

    /// Whether somebody has claimed it, or reads it.
    pub(crate) fn is_in_use(&self) -> bool {
        let inner = lock(&self.inner);
        inner.claimed || inner.readers > 0
    }

    /// Whether it was freed.
    pub(crate) fn is_freed(&self) -> bool {
        lock(&self.inner).freed
    }

    /// Asks the claimant, if there is one, to set access rights anew; else returns a claim to do so.
    pub(crate) fn refresh_access(self: &Arc<Self>) -> Option<Claim> {
        let mut inner = lock(&self.inner);
        if inner.claimed {
            inner.access_stale = true;
            return None;
        }
        (!inner.freed).then(|| self.claimed_beside_readers(&mut inner)).flatten()
    }

    /// The allocation that holds `addr`: its base and size. One of a cache may begin before the extent, and end after it.
    pub(crate) fn allocation(&self, addr: Addr) -> Option<(Addr, u64)> {
        if let Some(depot) = &self.cached {
            return depot.block(addr);
        }
        let offset = addr.0.checked_sub(self.base.0)?;
        match &self.slab {
            Some(slab) => slab.slot(offset).map(|(start, size)| (self.base.offset(start), size)),
            None => (offset < self.requested && !self.is_freed()).then_some((self.base, self.requested)),
        }
    }

    /// Where live allocations start in it.
    pub(crate) fn starts(&self) -> Vec<Addr> {
        match (&self.slab, &self.cached) {
            (Some(slab), _) => slab.starts().into_iter().map(|at| self.base.offset(at)).collect(),
            (None, Some(depot)) => depot.starts(&self.addresses()),
            (None, None) if self.is_freed() => Vec::new(),
            (None, None) => vec![self.base],
        }
    }

    /// Overrides the policy for offsets.
    pub(crate) fn set_override(&self, range: &Range<u64>, keep: bool) {
        let mut inner = lock(&self.inner);
        let Overrides { keep: kept, discard, .. } = &mut inner.overrides;
        let (to, from) = if keep { (kept, discard) } else { (discard, kept) };
        to.add(range.clone());
        from.remove(range);
    }

    /// No pause takes the extent while the allocation in `range` lives.
    pub(crate) fn keep_resident(&self, range: Range<u64>) {
        lock(&self.inner).overrides.resident.add(range);
    }

    /// Whether `range` holds something that no pause takes.
    pub(crate) fn stays_resident(&self, range: &Range<u64>) -> bool {
        lock(&self.inner).overrides.resident.clip(range).total() > 0
    }

    /// Forgets overrides and files in `range`.
    pub(crate) fn clear_override(&self, range: &Range<u64>) {
        let mut inner = lock(&self.inner);
        inner.overrides.resident.remove(range);
        inner.overrides.keep.remove(range);
        inner.overrides.discard.remove(range);
        inner.attached = without(&inner.attached, range);
    }

    /// Says that a file holds some offsets, in place of what was said of them before.
    pub(crate) fn attach(&self, file: Attached) {
        let mut inner = lock(&self.inner);
        inner.attached = without(&inner.attached, &file.range);
        let at = inner.attached.partition_point(|other| other.range.start < file.range.start);
        inner.attached.insert(at, file);
    }

    /// No file holds these offsets.
    pub(crate) fn detach(&self, range: &Range<u64>) {
        let mut inner = lock(&self.inner);
        inner.attached = without(&inner.attached, range);
    }

    /// What files are said to hold, by offset; no two hold the same.
    pub(crate) fn attached(&self) -> Vec<Attached> {
        lock(&self.inner).attached.clone()
    }

    /// A backup is known to have these offsets as they were when [`Extent::take_changed`] was asked. What was noted since stays: a block that is given
    /// out while its region is about to be paused is written to only after the resume.
    pub(crate) fn forget_changed(&self, range: &Range<u64>) {
        lock(&self.inner).settling.remove(range);
    }

    /// What was taken is not proven yet.
    pub(crate) fn put_changed(&self, taken: &Ranges) {
        let mut inner = lock(&self.inner);
        taken.iter().for_each(|range| inner.settling.add(range.clone()));
    }

    /// The content of these offsets is not what a backup may have of them.
    pub(crate) fn note_changed(&self, ranges: &Ranges) {
        let mut inner = lock(&self.inner);
        ranges.iter().for_each(|range| inner.changed.add(range.clone()));
    }

    /// Offsets that were given out or noted as changed since this was last asked.
    pub(crate) fn take_changed(&self) -> Ranges {
        let mut inner = lock(&self.inner);
        self.settle_changed(&mut inner);
        std::mem::take(&mut inner.settling)
    }

    /// Everything that has changed until now is settling.
    fn settle_changed(&self, inner: &mut Inner) {
        let changed = std::mem::take(&mut inner.changed);
        let fresh = self.slab.as_ref().map(Slab::take_fresh).unwrap_or_default();
        changed.iter().chain(fresh.iter()).for_each(|range| inner.settling.add(range.clone()));
    }

    /// Offsets that hold allocations.
    pub(crate) fn live_ranges(&self) -> Ranges {
        if !self.is_open() {
            return Ranges::new();
        }
        match (&self.slab, &self.cached) {
            (Some(slab), _) => slab.live_ranges(),
            (_, Some(depot)) => depot.live_ranges(&self.addresses()),
            _ => Ranges::of(0..self.requested),
        }
    }

    /// Offsets to save, where `keeps` is the region's policy. Gaps below `gap` bytes between slots are saved too:
    /// one longer copy is cheaper than two.
    pub(crate) fn ranges_to_save(&self, keeps: bool, gap: u64) -> Ranges {
        let live = self.live_ranges();
        let inner = lock(&self.inner);
        let mut save = if keeps { live.clone() } else { Ranges::new() };
        save.close_gaps(gap);
        for range in inner.overrides.keep.iter() {
            live.clip(range).iter().for_each(|part| save.add(part.clone()));
        }
        inner.overrides.discard.iter().for_each(|range| save.remove(range));
        save
    }

    /// Reads the chunks; `None` while somebody has claimed them.
    pub(crate) fn chunks<R>(&self, read: impl FnOnce(&[Chunk]) -> R) -> Option<R> {
        let inner = lock(&self.inner);
        (!inner.claimed && !inner.freed).then(|| read(&inner.chunks))
    }

    /// Bytes of host memory that the extent's own description takes.
    pub(crate) fn bookkeeping(&self) -> u64 {
        let inner = lock(&self.inner);
        let segments: usize = inner.chunks.iter().map(|chunk| chunk.segments.capacity()).sum();
        let lists = inner.chunks.capacity() * size_of::<Chunk>() + segments * size_of::<Segment>();
        let slots = self.slab.as_ref().map_or(0, Slab::count) * size_of::<u32>();
        (size_of::<Extent>() + lists + slots) as u64
    }

    /// Figures for statistics; of a claimed extent, as they were before.
    pub(crate) fn figures(&self) -> Figures {
        let (allocations, requested) = match (&self.slab, &self.cached) {
            (Some(slab), _) => (slab.live() as u64, slab.requested()),
            (None, Some(depot)) => depot.figures(&self.addresses()),
            (None, None) if self.is_freed() => (0, 0),
            (None, None) => (1, self.requested),
        };
        let [backed_up, stored] = [&self.backed_up, &self.stored].map(|figure| figure.load(Ordering::Relaxed));
        Figures { allocations, requested, resident: self.resident(), backed_up, stored }
    }

    /// Bytes of device memory that it holds; of a claimed extent, as they were before.
    pub(crate) fn resident(&self) -> u64 {
        self.resident.load(Ordering::Relaxed)
    }

    fn note(&self, chunks: &[Chunk]) {
        let resident = chunks.iter().filter(|c| c.physical.is_some()).map(|c| c.size).sum();
        let segments = || chunks.iter().flat_map(|c| &c.segments);
        let backed_up = segments().map(|s| s.len).sum();
        let stored = segments().filter(|s| s.is_stored()).map(|s| s.len).sum();
        self.resident.store(resident, Ordering::Relaxed);
        self.backed_up.store(backed_up, Ordering::Relaxed);
        self.stored.store(stored, Ordering::Relaxed);
    }
}

fn without(attached: &[Attached], range: &Range<u64>) -> Vec<Attached> {
    attached.iter().flat_map(|file| file.without(range)).collect()
}

/// Figures of one extent.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Figures {
    pub(crate) allocations: u64,
    pub(crate) requested: u64,
    pub(crate) resident: u64,
    pub(crate) backed_up: u64,
    /// Of what is backed up, the bytes that are in a tier behind the trait.
    pub(crate) stored: u64,
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests;
