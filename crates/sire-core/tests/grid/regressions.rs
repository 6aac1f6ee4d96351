//! Mistakes that the engine once made. Each test begins with its story.

use crate::common::MemDriver;
use crate::common::world::{CHUNK, World, policy, tag};
use sire_core::driver::{Addr, Device, DriverErrorKind};
use sire_core::engine::*;
use sire_core::error::Status;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const MANY: u64 = 1 << 30;

/// The number of the first call of `verb` after call number `after` (calls are numbered from 1), `skip` of them left out.
fn call_of(world: &World, verb: &str, after: u64, skip: usize) -> u64 {
    let log = world.driver.log();
    let calls = log.iter().enumerate().skip(after as usize).filter(|(_, called)| **called == verb);
    let (index, _) = { calls }.nth(skip).unwrap_or_else(|| panic!("no {verb} after call {after} in {log:?}"));
    index as u64 + 1
}

/// The graveyard held an extent that was unmapped already (its `unreserve` had failed) and one that was freed during a capture. The
/// first, which needs no waiting, was taken for a proof that the device was idle, and the second was unmapped under
/// whatever still ran on it.
#[test]
fn memory_freed_during_a_capture_always_waits_for_the_device() {
    let mut world = World::new(MANY);
    let region = world.region("m", policy(Backup::None));
    let (a, b) = (world.allocate(region, CHUNK).unwrap(), world.allocate(region, CHUNK).unwrap());
    world.driver.fail_always(Some(("unreserve", DriverErrorKind::Other)));
    world.free(a).unwrap();
    world.driver.fail_always(None);
    world.engine.free(b, true).unwrap();
    world.twins.remove(&b);
    let before = world.driver.calls();
    world.engine.trim();
    let (waited, unmapped) = (call_of(&world, "synchronize", before, 0), call_of(&world, "unmap", before, 0));
    assert!(waited < unmapped, "{:?}", &world.driver.log()[before as usize..]);
    world.check_no_leak();
}

/// A pause failed, its undo failed, and putting down the rest failed as well: the region ended paused with chunks still on the
/// device. The next pause said that there was nothing to do and left them there. Once it did go on, it took the
/// region's retained file for free room, and wrote over the chunks that were in it already.
#[test]
fn a_region_that_ended_half_paused_can_be_paused_to_the_end() {
    for backup in [Backup::Host, Backup::Disk] {
        let live = |faults: &[u64]| {
            let mut world = World::new(MANY);
            let region = world.region("m", Policy { backup, zero_fill: false, retain: true, ..Policy::default() });
            let addr = world.allocate(region, 3 * CHUNK).unwrap();
            world.write(addr);
            let began = world.driver.calls();
            faults.iter().for_each(|&number| world.driver.fail_at(number, DriverErrorKind::Other));
            let outcome = world.pause(&Selection::All);
            (world, began, outcome)
        };
        let mut faults = Vec::new();
        // The second chunk cannot be unmapped; the undo gets no memory; the second chunk cannot be unmapped again.
        for (verb, skip) in [("unmap", 1), ("create", 0), ("unmap", 0)] {
            let (world, began, _) = live(&faults);
            faults.push(call_of(&world, verb, faults.last().copied().unwrap_or(began), skip));
        }
        let (mut world, _, outcome) = live(&faults);
        assert_eq!(outcome.unwrap_err().status, Status::PausedAfterFailure);
        assert_eq!(world.driver.used_bytes(), 2 * CHUNK, "two chunks are still on the device");
        let report = world.pause(&Selection::All).unwrap();
        assert_eq!((report.regions_changed, report.bytes_moved), (1, 2 * CHUNK), "{backup:?}");
        assert_eq!(world.driver.used_bytes(), 0);
        world.resume(&Selection::All).unwrap();
        world.check();
        world.check_no_leak();
    }
}

/// Devices were put down one after the other, so what had no backup on the first was gone when the second failed; the pause was
/// "undone" with the content lost.
#[test]
fn nothing_is_thrown_away_before_everything_is_saved() {
    let mut world = World::new(MANY);
    let scratch = world.region("scratch", policy(Backup::None));
    let weights = world.region("weights", policy(Backup::Host));
    let kept = world.allocate(scratch, CHUNK).unwrap();
    let other = world.allocate_as(Request { device: Device(1), ..World::request(weights, CHUNK) }).unwrap();
    [kept, other].into_iter().for_each(|addr| world.write(addr));
    world.driver.fail_always(Some(("copy_to_host", DriverErrorKind::Other)));
    world.engine.pause(&Selection::All, PauseOptions::default()).unwrap_err();
    world.driver.fail_always(None);
    // Nobody promised it, but it is what "everything is as before" says.
    world.check();
    assert_eq!(world.driver.peek(Device(0), kept, CHUNK).unwrap(), world.twins[&kept].bytes);
    world.check_no_leak();
}

/// A resume took memory chunk by chunk. When it ran out, the message named the one chunk that was missing and what was free after
/// the others had been taken; and while it waited it kept what it had, so that two processes could
/// each hold half of a device and wait for the other for ever.
#[test]
fn a_resume_that_is_short_of_memory_holds_none_and_says_how_much_it_needs() {
    let mut world = World::new(3 * CHUNK);
    let region = world.region("model", policy(Backup::Host));
    let blocker = world.region("blocker", policy(Backup::None));
    let addr = world.allocate(region, 3 * CHUNK).unwrap();
    world.write(addr);
    world.pause(&tag("model")).unwrap();
    let guest = world.allocate(blocker, CHUNK).unwrap();

    let message = world.resume(&tag("model")).unwrap_err().message;
    for part in [format!("{} bytes are needed", 3 * CHUNK), format!("{} of {} bytes are free", 2 * CHUNK, 3 * CHUNK)] {
        assert!(message.contains(&part), "{part:?} is not in {message:?}");
    }

    std::thread::scope(|scope| {
        let engine = &world.engine;
        let patient = ResumeOptions { wait: Duration::from_secs(60), ..ResumeOptions::default() };
        let waiting = scope.spawn(move || engine.resume(&tag("model"), patient));
        std::thread::sleep(Duration::from_millis(50));
        for _ in 0..20 {
            assert_eq!(world.driver.used_bytes(), CHUNK, "the waiting resume holds memory");
            std::thread::sleep(Duration::from_millis(2));
        }
        world.engine.free(guest, false).unwrap();
        assert_eq!(waiting.join().unwrap().unwrap().bytes_moved, 3 * CHUNK);
    });
    world.twins.remove(&guest);
    world.check();
    world.check_no_leak();
}

/// A margin set after a region had grown into it made the undo of a failed pause fail: the region ended paused although
/// its memory had never gone to anybody else.
#[test]
fn the_margin_does_not_stop_an_undo() {
    let live = |fault: Option<u64>| {
        let mut world = World::new(4 * CHUNK);
        let region = world.region("m", policy(Backup::Host));
        let addr = world.allocate(region, 3 * CHUNK).unwrap();
        world.write(addr);
        world.engine.configure(&|config| config.margin = 4 * CHUNK);
        let began = world.driver.calls();
        fault.into_iter().for_each(|number| world.driver.fail_at(number, DriverErrorKind::Other));
        let outcome = world.pause(&Selection::All);
        (world, began, outcome)
    };
    let (dry, began, _) = live(None);
    let (mut world, _, outcome) = live(Some(call_of(&dry, "unmap", began, 1)));
    assert_eq!(outcome.unwrap_err().status, Status::Driver);
    assert!(world.states().values().all(|state| *state == State::Resident));
    world.check();
    world.check_no_leak();
}

/// Empty arena kept for the next pause counted against the host limit, so that a backup was refused for which there was room.
#[test]
fn empty_arena_makes_way_before_the_host_limit_refuses() {
    let mut world = World::new(MANY);
    world.engine.configure(&|config| config.host_limit = Some(3 * CHUNK));
    let region = world.region("m", policy(Backup::Host));
    for chunks in [2, 3, 1, 3] {
        let addr = world.allocate(region, chunks * CHUNK).unwrap();
        world.write(addr);
        world.pause(&Selection::All).unwrap();
        world.resume(&Selection::All).unwrap();
        world.check();
        world.free(addr).unwrap();
    }
    world.check_no_leak();
}

/// Memory that a peer may use was unmapped when its own device was idle; a kernel of the peer would have lost the context.
#[test]
fn peers_are_waited_for_too() {
    let mut world = World::new(MANY);
    let region = world.region("m", policy(Backup::Host));
    let addrs: Vec<Addr> = (0..2).map(|_| world.allocate(region, CHUNK).unwrap()).collect();
    addrs.iter().for_each(|&addr| world.write(addr));
    world.engine.allow_peer(Device(0), Device(1)).unwrap();
    let waits_before_unmap = |world: &World, after: u64| {
        let log = world.driver.log();
        let calls = log[after as usize..].iter();
        calls.take_while(|verb| **verb != "unmap").filter(|verb| **verb == "synchronize").count()
    };
    let before = world.driver.calls();
    world.pause(&Selection::All).unwrap();
    assert_eq!(waits_before_unmap(&world, before), 2);
    world.resume(&Selection::All).unwrap();
    let before = world.driver.calls();
    world.free(addrs[0]).unwrap();
    assert_eq!(waits_before_unmap(&world, before), 2);
    world.check();
    world.check_no_leak();
}

/// A resume that was refused because another region was busy noted that its paused regions might still hold memory, so that the next
/// pause of them was not the no-op it should have been.
#[test]
fn a_refused_resume_leaves_no_trace() {
    let mut world = World::new(2 * CHUNK);
    let (first, second) = (world.region("first", policy(Backup::Host)), world.region("second", policy(Backup::Host)));
    let blocker = world.region("blocker", policy(Backup::None));
    for region in [first, second] {
        let addr = world.allocate(region, CHUNK).unwrap();
        world.write(addr);
    }
    world.pause(&Selection::All).unwrap();
    world.resume(&tag("blocker")).unwrap();
    let guest = world.allocate(blocker, 2 * CHUNK).unwrap();
    std::thread::scope(|scope| {
        let engine = &world.engine;
        let patient = ResumeOptions { wait: Duration::from_secs(60), ..ResumeOptions::default() };
        // Either may come first; this one tries again until it is the other that is refused.
        let waiting = scope.spawn(move || {
            loop {
                match engine.resume(&tag("second"), patient) {
                    Err(error) if error.status == Status::Busy => std::thread::yield_now(),
                    outcome => break outcome,
                }
            }
        });
        let refused = || engine.resume(&Selection::All, ResumeOptions::default()).unwrap_err().status;
        while refused() != Status::Busy {
            std::thread::yield_now();
        }
        let report = engine.pause(&tag("first"), PauseOptions::default()).unwrap();
        assert_eq!((report.regions_changed, report.regions_unchanged), (0, 1));
        engine.free(guest, false).unwrap();
        waiting.join().unwrap().unwrap();
    });
    world.twins.remove(&guest);
    world.resume(&Selection::All).unwrap();
    world.check();
    world.check_no_leak();
}

/// Sizes near 2^64, which `SIRE_CHUNK` takes, overflowed when they were rounded up.
#[test]
fn enormous_settings_mean_all_of_it() {
    let config = Config { chunk: u64::MAX, copy_piece: u64::MAX, ..Config::default() };
    let driver = Arc::new(MemDriver::new(MANY));
    let engine = Engine::new(driver.clone(), config);
    let region = engine.region("m", policy(Backup::Host)).unwrap();
    let addr = engine.allocate(World::request(region, 3 << 20)).unwrap();
    driver.poke(Device(0), addr, &[7; 3 << 20]).unwrap();
    engine.pause(&Selection::All, PauseOptions::default()).unwrap();
    engine.resume(&Selection::All, ResumeOptions::default()).unwrap();
    assert_eq!(driver.peek(Device(0), addr, 3 << 20).unwrap(), [7; 3 << 20]);
}

/// A pause that was refused because a thread was inside one region had closed the others for a moment: allocations in them
/// failed, though nothing was paused. Whoever tried a pause again and again made a program fail at random.
#[test]
fn a_refused_pause_does_not_disturb_other_regions() {
    let world = World::new(MANY);
    let engine = &world.engine;
    let busy = engine.region("a", policy(Backup::Host)).unwrap();
    let occupied = engine.region("b", policy(Backup::Host)).unwrap();
    engine.enter(occupied, OnPaused::Refuse).unwrap();
    std::thread::scope(|scope| {
        let allocating = scope.spawn(move || {
            for _ in 0..3000 {
                let addr = engine.allocate(World::request(busy, 2 * CHUNK)).unwrap();
                engine.free(addr, false).unwrap();
            }
        });
        while !allocating.is_finished() {
            let refused = engine.pause(&Selection::All, PauseOptions::default()).unwrap_err();
            assert_eq!(refused.status, Status::Busy);
        }
        allocating.join().unwrap();
    });
    engine.leave(occupied);
}

/// A capture that began during a pause met the pause's end: an allocation that was freed meanwhile was given back there, after a
/// synchronisation that voided the capture.
#[test]
fn a_free_left_to_a_transition_does_not_void_a_capture_that_began_since() {
    static CAPTURING: AtomicBool = AtomicBool::new(false);
    let driver = Arc::new(MemDriver::new(MANY));
    let engine = Arc::new(Engine::new(driver.clone(), Config { chunk: CHUNK, small: 4096, ..Config::default() }));
    engine.watch_captures(|| CAPTURING.load(Ordering::SeqCst));
    let region = engine.region("m", policy(Backup::Host)).unwrap();
    let [first, second] = [(); 2].map(|()| engine.allocate(World::request(region, CHUNK)).unwrap());
    let (program, device) = (Arc::clone(&engine), Arc::clone(&driver));
    // While the first is copied, the program frees the second and begins a capture.
    driver.at_next("copy_to_host", move || {
        program.free(second, false).unwrap();
        CAPTURING.store(true, Ordering::SeqCst);
        device.set_capturing(true);
    });
    engine.pause(&Selection::All, PauseOptions::default()).unwrap();
    assert_eq!(driver.used_bytes(), CHUNK, "it waits for the capture's end");
    assert_eq!(engine.allocation(second), None);
    CAPTURING.store(false, Ordering::SeqCst);
    driver.set_capturing(false);
    engine.free(first, false).unwrap();
    assert_eq!((driver.used_bytes(), driver.counts()), (0, (0, 0, 0)));
}

/// A pause that found its room while a capture began synchronised the device all the same.
#[test]
fn a_pause_is_refused_if_a_capture_begins_before_it_has_touched_anything() {
    static CAPTURING: AtomicBool = AtomicBool::new(false);
    let mut world = World::new(MANY);
    world.engine.watch_captures(|| CAPTURING.load(Ordering::SeqCst));
    let region = world.region("m", policy(Backup::Host));
    let addr = world.allocate(region, CHUNK).unwrap();
    world.write(addr);
    CAPTURING.store(true, Ordering::SeqCst);
    world.driver.set_capturing(true);
    assert_eq!(world.pause(&Selection::All).unwrap_err().status, Status::Capturing);
    // Nor does a free wait, whatever its caller believed.
    world.free(addr).unwrap();
    assert_eq!(world.driver.used_bytes(), CHUNK);
    CAPTURING.store(false, Ordering::SeqCst);
    world.driver.set_capturing(false);
    world.check_no_leak();
}

/// An allocation during a capture that found the device full gave empty slabs back to make room: it unmapped them, which a driver may
/// answer by voiding the capture.
#[test]
fn a_full_device_does_not_make_a_capture_unmap() {
    let mut world = World::new(2 * CHUNK);
    let region = world.region("m", policy(Backup::None));
    let small = world.allocate(region, 600).unwrap();
    world.free(small).unwrap();
    // The slab's slots are ready again.
    world.pause(&Selection::All).unwrap();
    world.resume(&Selection::All).unwrap();
    let slab = world.driver.used_bytes();
    assert!(slab > 0);
    world.driver.set_capturing(true);
    // One chunk fits and is taken back at once; an unmap of memory that nobody has seen voids nothing.
    let request = Request { capturing: true, ..World::request(region, 3 * CHUNK) };
    assert_eq!(world.allocate_as(request).unwrap_err().status, Status::OutOfDeviceMemory);
    world.driver.set_capturing(false);
    assert_eq!(world.driver.used_bytes(), slab, "the slab was given back");
    world.allocate(region, 2 * CHUNK).unwrap();
    world.check_no_leak();
}

/// The program freed paused memory while it was being resumed. Of a run of chunks some were mapped already, but access is set for the whole run at
/// its end, which did not come any more; they counted as ready, and the copy into them lost the device's context.
#[test]
fn a_free_in_the_middle_of_a_run_of_maps_leaves_nothing_to_copy_into() {
    for before in 0..6 {
        let driver = Arc::new(MemDriver::new(MANY));
        let engine = Arc::new(Engine::new(driver.clone(), Config { chunk: CHUNK, small: 4096, ..Config::default() }));
        let region = engine.region("m", policy(Backup::Host)).unwrap();
        let addr = engine.allocate(World::request(region, 6 * CHUNK)).unwrap();
        engine.pause(&Selection::All, PauseOptions::default()).unwrap();
        let program = Arc::clone(&engine);
        driver.at_later("map", before, move || program.free(addr, false).unwrap());
        engine.resume(&Selection::All, ResumeOptions::default()).unwrap();
        assert_eq!(driver.lost(), None, "freed at map {before}");
        assert_eq!((engine.allocation(addr), driver.counts()), (None, (0, 0, 0)));
    }
}
