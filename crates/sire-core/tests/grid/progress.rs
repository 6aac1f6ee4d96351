//! Resumes in the background: what is told to be ready is there and stays, in the order that was asked for, and whoever waits
//! for the rest hears how it ended.

use crate::common::GRANULARITY;
use crate::common::world::{CHUNK, PROGRAM, World, policy, tag};
use sire_core::driver::{Addr, Device, DriverErrorKind};
use sire_core::engine::*;
use sire_core::error::Status;
use sire_core::progress::Progress;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Copies of one chunk.
const PIECES: u64 = CHUNK / GRANULARITY;
const COPY: &str = "copy_to_device";

/// Four chunks, paused.
fn paused(policy: Policy) -> (World, Addr) {
    let mut world = World::new(1 << 30);
    let region = world.region("r", policy);
    let addr = world.allocate(region, 4 * CHUNK).unwrap();
    world.write(addr);
    world.pause(&tag("r")).unwrap();
    (world, addr)
}

fn start(world: &World, order: &[(Addr, u64)]) -> Arc<Progress> {
    let options = ResumeOptions { order: Some(order), ..ResumeOptions::default() };
    world.engine.resume_start(&tag("r"), options).unwrap()
}

fn soon() -> Option<Instant> {
    Some(Instant::now() + Duration::from_millis(20))
}

#[test]
fn it_ends_like_a_resume() {
    for backup in [Backup::Host, Backup::Disk] {
        let (mut world, addr) = paused(policy(backup));
        let progress = start(&world, &[]);
        let report = progress.finished(None).unwrap().unwrap();
        assert_eq!((report.regions_changed, report.bytes_copied, report.bytes_moved), (1, 4 * CHUNK, 4 * CHUNK));
        assert_eq!(progress.bytes(), (4 * CHUNK, 4 * CHUNK));
        assert!(progress.ready(addr, 4 * CHUNK));
        world.check();
        let again = start(&world, &[]).finished(None).unwrap().unwrap();
        assert_eq!((again.regions_changed, again.regions_unchanged), (0, 1));
        world.check_no_leak();
    }
}

#[test]
fn chunks_are_ready_in_the_order_asked_for_and_can_be_used_at_once() {
    let (mut world, addr) = paused(policy(Backup::Host));
    let chunk = |n: u64| addr.offset(n * CHUNK);
    world.driver.set_gate(Some((COPY, 2 * PIECES + 1)));
    let progress = start(&world, &[(chunk(2).offset(7), 1), (chunk(0), CHUNK), (Addr(1), 5)]);
    assert_eq!(progress.wait(chunk(2), CHUNK, None), Ok(true));
    assert_eq!(progress.wait(addr, CHUNK, soon()).map(drop), Ok(()));
    assert_eq!(progress.wait(chunk(1), 1, soon()), Ok(false));
    assert!(!progress.ready(addr, 4 * CHUNK) && progress.ready(Addr(1), 100));
    assert_eq!(progress.finished(soon()), Ok(None));
    assert_eq!(world.engine.state(RegionId(0)), Ok(State::Paused));
    assert_eq!(world.engine.enter(RegionId(0), OnPaused::Refuse).unwrap_err().status, Status::Busy);
    assert_eq!(world.pause(&tag("r")).unwrap_err().status, Status::Busy);
    let found = world.driver.peek(Device(0), chunk(2), CHUNK).unwrap();
    assert_eq!(found, world.twins[&addr].bytes[2 * CHUNK as usize..3 * CHUNK as usize]);
    // The program goes on with what is there.
    world.driver.poke(Device(0), chunk(2), &[1, 2, 3]).unwrap();
    world.twins.get_mut(&addr).unwrap().bytes[2 * CHUNK as usize..][..3].copy_from_slice(&[1, 2, 3]);
    world.driver.set_gate(None);
    progress.finished(None).unwrap();
    world.check();
    world.check_no_leak();
}

#[test]
fn what_was_told_to_be_ready_stays_when_the_rest_fails() {
    let (mut world, addr) = paused(policy(Backup::Host));
    world.driver.set_gate(Some((COPY, 2 * PIECES)));
    let progress = start(&world, &[]);
    assert_eq!(progress.wait(addr, CHUNK, None), Ok(true));
    world.driver.poke(Device(0), addr, &[9; 100]).unwrap();
    world.twins.get_mut(&addr).unwrap().bytes[..100].fill(9);
    world.driver.fail_always(Some((COPY, DriverErrorKind::Other)));
    assert_eq!(progress.finished(None).unwrap_err().status, Status::Driver);
    assert_eq!(progress.wait(addr.offset(3 * CHUNK), 1, None).unwrap_err().status, Status::Driver);
    assert_eq!(progress.wait(addr, CHUNK, None), Ok(true), "it is still there");
    assert_eq!(world.engine.state(RegionId(0)), Ok(State::Paused));
    assert_eq!(world.driver.peek(Device(0), addr, 100).unwrap(), [9; 100]);
    world.driver.fail_always(None);
    world.driver.set_gate(None);
    // A pause puts down what was left, as it is now; a resume brings all of it.
    world.engine.pause(&tag("r"), PauseOptions::default()).unwrap();
    assert_eq!(world.driver.used_bytes(), 0);
    world.resume(&tag("r")).unwrap();
    world.check();
    world.check_no_leak();
}

/// The resume stops before it waits for the first chunk's last two copies: they are queued, and nothing is behind them.
fn first_chunk_queued(world: &World) -> Arc<Progress> {
    world.driver.set_gate(Some(("wait", PIECES - 2)));
    start(world, &[])
}

fn wait_ons(world: &World) -> usize {
    world.driver.log().iter().filter(|verb| **verb == "wait_on").count()
}

#[test]
fn a_stream_waits_for_what_is_queued_and_its_caller_does_not() {
    let (mut world, addr) = paused(policy(Backup::Host));
    let progress = first_chunk_queued(&world);
    assert_eq!(progress.wait_on((addr.offset(5), CHUNK - 5), PROGRAM, None), Ok(true));
    assert!(!progress.ready(addr, CHUNK) && wait_ons(&world) == 1);
    assert_eq!(progress.wait_on((addr, CHUNK + 1), PROGRAM, soon()), Ok(false), "the next chunk is not queued");
    assert_eq!(progress.wait_on((Addr(1), 5), PROGRAM, None), Ok(true), "that is none of its memory");
    assert_eq!(wait_ons(&world), 1);
    // Nobody of ours has waited for it: the program's stream does.
    let found = world.driver.peek_on(PROGRAM, addr, CHUNK).unwrap();
    assert_eq!(found, world.twins[&addr].bytes[..CHUNK as usize]);
    world.driver.set_gate(None);
    progress.finished(None).unwrap();
    assert_eq!(progress.wait_on((addr, 4 * CHUNK), PROGRAM, None), Ok(true), "it is over");
    assert_eq!(wait_ons(&world), 1);
    world.check();
    world.check_no_leak();
}

#[test]
fn a_stream_waits_for_the_whole_resume_when_its_last_copy_is_queued() {
    let (mut world, addr) = paused(policy(Backup::Host));
    world.driver.set_gate(Some(("wait", 4 * PIECES - 2)));
    let progress = start(&world, &[]);
    assert_eq!(progress.wait_on((Addr(0), u64::MAX), PROGRAM, None), Ok(true));
    assert_eq!(progress.bytes(), (3 * CHUNK, 4 * CHUNK));
    let found = world.driver.peek_on(PROGRAM, addr, 4 * CHUNK).unwrap();
    assert_eq!(found, world.twins[&addr].bytes);
    world.driver.set_gate(None);
    progress.finished(None).unwrap();
    world.check_no_leak();
}

#[test]
fn what_a_stream_was_made_to_wait_for_stays_when_the_rest_fails() {
    for cancelled in [false, true] {
        let (mut world, addr) = paused(policy(Backup::Host));
        let progress = first_chunk_queued(&world);
        assert_eq!(progress.wait_on((addr, 1), PROGRAM, None), Ok(true));
        match cancelled {
            true => progress.cancel(),
            false => world.driver.fail_always(Some((COPY, DriverErrorKind::Other))),
        }
        world.driver.set_gate(None);
        let failed = progress.finished(None).unwrap_err().status;
        assert_eq!(failed, if cancelled { Status::Cancelled } else { Status::Driver });
        assert_eq!(world.driver.used_bytes(), CHUNK, "the first chunk, and nothing else");
        assert!(progress.ready(addr, CHUNK) && progress.bytes() == (CHUNK, 4 * CHUNK));
        assert_eq!(progress.wait_on((addr, 4 * CHUNK), PROGRAM, None).map_err(|e| e.status), Err(failed));
        let found = world.driver.peek_on(PROGRAM, addr, CHUNK).unwrap();
        assert_eq!(found, world.twins[&addr].bytes[..CHUNK as usize]);
        world.driver.fail_always(None);
        // The program goes on with it, and what it writes survives the next resume.
        world.driver.poke(Device(0), addr, &[9; 100]).unwrap();
        world.twins.get_mut(&addr).unwrap().bytes[..100].fill(9);
        world.resume(&tag("r")).unwrap();
        world.check();
        world.check_no_leak();
    }
}

#[test]
fn a_backup_outlives_copies_of_which_nobody_knows_whether_they_are_over() {
    let (mut world, addr) = paused(policy(Backup::Host));
    let progress = first_chunk_queued(&world);
    assert_eq!(progress.wait_on((addr, CHUNK), PROGRAM, None), Ok(true));
    // From here on the driver does nothing, so that not even the device can be waited for.
    let calls = world.driver.calls();
    (1..=40).for_each(|call| world.driver.fail_at(calls + call, DriverErrorKind::Other));
    world.driver.set_gate(None);
    assert_eq!(progress.finished(None).unwrap_err().status, Status::Driver);
    assert!(!progress.ready(addr, CHUNK));
    world.driver.clear_faults();
    world.resume(&tag("r")).unwrap();
    world.check();
}

#[test]
fn whoever_waits_for_what_is_never_queued_is_told_why() {
    let (mut world, addr) = paused(policy(Backup::Host));
    let progress = first_chunk_queued(&world);
    let last = addr.offset(3 * CHUNK);
    std::thread::scope(|threads| {
        let waiter = threads.spawn(|| progress.wait_on((last, CHUNK), PROGRAM, None));
        world.driver.fail_always(Some((COPY, DriverErrorKind::Other)));
        world.driver.set_gate(None);
        assert_eq!(waiter.join().unwrap().map_err(|e| e.status), Err(Status::Driver));
    });
    assert_eq!((wait_ons(&world), world.driver.used_bytes()), (0, 0));
    world.driver.fail_always(None);
    world.resume(&tag("r")).unwrap();
    world.check();
    world.check_no_leak();
}

#[test]
fn what_is_given_up_while_a_stream_is_made_to_wait_was_not_told() {
    let (mut world, addr) = paused(policy(Backup::Host));
    let progress = first_chunk_queued(&world);
    let (driver, resume) = (world.driver.clone(), progress.clone());
    world.driver.at_next("wait_on", move || {
        driver.fail_always(Some((COPY, DriverErrorKind::Other)));
        driver.set_gate(None);
        resume.finished(None).unwrap_err();
        driver.fail_always(None);
    });
    assert_eq!(progress.wait_on((addr, CHUNK), PROGRAM, None).map_err(|e| e.status), Err(Status::Driver));
    assert_eq!((wait_ons(&world), world.driver.used_bytes()), (1, 0));
    world.resume(&tag("r")).unwrap();
    world.check();
    world.check_no_leak();
}

#[test]
fn where_a_stream_cannot_be_made_to_wait_its_caller_waits() {
    for capturing in [false, true] {
        let (mut world, addr) = paused(policy(Backup::Host));
        let progress = first_chunk_queued(&world);
        match capturing {
            // The test's driver refuses to let a stream that is captured wait for an event.
            true => world.driver.set_capturing(true),
            false => world.driver.fail_always(Some(("wait_on", DriverErrorKind::Unsupported))),
        }
        assert_eq!(progress.wait_on((addr, CHUNK), PROGRAM, soon()), Ok(false));
        world.driver.set_gate(None);
        assert_eq!(progress.wait_on((addr, CHUNK), PROGRAM, None), Ok(true));
        assert!(progress.ready(addr, CHUNK));
        progress.finished(None).unwrap();
        world.driver.set_capturing(false);
        world.driver.fail_always(None);
        world.check();
        world.check_no_leak();
    }
}

#[test]
fn a_driver_that_refuses_says_so_and_the_resume_goes_on() {
    for verb in ["is_capturing", "wait_on"] {
        let (mut world, addr) = paused(policy(Backup::Host));
        let progress = first_chunk_queued(&world);
        world.driver.fail_always(Some((verb, DriverErrorKind::Other)));
        let error = progress.wait_on((addr, CHUNK), PROGRAM, None).unwrap_err();
        assert!(error.status == Status::Driver && error.message.contains(verb), "{error}");
        world.driver.fail_always(None);
        assert_eq!(progress.wait_on((addr, CHUNK), PROGRAM, None), Ok(true));
        world.driver.set_gate(None);
        progress.finished(None).unwrap();
        world.check();
        world.check_no_leak();
    }
}

#[test]
fn memory_that_a_stream_waits_for_can_be_freed() {
    let (mut world, addr) = paused(policy(Backup::Host));
    let progress = first_chunk_queued(&world);
    assert_eq!(progress.wait_on((addr, CHUNK), PROGRAM, None), Ok(true));
    world.free(addr).unwrap();
    world.driver.set_gate(None);
    progress.finished(None).unwrap();
    world.check_no_leak();
}

#[test]
fn without_memory_nothing_is_ready_and_nothing_is_held() {
    let (mut world, addr) = paused(policy(Backup::Host));
    world.driver.set_capacity(3 * CHUNK);
    let progress = start(&world, &[]);
    let error = progress.wait(addr, 1, None).unwrap_err();
    assert_eq!(error.status, Status::OutOfDeviceMemory);
    assert!(error.message.contains("'r'"), "{error}");
    assert_eq!((world.driver.used_bytes(), progress.bytes()), (0, (0, 4 * CHUNK)));
    let driver = world.driver.clone();
    let options = ResumeOptions { wait: Duration::from_secs(20), ..ResumeOptions::default() };
    let progress = world.engine.resume_start(&tag("r"), options).unwrap();
    assert_eq!(progress.wait(addr, 1, soon()), Ok(false));
    driver.set_capacity(8 * CHUNK);
    progress.finished(None).unwrap();
    world.check();
    world.check_no_leak();
}

#[test]
fn a_progress_is_cancelled_by_itself_only() {
    let (mut world, addr) = paused(policy(Backup::Host));
    world.driver.set_gate(Some((COPY, PIECES + 2)));
    let progress = start(&world, &[]);
    world.engine.cancel();
    assert_eq!(progress.wait(addr, 1, None), Ok(true));
    progress.cancel();
    world.driver.set_gate(None);
    assert_eq!(progress.finished(None).unwrap_err().status, Status::Cancelled);
    world.resume(&tag("r")).unwrap();
    world.check();
    world.check_no_leak();
}

#[test]
fn a_forgotten_progress_ends_all_the_same() {
    let (mut world, _) = paused(policy(Backup::Host));
    drop(start(&world, &[]));
    world.engine.enter(RegionId(0), OnPaused::Resume).unwrap();
    world.engine.leave(RegionId(0));
    world.check();
    world.check_no_leak();
}

#[test]
fn quiescing_ends_what_goes_on() {
    let (mut world, addr) = paused(policy(Backup::Host));
    world.driver.set_gate(Some((COPY, PIECES + 2)));
    let progress = start(&world, &[]);
    assert_eq!(progress.wait(addr, 1, None), Ok(true));
    world.engine.quiesce(soon().unwrap());
    assert_eq!(progress.finished(soon()), Ok(None), "the deadline passes while a copy hangs");
    world.driver.set_gate(None);
    world.engine.quiesce(Instant::now() + Duration::from_secs(20));
    assert_eq!(progress.finished(None).unwrap_err().status, Status::Cancelled);
    world.resume(&tag("r")).unwrap();
    world.check();
    world.check_no_leak();
}

#[test]
fn memory_freed_meanwhile_is_nobodys_loss() {
    let (mut world, addr) = paused(policy(Backup::Host));
    world.driver.set_gate(Some((COPY, 1)));
    let progress = start(&world, &[]);
    world.free(addr).unwrap();
    world.driver.set_gate(None);
    progress.finished(None).unwrap();
    world.check_no_leak();
}

#[test]
fn zeros_and_undefined_content_are_ready_too() {
    for zero_fill in [false, true] {
        let (mut world, addr) = paused(Policy { zero_fill, ..Policy::default() });
        let progress = start(&world, &[]);
        assert_eq!(progress.wait_on((addr, 4 * CHUNK), PROGRAM, None), Ok(true));
        assert_eq!(progress.wait(addr, 4 * CHUNK, None), Ok(true));
        progress.finished(None).unwrap();
        world.check();
        world.check_no_leak();
    }
}

#[test]
fn a_blocking_resume_takes_an_order_too() {
    let (mut world, addr) = paused(policy(Backup::Host));
    let order = [(addr.offset(3 * CHUNK), 1), (addr, u64::MAX)];
    world.engine.resume(&tag("r"), ResumeOptions { order: Some(&order), ..ResumeOptions::default() }).unwrap();
    world.check();
    world.check_no_leak();
}

#[test]
fn what_can_be_refused_at_once_is() {
    let world = World::new(1 << 20);
    let refused = |options| world.engine.resume_start(&tag("nobody"), options).unwrap_err().status;
    assert_eq!(refused(ResumeOptions::default()), Status::UnknownTag);
    assert_eq!(refused(ResumeOptions { capturing: true, ..ResumeOptions::default() }), Status::Capturing);
}
