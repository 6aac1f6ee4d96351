//! What the driver says of captures and of peers to who calls it without a runtime: passed on and remembered, as [`super::captures`] and [`super::runtime`] do. A
//! runtime's own call that arrives here inside of that one is not counted again.

use super::captures::{counted, destroyed, ended};
use super::context;
use super::entry::{Code, original};
use super::guard::Guard;
use super::linear::per_thread;
use super::peer::{self, Way};
use super::runtime::{PEER_ACCESS_ALREADY_ENABLED, PEER_ACCESS_NOT_ENABLED};
use std::ffi::{c_int, c_uint, c_void};

pub(super) unsafe extern "C" fn begin_capture(stream: *mut c_void, mode: c_int) -> Code {
    // SAFETY: the program's own arguments, as it passed them.
    counted(stream, || unsafe { original::begin_capture(stream, mode) })
}

pub(super) unsafe extern "C" fn begin_capture_per_thread(stream: *mut c_void, mode: c_int) -> Code {
    // SAFETY: the program's own arguments, as it passed them.
    counted(per_thread(stream), || unsafe { original::begin_capture_per_thread(stream, mode) })
}

pub(super) unsafe extern "C" fn begin_capture_to_graph(
    stream: *mut c_void,
    graph: *mut c_void,
    dependencies: *const *mut c_void,
    edges: *const c_void,
    count: usize,
    mode: c_int,
) -> Code {
    // SAFETY: the program's own arguments, as it passed them.
    counted(stream, || unsafe { original::begin_capture_to_graph(stream, graph, dependencies, edges, count, mode) })
}

pub(super) unsafe extern "C" fn begin_capture_to_graph_per_thread(
    stream: *mut c_void,
    graph: *mut c_void,
    dependencies: *const *mut c_void,
    edges: *const c_void,
    count: usize,
    mode: c_int,
) -> Code {
    // SAFETY: the program's own arguments, as it passed them.
    counted(per_thread(stream), || unsafe {
        original::begin_capture_to_graph_per_thread(stream, graph, dependencies, edges, count, mode)
    })
}

pub(super) unsafe extern "C" fn begin_recapture(
    stream: *mut c_void,
    mode: c_int,
    graph: *mut c_void,
    callback: *mut c_void,
    data: *mut c_void,
) -> Code {
    // SAFETY: the program's own arguments, as it passed them.
    counted(stream, || unsafe { original::begin_recapture(stream, mode, graph, callback, data) })
}

pub(super) unsafe extern "C" fn begin_recapture_per_thread(
    stream: *mut c_void,
    mode: c_int,
    graph: *mut c_void,
    callback: *mut c_void,
    data: *mut c_void,
) -> Code {
    // SAFETY: the program's own arguments, as it passed them.
    counted(per_thread(stream), || unsafe { original::begin_recapture_per_thread(stream, mode, graph, callback, data) })
}

pub(super) unsafe extern "C" fn end_capture(stream: *mut c_void, graph: *mut *mut c_void) -> Code {
    // SAFETY: the program's own arguments, as it passed them.
    ended(stream, || unsafe { original::end_capture(stream, graph) })
}

pub(super) unsafe extern "C" fn end_capture_per_thread(stream: *mut c_void, graph: *mut *mut c_void) -> Code {
    // SAFETY: the program's own arguments, as it passed them.
    ended(per_thread(stream), || unsafe { original::end_capture_per_thread(stream, graph) })
}

pub(super) unsafe extern "C" fn stream_destroy(stream: *mut c_void) -> Code {
    // SAFETY: the program's own argument, as it passed it.
    destroyed(stream, || unsafe { original::stream_destroy(stream) })
}

/// The current context may touch memory on the device of `owner` from now on.
pub(super) unsafe extern "C" fn enable_peer_access(owner: *mut c_void, flags: c_uint) -> Code {
    // SAFETY: the program's own arguments, as it passed them.
    let code = unsafe { original::enable_peer_access(owner, flags) };
    if code == 0 || code == PEER_ACCESS_ALREADY_ENABLED {
        of_this_context(owner, |owner, accessor| peer::enable(owner, accessor, Way::Context(context::current())));
    }
    code
}

/// It may not any more.
pub(super) unsafe extern "C" fn disable_peer_access(owner: *mut c_void) -> Code {
    // SAFETY: the program's own argument, as it passed it.
    let code = unsafe { original::disable_peer_access(owner) };
    if code == 0 || code == PEER_ACCESS_NOT_ENABLED {
        of_this_context(owner, |owner, accessor| peer::disable(owner, accessor, Way::Context(context::current())));
    }
    code
}

/// What was said of the device of `owner` and the current context's.
fn of_this_context(owner: *mut c_void, note: impl FnOnce(u32, u32)) {
    let Some(_guard) = Guard::enter() else { return };
    let devices = (context::device_of(owner), context::device());
    if let (Some(owner), Some(accessor)) = devices
        && let (Ok(owner), Ok(accessor)) = (u32::try_from(owner), u32::try_from(accessor))
    {
        note(owner, accessor);
    }
}
