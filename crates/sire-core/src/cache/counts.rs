//! What a cache counts, in the shape and the words of PyTorch's `torch.cuda.memory_stats`: for each figure what it is now, the most that it has been, and
//! what has come and gone in all; for small and for large blocks, and for both together.

use std::collections::BTreeMap;

/// The figures, by PyTorch's names, and how many there are.
pub(crate) const FIGURES: [&str; 9] = [
    "allocation",
    "active",
    "segment",
    "inactive_split",
    "allocated_bytes",
    "active_bytes",
    "reserved_bytes",
    "inactive_split_bytes",
    "requested_bytes",
];

/// An index into [`FIGURES`].
#[derive(Clone, Copy, Debug)]
pub(super) enum Figure {
    Allocation,
    Active,
    Segment,
    InactiveSplit,
    AllocatedBytes,
    ActiveBytes,
    ReservedBytes,
    InactiveSplitBytes,
    RequestedBytes,
}

/// One figure.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Count {
    now: u64,
    peak: u64,
    /// All that has ever come.
    came: u64,
    /// Of what came and went, this much before the last reset.
    came_before: u64,
    went_before: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Group([Count; FIGURES.len()]);

/// See the [module documentation](self).
#[derive(Clone, Debug, Default)]
pub(crate) struct Counts {
    all: Group,
    small: Group,
    large: Group,
    pub(crate) retries: u64,
    pub(crate) out_of_memory: u64,
    pub(crate) synchronizations: u64,
    pub(crate) driver_allocations: u64,
    pub(crate) driver_frees: u64,
}

impl Counts {
    #[inline]
    fn groups(&mut self, large: bool) -> [&mut Group; 2] {
        [&mut self.all, if large { &mut self.large } else { &mut self.small }]
    }

    #[inline]
    pub(super) fn up(&mut self, large: bool, changes: &[(Figure, u64)]) {
        for group in self.groups(large) {
            for &(figure, by) in changes {
                let count = &mut group.0[figure as usize];
                count.now += by;
                count.came += by;
                count.peak = count.peak.max(count.now);
            }
        }
    }

    #[inline]
    pub(super) fn down(&mut self, large: bool, changes: &[(Figure, u64)]) {
        for group in self.groups(large) {
            changes.iter().for_each(|&(figure, by)| group.0[figure as usize].now -= by);
        }
    }

    /// What a figure is now, for small and large blocks together.
    pub(super) fn now(&self, figure: Figure) -> u64 {
        self.all.0[figure as usize].now
    }

    /// From now on, the most is what there is now.
    pub(crate) fn reset_peaks(&mut self) {
        for group in [&mut self.all, &mut self.small, &mut self.large] {
            group.0.iter_mut().for_each(|count| count.peak = count.now);
        }
    }

    /// From now on, what has come and gone is counted anew.
    pub(crate) fn reset_accumulated(&mut self) {
        for group in [&mut self.all, &mut self.small, &mut self.large] {
            for count in &mut group.0 {
                (count.came_before, count.went_before) = (count.came, count.came - count.now);
            }
        }
        (self.retries, self.out_of_memory, self.synchronizations) = (0, 0, 0);
    }

    /// Everything under PyTorch's names.
    pub(crate) fn named(&self) -> BTreeMap<String, u64> {
        let mut named = BTreeMap::new();
        for (pool, group) in [("all", &self.all), ("small_pool", &self.small), ("large_pool", &self.large)] {
            for (figure, count) in FIGURES.iter().zip(&group.0) {
                let freed = count.came - count.now - count.went_before;
                let values = [count.now, count.peak, count.came - count.came_before, freed];
                for (suffix, value) in ["current", "peak", "allocated", "freed"].iter().zip(values) {
                    named.insert(format!("{figure}.{pool}.{suffix}"), value);
                }
            }
        }
        // PyTorch's setting of a largest block that may be split has no counterpart here.
        for figure in ["oversize_allocations", "oversize_segments"] {
            for suffix in ["current", "peak", "allocated", "freed"] {
                named.insert(format!("{figure}.{suffix}"), 0);
            }
        }
        let single = [
            ("num_alloc_retries", self.retries),
            ("num_ooms", self.out_of_memory),
            ("num_oom_rejections", 0),
            ("num_sync_all_streams", self.synchronizations),
            ("num_device_alloc", self.driver_allocations),
            ("num_device_free", self.driver_frees),
        ];
        named.extend(single.map(|(name, value)| (name.to_owned(), value)));
        named
    }
}
