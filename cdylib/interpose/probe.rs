//! Whether a `cudaMalloc` of this process arrives here: the question behind `sire_hook_probe`.
//!
//! Not asked by looking at an environment variable but by calling: the function that the process' global search finds, if it
//! is ours, is called with a marker that only this thread's probe recognises.

use super::{cudaError, original};
use std::cell::Cell;
use std::ffi::c_void;
use std::ptr;

/// What the marked call answers; no CUDA error has this number.
const ARRIVED: cudaError = -7713;

thread_local! {
    static ARMED: Cell<bool> = const { Cell::new(false) };
}

/// The answer to a marked call; None: this is an ordinary one.
pub(super) fn answer(out: *const *mut c_void) -> Option<cudaError> {
    // Only a probe passes NULL while armed; the NULL test keeps ordinary calls from looking at the thread's flag.
    (out.is_null() && ARMED.with(Cell::get)).then_some(ARRIVED)
}

/// Asks.
pub(crate) fn live() -> bool {
    // The program's own handle stands for the global search; RTLD_DEFAULT would begin with this library's own scope, and find
    // itself where it was merely loaded by a dlopen.
    // SAFETY: NULL names the program itself, which is loaded; its handle stays valid.
    let program = unsafe { libc::dlopen(ptr::null(), libc::RTLD_NOW) };
    // SAFETY: asks the loader for the first global definition.
    let found = unsafe { libc::dlsym(program, c"cudaMalloc".as_ptr()) };
    if !original::is_ours(found) {
        return false;
    }
    // SAFETY: the address lies in this library and was found under this name: it is the function of the table.
    let call = unsafe {
        std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*mut *mut c_void, usize) -> cudaError>(found)
    };
    ARMED.with(|armed| armed.set(true));
    // SAFETY: while armed the call answers before it looks at its arguments.
    let code = unsafe { call(ptr::null_mut(), 0) };
    ARMED.with(|armed| armed.set(false));
    code == ARRIVED
}
