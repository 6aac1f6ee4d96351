//! What the members have in common, as one of them sees it: finding pieces, relying on them, striking them, burying the dead.

use super::pack::{Pack, PackId};
use super::roster::{Entry, Member, MemberId, Roster, others};
use super::{Address, Piece, SharedUse};
use crate::ranges::Ranges;
use crate::sync::{Mutex, lock};
use crate::tier::private;
use crate::tier::step::step;
use std::collections::{BTreeMap, HashMap};
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// The longest wait for the gate, and the time between two attempts.
const PATIENCE: (Duration, Duration) = (Duration::from_secs(2), Duration::from_micros(200));
/// The directory's last part: another format gets another.
const FORMAT: &str = "shared-1";

/// An entry that is not needed any more.
#[derive(Debug)]
pub(super) struct Struck {
    pub(super) slot: u32,
    pub(super) pack: Arc<Pack>,
    pub(super) at: u64,
    pub(super) len: u64,
}

#[derive(Debug)]
struct State {
    roster: Roster,
    packs: HashMap<PackId, Weak<Pack>>,
    held: HashMap<Address, Weak<Piece>>,
}

/// See the [module documentation](self).
#[derive(Debug)]
pub(super) struct Store {
    dir: PathBuf,
    gate: File,
    me: MemberId,
    state: Mutex<State>,
    struck: Mutex<Vec<Struck>>,
}

/// The gate, open for its holder until dropped.
struct Gate<'a>(&'a File);

impl Drop for Gate<'_> {
    fn drop(&mut self) {
        let _ = self.0.unlock();
    }
}

/// What the living rely on.
#[derive(Default)]
struct Living {
    ranges: HashMap<PackId, Ranges>,
    /// Under which (process, descriptor) a pack can be had.
    doors: HashMap<PackId, Vec<(u32, i32)>>,
    pieces: HashMap<Address, Vec<Entry>>,
    /// Somebody alive has an entry that cannot be read: nobody knows what it relies on.
    is_unclear: bool,
}

impl Living {
    fn add(&mut self, entry: &Entry) {
        self.ranges.entry(entry.pack).or_default().add(entry.range());
    }

    fn add_member(&mut self, member: &Member) {
        self.is_unclear |= !member.is_whole;
        for entry in &member.entries {
            self.add(entry);
            if member.is_reachable {
                self.doors.entry(entry.pack).or_default().push((member.id.pid, entry.fd));
                self.pieces.entry(entry.address).or_default().push(*entry);
            }
        }
    }
}

impl Store {
    /// Becomes a member.
    pub(super) fn open(dir: Option<&Path>) -> io::Result<Arc<Store>> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let dir = directory(dir)?;
        let me = MemberId::here(NUMBER.fetch_add(1, Ordering::Relaxed))?;
        let mut options = OpenOptions::new();
        let gate = options.read(true).write(true).create(true).truncate(false).mode(0o600).open(dir.join("gate"))?;
        let roster = {
            let _gate = pass(&gate)?;
            Roster::enlist(&dir, me)?
        };
        let state = Mutex::new(State { roster, packs: HashMap::new(), held: HashMap::new() });
        let store = Arc::new(Store { dir, gate, me, state, struck: Mutex::default() });
        // Best effort: whoever comes next buries what is left.
        let _ = store.with_living(|_, _| ());
        Ok(store)
    }

    /// This member.
    pub(super) fn me(&self) -> MemberId {
        self.me
    }

    /// A new pack.
    pub(super) fn create_pack(&self, len: u64) -> io::Result<Arc<Pack>> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let id = PackId { member: self.me, number: NUMBER.fetch_add(1, Ordering::Relaxed) };
        let pack = Arc::new(Pack::create(id, len)?);
        let packs = &mut lock(&self.state).packs;
        packs.retain(|_, pack| pack.strong_count() > 0);
        packs.insert(id, Arc::downgrade(&pack));
        Ok(pack)
    }

    /// Figures.
    pub(super) fn usage(&self) -> SharedUse {
        let state = lock(&self.state);
        let packs = state.packs.values().filter_map(Weak::upgrade).filter(|pack| pack.id.member == self.me);
        let own = packs.map(|pack| pack.memory()).sum();
        let borrowed = state.roster.entries().filter(|entry| entry.pack.member != self.me);
        SharedUse { own, borrowed: borrowed.map(|entry| entry.address.len).sum() }
    }

    /// Notes that an entry is not needed any more.
    pub(super) fn strike(&self, struck: Struck) {
        lock(&self.struck).push(struck);
    }

    /// Strikes what was noted.
    pub(super) fn settle(&self) {
        if !lock(&self.struck).is_empty() {
            // Best effort: it stays noted.
            let _ = self.with_living(|_, _| ());
        }
    }

    /// Opens the gate, strikes, buries; then `with` sees what the living rely on.
    fn with_living<R>(&self, with: impl FnOnce(&mut State, &Living) -> R) -> io::Result<R> {
        let mut state = lock(&self.state);
        let _gate = pass(&self.gate)?;
        let (alive, dead): (Vec<_>, Vec<_>) =
            others(&self.dir, self.me)?.into_iter().partition(|member| member.is_alive);
        let struck = std::mem::take(&mut *lock(&self.struck));
        let gone: Vec<&Struck> = struck.iter().filter(|struck| state.roster.strike(struck.slot).is_ok()).collect();
        let mut living = Living::default();
        state.roster.entries().for_each(|entry| living.add(entry));
        alive.iter().for_each(|member| living.add_member(member));
        for struck in gone {
            let mut unused = Ranges::of(struck.at..struck.at + struck.len);
            give_back(&struck.pack, &mut unused, &living);
        }
        bury(&dead, &living, |id| find_pack(&mut state.packs, &living, id));
        Ok(with(&mut state, &living))
    }

    /// For each piece of `pack` a place to rely on: one that there is already, or else its own, which others can find from
    /// now on. What is there already has still to be compared.
    pub(super) fn find(
        self: &Arc<Self>,
        pack: &Arc<Pack>,
        pieces: &BTreeMap<u64, Address>,
    ) -> io::Result<BTreeMap<u64, Arc<Piece>>> {
        self.with_living(|state, living| {
            state.held.retain(|_, piece| piece.strong_count() > 0);
            let mut found = BTreeMap::new();
            for (&at, &address) in pieces {
                let held = state.held.get(&address).and_then(Weak::upgrade);
                let piece = match held {
                    Some(piece) => Some(piece),
                    None => self.borrow(state, living, address).or_else(|| self.rely(state, pack, at, address)),
                };
                found.extend(piece.map(|piece| (at, piece)));
            }
            found
        })
    }

    /// Relies on another member's piece.
    fn borrow(self: &Arc<Self>, state: &mut State, living: &Living, address: Address) -> Option<Arc<Piece>> {
        living.pieces.get(&address)?.iter().find_map(|entry| {
            let pack = find_pack(&mut state.packs, living, entry.pack)?;
            (entry.range().end <= pack.len()).then(|| self.rely(state, &pack, entry.at, address)).flatten()
        })
    }

    /// Enters a piece into the roster: from now on others find it, too.
    fn rely(self: &Arc<Self>, state: &mut State, pack: &Arc<Pack>, at: u64, address: Address) -> Option<Arc<Piece>> {
        let entry = Entry { address, pack: pack.id, at, fd: pack.fd() };
        let slot = state.roster.add(entry).ok()?;
        let piece = Arc::new(Piece { store: Arc::clone(self), pack: Arc::clone(pack), at, address, slot });
        state.held.insert(address, Arc::downgrade(&piece));
        Some(piece)
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // A forked child has a copy of this, but is not the member.
        if std::process::id() == self.me.pid && self.with_living(|_, _| ()).is_ok() {
            lock(&self.state).roster.resign();
        }
    }
}

/// Waits for the gate, not for ever.
fn pass(gate: &File) -> io::Result<Gate<'_>> {
    let until = Instant::now() + PATIENCE.0;
    loop {
        match gate.try_lock() {
            Ok(()) => return Ok(Gate(gate)),
            Err(TryLockError::Error(error)) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
            Err(_) if Instant::now() >= until => return Err(io::ErrorKind::TimedOut.into()),
            Err(_) => std::thread::sleep(PATIENCE.1),
        }
    }
}

/// A pack that is open here, or that a living member has open.
fn find_pack(packs: &mut HashMap<PackId, Weak<Pack>>, living: &Living, id: PackId) -> Option<Arc<Pack>> {
    if let Some(pack) = packs.get(&id).and_then(Weak::upgrade) {
        return Some(pack);
    }
    let pack = living.doors.get(&id)?.iter().find_map(|&(pid, fd)| Pack::open(pid, fd, id).ok())?;
    let pack = Arc::new(pack);
    packs.insert(id, Arc::downgrade(&pack));
    Some(pack)
}

/// Gives back what of `unused` nobody relies on.
fn give_back(pack: &Pack, unused: &mut Ranges, living: &Living) {
    if living.is_unclear {
        return;
    }
    if let Some(used) = living.ranges.get(&pack.id) {
        used.iter().for_each(|range| unused.remove(range));
    }
    for range in unused.iter() {
        step();
        let _ = pack.punch(range);
    }
}

/// Gives back what only the dead relied on, and what they had not told of yet; then their rosters go.
fn bury(dead: &[Member], living: &Living, mut open: impl FnMut(PackId) -> Option<Arc<Pack>>) {
    let mut unused: HashMap<PackId, Ranges> = HashMap::new();
    for member in dead {
        for entry in &member.entries {
            unused.entry(entry.pack).or_default().add(entry.range());
        }
        for id in living.ranges.keys().filter(|id| id.member == member.id) {
            unused.entry(*id).or_default().add(0..u64::MAX);
        }
    }
    for (id, mut ranges) in unused {
        // A pack that nobody alive relies on has gone with its last descriptor, or is its living creator's to punch.
        if let Some(pack) = open(id) {
            give_back(&pack, &mut ranges, living);
        }
    }
    for member in dead {
        step();
        let _ = fs::remove_file(&member.path);
    }
}

/// The directory of rosters: `dir`, or one of this user's in shared memory or among temporary files.
fn directory(dir: Option<&Path>) -> io::Result<PathBuf> {
    let parent = match dir {
        Some(dir) => {
            DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
            dir.to_path_buf()
        }
        None => {
            let memory = Path::new("/dev/shm");
            let root = if memory.is_dir() { memory.to_path_buf() } else { std::env::temp_dir() };
            private::home(&root)?
        }
    };
    private::private(&parent.join(FORMAT))
}
