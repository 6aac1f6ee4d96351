//! Whole lives of memory that the program maps itself: a short one in which every driver call fails once, and pairs of them, and random ones. Every byte
//! that had a backup is compared with the player's twin, and nothing is left in the driver. Single stories are in `segments.rs`.

use crate::common::player::{PEER, Player, SMALL, STRIDE, small};
use crate::common::world::{policy, tag};
use proptest::prelude::*;
use sire_core::driver::DriverErrorKind;
use sire_core::engine::*;
use sire_core::error::{Error, Status};

/// PyTorch's life in short: two pools grow, one is paused, freed from, and comes back; a piece of each is handed out; a step is repeated until it succeeds.
fn life(faults: &[(u64, DriverErrorKind)], piece: u64) -> (u64, usize) {
    let mut player = Player::new(16 * piece, piece);
    for &(number, kind) in faults {
        player.driver.fail_at(number, kind);
    }
    let (a, b) = (player.region("a", policy(Backup::Host)), player.region("b", policy(Backup::None)));
    let (first, second) = (player.reserve(Some(a), 4), player.reserve(Some(b), 2));
    step(&mut player, |player| player.grow(first, &[0, 1], Some(a), a));
    step(&mut player, |player| player.grow(second, &[0], Some(b), b));
    step(&mut player, |player| player.pause(&tag("a")).map(drop));
    player.open(first, &[0, 1], PEER);
    player.shrink(first, 0);
    step(&mut player, |player| player.resume(&tag("a")).map(drop));
    step(&mut player, |player| player.grow(first, &[0], Some(a), a));
    step(&mut player, |player| player.grow(second, &[1], Some(b), b));
    step(&mut player, |player| player.lend(first, 0));
    step(&mut player, |player| player.lend(second, 1));
    step(&mut player, |player| player.pause(&Selection::All).map(drop));
    player.write(first, 0);
    player.drop_segment(second);
    step(&mut player, |player| player.resume(&Selection::All).map(drop));
    player.shrink(first, 1);
    let (calls, pending) = (player.driver.calls(), player.driver.pending_faults());
    player.check_no_leak();
    (calls, pending)
}

fn step(player: &mut Player, mut step: impl FnMut(&mut Player) -> Result<(), Error>) {
    for _ in 0..4 {
        let outcome = step(player);
        player.check();
        match outcome {
            Ok(()) => return,
            Err(error) => assert_ne!(error.status, Status::Internal, "{error}"),
        }
    }
    panic!("a step still fails")
}

const KINDS: [DriverErrorKind; 2] = [DriverErrorKind::OutOfMemory, DriverErrorKind::Other];

#[test]
fn every_call_fails_once() {
    for (kind, piece) in KINDS.into_iter().flat_map(|kind| [(kind, SMALL), (kind, STRIDE)]) {
        let mut number = 1;
        while life(&[(number, kind)], piece).1 == 0 {
            number += 1;
        }
        assert!(number > 50, "the life made only {number} calls");
    }
}

#[test]
fn pairs_of_calls_fail() {
    let stride = if std::env::var_os("SIRE_SWEEP").is_some_and(|value| value == "full") { 1 } else { 3 };
    for kind in KINDS {
        let calls = life(&[], SMALL).0;
        for first in 1..=calls {
            let mut second = first + 1 + first % stride;
            while life(&[(first, kind), (second, kind)], SMALL).1 == 0 {
                second += stride;
            }
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    Reserve(usize),
    Grow { segment: usize, slots: Vec<u64> },
    Shrink { segment: usize, slot: u64 },
    Drop(usize),
    Write { segment: usize, slot: u64 },
    Open(usize),
    Lend { segment: usize, slot: u64 },
    Pause(usize),
    Resume(usize),
    Switch(usize, usize),
    Fault { after: u64, short: bool },
    Capacity(u64),
    Trim,
}

fn steps() -> impl Strategy<Value = Step> {
    let segment = 0..4_usize;
    let region = 0..4_usize;
    prop_oneof![
        2 => (0..3_usize).prop_map(Step::Reserve),
        6 => (segment.clone(), proptest::collection::vec(0..6_u64, 1..4)).prop_map(|(segment, slots)| Step::Grow { segment, slots }),
        3 => (segment.clone(), 0..6_u64).prop_map(|(segment, slot)| Step::Shrink { segment, slot }),
        1 => segment.clone().prop_map(Step::Drop),
        3 => (segment.clone(), 0..6_u64).prop_map(|(segment, slot)| Step::Write { segment, slot }),
        1 => segment.clone().prop_map(Step::Open),
        1 => (segment, 0..6_u64).prop_map(|(segment, slot)| Step::Lend { segment, slot }),
        4 => region.clone().prop_map(Step::Pause),
        4 => region.clone().prop_map(Step::Resume),
        1 => (region.clone(), region).prop_map(|(pause, resume)| Step::Switch(pause, resume)),
        2 => (0..30_u64, any::<bool>()).prop_map(|(after, short)| Step::Fault { after, short }),
        1 => (4..40_u64).prop_map(Step::Capacity),
        1 => Just(Step::Trim),
    ]
}

struct Random {
    player: Player,
    regions: Vec<RegionId>,
    /// The region of each segment.
    of: Vec<RegionId>,
}

impl Random {
    fn new() -> Random {
        let mut player = small();
        let declared = Policy { clean: Clean::Declared, ..policy(Backup::Host) };
        let regions = vec![
            player.region("m/a", policy(Backup::Host)),
            player.region("m/b", declared),
            player.region("none", policy(Backup::None)),
        ];
        Random { player, regions, of: Vec::new() }
    }

    fn selection(which: usize) -> Selection {
        [Selection::All, tag("m"), tag("none"), tag("m/a")][which % 4].clone()
    }

    fn slots(&self, segment: usize) -> Vec<u64> {
        self.player.segments[segment].pieces.keys().copied().collect()
    }

    fn play(&mut self, step: &Step) {
        let count = self.player.segments.len();
        let segment = |which: usize| (count > 0).then(|| which % count.max(1));
        match step {
            Step::Reserve(which) if count < 4 => {
                self.of.push(self.regions[*which]);
                self.player.reserve(Some(self.regions[*which]), 6);
            }
            Step::Grow { segment: which, slots } => {
                let Some(segment) = segment(*which) else { return };
                let taken = self.slots(segment);
                let mut free: Vec<u64> = slots.iter().copied().filter(|slot| !taken.contains(slot)).collect();
                free.sort_unstable();
                free.dedup();
                let region = self.of[segment];
                let _ = self.player.grow(segment, &free, Some(region), region);
            }
            Step::Shrink { segment: which, slot } => {
                if let Some(segment) = segment(*which) {
                    self.player.shrink(segment, *slot);
                }
            }
            Step::Drop(which) => {
                if let Some(segment) = segment(*which) {
                    self.of.swap_remove(segment);
                    self.player.drop_segment(segment);
                }
            }
            Step::Write { segment: which, slot } => {
                if let Some(segment) = segment(*which) {
                    self.player.write(segment, *slot);
                    if self.player.segments[segment].pieces.contains_key(slot) {
                        self.player.engine.changed(self.player.addr(segment, *slot), SMALL).unwrap();
                    }
                }
            }
            Step::Open(which) => {
                if let Some(segment) = segment(*which) {
                    let slots = self.slots(segment);
                    self.player.open(segment, &slots, PEER);
                }
            }
            Step::Lend { segment: which, slot } => {
                if let Some(segment) = segment(*which) {
                    let _ = self.player.lend(segment, *slot);
                }
            }
            Step::Pause(which) => drop(self.player.pause(&Random::selection(*which))),
            Step::Resume(which) => drop(self.player.resume(&Random::selection(*which))),
            Step::Switch(pause, resume) => {
                let (pause, resume) = (Random::selection(*pause), Random::selection(*resume));
                if self.player.engine.switch(&pause, &resume, SwitchOptions::default()).is_ok()
                    || self.player.segments.iter().any(|segment| !segment.pieces.is_empty())
                {
                    self.forget_discarded();
                }
            }
            Step::Fault { after, short } => {
                let kind = if *short { DriverErrorKind::OutOfMemory } else { DriverErrorKind::Other };
                self.player.driver.fail_at(self.player.driver.calls() + 1 + after, kind);
            }
            Step::Capacity(pieces) => self.player.driver.set_capacity(pieces * SMALL),
            Step::Trim => drop(self.player.engine.trim()),
            Step::Reserve(_) => {}
        }
    }

    fn forget_discarded(&mut self) {
        let none = self.regions[2];
        for piece in self.player.segments.iter_mut().flat_map(|segment| segment.pieces.values_mut()) {
            if piece.region == none && !piece.lent {
                piece.holds = None;
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn random_lives_keep_every_byte(steps in proptest::collection::vec(steps(), 1..60)) {
        let mut life = Random::new();
        for step in &steps {
            life.play(step);
            life.player.check();
        }
        life.player.driver.set_capacity(1 << 20);
        life.player.check_no_leak();
    }
}
