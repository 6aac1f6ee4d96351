//! Turns: of all processes that share a device by time slices, one has it at a time.
//!
//! The queue is a ledger of its own (so that whoever is killed loses its turn at once, whoever is stopped keeps it, and no clock or process
//! number of others is trusted): who holds the turn is *holding* there, who wants it is *waiting*. When a turn ends is decided by its holder
//! alone, by three pure functions: nobody loses a turn that nobody else wants, a turn lasts its quantum and never less than
//! several times what it costs to change places, and who came first is next.

use crate::error::Result;
use crate::layout::State;
use crate::ledger::{Entry, Ledger, Member};
use crate::turn::Other;
use std::path::Path;
use std::time::Duration;

/// A turn lasts at least so many times what changing places costs: no more than a fifth of the time is spent on that.
pub const WORTH: u32 = 4;

/// What one look at the queue says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// It is ours now.
    Mine,
    /// Somebody has it.
    Taken,
    /// So many came first and still wait.
    Behind(usize),
}

/// Whether the holder of `ticket` is next.
#[must_use]
pub fn next(ticket: u64, others: &[Other]) -> Next {
    let ahead = others.iter().filter(|other| is_waiting(other) && other.ticket < ticket).count();
    match others.iter().any(|other| other.state == State::Holding) {
        true => Next::Taken,
        false if ahead > 0 => Next::Behind(ahead),
        false => Next::Mine,
    }
}

/// How long a turn lasts if somebody waits: the quantum, or longer if changing places costs so much.
#[must_use]
pub fn residency(quantum: Duration, switch: Duration) -> Duration {
    quantum.max(switch.saturating_mul(WORTH))
}

/// Whether whoever has had the device for `resident` gives it up, when `waiting` others want it.
#[must_use]
pub fn is_over(resident: Duration, residency: Duration, waiting: usize) -> bool {
    waiting > 0 && resident >= residency
}

/// It waits, and looks again and again: who is stopped could not take the turn.
fn is_waiting(other: &Other) -> bool {
    other.state == State::Waiting && !other.silent
}

/// A place among those that share a device. Dropping it, or the end of its process, gives the turn up.
#[derive(Debug)]
pub struct Turn(Member);

impl Turn {
    /// Joins the group `group` of the device `gpu` (its UUID), in the directory that all of them use. Wants nothing yet.
    ///
    /// # Errors
    /// As [`Ledger::open`] and [`Ledger::join`].
    pub fn join(dir: &Path, gpu: &str, group: &str) -> Result<Turn> {
        Ledger::open(dir, &file_name(gpu, group))?.join().map(Turn)
    }

    /// Takes the last place in the queue; whoever has the turn gives it up by that, in one step.
    ///
    /// # Errors
    /// `Io`, `Stuck`, `Forked`.
    pub fn queue(&self) -> Result<()> {
        self.0.queue_for_turn()
    }

    /// Looks once, and takes the turn if it is ours. Whoever waits has to look several times a second, or counts as asleep.
    ///
    /// # Errors
    /// `Io`, `Stuck`, `Forked`.
    pub fn take(&self) -> Result<Next> {
        self.0.decide(|ticket, others| {
            let verdict = next(ticket, others);
            (verdict, verdict == Next::Mine)
        })
    }

    /// How many wait for it, those that are stopped left out (that takes a while to show).
    ///
    /// # Errors
    /// `Io`, `Forked`.
    pub fn waiting(&self) -> Result<usize> {
        Ok(self.0.others()?.iter().filter(|other| is_waiting(other)).count())
    }

    /// Gives up the turn, or the place in the queue.
    ///
    /// # Errors
    /// `Io`, `Forked`.
    pub fn leave(&self) -> Result<()> {
        self.0.release()
    }
}

/// Everybody in the queue of a device's group.
///
/// # Errors
/// As [`Ledger::open`] and [`Ledger::entries`].
pub fn entries(dir: &Path, gpu: &str, group: &str) -> Result<Vec<Entry>> {
    Ledger::open(dir, &file_name(gpu, group))?.entries()
}

/// Groups meet in a file; what they are called is nobody else's concern, so the file is named by a checksum of it.
fn file_name(gpu: &str, group: &str) -> String {
    match group {
        "" => format!("slices-{gpu}"),
        named => format!("slices-{gpu}-{:08x}", crc32fast::hash(named.as_bytes())),
    }
}

#[cfg(test)]
mod tests;
