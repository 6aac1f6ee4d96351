//! How a Sire process is asked from outside, without CUDA and without the engine: whoever serves brings both.
//!
//! [`place`] is the private directory in which sockets lie, [`message`] what is said there (one JSON object per line), [`server`] answers many
//! clients on one thread and lets none of them hold it up, [`client`] asks. [`desk`] is where requests that change memory wait for a safe point
//! of the program, [`preempt`] how a process that needs memory asks others for theirs, [`instance`] which
//! process is which, [`board`] where figures wait that only the program can tell. Who may connect: the same user, nobody else, root included.

pub mod board;
pub mod client;
pub mod desk;
pub mod instance;
pub mod journal;
pub mod line;
pub mod message;
mod peer;
pub mod place;
pub mod preempt;
pub mod server;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks; what a panicking thread left behind is still in order, because every change here is a single assignment.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
