//! The real driver answers the questions of `sire_sim::conformance`, on whatever libcuda there is: NVIDIA's, or the software
//! device's (`SIRE_LIBCUDA=target/debug/libsire_sim_cuda.so cargo test -p sire-cuda`). Without one the test says so and passes,
//! unless `SIRE_LIBCUDA` named it.
#![allow(clippy::unwrap_used, clippy::panic)]

use sire_core::digest::Digest;
use sire_core::driver::{Addr, Device, Driver, DriverErrorKind};
use sire_cuda::{CudaDriver, Options};
use sire_sim::conformance;
use std::path::PathBuf;
use std::process::Command;

/// Names the one losing question that a child process is to ask.
const LOSING: &str = "SIRE_CONFORMANCE_LOSING";

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

/// What `is_capturing`, `description` and `calls` add to the bargain.
#[test]
fn facts_about_the_driver() {
    if std::env::var_os(LOSING).is_some() {
        return;
    }
    let Some(driver) = open() else { return };
    assert!(driver.description().starts_with("CUDA "));
    let before = driver.calls();
    driver.memory_info(Device(0)).unwrap();
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
