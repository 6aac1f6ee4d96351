//! Dummies behind paused addresses: strays read junk and write nowhere that matters, and nothing else is any different.

use crate::common::GRANULARITY;
use crate::common::world::{CHUNK, World, policy, tag};
use sire_core::driver::{Addr, Device, DriverErrorKind};
use sire_core::engine::*;
use sire_core::error::Status;

const SIZE: u64 = 2 * CHUNK + GRANULARITY;

fn veiling(room: u64) -> World {
    let world = World::new(room);
    world.engine.configure(&|config| config.dummies = true);
    world
}

fn figures(world: &World) -> (u64, u64, u64) {
    let stats: serde_json::Value = serde_json::from_str(&world.engine.stats_json()).unwrap();
    let figure = |name: &str| stats["dummies"][name].as_u64().unwrap();
    (figure("bytes"), figure("veiled_bytes"), figure("strays"))
}

/// A world with a written region `cache` that a pause throws away.
fn paused(room: u64) -> (World, Addr) {
    let mut world = veiling(room);
    let region = world.region("cache", policy(Backup::None));
    let addr = world.allocate(region, SIZE).unwrap();
    world.write(addr);
    world.pause(&tag("cache")).unwrap();
    (world, addr)
}

/// What a kernel would do that nobody told of the pause.
fn stray(world: &World, addr: Addr, bytes: &[u8]) {
    world.driver.poke(Device(0), addr, bytes).unwrap();
    world.driver.peek(Device(0), addr, bytes.len() as u64).unwrap();
    assert_eq!(world.driver.lost(), None);
}

#[test]
fn strays_live_and_are_counted() {
    let (mut world, addr) = paused(1 << 22);
    assert_eq!(world.driver.used_bytes(), GRANULARITY, "one granule lies behind all of it");
    assert_eq!(figures(&world), (GRANULARITY, SIZE, 0));
    stray(&world, addr, &[7; 100]);
    stray(&world, addr.offset(SIZE - 50), &[7; 50]);
    world.resume(&tag("cache")).unwrap();
    assert_eq!(figures(&world), (0, 0, 1));
    let notices = world.engine.take_notices();
    assert!(
        notices.iter().any(|notice| notice.contains("something wrote to paused memory on device 0")),
        "{notices:?}"
    );
    world.write(addr);
    world.check();
    world.pause(&tag("cache")).unwrap();
    assert_eq!(world.driver.peek(Device(0), addr, 100).unwrap(), vec![0; 100], "the dummy was cleared");
    world.resume(&tag("cache")).unwrap();
    assert_eq!(figures(&world), (0, 0, 1), "reading is not seen");
    world.check_no_leak();
}

#[test]
fn what_has_a_backup_has_no_dummy() {
    let mut world = veiling(1 << 22);
    for backup in [Backup::Host, Backup::Disk] {
        let region = world.region(&format!("{backup:?}"), policy(backup));
        let addr = world.allocate(region, SIZE).unwrap();
        world.write(addr);
        world.pause(&Selection::All).unwrap();
        assert_eq!(figures(&world), (0, 0, 0));
        assert!(world.driver.peek(Device(0), addr, 1).is_err());
        world.resume(&Selection::All).unwrap();
    }
    let region = world.region("mixed", policy(Backup::None));
    let addr = world.allocate(region, SIZE).unwrap();
    world.write(addr);
    world.set_override(addr, 10, 10, true);
    world.pause(&tag("mixed")).unwrap();
    assert_eq!(figures(&world).1, SIZE - CHUNK, "a chunk of which something is kept is none that was thrown away");
    world.resume(&tag("mixed")).unwrap();
    world.check();
    world.check_no_leak();
}

#[test]
fn nobody_asked() {
    let mut world = World::new(1 << 22);
    let region = world.region("cache", policy(Backup::None));
    let addr = world.allocate(region, SIZE).unwrap();
    world.pause(&tag("cache")).unwrap();
    assert_eq!(world.driver.used_bytes(), 0);
    assert!(world.driver.peek(Device(0), addr, 1).is_err());
    world.check_no_leak();
}

#[test]
fn frees_while_paused_and_several_regions() {
    let (mut world, addr) = paused(1 << 22);
    let other = world.region("other", Policy { zero_fill: true, ..Policy::default() });
    let zeroed = world.allocate(other, CHUNK).unwrap();
    let small = world.allocate(other, 600).unwrap();
    world.write(zeroed);
    world.write(small);
    world.pause(&tag("other")).unwrap();
    assert_eq!(world.driver.used_bytes(), GRANULARITY);
    stray(&world, zeroed, &[9; 10]);
    stray(&world, small, &[9; 10]);
    world.free(addr).unwrap();
    world.free(small).unwrap();
    world.resume(&tag("other")).unwrap();
    world.check();
    world.check_no_leak();
}

#[test]
fn a_resume_that_fails_leaves_the_dummy() {
    let (mut world, addr) = paused(4 * CHUNK);
    let other = world.region("other", policy(Backup::Host));
    let taken = world.allocate(other, 3 * CHUNK).unwrap();
    assert_eq!(world.resume(&tag("cache")).unwrap_err().status, Status::OutOfDeviceMemory);
    stray(&world, addr, &[1; 10]);
    assert_eq!(figures(&world).1, SIZE);
    world.free(taken).unwrap();
    world.resume(&tag("cache")).unwrap();
    world.check();
    world.check_no_leak();
}

#[test]
fn no_room_for_the_dummy_is_no_failure() {
    let mut world = veiling(2 * CHUNK);
    let region = world.region("cache", policy(Backup::None));
    let addr = world.allocate(region, CHUNK).unwrap();
    world.write(addr);
    world.driver.fail_always(Some(("reserve", DriverErrorKind::OutOfMemory)));
    world.pause(&tag("cache")).unwrap();
    world.driver.fail_always(None);
    assert_eq!(figures(&world), (0, 0, 0));
    assert!(world.engine.take_notices().iter().any(|notice| notice.contains("no dummy behind them")));
    world.resume(&tag("cache")).unwrap();
    world.check_no_leak();
}

#[test]
fn switches_and_lazy_pauses() {
    let (mut world, addr) = paused(4 * CHUNK);
    let other = world.region("other", policy(Backup::Host));
    let theirs = world.allocate(other, 3 * CHUNK).unwrap();
    world.write(theirs);
    world.switch(&tag("other"), &tag("cache")).unwrap();
    assert_eq!(figures(&world), (0, 0, 0));
    world.write(addr);
    world.check();
    world.switch(&tag("cache"), &tag("other")).unwrap();
    stray(&world, addr, &[3; 30]);
    world.check();
    world.pause(&tag("other")).unwrap();
    world.resume(&tag("cache")).unwrap();
    world.write(addr);
    world.pause_lazily(&tag("cache")).unwrap();
    assert_eq!(figures(&world).1, 0, "its own memory is still there");
    world.engine.trim();
    assert_eq!(figures(&world).1, SIZE);
    stray(&world, addr, &[3; 30]);
    world.resume(&tag("cache")).unwrap();
    assert_eq!(figures(&world), (0, 0, 2));
    world.check();
    world.check_no_leak();
}

#[test]
fn memory_that_was_handed_out_stays_and_says_why() {
    let mut world = World::new(1 << 22);
    let region = world.region("buffers", policy(Backup::Host));
    let shared = world.allocate(region, CHUNK).unwrap();
    let own = world.allocate(region, CHUNK).unwrap();
    world.write(shared);
    world.write(own);
    world.engine.segments().lend_range(shared, CHUNK, "it was exported").unwrap().keep();
    let held = |world: &World| {
        let stats: serde_json::Value = serde_json::from_str(&world.engine.stats_json()).unwrap();
        stats["regions"][0]["held"].clone()
    };
    assert_eq!(held(&world), serde_json::json!({"it was exported": CHUNK}));
    world.twins.get_mut(&shared).unwrap().resident = true;
    let report = world.pause(&tag("buffers")).unwrap();
    assert_eq!((report.bytes_moved, report.bytes_held), (CHUNK, CHUNK));
    world.check();
    assert!(world.engine.require_usable(shared).is_ok());
    assert_eq!(world.engine.require_usable(own).unwrap_err().status, Status::Paused);
    assert_eq!(world.engine.segments().lend_range(own, 1, "too late").unwrap_err().status, Status::Paused);
    assert!(world.engine.take_notices().iter().any(|notice| notice.contains("stay on the device: it was exported")));
    world.resume(&tag("buffers")).unwrap();
    world.free(shared).unwrap();
    assert_eq!(held(&world), serde_json::json!({}));
    assert_eq!(world.engine.require_usable(shared).unwrap_err().status, Status::UnknownAddress);
    world.check();
    world.check_no_leak();
}
