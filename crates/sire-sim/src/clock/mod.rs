//! The model clock: virtual time, for machines with a [`Profile`]. It only keeps account; work is done, and waited for, as without it.
//!
//! The rules. **Threads** have clocks of their own, since a thread that maps memory beside one that copies is what is to be modelled. A call begins at
//! its thread's clock and moves it on by what the call costs; a call that fails costs nothing. **Work** starts at the latest of: the end of what
//! its stream held before, the events it waits for, the submitting thread's clock at the end of the call, and the
//! moment its engine is free (one engine per direction, one for work on the device; first ready, first served). While both directions of a device are busy,
//! each keeps the profile's duplex share of its speed. **Waits** move the waiting thread's clock to the end of what it
//! waits for; a query says whether the thread's clock is past it. **Objects carry time** from thread to thread: a physical cannot be mapped before
//! it was made and last unmapped, nor a mapping used before it was usable, nor unmapped before the last work on it ended, nor
//! memory made before enough was given back. **The driver** carries out one virtual-memory call at a time if the profile says so. **Reading the clock**
//! ([`Clock::now`]) gives the latest of all threads' clocks, and nothing that is called later begins before it; a new thread begins there too.
//!
//! So times of a single-threaded program are a function of its calls: equal to the last bit, whatever the workers do. With several threads, what
//! is ready earlier in virtual time takes the gap left for it even if it is submitted later in real time ([`calendar`]); only
//! what was already seen by a wait is never revised ([`schedule`]), and ties fall as the calls fell.

mod calendar;
mod pace;
pub mod profile;
mod schedule;

use crate::core::locked;
use crate::types::PhysicalId;
use calendar::Calendar;
use pace::{Pace, View};
pub use profile::{Cost, Profile};
use schedule::Schedule;
pub use schedule::{Engine, Mark, Step};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard};
use std::thread::ThreadId;
use std::time::Instant;

/// Virtual time, in picoseconds since the machine was made.
pub type Time = u64;

/// Threads whose clocks are kept apart; with more, all clocks are joined.
const THREADS: usize = 1024;
/// Uses of a mapping that are kept one by one.
const USES: usize = 16;

/// Picoseconds as seconds.
pub fn seconds(time: Time) -> f64 {
    time as f64 / 1e12
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Clock {
    /// What things cost.
    pub profile: Profile,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    schedule: Schedule,
    /// Nothing that is called from now on begins before.
    floor: Time,
    threads: HashMap<ThreadId, Time>,
    /// Where threads keep in step: who is where.
    pace: Option<Pace>,
    /// When the driver is at a virtual-memory call.
    driver: Calendar,
    made: HashMap<PhysicalId, Time>,
    mappings: BTreeMap<u64, Mapping>,
    pools: Vec<Pool>,
}

/// What the clock knows about a mapping.
#[derive(Debug)]
struct Mapping {
    size: u64,
    physical: PhysicalId,
    usable: Time,
    used_until: Time,
    uses: Vec<Mark>,
}

/// Free memory of a device, by the time from which it can be had.
#[derive(Debug)]
struct Pool {
    bytes: BTreeMap<Time, u64>,
    scrubbed: Time,
}

impl State {
    fn mine(&self) -> Time {
        self.threads.get(&std::thread::current().id()).copied().unwrap_or(0).max(self.floor)
    }

    /// Who is to be looked at before the calling thread sees when `marks` end; nobody where threads do not keep in step, or if all was `calm` and still is.
    fn view(&mut self, marks: &[Mark], calm: Option<&View>) -> Option<View> {
        let pace = self.pace.as_mut()?;
        if calm.is_some_and(|view| pace.is_as_in(view)) {
            return None;
        }
        let end = marks.iter().map(|mark| self.schedule.end_of(mark)).max().unwrap_or(0);
        Some(pace.view(end))
    }

    fn set_mine(&mut self, time: Time) {
        if self.threads.len() >= THREADS {
            self.join();
        }
        let time = time.max(self.floor);
        self.threads.insert(std::thread::current().id(), time);
        if let Some(pace) = &mut self.pace {
            pace.is_at(time);
        }
    }

    fn join(&mut self) {
        self.floor = self.threads.drain().map(|(_, time)| time).fold(self.floor, Time::max);
        self.pace.iter_mut().for_each(Pace::forget);
    }

    fn overlapping(&mut self, addr: u64, len: u64) -> impl Iterator<Item = &mut Mapping> {
        let end = addr.saturating_add(len);
        let below = self.mappings.range(..=addr).next_back();
        let first = below.filter(|(base, found)| *base + found.size > addr).map_or(addr, |(base, _)| *base);
        self.mappings.range_mut(first..end.max(first)).map(|(_, mapping)| mapping)
    }

    /// A virtual-memory call of this thread that cannot begin before `from`; its end.
    fn driver_call(&mut self, from: Time, cost: Time, alone: bool) -> Time {
        let from = from.max(self.mine());
        let start = if alone { self.driver.gap(from, cost) } else { from };
        if alone {
            self.driver.take(start, start + cost);
        }
        self.set_mine(start + cost);
        start + cost
    }

    fn give(&mut self, device: u32, bytes: u64, at: Time, scrub: Time) {
        if let Some(pool) = self.pools.get_mut(device as usize) {
            pool.give(bytes, at, scrub);
        }
    }
}

impl Mapping {
    fn note(&mut self, mark: &Mark) {
        if self.uses.len() >= USES {
            let settled = self.uses.iter().filter_map(Mark::settled).max();
            self.used_until = self.used_until.max(settled.unwrap_or(0));
            self.uses.retain(|mark| mark.settled().is_none());
        }
        self.uses.push(mark.clone());
    }
}

impl Pool {
    fn give(&mut self, bytes: u64, at: Time, scrub: Time) {
        let ready = match scrub {
            0 => at,
            _ => self.scrubbed.max(at) + scrub,
        };
        self.scrubbed = ready;
        *self.bytes.entry(ready).or_default() += bytes;
    }

    /// From when on `bytes` can be had, which then are gone. Memory that the pool does not know of (another process gave it back) can be had at once.
    fn take(&mut self, mut bytes: u64) -> Time {
        let mut ready = 0;
        while bytes > 0
            && let Some(mut first) = self.bytes.first_entry()
        {
            ready = *first.key();
            let taken = bytes.min(*first.get());
            *first.get_mut() -= taken;
            bytes -= taken;
            if *first.get() == 0 {
                first.remove();
            }
        }
        ready
    }
}

/// Time itself.
impl Clock {
    /// At 0, for devices with so much memory each. If `paced`, threads keep in step: see [`pace`].
    pub fn new(profile: Profile, memory: &[u64], paced: bool) -> Clock {
        let pool = |bytes: &u64| Pool { bytes: BTreeMap::from([(0, *bytes)]), scrubbed: 0 };
        let state = State {
            schedule: Schedule::new(memory.len() as u32, profile.copies.duplex),
            floor: 0,
            threads: HashMap::new(),
            pace: paced.then(Pace::default),
            driver: Calendar::default(),
            made: HashMap::new(),
            mappings: BTreeMap::new(),
            pools: memory.iter().map(pool).collect(),
        };
        Clock { profile, state: Mutex::new(state) }
    }

    /// The latest of all threads' clocks. Nothing that is called later begins before it.
    pub fn now(&self) -> Time {
        let mut state = locked(&self.state);
        state.join();
        state.floor
    }

    /// The calling thread's clock.
    pub fn mine(&self) -> Time {
        locked(&self.state).mine()
    }

    /// The calling thread does something for so long.
    pub fn spend(&self, time: Time) {
        let mut state = locked(&self.state);
        let mine = state.mine();
        state.set_mine(mine + time);
    }
}

/// Work and waiting.
impl Clock {
    /// The calling thread puts steps on a stream, one after the other, behind `after`; the end of the last.
    pub fn submit(&self, steps: &[Step], after: Vec<Mark>, call_us: f64) -> Mark {
        let mut state = locked(&self.state);
        let mine = state.mine() + profile::picos(call_us);
        state.set_mine(mine);
        let mut after = after;
        let nothing = [Step::by_itself(0)];
        let steps = if steps.is_empty() { &nothing } else { steps };
        let mut last = None;
        for step in steps {
            let touches = step.touches.into_iter().filter(|(_, len)| *len > 0);
            let usable =
                touches.clone().flat_map(|(addr, len)| state.overlapping(addr, len).map(|m| m.usable).max()).max();
            let ready = mine.max(usable.unwrap_or(0));
            let mark = state.schedule.submit(step, std::mem::take(&mut after), ready);
            touches.for_each(|(addr, len)| state.overlapping(addr, len).for_each(|mapping| mapping.note(&mark)));
            after.push(mark.clone());
            last = Some(mark);
        }
        last.unwrap_or_else(|| state.schedule.submit(&nothing[0], after, mine))
    }

    /// The calling thread waits for all of `marks`, and goes on `cost_us` later.
    pub fn wait(&self, marks: &[Mark], cost_us: f64) {
        let mut state = self.after_the_others(marks);
        let mine = state.mine();
        let latest = marks.iter().map(|mark| state.schedule.observe(mark)).fold(mine, Time::max);
        state.set_mine(latest + profile::picos(cost_us));
    }

    /// The state at the calling thread's turn to see when `marks` end.
    fn after_the_others(&self, marks: &[Mark]) -> MutexGuard<'_, State> {
        let (begin, mut calm) = (Instant::now(), None);
        loop {
            let mut state = locked(&self.state);
            let Some(view) = state.view(marks, calm.as_ref()) else { return state };
            if begin.elapsed() > pace::PATIENCE {
                return state;
            }
            drop(state);
            calm = Some(view).filter(|view| !view.has_somebody_earlier());
            if calm.is_none() {
                std::thread::yield_now();
            }
        }
    }

    /// Whether the calling thread's clock is past the end of `mark`.
    pub fn has_passed(&self, mark: &Mark) -> bool {
        let mut state = locked(&self.state);
        let mine = state.mine();
        let passed = state.schedule.end_of(mark) <= mine;
        if passed {
            state.schedule.observe(mark);
        }
        passed
    }

    /// When `mark` ends.
    pub fn end_of(&self, mark: &Mark) -> Time {
        locked(&self.state).schedule.observe(mark)
    }
}

/// Memory.
impl Clock {
    fn vmm(&self, state: &mut State, from: Time, cost: Cost, bytes: u64) -> Time {
        state.driver_call(from, cost.of(bytes), self.profile.vmm.one_at_a_time)
    }

    fn scrub(&self, bytes: u64) -> Time {
        self.profile.vmm.scrub_gb_s.map_or(0, |rate| profile::moving(bytes, rate))
    }

    /// Addresses were reserved or given back.
    pub fn reserved(&self, bytes: u64) {
        self.vmm(&mut locked(&self.state), 0, self.profile.vmm.reserve, bytes);
    }

    /// A physical was made.
    pub fn created(&self, physical: PhysicalId, device: u32, bytes: u64) {
        let mut state = locked(&self.state);
        let ready = state.pools.get_mut(device as usize).map_or(0, |pool| pool.take(bytes));
        let end = self.vmm(&mut state, ready, self.profile.vmm.create, bytes);
        state.made.insert(physical, end);
    }

    /// A handle was released: `dead` if it was the last count, `freed` (device, bytes) if the memory went back.
    pub fn released(&self, physical: PhysicalId, dead: bool, freed: Option<(u32, u64)>) {
        let mut state = locked(&self.state);
        let made = if dead { state.made.remove(&physical) } else { state.made.get(&physical).copied() };
        let bytes = freed.map_or(0, |(_, bytes)| bytes);
        let end = self.vmm(&mut state, made.unwrap_or(0), self.profile.vmm.release, bytes);
        if let Some((device, bytes)) = freed {
            state.give(device, bytes, end, self.scrub(bytes));
        }
    }

    /// A physical was mapped.
    pub fn mapped(&self, addr: u64, size: u64, physical: PhysicalId) {
        let mut state = locked(&self.state);
        let made = state.made.get(&physical).copied().unwrap_or(0);
        let usable = self.vmm(&mut state, made, self.profile.vmm.map, size);
        state.mappings.insert(addr, Mapping { size, physical, usable, used_until: 0, uses: Vec::new() });
    }

    /// Access was set.
    pub fn access_set(&self, addr: u64, size: u64) {
        let mut state = locked(&self.state);
        let mapped = state.overlapping(addr, size).map(|mapping| mapping.usable).max();
        let end = self.vmm(&mut state, mapped.unwrap_or(0), self.profile.vmm.set_access, size);
        state.overlapping(addr, size).for_each(|mapping| mapping.usable = end);
    }

    /// A mapping was removed; `freed` (device, bytes) if its memory went back.
    pub fn unmapped(&self, addr: u64, size: u64, freed: Option<(u32, u64)>) {
        let mut state = locked(&self.state);
        let mut idle = 0;
        let mapping = state.mappings.remove(&addr);
        let physical = mapping.as_ref().map(|mapping| mapping.physical);
        if let Some(mapping) = mapping {
            let uses = mapping.uses.iter().map(|mark| state.schedule.observe(mark));
            idle = uses.fold(mapping.used_until.max(mapping.usable), Time::max);
        }
        let end = self.vmm(&mut state, idle, self.profile.vmm.unmap, size);
        // Whoever maps the memory elsewhere does so afterwards, on whatever thread.
        if let Some(made) = physical.and_then(|physical| state.made.get_mut(&physical)) {
            *made = end.max(*made);
        }
        if let Some((device, bytes)) = freed {
            state.give(device, bytes, end, self.scrub(bytes));
        }
    }

    /// Frames went to the heap: the thread waits until there are so many.
    pub fn taken(&self, device: u32, bytes: u64) {
        let mut state = locked(&self.state);
        let ready = state.pools.get_mut(device as usize).map_or(0, |pool| pool.take(bytes));
        let mine = state.mine();
        state.set_mine(mine.max(ready));
    }

    /// The heap gave frames back.
    pub fn given(&self, device: u32, bytes: u64) {
        let mut state = locked(&self.state);
        let mine = state.mine();
        state.give(device, bytes, mine, self.scrub(bytes));
    }
}
