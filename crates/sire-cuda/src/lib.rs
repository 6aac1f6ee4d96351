//! The real driver: [`sire_core::driver::Driver`] carried out by `libcuda`.
//!
//! What belongs here is what knows CUDA's driver API and nothing of regions: finding the library
//! (`library`), the table of entry points that we use (`table`), what a `CUresult` means
//! (`result`), contexts (`context`), the operating system around it (`system`), the verbs (`driver`) and the kernel that hashes (`hash`). No CUDA library is linked: everything is found
//! at run time, and its absence is an error with advice.

mod context;
mod driver;
mod hash;
mod library;
mod result;
mod system;
mod table;

pub use driver::{CudaDriver, Options};
pub use library::Resolver;
pub use system::is_wsl;
