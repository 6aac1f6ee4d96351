//! One record of a backup, the bytes of a segment, on its way between a staging buffer and a room: padded to what the room wants, and never used
//! before its checksum was right.

use super::Room;
use crate::error::{Error, Result, Status};
use crate::raw::Span;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// The largest alignment that a room may want; staging buffers leave as much on either side of a record.
pub(crate) const LARGEST_ALIGN: u64 = 4096;

/// The checksum of a record: XXH3, 128 bits. It finds damage; against somebody who forges bytes it is no protection.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Sum(u128);

impl Sum {
    /// Of these bytes.
    pub(crate) fn of(bytes: &[u8]) -> Sum {
        Sum(twox_hash::XxHash3_128::oneshot(bytes))
    }
}

/// What a request that went well brings.
#[derive(Debug)]
pub(crate) struct Answer {
    /// The part of the buffer that holds the record.
    pub(crate) bytes: Span,
    /// Its checksum.
    pub(crate) sum: Sum,
}

/// `len` bytes at offset `at` of a room.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    pub(crate) room: Arc<dyn Room>,
    pub(crate) at: u64,
    pub(crate) len: u64,
}

impl Record {
    /// How far the record begins behind an offset that the room can be asked for.
    fn skew(&self) -> u64 {
        self.at % self.room.align()
    }

    /// Bytes of a buffer that the record takes, padding included.
    fn padded(&self) -> u64 {
        (self.skew() + self.len).next_multiple_of(self.room.align())
    }

    /// Writes the first `len` bytes of `buffer`, which may be padded; `at` must be a multiple of the room's alignment.
    pub(crate) fn save(&self, buffer: &Span) -> Result<Answer> {
        let (padded, answer) = self.outgoing(buffer)?;
        padded.read(|bytes| guarded(|| self.room.write(self.at, bytes)))?;
        Ok(answer)
    }

    /// What goes to the room to save the first `len` bytes of `buffer`: padded with zeros. And the answer if it arrives.
    pub(crate) fn outgoing(&self, buffer: &Span) -> Result<(Span, Answer)> {
        let padded = buffer.part(0, self.padded()).filter(|_| self.skew() == 0).ok_or_else(|| unfit(buffer))?;
        let bytes = padded.part(0, self.len).ok_or_else(|| unfit(buffer))?;
        let sum = padded.write(|bytes| {
            let (content, padding) = bytes.split_at_mut(self.len as usize);
            padding.fill(0);
            Sum::of(content)
        });
        Ok((padded, Answer { bytes, sum }))
    }

    /// Reads the record into `buffer`. With `expected`, its bytes have that checksum, or it fails.
    pub(crate) fn load(&self, buffer: &Span, expected: Option<Sum>) -> Result<Answer> {
        let (at, padded) = self.incoming(buffer)?;
        padded.write(|bytes| guarded(|| self.room.read(at, bytes)))?;
        self.arrived(&padded, expected)
    }

    /// Where the room is to be read, and the part of `buffer` that its bytes fill.
    pub(crate) fn incoming(&self, buffer: &Span) -> Result<(u64, Span)> {
        let padded = buffer.part(0, self.padded()).ok_or_else(|| unfit(buffer))?;
        Ok((self.at - self.skew(), padded))
    }

    /// The record, once the room's bytes fill `padded`.
    pub(crate) fn arrived(&self, padded: &Span, expected: Option<Sum>) -> Result<Answer> {
        let bytes = padded.part(self.skew(), self.len).ok_or_else(|| unfit(padded))?;
        let sum = bytes.read(Sum::of);
        if expected.is_some_and(|expected| expected != sum) {
            return Err(self.damaged());
        }
        Ok(Answer { bytes, sum })
    }

    fn damaged(&self) -> Error {
        let what = format!("{} bytes at {} of {} are damaged", self.len, self.at, self.room.place());
        Error::new(Status::BackupIo, format!("{what} (checksum differs); the device was not touched"))
    }
}

fn unfit(buffer: &Span) -> Error {
    Error::new(Status::Internal, format!("a record of a backup does not fit its buffer of {} bytes", buffer.len()))
}

/// Tiers come from outside: what panics in one is an error here.
pub(crate) fn guarded<T>(call: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(call))
        .unwrap_or_else(|_| Err(Error::new(Status::Internal, "a tier panicked; what it was to do counts as not done")))
}
