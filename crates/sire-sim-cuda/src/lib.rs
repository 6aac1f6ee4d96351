//! The software CUDA device behind CUDA's C interfaces: one library that stands in for libcudart, libcuda and
//! libnvidia-ml, and, as stubs that fail by name, for the other NVIDIA libraries that PyTorch links.
//!
//! It exports unversioned symbols and has no SONAME, so one file serves under every name in `sonames-cuda12.txt` or `sonames-cuda13.txt`.
//! The device itself is the `sire-sim` crate; what is here translates: structs (`abi`), errors (`names`),
//! the frame around every call (`boundary`), process and thread state (`state`), CUDA 12 where it differs from 13
//! (`release`, `device_prop`), which devices the process sees (`visible`), device properties (`properties`), kernels known by name (`kernels`), the interfaces (`runtime`, `driver`, `nvml`),
//! the device's own functions (`hooks`), and what is not simulated (`libraries`, `stubs`).
// The names are NVIDIA's, and so is their documentation.
#![allow(non_snake_case, missing_docs)]

mod abi;
mod boundary;
mod device_prop;
mod driver;
mod hooks;
mod kernels;
mod libraries;
mod names;
mod nvml;
mod properties;
mod release;
mod runtime;
mod state;
mod stubs;
mod visible;
