//! What concerns the whole process: peers, limits, statistics, captures, whether the hook is live.

use crate::allocate;
use crate::boundary::{self, call, invalid};
use crate::capture;
use crate::interpose::{forwarded, lookup, peer, probe};
use crate::log;
use crate::preempt;
use crate::process;
use crate::slices;
use crate::status::sire_status;
use serde_json::{Map, Value, json};
use sire_core::error::{Error, Result, Status};
use std::ffi::{c_char, c_int};
use std::path::PathBuf;
use std::sync::atomic::Ordering;

/// Gives `peer` access to present and future memory on `device`, whatever the program takes back by CUDA's own calls.
#[unsafe(no_mangle)]
pub extern "C" fn sire_allow_peer(device: i32, peer: i32) -> sire_status {
    call(|| {
        let (device, peer) = (allocate::device(device)?, allocate::device(peer)?);
        process::get()?.engine.allow_peer(device, peer)?;
        peer::note_said(device.0, peer.0);
        Ok(())
    })
}

/// Bytes of device memory that allocations and resumes leave free.
#[unsafe(no_mangle)]
pub extern "C" fn sire_set_margin(bytes: usize) -> sire_status {
    call(|| set_margin(bytes as u64))
}

/// Where disk backups go from now on.
///
/// # Safety
/// `path` is NULL or NUL-terminated.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_set_disk_directory(path: *const c_char) -> sire_status {
    // SAFETY: the caller's promise.
    call(|| set_disk_directory(unsafe { boundary::string("the directory", path) }?))
}

pub(crate) fn set_margin(bytes: u64) -> Result<()> {
    process::get()?.engine.configure(&|config| config.margin = bytes);
    Ok(())
}

pub(crate) fn set_disk_directory(path: &str) -> Result<()> {
    if path.is_empty() {
        return Err(invalid("the directory is an empty string"));
    }
    process::get()?.engine.configure(&|config| config.disk_dir = Some(PathBuf::from(path)));
    Ok(())
}

/// Gives back what is only cached. Outputs: bytes of device and of host memory. Refused during a capture.
///
/// # Safety
/// Both outputs are NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_trim(out_device_bytes: *mut usize, out_host_bytes: *mut usize) -> sire_status {
    call(|| {
        let process = process::get()?;
        if capture::in_progress() {
            let why =
                "cannot trim while a CUDA graph is being captured: it would wait for the device; end the capture first";
            return Err(Error::new(Status::Capturing, why));
        }
        let (device, host) = process.engine.trim();
        // SAFETY: the caller's promise.
        unsafe {
            boundary::put(out_device_bytes, device as usize);
            boundary::put(out_host_bytes, host as usize);
        }
        Ok(())
    })
}

/// Whether a `cudaMalloc` of this process reaches this library (1) or not (0).
///
/// # Safety
/// `out_live` is NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_hook_probe(out_live: *mut i32) -> sire_status {
    call(|| {
        // SAFETY: the caller's promise.
        unsafe { boundary::put(out_live, c_int::from(probe::live())) };
        Ok(())
    })
}

/// Whether look-ups of the driver's functions in this process reach this library (1) or not (0): `libsire_driver.so` is preloaded.
///
/// # Safety
/// `out_live` is NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_driver_hook_probe(out_live: *mut i32) -> sire_status {
    call(|| {
        // SAFETY: the caller's promise.
        unsafe { boundary::put(out_live, c_int::from(lookup::live())) };
        Ok(())
    })
}

/// Everything observable, as JSON (docs/abi.md shows it). A text output: call with `cap` 0 to measure.
///
/// # Safety
/// `buf` is NULL or has room for `cap` bytes; `out_len` is NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_stats_json(buf: *mut c_char, cap: usize, out_len: *mut usize) -> sire_status {
    call(|| {
        let process = match process::get() {
            Ok(process) => Some(process),
            // Nothing to count is an answer, not a failure.
            Err(error) if error.status == Status::NoDriver => None,
            Err(error) => return Err(error),
        };
        let text = statistics(process)?.to_string();
        // SAFETY: the caller's promises.
        unsafe { boundary::put_whole_text(&text, buf, cap, out_len) };
        Ok(())
    })
}

/// The engine's statistics, and what only this library knows: versions, the hook, forwarded calls.
pub(crate) fn statistics(process: Option<&process::Process>) -> Result<Value> {
    let mut stats = match process {
        Some(process) => serde_json::from_str::<Map<String, Value>>(&process.engine.stats_json())
            .map_err(|error| Error::new(Status::Internal, format!("the engine's statistics are not JSON: {error}")))?,
        None => Map::new(),
    };
    stats.insert("version".to_owned(), json!(env!("CARGO_PKG_VERSION")));
    stats.insert("driver".to_owned(), json!(process.map(|process| process.driver.description())));
    stats.insert("hook_live".to_owned(), json!(probe::live()));
    stats.insert("driver_hooks".to_owned(), driver_hooks());
    stats.insert("time_slice".to_owned(), slices::figures());
    stats.insert("reclaimable".to_owned(), preempt::described());
    for list in ["devices", "regions", "tiers"] {
        stats.entry(list).or_insert_with(|| json!([]));
    }
    let counters = stats.entry("counters").or_insert_with(|| json!({"allocate": 0, "free": 0}));
    if let Some(counters) = counters.as_object_mut() {
        let forwarded = &forwarded::RUNTIME;
        counters.insert("forwarded_allocate".to_owned(), json!(forwarded.allocate.count()));
        counters.insert("forwarded_free".to_owned(), json!(forwarded.free.count()));
        counters.insert("driver_calls".to_owned(), json!(process.map_or(0, |process| process.driver.calls())));
    }
    Ok(Value::Object(stats))
}

/// Whether driver-level hooks are live, the look-ups that they answered, and the calls that they passed through.
fn driver_hooks() -> Value {
    let forwarded = &forwarded::DRIVER;
    json!({
        "live": lookup::live(),
        "answered": lookup::ANSWERED.load(Ordering::Relaxed),
        "allocate": forwarded.allocate.count(),
        "free": forwarded.free.count(),
        "managed": forwarded.managed.count(),
        "pitch": forwarded.pitch.count(),
        "pool": forwarded.pool.count(),
    })
}

/// A stream capture begins that no hook sees. Until `sire_capture_end` Sire never synchronises.
#[unsafe(no_mangle)]
pub extern "C" fn sire_capture_begin() -> sire_status {
    capture::begin();
    log::debug!("a capture begins");
    sire_status::Ok
}

/// The capture is over.
#[unsafe(no_mangle)]
pub extern "C" fn sire_capture_end() -> sire_status {
    call(|| if capture::end() { Ok(()) } else { Err(invalid("no capture is in progress")) })
}
