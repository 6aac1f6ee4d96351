//! The software CUDA device, and the test kit built on it.
//!
//! [`Machine`] is a set of devices with memory, virtual-memory management, a heap, host memory,
//! streams, events, graphs, faults and a census. It has no C types: `sire-sim-cuda` puts CUDA's
//! C interface in front of it, and [`SimDriver`] the engine's `Driver` trait.
//!
//! Modules, each using only those below it (verbs of [`Machine`] excepted, which call each other):
//!
//! * `conformance`, `faulty`, `driver`: the test kit
//! * `machine` (life), and its verbs in `vmm`, `heap`, `host`, `copy`, `graph`, `stream`, `ipc`, `census`
//! * `cost`: what work takes in virtual time
//! * `core`: what machine and workers share; `space`: addresses; `memory`: frames; `ledger`: their owners
//! * `clock`: virtual time, for machines with a profile
//! * the leaves `fault`, `options`, `types`, `error`, `sys`

mod census;
mod clock;
pub mod conformance;
mod copy;
mod core;
mod cost;
pub mod driver;
pub mod error;
pub mod fault;
pub mod faulty;
mod graph;
mod heap;
mod host;
mod in_use;
mod ipc;
mod ledger;
pub mod machine;
mod memory;
pub mod options;
mod space;
mod stream;
mod sys;
pub mod types;
mod vmm;

pub use self::clock::{Cost, Profile};
pub use self::core::{Done, HostFn, Kernel, OpContext};
pub use self::ipc::IPC_HANDLE;
pub use driver::SimDriver;
pub use error::{Code, Result, SimError};
pub use faulty::{At, Faulty, Planned};
pub use machine::Machine;
pub use memory::POISON;
pub use options::{Executor, Options, Poison};
pub use types::*;
