//! Safe points, and the socket through which other processes ask. docs/control.md says what they may ask.

use super::transition::{Asked, carry_out, sire_dead_ranges};
use crate::boundary::{self, call, invalid, sized_field};
use crate::capture;
use crate::control::{self, Control};
use crate::lock;
use crate::log;
use crate::preempt;
use crate::process::{self, Process};
use crate::status::sire_status;
use serde_json::{Value, json};
use sire_control::board::LONGEST_SHEET;
use sire_control::desk::{Action, Back, Member, Outcome, Part, Undo, is_under};
use sire_control::message::{Code, Refusal};
use sire_core::engine::{DeadRanges, Engine, PauseOptions, RegionId, Report, ResumeOptions, Selection, State};
use sire_core::error::{Error, Result, Status};
use std::cell::RefCell;
use std::ffi::{CString, c_char, c_void};
use std::os::unix::ffi::OsStrExt as _;
use std::sync::Mutex;
use std::time::Duration;

/// Told in the calling thread what happens to a tag (NULL: everything) at its safe point. `what` 0: it is about to be paused; anything but
/// `SIRE_STATUS_OK` refuses that. 1: it was resumed. 2: it was not paused after all.
pub type sire_told = Option<unsafe extern "C" fn(context: *mut c_void, what: i32, tag: *const c_char) -> i32>;

/// Settings of a safe point. Set `struct_size` to `sizeof(sire_safe_point_options)`.
#[repr(C)]
#[derive(Debug)]
pub struct sire_safe_point_options {
    /// `sizeof(sire_safe_point_options)`.
    pub struct_size: usize,
    /// As in `sire_pause_options`.
    pub dead_ranges: sire_dead_ranges,
    /// Passed to `dead_ranges`.
    pub dead_ranges_context: *mut c_void,
    /// Who wants to be told; NULL: nobody.
    pub told: sire_told,
    /// Passed to `told`.
    pub told_context: *mut c_void,
    /// How long the thread may be kept, in seconds; 0: for as long as it takes.
    pub slice_seconds: f64,
}

/// What `sire_safe_point_options` says, as far as it was there.
#[derive(Default)]
struct Wishes {
    dead: Option<Asked>,
    told: sire_told,
    told_context: *mut c_void,
    slice: Duration,
}

const BEFORE_PAUSE: i32 = 0;
const RESUMED: i32 = 1;
const NOT_PAUSED: i32 = 2;

impl Wishes {
    /// # Safety
    /// `options` is NULL or a sized struct whose functions, if there are any, can be called.
    unsafe fn of(options: *const sire_safe_point_options) -> Result<Wishes> {
        if options.is_null() {
            return Ok(Wishes { slice: slice(f64::INFINITY)?, ..Wishes::default() });
        }
        // SAFETY: the caller's promise.
        let size = unsafe { boundary::struct_size("sire_safe_point_options", options) }?;
        // SAFETY: `struct_size` bytes are readable.
        unsafe { boundary::refuse_unknown_fields("sire_safe_point_options", options, size) }?;
        let dead = sized_field!(options, size, sire_safe_point_options, dead_ranges: sire_dead_ranges).flatten();
        let dead_context = sized_field!(options, size, sire_safe_point_options, dead_ranges_context: *mut c_void);
        let told = sized_field!(options, size, sire_safe_point_options, told: sire_told).flatten();
        let told_context = sized_field!(options, size, sire_safe_point_options, told_context: *mut c_void);
        let seconds = sized_field!(options, size, sire_safe_point_options, slice_seconds: f64).unwrap_or(0.0);
        Ok(Wishes {
            dead: Asked::with(dead, dead_context.unwrap_or(std::ptr::null_mut())),
            told,
            told_context: told_context.unwrap_or(std::ptr::null_mut()),
            slice: slice(if seconds == 0.0 { f64::INFINITY } else { seconds })?,
        })
    }

    /// Whether the program has nothing against it.
    fn tell(&self, what: i32, tag: Option<&str>) -> bool {
        let Some(told) = self.told else { return true };
        // A tag without NUL, as all that are asked for.
        let tag = tag.and_then(|tag| CString::new(tag).ok());
        let pointer = tag.as_ref().map_or(std::ptr::null(), |tag| tag.as_ptr());
        // SAFETY: the caller of `sire_safe_point`, `_close` or `_give_up` vouched for the function; the tag lives across the call.
        unsafe { told(self.told_context, what, pointer) == 0 }
    }

    fn tell_resumed(&self, tag: Option<&str>) {
        if !self.tell(RESUMED, tag) {
            control::note("failed", || "a callback of the program's (sire.after_resume) failed".to_owned());
        }
    }
}

/// The calling thread as the desk knows it.
struct Here {
    control: &'static Control,
    member: Member,
}

impl Drop for Here {
    fn drop(&mut self) {
        // In a forked child the desk is the parent's, and its lock may be held by a thread that does not exist here.
        if control::current().is_some_and(|current| std::ptr::eq(current, self.control)) {
            self.control.desk.leave(&self.member);
        }
    }
}

thread_local! {
    static HERE: RefCell<Option<Here>> = const { RefCell::new(None) };
}

/// Opens the control socket of this process, unless it is open (docs/control.md): processes of the same user can list figures, and pause and resume at
/// safe points. A text output: the socket's path.
///
/// # Safety
/// `buf` is NULL or has room for `cap` bytes; `out_len` is NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_control_open(buf: *mut c_char, cap: usize, out_len: *mut usize) -> sire_status {
    call(|| {
        let path = control::open()?;
        let path = path.as_os_str().as_bytes();
        // SAFETY: the caller's promises.
        unsafe {
            boundary::put_text(path, buf, cap);
            boundary::put(out_len, path.len());
        }
        Ok(())
    })
}

/// Closes the control socket. What is paused from outside is resumed, because nobody could do that afterwards; if that fails it stays paused,
/// and the status says why. `told` (NULL: nobody) hears in the calling thread of each tag that was resumed, before threads that wait for it go on.
///
/// # Safety
/// `told` is NULL or can be called with `told_context`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_control_close(told: sire_told, told_context: *mut c_void) -> sire_status {
    call(|| {
        control::close();
        resume_all(&Wishes { told, told_context, ..Wishes::default() })
    })
}

/// Resumes what was paused from outside, without waiting for anybody: for a thread that cannot stay at its safe point any longer. `told` as for
/// `sire_control_close`.
///
/// # Safety
/// `told` is NULL or can be called with `told_context`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_control_give_up(told: sire_told, told_context: *mut c_void) -> sire_status {
    call(|| resume_all(&Wishes { told, told_context, ..Wishes::default() }))
}

fn resume_all(wishes: &Wishes) -> Result<()> {
    let Some(control) = control::current() else { return Ok(()) };
    control.desk.give_up(|back| {
        preempt::bring(back, ResumeOptions::default())?;
        wishes.tell_resumed(back.asked());
        Ok(())
    })
}

/// Tells `told` of each tag that was resumed.
pub(super) fn resumed_teller(told: sire_told, told_context: *mut c_void) -> impl FnMut(Option<&str>) {
    let wishes = Wishes { told, told_context, ..Wishes::default() };
    move |tag| wishes.tell_resumed(tag)
}

/// The calling thread is at a safe point: until this returns it uses no memory of a region. If another process has asked for a pause
/// or a resume, it happens now, in this thread, and a thread that was paused waits here for its resume. Once a thread has called this,
/// pauses from outside wait for it, until it ends or calls `sire_safe_point_leave`. While neither the socket nor time slices were ever opened it does nothing.
///
/// Returns when all is over, or after `slice_seconds`; `*out_held`: whether the program is still paused, so that the thread must call
/// this again at once. `options` NULL: nobody is asked or told, and it returns when all is over.
///
/// # Safety
/// `options` is NULL or a sized struct; `out_held` is NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_safe_point(options: *const sire_safe_point_options, out_held: *mut bool) -> sire_status {
    call(|| {
        // SAFETY: the caller's promise.
        let wishes = unsafe { Wishes::of(options) }?;
        let held = control::current().is_some_and(|control| pass(control, &wishes));
        // SAFETY: the caller's promise.
        unsafe { boundary::put(out_held, held) };
        Ok(())
    })
}

/// Pauses from outside do not wait for the calling thread any more, until it passes a safe point again: it uses no memory of a region meanwhile.
#[unsafe(no_mangle)]
pub extern "C" fn sire_safe_point_leave() -> sire_status {
    call(|| {
        drop(HERE.with(|here| here.borrow_mut().take()));
        Ok(())
    })
}

/// Waits until another process asks for figures that only the program knows, at most `timeout_seconds`; the answer is `sire_control_publish`. For
/// a thread of the program's that does nothing else.
///
/// # Safety
/// `out_asked` is NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_control_wait(timeout_seconds: f64, out_asked: *mut bool) -> sire_status {
    call(|| {
        let longest = slice(timeout_seconds)?.min(Duration::from_secs(3600));
        let control = control::current().ok_or_else(closed)?;
        let asked = control.board.wait(longest);
        // SAFETY: the caller's promise.
        unsafe { boundary::put(out_asked, asked) };
        Ok(())
    })
}

/// What the program says about itself, as JSON: shown under `program` to whoever asks.
///
/// # Safety
/// `json` is NULL or NUL-terminated.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_control_publish(json: *const c_char) -> sire_status {
    call(|| {
        let control = control::current().ok_or_else(closed)?;
        // SAFETY: the caller's promise.
        let text = unsafe { boundary::long_string("the figures", json, LONGEST_SHEET) }?;
        let sheet = serde_json::from_str(text).map_err(|error| invalid(format!("the figures are no JSON: {error}")))?;
        control.publish(sheet);
        Ok(())
    })
}

fn closed() -> Error {
    Error::new(Status::Inactive, "the control socket was never opened; call sire_control_open first")
}

fn slice(seconds: f64) -> Result<Duration> {
    if seconds.is_nan() || seconds < 0.0 {
        return Err(invalid(format!("{seconds} seconds: it must be 0 or more")));
    }
    // "For ever", about 30 years, which no clock arithmetic overflows.
    Ok(Duration::from_secs_f64(seconds.min(1e9)))
}

fn pass(control: &'static Control, wishes: &Wishes) -> bool {
    let member = HERE.with(|here| {
        let mut here = here.borrow_mut();
        if let Some(known) = &*here
            && std::ptr::eq(known.control, control)
        {
            return known.member.clone();
        }
        let member = control.desk.join(&thread_name());
        *here = Some(Here { control, member: member.clone() });
        member
    });
    if let Some(process) = process::started() {
        preempt::look_at_loans(&process.engine);
    }
    control.desk.pass(&member, wishes.slice, &mut |action| carry(action, wishes))
}

fn thread_name() -> String {
    let name = std::fs::read_to_string("/proc/thread-self/comm").unwrap_or_default();
    // SAFETY: no arguments, no memory.
    format!("{} ({})", name.trim_end(), unsafe { libc::gettid() })
}

/// Carries an action out at a safe point of the calling thread.
fn carry(action: &Action, wishes: &Wishes) -> Outcome {
    let outcome = boundary::catch(|| Ok(tried(action, wishes)));
    outcome.unwrap_or_else(|error| Outcome::Failed(control::refusal(&error)))
}

fn tried(action: &Action, wishes: &Wishes) -> Outcome {
    if capture::in_progress() {
        return Outcome::NotNow("a CUDA graph is being captured".to_owned());
    }
    let Some(process) = process::started() else {
        return Outcome::Failed(control::refusal(&Error::new(
            Status::Inactive,
            "the program has not used a device yet",
        )));
    };
    let outcome = match action {
        Action::Pause { tag } => pause(&process.engine, &named(tag.clone()), tag.as_deref(), FROM_OUTSIDE, wishes),
        Action::Resume { tag, wait } => resume(&tag.clone().map_or(Back::Everything, Back::Under), *wait, wishes),
        Action::Undo { back, wait } => resume(back, *wait, wishes),
        Action::Lend { mark, priority, .. } => lend(process, *mark, *priority, wishes),
        Action::Recover { mark, undo } => recover(process, *mark, undo, wishes),
        Action::Yield => pause(&process.engine, &Selection::All, None, FOR_A_TURN, wishes),
        Action::Return { wait } => resume(&Back::Everything, *wait, wishes),
    };
    outcome.unwrap_or_else(|error| match error.status {
        Status::Busy | Status::Capturing => Outcome::NotNow(error.message),
        _ => {
            control::note("failed", || format!("{action}: {error}"));
            Outcome::Failed(control::refusal(&error))
        }
    })
}

/// Why something is paused that the program did not pause itself, and whether content that no policy keeps is kept.
#[derive(Clone, Copy)]
struct Cause {
    why: &'static str,
    keep_all: bool,
}

const FROM_OUTSIDE: Cause = Cause { why: "from outside", keep_all: false };
const FOR_A_NEED: Cause = Cause { why: "for another process's need", keep_all: false };
const FOR_A_TURN: Cause = Cause { why: "for another process's turn", keep_all: true };

fn named(tag: Option<String>) -> Selection {
    tag.map_or(Selection::All, Selection::Tag)
}

/// `tag`: what was asked for, of which the program hears.
fn pause(engine: &Engine, selection: &Selection, tag: Option<&str>, cause: Cause, wishes: &Wishes) -> Result<Outcome> {
    let before = regions(engine);
    if !wishes.tell(BEFORE_PAUSE, tag) {
        wishes.tell(NOT_PAUSED, tag);
        return Err(Error::new(Status::Cancelled, "a callback of the program's (sire.before_pause) refused the pause"));
    }
    let dead = wishes.dead.as_ref().map(|asked| asked as &dyn DeadRanges);
    let paused = carry_out(|engine| {
        engine.pause(selection, PauseOptions { dead, keep_all: cause.keep_all, ..PauseOptions::default() })
    });
    if paused.as_ref().is_err_and(|error| error.status != Status::PausedAfterFailure) {
        wishes.tell(NOT_PAUSED, tag);
    }
    let whom = spoken(tag);
    let report = match paused {
        Err(error) if error.status == Status::PausedAfterFailure => {
            control::note("failed", || format!("{whom} is paused {}, but: {error}", cause.why));
            return Ok(Outcome::Stuck {
                refusal: control::refusal(&error),
                undo: undo(engine, selection, tag, &before),
            });
        }
        paused => paused?,
    };
    control::note("pause", || format!("{whom} {}: {} bytes given back", cause.why, report.bytes_moved));
    Ok(Outcome::Done { undo: undo(engine, selection, tag, &before), report: described(&report) })
}

fn resume(back: &Back, wait: Duration, wishes: &Wishes) -> Result<Outcome> {
    let report = preempt::bring(back, ResumeOptions { wait, capturing: false, order: None })?;
    control::note("resume", || format!("{}: {} bytes taken", spoken(back.asked()), report.bytes_moved));
    wishes.tell_resumed(back.asked());
    Ok(Outcome::Done { undo: Undo::new(), report: described(&report) })
}

/// What a mark means gives way, if its terms allow that now.
fn lend(process: &Process, mark: u64, priority: i32, wishes: &Wishes) -> Result<Outcome> {
    let (tag, regions) = match preempt::take(process, mark, priority) {
        Err(error) if error.status == Status::Unsupported => {
            return Ok(Outcome::Failed(Refusal::new(Code::Refused, error.message)));
        }
        taken => taken?,
    };
    let outcome = pause(&process.engine, &Selection::Exact(regions), Some(&tag), FOR_A_NEED, wishes)?;
    Ok(match outcome {
        Outcome::Done { report, undo } => {
            Outcome::Done { report: json!({"mark": mark, "tag": tag, "bytes": report["bytes_moved"]}), undo }
        }
        other => other,
    })
}

/// What gave way comes back; as long as there is no room for it, this is no moment for it.
fn recover(process: &'static Process, mark: u64, undo: &Undo, wishes: &Wishes) -> Result<Outcome> {
    match preempt::recover(process, mark, undo, |tag| wishes.tell_resumed(tag)) {
        Ok(()) => {
            control::note("resume", || "what gave way for another process is back".to_owned());
            Ok(Outcome::Done { undo: Undo::new(), report: Value::Null })
        }
        Err(error) => {
            say_once(mark, &error);
            Ok(Outcome::NotNow(error.message))
        }
    }
}

/// What may never pass by itself is told of, and not at each of the many tries.
fn say_once(mark: u64, error: &Error) {
    static SAID: Mutex<Option<(u64, String)>> = Mutex::new(None);
    if matches!(error.status, Status::Busy | Status::OutOfDeviceMemory | Status::Capturing) {
        return;
    }
    let said = Some((mark, error.message.clone()));
    if std::mem::replace(&mut *lock(&SAID), said.clone()) != said {
        control::note("failed", || format!("what gave way by mark {mark} cannot be brought back: {error}"));
        log::warning!("what gave way by mark {mark} cannot be brought back, and is tried again: {error}");
    }
}

fn spoken(tag: Option<&str>) -> String {
    tag.map_or_else(|| "everything".to_owned(), |tag| format!("'{tag}'"))
}

/// Every region's state.
fn regions(engine: &Engine) -> Vec<State> {
    (0..).map_while(|number| engine.state(RegionId(number)).ok()).collect()
}

/// What a resume has to name so that everything is as `before` the pause: what is paused now and was not then. Of what is `selected`: other threads may
/// have paused something else themselves meanwhile.
fn undo(engine: &Engine, selected: &Selection, asked: Option<&str>, before: &[State]) -> Undo {
    let after = regions(engine).into_iter().enumerate();
    let taken = after.filter(|(at, now)| *now == State::Paused && before.get(*at) != Some(&State::Paused));
    let part = |(at, _): (usize, State)| {
        let region = RegionId(u32::try_from(at).ok()?);
        let (tag, _) = engine.region_info(region).ok()?;
        if !is_selected(selected, region, &tag) {
            return None;
        }
        Some(Part { region: region.0, tag, pauses: engine.pauses(region).ok()? })
    };
    let parts: Vec<Part> = taken.filter_map(part).collect();
    if parts.is_empty() { Undo::new() } else { vec![Back::Exactly { asked: asked.map(str::to_owned), parts }] }
}

fn is_selected(selection: &Selection, region: RegionId, tag: &str) -> bool {
    match selection {
        Selection::All => true,
        Selection::Tag(top) => is_under(Some(tag), top),
        Selection::Exact(regions) => regions.contains(&region),
    }
}

fn described(report: &Report) -> Value {
    json!({
        "regions_changed": report.regions_changed,
        "regions_unchanged": report.regions_unchanged,
        "allocations": report.allocations,
        "bytes_expected": report.bytes_expected,
        "bytes_moved": report.bytes_moved,
        "bytes_copied": report.bytes_copied,
        "bytes_discarded": report.bytes_discarded,
        "bytes_zeroed": report.bytes_zeroed,
        "bytes_dead": report.bytes_dead,
        "bytes_clean": report.bytes_clean,
        "seconds_total": report.seconds_total,
    })
}
