//! The software CUDA device, and the test kit built on it.
//!
//! [`Machine`] is a set of devices with memory, virtual-memory management, a heap, host memory,
//! streams, events, graphs, faults and a census. It has no C types: `sire-sim-cuda` puts CUDA's
//! C interface in front of it, and [`SimDriver`](driver::SimDriver) the engine's `Driver` trait.
//!
//! Modules, each using only those below it: `driver`, `faulty`, `conformance` (the test kit);
//! `machine` (life) with its verbs in `vmm`, `heap`, `host`, `stream`, `copy`, `graph`, `census`;
//! `fault`; the leaves `types`, `options`, `error`.

pub mod error;
pub mod machine;
pub mod options;
pub mod types;

pub use error::{Code, Result, SimError};
pub use machine::{Kernel, Machine, OpContext};
pub use options::{Executor, Options, Poison, parse_size};
pub use types::*;
