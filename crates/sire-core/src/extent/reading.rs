//! Reading an extent's memory while the program goes on using it. Readers do not claim: a free or a new peer does not wait for
//! them. But as long as anybody reads, nobody else can claim the chunks, so nothing is unmapped under a copy and no
//! segment changes; a transition waits for the readers, who ask between two pieces whether they should stop. What is freed meanwhile
//! is given back by the last reader.

use super::{Chunk, Claim, Extent, Inner};
use crate::clock;
use crate::ranges::Ranges;
use crate::sync::lock;
use crate::tier::Segment;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

impl Chunk {
    /// What is known of the chunk, without its memory.
    fn shadow(&self) -> Chunk {
        Chunk { physical: None, mapped: false, segments: self.segments.clone(), ..*self }
    }
}

impl Extent {
    /// One more reader; false if the extent is freed, about to be unmapped or claimed.
    pub(crate) fn begin_reading(&self) -> bool {
        let mut inner = lock(&self.inner);
        let may = !inner.freed && !inner.wanted && !inner.claimed;
        inner.readers += usize::from(may);
        may
    }

    /// One reader fewer. If it was the last and the extent was freed meanwhile: the claim to give it back with.
    pub(crate) fn end_reading(self: &Arc<Self>) -> Option<Claim> {
        let mut inner = lock(&self.inner);
        inner.readers -= 1;
        inner.freed.then(|| self.claimed(&mut inner)).flatten()
    }

    /// What the program has said to be changed until now counts as settled once a reader has seen it: to be called before the device
    /// is synchronised.
    pub(crate) fn begin_settling(&self) {
        self.settle_changed(&mut lock(&self.inner));
    }

    /// Offsets that were noted as changed. Nothing is taken.
    pub(crate) fn known_changed(&self) -> Ranges {
        let inner = lock(&self.inner);
        let mut changed = inner.settling.clone();
        inner.changed.iter().for_each(|range| changed.add(range.clone()));
        changed
    }

    /// For a reader: a claim on nothing, with what is known of the chunks in `window`. `None` if the extent is freed.
    pub(crate) fn shadow(self: &Arc<Self>, window: &Range<u64>) -> Option<Claim> {
        let look = |inner: &mut Inner| {
            let within = inner.chunks.iter().filter(|chunk| window.contains(&chunk.offset));
            within.map(Chunk::shadow).collect::<Vec<Chunk>>()
        };
        let chunks = self.when_unclaimed(look)?;
        Some(Claim { extent: Arc::clone(self), chunks, dead: Ranges::new(), held: false })
    }

    /// For a reader: the chunks of a shadow have these backups now, which hold what had changed before the device was synchronised. False
    /// if the extent is freed.
    pub(crate) fn keep_backups(&self, mut shadow: Claim) -> bool {
        let chunks = std::mem::take(&mut shadow.chunks).into_iter();
        let mut new: Vec<(Range<u64>, Vec<Segment>)> = chunks.map(|chunk| (chunk.range(), chunk.segments)).collect();
        let kept = self.when_unclaimed(|inner| {
            for (range, segments) in &mut new {
                if let Some(chunk) = inner.chunks.iter_mut().find(|chunk| chunk.offset == range.start) {
                    std::mem::swap(&mut chunk.segments, segments);
                    inner.settling.remove(range);
                }
            }
            self.note(&inner.chunks);
        });
        // The old ones go when nothing is locked any more.
        drop(new);
        kept.is_some()
    }

    /// While somebody reads, only a new peer claims: that takes one driver call.
    fn when_unclaimed<R>(&self, mut with: impl FnMut(&mut Inner) -> R) -> Option<R> {
        loop {
            let mut inner = lock(&self.inner);
            if inner.freed {
                return None;
            }
            if !inner.claimed {
                return Some(with(&mut inner));
            }
            drop(inner);
            clock::sleep(Duration::from_micros(50));
        }
    }
}
