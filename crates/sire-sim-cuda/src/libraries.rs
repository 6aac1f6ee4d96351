//! The few questions of NVIDIA's other libraries that have a harmless answer: versions (those that the
//! PyTorch wheels were built with, or later) and names of errors; and cuBLAS's handles, for which PyTorch allocates
//! workspaces. Everything else of theirs is a stub.

use crate::boundary::{Out, write_text};
use crate::release;
use std::ffi::{c_char, c_int, c_void};
use std::sync::atomic::{AtomicUsize, Ordering};

const NOT_SIMULATED: *const c_char = c"not simulated by the software device".as_ptr();

macro_rules! texts {
    ($($name:ident)*) => {$(
        /// The one error that a stub has.
        #[unsafe(no_mangle)]
        pub extern "C" fn $name(_status: c_int) -> *const c_char {
            NOT_SIMULATED
        }
    )*};
}

texts! {
    cublasGetStatusName cublasGetStatusString cublasLtGetStatusName cublasLtGetStatusString cudnnGetErrorString
    cusparseGetErrorName cusparseGetErrorString cusparseLtGetErrorName cusparseLtGetErrorString
    ncclGetErrorString nvrtcGetErrorString
}

/// NCCL's last message of a communicator.
#[unsafe(no_mangle)]
pub extern "C" fn ncclGetLastError(_communicator: *mut c_void) -> *const c_char {
    NOT_SIMULATED
}

/// cuDNN's last message.
#[unsafe(no_mangle)]
pub extern "C" fn cudnnGetLastErrorString(buffer: Out<c_char>, capacity: usize) {
    write_text(buffer, capacity, "not simulated by the software device");
}

/// One part of cuDNN's version: 0 major, 1 minor, 2 patch.
#[unsafe(no_mangle)]
pub extern "C" fn cudnnGetProperty(part: c_int, value: Out<c_int>) -> c_int {
    answer(value, [9, 99, 0].get(part as usize).copied().unwrap_or(0))
}

/// cuDNN 9.99: later than what any wheel was built with.
#[unsafe(no_mangle)]
pub extern "C" fn cudnnGetVersion() -> usize {
    99900
}

/// The process's CUDA, as its runtime says it: 12080 or 13020.
fn cuda() -> c_int {
    release::of_process().version()
}

/// The runtime that cuDNN would have been built with.
#[unsafe(no_mangle)]
pub extern "C" fn cudnnGetCudartVersion() -> usize {
    cuda() as usize
}

/// cuBLASLt of the process's CUDA.
#[unsafe(no_mangle)]
pub extern "C" fn cublasLtGetVersion() -> usize {
    cuda() as usize * 10
}

fn answer<T>(out: Out<T>, value: T) -> c_int {
    out.set_if(value);
    0
}

/// NCCL 2.99.
#[unsafe(no_mangle)]
pub extern "C" fn ncclGetVersion(version: Out<c_int>) -> c_int {
    answer(version, 29_900)
}

/// NVRTC of the process's CUDA.
#[unsafe(no_mangle)]
pub extern "C" fn nvrtcVersion(major: Out<c_int>, minor: Out<c_int>) -> c_int {
    minor.set_if(cuda() % 1000 / 10);
    answer(major, cuda() / 1000)
}

/// CUPTI's interface of CUDA 12.8, or of 13.0.
#[unsafe(no_mangle)]
pub extern "C" fn cuptiGetVersion(version: Out<u32>) -> c_int {
    answer(version, if release::is_12() { 26 } else { 130_000 })
}

/// The text of a CUPTI status.
#[unsafe(no_mangle)]
pub extern "C" fn cuptiGetResultString(_status: c_int, out: Out<*const c_char>) -> c_int {
    answer(out, NOT_SIMULATED)
}

/// The name of a CUPTI callback: there are no callbacks.
#[unsafe(no_mangle)]
pub extern "C" fn cuptiGetCallbackName(_domain: c_int, _id: u32, out: Out<*const c_char>) -> c_int {
    answer(out, NOT_SIMULATED)
}

/// NVSHMEM's version.
#[unsafe(no_mangle)]
pub extern "C" fn nvshmem_info_get_version(major: Out<c_int>, minor: Out<c_int>) {
    major.set_if(3);
    minor.set_if(4);
}

/// A handle of cuBLAS: a name, of which nobody asks anything. No two are the same.
#[unsafe(no_mangle)]
pub extern "C" fn cublasCreate_v2(handle: Out<*mut c_void>) -> c_int {
    static NEXT: AtomicUsize = AtomicUsize::new(1);
    answer(handle, std::ptr::without_provenance_mut(NEXT.fetch_add(1, Ordering::Relaxed) << 4))
}

/// Forgets nothing.
#[unsafe(no_mangle)]
pub extern "C" fn cublasDestroy_v2(_handle: *mut c_void) -> c_int {
    0
}

/// The stream of a handle whose products are not simulated.
#[unsafe(no_mangle)]
pub extern "C" fn cublasSetStream_v2(_handle: *mut c_void, _stream: *mut c_void) -> c_int {
    0
}

/// Its workspace, which nothing is written to.
#[unsafe(no_mangle)]
pub extern "C" fn cublasSetWorkspace_v2(_handle: *mut c_void, _workspace: *mut c_void, _bytes: usize) -> c_int {
    0
}

macro_rules! modes {
    ($($set:ident $get:ident)*) => {$(
        /// A mode of a handle.
        #[unsafe(no_mangle)]
        pub extern "C" fn $set(_handle: *mut c_void, _mode: c_int) -> c_int {
            0
        }

        /// The mode that a handle begins with.
        #[unsafe(no_mangle)]
        pub extern "C" fn $get(_handle: *mut c_void, mode: Out<c_int>) -> c_int {
            answer(mode, 0)
        }
    )*};
}

modes! {
    cublasSetMathMode cublasGetMathMode
    cublasSetPointerMode_v2 cublasGetPointerMode_v2
}
