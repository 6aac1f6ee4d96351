//! `libsire_alloc.so`: a thin shell around the engine, loaded into other people's processes.
//!
//! It decides nothing. [`abi`], [`torch`] and [`tms`] are the functions that people call; [`interpose`] is what takes the
//! place of CUDA's; both turn C's arguments into the engine's and the engine's answers into C's. [`boundary`] keeps
//! panics, NULLs and bad strings out, [`process`] holds the one engine, [`region`] the thread's place in it.
//!
//! [`control`] answers other processes, [`slices`] shares the device with them by turns, [`preempt`] gives way for them, if that is asked for.
//!
//! Nothing runs before somebody calls: no constructor, no thread, no file, no CUDA library.
#![allow(non_camel_case_types, reason = "C's names")]

pub mod abi;
mod allocate;
mod boundary;
mod capture;
mod config;
mod control;
pub mod interpose;
mod log;
mod preempt;
mod process;
mod region;
mod reservation;
mod slices;
mod status;
pub mod tms;
pub mod torch;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Takes the lock, also if a thread has panicked while it held it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
