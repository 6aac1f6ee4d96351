//! Sets of byte offsets, kept as sorted ranges that neither touch nor overlap.

use std::ops::Range;

/// A set of offsets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ranges(Vec<Range<u64>>);

impl Ranges {
    /// The empty set.
    pub(crate) const fn new() -> Ranges {
        Ranges(Vec::new())
    }

    /// Exactly `range`.
    pub(crate) fn of(range: Range<u64>) -> Ranges {
        if range.is_empty() { Ranges::new() } else { Ranges(vec![range]) }
    }

    /// The ranges, ascending.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Range<u64>> {
        self.0.iter()
    }

    /// How many offsets.
    pub(crate) fn total(&self) -> u64 {
        self.0.iter().map(|r| r.end - r.start).sum()
    }

    /// Adds a range.
    pub(crate) fn add(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let first = self.0.partition_point(|r| r.end < range.start);
        let after = self.0.partition_point(|r| r.start <= range.end);
        let mut joined = range;
        if first < after {
            joined.start = joined.start.min(self.0[first].start);
            joined.end = joined.end.max(self.0[after - 1].end);
        }
        self.0.splice(first..after, [joined]);
    }

    /// Takes a range out.
    pub(crate) fn remove(&mut self, range: &Range<u64>) {
        let first = self.0.partition_point(|r| r.end <= range.start);
        let after = self.0.partition_point(|r| r.start < range.end);
        if range.is_empty() || first >= after {
            return;
        }
        let left = self.0[first].start..range.start;
        let right = range.end..self.0[after - 1].end;
        self.0.splice(first..after, [left, right].into_iter().filter(|r| !r.is_empty()));
    }

    /// What of the set lies in `window`.
    pub(crate) fn clip(&self, window: &Range<u64>) -> Ranges {
        let first = self.0.partition_point(|r| r.end <= window.start);
        let inside = self.0[first..].iter().take_while(|r| r.start < window.end);
        let parts = inside.map(|r| r.start.max(window.start)..r.end.min(window.end));
        Ranges(parts.filter(|part| !part.is_empty()).collect())
    }

    /// What of `window` is not in the set.
    pub(crate) fn gaps(&self, window: &Range<u64>) -> Ranges {
        let mut gaps = Ranges::of(window.clone());
        for range in self.clip(window).iter() {
            gaps.remove(range);
        }
        gaps
    }

    /// Joins neighbours that are less than `gap` apart.
    pub(crate) fn close_gaps(&mut self, gap: u64) {
        let mut closed: Vec<Range<u64>> = Vec::with_capacity(self.0.len());
        for range in self.0.drain(..) {
            match closed.last_mut() {
                Some(last) if range.start - last.end < gap => last.end = range.end,
                _ => closed.push(range),
            }
        }
        self.0 = closed;
    }

    /// Takes `len` offsets out, from the first range that has room; returns where.
    pub(crate) fn take(&mut self, len: u64) -> Option<u64> {
        let start = self.0.iter().find(|r| r.end - r.start >= len)?.start;
        self.remove(&(start..start + len));
        Some(start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The naive twin: one bit per offset.
    fn bits(ranges: &Ranges) -> Vec<bool> {
        let mut bits = vec![false; 64];
        for range in ranges.iter() {
            assert!(range.start < range.end);
            bits[range.start as usize..range.end as usize].fill(true);
        }
        let runs = bits.chunk_by(|a, b| a == b).filter(|run| run[0]).count();
        assert_eq!(runs, ranges.0.len(), "{ranges:?} is not in lowest terms");
        bits
    }

    proptest::proptest! {
        #[test]
        fn add_remove_clip_gaps_equal_a_bitmap(steps in proptest::collection::vec((proptest::bool::ANY, 0u64..60, 0u64..20), 1..20), window in (0u64..40, 0u64..24)) {
            let mut ranges = Ranges::new();
            let mut twin = vec![false; 64];
            for (add, start, len) in steps {
                let range = start..(start + len).min(64);
                if add { ranges.add(range.clone()); } else { ranges.remove(&range); }
                twin[range.start as usize..range.end as usize].fill(add);
                assert_eq!(bits(&ranges), twin);
            }
            let window = window.0..window.0 + window.1;
            let inside = |i: u64| window.contains(&i);
            let clip: Vec<bool> = (0..64).map(|i| inside(i) && twin[i as usize]).collect();
            let gaps: Vec<bool> = (0..64).map(|i| inside(i) && !twin[i as usize]).collect();
            assert_eq!(bits(&ranges.clip(&window)), clip);
            assert_eq!(bits(&ranges.gaps(&window)), gaps);
        }
    }

    #[test]
    fn take_finds_the_first_fit() {
        let mut holes = Ranges::of(0..4);
        holes.add(8..20);
        assert_eq!(holes.take(6), Some(8));
        assert_eq!(holes.take(4), Some(0));
        assert_eq!(holes.take(7), None);
        assert_eq!(holes, Ranges::of(14..20));
    }

    #[test]
    fn close_gaps_joins_near_neighbours_only() {
        let mut ranges = Ranges::of(0..4);
        ranges.add(6..8);
        ranges.add(20..24);
        ranges.close_gaps(4);
        assert_eq!(ranges.0, vec![0..8, 20..24]);
    }
}
