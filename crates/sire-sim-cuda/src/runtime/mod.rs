//! The runtime API (`cuda*`, libcudart), one module per subject. Functions do no more than translate:
//! the machine does the work.

mod copy;
mod device;
mod event;
mod graph;
pub mod ipc;
mod kernel;
mod memory;
mod per_thread;
pub mod pool;
mod stream;
mod symbol;

// What the driver API shares with the runtime API.
pub use copy::{advise, of_device, prefetch};
pub use event::{create as create_event, query as query_event};
pub use graph::{CaptureOutputs, describe_capture, exchange_mode, mode_of, recapture};
pub use kernel::{launch, launch_stream};
pub use memory::host_info;
pub use pool::{free_block, note_block};
pub use stream::{create as create_stream, host_function, own_stream};
