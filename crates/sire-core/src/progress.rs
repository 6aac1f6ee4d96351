//! The progress of a resume that goes on in the background: which memory can be used already, and what came of it.
//!
//! Nothing is told to be ready before all memory of the call is there, because until then everything may still be taken back.
//! From then on a failure concerns only what has not arrived: what was told to be ready stays.
//!
//! Whoever has a stream need not wait until bytes have arrived. Once the copies of a chunk are queued there is an event behind them, and the stream can wait for
//! that. A chunk for which a stream was made to wait counts as told: if the call fails later, it stays as soon as its copies are known to be over.

use crate::driver::{Addr, Device, Driver, DriverErrorKind, Event, ProgramStream};
use crate::error::{Error, Result, Status};
use crate::ranges::Ranges;
use crate::sync::{AtomicBool, Condvar, Mutex, Ordering, lock, wait, wait_until};
use crate::terms::Report;
use std::ops::Range;
use std::sync::Arc;
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
    /// Chunks of this attempt whose copies are all queued and that have not arrived, each with the event behind its last copy.
    sent: Vec<(Range<u64>, Event)>,
    /// Chunks that a stream was made to wait for.
    told: Vec<Range<u64>>,
    /// Counts what was given up: what somebody learned of `sent` before says nothing afterwards.
    stops: u64,
    outcome: Option<Result<Report>>,
}

/// What a stream has to wait for.
#[derive(Debug)]
struct Queued {
    chunks: Vec<(Range<u64>, Event)>,
    /// As the state's, when this was found.
    stops: u64,
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

    /// What brings the rest of `range`; `None` if some of it is not queued yet, or may still be taken back.
    fn queued(&self, range: &Range<u64>) -> Option<Queued> {
        let mut left = self.pending.clip(range);
        let meets = |chunk: &Range<u64>| chunk.start < range.end && range.start < chunk.end;
        let chunks: Vec<_> = self.sent.iter().filter(|(chunk, _)| meets(chunk)).cloned().collect();
        chunks.iter().for_each(|(chunk, _)| left.remove(chunk));
        let promised = chunks.is_empty() || self.unmade == 0;
        (promised && left.total() == 0).then_some(Queued { chunks, stops: self.stops })
    }

    /// Nothing of this attempt is under way any more, or nobody knows.
    fn give_up(&mut self) {
        self.sent.clear();
        self.stops += 1;
    }
}

/// See the [module documentation](self). All functions may be called from any thread.
#[derive(Debug, Default)]
pub struct Progress {
    state: Mutex<State>,
    /// Where streams are made to wait; `None` if there is nothing to wait for.
    driver: Option<Arc<dyn Driver>>,
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

    /// The same, on a driver.
    pub(crate) fn on(self, driver: Arc<dyn Driver>) -> Progress {
        Progress { driver: Some(driver), ..self }
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

    /// Has the program's `stream` of a device wait for `[addr, addr + len)`: what is put there from now on finds it. The caller waits only until all memory of
    /// the call is there and the copies that bring the range are queued, at most until `deadline`; what comes without a copy (zeros, constants) it waits for.
    /// False: not yet. Of a stream that captures a graph, and where the driver cannot make streams wait, the caller waits until the bytes have arrived.
    ///
    /// # Errors
    /// As for [`Progress::wait`]; the driver's own, and then the stream may wait for a part of the range.
    pub fn wait_on(
        &self,
        (addr, len): (Addr, u64),
        (device, stream): (Device, ProgramStream),
        deadline: Option<Instant>,
    ) -> Result<bool> {
        let range = addr.0..addr.0.saturating_add(len);
        loop {
            let Some(queued) = self.queued(&range, deadline)? else { return Ok(false) };
            let Some(driver) = self.driver.as_deref().filter(|_| !queued.chunks.is_empty()) else { return Ok(true) };
            // A stream that is captured must not wait for what is outside of its capture, and need not: what has arrived is there for good.
            if driver.is_capturing(device, stream)? {
                return self.wait(addr, len, deadline);
            }
            let mut events = queued.chunks.iter().map(|(_, event)| *event);
            match events.try_for_each(|event| driver.wait_on(event, device, stream)) {
                Err(error) if error.kind == DriverErrorKind::Unsupported => return self.wait(addr, len, deadline),
                done => done?,
            }
            if self.note_told(queued) {
                return Ok(true);
            }
        }
    }

    /// What brings the range, once all of it is queued; `None` if that is not so in time.
    fn queued(&self, range: &Range<u64>, deadline: Option<Instant>) -> Result<Option<Queued>> {
        let found = self.wait_for(deadline, |state| match (state.queued(range), &state.outcome) {
            (Some(queued), _) => Some(Ok(queued)),
            (None, Some(Err(error))) => Some(Err(error.clone())),
            (None, _) => None,
        });
        found.map(Some).or_else(|error| error.map_or(Ok(None), Err))
    }

    /// A stream waits for this. False if it was given up meanwhile. An event that has moved meanwhile is behind a later copy on the same stream of ours: its
    /// first one has arrived then, and the program's stream waits longer than it must.
    fn note_told(&self, queued: Queued) -> bool {
        let mut state = lock(&self.state);
        let holds = state.stops == queued.stops;
        if holds {
            state.told.extend(queued.chunks.into_iter().map(|(chunk, _)| chunk));
        }
        holds
    }

    /// Waits until the call is over, at most until `deadline`; its report, or `None` if it is not over.
    ///
    /// # Errors
    /// The call's own.
    pub fn finished(&self, deadline: Option<Instant>) -> Result<Option<Report>> {
        let found = self.wait_for(deadline, |state| state.outcome.clone());
        found.map(Some).or_else(|error| error.map_or(Ok(None), Err))
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

    /// The copies of a chunk are queued; `event` is behind the last.
    pub(crate) fn sent(&self, addresses: Range<u64>, event: Event) {
        lock(&self.state).sent.push((addresses, event));
        self.changed.notify_all();
    }

    /// The bytes of a chunk have arrived.
    pub(crate) fn landed(&self, addresses: Range<u64>) {
        let mut state = lock(&self.state);
        state.sent.retain(|(chunk, _)| *chunk != addresses);
        state.held.push(addresses);
        if state.unmade == 0 {
            state.publish();
            self.changed.notify_all();
        }
    }

    /// An attempt has failed. `drained`: all of its copies are over, so that what streams were made to wait for has arrived.
    pub(crate) fn stop(&self, drained: bool) {
        let mut state = lock(&self.state);
        state.give_up();
        let told = std::mem::take(&mut state.told);
        if drained {
            told.iter().for_each(|chunk| state.pending.remove(chunk));
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
        state.give_up();
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
    fn what_is_queued_is_promised_when_all_memory_is_there() {
        let progress = Progress::new(Ranges::of(0..100));
        progress.begin(1);
        progress.sent(0..10, Event(1));
        let queued = |end| lock(&progress.state).queued(&(5..end)).map(|queued| queued.chunks);
        assert_eq!(queued(10), None);
        progress.made(1);
        assert_eq!(queued(10), Some(vec![(0..10, Event(1))]));
        assert_eq!(queued(11), None);
        progress.sent(10..20, Event(2));
        assert_eq!(queued(11).map(|chunks| chunks.len()), Some(2));
        progress.landed(0..10);
        assert_eq!(queued(11), Some(vec![(10..20, Event(2))]));
        progress.stop(true);
        assert_eq!(queued(11), None);
        assert_eq!(queued(10), Some(vec![]));
    }

    #[test]
    fn what_a_stream_waits_for_has_arrived_once_all_copies_are_over() {
        for drained in [false, true] {
            let progress = Progress::new(Ranges::of(0..100));
            progress.begin(0);
            progress.sent(0..10, Event(1));
            let queued =
                progress.queued(&(0..10), None).unwrap_or_default().unwrap_or_else(|| unreachable!("it is queued"));
            assert!(progress.note_told(queued) && !progress.is_told(&(0..10)));
            progress.stop(drained);
            assert_eq!(progress.is_told(&(0..10)), drained);
        }
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
