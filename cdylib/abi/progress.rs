//! Resumes that go on in the background, and what is known about them meanwhile.

use super::transition::{Place, ResumeWish, narrowed, selection, sire_report, sire_resume_options};
use crate::allocate;
use crate::boundary::{self, call, invalid};
use crate::capture;
use crate::log;
use crate::process;
use crate::region;
use crate::status::sire_status;
use sire_core::driver::{Addr, ProgramStream};
use sire_core::engine::ResumeOptions;
use sire_core::error::{Error, Result, Status};
use sire_core::progress::Progress;
use std::ffi::{c_char, c_void};
use std::sync::{Arc, Once};
use std::time::{Duration, Instant};

/// A resume that goes on in the background. Every function that takes one may be called from any thread.
#[derive(Debug)]
pub struct sire_progress(Arc<Progress>);

/// How long the end of the process waits for a resume in the background to stop.
const FAREWELL: Duration = Duration::from_secs(2);

/// The driver goes away with the process: what is still under way is stopped before.
extern "C" fn at_exit() {
    if let Some(process) = process::started() {
        process.engine.quiesce(Instant::now() + FAREWELL);
    }
}

/// # Safety
/// `progress` is NULL or came from `sire_resume_start` and was not closed yet.
unsafe fn known<'a>(progress: *const sire_progress) -> Result<&'a Progress> {
    // SAFETY: the caller's promise.
    let found = unsafe { progress.as_ref() };
    found.map(|progress| &*progress.0).ok_or_else(|| invalid("the progress is NULL"))
}

/// Starts to resume the tag and what is under it (NULL: everything), and returns. What can be refused at once is; everything else
/// `*out_progress` tells, which must be closed. Memory can be used as soon as it is ready; nothing is before all of it has been
/// taken from the driver. Until the resume is over nobody can enter its regions. If it fails, they are paused, what was ready stays until the next
/// pause or resume, and the call can be repeated. `sire_cancel` does not concern it.
///
/// # Safety
/// `tag` is NULL or NUL-terminated; `options` is NULL or a sized struct; `out_progress` is writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_resume_start(
    tag: *const c_char,
    options: *const sire_resume_options,
    out_progress: *mut *mut sire_progress,
) -> sire_status {
    call(|| {
        if out_progress.is_null() {
            return Err(invalid("out_progress is NULL: nobody would know when the memory can be used"));
        }
        // SAFETY: the caller's promises.
        let (selection, wish) = unsafe { (selection(tag)?, ResumeWish::of(options)?) };
        let (selection, ResumeWish { wait, order, .. }) = (narrowed(selection, wish.alone)?, wish);
        let options = ResumeOptions { wait, capturing: capture::in_progress(), order: order.as_deref() };
        region::refuse_blind_process_region()?;
        let engine = &process::get()?.engine;
        let progress = engine.resume_start(&selection, options)?;
        static EXIT: Once = Once::new();
        EXIT.call_once(|| {
            // SAFETY: the handler is a plain function of this library, which is linked to stay loaded for good.
            if unsafe { libc::atexit(at_exit) } != 0 {
                log::warning!("no exit handler could be registered; wait for resumes before the process ends");
            }
        });
        // SAFETY: the caller's promise. `sire_progress_close` takes the box back.
        unsafe { boundary::put(out_progress, Box::into_raw(Box::new(sire_progress(progress)))) };
        Ok(())
    })
}

/// Whether these bytes can be used now. Memory that the resume does not concern counts as ready. Never blocks.
///
/// # Safety
/// `progress` is open; `out_ready` is NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_progress_ready(
    progress: *const sire_progress,
    ptr: *const c_void,
    bytes: usize,
    out_ready: *mut bool,
) -> sire_status {
    call(|| {
        // SAFETY: the caller's promise.
        let ready = unsafe { known(progress) }?.ready(allocate::address(ptr), bytes as u64);
        // SAFETY: the caller's promise.
        unsafe { boundary::put(out_ready, ready) };
        Ok(())
    })
}

/// Waits until these bytes can be used, or, with `ptr` NULL, until the resume is over; at most `timeout_seconds` (INFINITY: for as long as it
/// takes). `*out_ready`: whether it came to that. Fails as the resume did, if it ended before.
///
/// # Safety
/// `progress` is open, also while others wait; `out_ready` is NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_progress_wait(
    progress: *const sire_progress,
    ptr: *const c_void,
    bytes: usize,
    timeout_seconds: f64,
    out_ready: *mut bool,
) -> sire_status {
    call(|| {
        // SAFETY: the caller's promise.
        let progress = unsafe { known(progress) }?;
        let deadline = deadline(timeout_seconds)?;
        let ready = if ptr.is_null() {
            progress.finished(deadline)?.is_some()
        } else {
            progress.wait(allocate::address(ptr), bytes as u64, deadline)?
        };
        // SAFETY: the caller's promise.
        unsafe { boundary::put(out_ready, ready) };
        Ok(())
    })
}

/// Has `stream` of `device` wait for these bytes, or, with `ptr` NULL, for all that the resume brings back: what is put there from now on finds them. The
/// caller waits only until the copies that bring them are queued, at most `timeout_seconds` (as in `sire_progress_wait`); `*out_queued`: whether it came to
/// that. For a stream that captures a graph the caller waits until the bytes have arrived. Fails as the resume did, if it ended before.
///
/// # Safety
/// `progress` is open, also while others wait; `stream` is a stream of the device, which nobody destroys meanwhile; `out_queued` is NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_progress_wait_stream(
    progress: *const sire_progress,
    ptr: *const c_void,
    bytes: usize,
    device: i32,
    stream: *mut c_void,
    timeout_seconds: f64,
    out_queued: *mut bool,
) -> sire_status {
    call(|| {
        // SAFETY: the caller's promise.
        let progress = unsafe { known(progress) }?;
        let stream = (allocate::device(device)?, ProgramStream(stream as u64));
        let range = if ptr.is_null() { (Addr(0), u64::MAX) } else { (allocate::address(ptr), bytes as u64) };
        let queued = progress.wait_on(range, stream, deadline(timeout_seconds)?)?;
        // SAFETY: the caller's promise.
        unsafe { boundary::put(out_queued, queued) };
        Ok(())
    })
}

/// None: never.
fn deadline(seconds: f64) -> Result<Option<Instant>> {
    if seconds.is_nan() || seconds < 0.0 {
        return Err(invalid(format!("timeout_seconds is {seconds}; it must be 0 or more")));
    }
    Ok(Duration::try_from_secs_f64(seconds).ok().and_then(|timeout| Instant::now().checked_add(timeout)))
}

/// What the resume did; `SIRE_STATUS_BUSY` while it is not over, and its own failure if it failed.
///
/// # Safety
/// `progress` is open; `out` is NULL or a sized struct.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_progress_report(progress: *const sire_progress, out: *mut sire_report) -> sire_status {
    call(|| {
        // SAFETY: the caller's promises.
        let (progress, place) = unsafe { (known(progress)?, Place::at(out)?) };
        let report = progress.finished(Some(Instant::now()))?;
        let report = report.ok_or_else(|| Error::new(Status::Busy, "the resume is not over; wait for it"))?;
        // SAFETY: the caller's promise.
        unsafe { place.put(&report) };
        Ok(())
    })
}

/// Bytes of device memory that can be used already, and that the resume brings back altogether.
///
/// # Safety
/// `progress` is open; the outputs are NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_progress_bytes(
    progress: *const sire_progress,
    out_ready: *mut u64,
    out_total: *mut u64,
) -> sire_status {
    call(|| {
        // SAFETY: the caller's promise.
        let (ready, total) = unsafe { known(progress) }?.bytes();
        // SAFETY: the caller's promise.
        unsafe {
            boundary::put(out_ready, ready);
            boundary::put(out_total, total);
        }
        Ok(())
    })
}

/// Makes the resume stop at the next chunk. What is ready stays; its regions end paused, unless everything was ready.
///
/// # Safety
/// `progress` is open.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_progress_cancel(progress: *const sire_progress) -> sire_status {
    call(|| {
        // SAFETY: the caller's promise.
        unsafe { known(progress) }?.cancel();
        Ok(())
    })
}

/// Nobody asks any more; the resume goes on. NULL is nothing to do.
///
/// # Safety
/// `progress` is NULL or open, and no other thread is using it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_progress_close(progress: *mut sire_progress) -> sire_status {
    call(|| {
        if !progress.is_null() {
            // SAFETY: the caller's promise: a box that `sire_resume_start` leaked, taken back once.
            drop(unsafe { Box::from_raw(progress) });
        }
        Ok(())
    })
}
