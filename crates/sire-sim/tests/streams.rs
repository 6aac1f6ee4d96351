//! Streams, events and hazards: what is ordered, what is not, and what a missing wait does.

use sire_sim::{AccessDesc, CaptureMode, Code, Copy2d, CopyKind, Executor, Machine, Options, Pattern, Prot, StreamId};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

type Outcome = Result<(), Box<dyn std::error::Error>>;

fn machine(executor: Executor, delay_us: u64) -> Result<Machine, sire_sim::SimError> {
    let delay = Duration::from_micros(delay_us);
    Machine::new(Options { executor, delay, devices: 2, ..Options::tiny(1 << 20) })
}

fn code<T>(result: Result<T, sire_sim::SimError>) -> i32 {
    result.map_or_else(|error| error.code.0, |_| 0)
}

/// Holds a stream until it is opened: tests need no guesses about time.
struct Gate(std::sync::mpsc::Sender<()>);

impl Gate {
    fn on(machine: &Machine, stream: StreamId) -> Result<Gate, sire_sim::SimError> {
        let (open, opened) = std::sync::mpsc::channel();
        let opened = Mutex::new(opened);
        let wait = move || drop(opened.lock().map(|opened| opened.recv()));
        machine.launch_host(stream, Arc::new(wait)).map(|()| Gate(open))
    }

    fn open(self) {
        drop(self.0);
    }
}

/// Puts a note on a stream.
fn note(machine: &Machine, stream: StreamId, log: &Arc<Mutex<Vec<u32>>>, value: u32) -> Outcome {
    let log = log.clone();
    let host = move || {
        if let Ok(mut log) = log.lock() {
            log.push(value);
        }
    };
    Ok(machine.launch_host(stream, Arc::new(host))?)
}

fn seen(log: &Arc<Mutex<Vec<u32>>>) -> Vec<u32> {
    log.lock().map(|log| log.clone()).unwrap_or_default()
}

#[test]
fn unmapping_without_waiting_loses_the_device() -> Outcome {
    let machine = machine(Executor::Threads, 0)?;
    let (addr, size) = (machine.reserve(8192, 0, 0)?, 8192);
    let physical = machine.create(0, size, 0)?;
    machine.map(addr, size, 0, physical)?;
    machine.set_access(addr, size, &[AccessDesc { device: 0, prot: Prot::ReadWrite }])?;
    let stream = machine.stream_create(0, false, 0)?;
    machine.memset_async(addr, Pattern::U8(1), size, stream)?;
    machine.device_synchronize(0)?;
    let gate = Gate::on(&machine, stream)?;
    machine.memset_async(addr, Pattern::U8(2), size, stream)?;
    machine.unmap(addr, size)?; // the fill still waits for its turn
    gate.open();
    assert_eq!(code(machine.stream_synchronize(stream)), Code::ILLEGAL_ADDRESS.0);
    for verdict in [
        code(machine.malloc(0, 1)),
        code(machine.device_synchronize(0)),
        code(machine.event_create(0, true)),
        code(machine.create(0, size, 0)),
    ] {
        assert_eq!(verdict, Code::ILLEGAL_ADDRESS.0, "the error is sticky");
    }
    assert_eq!(code(machine.device_synchronize(1)), 0);
    machine.revive(0);
    assert_eq!(code(machine.device_synchronize(0)), 0);
    Ok(())
}

/// What CUDA's manual says of `cudaDeviceReset`: all that was allocated, and every stream and event; not what has to be unmapped and released.
#[test]
fn a_reset_ends_what_there_is_on_one_device() -> Outcome {
    let machine = machine(Executor::Threads, 0)?;
    let (addr, physical) = (machine.reserve(4096, 0, 0)?, machine.create(0, 4096, 0)?);
    machine.map(addr, 4096, 0, physical)?;
    machine.set_access(addr, 4096, &[AccessDesc { device: 0, prot: Prot::ReadWrite }])?;
    let free = machine.memory_info(0)?.0;
    let (large, small, pinned) = (machine.malloc(0, 8192)?, machine.malloc(0, 64)?, machine.host_alloc(0, 64, 0)?);
    let (stream, event) = (machine.stream_create(0, true, 0)?, machine.event_create(0, false)?);
    let (elsewhere, other) = (machine.malloc(1, 8192)?, machine.stream_create(1, true, 0)?);
    machine.enable_peer(1, 0)?;
    machine.memset_async(large, Pattern::U8(1), 8192, stream)?;
    let capturing = machine.stream_create(0, true, 0)?;
    machine.capture_begin(capturing, CaptureMode::Relaxed)?;
    machine.lose(0, Code::ILLEGAL_ADDRESS);
    machine.reset(0);
    assert_eq!(machine.memory_info(0)?.0, free, "what was mapped stays, all else goes");
    for ptr in [large, small, pinned] {
        assert!(code(machine.free(ptr)) != 0 && code(machine.host_free(ptr)) != 0);
    }
    assert_eq!(code(machine.stream_query(stream)), Code::INVALID_HANDLE.0);
    assert_eq!(code(machine.event_query(event)), Code::INVALID_HANDLE.0);
    assert_eq!(code(machine.disable_peer(1, 0)), Code::PEER_ACCESS_NOT_ENABLED.0);
    // The device works, and its default stream is another one.
    let again = machine.malloc(0, 8192)?;
    machine.memset_async(again, Pattern::U8(2), 8192, machine.legacy_stream(0)?)?;
    machine.memset_async(addr, Pattern::U8(2), 4096, machine.legacy_stream(0)?)?;
    machine.device_synchronize(0)?;
    // The other device has heard of nothing.
    machine.memset_async(elsewhere, Pattern::U8(3), 8192, other)?;
    machine.stream_synchronize(other)?;
    machine.free(elsewhere)?;
    Ok(())
}

#[test]
fn an_unmap_that_waits_hides_the_hazard() -> Outcome {
    let options = Options { unmap_syncs: true, delay: Duration::from_millis(10), ..Options::tiny(1 << 20) };
    let machine = Machine::new(options)?;
    let addr = machine.reserve(4096, 0, 0)?;
    let physical = machine.create(0, 4096, 0)?;
    machine.map(addr, 4096, 0, physical)?;
    machine.set_access(addr, 4096, &[AccessDesc { device: 0, prot: Prot::ReadWrite }])?;
    let stream = machine.stream_create(0, false, 0)?;
    machine.memset_async(addr, Pattern::U8(2), 4096, stream)?;
    machine.unmap(addr, 4096)?;
    assert_eq!(code(machine.device_synchronize(0)), 0);
    Ok(())
}

#[test]
fn streams_are_independent_and_events_order_them() -> Outcome {
    let machine = machine(Executor::Threads, 0)?;
    let (first, second) = (machine.stream_create(0, false, 0)?, machine.stream_create(1, false, 0)?);
    let log = Arc::new(Mutex::new(Vec::new()));
    let gate = Gate::on(&machine, first)?;
    note(&machine, first, &log, 1)?;
    note(&machine, second, &log, 2)?;
    machine.stream_synchronize(second)?;
    assert_eq!(seen(&log), [2], "streams do not wait for each other");
    assert!(!machine.stream_query(first)?);
    let event = machine.event_create(0, false)?;
    machine.event_record(event, first)?;
    machine.stream_wait_event(second, event)?;
    note(&machine, second, &log, 3)?;
    gate.open();
    machine.stream_synchronize(second)?;
    assert_eq!(seen(&log), [2, 1, 3]);
    assert!(machine.event_query(event)? && machine.stream_query(first)?);
    Ok(())
}

#[test]
fn the_legacy_stream_orders_blocking_streams_only() -> Outcome {
    let machine = machine(Executor::Threads, 0)?;
    let legacy = machine.legacy_stream(0)?;
    let (blocking, free) = (machine.stream_create(0, true, 0)?, machine.stream_create(0, false, 0)?);
    let log = Arc::new(Mutex::new(Vec::new()));
    let gate = Gate::on(&machine, blocking)?;
    note(&machine, blocking, &log, 1)?;
    note(&machine, legacy, &log, 2)?;
    note(&machine, blocking, &log, 3)?;
    note(&machine, free, &log, 4)?;
    machine.stream_synchronize(free)?;
    gate.open();
    machine.device_synchronize(0)?;
    assert_eq!(seen(&log), [4, 1, 2, 3]);
    assert_eq!(machine.resolve_stream(0, 0)?, machine.resolve_stream(0, 1)?);
    assert_ne!(machine.resolve_stream(0, 2)?, legacy, "the per-thread stream is another");
    assert_eq!(machine.resolve_stream(0, 2)?, machine.resolve_stream(0, 2)?);
    Ok(())
}

#[test]
fn pageable_memory_may_be_reused_and_pinned_may_not() -> Outcome {
    let machine = machine(Executor::Threads, 30_000)?;
    let stream = machine.stream_create(0, false, 0)?;
    let (a, b) = (machine.malloc(0, 1000)?, machine.malloc(0, 1000)?);
    let pinned = machine.host_alloc(0, 1000, 0)?;
    let mut pageable = vec![7u8; 1000];
    let gate = Gate::on(&machine, stream)?;
    // SAFETY: pinned memory lives until host_free, and nothing else touches it.
    let pinned_bytes = unsafe { std::slice::from_raw_parts_mut(pinned as *mut u8, 1000) };
    pinned_bytes.fill(7);
    // SAFETY: `pageable` is valid during the call, `pinned` until host_free.
    unsafe {
        machine.memcpy_async(a, pageable.as_ptr() as u64, 1000, CopyKind::HostToDevice, stream)?;
        machine.memcpy_async(b, pinned, 1000, CopyKind::HostToDevice, stream)?;
    }
    pageable.fill(9);
    pinned_bytes.fill(9);
    gate.open();
    let start = Instant::now();
    // SAFETY: `pageable` is valid during the call, which waits because it is pageable.
    unsafe { machine.memcpy_async(pageable.as_mut_ptr() as u64, a, 1000, CopyKind::DeviceToHost, stream) }?;
    assert_eq!(pageable, [7; 1000], "staged at submission, and there on return");
    assert!(start.elapsed() >= Duration::from_millis(30), "a pageable copy to the host waits");
    // SAFETY: `pinned` lives until host_free.
    unsafe { machine.memcpy_async(pinned, b, 1000, CopyKind::DeviceToHost, stream) }?;
    machine.stream_synchronize(stream)?;
    assert_eq!(pinned_bytes, [9; 1000], "read when the stream got there");
    machine.host_free(pinned)?;
    Ok(())
}

#[test]
fn copies_know_their_kinds() -> Outcome {
    let machine = machine(Executor::Threads, 0)?;
    let (ptr, host) = (machine.malloc(0, 4096)?, [0u8; 16]);
    let other = machine.malloc(1, 4096)?;
    let at = host.as_ptr() as u64;
    // SAFETY: `host` is valid for 16 bytes; refused copies touch nothing.
    unsafe {
        assert_eq!(code(machine.memcpy(0, at, ptr, 16, CopyKind::HostToDevice)), Code::INVALID_VALUE.0);
        assert_eq!(code(machine.memcpy(0, ptr, at, 16, CopyKind::DeviceToHost)), Code::INVALID_VALUE.0);
        assert_eq!(code(machine.memcpy(0, ptr, at, 16, CopyKind::DeviceToDevice)), Code::INVALID_VALUE.0);
        assert_eq!(code(machine.memcpy(0, ptr, at, 16, CopyKind::Default)), 0);
        assert_eq!(code(machine.memcpy(0, 0, at, 16, CopyKind::HostToDevice)), Code::INVALID_VALUE.0);
        assert_eq!(code(machine.memcpy(0, 0, 0, 0, CopyKind::HostToDevice)), 0);
    }
    machine.memset(0, ptr, Pattern::U16(0x0102), 2048)?;
    let stream = machine.stream_create(1, false, 0)?;
    machine.device_synchronize(0)?;
    machine.memcpy_peer_async(other, 1, ptr, 0, 4096, stream)?;
    machine.stream_synchronize(stream)?;
    let mut out = [0u8; 4];
    // SAFETY: `out` is valid during the call, which waits.
    unsafe { machine.memcpy(1, out.as_mut_ptr() as u64, other + 4092, 4, CopyKind::DeviceToHost) }?;
    assert_eq!(out, [2, 1, 2, 1]);
    assert_eq!(code(machine.memset(0, ptr + 1, Pattern::U32(0), 1)), Code::INVALID_VALUE.0);
    Ok(())
}

#[test]
fn rows_are_copied_and_filled() -> Outcome {
    let machine = machine(Executor::Inline, 0)?;
    let ptr = machine.malloc(0, 4096)?;
    let stream = machine.stream_create(0, true, 0)?;
    machine.memset_async(ptr, Pattern::U8(0), 4096, stream)?;
    machine.memset_2d_async(ptr + 8, 64, Pattern::U32(0x0505_0505), 2, 3, stream)?;
    let mut out = [1u8; 3 * 12];
    let copy =
        Copy2d { dst: out.as_mut_ptr() as u64, dst_pitch: 12, src: ptr + 4, src_pitch: 64, width: 12, height: 3 };
    // SAFETY: the rows fit `out`, which is valid during the call.
    unsafe { machine.memcpy_2d(0, copy, CopyKind::DeviceToHost) }?;
    assert_eq!(out, [[0, 0, 0, 0, 5, 5, 5, 5, 5, 5, 5, 5]; 3].concat().as_slice());
    let narrow = Copy2d { dst_pitch: 8, ..copy };
    // SAFETY: refused.
    assert_eq!(code(unsafe { machine.memcpy_2d(0, narrow, CopyKind::DeviceToHost) }), Code::INVALID_VALUE.0);
    Ok(())
}

#[test]
fn elapsed_time_is_between_the_events() -> Outcome {
    let machine = machine(Executor::Threads, 0)?;
    let stream = machine.stream_create(0, true, 0)?;
    let (start, end) = (machine.event_create(0, true)?, machine.event_create(0, true)?);
    assert_eq!(code(machine.event_elapsed(start, end)), Code::INVALID_HANDLE.0, "never recorded");
    machine.event_record(start, stream)?;
    let gate = Gate::on(&machine, stream)?;
    machine.event_record(end, stream)?;
    assert_eq!(code(machine.event_elapsed(start, end)), Code::NOT_READY.0);
    std::thread::sleep(Duration::from_millis(30));
    gate.open();
    machine.event_synchronize(end)?;
    let millis = machine.event_elapsed(start, end)?;
    assert!((29.0..5_000.0).contains(&millis), "{millis}");
    let silent = machine.event_create(0, false)?;
    machine.event_record(silent, stream)?;
    assert_eq!(code(machine.event_elapsed(start, silent)), Code::INVALID_HANDLE.0, "made without timing");
    Ok(())
}

#[test]
fn deferred_work_waits_for_somebody_who_waits() -> Outcome {
    let machine = machine(Executor::Deferred, 0)?;
    let (first, second) = (machine.stream_create(0, false, 0)?, machine.stream_create(0, false, 0)?);
    let log = Arc::new(Mutex::new(Vec::new()));
    note(&machine, first, &log, 1)?;
    let event = machine.event_create(0, false)?;
    machine.event_record(event, first)?;
    machine.stream_wait_event(second, event)?;
    note(&machine, second, &log, 2)?;
    note(&machine, first, &log, 3)?;
    assert_eq!(seen(&log), [0; 0]);
    machine.stream_synchronize(second)?;
    assert_eq!(seen(&log), [1, 2], "only what was waited for");
    machine.device_synchronize(0)?;
    assert_eq!(seen(&log), [1, 2, 3]);
    Ok(())
}

#[test]
fn a_kernels_error_is_the_devices() -> Outcome {
    let machine = machine(Executor::Threads, 0)?;
    let stream = machine.stream_create(0, false, 0)?;
    let ptr = machine.malloc(0, 64)?;
    let runs = Arc::new(AtomicU64::new(0));
    let counted = runs.clone();
    let kernel = Arc::new(move |context: &sire_sim::OpContext<'_>| {
        counted.fetch_add(1, Ordering::SeqCst);
        context.fill(ptr, Pattern::U32(0x01010101), 16)?;
        context.copy(ptr, ptr + 32, 32)?;
        context.check(ptr, 64, true)
    });
    machine.launch(stream, "good", kernel)?;
    machine.stream_synchronize(stream)?;
    let gate = Gate::on(&machine, stream)?; // a launch after the error would be refused, not dropped
    machine.launch(stream, "bad", Arc::new(move |context| context.check(ptr, 64 << 20, false)))?;
    machine.launch(stream, "never", Arc::new(|_| unreachable!("work after the error")))?;
    gate.open();
    assert_eq!(code(machine.stream_synchronize(stream)), Code::ILLEGAL_ADDRESS.0);
    assert_eq!(runs.load(Ordering::SeqCst), 1);
    assert_eq!(code(machine.launch(stream, "late", Arc::new(|_| Ok(())))), Code::ILLEGAL_ADDRESS.0);
    Ok(())
}

#[test]
fn freeing_waits_for_the_device() -> Outcome {
    let machine = machine(Executor::Threads, 20_000)?;
    let stream = machine.stream_create(0, false, 0)?;
    let ptr = machine.malloc(0, 4096)?;
    machine.memset_async(ptr, Pattern::U8(1), 4096, stream)?;
    machine.free(ptr)?;
    assert_eq!(code(machine.device_synchronize(0)), 0);
    let ptr = machine.malloc_async(0, 4096, stream)?;
    machine.memset_async(ptr, Pattern::U8(1), 4096, stream)?;
    machine.free_async(ptr, stream)?;
    machine.device_synchronize(0)?;
    assert_eq!(machine.memory_info(0)?.0, 1 << 20);
    Ok(())
}

#[test]
fn a_destroyed_streams_work_is_done() -> Outcome {
    let machine = machine(Executor::Threads, 5_000)?;
    let ptr = machine.malloc(0, 4096)?;
    let stream = machine.stream_create(0, false, 0)?;
    machine.memset_async(ptr, Pattern::U8(3), 4096, stream)?;
    machine.stream_destroy(stream)?;
    assert_eq!(code(machine.stream_query(stream)), Code::INVALID_HANDLE.0);
    machine.device_synchronize(0)?;
    let mut out = [0u8; 1];
    // SAFETY: `out` is valid during the call, which waits.
    unsafe { machine.memcpy(0, out.as_mut_ptr() as u64, ptr + 4095, 1, CopyKind::DeviceToHost) }?;
    assert_eq!(out, [3]);
    Ok(())
}
