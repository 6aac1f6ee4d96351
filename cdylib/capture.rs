//! How many stream captures are in progress, as far as we were told: while one is, Sire never synchronises.

use sire_core::driver::Device;
use std::ffi::c_int;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

static IN_PROGRESS: AtomicU32 = AtomicU32::new(0);

/// Streams (as the program names them) whose captures hooks saw begin, and the device that was current: a stream can be destroyed before its capture ends.
static STREAMS: Mutex<Vec<(usize, Option<c_int>)>> = Mutex::new(Vec::new());

/// Whether any thread of the process captures now.
pub(crate) fn in_progress() -> bool {
    IN_PROGRESS.load(Ordering::Acquire) > 0
}

/// A capture begins.
pub(crate) fn begin() {
    IN_PROGRESS.fetch_add(1, Ordering::AcqRel);
}

/// A capture ends; false if none was in progress.
pub(crate) fn end() -> bool {
    IN_PROGRESS.fetch_update(Ordering::AcqRel, Ordering::Acquire, |count| count.checked_sub(1)).is_ok()
}

/// A capture that was begun belongs to `stream`, of this `device` as far as is known.
pub(crate) fn remember(stream: usize, device: Option<c_int>) {
    STREAMS.lock().unwrap_or_else(PoisonError::into_inner).push((stream, device));
}

/// The device was reset: its streams are gone, and nobody will end what they captured.
pub(crate) fn end_on(device: Device) {
    let mut streams = STREAMS.lock().unwrap_or_else(PoisonError::into_inner);
    let gone = |on: Option<c_int>| on.is_some_and(|on| u32::try_from(on) == Ok(device.0));
    for _ in streams.extract_if(.., |(_, on)| gone(*on)) {
        end();
    }
}

/// Whatever `stream` captured is over; false if nothing was known of it.
pub(crate) fn forget(stream: usize) -> bool {
    let mut streams = STREAMS.lock().unwrap_or_else(PoisonError::into_inner);
    let found = streams.iter().position(|&(known, _)| known == stream);
    found.map(|index| streams.swap_remove(index)).is_some()
}
