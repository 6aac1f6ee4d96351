//! Transitions: pause, pre-copy, resume, cancel.

use crate::boundary::{self, call, invalid, sized_field};
use crate::capture;
use crate::control;
use crate::log;
use crate::preempt;
use crate::process;
use crate::region;
use crate::status::{self, sire_status};
use sire_core::driver::Addr;
use sire_core::engine::{DeadRanges, Engine, PauseOptions, RegionId, Report, ResumeOptions, Selection, SwitchOptions};
use sire_core::error::{Error, Result, Status};
use std::ffi::{c_char, c_void};
use std::fmt;
use std::time::Duration;

/// Settings of a pause. Set `struct_size` to `sizeof(sire_pause_options)`.
#[repr(C)]
#[derive(Debug)]
pub struct sire_pause_options {
    /// `sizeof(sire_pause_options)`.
    pub struct_size: usize,
    /// Who knows which memory of the paused regions holds nothing; NULL: all of it counts.
    pub dead_ranges: sire_dead_ranges,
    /// Passed to `dead_ranges`.
    pub dead_ranges_context: *mut c_void,
    /// When physical memory goes back to the driver. 0: now. 1: when somebody needs it, that is when an allocation or a resume of this process
    /// finds no room, with `sire_trim`, or when the tag is paused again with 0; a resume before that copies nothing and calls no driver. Other
    /// processes cannot have the memory until then.
    pub release: i32,
    /// 1: the caller vouches that no work that a device was given uses the memory any more, which then is not waited for, and what else the
    /// devices do goes on. 0: the devices are waited for.
    pub idle: u64,
    /// 1: only regions of the tag itself are meant. 0: what is under it as well.
    pub alone: u64,
}

/// Memory `[start, start + bytes)`. The one struct without a size of its own: it comes in arrays, and never changes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct sire_range {
    /// The first byte.
    pub start: *const c_void,
    /// How many.
    pub bytes: usize,
}

/// Says which memory of `regions` (`count` of them) holds nothing, such as the free blocks of the program's own allocator: it
/// is neither copied nor restored. Called once by `sire_pause`, in its thread, when the regions are closed and before
/// anything is planned; may free memory of the regions, may not pause or resume. The ranges stay the caller's, and
/// must live until `sire_pause` returns; those outside the regions are ignored. Anything but `SIRE_STATUS_OK` makes the pause
/// fail with that status, and nothing has changed.
pub type sire_dead_ranges = Option<
    unsafe extern "C" fn(
        context: *mut c_void,
        regions: *const u32,
        count: usize,
        out_ranges: *mut *const sire_range,
        out_count: *mut usize,
    ) -> i32,
>;

/// Settings of a resume. Set `struct_size` to `sizeof(sire_resume_options)`.
#[repr(C)]
#[derive(Debug)]
pub struct sire_resume_options {
    /// `sizeof(sire_resume_options)`.
    pub struct_size: usize,
    /// How long to wait for device memory that somebody else still holds, in seconds.
    pub wait_seconds: f64,
    /// Memory in the order in which it is to come back, chunk by chunk; what is not named comes last. NULL: no wish.
    pub order: *const sire_range,
    /// How many.
    pub order_count: usize,
    /// 1: only regions of the tag itself are meant. 0: what is under it as well.
    pub alone: u64,
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
    /// Bytes that the program's own allocator holds free (`dead_ranges`): neither copied nor counted as discarded.
    pub bytes_dead: u64,
    /// Bytes that an earlier pause had backed up and that had not changed: nothing was copied.
    pub bytes_clean: u64,
    /// Bytes that were hashed or compared to find out.
    pub bytes_hashed: u64,
    /// Bytes that repeat one 8-byte pattern and need no room in a backup.
    pub bytes_constant: u64,
    /// Bytes that another backup of this process has already, and that share its room.
    pub bytes_shared: u64,
    /// Physical bytes that changed hands within a switch, without the driver.
    pub bytes_recycled: u64,
    /// Physical bytes that stay until somebody needs them (`sire_pause_options.release`).
    pub bytes_lazy: u64,
    /// Physical bytes that stay because the program has handed them out, or keeps them resident; `held` in the statistics says why.
    pub bytes_held: u64,
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
            bytes_dead: report.bytes_dead,
            bytes_clean: report.bytes_clean,
            bytes_hashed: report.bytes_hashed,
            bytes_constant: report.bytes_constant,
            bytes_shared: report.bytes_shared,
            bytes_recycled: report.bytes_recycled,
            bytes_lazy: report.bytes_lazy,
            bytes_held: report.bytes_held,
        }
    }
}

/// A place for a report: how much of it the caller has room for.
pub(super) struct Place {
    start: *mut sire_report,
    size: usize,
}

impl Place {
    /// # Safety
    /// `start` is NULL or a sized struct.
    pub(super) unsafe fn at(start: *mut sire_report) -> Result<Place> {
        // SAFETY: the caller's promise.
        let size = if start.is_null() { 0 } else { unsafe { boundary::struct_size("sire_report", start) }? };
        Ok(Place { start, size })
    }

    /// # Safety
    /// As for [`Place::at`], still.
    pub(super) unsafe fn put(&self, report: &Report) {
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
pub(super) unsafe fn selection(tag: *const c_char) -> Result<Selection> {
    // SAFETY: the caller's promise.
    let tag = unsafe { boundary::optional_string("the tag", tag) }?;
    Ok(tag.map_or(Selection::All, |tag| Selection::Tag(tag.to_owned())))
}

/// The selection, if `alone` without what is under its tag.
pub(super) fn narrowed(selection: Selection, alone: bool) -> Result<Selection> {
    match selection {
        Selection::Tag(tag) if alone => process::get()?.engine.alone(&tag),
        _ if alone => Err(invalid("alone is 1, but no tag is named whose regions it could mean; name one, or pass 0")),
        all => Ok(all),
    }
}

/// A selection, for a sentence.
struct Named<'a>(&'a Selection);

impl fmt::Display for Named<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Selection::All => f.write_str("everything"),
            Selection::Tag(tag) => write!(f, "{tag:?}"),
            Selection::Exact(regions) => write!(f, "{} regions", regions.len()),
        }
    }
}

/// Runs a transition; what the engine noticed on the way, though nothing failed, goes to the log.
pub(crate) fn carry_out<T>(transition: impl FnOnce(&Engine) -> Result<T>) -> Result<T> {
    let engine = &process::get()?.engine;
    region::refuse_blind_process_region()?;
    let outcome = transition(engine);
    preempt::look_at_loans(engine);
    for notice in engine.take_notices() {
        log::warning!("{notice}");
    }
    outcome
}

/// A caller's `dead_ranges`.
pub(super) struct Asked {
    function: unsafe extern "C" fn(*mut c_void, *const u32, usize, *mut *const sire_range, *mut usize) -> i32,
    context: *mut c_void,
}

// SAFETY: the function is called in the thread that called `sire_pause` with it, and in no other.
unsafe impl Send for Asked {}
// SAFETY: as above; nothing of it changes.
unsafe impl Sync for Asked {}

impl fmt::Debug for Asked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Asked")
    }
}

impl Asked {
    /// A function that the caller vouched for, if there is one.
    pub(super) fn with(function: sire_dead_ranges, context: *mut c_void) -> Option<Asked> {
        function.map(|function| Asked { function, context })
    }

    /// # Safety
    /// `options` is NULL or a sized struct whose function, if there is one, can be called.
    unsafe fn of(options: *const sire_pause_options) -> Result<Option<Asked>> {
        if options.is_null() {
            return Ok(None);
        }
        // SAFETY: the caller's promise.
        let size = unsafe { boundary::struct_size("sire_pause_options", options) }?;
        // SAFETY: `struct_size` bytes are readable.
        unsafe { boundary::refuse_unknown_fields("sire_pause_options", options, size) }?;
        let function = sized_field!(options, size, sire_pause_options, dead_ranges: sire_dead_ranges).flatten();
        let context = sized_field!(options, size, sire_pause_options, dead_ranges_context: *mut c_void);
        Ok(function.map(|function| Asked { function, context: context.unwrap_or(std::ptr::null_mut()) }))
    }
}

/// Whether memory is to stay until somebody needs it.
///
/// # Safety
/// `options` is NULL or a sized struct.
unsafe fn is_lazy(options: *const sire_pause_options) -> Result<bool> {
    if options.is_null() {
        return Ok(false);
    }
    // SAFETY: the caller's promise.
    let size = unsafe { boundary::struct_size("sire_pause_options", options) }?;
    match sized_field!(options, size, sire_pause_options, release: i32).unwrap_or(0) {
        0 => Ok(false),
        1 => Ok(true),
        other => Err(invalid(format!("release is {other}; it must be 0 (now) or 1 (when somebody needs the memory)"))),
    }
}

/// Whether the caller vouches for idle memory, and whether the tag alone is meant.
///
/// # Safety
/// `options` is NULL or a sized struct.
unsafe fn idle_and_alone(options: *const sire_pause_options) -> Result<(bool, bool)> {
    if options.is_null() {
        return Ok((false, false));
    }
    // SAFETY: the caller's promise.
    let size = unsafe { boundary::struct_size("sire_pause_options", options) }?;
    let idle = sized_field!(options, size, sire_pause_options, idle: u64);
    let alone = sized_field!(options, size, sire_pause_options, alone: u64);
    Ok((flag("idle", idle, "devices are waited for", "nothing uses the memory")?, is_alone(alone)?))
}

fn is_alone(value: Option<u64>) -> Result<bool> {
    flag("alone", value, "what is under the tag is meant as well", "the tag's own regions are meant")
}

/// A field that is 0 or 1; 0 where the caller does not know it.
fn flag(name: &str, value: Option<u64>, zero: &str, one: &str) -> Result<bool> {
    match value.unwrap_or(0) {
        0 => Ok(false),
        1 => Ok(true),
        other => Err(invalid(format!("{name} is {other}; it must be 0 ({zero}) or 1 ({one})"))),
    }
}

impl DeadRanges for Asked {
    fn dead_ranges(&self, regions: &[RegionId]) -> Result<Vec<(Addr, u64)>> {
        let numbers: Vec<u32> = regions.iter().map(|region| region.0).collect();
        let (mut ranges, mut count) = (std::ptr::null(), 0);
        // SAFETY: the caller of `sire_pause` vouched for the function; the numbers and outputs live across the call.
        let status =
            unsafe { (self.function)(self.context, numbers.as_ptr(), numbers.len(), &raw mut ranges, &raw mut count) };
        if status != 0 {
            let status = status::engine_status(status).unwrap_or(Status::InvalidArgument);
            return Err(Error::new(status, "the program's dead_ranges function failed, so nothing was paused"));
        }
        // SAFETY: the function's promise: `count` ranges, which live until `sire_pause` returns.
        unsafe { self::ranges("dead_ranges", ranges, count) }
    }
}

/// # Safety
/// `start` is NULL or `count` ranges.
unsafe fn ranges(what: &str, start: *const sire_range, count: usize) -> Result<Vec<(Addr, u64)>> {
    if count == 0 || start.is_null() {
        return Ok(Vec::new());
    }
    if !start.is_aligned() {
        return Err(invalid(format!("{what}: the ranges are at an address that is no multiple of 8")));
    }
    // SAFETY: the caller's promise, and the alignment was looked at.
    let found = unsafe { std::slice::from_raw_parts(start, count) };
    Ok(found.iter().map(|range| (Addr(range.start as u64), range.bytes as u64)).collect())
}

/// Brings automatic backups (`backup` 4) of the tag and what is under it (NULL: everything) from the disk back into host memory, as far as
/// there is room, so that a resume is fast. Changes nothing else. Output: bytes that moved.
///
/// # Safety
/// `tag` is NULL or NUL-terminated; `out_bytes` is NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_promote(tag: *const c_char, out_bytes: *mut usize) -> sire_status {
    call(|| {
        // SAFETY: the caller's promise.
        let selection = unsafe { selection(tag) }?;
        let moved = process::get()?.engine.promote(&selection)?;
        // SAFETY: the caller's promise.
        unsafe { boundary::put(out_bytes, moved as usize) };
        Ok(())
    })
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
        // SAFETY: the caller's promise.
        let asked = unsafe { Asked::of(options) }?;
        let dead = asked.as_ref().map(|asked| asked as &dyn DeadRanges);
        // SAFETY: the caller's promise.
        let (lazy, (idle, alone)) = unsafe { (is_lazy(options)?, idle_and_alone(options)?) };
        let selection = narrowed(selection, alone)?;
        let options = PauseOptions { capturing: capture::in_progress(), dead, lazy, keep_all: false, idle };
        let report = carry_out(|engine| engine.pause(&selection, options))?;
        log::info!(
            "paused {}: {} regions changed, {} bytes given back, {} copied to backups, {} discarded, {} held until somebody needs them",
            Named(&selection),
            report.regions_changed,
            report.bytes_moved,
            report.bytes_copied,
            report.bytes_discarded,
            report.bytes_lazy
        );
        control::note("pause", || format!("{}: {} bytes given back", Named(&selection), report.bytes_moved));
        // SAFETY: the caller's promise.
        unsafe { place.put(&report) };
        Ok(())
    })
}

/// Backs up what the tag and what is under it (NULL: everything) hold, while the program goes on using it: a later pause copies only what has
/// changed since. For regions opened with a `clean` policy; a region that keeps its content without one is refused
/// (`SIRE_STATUS_INVALID_ARGUMENT`), because nothing would tell what has changed. Regions that are paused, and those that keep nothing, are left out.
///
/// Each device is waited for once, before the first copy: all work that it was given before this call is in the backup. What is written
/// afterwards is found by the pause; where the content is declared not to change, the backup made here counts as the first one, and later
/// writes must be told with `sire_changed`. Memory may be allocated and freed meanwhile; a pause that comes meanwhile goes first.
/// `regions_changed` counts the regions that were looked at. If the call fails (no room, cancelled), what was copied before stays.
///
/// # Safety
/// `tag` is NULL or NUL-terminated; `out` is NULL or a sized struct.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_pre_copy(tag: *const c_char, out: *mut sire_report) -> sire_status {
    call(|| {
        // SAFETY: the caller's promises.
        let (selection, place) = unsafe { (selection(tag)?, Place::at(out)?) };
        let report = carry_out(|engine| engine.pre_copy(&selection, capture::in_progress()))?;
        log::info!(
            "pre-copied {}: {} bytes copied to backups, {} had not changed",
            Named(&selection),
            report.bytes_copied,
            report.bytes_clean
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
        let (selection, place, wish) = unsafe { (selection(tag)?, Place::at(out)?, ResumeWish::of(options)?) };
        let (selection, ResumeWish { wait, order, .. }) = (narrowed(selection, wish.alone)?, wish);
        let options = ResumeOptions { wait, capturing: capture::in_progress(), order: order.as_deref() };
        let report = carry_out(|engine| engine.resume(&selection, options))?;
        log::info!(
            "resumed {}: {} regions changed, {} bytes taken, {} copied from backups, {} zeroed",
            Named(&selection),
            report.regions_changed,
            report.bytes_moved,
            report.bytes_copied,
            report.bytes_zeroed
        );
        control::note("resume", || format!("{}: {} bytes taken", Named(&selection), report.bytes_moved));
        // SAFETY: the caller's promise.
        unsafe { place.put(&report) };
        Ok(())
    })
}

/// Pauses one tag and resumes another, in one call: both, or neither. Content travels in both directions at once, and memory goes from the
/// one to the other, so that the device never needs more than it has. `options`: about what is paused; its memory goes now. If the undo of a failure fails too,
/// both are paused (`SIRE_STATUS_PAUSED_AFTER_FAILURE`), and nothing is lost.
///
/// # Safety
/// The tags are NUL-terminated; `options` and the outputs are NULL or sized structs.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_switch(
    pause: *const c_char,
    resume: *const c_char,
    options: *const sire_pause_options,
    out_pause: *mut sire_report,
    out_resume: *mut sire_report,
) -> sire_status {
    call(|| {
        // SAFETY: the caller's promises.
        let (pause, resume, asked, places) = unsafe {
            let tag = |text| boundary::string("the tag", text).map(|tag| Selection::Tag(tag.to_owned()));
            if is_lazy(options)? {
                return Err(invalid("a switch gives memory back now: release must be 0"));
            }
            let (idle, alone) = idle_and_alone(options)?;
            if idle {
                return Err(invalid("a switch waits for the devices: idle must be 0"));
            }
            if alone {
                return Err(invalid("a switch takes along what is under its tags: alone must be 0"));
            }
            (tag(pause)?, tag(resume)?, Asked::of(options)?, (Place::at(out_pause)?, Place::at(out_resume)?))
        };
        let dead = asked.as_ref().map(|asked| asked as &dyn DeadRanges);
        let options = SwitchOptions { capturing: capture::in_progress(), dead };
        let (left, came) = carry_out(|engine| engine.switch(&pause, &resume, options))?;
        log::info!(
            "switched from {} to {}: {} bytes given back, {} taken, {} changed hands",
            Named(&pause),
            Named(&resume),
            left.bytes_moved,
            came.bytes_moved,
            came.bytes_recycled
        );
        // SAFETY: the caller's promises.
        unsafe {
            places.0.put(&left);
            places.1.put(&came);
        }
        Ok(())
    })
}

/// Addresses and lengths.
type Ranges = Vec<(Addr, u64)>;

/// How long to wait, for what first, and whether for the tag alone.
#[derive(Default)]
pub(super) struct ResumeWish {
    pub(super) wait: Duration,
    pub(super) order: Option<Ranges>,
    pub(super) alone: bool,
}

impl ResumeWish {
    /// "For ever", about 30 years, which no clock arithmetic overflows.
    const LONGEST: f64 = 1e9;

    /// # Safety
    /// `options` is NULL or a sized struct, whose `order` is NULL or `order_count` ranges.
    pub(super) unsafe fn of(options: *const sire_resume_options) -> Result<ResumeWish> {
        if options.is_null() {
            return Ok(ResumeWish::default());
        }
        // SAFETY: the caller's promise.
        let size = unsafe { boundary::struct_size("sire_resume_options", options) }?;
        // SAFETY: `struct_size` bytes are readable.
        unsafe { boundary::refuse_unknown_fields("sire_resume_options", options, size) }?;
        let seconds = sized_field!(options, size, sire_resume_options, wait_seconds: f64).unwrap_or(0.0);
        if seconds.is_nan() || seconds < 0.0 {
            return Err(invalid(format!("wait_seconds is {seconds}; it must be 0 or more")));
        }
        let order = sized_field!(options, size, sire_resume_options, order: *const sire_range);
        let count = sized_field!(options, size, sire_resume_options, order_count: usize).unwrap_or(0);
        let alone = is_alone(sized_field!(options, size, sire_resume_options, alone: u64))?;
        // SAFETY: the caller's promise.
        let order = unsafe { ranges("order", order.unwrap_or(std::ptr::null()), count) }?;
        Ok(ResumeWish { wait: Duration::from_secs_f64(seconds.min(Self::LONGEST)), order: Some(order), alone })
    }
}

/// Makes a running pause, resume or pre-copy stop at the next chunk and roll back. Async-signal-safe.
#[unsafe(no_mangle)]
pub extern "C" fn sire_cancel() -> sire_status {
    if let Some(process) = process::started() {
        process.engine.cancel();
    }
    sire_status::Ok
}
