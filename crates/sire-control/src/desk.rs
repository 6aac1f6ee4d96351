//! Where pauses and resumes from outside wait for a safe point, and where a program that was paused waits for its resume.
//!
//! The bargain. Memory must not go while a thread uses it, and nobody but the program knows when that is. So threads *pass* safe points: places
//! where they promise that they use no memory of a region until [`Desk::pass`] returns. A thread that has passed one before is a *member*, until
//! it leaves or ends. A pause is carried out by a member inside `pass`, when all other members are inside too; from then on all
//! of them stay there until everything that was paused from outside is resumed. A request that finds no such moment before its deadline is
//! refused with the reason, and nothing has changed. A resume needs one member at a safe point.
//!
//! Passing takes no lock while nobody asks for anything.
//!
//! Time slices ([`away`]) use the same desk: while another process has its turn on the device, everything is paused and all members wait. So do
//! [`loans`]: memory that gave way for another process's need, until that ends.

use crate::lock;
use crate::message::{Answer, Code, Refusal};
use crate::server::Ticket;
use serde_json::{Value, json};
use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

/// Requests that may wait at once.
const MOST: usize = 16;
/// How long a request that found no good moment rests before the same thread tries it again.
const REST: Duration = Duration::from_millis(50);
/// What runs without a request.
const NOBODYS: Ticket = Ticket(0);

/// What a member is to do.
#[derive(Clone, PartialEq, Debug)]
pub enum Action {
    /// Pause a tag, or everything.
    Pause {
        /// None: everything.
        tag: Option<String>,
    },
    /// Resume a tag, or everything.
    Resume {
        /// None: everything.
        tag: Option<String>,
        /// How long to wait for memory that somebody else holds.
        wait: Duration,
    },
    /// Resume what a pause has taken, and nothing else.
    Undo {
        /// What it has taken.
        back: Back,
        /// As in `Resume`.
        wait: Duration,
    },
    /// For another process's need: pause what a mark of the program's means, until `Recover`.
    Lend {
        /// The mark's number.
        mark: u64,
        /// The need's priority.
        priority: i32,
        /// What the program has agreed to.
        terms: Terms,
    },
    /// The need is over: resume what `Lend` has paused, if nobody else waits for that memory.
    Recover {
        /// The mark's number.
        mark: u64,
        /// What was taken.
        undo: Undo,
    },
    /// For a time slice: pause everything, and lose nothing of it, until `Return`.
    Yield,
    /// For a time slice: resume what `Yield` has paused. Carried out as resumes.
    Return {
        /// As in `Resume`.
        wait: Duration,
    },
}

impl Action {
    /// Whether it comes from a time slice of this process, and not from outside.
    fn is_ours(&self) -> bool {
        matches!(self, Action::Yield | Action::Return { .. })
    }

    fn brings_back(&self) -> bool {
        matches!(self, Action::Resume { .. } | Action::Return { .. } | Action::Undo { .. } | Action::Recover { .. })
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (verb, tag) = match self {
            Action::Pause { tag } => ("pause", tag),
            Action::Resume { tag, .. } => ("resume", tag),
            Action::Undo { .. } => ("the resume of what was paused from outside", &None),
            Action::Lend { mark, .. } => return write!(f, "reclaim of mark {mark}"),
            Action::Recover { .. } => ("the resume of what gave way for another process", &None),
            Action::Yield => ("the pause of a time slice", &None),
            Action::Return { .. } => ("the resume of a time slice", &None),
        };
        match tag {
            Some(tag) => write!(f, "{verb} '{tag}'"),
            None => f.write_str(verb),
        }
    }
}

/// What came of an action.
#[derive(Debug)]
pub enum Outcome {
    /// It was done.
    Done {
        /// For whoever asked.
        report: Value,
        /// Of a pause: what to resume so that all is as before. Empty if nothing was paused that was not before.
        undo: Undo,
    },
    /// This was no moment for it; nothing has changed, and it is tried again when a safe point is passed next.
    NotNow(String),
    /// It failed.
    Failed(Refusal),
    /// A pause failed, and what was asked is paused all the same: nobody goes on before `undo` is resumed, as after `Done`.
    Stuck {
        /// For whoever asked.
        refusal: Refusal,
        /// As in `Done`.
        undo: Undo,
    },
}

/// A thread that passes safe points.
#[derive(Clone, Debug)]
pub struct Member {
    number: u64,
    last: Arc<AtomicU64>,
}

#[derive(Debug)]
struct Known {
    name: String,
    inside: bool,
    last: Arc<AtomicU64>,
}

/// A pause from outside that is in force.
#[derive(Debug)]
struct Hold {
    /// What was asked; None: everything.
    tag: Option<String>,
    /// What its resume resumes.
    undo: Undo,
}

#[derive(Debug)]
struct Asked {
    ticket: Ticket,
    action: Action,
    deadline: Instant,
    patience: Duration,
    why: Option<String>,
}

#[derive(Debug, Default)]
struct Inner {
    asked: VecDeque<Asked>,
    running: Option<Ticket>,
    /// The thread that carries it out.
    runner: Option<ThreadId>,
    /// No request is taken any more.
    closed: bool,
    /// Whoever asked for what is running has left.
    abandoned: bool,
    held: Vec<Hold>,
    /// What gave way for others.
    loans: Vec<Loan>,
    /// Another process has its turn on the device: what to resume when ours comes.
    away: Option<Undo>,
    members: BTreeMap<u64, Known>,
    next: u64,
}

/// Brings an answer to whoever asked.
pub type Deliver = Box<dyn Fn(Ticket, Answer) + Send + Sync>;

/// The desk of a process.
pub struct Desk {
    wanted: AtomicBool,
    inner: Mutex<Inner>,
    changed: Condvar,
    deliver: Deliver,
    opened: Instant,
}

impl fmt::Debug for Desk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Desk").field("inner", &self.inner).finish_non_exhaustive()
    }
}

/// What a thread inside `pass` does next.
enum Step {
    Run(Asked),
    Wait(Option<Instant>),
    GoOn,
}

impl Desk {
    /// A desk whose answers go to `deliver`.
    #[must_use]
    pub fn new(deliver: Deliver) -> Desk {
        Desk {
            wanted: AtomicBool::new(false),
            inner: Mutex::default(),
            changed: Condvar::new(),
            deliver,
            opened: Instant::now(),
        }
    }

    // ---- the program's side ---------------------------------------------------------------------------------------------

    /// The calling thread passes safe points from now on.
    pub fn join(&self, name: &str) -> Member {
        let last = Arc::new(AtomicU64::new(self.now()));
        let mut inner = lock(&self.inner);
        inner.next += 1;
        let number = inner.next;
        inner.members.insert(number, Known { name: name.to_owned(), inside: false, last: Arc::clone(&last) });
        Member { number, last }
    }

    /// It does not any more: nobody waits for it.
    pub fn leave(&self, member: &Member) {
        lock(&self.inner).members.remove(&member.number);
        self.changed.notify_all();
    }

    /// The calling thread is at a safe point. Actions that wait are carried out by `run` in this thread or in another member's; returns
    /// when nothing is paused from outside and nothing can be done here, or after `slice`: then true, and the thread must come
    /// back at once, without using memory of a region meanwhile.
    pub fn pass(&self, member: &Member, slice: Duration, run: &mut dyn FnMut(&Action) -> Outcome) -> bool {
        member.last.store(self.now(), Ordering::Relaxed);
        if !self.wanted.load(Ordering::Relaxed) {
            return false;
        }
        let back = Instant::now() + slice;
        let mut tried: Vec<(Ticket, Instant)> = Vec::new();
        let mut inner = lock(&self.inner);
        if inner.is_runner() {
            // A callback of the action that this very thread carries out.
            return false;
        }
        inner.mark(member, true);
        self.changed.notify_all();
        loop {
            match inner.step(&tried) {
                Step::Run(asked) => {
                    let ticket = asked.ticket;
                    drop(inner);
                    self.carry_out(asked, run);
                    tried.retain(|(other, _)| *other != ticket);
                    tried.push((ticket, Instant::now() + REST));
                    inner = lock(&self.inner);
                }
                Step::Wait(until) if Instant::now() < back => inner = self.wait(inner, until.unwrap_or(back).min(back)),
                step => {
                    // Under the lock of the decision: once it is given back, others may begin a pause that counts on whoever is inside.
                    inner.mark(member, false);
                    drop(inner);
                    member.last.store(self.now(), Ordering::Relaxed);
                    return matches!(step, Step::Wait(_));
                }
            }
        }
    }

    fn wait<'a>(&self, inner: MutexGuard<'a, Inner>, until: Instant) -> MutexGuard<'a, Inner> {
        let left = until.saturating_duration_since(Instant::now());
        self.changed.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0
    }

    /// No lock is held while `run` runs; `running` keeps others from beginning something else.
    fn carry_out(&self, asked: Asked, run: &mut dyn FnMut(&Action) -> Outcome) {
        let settled = match &asked.action {
            Action::Recover { .. } => return self.recover(&asked, run),
            Action::Pause { tag: Some(_) } | Action::Lend { .. } if self.is_away() => Desk::pause_later(),
            Action::Lend { .. } => self.lend(&asked, run),
            Action::Undo { .. } => Ok(Err(Refusal::new(Code::Invalid, "nobody asks for that from outside"))),
            Action::Pause { .. } => self.pause(&asked.action, run),
            Action::Resume { tag, .. } if self.is_away() => self.resume_later(tag.as_deref()),
            Action::Resume { tag: Some(_), .. } => self.resume_named(&asked.action, run),
            Action::Resume { tag: None, wait } => self.resume_held(*wait, run),
            Action::Yield => self.go_away(run),
            Action::Return { wait } => self.come_back(*wait, run),
        };
        let answer = {
            let mut inner = lock(&self.inner);
            (inner.running, inner.runner) = (None, None);
            match settled {
                Err(_) if std::mem::take(&mut inner.abandoned) => None,
                Err(why) if inner.closed && !asked.action.is_ours() => {
                    Some((asked.ticket, Err(Refusal::new(Code::Refused, why))))
                }
                Err(why) => {
                    inner.asked.push_front(Asked { why: Some(why), ..asked });
                    None
                }
                Ok(answer) => Some((asked.ticket, answer)),
            }
        };
        self.review();
        if let Some((ticket, answer)) = answer {
            (self.deliver)(ticket, answer);
        }
    }

    fn pause(&self, action: &Action, run: &mut dyn FnMut(&Action) -> Outcome) -> Result<Answer, String> {
        match run(action) {
            Outcome::Done { report, undo } => {
                let mut inner = lock(&self.inner);
                if let Action::Pause { tag } = action {
                    inner.hold(tag.clone(), undo);
                }
                Ok(Ok(json!({"report": report, "paused": inner.paused()})))
            }
            Outcome::Stuck { refusal, undo } => {
                if let Action::Pause { tag } = action {
                    lock(&self.inner).hold(tag.clone(), undo);
                }
                Ok(Err(refusal))
            }
            Outcome::NotNow(why) => Err(why),
            Outcome::Failed(refusal) => Ok(Err(refusal)),
        }
    }

    fn resume_named(&self, action: &Action, run: &mut dyn FnMut(&Action) -> Outcome) -> Result<Answer, String> {
        match run(action) {
            Outcome::Done { report, .. } => {
                let mut inner = lock(&self.inner);
                if let Action::Resume { tag: Some(top), .. } = action {
                    inner.forget_under(top);
                }
                Ok(Ok(json!({"reports": [report], "paused": inner.paused()})))
            }
            Outcome::NotNow(why) => Err(why),
            Outcome::Failed(refusal) | Outcome::Stuck { refusal, .. } => Ok(Err(refusal)),
        }
    }

    /// One after the other; what was resumed before a failure stays so.
    fn resume_held(&self, wait: Duration, run: &mut dyn FnMut(&Action) -> Outcome) -> Result<Answer, String> {
        let mut reports = Vec::new();
        if !lock(&self.inner).has_something_to_undo() {
            let why = "nothing was paused from outside; name a tag to resume what the program has paused itself";
            return Ok(Err(Refusal::new(Code::Refused, why)));
        }
        loop {
            let next = lock(&self.inner).next_undo();
            let Some(next) = next else { break };
            match run(&Action::Undo { back: next.clone(), wait }) {
                Outcome::Done { report, .. } => reports.push(report),
                Outcome::NotNow(why) => return Err(why),
                Outcome::Failed(refusal) | Outcome::Stuck { refusal, .. } => return Ok(Err(refusal)),
            }
            lock(&self.inner).undone(&next);
        }
        Ok(Ok(json!({"reports": reports, "paused": []})))
    }

    /// Whether anybody wants anything. Takes no lock.
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::Relaxed)
    }

    /// Whether the calling thread carries something out: it is in a callback of that, and cannot wait for its end.
    #[must_use]
    pub fn is_carrying(&self) -> bool {
        lock(&self.inner).is_runner()
    }

    /// Requests are taken from now on; at the beginning they are.
    pub fn open(&self) {
        lock(&self.inner).closed = false;
    }

    /// No request is taken any more, and those that wait are refused.
    pub fn close(&self) {
        let mut inner = lock(&self.inner);
        inner.closed = true;
        let (ours, asked) = std::mem::take(&mut inner.asked).into_iter().partition(|asked| asked.action.is_ours());
        inner.asked = ours;
        drop(inner);
        self.review();
        let asked: VecDeque<Asked> = asked;
        asked.into_iter().for_each(|asked| (self.deliver)(asked.ticket, Err(is_closed())));
    }

    // ---- the clients' side ----------------------------------------------------------------------------------------------

    /// Puts a request on the desk.
    ///
    /// # Errors
    /// `Busy` if too many wait already.
    pub fn ask(&self, ticket: Ticket, action: Action, patience: Duration) -> Result<(), Refusal> {
        let mut inner = lock(&self.inner);
        if inner.closed && !action.is_ours() {
            return Err(is_closed());
        }
        if inner.asked.len() >= MOST && !action.is_ours() {
            return Err(Refusal::new(
                Code::Busy,
                format!("{MOST} requests wait for a safe point already; try again later"),
            ));
        }
        inner.asked.push_back(Asked { ticket, action, deadline: Instant::now() + patience, patience, why: None });
        // Under the lock: a thread that passes from now on sees it, before anybody can begin.
        self.wanted.store(true, Ordering::Relaxed);
        drop(inner);
        self.review();
        Ok(())
    }

    /// Nobody waits for the answer any more: what has not begun is not done.
    pub fn forget(&self, ticket: Ticket) {
        let mut inner = lock(&self.inner);
        inner.asked.retain(|asked| asked.ticket != ticket);
        inner.abandoned |= inner.running == Some(ticket);
        drop(inner);
        self.review();
    }

    /// Refuses what has waited long enough; when to ask again. Time slices look at their own clock, and withdraw what they asked for.
    pub fn expire(&self) -> Option<Instant> {
        let now = Instant::now();
        let (late, next) = {
            let mut inner = lock(&self.inner);
            let mut late = Vec::new();
            let theirs = |asked: &&Asked| !asked.action.is_ours();
            while let Some(at) = inner.asked.iter().position(|asked| theirs(&asked) && asked.deadline <= now) {
                let Some(asked) = inner.asked.remove(at) else { break };
                late.push((asked.ticket, self.reason(&inner, &asked)));
            }
            (late, inner.asked.iter().filter(theirs).map(|asked| asked.deadline).min())
        };
        if !late.is_empty() {
            self.review();
        }
        for (ticket, why) in late {
            (self.deliver)(ticket, Err(Refusal::new(Code::Refused, why)));
        }
        next
    }

    fn reason(&self, inner: &Inner, asked: &Asked) -> String {
        let patience = asked.patience.as_secs_f64();
        if let Some(why) = &asked.why {
            return format!("no good moment came within {patience:.1} s: {why}");
        }
        if inner.members.is_empty() {
            return format!(
                "the program came to no safe point within {patience:.1} s, and never before: it calls neither sire.safe_point(), nor \
                 steps an optimizer, nor uses managed models"
            );
        }
        if inner.running.is_some() {
            return format!("another pause or resume was under way for {patience:.1} s");
        }
        let outside: Vec<String> = inner
            .members
            .values()
            .filter(|known| !known.inside)
            .map(|known| format!("thread '{}' passed its last one {:.1} s ago", known.name, self.ago(known)))
            .collect();
        let who = if outside.is_empty() { "others were before it".to_owned() } else { outside.join(", ") };
        format!("the program came to no safe point within {patience:.1} s: {who}")
    }

    /// What is paused from outside, what waits, and who passes safe points.
    #[must_use]
    pub fn summary(&self) -> Value {
        let inner = lock(&self.inner);
        let member =
            |known: &Known| json!({"thread": known.name, "waiting": known.inside, "seconds_ago": self.ago(known)});
        json!({
            "paused": inner.paused(),
            "loans": inner.loans.iter().map(|loan| inner.shown(loan)).collect::<Vec<_>>(),
            "asked": inner.asked.len() + usize::from(inner.running.is_some()),
            "safe_points": inner.members.values().map(member).collect::<Vec<_>>(),
        })
    }

    /// Members look at the desk from now on if there is anything for them.
    fn review(&self) {
        let inner = lock(&self.inner);
        let wanted = !inner.asked.is_empty() || inner.is_kept() || inner.is_owed() || inner.running.is_some();
        self.wanted.store(wanted, Ordering::Relaxed);
        drop(inner);
        self.changed.notify_all();
    }

    fn now(&self) -> u64 {
        u64::try_from(self.opened.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn ago(&self, known: &Known) -> f64 {
        self.now().saturating_sub(known.last.load(Ordering::Relaxed)) as f64 / 1000.0
    }
}

impl Inner {
    fn mark(&mut self, member: &Member, inside: bool) {
        if let Some(known) = self.members.get_mut(&member.number) {
            known.inside = inside;
        }
    }

    /// What is paused from outside, as it was asked for.
    fn paused(&self) -> Vec<&Option<String>> {
        self.held.iter().map(|hold| &hold.tag).collect()
    }

    /// A pause that is repeated adds what was resident again meanwhile.
    fn hold(&mut self, tag: Option<String>, undo: Undo) {
        match self.held.iter_mut().find(|hold| hold.tag == tag) {
            Some(hold) => hold.undo.extend(undo),
            None => self.held.push(Hold { tag, undo }),
        }
    }

    /// Whether the calling thread carries out what is running.
    fn is_runner(&self) -> bool {
        self.runner == Some(std::thread::current().id())
    }

    /// `tried`: what this thread has tried, and when it may again.
    fn step(&mut self, tried: &[(Ticket, Instant)]) -> Step {
        let now = Instant::now();
        let rested = |asked: &Asked| tried.iter().find(|(ticket, _)| *ticket == asked.ticket).map(|(_, until)| *until);
        let everybody = self.members.values().all(|known| known.inside);
        let waits = |asked: &&Asked| asked.deadline > now && rested(asked).is_none_or(|until| until <= now);
        let ready = |asked: &&Asked| everybody || asked.action.brings_back();
        if self.running.is_none() {
            let found = self.asked.iter().position(|asked| waits(&asked) && ready(&asked));
            if let Some(asked) = found.and_then(|at| self.asked.remove(at)) {
                (self.running, self.runner) = (Some(asked.ticket), Some(std::thread::current().id()));
                self.abandoned = false;
                return Step::Run(asked);
            }
            if let Some(asked) = self.due_loan(now) {
                (self.running, self.runner) = (Some(asked.ticket), Some(std::thread::current().id()));
                return Step::Run(asked);
            }
        }
        if !self.is_kept() && self.running.is_none() && !self.asked.iter().any(|asked| waits(&asked)) {
            // What was tried is tried again at the next safe point.
            return Step::GoOn;
        }
        let again =
            self.asked.iter().filter_map(rested).chain(self.loans.iter().filter(|loan| loan.over).map(|loan| loan.due));
        let again = again.filter(|until| *until > now);
        Step::Wait(self.asked.iter().filter(waits).map(|asked| asked.deadline).chain(again).min())
    }
}

fn is_closed() -> Refusal {
    Refusal::new(Code::Refused, "the control socket is being closed")
}

/// Whether `tag` is `top` or lies under it; everything does not.
#[must_use]
pub fn is_under(tag: Option<&str>, top: &str) -> bool {
    tag.and_then(|tag| tag.strip_prefix(top)).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

mod away;
mod loans;
mod undo;

use loans::Loan;
pub use loans::Terms;
pub use undo::{Back, Part, Undo};
#[cfg(test)]
mod tests;
