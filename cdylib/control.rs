//! The control socket of the process: who serves it, and what the answers are. docs/control.md is the contract.
//!
//! Two threads, started when the socket is opened. The server's waits for clients and answers what takes no time; the worker's asks the engine and the
//! driver, so that a driver that hangs holds up nothing but answers about it. What changes memory that the program uses waits at the desk for a
//! safe point, and is carried out there, by the program's own thread (`abi::control`).

use crate::abi::process::statistics;
use crate::boundary::catch;
use crate::capture;
use crate::preempt;
use crate::process;
use crate::slices;
use serde_json::{Value, json};
use sire_control::board::Board;
use sire_control::desk::{Action, Desk};
use sire_control::instance;
use sire_control::journal::Journal;
use sire_control::message::{Answer, Code, PROTOCOL, Refusal, Verb};
use sire_control::place::{self, Directions, Place, identity};
use sire_control::server::{Descriptors, Outbox, Server, Service, Ticket};
use sire_core::driver::{Device, Driver as _};
use sire_core::engine::Selection;
use sire_core::error::{Error, Result, Status};
use sire_core::policy::Budget;
use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

/// Questions that may wait for the worker.
const BACKLOG: usize = 64;
/// Events in a list.
const SHOWN: usize = 20;
/// How long the end of the process waits for the worker to finish what it has begun.
const FAREWELL: Duration = Duration::from_secs(2);
/// How long the server has for what was answered.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// The one of the process; it stays when its socket is closed, for threads that are still at the desk.
static CURRENT: AtomicPtr<Control> = AtomicPtr::new(std::ptr::null_mut());

/// The number of the process one of whose threads opens or closes the socket; 0: none does. Not a mutex, which a child that is forked meanwhile
/// would find locked for ever: the child finds a number that is not its own.
static TURN: AtomicU32 = AtomicU32::new(0);

/// The turn to open or close the socket.
struct Turn;

impl Turn {
    /// Waits for it.
    fn take() -> Turn {
        let own = std::process::id();
        loop {
            let found = TURN.load(Ordering::Relaxed);
            let is_free = found != own;
            if is_free && TURN.compare_exchange(found, own, Ordering::Acquire, Ordering::Relaxed).is_ok() {
                return Turn;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        TURN.store(0, Ordering::Release);
    }
}

/// What the threads share.
pub(crate) struct Control {
    pub desk: Desk,
    pub board: Board,
    pub journal: Journal,
    outbox: Arc<Outbox>,
    descriptors: Arc<Descriptors>,
    running: Mutex<Option<Running>>,
    /// Questions that the worker has not answered yet.
    working: AtomicUsize,
    /// Threads that serve a socket, or are about to.
    servers: AtomicUsize,
    process: u32,
    started: f64,
}

/// A socket that is open.
struct Running {
    directions: Directions,
    door: Door,
    stop: Arc<AtomicBool>,
}

/// Where a socket is.
struct Door {
    path: PathBuf,
    directory: PathBuf,
    identity: Option<(u64, u64)>,
}

impl Door {
    fn open(place: &Place) -> io::Result<(Door, UnixListener)> {
        let (listener, path) = place.listen(std::process::id())?;
        Ok((Door { identity: identity(&path), directory: place.path().to_path_buf(), path }, listener))
    }

    /// Whether the file is the one that was made.
    fn is_there(&self) -> bool {
        self.identity.is_some() && identity(&self.path) == self.identity
    }

    fn remove(&self) {
        if self.is_there() {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// The control of the process, if its socket was ever opened. Wait-free.
pub(crate) fn current() -> Option<&'static Control> {
    // SAFETY: null, or a box that `made` has leaked.
    unsafe { CURRENT.load(Ordering::Acquire).as_ref() }
}

/// Notes an event, if somebody may want to know.
pub(crate) fn note(what: &str, sentence: impl FnOnce() -> String) {
    if let Some(control) = current() {
        control.journal.note(what, &sentence());
    }
}

/// Opens the socket, unless it is open; where it is.
pub(crate) fn open() -> Result<PathBuf> {
    let _turn = Turn::take();
    let control = made()?;
    if let Some(running) = &*control.running() {
        return Ok(running.door.path.clone());
    }
    control.start().map_err(|error| failed("the control socket cannot be opened", &error))
}

/// Closes the socket: nobody can ask any more. What is paused from outside is left to [`Desk::give_up`].
pub(crate) fn close() {
    let _turn = Turn::take();
    if let Some(control) = current() {
        control.desk.close();
        control.stop();
    }
}

/// The one of the process; its desk works without a socket.
pub(crate) fn made() -> Result<&'static Control> {
    if let Some(control) = current() {
        return Ok(control);
    }
    let outbox = Arc::new(Outbox::new().map_err(|error| failed("the control socket cannot be opened", &error))?);
    let delivery = Arc::clone(&outbox);
    let control = Control {
        desk: Desk::new(Box::new(move |ticket, answer| {
            if let Some(answer) = slices::answered(ticket, answer) {
                delivery.put(ticket, answer);
            }
        })),
        board: Board::default(),
        journal: Journal::default(),
        outbox,
        descriptors: Arc::default(),
        running: Mutex::default(),
        working: AtomicUsize::new(0),
        servers: AtomicUsize::new(0),
        process: std::process::id(),
        started: now(),
    };
    watch_forks_and_exit();
    let control = Box::into_raw(Box::new(control));
    let published = CURRENT.compare_exchange(std::ptr::null_mut(), control, Ordering::AcqRel, Ordering::Acquire);
    let first = published.err().unwrap_or(control);
    if first != control {
        // SAFETY: it comes from the box above, and nobody else has it.
        drop(unsafe { Box::from_raw(control) });
    }
    // SAFETY: what was published stays for good.
    Ok(unsafe { &*first })
}

fn watch_forks_and_exit() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: both handlers are plain functions of this library, which is linked to stay loaded for good.
        let registered =
            unsafe { libc::pthread_atfork(None, None, Some(after_fork_in_child)) == 0 && libc::atexit(at_exit) == 0 };
        if !registered {
            crate::log::warning!(
                "no handler for forks and the end could be registered; close the control socket before either"
            );
        }
    });
}

/// The child has none of the threads: it keeps none of the descriptors, and may open a socket of its own. Stores and `close` only.
extern "C" fn after_fork_in_child() {
    instance::forget();
    if let Some(control) = current() {
        control.descriptors.close_in_child();
        CURRENT.store(std::ptr::null_mut(), Ordering::Release);
    }
}

/// Whatever the worker has begun with the driver gets a moment, because the driver goes next. Then the socket goes; what was answered is said
/// before the end. A child that was forked past the C library has neither thread.
extern "C" fn at_exit() {
    let Some(control) = current().filter(|control| control.process == std::process::id()) else { return };
    let is_working = || control.working.load(Ordering::Acquire) > 0;
    wait_while(&is_working, FAREWELL);
    control.stop();
    wait_while(&|| is_working() || control.is_served(), LAST_WORDS);
}

/// Whether `busy` came to its end in time.
fn wait_while(busy: &dyn Fn() -> bool, patience: Duration) -> bool {
    let until = Instant::now() + patience;
    while busy() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(1));
    }
    !busy()
}

/// A server thread that counts, until it ends in whatever way.
struct Serving<'a>(&'a AtomicUsize);

impl Drop for Serving<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Release);
    }
}

impl Control {
    fn running(&self) -> MutexGuard<'_, Option<Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a server's thread runs.
    fn is_served(&self) -> bool {
        self.servers.load(Ordering::Acquire) > 0
    }

    fn start(&'static self) -> io::Result<PathBuf> {
        // A server that is about to end would take what is answered to clients of the next one.
        if !wait_while(&|| self.is_served(), FAREWELL) {
            return Err(io::Error::other("the one that was closed before has not ended yet; try again"));
        }
        let directions = Directions::of_this_process();
        let (door, listener) = Door::open(&directions.place()?)?;
        let (questions, waiting) = sync_channel(BACKLOG);
        let outbox = Arc::clone(&self.outbox);
        let server = Server::new(listener, Porter { control: self, questions }, outbox, Arc::clone(&self.descriptors));
        let stop = server.stop();
        // The worker first: without a server, which holds the other end, it ends at once. A server that could not be started is dropped, and with it
        // all that is open.
        let serve = move || {
            let _serving = Serving(&self.servers);
            server.run();
        };
        self.servers.fetch_add(1, Ordering::Relaxed);
        let spawned = spawn("sire-control-w", move || self.work(waiting)).and_then(|_| spawn("sire-control", serve));
        if let Err(error) = spawned {
            self.servers.fetch_sub(1, Ordering::Release);
            door.remove();
            return Err(error);
        }
        self.desk.open();
        let path = door.path.clone();
        *self.running() = Some(Running { directions, door, stop });
        Ok(path)
    }

    /// A new socket where those who ask look for one, unless it is there already. Its directory goes with its user's session, and with what cleans up old
    /// files; a program that outlives that is to be found by who comes back.
    fn another_door(&self) -> Option<UnixListener> {
        let mut running = self.running();
        let Running { directions, door, .. } = running.as_mut()?;
        let place = directions.place().ok()?;
        if door.is_there() && place.path() == door.directory {
            return None;
        }
        let (new, listener) = Door::open(&place).ok()?;
        door.remove();
        self.journal.note("moved", &format!("the control socket is at {} now", new.path.display()));
        *door = new;
        Some(listener)
    }

    fn stop(&self) {
        if let Some(running) = self.running().take() {
            running.door.remove();
            running.stop.store(true, Ordering::Release);
            self.outbox.wake();
        }
    }

    // ---- the worker -----------------------------------------------------------------------------------------------------

    /// Ends with the server, which holds the other end.
    fn work(&self, waiting: Receiver<(Ticket, Verb)>) {
        for (ticket, verb) in waiting {
            let answer = catch(|| Ok(self.look_up(&verb))).unwrap_or_else(|error| Err(refusal(&error)));
            self.outbox.put(ticket, answer);
            self.working.fetch_sub(1, Ordering::Release);
        }
    }

    fn look_up(&self, verb: &Verb) -> Answer {
        let outcome = match verb {
            Verb::Evict { device, bytes } => evict(*device, *bytes),
            Verb::Budget { device, limit, headroom, residency } => set_budget(*device, *limit, *headroom, *residency),
            Verb::Trace => self.trace(),
            Verb::Marks => Ok(json!({
                "pid": std::process::id(),
                "instance": instance::spoken(instance::own()),
                "marks": preempt::described(),
            })),
            _ => self.list(),
        };
        let word = match verb {
            Verb::Evict { .. } => "evict",
            Verb::Budget { .. } => "budget",
            Verb::Trace => "trace",
            _ => return outcome.map_err(|error| refusal(&error)),
        };
        let said = outcome.as_ref().map_or_else(|error| format!("failed: {error}"), Value::to_string);
        self.journal.note(word, &format!("from outside: {said}"));
        outcome.map_err(|error| refusal(&error))
    }

    fn list(&self) -> Result<Value> {
        let mut answer = self.hello();
        // Whoever looks does not start CUDA in a process that has not used it: its forked children could not use it any more.
        answer["stats"] = statistics(process::started())?;
        answer["devices"] = devices(&answer["stats"]["devices"]);
        answer["control"] = self.desk.summary();
        answer["marks"] = preempt::described();
        answer["program"] = self.board.sheet().unwrap_or(Value::Null);
        answer["journal"] = self.journal.last(SHOWN);
        Ok(answer)
    }

    fn hello(&self) -> Value {
        json!({
            "protocol": PROTOCOL,
            "version": env!("CARGO_PKG_VERSION"),
            "pid": std::process::id(),
            "instance": instance::spoken(instance::own()),
            "uid": place::user(),
            "command": command(),
            "opened": self.started,
            "time": now(),
        })
    }

    fn trace(&self) -> Result<Value> {
        let directory = self.running().as_ref().map(|running| running.door.directory.clone());
        let directory = directory.ok_or_else(|| Error::new(Status::Inactive, "the control socket is closed"))?;
        let path = directory.join(format!("trace-{}-{}.trace", std::process::id(), now() as u64));
        Ok(json!({"path": engine()?.trace(&path)?}))
    }
}

/// The server's side: what takes no time is answered here.
struct Porter {
    control: &'static Control,
    questions: SyncSender<(Ticket, Verb)>,
}

impl Porter {
    fn pass_on(&self, ticket: Ticket, verb: Verb) -> Option<Answer> {
        self.control.working.fetch_add(1, Ordering::Relaxed);
        match self.questions.try_send((ticket, verb)) {
            Ok(()) => None,
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                self.control.working.fetch_sub(1, Ordering::Release);
                let why = "too many questions wait for the driver; try again later";
                Some(Err(Refusal::new(Code::Busy, why)))
            }
        }
    }

    /// Another process has its turn: what is to come back with ours has to be there, since nobody is asked any more when it comes.
    fn unknown_while_away(&self, tag: &str) -> Option<Answer> {
        let process = process::started().filter(|_| self.control.desk.is_away())?;
        let unknown = process.engine.refuse_unknown(&Selection::Tag(tag.to_owned())).err()?;
        Some(Err(refusal(&unknown)))
    }

    fn ask(&self, ticket: Ticket, action: Action, patience: f64) -> Option<Answer> {
        self.control.journal.note("asked", &action.to_string());
        self.control.desk.ask(ticket, action, Duration::from_secs_f64(patience)).err().map(Err)
    }
}

impl Service for Porter {
    fn answer(&self, ticket: Ticket, verb: Verb) -> Option<Answer> {
        match verb {
            Verb::Hello => Some(Ok(self.control.hello())),
            Verb::Events { since } => Some(Ok(self.control.journal.since(since))),
            Verb::List if self.control.board.ask(ticket) => None,
            Verb::Pause { tag, timeout } => self.ask(ticket, Action::Pause { tag }, timeout),
            Verb::Resume { tag, timeout, wait } => tag
                .as_deref()
                .and_then(|tag| self.unknown_while_away(tag))
                .or_else(|| self.ask(ticket, Action::Resume { tag, wait: Duration::from_secs_f64(wait) }, timeout)),
            Verb::Reclaim { mark, priority, timeout } => match preempt::terms(mark) {
                Some(terms) => self.ask(ticket, Action::Lend { mark, priority, terms }, timeout),
                None => Some(Err(Refusal::new(Code::Refused, format!("there is no mark {mark}; it was closed")))),
            },
            verb => self.pass_on(ticket, verb),
        }
    }

    fn forget(&self, ticket: Ticket) {
        self.control.desk.forget(ticket);
        self.control.board.forget(ticket);
    }

    fn let_go(&self, ticket: Ticket) {
        self.control.journal.note("returned", "a process that had this one's memory has ended its need");
        self.control.desk.let_go(ticket);
    }

    fn tick(&self) -> Option<Instant> {
        let (late, next) = self.control.board.expire();
        late.into_iter().for_each(|ticket| self.control.list_for(ticket, self));
        next.into_iter().chain(self.control.desk.expire()).min()
    }

    fn another_door(&self) -> Option<UnixListener> {
        self.control.another_door()
    }
}

impl Control {
    fn list_for(&self, ticket: Ticket, porter: &Porter) {
        if let Some(refused) = porter.pass_on(ticket, Verb::List) {
            self.outbox.put(ticket, refused);
        }
    }

    /// A new sheet of the program's figures: whoever waited for it gets it now.
    pub(crate) fn publish(&self, sheet: Value) {
        for ticket in self.board.publish(sheet) {
            self.outbox.put(ticket, self.list().map_err(|error| refusal(&error)));
        }
    }
}

// ---- what the worker asks ------------------------------------------------------------------------------------------------

fn engine() -> Result<&'static sire_core::engine::Engine> {
    let process = process::started();
    process
        .map(|process| &process.engine)
        .ok_or_else(|| Error::new(Status::Inactive, "the program has not used a device yet"))
}

fn evict(device: Option<u32>, bytes: Option<u64>) -> Result<Value> {
    let engine = engine()?;
    if capture::in_progress() {
        return Err(Error::new(Status::Capturing, "a CUDA graph is being captured; try again when that is over"));
    }
    let (Some(device), Some(bytes)) = (device, bytes) else {
        if device.is_some() || bytes.is_some() {
            let why = "evict takes a device and bytes together, or neither: then everything that is only cached goes";
            return Err(Error::new(Status::InvalidArgument, why));
        }
        let (device, host) = engine.trim();
        return Ok(json!({"device_bytes": device, "host_bytes": host}));
    };
    let made = engine.make_room(Device(device), bytes)?;
    let tags: Vec<&str> = made.iter().map(|each| each.tag.as_str()).collect();
    Ok(json!({"device_bytes": made.iter().map(|each| each.bytes).sum::<u64>(), "tags": tags}))
}

fn set_budget(device: u32, limit: Option<u64>, headroom: u64, residency: f64) -> Result<Value> {
    let residency = (residency * 1000.0) as u64;
    engine()?.set_budget(Device(device), Budget { limit, headroom, residency });
    Ok(json!({}))
}

/// Memory and identity of the devices that the program uses: no context is made on others, which would cost them memory.
fn devices(held: &Value) -> Value {
    let Some(process) = process::started() else { return json!([]) };
    let count = process.driver.device_count().unwrap_or(0);
    let device = |ordinal: u32| {
        let memory = process.driver.memory_info(Device(ordinal)).ok();
        json!({
            "device": ordinal,
            "uuid": process.driver.uuid(Device(ordinal)).ok(),
            "total_bytes": memory.map(|memory| memory.total),
            "free_bytes": memory.map(|memory| memory.free),
        })
    };
    let holds = |ordinal: u32| held.as_array().is_some_and(|all| all.iter().any(|each| each["device"] == ordinal));
    (0..count).filter(|ordinal| holds(*ordinal) || process.driver.is_in_use(Device(*ordinal))).map(device).collect()
}

/// What the process was started as, cut: arguments may be long.
fn command() -> String {
    let line = std::fs::read("/proc/self/cmdline").unwrap_or_default();
    let words: Vec<_> =
        line.split(|byte| *byte == 0).filter(|word| !word.is_empty()).map(String::from_utf8_lossy).collect();
    let program = words
        .first()
        .map(|word| Path::new(word.as_ref()).file_name().unwrap_or_default().to_string_lossy().into_owned());
    let rest = words.get(1..).unwrap_or_default().iter().map(std::borrow::Cow::as_ref);
    let whole: Vec<&str> = program.iter().map(String::as_str).chain(rest).collect();
    whole.join(" ").chars().take(160).collect()
}

fn now() -> f64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

fn failed(what: &str, error: &io::Error) -> Error {
    Error::new(Status::Unsupported, format!("{what}: {error}"))
}

/// An engine's failure, for a client.
pub(crate) fn refusal(error: &Error) -> Refusal {
    let code = match error.status {
        Status::InvalidArgument | Status::UnknownTag => Code::Invalid,
        _ => Code::Failed,
    };
    Refusal { status: Some(error.status.name().to_owned()), ..Refusal::new(code, &error.message) }
}

/// A thread of ours: signals are the program's.
pub(crate) fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    let blocked = move || {
        let mut all = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: `sigfillset` initialises the set that `pthread_sigmask` reads; the old mask is not asked for.
        unsafe {
            libc::sigfillset(all.as_mut_ptr());
            libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), std::ptr::null_mut());
        }
        // The thread ends; a panic has been told of by its hook.
        let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body));
    };
    std::thread::Builder::new().name(name.to_owned()).spawn(blocked)
}

#[cfg(test)]
mod tests {
    use super::made;
    use std::sync::Barrier;

    /// Two threads that came first at once had a desk each: what was asked of the one was never seen at the safe points of the other.
    #[test]
    fn a_process_has_one_desk_whoever_comes_first() {
        const THREADS: usize = 16;
        let all_are_here = Barrier::new(THREADS);
        let first = || {
            all_are_here.wait();
            made().ok().map(|control| std::ptr::from_ref(control) as usize)
        };
        let mut found: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(first)).collect();
            threads.into_iter().map(|thread| thread.join().ok().flatten()).collect()
        });
        found.dedup();
        assert!(matches!(found[..], [Some(_)]), "{found:?}");
    }
}
