//! The part of the engine that writes a trace. When it is off, a call costs one relaxed load. When it is on, each record is one
//! `write` to a file opened for appending: no lock of ours, nothing buffered that a killed process would lose, and no byte in memory.
//! The file is bounded; the trace ends when it is full or cannot be written, and never fails the call that it describes.

use super::code::{MAGIC, beginning, encode};
use super::{Attachment, Event, Header, Record, Transition, Verb, texts_of};
use crate::driver::Addr;
use crate::error::{Error, Result, Status};
use crate::notices::Notices;
use crate::terms::{Report, Request, Selection};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::Write as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};
// Not those of `sync`: a trace is written outside the model checker only.
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Largest file: about two million calls.
pub(super) const LIMIT: u64 = 64 << 20;

/// See the [module documentation](self).
#[derive(Debug, Default)]
pub(crate) struct Tracer {
    on: AtomicBool,
    sink: OnceLock<Sink>,
    /// Held while a trace is started: no file is touched for one that will be refused.
    starting: Mutex<()>,
    pub(crate) notices: Notices,
}

#[derive(Debug)]
struct Sink {
    /// Locked while this process writes.
    file: File,
    path: PathBuf,
    start: Instant,
    written: AtomicU64,
}

impl Tracer {
    /// Starts writing to `path`, or beside it where another process is writing there. Returns the file's name.
    pub(crate) fn start(&self, path: &Path, header: &Header) -> Result<PathBuf> {
        let failed = |what: String| Error::new(Status::InvalidArgument, what);
        let _starting = self.starting.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(sink) = self.sink.get() {
            return Err(failed(format!("a trace is being written already, to {}", sink.path.display())));
        }
        let (file, path) =
            open(path).map_err(|error| failed(format!("cannot trace to {}: {error}", path.display())))?;
        let begin = beginning(header);
        (&file).write_all(&begin).map_err(|error| failed(format!("cannot write {}: {error}", path.display())))?;
        let sink =
            Sink { file, path: path.clone(), start: Instant::now(), written: AtomicU64::new(begin.len() as u64) };
        self.sink.get_or_init(|| sink);
        self.on.store(true, Ordering::Relaxed);
        Ok(path)
    }

    /// Writes the record of a call, if tracing is on.
    #[inline]
    pub(crate) fn record(&self, event: impl FnOnce() -> Event) {
        if self.on.load(Ordering::Relaxed) {
            self.write(event());
        }
    }

    /// Makes a call that reports, and writes its record.
    #[inline]
    pub(crate) fn timed(
        &self,
        verb: Verb,
        selection: &Selection,
        wait: Duration,
        call: impl FnOnce() -> Result<Report>,
    ) -> Result<Report> {
        if !self.on.load(Ordering::Relaxed) {
            return call();
        }
        let start = Instant::now();
        let outcome = call();
        self.transition(verb, &[selection], wait, start.elapsed(), outcome.as_ref().map(std::slice::from_ref));
        outcome
    }

    /// As [`Tracer::timed`], for a switch.
    #[inline]
    pub(crate) fn timed_switch(
        &self,
        selections: [&Selection; 2],
        wait: Duration,
        call: impl FnOnce() -> Result<(Report, Report)>,
    ) -> Result<(Report, Report)> {
        if !self.on.load(Ordering::Relaxed) {
            return call();
        }
        let start = Instant::now();
        let outcome = call();
        let took = start.elapsed();
        match &outcome {
            Ok((paused, resumed)) => {
                self.transition(Verb::Switch, &selections, wait, took, Ok(&[paused.clone(), resumed.clone()]));
            }
            Err(error) => self.transition(Verb::Switch, &selections, wait, took, Err(error)),
        }
        outcome
    }

    #[cold]
    fn transition(
        &self,
        verb: Verb,
        selections: &[&Selection],
        wait: Duration,
        took: Duration,
        outcome: std::result::Result<&[Report], &Error>,
    ) {
        let reports = outcome.unwrap_or_default();
        let mut done = Transition {
            verb,
            tags: Vec::new(),
            wait,
            took,
            status: status(&outcome),
            moved: reports.iter().map(|report| report.bytes_moved).sum(),
            copied: reports.iter().map(|report| report.bytes_copied).sum(),
        };
        let texts: Vec<Vec<String>> = selections.iter().map(|selection| texts_of(selection)).collect();
        // A selection of many regions takes several records, the first of which has the figures.
        for at in 0..texts.iter().map(Vec::len).max().unwrap_or(0) {
            let tags = texts.iter().filter_map(|each| each.get(at).or(each.last()).cloned()).collect();
            self.write(Event::Transition(Transition { tags, ..done.clone() }));
            (done.took, done.moved, done.copied) = (Duration::ZERO, 0, 0);
        }
    }

    #[cold]
    fn write(&self, event: Event) {
        let Some(sink) = self.sink.get() else { return };
        let record = |event| encode(&Record { time: sink.start.elapsed(), thread: this_thread(), event });
        let frame = record(event);
        let before = sink.written.fetch_add(frame.len() as u64, Ordering::Relaxed);
        if before + frame.len() as u64 <= LIMIT {
            return self.append(sink, &frame);
        }
        // The first one that does not fit says so.
        if self.on.swap(false, Ordering::Relaxed) {
            self.append(sink, &record(Event::Cut));
            self.notices.add(format!("the trace {} has reached {LIMIT} bytes and ends here", sink.path.display()));
        }
    }

    fn append(&self, sink: &Sink, frame: &[u8]) {
        // One write, so that records of several threads do not mix; what is cut short ends the trace.
        let why = match (&sink.file).write(frame) {
            Ok(written) if written == frame.len() => return,
            Ok(_) => "only a part could be written".to_owned(),
            Err(error) => error.to_string(),
        };
        if self.on.swap(false, Ordering::Relaxed) {
            self.notices.add(format!("the trace {} ends here: {why}", sink.path.display()));
        }
    }
}

/// The number of an outcome.
pub(crate) fn status<T>(outcome: &std::result::Result<T, impl std::borrow::Borrow<Error>>) -> i32 {
    outcome.as_ref().map_or_else(|error| error.borrow().status as i32, |_| 0)
}

/// The record of a request for memory.
pub(crate) fn allocation(request: &Request, outcome: &Result<Addr>) -> Event {
    Event::Allocate {
        region: request.region.0,
        device: request.device.0,
        size: request.size,
        stream: request.stream.0,
        addr: outcome.as_ref().map_or(0, |addr| addr.0),
        status: status(outcome),
    }
}

/// The record of a file that was attached; `size` is its length.
pub(crate) fn attachment(addr: Addr, len: u64, path: &Path, at: u64, outcome: &Result<u64>) -> Event {
    let full = std::path::absolute(path);
    let name = full.as_deref().unwrap_or(path).to_string_lossy().into_owned();
    let (size, status) = (outcome.as_ref().map_or(0, |size| *size), status(outcome));
    Event::Attach(Attachment { addr: addr.0, len, at, size, status, name })
}

/// Opens and locks an empty file; `%p` is the process's number. One that somebody else is writing is left alone, also where that is another process of the
/// same number, in a container of its own.
fn open(path: &Path) -> std::io::Result<(File, PathBuf)> {
    let pid = std::process::id();
    let named = PathBuf::from(path.to_string_lossy().replace("%p", &pid.to_string()));
    let own = PathBuf::from(format!("{}.{pid}", named.display()));
    let (file, path) = match open_unless_taken(&named)? {
        Some(file) => (file, named),
        None => (open_unless_taken(&own)?.ok_or_else(|| taken(&own))?, own),
    };
    refuse_foreign(&file)?;
    file.set_len(0)?;
    Ok((file, path))
}

/// Opens and locks a file as it is; `None` if somebody else has. What cannot be locked at all is nobody's.
fn open_unless_taken(path: &Path) -> std::io::Result<Option<File>> {
    let mut options = OpenOptions::new();
    let file = options.read(true).append(true).create(true).mode(0o600).open(path)?;
    let is_taken = matches!(file.try_lock(), Err(TryLockError::WouldBlock));
    Ok((!is_taken).then_some(file))
}

fn taken(own: &Path) -> std::io::Error {
    std::io::Error::other(format!("somebody else is writing there, and to {} as well", own.display()))
}

/// What is not a trace is never overwritten.
fn refuse_foreign(file: &File) -> std::io::Result<()> {
    let data = file.metadata()?;
    let mut start = [0; MAGIC.len()];
    let mut is_trace = || file.read_exact_at(&mut start, 0).is_ok() && start == MAGIC;
    if data.is_file() && (data.len() == 0 || is_trace()) {
        return Ok(());
    }
    Err(std::io::Error::other("it exists and is not a trace; it is not overwritten"))
}

/// Threads in the order in which they first appear.
fn this_thread() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    thread_local!(static NUMBER: u32 = NEXT.fetch_add(1, Ordering::Relaxed));
    // A thread whose locals are gone already still gets a number.
    NUMBER.try_with(|number| *number).unwrap_or(u32::MAX)
}
