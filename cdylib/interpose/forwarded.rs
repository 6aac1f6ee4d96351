//! Calls that the driver serves, counted where they leave for it. Those that may wait for a device wait for what Sire is copying there, too; the
//! engine is told of them, so that it copies in shorter pieces for a while.

use crate::process;
use std::sync::atomic::{AtomicU64, Ordering};

/// How many calls of one kind were passed on.
#[derive(Debug)]
pub(crate) struct Forwarded(AtomicU64);

impl Forwarded {
    const fn none() -> Forwarded {
        Forwarded(AtomicU64::new(0))
    }

    /// One more is about to be, in the order of a stream: it waits for nothing. Wait-free.
    pub(crate) fn note(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// One more is about to be, and may wait for a device. Wait-free.
    pub(crate) fn note_waiting(&self) {
        self.note();
        if let Some(process) = process::started() {
            process.engine.note_caller();
        }
    }

    /// One more free is about to be; of no memory it waits for nothing. Wait-free.
    pub(crate) fn note_free(&self, of_nothing: bool) {
        if of_nothing { self.note() } else { self.note_waiting() }
    }

    /// So many.
    pub(crate) fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Calls of the runtime's functions, by kind.
#[derive(Debug)]
pub(crate) struct Runtime {
    pub(crate) allocate: Forwarded,
    pub(crate) free: Forwarded,
}

/// Calls of the driver's functions, by kind.
#[derive(Debug)]
pub(crate) struct Driver {
    pub(crate) allocate: Forwarded,
    pub(crate) free: Forwarded,
    pub(crate) managed: Forwarded,
    pub(crate) pitch: Forwarded,
    pub(crate) pool: Forwarded,
}

pub(crate) static RUNTIME: Runtime = Runtime { allocate: Forwarded::none(), free: Forwarded::none() };

pub(crate) static DRIVER: Driver = Driver {
    allocate: Forwarded::none(),
    free: Forwarded::none(),
    managed: Forwarded::none(),
    pitch: Forwarded::none(),
    pool: Forwarded::none(),
};
