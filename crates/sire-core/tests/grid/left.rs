//! What a pause leaves on the device because it has to, and what becomes of that once it no longer has to.

use crate::common::world::{CHUNK, World, policy, tag};
use sire_core::driver::{Addr, DriverErrorKind};
use sire_core::engine::*;
use sire_core::error::Status;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

const SIZE: u64 = 2 * CHUNK;

/// A paused region: a slab that stayed for the sake of one slot, which has been freed since, and a large allocation that went, or may go.
fn left_behind(rule: Policy, lazy: bool) -> World {
    let mut world = World::new(1 << 22);
    let region = world.region("r", rule);
    let [kept, neighbour, large] = [600, 700, SIZE].map(|size| world.allocate(region, size).unwrap());
    for addr in [kept, neighbour, large] {
        world.write(addr);
    }
    world.keep_resident(kept).unwrap();
    world.engine.pause(&tag("r"), PauseOptions { lazy, ..PauseOptions::default() }).unwrap();
    if rule.backup == Backup::None {
        world.twins.get_mut(&large).unwrap().promised = crate::common::world::Which::None;
    }
    world.free(kept).unwrap();
    world
}

/// The slab stayed on the device until the region was resumed and paused again, whatever was paused meanwhile.
#[test]
fn what_need_not_stay_any_more_goes_with_the_next_pause() {
    for lazy in [false, true] {
        for (backup, clean) in [
            (Backup::Host, Clean::No),
            (Backup::Host, Clean::Verified),
            (Backup::Disk, Clean::Declared),
            (Backup::Auto, Clean::No),
        ] {
            let mut world = left_behind(Policy { clean, ..policy(backup) }, lazy);
            let (left, large) = (world.driver.used_bytes(), if lazy { SIZE } else { 0 });
            let slab = left - large;
            assert!(slab > 0, "the slab stayed");
            let report = world.pause(&tag("r")).unwrap();
            assert_eq!(
                (report.regions_changed, report.regions_unchanged),
                (1, 0),
                "{backup:?} {clean:?}, lazily {lazy}"
            );
            assert_eq!((report.bytes_moved, report.bytes_expected), (left, left));
            assert!((1..=slab).contains(&report.bytes_copied), "what was held lazily is saved already: {report:?}");
            assert_eq!(world.driver.used_bytes(), 0);
            let report = world.pause(&tag("r")).unwrap();
            assert_eq!((report.regions_changed, report.regions_unchanged, report.bytes_moved), (0, 1, 0));
            assert_eq!(
                world.engine.pauses(*world.policies.keys().next().unwrap()).unwrap(),
                1,
                "the rest is none of its own"
            );
            world.resume_and_check();
        }
    }
}

#[test]
fn without_a_backup_the_next_pause_throws_it_away_and_says_so() {
    for lazy in [false, true] {
        let mut world = left_behind(policy(Backup::None), lazy);
        let report = world.pause(&tag("r")).unwrap();
        assert_eq!((report.bytes_discarded, report.bytes_copied, world.driver.used_bytes()), (700, 0, 0));
        world.twins.values_mut().for_each(|twin| twin.promised = crate::common::world::Which::None);
        world.resume_and_check();
    }
}

/// Another lazy pause changes nothing, and what still has to stay does.
#[test]
fn only_a_pause_that_means_now_takes_it_and_only_what_may_go() {
    let mut world = left_behind(policy(Backup::Host), true);
    let calls = world.driver.calls();
    assert_eq!((world.pause_lazily(&tag("r")).unwrap().regions_changed, world.driver.calls()), (0, calls));
    let region = world.engine.region("r", policy(Backup::Host)).unwrap();
    world.resume_and_check();
    let mut world = World::new(1 << 22);
    let again = world.region("r", policy(Backup::Host));
    assert_eq!(again, region);
    let kept = world.allocate(again, SIZE).unwrap();
    world.write(kept);
    world.keep_resident(kept).unwrap();
    for changed in [1, 0] {
        assert_eq!(world.pause(&tag("r")).unwrap().regions_changed, changed);
        assert_eq!(world.driver.used_bytes(), SIZE);
        world.check();
    }
    world.resume_and_check();
}

/// Every driver call of that pause fails once: the region stays paused, nothing is lost, and the pause can be repeated.
#[test]
fn a_pause_of_what_was_left_can_fail_anywhere() {
    for (lazy, kind) in [false, true]
        .into_iter()
        .flat_map(|lazy| [DriverErrorKind::Other, DriverErrorKind::OutOfMemory].map(|kind| (lazy, kind)))
    {
        for call in 1.. {
            let mut world = left_behind(policy(Backup::Host), lazy);
            world.driver.fail_at(world.driver.calls() + call, kind);
            let failed = world.pause(&tag("r")).is_err();
            let hit = world.driver.pending_faults() == 0;
            world.driver.clear_faults();
            assert_eq!(world.states().values().next(), Some(&State::Paused), "call {call}");
            if call % 2 == 0 {
                world.pause(&tag("r")).unwrap();
                assert_eq!(world.driver.used_bytes(), 0, "call {call}, failed {failed}");
            }
            world.resume_and_check();
            if !hit {
                assert!(call > 5, "it made only {call} calls");
                break;
            }
        }
    }
}

/// A free waits for the device, and the driver refuses that, so the allocation lives on; meanwhile its region was paused, and the pause had left to the
/// free what was the free's. It stays on the device as it was: a resume finds it, nobody who needs memory gets it unsaved, and another pause takes it.
#[test]
fn a_free_that_is_refused_while_its_region_is_paused_loses_nothing() {
    for (lazy, again) in [(false, false), (false, true), (true, false), (true, true)] {
        let mut world = World::new(1 << 22);
        let region = world.region("r", policy(Backup::Host));
        let [freed, other]: [Addr; 2] = [SIZE, CHUNK].map(|size| world.allocate(region, size).unwrap());
        world.write(freed);
        world.write(other);
        let pause = PauseOptions { lazy, ..PauseOptions::default() };
        let error = free_in_vain(&world, freed, || {
            world.engine.pause(&tag("r"), pause).unwrap();
        });
        assert_eq!(error.status, Status::Driver, "{error}");
        assert!(error.message.contains("synchronize"), "it says what was refused: {error}");
        assert_eq!(world.states().values().next(), Some(&State::Paused));
        world.engine.trim();
        assert_eq!(world.driver.used_bytes(), SIZE, "of the allocation nothing was saved, so it stays; the rest goes");
        if again {
            let report = world.pause(&tag("r")).unwrap();
            assert_eq!((report.bytes_copied, world.driver.used_bytes()), (SIZE, 0));
        }
        world.resume(&tag("r")).unwrap();
        world.check();
        world.pause(&tag("r")).unwrap();
        assert_eq!(world.driver.used_bytes(), 0, "the next pause is as any other");
        world.free(freed).unwrap();
        world.resume_and_check();
    }
}

/// Frees `addr` on a thread of its own; the driver refuses to wait for the device, after `meanwhile`.
fn free_in_vain(world: &World, addr: Addr, meanwhile: impl FnOnce()) -> sire_core::error::Error {
    let me = std::thread::current().id();
    let [waits, may_go] = [(); 2].map(|()| Arc::new(AtomicBool::new(false)));
    let (arrived, go) = (Arc::clone(&waits), Arc::clone(&may_go));
    world.driver.set_order(move |call, _| {
        let is_of_the_free = call.verb == "synchronize" && call.thread != me;
        arrived.fetch_or(is_of_the_free, Ordering::SeqCst);
        !is_of_the_free || go.load(Ordering::SeqCst)
    });
    std::thread::scope(|scope| {
        let freeing = scope.spawn(|| world.engine.free(addr, false).unwrap_err());
        while !waits.load(Ordering::SeqCst) && !freeing.is_finished() {
            std::thread::yield_now();
        }
        meanwhile();
        world.driver.fail_always(Some(("synchronize", DriverErrorKind::Other)));
        may_go.store(true, Ordering::SeqCst);
        let error = freeing.join().unwrap();
        world.driver.fail_always(None);
        world.driver.end_order();
        error
    })
}

/// A free that comes in the middle of a lazy pause is left to the pause, which the driver then does not let unmap the memory: the pause has come to its end all
/// the same, and the next call that can gives the memory back.
#[test]
fn freed_memory_that_a_lazy_pause_cannot_give_back_goes_later() {
    let mut world = World::new(1 << 22);
    let region = world.region("r", policy(Backup::Host));
    let [freed, other] = [SIZE, CHUNK].map(|size| world.allocate(region, size).unwrap());
    world.write(freed);
    world.write(other);
    let [waits, may_go] = [(); 2].map(|()| Arc::new(AtomicBool::new(false)));
    let (arrived, go) = (Arc::clone(&waits), Arc::clone(&may_go));
    world.driver.set_order(move |call, _| {
        arrived.fetch_or(call.verb == "copy_to_host", Ordering::SeqCst);
        call.verb != "copy_to_host" || go.load(Ordering::SeqCst)
    });
    let lazy = PauseOptions { lazy: true, ..PauseOptions::default() };
    std::thread::scope(|scope| {
        let pausing = scope.spawn(|| world.engine.pause(&tag("r"), lazy).unwrap());
        while !waits.load(Ordering::SeqCst) && !pausing.is_finished() {
            std::thread::yield_now();
        }
        world.engine.free(freed, false).unwrap();
        world.driver.fail_always(Some(("unmap", DriverErrorKind::Other)));
        may_go.store(true, Ordering::SeqCst);
        assert_eq!(pausing.join().unwrap().bytes_lazy, SIZE + CHUNK);
    });
    world.driver.end_order();
    world.twins.remove(&freed);
    assert_eq!(world.engine.free(freed, false).unwrap_err().status, Status::UnknownAddress);
    assert_eq!(world.driver.used_bytes(), SIZE + CHUNK, "the driver has it still");
    world.driver.fail_always(None);
    world.engine.trim();
    assert_eq!(world.driver.used_bytes(), 0);
    world.resume_and_check();
}

/// What was noted of memory that is away (a block that is given out while its region is paused is noted late) is for the pause after the resume, and not
/// for one that takes the rest.
#[test]
fn what_was_noted_while_memory_was_away_is_remembered() {
    let rule = Policy { clean: Clean::Declared, retain: true, ..policy(Backup::Host) };
    let mut world = left_behind(rule, false);
    let large = *world.twins.iter().find(|(_, twin)| twin.bytes.len() as u64 == SIZE).unwrap().0;
    world.engine.changed(large, SIZE).unwrap();
    world.pause(&tag("r")).unwrap();
    world.resume(&tag("r")).unwrap();
    let bytes: Vec<u8> = world.twins[&large].bytes.iter().map(|byte| !byte).collect();
    world.driver.poke(sire_core::driver::Device(0), large, &bytes).unwrap();
    world.twins.get_mut(&large).unwrap().bytes = bytes;
    world.pause(&tag("r")).unwrap();
    world.resume_and_check();
}
