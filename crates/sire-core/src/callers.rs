//! Callers: calls that wait for a device, and so for whatever the engine is copying there. They are counted, never looked at; who copies compares, and
//! can ask whether another thread has called lately: a program that calls now and then will call again. They are not told apart by device, which most
//! of them do not name: at worst copies to another one go in shorter pieces than they need to.

use crate::clock;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Milliseconds within which a call was made lately.
pub(crate) const LATELY: u64 = 1000;

/// What a thread knew of callers at some moment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Heard {
    /// How many there had been.
    pub(crate) all: u64,
    /// How many of them were the program's.
    pub(crate) program: u64,
    /// The millisecond when another thread called, if that was within the last second.
    pub(crate) lately: Option<u64>,
}

/// Hints, so none of the model checker's atomics: whatever a pass sees is right, and the newest is better.
#[derive(Debug)]
pub(crate) struct Callers {
    count: AtomicU64,
    /// Those of them that are the program's.
    program: AtomicU64,
    /// The thread that called last, and when: milliseconds, and one; 0 is never.
    who: AtomicUsize,
    last: AtomicU64,
    /// When the last one called that is another thread than `who`.
    other: AtomicU64,
}

impl Callers {
    /// None yet. Reads the clock, so that no caller will be the first to do so.
    pub(crate) fn new() -> Callers {
        let _ = clock::milliseconds();
        Callers {
            count: AtomicU64::new(0),
            program: AtomicU64::new(0),
            who: AtomicUsize::new(0),
            last: AtomicU64::new(0),
            other: AtomicU64::new(0),
        }
    }

    /// The engine is about to wait, which says nothing of who will call next.
    pub(crate) fn note_own(&self) {
        self.count.fetch_add(1, Ordering::Relaxed);
    }

    /// The program is about to wait, in the calling thread. Wait-free.
    pub(crate) fn note(&self) {
        self.note_at(me(), clock::milliseconds() + 1);
    }

    fn note_at(&self, me: usize, now: u64) {
        if self.who.swap(me, Ordering::Relaxed) != me {
            self.other.store(self.last.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        self.last.store(now, Ordering::Relaxed);
        self.program.fetch_add(1, Ordering::Relaxed);
        self.note_own();
    }

    /// How many there have been.
    pub(crate) fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// How many of them were the program's.
    pub(crate) fn program(&self) -> u64 {
        self.program.load(Ordering::Relaxed)
    }

    /// What the calling thread can know now. Counted before it is asked who came last, the other way round than they are noted: a call in between is one of the next.
    pub(crate) fn heard(&self) -> Heard {
        let (all, program) = (self.count(), self.program());
        Heard { all, program, lately: self.lately_at(me(), clock::milliseconds() + 1) }
    }

    /// When another thread than `me` called last, if that was lately.
    fn lately_at(&self, me: usize, now: u64) -> Option<u64> {
        let last = if self.who.load(Ordering::Relaxed) == me { &self.other } else { &self.last };
        let last = last.load(Ordering::Relaxed).checked_sub(1)?;
        (now - 1).saturating_sub(last).lt(&LATELY).then_some(last)
    }
}

/// What no two living threads have in common.
fn me() -> usize {
    thread_local!(static PLACE: u8 = const { 0 });
    PLACE.with(|place| std::ptr::from_ref(place).addr())
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 5000;

    /// When thread 1 hears that another one has come lately, after calls by (thread, when).
    fn hears(calls: &[(usize, u64)]) -> Option<u64> {
        let callers = Callers::new();
        calls.iter().for_each(|&(who, when)| callers.note_at(who, when));
        assert_eq!(callers.count(), calls.len() as u64);
        callers.lately_at(1, NOW)
    }

    #[test]
    fn who_copies_is_no_caller() {
        assert_eq!(hears(&[]), None);
        assert_eq!(hears(&[(1, NOW)]), None);
        assert_eq!(hears(&[(1, NOW - 1), (1, NOW)]), None);
    }

    #[test]
    fn another_thread_has_come_lately_whoever_came_since() {
        for since in [&[][..], &[(1, NOW)], &[(1, NOW), (1, NOW)]] {
            assert_eq!(hears(&[&[(2, NOW - LATELY + 1)], since].concat()), Some(NOW - LATELY), "{since:?}");
            assert_eq!(hears(&[&[(2, NOW - LATELY)], since].concat()), None, "{since:?}");
        }
        assert_eq!(hears(&[(1, 1), (2, NOW), (1, NOW), (1, NOW)]), Some(NOW - 1));
    }

    #[test]
    fn threads_are_told_apart() {
        let callers = Callers::new();
        let elsewhere = |work: fn(&Callers)| {
            std::thread::scope(|scope| {
                scope.spawn(|| work(&callers));
            });
            let Heard { all, program, lately } = callers.heard();
            (all, program, lately.is_some())
        };
        callers.note();
        assert_eq!(elsewhere(Callers::note_own), (2, 1, false));
        assert_eq!(elsewhere(Callers::note), (3, 2, true));
    }
}
