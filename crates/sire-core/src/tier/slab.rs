//! A slab: one mapping of the host arena, brought in unit by unit and registered with the driver in the same steps. A unit
//! is brought in by whoever needs it first, or ahead of that by a [`Crew`] of threads behind the first copies. Of several
//! threads that want the same unit one works and the others wait; no lock is held meanwhile.

use crate::driver::{Driver, DriverErrorKind};
use crate::ranges::Ranges;
use crate::raw::Pages;
use crate::sync::{AtomicBool, AtomicU64, Condvar, Mutex, Ordering, lock, spawn, wait};
use std::io;
use std::ops::Range;
use std::sync::Arc;

/// How far a unit is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Unit {
    /// Addresses only.
    Out,
    /// Its memory is there, and the driver does not know it.
    Forgotten,
    /// Somebody is bringing it in.
    Coming,
    /// Its memory is there, and registered unless the driver refuses that.
    In,
}

/// What kind of memory a slab is made of.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub(crate) struct Kind {
    /// The driver is not to know it.
    pub(crate) plain: bool,
    /// For buffers of one transition: it is not counted as what backups need.
    pub(crate) passing: bool,
    /// The NUMA node from which it comes, if that matters.
    pub(crate) node: Option<u32>,
}

/// What the slabs of one arena share.
#[derive(Debug)]
pub(super) struct Common {
    pub(super) driver: Arc<dyn Driver>,
    /// Bytes of ranges in use.
    pub(super) used: AtomicU64,
    /// The most that was in use since this was last set.
    pub(super) peak: AtomicU64,
    /// Why the driver refused a registration, until it is told.
    pub(super) refused: Mutex<Option<String>>,
    /// Whether it was noted before.
    warned: AtomicBool,
    /// How many do not want the driver to hear of any memory.
    quiet: AtomicU64,
    /// Slabs that were given back, and are not gone yet.
    leaving: Mutex<u64>,
    left: Condvar,
}

impl Common {
    pub(super) fn new(driver: Arc<dyn Driver>) -> Common {
        let (used, peak) = (AtomicU64::new(0), AtomicU64::new(0));
        let (refused, warned, quiet) = (Mutex::new(None), AtomicBool::new(false), AtomicU64::new(0));
        let (leaving, left) = (Mutex::new(0), Condvar::new());
        Common { driver, used, peak, refused, warned, quiet, leaving, left }
    }

    /// Returns when every slab that was given back is gone, and the driver knows its memory no more. The caller has none of them.
    pub(super) fn await_leaving(&self) {
        let mut leaving = lock(&self.leaving);
        while *leaving > 0 {
            leaving = wait(&self.left, leaving);
        }
    }

    /// From now on, what comes in is not registered. A slab hears of it at its next unit.
    pub(super) fn keep_quiet(&self) -> Quiet<'_> {
        self.quiet.fetch_add(1, Ordering::SeqCst);
        Quiet(self)
    }

    fn is_quiet(&self) -> bool {
        self.quiet.load(Ordering::SeqCst) > 0
    }
}

/// While it lives, the driver hears of no memory of the arena: what comes in is there, and forgotten.
#[derive(Debug)]
pub(crate) struct Quiet<'a>(&'a Common);

impl Drop for Quiet<'_> {
    fn drop(&mut self) {
        self.0.quiet.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A slab that was given back is counted until this is dropped.
#[derive(Debug)]
struct Leaving(Arc<Common>);

impl Drop for Leaving {
    fn drop(&mut self) {
        *lock(&self.0.leaving) -= 1;
        self.0.left.notify_all();
    }
}

/// A unit that the caller has marked as coming.
struct Coming {
    index: usize,
    before: Unit,
    /// Whether the driver is to hear of it.
    registers: bool,
}

/// See the [module documentation](self).
#[derive(Debug)]
pub(super) struct HostSlab {
    common: Arc<Common>,
    pages: Pages,
    /// Bytes per unit.
    unit: u64,
    units: Mutex<Vec<Unit>>,
    changed: Condvar,
    /// Units that are not in yet.
    missing: AtomicU64,
    /// Of these, those without memory.
    absent: AtomicU64,
    kind: Kind,
    /// The driver refused one unit: it is not asked again.
    refused: AtomicBool,
    holes: Mutex<Ranges>,
    /// Set when it was given back. The last field, so that it is dropped behind the pages.
    leaving: Mutex<Option<Leaving>>,
}

impl HostSlab {
    /// A slab of `size` bytes, all free, none of them there yet.
    pub(super) fn new(common: &Arc<Common>, size: u64, unit: u64, kind: Kind) -> io::Result<HostSlab> {
        let pages = Pages::new(size, unit)?;
        kind.node.into_iter().for_each(|node| pages.prefer(node));
        let count = size.div_ceil(unit);
        Ok(HostSlab {
            common: Arc::clone(common),
            pages,
            unit,
            units: Mutex::new(vec![Unit::Out; count as usize]),
            changed: Condvar::new(),
            missing: AtomicU64::new(count),
            absent: AtomicU64::new(count),
            kind,
            refused: AtomicBool::new(false),
            holes: Mutex::new(Ranges::of(0..size)),
            leaving: Mutex::new(None),
        })
    }

    /// It is given back, and goes with whoever has it last.
    pub(super) fn leave(&self) {
        *lock(&self.common.leaving) += 1;
        *lock(&self.leaving) = Some(Leaving(Arc::clone(&self.common)));
    }

    pub(super) fn pages(&self) -> &Pages {
        &self.pages
    }

    /// Bytes of its mapping.
    pub(super) fn len(&self) -> u64 {
        self.pages.len()
    }

    /// What it is made of.
    pub(super) fn kind(&self) -> Kind {
        self.kind
    }

    /// Bytes in no range.
    pub(super) fn unused(&self) -> u64 {
        lock(&self.holes).total()
    }

    /// Whether no range is in it.
    pub(super) fn is_free(&self) -> bool {
        self.unused() == self.len()
    }

    /// Takes `len` free bytes; returns where.
    pub(super) fn take(&self, len: u64) -> Option<u64> {
        let start = lock(&self.holes).take(len)?;
        if self.kind.passing {
            return Some(start);
        }
        let used = self.common.used.fetch_add(len, Ordering::Relaxed) + len;
        self.common.peak.fetch_max(used, Ordering::Relaxed);
        Some(start)
    }

    /// Makes bytes that were taken free again.
    pub(super) fn give(&self, range: Range<u64>) {
        if !self.kind.passing {
            self.common.used.fetch_sub(range.end - range.start, Ordering::Relaxed);
        }
        lock(&self.holes).add(range);
    }

    /// Bytes that are not there yet.
    pub(super) fn absent(&self) -> u64 {
        (self.absent.load(Ordering::Relaxed) * self.unit).min(self.len())
    }

    /// Whether the range is there.
    pub(super) fn is_in(&self, range: Range<u64>) -> bool {
        self.missing.load(Ordering::Acquire) == 0 || self.missing_units(range).is_empty()
    }

    /// Units of the range that are not there yet.
    pub(super) fn missing_units(&self, range: Range<u64>) -> Vec<usize> {
        let units = lock(&self.units);
        self.units_of(range).filter(|&index| units.get(index).is_some_and(|unit| *unit != Unit::In)).collect()
    }

    fn units_of(&self, range: Range<u64>) -> Range<usize> {
        (range.start / self.unit) as usize..range.end.div_ceil(self.unit) as usize
    }

    /// Returns when the range is there: brings in what nobody else is bringing in, and waits for the rest. It is registered as well, unless the
    /// driver refuses that or is not to hear of it now.
    pub(super) fn bring_in(&self, range: Range<u64>) -> io::Result<()> {
        if self.missing.load(Ordering::Acquire) == 0 {
            return Ok(());
        }
        let wanted = self.units_of(range);
        let mut units = lock(&self.units);
        loop {
            if let Some(coming) = wanted.clone().find_map(|index| self.mark(&mut units, index)) {
                drop(units);
                self.fetch(&coming)?;
                units = lock(&self.units);
            } else if wanted.clone().any(|index| units.get(index) == Some(&Unit::Coming)) {
                units = wait(&self.changed, units);
            } else {
                return Ok(());
            }
        }
    }

    /// Brings the unit in unless somebody else is doing that, it is there, or nobody needs it any more.
    fn bring_ahead(&self, index: usize) -> io::Result<()> {
        if self.is_idle(index) {
            return Ok(());
        }
        let coming = self.mark(&mut lock(&self.units), index);
        coming.map_or(Ok(()), |coming| self.fetch(&coming))
    }

    /// Marks a unit as coming, if there is anything to do for it. Whether it will be registered is decided here, with the units locked:
    /// [`HostSlab::unregister`] waits for what was marked before it looked, and what is marked afterwards registers nothing.
    fn mark(&self, units: &mut [Unit], index: usize) -> Option<Coming> {
        let registers = !self.common.is_quiet();
        let unit = units.get_mut(index)?;
        let wanted = *unit == Unit::Out || (*unit == Unit::Forgotten && registers);
        wanted.then(|| Coming { index, before: std::mem::replace(unit, Unit::Coming), registers })
    }

    /// The driver is not to know its memory any more. The arena is [quiet](Quiet) already, so that what comes in meanwhile is not registered anew. A unit
    /// that is there keeps its content, and is registered again by whoever needs it for a copy after that.
    pub(super) fn unregister(&self) {
        let mut units = lock(&self.units);
        while units.contains(&Unit::Coming) {
            units = wait(&self.changed, units);
        }
        let known = units.iter_mut().filter(|unit| **unit == Unit::In);
        let known = known.map(|unit| *unit = Unit::Forgotten).count();
        self.missing.fetch_add(known as u64, Ordering::Release);
        drop(units);
        self.pages.unregister();
    }

    /// Whether no range touches the unit.
    fn is_idle(&self, index: usize) -> bool {
        let part = self.part(index);
        lock(&self.holes).clip(&part).total() == part.end - part.start
    }

    fn part(&self, index: usize) -> Range<u64> {
        let start = index as u64 * self.unit;
        start..(start + self.unit).min(self.len())
    }

    /// Brings in a unit that the caller has marked as coming. If that fails it is what it was before, and those who wait for it try for themselves.
    fn fetch(&self, &Coming { index, before, registers }: &Coming) -> io::Result<()> {
        let done = self.pages.bring_in(self.part(index));
        if done.is_ok() && registers {
            self.register(index);
        }
        let after = match &done {
            Ok(()) if registers => Unit::In,
            Ok(()) => Unit::Forgotten,
            Err(_) => before,
        };
        let mut units = lock(&self.units);
        units[index] = after;
        self.missing.fetch_sub(u64::from(after == Unit::In), Ordering::Release);
        self.absent.fetch_sub(u64::from(before == Unit::Out && after != Unit::Out), Ordering::Relaxed);
        drop(units);
        self.changed.notify_all();
        done
    }

    fn register(&self, index: usize) {
        if self.kind.plain || self.refused.load(Ordering::Relaxed) {
            return;
        }
        let Err(error) = self.pages.register(&self.common.driver, self.part(index)) else { return };
        if error.kind == DriverErrorKind::Capturing {
            return; // The next part will be let in again.
        }
        self.refused.store(true, Ordering::Relaxed);
        if !self.common.warned.swap(true, Ordering::Relaxed) {
            *lock(&self.common.refused) = Some(error.to_string());
        }
    }
}

/// Units that are to be brought in ahead, and how far the threads have got.
#[derive(Debug)]
pub(super) struct Crew {
    wanted: Vec<(Arc<HostSlab>, usize)>,
    next: AtomicU64,
}

impl Crew {
    /// Starts up to `threads` threads on the units. What they do not bring in, for whatever reason, is brought in by those who need it.
    pub(super) fn start(wanted: Vec<(Arc<HostSlab>, usize)>, threads: usize) {
        // One unit is brought in as soon by whoever needs it.
        let threads = threads.min(wanted.len().saturating_sub(1));
        let crew = Arc::new(Crew { wanted, next: AtomicU64::new(0) });
        for _ in 0..threads {
            let crew = Arc::clone(&crew);
            if spawn("sire-host-memory", move || crew.work()).is_err() {
                return;
            }
        }
    }

    fn work(&self) {
        while let Some((slab, index)) = self.wanted.get(self.next.fetch_add(1, Ordering::Relaxed) as usize) {
            if slab.bring_ahead(*index).is_err() {
                return;
            }
        }
    }
}
