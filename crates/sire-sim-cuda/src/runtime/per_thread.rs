//! What programs call that were compiled with `--default-stream per-thread`: the function of the same name, for which stream 0 is the thread's own. Faults
//! and counters know it by the plain name.

use super::{copy, device, event, graph, memory, pool, stream};
use crate::abi::{Handle, HostFn};
use crate::boundary::{In, Out, Text};
use std::ffi::{c_int, c_uint, c_ulonglong, c_void};

/// `cudaEnablePerThreadDefaultStream`.
const PER_THREAD: c_ulonglong = 2;

/// The thread's own stream for stream 0.
fn own(stream: Handle) -> Handle {
    if stream.is_null() { 2 as Handle } else { stream }
}

/// What "as compiled" means to who was compiled so.
fn compiled(flags: c_ulonglong) -> c_ulonglong {
    if flags == 0 { PER_THREAD } else { flags }
}

/// Waits for the thread's own stream, after what was put into it has been accepted.
fn and_wait(queued: c_int) -> c_int {
    if queued == 0 { stream::cudaStreamSynchronize(own(std::ptr::null_mut())) } else { queued }
}

macro_rules! per_thread {
    ($(fn $name:ident($($arg:ident: $ty:ty),* $(,)?) { $call:expr })*) => {$(
        #[unsafe(no_mangle)]
        pub extern "C" fn $name($($arg: $ty),*) -> c_int { $call }
    )*};
}

per_thread! {
    fn cudaMallocAsync_ptsz(out: Out<u64>, size: usize, stream: Handle) { memory::cudaMallocAsync(out, size, own(stream)) }
    fn cudaFreeAsync_ptsz(ptr: u64, stream: Handle) { memory::cudaFreeAsync(ptr, own(stream)) }
    fn cudaMallocFromPoolAsync_ptsz(out: Out<u64>, size: usize, pool: Handle, stream: Handle) {
        pool::cudaMallocFromPoolAsync(out, size, pool, own(stream))
    }

    fn cudaMemcpyAsync_ptsz(dst: u64, src: u64, size: usize, kind: c_int, stream: Handle) {
        copy::cudaMemcpyAsync(dst, src, size, kind, own(stream))
    }
    fn cudaMemsetAsync_ptsz(dst: u64, value: c_int, count: usize, stream: Handle) {
        copy::cudaMemsetAsync(dst, value, count, own(stream))
    }
    fn cudaMemcpy_ptds(dst: u64, src: u64, size: usize, kind: c_int) {
        and_wait(copy::cudaMemcpyAsync(dst, src, size, kind, own(std::ptr::null_mut())))
    }
    fn cudaMemset_ptds(dst: u64, value: c_int, count: usize) {
        copy::cudaMemsetAsync(dst, value, count, own(std::ptr::null_mut()))
    }

    fn cudaStreamSynchronize_ptsz(stream: Handle) { stream::cudaStreamSynchronize(own(stream)) }
    fn cudaStreamQuery_ptsz(stream: Handle) { stream::cudaStreamQuery(own(stream)) }
    fn cudaStreamWaitEvent_ptsz(stream: Handle, event: Handle, flags: c_uint) {
        stream::cudaStreamWaitEvent(own(stream), event, flags)
    }
    fn cudaLaunchHostFunc_ptsz(stream: Handle, function: HostFn, data: *mut c_void) {
        stream::cudaLaunchHostFunc(own(stream), function, data)
    }
    fn cudaEventRecord_ptsz(event: Handle, stream: Handle) { event::cudaEventRecord(event, own(stream)) }

    fn cudaStreamBeginCapture_ptsz(stream: Handle, mode: c_int) { graph::cudaStreamBeginCapture(own(stream), mode) }
    fn cudaStreamBeginCaptureToGraph_ptsz(stream: Handle, graph: Handle, dependencies: In<u64>, edges: In<u8>, count: usize, mode: c_int) {
        graph::cudaStreamBeginCaptureToGraph(own(stream), graph, dependencies, edges, count, mode)
    }
    fn cudaStreamBeginRecaptureToGraph_ptsz(stream: Handle, mode: c_int, graph: Handle, callback: Handle) {
        graph::cudaStreamBeginRecaptureToGraph(own(stream), mode, graph, callback)
    }
    fn cudaStreamEndCapture_ptsz(stream: Handle, out: Out<Handle>) { graph::cudaStreamEndCapture(own(stream), out) }
    fn cudaStreamIsCapturing_ptsz(stream: Handle, status: Out<c_int>) { graph::cudaStreamIsCapturing(own(stream), status) }
    fn cudaGraphLaunch_ptsz(exec: Handle, stream: Handle) { graph::cudaGraphLaunch(exec, own(stream)) }

    fn cudaGetDriverEntryPoint_ptsz(symbol: Text, pointer: Out<Handle>, flags: c_ulonglong, status: Out<c_int>) {
        device::cudaGetDriverEntryPoint(symbol, pointer, compiled(flags), status)
    }
    fn cudaGetDriverEntryPointByVersion_ptsz(symbol: Text, pointer: Out<Handle>, version: c_uint, flags: c_ulonglong, status: Out<c_int>) {
        device::cudaGetDriverEntryPointByVersion(symbol, pointer, version, compiled(flags), status)
    }
}
