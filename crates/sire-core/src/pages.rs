//! Which pages of content host memory has already, so that a page which two models share is kept once.
//!
//! A page is known by its digest and its length. To give one out *lends* the whole range that it lies in: nobody writes to that any
//! more while it lives. Who wants to write a page again in place withdraws it first. Both happen under one lock, so a page that was given
//! out never changes. The index keeps nothing alive.

use crate::raw::{Span, SpanRef};
use crate::sync::{Mutex, lock};
use crate::tier::PageId;
use std::collections::{BTreeMap, HashMap};

/// Dead entries are looked for when there are this many new ones, or as many as there were.
const PATIENCE: usize = 4096;

/// A content, and how many bytes of it.
type Content = (PageId, u64);

#[derive(Debug)]
struct Page {
    span: SpanRef,
    /// Its address in host memory.
    at: usize,
}

#[derive(Debug, Default)]
struct Table {
    entries: HashMap<Content, Page>,
    /// The same entries by address. No two overlap.
    places: BTreeMap<usize, Content>,
    /// Entries that were alive when that was last looked at.
    alive: usize,
}

impl Table {
    fn add(&mut self, content: Content, span: &Span) {
        // Whoever was there before is dead, or was written over.
        self.forget(span);
        let at = span.ptr() as usize;
        self.places.insert(at, content);
        self.entries.insert(content, Page { span: span.downgrade(), at });
    }

    fn remove(&mut self, content: Content) {
        if let Some(page) = self.entries.remove(&content) {
            self.places.remove(&page.at);
        }
    }

    /// Removes every entry of which some bytes are in the span.
    fn forget(&mut self, span: &Span) {
        let first = span.ptr() as usize;
        let end = first + span.len() as usize;
        while let Some((&at, &content)) = self.places.range(..end).next_back()
            && at + content.1 as usize > first
        {
            self.remove(content);
        }
    }

    fn drop_dead(&mut self) {
        self.entries.retain(|_, page| page.span.is_alive());
        self.places.retain(|_, content| self.entries.contains_key(content));
        self.alive = self.entries.len();
    }
}

/// See the [module documentation](self).
#[derive(Debug, Default)]
pub(crate) struct Pages(Mutex<Table>);

impl Pages {
    /// Host memory with `len` bytes of that content, which stays as it is.
    pub(crate) fn find(&self, id: PageId, len: u64) -> Option<Span> {
        let mut table = lock(&self.0);
        let found = table.entries.get(&(id, len))?.span.upgrade();
        match &found {
            Some(span) => span.keeper().lend(),
            None => table.remove((id, len)),
        }
        found
    }

    /// As [`Pages::find`], but not this very span.
    pub(crate) fn find_other(&self, id: PageId, span: &Span) -> Option<Span> {
        let is_same = lock(&self.0).entries.get(&(id, span.len())).is_none_or(|page| page.span.is(span));
        if is_same { None } else { self.find(id, span.len()).filter(|found| !found.downgrade().is(span)) }
    }

    /// Makes a page findable, unless one like it is already.
    pub(crate) fn insert(&self, id: PageId, span: &Span) {
        let mut table = lock(&self.0);
        if table.entries.len() >= 2 * table.alive + PATIENCE {
            table.drop_dead();
        }
        let content = (id, span.len());
        match table.entries.get(&content) {
            Some(page) if page.span.is_alive() => {}
            _ => {
                table.remove(content);
                table.add(content, span);
            }
        }
    }

    /// Takes back every page that lies in the span, or reaches into it: it is about to be written to. False if somebody may be reading it, or
    /// about to.
    pub(crate) fn withdraw(&self, span: &Span) -> bool {
        let mut table = lock(&self.0);
        if span.keeper().is_lent() {
            return false;
        }
        table.forget(span);
        true
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;
    use crate::raw::{Keeper, Kept, Pages as Memory};
    use std::sync::Arc;

    const LEN: u64 = 4096;

    fn memory() -> Arc<dyn Keeper> {
        Arc::new(Kept(Memory::new(4 * LEN, LEN).unwrap_or_else(|e| unreachable!("{e}"))))
    }

    fn span(memory: &Arc<dyn Keeper>, at: u64, len: u64) -> Span {
        Span::new(Arc::clone(memory), at, len).unwrap_or_else(|| unreachable!("it is inside"))
    }

    /// The pages of four that are found after a part of the memory was withdrawn.
    fn found_without(at: u64, len: u64) -> Vec<u64> {
        let (pages, memory) = (Pages::default(), memory());
        (0..4).for_each(|i| pages.insert((i, 0), &span(&memory, i * LEN, LEN)));
        assert!(pages.withdraw(&span(&memory, at, len)));
        (0..4).filter(|&i| pages.find((i, 0), LEN).is_some()).collect()
    }

    #[test]
    fn what_is_withdrawn_in_part_is_found_no_more() {
        assert_eq!(found_without(0, LEN), [1, 2, 3]);
        assert_eq!(found_without(LEN, 1), [0, 2, 3]);
        assert_eq!(found_without(2 * LEN - 1, 1), [0, 2, 3]);
        assert_eq!(found_without(LEN / 2, LEN), [2, 3]);
        assert_eq!(found_without(1, 4 * LEN - 2), [0; 0]);
        assert_eq!(found_without(LEN, 0), [0, 1, 2, 3]);
    }

    #[test]
    fn what_is_gone_makes_way_for_what_comes_to_its_place() {
        let (pages, old) = (Pages::default(), memory());
        pages.insert((1, 0), &span(&old, 0, LEN));
        drop(old);
        let new = memory();
        pages.insert((2, 0), &span(&new, 0, LEN));
        assert!(pages.find((1, 0), LEN).is_none() && pages.find((2, 0), LEN).is_some());
        pages.insert((1, 0), &span(&new, LEN, LEN));
        assert!(pages.find((1, 0), LEN).is_some());
        let table = lock(&pages.0);
        assert_eq!((table.entries.len(), table.places.len()), (2, 2));
    }
}
