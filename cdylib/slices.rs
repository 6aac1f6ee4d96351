//! Time slices of this process: it has the device for a while, then everything it has there is paused and another process's turn comes.
//!
//! Who may is decided by the queue that all processes of a group share (`sire_ledger::slices`). What changes the program's memory goes over the desk
//! (`sire_control::desk`), so it happens at safe points, in the program's own threads. Between the two is one thread of ours, the *usher*:
//! it waits for the end of the turn, asks the desk for the pause, gives the turn up, waits for the next, asks for the resume. The turn is given up only when
//! everything is paused, and taken before anything is resumed.

use crate::boundary::catch;
use crate::control::{self, Control};
use crate::lock;
use crate::log;
use crate::preempt;
use crate::process::{self, Process};
use crate::reservation::{self, said};
use serde_json::{Value, json};
use sire_control::desk::{Action, Back};
use sire_control::message::Answer;
use sire_control::server::Ticket;
use sire_core::driver::{Device, Driver as _};
use sire_core::engine::ResumeOptions;
use sire_core::error::{Error, Result, Status};
use sire_ledger::slices::{Next, Turn, is_over, residency};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How often whoever waits looks at the queue, and whoever should go looks for its end.
const LOOK: Duration = Duration::from_millis(20);
/// How often the holder looks whether somebody waits, before its quantum is over.
const GLANCE: Duration = Duration::from_millis(100);
/// How long threads that are at a safe point wait for those that are not, before they go on.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long one attempt to resume waits for memory that somebody else still holds.
const ATTEMPT: Duration = Duration::from_millis(500);
/// Who leaves keeps the turn for at most so long, or its quantum, if it still has memory on the device.
const FAREWELL: Duration = Duration::from_secs(10);
/// Marks the tickets of requests that are ours, and not from outside.
const OURS: u64 = 1 << 63;

/// What somebody wants.
#[derive(Debug)]
pub(crate) struct Wish {
    pub(crate) device: Device,
    pub(crate) quantum: Duration,
    pub(crate) group: String,
    pub(crate) timeout: Option<Duration>,
}

/// Where the process is in its round.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    Resident,
    Leaving,
    Waiting,
    Returning,
}

#[derive(Debug)]
struct Figures {
    stage: Stage,
    since: Instant,
    turns: u64,
    switches: u64,
    resident: Duration,
    waited: Duration,
    /// What the last pause and the last resume took.
    pause: Duration,
    resume: Duration,
    last_error: Option<String>,
}

impl Figures {
    fn at_the_beginning() -> Figures {
        Figures {
            stage: Stage::Waiting,
            since: Instant::now(),
            turns: 0,
            switches: 0,
            resident: Duration::ZERO,
            waited: Duration::ZERO,
            pause: Duration::ZERO,
            resume: Duration::ZERO,
            last_error: None,
        }
    }
}

/// The time slices of the process.
struct Slices {
    wish: Wish,
    gpu: String,
    turn: Turn,
    control: &'static Control,
    figures: Mutex<Figures>,
    over: AtomicBool,
    /// The last turn is over, too.
    gave_up: AtomicBool,
    usher: Mutex<Option<JoinHandle<()>>>,
}

static CURRENT: Mutex<Option<Arc<Slices>>> = Mutex::new(None);
/// What has ended, and keeps its turn until its memory is gone; and the thread that waits for that.
static LEAVING: Mutex<Option<(Arc<Slices>, JoinHandle<()>)>> = Mutex::new(None);
/// Held while time slices begin or end.
static TURN: Mutex<()> = Mutex::new(());

/// The answer that the usher waits for.
static MAIL: Mutex<Option<(Ticket, Answer)>> = Mutex::new(None);
static CHANGED: Condvar = Condvar::new();
static NEXT: AtomicU64 = AtomicU64::new(OURS);

/// Takes an answer of the desk's if it is to a request of ours.
pub(crate) fn answered(ticket: Ticket, answer: Answer) -> Option<Answer> {
    if ticket.0 & OURS == 0 {
        return Some(answer);
    }
    *lock(&MAIL) = Some((ticket, answer));
    CHANGED.notify_all();
    None
}

/// Whether this process takes turns.
pub(crate) fn is_open() -> bool {
    lock(&CURRENT).is_some()
}

/// Joins the queue, and waits for the first turn. From then on turns end at safe points.
pub(crate) fn open(process: &'static Process, dir: &Path, wish: Wish) -> Result<()> {
    refuse_callback("begin")?;
    let _turn = lock(&TURN);
    refuse_open()?;
    let gpu = process.driver.uuid(wish.device)?;
    let (turn, since) = match lingering(&gpu, &wish.group) {
        Some((turn, since)) => (turn, Some(since)),
        None => (Turn::join(dir, &gpu, &wish.group).map_err(said)?, None),
    };
    let slices = Arc::new(Slices {
        wish,
        gpu,
        turn,
        control: control::made()?,
        figures: Mutex::new(Figures::at_the_beginning()),
        over: AtomicBool::new(false),
        gave_up: AtomicBool::new(false),
        usher: Mutex::default(),
    });
    *lock(&CURRENT) = Some(Arc::clone(&slices));
    let first = || since.map_or_else(|| wait_for_first(process, &slices.turn, &slices.wish), |_| Ok(()));
    // A turn that goes on is as old as it was: else whoever leaves and enters again and again would never make way.
    let begun = first().and_then(|()| slices.begin(since.unwrap_or_else(Instant::now)));
    begun.inspect_err(|_| drop(lock(&CURRENT).take()))
}

/// Fails in a callback of what is carried out at a safe point: a thread that is just ending the turns waits for that, whatever it has ended already.
fn refuse_callback(verb: &str) -> Result<()> {
    if control::current().is_some_and(|control| control.desk.is_carrying()) {
        let why = format!(
            "time slices cannot {verb} inside of a callback (sire.before_pause, sire.after_resume) of a pause or resume at a safe point, which would \
             wait for itself; {verb} them after the safe point"
        );
        return Err(Error::new(Status::Busy, why));
    }
    Ok(())
}

/// Fails where turns would be of no use: they are taken already, or a pause would make no room.
fn refuse_open() -> Result<()> {
    if let Some(there) = &*lock(&CURRENT) {
        let (device, group) = (there.wish.device, &there.wish.group);
        return Err(Error::new(
            Status::InvalidArgument,
            format!(
                "this process takes turns on {device} already, in the group '{group}': its turn pauses everything it has, so one is enough"
            ),
        ));
    }
    if reservation::has_fence() {
        return Err(Error::new(
            Status::Unsupported,
            "a reservation of this process keeps its memory from everybody else, so a pause would make no room; take turns without a \
             reservation, or reserve with fence=False",
        ));
    }
    Ok(())
}

/// The turn that this process has not given up yet, though it took turns no more, if it is one in this group; and since when it has it.
fn lingering(gpu: &str, group: &str) -> Option<(Turn, Instant)> {
    let (slices, thread) = lock(&LEAVING).take()?;
    slices.over.store(true, Ordering::Release);
    wake();
    // A thread that panicked has given nothing up.
    let _ = thread.join();
    let same = slices.gpu == gpu && slices.wish.group == group && !slices.gave_up.load(Ordering::Acquire);
    let since = lock(&slices.figures).since;
    Arc::into_inner(slices).filter(|_| same).map(|slices| (slices.turn, since))
}

fn wait_for_first(process: &Process, turn: &Turn, wish: &Wish) -> Result<()> {
    let (begun, before) = (Instant::now(), process.engine.cancels());
    let mut queued = false;
    loop {
        let looked = if queued { Ok(()) } else { turn.queue() }.and_then(|()| {
            queued = true;
            turn.take()
        });
        let why = match looked {
            Ok(Next::Mine) => {
                settle(process, wish.device);
                return Ok(());
            }
            Ok(Next::Taken) => "another process has it".to_owned(),
            Ok(Next::Behind(ahead)) => format!("{ahead} came first and still wait"),
            Err(sire_ledger::Error::Stuck) => "a process that is stopped keeps the queue".to_owned(),
            Err(error) => return Err(said(error)),
        };
        if process.engine.cancels() != before {
            return Err(Error::new(Status::Cancelled, "the wait for a turn on the device was cancelled"));
        }
        let left = wish.timeout.map_or(LOOK, |timeout| timeout.saturating_sub(begun.elapsed()));
        if left.is_zero() {
            return Err(Error::new(Status::Busy, format!("no turn on the device in the time given: {why}")));
        }
        std::thread::sleep(left.min(LOOK));
    }
}

/// The memory of a process that was killed comes back a moment after its turn: waits while it does.
fn settle(process: &Process, device: Device) {
    let free = || process.driver.memory_info(device).map_or(0, |memory| memory.free);
    let (begun, mut before) = (Instant::now(), free());
    while begun.elapsed() < Duration::from_secs(1) {
        std::thread::sleep(LOOK);
        let now = free();
        if now <= before {
            return;
        }
        before = now;
    }
}

fn wake() {
    // Whoever looked before holds the lock until it sleeps.
    drop(lock(&MAIL));
    CHANGED.notify_all();
}

/// Takes turns no more. The last one goes on until the memory is gone, since it would be in the others' way: for at most [`FAREWELL`], or a quantum.
/// If everything was paused for another's turn, it comes back if there is room, before any thread goes on; if not, threads stay at their safe points.
pub(crate) fn close() -> Result<()> {
    if process::started().is_none() {
        // A forked child has no turns, and the locks may be held by threads that do not exist in it.
        return Ok(());
    }
    refuse_callback("end")?;
    let _turn = lock(&TURN);
    let Some(slices) = lock(&CURRENT).take() else { return Ok(()) };
    slices.over.store(true, Ordering::Release);
    wake();
    let usher = lock(&slices.usher).take();
    let joined = usher.map_or(Ok(()), JoinHandle::join);
    if joined.is_err() {
        log::warning!("the thread of time slices had failed");
    }
    let stage = lock(&slices.figures).stage;
    let back = |back: &Back| match preempt::bring(back, ResumeOptions::default()) {
        // A name that somebody outside has given.
        Err(error) if error.status == Status::UnknownTag => Ok(()),
        brought => brought.map(drop),
    };
    let stayed = if stage == Stage::Resident { Ok(()) } else { slices.control.desk.stay(back) };
    // Whoever was about to come back has the turn, too.
    if matches!(stage, Stage::Resident | Stage::Returning) {
        linger(slices);
    }
    stayed
        .map_err(|error| error.context("time slices end in another process's turn, and what this one has stays paused"))
}

/// Keeps the turn while there is memory of this process on the device.
fn linger(slices: Arc<Slices>) {
    if !slices.has_memory() {
        return;
    }
    slices.over.store(false, Ordering::Release);
    let own = Arc::clone(&slices);
    let wait = move || {
        let end = Instant::now() + FAREWELL.max(own.wish.quantum);
        while own.has_memory() && own.sleep(LOOK) && Instant::now() < end {}
        if !own.is_over() {
            own.gave_up.store(true, Ordering::Release);
            // Best effort: the turn goes with the process at the latest.
            let _ = own.turn.leave();
        }
    };
    if let Ok(thread) = control::spawn("sire-slices", wait) {
        *lock(&LEAVING) = Some((slices, thread));
    }
}

/// What they have come to; null if there are none.
pub(crate) fn figures() -> Value {
    // In a forked child the lock may be held by a thread that does not exist.
    let slices = process::started().and_then(|_| lock(&CURRENT).clone());
    slices.map_or(Value::Null, |slices| slices.figures())
}

impl Slices {
    /// The first turn begins, or has begun.
    fn begin(self: &Arc<Slices>, since: Instant) -> Result<()> {
        {
            let mut figures = lock(&self.figures);
            figures.turns = 1;
            figures.begin_turn();
            figures.since = since;
        }
        let own = Arc::clone(self);
        let usher = control::spawn("sire-slices", move || own.usher());
        let failed = |error| Error::new(Status::Unsupported, format!("time slices need a thread: {error}"));
        *lock(&self.usher) = Some(usher.map_err(failed)?);
        Ok(())
    }

    /// Whether anything of this process is on the device, as far as the engine knows.
    fn has_memory(&self) -> bool {
        process::started().is_some_and(|process| process.engine.held_on(self.wish.device) > 0)
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    fn figures(&self) -> Value {
        let figures = lock(&self.figures);
        let so_far = |stage: &[Stage]| {
            if stage.contains(&figures.stage) { figures.since.elapsed() } else { Duration::ZERO }
        };
        let stage = match figures.stage {
            Stage::Resident => "resident",
            Stage::Leaving => "leaving",
            Stage::Waiting => "waiting",
            Stage::Returning => "returning",
        };
        json!({
            "device": self.wish.device.0,
            "gpu": self.gpu,
            "group": self.wish.group,
            "state": stage,
            "quantum_seconds": self.wish.quantum.as_secs_f64(),
            "residency_seconds": residency(self.wish.quantum, figures.switch()).as_secs_f64(),
            "turns": figures.turns,
            "switches": figures.switches,
            "resident_seconds": (figures.resident + so_far(&[Stage::Resident, Stage::Leaving])).as_secs_f64(),
            "waited_seconds": (figures.waited + so_far(&[Stage::Waiting])).as_secs_f64(),
            "switch_seconds": figures.switch().as_secs_f64(),
            "last_error": figures.last_error,
        })
    }

    fn note(&self, sentence: String) {
        log::warning!("time slices: {sentence}");
        control::note("slice", || sentence.clone());
        lock(&self.figures).last_error = Some(sentence);
    }

    fn note_once(&self, sentence: String) {
        if lock(&self.figures).last_error.as_ref() != Some(&sentence) {
            self.note(sentence);
        }
    }

    /// Sleeps, unless time slices end. Whether they go on.
    fn sleep(&self, time: Duration) -> bool {
        let end = Instant::now() + time;
        let mut mail = lock(&MAIL);
        while !self.is_over() {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return true;
            }
            mail = CHANGED.wait_timeout(mail, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        false
    }

    // ---- the usher ------------------------------------------------------------------------------------------------------

    fn usher(&self) {
        let round = || {
            while self.stay() {
                if self.go() {
                    while self.wait() && !self.come_back() {}
                } else {
                    self.sleep(LOOK);
                }
            }
            Ok(())
        };
        if let Err(error) = catch(round) {
            self.note(format!("no more turns: {error}"));
        }
    }

    /// Until the turn is over; false if time slices are.
    fn stay(&self) -> bool {
        while !self.is_over() {
            let (resident, residency) = {
                let figures = lock(&self.figures);
                (figures.since.elapsed(), residency(self.wish.quantum, figures.switch()))
            };
            let waiting = self.turn.waiting().unwrap_or(0);
            let is_idle = waiting > 0 && self.control.desk.is_held();
            if is_idle || is_over(resident, residency, waiting) {
                return true;
            }
            let left = residency.saturating_sub(resident);
            self.sleep(if left.is_zero() { LOOK } else { left.min(GLANCE) });
        }
        false
    }

    /// Pauses everything and gives the turn up. If that is not possible the turn goes on.
    fn go(&self) -> bool {
        lock(&self.figures).enter(Stage::Leaving);
        match self.ask(Action::Yield) {
            Ok(Ok(report)) => {
                if let Some(stuck) = report["stuck"].as_str() {
                    self.note(format!("everything is paused, but: {stuck}"));
                }
                let mut figures = lock(&self.figures);
                figures.pause = seconds(&report);
                figures.switches += 1;
                figures.enter(Stage::Waiting);
                drop(figures);
                self.line_up()
            }
            Ok(Err(refusal)) => {
                self.note(format!("the turn goes on, because the pause failed: {}", refusal.message));
                lock(&self.figures).begin_turn();
                false
            }
            Err(why) => {
                if let Some(why) = why.filter(|_| !self.is_over()) {
                    self.note_once(format!("the turn goes on, because at every safe point: {why}"));
                }
                // The turn is as old as it was.
                lock(&self.figures).stage = Stage::Resident;
                false
            }
        }
    }

    /// The last place in the queue. Whoever has the turn gives it up by that.
    fn line_up(&self) -> bool {
        while let Err(error) = self.turn.queue() {
            self.note(format!("the queue cannot be used, which is tried again: {error}"));
            if !self.sleep(Duration::from_secs(1)) {
                return false;
            }
        }
        true
    }

    /// Until it is our turn; false if time slices are over. Whoever is paused from outside wants none.
    fn wait(&self) -> bool {
        loop {
            if self.control.desk.is_held() {
                let left = self.turn.leave();
                while self.control.desk.is_held() {
                    if !self.sleep(LOOK) {
                        return false;
                    }
                }
                if left.is_ok() && !self.line_up() {
                    return false;
                }
            }
            match self.turn.take() {
                Ok(Next::Mine) => return true,
                Ok(_) => {}
                Err(error) => self.note(format!("the queue cannot be used, which is tried again: {error}")),
            }
            if !self.sleep(LOOK) {
                return false;
            }
        }
    }

    /// Brings everything back. False if somebody who takes no turns has the memory: then those who wait go first.
    fn come_back(&self) -> bool {
        let begun = Instant::now();
        lock(&self.figures).enter(Stage::Returning);
        loop {
            match self.ask(Action::Return { wait: ATTEMPT }) {
                Ok(Ok(reports)) => {
                    let mut figures = lock(&self.figures);
                    figures.resume = reports.as_array().map_or(Duration::ZERO, |all| all.iter().map(seconds).sum());
                    figures.last_error = None;
                    figures.turns += 1;
                    figures.begin_turn();
                    return true;
                }
                // Wanted no longer: the turn is given up.
                _ if self.control.desk.is_held() => return self.give_way(),
                Ok(Err(refusal)) => self.note_once(format!("it is this process's turn, but: {}", refusal.message)),
                Err(_) => {}
            }
            let switch = lock(&self.figures).switch();
            let waiting = self.turn.waiting().unwrap_or(0);
            if !self.sleep(LOOK) {
                return true;
            }
            if is_over(begun.elapsed(), residency(self.wish.quantum, switch), waiting) {
                return self.give_way();
            }
        }
    }

    /// The turn is not used: whoever waits is next. What came back of the memory goes again, or would be in the way. True if time slices are over.
    fn give_way(&self) -> bool {
        while self.has_memory() {
            match self.ask(Action::Yield) {
                Ok(Ok(_)) => break,
                Ok(Err(refusal)) => {
                    self.note_once(format!("the turn is kept, because the pause failed: {}", refusal.message))
                }
                Err(why) => {
                    self.note_once(format!("the turn is kept: {}", why.unwrap_or_else(|| "no safe point".to_owned())))
                }
            }
            if !self.sleep(LOOK) {
                return true;
            }
        }
        lock(&self.figures).enter(Stage::Waiting);
        !self.line_up()
    }

    /// What the desk says; an error if no good safe point came in time (why none was good, if there were any), or time slices are over.
    fn ask(&self, action: Action) -> std::result::Result<Answer, Option<String>> {
        let ticket = Ticket(NEXT.fetch_add(1, Ordering::Relaxed) | OURS);
        if let Err(refusal) = self.control.desk.ask(ticket, action, PATIENCE) {
            return Ok(Err(refusal));
        }
        let end = Instant::now() + PATIENCE;
        let arrived = |mail: &mut Option<(Ticket, Answer)>| mail.take_if(|(whose, _)| *whose == ticket);
        let mut mail = lock(&MAIL);
        loop {
            if let Some((_, answer)) = arrived(&mut mail) {
                return Ok(answer);
            }
            if self.is_over() || Instant::now() >= end {
                drop(mail);
                let why = self.control.desk.why(ticket);
                if self.control.desk.withdraw(ticket) {
                    return Err(why);
                }
                // It is being carried out, or just was.
                mail = lock(&MAIL);
                if let Some((_, answer)) = arrived(&mut mail) {
                    return Ok(answer);
                }
            }
            mail = CHANGED.wait_timeout(mail, LOOK).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Figures {
    /// What changing places costs: our pause, and our resume.
    fn switch(&self) -> Duration {
        self.pause + self.resume
    }

    fn enter(&mut self, stage: Stage) {
        let (since, now) = (self.since, Instant::now());
        match (self.stage, stage) {
            (Stage::Resident, Stage::Leaving) => {
                self.stage = stage;
                return;
            }
            (Stage::Resident | Stage::Leaving, _) => self.resident += now - since,
            (Stage::Waiting, _) => self.waited += now - since,
            (Stage::Returning, _) => {}
        }
        (self.stage, self.since) = (stage, now);
    }

    fn begin_turn(&mut self) {
        self.enter(Stage::Resident);
        self.since = Instant::now();
    }
}

fn seconds(report: &Value) -> Duration {
    Duration::try_from_secs_f64(report["seconds_total"].as_f64().unwrap_or(0.0)).unwrap_or_default()
}
