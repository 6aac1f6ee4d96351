//! Points at which a test lets its process die, to look at what a tier leaves behind, or threads meet, to see that there are several. In the
//! product they are nothing.

/// A point at which a process may die, or threads meet.
#[cfg(not(all(test, not(feature = "shuttle"))))]
pub(super) fn step() {}

#[cfg(all(test, not(feature = "shuttle")))]
pub(super) use mortal::{die_at, have_met, meet, step};

#[cfg(all(test, not(feature = "shuttle")))]
mod mortal {
    use crate::sync::lock;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::sync::{Condvar, Mutex};
    use std::time::Duration;

    /// Threads that wait at a step for another one.
    #[derive(Clone, Copy)]
    struct Meeting {
        wanted: bool,
        there: usize,
        took_place: bool,
    }

    static MEETING: Mutex<Meeting> = Mutex::new(Meeting { wanted: false, there: 0, took_place: false });
    static ARRIVED: Condvar = Condvar::new();

    /// From now on a thread waits at its step until a second one is at one, for ten seconds at most. Then it is over.
    pub(in crate::tier) fn meet() {
        lock(&MEETING).wanted = true;
    }

    /// Whether two have met.
    pub(in crate::tier) fn have_met() -> bool {
        lock(&MEETING).took_place
    }

    fn attend() {
        let mut meeting = lock(&MEETING);
        if !meeting.wanted {
            return;
        }
        meeting.there += 1;
        meeting.took_place = meeting.there > 1;
        ARRIVED.notify_all();
        let waited = ARRIVED.wait_timeout_while(meeting, Duration::from_secs(10), |meeting| !meeting.took_place);
        let mut meeting = waited.unwrap_or_else(std::sync::PoisonError::into_inner).0;
        (meeting.there, meeting.wanted) = (meeting.there - 1, false);
    }

    /// Steps that are left to live; 0: for ever.
    static LEFT: AtomicU64 = AtomicU64::new(0);

    /// Lets this process die at the given step from now on; 0: at none.
    pub(in crate::tier) fn die_at(step: u64) {
        LEFT.store(step, Ordering::SeqCst);
    }

    /// What the kernel does with a dying process's files is the same as after `kill -9`.
    pub(in crate::tier) fn step() {
        let one_less = |left: u64| left.checked_sub(1);
        if LEFT.fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_less) == Ok(1) {
            std::process::abort();
        }
        attend();
    }
}
