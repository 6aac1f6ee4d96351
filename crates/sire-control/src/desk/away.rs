//! Time slices at the desk: while another process has its turn on the device, everything of this one is paused (`away`), and its members wait.
//!
//! Pauses from outside and turns do not know of one another. What is resumed from outside while the process is away comes back with its turn, not
//! before: the memory is somebody else's until then. What is paused from outside stays so when the turn comes; a pause of a part is refused meanwhile, since
//! the turn would bring that part back.

use super::{Action, Back, Desk, Inner, NOBODYS, Outcome, Undo};
use crate::lock;
use crate::message::{Answer, Code, Refusal};
use crate::server::Ticket;
use serde_json::json;
use std::sync::PoisonError;
use std::time::Duration;

impl Desk {
    /// Whether everything is paused because another process has its turn.
    #[must_use]
    pub fn is_away(&self) -> bool {
        lock(&self.inner).away.is_some()
    }

    /// Whether somebody outside has paused everything: then a turn would be of no use.
    #[must_use]
    pub fn is_held(&self) -> bool {
        lock(&self.inner).is_held()
    }

    /// Why it was not carried out at the safe points that there were so far; None if there was none.
    pub fn why(&self, ticket: Ticket) -> Option<String> {
        let inner = lock(&self.inner);
        inner.asked.iter().find(|asked| asked.ticket == ticket)?.why.clone()
    }

    /// Takes a request back; false if it is being carried out, or was: then its answer comes.
    pub fn withdraw(&self, ticket: Ticket) -> bool {
        let mut inner = lock(&self.inner);
        let before = inner.asked.len();
        inner.asked.retain(|asked| asked.ticket != ticket);
        let withdrawn = inner.asked.len() < before;
        drop(inner);
        self.review();
        withdrawn
    }

    /// The process takes turns no more: `resume` brings back what is paused because of that, one after the other. Threads that wait go on
    /// when it is back, not before; what fails is held from then on, as if everything had been paused from outside. Waits for what is under
    /// way, unless this thread carries it out.
    ///
    /// # Errors
    /// The first of `resume`.
    pub fn stay<E>(&self, mut resume: impl FnMut(&Back) -> Result<(), E>) -> Result<(), E> {
        let mut inner = lock(&self.inner);
        while inner.running.is_some() && !inner.is_runner() {
            inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
        let before = (inner.running, inner.runner);
        (inner.running, inner.runner) = (before.0.or(Some(NOBODYS)), Some(std::thread::current().id()));
        let mut undo = inner.away.clone().unwrap_or_default();
        // What is paused from outside stays so.
        let kept = if inner.is_held() { std::mem::take(&mut undo) } else { Undo::new() };
        drop(inner);
        let (mut outcome, mut rest) = (Ok(()), kept);
        for back in undo {
            if let Err(error) = resume(&back) {
                outcome = outcome.and(Err(error));
                rest.push(back);
            }
        }
        let mut inner = lock(&self.inner);
        (inner.running, inner.runner) = before;
        inner.away = None;
        if !rest.is_empty() {
            inner.hold(None, rest);
        }
        drop(inner);
        self.review();
        outcome
    }

    pub(super) fn go_away(&self, run: &mut dyn FnMut(&Action) -> Outcome) -> Result<Answer, String> {
        let (answer, undo) = match run(&Action::Yield) {
            Outcome::Done { report, undo } => (report, undo),
            Outcome::Stuck { refusal, undo } => (json!({"stuck": refusal.message}), undo),
            Outcome::NotNow(why) => return Err(why),
            Outcome::Failed(refusal) => return Ok(Err(refusal)),
        };
        lock(&self.inner).away.get_or_insert_default().extend(undo);
        Ok(Ok(answer))
    }

    /// One after the other; what was resumed before a failure stays so, and the process stays away.
    pub(super) fn come_back(&self, wait: Duration, run: &mut dyn FnMut(&Action) -> Outcome) -> Result<Answer, String> {
        let mut reports = Vec::new();
        if self.is_held() {
            return Ok(Err(Refusal::new(Code::Refused, "everything is paused from outside")));
        }
        loop {
            let next = lock(&self.inner).away.as_ref().and_then(|undo| undo.first().cloned());
            let Some(next) = next else { break };
            match run(&Action::Undo { back: next.clone(), wait }) {
                Outcome::Done { report, .. } => reports.push(report),
                Outcome::NotNow(why) => return Err(why),
                // A name that nothing has: it would be refused in every turn, and nothing else would ever come back.
                Outcome::Failed(refusal) if is_unknown(&next, &refusal) => {
                    reports.push(json!({"failed": refusal.message}))
                }
                Outcome::Failed(refusal) | Outcome::Stuck { refusal, .. } => return Ok(Err(refusal)),
            }
            if let Some(undo) = &mut lock(&self.inner).away {
                undo.retain(|other| *other != next);
            }
        }
        lock(&self.inner).away = None;
        Ok(Ok(json!(reports)))
    }

    /// A pause from outside of what is paused already, and which the turn would bring back.
    pub(super) fn pause_later() -> Result<Answer, String> {
        let why = "another process has its turn on the device, and this one has nothing there; pause everything (no tag), or this tag in its turn";
        Ok(Err(Refusal::new(Code::Refused, why)))
    }

    /// A resume from outside that has to wait for the turn.
    pub(super) fn resume_later(&self, tag: Option<&str>) -> Result<Answer, String> {
        let mut inner = lock(&self.inner);
        match tag {
            Some(top) => {
                inner.forget_under(top);
                inner.owe(vec![Back::Under(top.to_owned())]);
            }
            None => drop(inner.defer()),
        }
        Ok(Ok(json!({"reports": [], "paused": inner.paused(), "deferred": true})))
    }
}

/// Whether somebody outside has named what the program does not know.
fn is_unknown(back: &Back, refusal: &Refusal) -> bool {
    matches!(back, Back::Under(_)) && refusal.code == Code::Invalid
}

impl Inner {
    fn is_held(&self) -> bool {
        self.held.iter().any(|hold| hold.tag.is_none())
    }

    /// Whether members stay in their safe points although nothing is being done.
    pub(super) fn is_kept(&self) -> bool {
        !self.held.is_empty() || self.away.is_some() || self.waits_for_loans()
    }

    /// If the process is away: what is paused from outside comes back with its turn, and then what gave way for others. Whether it is away.
    pub(super) fn defer(&mut self) -> bool {
        if self.away.is_none() {
            return false;
        }
        let undo = self.held.drain(..).flat_map(|hold| hold.undo).collect();
        self.end_all_loans();
        self.owe(undo);
        true
    }

    /// Adds to what the turn resumes.
    fn owe(&mut self, more: Undo) {
        if let Some(undo) = &mut self.away {
            let new: Undo = more.into_iter().filter(|back| !undo.contains(back)).collect();
            undo.extend(new);
        }
    }
}
