//! Refusals that need an unusual driver or an unlucky moment, and what they say: addresses that nobody could look up, and memory that another thread has
//! in its hands; and what makes no sense. What was made for the call is given back.

use crate::common::player::{HERE, SMALL, refusal, small};
use crate::common::world::{World, policy, tag};
use sire_core::engine::*;
use sire_core::error::Status;
use std::path::Path;
use std::sync::Arc;

const MIB: u64 = 1 << 20;
#[test]
fn memory_at_addresses_that_nobody_could_find_is_given_back_and_refused() {
    for cached in [true, false] {
        let mut world = World::with(64 * MIB, MIB);
        world.cached = cached;
        let region = world.region("a", policy(Backup::None));
        world.driver.reserve_from(1 << 57);
        let error = world.allocate(region, MIB).unwrap_err();
        assert_eq!(error.status, Status::Driver);
        assert!(
            error.message.contains("the driver reserved 0x") && error.message.contains(", beyond 57 bits of address")
        );
        world.engine.trim();
        assert_eq!(world.driver.counts(), (0, 0, 0), "physicals, mappings, reservations are left");
        world.driver.reserve_from(1 << 40);
        world.allocate(region, MIB).unwrap();
        world.check_no_leak();
    }
}

#[test]
fn memory_that_another_thread_is_mapping_is_left_to_it() {
    let mut player = small();
    let a = player.region("a", policy(Backup::Host));
    let segment = player.reserve(Some(a), 2);
    let handle = player.calls().create(player.memory(Some(a))).unwrap().unwrap();
    let (first, second) = (player.addr(segment, 0), player.addr(segment, 1));
    let engine = Arc::clone(&player.engine);
    player.driver.at_next("map", move || {
        let (refused, message) = refusal(engine.segments().map(second, SMALL, 0, handle, false));
        assert!(
            refused == Status::InvalidArgument && message.contains("is being mapped by another thread"),
            "{message}"
        );
    });
    assert_eq!(player.calls().map(first, SMALL, 0, handle, false).unwrap(), None);
    assert_eq!(player.calls().mapping(second), None);
    player.calls().release(handle).unwrap();
    assert!(player.calls().unmap(first, SMALL).unwrap().is_empty());
    player.check_no_leak();
}

#[test]
fn memory_mapped_where_nobody_could_find_it_is_refused_and_stays_the_programs() {
    let mut player = small();
    let a = player.region("a", policy(Backup::Host));
    player.driver.reserve_from(1 << 57);
    let segment = player.reserve(Some(a), 1);
    let handle = player.calls().create(player.memory(Some(a))).unwrap().unwrap();
    let (refused, message) = refusal(player.calls().map(player.addr(segment, 0), SMALL, 0, handle, false));
    assert!(refused == Status::InvalidArgument && message.contains("is beyond 57 bits of address"), "{message}");
    player.driver.reserve_from(1 << 40);
    let below = player.reserve(Some(a), 1);
    assert_eq!(player.calls().map(player.addr(below, 0), SMALL, 0, handle, false).unwrap(), None);
    assert!(player.calls().unmap(player.addr(below, 0), SMALL).unwrap().is_empty());
    player.calls().release(handle).unwrap();
    player.check_no_leak();
}

#[test]
fn what_makes_no_sense_is_refused_with_what_was_asked() {
    let mut world = World::with(64 * MIB, MIB);
    let region = world.region("a", policy(Backup::None));
    let nothing =
        [world.allocate(region, 0), world.engine.allocate_cached(World::request(region, 0), PoolNumber::NONE)];
    for (refused, message) in nothing.map(refusal) {
        assert!(refused == Status::InvalidArgument && message == "an allocation of 0 bytes was asked for", "{message}");
    }
    let (refused, message) = refusal(world.engine.trace(Path::new("/nonexistent/trace")));
    assert!(
        refused == Status::InvalidArgument && message.starts_with("cannot trace to /nonexistent/trace"),
        "{message}"
    );
    let addr = world.allocate(region, MIB).unwrap();
    world.engine.configure(&|config| config.margin = 64 * MIB);
    let (refused, message) = refusal(world.allocate(region, MIB));
    assert!(refused == Status::OutOfDeviceMemory && message.contains("67108864 must stay free"), "{message}");
    world.engine.configure(&|config| config.margin = 0);
    world.free(addr).unwrap();
    world.check_no_leak();
}

#[test]
fn a_tier_that_nobody_added_is_named() {
    let world = World::with(64 * MIB, MIB);
    let policy = policy(Backup::Tier(7));
    let refused = world.engine.region("a", policy).and_then(|region| {
        let addr = world.engine.allocate(World::request(region, MIB))?;
        world.driver.poke(HERE, addr, &[1; 8]).unwrap();
        world.engine.pause(&tag("a"), PauseOptions::default())
    });
    let (refused, message) = refusal(refused);
    assert!(refused == Status::InvalidArgument, "{refused:?}");
    assert!(message.contains("no tier was added for Tier(7); use Engine::add_tier"), "{message}");
}
