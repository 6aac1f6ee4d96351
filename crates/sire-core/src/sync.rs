//! The one place that chooses the primitives of synchronisation: the standard library's, or, with the
//! feature `shuttle`, ones that a model checker schedules. A poisoned lock is taken over: every
//! critical section of the engine leaves its data consistent at each step.

#[cfg(feature = "shuttle")]
pub(crate) use shuttle::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    sync::{Condvar, Mutex, MutexGuard, RwLock},
    thread::ThreadId,
};
use std::sync::PoisonError;
#[cfg(not(feature = "shuttle"))]
pub(crate) use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    sync::{Condvar, Mutex, MutexGuard, RwLock},
    thread::ThreadId,
};

/// Locks `mutex`.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits on `condvar`.
pub(crate) fn wait<'a, T>(condvar: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    condvar.wait(guard).unwrap_or_else(PoisonError::into_inner)
}

/// The calling thread.
pub(crate) fn this_thread() -> ThreadId {
    #[cfg(feature = "shuttle")]
    return shuttle::thread::current().id();
    #[cfg(not(feature = "shuttle"))]
    return std::thread::current().id();
}
