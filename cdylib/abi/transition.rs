//! Transitions: pause, resume, cancel.

use crate::boundary::{self, call, invalid, sized_field};
use crate::capture;
use crate::log;
use crate::process;
use crate::region;
use crate::status::sire_status;
use sire_core::engine::{Engine, PauseOptions, Report, ResumeOptions, Selection};
use sire_core::error::Result;
use std::ffi::c_char;
use std::fmt;
use std::time::Duration;

/// Settings of a pause. Set `struct_size` to `sizeof(sire_pause_options)`.
#[repr(C)]
#[derive(Debug)]
pub struct sire_pause_options {
    /// `sizeof(sire_pause_options)`.
    pub struct_size: usize,
}

/// Settings of a resume. Set `struct_size` to `sizeof(sire_resume_options)`.
#[repr(C)]
#[derive(Debug)]
pub struct sire_resume_options {
    /// `sizeof(sire_resume_options)`.
    pub struct_size: usize,
    /// How long to wait for device memory that somebody else still holds, in seconds.
    pub wait_seconds: f64,
}

/// What a pause or a resume did. Bytes are device bytes, times wall-clock seconds. Set `struct_size` before the call.
#[repr(C)]
#[derive(Debug, Default)]
pub struct sire_report {
    /// `sizeof(sire_report)`.
    pub struct_size: usize,
    /// Regions whose state the call changed.
    pub regions_changed: u32,
    /// Regions that were already in the wanted state.
    pub regions_unchanged: u32,
    /// Allocations in the changed regions.
    pub allocations: u64,
    /// Physical bytes that the changed regions hold when resident.
    pub bytes_expected: u64,
    /// Physical bytes given back to, or taken from, the driver.
    pub bytes_moved: u64,
    /// Bytes copied to or from backups.
    pub bytes_copied: u64,
    /// Bytes whose content was thrown away.
    pub bytes_discarded: u64,
    /// Bytes filled with zeros.
    pub bytes_zeroed: u64,
    /// Finding, checking, reserving room for backups.
    pub seconds_prepare: f64,
    /// Waiting for the devices.
    pub seconds_synchronize: f64,
    /// Copies and virtual-memory calls, overlapped.
    pub seconds_transfer: f64,
    /// The whole call.
    pub seconds_total: f64,
}

impl sire_report {
    fn of(report: &Report, struct_size: usize) -> sire_report {
        sire_report {
            struct_size,
            regions_changed: report.regions_changed,
            regions_unchanged: report.regions_unchanged,
            allocations: report.allocations,
            bytes_expected: report.bytes_expected,
            bytes_moved: report.bytes_moved,
            bytes_copied: report.bytes_copied,
            bytes_discarded: report.bytes_discarded,
            bytes_zeroed: report.bytes_zeroed,
            seconds_prepare: report.seconds_prepare,
            seconds_synchronize: report.seconds_synchronize,
            seconds_transfer: report.seconds_transfer,
            seconds_total: report.seconds_total,
        }
    }
}

/// A place for a report: how much of it the caller has room for.
struct Place {
    start: *mut sire_report,
    size: usize,
}

impl Place {
    /// # Safety
    /// `start` is NULL or a sized struct.
    unsafe fn at(start: *mut sire_report) -> Result<Place> {
        // SAFETY: the caller's promise.
        let size = if start.is_null() { 0 } else { unsafe { boundary::struct_size("sire_report", start) }? };
        Ok(Place { start, size })
    }

    /// # Safety
    /// As for [`Place::at`], still.
    unsafe fn put(&self, report: &Report) {
        if self.start.is_null() {
            return;
        }
        let full = sire_report::of(report, self.size);
        let taken = self.size.min(size_of::<sire_report>());
        // SAFETY: no more than the caller's `struct_size` bytes, from a whole struct of ours.
        unsafe { std::ptr::copy_nonoverlapping((&raw const full).cast::<u8>(), self.start.cast::<u8>(), taken) };
    }
}

/// # Safety
/// `tag` is NULL or a NUL-terminated string.
unsafe fn selection(tag: *const c_char) -> Result<Selection> {
    // SAFETY: the caller's promise.
    let tag = unsafe { boundary::optional_string("the tag", tag) }?;
    Ok(tag.map_or(Selection::All, |tag| Selection::Tag(tag.to_owned())))
}

/// A selection, for a sentence.
struct Named<'a>(&'a Selection);

impl fmt::Display for Named<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Selection::All => f.write_str("everything"),
            Selection::Tag(tag) => write!(f, "{tag:?}"),
        }
    }
}

/// Runs a transition; what the engine noticed on the way, though nothing failed, goes to the log.
fn carry_out(transition: impl FnOnce(&Engine) -> Result<Report>) -> Result<Report> {
    let engine = &process::get()?.engine;
    region::refuse_blind_process_region()?;
    let outcome = transition(engine);
    for notice in engine.take_notices() {
        log::warning!("{notice}");
    }
    outcome
}

/// Pauses the tag and what is under it (NULL: everything): content goes where the regions' policies say, physical memory goes
/// back to the driver, addresses stay. All or nothing. Pausing what is paused changes nothing.
///
/// Whoever pauses everything, or a process-wide region, sees to it that nothing uses the memory meanwhile: no thread of the
/// program submits work on it. Threads inside a region are found and refused; those under a process-wide one are not.
///
/// # Safety
/// `tag` is NULL or NUL-terminated; `options` and `out` are NULL or sized structs.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_pause(
    tag: *const c_char,
    options: *const sire_pause_options,
    out: *mut sire_report,
) -> sire_status {
    call(|| {
        // SAFETY: the caller's promises.
        let (selection, place) = unsafe { (selection(tag)?, Place::at(out)?) };
        if !options.is_null() {
            // SAFETY: the caller's promise.
            let size = unsafe { boundary::struct_size("sire_pause_options", options) }?;
            // SAFETY: `struct_size` bytes are readable.
            unsafe { boundary::refuse_unknown_fields("sire_pause_options", options, size) }?;
        }
        let options = PauseOptions { capturing: capture::in_progress() };
        let report = carry_out(|engine| engine.pause(&selection, options))?;
        log::info!(
            "paused {}: {} regions changed, {} bytes given back, {} copied to backups, {} discarded",
            Named(&selection),
            report.regions_changed,
            report.bytes_moved,
            report.bytes_copied,
            report.bytes_discarded
        );
        // SAFETY: the caller's promise.
        unsafe { place.put(&report) };
        Ok(())
    })
}

/// Resumes the tag and what is under it (NULL: everything): memory and content come back to the same addresses. All or
/// nothing; after a failure every backup is still there, and the call can be repeated.
///
/// # Safety
/// `tag` is NULL or NUL-terminated; `options` and `out` are NULL or sized structs.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_resume(
    tag: *const c_char,
    options: *const sire_resume_options,
    out: *mut sire_report,
) -> sire_status {
    call(|| {
        // SAFETY: the caller's promises.
        let (selection, place, wait) = unsafe { (selection(tag)?, Place::at(out)?, wait(options)?) };
        let options = ResumeOptions { wait, capturing: capture::in_progress() };
        let report = carry_out(|engine| engine.resume(&selection, options))?;
        log::info!(
            "resumed {}: {} regions changed, {} bytes taken, {} copied from backups, {} zeroed",
            Named(&selection),
            report.regions_changed,
            report.bytes_moved,
            report.bytes_copied,
            report.bytes_zeroed
        );
        // SAFETY: the caller's promise.
        unsafe { place.put(&report) };
        Ok(())
    })
}

/// # Safety
/// `options` is NULL or a sized struct.
unsafe fn wait(options: *const sire_resume_options) -> Result<Duration> {
    /// "For ever", about 30 years, which no clock arithmetic overflows.
    const LONGEST: f64 = 1e9;
    if options.is_null() {
        return Ok(Duration::ZERO);
    }
    // SAFETY: the caller's promise.
    let size = unsafe { boundary::struct_size("sire_resume_options", options) }?;
    // SAFETY: `struct_size` bytes are readable.
    unsafe { boundary::refuse_unknown_fields("sire_resume_options", options, size) }?;
    let seconds = sized_field!(options, size, sire_resume_options, wait_seconds: f64).unwrap_or(0.0);
    if seconds.is_nan() || seconds < 0.0 {
        return Err(invalid(format!("wait_seconds is {seconds}; it must be 0 or more")));
    }
    Ok(Duration::from_secs_f64(seconds.min(LONGEST)))
}

/// Makes a running pause or resume stop at the next chunk and roll back. Async-signal-safe.
#[unsafe(no_mangle)]
pub extern "C" fn sire_cancel() -> sire_status {
    if let Some(process) = process::started() {
        process.engine.cancel();
    }
    sire_status::Ok
}
