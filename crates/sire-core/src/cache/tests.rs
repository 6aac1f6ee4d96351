//! The cache against a naive twin: random lives of a few arenas, with memory that sometimes does not come and sometimes does not go. The twin knows only which
//! addresses the program was given, and finds everything else by looking at every block.
#![allow(clippy::expect_used, clippy::panic)]

use super::blocks::{Block, Index, Kind, NONE, UNIT};
use super::*;
use proptest::prelude::*;
use std::ops::Range;

const GRANULE: u64 = 16 * UNIT;
const MIB: u64 = 1 << 20;

/// What the program holds: start, bytes asked for, arena; and whether it has been freed and waits.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Held {
    start: u64,
    requested: u64,
    arena: u32,
    waits: bool,
}

#[derive(Debug)]
struct Twin {
    cache: Cache,
    held: Vec<Held>,
    /// Pieces that are on their way out.
    leaving: Vec<Range<u64>>,
    next_address: u64,
    peak: u64,
}

#[derive(Clone, Debug)]
enum Act {
    Allocate {
        arena: u8,
        size: u64,
        fails: bool,
        stuck: bool,
    },
    Free {
        which: usize,
        later: bool,
    },
    Record {
        which: usize,
        stream: u64,
    },
    Pass(usize),
    Trim {
        enough: u64,
    },
    /// Of what is leaving, some goes and some stays.
    Decide {
        which: usize,
        stays: bool,
    },
    Limit(Option<u64>),
    GiveBackAddresses,
}

fn acts() -> impl Strategy<Value = Act> {
    let size = prop_oneof![3 => 1..8 * UNIT, 3 => 1..64 * UNIT, 1 => MIB - 2..MIB + 8 * UNIT];
    prop_oneof![
        8 => (0..4u8, size, any::<u8>(), any::<bool>())
            .prop_map(|(arena, size, luck, stuck)| Act::Allocate { arena, size, fails: luck < 20, stuck }),
        6 => (any::<usize>(), 0..8u8).prop_map(|(which, luck)| Act::Free { which, later: luck == 0 }),
        1 => (any::<usize>(), 0..3u64).prop_map(|(which, stream)| Act::Record { which, stream }),
        2 => any::<usize>().prop_map(Act::Pass),
        1 => prop_oneof![Just(u64::MAX), 1..200 * UNIT].prop_map(|enough| Act::Trim { enough }),
        2 => (any::<usize>(), any::<bool>()).prop_map(|(which, stays)| Act::Decide { which, stays }),
        1 => prop_oneof![Just(None), (0..400 * UNIT).prop_map(Some)].prop_map(Act::Limit),
        1 => Just(Act::GiveBackAddresses),
    ]
}

impl Twin {
    fn new() -> Twin {
        Twin { cache: Cache::new(GRANULE), held: Vec::new(), leaving: Vec::new(), next_address: 1 << 30, peak: 0 }
    }

    fn blocks(&self, arena: u32) -> Vec<Block> {
        self.cache.walk(arena).into_iter().map(|index| *self.cache.blocks.get(index)).collect()
    }

    fn key(arena: u8, size: u64) -> Key {
        Key::of(RegionId(u32::from(arena) / 2), ProgramStream(u64::from(arena) % 2), 0, size)
    }

    fn allocate(&mut self, arena: u8, size: u64, fails: bool, stuck: bool) {
        let key = Twin::key(arena, size);
        let arena = self.cache.arena(key).unwrap_or_else(|| self.cache.add_arena(key));
        let warm = self.cache.arenas[arena as usize].warm;
        if warm != NONE && self.cache.blocks.get(warm).size == rounded(size) {
            let start = self.cache.blocks.get(warm).start;
            assert_eq!(self.cache.take(arena, size), Some(start), "what was freed last fits");
            return self.held.push(Held { start, requested: size, arena, waits: false });
        }
        self.cache.cool(arena);
        let free = self.blocks(arena).into_iter().filter(|block| block.kind == Kind::Free);
        let best = free.filter(|block| block.size >= rounded(size)).min_by_key(|block| block.size);
        let Some(start) = self.cache.take(arena, size) else {
            assert_eq!(best.map(|b| b.size), None, "{size} bytes were there");
            return self.grow(arena, size, fails, stuck);
        };
        let holder = best.expect("nothing was there").size;
        let given = self.leaving.iter().all(|piece| start + rounded(size) <= piece.start || piece.end <= start);
        assert!(given, "what is leaving was given out");
        let after = self.blocks(arena).into_iter().find(|block| block.start == start + rounded(size));
        let rest = after.filter(|block| block.kind == Kind::Free).map_or(0, |block| block.size);
        assert_eq!(rounded(size) + rest, holder, "the best fit was not taken");
        self.held.push(Held { start, requested: size, arena, waits: false });
    }

    fn grow(&mut self, arena: u32, size: u64, fails: bool, stuck: bool) {
        let growth = loop {
            match self.cache.grow(arena, size, true) {
                Step::Map(growth) => break growth,
                Step::Reserve(bytes) => {
                    let bytes = bytes.max(64 * GRANULE);
                    self.cache.add_reservation(arena, self.next_address, bytes);
                    self.next_address += bytes + GRANULE;
                }
                Step::OverLimit(bytes) => {
                    let mapped = self.cache.counts.now(Figure::ReservedBytes);
                    return assert!(self.cache.limit.is_some_and(|limit| mapped + bytes > limit));
                }
            }
        };
        let map = growth.map.clone();
        assert!((map.start | map.end).is_multiple_of(GRANULE) && map.end - map.start < size + GRANULE, "{map:?}");
        let middle = map.start + (map.end - map.start) / GRANULE / 2 * GRANULE;
        let mut pieces = vec![map.start..middle, middle..map.end];
        pieces.retain(|piece| !piece.is_empty());
        if fails {
            pieces.truncate(usize::from(stuck));
            self.cache.give_up(growth, &pieces);
            return self.leaving.extend(pieces);
        }
        let start = self.cache.grown(growth, &pieces);
        self.held.push(Held { start, requested: size, arena, waits: false });
    }

    fn free(&mut self, which: usize, later: bool) {
        let used: Vec<usize> = (0..self.held.len()).filter(|&at| !self.held[at].waits).collect();
        let Some(&at) = used.get(which % used.len().max(1)) else { return };
        let start = self.held[at].start;
        assert!(self.cache.free(start + UNIT).is_none() || self.held.iter().any(|held| held.start == start + UNIT));
        self.held.retain(|held| held.start != start + UNIT);
        let at = self.held.iter().position(|held| held.start == start).expect("it is held");
        let waits = if later {
            assert!(self.cache.free_later(start));
            true
        } else {
            match self.cache.free(start) {
                Some(Freed::Ready) => false,
                Some(Freed::After(streams)) => {
                    assert!(!streams.is_empty());
                    true
                }
                None => panic!("{start:#x} was the program's"),
            }
        };
        assert!(self.cache.free(start).is_none() || !waits, "freed twice");
        if waits {
            self.held[at].waits = true;
        } else {
            self.held.remove(at);
        }
    }

    fn act(&mut self, act: Act) {
        match act {
            Act::Allocate { arena, size, fails, stuck } => self.allocate(arena, size, fails, stuck),
            Act::Free { which, later } => self.free_unless_neighbour(which, later),
            Act::Record { which, stream } => {
                if let Some(held) = self.held.get(which % self.held.len().max(1)) {
                    assert_eq!(self.cache.record(held.start, ProgramStream(stream)), !held.waits);
                }
            }
            Act::Pass(which) => {
                let waiting: Vec<u64> = self.held.iter().filter(|held| held.waits).map(|held| held.start).collect();
                if let Some(&start) = waiting.get(which % waiting.len().max(1)) {
                    self.cache.passed(start);
                    self.held.retain(|held| held.start != start);
                }
            }
            Act::Trim { enough } => {
                let taken = self.cache.take_releasable(enough);
                let bytes: u64 = taken.iter().map(|piece| piece.end - piece.start).sum();
                self.leaving.extend(taken);
                assert!(bytes >= enough.min(1) || self.cache.take_releasable(1).is_empty());
            }
            Act::Decide { which, stays } => {
                if !self.leaving.is_empty() {
                    let piece = self.leaving.swap_remove(which % self.leaving.len());
                    let was_in = self.cache.arenas.iter().any(|arena| arena.pieces.contains_key(&piece.start));
                    if stays && was_in { self.cache.keep(piece.start) } else { self.cache.gone(piece.start) }
                }
            }
            Act::Limit(limit) => self.cache.set_limit(limit),
            Act::GiveBackAddresses => drop(self.cache.take_empty()),
        }
    }

    /// Frees by a start that is not the next block's, so that `free` can also be asked about an address inside.
    fn free_unless_neighbour(&mut self, which: usize, later: bool) {
        if !self.held.iter().any(|a| self.held.iter().any(|b| b.start == a.start + UNIT)) {
            return self.free(which, later);
        }
        let used: Vec<Held> = self.held.iter().filter(|held| !held.waits).copied().collect();
        if let Some(held) = used.get(which % used.len().max(1)) {
            match self.cache.free(held.start).expect("it was the program's") {
                Freed::Ready => self.held.retain(|other| other != held),
                Freed::After(_) => {
                    self.held.iter_mut().filter(|other| *other == held).for_each(|other| other.waits = true)
                }
            }
        }
    }

    fn check(&mut self) {
        let mut used = Vec::new();
        let mut sums = [0u64; FIGURES.len()];
        for arena in 0..self.cache.arenas.len() as u32 {
            self.check_arena(arena, &mut used, &mut sums);
        }
        let mut held: Vec<(u64, u64, bool)> = self.held.iter().map(|h| (h.start, h.requested, h.waits)).collect();
        held.sort_unstable();
        used.sort_unstable();
        assert_eq!(held, used, "the program and the cache disagree");
        assert!(held.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0), "two allocations overlap");
        let named = self.cache.counts.named();
        for (figure, sum) in FIGURES.iter().zip(sums) {
            let value = |pool: &str, suffix: &str| named[&format!("{figure}.{pool}.{suffix}")];
            assert_eq!(value("all", "current"), sum, "{figure}");
            assert_eq!(value("small_pool", "current") + value("large_pool", "current"), sum, "{figure}");
            assert_eq!(value("all", "allocated") - value("all", "freed"), sum, "{figure}");
            assert!(value("all", "peak") >= sum);
        }
        self.peak = self.peak.max(sums[Figure::ReservedBytes as usize]);
        assert_eq!(named["reserved_bytes.all.peak"], self.peak);
    }

    fn check_arena(&mut self, arena: u32, used: &mut Vec<(u64, u64, bool)>, sums: &mut [u64; FIGURES.len()]) {
        let cache = &self.cache;
        let mine = || cache.reservations.iter().filter(|(_, reservation)| reservation.arena == arena);
        let mut free: Vec<Index> = Vec::new();
        for (&start, reservation) in mine() {
            let mut at = start;
            let mut before: Option<Block> = None;
            let there = |index: Index| (index != NONE).then_some(index);
            for index in std::iter::successors(there(reservation.first), |&i| there(cache.blocks.get(i).after)) {
                let block = *cache.blocks.get(index);
                assert!(block.start == at && block.size > 0 && (block.start | block.size).is_multiple_of(UNIT));
                let alike = |kind| before.is_some_and(|b| b.kind == kind) && block.kind == kind;
                assert!(!alike(Kind::Free) && !alike(Kind::Hole), "neighbours were not joined at {at:#x}");
                let mut add = |figure: Figure, by: u64| sums[figure as usize] += by;
                match block.kind {
                    Kind::Free | Kind::Warm => {
                        assert_eq!(block.kind == Kind::Warm, cache.arenas[arena as usize].warm == index);
                        if block.kind == Kind::Free {
                            free.push(index);
                        }
                        add(Figure::InactiveSplit, 1);
                        add(Figure::InactiveSplitBytes, block.size);
                    }
                    Kind::Used | Kind::Waiting => {
                        let waits = block.kind == Kind::Waiting;
                        used.push((block.start, block.requested, waits));
                        assert_eq!(block.size, rounded(block.requested));
                        add(Figure::Active, 1);
                        add(Figure::ActiveBytes, block.size);
                        add(Figure::Allocation, u64::from(!waits));
                        add(Figure::AllocatedBytes, if waits { 0 } else { block.size });
                        add(Figure::RequestedBytes, if waits { 0 } else { block.requested });
                    }
                    Kind::Hole | Kind::Moving => {}
                }
                at = block.end();
                before = Some(block);
            }
            assert_eq!(at, start + reservation.size, "a reservation is not covered");
        }
        let mut binned = cache.arenas[arena as usize].bins.from(&cache.blocks, UNIT);
        binned.sort_unstable();
        free.sort_unstable();
        assert_eq!(binned, free);
        let arena = &cache.arenas[arena as usize];
        assert_eq!(arena.mapped, arena.pieces.values().sum::<u64>());
        sums[Figure::Segment as usize] += arena.pieces.len() as u64;
        sums[Figure::ReservedBytes as usize] += arena.mapped;
        assert!(mine().all(|(start, r)| start + r.size <= self.next_address));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, max_shrink_iters: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_lives(acts in prop::collection::vec(acts(), 1..250)) {
        let mut twin = Twin::new();
        for act in acts {
            twin.act(act);
            twin.check();
        }
    }
}

/// A cache with one reservation of 1 GiB at 1 GiB, to whose requests memory always comes.
fn take(cache: &mut Cache, key: Key, size: u64) -> u64 {
    let arena = cache.arena(key).unwrap_or_else(|| cache.add_arena(key));
    if let Some(start) = cache.take(arena, size) {
        return start;
    }
    loop {
        match cache.grow(arena, size, false) {
            Step::Map(growth) => {
                let piece = growth.map.clone();
                return cache.grown(growth, &[piece]);
            }
            Step::Reserve(_) => cache.add_reservation(arena, 1 << 30, 1 << 30),
            Step::OverLimit(_) => panic!("no limit was set"),
        }
    }
}

fn key(size: u64) -> Key {
    Key::of(RegionId(0), ProgramStream(0), 0, size)
}

#[test]
fn free_memory_at_the_end_grows_instead_of_being_left_behind() {
    let mut cache = Cache::new(2 * MIB);
    let sizes = [12 * MIB, 16 * MIB, 20 * MIB];
    for size in sizes {
        let start = take(&mut cache, key(size), size);
        assert_eq!(start, 1 << 30);
        assert_eq!(cache.free(start), Some(Freed::Ready));
    }
    // An allocator of fixed segments would have reserved the sum of these.
    assert_eq!(cache.counts.now(Figure::ReservedBytes), 20 * MIB);
}

#[test]
fn a_private_pool_keeps_its_memory_until_it_is_released() {
    let mut cache = Cache::new(2 * MIB);
    let pool = cache.add_pool();
    assert!(cache.hold_pool(pool));
    let start = take(&mut cache, Key { pool, ..key(MIB) }, MIB);
    cache.free(start);
    assert!(cache.take_releasable(u64::MAX).is_empty());
    assert!(!cache.release_pool(pool) && cache.take_releasable(u64::MAX).is_empty());
    assert!(cache.release_pool(pool) && !cache.hold_pool(pool));
    let piece = 1 << 30..(1 << 30) + 2 * MIB;
    assert_eq!(cache.take_releasable(u64::MAX), std::slice::from_ref(&piece));
    cache.gone(piece.start);
    assert_eq!(cache.take_empty(), [(1 << 30, 1 << 30)]);
    assert_eq!(cache.blocks.count(), 0);
}

#[test]
fn what_other_streams_have_used_waits_for_them() {
    let mut cache = Cache::new(2 * MIB);
    let start = take(&mut cache, key(UNIT), UNIT);
    for stream in [7, 0, 7, 8] {
        assert!(cache.record(start, ProgramStream(stream)));
    }
    assert_eq!(cache.free(start), Some(Freed::After(vec![ProgramStream(7), ProgramStream(8)])));
    let other = take(&mut cache, key(UNIT), UNIT);
    assert_ne!(other, start);
    cache.passed(start);
    assert_eq!(take(&mut cache, key(UNIT), UNIT), start);
    assert_eq!(cache.free(start), Some(Freed::Ready), "the streams of its last life are forgotten");
}

#[test]
fn live_ranges_are_the_programs_alone() {
    let mut cache = Cache::new(2 * MIB);
    let starts: Vec<u64> = (0..6).map(|n| take(&mut cache, key(MIB), MIB - n)).collect();
    cache.free(starts[1]);
    cache.free_later(starts[2]);
    let live: Vec<u64> = cache.live(&(starts[0] + 5..starts[5])).iter().map(|live| live.start).collect();
    assert_eq!(live, [starts[0], starts[3], starts[4]]);
    assert_eq!(cache.block(starts[3] + MIB - 4), Some(Live { start: starts[3], requested: MIB - 3 }));
    assert_eq!(cache.block(starts[3] + MIB - 3), None);
    let segments = cache.segments(4, |_| (0, 0));
    let [segment] = &segments[..] else { panic!("{segments:?}") };
    assert_eq!((segment.total_size, segment.blocks.len(), segment.allocated_size), (6 * MIB, 6, 4 * MIB));
}

#[test]
fn growth_brings_more_than_it_needs_only_within_limits() {
    let mut cache = Cache::new(2 * MIB);
    for _ in 0..120 {
        take(&mut cache, key(3 * MIB), 3 * MIB);
    }
    let reserved = cache.counts.now(Figure::ReservedBytes);
    assert!((360 * MIB..=374 * MIB).contains(&reserved), "{reserved}");
    assert!(cache.counts.named()["segment.all.current"] < 90);
    cache.set_limit(Some(reserved));
    let arena = cache.arena(key(3 * MIB)).expect("it is there");
    while cache.take(arena, 3 * MIB).is_some() {}
    assert!(matches!(cache.grow(arena, 3 * MIB, false), Step::OverLimit(_)));
}
