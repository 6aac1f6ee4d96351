//! A cache of device memory: what stands between a program that allocates a thousand times a second and a driver to which each allocation
//! is several slow calls. It decides and counts, and calls nobody: [`heap::caching`](crate::heap::caching) does what it says, asks it again, and tells it
//! what came of it. So all of it can be tested as what it is, a data structure, against a naive twin (`tests.rs`).
//!
//! There is one per device. An *arena* holds the blocks of one (region, stream, private pool), the small ones (up to 1 MiB) in one, the large ones in another:
//! memory that was freed is given out again only where stream order alone makes that right, and a region's pause takes nobody
//! else's memory. An arena's addresses are reserved once, many more than there is memory, and memory is mapped into them where it
//! is needed: at the end, or in a hole. So free space that touches the end grows with it, where an allocator with fixed segments would need another segment.
//!
//! Addresses of a reservation are cut into blocks without a gap ([`Kind`]). A *piece* is what was mapped in one go and can be given back by itself,
//! when all of it is free. Neighbours that are both free are one block, always; so are holes.
//!
//! A program meets it behind a lock, as a [`depot`]. [`blocks`] has the links and bins, [`grow`] maps and gives back, [`counts`] counts, [`report`] tells.

mod blocks;
mod counts;
mod depot;
mod grow;
mod report;
#[cfg(all(test, not(feature = "shuttle")))]
mod tests;

use crate::driver::ProgramStream;
use crate::terms::RegionId;
use blocks::{Bins, Block, Blocks, Index, List, NONE};
use counts::Figure;
use std::collections::{BTreeMap, HashMap};

pub(crate) use blocks::{Kind, UNIT};
pub(crate) use counts::Counts;
#[cfg(test)]
use counts::FIGURES;
pub(crate) use depot::{Depot, Door, Quick, Waiting};
pub(crate) use grow::{Growth, Step};
pub(crate) use report::{Live, Segment};

/// The largest small block.
pub(crate) const SMALL: u64 = 1 << 20;

/// Whose blocks an arena holds.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Key {
    pub(crate) region: RegionId,
    pub(crate) stream: ProgramStream,
    /// A private pool's number; 0: none.
    pub(crate) pool: u32,
    /// Whether it holds blocks larger than [`SMALL`].
    pub(crate) large: bool,
}

impl Key {
    /// The arena for a request of `size` bytes.
    pub(crate) fn of(region: RegionId, stream: ProgramStream, pool: u32, size: u64) -> Key {
        Key { region, stream, pool, large: size > SMALL }
    }
}

/// Addresses of an arena.
#[derive(Clone, Copy, Debug)]
struct Reservation {
    size: u64,
    arena: u32,
    /// Its first block.
    first: Index,
}

#[derive(Debug)]
struct Arena {
    key: Key,
    bins: Bins,
    holes: List,
    /// The block that was freed last, or `NONE`.
    warm: Index,
    /// Start and bytes of what was mapped in one go.
    pieces: BTreeMap<u64, u64>,
    mapped: u64,
    /// Changes with every block that is given out or taken back.
    version: u64,
    /// What the program uses, as of a version.
    live: Option<(u64, std::sync::Arc<[Live]>)>,
}

/// What became of a block that the program has freed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Freed {
    /// It can be given out again.
    Ready,
    /// First, what these streams have been given until now must have been done: then [`Cache::passed`].
    After(Vec<ProgramStream>),
}

/// See the [module documentation](self).
#[derive(Debug)]
pub(crate) struct Cache {
    /// Memory comes in multiples of this.
    granule: u64,
    blocks: Blocks,
    arenas: Vec<Arena>,
    keys: HashMap<Key, u32>,
    /// The arena that was asked for last.
    last: Option<(Key, u32)>,
    reservations: BTreeMap<u64, Reservation>,
    /// Streams that have used a block besides its arena's.
    recorded: HashMap<u64, Vec<ProgramStream>>,
    /// Private pools that live, and how many captures and graphs hold each.
    pools: BTreeMap<u32, u32>,
    next_pool: u32,
    limit: Option<u64>,
    /// Bytes on their way in.
    coming: u64,
    pub(crate) counts: Counts,
}

impl Cache {
    /// An empty cache. Memory is mapped in multiples of `granule` bytes, which is a multiple of [`UNIT`].
    pub(crate) fn new(granule: u64) -> Cache {
        Cache {
            granule,
            blocks: Blocks::default(),
            arenas: Vec::new(),
            keys: HashMap::new(),
            last: None,
            reservations: BTreeMap::new(),
            recorded: HashMap::new(),
            pools: BTreeMap::new(),
            next_pool: 1,
            limit: None,
            coming: 0,
            counts: Counts::default(),
        }
    }

    /// The number of the arena for `key`, if there is one.
    #[inline]
    pub(crate) fn arena(&mut self, key: Key) -> Option<u32> {
        if let Some((last, arena)) = self.last
            && last == key
        {
            return Some(arena);
        }
        let arena = *self.keys.get(&key)?;
        self.last = Some((key, arena));
        Some(arena)
    }

    /// A new arena.
    pub(crate) fn add_arena(&mut self, key: Key) -> u32 {
        let arena = self.arenas.len() as u32;
        let (bins, pieces) = (Bins::new(), BTreeMap::new());
        self.arenas.push(Arena {
            key,
            bins,
            holes: List::EMPTY,
            warm: NONE,
            pieces,
            mapped: 0,
            version: 0,
            live: None,
        });
        self.keys.insert(key, arena);
        arena
    }

    /// A block for `requested` bytes out of what is free; `None` if there is none.
    #[inline]
    pub(crate) fn take(&mut self, arena: u32, requested: u64) -> Option<u64> {
        let size = rounded(requested);
        let warm = self.arenas[arena as usize].warm;
        if warm != NONE {
            if self.blocks.get(warm).size == size {
                return Some(self.give_back(warm, requested));
            }
            self.cool(arena);
        }
        let index = self.arenas[arena as usize].bins.find(&self.blocks, size)?;
        self.unlink(index);
        Some(self.give_out(index, size, requested))
    }

    /// A warm block is the program's again: it has its name already.
    #[inline]
    fn give_back(&mut self, index: Index, requested: u64) -> u64 {
        let block = self.blocks.get_mut(index);
        (block.kind, block.requested, block.recorded) = (Kind::Used, requested, false);
        let Block { start, size, arena, .. } = *block;
        self.arenas[arena as usize].warm = NONE;
        let large = self.arenas[arena as usize].key.large;
        self.counts.down(large, &[(Figure::InactiveSplit, 1), (Figure::InactiveSplitBytes, size)]);
        self.count_use(arena, size, requested);
        start
    }

    /// The block that was freed last goes where free blocks are.
    fn cool(&mut self, arena: u32) {
        let arena = &mut self.arenas[arena as usize];
        let index = std::mem::replace(&mut arena.warm, NONE);
        if index != NONE {
            let Block { start, size, .. } = *self.blocks.get(index);
            self.counts.down(arena.key.large, &[(Figure::InactiveSplit, 1), (Figure::InactiveSplitBytes, size)]);
            self.blocks.unname(start);
            self.set_free(index);
        }
    }

    /// The first `size` bytes of a block that is in no bin become the program's, the rest is free.
    fn give_out(&mut self, index: Index, size: u64, requested: u64) -> u64 {
        let rest = self.blocks.split(index, size);
        let block = self.blocks.get_mut(index);
        (block.kind, block.requested, block.recorded) = (Kind::Used, requested, false);
        let Block { start, size, arena, .. } = *block;
        if rest != NONE {
            self.set_free(rest);
        }
        self.blocks.name(index);
        self.count_use(arena, size, requested);
        start
    }

    #[inline]
    fn count_use(&mut self, arena: u32, size: u64, requested: u64) {
        let arena = &mut self.arenas[arena as usize];
        arena.version += 1;
        let changes = [
            (Figure::Allocation, 1),
            (Figure::Active, 1),
            (Figure::AllocatedBytes, size),
            (Figure::ActiveBytes, size),
            (Figure::RequestedBytes, requested),
        ];
        self.counts.up(arena.key.large, &changes);
    }

    /// The program gives the block at `start` back; `None` if none of its blocks starts there.
    #[inline]
    pub(crate) fn free(&mut self, start: u64) -> Option<Freed> {
        let index = self.end_use(start)?;
        if self.blocks.get(index).recorded {
            self.blocks.get_mut(index).kind = Kind::Waiting;
            return Some(Freed::After(self.recorded.remove(&start).unwrap_or_default()));
        }
        self.warm(index);
        Some(Freed::Ready)
    }

    /// The block can be given out again, at once and as it is; the one that was freed before it is free like any other.
    #[inline]
    fn warm(&mut self, index: Index) {
        let Block { size, arena, .. } = *self.blocks.get(index);
        self.cool(arena);
        let large = self.arenas[arena as usize].key.large;
        self.counts.down(large, &[(Figure::Active, 1), (Figure::ActiveBytes, size)]);
        self.counts.up(large, &[(Figure::InactiveSplit, 1), (Figure::InactiveSplitBytes, size)]);
        self.blocks.get_mut(index).kind = Kind::Warm;
        self.arenas[arena as usize].warm = index;
    }

    /// The same, for a block that is not to be given out before [`Cache::passed`]. False if none of the program's blocks starts there.
    pub(crate) fn free_later(&mut self, start: u64) -> bool {
        let Some(index) = self.end_use(start) else { return false };
        self.recorded.remove(&start);
        self.blocks.get_mut(index).kind = Kind::Waiting;
        true
    }

    /// A block that the program uses is no longer counted as allocated.
    fn end_use(&mut self, start: u64) -> Option<Index> {
        let index = self.blocks.named(start)?;
        let Block { kind, size, requested, arena, .. } = *self.blocks.get(index);
        if kind != Kind::Used {
            return None;
        }
        let arena = &mut self.arenas[arena as usize];
        arena.version += 1;
        let changes = [(Figure::Allocation, 1), (Figure::AllocatedBytes, size), (Figure::RequestedBytes, requested)];
        self.counts.down(arena.key.large, &changes);
        Some(index)
    }

    /// Nothing uses the waiting block at `start` any more.
    pub(crate) fn passed(&mut self, start: u64) {
        if let Some(index) = self.blocks.named(start).filter(|&index| self.blocks.get(index).kind == Kind::Waiting) {
            self.release(index);
        }
    }

    /// A named block can be given out again.
    fn release(&mut self, index: Index) {
        let Block { start, size, arena, .. } = *self.blocks.get(index);
        self.blocks.unname(start);
        self.counts.down(self.arenas[arena as usize].key.large, &[(Figure::Active, 1), (Figure::ActiveBytes, size)]);
        self.set_free(index);
    }

    /// The block, which is in no list, is free, together with its free neighbours.
    fn set_free(&mut self, mut index: Index) {
        let Block { before, after, .. } = *self.blocks.get(index);
        if after != NONE && self.blocks.get(after).kind == Kind::Free {
            self.unlink(after);
            self.blocks.join(index);
        }
        if before != NONE && self.blocks.get(before).kind == Kind::Free {
            self.unlink(before);
            self.blocks.join(before);
            index = before;
        }
        let block = self.blocks.get_mut(index);
        block.kind = Kind::Free;
        let (arena, size) = (block.arena as usize, block.size);
        self.arenas[arena].bins.insert(&mut self.blocks, index);
        let changes = [(Figure::InactiveSplit, 1), (Figure::InactiveSplitBytes, size)];
        self.counts.up(self.arenas[arena].key.large, &changes);
    }

    /// Takes a free block out of its bin.
    fn unlink(&mut self, index: Index) {
        let Block { arena, size, .. } = *self.blocks.get(index);
        let arena = &mut self.arenas[arena as usize];
        arena.bins.remove(&mut self.blocks, index);
        self.counts.down(arena.key.large, &[(Figure::InactiveSplit, 1), (Figure::InactiveSplitBytes, size)]);
    }

    /// `stream` has used the block at `start`, too. False if the program has no block there.
    pub(crate) fn record(&mut self, start: u64, stream: ProgramStream) -> bool {
        let Some(index) = self.blocks.named(start) else { return false };
        let block = self.blocks.get_mut(index);
        if block.kind != Kind::Used {
            return false;
        }
        if self.arenas[block.arena as usize].key.stream != stream {
            block.recorded = true;
            let streams = self.recorded.entry(start).or_default();
            if !streams.contains(&stream) {
                streams.push(stream);
            }
        }
        true
    }

    /// A private pool: its blocks serve nobody else, and its memory stays, until it was released as often as it was held.
    pub(crate) fn add_pool(&mut self) -> u32 {
        let pool = self.next_pool;
        self.next_pool += 1;
        self.pools.insert(pool, 1);
        pool
    }

    /// Once more; false if the pool lives no more.
    pub(crate) fn hold_pool(&mut self, pool: u32) -> bool {
        self.pools.get_mut(&pool).map(|users| *users += 1).is_some()
    }

    /// Once less; true if the pool lives no more. What is free in it can then be given back; what the program still uses stays.
    pub(crate) fn release_pool(&mut self, pool: u32) -> bool {
        let Some(users) = self.pools.get_mut(&pool) else { return true };
        *users -= 1;
        let gone = *users == 0;
        if gone {
            self.pools.remove(&pool);
        }
        gone
    }

    /// No private pool lives any more.
    pub(crate) fn end_pools(&mut self) {
        self.pools.clear();
    }

    /// The most bytes of memory that may be mapped; what is paused counts, too.
    pub(crate) fn set_limit(&mut self, bytes: Option<u64>) {
        self.limit = bytes;
    }

    /// Bytes of host memory that the cache takes to know what is where, about.
    pub(crate) fn bookkeeping(&self) -> u64 {
        (self.blocks.bytes() + self.arenas.len() * (size_of::<Arena>() + 4096)) as u64
    }
}

/// What a request takes.
fn rounded(requested: u64) -> u64 {
    requested.max(1).next_multiple_of(UNIT)
}
