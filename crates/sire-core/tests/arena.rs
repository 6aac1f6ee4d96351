//! The host arena as its users see it: how much memory stays, when it comes in, and what happens where a driver or the system refuses.
#![cfg(not(feature = "shuttle"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::MemDriver;
use common::world::{CHUNK, World, policy, tag};
use sire_core::driver::{Addr, Device, DriverErrorKind};
use sire_core::engine::*;
use std::sync::Arc;
use std::time::{Duration, Instant};

const MANY: u64 = 1 << 30;
const MIB: u64 = 1 << 20;

/// A figure of the host tier.
fn host(engine: &Engine, name: &str) -> u64 {
    let stats: serde_json::Value = serde_json::from_str(&engine.stats_json()).unwrap();
    stats["tiers"][0][name].as_u64().unwrap()
}

/// Backups come from the NUMA node that the driver names, if the machine has one at all; both kinds of memory are found again.
#[test]
fn backups_lie_near_their_device() {
    let mut world = World::new(MANY);
    world.engine.configure(&|config| config.host_nodes = true);
    let region = world.region("near", policy(Backup::Host));
    for _ in 0..2 {
        round(&mut world, region, 2);
    }
    assert!(host(&world.engine, "present_bytes") <= 3 * CHUNK.next_multiple_of(MIB), "the arena grew");
    let wished =
        |line: &str| line.split(' ').nth(1).is_some_and(|policy| policy == "prefer:0" || policy == "prefer=relative:0");
    let Ok(maps) = std::fs::read_to_string("/proc/self/numa_maps") else { return };
    assert!(maps.lines().any(wished), "no memory was wished for on node 0:\n{maps}");
}

/// One round of pause and resume with `chunks` chunks to save.
fn round(world: &mut World, region: RegionId, chunks: u64) {
    let addr = world.allocate(region, chunks * CHUNK).unwrap();
    world.write(addr);
    world.pause(&Selection::All).unwrap();
    world.resume(&Selection::All).unwrap();
    world.check();
    world.free(addr).unwrap();
}

#[test]
fn what_stays_is_a_matter_of_policy() {
    for (kept, after) in
        [(Retention::Release, [0, 0, 0]), (Retention::Shrink, [8, 8, 2]), (Retention::Retain, [8, 8, 8])]
    {
        let mut world = World::new(MANY);
        world.engine.configure(&|config| config.host_policy = kept);
        let region = world.region("m", policy(Backup::Host));
        round(&mut world, region, 8);
        let mut found = [host(&world.engine, "reserved_bytes") / CHUNK, 0, 0];
        round(&mut world, region, 2);
        found[1] = host(&world.engine, "reserved_bytes") / CHUNK;
        (0..4).for_each(|_| round(&mut world, region, 2));
        found[2] = host(&world.engine, "reserved_bytes") / CHUNK;
        // A slab goes or stays as a whole, and room of eight chunks serves two as well.
        let fine = found[..2] == after[..2] && (found[2] == after[2] || kept == Retention::Shrink && found[2] == 0);
        assert!(fine, "{kept:?}: {found:?} chunks instead of {after:?}");
        world.engine.trim();
        assert_eq!((host(&world.engine, "reserved_bytes"), world.driver.registered()), (0, 0));
        world.check_no_leak();
    }
}

fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches("kB").trim().parse::<u64>().unwrap() * 1024
}

/// Measured, not counted: the process is as small as before.
#[test]
fn released_memory_returns_to_the_system() {
    let driver = Arc::new(MemDriver::new(MANY));
    let config = Config { host_policy: Retention::Release, host_unit: 4 * MIB, ..Config::default() };
    let engine = Engine::new(driver, config);
    let region = engine.region("m", policy(Backup::Host)).unwrap();
    let size = 48 * MIB;
    let addr = engine.allocate(World::request(region, size)).unwrap();
    let before = resident_bytes();
    engine.pause(&Selection::All, PauseOptions::default()).unwrap();
    assert_eq!(host(&engine, "present_bytes"), size);
    engine.resume(&Selection::All, ResumeOptions::default()).unwrap();
    let after = resident_bytes();
    // Tests run beside this one in the same process, with less.
    assert!(after < before + size / 2, "{before} bytes before, {after} after");
    assert_eq!(host(&engine, "reserved_bytes"), 0);
    engine.free(addr, false).unwrap();
}

fn pattern(len: u64, seed: u64) -> Vec<u8> {
    (0..len / 8).flat_map(|i| ((i ^ seed).wrapping_mul(0x9E37_79B9_7F4A_7C15)).to_le_bytes()).collect()
}

/// Several threads bring the memory of two pauses in, ahead of the copies, in units that both may touch.
#[test]
fn many_units_come_in_by_many_threads() {
    let driver = Arc::new(MemDriver::new(MANY));
    let config = Config { host_unit: 16 << 10, host_threads: 3, copy_piece: 24 << 10, ..Config::default() };
    let engine = Engine::new(driver.clone(), config);
    let regions = ["a", "b"].map(|tag| engine.region(tag, policy(Backup::Host)).unwrap());
    let sizes = [MIB + 4096, MIB];
    let addrs: Vec<Addr> = regions
        .iter()
        .zip(sizes)
        .map(|(&region, size)| engine.allocate(World::request(region, size)).unwrap())
        .collect();
    for turn in 0..6 {
        for (&addr, size) in addrs.iter().zip(sizes) {
            driver.poke(Device(0), addr, &pattern(size, turn)).unwrap();
        }
        std::thread::scope(|scope| {
            for name in ["a", "b"] {
                let engine = &engine;
                scope.spawn(move || engine.pause(&tag(name), PauseOptions::default()).unwrap());
            }
        });
        assert_eq!(host(&engine, "registered_bytes"), host(&engine, "present_bytes"));
        engine.resume(&Selection::All, ResumeOptions::default()).unwrap();
        for (&addr, size) in addrs.iter().zip(sizes) {
            assert!(driver.peek(Device(0), addr, size).unwrap() == pattern(size, turn), "turn {turn}, {addr:?}");
        }
        if turn % 3 == 2 {
            engine.trim();
        }
    }
    assert_eq!(engine.take_notices(), Vec::<String>::new());
}

/// Pageable memory is slower, and works.
#[test]
fn a_driver_that_registers_nothing_is_asked_once_per_slab() {
    let mut world = World::new(MANY);
    world.driver.fail_always(Some(("register_host", DriverErrorKind::Other)));
    let region = world.region("m", policy(Backup::Host));
    round(&mut world, region, 8);
    let asked = world.driver.log().iter().filter(|verb| **verb == "register_host").count();
    assert_eq!(asked, 1, "eight units, one refusal");
    assert!(world.engine.take_notices().iter().any(|notice| notice.contains("pageable")));
    world.check_no_leak();
}

#[test]
fn a_reserve_is_there_before_the_first_pause_and_stays() {
    let mut world = World::new(MANY);
    world.engine.configure(&|config| {
        config.host_reserve = 8 * CHUNK;
        config.host_policy = Retention::Release;
    });
    let region = world.region("m", policy(Backup::Host));
    let addr = world.allocate(region, 4 * CHUNK).unwrap();
    world.write(addr);
    let deadline = Instant::now() + Duration::from_secs(60);
    while host(&world.engine, "registered_bytes") < 8 * CHUNK {
        assert!(Instant::now() < deadline, "the reserve does not come in");
        std::thread::sleep(Duration::from_millis(1));
    }
    let calls = world.driver.calls();
    world.pause(&Selection::All).unwrap();
    assert!(!world.driver.log()[calls as usize..].contains(&"register_host"));
    world.resume(&Selection::All).unwrap();
    assert_eq!(host(&world.engine, "reserved_bytes"), 8 * CHUNK);
    world.check();
    world.check_no_leak();
}
