//! Asking a process: a connection, one request at a time, and an end to every wait.

use crate::line::Lines;
use crate::message::{Answer, LONGEST_REPLY, Request, Verb, parse_reply};
use crate::peer::{self, Peer};
use crate::place::{Found, Place, knock};
use std::collections::VecDeque;
use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Why there is no answer from a process.
#[derive(Debug)]
pub enum Failure {
    /// Nobody listens there any more.
    Gone,
    /// It did not answer in time: it is stopped, or something holds up all of its threads.
    Silent(Duration),
    /// It is another user's, or says something that is no reply.
    Strange(String),
    /// The system's own failure.
    System(io::Error),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Gone => f.write_str("nobody listens on its socket any more"),
            Failure::Silent(time) => {
                write!(f, "it did not answer within {:.1} s; is it stopped?", time.as_secs_f64())
            }
            Failure::Strange(why) => f.write_str(why),
            Failure::System(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for Failure {}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Failure {
        match error.kind() {
            ErrorKind::ConnectionRefused | ErrorKind::NotFound | ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => {
                Failure::Gone
            }
            _ => Failure::System(error),
        }
    }
}

/// A connection to a process.
#[derive(Debug)]
pub struct Client {
    stream: Arc<UnixStream>,
    lines: Lines,
    /// Lines that were read and not looked at yet.
    pending: VecDeque<Vec<u8>>,
    asked: u64,
}

impl Client {
    /// A connection to whoever listens at `path`, if it is to be had within `patience`.
    ///
    /// # Errors
    /// `Gone` if nobody listens; `Silent` if so many wait for a stopped process already that its queue is full; `Strange` if it is another user.
    pub fn connect(path: &Path, patience: Duration) -> Result<Client, Failure> {
        let stream = knock(path, patience).map_err(|error| match error.kind() {
            ErrorKind::WouldBlock => Failure::Silent(patience),
            _ => error.into(),
        })?;
        if !peer::is_ours(stream.as_fd()) {
            return Err(Failure::Strange(format!("{} belongs to another user's process", path.display())));
        }
        Ok(Client { stream: Arc::new(stream), lines: Lines::new(LONGEST_REPLY), pending: VecDeque::new(), asked: 0 })
    }

    /// The connection, for whoever may want to end it.
    #[must_use]
    pub fn stream(&self) -> Arc<UnixStream> {
        Arc::clone(&self.stream)
    }

    /// The number that whoever listens there has here; None: none, because it is in another PID namespace.
    #[must_use]
    pub fn peer(&self) -> Option<u32> {
        Peer::of(self.stream.as_fd()).and_then(|peer| peer.pid)
    }

    /// Asks, and waits for the answer at most `patience`.
    ///
    /// # Errors
    /// See [`Failure`]; a refusal is an answer.
    pub fn ask(&mut self, verb: Verb, patience: Duration) -> Result<Answer, Failure> {
        let until = Instant::now() + patience;
        let number = self.send(verb, until, patience)?;
        self.answer(&[number], until, patience).map(|(_, answer)| answer)
    }

    /// The same for what may take long: when there is no answer within `patience` it waits on, for `most` in all, as long as the process answers at all.
    ///
    /// # Errors
    /// As [`Client::ask`].
    pub fn ask_alive(&mut self, verb: Verb, patience: Duration, most: Duration) -> Result<Answer, Failure> {
        let end = Instant::now() + most;
        let number = self.send(verb, Instant::now() + patience, patience)?;
        loop {
            match self.answer(&[number], Instant::now() + patience, patience) {
                Err(Failure::Silent(_)) if Instant::now() < end => {}
                outcome => return outcome.map(|(_, answer)| answer),
            }
            let until = Instant::now() + patience;
            let alive = self.send(Verb::Hello, until, patience)?;
            let (whose, answer) = self.answer(&[number, alive], until, patience)?;
            if whose != alive {
                return Ok(answer);
            }
        }
    }

    /// Says it; the request's number. If it cannot be said, what a full house says comes before the door closes.
    fn send(&mut self, verb: Verb, until: Instant, patience: Duration) -> Result<u64, Failure> {
        self.asked += 1;
        let request = Request { id: self.asked, verb };
        self.stream.set_write_timeout(Some(patience.max(Duration::from_millis(1))))?;
        if let Err(error) = (&*self.stream).write_all(request.line().as_bytes()) {
            let said = self.read_lines(until, patience).map_err(|_| Failure::from(error))?;
            self.pending.extend(said);
        }
        Ok(self.asked)
    }

    /// The next answer to one of these requests, or to the connection itself, which has the number 0.
    fn answer(&mut self, wanted: &[u64], until: Instant, patience: Duration) -> Result<(u64, Answer), Failure> {
        loop {
            while let Some(line) = self.pending.pop_front() {
                let (id, answer) = parse_reply(&line).map_err(Failure::Strange)?;
                if id == 0 || wanted.contains(&id) {
                    return Ok((id, answer));
                }
            }
            let lines = self.read_lines(until, patience)?;
            self.pending.extend(lines);
        }
    }

    /// At least one line.
    fn read_lines(&mut self, until: Instant, patience: Duration) -> Result<Vec<Vec<u8>>, Failure> {
        let mut buffer = vec![0; 1 << 16];
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Failure::Silent(patience));
            }
            self.stream.set_read_timeout(Some(left))?;
            let count = match (&*self.stream).read(&mut buffer) {
                Ok(0) => return Err(Failure::Gone),
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Err(Failure::Silent(patience)),
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(error.into()),
            };
            let lines = self.lines.push(&buffer[..count]);
            let lines = lines.map_err(|_| Failure::Strange("its reply is too long".to_owned()))?;
            if !lines.is_empty() {
                return Ok(lines);
            }
        }
    }
}

/// Asks one process one thing, and waits at most `patience` in all.
///
/// # Errors
/// As [`Client::connect`] and [`Client::ask`].
pub fn ask(found: &Found, verb: Verb, patience: Duration) -> Result<Answer, Failure> {
    let until = Instant::now() + patience;
    let mut client = Client::connect(&found.path, patience)?;
    match client.ask(verb, until.saturating_duration_since(Instant::now())) {
        Err(Failure::Silent(_)) => Err(Failure::Silent(patience)),
        answer => answer,
    }
}

/// Asks all processes the same, side by side; what dead ones left behind is removed.
///
/// # Errors
/// The directory's.
pub fn ask_all(place: &Place, verb: &Verb, patience: Duration) -> io::Result<Vec<(Found, Result<Answer, Failure>)>> {
    let sockets = place.sockets()?;
    let mut answers = Vec::new();
    for some in sockets.chunks(64) {
        std::thread::scope(|scope| {
            let asking = some.iter().map(|found| {
                let one = move || ask(found, verb.clone(), patience);
                // Where the system has no thread for it, it is asked here: later than the others, but asked.
                std::thread::Builder::new().spawn_scoped(scope, one).map_err(|_| one())
            });
            let asking: Vec<_> = asking.collect();
            for (found, asked) in some.iter().zip(asking) {
                match asked.map_or_else(|answer| answer, |thread| thread.join().unwrap_or(Err(Failure::Gone))) {
                    // A socket that refuses connections has no process any more; one that merely hung up has.
                    Err(Failure::Gone) => place.forget_if_dead(found),
                    answer => answers.push((found.clone(), answer)),
                }
            }
        });
    }
    Ok(answers)
}
