//! How many stream captures are in progress, as far as we were told: while one is, Sire never synchronises.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

static IN_PROGRESS: AtomicU32 = AtomicU32::new(0);

/// Streams (as the program names them) whose captures hooks saw begin: a stream can be destroyed before its capture ends.
static STREAMS: Mutex<Vec<usize>> = Mutex::new(Vec::new());

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

/// A capture that was begun belongs to `stream`.
pub(crate) fn remember(stream: usize) {
    STREAMS.lock().unwrap_or_else(PoisonError::into_inner).push(stream);
}

/// Whatever `stream` captured is over; false if nothing was known of it.
pub(crate) fn forget(stream: usize) -> bool {
    let mut streams = STREAMS.lock().unwrap_or_else(PoisonError::into_inner);
    let found = streams.iter().position(|&known| known == stream);
    found.map(|index| streams.swap_remove(index)).is_some()
}
