//! The progress of a resume that goes on in the background: which memory can be used already, and what came of it.
//!
//! Nothing is told to be ready before all memory of the call is there, because until then everything may still be taken back.
//! From then on a failure concerns only what has not arrived: what was told to be ready stays.

use crate::driver::Addr;
use crate::error::{Error, Result, Status};
use crate::ranges::Ranges;
use crate::sync::{AtomicBool, Condvar, Mutex, Ordering, lock, wait, wait_until};
use crate::terms::Report;
use std::ops::Range;
use std::time::Instant;

#[derive(Debug, Default)]
struct State {
    /// Addresses that cannot be used yet.
    pending: Ranges,
    /// Bytes that were pending in the beginning.
    total: u64,
    /// Chunks of this attempt that have no memory yet.
    unmade: usize,
    /// What has arrived before all memory was there.
    held: Vec<Range<u64>>,
    outcome: Option<Result<Report>>,
}

impl State {
    fn publish(&mut self) {
        for range in self.held.drain(..) {
            self.pending.remove(&range);
        }
    }

    fn is_ready(&self, range: &Range<u64>) -> bool {
        self.pending.clip(range).total() == 0
    }
}

/// See the [module documentation](self). All functions may be called from any thread.
#[derive(Debug, Default)]
pub struct Progress {
    state: Mutex<State>,
    changed: Condvar,
    cancelled: AtomicBool,
}

impl Progress {
    /// Nothing has arrived of `pending`.
    pub(crate) fn new(pending: Ranges) -> Progress {
        let total = pending.total();
        let state = State { pending, total, ..State::default() };
        Progress { state: Mutex::new(state), ..Progress::default() }
    }

    /// All of it was there already.
    pub(crate) fn done(report: Report) -> Progress {
        let progress = Progress::default();
        progress.finish(Ok(report));
        progress
    }

    /// Whether `[addr, addr + len)` can be used now. Memory that the call does not concern counts as ready. Never blocks.
    #[must_use]
    pub fn ready(&self, addr: Addr, len: u64) -> bool {
        lock(&self.state).is_ready(&(addr.0..addr.0.saturating_add(len)))
    }

    /// Waits until `[addr, addr + len)` can be used, at most until `deadline` (`None`: for as long as it takes). False: not yet.
    ///
    /// # Errors
    /// The call's own, if it failed before the range was ready: see [`Engine::resume`](crate::engine::Engine::resume). Its regions are paused
    /// then, and the call can be repeated.
    pub fn wait(&self, addr: Addr, len: u64, deadline: Option<Instant>) -> Result<bool> {
        let range = addr.0..addr.0.saturating_add(len);
        self.wait_for(deadline, |state| match &state.outcome {
            _ if state.is_ready(&range) => Some(Ok(())),
            outcome => outcome.as_ref().map(|outcome| outcome.as_ref().map(drop).map_err(Error::clone)),
        })
        .map(|()| true)
        .or_else(not_yet)
    }

    /// Waits until the call is over, at most until `deadline`; its report, or `None` if it is not over.
    ///
    /// # Errors
    /// The call's own.
    pub fn finished(&self, deadline: Option<Instant>) -> Result<Option<Report>> {
        self.wait_for(deadline, |state| state.outcome.clone()).map(Some).or_else(|error| not_yet(error).map(|_| None))
    }

    fn wait_for<T>(
        &self,
        deadline: Option<Instant>,
        answer: impl Fn(&State) -> Option<Result<T>>,
    ) -> std::result::Result<T, Option<Error>> {
        let mut state = lock(&self.state);
        loop {
            if let Some(found) = answer(&state) {
                return found.map_err(Some);
            }
            state = match deadline {
                None => wait(&self.changed, state),
                Some(deadline) => wait_until(&self.changed, state, deadline).ok_or(None)?,
            };
        }
    }

    /// (Bytes of device memory that can be used already, bytes that the call brings back.)
    #[must_use]
    pub fn bytes(&self) -> (u64, u64) {
        let state = lock(&self.state);
        (state.total - state.pending.total(), state.total)
    }

    /// Makes the call stop at the next chunk. What is ready stays; the regions end paused, unless everything was ready.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::SeqCst);
    }

    /// `Cancelled` once that was asked for.
    pub(crate) fn check_cancelled(&self) -> Result<()> {
        if !self.cancelled.load(Ordering::SeqCst) {
            return Ok(());
        }
        Err(Error::new(
            Status::Cancelled,
            "the resume was cancelled; what was ready stays, and the call can be repeated",
        ))
    }

    /// An attempt begins that needs memory for so many chunks.
    pub(crate) fn begin(&self, unmade: usize) {
        let mut state = lock(&self.state);
        state.held.clear();
        state.unmade = unmade;
    }

    /// So many chunks have memory now.
    pub(crate) fn made(&self, chunks: usize) {
        let mut state = lock(&self.state);
        state.unmade = state.unmade.saturating_sub(chunks);
        if state.unmade == 0 {
            state.publish();
            self.changed.notify_all();
        }
    }

    /// The bytes of a chunk have arrived.
    pub(crate) fn landed(&self, addresses: Range<u64>) {
        let mut state = lock(&self.state);
        state.held.push(addresses);
        if state.unmade == 0 {
            state.publish();
            self.changed.notify_all();
        }
    }

    /// Whether somebody may have been told that these addresses are ready.
    pub(crate) fn is_told(&self, addresses: &Range<u64>) -> bool {
        lock(&self.state).is_ready(addresses)
    }

    /// The call is over.
    pub(crate) fn finish(&self, outcome: Result<Report>) {
        let mut state = lock(&self.state);
        if outcome.is_ok() {
            state.pending = Ranges::new();
        }
        state.outcome.get_or_insert(outcome);
        drop(state);
        self.changed.notify_all();
    }
}

/// No answer in time is not an error.
fn not_yet(error: Option<Error>) -> Result<bool> {
    error.map_or(Ok(false), Err)
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;
    use std::time::Duration;

    fn soon() -> Option<Instant> {
        Some(Instant::now() + Duration::from_millis(1))
    }

    #[test]
    fn nothing_is_ready_before_all_memory_is_there() {
        let progress = Progress::new(Ranges::of(0..100));
        progress.begin(2);
        progress.landed(0..10);
        assert!(!progress.ready(Addr(0), 10) && !progress.is_told(&(0..10)));
        progress.made(1);
        assert_eq!(progress.wait(Addr(0), 10, soon()), Ok(false));
        progress.made(1);
        assert!(progress.ready(Addr(0), 10) && !progress.ready(Addr(5), 10));
        progress.landed(10..20);
        assert_eq!(progress.wait(Addr(5), 10, None), Ok(true));
        assert_eq!(progress.bytes(), (20, 100));
        assert_eq!(progress.finished(soon()), Ok(None));
    }

    #[test]
    fn a_new_attempt_begins_anew() {
        let progress = Progress::new(Ranges::of(0..100));
        progress.begin(1);
        progress.landed(0..10);
        progress.begin(1);
        progress.made(1);
        assert!(!progress.ready(Addr(0), 10));
    }

    #[test]
    fn a_failure_is_told_to_whoever_waits_for_what_has_not_arrived() {
        let progress = Progress::new(Ranges::of(0..100));
        progress.begin(0);
        progress.landed(0..10);
        progress.finish(Err(Error::new(Status::BackupIo, "no")));
        assert_eq!(progress.wait(Addr(0), 10, None), Ok(true));
        assert_eq!(progress.wait(Addr(0), 11, None).map_err(|e| e.status), Err(Status::BackupIo));
        assert_eq!(progress.wait(Addr(500), 11, None), Ok(true), "that is none of its memory");
        assert!(progress.finished(None).is_err());
    }
}
