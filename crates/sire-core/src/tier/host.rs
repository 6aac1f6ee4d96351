//! The host tier: a reusable arena of host memory. It is made of slabs of exact size, each brought in
//! and registered with the driver once; backups take contiguous ranges of them, and a dropped range
//! is room for the next. Nothing here is locked while memory is mapped, brought in or registered.

use super::memory;
use crate::driver::Driver;
use crate::error::{Error, Result, Status};
use crate::ranges::Ranges;
use crate::raw::{Keeper, Pages, Span};
use crate::sync::{AtomicBool, AtomicU64, Mutex, Ordering, lock};
use std::sync::Arc;

/// Ranges start at multiples of this.
const ALIGN: u64 = 512;
/// A slab made for several ranges is at most this large (a larger range gets a slab of its own).
const SLAB: u64 = 1 << 30;
/// Unused slabs up to this many bytes are kept for the next pause.
const SLACK: u64 = 512 << 20;

/// One mapping of the arena.
#[derive(Debug)]
struct HostSlab {
    pages: Pages,
    holes: Mutex<Ranges>,
}

impl HostSlab {
    fn is_free(&self) -> bool {
        lock(&self.holes).total() == self.pages.len()
    }
}

/// A contiguous piece of the arena; room again when dropped.
#[derive(Debug)]
pub(crate) struct HostRange {
    slab: Arc<HostSlab>,
    start: u64,
    len: u64,
    lent: AtomicBool,
}

impl HostRange {
    fn new(slab: &Arc<HostSlab>, start: u64, len: u64) -> Arc<HostRange> {
        Arc::new(HostRange { slab: Arc::clone(slab), start, len, lent: AtomicBool::new(false) })
    }

    /// Bytes `[at, at + len)` of the range.
    pub(crate) fn span(self: &Arc<Self>, at: u64, len: u64) -> Option<Span> {
        let inside = at.checked_add(len).is_some_and(|end| end <= self.len);
        inside.then(|| Span::new(Arc::clone(self) as Arc<dyn Keeper>, self.start + at, len)).flatten()
    }
}

impl Keeper for HostRange {
    fn pages(&self) -> &Pages {
        &self.slab.pages
    }

    fn lend(&self) {
        self.lent.store(true, Ordering::Relaxed);
    }

    fn is_lent(&self) -> bool {
        self.lent.load(Ordering::Relaxed)
    }
}

impl Drop for HostRange {
    fn drop(&mut self) {
        lock(&self.slab.holes).add(self.start..self.start + rounded(self.len));
    }
}

fn rounded(len: u64) -> u64 {
    len.next_multiple_of(ALIGN)
}

/// Figures of the tier, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct HostUse {
    pub(crate) used: u64,
    pub(crate) reserved: u64,
    pub(crate) registered: u64,
}

/// The arena.
#[derive(Debug)]
pub(crate) struct HostTier {
    driver: Arc<dyn Driver>,
    slabs: Mutex<Vec<Arc<HostSlab>>>,
    /// Bytes of slabs that exist or are being made.
    committed: AtomicU64,
    /// Why the driver refused a registration, until it is told.
    refused: Mutex<Option<String>>,
    /// Whether it was noted before.
    warned: AtomicBool,
}

impl HostTier {
    /// An empty arena.
    pub(crate) fn new(driver: Arc<dyn Driver>) -> HostTier {
        HostTier {
            driver,
            slabs: Mutex::new(Vec::new()),
            committed: AtomicU64::new(0),
            refused: Mutex::new(None),
            warned: AtomicBool::new(false),
        }
    }

    /// One contiguous range per length, or nothing at all. `limit` bounds the whole arena.
    pub(crate) fn reserve(&self, lens: &[u64], limit: Option<u64>) -> Result<Vec<Arc<HostRange>>> {
        let mut found: Vec<Option<Arc<HostRange>>> = lens.iter().map(|&len| self.fit(len)).collect();
        let mut missing: u64 = lens.iter().zip(&found).filter(|(_, f)| f.is_none()).map(|(&l, _)| rounded(l)).sum();
        if missing > 0 {
            self.tidy(SLACK.saturating_sub(missing));
            self.make_way(missing, limit)?;
        }
        for (&len, place) in lens.iter().zip(&mut found).filter(|(_, place)| place.is_none()) {
            let range = match self.fit(len) {
                Some(range) => range,
                None => self.grow(len, missing, limit)?,
            };
            missing = missing.saturating_sub(rounded(len));
            *place = Some(range);
        }
        Ok(found.into_iter().flatten().collect())
    }

    /// Room in a slab that exists.
    fn fit(&self, len: u64) -> Option<Arc<HostRange>> {
        let slabs = lock(&self.slabs);
        slabs.iter().find_map(|slab| {
            let start = lock(&slab.holes).take(rounded(len))?;
            Some(HostRange::new(slab, start, len))
        })
    }

    /// A new slab for `len` bytes and, if it is small, for the rest of what is missing.
    fn grow(&self, len: u64, missing: u64, limit: Option<u64>) -> Result<Arc<HostRange>> {
        let size = rounded(len).max(missing.min(SLAB)).next_multiple_of(4096);
        self.make_way(size, limit)?;
        self.commit(size, limit)?;
        let pages = self.make(size).inspect_err(|_| {
            self.committed.fetch_sub(size, Ordering::Relaxed);
        })?;
        let mut holes = Ranges::of(0..size);
        holes.remove(&(0..rounded(len)));
        let slab = Arc::new(HostSlab { pages, holes: Mutex::new(holes) });
        lock(&self.slabs).push(Arc::clone(&slab));
        Ok(HostRange::new(&slab, 0, len))
    }

    fn make(&self, size: u64) -> Result<Pages> {
        let mut pages = Pages::new(size).map_err(|e| no_room(size, &format!("the system refuses it ({e})")))?;
        if let Err(error) = pages.register(&self.driver)
            && !self.warned.swap(true, Ordering::Relaxed)
        {
            *lock(&self.refused) = Some(error.to_string());
        }
        Ok(pages)
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

    /// Refuses what would pass the configured limit, the machine's memory or a control group's.
    fn check_room(&self, bytes: u64, limit: Option<u64>) -> Result<()> {
        let committed = self.committed.load(Ordering::Relaxed);
        if let Some(limit) = limit.filter(|&limit| committed.saturating_add(bytes) > limit) {
            return Err(over_limit(bytes, limit, committed));
        }
        let room = memory::room();
        if room.bytes < bytes {
            return Err(no_room(bytes, &format!("{} leaves {}", room.set_by, room.bytes)));
        }
        Ok(())
    }

    /// Gives unused slabs back to the system until at most `keep` unused bytes are left; returns bytes given back.
    pub(crate) fn tidy(&self, keep: u64) -> u64 {
        let mut kept = 0;
        let mut gone = Vec::new();
        lock(&self.slabs).retain(|slab| {
            let stay = !slab.is_free() || kept + slab.pages.len() <= keep;
            if !stay {
                gone.push(Arc::clone(slab));
            } else if slab.is_free() {
                kept += slab.pages.len();
            }
            stay
        });
        let bytes = gone.iter().map(|slab| slab.pages.len()).sum();
        drop(gone);
        self.committed.fetch_sub(bytes, Ordering::Relaxed);
        bytes
    }

    /// Gives back what exceeds the slack that is kept for the next pause.
    pub(crate) fn relax(&self) {
        self.tidy(SLACK);
    }

    /// A sentence to tell once, if the driver has refused to register host memory.
    pub(crate) fn take_notice(&self) -> Option<String> {
        let refused = lock(&self.refused).take()?;
        Some(format!(
            "backups use pageable host memory, which is slower: the driver would not pin it ({refused}); see `ulimit -l`"
        ))
    }

    /// Figures.
    pub(crate) fn usage(&self) -> HostUse {
        let slabs = lock(&self.slabs);
        slabs.iter().fold(HostUse::default(), |sum, slab| HostUse {
            used: sum.used + slab.pages.len() - lock(&slab.holes).total(),
            reserved: sum.reserved + slab.pages.len(),
            registered: sum.registered + if slab.pages.is_registered() { slab.pages.len() } else { 0 },
        })
    }
}

fn over_limit(bytes: u64, limit: u64, committed: u64) -> Error {
    let have = limit.saturating_sub(committed);
    no_room(bytes, &format!("the host limit of {limit} bytes leaves {have}; raise it"))
}

fn no_room(bytes: u64, why: &str) -> Error {
    let message = format!("no room for {bytes} bytes of backup in host memory: {why}, or use the disk tier");
    Error::new(Status::OutOfBackupSpace, message)
}
