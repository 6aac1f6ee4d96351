//! A chunk: what is known of one physical of an extent, and what of its bytes a backup holds.

use crate::driver::{Addr, Physical, Properties};
use crate::raw::Span;
use crate::tier::{Place, Segment};
use std::ops::Range;

/// Where a chunk's bytes are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Truth {
    /// On the device: the chunk is mapped.
    Device,
    /// In its segments; what no segment covers was thrown away.
    Backup,
}

/// A part of an extent with physical memory of its own.
#[derive(Debug)]
pub(crate) struct Chunk {
    pub(crate) offset: u64,
    pub(crate) size: u64,
    pub(crate) physical: Option<Physical>,
    /// What the program asked of its memory; `None`: nothing, it is the driver's choice.
    pub(crate) properties: Option<Properties>,
    pub(crate) mapped: bool,
    /// Bytes, from the start, behind which a dummy lies: see [`crate::heap::veils`].
    pub(crate) veiled: u64,
    pub(crate) truth: Truth,
    /// The backup, in the order of offsets. With `Truth::Device`: a retained, perhaps outdated one.
    pub(crate) segments: Vec<Segment>,
}

impl Chunk {
    pub(super) fn new(offset: u64, size: u64) -> Chunk {
        let (physical, properties, segments) = (None, None, Vec::new());
        Chunk { offset, size, physical, properties, mapped: false, veiled: 0, truth: Truth::Device, segments }
    }

    /// The offsets it covers in its extent.
    pub(crate) fn range(&self) -> Range<u64> {
        self.offset..self.offset + self.size
    }

    /// Whether there is a backup, and nothing has to be copied for it.
    pub(crate) fn is_saved(&self) -> bool {
        self.segments.iter().all(|segment| segment.filled)
    }

    /// Whether it holds memory though its bytes are in a backup.
    pub(crate) fn is_leftover(&self) -> bool {
        self.truth == Truth::Backup && (self.physical.is_some() || self.mapped)
    }
}

/// The addresses of a chunk of the extent at `base`.
pub(crate) fn addresses(base: Addr, chunk: &Chunk) -> Range<u64> {
    base.0 + chunk.offset..base.0 + chunk.offset + chunk.size
}

/// Bytes of a backup that can be read at once.
#[derive(Debug)]
pub(crate) enum Held {
    /// They are in host memory.
    Span(Span),
    /// They are a word again and again: so many bytes of it.
    Repeated(u64, u64),
}

/// What holds `[range.start, range.end)`, in order, lent from now on; `None` if some of it has no backup, or is outside host memory.
pub(crate) fn held(chunks: &[Chunk], range: &Range<u64>) -> Option<Vec<Held>> {
    let mut parts = Vec::new();
    let mut reached = range.start;
    let segments = chunks.iter().flat_map(|chunk| &chunk.segments);
    for segment in segments.filter(|s| s.offset < range.end && range.start < s.end()) {
        let (from, to) = (segment.offset.max(range.start), segment.end().min(range.end));
        if from != reached {
            return None;
        }
        let at = from - segment.offset;
        parts.push(match &segment.place {
            Place::Host(span) => Held::Span(span.part(at, to - from)?),
            Place::Constant(word) => Held::Repeated(word.rotate_right(8 * (at % 8) as u32), to - from),
            Place::Stored { .. } => return None,
        });
        reached = to;
    }
    let spans = parts.iter().filter_map(|part| if let Held::Span(span) = part { Some(span) } else { None });
    spans.for_each(|span| span.keeper().show());
    (reached == range.end && !parts.is_empty()).then_some(parts)
}

/// One piece of host memory that is all of it, if there is one.
pub(crate) fn contiguous(parts: &[Held]) -> Option<Span> {
    let (first, rest) = parts.split_first()?;
    let Held::Span(first) = first else { return None };
    rest.iter().try_fold(first.clone(), |whole, part| match part {
        Held::Span(span) => whole.joined(span),
        Held::Repeated(..) => None,
    })
}
