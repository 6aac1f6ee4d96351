//! How memory comes into an arena and goes out again. Both take driver calls, which happen between two steps of the cache: what moves is a block of its own
//! meanwhile, so that nobody else counts on it.

use super::blocks::{Block, Index, Kind, NONE};
use super::{Cache, Figure, Reservation, rounded};
use std::ops::Range;

/// Small and middling requests bring more memory than they need, up to this; it is as much as PyTorch takes at once.
const AT_ONCE: u64 = 20 << 20;
/// Larger requests bring what they need.
const MIDDLING: u64 = 10 << 20;

/// What a request that nothing free can serve needs first.
#[derive(Debug)]
pub(crate) enum Step {
    /// Memory at `growth.map`; then [`Cache::grown`], or [`Cache::give_up`].
    Map(Growth),
    /// Addresses: at least so many bytes of them; then [`Cache::add_reservation`], and again.
    Reserve(u64),
    /// It would exceed the limit: these are the bytes that would have to be mapped.
    OverLimit(u64),
}

/// Memory that is on its way into an arena, for one request.
#[derive(Debug)]
pub(crate) struct Growth {
    /// Where memory is to be mapped: multiples of the granule.
    pub(crate) map: Range<u64>,
    /// The block that will serve: free memory before, what is to be mapped, free memory behind.
    index: Index,
    requested: u64,
}

/// A way to make room: a hole, and how much of it.
struct Fit {
    hole: Index,
    map: u64,
    /// Whether the free block behind the hole is needed too.
    with_after: bool,
}

impl Cache {
    /// What is needed for `requested` bytes in `arena`, when [`Cache::take`] has found nothing. `frugal`: no byte more than that.
    pub(crate) fn grow(&mut self, arena: u32, requested: u64, frugal: bool) -> Step {
        let size = rounded(requested);
        self.cool(arena);
        let holes: Vec<Index> = self.arenas[arena as usize].holes.iter(&self.blocks).collect();
        let fits = holes.into_iter().filter_map(|hole| self.fit(hole, size));
        let Some(fit) = fits.min_by_key(|fit| (fit.map, self.blocks.get(fit.hole).start)) else {
            return Step::Reserve(size.next_multiple_of(self.granule));
        };
        let mapped = self.counts.now(Figure::ReservedBytes) + self.coming;
        if self.limit.is_some_and(|limit| mapped + fit.map > limit) {
            return Step::OverLimit(fit.map);
        }
        let wish = if frugal || self.limit.is_some() { fit.map } else { self.wish(arena, size, fit.map) };
        let room = self.blocks.get(fit.hole).size;
        self.prepare(Fit { map: wish.min(room), ..fit }, requested)
    }

    /// How a hole and its free neighbours could hold `size` bytes.
    fn fit(&self, hole: Index, size: u64) -> Option<Fit> {
        let Block { size: room, before, after, .. } = *self.blocks.get(hole);
        let free = |index: Index| match index {
            NONE => 0,
            index => {
                Some(self.blocks.get(index)).filter(|block| block.kind == Kind::Free).map_or(0, |block| block.size)
            }
        };
        let missing = size.saturating_sub(free(before)).max(1).next_multiple_of(self.granule);
        if missing <= room {
            return Some(Fit { hole, map: missing, with_after: false });
        }
        (free(before) + room + free(after) >= size).then_some(Fit { hole, map: room, with_after: true })
    }

    /// Middling requests bring a little of what the arena has already, within limits: fewer driver calls, and hardly any slack.
    fn wish(&self, arena: u32, size: u64, missing: u64) -> u64 {
        if size >= MIDDLING {
            return missing;
        }
        let share = self.arenas[arena as usize].mapped / 32 / self.granule * self.granule;
        missing.max(share.min(AT_ONCE))
    }

    /// Makes one moving block of what will serve the request.
    fn prepare(&mut self, fit: Fit, requested: u64) -> Step {
        let hole = fit.hole;
        self.unlink_hole(hole);
        let rest = self.blocks.split(hole, fit.map);
        if rest != NONE {
            self.link_hole(rest);
        }
        let Block { start, size, before, after, .. } = *self.blocks.get(hole);
        let map = start..start + size;
        self.blocks.get_mut(hole).kind = Kind::Moving;
        if fit.with_after {
            self.unlink(after);
            self.blocks.join(hole);
        }
        let mut index = hole;
        if before != NONE && self.blocks.get(before).kind == Kind::Free {
            self.unlink(before);
            self.blocks.join(before);
            self.blocks.get_mut(before).kind = Kind::Moving;
            index = before;
        }
        self.coming += map.end - map.start;
        Step::Map(Growth { map, index, requested })
    }

    /// The memory is there, mapped as these pieces: the block is the program's.
    pub(crate) fn grown(&mut self, growth: Growth, pieces: &[Range<u64>]) -> u64 {
        let Growth { map, index, requested } = growth;
        let bytes = map.end - map.start;
        self.coming -= bytes;
        let arena = &mut self.arenas[self.blocks.get(index).arena as usize];
        arena.mapped += bytes;
        arena.pieces.extend(pieces.iter().map(|piece| (piece.start, piece.end - piece.start)));
        let changes = [(Figure::Segment, pieces.len() as u64), (Figure::ReservedBytes, bytes)];
        self.counts.up(arena.key.large, &changes);
        self.counts.driver_allocations += pieces.len() as u64;
        self.give_out(index, rounded(requested), requested)
    }

    /// The memory did not come. What could not be undone at once, in the order of addresses, is still on its way: [`Cache::gone`] will be said of it.
    pub(crate) fn give_up(&mut self, growth: Growth, stuck: &[Range<u64>]) {
        let Growth { map, index, .. } = growth;
        self.coming -= map.end - map.start;
        let (before, mut rest, after) = self.carve(index, &map);
        [before, after].into_iter().filter(|&side| side != NONE).for_each(|side| self.set_free(side));
        for piece in stuck {
            let (before, held, after) = self.carve(rest, piece);
            if before != NONE {
                self.set_hole(before);
            }
            self.blocks.name(held);
            rest = after;
        }
        if rest != NONE {
            self.set_hole(rest);
        }
    }

    /// Cuts `range` out of a moving block: what is before it, itself, and what is after it.
    fn carve(&mut self, index: Index, range: &Range<u64>) -> (Index, Index, Index) {
        let start = self.blocks.get(index).start;
        let (before, middle) = match range.start - start {
            0 => (NONE, index),
            before => (index, self.blocks.split(index, before)),
        };
        (before, middle, self.blocks.split(middle, range.end - range.start))
    }

    /// The arena has more addresses.
    pub(crate) fn add_reservation(&mut self, arena: u32, start: u64, size: u64) {
        let first = self.blocks.add(Block::new(start, size, Kind::Hole, arena));
        self.link_hole(first);
        self.reservations.insert(start, Reservation { size, arena, first });
    }

    /// The block, which is in no list, is a hole, together with its neighbours that are holes.
    fn set_hole(&mut self, mut index: Index) {
        let Block { before, after, .. } = *self.blocks.get(index);
        if after != NONE && self.blocks.get(after).kind == Kind::Hole {
            self.unlink_hole(after);
            self.blocks.join(index);
        }
        if before != NONE && self.blocks.get(before).kind == Kind::Hole {
            self.unlink_hole(before);
            self.blocks.join(before);
            index = before;
        }
        self.blocks.get_mut(index).kind = Kind::Hole;
        self.link_hole(index);
    }

    fn link_hole(&mut self, index: Index) {
        let arena = self.blocks.get(index).arena as usize;
        self.arenas[arena].holes.push(&mut self.blocks, index);
    }

    fn unlink_hole(&mut self, index: Index) {
        let arena = self.blocks.get(index).arena as usize;
        self.arenas[arena].holes.remove(&mut self.blocks, index);
    }

    /// Pieces that nobody uses, at least `enough` bytes of them if there are, are on their way out from now on: of each, [`Cache::gone`] or
    /// [`Cache::keep`] will be said. Private pools that live keep theirs.
    pub(crate) fn take_releasable(&mut self, enough: u64) -> Vec<Range<u64>> {
        let mut taken = Vec::new();
        let mut bytes = 0;
        for arena in 0..self.arenas.len() {
            let pool = self.arenas[arena].key.pool;
            if pool != 0 && self.pools.contains_key(&pool) {
                continue;
            }
            self.cool(arena as u32);
            for index in self.arenas[arena].bins.from(&self.blocks, self.granule) {
                if bytes >= enough {
                    return taken;
                }
                let before = taken.len();
                self.take_pieces(index, &mut taken);
                bytes += taken[before..].iter().map(|piece| piece.end - piece.start).sum::<u64>();
            }
        }
        taken
    }

    /// Takes the pieces that lie wholly inside a free block.
    fn take_pieces(&mut self, index: Index, taken: &mut Vec<Range<u64>>) {
        let block = *self.blocks.get(index);
        let pieces = &self.arenas[block.arena as usize].pieces;
        let inside = pieces.range(block.start..block.end()).map(|(&start, &size)| start..start + size);
        let inside: Vec<Range<u64>> = inside.filter(|piece| piece.end <= block.end()).collect();
        let Some((first, last)) = inside.first().zip(inside.last()) else { return };
        self.unlink(index);
        self.blocks.get_mut(index).kind = Kind::Moving;
        let (before, mut at, after) = self.carve(index, &(first.start..last.end));
        [before, after].into_iter().filter(|&side| side != NONE).for_each(|side| self.set_free(side));
        for piece in &inside {
            let rest = self.blocks.split(at, piece.end - piece.start);
            self.blocks.name(at);
            at = rest;
        }
        taken.extend(inside);
    }

    /// The piece at `start` is unmapped. Nothing happens if it was not on its way.
    pub(crate) fn gone(&mut self, start: u64) {
        let Some(index) = self.moving(start) else { return };
        self.blocks.unname(start);
        let arena = &mut self.arenas[self.blocks.get(index).arena as usize];
        // What never came all the way in is not counted.
        if let Some(bytes) = arena.pieces.remove(&start) {
            arena.mapped -= bytes;
            let large = arena.key.large;
            self.counts.down(large, &[(Figure::Segment, 1), (Figure::ReservedBytes, bytes)]);
            self.counts.driver_frees += 1;
        }
        self.set_hole(index);
    }

    /// The piece at `start` stays after all.
    pub(crate) fn keep(&mut self, start: u64) {
        if let Some(index) = self.moving(start) {
            self.blocks.unname(start);
            self.set_free(index);
        }
    }

    fn moving(&self, start: u64) -> Option<Index> {
        self.blocks.named(start).filter(|&index| self.blocks.get(index).kind == Kind::Moving)
    }

    /// Addresses that hold no memory any more and that nobody will need soon: start and bytes. The cache has forgotten them.
    pub(crate) fn take_empty(&mut self) -> Vec<(u64, u64)> {
        let is_empty = |reservation: &Reservation| {
            let block = self.blocks.get(reservation.first);
            block.kind == Kind::Hole && block.after == NONE
        };
        let empty: Vec<u64> = self.reservations.iter().filter(|(_, r)| is_empty(r)).map(|(&start, _)| start).collect();
        empty.into_iter().filter_map(|start| self.forget(start)).collect()
    }

    /// A reservation that is one hole.
    fn forget(&mut self, start: u64) -> Option<(u64, u64)> {
        let reservation = self.reservations.remove(&start)?;
        self.unlink_hole(reservation.first);
        self.blocks.remove(reservation.first);
        Some((start, reservation.size))
    }
}
