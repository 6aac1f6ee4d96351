//! Which tier a backup goes to, and which backups make way: pure functions of what is known. `backup="auto"` means: host memory first,
//! shared where that is asked for and the content may be clean; the disk where host memory would not do. When host memory has
//! become scarce, the backups of regions that were used least recently move to the disk, in the background, until there is room for the
//! next pause.

use crate::terms::RegionId;

/// Above this share of the limit backups make way, until it is below the second.
const HIGH: u64 = 90;
const LOW: u64 = 75;

/// What is known when an automatic backup needs room.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Facts {
    /// Bytes.
    pub(crate) need: u64,
    /// Bytes that host memory has left for backups.
    pub(crate) host_left: u64,
    /// Another process may have the content, and sharing was asked for.
    pub(crate) may_share: bool,
}

/// Where an automatic backup goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Choice {
    Host,
    Shared,
    Disk,
}

/// Chooses.
pub(crate) fn choose(facts: Facts) -> Choice {
    match facts {
        Facts { need, host_left, .. } if need > host_left => Choice::Disk,
        Facts { may_share: true, .. } => Choice::Shared,
        Facts { .. } => Choice::Host,
    }
}

/// A paused region whose backup may move to the disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Held {
    pub(crate) region: RegionId,
    /// Bytes in host memory.
    pub(crate) bytes: u64,
    /// When it was used last; later is more.
    pub(crate) used: u64,
}

/// Which regions' backups make way, in order, when `in_use` of `limit` bytes are taken: those used least recently, no more than needed.
pub(crate) fn victims(held: &[Held], in_use: u64, limit: u64) -> Vec<RegionId> {
    let (high, low) = (part(limit, HIGH), part(limit, LOW));
    if in_use <= high {
        return Vec::new();
    }
    let mut order: Vec<&Held> = held.iter().filter(|held| held.bytes > 0).collect();
    order.sort_by_key(|held| (held.used, held.region));
    let mut left = in_use;
    let needed = order.into_iter().take_while(|held| {
        let needed = left > low;
        left = left.saturating_sub(held.bytes);
        needed
    });
    needed.map(|held| held.region).collect()
}

fn part(limit: u64, percent: u64) -> u64 {
    (u128::from(limit) * u128::from(percent) / 100) as u64
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn host_memory_comes_first() {
        let facts = Facts { need: 10, host_left: 10, may_share: false };
        assert_eq!(choose(facts), Choice::Host);
        assert_eq!(choose(Facts { may_share: true, ..facts }), Choice::Shared);
        assert_eq!(choose(Facts { need: 11, may_share: true, ..facts }), Choice::Disk);
    }

    /// The naive twin: of all sets that hold, with a region, every region that was used before it, the smallest that makes enough room.
    fn by_trying(held: &[Held], in_use: u64, limit: u64) -> Vec<RegionId> {
        if in_use <= part(limit, HIGH) {
            return Vec::new();
        }
        let held: Vec<Held> = held.iter().copied().filter(|held| held.bytes > 0).collect();
        let is_in = |set: u32, i: usize| set >> i & 1 == 1;
        let closed = |set: u32| {
            (0..held.len())
                .all(|i| (0..held.len()).all(|j| !is_in(set, i) || held[j].used >= held[i].used || is_in(set, j)))
        };
        let freed = |set: u32| (0..held.len()).filter(|&i| is_in(set, i)).map(|i| held[i].bytes).sum::<u64>();
        let enough = |set: u32| in_use - freed(set).min(in_use) <= part(limit, LOW);
        let sets: Vec<u32> = (0..1 << held.len()).filter(|&set| closed(set)).collect();
        let best = sets.iter().copied().filter(|&set| enough(set)).min_by_key(|set| set.count_ones());
        let set = best.unwrap_or((1 << held.len()) - 1);
        let mut chosen: Vec<&Held> =
            held.iter().enumerate().filter(|(i, _)| is_in(set, *i)).map(|(_, held)| held).collect();
        chosen.sort_by_key(|held| held.used);
        chosen.into_iter().map(|held| held.region).collect()
    }

    proptest! {
        #[test]
        fn the_least_recently_used_make_way_and_no_more_than_needed(
            bytes in prop::collection::vec(0..60_u64, 0..7), seed in any::<u64>(), extra in 0..50_u64, limit in 0..300_u64,
        ) {
            let held: Vec<Held> = bytes.iter().enumerate().map(|(i, &bytes)| {
                // Distinct times in an order that the seed decides.
                let used = (seed.rotate_left(i as u32 * 8) & 0xFF) * 8 + i as u64;
                Held { region: RegionId(i as u32), bytes, used }
            }).collect();
            let in_use = bytes.iter().sum::<u64>() + extra;
            prop_assert_eq!(victims(&held, in_use, limit), by_trying(&held, in_use, limit));
        }
    }
}
