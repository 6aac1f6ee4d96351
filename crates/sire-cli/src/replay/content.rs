//! The bytes of allocations: written so that they differ everywhere, and compared. The only part of a replay that touches memory.

use std::ops::Range;
use std::sync::Arc;

use sire_core::driver::{Addr, Device, Driver, DriverResult, Event, Stream};

/// Bytes that are moved at once.
const PIECE: usize = 4 << 20;

/// Writes and compares, on one device.
#[derive(Debug)]
pub struct Content {
    driver: Arc<dyn Driver>,
    stream: Stream,
    event: Event,
    words: Vec<u64>,
}

impl Content {
    /// On `device`.
    ///
    /// # Errors
    /// The driver's.
    pub fn new(driver: &Arc<dyn Driver>, device: Device) -> DriverResult<Content> {
        let (stream, event) = (driver.open_stream(device)?, driver.open_event(device)?);
        Ok(Content { driver: Arc::clone(driver), stream, event, words: vec![0; PIECE / 8] })
    }

    /// Fills `range` of the allocation at `base` with the bytes that `key` means.
    ///
    /// # Errors
    /// The driver's.
    pub fn write(&mut self, base: Addr, range: Range<u64>, key: u64) -> DriverResult<()> {
        for (from, len) in pieces(&range) {
            self.words.iter_mut().zip(from / 8..).for_each(|(word, at)| *word = pattern(key, at));
            let source = self.words.as_ptr().cast::<u8>();
            // SAFETY: the buffer has PIECE >= `len` bytes, and stays as it is until `settle` has waited for the copy.
            unsafe { self.driver.copy_to_device(self.stream, base.offset(from), source, len) }?;
            self.settle()?;
        }
        Ok(())
    }

    /// The first offset in `range` whose bytes are others than those that `key` means.
    ///
    /// # Errors
    /// The driver's.
    pub fn wrong(&mut self, base: Addr, range: Range<u64>, key: u64) -> DriverResult<Option<u64>> {
        for (from, len) in pieces(&range) {
            let target = self.words.as_mut_ptr().cast::<u8>();
            // SAFETY: the buffer has PIECE >= `len` bytes, and nobody looks at it until `settle` has waited for the copy.
            unsafe { self.driver.copy_to_host(self.stream, target, base.offset(from), len) }?;
            self.settle()?;
            let differs = |(word, at): (&u64, u64)| *word != pattern(key, at);
            let whole = self.words.iter().zip(from / 8..).take(len as usize / 8);
            if let Some(place) = whole.clone().position(differs) {
                return Ok(Some(from + 8 * place as u64));
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

/// Whole words of the range, in pieces: (offset, bytes).
fn pieces(range: &Range<u64>) -> impl Iterator<Item = (u64, u64)> + use<> {
    let (start, end) = (range.start.next_multiple_of(8), range.end / 8 * 8);
    (start..end).step_by(PIECE).map(move |from| (from, (end - from).min(PIECE as u64)))
}

/// Word number `at` of what `key` means.
fn pattern(key: u64, at: u64) -> u64 {
    (key ^ at).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(29).wrapping_mul(0xBF58_476D_1CE4_E5B9)
}
