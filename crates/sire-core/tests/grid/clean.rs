//! Clean backups: what an earlier pause backed up and what has not changed since is not copied again, and everything else is.

use crate::common::GRANULARITY;
use crate::common::world::{CHUNK, World, tag};
use sire_core::driver::{Addr, DriverErrorKind};
use sire_core::engine::*;
use sire_core::error::Status;

/// Pieces of content in these tests: one copy piece.
const PAGE: u64 = GRANULARITY;

fn declared(backup: Backup) -> Policy {
    Policy { backup, clean: Clean::Declared, ..Policy::default() }
}

/// A world with one region and one written allocation of two chunks, paused and resumed once.
fn backed_up(policy: Policy) -> (World, RegionId, Addr) {
    let mut world = World::new(1 << 22);
    let region = world.region("r", policy);
    let addr = world.allocate(region, 2 * CHUNK).unwrap();
    world.write(addr);
    let report = cycle(&mut world);
    assert_eq!((report.bytes_copied, report.bytes_clean), (2 * CHUNK, 0), "nothing was backed up before");
    (world, region, addr)
}

/// A pause and a resume of everything, with every byte checked; what the pause reported.
fn cycle(world: &mut World) -> Report {
    let report = world.pause(&Selection::All).unwrap();
    world.resume(&Selection::All).unwrap();
    world.check();
    report
}

#[test]
fn what_is_declared_not_to_change_is_copied_once() {
    for backup in [Backup::Host, Backup::Disk] {
        let (mut world, _, _) = backed_up(declared(backup));
        for _ in 0..3 {
            let before = world.driver.log().len();
            let report = cycle(&mut world);
            assert_eq!((report.bytes_copied, report.bytes_clean), (0, 2 * CHUNK), "{backup:?}");
            assert_eq!(report.bytes_moved, 2 * CHUNK);
            assert!(!world.driver.log()[before..].contains(&"copy_to_host"));
        }
        world.check_no_leak();
    }
}

#[test]
fn a_change_that_is_told_is_copied_and_nothing_else() {
    for backup in [Backup::Host, Backup::Disk] {
        let (mut world, _, addr) = backed_up(declared(backup));
        world.write_part(addr, CHUNK + PAGE + 5, 7);
        let report = cycle(&mut world);
        assert_eq!((report.bytes_copied, report.bytes_clean), (PAGE, 2 * CHUNK - PAGE), "{backup:?}");
        world.write_part(addr, PAGE - 1, 2);
        assert_eq!(cycle(&mut world).bytes_copied, 2 * PAGE);
        assert_eq!(cycle(&mut world).bytes_copied, 0);
        world.check_no_leak();
    }
}

#[test]
fn new_memory_is_copied_and_old_memory_is_not() {
    let (mut world, region, _) = backed_up(declared(Backup::Host));
    let new = world.allocate(region, CHUNK + 99).unwrap();
    world.write(new);
    let report = cycle(&mut world);
    assert_eq!((report.bytes_copied, report.bytes_clean), (CHUNK + 99, 2 * CHUNK));
    world.free(new).unwrap();
    let again = world.allocate(region, CHUNK + 99).unwrap();
    assert_eq!(again, new, "the driver gives the same address out again");
    world.write(again);
    assert_eq!(cycle(&mut world).bytes_copied, CHUNK + 99);
    world.check_no_leak();
}

#[test]
fn a_slot_that_was_freed_and_given_out_again_is_copied() {
    let mut world = World::new(1 << 22);
    let region = world.region("r", declared(Backup::Host));
    let slots: Vec<Addr> = (0..4).map(|_| world.allocate(region, 600).unwrap()).collect();
    slots.iter().for_each(|&slot| world.write(slot));
    cycle(&mut world);
    assert_eq!(cycle(&mut world).bytes_copied, 0);
    world.free(slots[1]).unwrap();
    assert_eq!(cycle(&mut world).bytes_copied, 0, "the slab's other slots have not changed");
    let again = world.allocate(region, 600).unwrap();
    world.driver.poke(world.twins[&again].device, again, &[7; 600]).unwrap();
    let twin = world.twins.get_mut(&again).unwrap();
    twin.bytes.fill(7);
    twin.promised = crate::common::world::Which::All;
    assert!(cycle(&mut world).bytes_copied > 0, "{again:?} was {:?}", slots[1]);
    assert_eq!(cycle(&mut world).bytes_copied, 0);
    world.check_no_leak();
}

#[test]
fn overrides_are_followed() {
    let (mut world, _, addr) = backed_up(declared(Backup::Host));
    world.set_override(addr, PAGE, PAGE, false);
    let report = cycle(&mut world);
    assert_eq!((report.bytes_copied, report.bytes_discarded), (0, PAGE));
    world.write_part(addr, PAGE, 100);
    world.set_override(addr, PAGE, PAGE, true);
    let report = cycle(&mut world);
    assert_eq!(
        (report.bytes_copied, report.bytes_clean),
        (PAGE, 2 * CHUNK - PAGE),
        "what was thrown away has no backup"
    );
    world.check_no_leak();
}

#[test]
fn what_is_kept_by_an_override_alone_is_clean_too() {
    let mut world = World::new(1 << 22);
    let region = world.region("r", declared(Backup::None));
    let addr = world.allocate(region, 2 * CHUNK).unwrap();
    world.write(addr);
    world.set_override(addr, 100, CHUNK, true);
    assert_eq!(cycle(&mut world).bytes_copied, CHUNK);
    let report = cycle(&mut world);
    assert_eq!((report.bytes_copied, report.bytes_clean, report.bytes_discarded), (0, CHUNK, CHUNK));
    world.check_no_leak();
}

#[test]
fn a_backup_that_somebody_reads_is_never_written_to() {
    let (mut world, _, addr) = backed_up(declared(Backup::Host));
    world.pause(&tag("r")).unwrap();
    let view = world.engine.backup(addr, 2 * CHUNK).unwrap().expect("contiguous");
    // SAFETY: the view keeps `len` bytes at `ptr` valid.
    let read = |view: &BackupView| unsafe { std::slice::from_raw_parts(view.ptr, view.len as usize) }.to_vec();
    let before = read(&view);
    world.resume(&tag("r")).unwrap();
    assert_eq!(cycle(&mut world).bytes_copied, 0, "reading does no harm");
    world.write_part(addr, 0, 1);
    assert_eq!(cycle(&mut world).bytes_copied, PAGE);
    assert_eq!(read(&view), before);
    drop(view);
    world.check_no_leak();
}

#[test]
fn a_failed_pause_keeps_what_was_clean() {
    let (mut world, region, addr) = backed_up(declared(Backup::Host));
    let new = world.allocate(region, CHUNK).unwrap();
    world.write(new);
    world.write_part(addr, 0, 1);
    world.driver.fail_always(Some(("copy_to_host", DriverErrorKind::Other)));
    world.pause(&tag("r")).unwrap_err();
    world.driver.fail_always(None);
    world.check();
    let report = cycle(&mut world);
    assert_eq!((report.bytes_copied, report.bytes_clean), (CHUNK + PAGE, 2 * CHUNK - PAGE));
    world.check_no_leak();
}

#[test]
fn a_pause_without_room_forgets_neither_changes_nor_backups() {
    let (mut world, region, addr) = backed_up(declared(Backup::Host));
    let new = world.allocate(region, 64 * CHUNK).unwrap();
    world.write(new);
    world.write_part(addr, 0, 1);
    world.engine.configure(&|config| config.host_limit = Some(3 * CHUNK));
    assert_eq!(world.pause(&tag("r")).unwrap_err().status, Status::OutOfBackupSpace);
    world.free(new).unwrap();
    let report = cycle(&mut world);
    assert_eq!((report.bytes_copied, report.bytes_clean), (PAGE, 2 * CHUNK - PAGE));
    world.check_no_leak();
}

#[test]
fn trimmed_backups_are_made_again() {
    let (mut world, _, _) = backed_up(declared(Backup::Host));
    world.engine.trim();
    assert_eq!(cycle(&mut world).bytes_copied, 2 * CHUNK);
    assert_eq!(cycle(&mut world).bytes_copied, 0);
    world.check_no_leak();
}

#[test]
fn statistics_count_what_was_copied() {
    let (mut world, _, _) = backed_up(declared(Backup::Host));
    cycle(&mut world);
    let stats: serde_json::Value = serde_json::from_str(&world.engine.stats_json()).unwrap();
    assert_eq!(stats["regions"][0]["bytes_copied"], 2 * CHUNK);
}

fn verified(backup: Backup) -> Policy {
    Policy { backup, clean: Clean::Verified, ..Policy::default() }
}

fn paranoid(backup: Backup) -> Policy {
    Policy { backup, clean: Clean::Paranoid, ..Policy::default() }
}

fn host_bytes(world: &World) -> u64 {
    let stats: serde_json::Value = serde_json::from_str(&world.engine.stats_json()).unwrap();
    stats["tiers"][0]["used_bytes"].as_u64().unwrap()
}

/// Content without two equal pages.
fn varied(len: u64, seed: u64) -> Vec<u8> {
    (0..len).map(|i| (i.wrapping_mul(i ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}

#[test]
fn verified_memory_that_changed_is_copied_and_nothing_else() {
    for (policy, hashing) in [
        (verified(Backup::Host), true),
        (verified(Backup::Disk), true),
        (verified(Backup::Host), false),
        (paranoid(Backup::Host), true),
    ] {
        let mut world = World::new(1 << 22);
        world.driver.set_hashing(hashing);
        let region = world.region("r", policy);
        let addr = world.allocate(region, 2 * CHUNK).unwrap();
        world.write_repeated(addr, &varied(2 * CHUNK, 1));
        assert_eq!(cycle(&mut world).bytes_copied, 2 * CHUNK, "{policy:?}");
        let report = cycle(&mut world);
        assert_eq!(
            (report.bytes_copied, report.bytes_clean, report.bytes_hashed),
            (0, 2 * CHUNK, 2 * CHUNK),
            "{policy:?}"
        );
        world.write_part(addr, CHUNK + 5, 1);
        let report = cycle(&mut world);
        assert_eq!((report.bytes_copied, report.bytes_clean), (PAGE, 2 * CHUNK - PAGE), "{policy:?}");
        assert_eq!(cycle(&mut world).bytes_copied, 0, "{policy:?}");
        assert!(host_bytes(&world) <= 2 * CHUNK);
        world.check_no_leak();
    }
}

#[test]
fn a_slot_with_new_content_is_seen() {
    for policy in [verified(Backup::Host), paranoid(Backup::Host), verified(Backup::Disk)] {
        let mut world = World::new(1 << 22);
        let region = world.region("r", policy);
        let slots: Vec<Addr> = (0..4).map(|_| world.allocate(region, 600).unwrap()).collect();
        slots.iter().for_each(|&slot| world.write(slot));
        cycle(&mut world);
        world.write(slots[2]);
        assert!(cycle(&mut world).bytes_copied > 0);
        assert_eq!(cycle(&mut world).bytes_copied, 0);
        world.check_no_leak();
    }
}

#[test]
fn an_odd_address_is_copied_where_it_cannot_be_hashed() {
    let mut world = World::new(1 << 22);
    let region = world.region("r", verified(Backup::None));
    let addr = world.allocate(region, 2 * CHUNK).unwrap();
    world.write(addr);
    world.set_override(addr, 5, CHUNK, true);
    cycle(&mut world);
    world.write_part(addr, 100, 3);
    cycle(&mut world);
    world.check_no_leak();
}

#[test]
fn constant_pages_take_no_room() {
    for policy in [verified(Backup::Host), declared(Backup::Host), verified(Backup::Disk)] {
        let mut world = World::new(1 << 22);
        let region = world.region("r", policy);
        let words: [&[u8]; 3] = [&[0], &[0, 0x3c], b"8 bytes."];
        let addrs = words.map(|word| {
            let addr = world.allocate(region, CHUNK + 12).unwrap();
            world.write_repeated(addr, word);
            addr
        });
        let report = world.pause(&tag("r")).unwrap();
        assert_eq!((report.bytes_copied, report.bytes_constant), (0, 3 * (CHUNK + 12)), "{policy:?}");
        assert_eq!(host_bytes(&world), if policy.backup == Backup::Host { 0 } else { host_bytes(&world) });
        let view = world.engine.backup(addrs[1].offset(1), 5).unwrap().expect("assembled");
        // SAFETY: the view keeps `len` bytes at `ptr` valid.
        assert_eq!(unsafe { std::slice::from_raw_parts(view.ptr, 5) }, [0x3c, 0, 0x3c, 0, 0x3c]);
        drop(view);
        let report = world.resume(&tag("r")).unwrap();
        assert_eq!(report.bytes_constant + report.bytes_copied, 3 * (CHUNK + 12));
        world.check();
        world.write_part(addrs[0], PAGE + 1, 1);
        let report = cycle(&mut world);
        assert_eq!(report.bytes_copied, PAGE);
        assert_eq!(report.bytes_clean + report.bytes_constant, 3 * (CHUNK + 12) - PAGE);
        assert_eq!(cycle(&mut world).bytes_copied, 0);
        world.check_no_leak();
    }
}

#[test]
fn two_models_with_one_base_keep_it_once() {
    let mut world = World::new(1 << 22);
    let (one, other) = (world.region("one", declared(Backup::Host)), world.region("other", verified(Backup::Host)));
    let base = varied(2 * CHUNK, 7);
    let addrs = [one, other].map(|region| {
        let addr = world.allocate(region, 2 * CHUNK).unwrap();
        world.write_repeated(addr, &base);
        addr
    });
    world.write_part(addrs[1], 3 * PAGE, 9);
    world.pause(&tag("one")).unwrap();
    let report = world.pause(&tag("other")).unwrap();
    assert_eq!((report.bytes_copied, report.bytes_shared), (PAGE, 2 * CHUNK - PAGE));
    assert_eq!(host_bytes(&world), 2 * CHUNK + PAGE);
    let view = world.engine.backup(addrs[1], 2 * CHUNK).unwrap().expect("assembled");
    // SAFETY: the view keeps `len` bytes at `ptr` valid.
    world.twins[&addrs[1]].assert_equal(addrs[1], unsafe { std::slice::from_raw_parts(view.ptr, view.len as usize) });
    drop(view);
    world.resume(&Selection::All).unwrap();
    world.check();
    // Neither sees what the other does to its content, in whichever order.
    for round in 0..4 {
        world.write_part(addrs[round % 2], PAGE * round as u64, 100);
        assert_eq!(cycle(&mut world).bytes_copied, PAGE, "round {round}");
        assert_eq!(cycle(&mut world).bytes_copied, 0);
    }
    world.free(addrs[0]).unwrap();
    assert_eq!(cycle(&mut world).bytes_copied, 0, "what was shared outlives the first owner");
    world.check_no_leak();
}

/// A model on the disk had pages in common with one in host memory, and could not use them there. That it had looked kept the other from ever writing to its
/// own backup again: each change took new room, and where there was none the pause was refused.
#[test]
fn who_cannot_use_pages_in_host_memory_leaves_them_to_their_owner() {
    let mut world = World::new(1 << 22);
    let base = varied(2 * CHUNK, 7);
    let [addr, _] = [("host", Backup::Host), ("disk", Backup::Disk)].map(|(name, backup)| {
        let region = world.region(name, verified(backup));
        let addr = world.allocate(region, 2 * CHUNK).unwrap();
        world.write_repeated(addr, &base);
        world.pause(&tag(name)).unwrap();
        addr
    });
    world.resume(&Selection::All).unwrap();
    world.engine.configure(&|config| config.host_limit = Some(2 * CHUNK));
    world.write_part(addr, 0, 1);
    assert_eq!(world.pause(&tag("host")).map(|report| report.bytes_copied), Ok(PAGE));
    assert_eq!(host_bytes(&world), 2 * CHUNK);
    world.resume(&Selection::All).unwrap();
    world.check();
    world.check_no_leak();
}

#[test]
fn what_one_pause_finds_twice_is_kept_once_afterwards() {
    let mut world = World::new(1 << 22);
    let base = varied(2 * CHUNK, 3);
    for tag in ["one", "other"] {
        let region = world.region(tag, verified(Backup::Host));
        let addr = world.allocate(region, 2 * CHUNK).unwrap();
        world.write_repeated(addr, &base);
    }
    let report = world.pause(&Selection::All).unwrap();
    assert_eq!((report.bytes_copied, report.bytes_shared), (4 * CHUNK, 2 * CHUNK));
    assert_eq!(host_bytes(&world), 2 * CHUNK);
    world.resume(&Selection::All).unwrap();
    world.check();
    assert_eq!(cycle(&mut world).bytes_copied, 0);
    world.check_no_leak();
}

#[test]
fn content_of_which_nothing_is_promised_is_neither_hashed_nor_shared() {
    let mut world = World::new(1 << 22);
    let region = world.region("r", crate::common::world::policy(Backup::Host));
    let addr = world.allocate(region, CHUNK).unwrap();
    world.write_repeated(addr, &[0]);
    let report = cycle(&mut world);
    assert_eq!((report.bytes_copied, report.bytes_hashed, report.bytes_constant), (CHUNK, 0, 0));
    assert!(!world.driver.log().contains(&"hash"));
    world.check_no_leak();
}

#[test]
fn a_failed_hash_leaves_everything_as_it_was() {
    let (mut world, _, addr) = backed_up(verified(Backup::Host));
    world.write_part(addr, 0, 1);
    world.driver.fail_always(Some(("hash", DriverErrorKind::Other)));
    world.pause(&tag("r")).unwrap_err();
    world.driver.fail_always(None);
    world.check();
    let report = cycle(&mut world);
    assert_eq!((report.bytes_copied, report.bytes_clean), (PAGE, 2 * CHUNK - PAGE));
    world.check_no_leak();
}

/// A page was written over by half in its old place, because the other half held nothing any more. It was still found under its old content, so a second
/// model with that content copied nothing and came back with the first one's new bytes.
#[test]
fn a_page_that_is_written_over_in_part_is_not_found_any_more() {
    for policy in [verified(Backup::Host), declared(Backup::Host)] {
        for (dead, together) in [(false, false), (false, true), (true, false), (true, true)] {
            let mut world = World::new(1 << 22);
            let base = varied(2 * CHUNK, 5);
            let one = world.region("one", policy);
            let addr = world.allocate(one, 2 * CHUNK).unwrap();
            world.write_repeated(addr, &base);
            cycle(&mut world);
            let gap = (addr.offset(PAGE / 2), PAGE);
            if dead {
                world.pause_without(&tag("one"), &[gap]).unwrap();
                world.resume(&tag("one")).unwrap();
            } else {
                world.set_override(addr, PAGE / 2, PAGE, false);
                cycle(&mut world);
            }
            world.write_bytes(addr, 0, &varied(PAGE / 2, 9));
            let other = world.region("other", policy);
            let same = world.allocate(other, 2 * CHUNK).unwrap();
            world.write_repeated(same, &base);
            if !together {
                world.pause_without(&tag("one"), &[gap][..usize::from(dead)]).unwrap();
            }
            let report = world.pause_without(&Selection::All, &[gap][..usize::from(dead)]).unwrap();
            world.resume(&Selection::All).unwrap();
            world.check();
            // Both pages at the gap are saved anew, unless it is known that one has not changed.
            let anew = if policy.clean == Clean::Verified { 2 * PAGE } else { PAGE };
            assert_eq!(report.bytes_shared, 2 * CHUNK - anew, "{policy:?}, dead {dead}, together {together}");
            world.check_no_leak();
        }
    }
}
