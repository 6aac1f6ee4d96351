//! The shared tier: host backups of several processes of one user, kept once.
//!
//! # The bargain
//!
//! *What is shared.* Content, in pieces of any length, found by its [`Address`]: a 128-bit hash and the length. The hash only
//! proposes; before a process relies on another's piece it compares every byte with its own.
//!
//! *Where the bytes are.* In [`pack`]s: anonymous files in memory, one for each reservation, of fixed length. They are
//! ordinary memory to the kernel: when the last process that holds a descriptor dies, however it dies, they
//! are gone. Nothing has to be cleaned up, and no quota of `/dev/shm` applies. A range of a pack is
//! written by its creator, once, before anybody is told of it, and never again: no range is used twice.
//!
//! *How it is found.* Each process that takes part is a *member* and has one small file, its [`roster`], in a directory that is the
//! user's alone. The roster lists the pieces that the member relies on, its own and others', and under which
//! of its descriptors they can be had (`/proc/PID/fd`). Only the member writes to it, so no process can leave
//! a table half-changed for the others; a torn entry fails its checksum and is not there.
//!
//! *Who is alive.* A member holds the lock on its roster as long as it lives; the kernel drops it. (A forked child
//! inherits the lock, so a member also counts as dead when its process is gone or another has its number.) Members in
//! different PID namespaces do not share, and leave each other alone.
//!
//! *The gate.* Whoever reads the rosters of others in order to rely on something, or takes an entry back, holds the lock on
//! the file `gate` meanwhile. The kernel drops that too. Nobody waits for it longer than two seconds: a process that was
//! stopped inside costs the others the sharing, not the pause. No copy or comparison is made inside.
//!
//! *Taking back.* A piece that is no longer needed is struck from the roster; whoever strikes the last entry gives its pages back. For a
//! dead member, the next one that comes through the gate does so: it *buries* it.
//!
//! *What a reader may trust.* A pack says in its first bytes whose it is; anything else found under the descriptor is
//! refused, as is a roster of another version. Content is verified against its checksum by the engine before it reaches a
//! device. Members trust each other as far as processes of one user must: any of them could write to the memory of any other.

pub(super) mod pack;
pub(super) mod roster;
mod store;
#[cfg(all(test, not(feature = "shuttle")))]
mod tests;

use crate::error::{Error, Result, Status};
use crate::ranges::Ranges;
use crate::settings::Settings;
use crate::sync::{AtomicBool, Mutex, Ordering, lock};
use crate::tier::{Place, Room, Segment, Tier, memory};
use pack::Pack;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Weak};
use store::{Store, Struck};

/// Which content: its 128-bit hash (xxh3) and its length.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(crate) struct Address {
    pub(crate) hash: u128,
    pub(crate) len: u64,
}

impl Address {
    /// The address of `bytes`.
    pub(crate) fn of(bytes: &[u8]) -> Address {
        Address { hash: twox_hash::XxHash3_128::oneshot(bytes), len: bytes.len() as u64 }
    }
}

/// Figures of this process, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct SharedUse {
    /// Memory in packs that this process made. Over all living members this counts each byte at most once.
    pub(crate) own: u64,
    /// Bytes it relies on in packs that others made.
    pub(crate) borrowed: u64,
}

/// The tier as one engine sees it. It becomes a member with its first reservation.
#[derive(Debug)]
pub(crate) struct SharedTier {
    settings: Arc<Settings>,
    store: Mutex<Option<Arc<Store>>>,
    /// Drafts that may still be shared.
    drafts: Mutex<Vec<Weak<Draft>>>,
}

impl SharedTier {
    /// No member yet.
    pub(crate) fn new(settings: Arc<Settings>) -> SharedTier {
        SharedTier { settings, store: Mutex::default(), drafts: Mutex::default() }
    }

    /// Room for `len` bytes, present from now on.
    ///
    /// # Errors
    /// `OutOfBackupSpace` if there is not as much memory; `BackupIo` if the directory cannot be used.
    pub(crate) fn draft(&self, len: u64) -> Result<Arc<Draft>> {
        let store = self.store()?;
        let left = self.limit().map(|limit| limit.saturating_sub(store.usage().own));
        let room = memory::room();
        if let Some(left) = left.filter(|&left| left < len) {
            return Err(no_room(len, &format!("the host limit leaves {left}")));
        }
        if room.bytes < len {
            return Err(no_room(len, &format!("{} leaves {}", room.set_by, room.bytes)));
        }
        let pack = store.create_pack(len).map_err(|e| no_room(len, &format!("the system refuses it ({e})")))?;
        let draft = Draft { store, pack, len, pieces: Mutex::default(), is_shared: AtomicBool::new(false) };
        let draft = Arc::new(draft);
        let mut drafts = lock(&self.drafts);
        drafts.retain(|draft| draft.strong_count() > 0);
        drafts.push(Arc::downgrade(&draft));
        Ok(draft)
    }

    fn store(&self) -> Result<Arc<Store>> {
        let mut slot = lock(&self.store);
        if let Some(store) = &*slot {
            return Ok(Arc::clone(store));
        }
        let store = Store::open(self.settings.shared_dir().as_deref()).map_err(|e| {
            let message = format!("backups cannot be shared between processes: {e}; they are kept by this one alone");
            Error::new(Status::BackupIo, message)
        })?;
        Ok(Arc::clone(slot.insert(store)))
    }

    /// Shares those of these segments that were saved in drafts; returns the bytes that others had already. What cannot be shared stays
    /// where it is, and so does what other segments have in the same drafts or in others: another pause may be writing there.
    pub(crate) fn share<'a>(&self, segments: impl Iterator<Item = &'a mut Segment>) -> u64 {
        let mut wanted: BTreeMap<*const (), BTreeMap<u64, &'a mut Segment>> = BTreeMap::new();
        for segment in segments.filter(|segment| segment.filled) {
            if let Place::Stored { room, at, .. } = &segment.place {
                wanted.entry(Arc::as_ptr(room).cast()).or_default().insert(*at, segment);
            }
        }
        let mut saved = 0;
        for draft in self.drafts() {
            let Some(mut segments) = wanted.remove(&Arc::as_ptr(&draft).cast()) else { continue };
            for (at, piece) in draft.share(|at| segments.contains_key(&at)) {
                let Some(segment) = segments.remove(&at) else { continue };
                saved += if piece.is_own() { 0 } else { piece.len() };
                if let Place::Stored { room, at, .. } = &mut segment.place {
                    (*room, *at) = (piece, 0);
                }
            }
        }
        saved
    }

    /// Those that live.
    fn drafts(&self) -> Vec<Arc<Draft>> {
        let mut drafts = lock(&self.drafts);
        drafts.retain(|draft| draft.strong_count() > 0);
        drafts.iter().filter_map(Weak::upgrade).collect()
    }

    /// Strikes what was dropped since. Cheap if nothing was.
    pub(crate) fn settle(&self) {
        let store = lock(&self.store).clone();
        if let Some(store) = store {
            store.settle();
        }
    }

    /// Figures.
    pub(crate) fn usage(&self) -> SharedUse {
        lock(&self.store).as_ref().map(|store| store.usage()).unwrap_or_default()
    }
}

impl Tier for SharedTier {
    fn name(&self) -> &'static str {
        "shared"
    }

    fn reserve(&self, len: u64) -> Result<Arc<dyn Room>> {
        Ok(self.draft(len)?)
    }

    fn used(&self) -> u64 {
        let SharedUse { own, borrowed } = self.usage();
        own + borrowed
    }

    fn limit(&self) -> Option<u64> {
        self.settings.host_limit()
    }
}

fn no_room(bytes: u64, why: &str) -> Error {
    let message =
        format!("no room for {bytes} bytes of shared backup in host memory: {why}; raise it, or use the disk tier");
    Error::new(Status::OutOfBackupSpace, message)
}

/// Room that only this process knows: written first, then [shared](Draft::share).
pub(crate) struct Draft {
    store: Arc<Store>,
    pack: Arc<Pack>,
    len: u64,
    /// What was written and is not shared yet, by where it starts.
    pieces: Mutex<BTreeMap<u64, Address>>,
    is_shared: AtomicBool,
}

impl fmt::Debug for Draft {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a backup of {} bytes in memory that is to be shared", self.len)
    }
}

impl Room for Draft {
    fn len(&self) -> u64 {
        self.len
    }

    fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        self.check(at, bytes.len() as u64)?;
        if self.is_shared.load(Ordering::Acquire) {
            return Err(Error::new(Status::BackupIo, "a shared backup cannot be written again"));
        }
        self.pack.write(at, bytes).map_err(|e| failed("write", at, bytes.len(), &e))?;
        lock(&self.pieces).insert(at, Address::of(bytes));
        Ok(())
    }

    fn read(&self, at: u64, into: &mut [u8]) -> Result<()> {
        self.check(at, into.len() as u64)?;
        self.pack.read(at, into).map_err(|e| failed("read", at, into.len(), &e))
    }

    fn is_rewritable(&self) -> bool {
        false
    }

    fn is_in_memory(&self) -> bool {
        true
    }
}

impl Draft {
    fn check(&self, at: u64, len: u64) -> Result<()> {
        let inside = at.checked_add(len).is_some_and(|end| end <= self.len);
        let message = || format!("{len} bytes at {at} are not inside a shared backup of {} bytes", self.len);
        if inside { Ok(()) } else { Err(Error::new(Status::BackupIo, message())) }
    }

    /// Shares what was written and is `wanted`: by where it started in the draft, each piece with its place among all members' pieces. Room
    /// that is not needed any more is given back. A piece that is missing in the answer stays in the draft, for this process alone, and may be
    /// asked for again. Whoever has an answer reads the piece, and not the draft any more.
    pub(crate) fn share(&self, wanted: impl Fn(u64) -> bool) -> BTreeMap<u64, Arc<Piece>> {
        let (mut pieces, mut unused) = self.take(wanted);
        let mut shared = self.store.find(&self.pack, &pieces).unwrap_or_default();
        shared.retain(|&at, piece| self.is_here(at, piece) || self.equals(at, piece));
        for (&at, piece) in &shared {
            pieces.remove(&at);
            if !self.is_here(at, piece) {
                unused.add(at..at + piece.address.len);
            }
        }
        lock(&self.pieces).append(&mut pieces);
        // A piece that stayed where it was is not among them: from now on the rosters say who needs it.
        for range in unused.iter() {
            // Best effort: what stays costs memory, not bytes.
            let _ = self.pack.punch(range);
        }
        shared
    }

    /// Takes out the pieces that are `wanted`. Beside them the ranges that were never written, the first time: from then on
    /// nothing is, and what is missing among the pieces may be somebody's.
    fn take(&self, wanted: impl Fn(u64) -> bool) -> (BTreeMap<u64, Address>, Ranges) {
        let mut pieces = lock(&self.pieces);
        let mut unused = Ranges::new();
        if !self.is_shared.swap(true, Ordering::AcqRel) {
            unused.add(0..self.len);
            pieces.iter().for_each(|(&at, address)| unused.remove(&(at..at + address.len)));
        }
        let (taken, rest) = std::mem::take(&mut *pieces).into_iter().partition(|(at, _)| wanted(*at));
        *pieces = rest;
        (taken, unused)
    }

    /// Whether the piece is what was written at `at`, in its own place.
    fn is_here(&self, at: u64, piece: &Piece) -> bool {
        Arc::ptr_eq(&piece.pack, &self.pack) && piece.at == at
    }

    fn equals(&self, at: u64, piece: &Piece) -> bool {
        const STEP: usize = 256 << 10;
        let (mut ours, mut theirs) = (vec![0; STEP], vec![0; STEP]);
        (0..piece.address.len).step_by(STEP).all(|from| {
            let len = STEP.min((piece.address.len - from) as usize);
            let (ours, theirs) = (&mut ours[..len], &mut theirs[..len]);
            let read = self.pack.read(at + from, ours).and_then(|()| piece.pack.read(piece.at + from, theirs));
            read.is_ok() && ours == theirs
        })
    }
}

impl Drop for Draft {
    /// The memory outlasts the draft as long as somebody relies on a piece of it. Nobody can find the others any more.
    fn drop(&mut self) {
        for (at, address) in std::mem::take(&mut *lock(&self.pieces)) {
            let _ = self.pack.punch(&(at..at + address.len));
        }
    }
}

/// A piece that this process relies on. Nobody changes it, and it is there until this value is dropped.
pub(crate) struct Piece {
    store: Arc<Store>,
    pack: Arc<Pack>,
    at: u64,
    address: Address,
    /// Its entry in the roster.
    slot: u32,
}

impl fmt::Debug for Piece {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whose = if self.is_own() { "of this process" } else { "of another process" };
        write!(f, "{} bytes of shared memory {whose}", self.address.len)
    }
}

impl Room for Piece {
    fn len(&self) -> u64 {
        self.address.len
    }

    fn write(&self, _: u64, _: &[u8]) -> Result<()> {
        Err(Error::new(Status::BackupIo, "a shared backup cannot be written again"))
    }

    fn read(&self, at: u64, into: &mut [u8]) -> Result<()> {
        let len = into.len() as u64;
        if at.checked_add(len).is_none_or(|end| end > self.address.len) {
            let message = format!("{len} bytes at {at} are not inside a piece of {} bytes", self.address.len);
            return Err(Error::new(Status::BackupIo, message));
        }
        self.pack.read(self.at + at, into).map_err(|e| failed("read", at, into.len(), &e))
    }

    fn is_rewritable(&self) -> bool {
        false
    }

    fn is_in_memory(&self) -> bool {
        true
    }
}

impl Piece {
    fn is_own(&self) -> bool {
        self.pack.id.member == self.store.me()
    }
}

impl Drop for Piece {
    /// Noted only: this may be a free, which must not wait for other processes.
    fn drop(&mut self) {
        self.store.strike(Struck { slot: self.slot, pack: Arc::clone(&self.pack), at: self.at, len: self.address.len });
    }
}

fn failed(doing: &str, at: u64, len: usize, error: &std::io::Error) -> Error {
    Error::new(Status::BackupIo, format!("cannot {doing} {len} bytes at {at} of a shared backup: {error}"))
}
