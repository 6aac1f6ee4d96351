//! The host tier: a reusable arena of host memory. It is made of slabs of exact size; backups take contiguous ranges of them, and a
//! dropped range is room for the next. The memory of a slab comes in behind the first copies (see [`super::slab`]); how much of it
//! stays when nobody uses it is a matter of policy and of high-water marks. Nothing here is locked while memory
//! is mapped, brought in or registered.

use super::memory;
pub(crate) use super::slab::Kind;
use super::slab::{Common, Crew, HostSlab, Quiet};
use crate::driver::Driver;
use crate::error::{Error, Result, Status};
use crate::raw::{Keeper, Pages, Span};
use crate::settings::Settings;
use crate::sync::{AtomicBool, AtomicU64, Mutex, Ordering, lock, spawn};
use crate::terms::Retention;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

/// Ranges start at multiples of this.
const ALIGN: u64 = 512;
/// A slab made for several ranges is at most this large (a larger range gets a slab of its own).
const SLAB: u64 = 1 << 30;
/// Rounds of pause and resume that a high-water mark lasts.
const ROUNDS: usize = 4;

/// A contiguous piece of the arena; room again when dropped.
#[derive(Debug)]
pub(crate) struct HostRange {
    slab: Arc<HostSlab>,
    start: u64,
    len: u64,
    lent: AtomicBool,
    shown: AtomicBool,
    /// Who reads it just now, in the engine.
    readers: AtomicU64,
}

impl HostRange {
    /// Bytes `[at, at + len)` of the range.
    pub(crate) fn span(self: &Arc<Self>, at: u64, len: u64) -> Option<Span> {
        let inside = at.checked_add(len).is_some_and(|end| end <= self.len);
        inside.then(|| Span::new(Arc::clone(self) as Arc<dyn Keeper>, self.start + at, len)).flatten()
    }

    fn missing(&self) -> impl Iterator<Item = (Arc<HostSlab>, usize)> {
        let units = self.slab.missing_units(self.start..self.start + self.len);
        units.into_iter().map(|index| (Arc::clone(&self.slab), index))
    }
}

impl Keeper for HostRange {
    fn pages(&self) -> &Pages {
        self.slab.pages()
    }

    fn lend(&self) {
        self.lent.store(true, Ordering::Relaxed);
    }

    fn show(&self) {
        self.lend();
        if !self.shown.swap(true, Ordering::Relaxed) {
            self.slab.pages().share_with_children(self.start..self.start + self.len);
        }
    }

    fn is_lent(&self) -> bool {
        // Whoever has ended has read all before the caller writes.
        self.lent.load(Ordering::Relaxed) || self.readers.load(Ordering::Acquire) > 0
    }

    fn begin_reading(&self) {
        self.readers.fetch_add(1, Ordering::Relaxed);
    }

    fn end_reading(&self) {
        self.readers.fetch_sub(1, Ordering::Release);
    }

    fn bring_in(&self, part: Range<u64>) -> Result<()> {
        let len = part.end - part.start;
        self.slab.bring_in(part).map_err(|e| no_room(len, &format!("the system has no memory for them ({e})")))
    }

    fn is_in(&self, part: Range<u64>) -> bool {
        self.slab.is_in(part)
    }
}

impl Drop for HostRange {
    fn drop(&mut self) {
        if self.shown.load(Ordering::Relaxed) {
            self.slab.pages().keep_from_children(self.start..self.start + self.len);
        }
        self.slab.give(self.start..self.start + rounded(self.len));
    }
}

fn rounded(len: u64) -> u64 {
    len.next_multiple_of(ALIGN)
}

/// Figures of the tier, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct HostUse {
    /// In ranges.
    pub(crate) used: u64,
    /// Mapped.
    pub(crate) reserved: u64,
    /// Of these, there.
    pub(crate) present: u64,
    /// Of these, known to the driver.
    pub(crate) registered: u64,
}

/// The most that was in use: ever, and in each of the last rounds.
#[derive(Debug, Default)]
struct Marks {
    ever: u64,
    rounds: VecDeque<u64>,
}

/// The arena.
#[derive(Debug)]
pub(crate) struct HostTier {
    settings: Arc<Settings>,
    common: Arc<Common>,
    slabs: Mutex<Vec<Arc<HostSlab>>>,
    /// Bytes of slabs that exist or are being made.
    committed: AtomicU64,
    marks: Mutex<Marks>,
    /// The reserve was asked for.
    prepared: AtomicBool,
    /// Why there is no reserve, until it is told.
    unprepared: Mutex<Option<String>>,
}

impl HostTier {
    /// An empty arena.
    pub(crate) fn new(driver: Arc<dyn Driver>, settings: Arc<Settings>) -> HostTier {
        HostTier {
            settings,
            common: Arc::new(Common::new(driver)),
            slabs: Mutex::new(Vec::new()),
            committed: AtomicU64::new(0),
            marks: Mutex::default(),
            prepared: AtomicBool::new(false),
            unprepared: Mutex::default(),
        }
    }

    /// One contiguous range per length, or nothing at all. `limit` bounds the whole arena. The memory may still be on its way in, see
    /// [`Span::bring_in`].
    pub(crate) fn reserve(&self, lens: &[u64], limit: Option<u64>) -> Result<Vec<Arc<HostRange>>> {
        self.reserve_kind(lens, limit, Kind::default())
    }

    /// The same in slabs of one kind.
    pub(crate) fn reserve_kind(&self, lens: &[u64], limit: Option<u64>, kind: Kind) -> Result<Vec<Arc<HostRange>>> {
        let mut found: Vec<Option<Arc<HostRange>>> = lens.iter().map(|&len| self.fit(len, kind)).collect();
        let mut missing: u64 = lens.iter().zip(&found).filter(|(_, f)| f.is_none()).map(|(&l, _)| rounded(l)).sum();
        if missing > 0 {
            self.tidy_backups(self.spare(missing));
            self.make_way(missing, limit)?;
        }
        for (&len, place) in lens.iter().zip(&mut found).filter(|(_, place)| place.is_none()) {
            let range = match self.fit(len, kind) {
                Some(range) => range,
                None => self.grow(len, missing, limit, kind)?,
            };
            missing = missing.saturating_sub(rounded(len));
            *place = Some(range);
        }
        let found: Vec<Arc<HostRange>> = found.into_iter().flatten().collect();
        Crew::start(found.iter().flat_map(|range| range.missing()).collect(), self.settings.host_threads);
        Ok(found)
    }

    /// Room in a slab that exists.
    fn fit(&self, len: u64, kind: Kind) -> Option<Arc<HostRange>> {
        let slabs = lock(&self.slabs);
        slabs.iter().filter(|slab| slab.kind() == kind).find_map(|slab| take(slab, len))
    }

    /// A new slab for `len` bytes and, if it is small, for the rest of what is missing.
    fn grow(&self, len: u64, missing: u64, limit: Option<u64>, kind: Kind) -> Result<Arc<HostRange>> {
        let size = rounded(len).max(missing.min(SLAB)).next_multiple_of(4096);
        let slab = self.add(size, limit, kind)?;
        let range = take(&slab, len).ok_or_else(|| no_room(len, "a new slab is too small"))?;
        lock(&self.slabs).push(slab);
        Ok(range)
    }

    /// A new slab that nobody can find yet.
    fn add(&self, size: u64, limit: Option<u64>, kind: Kind) -> Result<Arc<HostSlab>> {
        self.make_way(size, limit)?;
        self.commit(size, limit)?;
        let slab = HostSlab::new(&self.common, size, self.settings.host_unit, kind).map_err(|e| {
            self.committed.fetch_sub(size, Ordering::Relaxed);
            no_room(size, &format!("the system refuses it ({e})"))
        })?;
        Ok(Arc::new(slab))
    }

    /// Brings the reserve in, in the background, the first time it is called; it may be called from a hook.
    pub(crate) fn prepare(self: &Arc<Self>) {
        let (_, reserve) = self.settings.host_keeping();
        if reserve == 0 || self.prepared.swap(true, Ordering::Relaxed) {
            return;
        }
        let tier = Arc::clone(self);
        // Without a thread there is no reserve; the first pause makes what it needs.
        let _ = spawn("sire-host-reserve", move || {
            if let Err(error) = tier.build_reserve(reserve) {
                *lock(&tier.unprepared) = Some(error.message);
            }
        });
    }

    /// Makes slabs for what `reserve` has more than there is, and brings them in.
    fn build_reserve(&self, reserve: u64) -> Result<()> {
        let missing = reserve.saturating_sub(self.committed.load(Ordering::Relaxed));
        for at in (0..missing).step_by(SLAB as usize) {
            let size = SLAB.min(missing - at).next_multiple_of(4096);
            let slab = self.add(size, self.settings.host_limit(), Kind::default())?;
            lock(&self.slabs).push(Arc::clone(&slab));
            for from in (0..size).step_by(self.settings.host_unit as usize) {
                // Only this function has it: it was given back meanwhile.
                if Arc::strong_count(&slab) == 1 {
                    break;
                }
                let came = slab.bring_in(from..(from + self.settings.host_unit).min(size));
                came.map_err(|e| no_room(size, &format!("the system has no memory for the reserve ({e})")))?;
            }
        }
        Ok(())
    }

    /// Checks that there is room; if not, empty slabs make way first.
    fn make_way(&self, bytes: u64, limit: Option<u64>) -> Result<()> {
        self.check_room(bytes, limit).or_else(|_| {
            self.tidy(0);
            self.check_room(bytes, limit)
        })
    }

    /// Counts bytes that are about to be taken, unless others have taken what the limit leaves since it was checked.
    fn commit(&self, bytes: u64, limit: Option<u64>) -> Result<()> {
        let more = |committed: u64| committed.checked_add(bytes).filter(|&sum| limit.is_none_or(|limit| sum <= limit));
        match self.committed.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more) {
            Ok(_) => Ok(()),
            Err(committed) => Err(over_limit(bytes, limit.unwrap_or(u64::MAX), committed)),
        }
    }

    /// Refuses what would pass the configured limit, the machine's memory or a control group's. What was promised before and has not come in yet
    /// is counted as taken.
    fn check_room(&self, bytes: u64, limit: Option<u64>) -> Result<()> {
        let committed = self.committed.load(Ordering::Relaxed);
        if let Some(limit) = limit.filter(|&limit| committed.saturating_add(bytes) > limit) {
            return Err(over_limit(bytes, limit, committed));
        }
        let promised: u64 = lock(&self.slabs).iter().map(|slab| slab.absent()).sum();
        let room = memory::room();
        if room.bytes < bytes.saturating_add(promised) {
            return Err(no_room(bytes, &format!("{} leaves {}", room.set_by, room.bytes.saturating_sub(promised))));
        }
        Ok(())
    }

    /// Gives unused slabs back to the system until at most `keep` unused bytes are left; returns bytes given back.
    pub(crate) fn tidy(&self, keep: u64) -> u64 {
        self.tidy_but(keep, |_| false)
    }

    /// The same; transitions' buffers stay if everything is retained.
    fn tidy_backups(&self, keep: u64) -> u64 {
        let retains = self.retains();
        self.tidy_but(keep, |slab| retains && slab.kind().passing)
    }

    fn tidy_but(&self, keep: u64, stays: impl Fn(&HostSlab) -> bool) -> u64 {
        let slabs = lock(&self.slabs);
        let mut kept: u64 = slabs.iter().filter(|slab| !slab.is_free()).map(|slab| slab.unused()).sum();
        drop(slabs);
        self.give_back(|slab| {
            if stays(slab) {
                return true;
            }
            let stays = kept + slab.len() <= keep;
            kept += if stays { slab.len() } else { 0 };
            stays
        })
    }

    /// After a transition: its buffers go back to the system, unless everything is retained.
    pub(crate) fn drop_buffers(&self) {
        if !self.retains() {
            self.give_back(|slab| !slab.kind().passing);
        }
    }

    fn retains(&self) -> bool {
        self.settings.host_keeping().0 == Retention::Retain
    }

    /// Gives those unused slabs back to the system that need not stay; returns bytes given back.
    fn give_back(&self, mut stays: impl FnMut(&HostSlab) -> bool) -> u64 {
        let mut gone = Vec::new();
        let mut slabs = lock(&self.slabs);
        slabs.retain(|slab| {
            let stays = !slab.is_free() || stays(slab);
            if !stays {
                slab.leave();
                gone.push(Arc::clone(slab));
            }
            stays
        });
        drop(slabs);
        let bytes = gone.iter().map(|slab| slab.len()).sum();
        drop(gone);
        self.committed.fetch_sub(bytes, Ordering::Relaxed);
        bytes
    }

    /// Ends a round of pause and resume: gives back what the policy does not keep for the next.
    pub(crate) fn relax(&self) {
        let used = self.common.used.load(Ordering::Relaxed);
        let peak = self.common.peak.swap(used, Ordering::Relaxed);
        let mut marks = lock(&self.marks);
        marks.ever = marks.ever.max(peak);
        marks.rounds.push_back(peak);
        if marks.rounds.len() > ROUNDS {
            marks.rounds.pop_front();
        }
        drop(marks);
        let mut spare = self.spare(0);
        let (policy, reserve) = self.settings.host_keeping();
        let idle = self.committed.load(Ordering::Relaxed).saturating_sub(used);
        if policy == Retention::Shrink && idle.min(spare) > 0 {
            // Memory that only waits for a next pause must not be what the machine runs short of.
            spare = spare.min(memory::room().bytes.max(reserve.saturating_sub(used)));
        }
        self.tidy_backups(spare);
    }

    /// Unused bytes that the policy keeps beside what is in use and `more` bytes.
    fn spare(&self, more: u64) -> u64 {
        let (policy, reserve) = self.settings.host_keeping();
        let marks = lock(&self.marks);
        let mark = match policy {
            Retention::Retain => marks.ever,
            Retention::Shrink => marks.rounds.iter().copied().max().unwrap_or(0),
            Retention::Release => 0,
        };
        mark.max(reserve).saturating_sub(self.common.used.load(Ordering::Relaxed)).saturating_sub(more)
    }

    /// Sentences to tell once: the driver has refused to register host memory, or there was no room for the reserve.
    pub(crate) fn take_notices(&self) -> Vec<String> {
        let refused = lock(&self.common.refused).take().map(|refused| {
            format!(
                "backups use pageable host memory, which is slower: the driver would not pin it ({refused}); see `ulimit -l`"
            )
        });
        let unprepared =
            lock(&self.unprepared).take().map(|why| format!("the reserve of host memory was not made: {why}"));
        refused.into_iter().chain(unprepared).collect()
    }

    /// The driver is not to know any of its memory, nor what others bring in, until the result is dropped; what a copy needs then is registered again.
    /// To be called while no copy is under way.
    pub(crate) fn unregister(&self) -> Quiet<'_> {
        let quiet = self.common.keep_quiet();
        let slabs = lock(&self.slabs).clone();
        slabs.iter().for_each(|slab| slab.unregister());
        // One that was given back meanwhile goes here.
        drop(slabs);
        self.common.await_leaving();
        quiet
    }

    /// Figures.
    pub(crate) fn usage(&self) -> HostUse {
        let slabs = lock(&self.slabs);
        slabs.iter().fold(HostUse::default(), |sum, slab| HostUse {
            used: sum.used + slab.len() - slab.unused(),
            reserved: sum.reserved + slab.len(),
            present: sum.present + slab.len() - slab.absent(),
            registered: sum.registered + slab.pages().registered(),
        })
    }
}

fn take(slab: &Arc<HostSlab>, len: u64) -> Option<Arc<HostRange>> {
    let start = slab.take(rounded(len))?;
    Some(Arc::new(HostRange {
        slab: Arc::clone(slab),
        start,
        len,
        lent: AtomicBool::new(false),
        shown: AtomicBool::new(false),
        readers: AtomicU64::new(0),
    }))
}

fn over_limit(bytes: u64, limit: u64, committed: u64) -> Error {
    let have = limit.saturating_sub(committed);
    no_room(bytes, &format!("the host limit of {limit} bytes leaves {have}; raise it"))
}

fn no_room(bytes: u64, why: &str) -> Error {
    let message = format!("no room for {bytes} bytes of backup in host memory: {why}, or use the disk tier");
    Error::new(Status::OutOfBackupSpace, message)
}
