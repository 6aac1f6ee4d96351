//! What makes an extent a slab: slots of one size, which of them are in use, and which were given out since the last backup.

use crate::driver::ProgramStream;
use crate::ranges::Ranges;
use crate::sync::{Mutex, lock};

/// In a slot's size: it was given out since the last backup. Small sizes are far below.
const FRESH: u32 = 1 << 31;

/// The sizes of a slab's slots that are in use (0: not in use), and whether they are fresh.
#[derive(Debug, Default)]
struct Slots {
    sizes: Vec<u32>,
    live: usize,
}

/// What makes an extent a slab.
#[derive(Debug)]
pub(crate) struct Slab {
    /// Bytes per slot.
    pub(crate) class: u64,
    /// The stream it serves.
    pub(crate) stream: ProgramStream,
    slots: Mutex<Slots>,
}

impl Slab {
    /// A slab of `size` bytes in slots of `class` bytes, all free.
    pub(crate) fn new(class: u64, stream: ProgramStream, size: u64) -> Slab {
        let sizes = vec![0; (size / class) as usize];
        Slab { class, stream, slots: Mutex::new(Slots { sizes, live: 0 }) }
    }

    /// How many slots.
    pub(crate) fn count(&self) -> usize {
        lock(&self.slots).sizes.len()
    }

    /// Slots in use.
    pub(crate) fn live(&self) -> usize {
        lock(&self.slots).live
    }

    /// Bytes asked for in slots in use.
    pub(super) fn requested(&self) -> u64 {
        lock(&self.slots).sizes.iter().map(|&size| u64::from(size & !FRESH)).sum()
    }

    /// Puts `size` bytes into the slot at `offset`.
    pub(crate) fn occupy(&self, offset: u64, size: u64) {
        let mut slots = lock(&self.slots);
        let index = (offset / self.class) as usize;
        if let Some(slot) = slots.sizes.get_mut(index) {
            *slot = size as u32 | FRESH;
            slots.live += 1;
        }
    }

    /// Frees the slot at `offset`; false if nothing is in use there.
    pub(crate) fn vacate(&self, offset: u64) -> bool {
        let mut slots = lock(&self.slots);
        let Some(slot) = slots.sizes.get_mut((offset / self.class) as usize) else { return false };
        if !offset.is_multiple_of(self.class) || *slot == 0 {
            return false;
        }
        *slot = 0;
        slots.live -= 1;
        true
    }

    /// The slot in use that holds `offset`: where it starts, and its bytes.
    pub(super) fn slot(&self, offset: u64) -> Option<(u64, u64)> {
        let index = offset / self.class;
        let size = u64::from(*lock(&self.slots).sizes.get(index as usize)? & !FRESH);
        (size > 0 && offset - index * self.class < size).then_some((index * self.class, size))
    }

    /// Where the slots start that are in use.
    pub(super) fn starts(&self) -> Vec<u64> {
        let slots = lock(&self.slots);
        let live = slots.sizes.iter().enumerate().filter(|(_, size)| **size > 0);
        live.map(|(index, _)| index as u64 * self.class).collect()
    }

    pub(super) fn live_ranges(&self) -> Ranges {
        let slots = lock(&self.slots);
        let mut live = Ranges::new();
        for (index, &size) in slots.sizes.iter().enumerate().filter(|(_, size)| **size > 0) {
            let start = index as u64 * self.class;
            live.add(start..start + u64::from(size & !FRESH));
        }
        live
    }

    /// Slots that were given out since this was last asked.
    pub(super) fn take_fresh(&self) -> Ranges {
        let mut slots = lock(&self.slots);
        let mut fresh = Ranges::new();
        for (index, size) in slots.sizes.iter_mut().enumerate().filter(|(_, size)| **size & FRESH != 0) {
            *size &= !FRESH;
            fresh.add(index as u64 * self.class..(index as u64 + 1) * self.class);
        }
        fresh
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;

    #[test]
    fn slots_know_what_is_in_use() {
        let slab = Slab::new(512, ProgramStream(0), 2048);
        slab.occupy(512, 100);
        assert_eq!(slab.slot(611), Some((512, 100)));
        assert_eq!(slab.slot(612), None);
        assert!(!slab.vacate(513) && !slab.vacate(0) && !slab.vacate(4096));
        assert!(slab.vacate(512) && !slab.vacate(512));
        assert_eq!((slab.live(), slab.count()), (0, 4));
    }
}
