//! Streams, events and capture.

use super::{per_thread, stream_of};
use crate::abi::{Handle, HostFn};
use crate::boundary::{In, Out, export};
use crate::runtime::{
    CaptureOutputs, create_event, create_stream, describe_capture, exchange_mode, host_function, mode_of, own_stream,
    query_event, recapture,
};
use crate::state::{self, Context};
use crate::visible;
use sire_sim::{Code, EventId, ExecId, GraphId, Machine, NodeId, Result};
use std::ffi::{c_float, c_int, c_uint, c_ulonglong, c_void};

fn begin_to_graph(machine: &Machine, stream: Handle, graph: Handle, after: Vec<u64>, mode: c_int) -> Result<()> {
    let after: Vec<NodeId> = after.into_iter().map(NodeId).collect();
    machine.capture_begin_to_graph(stream_of(machine, stream)?, GraphId(graph as u64), &after, mode_of(mode)?)
}

export! { Driver:
    fn cuStreamCreate(out: Out<Handle>, flags: c_uint) |machine| { create_stream(machine, out, state::context_device(machine)?, flags, 0) }
    fn cuStreamCreateWithPriority(out: Out<Handle>, flags: c_uint, priority: c_int) |machine| {
        create_stream(machine, out, state::context_device(machine)?, flags, priority)
    }
    fn cuStreamDestroy_v2(stream: Handle) |machine| { machine.stream_destroy(own_stream(machine, stream)?) }
    fn cuStreamSynchronize(stream: Handle) |machine| { machine.stream_synchronize(stream_of(machine, stream)?) }
    fn cuStreamQuery(stream: Handle) |machine| {
        let done = machine.stream_query(stream_of(machine, stream)?)?;
        if done { Ok(()) } else { Err(Code::NOT_READY.because("work is queued")) }
    }
    fn cuStreamWaitEvent(stream: Handle, event: Handle, _flags: c_uint) |machine| {
        machine.stream_wait_event(stream_of(machine, stream)?, EventId(event as u64))
    }
    fn cuStreamGetPriority(stream: Handle, priority: Out<c_int>) |machine| {
        priority.set(machine.stream_priority(stream_of(machine, stream)?)?)
    }
    fn cuStreamGetFlags(stream: Handle, flags: Out<c_uint>) |machine| {
        flags.set(c_uint::from(!machine.stream_is_blocking(stream_of(machine, stream)?)?))
    }
    fn cuStreamGetId(stream: Handle, id: Out<c_ulonglong>) |machine| { id.set(stream_of(machine, stream)?.0) }
    fn cuStreamGetDevice(stream: Handle, device: Out<c_int>) |machine| {
        device.set(visible::to_program(machine, machine.stream_device(stream_of(machine, stream)?)?))
    }
    fn cuStreamGetCtx(stream: Handle, context: Out<Handle>) |machine| {
        let device = machine.stream_device(stream_of(machine, stream)?)?;
        context.set(Context::primary(device).0 as Handle)
    }
    fn cuLaunchHostFunc(stream: Handle, function: HostFn, data: *mut c_void) |machine| {
        state::context_device(machine)?;
        host_function(machine, stream, function, data)
    }

    fn cuStreamIsCapturing(stream: Handle, status: Out<c_int>) |machine| {
        status.set(machine.capture_info(stream_of(machine, stream)?)?.status as c_int)
    }
    fn cuStreamBeginCapture_v2(stream: Handle, mode: c_int) |machine| { machine.capture_begin(stream_of(machine, stream)?, mode_of(mode)?) }
    fn cuStreamEndCapture(stream: Handle, out: Out<Handle>) |machine| { out.set(machine.capture_end(stream_of(machine, stream)?)?.0 as Handle) }
    fn cuStreamBeginCapture_v2_ptsz(stream: Handle, mode: c_int) |machine| {
        machine.capture_begin(stream_of(machine, per_thread(stream))?, mode_of(mode)?)
    }
    fn cuStreamEndCapture_ptsz(stream: Handle, out: Out<Handle>) |machine| {
        out.set(machine.capture_end(stream_of(machine, per_thread(stream))?)?.0 as Handle)
    }
    fn cuStreamBeginCaptureToGraph(stream: Handle, graph: Handle, dependencies: In<u64>, _edges: In<u8>, count: usize, mode: c_int) |machine| {
        begin_to_graph(machine, stream, graph, dependencies.all(count)?, mode)
    }
    fn cuStreamBeginCaptureToGraph_ptsz(stream: Handle, graph: Handle, dependencies: In<u64>, _edges: In<u8>, count: usize, mode: c_int) |machine| {
        begin_to_graph(machine, per_thread(stream), graph, dependencies.all(count)?, mode)
    }
    fn cuStreamBeginRecaptureToGraph(stream: Handle, mode: c_int, graph: Handle, callback: Handle, _data: Handle) |machine| {
        recapture(machine, stream_of(machine, stream)?, mode, graph, callback)
    }
    fn cuStreamBeginRecaptureToGraph_ptsz(stream: Handle, mode: c_int, graph: Handle, callback: Handle, _data: Handle) |machine| {
        recapture(machine, stream_of(machine, per_thread(stream))?, mode, graph, callback)
    }
    fn cuStreamGetCaptureInfo(stream: Handle, status: Out<c_int>, id: Out<c_ulonglong>) |machine| {
        state::context_device(machine)?;
        describe_capture(machine, stream, &CaptureOutputs::brief(status, id))
    }
    fn cuStreamGetCaptureInfo_v2(stream: Handle, status: Out<c_int>, id: Out<c_ulonglong>, graph: Out<Handle>, dependencies: Out<*const Handle>, count: Out<usize>) |machine| {
        state::context_device(machine)?;
        describe_capture(machine, stream, &CaptureOutputs { status, id, graph, dependencies, edges: Out::none(), count })
    }
    fn cuStreamGetCaptureInfo_v3(stream: Handle, status: Out<c_int>, id: Out<c_ulonglong>, graph: Out<Handle>, dependencies: Out<*const Handle>, edges: Out<Handle>, count: Out<usize>) |machine| {
        state::context_device(machine)?;
        describe_capture(machine, stream, &CaptureOutputs { status, id, graph, dependencies, edges, count })
    }
    fn cuThreadExchangeStreamCaptureMode(mode: Out<c_int>) |machine| { exchange_mode(machine, mode) }
    fn cuGraphInstantiateWithFlags(out: Out<Handle>, graph: Handle, _flags: c_ulonglong) |machine| {
        out.required()?.set(machine.graph_instantiate(GraphId(graph as u64))?.0 as Handle)
    }
    fn cuGraphLaunch(exec: Handle, stream: Handle) |machine| { machine.graph_launch(ExecId(exec as u64), stream_of(machine, stream)?) }
    fn cuGraphCreate(out: Out<Handle>, _flags: c_uint) |machine| { out.required()?.set(machine.graph_create()?.0 as Handle) }
    fn cuGraphDestroy(graph: Handle) |machine| { machine.graph_destroy(GraphId(graph as u64)) }
    fn cuGraphExecDestroy(exec: Handle) |machine| { machine.exec_destroy(ExecId(exec as u64)) }

    fn cuEventCreate(out: Out<Handle>, flags: c_uint) |machine| { create_event(machine, out, state::context_device(machine)?, flags) }
    fn cuEventDestroy_v2(event: Handle) |machine| { machine.event_destroy(EventId(event as u64)) }
    fn cuEventRecord(event: Handle, stream: Handle) |machine| { machine.event_record(EventId(event as u64), stream_of(machine, stream)?) }
    fn cuEventRecordWithFlags(event: Handle, stream: Handle, _flags: c_uint) |machine| {
        machine.event_record(EventId(event as u64), stream_of(machine, stream)?)
    }
    fn cuEventQuery(event: Handle) |machine| { query_event(machine, event) }
    fn cuEventSynchronize(event: Handle) |machine| { machine.event_synchronize(EventId(event as u64)) }
    fn cuEventElapsedTime(milliseconds: Out<c_float>, start: Handle, end: Handle) |machine| {
        milliseconds.set(machine.event_elapsed(EventId(start as u64), EventId(end as u64))?)
    }
    fn cuEventElapsedTime_v2(milliseconds: Out<c_float>, start: Handle, end: Handle) |machine| {
        milliseconds.set(machine.event_elapsed(EventId(start as u64), EventId(end as u64))?)
    }
}
