//! The one place that chooses the primitives of synchronisation: the standard library's, or, with the
//! feature `shuttle`, ones that a model checker schedules. A poisoned lock is taken over: every
//! critical section of the engine leaves its data consistent at each step.

#[cfg(feature = "shuttle")]
pub(crate) use shuttle::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    sync::{Condvar, Mutex, MutexGuard, RwLock, mpsc},
    thread::{JoinHandle, ThreadId},
};
use std::sync::PoisonError;
#[cfg(not(feature = "shuttle"))]
pub(crate) use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    sync::{Condvar, Mutex, MutexGuard, RwLock, mpsc},
    thread::{JoinHandle, ThreadId},
};

/// Locks `mutex`.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits on `condvar`.
pub(crate) fn wait<'a, T>(condvar: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    condvar.wait(guard).unwrap_or_else(PoisonError::into_inner)
}

/// Waits on `condvar` until `deadline`; `None` if that has passed. Under the model checker time does not pass.
pub(crate) fn wait_until<'a, T>(
    condvar: &Condvar,
    guard: MutexGuard<'a, T>,
    deadline: std::time::Instant,
) -> Option<MutexGuard<'a, T>> {
    #[cfg(feature = "shuttle")]
    {
        let _ = deadline;
        Some(wait(condvar, guard))
    }
    #[cfg(not(feature = "shuttle"))]
    {
        let left = deadline.checked_duration_since(std::time::Instant::now()).filter(|left| !left.is_zero())?;
        Some(condvar.wait_timeout(guard, left).unwrap_or_else(PoisonError::into_inner).0)
    }
}

/// The calling thread.
pub(crate) fn this_thread() -> ThreadId {
    #[cfg(feature = "shuttle")]
    return shuttle::thread::current().id();
    #[cfg(not(feature = "shuttle"))]
    return std::thread::current().id();
}

/// How [`beside`] runs what it was given.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Runs {
    SideBySide,
    /// One after the other, on the caller's thread.
    InTurn,
}

/// Runs `other` on a thread of its own while `mine` runs here, and waits for both. Where no thread can be made, `other`
/// runs first, and is told so: it must not need `mine` to come to its end.
pub(crate) fn beside<R>(other: impl FnOnce(Runs) + Send, mine: impl FnOnce() -> R) -> R {
    let slot = Mutex::new(Some(other));
    let run = |runs| {
        let other = lock(&slot).take();
        other.into_iter().for_each(|other| other(runs));
    };
    together(&[&|| run(Runs::SideBySide)], |left| {
        left.into_iter().for_each(|_| run(Runs::InTurn));
        mine()
    })
}

/// Does `work` with every item at the same time: with the first here, with each other one on a thread of its own (or here,
/// where no thread can be made).
pub(crate) fn at_once<T: Send>(mut items: Vec<T>, work: impl Fn(T) + Sync) {
    if items.len() < 2 {
        return items.pop().into_iter().for_each(work);
    }
    let runs: Vec<_> = items
        .into_iter()
        .map(|item| Mutex::new(Some(item)))
        .map(|slot| {
            let work = &work;
            move || {
                let item = lock(&slot).take();
                item.into_iter().for_each(work);
            }
        })
        .collect();
    let Some((first, others)) = runs.split_last() else { return };
    let others: Vec<Run<'_>> = others.iter().map(|run| -> Run<'_> { run }).collect();
    together(&others, |left| {
        first();
        left.into_iter().for_each(|run| run());
    });
}

type Run<'a> = &'a (dyn Fn() + Sync);

/// Runs each of `others` on a thread of its own while `mine` runs here, and waits for all. `mine` gets those for which the system has no thread. Signals of the
/// program do not reach those threads.
#[cfg(not(feature = "shuttle"))]
fn together<'a, R>(others: &[Run<'a>], mine: impl FnOnce(Vec<Run<'a>>) -> R) -> R {
    let thread = || std::thread::Builder::new().name("sire".to_owned());
    let quiet = |run: Run<'a>| {
        move || {
            crate::raw::block_signals();
            run();
        }
    };
    std::thread::scope(|threads| {
        mine(others.iter().copied().filter(|&run| thread().spawn_scoped(threads, quiet(run)).is_err()).collect())
    })
}

/// As above. As the last thread of a scope of shuttle's ends, it wakes whoever opened the scope, whatever that thread is waiting for: a lock, or the end of
/// another scope. So the threads stay until it waits for them alone.
#[cfg(feature = "shuttle")]
fn together<'a, R>(others: &[Run<'a>], mine: impl FnOnce(Vec<Run<'a>>) -> R) -> R {
    let is_waited_for = AtomicBool::new(false);
    shuttle::thread::scope(|threads| {
        for run in others {
            threads.spawn(|| {
                run();
                while !is_waited_for.load(Ordering::SeqCst) {
                    shuttle::thread::yield_now();
                }
            });
        }
        let result = mine(Vec::new());
        is_waited_for.store(true, Ordering::SeqCst);
        result
    })
}

/// As [`spawn`], for a thread that somebody waits for, and with a stack for code that is not ours; `None` if the system has none to give.
pub(crate) fn start(name: &str, work: impl FnOnce() + Send + 'static) -> Option<JoinHandle<()>> {
    #[cfg(feature = "shuttle")]
    return shuttle::thread::Builder::new().name(name.to_owned()).spawn(work).ok();
    #[cfg(not(feature = "shuttle"))]
    {
        let quiet = move || {
            crate::raw::block_signals();
            work();
        };
        std::thread::Builder::new().name(name.to_owned()).spawn(quiet).ok()
    }
}

/// Bytes of stack for a thread that calls the driver: it may make a context there, the C library keeps thread-local data of every loaded library on it, and
/// profilers' callbacks run on it. Only addresses, until they are touched.
#[cfg(not(feature = "shuttle"))]
const STACK: usize = 2 << 20;

/// Starts a thread of ours, which nobody waits for. Signals of the program do not reach it.
///
/// # Errors
/// The system's, if it has no thread to give.
pub(crate) fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
    #[cfg(feature = "shuttle")]
    {
        let _ = name;
        drop(shuttle::thread::spawn(work));
        Ok(())
    }
    #[cfg(not(feature = "shuttle"))]
    {
        let quiet = move || {
            crate::raw::block_signals();
            work();
        };
        std::thread::Builder::new().name(name.to_owned()).stack_size(STACK).spawn(quiet).map(drop)
    }
}

/// Does `work` on a thread of its own that nobody waits for; here, if the system refuses one.
pub(crate) fn hand_over<T: Send + 'static>(subject: T, work: fn(&mut T)) {
    let slot = std::sync::Arc::new(Mutex::new(Some(subject)));
    let there = std::sync::Arc::clone(&slot);
    let run = move |slot: &Mutex<Option<T>>| {
        let subject = lock(slot).take();
        subject.into_iter().for_each(|mut subject| work(&mut subject));
    };
    if spawn("sire-behind", move || run(&there)).is_err() {
        run(&slot);
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;

    fn blocked_signals() -> Option<u64> {
        let status = std::fs::read_to_string("/proc/thread-self/status").ok()?;
        let mask = status.lines().find_map(|line| line.strip_prefix("SigBlk:"))?;
        u64::from_str_radix(mask.trim(), 16).ok()
    }

    /// A handler of the program's could run on a thread that it did not know of.
    #[test]
    fn signals_of_the_program_reach_no_thread_of_ours() {
        const TERM: u64 = 1 << 14;
        let here = std::thread::current().id();
        beside(|_| assert_ne!(blocked_signals().unwrap_or(TERM) & TERM, 0), || {});
        at_once(vec![0, 1, 2], |_| {
            if std::thread::current().id() != here {
                assert_ne!(blocked_signals().unwrap_or(TERM) & TERM, 0);
            }
        });
    }
}
