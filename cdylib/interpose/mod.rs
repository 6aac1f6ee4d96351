//! The functions of the CUDA runtime that Sire takes the place of: one table, each line calls into [`runtime`], [`captures`], [`pool`], [`ipc`], [`reset`]
//! or [`driver`]. What a program then finds in the place of the driver's own functions is in [`entry`], and serves them in [`segments`], [`linear`],
//! [`pool`], [`reset`] and [`streams`]; [`lookup`] says who finds it where driver-level hooks are loaded.
//!
//! Every exported function is three instructions: it hands its caller's return address on as one argument more. From that
//! address [`original`] finds the runtime that *this caller* links, whichever way it was loaded. The exports carry no symbol
//! version; a version node would lose the interposition of references such as `cudaMalloc@libcudart.so.13`.

#![allow(non_snake_case, reason = "CUDA's names")]

mod captures;
mod context;
mod driver;
mod entry;
pub(crate) mod forwarded;
mod guard;
mod ipc;
pub(crate) mod linear;
pub mod lookup;
pub(crate) mod original;
pub(crate) mod peer;
mod pool;
pub(crate) mod probe;
mod reset;
pub(crate) mod runtime;
mod segments;
mod streams;

use std::ffi::{c_char, c_int, c_uint, c_ulonglong, c_void};

/// A `cudaError_t`.
pub type cudaError = c_int;

/// The body of an exported function: the return address into the first free argument register, then on to `$serve`.
#[cfg(target_arch = "x86_64")]
macro_rules! stub {
    // The seventh argument goes on the stack: a copy of the return address, right where the callee looks for it.
    ($serve:path, (stack, $arm:literal)) => {
        core::arch::naked_asm!("push qword ptr [rsp]", "call {serve}", "add rsp, 8", "ret", serve = sym $serve)
    };
    ($serve:path, ($intel:literal, $arm:literal)) => {
        core::arch::naked_asm!(concat!("mov ", $intel, ", qword ptr [rsp]"), "jmp {serve}", serve = sym $serve)
    };
}
#[cfg(target_arch = "aarch64")]
macro_rules! stub {
    ($serve:path, ($intel:tt, $arm:literal)) => {
        core::arch::naked_asm!(concat!("mov ", $arm, ", x30"), "b {serve}", serve = sym $serve)
    };
}

use stub;

/// Exports one function per line: name, arguments, the function that serves it, and where the return address goes
/// (the first argument register that is free, on x86-64 and on AArch64; `stack`: none is free on x86-64).
macro_rules! hooks {
    ($($(#[$about:meta])* $name:ident($($argument:ident: $type:ty),* $(,)?) => $serve:path, $place:tt;)*) => {
        $(
            $(#[$about])*
            ///
            /// # Safety
            /// As CUDA's function of this name.
            #[unsafe(no_mangle)]
            #[unsafe(naked)]
            pub unsafe extern "C" fn $name($($argument: $type),*) -> cudaError {
                stub!($serve, $place)
            }
        )*

        /// The names of the table, for the tests that compare it with the exports.
        pub const HOOKED: &[&str] = &[$(stringify!($name)),*];
    };
}

hooks! {
    /// In a region: memory of Sire's; else the original.
    cudaMalloc(out: *mut *mut c_void, bytes: usize) => runtime::malloc, ("rdx", "x2");
    /// Sire's memory goes to Sire; NULL and everything else to the original.
    cudaFree(ptr: *mut c_void) => runtime::free, ("rsi", "x1");
    /// In a region: memory of Sire's (at once, not in stream order); else the original.
    cudaMallocAsync(out: *mut *mut c_void, bytes: usize, stream: *mut c_void) => runtime::malloc_async, ("rcx", "x3");
    /// As `cudaMallocAsync`, for stream 0 as the thread's own.
    cudaMallocAsync_ptsz(out: *mut *mut c_void, bytes: usize, stream: *mut c_void) => runtime::malloc_async_per_thread, ("rcx", "x3");
    /// In a region: memory of Sire's on the pool's device (at once, not in stream order); else the original.
    cudaMallocFromPoolAsync(out: *mut *mut c_void, bytes: usize, pool: *mut c_void, stream: *mut c_void)
        => pool::runtime_malloc, ("r8", "x4");
    /// As `cudaMallocFromPoolAsync`, for stream 0 as the thread's own.
    cudaMallocFromPoolAsync_ptsz(out: *mut *mut c_void, bytes: usize, pool: *mut c_void, stream: *mut c_void)
        => pool::runtime_malloc_per_thread, ("r8", "x4");
    /// Sire's memory goes to Sire; everything else to the original.
    cudaFreeAsync(ptr: *mut c_void, stream: *mut c_void) => runtime::free_async, ("rdx", "x2");
    /// As `cudaFreeAsync`, for stream 0 as the thread's own.
    cudaFreeAsync_ptsz(ptr: *mut c_void, stream: *mut c_void) => runtime::free_async_per_thread, ("rdx", "x2");
    /// The original: free is what the driver says, paused memory included.
    cudaMemGetInfo(free: *mut usize, total: *mut usize) => runtime::mem_get_info, ("rdx", "x2");
    /// The original; and Sire's memory on the peer becomes accessible too.
    cudaDeviceEnablePeerAccess(peer: c_int, flags: c_uint) => runtime::enable_peer_access, ("rdx", "x2");
    /// The original; and Sire's memory on the peer is accessible no more, if nothing else said that it is.
    cudaDeviceDisablePeerAccess(peer: c_int) => runtime::disable_peer_access, ("rsi", "x1");
    /// Sire's memory on this thread's device is freed, and what Sire has there forgotten; then the original.
    cudaDeviceReset() => reset::runtime, ("rdi", "x0");
    /// The original; Sire then knows the pool's device.
    cudaMemPoolCreate(out: *mut *mut c_void, properties: *const c_void) => pool::runtime_create, ("rdx", "x2");
    /// The original; the pool is known no more, and what was given through it is taken back.
    cudaMemPoolDestroy(pool: *mut c_void) => pool::runtime_destroy, ("rsi", "x1");
    /// The original; Sire's memory on the pool's device becomes accessible too, or is no more.
    cudaMemPoolSetAccess(pool: *mut c_void, access: *const c_void, count: usize) => pool::runtime_set_access, ("rcx", "x3");
    /// Sire's memory has no such handle, which is said; for everything else the original.
    cudaIpcGetMemHandle(out: *mut c_void, ptr: *mut c_void) => ipc::runtime_get_mem_handle, ("rdx", "x2");
    /// The original; Sire then knows that a capture is in progress.
    cudaStreamBeginCapture(stream: *mut c_void, mode: c_int) => captures::begin_capture, ("rdx", "x2");
    /// As `cudaStreamBeginCapture`, for stream 0 as the thread's own.
    cudaStreamBeginCapture_ptsz(stream: *mut c_void, mode: c_int) => captures::begin_capture_per_thread, ("rdx", "x2");
    /// The original; Sire then knows that a capture is in progress.
    cudaStreamBeginCaptureToGraph(stream: *mut c_void, graph: *mut c_void, dependencies: *const *mut c_void,
        edges: *const c_void, count: usize, mode: c_int) => captures::begin_capture_to_graph, (stack, "x6");
    /// As `cudaStreamBeginCaptureToGraph`, for stream 0 as the thread's own.
    cudaStreamBeginCaptureToGraph_ptsz(stream: *mut c_void, graph: *mut c_void, dependencies: *const *mut c_void,
        edges: *const c_void, count: usize, mode: c_int) => captures::begin_capture_to_graph_per_thread, (stack, "x6");
    /// The original; Sire then knows that a capture is in progress.
    cudaStreamBeginRecaptureToGraph(stream: *mut c_void, mode: c_int, graph: *mut c_void, callback: *mut c_void)
        => captures::begin_recapture, ("r8", "x4");
    /// As `cudaStreamBeginRecaptureToGraph`, for stream 0 as the thread's own.
    cudaStreamBeginRecaptureToGraph_ptsz(stream: *mut c_void, mode: c_int, graph: *mut c_void, callback: *mut c_void)
        => captures::begin_recapture_per_thread, ("r8", "x4");
    /// The original; Sire then knows that the capture is over.
    cudaStreamEndCapture(stream: *mut c_void, graph: *mut *mut c_void) => captures::end_capture, ("rdx", "x2");
    /// As `cudaStreamEndCapture`, for stream 0 as the thread's own.
    cudaStreamEndCapture_ptsz(stream: *mut c_void, graph: *mut *mut c_void) => captures::end_capture_per_thread, ("rdx", "x2");
    /// The original; if it was capturing, Sire then knows that the capture is over.
    cudaStreamDestroy(stream: *mut c_void) => captures::stream_destroy, ("rsi", "x1");
    /// The original; of the driver's virtual-memory functions, PyTorch gets ours.
    cudaGetDriverEntryPoint(symbol: *const c_char, out: *mut *mut c_void, flags: c_ulonglong, status: *mut c_int)
        => driver::entry_point, ("r8", "x4");
    /// As `cudaGetDriverEntryPoint`, which then gives functions for stream 0 as the thread's own.
    cudaGetDriverEntryPoint_ptsz(symbol: *const c_char, out: *mut *mut c_void, flags: c_ulonglong, status: *mut c_int)
        => driver::entry_point_per_thread, ("r8", "x4");
    /// The original; of the driver's virtual-memory functions, PyTorch gets ours.
    cudaGetDriverEntryPointByVersion(symbol: *const c_char, out: *mut *mut c_void, version: c_uint, flags: c_ulonglong,
        status: *mut c_int) => driver::entry_point_by_version, ("r9", "x5");
    /// As `cudaGetDriverEntryPointByVersion`, which then gives functions for stream 0 as the thread's own.
    cudaGetDriverEntryPointByVersion_ptsz(symbol: *const c_char, out: *mut *mut c_void, version: c_uint, flags: c_ulonglong,
        status: *mut c_int) => driver::entry_point_by_version_per_thread, ("r9", "x5");
}

#[cfg(not(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64"))))]
compile_error!("interposition is written for Linux on x86-64 and AArch64");
