//! How long the pieces are in which bytes go to and fro: long where nobody waits for the device, short as soon as somebody does.

use crate::common::world::{CHUNK, World, policy, tag};
use crate::common::{Call, GRANULARITY};
use sire_core::engine::*;
use sire_core::error::Error;
use std::sync::Arc;

/// All lengths here are in pages. Four are under way at first, in two pieces.
const PAGE: u64 = GRANULARITY;
const COPY_PIECE: u64 = 4 * PAGE;
/// An allocation of one chunk.
const SIZE: u64 = 30 * PAGE;

const CALM: [u64; 6] = [2, 2, 4, 8, 8, 6];
const GENTLE: [u64; 15] = [2; 15];
const SHORT: [u64; 30] = [1; 30];
/// A caller comes when the third piece goes, whose length is settled.
const AT_THE_THIRD: u64 = 2;

/// A world with a written allocation in each region, which has been away once.
fn world(regions: &[(&str, Policy)]) -> World {
    let mut world = World::configured(1 << 30, |config| {
        (config.copy_piece, config.chunk, config.host_unit) = (COPY_PIECE, 64 * CHUNK, 64 * CHUNK);
    });
    for &(name, policy) in regions {
        let region = world.region(name, policy);
        let addr = world.allocate(region, SIZE).unwrap();
        world.write(addr);
    }
    world.pause(&Selection::All).unwrap();
    world.resume(&Selection::All).unwrap();
    world
}

fn one(backup: Backup) -> World {
    world(&[("a", policy(backup))])
}

/// The pieces that `verb` copied: each ends with an event.
fn pieces(trail: &[Call], verb: &str) -> Vec<u64> {
    let (mut pieces, mut piece) = (Vec::new(), 0);
    for call in trail {
        match call.verb {
            copy if copy == verb => piece += call.size / PAGE,
            "record" if piece > 0 => pieces.push(std::mem::take(&mut piece)),
            _ => {}
        }
    }
    pieces
}

/// Pieces out of the device and back: of a pause and a resume of everything.
fn cycle(world: &mut World) -> [Vec<u64>; 2] {
    let begun = world.driver.calls() as usize;
    world.pause(&Selection::All).unwrap();
    world.resume(&Selection::All).unwrap();
    world.check();
    let trail = world.driver.trail(begun);
    ["copy_to_host", "copy_to_device"].map(|verb| pieces(&trail, verb))
}

/// Has another thread do something.
fn elsewhere(work: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        scope.spawn(work);
    });
}

#[test]
fn they_grow_while_nobody_calls() {
    let mut world = one(Backup::Host);
    assert_eq!(cycle(&mut world), [CALM, CALM]);
    // Whoever pauses cannot wait for it.
    world.engine.note_caller();
    assert_eq!(cycle(&mut world), [CALM, CALM]);
    world.check_no_leak();
}

#[test]
fn they_are_short_from_the_start_where_another_thread_has_called_lately() {
    let world = one(Backup::Host);
    let begun = world.driver.calls() as usize;
    elsewhere(|| world.engine.note_caller());
    world.engine.pause(&Selection::All, PauseOptions::default()).unwrap();
    // Those of this thread since do not hide it.
    elsewhere(|| world.engine.note_caller());
    world.engine.note_caller();
    world.engine.resume(&Selection::All, ResumeOptions::default()).unwrap();
    let trail = world.driver.trail(begun);
    assert_eq!(["copy_to_host", "copy_to_device"].map(|verb| pieces(&trail, verb)), [SHORT, SHORT]);
}

#[test]
fn they_are_short_as_soon_as_somebody_calls() {
    type Step = fn(&Engine) -> Result<Report, Error>;
    let pause: Step = |engine| engine.pause(&Selection::All, PauseOptions::default());
    let resume: Step = |engine| engine.resume(&Selection::All, ResumeOptions::default());
    // When a piece goes its length is settled; while the pass waits for the first to land, that of the third is not.
    for (when, before, settled) in [("copy", AT_THE_THIRD, 3), ("wait", 0, 2)] {
        let world = one(Backup::Host);
        let (driver, engine) = (world.driver.clone(), Arc::new(world.engine));
        for (verb, step) in [("copy_to_host", pause), ("copy_to_device", resume)] {
            let (begun, program) = (driver.calls() as usize, Arc::downgrade(&engine));
            let at = if when == "copy" { verb } else { when };
            // By the pausing thread itself, here; a caller during a pass is another's, whoever it is.
            driver.at_later(at, before, move || program.upgrade().unwrap().note_caller());
            step(&engine).unwrap();
            let short = 30 - CALM[..settled].iter().sum::<u64>() as usize;
            assert_eq!(
                pieces(&driver.trail(begun), verb),
                [&CALM[..settled], &SHORT[..short]].concat(),
                "{verb}, {when}"
            );
        }
    }
}

/// Calls that come now and then find no more than a copy piece under way, however much is copied between them.
#[test]
fn they_do_not_grow_within_a_second_of_a_call() {
    let names = ["a", "b", "c", "d"].map(|name| (name, policy(Backup::Host)));
    let world = world(&names);
    // Sixty-four short ones end in the third region.
    let expected = [&[1; 64][..], &[2; 13], &[2; 15]].concat();
    let paused = || {
        let begun = world.driver.calls() as usize;
        elsewhere(|| world.engine.note_caller());
        world.engine.pause(&Selection::All, PauseOptions::default()).unwrap();
        let lengths = pieces(&world.driver.trail(begun), "copy_to_host");
        world.engine.resume(&Selection::All, ResumeOptions::default()).unwrap();
        lengths
    };
    // A machine that stalls for a second meanwhile has forgotten the call.
    let all: Vec<_> = (0..5).map(|_| paused()).collect();
    assert!(all.contains(&expected), "{all:?}");
}

/// An allocation that waits until the device has let go of small ones is the program's call as well: it may come again.
#[test]
fn an_allocation_that_waits_is_a_call() {
    let names = ["a", "b", "c", "d"].map(|name| (name, policy(Backup::Host)));
    let world = world(&names);
    let (driver, engine) = (world.driver.clone(), Arc::new(world.engine));
    let (begun, program) = (driver.calls() as usize, Arc::downgrade(&engine));
    driver.at_later("copy_to_host", AT_THE_THIRD, move || {
        let engine = program.upgrade().unwrap();
        let region = engine.region("small", Policy::default()).unwrap();
        let small = || engine.allocate(World::request(region, 512)).unwrap();
        // Four slabs of eight, of which no slot may be used again before somebody has waited.
        let all: Vec<_> = (0..4 * 8).map(|_| small()).collect();
        all.into_iter().for_each(|addr| engine.free(addr, false).unwrap());
        let _ = small();
    });
    engine.pause(&Selection::All, PauseOptions::default()).unwrap();
    let lengths = pieces(&driver.trail(begun), "copy_to_host");
    // Sixty-four short ones end in the third region.
    assert_eq!(lengths, [&CALM[..3], &SHORT[..22], &SHORT, &SHORT[..12], &[2; 9], &[2; 15]].concat());
}

/// Who frees memory of the engine's waits for the device, too, and so does a pause: but that says nothing of what the program will do next.
#[test]
fn a_free_is_a_call_and_another_pause_only_while_it_waits() {
    let world = world(&[("a", policy(Backup::Host)), ("b", policy(Backup::Host))]);
    let (driver, engine) = (world.driver.clone(), Arc::new(world.engine));
    let (begun, other) = (driver.calls() as usize, Arc::downgrade(&engine));
    driver.at_later("copy_to_host", AT_THE_THIRD, move || {
        let engine = other.upgrade().unwrap();
        let region = engine.region("other", Policy::default()).unwrap();
        let addr = engine.allocate(World::request(region, 4 * CHUNK)).unwrap();
        engine.free(addr, false).unwrap();
    });
    engine.pause(&tag("a"), PauseOptions::default()).unwrap();
    assert_eq!(pieces(&driver.trail(begun), "copy_to_host"), [&CALM[..3], &SHORT[..22]].concat());
    let begun = driver.calls() as usize;
    elsewhere(|| assert!(engine.pause(&tag("b"), PauseOptions::default()).is_ok()));
    engine.resume(&tag("b"), ResumeOptions::default()).unwrap();
    let trail = driver.trail(begun);
    let [out, back] = ["copy_to_host", "copy_to_device"].map(|verb| pieces(&trail, verb));
    assert_eq!((out, back), (SHORT.to_vec(), CALM.to_vec()));
}

#[test]
fn both_sides_of_a_switch_have_a_stride_of_their_own() {
    let mut world = world(&[("a", policy(Backup::Host)), ("b", policy(Backup::Host))]);
    world.pause(&tag("b")).unwrap();
    // One side has a thread of its own; the call is this one's all the same.
    world.engine.note_caller();
    let begun = world.driver.calls() as usize;
    world.switch(&tag("a"), &tag("b")).unwrap();
    let trail = world.driver.trail(begun);
    let of =
        |verb: &str| trail.iter().filter(|call| call.verb == verb).map(|call| call.size / PAGE).collect::<Vec<_>>();
    assert_eq!((of("copy_to_host"), of("copy_to_device")), (CALM.to_vec(), CALM.to_vec()));
    world.check();
}

/// The program goes on beside it, and its own copies wait for ours.
#[test]
fn they_do_not_grow_in_the_background() {
    let mut world = one(Backup::Host);
    world.pause(&Selection::All).unwrap();
    let begun = world.driver.calls() as usize;
    world.resume_behind(&Selection::All).unwrap();
    assert_eq!(pieces(&world.driver.trail(begun), "copy_to_device"), GENTLE);
    world.check();
}

/// A record of a tier is as long as it is, and what goes through a buffer fits into one.
#[test]
fn what_goes_through_a_buffer_is_no_longer_than_one() {
    let mut world = one(Backup::Disk);
    let records = vec![4, 4, 4, 4, 4, 4, 4, 2];
    assert_eq!(cycle(&mut world), [records.clone(), records]);

    let verified = Policy { clean: Clean::Verified, zero_fill: false, ..policy(Backup::Host) };
    let mut world = self::world(&[("a", verified)]);
    let addr = *world.twins.keys().next().unwrap();
    world.write_constant(addr, 0, SIZE, *b"no bytes");
    let [out, back] = cycle(&mut world);
    assert_eq!((out.len(), back.iter().sum::<u64>()), (0, 30));
    assert!(back.iter().all(|&len| len <= 4), "{back:?}");
}
