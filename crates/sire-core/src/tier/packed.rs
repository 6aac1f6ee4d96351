//! A room whose records are kept compressed in another room. It is made whole and never changes.

use super::Room;
use super::compress;
use super::record::LARGEST_ALIGN;
use crate::error::{Error, Result, Status};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

/// Where a record's frame is in the inner room.
#[derive(Clone, Copy, Debug)]
struct Frame {
    /// Bytes of the frame.
    len: u64,
    /// Bytes of the record.
    raw: u64,
}

/// See the [module documentation](self).
pub(crate) struct PackedRoom {
    inner: Arc<dyn Room>,
    /// By where they start: a record is asked for under its frame's offset.
    frames: BTreeMap<u64, Frame>,
    used: u64,
}

impl fmt::Debug for PackedRoom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}, compressed", self.inner)
    }
}

impl PackedRoom {
    /// Nothing in `inner` yet.
    pub(crate) fn new(inner: Arc<dyn Room>) -> PackedRoom {
        PackedRoom { inner, frames: BTreeMap::new(), used: 0 }
    }

    /// Keeps a frame of a record of `raw` bytes; returns where, or `None` if there is no room for it.
    pub(crate) fn add(&mut self, frame: &[u8], raw: u64) -> Result<Option<u64>> {
        let (at, align) = (self.used, self.inner.align());
        let len = (frame.len() as u64).next_multiple_of(align);
        if at + len > self.inner.len() {
            return Ok(None);
        }
        let mut buffer = Buffer::new(len);
        buffer.bytes()[..frame.len()].copy_from_slice(frame);
        self.inner.write(at, buffer.bytes())?;
        self.frames.insert(at, Frame { len: frame.len() as u64, raw });
        self.used = (at + len).next_multiple_of(LARGEST_ALIGN);
        Ok(Some(at))
    }
}

impl Room for PackedRoom {
    fn len(&self) -> u64 {
        self.inner.len()
    }

    fn write(&self, _: u64, _: &[u8]) -> Result<()> {
        Err(Error::new(Status::BackupIo, "a compressed backup cannot be written again"))
    }

    fn read(&self, at: u64, into: &mut [u8]) -> Result<()> {
        let frame = self.frames.get(&at).filter(|frame| frame.raw == into.len() as u64).ok_or_else(|| {
            let message = format!("no record of {} bytes at {at} of {self:?}", into.len());
            Error::new(Status::BackupIo, message)
        })?;
        let mut buffer = Buffer::new(frame.len.next_multiple_of(self.inner.align()));
        self.inner.read(at, buffer.bytes())?;
        compress::unpack(&buffer.bytes()[..frame.len as usize], into)
    }

    fn is_rewritable(&self) -> bool {
        false
    }
}

/// Bytes that begin where direct requests to a disk may.
struct Buffer {
    all: Vec<u8>,
    skip: usize,
    len: usize,
}

impl Buffer {
    fn new(len: u64) -> Buffer {
        let all = vec![0; (len + LARGEST_ALIGN) as usize];
        let skip = all.as_ptr().align_offset(LARGEST_ALIGN as usize).min(LARGEST_ALIGN as usize);
        Buffer { all, skip, len: len as usize }
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.all[self.skip..self.skip + self.len]
    }
}
