//! Where backups are. A *tier* lends room for bytes before anything is released, and keeps them until the room
//! is dropped: [`host`] in host memory, [`disk`] in private files. [`memory`] knows how much the machine has left.

pub(crate) mod disk;
pub(crate) mod host;
pub(crate) mod memory;

use crate::raw::Span;
use disk::DiskFile;
use std::sync::Arc;

/// Where one segment of a backup is.
#[derive(Debug)]
pub(crate) enum Place {
    /// In host memory.
    Host(Span),
    /// In a file, with its checksum.
    Disk { file: Arc<DiskFile>, at: u64, sum: u32 },
}

/// Bytes `[offset, offset + len)` of an extent, and where they are (or will be) saved.
#[derive(Debug)]
pub(crate) struct Segment {
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) place: Place,
}

impl Segment {
    /// The offsets it covers.
    pub(crate) fn range(&self) -> std::ops::Range<u64> {
        self.offset..self.offset + self.len
    }
}
