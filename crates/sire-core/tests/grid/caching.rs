//! The engine as a caching allocator: what is given out again and when, what a pause takes of it, what happens when memory is short, and every driver
//! call failing once. How the cache itself decides is asked beside it (`src/cache/tests.rs`).

use crate::common::world::{World, policy, tag};
use crate::common::{GRANULARITY, MemDriver};
use sire_core::driver::{Addr, Device, DriverErrorKind, ProgramStream};
use sire_core::engine::*;
use sire_core::error::{Error, Status};
use std::sync::Arc;

const MIB: u64 = 1 << 20;
const ROOM: u64 = 64 * MIB;

fn world(capacity: u64) -> World {
    let mut world = World::with(capacity, MIB);
    world.cached = true;
    world
}

fn on(region: RegionId, size: u64, stream: u64) -> Request {
    Request { stream: ProgramStream(stream), ..World::request(region, size) }
}

fn stats(world: &World) -> serde_json::Value {
    serde_json::from_str(&world.engine.memory_stats_json(Device(0)).unwrap()).unwrap()
}

fn reserved(world: &World) -> u64 {
    stats(world)["reserved_bytes.all.current"].as_u64().unwrap()
}

#[test]
fn what_is_freed_is_given_out_again_without_a_driver_call() {
    let mut world = world(ROOM);
    let region = world.region("a", policy(Backup::Host));
    let sizes = [1, 512, 5000, MIB, MIB + 1, 5 * MIB];
    let addrs: Vec<Addr> = sizes.iter().map(|&size| world.allocate(region, size).unwrap()).collect();
    assert!(addrs.iter().all(|addr| addr.0.is_multiple_of(512)));
    let calls = world.driver.calls();
    for (&size, &addr) in sizes.iter().zip(&addrs) {
        world.free(addr).unwrap();
        assert_eq!(world.allocate(region, size).unwrap(), addr);
    }
    assert_eq!(world.driver.calls(), calls);
    assert_eq!(world.engine.free(addrs[2].offset(512), false).unwrap_err().status, Status::UnknownAddress);
    world.free(addrs[0]).unwrap();
    assert_eq!(world.engine.free(addrs[0], false).unwrap_err().status, Status::UnknownAddress);
    assert_eq!(world.driver.calls(), calls);
    world.check_no_leak();
}

#[test]
fn an_impossible_size_is_refused_even_where_memory_is_free() {
    let mut world = world(ROOM);
    let region = world.region("a", policy(Backup::None));
    let addr = world.allocate(region, 512).unwrap();
    world.free(addr).unwrap();
    let ask = |size| world.engine.allocate_cached(on(region, size, 0), PoolNumber::NONE).unwrap_err().status;
    assert_eq!(ask(0), Status::InvalidArgument);
    assert_eq!([1 << 62, u64::MAX].map(ask), [Status::OutOfDeviceMemory; 2]);
    world.check_no_leak();
}

#[test]
fn any_cached_block_can_be_kept_resident() {
    let mut world = world(ROOM);
    let region = world.region("a", policy(Backup::Host));
    // The third begins in an earlier piece than it ends in.
    let addrs: Vec<Addr> = (0..3).map(|_| world.allocate(region, 3 * MIB).unwrap()).collect();
    for &addr in &addrs {
        world.write(addr);
        assert_eq!(world.engine.keep_resident(addr.offset(3 * MIB - 1)).unwrap(), 3 * MIB);
    }
    world.pause(&tag("a")).unwrap();
    world.check();
    world.resume(&tag("a")).unwrap();
    world.check_no_leak();
}

#[test]
fn a_pause_copies_what_the_program_uses_and_no_more() {
    let mut world = world(ROOM);
    let region = world.region("a", policy(Backup::Host));
    let addrs: Vec<Addr> = (0..6).map(|_| world.allocate(region, 3 * MIB).unwrap()).collect();
    let small: Vec<Addr> = (0..9).map(|_| world.allocate(region, 70_000).unwrap()).collect();
    addrs.iter().chain(&small).for_each(|&addr| world.write(addr));
    addrs.iter().step_by(2).chain(small.iter().skip(4)).for_each(|&addr| world.free(addr).unwrap());
    let report = world.pause(&tag("a")).unwrap();
    assert_eq!(world.driver.used_bytes(), 0);
    let used = 9 * MIB + 4 * 70_000;
    assert!((used..used + 8 * 512).contains(&report.bytes_copied), "{}", report.bytes_copied);
    assert_eq!(report.allocations, 7);
    // Frees are allowed; what they leave is not given out before the resume.
    world.free(addrs[1]).unwrap();
    assert_eq!(world.allocate(region, 3 * MIB).unwrap_err().status, Status::Paused);
    world.resume(&tag("a")).unwrap();
    world.check();
    assert!(addrs.contains(&world.allocate(region, 3 * MIB).unwrap()));
    world.check_no_leak();
}

#[test]
fn an_allocation_may_lie_in_several_pieces() {
    let mut world = world(ROOM);
    let region = world.region("a", policy(Backup::None));
    let addr = world.allocate(region, 7 * MIB + 3).unwrap();
    world.write(addr);
    world.set_override(addr, MIB, 4 * MIB, true);
    assert_eq!(world.engine.keep(addr.offset(7 * MIB), 4).unwrap_err().status, Status::UnknownAddress);
    assert_eq!(world.engine.allocation(addr.offset(6 * MIB)), Some((addr, 7 * MIB + 3, Device(0), region)));
    let report = world.pause(&tag("a")).unwrap();
    assert_eq!(report.bytes_copied, 4 * MIB);
    world.resume(&tag("a")).unwrap();
    world.check();
    // What was said of an allocation goes with it.
    world.free(addr).unwrap();
    let again = world.allocate(region, 7 * MIB + 3).unwrap();
    assert_eq!(again, addr);
    assert_eq!(world.pause(&tag("a")).unwrap().bytes_copied, 0);
    world.resume(&tag("a")).unwrap();
    assert_eq!(world.engine.keep_resident(again).unwrap(), 7 * MIB + 3);
    world.pause(&tag("a")).unwrap();
    assert_eq!(world.driver.used_bytes(), 8 * MIB);
    world.resume(&tag("a")).unwrap();
    world.check_no_leak();
}

#[test]
fn where_content_is_declared_not_to_change_a_block_that_is_given_out_again_counts_as_changed() {
    let mut world = world(ROOM);
    let region = world.region("a", Policy { clean: Clean::Declared, ..policy(Backup::Host) });
    let [first, second] = [0, 0].map(|_| world.allocate(region, 100_000).unwrap());
    [first, second].into_iter().for_each(|addr| world.write(addr));
    assert!(world.pause(&tag("a")).unwrap().bytes_copied >= 200_000);
    world.resume(&tag("a")).unwrap();
    world.free(first).unwrap();
    assert_eq!(world.allocate(region, 99_000).unwrap(), first);
    let twin = world.twins.get_mut(&first).unwrap();
    twin.bytes.fill(77);
    twin.promised = crate::common::world::Which::All;
    // Not told by the program: the engine knows.
    world.driver.poke(Device(0), first, &vec![77; 99_000]).unwrap();
    let copied = world.pause(&tag("a")).unwrap().bytes_copied;
    assert!(copied >= 99_000, "{copied}");
    world.resume(&tag("a")).unwrap();
    world.check();
    world.check_no_leak();
}

#[test]
fn blocks_wait_for_the_streams_that_used_them() {
    let mut world = world(ROOM);
    let region = world.region("a", policy(Backup::None));
    let addr = world.allocate(region, MIB).unwrap();
    let (other, third) = (ProgramStream(7), ProgramStream(8));
    assert!(world.engine.record_stream(addr, other) && world.engine.record_stream(addr, third));
    assert!(!world.engine.record_stream(addr.offset(512), other));
    world.free(addr).unwrap();
    assert_eq!(stats(&world)["active.all.current"], 1);
    let next = world.allocate(region, MIB).unwrap();
    assert_ne!(next, addr);
    world.driver.pass_stream(third);
    let after = world.allocate(region, MIB).unwrap();
    assert_ne!(after, addr, "the other stream has not passed");
    world.driver.pass_stream(other);
    assert_eq!(world.allocate(region, MIB).unwrap(), addr);
    assert!(!world.driver.log().contains(&"synchronize"));
    world.check_no_leak();
}

#[test]
fn a_stream_that_cannot_be_marked_makes_the_block_wait_for_the_device() {
    let mut world = world(ROOM);
    let region = world.region("a", policy(Backup::None));
    let addr = world.allocate(region, MIB).unwrap();
    world.engine.record_stream(addr, ProgramStream(7));
    world.driver.fail_always(Some(("record_on", DriverErrorKind::Other)));
    world.free(addr).unwrap();
    world.driver.fail_always(None);
    let next = world.allocate(region, MIB).unwrap();
    assert_ne!(next, addr);
    // The cache would have to grow for this one: the device is waited for first.
    assert_eq!(world.allocate(region, MIB).unwrap(), addr);
    assert_eq!(world.driver.log().iter().filter(|verb| **verb == "synchronize").count(), 1);
    world.check_no_leak();
}

#[test]
fn a_capture_waits_for_nothing_and_gives_nothing_back() {
    let mut world = world(8 * MIB);
    let region = world.region("a", policy(Backup::None));
    let [addr, full] = [MIB, 4 * MIB].map(|size| world.allocate(region, size).unwrap());
    world.free(full).unwrap();
    world.engine.record_stream(addr, ProgramStream(7));
    world.driver.set_capturing(true);
    world.engine.free(addr, true).unwrap();
    world.twins.remove(&addr);
    let capturing = |size, stream| Request { capturing: true, ..on(region, size, stream) };
    let pool = world.engine.hold_pool(Device(0), (1, 2)).unwrap();
    let private = world.engine.allocate_cached(capturing(MIB, 5), pool).unwrap();
    let short = world.engine.allocate_cached(capturing(4 * MIB, 5), pool).unwrap_err();
    assert_eq!(short.status, Status::OutOfDeviceMemory);
    world.engine.free(private, true).unwrap();
    world.driver.set_capturing(false);
    // What the pool holds free is nobody else's, and stays.
    let shared = world.allocate_as(on(region, MIB, 5)).unwrap();
    assert_ne!(shared, private);
    let kept = world.driver.used_bytes();
    world.engine.empty_caches();
    assert!(world.driver.used_bytes() >= 4 * MIB && world.driver.used_bytes() < kept);
    assert!(world.engine.release_pool(Device(0), (1, 2)) && !world.engine.release_pool(Device(0), (1, 2)));
    world.check_no_leak();
}

#[test]
fn memory_is_short_only_when_nothing_that_is_cached_is_left() {
    let mut world = world(12 * MIB);
    let [a, b] = ["a", "b"].map(|tag| world.region(tag, policy(Backup::Host)));
    let first = world.allocate_as(on(a, 8 * MIB, 1)).unwrap();
    world.free(first).unwrap();
    // Another stream's, another region's, and what no cache has.
    let second = world.allocate_as(on(a, 8 * MIB, 2)).unwrap();
    world.free(second).unwrap();
    let third = world.allocate_as(on(b, 8 * MIB, 1)).unwrap();
    world.write(third);
    world.cached = false;
    let error = world.allocate(a, 8 * MIB).unwrap_err();
    assert_eq!(error.status, Status::OutOfDeviceMemory);
    world.cached = true;
    let error = world.allocate(a, 8 * MIB).unwrap_err();
    assert!(error.message.contains("8388608 bytes are needed") || error.message.contains("are free"), "{error}");
    assert_eq!(stats(&world)["num_ooms"], 1);
    world.check();
    // What a paused region holds lazily makes way.
    world.pause_lazily(&tag("b")).unwrap();
    let fourth = world.allocate(a, 8 * MIB).unwrap();
    world.write(fourth);
    world.free(fourth).unwrap();
    world.resume(&tag("b")).unwrap();
    world.check();
    world.check_no_leak();
}

#[test]
fn a_free_block_at_the_end_grows_and_a_hole_is_filled() {
    let mut world = world(ROOM);
    let region = world.region("a", policy(Backup::None));
    let sizes = [2 * MIB, 4 * MIB, 6 * MIB, 10 * MIB];
    for size in sizes {
        let addr = world.allocate(region, size).unwrap();
        world.free(addr).unwrap();
    }
    assert_eq!(reserved(&world), 10 * MIB);
    let addrs: Vec<Addr> = (0..5).map(|_| world.allocate(region, 2 * MIB).unwrap()).collect();
    world.free(addrs[2]).unwrap();
    world.engine.empty_caches();
    assert_eq!(reserved(&world), 8 * MIB, "a granule in the middle went back");
    assert_eq!(world.allocate(region, 2 * MIB).unwrap(), addrs[2]);
    world.check_no_leak();
}

#[test]
fn a_share_of_memory_is_a_limit() {
    let mut world = world(ROOM);
    let region = world.region("a", policy(Backup::None));
    world.engine.set_memory_fraction(Device(0), 0.25).unwrap();
    let addr = world.allocate(region, 12 * MIB).unwrap();
    let error = world.allocate(region, 8 * MIB).unwrap_err();
    assert!(error.message.contains("share of memory") && error.status == Status::OutOfDeviceMemory, "{error}");
    world.free(addr).unwrap();
    let other = world.allocate_as(on(region, 14 * MIB, 3)).unwrap();
    assert_eq!(reserved(&world), 14 * MIB, "what was free went back first");
    world.engine.set_memory_fraction(Device(0), 1.0).unwrap();
    world.allocate(region, 40 * MIB).unwrap();
    assert_eq!(world.engine.set_memory_fraction(Device(0), -0.5).unwrap_err().status, Status::InvalidArgument);
    world.free(other).unwrap();
    world.check_no_leak();
}

#[test]
fn who_does_not_say_which_streams_used_a_block_waits_for_the_device() {
    let mut world = world(ROOM);
    let region = world.region("a", policy(Backup::None));
    let [first, second] = [0, 0].map(|_| world.allocate(region, MIB).unwrap());
    world.engine.free_cached(first, Reuse::AfterDevice, false).unwrap();
    world.twins.remove(&first);
    assert_eq!(world.engine.free_cached(first, Reuse::AfterDevice, false).unwrap_err().status, Status::UnknownAddress);
    assert_eq!(world.allocate(region, MIB).unwrap(), first, "the device was waited for");
    assert!(world.driver.log().contains(&"synchronize"));
    assert!(world.engine.caches(second) && !world.engine.caches(Addr(GRANULARITY)));
    world.check_no_leak();
}

#[test]
fn peers_reach_what_a_cache_has_and_what_it_will_have() {
    let mut world = world(ROOM);
    let region = world.region("a", policy(Backup::Host));
    let before = world.allocate(region, MIB).unwrap();
    world.engine.allow_peer(Device(0), Device(1)).unwrap();
    let after = world.allocate(region, 5 * MIB).unwrap();
    for addr in [before, after] {
        world.driver.poke(Device(1), addr, &[1, 2, 3]).unwrap();
    }
    world.pause(&tag("a")).unwrap();
    world.resume(&tag("a")).unwrap();
    assert_eq!(world.driver.peek(Device(1), after, 3).unwrap(), [1, 2, 3]);
    world.check_no_leak();
}

// ---- every call fails once --------------------------------------------------------------------------------------------------

/// Repeats a step until it succeeds; after each attempt everything promised is there.
fn step<T>(world: &mut World, mut step: impl FnMut(&mut World) -> Result<T, Error>) -> T {
    for _ in 0..4 {
        let outcome = step(world);
        world.check();
        match outcome {
            Ok(value) => return value,
            Err(e) => assert_ne!(e.status, Status::Internal, "{e}"),
        }
    }
    panic!("a step still fails after four attempts");
}

/// Growth, pause, reuse, trim, a hole that is filled, a free while paused, and memory that another stream's cache has to give back.
fn life(world: &mut World) {
    let host = world.region("c/host", policy(Backup::Host));
    let none = world.region("c/none", policy(Backup::None));
    let [a, b] = [600, 5000].map(|size| step(world, |w| w.allocate(host, size)));
    [a, b].into_iter().for_each(|addr| world.write(addr));
    let large = step(world, |w| w.allocate(none, 3 * MIB));
    step(world, |w| w.pause(&Selection::All));
    step(world, |w| w.resume(&Selection::All));
    step(world, |w| w.free(a));
    let again = step(world, |w| w.allocate(host, 600));
    world.write(again);
    world.engine.record_stream(large, ProgramStream(9));
    step(world, |w| w.free(large));
    world.driver.pass_stream(ProgramStream(9));
    let other = step(world, |w| w.allocate_as(on(none, 3 * MIB, 1)));
    step(world, |w| w.pause(&tag("c/none")));
    step(world, |w| w.free(other));
    step(world, |w| w.resume(&tag("c/none")));
    world.engine.empty_caches();
    world.check();
    let last = step(world, |w| w.allocate(none, 2 * MIB + 1));
    step(world, |w| w.pause(&Selection::All));
    step(world, |w| w.resume(&Selection::All));
    step(world, |w| w.free(last));
}

fn live(faults: &[(u64, DriverErrorKind)]) -> (u64, usize) {
    let mut world = world(8 * MIB);
    faults.iter().for_each(|&(number, kind)| world.driver.fail_at(number, kind));
    life(&mut world);
    let outcome = (world.driver.calls(), world.driver.pending_faults());
    world.check_no_leak();
    outcome
}

#[test]
fn every_call_of_a_cached_life_fails_once() {
    for kind in [DriverErrorKind::OutOfMemory, DriverErrorKind::Other] {
        let mut number = 1;
        while live(&[(number, kind)]).1 == 0 {
            number += 1;
        }
        assert!(number > 60, "the life made only {number} calls");
    }
}

#[test]
fn pairs_of_calls_of_a_cached_life_fail() {
    let full = std::env::var_os("SIRE_SWEEP").is_some_and(|value| value == "full");
    let stride = if full { 1 } else { 37 };
    for first in 1..=live(&[]).0 {
        let mut second = first + 1 + first % stride;
        while live(&[(first, DriverErrorKind::Other), (second, DriverErrorKind::Other)]).1 == 0 {
            second += stride;
        }
    }
}

// ---- threads ----------------------------------------------------------------------------------------------------------------

#[test]
fn eight_threads_on_four_streams_beside_pauses() {
    let driver = Arc::new(MemDriver::new(ROOM));
    let engine = Engine::new(driver.clone(), Config { tends: false, ..Config::default() });
    let region = engine.region("a", policy(Backup::Host)).unwrap();
    let aside = engine.region("b", policy(Backup::Host)).unwrap();
    std::thread::scope(|threads| {
        for number in 0..8u64 {
            let (engine, driver) = (&engine, &driver);
            threads.spawn(move || {
                let region = if number < 4 { region } else { aside };
                let mut held: Vec<(Addr, u64, u8)> = Vec::new();
                for turn in 0..300u64 {
                    let size = 1 + (turn * 7919 + number * 31) % 9000;
                    match engine.allocate_cached(on(region, size, number % 4), PoolNumber::NONE) {
                        Ok(addr) => {
                            let value = (turn + number) as u8;
                            // A pause may have taken it again already.
                            let _ = driver.poke(Device(0), addr, &vec![value; size as usize]);
                            held.push((addr, size, value));
                        }
                        Err(error) => assert!(matches!(error.status, Status::Paused | Status::Busy), "{error}"),
                    }
                    if held.len() > 20 {
                        let (addr, size, value) = held.swap_remove((turn % 20) as usize);
                        if number >= 4 {
                            assert_eq!(driver.peek(Device(0), addr, size).unwrap(), vec![value; size as usize]);
                        }
                        engine.free(addr, false).unwrap();
                    }
                }
                held.into_iter().for_each(|(addr, ..)| engine.free(addr, false).unwrap());
            });
        }
        for _ in 0..10 {
            engine.pause(&tag("a"), PauseOptions::default()).unwrap();
            engine.resume(&tag("a"), ResumeOptions::default()).unwrap();
            engine.empty_caches();
        }
    });
    engine.empty_caches();
    assert_eq!(driver.counts(), (0, 0, 0));
}
