//! The ledger: which addresses the program reserved and what it has mapped there, whoever holds the memory. It answers one question:
//! whether memory of several regions lies in one reservation. PyTorch's tensors know no borders between mappings of one
//! reservation, so that pausing one region would take pages from under another's tensors.

use crate::terms::RegionId;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// A mapping: where it ends, and the region that a pause would find it in (none: it stays on the device).
type Mapped = (u64, Option<RegionId>);

#[derive(Debug)]
struct Reservation {
    end: u64,
    /// The region in which it was made.
    region: Option<RegionId>,
}

/// Two owners in one reservation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Mix {
    /// A region that is to be paused.
    pub(super) region: RegionId,
    /// What lies beside it and is not to be paused: another region's, or nobody's.
    pub(super) beside: Option<RegionId>,
    /// Where the reservation begins; of one that is not known, the mapping.
    pub(super) at: u64,
}

/// See the [module documentation](self).
#[derive(Debug, Default)]
pub(super) struct Ledger {
    reservations: BTreeMap<u64, Reservation>,
    mapped: BTreeMap<u64, Mapped>,
}

impl Ledger {
    /// A reservation that the program made in `region`.
    pub(super) fn reserve(&mut self, range: &Range<u64>, region: Option<RegionId>) {
        self.reservations.insert(range.start, Reservation { end: range.end, region });
    }

    /// Whether this is a reservation.
    pub(super) fn is_reservation(&self, range: &Range<u64>) -> bool {
        self.reservations.get(&range.start).is_some_and(|known| known.end == range.end)
    }

    /// The program gave a reservation back.
    pub(super) fn unreserve(&mut self, range: &Range<u64>) {
        self.reservations.remove(&range.start);
        self.unmap(range);
    }

    /// Whether an address lies in a reservation that was seen.
    pub(super) fn is_reserved(&self, at: u64) -> bool {
        self.reservation_at(at).is_some()
    }

    /// Whether any reservation was made in a region.
    pub(super) fn has_regions(&self) -> bool {
        self.reservations.values().any(|reservation| reservation.region.is_some())
    }

    /// The region in which the reservation that holds `at` was made.
    pub(super) fn region_at(&self, at: u64) -> Option<RegionId> {
        self.reservation_at(at)?.1.region
    }

    fn reservation_at(&self, at: u64) -> Option<(u64, &Reservation)> {
        let (start, found) = self.reservations.range(..=at).next_back()?;
        (at < found.end).then_some((*start, found))
    }

    /// Something is mapped there from now on.
    pub(super) fn map(&mut self, range: &Range<u64>, region: Option<RegionId>) {
        self.mapped.insert(range.start, (range.end, region));
    }

    /// What begins in the range is not mapped any more.
    pub(super) fn unmap(&mut self, range: &Range<u64>) {
        let gone: Vec<u64> = self.mapped.range(range.clone()).map(|(start, _)| *start).collect();
        for start in gone {
            self.mapped.remove(&start);
        }
    }

    /// What is mapped in the range and is no region's, by address.
    pub(super) fn strangers(&self, range: &Range<u64>) -> Vec<Range<u64>> {
        let inside = self.mapped.range(range.clone()).filter(|(_, (_, region))| region.is_none());
        inside.map(|(start, (end, _))| *start..*end).collect()
    }

    /// A reservation in which something of `regions` lies beside something else. Memory in addresses whose reservation nobody saw may lie
    /// beside anything.
    pub(super) fn mix(&self, regions: &BTreeSet<RegionId>) -> Option<Mix> {
        let mut owners: BTreeMap<u64, BTreeSet<Option<RegionId>>> = BTreeMap::new();
        for (&at, &(_, region)) in &self.mapped {
            let (start, unseen) = self.reservation_at(at).map_or((at, Some(None)), |(start, _)| (start, None));
            owners.entry(start).or_default().extend(unseen.into_iter().chain([region]));
        }
        owners.into_iter().find_map(|(at, owners)| {
            let region = owners.iter().copied().flatten().find(|owner| regions.contains(owner))?;
            let beside = owners.into_iter().find(|owner| owner.is_none_or(|owner| !regions.contains(&owner)))?;
            Some(Mix { region, beside, at })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: RegionId = RegionId(0);
    const B: RegionId = RegionId(1);

    fn beside(ledger: &Ledger, regions: &[RegionId]) -> Option<Option<RegionId>> {
        ledger.mix(&regions.iter().copied().collect()).map(|mix| mix.beside)
    }

    #[test]
    fn regions_in_one_reservation_are_paused_together_or_not_at_all() {
        let mut ledger = Ledger::default();
        ledger.reserve(&(0..100), Some(A));
        ledger.reserve(&(100..200), Some(B));
        ledger.map(&(0..10), Some(A));
        ledger.map(&(100..110), Some(B));
        assert_eq!((beside(&ledger, &[A]), beside(&ledger, &[A, B])), (None, None));
        ledger.map(&(10..20), Some(B));
        assert_eq!(beside(&ledger, &[A]), Some(Some(B)));
        assert_eq!(beside(&ledger, &[B]), Some(Some(A)));
        assert_eq!(beside(&ledger, &[A, B]), None);
        ledger.map(&(20..30), None);
        assert_eq!(beside(&ledger, &[A, B]), Some(None));
        assert_eq!(ledger.strangers(&(0..100)), vec![20..30]);
        ledger.unmap(&(10..30));
        assert_eq!(beside(&ledger, &[A]), None);
    }

    #[test]
    fn a_reservation_that_nobody_saw_may_hold_anything() {
        let mut ledger = Ledger::default();
        ledger.map(&(0..10), Some(A));
        assert_eq!(beside(&ledger, &[A]), Some(None));
        assert_eq!(beside(&ledger, &[B]), None);
        ledger.unreserve(&(0..100));
        assert_eq!(beside(&ledger, &[A]), None);
    }

    #[test]
    fn what_is_mapped_belongs_to_the_reservation_around_it() {
        let mut ledger = Ledger::default();
        ledger.reserve(&(100..200), Some(A));
        assert_eq!([99, 100, 199, 200].map(|at| ledger.region_at(at)), [None, Some(A), Some(A), None]);
        assert!(ledger.has_regions() && ledger.is_reservation(&(100..200)) && !ledger.is_reservation(&(100..150)));
    }
}
