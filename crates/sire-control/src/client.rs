//! Asking a process: a connection, one request at a time, and an end to every wait.

use crate::line::Lines;
use crate::message::{Answer, LONGEST_REPLY, Request, Verb, parse_reply};
use crate::place::{Found, Place, knock};
use crate::server::peer_is_ours;
use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
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
    stream: UnixStream,
    lines: Lines,
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
        if !peer_is_ours(stream.as_fd()) {
            return Err(Failure::Strange(format!("{} belongs to another user's process", path.display())));
        }
        Ok(Client { stream, lines: Lines::new(LONGEST_REPLY), asked: 0 })
    }

    /// Asks, and waits for the answer at most `patience`.
    ///
    /// # Errors
    /// See [`Failure`]; a refusal is an answer.
    pub fn ask(&mut self, verb: Verb, patience: Duration) -> Result<Answer, Failure> {
        self.asked += 1;
        let request = Request { id: self.asked, verb };
        let until = Instant::now() + patience;
        self.stream.set_write_timeout(Some(patience.max(Duration::from_millis(1))))?;
        if let Err(error) = self.stream.write_all(request.line().as_bytes()) {
            // What a full house says comes before the door closes.
            return self.answer(until, patience).map_err(|_| error.into());
        }
        self.answer(until, patience)
    }

    fn answer(&mut self, until: Instant, patience: Duration) -> Result<Answer, Failure> {
        let mut buffer = vec![0; 1 << 16];
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Failure::Silent(patience));
            }
            self.stream.set_read_timeout(Some(left))?;
            let count = match self.stream.read(&mut buffer) {
                Ok(0) => return Err(Failure::Gone),
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Err(Failure::Silent(patience)),
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(error.into()),
            };
            let lines = self.lines.push(&buffer[..count]);
            for line in lines.map_err(|_| Failure::Strange("its reply is too long".to_owned()))? {
                let (id, answer) = parse_reply(&line).map_err(Failure::Strange)?;
                // 0: a refusal of the connection itself.
                if id == self.asked || id == 0 {
                    return Ok(answer);
                }
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
            let asking: Vec<_> =
                some.iter().map(|found| scope.spawn(move || ask(found, verb.clone(), patience))).collect();
            for (found, thread) in some.iter().zip(asking) {
                match thread.join().unwrap_or(Err(Failure::Gone)) {
                    // A socket that refuses connections has no process any more; one that merely hung up has.
                    Err(Failure::Gone) => place.forget_if_dead(found),
                    answer => answers.push((found.clone(), answer)),
                }
            }
        });
    }
    Ok(answers)
}
