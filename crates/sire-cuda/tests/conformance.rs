//! The real driver answers the questions of `sire_sim::conformance`, on whatever libcuda there is: NVIDIA's, or the software
//! device's (`SIRE_LIBCUDA=target/debug/libsire_sim_cuda.so cargo test -p sire-cuda`). Without one the test says so and passes,
//! unless `SIRE_LIBCUDA` named it.
#![allow(clippy::unwrap_used, clippy::panic)]

use sire_core::digest::Digest;
use sire_core::driver::{Access, Addr, Device, Driver, DriverErrorKind, Rights, Stream};
use sire_cuda::{CudaDriver, Options};
use sire_sim::conformance;
use std::path::PathBuf;
use std::process::Command;

/// Names the one losing question that a child process is to ask.
const LOSING: &str = "SIRE_CONFORMANCE_LOSING";

const HERE: Device = Device(0);

fn open() -> Option<CudaDriver> {
    let path = std::env::var_os("SIRE_LIBCUDA").map(PathBuf::from);
    let named = path.is_some();
    match CudaDriver::open(&Options { path, exportable: false }, None) {
        Ok(driver) => Some(driver),
        Err(error) if named => panic!("{error}"),
        Err(error) => {
            assert_eq!(error.kind, DriverErrorKind::Unavailable, "{error}");
            eprintln!("not asked: {error}");
            None
        }
    }
}

/// One test, so that nothing else allocates on the device meanwhile.
#[test]
fn the_real_driver_keeps_the_bargain() {
    if let Ok(question) = std::env::var(LOSING) {
        return ask_losing(&question);
    }
    let Some(driver) = open() else { return };
    eprintln!("asking {}", driver.description());
    streams_that_hash_later_need_no_memory(&driver);
    drop(driver);
    conformance::suite(|| open().unwrap());

    // A lost device is lost for the whole process: each of these in its own.
    for question in ["no_access_before_set_access", "unmapped_range_is_lost"] {
        let asked = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "the_real_driver_keeps_the_bargain", "--nocapture"])
            .env(LOSING, question)
            .output()
            .unwrap();
        assert!(asked.status.success(), "{question}: {}", String::from_utf8_lossy(&asked.stderr));
    }
}

fn ask_losing(question: &str) {
    let driver = open().unwrap();
    match question {
        "no_access_before_set_access" => conformance::no_access_before_set_access(&driver),
        "unmapped_range_is_lost" => conformance::unmapped_range_is_lost(&driver),
        other => panic!("{other} is not a question"),
    }
}

/// Once hashing was made ready, on one stream, a pause that hashes on another one allocates nothing: it makes exactly the calls of the first.
fn streams_that_hash_later_need_no_memory(driver: &CudaDriver) {
    let size = driver.granularity(HERE).unwrap();
    let (addr, physical) = (driver.reserve(size, 0).unwrap(), driver.create(HERE, size).unwrap());
    driver.map(addr, size, physical).unwrap();
    driver.set_access(addr, size, &[Access { device: HERE, rights: Rights::ReadWrite }]).unwrap();
    driver.release(physical).unwrap();
    let hash = |stream: Stream, len: u64| {
        let (mut digest, before) = (Digest::default(), driver.calls());
        // SAFETY: there is one page, for whose digest there is room until the device has been waited for.
        let queued = unsafe { driver.hash(stream, addr, len, size, &raw mut digest) };
        let calls = driver.calls() - before;
        driver.synchronize(HERE).unwrap();
        queued.map(|()| calls)
    };
    let streams: Vec<Stream> = (0..8).map(|_| driver.open_stream(HERE).unwrap()).collect();
    match hash(streams[0], 0) {
        Err(error) if error.kind == DriverErrorKind::Unsupported => eprintln!("{error}"),
        ready => {
            assert!(ready.unwrap() > 2);
            let calls: Vec<u64> = streams.iter().map(|&stream| hash(stream, size).unwrap()).collect();
            assert_eq!(calls, [5; 8], "push, clear, launch, copy, pop");
        }
    }
    streams.into_iter().for_each(|stream| driver.close_stream(stream).unwrap());
    driver.unmap(addr, size).unwrap();
    driver.unreserve(addr, size).unwrap();
}

/// What `is_capturing`, `description` and `calls` add to the bargain.
#[test]
fn facts_about_the_driver() {
    if std::env::var_os(LOSING).is_some() {
        return;
    }
    let Some(driver) = open() else { return };
    assert!(driver.description().starts_with("CUDA "));
    let before = driver.calls();
    driver.memory_info(HERE).unwrap();
    assert_eq!(driver.calls() - before, 3, "push, ask, pop");
    let stream = driver.open_stream(Device(0)).unwrap();
    let mut out = [Digest::default()];
    // SAFETY: a refused call reads and writes nothing.
    let refused = unsafe { driver.hash(stream, Addr(8), 16, 16, out.as_mut_ptr()) }.unwrap_err();
    assert!(refused.message.contains("by pages of 16 bytes: both must be multiples of 16"), "{refused}");
    driver.close_stream(stream).unwrap();
}

#[test]
fn a_library_that_is_not_there_is_an_error_with_advice() {
    let options = Options { path: Some(PathBuf::from("/nonexistent/libcuda.so.1")), exportable: false };
    let error = CudaDriver::open(&options, None).unwrap_err();
    assert_eq!(error.kind, DriverErrorKind::Unavailable);
    assert!(error.message.contains("SIRE_LIBCUDA"), "{error}");
}
