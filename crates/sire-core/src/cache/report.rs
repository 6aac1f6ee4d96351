//! What a cache tells: which addresses the program uses (a pause saves nothing else), and lists of segments and blocks in the shape of PyTorch's
//! memory snapshot.

use super::Cache;
use super::blocks::{Index, Kind, NONE};
use serde::Serialize;
use std::ops::Range;
use std::sync::Arc;

/// A block that the program uses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Live {
    pub(crate) start: u64,
    /// Bytes that were asked for.
    pub(crate) requested: u64,
}

/// Memory that lies side by side in one arena, as `torch.cuda.memory_snapshot` lists a segment.
#[derive(Debug, Serialize)]
pub(crate) struct Segment {
    pub(crate) device: u32,
    pub(crate) address: u64,
    pub(crate) total_size: u64,
    pub(crate) allocated_size: u64,
    pub(crate) active_size: u64,
    pub(crate) requested_size: u64,
    pub(crate) stream: u64,
    pub(crate) segment_type: &'static str,
    pub(crate) segment_pool_id: (u64, u64),
    pub(crate) is_expandable: bool,
    /// The region's number; the engine knows its tag.
    pub(crate) region: u32,
    pub(crate) frames: [(); 0],
    pub(crate) blocks: Vec<SegmentBlock>,
}

/// A block of a [`Segment`].
#[derive(Debug, Serialize)]
pub(crate) struct SegmentBlock {
    address: u64,
    size: u64,
    requested_size: u64,
    state: &'static str,
    frames: [(); 0],
}

impl Cache {
    /// The blocks in `range` that the program uses, in the order of addresses; also one that only ends there. The range lies inside one reservation.
    pub(crate) fn live(&mut self, range: &Range<u64>) -> Vec<Live> {
        let Some((_, reservation)) = self.reservations.range(..=range.start).next_back() else { return Vec::new() };
        let all = self.live_in(reservation.arena);
        let first = all.partition_point(|live| live.start + live.requested <= range.start);
        let last = all.partition_point(|live| live.start < range.end);
        all[first..last.max(first)].to_vec()
    }

    /// Bytes that were asked for, of the program's block that starts at `start`.
    pub(crate) fn requested(&self, start: u64) -> Option<u64> {
        let block = self.blocks.get(self.blocks.named(start)?);
        (block.kind == Kind::Used).then_some(block.requested)
    }

    /// The program's block that holds `address`.
    pub(crate) fn block(&mut self, address: u64) -> Option<Live> {
        if let Some(requested) = self.requested(address) {
            return Some(Live { start: address, requested });
        }
        self.live(&(address..address + 1)).first().copied()
    }

    /// All of an arena's, kept until one changes: a pause asks for each piece.
    fn live_in(&mut self, arena: u32) -> Arc<[Live]> {
        let number = arena;
        let arena = &self.arenas[number as usize];
        if let Some((version, live)) = &arena.live
            && *version == arena.version
        {
            return Arc::clone(live);
        }
        let used =
            self.walk(number).into_iter().map(|index| self.blocks.get(index)).filter(|block| block.kind == Kind::Used);
        let live: Arc<[Live]> = used.map(|block| Live { start: block.start, requested: block.requested }).collect();
        let arena = &mut self.arenas[number as usize];
        arena.live = Some((arena.version, Arc::clone(&live)));
        live
    }

    /// An arena's blocks, in the order of addresses.
    pub(super) fn walk(&self, arena: u32) -> Vec<Index> {
        let there = |index: Index| (index != NONE).then_some(index);
        let reservations = self.reservations.values().filter(|reservation| reservation.arena == arena);
        reservations
            .flat_map(|reservation| {
                std::iter::successors(there(reservation.first), |&index| there(self.blocks.get(index).after))
            })
            .collect()
    }

    /// Everything that is mapped. `pool_id`: the program's name of a private pool.
    pub(crate) fn segments(&self, device: u32, pool_id: impl Fn(u32) -> (u64, u64)) -> Vec<Segment> {
        let mut segments = Vec::new();
        for arena in 0..self.arenas.len() as u32 {
            let mut open: Option<Segment> = None;
            for index in self.walk(arena) {
                let block = self.blocks.get(index);
                if matches!(block.kind, Kind::Hole | Kind::Moving)
                    || open.as_ref().is_some_and(|s| s.address + s.total_size != block.start)
                {
                    segments.extend(open.take());
                }
                if !matches!(block.kind, Kind::Hole | Kind::Moving) {
                    let fresh = || self.empty_segment(device, arena, block.start, &pool_id);
                    open.get_or_insert_with(fresh).add(block);
                }
            }
            segments.extend(open);
        }
        segments
    }

    fn empty_segment(&self, device: u32, arena: u32, address: u64, pool_id: &impl Fn(u32) -> (u64, u64)) -> Segment {
        let key = self.arenas[arena as usize].key;
        Segment {
            device,
            address,
            total_size: 0,
            allocated_size: 0,
            active_size: 0,
            requested_size: 0,
            stream: key.stream.0,
            segment_type: if key.large { "large" } else { "small" },
            segment_pool_id: pool_id(key.pool),
            is_expandable: true,
            region: key.region.0,
            frames: [],
            blocks: Vec::new(),
        }
    }
}

impl Segment {
    fn add(&mut self, block: &super::blocks::Block) {
        let (used, waiting) = (block.kind == Kind::Used, block.kind == Kind::Waiting);
        self.total_size += block.size;
        self.allocated_size += if used { block.size } else { 0 };
        self.active_size += if used || waiting { block.size } else { 0 };
        self.requested_size += if used { block.requested } else { 0 };
        let state = match block.kind {
            Kind::Used => "active_allocated",
            Kind::Waiting => "active_awaiting_free",
            _ => "inactive",
        };
        let requested_size = if used { block.requested } else { 0 };
        self.blocks.push(SegmentBlock { address: block.start, size: block.size, requested_size, state, frames: [] });
    }
}
