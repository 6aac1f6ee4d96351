//! The bytes of allocations: written so that they differ everywhere, and compared. The only part of a replay that touches memory.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use sire_core::driver::{Addr, Device, Driver, DriverResult, Event, Stream};
use sire_core::error::{Error, Result, Status};

/// Bytes that are moved at once.
const PIECE: usize = 4 << 20;

/// What bytes of an allocation are.
#[derive(Clone, Debug)]
pub enum Meaning {
    /// A pattern that belongs to this number, by the offset in the allocation. Whole words only.
    Key(u64),
    /// What a file holds from this byte on for offset 0 of the allocation (which may lie before the file).
    File(Arc<File>, i128),
}

impl Meaning {
    /// The bytes at an offset of the allocation.
    fn fill(&self, bytes: &mut [u8], from: u64) -> Result<()> {
        match self {
            Meaning::Key(key) => {
                pattern(bytes, *key, from);
                Ok(())
            }
            Meaning::File(file, shift) => {
                let at = u64::try_from(i128::from(from) + shift).unwrap_or(u64::MAX);
                let failed = |error| Error::new(Status::BackupIo, format!("cannot read a file of the trace: {error}"));
                file.read_exact_at(bytes, at).map_err(failed)
            }
        }
    }

    /// The part of a range that has a meaning.
    fn whole(&self, range: &Range<u64>) -> Range<u64> {
        match self {
            Meaning::Key(_) => range.start.next_multiple_of(8)..range.end / 8 * 8,
            Meaning::File(..) => range.clone(),
        }
    }
}

/// Fills `bytes` with what belongs to `key` from word `from / 8` on.
pub fn pattern(bytes: &mut [u8], key: u64, from: u64) {
    bytes.chunks_mut(8).zip(from / 8..).for_each(|(word, at)| {
        let value = (key ^ at).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(29).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        word.copy_from_slice(&value.to_le_bytes()[..word.len()]);
    });
}

/// Writes and compares, on one device.
#[derive(Debug)]
pub struct Content {
    driver: Arc<dyn Driver>,
    stream: Stream,
    event: Event,
    bytes: Vec<u8>,
    expected: Vec<u8>,
}

impl Content {
    /// On `device`.
    ///
    /// # Errors
    /// The driver's.
    pub fn new(driver: &Arc<dyn Driver>, device: Device) -> DriverResult<Content> {
        let (stream, event) = (driver.open_stream(device)?, driver.open_event(device)?);
        let (bytes, expected) = (vec![0; PIECE], vec![0; PIECE]);
        Ok(Content { driver: Arc::clone(driver), stream, event, bytes, expected })
    }

    /// Fills `range` of the allocation at `base` with what it means.
    ///
    /// # Errors
    /// The driver's, or that a file cannot be read.
    pub fn write(&mut self, base: Addr, range: &Range<u64>, meaning: &Meaning) -> Result<()> {
        for (from, len) in pieces(&meaning.whole(range)) {
            meaning.fill(&mut self.bytes[..len], from)?;
            let source = self.bytes.as_ptr();
            // SAFETY: the buffer has PIECE >= `len` bytes, and stays as it is until `settle` has waited for the copy.
            unsafe { self.driver.copy_to_device(self.stream, base.offset(from), source, len as u64) }?;
            self.settle()?;
        }
        Ok(())
    }

    /// The first offset in `range` whose bytes are others than it means.
    ///
    /// # Errors
    /// The driver's, or that a file cannot be read.
    pub fn wrong(&mut self, base: Addr, range: &Range<u64>, meaning: &Meaning) -> Result<Option<u64>> {
        for (from, len) in pieces(&meaning.whole(range)) {
            let target = self.bytes.as_mut_ptr();
            // SAFETY: the buffer has PIECE >= `len` bytes, and nobody looks at it until `settle` has waited for the copy.
            unsafe { self.driver.copy_to_host(self.stream, target, base.offset(from), len as u64) }?;
            self.settle()?;
            meaning.fill(&mut self.expected[..len], from)?;
            let (found, expected) = (&self.bytes[..len], &self.expected[..len]);
            if found != expected {
                return Ok(found.iter().zip(expected).position(|(a, b)| a != b).map(|place| from + place as u64));
            }
        }
        Ok(None)
    }

    fn settle(&self) -> DriverResult<()> {
        self.driver.record(self.event, self.stream)?;
        self.driver.wait(self.event)
    }
}

impl Drop for Content {
    fn drop(&mut self) {
        let _ = self.driver.close_event(self.event);
        let _ = self.driver.close_stream(self.stream);
    }
}

/// A range in pieces: (offset, bytes).
fn pieces(range: &Range<u64>) -> impl Iterator<Item = (u64, usize)> + use<> {
    let (start, end) = (range.start, range.end);
    (start..end).step_by(PIECE).map(move |from| (from, (end - from).min(PIECE as u64) as usize))
}
