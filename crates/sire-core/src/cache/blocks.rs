//! The blocks of a cache, and the bins in which the free ones are found. Here are only links and lists; what a block is used for is
//! decided in the modules above.
//!
//! Blocks lie in one vector and are linked to their neighbours in address, so that splitting and joining moves numbers and no address. A bin is a
//! list of free blocks of about one size: classes of one unit up to 31 units, then 32 per doubling, and a bit per class that says
//! whether there are any. Giving a block out and taking it back is a few links, and allocates nothing.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// Every block starts at a multiple of this, and is a multiple of it long.
pub(crate) const UNIT: u64 = 512;
/// log2 of the classes per doubling.
const STEPS: u32 = 5;
/// Classes: enough for 2^44 bytes.
const CLASSES: usize = 1024;
/// So many blocks of one class are looked at for the best one: beyond, a block of the next class is as good.
const LOOKED_AT: usize = 128;

/// Names a block.
pub(super) type Index = u32;
/// No block.
pub(super) const NONE: Index = Index::MAX;

/// What a block is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    /// Addresses without memory.
    Hole,
    /// Memory is on its way in or out: nobody else touches it.
    Moving,
    /// Memory that nobody uses.
    Free,
    /// The same, but freed a moment ago and in no bin yet: the next request of its size gets it back as it is.
    Warm,
    /// The program's.
    Used,
    /// The program has freed it, but work on other streams may still use it.
    Waiting,
}

/// Consecutive addresses of one kind.
#[derive(Clone, Copy, Debug)]
pub(super) struct Block {
    pub(super) start: u64,
    pub(super) size: u64,
    /// Bytes that the program asked for.
    pub(super) requested: u64,
    pub(super) kind: Kind,
    /// Other streams than the arena's have used it.
    pub(super) recorded: bool,
    pub(super) arena: u32,
    /// Neighbours in address, inside one reservation.
    pub(super) before: Index,
    pub(super) after: Index,
    /// Neighbours in a [`List`].
    previous: Index,
    next: Index,
}

impl Block {
    pub(super) fn new(start: u64, size: u64, kind: Kind, arena: u32) -> Block {
        let (before, after, previous, next) = (NONE, NONE, NONE, NONE);
        Block { start, size, requested: 0, kind, recorded: false, arena, before, after, previous, next }
    }

    pub(super) fn end(&self) -> u64 {
        self.start + self.size
    }
}

/// Spreads addresses, which are multiples of [`UNIT`], over a table.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ByAddress(u64);

impl Hasher for ByAddress {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&byte| self.write_u64(u64::from(byte)));
    }

    fn write_u64(&mut self, address: u64) {
        let mixed = (self.0 ^ address).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        self.0 = mixed ^ (mixed >> 32);
    }
}

/// All blocks of a cache.
#[derive(Debug, Default)]
pub(super) struct Blocks {
    all: Vec<Block>,
    spare: Vec<Index>,
    /// Blocks that somebody may name by their start: the program's, and pieces on their way out.
    named: HashMap<u64, Index, BuildHasherDefault<ByAddress>>,
}

impl Blocks {
    pub(super) fn get(&self, index: Index) -> &Block {
        &self.all[index as usize]
    }

    pub(super) fn get_mut(&mut self, index: Index) -> &mut Block {
        &mut self.all[index as usize]
    }

    /// How many there are.
    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        self.all.len() - self.spare.len()
    }

    /// Bytes of host memory that they take, about.
    pub(super) fn bytes(&self) -> usize {
        self.all.capacity() * size_of::<Block>() + self.named.capacity() * (size_of::<(u64, Index)>() + 1)
    }

    pub(super) fn add(&mut self, block: Block) -> Index {
        match self.spare.pop() {
            Some(index) => {
                self.all[index as usize] = block;
                index
            }
            None => {
                self.all.push(block);
                (self.all.len() - 1) as Index
            }
        }
    }

    /// The block with neighbours on neither side is no more.
    pub(super) fn remove(&mut self, index: Index) {
        self.spare.push(index);
    }

    /// The block keeps its first `size` bytes; the rest becomes another one, of the same kind. `NONE` if there is no rest.
    pub(super) fn split(&mut self, index: Index, size: u64) -> Index {
        let block = *self.get(index);
        if size >= block.size {
            return NONE;
        }
        let rest = Block::new(block.start + size, block.size - size, block.kind, block.arena);
        let rest = self.add(Block { before: index, after: block.after, ..rest });
        let first = self.get_mut(index);
        (first.size, first.after) = (size, rest);
        if block.after != NONE {
            self.get_mut(block.after).before = rest;
        }
        rest
    }

    /// The block takes in the one after it, which must be in no list and have no name.
    pub(super) fn join(&mut self, index: Index) {
        let gone = self.get(index).after;
        let Block { size, after, .. } = *self.get(gone);
        let block = self.get_mut(index);
        block.size += size;
        block.after = after;
        if after != NONE {
            self.get_mut(after).before = index;
        }
        self.remove(gone);
    }

    pub(super) fn name(&mut self, index: Index) {
        self.named.insert(self.get(index).start, index);
    }

    pub(super) fn named(&self, start: u64) -> Option<Index> {
        self.named.get(&start).copied()
    }

    pub(super) fn unname(&mut self, start: u64) -> Option<Index> {
        self.named.remove(&start)
    }
}

/// A list of blocks, newest first.
#[derive(Clone, Copy, Debug)]
pub(super) struct List(Index);

impl List {
    pub(super) const EMPTY: List = List(NONE);

    fn is_empty(self) -> bool {
        self.0 == NONE
    }

    pub(super) fn push(&mut self, blocks: &mut Blocks, index: Index) {
        let second = std::mem::replace(&mut self.0, index);
        let block = blocks.get_mut(index);
        (block.previous, block.next) = (NONE, second);
        if second != NONE {
            blocks.get_mut(second).previous = index;
        }
    }

    pub(super) fn remove(&mut self, blocks: &mut Blocks, index: Index) {
        let Block { previous, next, .. } = *blocks.get(index);
        match previous {
            NONE => self.0 = next,
            previous => blocks.get_mut(previous).next = next,
        }
        if next != NONE {
            blocks.get_mut(next).previous = previous;
        }
    }

    pub(super) fn iter(self, blocks: &Blocks) -> impl Iterator<Item = Index> {
        let there = |index: Index| (index != NONE).then_some(index);
        std::iter::successors(there(self.0), move |&index| there(blocks.get(index).next))
    }
}

/// The free blocks of an arena, by size.
#[derive(Debug)]
pub(super) struct Bins {
    lists: Box<[List; CLASSES]>,
    /// A bit for each list that is not empty.
    filled: [u64; CLASSES / 64],
}

impl Bins {
    pub(super) fn new() -> Bins {
        Bins { lists: Box::new([List::EMPTY; CLASSES]), filled: [0; CLASSES / 64] }
    }

    pub(super) fn insert(&mut self, blocks: &mut Blocks, index: Index) {
        let class = class_of(blocks.get(index).size);
        self.lists[class].push(blocks, index);
        self.filled[class / 64] |= 1 << (class % 64);
    }

    pub(super) fn remove(&mut self, blocks: &mut Blocks, index: Index) {
        let class = class_of(blocks.get(index).size);
        self.lists[class].remove(blocks, index);
        if self.lists[class].is_empty() {
            self.filled[class / 64] &= !(1 << (class % 64));
        }
    }

    /// The smallest free block of `size` bytes or more, the lowest of equals; of a class with very many, one of about that size.
    pub(super) fn find(&self, blocks: &Blocks, size: u64) -> Option<Index> {
        let class = class_of(size);
        self.best_of(blocks, class, size).or_else(|| self.best_of(blocks, self.filled_from(class + 1)?, size))
    }

    fn best_of(&self, blocks: &Blocks, class: usize, size: u64) -> Option<Index> {
        let looked_at = self.lists[class].iter(blocks).take(LOOKED_AT);
        let enough = looked_at.map(|index| (blocks.get(index), index)).filter(|(block, _)| block.size >= size);
        enough.min_by_key(|(block, _)| (block.size, block.start)).map(|(_, index)| index)
    }

    fn filled_from(&self, class: usize) -> Option<usize> {
        let mut word = class / 64;
        let mut bits = self.filled.get(word)? & (u64::MAX << (class % 64));
        while bits == 0 {
            word += 1;
            bits = *self.filled.get(word)?;
        }
        Some(word * 64 + bits.trailing_zeros() as usize)
    }

    /// Every free block that may have `size` bytes or more.
    pub(super) fn from(&self, blocks: &Blocks, size: u64) -> Vec<Index> {
        let lists = std::iter::successors(self.filled_from(class_of(size)), |class| self.filled_from(class + 1));
        lists.flat_map(|class| self.lists[class].iter(blocks)).collect()
    }
}

/// Which bin a block of `size` bytes is in.
fn class_of(size: u64) -> usize {
    let units = (size / UNIT).max(1);
    let log = units.ilog2();
    let class = match log.checked_sub(STEPS) {
        None => units,
        Some(shift) => u64::from(shift + 1) << STEPS | (units >> shift) & ((1 << STEPS) - 1),
    };
    (class as usize).min(CLASSES - 1)
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;

    #[test]
    fn classes_grow_with_sizes_and_are_narrow() {
        let powers = (13..35).flat_map(|log| [(1u64 << log) - 1, 1 << log, (1 << log) + 1]);
        let mut last = (0, 0);
        for units in (1..5000).chain(powers) {
            let class = class_of(units * UNIT);
            assert!(class < CLASSES);
            assert!(class == last.1 || class == last.1 + 1 || units > last.0 + 1, "{units}");
            last = (units, class);
            assert!(class_of((units + units / 16 + 2) * UNIT) > class, "{units}: a class is no wider than a sixteenth");
        }
        assert_eq!(class_of(1 << 44), CLASSES - 1 - 31);
    }

    #[test]
    fn splitting_and_joining_keeps_the_links() {
        let mut blocks = Blocks::default();
        let first = blocks.add(Block::new(0, 10 * UNIT, Kind::Free, 0));
        let second = blocks.split(first, 4 * UNIT);
        let third = blocks.split(second, UNIT);
        assert_eq!(blocks.split(third, 5 * UNIT), NONE);
        assert_eq!([first, second, third].map(|i| blocks.get(i).start / UNIT), [0, 4, 5]);
        blocks.join(second);
        assert_eq!((blocks.get(second).size, blocks.get(second).after, blocks.count()), (6 * UNIT, NONE, 2));
        blocks.join(first);
        assert_eq!((blocks.get(first).size, blocks.count()), (10 * UNIT, 1));
    }
}
