//! Who goes first where threads keep in step (`Options::paced`). What a wait has seen is never revised, so a thread that waits for the end of some work
//! first lets everybody act who may still act before that end: a thread that runs, in real time, and whose clock is not there yet; and one that waits for
//! the end of earlier work. A thread that sleeps for another reason waits for a thread of the program, at last for one of those.
//!
//! Whether a thread runs is asked of the operating system. So threads that the machine's own scheduler holds back are waited for, but a thread that never
//! sleeps and never calls this machine would be waited for in vain: hence [`PATIENCE`].

use super::Time;
use crate::sys::{self, Tasks};
use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::time::Duration;

/// How long, in real time, a thread lets others go first.
pub const PATIENCE: Duration = Duration::from_secs(1);

/// How far in virtual time a thread is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum At {
    /// Its clock: what it does next begins no earlier.
    Running(Time),
    /// It waits for work that ends then.
    Waiting(Time),
}

/// See the module's documentation. Threads are known by their numbers in the operating system.
#[derive(Debug, Default)]
pub struct Pace {
    threads: HashMap<u64, At>,
    /// How many times a clock was set.
    acts: u64,
}

impl Pace {
    /// The calling thread's clock is at `time`.
    pub fn is_at(&mut self, time: Time) {
        self.acts += 1;
        self.threads.insert(sys::task(), At::Running(time));
    }

    /// Nobody's clock is known any more.
    pub fn forget(&mut self) {
        self.threads.clear();
    }

    /// Who is where now, for the calling thread, which waits for work that ends at `end`.
    pub fn view(&mut self, end: Time) -> View {
        let me = sys::task();
        self.threads.insert(me, At::Waiting(end));
        let with = |is_of: fn(&At, Time) -> bool| {
            let found = self.threads.iter().filter(move |(_, at)| is_of(at, end));
            found.map(|(task, _)| *task).collect()
        };
        let late = with(|at, end| !matches!(at, At::Running(time) | At::Waiting(time) if *time < end));
        let earlier = with(|at, end| matches!(at, At::Waiting(time) if *time < end));
        View { acts: self.acts, me, late, earlier }
    }

    /// Whether nobody has acted since the view was taken.
    pub fn is_as_in(&self, view: &View) -> bool {
        self.acts == view.acts
    }
}

/// Who is where at a moment. It is looked at without the clock's lock, because whoever waits for that lock seems to sleep; so if nobody could act as it was
/// looked at, and nobody has acted until the lock was taken again, it is the thread's turn. (Two threads that wake each other can both be missed, each
/// at a moment when the other one runs; but they act.)
#[derive(Debug)]
pub struct View {
    acts: u64,
    me: u64,
    /// Who cannot act before the end of what is waited for.
    late: HashSet<u64>,
    /// Who waits for an earlier end.
    earlier: HashSet<u64>,
}

impl View {
    /// Whether another thread than the calling one may still act before what it waits for has ended.
    pub fn has_somebody_earlier(&self) -> bool {
        thread_local!(static TASKS: RefCell<Tasks> = RefCell::default());
        let may_act = |task: u64| match task {
            _ if task == self.me || self.late.contains(&task) => Some(false),
            _ if self.earlier.contains(&task) => Some(true),
            _ => None,
        };
        TASKS.with_borrow_mut(|tasks| tasks.any(may_act))
    }
}
