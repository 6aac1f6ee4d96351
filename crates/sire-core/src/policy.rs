//! Who makes way: pure functions from what is known to a plan. Nothing here calls anybody, and times are numbers that the caller brings.
//!
//! A *candidate* is a paused region whose memory is still on a device, because nobody has needed it so far. It may not make way while
//! somebody holds a *lease* on it or it is *pinned*. All others have an order, from the first to make way to the last:
//!
//! 1. those that need not be kept for a while come before those that do (keep-alive, and the residency that everybody is owed, so that
//!    two that do not fit together do not chase each other out);
//! 2. lower priority before higher;
//! 3. what can be dropped without a copy before what cannot;
//! 4. what was used least recently first.
//!
//! A plan takes no more than needed: of all sets of candidates that make enough room, the one whose dearest member is cheapest, then
//! whose second dearest is, and so on. So somebody cheap is spared where somebody dearer has to go anyway and is enough.

use crate::terms::RegionId;

/// What the program says about a region beside its policy.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Standing {
    /// Higher goes later; 0 if nobody said anything.
    pub priority: i32,
    /// It does not make way at all.
    pub pinned: bool,
    /// For how long after its last use it goes only when nobody else is left, in milliseconds.
    pub keep_alive: u64,
}

/// A region that may make way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Candidate {
    /// Which one.
    pub region: RegionId,
    /// Bytes of the device's memory that it would give back.
    pub bytes: u64,
    /// What the program says about it.
    pub standing: Standing,
    /// How many use it now.
    pub leases: u64,
    /// A copy is needed before its memory can go.
    pub dirty: bool,
    /// When it was used last, in an order of the process's own.
    pub used: u64,
    /// The same in milliseconds of the caller's clock.
    pub used_at: u64,
}

/// What is needed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Need {
    /// Bytes that are missing.
    pub bytes: u64,
    /// The time, in milliseconds of the caller's clock.
    pub now: u64,
    /// For how long after its last use everybody is spared while somebody else is left, in milliseconds.
    pub residency: u64,
}

/// Who makes way.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Plan {
    /// In this order.
    pub victims: Vec<RegionId>,
    /// Bytes that this gives back.
    pub bytes: u64,
    /// Whether that is enough; if not, everybody who may is a victim.
    pub enough: bool,
}

/// What is known of a device and of what may be used of it. Bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Budget {
    /// The most that regions may hold; `None`: what there is.
    pub limit: Option<u64>,
    /// What stays free for others: other processes, and memory that no region has.
    pub headroom: u64,
    /// For how long after its last use everybody is spared while somebody else is left, in milliseconds.
    pub residency: u64,
}

impl Budget {
    /// How many bytes are missing for `wanted` more where `free` bytes of the device are free and regions hold `held`.
    #[must_use]
    pub fn missing(self, wanted: u64, free: u64, held: u64) -> u64 {
        let by_device = wanted.saturating_add(self.headroom).saturating_sub(free);
        let by_limit = self.limit.map_or(0, |limit| held.saturating_add(wanted).saturating_sub(limit));
        by_device.max(by_limit)
    }
}

/// Those who may make way, the first to go first.
#[must_use]
pub fn order(candidates: &[Candidate], need: &Need) -> Vec<Candidate> {
    let may = |each: &&Candidate| each.leases == 0 && !each.standing.pinned && each.bytes > 0;
    let mut order: Vec<Candidate> = candidates.iter().filter(may).copied().collect();
    order.sort_by_key(|each| value(each, need));
    order
}

/// What is lost with a candidate; greater goes later.
fn value(each: &Candidate, need: &Need) -> (bool, i32, bool, u64, RegionId) {
    let spared = each.standing.keep_alive.max(need.residency);
    let is_spared = need.now.saturating_sub(each.used_at) < spared;
    (is_spared, each.standing.priority, each.dirty, each.used, each.region)
}

/// Who makes way for `need`.
#[must_use]
pub fn plan(candidates: &[Candidate], need: &Need) -> Plan {
    let order = order(candidates, need);
    let mut bytes: u64 = order.iter().map(|each| each.bytes).sum();
    let enough = bytes >= need.bytes;
    let mut victims = Vec::new();
    // From the dearest on: who can be spared is.
    for each in order.iter().rev() {
        if enough && bytes - each.bytes >= need.bytes {
            bytes -= each.bytes;
        } else {
            victims.push(each.region);
        }
    }
    victims.reverse();
    Plan { victims, bytes, enough }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn idle(region: u32, bytes: u64, used: u64) -> Candidate {
        let standing = Standing::default();
        Candidate { region: RegionId(region), bytes, standing, leases: 0, dirty: false, used, used_at: 0 }
    }

    fn victims(candidates: &[Candidate], need: &Need) -> Vec<u32> {
        plan(candidates, need).victims.iter().map(|region| region.0).collect()
    }

    #[test]
    fn the_least_recently_used_goes_and_no_more() {
        let all = [idle(0, 10, 3), idle(1, 10, 1), idle(2, 10, 2)];
        let need = |bytes| Need { bytes, ..Need::default() };
        assert!(victims(&all, &need(0)).is_empty());
        assert_eq!(victims(&all, &need(10)), [1]);
        assert_eq!(victims(&all, &need(11)), [1, 2]);
        assert_eq!(plan(&all, &need(31)), Plan { victims: [1, 2, 0].map(RegionId).to_vec(), bytes: 30, enough: false });
    }

    #[test]
    fn a_small_one_is_spared_where_a_large_one_has_to_go() {
        let all = [idle(0, 1, 1), idle(1, 100, 2)];
        assert_eq!(victims(&all, &Need { bytes: 50, ..Need::default() }), [1]);
    }

    #[test]
    fn each_rule_comes_before_the_next() {
        let base = idle(0, 10, 5);
        let kept = Candidate { standing: Standing { keep_alive: 100, ..base.standing }, ..base };
        let dear = Candidate { standing: Standing { priority: 1, ..base.standing }, ..base };
        let dirty = Candidate { dirty: true, ..base };
        let recent = Candidate { used: 6, ..base };
        let need = Need { bytes: 10, now: 50, residency: 0 };
        for (later, sooner) in [(kept, dear), (dear, dirty), (dirty, recent), (recent, base)] {
            let pair = [Candidate { region: RegionId(1), ..later }, Candidate { region: RegionId(2), ..sooner }];
            assert_eq!(victims(&pair, &need), [2], "{later:?} went before {sooner:?}");
        }
        let over = Need { now: 100, ..need };
        let pair = [Candidate { region: RegionId(1), ..kept }, Candidate { region: RegionId(2), ..dear }];
        assert_eq!(victims(&pair, &over), [1], "a keep-alive never ended");
    }

    #[test]
    fn those_in_use_stay_and_those_just_used_go_last() {
        let held = Candidate { leases: 1, ..idle(0, 10, 1) };
        let pinned = Candidate { standing: Standing { pinned: true, ..Standing::default() }, ..idle(1, 10, 1) };
        let need = Need { bytes: 10, now: 1000, residency: 100 };
        assert_eq!(plan(&[held, pinned], &need), Plan::default());
        let fresh = Candidate { used_at: 950, ..idle(2, 10, 1) };
        let old = Candidate { used_at: 900, ..idle(3, 10, 2) };
        assert_eq!(victims(&[fresh, old], &need), [3]);
        assert_eq!(victims(&[fresh], &need), [2]);
    }

    #[test]
    fn budgets_count_what_others_hold() {
        let budget = Budget { limit: Some(100), headroom: 10, residency: 0 };
        assert_eq!(budget.missing(20, 1000, 50), 0);
        assert_eq!(budget.missing(60, 1000, 50), 10);
        assert_eq!(budget.missing(20, 25, 50), 5);
        assert_eq!(Budget::default().missing(20, 20, u64::MAX), 0);
        assert_eq!(Budget { headroom: u64::MAX, ..Budget::default() }.missing(1, 0, 0), u64::MAX);
    }

    /// The naive twin: of all subsets that make enough room, the one whose members, from the dearest on, are cheapest.
    fn by_trying(candidates: &[Candidate], need: &Need) -> Plan {
        let order = order(candidates, need);
        let members = |set: u32| (0..order.len()).filter(move |i| set >> i & 1 == 1);
        let bytes = |set: u32| members(set).map(|i| order[i].bytes).sum::<u64>();
        let everybody = (1_u32 << order.len()) - 1;
        let dearest_first = |set: u32| members(set).rev().collect::<Vec<_>>();
        let fitting = (0..=everybody).filter(|&set| bytes(set) >= need.bytes);
        let best = fitting.min_by_key(|&set| dearest_first(set));
        let set = best.unwrap_or(everybody);
        let victims = members(set).map(|i| order[i].region).collect();
        Plan { victims, bytes: bytes(set), enough: best.is_some() }
    }

    fn candidates() -> impl Strategy<Value = Vec<Candidate>> {
        let one = (0..40_u64, -1..2_i32, 0..8_u8, 0..2_u64, any::<bool>(), 0..5_u64, 0..200_u64, 0..150_u64);
        prop::collection::vec(one, 0..9).prop_map(|all| {
            let made = all.into_iter().enumerate().map(|(i, (bytes, priority, pin, leases, dirty, used, at, keep))| {
                let standing = Standing { priority, pinned: pin == 0, keep_alive: keep };
                Candidate { region: RegionId(i as u32), bytes, standing, leases, dirty, used, used_at: at }
            });
            made.collect()
        })
    }

    proptest! {
        #[test]
        fn plans_are_what_trying_all_sets_finds(
            all in candidates(), bytes in 0..200_u64, now in 0..300_u64, residency in 0..100_u64,
        ) {
            let need = Need { bytes, now, residency };
            prop_assert_eq!(plan(&all, &need), by_trying(&all, &need));
        }

        #[test]
        fn nobody_in_use_goes_and_every_victim_is_needed(all in candidates(), bytes in 0..200_u64) {
            let need = Need { bytes, now: 200, residency: 50 };
            let plan = plan(&all, &need);
            let find = |region: &RegionId| all.iter().find(|each| each.region == *region);
            for victim in plan.victims.iter().filter_map(find) {
                prop_assert!(victim.leases == 0 && !victim.standing.pinned);
                prop_assert!(!plan.enough || plan.bytes - victim.bytes < bytes, "{:?} was not needed", victim);
            }
        }
    }
}
