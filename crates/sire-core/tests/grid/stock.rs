//! The stock: memory that the process owns ahead of its need. The naive twin is a count: what the process owns never falls below what it wanted to
//! own, whatever it allocates, frees, pauses and resumes; and nobody else, who takes whatever the driver gives him, ever gets in between.

use crate::common::GRANULARITY;
use crate::common::world::{CHUNK, World, policy};
use proptest::prelude::*;
use sire_core::driver::{Device, Driver, DriverErrorKind};
use sire_core::engine::*;
use sire_core::error::{Error, Status};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

const GPU: Device = Device(0);
const ALL: Selection = Selection::All;

fn stock_up(world: &World, bytes: u64) -> Result<u64, Error> {
    world.engine.stock_up(GPU, bytes, &mut |_| {})
}

/// Somebody else takes everything that the driver has.
fn occupy(world: &World) -> u64 {
    let free = world.driver.memory_info(GPU).unwrap().free;
    for _ in 0..free / GRANULARITY {
        world.driver.create(GPU, GRANULARITY).unwrap();
    }
    free
}

#[test]
fn what_was_stocked_is_there_when_the_device_is_full() {
    let mut world = World::new(20 * CHUNK);
    let region = world.region("r", policy(Backup::Host));
    let mut heard = Vec::new();
    assert_eq!(world.engine.stock_up(GPU, 3 * CHUNK + 1, &mut |bytes| heard.push(bytes)), Ok(3 * CHUNK + GRANULARITY));
    assert_eq!(heard, [CHUNK, 2 * CHUNK, 3 * CHUNK, 3 * CHUNK + GRANULARITY]);
    occupy(&world);
    for _ in 0..3 {
        let before = creates(&world);
        let addr = world.allocate(region, 3 * CHUNK).unwrap();
        world.write(addr);
        assert_eq!(creates(&world), before, "whole pieces change hands");
        world.pause(&ALL).unwrap();
        assert_eq!(world.engine.stocked(GPU).lying, 3 * CHUNK + GRANULARITY, "a pause gives back to the stock");
        assert_eq!(world.driver.memory_info(GPU).unwrap().free, 0);
        world.resume(&ALL).unwrap();
        world.check();
        world.free(addr).unwrap();
    }
    assert_eq!(
        world.engine.stocked(GPU),
        Stocked { target: 3 * CHUNK + GRANULARITY, lying: 3 * CHUNK + GRANULARITY, taken: 0 }
    );
    // Other sizes too, and not one byte more.
    let odd = [GRANULARITY, 2 * CHUNK - GRANULARITY, CHUNK].map(|size| world.allocate(region, size).unwrap());
    assert_eq!(world.allocate(region, 2 * GRANULARITY).unwrap_err().status, Status::OutOfDeviceMemory);
    for addr in odd {
        world.write(addr);
        world.check();
        world.free(addr).unwrap();
    }
    world.engine.trim();
    world.engine.stock_down(GPU, u64::MAX);
    assert_eq!(world.driver.memory_info(GPU).unwrap().free, 3 * CHUNK + GRANULARITY);
}

#[test]
fn a_low_estimate_does_not_run_into_its_own_stock() {
    let mut world = World::new(10 * CHUNK);
    let region = world.region("r", policy(Backup::Host));
    stock_up(&world, 2 * CHUNK).unwrap();
    let all = [3 * CHUNK, 6 * CHUNK, CHUNK].map(|size| world.allocate(region, size).unwrap());
    assert_eq!(world.engine.stocked(GPU), Stocked { target: 2 * CHUNK, lying: 0, taken: 2 * CHUNK });
    // What is given back fills the stock first; the rest is the driver's.
    for addr in all {
        world.free(addr).unwrap();
    }
    assert_eq!(world.engine.stocked(GPU).lying, 2 * CHUNK);
    assert_eq!(world.driver.memory_info(GPU).unwrap().free, 8 * CHUNK);
    assert_eq!(stock_up(&world, 9 * CHUNK).unwrap_err().status, Status::OutOfDeviceMemory);
    assert_eq!(world.engine.stocked(GPU).target, 2 * CHUNK, "a failed growth left something");
    assert_eq!(world.driver.used_bytes(), 2 * CHUNK);
}

#[test]
fn what_others_in_the_process_take_comes_out_of_the_stock() {
    let world = World::new(10 * CHUNK);
    stock_up(&world, 4 * CHUNK).unwrap();
    assert_eq!(occupy(&world), 6 * CHUNK);
    assert_eq!(world.engine.stock_spend(GPU, CHUNK + GRANULARITY), CHUNK + GRANULARITY);
    let outside = world.driver.create(GPU, CHUNK + GRANULARITY).unwrap();
    assert_eq!(world.driver.memory_info(GPU).unwrap().free, 0, "more than was asked for was made free");
    assert_eq!(world.engine.stocked(GPU).missing(), CHUNK + GRANULARITY);
    world.engine.stock_settle(GPU, CHUNK + GRANULARITY);
    assert_eq!(world.engine.stocked(GPU).owned(), 4 * CHUNK);
    assert_eq!(world.engine.stock_let_go(GPU, CHUNK + GRANULARITY), CHUNK + GRANULARITY);
    world.driver.release(outside).unwrap();
    world.engine.stock_regain(GPU, CHUNK + GRANULARITY);
    assert_eq!(world.engine.stocked(GPU), Stocked { target: 4 * CHUNK, lying: 4 * CHUNK, taken: 0 });
    assert_eq!(world.driver.memory_info(GPU).unwrap().free, 0);
}

fn creates(world: &World) -> usize {
    world.driver.log().iter().filter(|verb| **verb == "create").count()
}

/// A stock of four chunks on a device that is full otherwise, three of which went to somebody in the process and were freed again.
fn three_of_four_let_go() -> World {
    let world = World::new(10 * CHUNK);
    stock_up(&world, 4 * CHUNK).unwrap();
    occupy(&world);
    assert_eq!(world.engine.stock_spend(GPU, 3 * CHUNK), 3 * CHUNK);
    let outside = world.driver.create(GPU, 3 * CHUNK).unwrap();
    world.engine.stock_settle(GPU, 3 * CHUNK);
    assert_eq!(world.engine.stock_let_go(GPU, 3 * CHUNK), 3 * CHUNK);
    world.driver.release(outside).unwrap();
    world
}

/// It once came back in one piece or not at all: a stranger who had taken one granule meanwhile cost all of it.
#[test]
fn what_a_stranger_has_left_comes_back() {
    let world = three_of_four_let_go();
    let stranger = world.driver.create(GPU, GRANULARITY).unwrap();
    world.engine.stock_regain(GPU, 3 * CHUNK);
    assert!(world.engine.stocked(GPU).missing() <= CHUNK, "{:?}", world.engine.stocked(GPU));
    // What could not be had is tried again when something else comes back.
    world.driver.release(stranger).unwrap();
    assert_eq!(world.engine.stock_spend(GPU, CHUNK), CHUNK);
    world.engine.stock_regain(GPU, CHUNK);
    assert_eq!(world.engine.stocked(GPU), Stocked { target: 4 * CHUNK, lying: 4 * CHUNK, taken: 0 });
}

/// One who was made room for is not robbed of it by another's regaining: while he is on his way, only what that one has had comes back.
#[test]
fn what_is_missing_is_not_taken_from_who_was_made_room_for() {
    let world = three_of_four_let_go();
    let stranger = world.driver.create(GPU, 2 * CHUNK).unwrap();
    world.engine.stock_regain(GPU, 3 * CHUNK);
    assert_eq!(world.engine.stocked(GPU).missing(), 2 * CHUNK);
    assert_eq!(world.engine.stock_spend(GPU, CHUNK), CHUNK, "for another thread's allocation");
    assert_eq!(world.engine.stock_spend(GPU, GRANULARITY), GRANULARITY);
    world.engine.stock_regain(GPU, GRANULARITY);
    let other = world.driver.create(GPU, CHUNK).expect("its room was taken");
    world.engine.stock_settle(GPU, CHUNK);
    [stranger, other].into_iter().for_each(|memory| world.driver.release(memory).unwrap());
    world.engine.stock_regain(GPU, 0);
    assert_eq!(world.engine.stocked(GPU), Stocked { target: 4 * CHUNK, lying: 3 * CHUNK, taken: CHUNK });
}

/// An allocation in the order of a stream was made room for, and nobody hears of its end. It counted as on its way for good: what it had never came back into
/// the stock, however much was free.
#[test]
fn what_nobody_will_hear_of_comes_back_with_the_next() {
    let world = World::new(10 * CHUNK);
    stock_up(&world, 4 * CHUNK).unwrap();
    occupy(&world);
    assert_eq!(world.engine.stock_spend(GPU, 2 * CHUNK), 2 * CHUNK);
    let unheard = world.driver.create(GPU, 2 * CHUNK).unwrap();
    world.engine.stock_give_up(GPU, 2 * CHUNK);
    assert_eq!(world.engine.stocked(GPU).missing(), 2 * CHUNK);
    world.driver.release(unheard).unwrap();
    assert_eq!(world.engine.stock_spend(GPU, GRANULARITY), GRANULARITY);
    world.engine.stock_regain(GPU, GRANULARITY);
    assert_eq!(world.engine.stocked(GPU), Stocked { target: 4 * CHUNK, lying: 4 * CHUNK, taken: 0 });
}

/// It once came back as one piece, which every chunk that was taken from it opened as a whole.
#[test]
fn what_comes_back_is_handed_out_whole() {
    let mut world = three_of_four_let_go();
    world.engine.stock_regain(GPU, 3 * CHUNK);
    let region = world.region("r", policy(Backup::Host));
    let before = creates(&world);
    world.allocate(region, 2 * CHUNK).unwrap();
    assert_eq!(creates(&world), before, "the fence was opened");
    assert_eq!(world.engine.stocked(GPU).missing(), 0);
}

/// An allocation that no device could hold once opened the whole fence before CUDA refused it.
#[test]
fn what_no_device_could_hold_opens_no_fence() {
    let world = World::new(10 * CHUNK);
    stock_up(&world, 4 * CHUNK).unwrap();
    for bytes in [20 * CHUNK, 1 << 45, u64::MAX] {
        let before = world.driver.log().len();
        assert_eq!(world.engine.stock_spend(GPU, bytes), 0);
        assert!(world.driver.log()[before..].iter().all(|verb| *verb == "memory_info"), "{bytes} bytes");
    }
    assert_eq!(world.engine.stocked(GPU).lying, 4 * CHUNK);
}

/// Keeps books as a ledger between processes does: what is owned, by what was heard. They never say more than the driver has given.
fn keep_books(world: &World) -> Arc<AtomicU64> {
    let books = Arc::new(AtomicU64::new(0));
    let driver = Arc::clone(&world.driver);
    let noted = Arc::clone(&books);
    world.engine.stock_watch(Box::new(move |_, stocked| {
        let owned = stocked().owned();
        noted.store(owned, Ordering::SeqCst);
        assert!(owned <= driver.used_bytes(), "{owned} bytes are said to be owned, more than there are");
    }));
    books
}

#[test]
fn who_watches_hears_of_bytes_before_they_go_and_after_they_came() {
    let mut world = World::new(10 * CHUNK);
    let books = keep_books(&world);
    let said = || books.load(Ordering::SeqCst);
    stock_up(&world, 4 * CHUNK).unwrap();
    assert_eq!(world.engine.stock_spend(GPU, GRANULARITY), GRANULARITY);
    assert_eq!(said(), 4 * CHUNK - GRANULARITY, "what the program is about to take is anybody's");
    let outside = world.driver.create(GPU, GRANULARITY).unwrap();
    world.engine.stock_settle(GPU, GRANULARITY);
    assert_eq!(said(), 4 * CHUNK);
    assert_eq!(world.engine.stock_let_go(GPU, GRANULARITY), GRANULARITY);
    assert_eq!(said(), 4 * CHUNK - GRANULARITY, "before it is freed");
    world.driver.release(outside).unwrap();
    world.engine.stock_regain(GPU, GRANULARITY);
    assert_eq!(said(), 4 * CHUNK);
    // What nobody gave up does not come back, and what fails is as before.
    world.engine.stock_regain(GPU, CHUNK);
    assert_eq!(world.engine.stocked(GPU).owned(), 4 * CHUNK);
    assert_eq!(world.engine.stock_spend(GPU, 3 * GRANULARITY), 3 * GRANULARITY);
    world.engine.stock_regain(GPU, 3 * GRANULARITY);
    assert_eq!((said(), world.engine.stocked(GPU).missing()), (4 * CHUNK, 0));
    // A reservation that ends meanwhile wants nothing back.
    assert_eq!(world.engine.stock_spend(GPU, CHUNK), CHUNK);
    world.engine.stock_down(GPU, 4 * CHUNK);
    world.engine.stock_regain(GPU, CHUNK);
    world.engine.stock_settle(GPU, CHUNK);
    assert_eq!((world.engine.stocked(GPU), world.driver.used_bytes()), (Stocked::default(), 0));
    let region = world.region("r", policy(Backup::Host));
    stock_up(&world, 3 * CHUNK).unwrap();
    // A size that no piece has: opened, made, the rest taken in again.
    let addr = world.allocate(region, 2 * CHUNK - GRANULARITY).unwrap();
    assert_eq!(world.engine.stocked(GPU).owned(), 3 * CHUNK);
    world.free(addr).unwrap();
    assert_eq!(world.engine.stocked(GPU).owned(), 3 * CHUNK);
}

#[derive(Clone, Debug)]
enum Step {
    Allocate(u64),
    Free(usize),
    Pause,
    Resume,
    Up(u64),
    Down(u64),
    Trim,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (1..5 * CHUNK / 1024).prop_map(|kib| Step::Allocate(kib * 1024)),
        4 => any::<usize>().prop_map(Step::Free),
        1 => Just(Step::Pause),
        1 => Just(Step::Resume),
        2 => (1..4 * CHUNK).prop_map(Step::Up),
        2 => (1..4 * CHUNK).prop_map(Step::Down),
        1 => Just(Step::Trim),
    ]
}

fn run(world: &mut World, region: RegionId, steps: &[Step], wanted: &mut u64) {
    for step in steps {
        match *step {
            Step::Allocate(size) => {
                if let Ok(addr) = world.allocate(region, size) {
                    world.write(addr);
                }
            }
            Step::Free(which) => {
                let live: Vec<_> = world.twins.keys().copied().collect();
                if let Some(addr) = live.get(which % live.len().max(1)) {
                    let _ = world.free(*addr);
                }
            }
            Step::Pause => drop(world.pause(&ALL)),
            Step::Resume => drop(world.resume(&ALL)),
            Step::Up(bytes) => *wanted += stock_up(world, bytes).unwrap_or(0),
            Step::Down(bytes) => {
                let bytes = bytes.min(*wanted);
                world.engine.stock_down(GPU, bytes);
                *wanted -= bytes / GRANULARITY * GRANULARITY;
            }
            Step::Trim => drop(world.engine.trim()),
        }
    }
}

proptest! {
    #[test]
    fn what_is_wanted_is_owned(steps in prop::collection::vec(step(), 1..40)) {
        let mut world = World::new(24 * CHUNK);
        let region = world.region("r", policy(Backup::Host));
        let _books = keep_books(&world);
        let mut wanted = 0;
        for step in steps {
            run(&mut world, region, &[step], &mut wanted);
            let stocked = world.engine.stocked(GPU);
            prop_assert_eq!(stocked.target, wanted);
            // Nobody else is there, so that nothing can get lost.
            prop_assert_eq!(stocked.owned(), wanted, "{:?}", stocked);
            prop_assert!(world.driver.used_bytes() >= wanted);
            world.check();
        }
        world.engine.stock_down(GPU, u64::MAX);
        let _ = world.resume(&ALL);
        world.check_no_leak();
    }

    /// One driver call fails, anywhere: nothing is lost, doubled or leaked.
    #[test]
    fn a_failing_driver_costs_at_most_what_the_stock_wanted(steps in prop::collection::vec(step(), 1..20), at in 1..400_u64, short in any::<bool>()) {
        let mut world = World::new(24 * CHUNK);
        let region = world.region("r", policy(Backup::Host));
        let kind = if short { DriverErrorKind::OutOfMemory } else { DriverErrorKind::Other };
        world.driver.fail_at(world.driver.calls() + at, kind);
        run(&mut world, region, &steps, &mut 0);
        world.driver.clear_faults();
        // What the driver did not take back lies in the stock until the next time that it is made smaller.
        world.engine.stock_down(GPU, 0);
        let stocked = world.engine.stocked(GPU);
        prop_assert!(stocked.owned() <= stocked.target, "{:?}", stocked);
        world.resume(&ALL).unwrap();
        world.check();
        world.engine.stock_down(GPU, u64::MAX);
        world.check_no_leak();
    }
}
