//! When device work runs in virtual time. An *operation* takes an engine for an amount of work (the time it needs when it
//! has the link for itself) once it is ready; a [`Mark`] is its end, for others to wait for.
//!
//! The simple version: go through virtual time from one change to the next. At each, every idle engine takes the operation that was ready
//! first (of two equals, the one submitted first); an operation moves at full speed, or at the duplex share while
//! the opposite engine of its device is busy too; a change is an end, or an operation becoming ready.
//!
//! The bend: nothing is worked out before somebody asks, and only what was asked for is *settled*, that is, can never change again. Later submissions may
//! still slow down what nobody has seen. Settled operations leave; what remains of them is the engine's [`Calendar`],
//! around which everything else is arranged.

use super::Time;
use super::calendar::Calendar;
use std::collections::BTreeSet;
use std::sync::{Arc, OnceLock};

/// Operations that wait to be settled; at more than this, all are.
const UNSETTLED: usize = 4096;
/// Full speed.
const WHOLE: u64 = 1_000_000;

/// The end of an operation.
#[derive(Clone, Debug)]
pub struct Mark(Arc<(u64, OnceLock<Time>)>);

impl Mark {
    /// The end, once nothing can change it.
    pub fn settled(&self) -> Option<Time> {
        self.0.1.get().copied()
    }
}

/// What serves one operation at a time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Engine {
    /// Copies from host to device.
    ToDevice = 0,
    /// Copies from device to host.
    ToHost = 1,
    /// Copies and fills on the device.
    OnDevice = 2,
}

/// Engines of a device.
const KINDS: usize = 3;

/// One operation to be submitted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Step {
    /// The engine of which device; `None`: it takes its time without keeping others waiting.
    pub engine: Option<(u32, Engine)>,
    /// How long it takes by itself.
    pub work: Time,
    /// Up to two address ranges (address, length) that it touches.
    pub touches: [(u64, u64); 2],
}

impl Step {
    /// Takes `work` on no engine, and touches nothing.
    pub fn by_itself(work: Time) -> Step {
        Step { engine: None, work, touches: [(0, 0); 2] }
    }
}

#[derive(Debug)]
struct Operation {
    mark: Mark,
    after: Vec<Mark>,
    submitted: Time,
    engine: Option<usize>,
    work: Time,
    start: Time,
    end: Time,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Schedule {
    /// In the order of submission, which is also that of the marks' numbers.
    open: Vec<Operation>,
    engines: Vec<Calendar>,
    /// Share of full speed while both directions are busy, of [`WHOLE`].
    duplex: u64,
    solved: bool,
    last: u64,
}

impl Schedule {
    /// Nothing submitted yet.
    pub fn new(devices: u32, duplex: f64) -> Schedule {
        let engines = (0..devices as usize * KINDS).map(|_| Calendar::default()).collect();
        let duplex = (duplex * WHOLE as f64).round().clamp(1.0, WHOLE as f64) as u64;
        Schedule { open: Vec::new(), engines, duplex, solved: true, last: 0 }
    }

    /// An operation that is ready at `at`, but not before `after`.
    pub fn submit(&mut self, step: &Step, after: Vec<Mark>, at: Time) -> Mark {
        if self.open.len() >= UNSETTLED {
            self.settle(Time::MAX);
        }
        self.last += 1;
        let mark = Mark(Arc::new((self.last, OnceLock::new())));
        let engine = step.engine.map(|(device, engine)| device as usize * KINDS + engine as usize);
        let engine = engine.filter(|engine| *engine < self.engines.len());
        let (work, mark_kept) = (step.work, mark.clone());
        self.open.push(Operation { mark: mark_kept, after, submitted: at, engine, work, start: 0, end: 0 });
        self.solved = false;
        mark
    }

    /// When the operation ends as things stand.
    pub fn end_of(&mut self, mark: &Mark) -> Time {
        if let Some(end) = mark.settled() {
            return end;
        }
        self.solve();
        self.position(mark).map_or(0, |at| self.open[at].end)
    }

    /// When the operation ends; that, and all that ends before it, stays so.
    pub fn observe(&mut self, mark: &Mark) -> Time {
        let end = self.end_of(mark);
        if mark.settled().is_none() {
            self.settle(end);
        }
        end
    }

    fn position(&self, mark: &Mark) -> Option<usize> {
        self.open.binary_search_by_key(&mark.0.0, |operation| operation.mark.0.0).ok()
    }

    fn settle(&mut self, until: Time) {
        self.solve();
        let engines = &mut self.engines;
        self.open.retain(|operation| {
            if operation.end > until {
                return true;
            }
            // Only this function sets it, and an operation leaves as it does.
            let _ = operation.mark.0.1.set(operation.end);
            if let Some(engine) = operation.engine {
                engines[engine].take(operation.start, operation.end);
            }
            false
        });
    }

    fn solve(&mut self) {
        if std::mem::replace(&mut self.solved, true) {
            return;
        }
        let ends = Run::new(self).finish();
        for (operation, (start, end)) in self.open.iter_mut().zip(ends) {
            (operation.start, operation.end) = (start, end);
        }
    }
}

/// The engine of the opposite direction.
fn opposite(engine: usize) -> Option<usize> {
    match engine % KINDS {
        0 => Some(engine + 1),
        1 => Some(engine - 1),
        _ => None,
    }
}

/// One pass through virtual time over the open operations.
struct Run<'a> {
    schedule: &'a Schedule,
    now: Time,
    /// Per operation: how many open operations it waits for, who waits for it, when it is ready, start and end.
    waits: Vec<usize>,
    followers: Vec<Vec<usize>>,
    ready: Vec<Time>,
    spans: Vec<(Time, Time)>,
    /// Per engine: what is ready for it, and what it is at, with the work left.
    queues: Vec<BTreeSet<(Time, usize)>>,
    current: Vec<Option<(usize, Time)>>,
}

impl<'a> Run<'a> {
    fn new(schedule: &'a Schedule) -> Run<'a> {
        let (count, engines) = (schedule.open.len(), schedule.engines.len());
        let mut run = Run {
            schedule,
            now: 0,
            waits: vec![0; count],
            followers: vec![Vec::new(); count],
            ready: schedule.open.iter().map(|operation| operation.submitted).collect(),
            spans: vec![(0, 0); count],
            queues: vec![BTreeSet::new(); engines],
            current: vec![None; engines],
        };
        for (at, operation) in schedule.open.iter().enumerate() {
            for mark in &operation.after {
                match (mark.settled(), schedule.position(mark)) {
                    (Some(end), _) => run.ready[at] = run.ready[at].max(end),
                    (None, Some(before)) => {
                        run.followers[before].push(at);
                        run.waits[at] += 1;
                    }
                    (None, None) => {}
                }
            }
        }
        let free: Vec<usize> = (0..count).filter(|at| run.waits[*at] == 0).collect();
        run.admit(free);
        run
    }

    /// Operations that wait for nobody any more: they queue for their engine, or just take their time.
    fn admit(&mut self, mut free: Vec<usize>) {
        while let Some(at) = free.pop() {
            let operation = &self.schedule.open[at];
            match operation.engine {
                Some(engine) => drop(self.queues[engine].insert((self.ready[at], at))),
                None => {
                    self.spans[at] = (self.ready[at], self.ready[at] + operation.work);
                    free.extend(self.followers_freed_by(at));
                }
            }
        }
    }

    fn followers_freed_by(&mut self, at: usize) -> Vec<usize> {
        let followers = std::mem::take(&mut self.followers[at]);
        let end = self.spans[at].1;
        for follower in &followers {
            self.ready[*follower] = self.ready[*follower].max(end);
            self.waits[*follower] -= 1;
        }
        followers.into_iter().filter(|follower| self.waits[*follower] == 0).collect()
    }

    /// Start and end of every operation.
    fn finish(mut self) -> Vec<(Time, Time)> {
        while let Some(next) = self.next_change() {
            self.advance(next);
        }
        self.spans
    }

    fn start_ready(&mut self) {
        for (queue, current) in self.queues.iter_mut().zip(&mut self.current) {
            if current.is_none()
                && let Some(&(ready, at)) = queue.first()
                && ready <= self.now
            {
                queue.pop_first();
                self.spans[at].0 = self.now;
                *current = Some((at, self.schedule.open[at].work));
            }
        }
    }

    /// How fast `engine` works on what it is at now.
    fn speed(&self, engine: usize) -> u64 {
        let taken = |engine: usize| self.schedule.engines[engine].is_busy(self.now);
        if taken(engine) {
            return 0;
        }
        match opposite(engine) {
            Some(other) if taken(other) || self.current[other].is_some() => self.schedule.duplex,
            _ => WHOLE,
        }
    }

    /// Starts what can start now, and says when something changes next; `None` at the end of everything.
    fn next_change(&mut self) -> Option<Time> {
        self.start_ready();
        let mut next: Option<Time> = None;
        let mut note = |time: Time| next = Some(next.map_or(time, |next| next.min(time)));
        for engine in 0..self.current.len() {
            let Some((_, left)) = self.current[engine] else {
                if let Some((ready, _)) = self.queues[engine].first() {
                    note(*ready);
                }
                continue;
            };
            let speed = self.speed(engine);
            if speed > 0 {
                note(self.now + scaled(left, WHOLE, speed, true));
            }
            let calendars = [Some(engine), opposite(engine)].into_iter().flatten();
            calendars.filter_map(|one| self.schedule.engines[one].next_change(self.now)).for_each(&mut note);
        }
        next
    }

    /// Lets time pass until `next`.
    fn advance(&mut self, next: Time) {
        let speeds: Vec<u64> = (0..self.current.len()).map(|engine| self.speed(engine)).collect();
        let passed = next - self.now;
        self.now = next;
        let mut freed = Vec::new();
        for (engine, speed) in speeds.into_iter().enumerate() {
            let Some((at, left)) = self.current[engine] else { continue };
            let left = left.saturating_sub(scaled(passed, speed, WHOLE, false));
            self.current[engine] = Some((at, left)).filter(|_| left > 0 || speed == 0);
            if self.current[engine].is_none() {
                self.spans[at].1 = next;
                freed.extend(self.followers_freed_by(at));
            }
        }
        self.admit(freed);
    }
}

/// `time * by / of`, rounded up or down.
fn scaled(time: Time, by: u64, of: u64, up: bool) -> Time {
    let product = u128::from(time) * u128::from(by);
    let quotient = if up { product.div_ceil(u128::from(of)) } else { product / u128::from(of) };
    Time::try_from(quotient).unwrap_or(Time::MAX)
}
