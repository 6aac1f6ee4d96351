//! One thread that answers many clients, with limits on everything that a client could make it keep or wait for.
//!
//! A connection that sends a line too long, too slowly, or more than its share is told so and closed; a client that does not read its answer is closed;
//! who comes when all places are taken is told to come again. The thread waits in `poll` and nowhere else: what takes time is
//! answered later, through an [`Outbox`], by whoever has done it.

use crate::line::Lines;
use crate::lock;
use crate::message::{Answer, Code, LONGEST_REQUEST, Refusal, Request, Verb, reply};
use crate::peer;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd as _, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Connections that are served at once.
pub const PLACES: usize = 32;
/// The next ticket: what is answered to a client of a server that has ended is nobody's of the next one, which has its outbox.
static TICKETS: AtomicU64 = AtomicU64::new(1);
/// Agreements ([`Verb::Reclaim`]) that are in force, or asked for, at once; each keeps a connection.
pub const AGREEMENTS: usize = 16;
/// Requests of one connection that may be unanswered.
const AT_ONCE: usize = 8;
/// How long a connection may lie still between two requests.
const IDLE: Duration = Duration::from_secs(120);
/// How long a line may take from its first byte to its last, and an answer until it is read.
const LINE: Duration = Duration::from_secs(5);
/// How long the thread sleeps at most.
const LONGEST_SLEEP: Duration = Duration::from_secs(1);

/// A request, in this process's count.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Ticket(pub u64);

/// Whoever knows the answers. Nothing here may take long: the thread serves others meanwhile.
pub trait Service: Send + Sync {
    /// The answer; None if it comes later, through the outbox.
    fn answer(&self, ticket: Ticket, verb: Verb) -> Option<Answer>;

    /// Nobody waits for this answer any more.
    fn forget(&self, ticket: Ticket);

    /// The connection has ended on which this agreement was asked for.
    fn let_go(&self, _ticket: Ticket) {}

    /// Does what is due; when to call it again (None: when something else happens).
    fn tick(&self) -> Option<Instant>;

    /// Where clients come to from now on, if nobody finds the socket any more on which they have come until now. Asked once a second.
    fn another_door(&self) -> Option<UnixListener> {
        None
    }
}

/// Answers that come later. For one server at a time: it drops those that none of its clients waits for.
#[derive(Debug)]
pub struct Outbox {
    finished: Mutex<Vec<(Ticket, Answer)>>,
    wake: OwnedFd,
}

impl Outbox {
    /// An empty one.
    ///
    /// # Errors
    /// The system's.
    pub fn new() -> io::Result<Outbox> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Outbox { finished: Mutex::default(), wake })
    }

    /// The answer to a request that was asked earlier.
    pub fn put(&self, ticket: Ticket, answer: Answer) {
        lock(&self.finished).push((ticket, answer));
        self.wake();
    }

    /// Makes the thread look at what there is.
    pub fn wake(&self) {
        // A full counter wakes as well.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }
}

/// The descriptors of a server, for a forked child to close: it has no thread that would serve them, and a peer would wait for ever.
#[derive(Debug)]
pub struct Descriptors([AtomicI32; PLACES + 2]);

impl Default for Descriptors {
    fn default() -> Descriptors {
        Descriptors::new()
    }
}

impl Descriptors {
    /// None yet.
    #[must_use]
    pub const fn new() -> Descriptors {
        Descriptors([const { AtomicI32::new(-1) }; PLACES + 2])
    }

    pub(crate) fn add(&self, fd: RawFd) {
        let free = |slot: &&AtomicI32| slot.compare_exchange(-1, fd, Ordering::AcqRel, Ordering::Relaxed).is_ok();
        let _ = self.0.iter().find(free);
    }

    pub(crate) fn remove(&self, fd: RawFd) {
        let _ = self.0.iter().find(|slot| slot.compare_exchange(fd, -1, Ordering::AcqRel, Ordering::Relaxed).is_ok());
    }

    /// Closes all. Only in the child of a fork, where the server's thread does not exist. Async-signal-safe.
    pub fn close_in_child(&self) {
        for slot in &self.0 {
            let fd = slot.swap(-1, Ordering::AcqRel);
            if fd >= 0 {
                // SAFETY: in the child the owner of this descriptor, a value on the server thread's stack, is never used or dropped again.
                unsafe { rustix::io::close(fd) };
            }
        }
    }
}

/// A server, to be run on a thread of its own.
pub struct Server<S: Service> {
    listener: UnixListener,
    service: S,
    outbox: Arc<Outbox>,
    descriptors: Arc<Descriptors>,
    stop: Arc<AtomicBool>,
    connections: Vec<Connection>,
    /// When the socket was last looked for.
    looked: Instant,
}

struct Connection {
    stream: UnixStream,
    lines: Lines,
    out: Vec<u8>,
    open: Vec<(Ticket, u64)>,
    /// Agreements that last as long as the connection: asked for, and not refused.
    agreed: Vec<Ticket>,
    /// When the line that has begun must be complete, the answer read, the next request there.
    deadline: Instant,
    /// Nothing more is read; it ends when everything is written.
    ending: bool,
    /// Nobody is at the other end.
    gone: bool,
}

impl<S: Service> Server<S> {
    /// A server on a socket that does not block. `descriptors`: what a forked child has to close.
    #[must_use]
    pub fn new(listener: UnixListener, service: S, outbox: Arc<Outbox>, descriptors: Arc<Descriptors>) -> Server<S> {
        descriptors.add(listener.as_raw_fd());
        descriptors.add(outbox.wake.as_raw_fd());
        let stop = Arc::new(AtomicBool::new(false));
        Server { listener, service, outbox, descriptors, stop, connections: Vec::new(), looked: Instant::now() }
    }

    /// Set it and wake the outbox, and [`Server::run`] returns.
    #[must_use]
    pub fn stop(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.stop)
    }

    /// Serves until it is stopped.
    pub fn run(mut self) {
        while !self.stop.load(Ordering::Acquire) {
            let due = self.service.tick();
            self.deliver();
            self.look_for_the_door();
            let Some(ready) = self.sleep(due) else { continue };
            let mut buffer = [0; 8];
            let _ = rustix::io::read(&self.outbox.wake, &mut buffer);
            for (at, flags) in ready.connections {
                self.attend(at, flags);
            }
            if ready.listener {
                self.welcome();
            }
            self.close_ended();
        }
        // What was answered before the end is still said.
        self.deliver();
    }

    fn sleep(&self, due: Option<Instant>) -> Option<Ready> {
        let deadlines = self.connections.iter().map(|connection| connection.deadline).chain(due);
        let now = Instant::now();
        let left = deadlines.map(|deadline| deadline.saturating_duration_since(now)).min();
        let left = left.unwrap_or(LONGEST_SLEEP).min(LONGEST_SLEEP);
        let timeout = Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: i64::from(left.subsec_nanos()) };
        let mut fds = vec![PollFd::new(&self.listener, PollFlags::IN), PollFd::new(&self.outbox.wake, PollFlags::IN)];
        fds.extend(self.connections.iter().map(|each| PollFd::new(&each.stream, each.interest())));
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) => {}
            Err(Errno::INTR) => return None,
            // Out of memory for the kernel: later.
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
        let flags: Vec<PollFlags> = fds.iter().map(PollFd::revents).collect();
        let listener = flags.first().is_some_and(|flags| !flags.is_empty());
        Some(Ready { listener, connections: flags.into_iter().skip(2).enumerate().collect() })
    }

    fn look_for_the_door(&mut self) {
        if self.looked.elapsed() < LONGEST_SLEEP {
            return;
        }
        self.looked = Instant::now();
        if let Some(listener) = self.service.another_door() {
            self.descriptors.remove(self.listener.as_raw_fd());
            self.descriptors.add(listener.as_raw_fd());
            self.listener = listener;
        }
    }

    /// Whoever waits at the door: the same user is let in, as long as there is a place.
    fn welcome(&mut self) {
        for _ in 0..PLACES {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(_) => {
                    // No descriptor left, most likely: without this the door would stay open and the thread would spin.
                    std::thread::sleep(Duration::from_millis(20));
                    return;
                }
            };
            if stream.set_nonblocking(true).is_err() {
                continue;
            }
            match self.refusal_of(&stream) {
                None => self.let_in(stream),
                // Best effort: a stranger who does not read is not waited for.
                Some(refusal) => drop((&stream).write(reply(0, &Err(refusal)).as_bytes())),
            }
        }
    }

    fn refusal_of(&self, stream: &UnixStream) -> Option<Refusal> {
        if !peer::is_ours(stream.as_fd()) {
            return Some(Refusal::new(Code::Refused, "this socket answers the user of its process only"));
        }
        let full = self.connections.len() >= PLACES;
        full.then(|| Refusal::new(Code::Busy, format!("{PLACES} clients are connected already; try again later")))
    }

    fn let_in(&mut self, stream: UnixStream) {
        self.descriptors.add(stream.as_raw_fd());
        self.connections.push(Connection {
            stream,
            lines: Lines::new(LONGEST_REQUEST),
            out: Vec::new(),
            open: Vec::new(),
            agreed: Vec::new(),
            deadline: Instant::now() + IDLE,
            ending: false,
            gone: false,
        });
    }

    fn attend(&mut self, at: usize, flags: PollFlags) {
        if flags.contains(PollFlags::IN) && self.connections[at].interest().contains(PollFlags::IN) {
            self.read(at);
        }
        let connection = &mut self.connections[at];
        if flags.intersects(PollFlags::ERR | PollFlags::HUP) {
            // The peer has gone in both directions.
            connection.abandon();
        }
        connection.write();
        if !connection.gone && connection.deadline <= Instant::now() {
            connection.give_up();
        }
    }

    fn read(&mut self, at: usize) {
        let mut buffer = [0; LONGEST_REQUEST];
        let connection = &mut self.connections[at];
        match (&connection.stream).read(&mut buffer) {
            Ok(0) => connection.ending = true,
            Ok(count) => match connection.take(&buffer[..count]) {
                Ok(lines) => lines.iter().for_each(|line| self.request(at, line)),
                Err(refusal) => connection.refuse(0, refusal),
            },
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(_) => connection.abandon(),
        }
    }

    fn request(&mut self, at: usize, line: &[u8]) {
        let agreements = self.connections.iter().map(|each| each.agreed.len()).sum::<usize>();
        let connection = &mut self.connections[at];
        if connection.ending {
            return;
        }
        match Request::parse(line) {
            // Whoever says something that is no request gets no second try: it is not one of ours.
            Err((0, refusal)) => connection.refuse(0, refusal),
            Err((id, refusal)) => connection.say(&reply(id, &Err(refusal))),
            Ok(request) if connection.open.len() >= AT_ONCE => {
                let why = format!("{AT_ONCE} requests of this connection are unanswered; wait for them");
                connection.say(&reply(request.id, &Err(Refusal::new(Code::Busy, why))));
            }
            Ok(request) if request.verb.binds() && agreements >= AGREEMENTS => {
                let why = format!("{AGREEMENTS} processes have this one's memory already; try again later");
                connection.say(&reply(request.id, &Err(Refusal::new(Code::Busy, why))));
            }
            Ok(request) => {
                let ticket = Ticket(TICKETS.fetch_add(1, Ordering::Relaxed));
                if request.verb.binds() {
                    connection.agreed.push(ticket);
                }
                match self.service.answer(ticket, request.verb) {
                    Some(answer) => connection.answered(ticket, request.id, &answer),
                    None => connection.open.push((ticket, request.id)),
                }
            }
        }
    }

    /// Brings what has been finished meanwhile to whoever asked, if it is still there.
    fn deliver(&mut self) {
        for (ticket, answer) in std::mem::take(&mut *lock(&self.outbox.finished)) {
            for connection in &mut self.connections {
                if let Some(open) = connection.open.iter().position(|(other, _)| *other == ticket) {
                    let (_, id) = connection.open.swap_remove(open);
                    connection.answered(ticket, id, &answer);
                }
            }
        }
    }

    fn close_ended(&mut self) {
        let mut at = 0;
        while at < self.connections.len() {
            if !self.connections[at].is_over() {
                at += 1;
                continue;
            }
            self.say_goodbye(at);
            self.connections.swap_remove(at);
        }
    }

    fn say_goodbye(&self, at: usize) {
        let connection = &self.connections[at];
        connection.open.iter().for_each(|(ticket, _)| self.service.forget(*ticket));
        connection.agreed.iter().for_each(|ticket| self.service.let_go(*ticket));
        self.descriptors.remove(connection.stream.as_raw_fd());
    }
}

impl<S: Service> Drop for Server<S> {
    /// Also of one that never ran: a forked child is not to close what has these numbers next.
    fn drop(&mut self) {
        (0..self.connections.len()).for_each(|at| self.say_goodbye(at));
        self.descriptors.remove(self.listener.as_raw_fd());
        self.descriptors.remove(self.outbox.wake.as_raw_fd());
    }
}

/// What `poll` has found.
struct Ready {
    listener: bool,
    connections: Vec<(usize, PollFlags)>,
}

impl Connection {
    fn interest(&self) -> PollFlags {
        // Who does not read what was answered is not heard either: so little waits here for it.
        let reading = if self.ending || !self.out.is_empty() { PollFlags::empty() } else { PollFlags::IN };
        let writing = if self.out.is_empty() { PollFlags::empty() } else { PollFlags::OUT };
        reading | writing
    }

    fn take(&mut self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, Refusal> {
        let was_open = self.lines.is_open();
        let lines = self.lines.push(bytes).map_err(|_| {
            Refusal::new(Code::Invalid, format!("a request has at most {LONGEST_REQUEST} bytes; this one has more"))
        })?;
        if !self.lines.is_open() {
            self.deadline = Instant::now() + IDLE;
        } else if !was_open || !lines.is_empty() {
            self.deadline = Instant::now() + LINE;
        }
        Ok(lines)
    }

    /// The answer to a request; what was refused is no agreement.
    fn answered(&mut self, ticket: Ticket, id: u64, answer: &Answer) {
        if answer.is_err() {
            self.agreed.retain(|other| *other != ticket);
        }
        self.say(&reply(id, answer));
    }

    fn say(&mut self, line: &str) {
        if self.out.is_empty() {
            self.deadline = Instant::now() + LINE;
        }
        self.out.extend_from_slice(line.as_bytes());
        self.write();
    }

    fn refuse(&mut self, id: u64, refusal: Refusal) {
        self.say(&reply(id, &Err(refusal)));
        self.ending = true;
        // What has begun is not waited for any more; answers that come later still go out.
        self.lines = Lines::new(LONGEST_REQUEST);
    }

    fn write(&mut self) {
        while !self.out.is_empty() && !self.gone {
            match (&self.stream).write(&self.out) {
                Ok(0) => return self.abandon(),
                Ok(count) => drop(self.out.drain(..count)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(_) => return self.abandon(),
            }
            if self.out.is_empty() {
                self.deadline = Instant::now() + if self.lines.is_open() { LINE } else { IDLE };
            }
        }
    }

    /// The deadline has passed: of a line, of an answer that nobody reads, or of the next request.
    fn give_up(&mut self) {
        if !self.out.is_empty() {
            self.abandon();
        } else if !self.lines.is_open() && (!self.open.is_empty() || !self.agreed.is_empty()) {
            // It is we who take long, or nothing more is to be said while an agreement lasts.
            self.deadline = Instant::now() + IDLE;
        } else {
            let seconds = if self.lines.is_open() { LINE } else { IDLE }.as_secs();
            self.refuse(0, Refusal::new(Code::Refused, format!("no whole request came within {seconds} s")));
        }
    }

    fn abandon(&mut self) {
        self.gone = true;
    }

    /// Nothing is left to say to this one. A client that has closed its sending half still gets its answers.
    fn is_over(&self) -> bool {
        self.gone || (self.ending && self.out.is_empty() && self.open.is_empty())
    }
}

#[cfg(test)]
mod tests;
