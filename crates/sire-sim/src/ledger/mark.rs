//! Marks: numbers that processes count up for each other. A mark says how often something was begun (an
//! interprocess event recorded) and how far it is done; members read and write it without the ledger's lock.
//! A mark belongs to the member that made it and goes with it; whoever waits for what a dead member began
//! waits no longer.

use super::{Guard, Layout, Ledger};
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

/// How many there can be, all members together.
pub const MOST: usize = 4096;

/// One mark, as the table has it. All zero: free.
#[repr(C)]
#[derive(Debug, Default)]
pub struct Entry {
    owner: AtomicU16, // slot + 1; 0: free
    recorder: AtomicU16,
    serial: AtomicU32,
    begun: AtomicU64,
    done: AtomicU64,
}

/// Which mark: its place, and which of those that were there in turn.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mark {
    /// Its place.
    pub index: u32,
    /// Which one.
    pub serial: u32,
}

impl Guard<'_> {
    /// Makes a mark; `None` if there are too many.
    pub fn make_mark(&mut self) -> Option<Mark> {
        let serial = self.header().serial.wrapping_add(1).max(1);
        self.header().serial = serial;
        let (index, entry) = self.ledger.marks().iter().enumerate().find(|(_, entry)| entry.is_free())?;
        entry.begun.store(0, Ordering::Relaxed);
        entry.done.store(0, Ordering::Relaxed);
        entry.serial.store(serial, Ordering::Release);
        entry.owner.store(self.ledger.slot as u16 + 1, Ordering::Release);
        Some(Mark { index: index as u32, serial })
    }

    /// Removes a mark. Who waits for it waits no longer.
    pub fn remove_mark(&mut self, mark: Mark) {
        if let Some(entry) = self.ledger.mark(mark) {
            entry.clear();
        }
    }

    /// Removes the marks of members (slot + 1) of which `is_theirs` is true.
    pub(super) fn clear_marks(&mut self, is_theirs: impl Fn(u16) -> bool) {
        for entry in self.ledger.marks() {
            if is_theirs(entry.owner.load(Ordering::Acquire)) {
                entry.clear();
            }
            // Nobody will do what they have begun, whoever has their slot next.
            let recorder = entry.recorder.load(Ordering::Acquire);
            if is_theirs(recorder) {
                let _ = entry.recorder.compare_exchange(recorder, 0, Ordering::AcqRel, Ordering::Acquire);
            }
        }
    }
}

impl Entry {
    fn is_free(&self) -> bool {
        self.owner.load(Ordering::Acquire) == 0
    }

    fn clear(&self) {
        self.owner.store(0, Ordering::Release);
        self.serial.store(0, Ordering::Release);
    }
}

impl Ledger {
    fn marks(&self) -> &[Entry] {
        let at = self.base as usize + Layout::of(self.frames).marks;
        // SAFETY: the mapping of `Layout::total` bytes at `base` lives as long as self and holds MOST entries there, aligned to 8 bytes,
        // which every process touches through atomics only.
        unsafe { std::slice::from_raw_parts(at as *const Entry, MOST) }
    }

    /// The live entry of a mark.
    fn mark(&self, mark: Mark) -> Option<&Entry> {
        let entry = self.marks().get(mark.index as usize)?;
        (!entry.is_free() && entry.serial.load(Ordering::Acquire) == mark.serial).then_some(entry)
    }

    /// Whether the mark is there still.
    pub fn has_mark(&self, mark: Mark) -> bool {
        self.mark(mark).is_some()
    }

    /// Counts one beginning more; its number. 0 if the mark is gone.
    pub fn begin_mark(&self, mark: Mark) -> u64 {
        let Some(entry) = self.mark(mark) else { return 0 };
        entry.recorder.store(self.slot as u16 + 1, Ordering::Release);
        entry.begun.fetch_add(1, Ordering::AcqRel) + 1
    }

    /// What was begun up to `number` is done.
    pub fn finish_mark(&self, mark: Mark, number: u64) {
        if let Some(entry) = self.mark(mark) {
            entry.done.fetch_max(number, Ordering::AcqRel);
        }
    }

    /// The number of the last beginning.
    pub fn begun_of_mark(&self, mark: Mark) -> u64 {
        self.mark(mark).map_or(0, |entry| entry.begun.load(Ordering::Acquire))
    }

    /// Whether what was begun up to `number` is done, or nobody will do it any more (`look`: which is costlier to find out).
    pub fn mark_has_passed(&self, mark: Mark, number: u64, look: bool) -> bool {
        let Some(entry) = self.mark(mark) else { return true };
        if entry.done.load(Ordering::Acquire) >= number {
            return true;
        }
        look && !self.lives(entry.recorder.load(Ordering::Acquire))
    }

    /// Whether a member (slot + 1) lives.
    fn lives(&self, member: u16) -> bool {
        let Some(slot) = usize::from(member).checked_sub(1) else { return false };
        let Ok(mut guard) = self.lock() else { return true };
        let found = guard.members().get(slot).copied();
        drop(guard);
        found.is_some_and(|found| found.pid != 0 && self.is_alive(slot, found))
    }
}
