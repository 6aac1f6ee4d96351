//! Buffers between a device and a tier: host memory of the arena, so that the driver may know it, at addresses that
//! direct requests to a disk can use. There are enough for what flies on a lane and what a tier has under way. The fewest that a transition can do with
//! are brought in before it begins; each of the others when it is first used, while the first requests are under way.

use super::host::{HostTier, Kind};
use super::record::LARGEST_ALIGN;
use crate::error::Result;
use crate::raw::Span;

const PASSING: Kind = Kind { plain: false, passing: true, node: None };
/// Fewer than this make a transition wait for itself.
const FEWEST: usize = 2;

/// See the [module documentation](self).
#[derive(Debug, Default)]
pub(crate) struct Buffers {
    all: Vec<Span>,
    free: Vec<usize>,
}

impl Buffers {
    /// `count` buffers for records of `len` bytes, or as many as there is memory for. The limit on backups does not concern them.
    pub(crate) fn new(host: &HostTier, count: usize, len: u64) -> Result<Buffers> {
        let size = (len + 2 * LARGEST_ALIGN).next_multiple_of(LARGEST_ALIGN);
        let mut count = count.max(FEWEST);
        let ranges = loop {
            // One page more, so that each can begin on a page.
            match host.reserve_kind(&vec![size + LARGEST_ALIGN; count], None, PASSING) {
                Err(_) if count > FEWEST => count = FEWEST.max(count / 2),
                outcome => break outcome?,
            }
        };
        let aligned = |span: Span| span.part((span.ptr() as u64).wrapping_neg() % LARGEST_ALIGN, size);
        let all = ranges.iter().filter_map(|range| range.span(0, size + LARGEST_ALIGN).and_then(aligned));
        let all: Vec<Span> = all.collect();
        all.iter().take(FEWEST).try_for_each(Span::bring_in)?;
        // The last is taken first: what is there already, and later what was used last.
        Ok(Buffers { free: (0..all.len()).rev().collect(), all })
    }

    /// A buffer that nobody uses. Those that the system has no memory for any more are not used in this transition.
    pub(crate) fn take(&mut self) -> Option<Span> {
        let taken = self.free.pop().map(|index| self.all[index].clone());
        // The next is there as long as anything is said to be free.
        while let Some(&next) = self.free.last()
            && self.all[next].bring_in().is_err()
        {
            self.free.pop();
        }
        taken
    }

    /// How many nobody uses; if that is not 0, at least one is there.
    pub(crate) fn free(&self) -> usize {
        self.free.len()
    }

    /// The buffer that a span is part of.
    pub(crate) fn around(&self, span: &Span) -> Option<Span> {
        self.index(span).map(|index| self.all[index].clone())
    }

    /// The buffer that a span is part of is free again.
    pub(crate) fn put(&mut self, span: &Span) {
        self.free.extend(self.index(span));
    }

    /// The same, of a request that has ended; one that was lost keeps its buffer.
    pub(crate) fn put_back(&mut self, buffer: Option<Span>) {
        buffer.iter().for_each(|buffer| self.put(buffer));
    }

    fn index(&self, span: &Span) -> Option<usize> {
        let at = span.ptr() as u64;
        self.all.iter().position(|buffer| (buffer.ptr() as u64..buffer.ptr() as u64 + buffer.len()).contains(&at))
    }
}
