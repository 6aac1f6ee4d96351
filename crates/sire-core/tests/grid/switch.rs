//! Switches: two sets of regions change places in one call. What must hold besides the bytes: the device never needs more than it
//! has, memory that fits changes hands, and a failure leaves either everything as it was or everything paused.

use crate::common::GRANULARITY;
use crate::common::world::{CHUNK, World, policy, tag};
use sire_core::driver::{Addr, Device, DriverErrorKind};
use sire_core::engine::*;
use sire_core::error::Status;

fn a() -> Selection {
    tag("a")
}

fn b() -> Selection {
    tag("b")
}

/// A device for `chunks` chunks; `a` is paused, `b` resident, each with allocations of these sizes.
fn world(chunks: u64, in_a: &[u64], in_b: &[u64]) -> (World, Vec<Addr>) {
    let mut world = World::new(chunks * CHUNK);
    let mut addrs = Vec::new();
    for (name, sizes) in [("a", in_a), ("b", in_b)] {
        let region = world.region(name, policy(Backup::Host));
        let made: Vec<Addr> = sizes.iter().map(|&size| world.allocate(region, size).unwrap()).collect();
        made.iter().for_each(|&addr| world.write(addr));
        addrs.extend(made);
        if name == "a" {
            world.pause(&a()).unwrap();
        }
    }
    (world, addrs)
}

fn count(world: &World, verb: &str) -> usize {
    world.driver.log().iter().filter(|logged| **logged == verb).count()
}

fn states(world: &World) -> Vec<State> {
    world.states().into_values().collect()
}

#[test]
fn two_regions_change_places_on_a_device_for_one() {
    let (mut world, _) = world(4, &[4 * CHUNK], &[4 * CHUNK]);
    for (out, back) in [(b(), a()), (a(), b()), (b(), a())] {
        let before = (count(&world, "create"), count(&world, "release"));
        let (paused, resumed) = world.switch(&out, &back).unwrap();
        assert_eq!((count(&world, "create"), count(&world, "release")), before, "all memory changes hands");
        assert_eq!((paused.bytes_moved, paused.bytes_recycled, paused.bytes_copied), (0, 4 * CHUNK, 4 * CHUNK));
        assert_eq!((resumed.bytes_moved, resumed.bytes_recycled, resumed.bytes_copied), (0, 4 * CHUNK, 4 * CHUNK));
        world.check();
    }
    assert_eq!(states(&world), [State::Resident, State::Paused]);
    world.resume(&b()).expect_err("there is no room for both");
    world.switch(&a(), &b()).unwrap();
    world.check_no_leak();
}

#[test]
fn what_does_not_match_waits_for_credit_and_is_never_asked_for_in_vain() {
    let odd = CHUNK - GRANULARITY;
    let (mut world, _) = world(4, &[odd, 2 * CHUNK, 700], &[odd, CHUNK, odd, 900]);
    for (out, back) in [(b(), a()), (a(), b()), (b(), a())] {
        let before = count(&world, "create");
        let (paused, resumed) = world.switch(&out, &back).unwrap();
        assert_eq!(paused.bytes_moved + paused.bytes_recycled, paused.bytes_expected);
        assert_eq!(resumed.bytes_moved + resumed.bytes_recycled, resumed.bytes_expected);
        assert_eq!(paused.bytes_recycled, resumed.bytes_recycled);
        assert!(count(&world, "create") > before && resumed.bytes_recycled > 0);
        assert_eq!(world.driver.refused(), 0, "memory was asked for that was not there");
        world.check();
    }
    world.check_no_leak();
}

#[test]
fn discarded_and_free_memory_counts_as_credit() {
    let mut world = World::new(4 * CHUNK);
    let (model, cache) = (world.region("a", policy(Backup::Host)), world.region("b", policy(Backup::None)));
    let addr = world.allocate(model, 3 * CHUNK + 5).unwrap();
    world.write(addr);
    world.pause(&a()).unwrap();
    world.allocate(cache, 2 * CHUNK + GRANULARITY).unwrap();
    let (paused, _) = world.switch(&b(), &a()).unwrap();
    assert_eq!((paused.bytes_copied, paused.bytes_discarded), (0, 2 * CHUNK + GRANULARITY));
    assert_eq!(world.driver.refused(), 0);
    world.check();
    world.check_no_leak();
}

#[test]
fn what_cannot_fit_is_refused_before_anything_moves() {
    let (mut world, _) = world(4, &[4 * CHUNK], &[2 * CHUNK]);
    let other = world.region("c", policy(Backup::Host));
    world.allocate(other, GRANULARITY).unwrap();
    let copies = count(&world, "copy_to_host");
    let error = world.switch(&b(), &a()).unwrap_err();
    assert_eq!((error.status, states(&world)[1]), (Status::OutOfDeviceMemory, State::Resident));
    assert!(error.message.contains("switch") && error.message.contains("device 0"), "{error}");
    assert_eq!(count(&world, "copy_to_host"), copies);
    world.check();
}

#[test]
fn a_side_with_nothing_to_do_leaves_the_other_its_work() {
    let (mut world, _) = world(8, &[CHUNK], &[CHUNK]);
    world.resume(&a()).unwrap();
    let (paused, resumed) = world.switch(&b(), &a()).unwrap();
    assert_eq!((paused.regions_changed, resumed.regions_changed, resumed.regions_unchanged), (1, 0, 1));
    world.pause(&a()).unwrap();
    let (paused, resumed) = world.switch(&b(), &a()).unwrap();
    assert_eq!((paused.regions_changed, resumed.regions_changed), (0, 1));
    let (paused, resumed) = world.switch(&b(), &a()).unwrap();
    assert_eq!((paused.regions_changed, resumed.regions_changed), (0, 0));
    world.check();
    world.check_no_leak();
}

#[test]
fn refusals_change_nothing() {
    let (mut world, _) = world(8, &[CHUNK], &[CHUNK]);
    let capturing =
        world.engine.switch(&b(), &a(), SwitchOptions { capturing: true, ..SwitchOptions::default() }).unwrap_err();
    assert_eq!(capturing.status, Status::Capturing);
    for (out, back, wanted) in [
        (b(), b(), Status::InvalidArgument),
        (Selection::All, a(), Status::InvalidArgument),
        (tag("x"), a(), Status::UnknownTag),
        (b(), tag("x"), Status::UnknownTag),
    ] {
        assert_eq!(world.switch(&out, &back).unwrap_err().status, wanted);
    }
    let region = world.engine.region("b", policy(Backup::Host)).unwrap();
    world.engine.enter(region, OnPaused::Refuse).unwrap();
    assert_eq!(world.switch(&b(), &a()).unwrap_err().status, Status::Busy);
    world.engine.leave(region);
    world.switch(&b(), &a()).unwrap();
    world.check_no_leak();
}

/// The copy in fails at its very end: what had changed hands goes back, and nothing was created on the way.
#[test]
fn an_undo_returns_the_same_memory() {
    let (mut world, _) = world(2, &[2 * CHUNK], &[2 * CHUNK]);
    world.driver.fail_always(Some(("copy_to_device", DriverErrorKind::Other)));
    let (created, released) = (count(&world, "create"), count(&world, "release"));
    let error = world.switch(&b(), &a()).unwrap_err();
    // The undo copies in as well.
    assert_eq!(error.status, Status::PausedAfterFailure, "{error}");
    world.driver.fail_always(None);
    world.switch(&b(), &a()).unwrap();
    world.check();
    assert!(count(&world, "create") - created <= 4 && count(&world, "release") >= released);
    world.check_no_leak();
}

#[test]
fn a_damaged_backup_stops_the_switch_and_everything_is_as_before() {
    let (mut world, addrs) = world(4, &[], &[2 * CHUNK]);
    let disk = world.region("a", policy(Backup::Disk));
    let addr = world.allocate(disk, CHUNK).unwrap();
    world.write(addr);
    world.pause(&a()).unwrap();
    world.damage_files();
    let error = world.switch(&b(), &a()).unwrap_err();
    assert_eq!(error.status, Status::BackupIo, "{error}");
    assert_eq!(world.engine.state(world.twins[&addrs[0]].region), Ok(State::Resident));
    world.check();
}

#[test]
fn two_devices_switch_at_once() {
    let mut world = World::new(3 * CHUNK);
    for (name, backup) in [("a", Backup::Host), ("b", Backup::Disk)] {
        let region = world.region(name, policy(backup));
        for device in [0, 1] {
            let request = Request { device: Device(device), ..World::request(region, 2 * CHUNK + 100) };
            let addr = world.allocate_as(request).unwrap();
            world.write(addr);
        }
        if name == "a" {
            world.pause(&a()).unwrap();
        }
    }
    for (out, back) in [(b(), a()), (a(), b())] {
        world.switch(&out, &back).unwrap();
        assert_eq!(world.driver.refused(), 0);
        world.check();
    }
    world.check_no_leak();
}

#[test]
fn a_clean_side_costs_no_copy() {
    let mut world = World::new(4 * CHUNK);
    let clean = Policy { backup: Backup::Host, clean: Clean::Declared, ..Policy::default() };
    for name in ["a", "b"] {
        let region = world.region(name, clean);
        let addr = world.allocate(region, 4 * CHUNK).unwrap();
        world.write(addr);
        world.pause(&tag(name)).unwrap();
    }
    world.resume(&a()).unwrap();
    for (out, back) in [(a(), b()), (b(), a()), (a(), b())] {
        let (paused, resumed) = world.switch(&out, &back).unwrap();
        assert_eq!((paused.bytes_copied, paused.bytes_clean), (0, 4 * CHUNK));
        assert_eq!((resumed.bytes_copied, resumed.bytes_recycled), (4 * CHUNK, 4 * CHUNK));
        world.check();
    }
    world.check_no_leak();
}
