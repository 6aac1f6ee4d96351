//! Graphs: capture, replay, spreading by events, and what CUDA prohibits meanwhile.

use sire_sim::{CaptureMode, CaptureStatus, Code, CopyKind, Machine, NodeKind, Options, Pattern, StreamId};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

type Outcome = Result<(), Box<dyn std::error::Error>>;

fn setup() -> Result<(Machine, StreamId), sire_sim::SimError> {
    let machine = Machine::new(Options::tiny(1 << 20))?;
    let stream = machine.stream_create(0, true, 0)?;
    Ok((machine, stream))
}

fn code<T>(result: Result<T, sire_sim::SimError>) -> i32 {
    result.map_or_else(|error| error.code.0, |_| 0)
}

fn read(machine: &Machine, ptr: u64) -> Result<u8, sire_sim::SimError> {
    let mut out = [0u8; 1];
    // SAFETY: `out` is valid during the call, which waits.
    unsafe { machine.memcpy(0, out.as_mut_ptr() as u64, ptr, 1, CopyKind::DeviceToHost) }?;
    Ok(out[0])
}

#[test]
fn captured_work_runs_at_replay_only() -> Outcome {
    let (machine, stream) = setup()?;
    let (a, b) = (machine.malloc(0, 64)?, machine.malloc(0, 64)?);
    machine.memset(0, a, Pattern::U8(1), 64)?;
    machine.memset(0, b, Pattern::U8(2), 64)?;
    let count = Arc::new(AtomicU64::new(0));
    let (host, kernel) = (count.clone(), count.clone());
    machine.capture_begin(stream, CaptureMode::Global)?;
    assert_eq!(machine.capture_info(stream)?.status, CaptureStatus::Active);
    // SAFETY: device addresses only.
    unsafe { machine.memcpy_async(b, a, 64, CopyKind::DeviceToDevice, stream) }?;
    machine.memset_async(a, Pattern::U8(9), 64, stream)?;
    machine.launch_host(
        stream,
        Arc::new(move || {
            host.fetch_add(1, Ordering::SeqCst);
        }),
    )?;
    machine.launch(
        stream,
        "k",
        Arc::new(move |_| {
            kernel.fetch_add(10, Ordering::SeqCst);
            Ok(())
        }),
    )?;
    let graph = machine.capture_end(stream)?;
    assert_eq!((read(&machine, a)?, read(&machine, b)?, count.load(Ordering::SeqCst)), (1, 2, 0));
    let nodes = machine.graph_nodes(graph)?;
    let kinds: Vec<_> = nodes.iter().map(|node| machine.node_kind(*node)).collect::<Result<_, _>>()?;
    assert_eq!(kinds, [NodeKind::Memcpy, NodeKind::Memset, NodeKind::Host, NodeKind::Kernel]);
    assert_eq!(machine.graph_edges(graph)?, [(nodes[0], nodes[1]), (nodes[1], nodes[2]), (nodes[2], nodes[3])]);
    let exec = machine.graph_instantiate(graph)?;
    machine.graph_destroy(graph)?;
    machine.graph_launch(exec, stream)?;
    machine.stream_synchronize(stream)?;
    assert_eq!((read(&machine, a)?, read(&machine, b)?, count.load(Ordering::SeqCst)), (9, 1, 11));
    machine.memset(0, a, Pattern::U8(5), 64)?;
    machine.graph_launch(exec, stream)?;
    machine.graph_launch(exec, stream)?;
    machine.exec_destroy(exec)?;
    machine.stream_synchronize(stream)?;
    assert_eq!((read(&machine, b)?, count.load(Ordering::SeqCst)), (9, 33));
    assert_eq!(code(machine.graph_launch(exec, stream)), Code::INVALID_VALUE.0);
    Ok(())
}

#[test]
fn replay_over_unmapped_memory_loses_the_device() -> Outcome {
    let (machine, stream) = setup()?;
    let ptr = machine.malloc(0, 4096)?;
    machine.capture_begin(stream, CaptureMode::Global)?;
    machine.memset_async(ptr, Pattern::U8(1), 4096, stream)?;
    let exec = machine.graph_instantiate(machine.capture_end(stream)?)?;
    machine.free(ptr)?;
    machine.graph_launch(exec, stream)?;
    assert_eq!(code(machine.stream_synchronize(stream)), Code::ILLEGAL_ADDRESS.0);
    Ok(())
}

/// Forks a capture on `stream` to `side`, with a node on each.
fn fork(machine: &Machine, stream: StreamId, side: StreamId, ptr: u64) -> Outcome {
    let event = machine.event_create(0, false)?;
    machine.capture_begin(stream, CaptureMode::Global)?;
    machine.memset_async(ptr, Pattern::U8(1), 1, stream)?;
    machine.event_record(event, stream)?;
    machine.stream_wait_event(side, event)?;
    assert_eq!(machine.capture_info(side)?.id, machine.capture_info(stream)?.id);
    machine.memset_async(ptr, Pattern::U8(2), 1, side)?;
    Ok(())
}

#[test]
fn a_capture_spreads_by_events_and_must_be_joined() -> Outcome {
    let (machine, stream) = setup()?;
    let side = machine.stream_create(0, true, 0)?;
    let ptr = machine.malloc(0, 64)?;
    fork(&machine, stream, side, ptr)?;
    let join = machine.event_create(0, false)?;
    machine.event_record(join, side)?;
    machine.stream_wait_event(stream, join)?;
    let graph = machine.capture_end(stream)?;
    assert_eq!(machine.graph_nodes(graph)?.len(), 2);
    assert_eq!(machine.capture_info(side)?.status, CaptureStatus::None, "the end frees all streams");
    let exec = machine.graph_instantiate(graph)?;
    machine.graph_launch(exec, stream)?;
    assert_eq!(read(&machine, ptr)?, 2);

    fork(&machine, stream, side, ptr)?;
    assert_eq!(code(machine.capture_end(stream)), Code::CAPTURE_UNJOINED.0);
    assert_eq!(machine.capture_info(stream)?.status, CaptureStatus::None);

    fork(&machine, stream, side, ptr)?;
    assert_eq!(code(machine.capture_end(side)), Code::CAPTURE_UNMATCHED.0);
    assert_eq!(code(machine.capture_end(stream)), Code::CAPTURE_INVALIDATED.0);
    Ok(())
}

/// What is refused with which code during a capture of `stream`; each time the capture must be spoilt.
#[test]
fn prohibited_calls_are_refused_and_spoil_the_capture() -> Outcome {
    type Call = fn(&Machine, StreamId) -> Result<(), sire_sim::SimError>;
    let unsupported = Code::CAPTURE_UNSUPPORTED.0;
    let calls: [(&str, i32, Call); 9] = [
        ("stream synchronize", unsupported, |machine, stream| machine.stream_synchronize(stream)),
        ("stream query", unsupported, |machine, stream| machine.stream_query(stream).map(drop)),
        ("device synchronize", unsupported, |machine, _| machine.device_synchronize(0)),
        ("malloc", unsupported, |machine, _| machine.malloc(0, 64).map(drop)),
        ("free", unsupported, |machine, _| machine.free(0)),
        ("host alloc", unsupported, |machine, _| machine.host_alloc(0, 64, 0).map(drop)),
        ("legacy work", Code::CAPTURE_IMPLICIT.0, |machine, _| {
            machine.launch_host(machine.legacy_stream(0)?, Arc::new(|| ()))
        }),
        ("legacy synchronize", Code::CAPTURE_IMPLICIT.0, |machine, _| {
            machine.stream_synchronize(machine.legacy_stream(0)?)
        }),
        ("outside event", Code::CAPTURE_ISOLATION.0, |machine, stream| {
            let (event, outside) = (machine.event_create(0, false)?, machine.stream_create(0, false, 0)?);
            machine.event_record(event, outside)?;
            machine.stream_wait_event(stream, event)
        }),
    ];
    let (machine, stream) = setup()?;
    for (name, expected, call) in calls {
        machine.capture_begin(stream, CaptureMode::Global)?;
        assert_eq!(code(call(&machine, stream)), expected, "{name}");
        assert_eq!(machine.capture_info(stream)?.status, CaptureStatus::Invalidated, "{name}");
        assert_eq!(code(machine.launch_host(stream, Arc::new(|| ()))), Code::CAPTURE_INVALIDATED.0, "{name}");
        assert_eq!(code(machine.capture_end(stream)), Code::CAPTURE_INVALIDATED.0, "{name}");
        assert_eq!(code(call(&machine, stream)), 0, "{name} after the capture");
    }
    Ok(())
}

#[test]
fn captured_events_cannot_be_waited_for() -> Outcome {
    let (machine, stream) = setup()?;
    let event = machine.event_create(0, true)?;
    machine.capture_begin(stream, CaptureMode::Relaxed)?;
    machine.event_record(event, stream)?;
    assert_eq!(code(machine.event_query(event)), Code::CAPTURED_EVENT.0);
    assert_eq!(code(machine.capture_end(stream)), Code::CAPTURE_INVALIDATED.0);
    assert_eq!(code(machine.event_synchronize(event)), Code::CAPTURED_EVENT.0);
    machine.event_record(event, stream)?;
    machine.event_synchronize(event)?;
    Ok(())
}

#[test]
fn modes_decide_whose_calls_are_unsafe() -> Outcome {
    let (machine, stream) = setup()?;
    let malloc_elsewhere =
        || std::thread::scope(|scope| scope.spawn(|| code(machine.malloc(0, 64))).join().unwrap_or(-1));
    machine.capture_begin(stream, CaptureMode::Relaxed)?;
    assert_eq!((code(machine.malloc(0, 64)), malloc_elsewhere()), (0, 0));
    machine.capture_end(stream)?;
    machine.capture_begin(stream, CaptureMode::ThreadLocal)?;
    assert_eq!(malloc_elsewhere(), 0);
    machine.capture_end(stream)?;
    machine.capture_begin(stream, CaptureMode::Global)?;
    let old = machine.thread_exchange_mode(CaptureMode::Relaxed);
    assert_eq!(old, CaptureMode::Global);
    assert_eq!(code(machine.malloc(0, 64)), 0, "the thread says that it knows what it does");
    assert_eq!(machine.thread_exchange_mode(old), CaptureMode::Relaxed);
    assert_eq!(malloc_elsewhere(), Code::CAPTURE_UNSUPPORTED.0);
    assert_eq!(code(machine.capture_end(stream)), Code::CAPTURE_INVALIDATED.0);
    Ok(())
}

#[test]
fn captures_begin_and_end_where_they_may() -> Outcome {
    let (machine, stream) = setup()?;
    assert_eq!(
        code(machine.capture_begin(machine.legacy_stream(0)?, CaptureMode::Global)),
        Code::CAPTURE_UNSUPPORTED.0
    );
    assert_eq!(code(machine.capture_end(stream)), Code::ILLEGAL_STATE.0);
    machine.capture_begin(stream, CaptureMode::Global)?;
    assert_eq!(code(machine.capture_begin(stream, CaptureMode::Global)), Code::ILLEGAL_STATE.0);
    let other = std::thread::scope(|scope| scope.spawn(|| code(machine.capture_end(stream))).join().unwrap_or(-1));
    assert_eq!(other, Code::CAPTURE_WRONG_THREAD.0);
    assert_eq!(code(machine.capture_end(stream)), Code::CAPTURE_INVALIDATED.0);
    assert_eq!(code(machine.capture_info(machine.legacy_stream(0)?)), 0);
    machine.capture_begin(stream, CaptureMode::Global)?;
    assert_eq!(code(machine.capture_info(machine.legacy_stream(0)?)), Code::CAPTURE_IMPLICIT.0);
    assert_eq!(machine.capture_info(stream)?.status, CaptureStatus::Active, "asking spoils nothing");
    machine.stream_destroy(stream)?;
    machine.device_synchronize(0)?;
    Ok(())
}

#[test]
fn a_graph_is_captured_again() -> Outcome {
    let (machine, stream) = setup()?;
    let a = machine.malloc(0, 64)?;
    machine.capture_begin(stream, CaptureMode::Global)?;
    machine.memset_async(a, Pattern::U8(1), 64, stream)?;
    let graph = machine.capture_end(stream)?;
    machine.capture_begin_again(stream, graph, CaptureMode::Global)?;
    assert_eq!(machine.capture_info(stream)?.status, CaptureStatus::Active);
    machine.memset_async(a, Pattern::U8(2), 64, stream)?;
    assert_eq!(machine.capture_end(stream)?, graph);
    let exec = machine.graph_instantiate(graph)?;
    machine.graph_launch(exec, stream)?;
    machine.stream_synchronize(stream)?;
    assert_eq!(read(&machine, a)?, 2, "what was captured last");
    machine.capture_begin_again(stream, graph, CaptureMode::Global)?;
    assert_eq!(code(machine.capture_end(stream)), Code::INVALID_VALUE.0, "the node is missing");
    machine.graph_destroy(graph)?;
    assert_eq!(code(machine.capture_begin_again(stream, graph, CaptureMode::Global)), Code::INVALID_VALUE.0);
    assert_eq!(machine.capture_info(stream)?.status, CaptureStatus::None);
    Ok(())
}
