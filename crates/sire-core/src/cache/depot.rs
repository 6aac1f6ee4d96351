//! A depot: the cache of one device behind its one short lock, and what waits beside it: blocks that other streams still use, and blocks whose reuse
//! has to wait for the whole device. No driver is called here, so the lock is never held for longer than a few links.

use super::{Cache, Freed, Growth, Key, Segment, Step};
use crate::driver::{Addr, Device, Event, ProgramStream};
use crate::ranges::Ranges;
use crate::sync::{AtomicBool, Mutex, MutexGuard, Ordering, lock};
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::Arc;

/// What a region's memory needs of whoever gives it out.
#[derive(Clone, Debug)]
pub(crate) struct Door {
    /// Whether the region is resident.
    pub(crate) open: Arc<AtomicBool>,
    /// Whether the region must be told that addresses hold something new.
    pub(crate) tells: bool,
}

/// How a request without a driver call ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Quick {
    /// The region must be told if `true`.
    Taken(Addr, bool),
    /// The region is not resident.
    Closed,
    /// There is no such arena, or nothing free in it.
    Nothing,
}

/// A freed block that waits for a point in another stream.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Waiting {
    pub(crate) event: Event,
    pub(crate) stream: ProgramStream,
    pub(crate) start: u64,
}

/// Freed blocks that can be given out when the device has come to where it is now.
#[derive(Debug, Default)]
pub(crate) struct Backlog {
    pub(crate) waiting: Vec<Waiting>,
    starts: Vec<u64>,
}

/// A freed block whose streams were being captured, so that no point in them could be marked.
type Deferred = (u64, Vec<ProgramStream>);

#[derive(Debug)]
struct State {
    cache: Cache,
    /// By arena.
    doors: Vec<Door>,
    waiting: Vec<Waiting>,
    /// How many points each waiting block still waits for.
    points: HashMap<u64, usize>,
    deferred: Vec<Deferred>,
    /// Blocks that wait for the whole device, and their bytes.
    quarantine: Vec<u64>,
    quarantined: u64,
    /// Events that are not in use.
    spare: Vec<Event>,
    /// Private pools by the program's names.
    pools: BTreeMap<(u64, u64), u32>,
}

/// See the [module documentation](self).
#[derive(Debug)]
pub(crate) struct Depot {
    pub(crate) device: Device,
    /// Memory comes in multiples of this.
    pub(crate) granule: u64,
    state: Mutex<State>,
    /// Whether anything waits, so that nobody need lock to find out.
    waits: AtomicBool,
    /// Something was said about single allocations (keep, discard), so that a free has to take it back.
    remarks: AtomicBool,
}

impl Depot {
    pub(crate) fn new(device: Device, granule: u64) -> Depot {
        let state = State {
            cache: Cache::new(granule),
            doors: Vec::new(),
            waiting: Vec::new(),
            points: HashMap::new(),
            deferred: Vec::new(),
            quarantine: Vec::new(),
            quarantined: 0,
            spare: Vec::new(),
            pools: BTreeMap::new(),
        };
        Depot {
            device,
            granule,
            state: Mutex::new(state),
            waits: AtomicBool::new(false),
            remarks: AtomicBool::new(false),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Memory out of what is free, if the region is resident.
    #[inline]
    pub(crate) fn take(&self, key: Key, size: u64) -> Quick {
        let mut state = self.state();
        let Some(arena) = state.cache.arena(key) else { return Quick::Nothing };
        let door = &state.doors[arena as usize];
        if !door.open.load(Ordering::SeqCst) {
            return Quick::Closed;
        }
        let tells = door.tells;
        state.cache.take(arena, size).map_or(Quick::Nothing, |start| Quick::Taken(Addr(start), tells))
    }

    /// The arena for `key`, made if there is none.
    pub(crate) fn arena(&self, key: Key, door: impl FnOnce() -> Door) -> u32 {
        let mut state = self.state();
        if let Some(arena) = state.cache.arena(key) {
            return arena;
        }
        state.doors.push(door());
        state.cache.add_arena(key)
    }

    /// See [`Cache::grow`].
    pub(crate) fn grow(&self, arena: u32, size: u64, frugal: bool) -> Step {
        self.state().cache.grow(arena, size, frugal)
    }

    pub(crate) fn grown(&self, growth: Growth, pieces: &[Range<u64>]) -> Addr {
        Addr(self.state().cache.grown(growth, pieces))
    }

    pub(crate) fn give_up(&self, growth: Growth, stuck: &[Range<u64>]) {
        self.state().cache.give_up(growth, stuck);
    }

    pub(crate) fn add_reservation(&self, arena: u32, base: Addr, size: u64) {
        self.state().cache.add_reservation(arena, base.0, size);
    }

    // ---- freeing ----------------------------------------------------------------------------------------------------------------

    /// Takes the block at `addr` back; `None` if the program has none there. If other streams have used it, it is for the caller to
    /// mark their points ([`Depot::wait_for`]).
    #[inline]
    pub(crate) fn free(&self, addr: Addr) -> Option<Freed> {
        self.state().cache.free(addr.0)
    }

    /// The same; the block waits for the whole device. Returns how many bytes wait so.
    pub(crate) fn free_later(&self, addr: Addr) -> Option<u64> {
        let mut state = self.state();
        let size = state.cache.requested(addr.0)?;
        if !state.cache.free_later(addr.0) {
            return None;
        }
        state.quarantine.push(addr.0);
        state.quarantined += size;
        self.waits.store(true, Ordering::Relaxed);
        Some(state.quarantined)
    }

    /// The block at `start` waits for these points, at least one.
    pub(crate) fn wait_for(&self, start: u64, points: Vec<(Event, ProgramStream)>) {
        let mut state = self.state();
        state.points.insert(start, points.len());
        state.waiting.extend(points.into_iter().map(|(event, stream)| Waiting { event, stream, start }));
        self.waits.store(true, Ordering::Relaxed);
    }

    /// Points in these streams cannot be marked now: later.
    pub(crate) fn defer(&self, start: u64, streams: Vec<ProgramStream>) {
        self.state().deferred.push((start, streams));
        self.waits.store(true, Ordering::Relaxed);
    }

    /// The freed block at `start` waits for the whole device after all.
    pub(crate) fn quarantine(&self, start: u64) {
        self.state().quarantine.push(start);
        self.waits.store(true, Ordering::Relaxed);
    }

    /// Whether anything waits.
    pub(crate) fn has_waiting(&self) -> bool {
        self.waits.load(Ordering::Relaxed)
    }

    /// Whether something waits for the whole device.
    pub(crate) fn has_quarantine(&self) -> bool {
        !self.state().quarantine.is_empty()
    }

    /// The points that are waited for: the caller asks about them and puts them back. And what was put off until no capture is in progress.
    pub(crate) fn take_asked(&self) -> (Vec<Waiting>, Vec<Deferred>) {
        let mut state = self.state();
        (std::mem::take(&mut state.waiting), std::mem::take(&mut state.deferred))
    }

    /// Of what was taken, this has passed, and that has not.
    pub(crate) fn put_waiting(&self, passed: &[Waiting], left: Vec<Waiting>) {
        let mut state = self.state();
        passed.iter().for_each(|point| state.pass(*point));
        state.waiting.extend(left);
        self.note_waiting(&state);
    }

    /// Everything that waits: whoever takes it waits for the device, then says so.
    pub(crate) fn take_backlog(&self) -> Backlog {
        let mut state = self.state();
        state.quarantined = 0;
        let deferred = std::mem::take(&mut state.deferred).into_iter().map(|(start, _)| start);
        let mut starts = std::mem::take(&mut state.quarantine);
        starts.extend(deferred);
        Backlog { waiting: std::mem::take(&mut state.waiting), starts }
    }

    /// The device has been waited for, or could not be.
    pub(crate) fn put_backlog(&self, backlog: Backlog, waited: bool) {
        let mut state = self.state();
        if waited {
            backlog.waiting.iter().for_each(|point| state.pass(*point));
            backlog.starts.iter().for_each(|&start| state.cache.passed(start));
            state.cache.counts.synchronizations += 1;
        } else {
            state.waiting.extend(backlog.waiting);
            state.quarantine.extend(backlog.starts);
        }
        self.note_waiting(&state);
    }

    fn note_waiting(&self, state: &State) {
        let any = !(state.waiting.is_empty() && state.deferred.is_empty() && state.quarantine.is_empty());
        self.waits.store(any, Ordering::Relaxed);
    }

    /// An event that is not in use.
    pub(crate) fn spare_event(&self) -> Option<Event> {
        self.state().spare.pop()
    }

    pub(crate) fn put_event(&self, event: Event) {
        self.state().spare.push(event);
    }

    /// `stream` has used the block at `addr`. False if the program has none there.
    pub(crate) fn record(&self, addr: Addr, stream: ProgramStream) -> bool {
        self.state().cache.record(addr.0, stream)
    }

    // ---- giving back ------------------------------------------------------------------------------------------------------------

    /// Addresses of pieces. See [`Cache::take_releasable`].
    pub(crate) fn take_releasable(&self, enough: u64) -> Vec<Range<u64>> {
        self.state().cache.take_releasable(enough)
    }

    /// These pieces stay after all.
    pub(crate) fn keep(&self, pieces: &[Range<u64>]) {
        let mut state = self.state();
        pieces.iter().for_each(|piece| state.cache.keep(piece.start));
    }

    /// The piece at `base` is unmapped.
    pub(crate) fn gone(&self, base: Addr) {
        self.state().cache.gone(base.0);
    }

    /// See [`Cache::take_empty`].
    pub(crate) fn take_empty(&self) -> Vec<(u64, u64)> {
        self.state().cache.take_empty()
    }

    /// See [`Cache::set_limit`].
    pub(crate) fn set_limit(&self, bytes: Option<u64>) {
        self.state().cache.set_limit(bytes);
    }

    // ---- private pools ----------------------------------------------------------------------------------------------------------

    /// The private pool of this name, held once more; made if there is none.
    pub(crate) fn hold_pool(&self, id: (u64, u64)) -> u32 {
        let mut state = self.state();
        let known = state.pools.get(&id).copied();
        if let Some(pool) = known.filter(|&pool| state.cache.hold_pool(pool)) {
            return pool;
        }
        let pool = state.cache.add_pool();
        state.pools.insert(id, pool);
        pool
    }

    /// Held once less. False if there is none.
    pub(crate) fn release_pool(&self, id: (u64, u64)) -> bool {
        let mut state = self.state();
        let Some(pool) = state.pools.get(&id).copied() else { return false };
        if state.cache.release_pool(pool) {
            state.pools.remove(&id);
        }
        true
    }

    /// The device is being reset: no graph is left for which a private pool would keep memory. Returns the events that are not in use, which go.
    pub(crate) fn retire(&self) -> Vec<Event> {
        let mut state = self.state();
        state.cache.end_pools();
        state.pools.clear();
        std::mem::take(&mut state.spare)
    }

    // ---- what is known ----------------------------------------------------------------------------------------------------------

    /// See [`Cache::requested`].
    pub(crate) fn requested(&self, start: Addr) -> Option<u64> {
        self.state().cache.requested(start.0)
    }

    /// The allocation that holds `addr`: its start and its bytes.
    pub(crate) fn block(&self, addr: Addr) -> Option<(Addr, u64)> {
        self.state().cache.block(addr.0).map(|live| (Addr(live.start), live.requested))
    }

    /// Offsets in `range` that the program uses.
    pub(crate) fn live_ranges(&self, range: &Range<u64>) -> Ranges {
        let mut live = Ranges::new();
        for block in self.state().cache.live(range) {
            let (start, end) = (block.start.max(range.start), (block.start + block.requested).min(range.end));
            live.add(start - range.start..end - range.start);
        }
        live
    }

    /// Where allocations begin in `range`.
    pub(crate) fn starts(&self, range: &Range<u64>) -> Vec<Addr> {
        let live = self.state().cache.live(range);
        live.iter().filter(|block| block.start >= range.start).map(|block| Addr(block.start)).collect()
    }

    /// Allocations that begin in `range`, and bytes asked for that lie there.
    pub(crate) fn figures(&self, range: &Range<u64>) -> (u64, u64) {
        let live = self.state().cache.live(range);
        let begin = live.iter().filter(|block| block.start >= range.start).count() as u64;
        let bytes = |block: &super::Live| (block.start + block.requested).min(range.end) - block.start.max(range.start);
        (begin, live.iter().map(bytes).sum())
    }

    /// From now on a free takes back what was said about the allocation.
    pub(crate) fn note_remarks(&self) {
        self.remarks.store(true, Ordering::Release);
    }

    /// Whether anything was ever said about single allocations.
    pub(crate) fn has_remarks(&self) -> bool {
        self.remarks.load(Ordering::Acquire)
    }

    /// Reads or changes what is counted.
    pub(crate) fn counts<R>(&self, with: impl FnOnce(&mut super::Counts) -> R) -> R {
        with(&mut self.state().cache.counts)
    }

    /// Everything that is mapped.
    pub(crate) fn segments(&self) -> Vec<Segment> {
        let state = self.state();
        let name = |pool: u32| state.pools.iter().find(|(_, number)| **number == pool).map_or((0, 0), |(id, _)| *id);
        state.cache.segments(self.device.0, name)
    }

    /// Bytes of host memory that it takes, about.
    pub(crate) fn bookkeeping(&self) -> u64 {
        self.state().cache.bookkeeping()
    }
}

impl State {
    /// One of the points that a block waits for has passed.
    fn pass(&mut self, point: Waiting) {
        self.spare.push(point.event);
        let left = self.points.get_mut(&point.start).map(|left| {
            *left -= 1;
            *left
        });
        if left == Some(0) {
            self.points.remove(&point.start);
            self.cache.passed(point.start);
        }
    }
}
