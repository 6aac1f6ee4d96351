//! What the engine does when nothing goes wrong, and what it says when it is asked for something it cannot do.

use crate::common::world::{CHUNK, World, policy, tag};
use crate::common::{GRANULARITY, MemDriver};
use sire_core::driver::{Addr, Device, DriverErrorKind, ProgramStream};
use sire_core::engine::*;
use sire_core::error::Status;
use std::time::Duration;

const MANY: u64 = 1 << 30;

fn status<T: std::fmt::Debug>(result: Result<T, sire_core::error::Error>) -> Status {
    result.expect_err("it should have failed").status
}

fn stats(world: &World) -> serde_json::Value {
    serde_json::from_str(&world.engine.stats_json()).unwrap()
}

#[test]
fn content_survives_a_pause_in_host_and_disk_and_addresses_stay() {
    for backup in [Backup::Host, Backup::Disk] {
        let mut world = World::new(MANY);
        let region = world.region("model", policy(backup));
        let sizes = [1, 100, 512, 3000, GRANULARITY, CHUNK - 1, CHUNK, 3 * CHUNK + 17];
        let addrs: Vec<Addr> = sizes.iter().map(|&size| world.allocate(region, size).unwrap()).collect();
        addrs.iter().for_each(|&addr| world.write(addr));
        let used = world.driver.used_bytes();
        for _ in 0..3 {
            let report = world.pause(&tag("model")).unwrap();
            assert_eq!(world.driver.used_bytes(), 0, "all physical memory is released");
            assert_eq!((report.regions_changed, report.allocations), (1, sizes.len() as u64));
            assert_eq!((report.bytes_moved, report.bytes_expected), (used, used));
            assert_eq!(report.bytes_discarded, 0);
            assert!(report.bytes_copied >= sizes.iter().sum());
            let report = world.resume(&tag("model")).unwrap();
            assert_eq!((report.bytes_moved, world.driver.used_bytes()), (used, used));
            world.check();
        }
        assert_eq!(stats(&world)["regions"][0]["pauses"], 3);
        world.check_no_leak();
    }
}

/// The report said what was thrown away, and the statistics of the region, which add it up over its pauses, said 0: they looked when all memory had gone.
#[test]
fn without_backup_the_content_goes_and_report_and_statistics_say_how_much() {
    let mut world = World::new(MANY);
    let region = world.region("kv", Policy { zero_fill: true, ..Policy::default() });
    let kept = world.region("kept", policy(Backup::Host));
    for (region, size) in [(region, CHUNK + 5), (kept, CHUNK)] {
        let addr = world.allocate(region, size).unwrap();
        world.write(addr);
    }
    for pauses in [1, 2] {
        let report = world.pause(&Selection::All).unwrap();
        assert_eq!((report.bytes_discarded, report.bytes_copied), (CHUNK + 5, CHUNK));
        let regions = &stats(&world)["regions"];
        assert_eq!(regions[0]["bytes_discarded"], pauses * (CHUNK + 5));
        assert_eq!(regions[1]["bytes_discarded"], 0);
        let report = world.resume(&Selection::All).unwrap();
        assert_eq!(report.bytes_zeroed, CHUNK + GRANULARITY);
    }
    world.check();
    world.check_no_leak();
}

#[test]
fn keep_and_discard_override_the_policy() {
    for (backup, discarded) in [(Backup::None, 3 * CHUNK - 40), (Backup::Host, 30), (Backup::Disk, 30)] {
        let mut world = World::new(MANY);
        let region = world.region("mixed", Policy { backup, zero_fill: true, retain: false, ..Policy::default() });
        let addr = world.allocate(region, 3 * CHUNK).unwrap();
        world.write(addr);
        world.set_override(addr, CHUNK - 10, 50, true);
        world.set_override(addr, CHUNK, 10, false);
        world.set_override(addr, 0, 20, false);
        let report = world.pause(&Selection::All).unwrap();
        assert_eq!(report.bytes_discarded, discarded, "{backup:?}");
        assert_eq!(stats(&world)["regions"][0]["bytes_discarded"], discarded, "{backup:?}");
        world.resume(&Selection::All).unwrap();
        world.check();
        world.check_no_leak();
    }
}

#[test]
fn pausing_twice_and_resuming_twice_say_that_nothing_changed() {
    let mut world = World::new(MANY);
    let region = world.region("a", policy(Backup::Host));
    let addr = world.allocate(region, CHUNK).unwrap();
    world.write(addr);
    let report = world.resume(&tag("a")).unwrap();
    assert_eq!((report.regions_changed, report.regions_unchanged), (0, 1));
    world.pause(&tag("a")).unwrap();
    let report = world.pause(&tag("a")).unwrap();
    assert_eq!((report.regions_changed, report.regions_unchanged, report.bytes_moved), (0, 1, 0));
    world.resume(&tag("a")).unwrap();
    world.check();
}

#[test]
fn a_tag_pauses_what_is_under_it_and_nothing_else() {
    let mut world = World::new(MANY);
    let ids = ["model", "model/weights", "model/kv", "models"].map(|t| world.region(t, policy(Backup::Host)));
    for id in ids {
        world.allocate(id, CHUNK).unwrap();
    }
    assert_eq!(world.pause(&tag("model")).unwrap().regions_changed, 3);
    let paused = ids.map(|id| world.engine.state(id).unwrap() == State::Paused);
    assert_eq!(paused, [true, true, true, false]);
    assert_eq!(world.resume(&tag("model/kv")).unwrap().regions_changed, 1);
    assert_eq!(status(world.pause(&tag("weights"))), Status::UnknownTag);
}

#[test]
fn a_thread_inside_a_region_keeps_it_from_being_paused() {
    let mut world = World::new(MANY);
    let region = world.region("busy", policy(Backup::Host));
    let other = world.region("idle", policy(Backup::Host));
    world.allocate(region, CHUNK).unwrap();
    world.engine.enter(region, OnPaused::Refuse).unwrap();
    let error = world.pause(&Selection::All).unwrap_err();
    assert_eq!(error.status, Status::Busy);
    assert!(error.message.contains("'busy'") && error.message.contains("1 thread"), "{error}");
    assert_eq!(world.engine.state(other), Ok(State::Resident), "nothing is paused when one is refused");
    world.engine.leave(region);
    world.pause(&Selection::All).unwrap();
    assert_eq!(status(world.engine.enter(region, OnPaused::Refuse)), Status::Paused);
    assert_eq!(status(world.engine.allocate(World::request(region, 10))), Status::Paused);
    world.engine.enter(region, OnPaused::Resume).unwrap();
    assert_eq!(world.engine.state(region), Ok(State::Resident));
}

#[test]
fn memory_is_freed_while_paused() {
    let mut world = World::new(MANY);
    let region = world.region("r", policy(Backup::Host));
    let addrs = [100, 200, CHUNK * 2, CHUNK].map(|size| world.allocate(region, size).unwrap());
    addrs.iter().for_each(|&addr| world.write(addr));
    world.pause(&Selection::All).unwrap();
    world.free(addrs[0]).unwrap();
    world.free(addrs[2]).unwrap();
    assert_eq!(status(world.engine.free(addrs[2], false)), Status::UnknownAddress);
    world.resume(&Selection::All).unwrap();
    world.check();
    world.check_no_leak();
}

#[test]
fn wrong_addresses_are_refused_with_the_reason() {
    const FEW: u64 = 1 << 20;
    let mut world = World::new(FEW);
    let region = world.region("r", policy(Backup::Host));
    let large = world.allocate(region, CHUNK).unwrap();
    let small = world.allocate(region, 100).unwrap();
    for (addr, why) in [
        (Addr(0), "no memory of Sire's"),
        (Addr(u64::MAX), "no memory of Sire's"),
        (large.offset(1), "inside the allocation"),
        (small.offset(1), "inside an allocation"),
        (small.offset(512), "freed before"),
    ] {
        let error = world.engine.free(addr, false).unwrap_err();
        assert_eq!(error.status, Status::UnknownAddress);
        assert!(error.message.contains(why), "{error}");
    }
    assert_eq!(status(world.engine.keep(large, CHUNK + 1)), Status::UnknownAddress);
    assert_eq!(status(world.engine.discard(large.offset(1), u64::MAX)), Status::UnknownAddress);
    assert_eq!(status(world.engine.backup(Addr(1), 1)), Status::UnknownAddress);
    world.free(small).unwrap();
    assert_eq!(status(world.engine.free(small, false)), Status::UnknownAddress);
    assert_eq!(status(world.engine.allocate(World::request(region, 0))), Status::InvalidArgument);
    assert_eq!(status(world.engine.allocate(World::request(RegionId(99), 1))), Status::UnknownTag);
    for size in [u64::MAX, u64::MAX - 4095, 1 << 50, FEW + 1] {
        assert_eq!(status(world.engine.allocate(World::request(region, size))), Status::OutOfDeviceMemory);
    }
    world.check_no_leak();
}

#[test]
fn small_allocations_share_slabs_and_freed_slots_wait_for_the_device() {
    let mut world = World::new(MANY);
    let region = world.region("r", policy(Backup::Host));
    let first = world.allocate(region, 512).unwrap();
    let calls = world.driver.calls();
    let second = world.allocate(region, 500).unwrap();
    assert_eq!(world.driver.calls(), calls, "a slot of a slab costs no driver call");
    assert_eq!(second.0 - first.0, 512);
    world.free(first).unwrap();
    let third = world.allocate(region, 512).unwrap();
    assert_ne!(third, first, "the device may still be using it");
    world.pause(&Selection::All).unwrap();
    world.resume(&Selection::All).unwrap();
    assert_eq!(world.allocate(region, 512).unwrap(), first, "a pause has synchronised");
    let other_stream = Request { stream: ProgramStream(7), ..World::request(region, 512) };
    let far = world.allocate_as(other_stream).unwrap();
    assert!(far.0.abs_diff(first.0) >= 1 << 21, "another stream has slabs of its own");
    world.check_no_leak();
}

#[test]
fn a_program_that_frees_and_allocates_for_ever_needs_bounded_memory() {
    let mut world = World::new(256 * 1024);
    let region = world.region("r", policy(Backup::Host));
    for _ in 0..5000 {
        let addr = world.allocate(region, 600).unwrap();
        world.free(addr).unwrap();
    }
    let syncs = world.driver.log().iter().filter(|verb| **verb == "synchronize").count();
    assert!((1..400).contains(&syncs), "{syncs} synchronisations for 5000 frees");
    world.check_no_leak();
}

#[test]
fn cached_memory_is_given_back_before_an_allocation_fails() {
    let mut world = World::new(4 * CHUNK);
    let region = world.region("r", policy(Backup::Host));
    let small: Vec<Addr> = (0..20).map(|_| world.allocate(region, 2000).unwrap()).collect();
    for addr in small {
        world.free(addr).unwrap();
    }
    world.allocate(region, 4 * CHUNK).unwrap();
    let error = world.engine.allocate(World::request(region, CHUNK)).unwrap_err();
    assert_eq!(error.status, Status::OutOfDeviceMemory);
    for part in ["'r'", "device 0", &format!("{CHUNK} bytes"), "0 of"] {
        assert!(error.message.contains(part), "{error} lacks {part}");
    }
    world.check_no_leak();
}

#[test]
fn the_margin_stays_free() {
    let mut world = World::new(4 * CHUNK);
    let region = world.region("r", policy(Backup::Host));
    world.engine.configure(&|config| config.margin = CHUNK);
    assert_eq!(status(world.engine.allocate(World::request(region, 4 * CHUNK))), Status::OutOfDeviceMemory);
    let addr = world.allocate(region, 3 * CHUNK).unwrap();
    world.write(addr);
    world.pause(&Selection::All).unwrap();
    world.engine.configure(&|config| config.margin = 2 * CHUNK);
    assert_eq!(status(world.resume(&Selection::All)), Status::OutOfDeviceMemory);
    world.engine.configure(&|config| config.margin = 0);
    world.resume(&Selection::All).unwrap();
    world.check();
}

#[test]
fn a_pause_that_keeps_all_loses_nothing_but_what_is_declared_to_hold_nothing() {
    let mut world = World::new(MANY);
    let (bare, saved) = (world.region("bare", policy(Backup::None)), world.region("saved", policy(Backup::Host)));
    let (first, scratch, second) = (
        world.allocate(bare, CHUNK).unwrap(),
        world.allocate(bare, CHUNK).unwrap(),
        world.allocate(saved, CHUNK).unwrap(),
    );
    for addr in [first, scratch, second] {
        world.write(addr);
    }
    world.engine.discard(scratch, CHUNK).unwrap();
    let keep_all = PauseOptions { keep_all: true, ..PauseOptions::default() };
    let report = world.engine.pause(&Selection::All, keep_all).unwrap();
    assert_eq!((report.bytes_copied, report.bytes_discarded), (2 * CHUNK, CHUNK));
    world.engine.resume(&Selection::All, ResumeOptions::default()).unwrap();
    for addr in [first, second] {
        let found = world.driver.peek(Device(0), addr, CHUNK).unwrap();
        world.twins[&addr].assert_equal(addr, &found);
    }
    // The next pause is the program's own, and means what the policy says.
    let report = world.engine.pause(&Selection::All, PauseOptions::default()).unwrap();
    assert_eq!((report.bytes_copied, report.bytes_discarded), (CHUNK, 2 * CHUNK));
}

#[test]
fn devices_are_waited_for_unless_the_caller_vouches_for_the_memory() {
    let mut world = World::new(MANY);
    let region = world.region("r", policy(Backup::Host));
    let addr = world.allocate(region, 2 * CHUNK).unwrap();
    world.write(addr);
    for idle in [false, true] {
        let before = world.driver.log().len();
        let report = world.engine.pause(&Selection::All, PauseOptions { idle, ..PauseOptions::default() }).unwrap();
        assert_eq!((report.bytes_moved, report.bytes_copied), (2 * CHUNK, 2 * CHUNK));
        let log = world.driver.log()[before..].to_vec();
        let gone = log.iter().position(|verb| *verb == "unmap").unwrap();
        assert_eq!(log[..gone].contains(&"synchronize"), !idle, "{log:?}");
        world.resume(&Selection::All).unwrap();
        world.check();
    }
}

#[test]
fn a_capture_is_never_synchronised_and_its_frees_come_later() {
    let mut world = World::new(MANY);
    let region = world.region("r", policy(Backup::Host));
    let large = world.allocate(region, CHUNK).unwrap();
    let small = world.allocate(region, 100).unwrap();
    let capturing = Request { capturing: true, ..World::request(region, CHUNK) };
    let captured = world.allocate_as(capturing).unwrap();
    let before = world.driver.log().len();
    for addr in [large, small] {
        world.engine.free(addr, true).unwrap();
        world.twins.remove(&addr);
    }
    assert_eq!(status(world.engine.free(large, true)), Status::UnknownAddress);
    let log = world.driver.log();
    assert!(log[before..].iter().all(|verb| *verb != "synchronize" && *verb != "unmap"), "{:?}", &log[before..]);
    let options = PauseOptions { capturing: true, ..PauseOptions::default() };
    assert_eq!(status(world.engine.pause(&Selection::All, options)), Status::Capturing);
    let options = ResumeOptions { capturing: true, ..ResumeOptions::default() };
    assert_eq!(status(world.engine.resume(&Selection::All, options)), Status::Capturing);
    let used = world.driver.used_bytes();
    world.free(captured).unwrap();
    assert!(world.driver.used_bytes() < used - CHUNK, "the next free outside a capture finishes both");
    world.check_no_leak();
}

#[test]
fn peers_keep_their_access_over_a_pause() {
    let mut world = World::new(MANY);
    let region = world.region("r", policy(Backup::Host));
    let addr = world.allocate(region, 2 * CHUNK).unwrap();
    world.write(addr);
    assert!(world.driver.peek(Device(1), addr, 1).is_err());
    world.engine.allow_peer(Device(0), Device(1)).unwrap();
    world.pause(&Selection::All).unwrap();
    world.resume(&Selection::All).unwrap();
    let later = world.allocate(region, 10).unwrap();
    for addr in [addr, addr.offset(2 * CHUNK - 1), later] {
        assert!(world.driver.peek(Device(1), addr, 1).is_ok());
    }
}

#[test]
fn access_that_is_taken_back_is_gone_before_and_after_a_pause() {
    let mut world = World::new(MANY);
    let region = world.region("r", policy(Backup::Host));
    let mut addrs: Vec<Addr> = [2 * CHUNK, 10].map(|size| world.allocate(region, size).unwrap()).into();
    let (here, there) = (Device(0), Device(1));
    let may = |world: &World, addrs: &[Addr]| {
        let answers: Vec<bool> = addrs.iter().map(|addr| world.driver.peek(there, *addr, 1).is_ok()).collect();
        assert!(answers.iter().all(|answer| *answer == answers[0]), "some of it: {answers:?}");
        answers[0]
    };
    world.engine.refuse_peer(here, there).unwrap();
    world.engine.allow_peer(here, there).unwrap();
    assert!(may(&world, &addrs));
    world.engine.refuse_peer(here, there).unwrap();
    assert!(!may(&world, &addrs), "memory that is there");
    world.engine.allow_peer(here, there).unwrap();
    world.pause(&Selection::All).unwrap();
    world.engine.refuse_peer(here, there).unwrap();
    world.resume(&Selection::All).unwrap();
    addrs.push(world.allocate(region, CHUNK).unwrap());
    assert!(!may(&world, &addrs), "what comes back, and what comes");
    // Its own device, and the other direction, are another matter.
    world.engine.allow_peer(there, here).unwrap();
    world.engine.refuse_peer(here, here).unwrap();
    world.engine.allow_peer(here, there).unwrap();
    // What a driver refuses can be asked for again.
    world.driver.fail_at(world.driver.calls() + 1, DriverErrorKind::Other);
    world.engine.refuse_peer(here, there).unwrap_err();
    world.engine.refuse_peer(here, there).unwrap();
    assert!(!may(&world, &addrs));
    world.check();
    world.check_no_leak();
}

#[test]
fn a_resume_without_room_fails_keeps_everything_and_succeeds_later() {
    let mut world = World::new(8 * CHUNK);
    let region = world.region("r", policy(Backup::Host));
    let addr = world.allocate(region, 5 * CHUNK).unwrap();
    world.write(addr);
    world.pause(&tag("r")).unwrap();
    world.driver.set_capacity(3 * CHUNK);
    let error = world.resume(&tag("r")).unwrap_err();
    assert_eq!(error.status, Status::OutOfDeviceMemory);
    assert!(error.message.contains("'r'"), "{error}");
    assert_eq!(world.driver.used_bytes(), 0, "what was made is given back");
    let options = ResumeOptions { wait: Duration::from_millis(30), ..ResumeOptions::default() };
    let start = std::time::Instant::now();
    assert_eq!(status(world.engine.resume(&tag("r"), options)), Status::OutOfDeviceMemory);
    assert!(start.elapsed() >= Duration::from_millis(30));
    let driver = world.driver.clone();
    let helper = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(30));
        driver.set_capacity(8 * CHUNK);
    });
    let options = ResumeOptions { wait: Duration::from_secs(20), ..ResumeOptions::default() };
    world.engine.resume(&tag("r"), options).unwrap();
    helper.join().unwrap();
    world.check();
    world.check_no_leak();
}

#[test]
fn room_for_every_byte_is_certain_before_the_first_page_goes() {
    let mut world = World::new(MANY);
    let region = world.region("r", policy(Backup::Host));
    let addr = world.allocate(region, 4 * CHUNK).unwrap();
    world.write(addr);
    world.engine.configure(&|config| config.host_limit = Some(4 * CHUNK - 1));
    let before = world.driver.log().len();
    let error = world.pause(&tag("r")).unwrap_err();
    assert_eq!(error.status, Status::OutOfBackupSpace);
    assert!(error.message.contains("host limit"), "{error}");
    assert!(!world.driver.log()[before..].contains(&"unmap"));
    world.engine.configure(&|config| config.host_limit = Some(4 * CHUNK));
    world.pause(&tag("r")).unwrap();
    world.resume(&tag("r")).unwrap();
    world.check();
    let disk = world.region("d", policy(Backup::Disk));
    let addr = world.allocate(disk, CHUNK).unwrap();
    world.write(addr);
    world.engine.configure(&|config| config.disk_dir = Some("/proc/nowhere".into()));
    let error = world.pause(&tag("d")).unwrap_err();
    assert_eq!(error.status, Status::BackupIo);
    assert!(error.message.contains("/proc/nowhere"), "{error}");
    world.check();
}

#[test]
fn backups_can_be_read_while_paused_and_outlive_what_they_came_from() {
    let mut world = World::new(MANY);
    let region =
        world.region("r", Policy { backup: Backup::Host, zero_fill: false, retain: true, ..Policy::default() });
    let addr = world.allocate(region, 3 * CHUNK).unwrap();
    world.write(addr);
    let expected = world.driver.peek(Device(0), addr, 3 * CHUNK).unwrap();
    assert!(world.engine.backup(addr, 1).unwrap().is_none());
    world.pause(&tag("r")).unwrap();
    let view = world.engine.backup(addr.offset(5), 3 * CHUNK - 9).unwrap().expect("a host backup");
    let read = |view: &BackupView| {
        // SAFETY: the view keeps `len` bytes at `ptr` valid, and a lent range is never written again.
        unsafe { std::slice::from_raw_parts(view.ptr, view.len as usize) }.to_vec()
    };
    assert_eq!(read(&view), expected[5..expected.len() - 4]);
    world.resume(&tag("r")).unwrap();
    world.write(addr);
    world.pause(&tag("r")).unwrap();
    world.free(addr).unwrap();
    assert_eq!(read(&view), expected[5..expected.len() - 4], "the view keeps its bytes");
    drop(view);
    world.check_no_leak();
}

#[test]
fn retained_backups_are_reused_and_trimmed() {
    let mut world = World::new(MANY);
    let region =
        world.region("r", Policy { backup: Backup::Host, zero_fill: false, retain: true, ..Policy::default() });
    let addr = world.allocate(region, 2 * CHUNK).unwrap();
    for _ in 0..3 {
        world.write(addr);
        world.pause(&tag("r")).unwrap();
        world.resume(&tag("r")).unwrap();
        world.check();
        assert_eq!(stats(&world)["tiers"][0]["used_bytes"], 2 * CHUNK);
    }
    let (_, host) = world.engine.trim();
    assert_eq!(host, 2 * CHUNK);
    world.check_no_leak();
}

#[test]
fn host_memory_that_cannot_be_pinned_is_used_all_the_same_and_said_once() {
    let mut world = World::new(MANY);
    world.driver.fail_always(Some(("register_host", DriverErrorKind::Unsupported)));
    let region = world.region("r", policy(Backup::Host));
    let addr = world.allocate(region, CHUNK).unwrap();
    world.write(addr);
    world.pause(&tag("r")).unwrap();
    world.resume(&tag("r")).unwrap();
    world.check();
    assert_eq!(world.engine.take_notices().len(), 1);
    assert!(world.engine.take_notices().is_empty());
}

#[test]
fn nothing_is_queued_beyond_two_pieces() {
    let mut world = World::new(MANY);
    let region = world.region("r", policy(Backup::Host));
    let addr = world.allocate(region, 6 * CHUNK).unwrap();
    world.write(addr);
    let before = world.driver.log().len();
    world.pause(&tag("r")).unwrap();
    let mut ahead = 0_i32;
    let mut unmapped_while_copying = 0;
    for verb in &world.driver.log()[before..] {
        match *verb {
            "copy_to_host" => ahead += 1,
            "wait" => ahead -= 1,
            "unmap" if ahead > 0 => unmapped_while_copying += 1,
            _ => {}
        }
        assert!(ahead <= 2);
    }
    assert_eq!(unmapped_while_copying, 5, "every chunk but the last is released while the next is copied");
}

#[test]
fn a_cancelled_call_rolls_back() {
    let mut world = World::new(MANY);
    let region = world.region("r", policy(Backup::Host));
    let addr = world.allocate(region, 2 * CHUNK).unwrap();
    world.write(addr);
    world.engine.cancel();
    world.pause(&tag("r")).expect("a cancel before the call does not touch it");
    world.driver.set_capacity(0);
    std::thread::scope(|scope| {
        let options = ResumeOptions { wait: Duration::from_secs(60), ..ResumeOptions::default() };
        let engine = &world.engine;
        let waiting = scope.spawn(move || engine.resume(&tag("r"), options));
        // Again and again: one that comes before the call has begun does not touch it.
        while !waiting.is_finished() {
            engine.cancel();
            std::thread::sleep(Duration::from_millis(2));
        }
        assert_eq!(status(waiting.join().unwrap()), Status::Cancelled);
    });
    world.driver.set_capacity(MANY);
    world.resume(&tag("r")).unwrap();
    world.check();
}

#[test]
fn when_the_undo_cannot_get_its_pages_back_the_region_ends_paused_with_everything_saved() {
    let mut world = World::new(MANY);
    let region = world.region("r", policy(Backup::Host));
    let addrs = [3 * CHUNK, 2 * CHUNK, 700].map(|size| world.allocate(region, size).unwrap());
    addrs.iter().for_each(|&addr| world.write(addr));
    // The third unmap fails; by then two chunks are gone, and somebody else has taken them.
    let copies = world.driver.log().len() as u64;
    let log = {
        let mut rehearsal = World::new(MANY);
        let region = rehearsal.region("r", policy(Backup::Host));
        for size in [3 * CHUNK, 2 * CHUNK, 700] {
            rehearsal.allocate(region, size).unwrap();
        }
        rehearsal.pause(&tag("r")).unwrap();
        rehearsal.driver.log()
    };
    let third = log.iter().enumerate().filter(|(i, v)| *i as u64 >= copies && **v == "unmap").nth(2).unwrap().0;
    world.driver.fail_at(third as u64 + 1, DriverErrorKind::Other);
    world.driver.set_capacity(0);
    let error = world.pause(&tag("r")).unwrap_err();
    assert_eq!(error.status, Status::PausedAfterFailure);
    assert_eq!(world.engine.state(region), Ok(State::Paused));
    assert_eq!(world.driver.used_bytes(), 0, "what could still be released is released");
    assert!(stats(&world)["regions"][0]["last_error"].as_str().unwrap().contains("could not be undone"));
    world.driver.set_capacity(MANY);
    world.resume(&tag("r")).unwrap();
    world.check();
    world.check_no_leak();
}

#[test]
fn statistics_have_the_promised_fields() {
    let mut world = World::new(MANY);
    let region = world.region("model/weights", policy(Backup::Host));
    let addr = world.allocate(region, CHUNK).unwrap();
    world.write(addr);
    world.pause(&Selection::All).unwrap();
    let stats = stats(&world);
    let region = &stats["regions"][0];
    assert_eq!(
        (&region["tag"], &region["state"], &region["backup"]),
        (&"model/weights".into(), &"paused".into(), &"host".into())
    );
    assert_eq!(
        (&region["paused_bytes"], &region["backup_bytes"], &region["resident_bytes"]),
        (&CHUNK.into(), &CHUNK.into(), &0.into())
    );
    assert_eq!(stats["devices"][0]["allocations"], 1);
    assert_eq!(stats["counters"]["driver_calls"], world.driver.calls());
    for field in ["version", "driver", "hook_live", "devices", "regions", "tiers", "counters"] {
        assert!(stats.get(field).is_some(), "{field}");
    }
}

#[test]
fn the_driver_of_these_tests_notices_a_page_that_goes_too_early() {
    use sire_core::driver::Driver;
    let driver = MemDriver::new(MANY);
    let addr = driver.reserve(CHUNK, 0).unwrap();
    let physical = driver.create(Device(0), CHUNK).unwrap();
    driver.map(addr, CHUNK, physical).unwrap();
    let stream = driver.open_stream(Device(0)).unwrap();
    driver.fill(stream, addr, 8, 1).unwrap();
    driver.unmap(addr, CHUNK).unwrap();
    assert_eq!(driver.synchronize(Device(0)).unwrap_err().kind, DriverErrorKind::Lost);
}

/// The program's kernels are asynchronous: what is queued when a pause or a free comes must be done before pages go.
#[test]
fn work_that_the_program_has_queued_is_waited_for() {
    use sire_core::driver::Driver;
    let mut world = World::new(MANY);
    let region = world.region("r", policy(Backup::Host));
    let addrs = [2 * CHUNK, 700].map(|size| world.allocate(region, size).unwrap());
    let stream = world.driver.open_stream(Device(0)).unwrap();
    for (byte, addr) in addrs.into_iter().enumerate() {
        world.driver.fill(stream, addr, 700, byte as u8 + 7).unwrap();
    }
    world.pause(&tag("r")).unwrap();
    world.resume(&tag("r")).unwrap();
    for (byte, addr) in addrs.into_iter().enumerate() {
        assert_eq!(world.driver.peek(Device(0), addr, 700).unwrap(), vec![byte as u8 + 7; 700]);
        world.driver.fill(stream, addr, 700, 1).unwrap();
        world.free(addr).unwrap();
    }
    world.driver.synchronize(Device(0)).expect("no queued work met an unmapped page");
    world.driver.close_stream(stream).unwrap();
    world.check_no_leak();
}

#[test]
fn what_is_kept_resident_stays_until_it_is_freed() {
    let mut world = World::new(MANY);
    let region = world.region("mixed", policy(Backup::None));
    let [stays, goes] = [0, 0].map(|_| world.allocate(region, 2 * CHUNK).unwrap());
    world.write(stays);
    world.keep_resident(stays).unwrap();
    assert_eq!(world.engine.keep_resident(stays.offset(CHUNK + 7)), Ok(2 * CHUNK));
    assert_eq!(status(world.engine.keep_resident(stays.offset(2 * CHUNK))), Status::UnknownAddress);
    for selection in [tag("mixed"), Selection::All] {
        let report = world.pause(&selection).unwrap();
        assert_eq!((report.bytes_moved, report.allocations), (2 * CHUNK, 1));
        assert_eq!(world.driver.used_bytes(), 2 * CHUNK);
        assert_eq!(status(world.engine.keep_resident(goes)), Status::Paused);
        world.keep_resident(stays).unwrap();
        world.check();
        world.write(stays);
        world.resume(&selection).unwrap();
        world.check();
    }
    world.free(stays).unwrap();
    assert_eq!(status(world.engine.keep_resident(stays)), Status::UnknownAddress);
    world.allocate(region, 2 * CHUNK).unwrap();
    world.pause(&tag("mixed")).unwrap();
    assert_eq!(world.driver.used_bytes(), 0, "new memory at the old address is taken like any other");
    world.check_no_leak();
}

#[test]
fn a_slot_that_is_kept_resident_takes_its_slab_with_it() {
    let mut world = World::new(MANY);
    let region = world.region("small", policy(Backup::Host));
    let slots = [600, 700].map(|size| world.allocate(region, size).unwrap());
    slots.iter().for_each(|&slot| world.write(slot));
    world.keep_resident(slots[0]).unwrap();
    assert_eq!(world.pause(&tag("small")).unwrap().bytes_moved, 0);
    world.resume(&tag("small")).unwrap();
    world.free(slots[0]).unwrap();
    assert!(world.pause(&tag("small")).unwrap().bytes_moved > 0);
    world.resume(&tag("small")).unwrap();
    world.check();
    world.check_no_leak();
}

#[test]
fn pageable_backups_are_not_registered() {
    let mut world = World::new(MANY);
    let registered = |world: &World| stats(world)["tiers"][0]["registered_bytes"].as_u64().unwrap();
    for (pageable, expected) in [(true, 0), (false, CHUNK)] {
        let region = world.region("model", Policy { pageable, ..policy(Backup::Host) });
        let addr = world.allocate(region, CHUNK).unwrap();
        world.write(addr);
        world.pause(&tag("model")).unwrap();
        assert_eq!((registered(&world), world.engine.take_notices()), (expected, vec![]));
        world.resume(&tag("model")).unwrap();
        world.check();
    }
    world.check_no_leak();
}
