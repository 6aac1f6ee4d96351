//! The driver API (`cu*`, libcuda), one module per subject. It needs a current context where CUDA's does.

mod context;
mod copy;
pub mod entry;
mod ipc;
mod launch;
mod memory;
mod pool;
mod queue;
mod versions;
mod vmm;

pub use vmm::LABEL_SHIFT;

use crate::abi::Handle;
use crate::state;
use sire_sim::{Machine, Result, StreamId};

/// The stream that a `CUstream` means in this thread.
fn stream_of(machine: &Machine, stream: Handle) -> Result<StreamId> {
    machine.resolve_stream(state::context_device(machine)?, stream as u64)
}

/// What `_ptsz` functions mean by stream 0: the thread's own.
fn per_thread(stream: Handle) -> Handle {
    if stream.is_null() { 2 as Handle } else { stream }
}
