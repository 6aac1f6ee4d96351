//! Loans at the desk: memory of this program that gave way for another process's need, by agreement ([`crate::preempt`]).
//!
//! A loan is made at a safe point, as a pause from outside is, and is over when its needer's connection is: then what it has taken, and nothing else, comes
//! back at a safe point, as soon as the memory can be had. The program's own resume wins: what it brings back is no part of the loan any more. In
//! another process's turn on the device nothing is lent, and nothing comes back; nor does what somebody outside has paused meanwhile: of a loan the rest does.

use super::{Action, Asked, Back, Desk, Inner, Outcome, Part, Undo};
use crate::lock;
use crate::message::Answer;
use crate::server::Ticket;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// How long a resume that found no memory rests: at first, and at most.
const REST: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(2));

/// What the program has agreed to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Terms {
    /// Threads that pass safe points wait there until the memory is back.
    pub waits: bool,
    /// It comes back when the need is over; else when the program resumes it.
    pub returns: bool,
}

/// Memory that gave way.
#[derive(Debug)]
pub(super) struct Loan {
    /// The request that it was made for: its connection is what holds it.
    ticket: Ticket,
    mark: u64,
    terms: Terms,
    pub(super) undo: Undo,
    /// The need is over.
    pub(super) over: bool,
    /// When to try the next time.
    pub(super) due: Instant,
    tries: u32,
    /// Why it could not be brought back the last time.
    why: Option<String>,
}

impl Loan {
    /// That is no part of it any more.
    pub(super) fn is_back(&mut self, back: &Back) {
        let before = self.undo.clone();
        self.undo.retain_mut(|own| own.take_off(back));
        if self.undo != before {
            (self.tries, self.why) = (0, None);
        }
    }

    /// It could not be brought back, and is tried again later and later.
    fn rest(&mut self, why: Option<String>) {
        self.due = Instant::now() + REST.0.saturating_mul(1 << self.tries.min(10)).min(REST.1);
        self.tries += 1;
        self.why = why;
    }

    /// `is_held`: what is left of it is paused from outside.
    pub(super) fn shown(&self, is_held: bool) -> Value {
        let state = if self.over { "returning" } else { "lent" };
        let obstacle = if is_held {
            Some("it was paused from outside meanwhile, and waits for its resume")
        } else {
            self.why.as_deref()
        };
        json!({"mark": self.mark, "state": state, "waits": self.terms.waits, "obstacle": obstacle})
    }
}

impl Desk {
    /// Memory gives way for the need of whoever asked.
    pub(super) fn lend(&self, asked: &Asked, run: &mut dyn FnMut(&Action) -> Outcome) -> Result<Answer, String> {
        let Action::Lend { mark, terms, .. } = asked.action else { return Err("it is no loan".to_owned()) };
        let (answer, undo, is_stuck) = match run(&asked.action) {
            Outcome::Done { report, undo } => (Ok(report), undo, false),
            Outcome::Stuck { refusal, undo } => (Err(refusal), undo, true),
            Outcome::NotNow(why) => return Err(why),
            Outcome::Failed(refusal) => return Ok(Err(refusal)),
        };
        let mut inner = lock(&self.inner);
        let over = is_stuck || inner.abandoned;
        inner.loans.push(Loan {
            ticket: asked.ticket,
            mark,
            terms,
            undo,
            over,
            due: Instant::now(),
            tries: 0,
            why: None,
        });
        inner.settle_loans();
        Ok(answer)
    }

    /// Tries to bring a loan back; if that fails it is tried again, less and less often.
    pub(super) fn recover(&self, asked: &Asked, run: &mut dyn FnMut(&Action) -> Outcome) {
        let failed = match run(&asked.action) {
            Outcome::Done { .. } => None,
            Outcome::NotNow(why) => Some(why),
            Outcome::Failed(refusal) | Outcome::Stuck { refusal, .. } => Some(refusal.message),
        };
        let mut inner = lock(&self.inner);
        (inner.running, inner.runner) = (None, None);
        if let Some(loan) = inner.loans.iter_mut().find(|loan| loan.ticket == asked.ticket) {
            match (failed, &asked.action) {
                // What somebody outside has paused is left of it.
                (None, Action::Recover { undo, .. }) => undo.iter().for_each(|back| loan.is_back(back)),
                (why, _) => loan.rest(why),
            }
        }
        inner.tidy_loans();
        drop(inner);
        self.review();
    }

    /// The needer of that request has ended.
    pub fn let_go(&self, ticket: Ticket) {
        self.end_loans(|loan| loan.ticket == ticket);
    }

    fn end_loans(&self, which: impl Fn(&Loan) -> bool) {
        let mut inner = lock(&self.inner);
        let now = Instant::now();
        for loan in inner.loans.iter_mut().filter(|loan| which(loan) && !loan.over) {
            (loan.over, loan.due) = (true, now);
        }
        inner.settle_loans();
        drop(inner);
        self.review();
    }

    /// The program takes its consent back: `resume` brings back, now, what gave way by this mark. What fails comes back later, at a safe point, as if the
    /// need were over. In a callback of what is being carried out, and in another process's turn on the device, all of it does; and what somebody
    /// outside has paused meanwhile stays so until its resume.
    ///
    /// # Errors
    /// The first of `resume`.
    pub fn recall<E>(&self, mark: u64, resume: impl FnMut(&Back) -> Result<(), E>) -> Result<(), E> {
        self.end_loans(|loan| loan.mark == mark);
        let inner = self.when_nothing_runs();
        let ours = inner.loans.iter().filter(|loan| loan.mark == mark);
        let undo: Undo = ours.flat_map(|loan| inner.not_held(&loan.undo)).collect();
        if undo.is_empty() || inner.is_runner() || inner.away.is_some() {
            return Ok(());
        }
        self.undo_here(inner, undo, resume)
    }

    /// The program has resumed something itself: `is_away` says what of a loan still is. Nobody waits for what is back.
    pub fn came_back(&self, is_away: impl Fn(&Part) -> bool) {
        let mut inner = lock(&self.inner);
        if inner.loans.is_empty() {
            return;
        }
        for back in inner.loans.iter_mut().flat_map(|loan| &mut loan.undo) {
            if let Back::Exactly { parts, .. } = back {
                parts.retain(&is_away);
            }
        }
        let is_left = |back: &Back| !matches!(back, Back::Exactly { parts, .. } if parts.is_empty());
        inner.loans.iter_mut().for_each(|loan| loan.undo.retain(is_left));
        inner.tidy_loans();
        drop(inner);
        self.review();
    }

    /// Why what gave way by this mark could not be brought back the last time that it was tried.
    #[must_use]
    pub fn why_away(&self, mark: u64) -> Option<String> {
        lock(&self.inner).loans.iter().find(|loan| loan.mark == mark && loan.why.is_some())?.why.clone()
    }

    /// The marks whose memory has given way, and whether it is on its way back.
    #[must_use]
    pub fn lent(&self) -> Vec<(u64, bool)> {
        lock(&self.inner).loans.iter().map(|loan| (loan.mark, loan.over)).collect()
    }
}

impl Inner {
    /// A loan that does not come back by itself is the program's own pause once the need is over.
    fn settle_loans(&mut self) {
        self.loans.retain(|loan| loan.terms.returns || !loan.over);
        self.tidy_loans();
    }

    pub(super) fn tidy_loans(&mut self) {
        self.loans.retain(|loan| !loan.undo.is_empty());
    }

    /// A loan, for whoever looks.
    pub(super) fn shown(&self, loan: &Loan) -> Value {
        loan.shown(loan.over && self.not_held(&loan.undo).is_empty())
    }

    /// Whether members stay in their safe points because of a loan.
    pub(super) fn waits_for_loans(&self) -> bool {
        self.loans.iter().any(|loan| loan.terms.waits)
    }

    /// Whether something comes back as soon as it can.
    pub(super) fn is_owed(&self) -> bool {
        self.loans.iter().any(|loan| loan.over)
    }

    /// All needs count as over.
    pub(super) fn end_all_loans(&mut self) {
        self.loans.iter_mut().for_each(|loan| loan.over = true);
        self.settle_loans();
    }

    /// A loan that is over, if it is time to bring it back.
    pub(super) fn due_loan(&self, now: Instant) -> Option<Asked> {
        if self.away.is_some() {
            return None;
        }
        let due = self.loans.iter().filter(|loan| loan.over && loan.due <= now);
        let mut free = due.map(|loan| (loan, self.not_held(&loan.undo)));
        let (loan, undo) = free.find(|(_, undo)| !undo.is_empty())?;
        let action = Action::Recover { mark: loan.mark, undo };
        Some(Asked { ticket: loan.ticket, action, deadline: now, patience: Duration::ZERO, why: None })
    }
}
