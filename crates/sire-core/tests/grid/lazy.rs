//! Lazy pauses: the region is paused and backed up, its memory stays until somebody needs it.

use crate::common::GRANULARITY;
use crate::common::world::{CHUNK, World, policy, tag};
use sire_core::driver::{Addr, Device, DriverErrorKind, Properties};
use sire_core::engine::*;
use sire_core::error::{Error, Status};
use sire_core::policy::{Budget, Standing};
use sire_core::segments::NewMemory;

const SIZE: u64 = 2 * CHUNK;

/// A world whose device holds `room` bytes, with region `r` written and paused lazily.
fn held(policy: Policy, room: u64) -> (World, RegionId, Addr) {
    let mut world = World::new(room);
    let region = world.region("r", policy);
    let addr = world.allocate(region, SIZE).unwrap();
    world.write(addr);
    let report = world.pause_lazily(&tag("r")).unwrap();
    assert_eq!((report.regions_changed, report.bytes_moved, report.bytes_lazy), (1, 0, SIZE));
    (world, region, addr)
}

fn stats(world: &World) -> serde_json::Value {
    serde_json::from_str(&world.engine.stats_json()).unwrap()
}

#[test]
fn a_resume_before_anybody_needs_it_calls_no_driver() {
    for backup in [Backup::Host, Backup::Disk, Backup::None] {
        for clean in [Clean::No, Clean::Declared, Clean::Verified] {
            let (mut world, _, _) = held(Policy { clean, ..policy(backup) }, 1 << 22);
            let calls = world.driver.calls();
            let report = world.resume(&tag("r")).unwrap();
            assert_eq!(world.driver.calls(), calls, "{backup:?} {clean:?}");
            assert_eq!((report.regions_changed, report.bytes_moved, report.bytes_copied), (1, 0, 0));
            world.check();
            world.check_no_leak();
        }
    }
}

#[test]
fn paused_means_paused() {
    let (world, region, addr) = held(policy(Backup::Host), 1 << 22);
    assert_eq!(world.engine.state(region), Ok(State::Paused));
    assert_eq!(world.engine.enter(region, OnPaused::Refuse).unwrap_err().status, Status::Paused);
    assert_eq!(world.engine.allocate(World::request(region, 600)).unwrap_err().status, Status::Paused);
    let stats = stats(&world);
    let region = &stats["regions"][0];
    assert_eq!((&region["state"], &region["lazy_bytes"]), (&"paused".into(), &SIZE.into()));
    assert_eq!(stats["devices"][0]["lazy_bytes"], SIZE);
    let view = world.engine.backup(addr, SIZE).unwrap().expect("it has a backup");
    // SAFETY: the view keeps `len` bytes at `ptr` valid.
    world.twins[&addr].assert_equal(addr, unsafe { std::slice::from_raw_parts(view.ptr, view.len as usize) });
    drop(view);
    world.resume_and_check();
}

#[test]
fn what_nothing_keeps_counts_when_it_is_paused_and_not_again_when_its_memory_goes() {
    let (mut world, _, _) = held(policy(Backup::None), 1 << 22);
    for _ in 0..2 {
        assert_eq!(stats(&world)["regions"][0]["bytes_discarded"], SIZE);
        assert_eq!(world.pause(&tag("r")).unwrap().bytes_discarded, 0);
    }
    world.resume_and_check();
}

#[test]
fn an_allocation_that_does_not_fit_gets_the_memory() {
    let (mut world, _, _) = held(policy(Backup::Host), SIZE + CHUNK);
    let other = world.region("other", policy(Backup::Host));
    let fits = world.allocate(other, CHUNK).unwrap();
    assert_eq!(stats(&world)["regions"][0]["lazy_bytes"], SIZE, "there was room");
    let capturing = Request { capturing: true, ..World::request(other, CHUNK) };
    assert_eq!(world.allocate_as(capturing).unwrap_err().status, Status::OutOfDeviceMemory);
    assert_eq!(stats(&world)["regions"][0]["lazy_bytes"], SIZE, "a capture does not survive it");
    let needs = world.allocate(other, CHUNK).unwrap();
    assert_eq!(stats(&world)["regions"][0]["lazy_bytes"], 0);
    assert_eq!(world.driver.used_bytes(), 2 * CHUNK);
    world.free(fits).unwrap();
    world.free(needs).unwrap();
    world.resume_and_check();
}

#[test]
fn the_least_recently_used_goes_first_and_no_more_than_is_needed() {
    let mut world = World::new(3 * CHUNK);
    let addrs = ["one", "two", "three"].map(|tag| {
        let region = world.region(tag, policy(Backup::Host));
        let addr = world.allocate(region, CHUNK).unwrap();
        world.write(addr);
        addr
    });
    for name in ["two", "one", "three"] {
        world.pause_lazily(&tag(name)).unwrap();
    }
    let lazy = |world: &World| -> Vec<bool> {
        stats(world)["regions"].as_array().unwrap().iter().take(3).map(|region| region["lazy_bytes"] != 0).collect()
    };
    let other = world.region("other", policy(Backup::None));
    world.allocate(other, CHUNK).unwrap();
    assert_eq!(lazy(&world), [true, false, true]);
    assert!(world.engine.make_way(Device(0), CHUNK), "for an allocation that is none of ours");
    assert_eq!(lazy(&world), [false, false, true]);
    assert!(world.engine.make_way(Device(0), 2 * CHUNK) && !world.engine.make_way(Device(0), CHUNK));
    assert!(!world.engine.make_way(Device(1), CHUNK));
    world.driver.set_capacity(1 << 22);
    world.resume(&Selection::All).unwrap();
    world.check();
    assert_eq!(addrs.len(), 3);
    world.check_no_leak();
}

#[test]
fn a_resume_that_does_not_fit_gets_the_memory() {
    let (mut world, _, _) = held(policy(Backup::Host), SIZE + CHUNK);
    let other = world.region("other", policy(Backup::Host));
    world.resume(&tag("r")).unwrap();
    world.pause(&tag("r")).unwrap();
    let addr = world.allocate(other, SIZE).unwrap();
    world.write(addr);
    for name in ["r", "other", "r"] {
        world.pause_lazily(&Selection::All).unwrap();
        world.resume(&tag(name)).unwrap();
        world.check();
        assert!(world.driver.used_bytes() <= SIZE + CHUNK);
    }
    world.driver.set_capacity(1 << 22);
    world.resume_and_check();
}

#[test]
fn a_pause_a_switch_or_a_trim_says_now() {
    let nows: [fn(&mut World); 4] = [
        |world| {
            let report = world.pause(&tag("r")).unwrap();
            assert_eq!((report.regions_changed, report.regions_unchanged), (1, 0));
            assert_eq!((report.bytes_moved, report.bytes_expected, report.allocations), (SIZE, SIZE, 1));
            assert_eq!((report.bytes_copied, report.bytes_hashed), (0, 0));
        },
        |world| assert_eq!(world.pause(&Selection::All).unwrap().bytes_moved, SIZE),
        |world| assert_eq!(world.engine.trim().0, SIZE),
        |world| {
            world.region("other", policy(Backup::Host));
            world.switch(&tag("r"), &tag("other")).unwrap();
        },
    ];
    for now in nows {
        let (mut world, _, _) = held(Policy { clean: Clean::Verified, ..policy(Backup::Host) }, 1 << 22);
        now(&mut world);
        assert_eq!(world.driver.used_bytes(), 0);
        assert_eq!(world.pause(&tag("r")).unwrap().regions_changed, 0, "once");
        world.resume_and_check();
    }
}

#[test]
fn a_lazy_pause_of_what_is_paused_changes_nothing() {
    let (mut world, _, _) = held(policy(Backup::Host), 1 << 22);
    let calls = world.driver.calls();
    let report = world.pause_lazily(&tag("r")).unwrap();
    assert_eq!((report.regions_changed, report.regions_unchanged, world.driver.calls()), (0, 1, calls));
    world.resume_and_check();
}

#[test]
fn what_must_read_as_zero_does() {
    let mut world = World::new(1 << 22);
    let region = world.region("r", Policy { zero_fill: true, ..policy(Backup::None) });
    let addr = world.allocate(region, SIZE).unwrap();
    world.write(addr);
    world.set_override(addr, 0, CHUNK, true);
    let report = world.pause_lazily(&tag("r")).unwrap();
    assert_eq!((report.bytes_lazy, report.bytes_moved), (CHUNK, CHUNK), "what is kept stays, the rest goes");
    world.resume_and_check();
}

#[test]
fn memory_is_freed_while_it_is_held() {
    let (mut world, _, addr) = held(policy(Backup::Host), 1 << 22);
    world.free(addr).unwrap();
    assert_eq!(world.driver.used_bytes(), 0);
    world.check_no_leak();
}

#[test]
fn what_the_driver_refuses_to_take_stays_with_its_content() {
    for verb in ["unmap", "release"] {
        let (mut world, _, _) = held(policy(Backup::Host), 1 << 22);
        world.driver.fail_always(Some((verb, DriverErrorKind::Other)));
        world.pause(&tag("r")).unwrap_err();
        world.engine.trim();
        world.driver.fail_always(None);
        assert_eq!(world.states().values().next(), Some(&State::Paused));
        world.pause(&tag("r")).unwrap();
        assert_eq!(world.driver.used_bytes(), 0, "{verb}");
        world.resume_and_check();
    }
}

/// A pause of everything paused one region, and then failed to release the other, which was held lazily: it answered with the driver's error, as
/// if nothing had happened. (Found by the random lives.)
#[test]
fn a_pause_that_cannot_release_what_was_paused_before_is_a_pause_nevertheless() {
    let (mut world, _, _) = held(policy(Backup::Host), 1 << 22);
    let other = world.region("other", policy(Backup::None));
    assert_eq!(world.engine.state(other), Ok(State::Resident));
    world.driver.fail_always(Some(("unmap", DriverErrorKind::Other)));
    assert_eq!(world.pause(&Selection::All).unwrap().bytes_moved, 0);
    world.driver.fail_always(None);
    assert!(world.engine.take_notices().iter().any(|notice| notice.contains("an earlier pause had left")));
    assert_eq!(world.engine.state(other), Ok(State::Paused));
    assert_eq!(world.pause(&Selection::All).unwrap().bytes_moved, SIZE);
    world.resume_and_check();
}

#[test]
fn a_failed_lazy_pause_leaves_the_region_resident() {
    let mut world = World::new(1 << 22);
    let region = world.region("r", policy(Backup::Host));
    let addr = world.allocate(region, SIZE).unwrap();
    world.write(addr);
    world.driver.fail_always(Some(("copy_to_host", DriverErrorKind::Other)));
    world.pause_lazily(&tag("r")).unwrap_err();
    world.driver.fail_always(None);
    world.check();
    world.write_part(addr, GRANULARITY, 5);
    world.pause_lazily(&tag("r")).unwrap();
    world.resume_and_check();
}

#[test]
fn a_peer_that_comes_meanwhile_has_access() {
    let (mut world, _, addr) = held(policy(Backup::Host), 1 << 22);
    world.engine.allow_peer(Device(0), Device(1)).unwrap();
    world.resume(&tag("r")).unwrap();
    assert!(world.driver.peek(Device(1), addr, 1).is_ok());
    world.check_no_leak();
}

/// Regions `m/a`, which is paused lazily, and `m/b`, which is paused, on a device that has not enough room for both; an allocation in each.
fn one_of_two_held() -> (World, Addr, Addr) {
    let mut world = World::new(1 << 22);
    let addrs = ["m/a", "m/b"].map(|name| {
        let region = world.region(name, policy(Backup::Host));
        let addr = world.allocate(region, SIZE).unwrap();
        world.write(addr);
        addr
    });
    world.pause_lazily(&tag("m/a")).unwrap();
    world.pause(&tag("m/b")).unwrap();
    world.driver.set_capacity(SIZE + CHUNK);
    (world, addrs[0], addrs[1])
}

/// After a resume, or a switch, that had failed for want of memory, what one of its regions held lazily could not make way any more: a resume of the other
/// region alone failed as well.
#[test]
fn what_is_held_lazily_makes_way_after_a_resume_that_failed() {
    let fails: [fn(&mut World) -> Error; 2] =
        [|world| world.resume(&tag("m")).unwrap_err(), |world| world.switch(&tag("other"), &tag("m")).unwrap_err()];
    for fail in fails {
        let (mut world, _, _) = one_of_two_held();
        let other = world.region("other", policy(Backup::Host));
        let small = world.allocate(other, 600).unwrap();
        world.write(small);
        assert_eq!(fail(&mut world).status, Status::OutOfDeviceMemory);
        assert_eq!(stats(&world)["regions"][0]["lazy_bytes"], SIZE);
        let calls = world.driver.log().len();
        world.resume(&tag("m/b")).unwrap();
        assert!(!world.driver.log()[calls..].contains(&"copy_to_host"), "it was in a backup already");
        world.check();
        world.driver.set_capacity(1 << 22);
        world.resume_and_check();
    }
}

/// A resume in the background says of what is held lazily that it is ready. What the program writes there before the resume fails is in no backup.
#[test]
fn what_was_ready_in_a_resume_that_failed_does_not_make_way() {
    let (mut world, addr, _) = one_of_two_held();
    let progress = world.engine.resume_start(&tag("m"), ResumeOptions::default()).unwrap();
    assert!(progress.ready(addr, SIZE));
    world.write(addr);
    assert_eq!(progress.finished(None).unwrap_err().status, Status::OutOfDeviceMemory);
    assert_eq!(world.resume(&tag("m/b")).unwrap_err().status, Status::OutOfDeviceMemory);
    assert_eq!(world.pause(&tag("m")).unwrap().bytes_copied, SIZE);
    world.resume(&tag("m/b")).unwrap();
    world.driver.set_capacity(1 << 22);
    world.resume_and_check();
}

/// A world whose device holds four chunks, with three regions of one chunk each that were paused lazily, in the order of their names.
fn three_held() -> World {
    let mut world = World::new(4 * CHUNK);
    for name in ["one", "two", "three"] {
        let region = world.region(name, policy(Backup::Host));
        let addr = world.allocate(region, CHUNK).unwrap();
        world.write(addr);
        world.pause_lazily(&tag(name)).unwrap();
    }
    world
}

fn make_room(world: &World, chunks: u64) -> Vec<String> {
    world.engine.make_room(Device(0), chunks * CHUNK).unwrap().into_iter().map(|made| made.tag).collect()
}

#[test]
fn who_makes_way_is_up_to_the_program() {
    let world = three_held();
    assert_eq!(make_room(&world, 1), Vec::<String>::new(), "there was room");
    world.engine.set_standing(&tag("one"), Standing { priority: 1, ..Standing::default() }).unwrap();
    world.engine.lease(&tag("two")).unwrap();
    assert_eq!(make_room(&world, 2), ["three"]);
    let error = world.engine.make_room(Device(0), 4 * CHUNK).unwrap_err();
    assert_eq!(error.status, Status::OutOfDeviceMemory);
    assert!(error.message.contains("1 more are leased"), "{}", error.message);
    assert_eq!(make_room(&world, 3), ["one"]);
    world.engine.unlease(&tag("two")).unwrap();
    assert_eq!(world.engine.unlease(&tag("two")).unwrap_err().status, Status::InvalidArgument);
    world.engine.set_standing(&tag("two"), Standing { pinned: true, ..Standing::default() }).unwrap();
    world.engine.make_room(Device(0), 4 * CHUNK).unwrap_err();
    assert!(!world.engine.make_way(Device(0), CHUNK), "what is pinned stays, also when an allocation fails");
    world.engine.set_standing(&tag("two"), Standing::default()).unwrap();
    assert_eq!(make_room(&world, 4), ["two"]);
    world.resume_and_check();
}

#[test]
fn an_allocation_that_does_not_fit_follows_the_same_order() {
    let mut world = three_held();
    world.engine.set_standing(&tag("one"), Standing { priority: 1, ..Standing::default() }).unwrap();
    world.engine.lease(&tag("two")).unwrap();
    let other = world.region("other", policy(Backup::None));
    let addr = world.allocate(other, 2 * CHUNK).unwrap();
    let lazy = |world: &World, i: usize| stats(world)["regions"][i]["lazy_bytes"] != 0;
    assert_eq!([0, 1, 2].map(|i| lazy(&world, i)), [true, true, false]);
    assert_eq!(world.allocate(other, 2 * CHUNK).unwrap_err().status, Status::OutOfDeviceMemory);
    assert!(lazy(&world, 1), "a lease was broken");
    world.free(addr).unwrap();
    world.resume_and_check();
}

/// It once filled the device chunk by chunk, gave back what was cached, made everybody who was paused lazily give way, filled the device again, and failed.
#[test]
fn what_no_device_could_hold_makes_nobody_give_way() {
    let mut world = three_held();
    let other = world.region("other", policy(Backup::Host));
    let before = world.driver.log().len();
    let error = world.allocate(other, 8 * CHUNK).unwrap_err();
    assert_eq!(error.status, Status::OutOfDeviceMemory);
    assert!(error.message.contains(&format!("of {} bytes", 4 * CHUNK)), "{}", error.message);
    assert!(!world.engine.make_way(Device(0), 8 * CHUNK), "for an allocation that is none of ours");
    let memory = NewMemory {
        region: Some(other),
        device: Device(0),
        size: 8 * CHUNK,
        properties: Properties { shareable: 0, rdma: false },
        capturing: false,
    };
    assert_eq!(world.engine.segments().create(memory).unwrap_err().status, Status::OutOfDeviceMemory);
    assert!(!world.driver.log()[before..].contains(&"create"));
    assert!([0, 1, 2].iter().all(|&i| stats(&world)["regions"][i]["lazy_bytes"] == CHUNK));
    world.resume_and_check();
}

#[test]
fn budgets_are_for_what_regions_hold_and_for_others() {
    let world = three_held();
    world.engine.set_budget(Device(0), Budget { limit: Some(3 * CHUNK), ..Budget::default() });
    assert_eq!(make_room(&world, 1), ["one"]);
    world.engine.set_budget(Device(0), Budget { headroom: CHUNK, ..Budget::default() });
    assert_eq!(make_room(&world, 2), ["two"]);
    assert_eq!(make_room(&world, 2), Vec::<String>::new());
    world.engine.make_room(Device(0), 4 * CHUNK).unwrap_err();
    world.engine.set_budget(Device(0), Budget { residency: 3_600_000, ..Budget::default() });
    assert_eq!(make_room(&world, 4), ["three"], "spared only while somebody else is left");
    world.resume_and_check();
}

/// Memory that a lazy pause had left for the program's sake was given back, unsaved, once the program no longer wanted it to stay: with it its neighbours.
#[test]
fn what_was_kept_resident_is_not_given_back_before_another_pause() {
    for clean in [Clean::No, Clean::Verified] {
        let mut world = World::new(1 << 22);
        let region = world.region("small", Policy { clean, ..policy(Backup::Host) });
        let slots = [600, 700].map(|size| world.allocate(region, size).unwrap());
        slots.iter().for_each(|&slot| world.write(slot));
        let other = world.allocate(region, SIZE).unwrap();
        world.write(other);
        world.keep_resident(slots[0]).unwrap();
        world.pause_lazily(&tag("small")).unwrap();
        world.free(slots[0]).unwrap();
        let offered = world.engine.holdings(&tag("small")).unwrap()[0].resident.values().sum::<u64>();
        assert!(offered > SIZE, "a pause that is not lazy takes the slab as well");
        assert_eq!(world.engine.trim().0, SIZE, "of the slab nothing was saved");
        world.resume(&tag("small")).unwrap();
        world.check();
        world.pause_lazily(&tag("small")).unwrap();
        assert!(world.engine.trim().0 > SIZE, "the next pause has taken it");
        world.resume_and_check();
    }
}
