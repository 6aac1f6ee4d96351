//! Who is asked to give way: a pure function from what owners offer and what somebody needs to a list, in the order in which they are asked. Nothing
//! here calls anybody, and times are numbers that the caller brings.
//!
//! An *offer* is what one mark of a process means: it gives way as a whole, or not at all. It may be asked for if its priority is not above the
//! need's, it has been idle for as long as its owner wants, and nothing is in its way. All others have an order, from the first to give way to the last:
//!
//! 1. those that came back from another loan a while ago, or never were away, before those that came back just now ([`RESIDENCY`]): so two that
//!    do not fit together do not chase each other out while somebody else could give way;
//! 2. lower priority before higher;
//! 3. what was used least recently first;
//! 4. what gives less back first.
//!
//! A plan takes no more than needed: of all sets of offers that make enough room, the one whose dearest member is cheapest, then whose second dearest is, and
//! so on. If all offers together are not enough, nobody is asked: it would help nobody.

use crate::place::Name;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// For how long after it came back from a loan an offer is spared while others are enough.
pub const RESIDENCY: Duration = Duration::from_secs(30);

/// A mark as its owner describes it.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Mark {
    /// Its number in the owner's process.
    pub mark: u64,
    /// The tag that it is about.
    pub tag: String,
    /// It gives way to needs of this priority and above.
    pub priority: i32,
    /// Seconds for which it must not have been used.
    pub after_idle: f64,
    /// Whether it comes back by itself when the need is over.
    pub resume: bool,
    /// Whether the program waits at its safe points until then.
    pub wait: bool,
    /// Whether content without a backup may be lost.
    pub discard: bool,
    /// Bytes that it would give back, by the GPU's UUID.
    pub gpus: Vec<Bytes>,
    /// Seconds since its last use.
    pub idle_seconds: f64,
    /// Seconds since it came back from a loan; none: never.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub back_seconds: Option<f64>,
    /// `resident`, `lent`, `returning`, `paused` (by the program) or `empty`.
    pub state: String,
    /// Why it cannot give way now, whatever the need.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub obstacle: Option<String>,
}

/// Bytes on one GPU.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Bytes {
    /// Its UUID.
    pub gpu: String,
    /// How many.
    pub bytes: u64,
}

/// A process's mark.
#[derive(Clone, PartialEq, Debug)]
pub struct Offer {
    /// Whose it is.
    pub owner: Name,
    /// What it offers.
    pub mark: Mark,
}

/// What is needed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Need {
    /// The GPU's UUID.
    pub gpu: String,
    /// Bytes that are missing there.
    pub bytes: u64,
    /// Of what priority.
    pub priority: i32,
}

impl Mark {
    /// Bytes that it would give back on a GPU.
    #[must_use]
    pub fn bytes_on(&self, gpu: &str) -> u64 {
        self.gpus.iter().filter(|each| each.gpu == gpu).map(|each| each.bytes).sum()
    }

    /// Why it does not give way to a need of this priority; None: it does.
    #[must_use]
    pub fn objection(&self, priority: i32) -> Option<String> {
        if let Some(obstacle) = &self.obstacle {
            return Some(obstacle.clone());
        }
        if self.priority > priority {
            return Some(format!("its priority is {}, the need's is {priority}", self.priority));
        }
        // What cannot be compared is no permission.
        let is_idle = self.idle_seconds >= self.after_idle;
        (!is_idle).then(|| {
            format!("idle for {:.1} s of the {:.1} s that its owner wants", self.idle_seconds, self.after_idle)
        })
    }
}

/// Those who may be asked, the first to give way first; of what has no bytes on the GPU nothing is said.
#[must_use]
pub fn order(offers: &[Offer], need: &Need) -> Vec<Offer> {
    let may = |each: &&Offer| each.mark.bytes_on(&need.gpu) > 0 && each.mark.objection(need.priority).is_none();
    let mut order: Vec<Offer> = offers.iter().filter(may).cloned().collect();
    order.sort_by(|a, b| {
        let key = |each: &Offer| {
            let is_spared = each.mark.back_seconds.is_some_and(|seconds| seconds < RESIDENCY.as_secs_f64());
            (is_spared, each.mark.priority)
        };
        let idle = |each: &Offer| each.mark.idle_seconds;
        let rest = |each: &Offer| (each.mark.bytes_on(&need.gpu), each.owner, each.mark.mark);
        key(a).cmp(&key(b)).then(idle(b).total_cmp(&idle(a))).then_with(|| rest(a).cmp(&rest(b)))
    });
    order
}

/// Who is asked, in this order; nobody, if all would not be enough or nothing is missing.
#[must_use]
pub fn plan(offers: &[Offer], need: &Need) -> Vec<Offer> {
    let order = order(offers, need);
    let bytes = |each: &Offer| each.mark.bytes_on(&need.gpu);
    let mut sum = order.iter().fold(0_u64, |sum, each| sum.saturating_add(bytes(each)));
    if sum < need.bytes {
        return Vec::new();
    }
    let mut asked = Vec::new();
    // From the dearest on: who can be spared is.
    for each in order.into_iter().rev() {
        match sum.saturating_sub(bytes(&each)) {
            rest if rest >= need.bytes => sum = rest,
            _ => asked.push(each),
        }
    }
    asked.reverse();
    asked
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(number: u64, bytes: u64) -> Offer {
        let gpus = vec![Bytes { gpu: "GPU-a".to_owned(), bytes }];
        Offer {
            owner: Name { pid: 1, namesake: 0 },
            mark: Mark { mark: number, gpus, idle_seconds: 10.0, ..Mark::default() },
        }
    }

    fn need(bytes: u64) -> Need {
        Need { gpu: "GPU-a".to_owned(), bytes, priority: 0 }
    }

    fn asked(offers: &[Offer], need: &Need) -> Vec<u64> {
        plan(offers, need).iter().map(|each| each.mark.mark).collect()
    }

    #[test]
    fn the_longest_idle_gives_way_and_no_more_than_needed() {
        let mut all = [offer(0, 10), offer(1, 10), offer(2, 10)];
        all[1].mark.idle_seconds = 30.0;
        all[2].mark.idle_seconds = 20.0;
        assert!(asked(&all, &need(0)).is_empty());
        assert_eq!(asked(&all, &need(10)), [1]);
        assert_eq!(asked(&all, &need(11)), [1, 2]);
        assert!(asked(&all, &need(31)).is_empty(), "somebody is disturbed in vain");
    }

    #[test]
    fn a_small_one_is_spared_where_a_large_one_has_to_go() {
        let mut all = [offer(0, 1), offer(1, 100)];
        all[0].mark.idle_seconds = 99.0;
        assert_eq!(asked(&all, &need(50)), [1]);
    }

    #[test]
    fn nobody_is_asked_who_has_not_agreed() {
        let mut all = [offer(0, 10), offer(1, 10), offer(2, 10), offer(3, 10)];
        all[0].mark.priority = 1;
        all[1].mark.after_idle = 10.5;
        all[2].mark.obstacle = Some("a thread is inside".to_owned());
        all[3].mark.gpus[0].gpu = "GPU-b".to_owned();
        assert!(asked(&all, &need(1)).is_empty());
        assert_eq!(all[1].mark.objection(0).as_deref(), Some("idle for 10.0 s of the 10.5 s that its owner wants"));
        assert_eq!(asked(&all, &Need { priority: 1, ..need(1) }), [0]);
        all[1].mark.idle_seconds = 10.5;
        assert_eq!(asked(&all, &need(1)), [1]);
        all[1].mark.idle_seconds = f64::NAN;
        assert!(asked(&all, &need(1)).is_empty(), "nonsense is no permission");
    }

    #[test]
    fn each_rule_comes_before_the_next() {
        let base = offer(1, 10);
        let changed = |change: &dyn Fn(&mut Mark)| {
            let mut other = Offer { mark: Mark { mark: 2, ..base.mark.clone() }, ..base.clone() };
            change(&mut other.mark);
            other
        };
        let later = [
            changed(&|mark| mark.back_seconds = Some(1.0)),
            changed(&|mark| mark.priority = 1),
            changed(&|mark| mark.idle_seconds = 9.0),
            changed(&|mark| mark.gpus[0].bytes = 11),
        ];
        let strong = Need { priority: 5, ..need(10) };
        for pair in later.windows(2) {
            let dear = Offer { mark: Mark { mark: 1, ..pair[0].mark.clone() }, ..pair[0].clone() };
            assert_eq!(asked(&[dear, pair[1].clone()], &strong), [2]);
        }
        for dear in &later {
            assert_eq!(asked(&[base.clone(), dear.clone()], &strong), [1]);
        }
        assert_eq!(asked(&later[..1], &strong), [2], "who came back just now goes if nobody else is left");
    }

    /// A small generator of numbers: the same ones each time.
    struct Numbers(u64);

    impl Numbers {
        fn below(&mut self, end: u64) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0 % end
        }
    }

    fn random(numbers: &mut Numbers, number: u64) -> Offer {
        let mut made = offer(number, numbers.below(40));
        let mark = &mut made.mark;
        mark.priority = numbers.below(3) as i32 - 1;
        mark.idle_seconds = numbers.below(20) as f64;
        mark.after_idle = [0.0, 5.0, 15.0][numbers.below(3) as usize];
        mark.back_seconds = [None, Some(1.0), Some(100.0)][numbers.below(3) as usize];
        mark.obstacle = (numbers.below(8) == 0).then(String::new);
        made.owner.namesake = numbers.below(3) as u32;
        made
    }

    /// The naive twin: of all subsets that make enough room, the one whose members, from the dearest on, are cheapest.
    fn by_trying(offers: &[Offer], need: &Need) -> Vec<Offer> {
        let order = order(offers, need);
        let members = |set: u32| (0..order.len()).filter(move |i| set >> i & 1 == 1);
        let bytes = |set: u32| members(set).map(|i| order[i].mark.bytes_on(&need.gpu)).sum::<u64>();
        let fitting = (0..1_u32 << order.len()).filter(|&set| bytes(set) >= need.bytes);
        let best = fitting.min_by_key(|&set| members(set).rev().collect::<Vec<_>>());
        best.map_or_else(Vec::new, |set| members(set).map(|i| order[i].clone()).collect())
    }

    #[test]
    fn plans_are_what_trying_all_sets_finds() {
        let mut numbers = Numbers(0x5eed);
        let mut planned = 0;
        for _ in 0..3000 {
            let count = numbers.below(9);
            let offers: Vec<Offer> = (0..count).map(|number| random(&mut numbers, number)).collect();
            let need = Need { bytes: numbers.below(120), priority: numbers.below(3) as i32 - 1, ..need(0) };
            let found = plan(&offers, &need);
            assert_eq!(found, by_trying(&offers, &need));
            assert!(found.iter().all(|each| each.mark.objection(need.priority).is_none()));
            planned += usize::from(!found.is_empty());
        }
        assert!(planned > 500, "hardly anything was planned: {planned}");
    }
}
