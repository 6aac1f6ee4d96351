//! Figures that only the program can tell (its models, its slices), asked for when somebody wants to see them.
//!
//! The program's publisher waits at the board and pins a new sheet up when it is asked; whoever asked gets the new one, or after a moment the old one.

use crate::lock;
use crate::server::Ticket;
use serde_json::Value;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Bytes of the longest sheet.
pub const LONGEST_SHEET: usize = 4 << 20;
/// How long a question waits for a new sheet.
const MOMENT: Duration = Duration::from_secs(1);
/// A publisher that has not come back for so long is gone.
const GONE: Duration = Duration::from_secs(5);

#[derive(Debug, Default)]
struct Inner {
    sheet: Option<Value>,
    publisher: Option<Instant>,
    asking: Vec<(Ticket, Instant)>,
}

/// The board of a process.
#[derive(Debug, Default)]
pub struct Board {
    inner: Mutex<Inner>,
    asked: Condvar,
}

impl Board {
    /// The publisher waits until somebody asks, at most for `longest`; whether somebody does.
    pub fn wait(&self, longest: Duration) -> bool {
        let until = Instant::now() + longest;
        let mut inner = lock(&self.inner);
        loop {
            inner.publisher = Some(Instant::now());
            let left = until.saturating_duration_since(Instant::now());
            if !inner.asking.is_empty() || left.is_zero() {
                return !inner.asking.is_empty();
            }
            inner = self.asked.wait_timeout(inner, left.min(GONE / 2)).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// A new sheet; who asked for it.
    pub fn publish(&self, sheet: Value) -> Vec<Ticket> {
        let mut inner = lock(&self.inner);
        inner.sheet = Some(sheet);
        inner.asking.drain(..).map(|(ticket, _)| ticket).collect()
    }

    /// Asks for a new sheet; false if nobody would make one: then the old one counts.
    pub fn ask(&self, ticket: Ticket) -> bool {
        let mut inner = lock(&self.inner);
        if inner.publisher.is_none_or(|seen| seen.elapsed() > GONE) {
            return false;
        }
        inner.asking.push((ticket, Instant::now() + MOMENT));
        drop(inner);
        self.asked.notify_all();
        true
    }

    /// Who has waited long enough, and when to ask again.
    pub fn expire(&self) -> (Vec<Ticket>, Option<Instant>) {
        let now = Instant::now();
        let mut inner = lock(&self.inner);
        let late = inner.asking.iter().filter(|(_, until)| *until <= now).map(|(ticket, _)| *ticket).collect();
        inner.asking.retain(|(_, until)| *until > now);
        (late, inner.asking.iter().map(|(_, until)| *until).min())
    }

    /// Nobody waits for this answer any more.
    pub fn forget(&self, ticket: Ticket) {
        lock(&self.inner).asking.retain(|(other, _)| *other != ticket);
    }

    /// The newest sheet.
    #[must_use]
    pub fn sheet(&self) -> Option<Value> {
        lock(&self.inner).sheet.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::Board;
    use crate::server::Ticket;
    use serde_json::json;
    use std::time::Duration;

    #[test]
    fn nobody_waits_for_a_publisher_that_is_not_there() {
        assert!(!Board::default().ask(Ticket(1)));
    }

    #[test]
    fn a_question_wakes_the_publisher_and_gets_its_sheet() {
        let board = Board::default();
        assert!(!board.wait(Duration::ZERO));
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| board.wait(Duration::from_secs(60)));
            assert!(board.ask(Ticket(1)));
            assert!(waiting.join().is_ok_and(|asked| asked));
        });
        assert!(board.ask(Ticket(2)));
        board.forget(Ticket(1));
        assert_eq!(board.publish(json!([7])), [Ticket(2)]);
        assert_eq!(board.sheet(), Some(json!([7])));
        assert_eq!(board.expire(), (vec![], None));
    }
}
