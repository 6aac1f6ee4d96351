//! Where backups are. A *tier* lends room for bytes before anything is released, and keeps them until the room
//! is dropped. Host memory ([`host`], in slabs, see [`slab`]) is the engine's own: the device copies straight into it. Every other tier is a
//! [`Tier`]: the engine brings the bytes to it through buffers of its own and the threads of [`queue`], and
//! gives none to a device before their checksum ([`record`]) was right. [`disk`] keeps them in private files, [`mod@file`] knows
//! that a file of the program's has them already; others come from outside ([`conformance`] asks whether they keep the bargain).
//! [`memory`] knows how much the machine has left, [`private`] which directories are ours; [`step`] is for tests.

pub(crate) mod compress;
pub mod conformance;
pub(crate) mod direct;
pub(crate) mod disk;
pub(crate) mod file;
pub(crate) mod host;
pub(crate) mod memory;
pub(crate) mod packed;
mod private;
pub(crate) mod queue;
pub(crate) mod record;
pub(crate) mod shared;
mod slab;
pub(crate) mod spill;
pub(crate) mod staging;
mod step;

use crate::error::{Error, Result, Status};
use crate::raw::{Reading, Span};
use crate::settings::Settings;
use crate::sync::{Mutex, lock};
use crate::terms::{Backup, Clean, Policy};
use record::{Record, Sum};
use shared::SharedTier;
use std::fmt::Debug;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// A place for backups outside host memory: a disk, another machine, an object store.
///
/// The bargain, both ways:
///
/// * The engine asks for all the room of a pause before it releases anything. Room that was given is *certain*: a
///   later [`Room::write`] inside it may fail for a fault, never for want of space.
/// * The engine checks: it keeps a 128-bit checksum of every piece, and compares it before a byte reaches a device.
/// * A read asks for exactly what one write kept last: same offset, same length.
/// * Calls block. They come from several threads at once (about [`Tier::depth`]), never from an allocation hook, never
///   while the engine holds a lock. They must not use CUDA and must not call the engine.
/// * Whatever goes wrong is an [`Error`]: `OutOfBackupSpace` for want of space, else `BackupIo`, with a
///   message that names the place and what to do. A panic is caught and counts as `Internal`.
pub trait Tier: Send + Sync + Debug {
    /// A short name for messages and statistics.
    fn name(&self) -> &str;

    /// Room for at least `len` bytes (never 0), certain until the result is dropped. Room may outlive the tier's owner.
    ///
    /// # Errors
    /// `OutOfBackupSpace` if there is not that much; `BackupIo` if the place cannot be used.
    fn reserve(&self, len: u64) -> Result<Arc<dyn Room>>;

    /// How many requests it likes to have under way at once.
    fn depth(&self) -> usize {
        4
    }

    /// Bytes of all room that it has lent and not got back.
    fn used(&self) -> u64;

    /// The most bytes that it may lend, if somebody has set a limit.
    fn limit(&self) -> Option<u64> {
        None
    }
}

/// Room in a tier. Dropping it gives the bytes up.
pub trait Room: Send + Sync + Debug {
    /// Bytes.
    fn len(&self) -> u64;

    /// Where it is, for messages: "a backup file in /var/tmp".
    fn place(&self) -> String {
        "a backup".to_owned()
    }

    /// Whether it has no bytes at all.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Offsets and lengths of reads and writes are multiples of this power of two, at most 4096; so is [`Room::len`]. (The engine pads
    /// what it saves.) The addresses of buffers are multiples of it too.
    fn align(&self) -> u64 {
        1
    }

    /// Keeps `bytes` at offset `at`, in place of what was there. When it has returned, no pressure on memory and no error that
    /// the system reports late may lose them; they need not outlive the process. Two writes never overlap at the same time.
    ///
    /// # Errors
    /// `BackupIo`, also for a range that is not inside the room; the bytes at the range are then undefined.
    fn write(&self, at: u64, bytes: &[u8]) -> Result<()>;

    /// Fills `into` from offset `at`: all of it, or it fails. What was never written may be anything.
    ///
    /// # Errors
    /// `BackupIo`, also for a range that is not inside the room; the content of `into` is then undefined.
    fn read(&self, at: u64, into: &mut [u8]) -> Result<()>;

    /// A file with the same bytes at the same offsets, which takes requests of this alignment past the page cache and stays open while the room
    /// lives. If there is one, the kernel may be asked for them without [`Room::read`] and [`Room::write`]; what does not come or go whole that way is done again through these, whose
    /// answers count.
    fn file(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Whether bytes that have been there may be replaced by others. If not, others get room of their own.
    fn is_rewritable(&self) -> bool {
        true
    }

    /// Whether the bytes were there before any backup, in a file of the program's: keeping them there costs nothing, and nothing is written.
    fn is_borrowed(&self) -> bool {
        false
    }

    /// Whether the bytes are in host memory: there is nothing to gain by bringing them there before they are needed.
    fn is_in_memory(&self) -> bool {
        false
    }
}

/// Where one segment of a backup is.
#[derive(Clone, Debug)]
pub(crate) enum Place {
    /// In host memory.
    Host(Span),
    /// In a tier, with its checksum.
    Stored { room: Arc<dyn Room>, at: u64, sum: Sum },
    /// Nowhere: the bytes are this word (little-endian) again and again.
    Constant(u64),
}

impl Place {
    /// The `len` bytes there, if they are in a tier.
    pub(crate) fn record(&self, len: u64) -> Option<(Record, Sum)> {
        match self {
            Place::Host(_) | Place::Constant(_) => None,
            Place::Stored { room, at, sum } => Some((Record { room: Arc::clone(room), at: *at, len }, *sum)),
        }
    }
}

/// What tells a page's content: the two halves of its digest.
pub(crate) type PageId = (u64, u64);

/// `range`, cut at multiples of `page`.
pub(crate) fn page_cuts(range: &Range<u64>, page: u64) -> impl Iterator<Item = Range<u64>> + use<> {
    let (end, mut at) = (range.end, range.start);
    std::iter::from_fn(move || {
        let cut = at..end.min((at / page + 1) * page);
        at = cut.end;
        (!cut.is_empty()).then_some(cut)
    })
}

/// The bytes of a constant, repeated to `bytes`' length.
pub(crate) fn repeat(word: u64, bytes: &mut [u8]) {
    let word = word.to_le_bytes();
    bytes.chunks_mut(8).for_each(|part| part.copy_from_slice(&word[..part.len()]));
}

/// Bytes `[offset, offset + len)` of an extent, and where they are (or will be) saved.
#[derive(Clone, Debug)]
pub(crate) struct Segment {
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) place: Place,
    /// Whether the bytes have arrived there. On a chunk whose bytes are on the device: whether they are known to be the same still.
    pub(crate) filled: bool,
    /// What is known of the content of its [pages](page_cuts), once it is filled; of none, if this is empty.
    pub(crate) pages: Vec<Option<PageId>>,
}

impl Segment {
    /// Room that nothing has arrived in yet.
    pub(crate) fn new(range: &Range<u64>, place: Place) -> Segment {
        Segment { offset: range.start, len: range.end - range.start, place, filled: false, pages: Vec::new() }
    }

    /// Where the segment ends.
    pub(crate) fn end(&self) -> u64 {
        self.offset + self.len
    }

    /// The byte that it repeats, if it is a constant of one byte.
    pub(crate) fn byte(&self) -> Option<u8> {
        let Place::Constant(word) = self.place else { return None };
        let bytes = word.to_le_bytes();
        bytes.iter().all(|byte| *byte == bytes[0]).then_some(bytes[0])
    }

    /// Whether its bytes are in host memory, and go straight to a device and back.
    pub(crate) fn is_in_host(&self) -> bool {
        matches!(self.place, Place::Host(_))
    }

    /// Whether its bytes are behind the trait: outside host memory, or in host memory that is shared.
    pub(crate) fn is_stored(&self) -> bool {
        matches!(self.place, Place::Stored { .. })
    }

    /// Whether its bytes are in a file of the program's.
    pub(crate) fn is_borrowed(&self) -> bool {
        matches!(&self.place, Place::Stored { room, .. } if room.is_borrowed())
    }

    /// Keeps it, if it is in host memory, from being written to while the result lives. To be called while nobody has claimed the extent.
    pub(crate) fn reading(&self) -> Option<Reading> {
        if let Place::Host(span) = &self.place { Some(span.reading()) } else { None }
    }

    /// Whether both are the same bytes in the same place.
    pub(crate) fn is_same(&self, other: &Segment) -> bool {
        let same_place = match (&self.place, &other.place) {
            (Place::Host(one), Place::Host(other)) => one.ptr() == other.ptr(),
            (Place::Constant(one), Place::Constant(other)) => one == other,
            (Place::Stored { room, at, sum }, Place::Stored { room: other, at: other_at, sum: other_sum }) => {
                // The sum, too: a record may have been written again where it was.
                Arc::ptr_eq(room, other) && (at, sum) == (other_at, other_sum)
            }
            _ => false,
        };
        same_place && self.range() == other.range()
    }

    /// `range` of it as a segment of its own, with what is known if that is a whole page; `None` if it is not inside, or cannot be had apart.
    pub(crate) fn part(&self, range: &Range<u64>, page: u64) -> Option<Segment> {
        if *range == self.range() {
            return Some(self.clone());
        }
        let at = range.start.checked_sub(self.offset)?;
        let place = match &self.place {
            Place::Host(span) => Place::Host(span.part(at, range.end - range.start)?),
            Place::Constant(word) if at.is_multiple_of(8) && range.end <= self.end() => Place::Constant(*word),
            Place::Constant(_) | Place::Stored { .. } => return None,
        };
        let whole = |edge: u64| edge.is_multiple_of(page) || edge == self.offset || edge == self.end();
        let known = self.pages.get((range.start / page - self.offset / page) as usize).copied().flatten();
        let pages = vec![known.filter(|_| whole(range.start) && whole(range.end))];
        Some(Segment { filled: self.filled, pages, ..Segment::new(range, place) })
    }

    /// Takes in `next`, if it lies right behind, in the extent and in host memory, and is alike.
    pub(crate) fn join(&mut self, next: &Segment, page: u64) -> bool {
        if self.end() != next.offset || self.filled != next.filled || !next.offset.is_multiple_of(page) {
            return false;
        }
        match (&self.place, &next.place) {
            (Place::Host(one), Place::Host(other)) => match one.joined(other) {
                Some(joined) => self.place = Place::Host(joined),
                None => return false,
            },
            (Place::Constant(one), Place::Constant(other)) if one == other && self.len.is_multiple_of(8) => {}
            _ => return false,
        }
        let count = |segment: &Segment| page_cuts(&segment.range(), page).count();
        self.pages.resize(count(self), None);
        self.pages.extend(&next.pages);
        self.len += next.len;
        self.pages.resize(count(self), None);
        true
    }

    /// Whether it is in host memory and holds exactly these bytes.
    pub(crate) fn holds(&self, bytes: &Span) -> bool {
        match &self.place {
            Place::Host(span) => bytes.read(|bytes| span.read(|held| held == bytes)),
            Place::Constant(word) => {
                bytes.read(|bytes| bytes.chunks(8).all(|part| *part == word.to_le_bytes()[..part.len()]))
            }
            Place::Stored { .. } => false,
        }
    }

    /// The offsets it covers.
    pub(crate) fn range(&self) -> Range<u64> {
        self.offset..self.offset + self.len
    }
}

/// Room that a pause was promised and that may still be on its way in. Nothing is given up before all of it is there.
#[derive(Debug)]
pub(crate) struct Promised(Mutex<Vec<Span>>);

impl Promised {
    /// What the host segments among `segments` need.
    pub(crate) fn to<'a>(segments: impl Iterator<Item = &'a Segment>) -> Promised {
        let span = |segment: &Segment| match &segment.place {
            Place::Host(span) => Some(span.clone()),
            Place::Stored { .. } | Place::Constant(_) => None,
        };
        Promised(Mutex::new(segments.filter_map(span).collect()))
    }

    /// Whether all of it is there.
    pub(crate) fn is_kept(&self) -> bool {
        let mut spans = lock(&self.0);
        while spans.last().is_some_and(Span::is_in) {
            spans.pop();
        }
        spans.is_empty()
    }

    /// Waits until all of it is there. Parts of a pause that call this at the same time share the work, and each waits for all.
    ///
    /// # Errors
    /// `OutOfBackupSpace` if the system has no memory for it. The promise stands then, and nobody finds it kept.
    pub(crate) fn keep(&self) -> Result<()> {
        let spans = lock(&self.0).clone();
        spans.iter().try_for_each(Span::bring_in)?;
        lock(&self.0).clear();
        Ok(())
    }
}

/// The tiers behind the trait: the engine's own, then those from outside.
#[derive(Debug)]
pub(crate) struct Tiers {
    settings: Arc<Settings>,
    disk: Arc<dyn Tier>,
    pub(crate) files: file::FileTier,
    /// Host memory that processes share.
    pub(crate) shared: Arc<SharedTier>,
    others: Mutex<Vec<Arc<dyn Tier>>>,
}

impl Tiers {
    /// The engine's own.
    pub(crate) fn new(settings: Arc<Settings>) -> Tiers {
        Tiers {
            disk: Arc::new(disk::DiskTier::new(Arc::clone(&settings))),
            shared: Arc::new(SharedTier::new(Arc::clone(&settings))),
            files: file::FileTier::default(),
            settings,
            others: Mutex::default(),
        }
    }

    /// One more from outside.
    pub(crate) fn add(&self, tier: Arc<dyn Tier>) -> Result<Backup> {
        let mut others = lock(&self.others);
        let number = u8::try_from(others.len());
        let number =
            number.map_err(|_| Error::new(Status::InvalidArgument, "there are 256 tiers from outside already"))?;
        others.push(tier);
        Ok(Backup::Tier(number))
    }

    /// The tier behind the trait that takes the backups of a policy, if any does.
    pub(crate) fn for_policy(&self, policy: &Policy) -> Result<Option<Arc<dyn Tier>>> {
        match policy.backup {
            Backup::Disk | Backup::Tier(_) => self.of(policy.backup).map(Some),
            Backup::Host if policy.clean != Clean::No && self.settings.shares() => {
                Ok(Some(Arc::clone(&self.shared) as Arc<dyn Tier>))
            }
            Backup::None | Backup::Host | Backup::File | Backup::Auto => Ok(None),
        }
    }

    /// The tier that a policy sends backups to.
    pub(crate) fn of(&self, backup: Backup) -> Result<Arc<dyn Tier>> {
        let found = match backup {
            Backup::Disk => Some(Arc::clone(&self.disk)),
            Backup::Tier(number) => lock(&self.others).get(usize::from(number)).cloned(),
            Backup::None | Backup::Host | Backup::File | Backup::Auto => None,
        };
        found.ok_or_else(|| {
            Error::new(Status::InvalidArgument, format!("no tier was added for {backup:?}; use Engine::add_tier"))
        })
    }

    /// How many requests to have under way for what a policy has sent to a tier.
    pub(crate) fn depth(&self, backup: Backup) -> usize {
        match backup {
            Backup::File => file::DEPTH,
            Backup::Auto => self.disk.depth(),
            Backup::Host if self.settings.shares() => self.shared.depth(),
            _ => self.of(backup).map_or(1, |tier| tier.depth()),
        }
    }

    /// A policy's name in statistics.
    pub(crate) fn name(&self, backup: Backup) -> String {
        match backup {
            Backup::None => "none".to_owned(),
            Backup::Host => "host".to_owned(),
            Backup::File => "file".to_owned(),
            Backup::Auto => "auto".to_owned(),
            Backup::Disk | Backup::Tier(_) => {
                self.of(backup).map_or_else(|_| "unknown".to_owned(), |tier| tier.name().to_owned())
            }
        }
    }

    /// All behind the trait.
    pub(crate) fn all(&self) -> Vec<Arc<dyn Tier>> {
        std::iter::once(Arc::clone(&self.disk)).chain(lock(&self.others).iter().cloned()).collect()
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;
    use crate::raw::{Keeper, Pages};

    /// Host memory that the system does not have.
    #[derive(Debug)]
    struct Absent(Pages);

    impl Keeper for Absent {
        fn pages(&self) -> &Pages {
            &self.0
        }
        fn lend(&self) {}
        fn is_lent(&self) -> bool {
            false
        }
        fn bring_in(&self, _: Range<u64>) -> Result<()> {
            Err(Error::new(Status::OutOfBackupSpace, "the system has no memory"))
        }
        fn is_in(&self, _: Range<u64>) -> bool {
            false
        }
    }

    /// A pause of two devices: one part heard that there is no memory for the backup, the other one, which asked next, that all of it was there, and
    /// gave its device's memory up.
    #[test]
    fn a_promise_that_cannot_be_kept_is_kept_for_nobody() {
        let pages = Pages::new(4096, 4096).unwrap_or_else(|e| unreachable!("{e}"));
        let span = Span::new(Arc::new(Absent(pages)), 0, 4096).unwrap_or_else(|| unreachable!("it is inside"));
        let promised = Promised::to([Segment::new(&(0..4096), Place::Host(span))].iter());
        for _ in 0..2 {
            let refused = promised.keep().map_err(|error| error.status);
            assert_eq!((refused, promised.is_kept()), (Err(Status::OutOfBackupSpace), false));
        }
    }
}
