//! Where backups are. A *tier* lends room for bytes before anything is released, and keeps them until the room
//! is dropped: [`host`] in host memory (in slabs, see [`slab`]), [`disk`] in private files. [`memory`] knows how much the machine has left.

pub(crate) mod disk;
pub(crate) mod host;
pub(crate) mod memory;
mod slab;

use crate::error::Result;
use crate::raw::Span;
use crate::sync::{Mutex, lock};
use disk::DiskFile;
use std::ops::Range;
use std::sync::Arc;

/// Where one segment of a backup is.
#[derive(Clone, Debug)]
pub(crate) enum Place {
    /// In host memory.
    Host(Span),
    /// In a file, with its checksum.
    Disk { file: Arc<DiskFile>, at: u64, sum: u32 },
    /// Nowhere: the bytes are this word (little-endian) again and again.
    Constant(u64),
}

/// What tells a page's content: the two halves of its digest.
pub(crate) type PageId = (u64, u64);

/// `range`, cut at multiples of `page`.
pub(crate) fn page_cuts(range: &Range<u64>, page: u64) -> impl Iterator<Item = Range<u64>> + use<> {
    let (end, mut at) = (range.end, range.start);
    std::iter::from_fn(move || {
        let cut = at..end.min((at / page + 1) * page);
        at = cut.end;
        (!cut.is_empty()).then_some(cut)
    })
}

/// The bytes of a constant, repeated to `bytes`' length.
pub(crate) fn repeat(word: u64, bytes: &mut [u8]) {
    let word = word.to_le_bytes();
    bytes.chunks_mut(8).for_each(|part| part.copy_from_slice(&word[..part.len()]));
}

/// Bytes `[offset, offset + len)` of an extent, and where they are (or will be) saved.
#[derive(Clone, Debug)]
pub(crate) struct Segment {
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) place: Place,
    /// Whether the bytes have arrived there. On a chunk whose bytes are on the device: whether they are known to be the same still.
    pub(crate) filled: bool,
    /// What is known of the content of its [pages](page_cuts), once it is filled; of none, if this is empty.
    pub(crate) pages: Vec<Option<PageId>>,
}

impl Segment {
    /// Room that nothing has arrived in yet.
    pub(crate) fn new(range: &Range<u64>, place: Place) -> Segment {
        Segment { offset: range.start, len: range.end - range.start, place, filled: false, pages: Vec::new() }
    }

    /// Where the segment ends.
    pub(crate) fn end(&self) -> u64 {
        self.offset + self.len
    }

    /// The byte that it repeats, if it is a constant of one byte.
    pub(crate) fn byte(&self) -> Option<u8> {
        let Place::Constant(word) = self.place else { return None };
        let bytes = word.to_le_bytes();
        bytes.iter().all(|byte| *byte == bytes[0]).then_some(bytes[0])
    }

    /// Whether its bytes are outside host memory.
    pub(crate) fn is_stored(&self) -> bool {
        matches!(self.place, Place::Disk { .. })
    }

    /// `range` of it as a segment of its own, with what is known if that is a whole page; `None` if it is not inside, or cannot be had apart.
    pub(crate) fn part(&self, range: &Range<u64>, page: u64) -> Option<Segment> {
        if *range == self.range() {
            return Some(self.clone());
        }
        let at = range.start.checked_sub(self.offset)?;
        let place = match &self.place {
            Place::Host(span) => Place::Host(span.part(at, range.end - range.start)?),
            Place::Constant(word) if at.is_multiple_of(8) && range.end <= self.end() => Place::Constant(*word),
            Place::Constant(_) | Place::Disk { .. } => return None,
        };
        let whole = |edge: u64| edge.is_multiple_of(page) || edge == self.offset || edge == self.end();
        let known = self.pages.get((range.start / page - self.offset / page) as usize).copied().flatten();
        let pages = vec![known.filter(|_| whole(range.start) && whole(range.end))];
        Some(Segment { filled: self.filled, pages, ..Segment::new(range, place) })
    }

    /// Takes in `next`, if it lies right behind, in the extent and in host memory, and is alike.
    pub(crate) fn join(&mut self, next: &Segment, page: u64) -> bool {
        if self.end() != next.offset || self.filled != next.filled || !next.offset.is_multiple_of(page) {
            return false;
        }
        match (&self.place, &next.place) {
            (Place::Host(one), Place::Host(other)) => match one.joined(other) {
                Some(joined) => self.place = Place::Host(joined),
                None => return false,
            },
            (Place::Constant(one), Place::Constant(other)) if one == other && self.len.is_multiple_of(8) => {}
            _ => return false,
        }
        let count = |segment: &Segment| page_cuts(&segment.range(), page).count();
        self.pages.resize(count(self), None);
        self.pages.extend(&next.pages);
        self.len += next.len;
        self.pages.resize(count(self), None);
        true
    }

    /// Whether it is in host memory and holds exactly these bytes.
    pub(crate) fn holds(&self, bytes: &Span) -> bool {
        match &self.place {
            Place::Host(span) => bytes.read(|bytes| span.read(|held| held == bytes)),
            Place::Constant(word) => {
                bytes.read(|bytes| bytes.chunks(8).all(|part| *part == word.to_le_bytes()[..part.len()]))
            }
            Place::Disk { .. } => false,
        }
    }

    /// The offsets it covers.
    pub(crate) fn range(&self) -> Range<u64> {
        self.offset..self.offset + self.len
    }
}

/// Room that a pause was promised and that may still be on its way in. Nothing is given up before all of it is there.
#[derive(Debug)]
pub(crate) struct Promised(Mutex<Vec<Span>>);

impl Promised {
    /// What the host segments among `segments` need.
    pub(crate) fn to<'a>(segments: impl Iterator<Item = &'a Segment>) -> Promised {
        let span = |segment: &Segment| match &segment.place {
            Place::Host(span) => Some(span.clone()),
            Place::Disk { .. } | Place::Constant(_) => None,
        };
        Promised(Mutex::new(segments.filter_map(span).collect()))
    }

    /// Whether all of it is there.
    pub(crate) fn is_kept(&self) -> bool {
        let mut spans = lock(&self.0);
        while spans.last().is_some_and(Span::is_in) {
            spans.pop();
        }
        spans.is_empty()
    }

    /// Waits until all of it is there.
    ///
    /// # Errors
    /// `OutOfBackupSpace` if the system has no memory for it.
    pub(crate) fn keep(&self) -> Result<()> {
        let spans = std::mem::take(&mut *lock(&self.0));
        spans.iter().try_for_each(Span::bring_in)
    }
}
