//! The `sire_*` functions. docs/abi.md is their contract; `include/sire.h` is generated from these files.
//!
//! Each is a few lines: the arguments are checked and turned into the engine's words, and the answer into C's.

pub mod cache;
pub mod control;
pub mod memory;
pub mod process;
pub mod progress;
pub mod reclaimable;
pub mod region;
pub mod reserve;
pub mod slices;
pub mod standing;
pub mod transition;
pub mod values;
