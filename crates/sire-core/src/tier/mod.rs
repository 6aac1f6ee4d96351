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
use std::sync::Arc;

/// Where one segment of a backup is.
#[derive(Clone, Debug)]
pub(crate) enum Place {
    /// In host memory.
    Host(Span),
    /// In a file, with its checksum.
    Disk { file: Arc<DiskFile>, at: u64, sum: u32 },
}

/// Bytes `[offset, offset + len)` of an extent, and where they are (or will be) saved.
#[derive(Clone, Debug)]
pub(crate) struct Segment {
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) place: Place,
    /// Whether the bytes have arrived there. On a chunk whose bytes are on the device: whether they are known to be the same still.
    pub(crate) filled: bool,
}

impl Segment {
    /// Room that nothing has arrived in yet.
    pub(crate) fn new(range: &std::ops::Range<u64>, place: Place) -> Segment {
        Segment { offset: range.start, len: range.end - range.start, place, filled: false }
    }

    /// Where the segment ends.
    pub(crate) fn end(&self) -> u64 {
        self.offset + self.len
    }

    /// Whether it may be written again where it is: nobody else reads it there.
    pub(crate) fn is_writable(&self) -> bool {
        match &self.place {
            Place::Host(span) => !span.keeper().is_lent(),
            Place::Disk { .. } => true,
        }
    }

    /// `range` of it as a segment of its own; `None` if that is not inside it, or cannot be told apart.
    pub(crate) fn part(&self, range: &std::ops::Range<u64>) -> Option<Segment> {
        if *range == self.range() {
            return Some(self.clone());
        }
        let Place::Host(span) = &self.place else { return None };
        let span = span.part(range.start.checked_sub(self.offset)?, range.end - range.start)?;
        Some(Segment {
            offset: range.start,
            len: range.end - range.start,
            place: Place::Host(span),
            filled: self.filled,
        })
    }

    /// This segment and `next` as one, if they lie side by side in the extent and in host memory and are alike.
    pub(crate) fn joined(&self, next: &Segment) -> Option<Segment> {
        let (Place::Host(one), Place::Host(other)) = (&self.place, &next.place) else { return None };
        if self.end() != next.offset || self.filled != next.filled {
            return None;
        }
        let place = Place::Host(one.joined(other)?);
        Some(Segment { offset: self.offset, len: self.len + next.len, place, filled: self.filled })
    }

    /// The offsets it covers.
    pub(crate) fn range(&self) -> std::ops::Range<u64> {
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
            Place::Disk { .. } => None,
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
