//! A claim: the right to change an extent's chunks, and the chunks while somebody has it. What arrives meanwhile (a free, a new
//! peer) is handed over when it ends.

use super::{Chunk, Extent, Inner, Truth, addresses};
use crate::ranges::Ranges;
use crate::sync::lock;
use std::ops::Range;
use std::sync::Arc;

/// The right to change an extent's chunks, and the chunks.
#[derive(Debug)]
pub(crate) struct Claim {
    pub(crate) extent: Arc<Extent>,
    pub(crate) chunks: Vec<Chunk>,
    /// Offsets that hold nothing, for as long as this claim lives.
    pub(crate) dead: Ranges,
    pub(super) held: bool,
}

impl Claim {
    /// Puts the chunks back, unless something arrived that must be done first.
    pub(crate) fn put_back(mut self) -> Result<(), Unfinished> {
        let extent = Arc::clone(&self.extent);
        let mut inner = lock(&extent.inner);
        // Whoever reads a freed extent last gives it back.
        if inner.freed && inner.readers == 0 {
            return Err(Unfinished::Freed(self));
        }
        if std::mem::take(&mut inner.access_stale) && !inner.freed {
            return Err(Unfinished::AccessStale(self));
        }
        self.store(&mut inner);
        Ok(())
    }

    /// Puts the chunks of a freed extent back: somebody will claim it again.
    pub(crate) fn bury(mut self) {
        let extent = Arc::clone(&self.extent);
        self.store(&mut lock(&extent.inner));
    }

    /// Takes the free back: the extent lives on.
    pub(crate) fn unfree(self) -> Result<(), Unfinished> {
        lock(&self.extent.inner).freed = false;
        self.put_back()
    }

    fn store(&mut self, inner: &mut Inner) {
        self.extent.note(&self.chunks);
        inner.chunks = std::mem::take(&mut self.chunks);
        inner.claimed = false;
        self.held = false;
    }

    /// Whether this is a claim indeed, and not a shadow for a reader.
    pub(crate) fn is_held(&self) -> bool {
        self.held
    }

    /// Notes which of `addresses` hold nothing; holes below `gap` bytes count as live: one longer copy is cheaper than two.
    /// Returns how many bytes of allocations are dead.
    pub(crate) fn mark_dead(&mut self, addresses: &Ranges, gap: u64) -> u64 {
        let base = self.extent.base.0;
        let live = self.extent.live_ranges();
        for range in addresses.clip(&(base..base + self.extent.size)).iter() {
            if range.end - range.start >= gap {
                live.clip(&(range.start - base..range.end - base)).iter().for_each(|part| self.dead.add(part.clone()));
            }
        }
        self.dead.total()
    }

    /// The addresses of one of its chunks.
    pub(crate) fn addresses(&self, chunk: &Chunk) -> Range<u64> {
        addresses(self.extent.base, chunk)
    }

    /// Offsets that hold allocations with something in them.
    pub(crate) fn live_ranges(&self) -> Ranges {
        let mut live = self.extent.live_ranges();
        self.dead.iter().for_each(|dead| live.remove(dead));
        live
    }

    /// Bytes of physical memory that the chunks hold.
    pub(crate) fn physical_bytes(&self) -> u64 {
        self.chunks.iter().filter(|chunk| chunk.physical.is_some()).map(|chunk| chunk.size).sum()
    }

    /// Whether any chunk is mapped: something may be using it.
    pub(crate) fn may_be_in_use(&self) -> bool {
        self.chunks.iter().any(|chunk| chunk.mapped || chunk.veiled > 0)
    }

    /// Whether a chunk of a live extent holds memory, with its bytes where `wanted` says.
    pub(crate) fn holds_memory(&self, wanted: impl Fn(Truth) -> bool) -> bool {
        let holds = |chunk: &Chunk| wanted(chunk.truth) && (chunk.mapped || chunk.physical.is_some());
        !self.extent.is_freed() && self.chunks.iter().any(holds)
    }

    /// Physical bytes of chunks whose bytes are on the device.
    pub(crate) fn resident_bytes(&self) -> u64 {
        let resident = |chunk: &&Chunk| chunk.truth == Truth::Device && chunk.physical.is_some();
        self.chunks.iter().filter(resident).map(|chunk| chunk.size).sum()
    }
}

impl Drop for Claim {
    /// Only a panic comes here with chunks in hand: they are kept, so that nothing is lost.
    fn drop(&mut self) {
        if self.held {
            let extent = Arc::clone(&self.extent);
            self.store(&mut lock(&extent.inner));
        }
    }
}

/// Why chunks were not put back: there is more to do first.
#[derive(Debug)]
pub(crate) enum Unfinished {
    /// It was freed meanwhile.
    Freed(Claim),
    /// Access rights changed meanwhile.
    AccessStale(Claim),
}
