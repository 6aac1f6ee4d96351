//! Points at which a test lets its process die, to look at what a tier leaves behind. In the product they are nothing.

/// A point at which a process may die.
#[cfg(not(all(test, not(feature = "shuttle"))))]
pub(super) fn step() {}

#[cfg(all(test, not(feature = "shuttle")))]
pub(super) use mortal::{die_at, step};

#[cfg(all(test, not(feature = "shuttle")))]
mod mortal {
    use std::sync::atomic::{AtomicU64, Ordering};

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
    }
}
