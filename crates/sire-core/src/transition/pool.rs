//! The pool: physical memory on its way from chunks that give it back to chunks that need it. Outside of a switch it is a door without a
//! guard: what is given goes to the driver, and whoever needs memory makes it.
//!
//! In a switch it keeps two promises. *Credit*: nobody makes memory beyond what was free at the start and what has been given
//! back since, so that the device never needs more than it has; who has no credit waits for the next chunk to be given.
//! *Recycling*: a chunk whose size is still needed changes hands without a driver call.

use crate::driver::{Addr, Device, DriverResult, Physical, Properties};
use crate::extent::{Chunk, Claim, Truth};
use crate::heap::{Heap, Orphan};
use crate::sync::{Condvar, Mutex, lock, wait};
use std::collections::{BTreeMap, VecDeque};

/// Chunks of a kind that lie ready before whoever gives them waits.
const AHEAD: usize = 4;

/// Chunks of one size on one device, of which the program asked the same.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct Kind {
    pub(super) device: Device,
    pub(super) size: u64,
    pub(super) properties: Option<Properties>,
}

impl Kind {
    /// The kind of a chunk.
    pub(super) fn of(device: Device, chunk: &Chunk) -> Kind {
        Kind { device, size: chunk.size, properties: chunk.properties }
    }
}

/// Where a chunk's memory comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Supply {
    /// From a chunk that needs it no more.
    Recycled(Physical),
    /// From the driver: the caller has the credit to make it.
    Driver,
}

#[derive(Debug, Default)]
struct State {
    /// Bytes that may still be made; no limit on a device that is not here.
    credit: BTreeMap<Device, u64>,
    /// Chunks that are still to be supplied.
    needed: BTreeMap<Kind, usize>,
    /// In the order in which they were given: whoever takes gets what has been idle for longest.
    spare: BTreeMap<Kind, VecDeque<Physical>>,
    /// Nothing more will be given.
    closed: bool,
    /// What is waited for, and whether somebody may still take.
    waiting: Vec<Kind>,
    taken_from: bool,
    stopped: bool,
}

/// What giving a chunk's memory came to, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Given {
    /// Back to the driver.
    pub(super) released: u64,
    /// To another chunk.
    pub(super) recycled: u64,
}

/// See the [module documentation](self).
#[derive(Debug)]
pub(super) struct Pool<'a> {
    heap: &'a Heap,
    state: Mutex<State>,
    changed: Condvar,
}

impl<'a> Pool<'a> {
    /// No limit, nothing recycled.
    pub(super) fn open(heap: &'a Heap) -> Pool<'a> {
        Pool::new(heap, State::default())
    }

    /// No limit; chunks are kept for those of `claims` that are away.
    pub(super) fn recycling<'b>(heap: &'a Heap, claims: impl Iterator<Item = &'b Claim>) -> Pool<'a> {
        Pool::new(heap, State { needed: needs(claims), ..State::default() })
    }

    /// As [`Pool::recycling`]; on each device no more is made than `credit` bytes and what is given there.
    pub(super) fn limited<'b>(
        heap: &'a Heap,
        claims: impl Iterator<Item = &'b Claim>,
        credit: BTreeMap<Device, u64>,
    ) -> Pool<'a> {
        Pool::new(heap, State { needed: needs(claims), credit, ..State::default() })
    }

    fn new(heap: &'a Heap, state: State) -> Pool<'a> {
        Pool { heap, state: Mutex::new(state), changed: Condvar::new() }
    }

    /// A guard at whose end nothing more will be given.
    pub(super) fn giver(&self) -> Giver<'_> {
        Giver(self)
    }

    /// The chunk that was to be supplied needs nothing any more.
    pub(super) fn skip(&self, kind: Kind) {
        let superfluous = lock(&self.state).skip(kind);
        if let Some(physical) = superfluous {
            self.release(kind, physical);
        }
    }

    /// Releases what nobody took.
    pub(super) fn release_spare(&self) {
        let spare = std::mem::take(&mut lock(&self.state).spare);
        for (kind, physicals) in spare {
            physicals.into_iter().for_each(|physical| self.release(kind, physical));
        }
    }

    /// What nobody took is kept for whoever takes from `other`.
    pub(super) fn pour_into(&self, other: &Pool<'_>) {
        let spare = std::mem::take(&mut lock(&self.state).spare);
        for (kind, physicals) in spare {
            for physical in physicals {
                if !lock(&other.state).keep(kind, physical) {
                    self.release(kind, physical);
                }
            }
        }
    }

    fn release(&self, kind: Kind, physical: Physical) {
        let plain = kind.properties.is_none();
        let orphan = Orphan { device: kind.device, size: kind.size, plain, physical };
        let released = self.heap.release_or_keep(orphan);
        if let (true, Some(credit)) = (released, lock(&self.state).credit.get_mut(&kind.device)) {
            *credit += kind.size;
        }
        self.changed.notify_all();
    }

    /// Memory for one chunk; waits for credit. `None` if the work was stopped.
    pub(super) fn take(&self, kind: Kind) -> Option<Supply> {
        let mut state = lock(&self.state);
        loop {
            if state.stopped {
                return None;
            }
            if let Some(supply) = state.supply(kind) {
                self.changed.notify_all();
                return Some(supply);
            }
            state.waiting.push(kind);
            self.changed.notify_all();
            state = wait(&self.changed, state);
            state.waits_no_more(kind);
        }
    }

    /// Whether [`Pool::take`] would wait now.
    pub(super) fn would_wait(&self, kind: Kind) -> bool {
        lock(&self.state).would_wait(kind)
    }

    /// Unmaps the chunk; its memory goes to whoever needs that size, or back to the driver. What the driver refuses stays noted in
    /// the chunk.
    pub(super) fn give(&self, device: Device, base: Addr, chunk: &mut Chunk) -> DriverResult<Given> {
        let kind = Kind::of(device, chunk);
        self.await_takers(kind);
        self.heap.unmap(base, chunk)?;
        if let Some(_kept) = chunk.physical.take_if(|physical| lock(&self.state).keep(kind, *physical)) {
            self.changed.notify_all();
            return Ok(Given { released: 0, recycled: kind.size });
        }
        let released = self.heap.strip(device, base, chunk)?;
        if let Some(credit) = lock(&self.state).credit.get_mut(&device) {
            *credit += released;
        }
        self.changed.notify_all();
        Ok(Given { released, recycled: 0 })
    }

    /// Waits while enough lies ready for whoever takes. A giver that has nothing to copy would otherwise keep the driver busy with
    /// unmapping all it has, before the first chunk could be mapped anew. While somebody waits for what is not there yet, nobody else does.
    fn await_takers(&self, kind: Kind) {
        let mut state = lock(&self.state);
        while state.is_ahead(kind) {
            state = wait(&self.changed, state);
        }
    }

    /// A guard that lasts as long as somebody takes.
    pub(super) fn taker(&self) -> Taker<'_> {
        lock(&self.state).taken_from = true;
        Taker(self)
    }

    /// Nobody takes any more, or not before all is given: whoever gives need not wait.
    pub(super) fn nobody_takes(&self) {
        lock(&self.state).taken_from = false;
        self.changed.notify_all();
    }

    /// Nobody waits any more.
    pub(super) fn stop(&self) {
        lock(&self.state).stopped = true;
        self.changed.notify_all();
    }
}

/// Whoever gives memory. Dropped, also by a panic, it lets nobody wait any longer.
#[derive(Debug)]
pub(super) struct Giver<'a>(&'a Pool<'a>);

impl Drop for Giver<'_> {
    fn drop(&mut self) {
        lock(&self.0.state).closed = true;
        self.0.changed.notify_all();
    }
}

/// Whoever takes memory. Dropped, also by a panic, it keeps nobody waiting.
#[derive(Debug)]
pub(super) struct Taker<'a>(&'a Pool<'a>);

impl Drop for Taker<'_> {
    fn drop(&mut self) {
        self.0.nobody_takes();
    }
}

/// How many chunks of each kind are away and without memory.
fn needs<'b>(claims: impl Iterator<Item = &'b Claim>) -> BTreeMap<Kind, usize> {
    let mut needed = BTreeMap::new();
    for claim in claims {
        let away = claim.chunks.iter().filter(|chunk| chunk.truth == Truth::Backup && chunk.physical.is_none());
        away.for_each(|chunk| *needed.entry(Kind::of(claim.extent.device, chunk)).or_default() += 1);
    }
    needed
}

impl State {
    fn is_ahead(&self, kind: Kind) -> bool {
        let ready = self.spare.get(&kind).map_or(0, VecDeque::len);
        let waits_in_vain = self.waiting.iter().any(|&kind| self.would_wait(kind));
        ready >= AHEAD && !waits_in_vain && self.taken_from && !self.stopped
    }

    fn would_wait(&self, kind: Kind) -> bool {
        let is_spare = self.spare.get(&kind).is_some_and(|spare| !spare.is_empty());
        !is_spare && !self.closed && self.credit.get(&kind.device).is_some_and(|&credit| credit < kind.size)
    }

    fn waits_no_more(&mut self, kind: Kind) {
        if let Some(at) = self.waiting.iter().position(|&waiting| waiting == kind) {
            self.waiting.swap_remove(at);
        }
    }

    fn supply(&mut self, kind: Kind) -> Option<Supply> {
        let supply = match self.spare.get_mut(&kind).and_then(VecDeque::pop_front) {
            Some(physical) => Supply::Recycled(physical),
            None => self.spend(kind)?,
        };
        if let Some(needed) = self.needed.get_mut(&kind) {
            *needed = needed.saturating_sub(1);
        }
        Some(supply)
    }

    /// One chunk fewer is to be supplied; returns memory that nobody will need then.
    fn skip(&mut self, kind: Kind) -> Option<Physical> {
        let needed = self.needed.get_mut(&kind)?;
        *needed = needed.saturating_sub(1);
        let spare = self.spare.get_mut(&kind)?;
        if spare.len() > *needed { spare.pop_front() } else { None }
    }

    /// Without any hope of more, the driver may say what there is.
    fn spend(&mut self, kind: Kind) -> Option<Supply> {
        let Some(credit) = self.credit.get_mut(&kind.device) else { return Some(Supply::Driver) };
        if *credit < kind.size && !self.closed {
            return None;
        }
        *credit = credit.saturating_sub(kind.size);
        Some(Supply::Driver)
    }

    /// Takes a chunk's memory if as many chunks of its size are still to be supplied.
    fn keep(&mut self, kind: Kind, physical: Physical) -> bool {
        let spare = self.spare.entry(kind).or_default();
        let wanted = !self.stopped && spare.len() < self.needed.get(&kind).copied().unwrap_or(0);
        if wanted {
            spare.push_back(physical);
        }
        wanted
    }
}
