//! The regions of one transition: closed together or not at all, opened together at the end, whatever happens between.

use super::plan;
use crate::clock;
use crate::error::{Error, Result};
use crate::extent::{Claim, Extent, Truth};
use crate::heap::Heap;
use crate::ranges::Ranges;
use crate::region::{Left, Phase, Region};
use crate::terms::{DeadRanges, RegionId, Report};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// What regions are closed for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    Pause,
    Resume,
    /// To give back what a pause has left lazily.
    Release,
}

/// Closed regions, and the phase each had before.
#[derive(Debug)]
pub(super) struct Batch {
    purpose: Purpose,
    closed: BTreeMap<RegionId, (Arc<Region>, Phase)>,
    unchanged: u32,
    /// Bytes that a pause has to copy, by region.
    pending: BTreeMap<RegionId, u64>,
    /// Bytes that it throws away, by region.
    discarded: BTreeMap<RegionId, u64>,
    /// Whether regions without a backup are saved, too.
    keep_all: bool,
    opened: bool,
}

impl Batch {
    /// Closes those regions that are not in the phase `target`; on a refusal none stays closed.
    pub(super) fn close(mut regions: Vec<Arc<Region>>, target: Phase) -> Result<Batch> {
        regions.sort_by_key(|region| region.id);
        // Asked first, so that a call that is refused closes nothing, and allocations elsewhere do not meet a closed region.
        regions.iter().try_for_each(|region| region.check(target))?;
        let mut batch = Batch::of(if target == Phase::Paused { Purpose::Pause } else { Purpose::Resume });
        for region in regions {
            match region.close(target)? {
                Some(before) => drop(batch.closed.insert(region.id, (region, before))),
                None => batch.unchanged += 1,
            }
        }
        batch.closed.values().for_each(|(region, _)| region.drain());
        Ok(batch)
    }

    fn of(purpose: Purpose) -> Batch {
        let (closed, pending, discarded) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        Batch { purpose, closed, unchanged: 0, pending, discarded, keep_all: false, opened: false }
    }

    /// The same batch; `keep_all`: whether what nothing keeps is saved all the same.
    pub(super) fn keeping_all(mut self, keep_all: bool) -> Batch {
        self.keep_all = keep_all;
        self
    }

    /// Whether regions without a backup are saved, too.
    pub(super) fn keeps_all(&self) -> bool {
        self.keep_all
    }

    /// One paused region, to give back what it holds lazily; `None` if it holds nothing so.
    pub(super) fn release(region: &Arc<Region>) -> Option<Batch> {
        region.begin_release().then(|| {
            let mut batch = Batch::of(Purpose::Release);
            batch.closed.insert(region.id, (Arc::clone(region), Phase::Paused));
            batch
        })
    }

    /// Whether there is nothing to do.
    pub(super) fn is_empty(&self) -> bool {
        self.closed.is_empty()
    }

    /// A report with the regions counted.
    pub(super) fn report(&self) -> Report {
        let regions_changed = self.closed.len() as u32;
        Report { regions_changed, regions_unchanged: self.unchanged, ..Report::default() }
    }

    /// The addresses in these regions that hold nothing, as `map` says.
    pub(super) fn dead_ranges(&self, map: &dyn DeadRanges) -> Result<Ranges> {
        let ids: Vec<RegionId> = self.closed.keys().copied().collect();
        let mut found = map.dead_ranges(&ids).inspect_err(|error| self.note_error(error))?;
        found.sort_unstable();
        let mut dead = Ranges::new();
        found.into_iter().for_each(|(start, bytes)| dead.add(start.0..start.0.saturating_add(bytes)));
        Ok(dead)
    }

    /// Claims every live extent of the regions, but for those that are to stay on the device: nobody can add to these now.
    pub(super) fn claim(&self, heap: &Heap) -> Vec<Claim> {
        let extents = heap.registry.extents_of(self.closed.keys().copied());
        extents
            .iter()
            .filter(|extent| !self.leaves(extent))
            .filter_map(|extent| {
                loop {
                    match extent.claim() {
                        Some(claim) => return self.unless_held(heap, claim),
                        // Whoever freed it gives it back.
                        None if extent.is_freed() => return None,
                        // A new peer is being given access: that takes one driver call.
                        None => clock::sleep(Duration::from_micros(50)),
                    }
                }
            })
            .collect()
    }

    /// Whether the extent stays on the device, claimed or not. What a pause has left was not saved: nothing of it may be released before another pause, also
    /// where the reason is gone.
    fn leaves(&self, extent: &Extent) -> bool {
        match self.purpose {
            // Until it is claimed: what somebody is just freeing may stay after all.
            Purpose::Pause => extent.pass_by(true),
            Purpose::Release if extent.was_passed_by() => return true,
            Purpose::Release | Purpose::Resume => {}
        }
        extent.always_stays()
    }

    /// The claim, if a pause can follow what the program does with that memory.
    fn unless_held(&self, heap: &Heap, claim: Claim) -> Option<Claim> {
        // What is handed out is there; what only others may touch may have to come back to them.
        let is_back = self.purpose == Purpose::Resume;
        let held = if is_back { claim.extent.handed_out() } else { claim.extent.held() };
        let Some(why) = held else {
            if self.purpose == Purpose::Pause {
                claim.extent.pass_by(false);
            }
            return Some(claim);
        };
        let Extent { base, size, region, .. } = *claim.extent;
        let tag = self.region(region).map_or("", |region| &region.tag);
        heap.notices.add(format!("{size} bytes at {base:?} in region '{tag}' stay on the device: {why}"));
        heap.put_back(claim);
        None
    }

    /// Bytes of the regions that a pause leaves on the device.
    pub(super) fn held_bytes(&self, heap: &Heap) -> u64 {
        let extents = heap.registry.extents_of(self.closed.keys().copied());
        let held = extents.iter().filter(|extent| !extent.is_freed() && extent.stays_because().is_some());
        held.map(|extent| extent.figures().resident).sum()
    }

    /// Counts allocations and bytes.
    pub(super) fn count(&self, claims: &mut [Claim], report: &mut Report) {
        for claim in claims {
            report.allocations += claim.extent.figures().allocations;
            report.bytes_expected += claim.extent.size;
        }
    }

    /// Counts what is prepared but not saved yet, and what nothing will save. Once memory goes, nobody can tell any more what was on the device.
    pub(super) fn note_pending(&mut self, claims: &[Claim]) {
        for claim in claims {
            *self.pending.entry(claim.extent.region).or_default() += plan::pending(claim);
            *self.discarded.entry(claim.extent.region).or_default() += plan::discarded(claim);
        }
    }

    /// Bytes of all regions that nothing will save.
    pub(super) fn discarded_bytes(&self) -> u64 {
        self.discarded.values().sum()
    }

    /// The region, if it is one of these.
    pub(super) fn region(&self, id: RegionId) -> Option<&Arc<Region>> {
        self.closed.get(&id).map(|(region, _)| region)
    }

    /// The phase that a region had before.
    pub(super) fn was(&self, id: RegionId) -> Option<Phase> {
        self.closed.get(&id).map(|(_, phase)| *phase)
    }

    /// What memory the claims of each region still hold, where all are paused; `lazy`: of those regions, what has its bytes there stays until somebody
    /// needs it. Of all others it is left over.
    pub(super) fn left(&self, claims: &[Claim], lazy: impl Fn(&Region) -> bool) -> BTreeMap<RegionId, Left> {
        let mut left: BTreeMap<RegionId, Left> = BTreeMap::new();
        for claim in claims {
            let id = claim.extent.region;
            let is_lazy = self.region(id).is_some_and(|region| lazy(region));
            let left = left.entry(id).or_default();
            left.lazy |= is_lazy && claim.holds_memory(|truth| truth == Truth::Device);
            left.over |= claim.holds_memory(|truth| !is_lazy || truth == Truth::Backup);
        }
        left
    }

    /// Whether the region's backups outlast a resume.
    pub(super) fn retains(&self, id: RegionId) -> bool {
        self.region(id).is_some_and(|region| region.retains())
    }

    /// Whether the region's backups may stand for content that has not changed.
    pub(super) fn is_clean(&self, id: RegionId) -> bool {
        self.region(id).is_some_and(|region| region.may_be_clean())
    }

    /// Notes the error in every region's history.
    pub(super) fn note_error(&self, error: &Error) {
        for (region, _) in self.closed.values() {
            region.history(|history| history.last_error = Some(error.message.clone()));
        }
    }

    /// Opens every region in the phase that `phase` makes of the one before.
    pub(super) fn open(mut self, phase: impl Fn(Phase) -> Phase, left: &BTreeMap<RegionId, Left>) {
        self.opened = true;
        for (id, (region, before)) in &self.closed {
            region.open(phase(*before), left.get(id).copied().unwrap_or_default());
        }
    }

    /// Counts the pause of what was not paused before.
    pub(super) fn note_pause(&self) {
        let paused = self.closed.values().filter(|(_, before)| *before == Phase::Resident);
        paused.for_each(|(region, _)| region.history(|history| history.pauses += 1));
    }

    /// Adds a successful transition to every region's history.
    pub(super) fn note_success(&self, report: &Report, target: Phase) {
        if target == Phase::Paused {
            // The rest of a pause is none of its own.
            self.note_pause();
        }
        for (id, (region, _)) in &self.closed {
            if target == Phase::Resident {
                region.note_use();
            }
            region.history(|history| {
                history.last_error = None;
                history.touch();
                if target == Phase::Paused {
                    history.bytes_copied += self.pending.get(id).copied().unwrap_or(0);
                    history.bytes_discarded += self.discarded.get(id).copied().unwrap_or(0);
                    history.seconds_paused_last = report.seconds_total;
                } else {
                    history.resumes += 1;
                    history.seconds_resumed_last = report.seconds_total;
                }
            });
        }
    }
}

impl Drop for Batch {
    /// A refusal while closing, or a panic: the regions open as they were.
    fn drop(&mut self) {
        if !self.opened {
            self.closed.values().for_each(|(region, before)| region.reopen(*before));
        }
    }
}
