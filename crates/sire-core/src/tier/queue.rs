//! Requests to a tier, several under way at once. A queue belongs to one pass over one device: its threads start when
//! there is work for them and end with it, so that between transitions there are none (nothing to park, nothing that a
//! `fork` could lose). They call the room and nothing else, never the driver. Answers come in the order in which requests end.

use super::record::{Answer, Record, Sum};
use crate::error::Result;
use crate::raw::Span;
use crate::sync::{Condvar, JoinHandle, Mutex, lock, start, wait};
use std::collections::VecDeque;
use std::sync::Arc;

/// What is to be done with a record and a buffer.
#[derive(Clone, Copy, Debug)]
enum Verb {
    Write,
    /// Verified, if the checksum is known.
    Read(Option<Sum>),
}

#[derive(Debug)]
struct Request<T> {
    verb: Verb,
    record: Record,
    buffer: Span,
    ticket: T,
}

/// A request that has ended.
#[derive(Debug)]
pub(crate) struct Done<T> {
    pub(crate) ticket: T,
    /// The buffer that went with it.
    pub(crate) buffer: Span,
    pub(crate) outcome: Result<Answer>,
}

impl<T> Request<T> {
    fn run(self) -> Done<T> {
        let Request { verb, record, buffer, ticket } = self;
        let outcome = match verb {
            Verb::Write => record.save(&buffer),
            Verb::Read(expected) => record.load(&buffer, expected),
        };
        Done { ticket, buffer, outcome }
    }
}

#[derive(Debug)]
struct State<T> {
    waiting: VecDeque<Request<T>>,
    done: VecDeque<Done<T>>,
    /// Threads that wait for work.
    idle: usize,
    closed: bool,
}

#[derive(Debug)]
struct Shared<T> {
    state: Mutex<State<T>>,
    work: Condvar,
    ended: Condvar,
}

impl<T> Shared<T> {
    /// A thread's life.
    fn serve(&self) {
        while let Some(request) = self.next() {
            let done = request.run();
            lock(&self.state).done.push_back(done);
            self.ended.notify_one();
        }
    }

    fn next(&self) -> Option<Request<T>> {
        let mut state = lock(&self.state);
        state.idle += 1;
        while state.waiting.is_empty() && !state.closed {
            state = wait(&self.work, state);
        }
        state.idle -= 1;
        state.waiting.pop_front()
    }
}

/// See the [module documentation](self).
#[derive(Debug)]
pub(crate) struct Queue<T: Send + 'static> {
    shared: Arc<Shared<T>>,
    threads: Vec<JoinHandle<()>>,
    depth: usize,
    under_way: usize,
}

impl<T: Send + 'static> Queue<T> {
    /// At most `depth` requests at once, each on a thread of its own; with `depth` 0 or 1, on the caller's.
    pub(crate) fn new(depth: usize) -> Queue<T> {
        let state = State { waiting: VecDeque::new(), done: VecDeque::new(), idle: 0, closed: false };
        let shared = Shared { state: Mutex::new(state), work: Condvar::new(), ended: Condvar::new() };
        Queue { shared: Arc::new(shared), threads: Vec::new(), depth, under_way: 0 }
    }

    /// Writes what is at the start of `buffer`.
    pub(crate) fn write(&mut self, record: Record, buffer: Span, ticket: T) {
        self.push(Request { verb: Verb::Write, record, buffer, ticket });
    }

    /// Reads into `buffer`; with `sum`, the bytes must have it.
    pub(crate) fn read(&mut self, record: Record, buffer: Span, sum: Option<Sum>, ticket: T) {
        self.push(Request { verb: Verb::Read(sum), record, buffer, ticket });
    }

    fn push(&mut self, request: Request<T>) {
        self.under_way += 1;
        let state = lock(&self.shared.state);
        let all_busy = state.waiting.len() >= state.idle;
        drop(state);
        if all_busy && !self.grow() {
            let done = request.run();
            lock(&self.shared.state).done.push_back(done);
            return;
        }
        lock(&self.shared.state).waiting.push_back(request);
        self.shared.work.notify_one();
    }

    /// Starts a thread if there may be one more; false if there is none at all.
    fn grow(&mut self) -> bool {
        if self.depth > 1 && self.threads.len() < self.depth {
            let shared = Arc::clone(&self.shared);
            // A system that gives no more threads: fewer do the work, or the caller.
            self.threads.extend(start("sire-io", move || shared.serve()));
        }
        !self.threads.is_empty()
    }

    /// A request that has ended, if there is one.
    pub(crate) fn poll(&mut self) -> Option<Done<T>> {
        let done = lock(&self.shared.state).done.pop_front()?;
        self.under_way -= 1;
        Some(done)
    }

    /// Waits for a request to end; `None` if none is under way.
    pub(crate) fn wait(&mut self) -> Option<Done<T>> {
        if self.under_way == 0 {
            return None;
        }
        let mut state = lock(&self.shared.state);
        loop {
            if let Some(done) = state.done.pop_front() {
                self.under_way -= 1;
                return Some(done);
            }
            state = wait(&self.shared.ended, state);
        }
    }
}

impl<T: Send + 'static> Drop for Queue<T> {
    /// What has not begun never will; what is under way is waited for.
    fn drop(&mut self) {
        let mut state = lock(&self.shared.state);
        state.closed = true;
        state.waiting.clear();
        drop(state);
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            // It cannot have panicked: a tier's panic is caught where it happens.
            let _ = thread.join();
        }
    }
}
