//! When something that serves one at a time is taken: a set of busy stretches of virtual time. What asks later in real
//! time but is ready earlier in virtual time still gets the gap that was left for it.

use super::Time;
use std::collections::BTreeMap;

/// Most stretches that are remembered; before the oldest of them, everything counts as busy.
const REMEMBERED: usize = 4096;

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct Calendar {
    /// Start to end of each busy stretch; stretches neither overlap nor touch.
    busy: BTreeMap<Time, Time>,
    /// Nothing is free before.
    horizon: Time,
}

impl Calendar {
    /// Whether `at` lies in a busy stretch.
    pub fn is_busy(&self, at: Time) -> bool {
        at < self.horizon || self.busy.range(..=at).next_back().is_some_and(|(_, end)| at < *end)
    }

    /// The next time after `at` when a busy stretch begins or ends.
    pub fn next_change(&self, at: Time) -> Option<Time> {
        let horizon = (at < self.horizon).then_some(self.horizon);
        let end = self.busy.range(..=at).next_back().map(|(_, end)| *end).filter(|end| *end > at);
        let start = self.busy.range(at + 1..).next().map(|(start, _)| *start);
        [horizon, end, start].into_iter().flatten().min()
    }

    /// The first start, at or after `from`, of `len` free in one piece.
    pub fn gap(&self, from: Time, len: Time) -> Time {
        let from = from.max(self.horizon);
        let mut at = self.busy.range(..=from).next_back().map_or(from, |(_, end)| from.max(*end));
        for (start, end) in self.busy.range(at..) {
            if *start - at >= len {
                break;
            }
            at = *end;
        }
        at
    }

    /// Makes `[start, end)` busy; part of it may be so already.
    pub fn take(&mut self, mut start: Time, mut end: Time) {
        if start >= end {
            return;
        }
        while let Some((&first, &last)) = self.busy.range(..=end).next_back()
            && last >= start
        {
            self.busy.remove(&first);
            (start, end) = (start.min(first), end.max(last));
        }
        self.busy.insert(start, end);
        while self.busy.len() > REMEMBERED
            && let Some((_, end)) = self.busy.pop_first()
        {
            self.horizon = end;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stretches_join() {
        let mut calendar = Calendar::default();
        for (start, end) in [(10, 20), (30, 40), (20, 25), (39, 50), (5, 5)] {
            calendar.take(start, end);
        }
        assert_eq!(calendar.busy, BTreeMap::from([(10, 25), (30, 50)]));
        calendar.take(0, 100);
        assert_eq!(calendar.busy, BTreeMap::from([(0, 100)]));
    }

    #[test]
    fn gaps_are_found_from_where_they_are_asked_for() {
        let mut calendar = Calendar::default();
        calendar.take(10, 20);
        calendar.take(25, 30);
        assert_eq!(calendar.gap(0, 10), 0);
        assert_eq!(calendar.gap(1, 10), 30);
        assert_eq!(calendar.gap(12, 5), 20);
        assert_eq!(calendar.gap(12, 6), 30);
        assert!(calendar.is_busy(10) && !calendar.is_busy(20) && !calendar.is_busy(9));
        assert_eq!(
            [0, 10, 20, 27, 30].map(|at| calendar.next_change(at)),
            [Some(10), Some(20), Some(25), Some(30), None]
        );
    }

    #[test]
    fn what_is_forgotten_counts_as_busy() {
        let mut calendar = Calendar::default();
        for n in 0..REMEMBERED as u64 + 2 {
            calendar.take(n * 10, n * 10 + 1);
        }
        assert_eq!(calendar.gap(0, 1), 11);
        assert!(calendar.is_busy(5) && !calendar.is_busy(15));
    }
}
