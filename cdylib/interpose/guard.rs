//! Re-entry: a call that arrives while this thread is inside one of our hooks is not the program's.
//!
//! It happens where a driver is written on top of a runtime (the software device), or another interposer sits between.

use std::cell::Cell;

thread_local! {
    static INSIDE: Cell<bool> = const { Cell::new(false) };
    static OWN_QUESTION: Cell<bool> = const { Cell::new(false) };
}

/// Asks for something that Sire itself is going to use: what is found meanwhile is the driver's.
pub(super) fn own_question<T>(ask: impl FnOnce() -> T) -> T {
    let before = OWN_QUESTION.with(|own| own.replace(true));
    let answer = ask();
    OWN_QUESTION.with(|own| own.set(before));
    answer
}

/// Whether this thread is inside [`own_question`].
pub(super) fn is_own_question() -> bool {
    OWN_QUESTION.with(Cell::get)
}

/// This thread is inside a hook for as long as the value lives.
pub(super) struct Guard;

impl Guard {
    /// None if this thread is inside already: then the call must be passed through.
    pub(super) fn enter() -> Option<Guard> {
        INSIDE.with(|inside| (!inside.replace(true)).then_some(Guard))
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        INSIDE.with(|inside| inside.set(false));
    }
}
