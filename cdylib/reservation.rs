//! Reservations of this process: places in the ledger that all processes share, and the stock that keeps the reserved bytes from everybody else
//! (the *fence*). What the process allocates comes out of the stock: the engine sees to that for its own memory, the hooks for what they pass on.
//!
//! Order is everything between processes: more is said to be owned *after* the driver has given it, less *before* it goes back. So what
//! another process computes from the ledger and from the driver's figure is never too much.

use crate::boundary::catch;
use crate::capture::{self, Relaxed};
use crate::log;
use crate::process::{self, Process};
use serde_json::{Value, json};
use sire_core::driver::Device;
use sire_core::error::{Error, Result, Status};
use sire_ledger::{Ledger, Member, Memory, Patience, Want};
use std::collections::HashMap;
use std::ffi::c_void;
use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

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
}

/// One place in the ledger, and how much of what it holds lies in the stock or was taken from there.
#[derive(Debug)]
struct Held {
    member: Member,
    fenced: u64,
}

/// A reservation: what it was made with, and what it was enlarged by.
#[derive(Debug)]
pub(crate) struct Reservation {
    device: Device,
    ledger: Ledger,
    held: Mutex<Vec<Held>>,
    /// Bytes of the fence that are on their way through the driver.
    leaving: AtomicU64,
}

/// What a reservation is, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Standing {
    pub(crate) reserved: u64,
    pub(crate) fenced: u64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn said(error: sire_ledger::Error) -> Error {
    use sire_ledger::Error::{Cancelled, Foreign, Forked, Full, Io, Stuck, TimedOut, TooLarge};
    let status = match error {
        Io { .. } | Foreign { .. } | Full { .. } => Status::Unsupported,
        TooLarge { .. } => Status::OutOfDeviceMemory,
        TimedOut { .. } | Stuck => Status::Busy,
        Cancelled => Status::Cancelled,
        Forked => Status::Inactive,
    };
    Error::new(status, error.to_string())
}

fn memory(process: &Process, device: Device) -> Option<Memory> {
    process.engine.memory_of(device).ok().map(|info| Memory { free: info.free, total: info.total })
}

impl Reservation {
    /// Waits for its turn and for room, and takes what is wished for.
    pub(crate) fn make(process: &'static Process, dir: &Path, wish: Wish) -> Result<Arc<Reservation>> {
        let gpu = process.driver.uuid(wish.device)?;
        let ledger = Ledger::open(dir, &gpu).map_err(said)?;
        let reservation =
            Reservation { device: wish.device, ledger, held: Mutex::default(), leaving: AtomicU64::new(0) };
        reservation.enlarge(process, wish)?;
        let reservation = Arc::new(reservation);
        let mut all = lock(&RESERVATIONS);
        all.retain(|other| other.strong_count() > 0);
        all.push(Arc::downgrade(&reservation));
        Ok(reservation)
    }

    fn enlarge(&self, process: &Process, wish: Wish) -> Result<()> {
        let member = self.ledger.join().map_err(said)?;
        let before = process.engine.cancels();
        let cancelled = || process.engine.cancels() != before;
        let patience = Patience { timeout: wish.timeout, cancelled: &cancelled };
        let mut bytes = member.reserve(wish.want, &|| memory(process, wish.device), patience).map_err(said)?;
        if matches!(wish.want, Want::Rest { .. }) {
            // Whole granules, so that the fence needs no byte more.
            bytes -= bytes % LARGEST_GRANULE;
            member.shrink(bytes).map_err(said)?;
        }
        let fenced = match wish.fence {
            Fence::None => 0,
            fence => match self.build_fence(process, &member, bytes) {
                Err(error) if fence == Fence::IfPossible => {
                    log::warning!("the reservation of {bytes} bytes on {} has no fence: {error}", self.device);
                    0
                }
                fenced => fenced?,
            },
        };
        lock(&self.held).push(Held { member, fenced });
        Ok(())
    }

    fn build_fence(&self, process: &Process, member: &Member, bytes: u64) -> Result<u64> {
        let _relaxed = Relaxed::enter(process);
        // What cannot be noted counts as not owned: others then see less room than there is, never more.
        let mut note = |lying: u64| drop(member.note_owned(lying.min(bytes)));
        let fenced = process.engine.stock_up(self.device, bytes, &mut note);
        fenced.inspect_err(|_| drop(member.note_owned(0)))
    }

    /// Makes it `bytes` in all. More waits in the queue like a reservation of its own, while what there is stays.
    pub(crate) fn resize(&self, process: &Process, bytes: u64, timeout: Option<Duration>, fence: Fence) -> Result<()> {
        let now = self.standing().reserved;
        if bytes > now {
            let want = Want::Bytes(bytes - now);
            return self.enlarge(process, Wish { device: self.device, want, timeout, fence });
        }
        let lowered = self.keep(bytes)?;
        lower_fence(process, self.device, lowered);
        Ok(())
    }

    /// Keeps `bytes`, of the places that were taken first. Returns how many bytes of the fence are to go.
    fn keep(&self, bytes: u64) -> Result<u64> {
        let (mut left, mut lowered) = (bytes, 0);
        let mut held = lock(&self.held);
        for each in held.iter_mut() {
            let kept = left.min(each.member.reserved());
            lowered += each.give_back(kept)?;
            left -= kept;
        }
        held.retain(|each| each.member.reserved() > 0);
        Ok(lowered)
    }

    /// Says how many of the bytes this process owns, where it has them without a fence of ours.
    pub(crate) fn note_owned(&self, bytes: u64) -> Result<()> {
        let mut left = bytes;
        for held in lock(&self.held).iter().filter(|held| held.fenced == 0) {
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
        Standing { reserved, fenced: held.iter().map(|each| each.fenced).sum() }
    }

    /// For as long as `with` runs, so many bytes of the fence count as not owned.
    fn without<R>(&self, bytes: u64, with: impl FnOnce() -> R) -> R {
        self.leaving.fetch_add(bytes, Ordering::SeqCst);
        self.note_fences();
        let result = with();
        self.leaving.fetch_sub(bytes, Ordering::SeqCst);
        self.note_fences();
        result
    }

    fn note_fences(&self) {
        let mut left = self.leaving.load(Ordering::SeqCst);
        for held in lock(&self.held).iter().filter(|held| held.fenced > 0) {
            let less = left.min(held.fenced);
            left -= less;
            // What cannot be noted is noted the next time; until then others see less room, or this process is being ended.
            let _ = held.member.note_owned((held.fenced - less).min(held.member.reserved()));
        }
    }
}

impl Held {
    /// Keeps `bytes`. Returns how many bytes of the fence are to go back to the driver now.
    fn give_back(&mut self, bytes: u64) -> Result<u64> {
        self.member.note_owned(self.fenced.min(bytes)).map_err(said)?;
        self.member.shrink(bytes).map_err(said)?;
        let less = self.fenced.saturating_sub(bytes);
        self.fenced -= less;
        Ok(less)
    }
}

fn lower_fence(process: &Process, device: Device, bytes: u64) {
    let _relaxed = Relaxed::enter(process);
    process.engine.stock_down(device, bytes);
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // In a forked child neither the place nor the memory is ours.
        let Some(process) = process::started() else { return };
        let mut held = std::mem::take(&mut *lock(&self.held));
        let fenced = held.iter_mut().map(|each| each.give_back(0).unwrap_or(each.fenced)).sum();
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
/// What was allocated outside the engine and came out of the stock, by address; and how many those are, so that who has none takes no lock.
static SPENT: Mutex<Option<HashMap<usize, (Device, u64)>>> = Mutex::new(None);
static SPENT_COUNT: AtomicUsize = AtomicUsize::new(0);

/// The program is about to take memory that the engine does not make: it comes out of the stock. `None` where there is nothing to take from.
pub(crate) fn spend(device: impl FnOnce() -> Result<Device>, bytes: usize) -> Option<(Device, u64)> {
    let process = process::started().filter(|process| process.engine.has_stock() && !capture::in_progress())?;
    let spent = catch(|| {
        let device = device()?;
        let _relaxed = Relaxed::enter(process);
        Ok((device, process.engine.stock_spend(device, bytes as u64)))
    });
    spent.ok().filter(|(_, bytes)| *bytes > 0)
}

/// What [`spend`] made free was taken, at this address; or, if it is NULL, could not be.
pub(crate) fn spent(place: *const c_void, (device, bytes): (Device, u64)) {
    if place.is_null() {
        return regain(device, bytes);
    }
    lock(&SPENT).get_or_insert_default().insert(place as usize, (device, bytes));
    SPENT_COUNT.fetch_add(1, Ordering::SeqCst);
}

/// Frees memory outside the engine with `free`; what it had from the stock goes back there.
pub(crate) fn free<R>(place: *const c_void, free: impl FnOnce() -> R) -> R {
    let known = SPENT_COUNT.load(Ordering::SeqCst) > 0;
    let Some((device, bytes)) = known.then(|| lock(&SPENT).as_mut()?.remove(&(place as usize))).flatten() else {
        return free();
    };
    SPENT_COUNT.fetch_sub(1, Ordering::SeqCst);
    let both = || {
        let result = free();
        regain(device, bytes);
        result
    };
    let reservation = lock(&RESERVATIONS).iter().filter_map(Weak::upgrade).find(|each| each.device == device);
    match reservation {
        Some(reservation) => reservation.without(bytes, both),
        None => both(),
    }
}

fn regain(device: Device, bytes: u64) {
    if let Some(process) = process::started() {
        let regained = catch(|| {
            let _relaxed = Relaxed::enter(process);
            process.engine.stock_regain(device, bytes);
            Ok(())
        });
        if let Err(error) = regained {
            log::warning!("{bytes} bytes did not come back into the reservation: {error}");
        }
    }
}
