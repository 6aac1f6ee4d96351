//! The engine of Sire: regions of device memory that can be paused and resumed.
//!
//! Modules, each using only those below it:
//!
//! ```text
//! engine                    the face: allocate, free, pause, resume, what can be asked; stats
//! segments                  memory that the program maps itself: PyTorch's expandable segments
//! progress                  what has arrived of a resume in the background
//! transition                pause and resume of a set of regions: survey, plan, put_down, pick_up, undo
//! trace                     what was called, written to a file and read back
//! heap                      large and small allocations, slabs, memory that waits to be given back
//! registry, region          address -> extent; tags, policies, threads inside, state
//! extent, mapping           one reservation and its chunks: where each byte is
//! cache                     what a caching allocator decides: blocks, arenas, what other streams still use
//! transfer                  pipelined copies between a device and the tiers
//! policy                    who makes way: a pure function
//! pages                     which pages of content host memory has already
//! tier                      where backups are: host memory, disk, files, tiers from outside
//! stock                     memory that the process owns ahead of its need: a driver in front of the driver
//! raw                       the only module with unsafe code: host pages, copies, the kernel's queue for files
//! driver                    the trait: what the engine asks of a GPU
//! digest                    what tells pages of content apart: the definition of the hash
//! settings, notices, terms, error, ranges, size, sync, clock, callers    leaves
//! ```
#![deny(unsafe_code)]

pub mod digest;
pub mod driver;
pub mod engine;
pub mod error;
pub mod policy;
pub mod progress;
pub mod segments;
pub mod size;
pub mod tier;
pub mod trace;

mod cache;
mod callers;
mod clock;
mod extent;
mod heap;
mod mapping;
mod notices;
mod pages;
mod ranges;
mod raw;
mod region;
mod registry;
mod settings;
mod stats;
mod stock;
mod sync;
mod terms;
mod transfer;
mod transition;
