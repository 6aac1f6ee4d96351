//! Which region an allocation belongs to: a stack per thread, and a default for the whole process.
//!
//! The thread's part is plain numbers without a destructor, so that a hook may look at it at any time in a thread's
//! life. A pthread key, set while a thread is inside a region, leaves what the thread forgot to leave when it exits.

use crate::boundary::invalid;
use crate::capture;
use crate::config;
use crate::interpose::probe;
use crate::preempt;
use crate::process;
use crate::tms;
use sire_core::engine::{Backup, Engine, OnPaused, Policy, RegionId};
use sire_core::error::{Error, Result, Status};
use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

/// No region, in C.
pub(crate) const NONE: u32 = u32::MAX;
/// The environment has not been asked for a process-wide region yet.
const UNREAD: u32 = u32::MAX - 1;
/// How deep regions nest in one thread.
const DEEPEST: usize = 64;

/// A region that a thread is inside, and whose memory it takes there: a device's, or that of [`EVERY_DEVICE`].
#[derive(Clone, Copy)]
struct Entry {
    region: RegionId,
    device: c_int,
}

/// A region is entered for allocations on every device.
pub(crate) const EVERY_DEVICE: c_int = -1;

const NOT_ENTERED: Entry = Entry { region: RegionId(NONE), device: EVERY_DEVICE };

struct Thread {
    stack: [Cell<Entry>; DEEPEST],
    depth: Cell<usize>,
    suspended: Cell<u16>,
}

thread_local! {
    static THREAD: Thread = const {
        Thread { stack: [const { Cell::new(NOT_ENTERED) }; DEEPEST], depth: Cell::new(0), suspended: Cell::new(0) }
    };
}

static PROCESS_WIDE: AtomicU32 = AtomicU32::new(UNREAD);

/// The region of this thread's next allocation on a device that its innermost region takes; None: it passes through.
pub(crate) fn current() -> Result<Option<RegionId>> {
    current_on(&|| None)
}

/// The region that this thread's next allocation on a device belongs to; None: it passes through. The device is asked for only where it matters; if
/// it is not known, the innermost region takes what is allocated.
pub(crate) fn current_on(device: &dyn Fn() -> Option<c_int>) -> Result<Option<RegionId>> {
    let (suspended, innermost) = THREAD.with(|thread| (thread.suspended.get() > 0, innermost_on(thread, device)));
    if suspended {
        return Ok(None);
    }
    if let Some(region) = innermost {
        return Ok(Some(region));
    }
    if let Some(region) = tms::current_region()? {
        return Ok(Some(region));
    }
    process_wide()
}

/// Whether this thread is suspended: even an allocator function of ours then passes through.
pub(crate) fn suspended() -> bool {
    THREAD.with(|thread| thread.suspended.get() > 0)
}

fn innermost(thread: &Thread) -> Option<RegionId> {
    thread.depth.get().checked_sub(1).map(|top| thread.stack[top].get().region)
}

fn innermost_on(thread: &Thread, device: &dyn Fn() -> Option<c_int>) -> Option<RegionId> {
    let mut entries = thread.stack[..thread.depth.get()].iter().rev().map(Cell::get);
    let takes = |entry: &Entry| entry.device == EVERY_DEVICE || device().is_none_or(|device| device == entry.device);
    entries.find(takes).map(|entry| entry.region)
}

/// The process-wide region; the environment's is opened by the first who asks.
fn process_wide() -> Result<Option<RegionId>> {
    match PROCESS_WIDE.load(Ordering::Acquire) {
        NONE => Ok(None),
        UNREAD => open_process_wide(),
        region => Ok(Some(RegionId(region))),
    }
}

#[cold]
fn open_process_wide() -> Result<Option<RegionId>> {
    let settings = config::get()?;
    let opened = match &settings.region {
        Some(tag) if !settings.disabled => {
            let policy = Policy { backup: settings.backup.unwrap_or(Backup::Host), ..Policy::default() };
            Some(open(tag, policy).map_err(|error| error.context(format!("opening SIRE_REGION {tag:?}")))?)
        }
        _ => None,
    };
    let value = opened.map_or(NONE, |region| region.0);
    // Somebody who set a region meanwhile wins.
    let _ = PROCESS_WIDE.compare_exchange(UNREAD, value, Ordering::AcqRel, Ordering::Acquire);
    process_wide_value()
}

fn process_wide_value() -> Result<Option<RegionId>> {
    let value = PROCESS_WIDE.load(Ordering::Acquire);
    Ok((value < UNREAD).then_some(RegionId(value)))
}

/// Opens a region.
pub(crate) fn open(tag: &str, policy: Policy) -> Result<RegionId> {
    let engine = &process::get()?.engine;
    let opened = engine.region(tag, policy)?;
    preempt::region_opened(engine, opened);
    Ok(opened)
}

/// PyTorch's expandable segments never call cudaMalloc. Where its way to the driver does not lead through our hooks either, a process-wide
/// region would silently hold nothing. (PyTorch's pools with an allocator of ours use no such segments.)
fn refuse_unseen_segments() -> Result<()> {
    let settings = config::get()?;
    let is_served = |settings: &config::Settings| settings.disabled || (settings.hooks && probe::live());
    match settings.expandable_segments {
        Some(variable) if !is_served(settings) => Err(Error::new(
            Status::Unsupported,
            format!(
                "{variable} has expandable_segments:True, which a process-wide region serves only in the hook mode preload: such memory \
                 would not be paused; preload the library, or remove expandable_segments from {variable}"
            ),
        )),
        _ => Ok(()),
    }
}

/// Under a process-wide region of the environment's, pausing "everything" would find nothing, and look like a success.
pub(crate) fn refuse_blind_process_region() -> Result<()> {
    let settings = config::get()?;
    if settings.region.is_some() || settings.tms.enable { refuse_unseen_segments() } else { Ok(()) }
}

/// Sets the default of threads outside any region.
pub(crate) fn set_process_wide(region: u32) -> Result<()> {
    if region != NONE {
        refuse_unseen_segments()?;
        process::get()?.engine.state(RegionId(region))?;
    }
    PROCESS_WIDE.store(region, Ordering::Release);
    Ok(())
}

/// This thread goes inside, for what it allocates on `device`.
pub(crate) fn enter(region: RegionId, device: c_int, on_paused: OnPaused) -> Result<()> {
    let engine = &process::get()?.engine;
    let depth = THREAD.with(|thread| thread.depth.get());
    if depth == DEEPEST {
        return Err(invalid(format!(
            "region {} would be the thread's {}th nested one; the deepest is {DEEPEST}",
            region.0,
            depth + 1
        )));
    }
    enter_engine(engine, region, on_paused)?;
    watch_thread_exit();
    THREAD.with(|thread| {
        thread.stack[depth].set(Entry { region, device });
        thread.depth.set(depth + 1);
    });
    Ok(())
}

/// During a capture nothing is resumed: that waits for copies, which would void the capture.
fn enter_engine(engine: &Engine, region: RegionId, on_paused: OnPaused) -> Result<()> {
    if on_paused == OnPaused::Refuse || !capture::in_progress() {
        return engine.enter(region, on_paused);
    }
    engine.enter(region, OnPaused::Refuse).map_err(|error| match error.status {
        Status::Paused | Status::Busy => Error::new(
            Status::Capturing,
            format!("{error} (not while a CUDA graph is being captured; end the capture first)"),
        ),
        _ => error,
    })
}

/// This thread leaves its innermost region, which must be this one.
pub(crate) fn leave(region: RegionId) -> Result<()> {
    let engine = &process::get()?.engine;
    THREAD.with(|thread| match innermost(thread) {
        Some(top) if top == region => {
            thread.depth.set(thread.depth.get() - 1);
            Ok(())
        }
        Some(top) => Err(invalid(format!("region {} is not this thread's innermost; region {} is", region.0, top.0))),
        None => {
            Err(invalid(format!("this thread is in no region; was region {} entered on another thread?", region.0)))
        }
    })?;
    engine.leave(region);
    Ok(())
}

/// Until as many `unsuspend`s, this thread's allocations pass through.
pub(crate) fn suspend() -> Result<()> {
    THREAD.with(|thread| {
        let count = thread.suspended.get().checked_add(1).ok_or_else(|| {
            invalid(format!(
                "this thread is suspended {} times already; each needs its sire_region_unsuspend",
                u16::MAX
            ))
        })?;
        thread.suspended.set(count);
        Ok(())
    })
}

/// Undoes one [`suspend`].
pub(crate) fn unsuspend() -> Result<()> {
    THREAD.with(|thread| {
        let count = thread.suspended.get().checked_sub(1).ok_or_else(|| invalid("this thread is not suspended"))?;
        thread.suspended.set(count);
        Ok(())
    })
}

/// Sees to it that [`thread_exits`] runs for this thread.
fn watch_thread_exit() {
    static KEY: OnceLock<Option<libc::pthread_key_t>> = OnceLock::new();
    let key = KEY.get_or_init(|| {
        let mut key = 0;
        // SAFETY: writes one key; the destructor is a function of this library, which stays loaded.
        (unsafe { libc::pthread_key_create(&raw mut key, Some(thread_exits)) } == 0).then_some(key)
    });
    if let Some(key) = *key {
        // SAFETY: the key exists. Any value but NULL makes the destructor run; it is never dereferenced.
        unsafe { libc::pthread_setspecific(key, std::ptr::without_provenance(1)) };
    }
}

/// A thread that dies inside a region must not keep it busy for ever.
extern "C" fn thread_exits(_value: *mut c_void) {
    let Some(process) = process::started() else { return };
    THREAD.with(|thread| {
        while let Some(region) = innermost(thread) {
            thread.depth.set(thread.depth.get() - 1);
            let _ = crate::boundary::catch(|| {
                process.engine.leave(region);
                Ok(())
            });
        }
    });
}
