//! The driver's bargain, asked of the software device: with each executor, and through the faulty wrapper.

use sire_core::driver::{Device, Driver, DriverErrorKind};
use sire_sim::{Executor, Faulty, Options, Planned, SimDriver, conformance};

fn driver(options: Options) -> SimDriver {
    SimDriver::new(options).unwrap_or_else(|error| unreachable!("{error}"))
}

fn with(executor: Executor) -> SimDriver {
    driver(Options { executor, ..Options::tiny(1 << 20) })
}

#[test]
fn threads() {
    conformance::suite(|| with(Executor::Threads));
    conformance::losing_suite(|| with(Executor::Threads));
}

#[test]
fn inline() {
    conformance::suite(|| with(Executor::Inline));
    conformance::losing_suite(|| with(Executor::Inline));
}

#[test]
fn deferred() {
    conformance::suite(|| with(Executor::Deferred));
    conformance::losing_suite(|| with(Executor::Deferred));
}

#[test]
fn granularity_of_a_gpu() {
    conformance::suite(|| driver(Options { memory: 64 << 20, ..Options::default() }));
}

#[test]
fn timing_mode() {
    conformance::suite(|| driver(Options { timing: true, ..Options::tiny(1 << 20) }));
}

#[test]
fn slow_device() {
    let delay = std::time::Duration::from_micros(50);
    conformance::suite(|| driver(Options { delay, ..Options::tiny(1 << 20) }));
}

#[test]
fn faulty_without_faults() {
    conformance::suite(|| Faulty::new(with(Executor::Threads)));
    conformance::losing_suite(|| Faulty::new(with(Executor::Threads)));
}

#[test]
fn faulty_fails_what_was_planned_and_nothing_else() -> Result<(), Box<dyn std::error::Error>> {
    let faulty = Faulty::new(with(Executor::Inline));
    faulty.plan([Planned::call(2, DriverErrorKind::OutOfMemory), Planned::verb("reserve", 3, DriverErrorKind::Other)]);
    let seen = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
    let inside = seen.clone();
    faulty.before(4, move || inside.store(4, std::sync::atomic::Ordering::SeqCst));
    let first = faulty.reserve(4096, 0)?;
    assert_eq!(faulty.create(Device(0), 4096).map_err(|error| error.kind), Err(DriverErrorKind::OutOfMemory));
    let physical = faulty.create(Device(0), 4096)?;
    assert_eq!(seen.load(std::sync::atomic::Ordering::SeqCst), 0);
    faulty.map(first, 4096, physical)?;
    assert_eq!(seen.load(std::sync::atomic::Ordering::SeqCst), 4);
    faulty.reserve(4096, 0)?;
    assert_eq!(
        faulty.reserve(4096, 0).map_err(|error| (error.kind, error.verb)),
        Err((DriverErrorKind::Other, "reserve"))
    );
    assert_eq!((faulty.calls(), faulty.fired()), (6, 2));
    assert_eq!(faulty.verbs(), ["reserve", "create", "create", "map", "reserve", "reserve"]);
    faulty.plan([Planned::call(1, DriverErrorKind::Lost)]);
    assert!(faulty.synchronize(Device(0)).is_err());
    assert_eq!(faulty.memory_info(Device(0)).map_err(|error| error.kind), Err(DriverErrorKind::Lost));
    faulty.plan([]);
    faulty.memory_info(Device(0))?;
    Ok(())
}

/// Processor time that the calling thread has used.
fn used() -> std::time::Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a live local of the right type.
    assert_eq!(unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) }, 0);
    std::time::Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[test]
fn making_a_driver_is_cheap() {
    let options = || Options { executor: Executor::Inline, ..Options::tiny(64 << 20) };
    let batch = || {
        let start = used();
        (0..50).for_each(|_| drop(driver(options())));
        (used() - start) / 50
    };
    let best = (0..8).map(|_| batch()).min();
    assert!(best.is_some_and(|each| each < std::time::Duration::from_millis(1)), "{best:?} per driver");
}

#[test]
fn the_fault_plan_reaches_the_driver() -> Result<(), Box<dyn std::error::Error>> {
    let faults = "cuMemCreate#2=error:2; cuMemMap+16k=error:700".to_string();
    let driver = driver(Options { faults, ..Options::tiny(1 << 20) });
    let first = driver.create(Device(0), 8192)?;
    let failed = driver.create(Device(0), 8192).map_err(|error| (error.kind, error.verb, error.code));
    assert_eq!(failed, Err((DriverErrorKind::OutOfMemory, "create", 2)));
    assert_eq!(driver.memory_info(Device(0))?.free, (1 << 20) - 8192, "a planned failure has no effect");
    let addr = driver.reserve(8192, 0)?;
    driver.map(addr, 8192, first)?;
    driver.unmap(addr, 8192)?;
    driver.map(addr, 8192, first)?;
    driver.unmap(addr, 8192)?;
    assert_eq!(driver.map(addr, 8192, first).map_err(|error| error.kind), Err(DriverErrorKind::Lost));
    driver.map(addr, 8192, first)?;
    assert_eq!(driver.machine().call_counts().get("cuMemMap"), Some(&4));
    Ok(())
}

/// The driver's streams and the program's are independent, the legacy default stream included; and asking
/// whether the program captures neither waits nor spoils anything.
#[test]
fn the_programs_streams_are_its_own() -> Result<(), Box<dyn std::error::Error>> {
    use sire_core::driver::{Access, ProgramStream, Rights};
    use sire_sim::{CaptureMode, CaptureStatus};
    let driver = with(Executor::Threads);
    let machine = driver.machine();
    let (open, opened) = std::sync::mpsc::channel::<()>();
    let opened = std::sync::Mutex::new(opened);
    let legacy = machine.legacy_stream(0)?;
    machine.launch_host(legacy, std::sync::Arc::new(move || drop(opened.lock().map(|opened| opened.recv()))))?;
    let addr = driver.reserve(4096, 0)?;
    let physical = driver.create(Device(0), 4096)?;
    driver.map(addr, 4096, physical)?;
    driver.set_access(addr, 4096, &[Access { device: Device(0), rights: Rights::ReadWrite }])?;
    let (stream, event) = (driver.open_stream(Device(0))?, driver.open_event(Device(0))?);
    driver.fill(stream, addr, 4096, 1)?;
    driver.record(event, stream)?;
    driver.wait(event)?; // returns although the legacy stream is held
    assert!(!machine.stream_query(legacy)?);
    drop(open);
    driver.synchronize(Device(0))?;

    let program = machine.stream_create(0, true, 0)?;
    machine.capture_begin(program, CaptureMode::Global)?;
    assert!(driver.is_capturing(Device(0), ProgramStream(program.0))?);
    assert!(driver.is_capturing(Device(0), ProgramStream(0))?, "work on the legacy stream would spoil the capture");
    driver.fill(stream, addr, 4096, 2)?;
    assert_eq!(machine.capture_info(program)?.status, CaptureStatus::Active);
    machine.capture_end(program)?;
    assert!(!driver.is_capturing(Device(0), ProgramStream(program.0))?);
    Ok(())
}
