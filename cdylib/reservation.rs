//! Reservations of this process: places in the ledger that all processes share, and the stock that keeps the reserved bytes from everybody else
//! (the *fence*). What the process allocates comes out of the stock: the engine sees to that for its own memory, the hooks for what they pass on.
//!
//! Order is everything between processes: more is said to be owned *after* the driver has given it, less *before* it goes back. So what
//! another process computes from the ledger and from the driver's figure is never too much. The engine says of every byte of the fence when it is on
//! its way through the driver ([`note_missing`]), whoever caused that.

use crate::boundary::catch;
use crate::capture;
use crate::lock;
use crate::log;
use crate::preempt;
use crate::process::{self, Process};
use crate::slices;
use serde_json::{Value, json};
use sire_control::preempt::Borrower;
use sire_core::driver::Device;
use sire_core::engine::Stocked;
use sire_core::error::{Error, Result, Status};
use sire_ledger::{Ledger, Member, Memory, Patience, Want};
use std::collections::HashMap;
use std::ffi::c_void;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

/// A multiple of every device's granularity.
const LARGEST_GRANULE: u64 = 2 << 20;

/// Whether the reserved bytes are taken from the driver at once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Fence {
    /// Only the ledger says that they are ours.
    None,
    /// They are; if they cannot be had, the ledger alone does.
    IfPossible,
    /// They are, or the reservation fails.
    Strict,
}

/// What somebody wants to reserve.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wish {
    pub(crate) device: Device,
    pub(crate) want: Want,
    pub(crate) timeout: Option<Duration>,
    pub(crate) fence: Fence,
    /// Whether others are asked to give way, for a need of this priority.
    pub(crate) preempt: Option<i32>,
}

/// One place in the ledger, and how much of what it holds lies in the stock or was taken from there: whole granules; `None` without a fence.
#[derive(Debug)]
struct Held {
    member: Member,
    fenced: Option<u64>,
}

/// A reservation. One place in the ledger with a fence and one without are enough, however often it is resized: 256 are all that there are.
#[derive(Debug)]
pub(crate) struct Reservation {
    device: Device,
    ledger: Ledger,
    held: Mutex<Vec<Held>>,
    /// Held while it is resized: who makes it so many bytes counts on what there is.
    resizing: Mutex<()>,
    /// Held while the fence changes its size: who enlarges it counts on what there is.
    sizing: Mutex<()>,
    preempt: Option<i32>,
    /// What others have lent. Dropped after everything else has been given back.
    borrowers: Mutex<Vec<Borrower>>,
}

/// What a reservation is, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Standing {
    pub(crate) reserved: u64,
    pub(crate) fenced: u64,
}

pub(crate) fn said(error: sire_ledger::Error) -> Error {
    use sire_ledger::Error::{Cancelled, Foreign, Forked, Full, Io, Speechless, Stuck, TimedOut, TooLarge};
    let status = match error {
        Io { .. } | Foreign { .. } | Full { .. } | Speechless => Status::Unsupported,
        TooLarge { .. } => Status::OutOfDeviceMemory,
        TimedOut { .. } | Stuck => Status::Busy,
        Cancelled => Status::Cancelled,
        Forked => Status::Inactive,
    };
    Error::new(status, error.to_string())
}

pub(crate) fn memory(process: &Process, device: Device) -> Option<Memory> {
    process.engine.memory_of(device).ok().map(|info| Memory { free: info.free, total: info.total })
}

impl Reservation {
    /// Waits for its turn and for room, and takes what is wished for.
    pub(crate) fn make(process: &'static Process, dir: &Path, wish: Wish) -> Result<Arc<Reservation>> {
        let gpu = process.driver.uuid(wish.device)?;
        let ledger = Ledger::open(dir, &gpu).map_err(said)?;
        let reservation = Reservation {
            device: wish.device,
            ledger,
            held: Mutex::default(),
            resizing: Mutex::default(),
            sizing: Mutex::default(),
            preempt: wish.preempt,
            borrowers: Mutex::default(),
        };
        let reservation = Arc::new(reservation);
        // Before there is a fence, so that whoever opens it finds whom to tell.
        process.engine.stock_watch(Box::new(note_missing));
        remember(&reservation);
        reservation.enlarge(process, wish)?;
        Ok(reservation)
    }

    fn enlarge(&self, process: &Process, wish: Wish) -> Result<()> {
        let member = self.ledger.join().map_err(said)?;
        let before = process.engine.cancels();
        let cancelled = || process.engine.cancels() != before;
        let patience = Patience { timeout: wish.timeout, cancelled: &cancelled };
        let borrower = wish.preempt.map(|priority| preempt::borrower(process, wish.device, priority)).transpose()?;
        let ask = |missing: u64, seen: Instant| borrower.iter().for_each(|borrower| borrower.missing(missing, seen));
        let reserved = member.reserve_asking(wish.want, &|| memory(process, wish.device), patience, &ask);
        let mut bytes = reserved.map_err(|error| match (&borrower, said(error)) {
            (Some(borrower), error) if error.status == Status::Busy => {
                Error::new(Status::Busy, format!("{error}. Nobody gave way: {}", borrower.why()))
            }
            (_, error) => error,
        })?;
        borrower.iter().for_each(Borrower::enough);
        if matches!(wish.want, Want::Rest { .. }) {
            // Whole granules, so that the fence needs no byte more.
            bytes -= bytes % LARGEST_GRANULE;
            member.shrink(bytes).map_err(said)?;
        }
        let _sizing = lock(&self.sizing);
        let fenced = match wish.fence {
            Fence::None => None,
            fence => match self.build_fence(process, &member, bytes) {
                Err(error) if fence == Fence::IfPossible => {
                    log::warning!("the reservation of {bytes} bytes on {} has no fence: {error}", self.device);
                    None
                }
                fenced => Some(fenced?),
            },
        };
        self.take_in(member, fenced);
        // The fence may have been opened before the place was here to be told.
        note_missing(self.device, &|| process.engine.stocked(self.device));
        lock(&self.borrowers).extend(borrower.filter(|borrower| borrower.lent() > 0));
        Ok(())
    }

    /// Adds a place to the one of its kind, if there is one.
    fn take_in(&self, member: Member, fenced: Option<u64>) {
        let mut held = lock(&self.held);
        match held.iter_mut().find(|each| each.fenced.is_some() == fenced.is_some()) {
            Some(same) if same.member.absorb(&member).is_ok() => {
                same.fenced = same.fenced.map(|all| all + fenced.unwrap_or(0));
            }
            _ => held.push(Held { member, fenced }),
        }
    }

    fn build_fence(&self, process: &Process, member: &Member, bytes: u64) -> Result<u64> {
        if slices::is_open() {
            return Err(Error::new(
                Status::Unsupported,
                "this process takes turns on the device, and a fence would keep the others' memory in theirs; reserve with fence=False",
            ));
        }
        // The last granule of the fence that there is may be in part for the new bytes.
        let spare = self.spare().min(bytes);
        // What cannot be noted counts as not owned: others then see less room than there is, never more.
        let mut note = |lying: u64| drop(member.note_owned(lying.saturating_add(spare).min(bytes)));
        note(0);
        let fenced = process.engine.stock_up(self.device, bytes - spare, &mut note);
        fenced.inspect_err(|_| drop(member.note_owned(0)))
    }

    /// Bytes of the fence beyond what is reserved behind it: it consists of whole granules.
    fn spare(&self) -> u64 {
        let held = lock(&self.held);
        held.iter().filter_map(|each| each.fenced?.checked_sub(each.member.reserved())).sum()
    }

    /// Makes it `bytes` in all. More waits in the queue like a reservation of its own, while what there is stays.
    pub(crate) fn resize(&self, process: &Process, bytes: u64, timeout: Option<Duration>, fence: Fence) -> Result<()> {
        let _resizing = lock(&self.resizing);
        let now = self.standing().reserved;
        if bytes > now {
            let want = Want::Bytes(bytes - now);
            return self.enlarge(process, Wish { device: self.device, want, timeout, fence, preempt: self.preempt });
        }
        let _sizing = lock(&self.sizing);
        let mut lowered = 0;
        let kept = self.keep(bytes, &mut lowered);
        lower_fence(process, self.device, lowered);
        kept
    }

    /// Keeps `bytes`, of the places that were taken first. `lowered`: how many bytes of the fence are to go, whatever fails.
    fn keep(&self, bytes: u64, lowered: &mut u64) -> Result<()> {
        let mut left = bytes;
        let mut held = lock(&self.held);
        for each in held.iter_mut() {
            let kept = left.min(each.member.reserved());
            *lowered += each.give_back(kept)?;
            left -= kept;
        }
        held.retain(|each| each.member.reserved() > 0);
        Ok(())
    }

    /// Says how many of the bytes this process owns, where it has them without a fence of ours.
    pub(crate) fn note_owned(&self, bytes: u64) -> Result<()> {
        let mut left = bytes;
        for held in lock(&self.held).iter().filter(|held| held.fenced.is_none()) {
            let owned = left.min(held.member.reserved());
            held.member.note_owned(owned).map_err(said)?;
            left -= owned;
        }
        Ok(())
    }

    pub(crate) fn device(&self) -> Device {
        self.device
    }

    pub(crate) fn standing(&self) -> Standing {
        let held = lock(&self.held);
        let reserved = held.iter().map(|each| each.member.reserved()).sum();
        Standing { reserved, fenced: held.iter().filter_map(|each| each.fenced).sum() }
    }

    /// So many bytes of the fence, at most, count as not owned. Returns how many of them it does not have.
    fn note_fence(&self, mut missing: u64) -> u64 {
        for held in lock(&self.held).iter() {
            let Some(fenced) = held.fenced else { continue };
            let less = missing.min(fenced);
            missing -= less;
            let owned = (fenced - less).min(held.member.reserved());
            if owned != held.member.owned() {
                // What cannot be noted is noted the next time.
                let _ = held.member.note_owned(owned);
            }
        }
        missing
    }
}

/// What of a device's fences is on its way through the driver counts as not owned, before it goes and until it is back.
fn note_missing(device: Device, stocked: &dyn Fn() -> Stocked) {
    // Outlives the lock: to drop the last one would be to come here again.
    let concerned = reservations(device);
    if process::started().is_none() || concerned.is_empty() {
        return;
    }
    // The figures are asked for with the lock: whoever comes last knows the newest.
    let _noting = lock(&NOTING);
    concerned.iter().fold(stocked().missing(), |missing, each| each.note_fence(missing));
}

fn remember(reservation: &Arc<Reservation>) {
    let mut all = lock(&RESERVATIONS);
    all.retain(|other| other.strong_count() > 0);
    all.push(Arc::downgrade(reservation));
}

/// All that there are, each kept alive until the caller is done with it.
fn living() -> Vec<Arc<Reservation>> {
    lock(&RESERVATIONS).iter().filter_map(Weak::upgrade).collect()
}

/// Those of a device.
fn reservations(device: Device) -> Vec<Arc<Reservation>> {
    living().into_iter().filter(|each| each.device == device).collect()
}

/// Whether this process has reserved memory of the device: what it gives back is still its own then.
pub(crate) fn is_on(device: Device) -> bool {
    reservations(device).iter().any(|each| each.standing().reserved > 0)
}

/// Whether some reservation of this process has a fence.
pub(crate) fn has_fence() -> bool {
    living().iter().any(|each| each.standing().fenced > 0)
}

impl Held {
    /// Keeps `bytes`. Returns how many bytes of the fence are to go back to the driver now.
    fn give_back(&mut self, bytes: u64) -> Result<u64> {
        self.member.shrink(bytes).map_err(said)?;
        let Some(fenced) = self.fenced else { return Ok(0) };
        // The granule that the last byte lies in stays, so that all that ever goes are whole ones.
        let kept = bytes.checked_next_multiple_of(LARGEST_GRANULE).unwrap_or(u64::MAX).min(fenced);
        self.fenced = Some(kept);
        Ok(fenced - kept)
    }
}

fn lower_fence(process: &Process, device: Device, bytes: u64) {
    process.engine.stock_down(device, bytes);
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // In a forked child neither the place nor the memory is ours.
        let Some(process) = process::started() else { return };
        let mut held = std::mem::take(&mut *lock(&self.held));
        let fenced = held.iter_mut().map(|each| each.give_back(0).unwrap_or(each.fenced.unwrap_or(0))).sum();
        drop(held);
        lower_fence(process, self.device, fenced);
    }
}

/// What is in a device's ledger, as all users may see it.
pub(crate) fn list(process: &Process, dir: &Path, device: Device) -> Result<Value> {
    let gpu = process.driver.uuid(device)?;
    let entries = Ledger::open(dir, &gpu).and_then(|ledger| ledger.entries()).map_err(said)?;
    Ok(json!({ "gpu": gpu, "entries": entries }))
}

// ---- memory outside the engine --------------------------------------------------------------------------------------

static RESERVATIONS: Mutex<Vec<Weak<Reservation>>> = Mutex::new(Vec::new());
/// Held while the ledger is told what is missing.
static NOTING: Mutex<()> = Mutex::new(());
/// What was allocated outside the engine and came out of the stock, by address; and how many those are, so that who has none takes no lock.
static SPENT: Mutex<Option<HashMap<usize, (Device, u64)>>> = Mutex::new(None);
static SPENT_COUNT: AtomicUsize = AtomicUsize::new(0);

/// The program is about to take memory that the engine does not make: it comes out of the stock. `None` where there is nothing to take from. Until
/// [`spent`] is called, what was made free for it counts as not owned: anybody may be faster.
pub(crate) fn spend(device: impl FnOnce() -> Option<Device>, bytes: usize) -> Option<(Device, u64)> {
    let process = process::started().filter(|process| process.engine.has_stock() && !capture::in_progress())?;
    let spend = |device| (device, process.engine.stock_spend(device, bytes as u64));
    let spent = catch(|| Ok(device().map(spend)));
    spent.ok().flatten().filter(|(_, bytes)| *bytes > 0)
}

/// What [`spend`] made free was taken, at this address; or, if it is NULL, could not be.
pub(crate) fn spent(place: *const c_void, (device, bytes): (Device, u64)) {
    if place.is_null() {
        return regain(device, bytes);
    }
    if let Some(process) = process::started() {
        process.engine.stock_settle(device, bytes);
    }
    let mut all = lock(&SPENT);
    all.get_or_insert_default().entry(place as usize).and_modify(|entry| entry.1 += bytes).or_insert_with(|| {
        SPENT_COUNT.fetch_add(1, Ordering::SeqCst);
        (device, bytes)
    });
}

/// What [`spend`] made free was taken by what nobody will hear the end of: it is missing.
pub(crate) fn give_up((device, bytes): (Device, u64)) {
    if let Some(process) = process::started() {
        process.engine.stock_give_up(device, bytes);
    }
}

/// Frees memory outside the engine with `free`; what it had from the stock goes back there.
pub(crate) fn free<R>(place: *const c_void, free: impl FnOnce() -> R) -> R {
    let known = SPENT_COUNT.load(Ordering::SeqCst) > 0;
    let Some((device, bytes)) = known.then(|| lock(&SPENT).as_mut()?.remove(&(place as usize))).flatten() else {
        return free();
    };
    SPENT_COUNT.fetch_sub(1, Ordering::SeqCst);
    let gone = process::started().map_or(0, |process| process.engine.stock_let_go(device, bytes));
    let result = free();
    regain(device, gone);
    result
}

/// What was allocated outside the engine on `device` is gone: what it had from the stock goes back there.
pub(crate) fn ended(device: Device) {
    if SPENT_COUNT.load(Ordering::SeqCst) == 0 {
        return;
    }
    let mut all = lock(&SPENT);
    let gone: Vec<u64> = all
        .iter_mut()
        .flat_map(|all| all.extract_if(|_, (on, _)| *on == device))
        .map(|(_, (_, bytes))| bytes)
        .collect();
    drop(all);
    SPENT_COUNT.fetch_sub(gone.len(), Ordering::SeqCst);
    let bytes = process::started().map_or(0, |process| process.engine.stock_let_go(device, gone.iter().sum()));
    regain(device, bytes);
}

fn regain(device: Device, bytes: u64) {
    if let Some(process) = process::started() {
        let regained = catch(|| {
            process.engine.stock_regain(device, bytes);
            Ok(())
        });
        if let Err(error) = regained {
            log::warning!("{bytes} bytes did not come back into the reservation: {error}");
        }
    }
}
