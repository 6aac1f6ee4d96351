//! Requests to a tier, several under way at once. A queue belongs to one pass over one device. What a room has in a file goes through the kernel's
//! own queue ([`Ring`]) where the kernel allows that; everything else, and whatever does not go whole that way, through threads. These start when
//! there is work for them and end with it, so that between transitions there are none (nothing to park, nothing that a
//! `fork` could lose). They call the room and nothing else, never the driver. Answers come in the order in which requests end.

use super::record::{Answer, Record, Sum};
use super::step::step;
use crate::error::{Error, Result, Status};
use crate::raw::Span;
use crate::raw::ring::{Ended, Holder, Ring, Way};
use crate::sync::{Condvar, JoinHandle, Mutex, lock, start, wait};
use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
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
    /// The buffer that went with it; `None` if the kernel may use it for ever.
    pub(crate) buffer: Option<Span>,
    pub(crate) outcome: Result<Answer>,
}

impl<T> Request<T> {
    fn run(self) -> Done<T> {
        let Request { verb, record, buffer, ticket } = self;
        let outcome = match verb {
            Verb::Write => record.save(&buffer),
            Verb::Read(expected) => record.load(&buffer, expected),
        };
        Done { ticket, buffer: Some(buffer), outcome }
    }
}

/// A request that the kernel has, and what it answers if all goes well.
#[derive(Debug)]
struct Sent<T> {
    request: Request<T>,
    /// Of a write.
    answer: Option<Answer>,
}

impl<T> Holder for Sent<T> {
    fn file(&self) -> Option<BorrowedFd<'_>> {
        self.request.record.room.file()
    }
}

impl<T> Sent<T> {
    /// The request has ended so. One that did not go whole is done again through its room, which knows what to say about it.
    fn arrived(self, span: &Span, outcome: io::Result<u64>) -> Done<T> {
        step();
        if !matches!(outcome, Ok(count) if count == span.len()) {
            return self.request.run();
        }
        let Request { verb, record, buffer, ticket } = self.request;
        let outcome = match (verb, self.answer) {
            (Verb::Read(expected), _) => record.arrived(span, expected),
            (Verb::Write, Some(answer)) => Ok(answer),
            (Verb::Write, None) => record.save(&buffer),
        };
        Done { ticket, buffer: Some(buffer), outcome }
    }

    /// Nobody knows whether the request ever ends: its buffer is nobody's any more.
    fn lost(self, error: &io::Error) -> Done<T> {
        let Request { record, ticket, .. } = self.request;
        let what = format!("{} bytes at {} of {}", record.len, record.at, record.room.place());
        let message =
            format!("the kernel's queue has lost a request for {what}: {error}; SIRE_IO_URING=0 does without it");
        Done { ticket, buffer: None, outcome: Err(Error::new(Status::BackupIo, message)) }
    }
}

/// The kernel's queue, if there may be one: made for the first request that can go there.
#[derive(Debug)]
enum Kernel<T> {
    /// Not made yet.
    Wanted,
    Open(Box<Ring<Sent<T>>>),
    /// Not wanted, refused by the kernel, or broken.
    Closed,
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
    kernel: Kernel<T>,
    depth: usize,
    under_way: usize,
}

impl<T: Send + 'static> Queue<T> {
    /// At most `depth` requests at once, each on a thread of its own, or with `ring` all with the kernel where that is possible; with `depth` 0 or 1,
    /// on the caller's thread.
    pub(crate) fn new(depth: usize, ring: bool) -> Queue<T> {
        let state = State { waiting: VecDeque::new(), done: VecDeque::new(), idle: 0, closed: false };
        let shared = Shared { state: Mutex::new(state), work: Condvar::new(), ended: Condvar::new() };
        // A model checker knows nothing of what the kernel does.
        let kernel = if ring && depth > 1 && !cfg!(feature = "shuttle") { Kernel::Wanted } else { Kernel::Closed };
        Queue { shared: Arc::new(shared), threads: Vec::new(), kernel, depth, under_way: 0 }
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
        if let Err(request) = self.ask_kernel(request) {
            self.ask_thread(request);
        }
    }

    /// Gives a request to the kernel; it comes back if that cannot be.
    fn ask_kernel(&mut self, request: Request<T>) -> std::result::Result<(), Request<T>> {
        if request.record.room.file().is_none() {
            return Err(request);
        }
        if matches!(self.kernel, Kernel::Wanted) {
            self.kernel = Ring::new(self.depth).map_or(Kernel::Closed, |ring| Kernel::Open(Box::new(ring)));
        }
        let Kernel::Open(ring) = &mut self.kernel else { return Err(request) };
        let (record, buffer) = (&request.record, &request.buffer);
        let (way, at, span, answer) = match request.verb {
            Verb::Write => match record.outgoing(buffer) {
                Ok((span, answer)) => (Way::Write, record.at, span, Some(answer)),
                Err(_) => return Err(request),
            },
            Verb::Read(_) => match record.incoming(buffer) {
                Ok((at, span)) => (Way::Read, at, span, None),
                Err(_) => return Err(request),
            },
        };
        if at.checked_add(span.len()).is_none_or(|end| end > record.room.len()) {
            return Err(request);
        }
        step();
        ring.send(way, at, &span, Sent { request, answer }).map_err(|sent| sent.request)
    }

    /// A request that the kernel has ended. With `wait`, the next.
    fn ended_by_kernel(&mut self, wait: bool) -> Option<Done<T>> {
        let Kernel::Open(ring) = &mut self.kernel else { return None };
        match ring.next(wait) {
            Ok(ended) => ended.map(|Ended { holder, span, outcome }| holder.arrived(&span, outcome)),
            Err(error) => {
                if let Kernel::Open(ring) = std::mem::replace(&mut self.kernel, Kernel::Closed) {
                    let lost = ring.give_up().into_iter().map(|sent| sent.lost(&error));
                    lock(&self.shared.state).done.extend(lost);
                }
                lock(&self.shared.state).done.pop_front()
            }
        }
    }

    fn ask_thread(&mut self, request: Request<T>) {
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
        let done = lock(&self.shared.state).done.pop_front();
        let done = done.or_else(|| self.ended_by_kernel(false))?;
        self.under_way -= 1;
        Some(done)
    }

    /// Waits for a request to end; `None` if none is under way.
    pub(crate) fn wait(&mut self) -> Option<Done<T>> {
        if self.under_way == 0 {
            return None;
        }
        if let Some(done) = self.poll() {
            return Some(done);
        }
        if let Some(done) = self.ended_by_kernel(true) {
            self.under_way -= 1;
            return Some(done);
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
        while self.ended_by_kernel(true).is_some() {}
        for thread in self.threads.drain(..) {
            // It cannot have panicked: a tier's panic is caught where it happens.
            let _ = thread.join();
        }
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
pub(super) mod tests;
