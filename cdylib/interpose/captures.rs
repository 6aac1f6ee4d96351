//! Captures, as the runtime's functions begin and end them: counted, so that nothing of ours synchronises or pauses meanwhile. What the driver's functions
//! do ([`super::streams`]) is counted by the same rules.

use super::context;
use super::cudaError;
use super::guard::Guard;
use super::linear::per_thread;
use super::original;
use crate::capture;
use std::ffi::{c_int, c_void};

const SUCCESS: cudaError = 0;
const CAPTURE_WRONG_THREAD: cudaError = 908;

pub(super) unsafe extern "C" fn begin_capture(stream: *mut c_void, mode: c_int, caller: usize) -> cudaError {
    // SAFETY: the program's own arguments, as it passed them.
    counted(stream, || unsafe { original::runtime(caller).begin_capture(stream, mode) })
}

#[allow(clippy::too_many_arguments, reason = "CUDA's six and the caller")]
pub(super) unsafe extern "C" fn begin_capture_to_graph(
    stream: *mut c_void,
    graph: *mut c_void,
    dependencies: *const *mut c_void,
    edges: *const c_void,
    count: usize,
    mode: c_int,
    caller: usize,
) -> cudaError {
    // SAFETY: the program's own arguments, as it passed them.
    counted(stream, || unsafe {
        original::runtime(caller).begin_capture_to_graph(stream, graph, dependencies, edges, count, mode)
    })
}

pub(super) unsafe extern "C" fn begin_capture_per_thread(stream: *mut c_void, mode: c_int, caller: usize) -> cudaError {
    // SAFETY: the program's own arguments, as it passed them.
    counted(per_thread(stream), || unsafe { original::runtime(caller).begin_capture_per_thread(stream, mode) })
}

#[allow(clippy::too_many_arguments, reason = "CUDA's six and the caller")]
pub(super) unsafe extern "C" fn begin_capture_to_graph_per_thread(
    stream: *mut c_void,
    graph: *mut c_void,
    dependencies: *const *mut c_void,
    edges: *const c_void,
    count: usize,
    mode: c_int,
    caller: usize,
) -> cudaError {
    // SAFETY: the program's own arguments, as it passed them.
    counted(per_thread(stream), || unsafe {
        original::runtime(caller).begin_capture_to_graph_per_thread(stream, graph, dependencies, edges, count, mode)
    })
}

/// Since CUDA 13.3: into a graph that was captured before, whose nodes are to be as they were.
pub(super) unsafe extern "C" fn begin_recapture(
    stream: *mut c_void,
    mode: c_int,
    graph: *mut c_void,
    callback: *mut c_void,
    caller: usize,
) -> cudaError {
    // SAFETY: the program's own arguments, as it passed them.
    counted(stream, || unsafe { original::runtime(caller).begin_recapture(stream, mode, graph, callback) })
}

pub(super) unsafe extern "C" fn begin_recapture_per_thread(
    stream: *mut c_void,
    mode: c_int,
    graph: *mut c_void,
    callback: *mut c_void,
    caller: usize,
) -> cudaError {
    // SAFETY: the program's own arguments, as it passed them.
    counted(per_thread(stream), || unsafe {
        original::runtime(caller).begin_recapture_per_thread(stream, mode, graph, callback)
    })
}

/// Counts a capture from before it begins, so that no synchronisation of ours slips in between. A runtime's call of the driver inside of
/// `begin` is not counted again.
pub(super) fn counted(stream: *mut c_void, begin: impl FnOnce() -> cudaError) -> cudaError {
    let Some(_guard) = Guard::enter() else { return begin() };
    capture::begin();
    let code = begin();
    if code == SUCCESS {
        capture::remember(stream as usize, context::device());
    } else {
        capture::end();
    }
    code
}

pub(super) unsafe extern "C" fn stream_destroy(stream: *mut c_void, caller: usize) -> cudaError {
    // SAFETY: the program's own argument, as it passed it.
    destroyed(stream, || unsafe { original::runtime(caller).stream_destroy(stream) })
}

/// Destroying a stream voids what it captures, and nobody will end that.
pub(super) fn destroyed(stream: *mut c_void, destroy: impl FnOnce() -> cudaError) -> cudaError {
    let Some(_guard) = Guard::enter() else { return destroy() };
    // Asked before: afterwards the same name may be another stream's.
    let captures = capture::in_progress() && capture::forget(stream as usize);
    let code = destroy();
    if captures && code == SUCCESS {
        capture::end();
    } else if captures {
        capture::remember(stream as usize, context::device());
    }
    code
}

pub(super) unsafe extern "C" fn end_capture(stream: *mut c_void, graph: *mut *mut c_void, caller: usize) -> cudaError {
    // SAFETY: the program's own arguments, as it passed them.
    ended(stream, || unsafe { original::runtime(caller).end_capture(stream, graph) })
}

pub(super) unsafe extern "C" fn end_capture_per_thread(
    stream: *mut c_void,
    graph: *mut *mut c_void,
    caller: usize,
) -> cudaError {
    // SAFETY: the program's own arguments, as it passed them.
    ended(per_thread(stream), || unsafe { original::runtime(caller).end_capture_per_thread(stream, graph) })
}

/// Every other answer than "not on this thread" and "nothing to end" means that the capture is over, voided or not. One whose beginning nobody heard was
/// not counted, and ends none of the others.
pub(super) fn ended(stream: *mut c_void, end: impl FnOnce() -> cudaError) -> cudaError {
    let Some(_guard) = Guard::enter() else { return end() };
    let code = end();
    if !matches!(code, CAPTURE_WRONG_THREAD | 1 | 400 | 401) && capture::forget(stream as usize) {
        capture::end();
    }
    code
}
