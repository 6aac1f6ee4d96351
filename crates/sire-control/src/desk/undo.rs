//! What a pause has taken, for the resume that undoes it: exactly that, and nothing that the program had paused itself.

use super::{Desk, Inner, NOBODYS, is_under};
use crate::lock;
use std::collections::BTreeMap;
use std::sync::{MutexGuard, PoisonError};

/// A region that a pause has taken.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Part {
    /// The engine's number of it.
    pub region: u32,
    /// Its tag.
    pub tag: String,
    /// How often it had been paused then: if it is more often now, it is away for another reason.
    pub pauses: u64,
}

/// What a resume brings back.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Back {
    /// Everything.
    Everything,
    /// A tag and what is under it, as somebody asked for.
    Under(String),
    /// These regions.
    Exactly {
        /// What was asked for when they were paused (None: everything): what the program hears of.
        asked: Option<String>,
        /// Which ones.
        parts: Vec<Part>,
    },
}

/// What a pause has taken, in the order in which it comes back.
pub type Undo = Vec<Back>;

impl Back {
    /// Without what lies under `top`; whether anything is left.
    pub(super) fn leave_out(&mut self, top: &str) -> bool {
        match self {
            Back::Everything => true,
            Back::Under(tag) => !is_under(Some(tag), top),
            Back::Exactly { parts, .. } => {
                parts.retain(|part| !is_under(Some(&part.tag), top));
                !parts.is_empty()
            }
        }
    }

    /// What is left of it if what lies under `tops` (None: everything) stays away. The program hears of each tag by itself if that is a part only. What
    /// cannot be parted goes as a whole.
    fn outside(&self, tops: &[Option<&str>]) -> Undo {
        let is_covered = |tag: &str| tops.iter().any(|top| top.is_none_or(|top| is_under(Some(tag), top)));
        let holds_a_part = |tag: &str| tops.iter().flatten().any(|top| is_under(Some(top), tag));
        let goes = match self {
            Back::Everything => tops.is_empty(),
            Back::Under(tag) => !is_covered(tag) && !holds_a_part(tag),
            Back::Exactly { parts, .. } => !parts.iter().any(|part| is_covered(&part.tag)),
        };
        match self {
            whole if goes => vec![whole.clone()],
            Back::Exactly { parts, .. } => by_tag(parts.iter().filter(|part| !is_covered(&part.tag))),
            _ => Undo::new(),
        }
    }

    /// Without what `back` has brought back; whether anything is left.
    pub(super) fn take_off(&mut self, back: &Back) -> bool {
        match (&mut *self, back) {
            (Back::Exactly { parts, .. }, Back::Exactly { parts: returned, .. }) => {
                parts.retain(|part| !returned.contains(part));
                !parts.is_empty()
            }
            (own, back) => own != back,
        }
    }

    /// The tag of which the program hears; None: everything.
    #[must_use]
    pub fn asked(&self) -> Option<&str> {
        match self {
            Back::Everything => None,
            Back::Under(tag) => Some(tag),
            Back::Exactly { asked, .. } => asked.as_deref(),
        }
    }
}

/// The same parts, each tag's as if it had been asked for.
fn by_tag<'a>(parts: impl Iterator<Item = &'a Part>) -> Undo {
    let mut tags: BTreeMap<&str, Vec<Part>> = BTreeMap::new();
    for part in parts {
        tags.entry(&part.tag).or_default().push(part.clone());
    }
    tags.into_iter().map(|(tag, parts)| Back::Exactly { asked: Some(tag.to_owned()), parts }).collect()
}

impl Desk {
    /// For a thread that cannot wait for the resume, and for the end of the socket: `resume` brings back all that is paused from outside, or gave
    /// way for others, one after the other. Threads that are held go on when it is back, not before; what fails stays held. Waits for what is under
    /// way, unless this thread carries it out: then nothing is done. While another process has its turn on the device, it comes back with ours.
    ///
    /// # Errors
    /// The first of `resume`.
    pub fn give_up<E>(&self, resume: impl FnMut(&Back) -> Result<(), E>) -> Result<(), E> {
        let mut inner = self.when_nothing_runs();
        if inner.is_runner() || inner.defer() {
            return Ok(());
        }
        inner.tidy();
        let undo = inner.undo();
        self.undo_here(inner, undo, resume)
    }

    /// The lock, when nobody but the calling thread carries anything out.
    pub(super) fn when_nothing_runs(&self) -> MutexGuard<'_, Inner> {
        let mut inner = lock(&self.inner);
        while inner.running.is_some() && !inner.is_runner() {
            inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
        inner
    }

    /// Brings `undo` back in the calling thread, while members stay where they are; what fails stays as it is.
    pub(super) fn undo_here<E>(
        &self,
        mut inner: MutexGuard<'_, Inner>,
        undo: Undo,
        mut resume: impl FnMut(&Back) -> Result<(), E>,
    ) -> Result<(), E> {
        (inner.running, inner.runner) = (Some(NOBODYS), Some(std::thread::current().id()));
        drop(inner);
        let mut outcome = Ok(());
        for back in undo {
            match resume(&back) {
                Ok(()) => lock(&self.inner).undone(&back),
                failed => outcome = outcome.and(failed),
            }
        }
        let mut inner = lock(&self.inner);
        (inner.running, inner.runner) = (None, None);
        inner.tidy_loans();
        drop(inner);
        self.review();
        outcome
    }
}

impl Inner {
    /// What is to be resumed next, for the oldest hold; holds that are done with go. Loans come last.
    pub(super) fn next_undo(&mut self) -> Option<Back> {
        self.tidy();
        let held = self.held.first().and_then(|hold| hold.undo.first());
        held.or_else(|| self.loans.first()?.undo.first()).cloned()
    }

    /// All that is to be resumed, the oldest hold first.
    pub(super) fn undo(&self) -> Undo {
        let mut found = Undo::new();
        let held = self.held.iter().flat_map(|hold| &hold.undo);
        for back in held.chain(self.loans.iter().flat_map(|loan| &loan.undo)) {
            if !found.contains(back) {
                found.push(back.clone());
            }
        }
        found
    }

    pub(super) fn undoes(&mut self) -> impl Iterator<Item = &mut Undo> {
        self.held.iter_mut().map(|hold| &mut hold.undo).chain(self.loans.iter_mut().map(|loan| &mut loan.undo))
    }

    pub(super) fn has_something_to_undo(&self) -> bool {
        !self.held.is_empty() || !self.loans.is_empty()
    }

    /// What is under `top` is back, or is owed to nobody any more.
    pub(super) fn forget_under(&mut self, top: &str) {
        self.held.retain(|hold| !is_under(hold.tag.as_deref(), top));
        self.undoes().for_each(|undo| undo.retain_mut(|back| back.leave_out(top)));
        self.loans.retain(|loan| !loan.undo.is_empty());
    }

    /// What is done with goes.
    pub(super) fn tidy(&mut self) {
        self.held.retain(|hold| !hold.undo.is_empty());
        self.loans.retain(|loan| !loan.undo.is_empty());
    }

    /// It is back. A hold that has taken nothing else goes with it; one that had nothing to bring back is no matter of this.
    pub(super) fn undone(&mut self, back: &Back) {
        self.held.retain_mut(|hold| {
            let before = hold.undo.len();
            hold.undo.retain(|other| other != back);
            !hold.undo.is_empty() || before == 0
        });
        self.loans.iter_mut().for_each(|loan| loan.is_back(back));
    }

    /// Of what `undo` would bring back, what nobody outside has paused.
    pub(super) fn not_held(&self, undo: &Undo) -> Undo {
        let tops: Vec<Option<&str>> = self.held.iter().map(|hold| hold.tag.as_deref()).collect();
        undo.iter().flat_map(|back| back.outside(&tops)).collect()
    }
}
