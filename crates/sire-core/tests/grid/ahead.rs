//! Backups made ahead of a pause: what they hold is not copied again, what has changed since is, and whatever the program does meanwhile
//! wins.

use crate::common::GRANULARITY;
use crate::common::world::{CHUNK, World, policy, tag};
use sire_core::driver::{Addr, DriverErrorKind};
use sire_core::engine::*;
use sire_core::error::Status;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Pieces of content in these tests: one copy piece.
const PAGE: u64 = GRANULARITY;
/// Six chunks: two windows.
const SIZE: u64 = 6 * CHUNK;

fn clean(clean: Clean, backup: Backup) -> Policy {
    Policy { backup, clean, zero_fill: false, retain: false, pageable: false, whole: false }
}

/// Content without two equal pages.
fn varied(len: u64, seed: u64) -> Vec<u8> {
    (0..len).map(|i| (i.wrapping_mul(i ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}

/// A world with one region and one written allocation of two windows.
fn written(policy: Policy) -> (World, RegionId, Addr) {
    let mut world = World::new(1 << 22);
    let region = world.region("r", policy);
    let addr = world.allocate(region, SIZE).unwrap();
    world.write_repeated(addr, &varied(SIZE, 3));
    (world, region, addr)
}

fn pre_copy(world: &World) -> Report {
    let report = world.engine.pre_copy(&tag("r"), false).unwrap();
    world.check();
    report
}

fn cycle(world: &mut World) -> Report {
    let report = world.pause(&Selection::All).unwrap();
    world.resume(&Selection::All).unwrap();
    world.check();
    report
}

const POLICIES: [Policy; 6] = {
    const fn of(clean: Clean, backup: Backup) -> Policy {
        Policy { backup, clean, zero_fill: false, retain: false, pageable: false, whole: false }
    }
    [
        of(Clean::Declared, Backup::Host),
        of(Clean::Verified, Backup::Host),
        of(Clean::Paranoid, Backup::Host),
        of(Clean::Declared, Backup::Disk),
        of(Clean::Verified, Backup::Disk),
        of(Clean::Verified, Backup::Auto),
    ]
};

#[test]
fn what_was_pre_copied_is_not_copied_by_the_pause() {
    for policy in POLICIES {
        let (mut world, _, _) = written(policy);
        let report = pre_copy(&world);
        assert_eq!((report.bytes_copied, report.bytes_clean, report.regions_changed), (SIZE, 0, 1), "{policy:?}");
        assert_eq!(report.bytes_expected, SIZE);
        let again = pre_copy(&world);
        assert_eq!((again.bytes_copied, again.bytes_clean), (0, SIZE), "{policy:?}");
        let report = cycle(&mut world);
        assert_eq!((report.bytes_copied, report.bytes_clean), (0, SIZE), "{policy:?}");
        world.check_no_leak();
    }
}

#[test]
fn what_changed_since_is_copied_and_nothing_else() {
    for policy in POLICIES {
        let (mut world, _, addr) = written(policy);
        pre_copy(&world);
        world.write_part(addr, 5 * CHUNK + 7, 1);
        let report = cycle(&mut world);
        assert_eq!((report.bytes_copied, report.bytes_clean), (PAGE, SIZE - PAGE), "{policy:?}");
        world.write_part(addr, CHUNK, PAGE - 1);
        assert_eq!(pre_copy(&world).bytes_copied, PAGE, "{policy:?}");
        assert_eq!(cycle(&mut world).bytes_copied, 0, "{policy:?}");
        world.check_no_leak();
    }
}

#[test]
fn without_a_driver_that_hashes_pages_are_compared() {
    let (mut world, _, addr) = written(clean(Clean::Verified, Backup::Host));
    world.driver.set_hashing(false);
    pre_copy(&world);
    world.write_part(addr, 9, 1);
    assert_eq!(cycle(&mut world).bytes_copied, PAGE);
    world.check_no_leak();
}

/// A kernel that runs beside the copy: it writes to memory of which the copy has taken the old bytes already.
#[test]
fn a_write_that_races_with_the_copy_is_found() {
    for policy in [
        clean(Clean::Verified, Backup::Host),
        clean(Clean::Paranoid, Backup::Host),
        clean(Clean::Verified, Backup::Disk),
    ] {
        let (mut world, _, addr) = written(policy);
        let driver = Arc::clone(&world.driver);
        let device = world.twins[&addr].device;
        // Two pieces fly at once: before the fifth is sent, the first has landed.
        world.driver.at_later("copy_to_host", 4, move || driver.poke(device, addr, &[1, 2, 3]).unwrap());
        world.twins.get_mut(&addr).unwrap().bytes[..3].copy_from_slice(&[1, 2, 3]);
        pre_copy(&world);
        assert_eq!(cycle(&mut world).bytes_copied, PAGE, "{policy:?}");
        assert_eq!(cycle(&mut world).bytes_copied, 0, "{policy:?}");
        world.check_no_leak();
    }
}

#[test]
fn a_change_that_is_told_during_the_copy_stays_told() {
    for (verb, before, copied) in [("synchronize", 0, 0), ("hash", 0, 0), ("copy_to_host", 4, PAGE), ("wait", 9, PAGE)]
    {
        let (world, _, addr) = written(clean(Clean::Declared, Backup::Host));
        let (driver, device) = (Arc::clone(&world.driver), world.twins[&addr].device);
        let (mut world, outcome) = with_surprise(world, (verb, before), move |engine| {
            driver.poke(device, addr, &[7; 9]).unwrap();
            engine.changed(addr, 9).unwrap();
        });
        outcome.unwrap();
        world.twins.get_mut(&addr).unwrap().bytes[..9].fill(7);
        assert_eq!(cycle(&mut world).bytes_copied, copied, "{verb}");
        assert_eq!(cycle(&mut world).bytes_copied, 0);
        world.check_no_leak();
    }
}

#[test]
fn content_of_which_nothing_is_promised_is_refused() {
    let (mut world, _, addr) = written(policy(Backup::Host));
    let none = world.region("r/none", policy(Backup::None));
    world.allocate(none, CHUNK).unwrap();
    for what in ["r", "r/none"] {
        let error = world.engine.pre_copy(&tag(what), false).unwrap_err();
        assert_eq!(error.status, Status::InvalidArgument);
        assert!(error.message.contains("immutable") && error.message.contains("'r"), "{error}");
    }
    let file = world.region("file", Policy { clean: Clean::Verified, ..policy(Backup::File) });
    assert_eq!(world.engine.region_info(file).unwrap().0, "file");
    assert_eq!(world.engine.pre_copy(&tag("file"), false).unwrap_err().status, Status::InvalidArgument);
    world.free(addr).unwrap();
    assert_eq!(world.engine.pre_copy(&tag("nowhere"), false).unwrap_err().status, Status::UnknownTag);
    assert_eq!(world.engine.pre_copy(&tag("r"), true).unwrap_err().status, Status::Capturing);
    world.check_no_leak();
}

#[test]
fn what_keeps_nothing_or_is_paused_is_left_out() {
    let (mut world, _, _) = written(clean(Clean::Declared, Backup::Host));
    let none = world.region("r/cache", policy(Backup::None));
    world.allocate(none, CHUNK).unwrap();
    assert_eq!(pre_copy(&world).regions_changed, 1);
    world.pause(&tag("r")).unwrap();
    let report = pre_copy(&world);
    assert_eq!((report.regions_changed, report.regions_unchanged, report.bytes_copied), (0, 1, 0));
    world.resume(&tag("r")).unwrap();
    world.check_no_leak();
}

#[test]
fn small_allocations_and_overrides_are_followed() {
    let mut world = World::new(1 << 22);
    let region = world.region("r", clean(Clean::Declared, Backup::Host));
    let slots: Vec<Addr> = (0..5).map(|_| world.allocate(region, 700).unwrap()).collect();
    slots.iter().for_each(|&slot| world.write(slot));
    let large = world.allocate(region, 2 * CHUNK).unwrap();
    world.write(large);
    world.set_override(large, PAGE, PAGE, false);
    pre_copy(&world);
    world.free(slots[1]).unwrap();
    let report = world.pause(&tag("r")).unwrap();
    assert_eq!((report.bytes_copied, report.bytes_discarded), (0, PAGE));
    world.resume(&tag("r")).unwrap();
    let again = world.allocate(region, 690).unwrap();
    world.driver.poke(world.twins[&again].device, again, &[9; 690]).unwrap();
    world.twins.get_mut(&again).unwrap().bytes.fill(9);
    world.twins.get_mut(&again).unwrap().promised = crate::common::world::Which::All;
    assert!(pre_copy(&world).bytes_copied > 0, "a slot that was given out again is new");
    assert_eq!(cycle(&mut world).bytes_copied, 0);
    world.check_no_leak();
}

/// Runs a pre-copy during which `surprise` happens at the first call of `verb`.
fn with_surprise(
    mut world: World,
    (verb, before): (&'static str, u64),
    surprise: impl FnOnce(&Engine) + Send + 'static,
) -> (World, Result<Report, sire_core::error::Error>) {
    let engine = Arc::new(std::mem::replace(&mut world.engine, Engine::new(world.driver.clone(), Config::default())));
    let (there, happened) = (Arc::clone(&engine), Arc::new(AtomicBool::new(false)));
    let told = Arc::clone(&happened);
    world.driver.at_later(verb, before, move || {
        surprise(&there);
        drop(there);
        told.store(true, Ordering::SeqCst);
    });
    let outcome = engine.pre_copy(&tag("r"), false);
    assert!(happened.load(Ordering::SeqCst), "{verb} was never called");
    world.engine = wait_alone(engine);
    (world, outcome)
}

#[test]
fn memory_that_is_freed_meanwhile_goes_at_once_and_its_backup_with_it() {
    for verb in ["hash", "copy_to_host", "wait"] {
        let (world, _, addr) = written(clean(Clean::Verified, Backup::Host));
        let (mut world, outcome) = with_surprise(world, (verb, 0), move |engine| engine.free(addr, false).unwrap());
        world.twins.remove(&addr);
        assert!(outcome.unwrap().bytes_copied < SIZE);
        assert_eq!(world.driver.lost(), None, "{verb}");
        assert_eq!(world.driver.counts(), (0, 0, 0), "{verb}");
        world.check_no_leak();
    }
}

#[test]
fn an_allocation_gets_memory_that_is_freed_meanwhile() {
    let (mut world, region, addr) = written(clean(Clean::Verified, Backup::Host));
    world.driver.set_capacity(SIZE);
    let (freed, done) = std::sync::mpsc::channel();
    let engine = Arc::new(std::mem::replace(&mut world.engine, Engine::new(world.driver.clone(), Config::default())));
    let there = Arc::clone(&engine);
    world.driver.at_next("copy_to_host", move || {
        there.free(addr, false).unwrap();
        freed.send(()).unwrap();
        // Long enough for the other thread to find that there is no memory yet.
        std::thread::sleep(std::time::Duration::from_millis(30));
    });
    let new = std::thread::scope(|scope| {
        scope.spawn(|| engine.pre_copy(&tag("r"), false).unwrap());
        done.recv().unwrap();
        engine.allocate(World::request(region, SIZE)).unwrap()
    });
    engine.free(new, false).unwrap();
    world.twins.clear();
    world.engine = Arc::into_inner(engine).expect("nobody is left");
    world.check_no_leak();
}

#[test]
fn a_pause_that_comes_meanwhile_goes_first() {
    for verb in ["hash", "copy_to_host", "wait"] {
        let (mut world, region, _) = written(clean(Clean::Verified, Backup::Host));
        let engine =
            Arc::new(std::mem::replace(&mut world.engine, Engine::new(world.driver.clone(), Config::default())));
        let (there, other) = (Arc::clone(&engine), Arc::new(std::sync::Mutex::new(None)));
        let started = Arc::clone(&other);
        world.driver.at_next(verb, move || {
            let pausing = Arc::clone(&there);
            // Whoever looks from inside makes the pause busy for a moment.
            let pause = move || while pausing.pause(&tag("r"), PauseOptions::default()).is_err() {};
            *started.lock().unwrap() = Some(std::thread::spawn(pause));
            while there.enter(region, OnPaused::Refuse).is_ok() {
                there.leave(region);
                std::thread::yield_now();
            }
        });
        let report = engine.pre_copy(&tag("r"), false).unwrap();
        assert!(report.bytes_copied < SIZE, "{verb}: {report:?}");
        other.lock().unwrap().take().unwrap().join().unwrap();
        assert_eq!(engine.state(region), Ok(State::Paused));
        assert_eq!(world.driver.used_bytes(), 0);
        world.engine = wait_alone(engine);
        world.resume(&tag("r")).unwrap();
        world.check();
        world.check_no_leak();
    }
}

fn wait_alone(mut engine: Arc<Engine>) -> Engine {
    loop {
        match Arc::try_unwrap(engine) {
            Ok(engine) => return engine,
            Err(shared) => engine = shared,
        }
        std::thread::yield_now();
    }
}

#[test]
fn cancelled_it_keeps_the_windows_that_are_done() {
    let (mut world, region, _) = written(clean(Clean::Verified, Backup::Host));
    let other = world.allocate(region, CHUNK).unwrap();
    world.write_repeated(other, &varied(CHUNK, 11));
    pre_copy(&world);
    world.write_repeated(other, &varied(CHUNK, 12));
    let (mut world, outcome) = with_surprise(world, ("copy_to_host", 0), |engine| engine.cancel());
    let error = outcome.unwrap_err();
    assert_eq!(error.status, Status::Cancelled);
    assert!(error.message.contains("stay backed up"), "{error}");
    let report = cycle(&mut world);
    assert_eq!(report.bytes_clean, SIZE);
    world.check_no_leak();
}

#[test]
fn a_second_one_at_the_same_time_is_refused() {
    let (world, _, _) = written(clean(Clean::Verified, Backup::Host));
    let (mut world, outcome) = with_surprise(world, ("copy_to_host", 0), |engine| {
        assert_eq!(engine.pre_copy(&tag("r"), false).unwrap_err().status, Status::Busy);
    });
    outcome.unwrap();
    assert_eq!(cycle(&mut world).bytes_copied, 0);
    world.check_no_leak();
}

#[test]
fn a_peer_that_comes_meanwhile_has_access_at_once() {
    let (world, _, addr) = written(clean(Clean::Verified, Backup::Host));
    let driver = Arc::clone(&world.driver);
    let (mut world, outcome) = with_surprise(world, ("copy_to_host", 0), move |engine| {
        let (here, there) = (sire_core::driver::Device(0), sire_core::driver::Device(1));
        engine.allow_peer(here, there).unwrap();
        assert!(driver.peek(there, addr, 1).is_ok(), "the peer cannot read what is being copied");
    });
    outcome.unwrap();
    assert_eq!(cycle(&mut world).bytes_copied, 0);
    world.check_no_leak();
}

#[test]
fn a_peer_that_goes_meanwhile_has_no_access_from_then_on() {
    let (world, _, addr) = written(clean(Clean::Verified, Backup::Host));
    let (here, there) = (sire_core::driver::Device(0), sire_core::driver::Device(1));
    world.engine.allow_peer(here, there).unwrap();
    let driver = Arc::clone(&world.driver);
    let (mut world, outcome) = with_surprise(world, ("copy_to_host", 0), move |engine| {
        engine.refuse_peer(here, there).unwrap();
        assert!(driver.peek(there, addr, 1).is_err(), "the peer still reads what is being copied");
    });
    outcome.unwrap();
    assert_eq!(cycle(&mut world).bytes_copied, 0);
    assert!(world.driver.peek(there, addr, 1).is_err());
    world.check_no_leak();
}

#[test]
fn where_host_memory_ends_it_stops_and_keeps_what_it_has() {
    let (mut world, _, _) = written(clean(Clean::Verified, Backup::Host));
    world.engine.configure(&|config| config.host_limit = Some(5 * CHUNK));
    let error = world.engine.pre_copy(&tag("r"), false).unwrap_err();
    assert_eq!(error.status, Status::OutOfBackupSpace);
    assert!(error.message.contains(&format!("{} bytes that were pre-copied", 4 * CHUNK)), "{error}");
    world.check();
    world.engine.configure(&|config| config.host_limit = None);
    let report = cycle(&mut world);
    assert_eq!((report.bytes_copied, report.bytes_clean), (2 * CHUNK, 4 * CHUNK));
    world.check_no_leak();
}

#[test]
fn a_failed_copy_leaves_everything_as_it_was() {
    for policy in POLICIES {
        for verb in ["copy_to_host", "record", "wait", "synchronize"] {
            let (mut world, _, addr) = written(policy);
            cycle(&mut world);
            world.write_part(addr, 5, 1);
            world.driver.fail_at(world.driver.calls() + 1, DriverErrorKind::Other);
            world.driver.fail_always(Some((verb, DriverErrorKind::Other)));
            let failed = world.engine.pre_copy(&tag("r"), false);
            assert!(failed.is_err(), "{verb} {policy:?}");
            world.driver.fail_always(None);
            world.driver.clear_faults();
            world.check();
            assert_eq!(cycle(&mut world).bytes_copied, PAGE, "{verb} {policy:?}");
            world.check_no_leak();
        }
    }
}

#[test]
fn constant_and_common_pages_take_no_room() {
    let mut world = World::new(1 << 22);
    let region = world.region("r", clean(Clean::Verified, Backup::Host));
    let addrs = [0, 1].map(|_| {
        let addr = world.allocate(region, 2 * CHUNK).unwrap();
        world.write_repeated(addr, &varied(2 * CHUNK, 5));
        world.write_constant(addr, CHUNK, CHUNK, [7; 8]);
        addr
    });
    let report = pre_copy(&world);
    assert_eq!((report.bytes_copied, report.bytes_constant, report.bytes_shared), (CHUNK, 2 * CHUNK, CHUNK));
    assert_eq!(cycle(&mut world).bytes_copied, 0);
    world.write_part(addrs[0], 0, 1);
    assert_eq!(pre_copy(&world).bytes_copied, PAGE);
    cycle(&mut world);
    world.check_no_leak();
}

#[test]
fn trimmed_backups_are_made_again() {
    let (mut world, _, _) = written(clean(Clean::Declared, Backup::Host));
    pre_copy(&world);
    world.engine.trim();
    assert_eq!(pre_copy(&world).bytes_copied, SIZE);
    assert_eq!(cycle(&mut world).bytes_copied, 0);
    world.check_no_leak();
}

#[test]
fn processes_share_what_was_pre_copied() {
    let (mut world, region, _) = written(clean(Clean::Verified, Backup::Host));
    world.engine.configure(&|config| (config.shared_backups, config.shared_dir) = (true, config.disk_dir.clone()));
    let other = world.allocate(region, CHUNK).unwrap();
    world.write_repeated(other, &varied(CHUNK, 11));
    assert_eq!(pre_copy(&world).bytes_copied, SIZE + CHUNK);
    assert_eq!(cycle(&mut world).bytes_copied, 0);
    world.check_no_leak();
}
