//! Which pages of content host memory has already, so that a page which two models share is kept once.
//!
//! A page is known by its digest and its length. To give one out *lends* the whole range that it lies in: nobody writes to that any
//! more while it lives. Who wants to write a page again in place withdraws it first. Both happen under one lock, so a page that was given
//! out never changes. The index keeps nothing alive.

use crate::raw::{Span, SpanRef};
use crate::sync::{Mutex, lock};
use crate::tier::PageId;
use std::collections::HashMap;

/// Dead entries are looked for when there are this many new ones, or as many as there were.
const PATIENCE: usize = 4096;

#[derive(Debug, Default)]
struct Table {
    entries: HashMap<(PageId, u64), SpanRef>,
    /// Entries that were alive when that was last looked at.
    alive: usize,
}

/// See the [module documentation](self).
#[derive(Debug, Default)]
pub(crate) struct Pages(Mutex<Table>);

impl Pages {
    /// Host memory with `len` bytes of that content, which stays as it is.
    pub(crate) fn find(&self, id: PageId, len: u64) -> Option<Span> {
        let mut table = lock(&self.0);
        let found = table.entries.get(&(id, len))?.upgrade();
        match &found {
            Some(span) => span.keeper().lend(),
            None => drop(table.entries.remove(&(id, len))),
        }
        found
    }

    /// As [`Pages::find`], but not this very span.
    pub(crate) fn find_other(&self, id: PageId, span: &Span) -> Option<Span> {
        let is_same = lock(&self.0).entries.get(&(id, span.len())).is_none_or(|page| page.is(span));
        if is_same { None } else { self.find(id, span.len()).filter(|found| !found.downgrade().is(span)) }
    }

    /// Makes a page findable, unless one like it is already.
    pub(crate) fn insert(&self, id: PageId, span: &Span) {
        let mut table = lock(&self.0);
        if table.entries.len() >= 2 * table.alive + PATIENCE {
            table.entries.retain(|_, page| page.is_alive());
            table.alive = table.entries.len();
        }
        let page = table.entries.entry((id, span.len())).or_insert_with(|| span.downgrade());
        if !page.is_alive() {
            *page = span.downgrade();
        }
    }

    /// Takes a page back that is about to be written to. False if somebody may be reading it, or about to.
    pub(crate) fn withdraw(&self, id: Option<PageId>, span: &Span) -> bool {
        let mut table = lock(&self.0);
        if span.keeper().is_lent() {
            return false;
        }
        if let Some(id) = id
            && table.entries.get(&(id, span.len())).is_some_and(|page| page.is(span))
        {
            table.entries.remove(&(id, span.len()));
        }
        true
    }
}
