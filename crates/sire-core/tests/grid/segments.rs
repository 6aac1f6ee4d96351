//! Memory that the program maps itself: PyTorch's order of calls, what a pause does to it, and what it does to a pause. Whole lives, in which calls fail,
//! are in `segment_lives.rs`.

use crate::common::player::{HERE, PEER, Player, SMALL, STRIDE, WANTED, access, beside, refusal, small};
use crate::common::world::{policy, tag};
use sire_core::driver::{Addr, Device, Driver, DriverErrorKind};
use sire_core::engine::*;
use sire_core::error::Status;
use sire_core::segments::{Handle, NewMemory, Segments};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

#[test]
fn a_segment_grows_is_paused_and_comes_back_as_it_was() {
    let mut player = Player::new(16 * STRIDE, STRIDE);
    let a = player.region("a", policy(Backup::Host));
    let segment = player.reserve(Some(a), 8);
    player.grow(segment, &[0, 1, 2], Some(a), a).unwrap();
    player.grow(segment, &[3], Some(a), a).unwrap();
    player.open(segment, &[0, 1, 2, 3], PEER);
    let report = player.pause(&tag("a")).unwrap();
    assert_eq!((report.bytes_moved, report.bytes_copied, report.allocations), (4 * STRIDE, 4 * STRIDE, 4));
    assert_eq!(player.driver.used_bytes(), 0);
    let before = player.driver.log().len();
    let report = player.resume(&tag("a")).unwrap();
    assert_eq!(report.bytes_moved, 4 * STRIDE);
    assert_eq!(player.driver.properties(), vec![Some(WANTED); 4]);
    let opened = player.driver.log()[before..].iter().filter(|verb| **verb == "set_access").count();
    assert_eq!(opened, 3, "one piece, so that the copy begins, then runs of two and of what is left");
    player.check_no_leak();
}

/// It once waited for the owner alone, and for peers only if they were given access to all of it: work of another device that the program had named in
/// its own call could still write to what was being copied.
#[test]
fn a_pause_waits_for_every_device_that_was_given_access() {
    let mut player = small();
    let a = player.region("a", policy(Backup::Host));
    let segment = player.reserve(Some(a), 4);
    player.grow(segment, &[0, 1], Some(a), a).unwrap();
    let waits = |player: &mut Player| {
        let before = player.driver.log().len();
        player.pause(&tag("a")).unwrap();
        let log = player.driver.log();
        let waits = log[before..].iter().filter(|verb| **verb == "synchronize").count();
        player.resume(&tag("a")).unwrap();
        waits
    };
    player.open(segment, &[0, 1], HERE);
    assert_eq!(waits(&mut player), 1);
    player.open(segment, &[1], PEER);
    assert_eq!(waits(&mut player), 2, "the peer's work is not waited for");
    player.check_no_leak();
}

/// What only peers may touch was taken for memory without content: it went with a pause, without a backup and without a word.
#[test]
fn what_only_a_peer_may_touch_stays() {
    let mut player = small();
    let a = player.region("a", policy(Backup::Host));
    let segment = player.reserve(Some(a), 2);
    let (addr, handle) = (player.addr(segment, 0), player.calls().create(player.memory(Some(a))).unwrap().unwrap());
    assert_eq!(player.calls().map(addr, SMALL, 0, handle, false).unwrap(), None);
    player.calls().grant(addr, SMALL, &access(PEER)).unwrap();
    player.driver.poke(PEER, addr, &[7; 8]).unwrap();
    let report = player.engine.pause(&tag("a"), PauseOptions::default()).unwrap();
    assert_eq!((report.bytes_held, report.bytes_moved, report.bytes_discarded), (SMALL, 0, 0));
    let notices = player.engine.take_notices();
    assert!(notices.iter().any(|notice| notice.contains("stay on the device: only other devices")), "{notices:?}");
    // Once its owner may read it, also while it is paused, a pause takes it.
    player.calls().grant(addr, SMALL, &access(HERE)).unwrap();
    assert_eq!(player.engine.pause(&tag("a"), PauseOptions::default()).unwrap().bytes_moved, SMALL);
    player.engine.resume(&tag("a"), ResumeOptions::default()).unwrap();
    assert_eq!(player.driver.peek(PEER, addr, 8).unwrap(), [7; 8]);
    player.calls().unmap(addr, SMALL).unwrap();
    player.calls().release(handle).unwrap();
    player.check_no_leak();
}

/// A peer is given access to memory that was paused before anybody had any, and that comes back for it; and unmapped, such memory is followed as before.
#[test]
fn what_only_a_peer_may_touch_comes_and_goes_as_the_program_says() {
    let mut player = small();
    let a = player.region("a", policy(Backup::Host));
    let segment = player.reserve(Some(a), 2);
    let (addr, handle) = (player.addr(segment, 0), player.calls().create(player.memory(Some(a))).unwrap().unwrap());
    assert_eq!(player.calls().map(addr, SMALL, 0, handle, false).unwrap(), None);
    assert_eq!(player.engine.pause(&tag("a"), PauseOptions::default()).unwrap().bytes_moved, SMALL);
    player.calls().grant(addr, SMALL, &access(PEER)).unwrap();
    player.engine.resume(&tag("a"), ResumeOptions::default()).unwrap();
    player.driver.poke(PEER, addr, &[9; 8]).unwrap();
    player.calls().unmap(addr, SMALL).unwrap();
    let there = player.addr(segment, 1);
    assert_eq!(player.calls().map(there, SMALL, 0, handle, false).unwrap(), None, "it is followed");
    player.calls().grant(there, SMALL, &access(HERE)).unwrap();
    assert_eq!(player.driver.peek(HERE, there, 8).unwrap(), [9; 8]);
    player.calls().unmap(there, SMALL).unwrap();
    player.calls().release(handle).unwrap();
    player.check_no_leak();
}

/// Whoever copied memory ahead of a pause gave it back in the program's place when it was unmapped: mapped elsewhere, the handle had lost its content.
#[test]
fn memory_that_is_unmapped_while_it_is_read_keeps_its_content() {
    for clean in [Clean::Verified, Clean::Paranoid] {
        let mut player = small();
        let a = player.region("a", Policy { clean, ..policy(Backup::Host) });
        let segment = player.reserve(Some(a), 4);
        player.grow(segment, &[0, 1], Some(a), a).unwrap();
        let moved = player.segments[segment].pieces.remove(&0).unwrap();
        let (here, there, handle) = (player.addr(segment, 0), player.addr(segment, 3), moved.handle);
        let outcome = beside(&player, "copy_to_host", move |engine| {
            engine.segments().unmap(here, SMALL).unwrap();
            engine.segments().map(there, SMALL, 0, handle, false).unwrap();
            engine.segments().grant(there, SMALL, &access(HERE)).unwrap();
        });
        player.engine.pre_copy(&tag("a"), false).unwrap();
        outcome.recv().unwrap();
        player.segments[segment].pieces.insert(3, moved);
        player.check();
        player.pause(&tag("a")).unwrap();
        player.resume(&tag("a")).unwrap();
        player.check_no_leak();
    }
}

/// Reservations can lie side by side, and the manual does not say whether one call may give access to memory in both.
#[test]
fn access_that_is_refused_for_several_pieces_is_given_piece_by_piece() {
    let mut player = Player::new(16 * STRIDE, STRIDE);
    let a = player.region("a", policy(Backup::Host));
    let segment = player.reserve(Some(a), 8);
    player.grow(segment, &[0, 1, 2, 3], Some(a), a).unwrap();
    player.open(segment, &[0, 1, 2, 3], PEER);
    player.pause(&tag("a")).unwrap();
    player.driver.set_widest_access(Some(STRIDE));
    assert_eq!(player.resume(&tag("a")).unwrap().bytes_moved, 4 * STRIDE);
    player.check_no_leak();
}

/// It once stayed noted, and every later resume asked for it, and failed.
#[test]
fn access_that_is_refused_is_not_asked_for_again() {
    let mut player = small();
    let a = player.region("a", policy(Backup::Host));
    let segment = player.reserve(Some(a), 2);
    player.grow(segment, &[0], Some(a), a).unwrap();
    player.open(segment, &[0], HERE);
    let addr = player.addr(segment, 0);
    let (refused, message) = refusal(player.calls().grant(addr, SMALL, &access(Device(7))));
    assert!(refused == Status::InvalidArgument && message.contains("there are 2 devices"), "{message}");
    player.driver.set_widest_access(Some(1));
    player.calls().grant(addr, SMALL, &access(PEER)).unwrap_err();
    player.driver.set_widest_access(None);
    player.pause(&tag("a")).unwrap();
    player.resume(&tag("a")).unwrap();
    assert!(player.driver.peek(PEER, addr, 1).is_err(), "the peer reads what the driver refused to give it");
    player.check_no_leak();
}

#[test]
fn freeing_what_is_paused_is_noted_and_nothing_else() {
    let mut player = small();
    let a = player.region("a", policy(Backup::Host));
    let segment = player.reserve(Some(a), 4);
    player.grow(segment, &[0, 1, 2], Some(a), a).unwrap();
    player.pause(&tag("a")).unwrap();
    let calls = player.driver.calls();
    player.shrink(segment, 1);
    assert_eq!(player.driver.calls(), calls, "what is paused is not unmapped");
    assert_eq!(player.resume(&tag("a")).unwrap().bytes_moved, 2 * SMALL);
    player.grow(segment, &[1], Some(a), a).unwrap();
    player.pause(&Selection::All).unwrap();
    let calls = player.driver.calls();
    player.drop_segment(segment);
    assert_eq!(player.driver.calls(), calls + 1, "the addresses go, and that is all");
    assert_eq!(player.resume(&Selection::All).unwrap().bytes_moved, 0);
    player.check_no_leak();
}

#[test]
fn only_create_fails_while_paused() {
    let mut player = small();
    let a = player.region("a", policy(Backup::Host));
    let segment = player.reserve(Some(a), 4);
    player.grow(segment, &[0, 1], Some(a), a).unwrap();
    player.pause(&tag("a")).unwrap();
    let (refused, message) = refusal(player.grow(segment, &[2], Some(a), a));
    assert!(refused == Status::Paused && message.contains("region 'a'"), "{message}");
    player.open(segment, &[0, 1], PEER);
    let addr = player.addr(segment, 0);
    assert_eq!(player.calls().mapping(addr.offset(1)), Some((addr, SMALL)));
    assert_eq!(player.calls().retain(addr), Some(player.segments[segment].pieces[&0].handle));
    player.calls().release(player.segments[segment].pieces[&0].handle).unwrap();
    player.resume(&tag("a")).unwrap();
    player.check_no_leak();
}

#[test]
fn a_full_device_takes_no_half_growth() {
    let mut player = small();
    player.driver.set_capacity(3 * SMALL);
    let a = player.region("a", policy(Backup::Host));
    let segment = player.reserve(Some(a), 8);
    player.grow(segment, &[0], Some(a), a).unwrap();
    let (refused, message) = refusal(player.grow(segment, &[1, 2, 3], Some(a), a));
    assert!(refused == Status::OutOfDeviceMemory && message.contains("region 'a'"), "{message}");
    player.grow(segment, &[1, 2], Some(a), a).unwrap();
    player.pause(&tag("a")).unwrap();
    player.driver.set_capacity(SMALL);
    assert_eq!(refusal(player.resume(&tag("a"))).0, Status::OutOfDeviceMemory);
    player.driver.set_capacity(3 * SMALL);
    player.resume(&tag("a")).unwrap();
    player.check_no_leak();
}

#[test]
fn memory_in_hand_keeps_a_region_from_pausing() {
    let mut player = small();
    let a = player.region("a", policy(Backup::Host));
    let handle = player.calls().create(player.memory(Some(a))).unwrap().unwrap();
    let (refused, message) = refusal(player.pause(&tag("a")));
    assert!(refused == Status::Busy && message.contains("1 pieces"), "{message}");
    player.calls().release(handle).unwrap();
    assert_eq!(player.pause(&tag("a")).unwrap().regions_changed, 1);
    assert_eq!(refusal(player.calls().release(handle)).0, Status::InvalidArgument);
    player.check_no_leak();
}

#[test]
fn a_pause_waits_for_memory_that_is_being_mapped() {
    let mut player = small();
    let a = player.region("a", policy(Backup::Host));
    let handle = player.calls().create(player.memory(Some(a))).unwrap().unwrap();
    let engine = Arc::clone(&player.engine);
    let releasing = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(10));
        engine.segments().release(handle).unwrap();
    });
    player.pause(&tag("a")).unwrap();
    releasing.join().unwrap();
    player.check_no_leak();
}

#[test]
fn memory_that_nobody_may_touch_yet_is_not_read() {
    let mut player = small();
    let zeroed = player.region("zeroed", Policy { zero_fill: true, ..policy(Backup::Host) });
    let segment = player.reserve(Some(zeroed), 2);
    let handle = player.calls().create(player.memory(Some(zeroed))).unwrap().unwrap();
    let addr = player.addr(segment, 0);
    assert_eq!(player.calls().map(addr, SMALL, 0, handle, false).unwrap(), None);
    let report = player.pause(&tag("zeroed")).unwrap();
    assert_eq!((report.bytes_copied, report.bytes_discarded, report.bytes_moved), (0, 0, SMALL));
    player.calls().grant(addr, SMALL, &access(HERE)).unwrap();
    player.resume(&tag("zeroed")).unwrap();
    player.driver.poke(HERE, addr, &[1; 8]).unwrap();
    player.calls().unmap(addr, SMALL).unwrap();
    player.calls().release(handle).unwrap();
    player.check_no_leak();
}

#[test]
fn a_second_mapping_is_the_drivers() {
    let mut player = small();
    let a = player.region("a", policy(Backup::Host));
    let segment = player.reserve(Some(a), 4);
    player.grow(segment, &[0], Some(a), a).unwrap();
    let handle = player.segments[segment].pieces[&0].handle;
    let there = player.addr(segment, 2);
    let physical = player.calls().map(there, SMALL, 0, handle, false).unwrap().expect("the caller is to map it");
    player.driver.map(there, SMALL, physical).unwrap();
    player.calls().mapped(there, SMALL);
    player.calls().unreserve(there, SMALL).unwrap();
    assert_eq!(player.calls().unmap(there, SMALL).unwrap(), vec![(there, SMALL)]);
    player.driver.unmap(there, SMALL).unwrap();
    player.check_no_leak();
}

/// What the driver refused to map a second time, or in part, was held for good, though it was mapped once and whole.
#[test]
fn a_mapping_that_the_driver_refuses_holds_nothing() {
    let mut player = small();
    let a = player.region("a", policy(Backup::Host));
    let segment = player.reserve(Some(a), 4);
    player.grow(segment, &[0], Some(a), a).unwrap();
    let twice = player.segments[segment].pieces[&0].handle;
    let loose = player.calls().create(player.memory(Some(a))).unwrap().unwrap();
    let (first, second) = (player.addr(segment, 1), player.addr(segment, 2));
    for (handle, addr, size) in [(twice, second, SMALL), (loose, second, SMALL / 2)] {
        let asking =
            player.calls().map_or_lend(addr, size, 0, handle, false).unwrap().expect("the caller is to map it");
        drop(asking);
    }
    assert_eq!(player.calls().map(first, SMALL, 0, loose, false).unwrap(), None, "it is followed");
    let report = player.engine.pause(&tag("a"), PauseOptions::default()).unwrap();
    assert_eq!((report.bytes_held, report.bytes_moved, player.driver.used_bytes()), (0, 2 * SMALL, 0));
    player.engine.resume(&tag("a"), ResumeOptions::default()).unwrap();
    assert!(player.calls().unmap(first, SMALL).unwrap().is_empty());
    player.calls().release(loose).unwrap();
    player.check_no_leak();
}

#[test]
fn memory_that_was_unmapped_keeps_its_content_until_it_is_released() {
    let mut player = small();
    let a = player.region("a", policy(Backup::Host));
    let segment = player.reserve(Some(a), 4);
    player.grow(segment, &[0], Some(a), a).unwrap();
    let piece = player.segments[segment].pieces.remove(&0).unwrap();
    player.calls().unmap(player.addr(segment, 0), SMALL).unwrap();
    assert_eq!(refusal(player.pause(&tag("a"))).0, Status::Busy);
    assert_eq!(player.calls().map(player.addr(segment, 3), SMALL, 0, piece.handle, false).unwrap(), None);
    player.segments[segment].pieces.insert(3, piece);
    player.open(segment, &[3], HERE);
    player.check();
    player.pause(&tag("a")).unwrap();
    // Unmapped while it is paused, its content is gone, as after a release; but the handle still works.
    let piece = player.segments[segment].pieces.remove(&3).unwrap();
    player.calls().unmap(player.addr(segment, 3), SMALL).unwrap();
    player.resume(&tag("a")).unwrap();
    assert_eq!(player.calls().map(player.addr(segment, 0), SMALL, 0, piece.handle, false).unwrap(), None);
    player.segments[segment].pieces.insert(0, crate::common::player::Piece { holds: None, ..piece });
    player.check_no_leak();
}

#[test]
fn a_range_of_several_mappings_is_one_range() {
    let mut player = Player::new(16 * STRIDE, STRIDE);
    let a = player.region("a", policy(Backup::Host));
    let segment = player.reserve(Some(a), 4);
    player.grow(segment, &[0, 1, 2], Some(a), a).unwrap();
    let base = player.addr(segment, 0);
    player.engine.discard(base.offset(STRIDE / 2), 2 * STRIDE).unwrap();
    assert_eq!(player.engine.pause(&tag("a"), PauseOptions::default()).unwrap().bytes_copied, STRIDE);
    assert!(player.engine.backup(base, STRIDE / 2).unwrap().is_some());
    player.engine.resume(&tag("a"), ResumeOptions::default()).unwrap();
    assert_eq!(refusal(player.engine.keep(base, 4 * STRIDE)).0, Status::UnknownAddress);
    player.engine.keep(base, 3 * STRIDE).unwrap();
    player.engine.pause(&tag("a"), PauseOptions::default()).unwrap();
    let view = player.engine.backup(base, 3 * STRIDE).unwrap().unwrap();
    assert_eq!(view.len, 3 * STRIDE);
    drop(view);
    assert_eq!(refusal(player.engine.free(base, false)).0, Status::UnknownAddress);
    for slot in 0..3 {
        player.shrink(segment, slot);
    }
    player.check_no_leak();
}

#[test]
fn one_call_unmaps_several() {
    let mut player = Player::new(16 * STRIDE, STRIDE);
    let a = player.region("a", policy(Backup::Host));
    let segment = player.reserve(Some(a), 4);
    player.grow(segment, &[0, 1, 2], Some(a), a).unwrap();
    let base = player.addr(segment, 0);
    assert_eq!(refusal(player.calls().unmap(base, STRIDE + SMALL)).0, Status::InvalidArgument);
    player.check();
    assert!(player.calls().unmap(base, 3 * STRIDE).unwrap().is_empty());
    for (_, piece) in std::mem::take(&mut player.segments[segment].pieces) {
        player.calls().release(piece.handle).unwrap();
    }
    player.check_no_leak();
}

#[test]
fn regions_that_share_a_segment_are_not_paused_alone() {
    let mut player = small();
    let (a, b) = (player.region("m/a", policy(Backup::Host)), player.region("m/b", policy(Backup::Host)));
    let segment = player.reserve(Some(a), 4);
    player.grow(segment, &[0], Some(a), a).unwrap();
    player.grow(segment, &[1], Some(b), b).unwrap();
    let (refused, message) = refusal(player.pause(&tag("m/a")));
    assert!(refused == Status::Unsupported && message.contains("'m/b'") && message.contains("pool"), "{message}");
    player.pause(&tag("m")).unwrap();
    player.resume(&tag("m")).unwrap();
    player.shrink(segment, 1);
    player.pause(&tag("m/a")).unwrap();
    player.check_no_leak();
}

#[test]
fn memory_of_no_region_joins_the_segment_that_it_is_mapped_in() {
    let mut player = small();
    assert_eq!(player.calls().create(player.memory(None)).unwrap(), None, "no region, no reservation: none of ours");
    let a = player.region("a", policy(Backup::Host));
    let (inside, outside) = (player.reserve(Some(a), 4), player.reserve(None, 4));
    player.grow(inside, &[0], None, a).unwrap();
    assert_eq!(player.pause(&tag("a")).unwrap().bytes_moved, SMALL);
    let handle = player.calls().create(player.memory(None)).unwrap().unwrap();
    let there = player.addr(outside, 0);
    let physical = player.calls().map(there, SMALL, 0, handle, false).unwrap().expect("the caller is to map it");
    player.driver.map(there, SMALL, physical).unwrap();
    player.calls().mapped(there, SMALL);
    assert_eq!(player.calls().grant(there, SMALL, &access(HERE)).unwrap(), vec![(there, SMALL)]);
    assert_eq!(player.calls().unmap(there, SMALL).unwrap(), vec![(there, SMALL)]);
    player.driver.unmap(there, SMALL).unwrap();
    player.calls().release(handle).unwrap();
    player.resume(&tag("a")).unwrap();
    player.check_no_leak();
}

#[test]
fn unknown_handles_are_errors() {
    let player = small();
    let stale = Handle(0x51AE << 48 | 7);
    assert!(Segments::is_virtual(stale.0) && !Segments::is_virtual(7) && !Segments::is_virtual(0x7f00_dead_beef));
    assert_eq!(refusal(player.calls().release(stale)).0, Status::InvalidArgument);
    assert_eq!(refusal(player.calls().map(Addr(STRIDE), SMALL, 0, stale, false)).0, Status::InvalidArgument);
    assert_eq!(refusal(player.calls().memory(stale)).0, Status::InvalidArgument);
    assert_eq!(refusal(player.calls().lend(stale, "")).0, Status::InvalidArgument);
    assert_eq!(player.calls().retain(Addr(STRIDE)), None);
}

/// What is refused says what was asked and what is in its way.
#[test]
fn refusals_say_what_is_in_the_way() {
    let mut player = small();
    let a = player.region("a", policy(Backup::Host));
    let segment = player.reserve(Some(a), 4);
    player.grow(segment, &[0, 1], Some(a), a).unwrap();
    let (addr, stale) = (player.addr(segment, 0), Handle(0x51AE << 48 | 7));
    let calls = player.calls();
    let fresh = calls.create(player.memory(Some(a))).unwrap().expect("it is ours");
    let refusals = [
        (refusal(calls.release(stale)), "is no live handle of physical memory"),
        (refusal(calls.map(addr, SMALL, 0, fresh, false)), "cannot be mapped at"),
        (refusal(calls.unmap(addr, SMALL / 2)), "end inside the mapping at"),
        (refusal(calls.unreserve(player.segments[segment].base, 4 * STRIDE)), "cannot be given back"),
    ];
    for ((status, message), words) in refusals {
        assert_eq!(status, Status::InvalidArgument, "{message}");
        assert!(message.contains(words), "{message}");
    }
    calls.release(fresh).unwrap();
    let (engine, handle) = (Arc::clone(&player.engine), player.segments[segment].pieces[&0].handle);
    player.driver.at_next("copy_to_host", move || {
        let (status, message) = refusal(engine.segments().lend(handle, "it was exported"));
        assert_eq!(status, Status::Busy);
        assert!(message.contains("is being paused or resumed"), "{message}");
    });
    player.pause(&tag("a")).unwrap();
    player.resume(&tag("a")).unwrap();
    player.check_no_leak();
}

/// While a pause copies, the program unmaps, releases and gives addresses back; all goes well at once, and the pages go with the pause.
#[test]
fn freeing_what_is_being_paused_is_left_to_the_pause() {
    for verb in ["copy_to_host", "wait", "unmap", "release"] {
        let mut player = small();
        let a = player.region("a", policy(Backup::Host));
        let (gone, stays) = (player.reserve(Some(a), 2), player.reserve(Some(a), 2));
        player.grow(gone, &[0, 1], Some(a), a).unwrap();
        player.grow(stays, &[0], Some(a), a).unwrap();
        let engine = Arc::clone(&player.engine);
        let segment = player.segments.swap_remove(gone);
        player.driver.at_next(verb, move || {
            let calls = engine.segments();
            for (slot, piece) in segment.pieces {
                assert!(calls.unmap(segment.base.offset(slot * STRIDE), SMALL).unwrap().is_empty());
                calls.release(piece.handle).unwrap();
            }
            assert!(calls.unreserve(segment.base, segment.slots * STRIDE).unwrap());
        });
        let before = player.driver.log().len();
        player.pause(&tag("a")).unwrap();
        assert_eq!((player.driver.used_bytes(), player.driver.counts().1), (0, 0), "{verb}");
        let waits = player.driver.log()[before..].iter().filter(|called| **called == "synchronize").count();
        assert_eq!(waits, 1, "nobody waits for a device because the program unmaps something: {verb}");
        player.resume(&tag("a")).unwrap();
        player.check_no_leak();
    }
}

#[test]
fn a_switch_hands_pieces_on_that_were_asked_to_do_the_same() {
    let mut player = small();
    player.driver.set_capacity(3 * SMALL);
    let (a, b) = (player.region("a", policy(Backup::Host)), player.region("b", policy(Backup::Host)));
    for region in [a, b] {
        let segment = player.reserve(Some(region), 4);
        player.grow(segment, &[0, 1], Some(region), region).unwrap();
        if region == a {
            player.pause(&tag("a")).unwrap();
        }
    }
    let (_, resumed) = player.engine.switch(&tag("b"), &tag("a"), SwitchOptions::default()).unwrap();
    assert!(resumed.bytes_recycled > 0, "{resumed:?}");
    player.check();
    assert_eq!(player.driver.properties(), vec![Some(WANTED); 2]);
    player.check_no_leak();
}

/// What was unmapped while its region was paused lazily could be mapped again there at once. It had no backup any more, and went without one, and without
/// waiting for anybody, as soon as somebody needed memory.
#[test]
fn what_was_unmapped_while_its_region_was_paused_lazily_waits_for_the_resume() {
    let mut player = small();
    player.driver.set_capacity(3 * SMALL);
    let (a, b) = (player.region("a", policy(Backup::Host)), player.region("b", policy(Backup::None)));
    let (segment, other) = (player.reserve(Some(a), 4), player.reserve(Some(b), 4));
    player.grow(segment, &[0, 1], Some(a), a).unwrap();
    player.engine.pause(&tag("a"), PauseOptions { lazy: true, ..PauseOptions::default() }).unwrap();
    let piece = player.segments[segment].pieces.remove(&0).unwrap();
    player.calls().unmap(player.addr(segment, 0), SMALL).unwrap();
    let there = player.addr(segment, 3);
    let (refused, message) = refusal(player.calls().map(there, SMALL, 0, piece.handle, false));
    assert!(refused == Status::Paused && message.contains("map memory in region 'a'"), "{message}");
    player.grow(other, &[0, 1], Some(b), b).unwrap();
    player.shrink(other, 0);
    player.resume(&tag("a")).unwrap();
    assert_eq!(player.calls().map(there, SMALL, 0, piece.handle, false).unwrap(), None);
    player.segments[segment].pieces.insert(3, piece);
    player.open(segment, &[3], HERE);
    player.check();
    player.check_no_leak();
}

/// Two threads found addresses that the driver had refused to unmap before. While one tried again, the other was told that the driver still refused.
#[test]
fn a_mapping_waits_for_whoever_unmaps_what_was_there() {
    let mut player = small();
    let a = player.region("a", policy(Backup::Host));
    let segment = player.reserve(Some(a), 4);
    player.grow(segment, &[0, 1], Some(a), a).unwrap();
    player.driver.fail_always(Some(("unmap", DriverErrorKind::Other)));
    player.shrink(segment, 0);
    player.shrink(segment, 1);
    player.driver.fail_always(None);
    assert_eq!(player.driver.counts().1, 2, "both wait to be unmapped");
    let handle = player.calls().create(NewMemory { capturing: true, ..player.memory(Some(a)) }).unwrap().unwrap();
    let there = player.addr(segment, 1);
    let mapped = beside(&player, "unmap", move |engine| engine.segments().map(there, SMALL, 0, handle, false));
    player.engine.trim();
    assert_eq!(mapped.recv().unwrap(), Ok(None));
    player.calls().unmap(there, SMALL).unwrap();
    player.calls().release(handle).unwrap();
    player.check_no_leak();
}

/// What the program had unmapped while a transition had it could not be given back during a capture that began meanwhile, because a device would have been
/// waited for, which nobody had asked for. Memory could not be mapped there before the capture's end.
#[test]
fn addresses_that_were_unmapped_are_free_also_during_a_capture() {
    static CAPTURING: AtomicBool = AtomicBool::new(false);
    let mut player = small();
    player.engine.watch_captures(|| CAPTURING.load(Ordering::SeqCst));
    let (a, b) = (player.region("a", policy(Backup::Host)), player.region("b", policy(Backup::Host)));
    let segment = player.reserve(Some(a), 4);
    player.grow(segment, &[0, 1], Some(a), a).unwrap();
    let handle = player.calls().create(player.memory(Some(b))).unwrap().unwrap();
    let (engine, driver, there) = (Arc::clone(&player.engine), Arc::clone(&player.driver), player.addr(segment, 1));
    let gone = player.segments[segment].pieces.remove(&1).unwrap();
    player.driver.at_next("copy_to_host", move || {
        engine.segments().unmap(there, SMALL).unwrap();
        engine.segments().release(gone.handle).unwrap();
        CAPTURING.store(true, Ordering::SeqCst);
        driver.set_capturing(true);
    });
    player.pause(&tag("a")).unwrap();
    assert_eq!(player.calls().map(there, SMALL, 0, handle, true), Ok(None));
    CAPTURING.store(false, Ordering::SeqCst);
    player.driver.set_capturing(false);
    player.calls().unmap(there, SMALL).unwrap();
    player.calls().release(handle).unwrap();
    player.check_no_leak();
}

/// A size that is garbage made the call look through the whole address space, page by page.
#[test]
fn garbage_sizes_are_refused_at_once() {
    let mut player = small();
    let a = player.region("a", policy(Backup::Host));
    let segment = player.reserve(Some(a), 4);
    player.grow(segment, &[0, 1], Some(a), a).unwrap();
    let addr = player.addr(segment, 0);
    for size in [u64::MAX, u64::MAX - addr.0, 1 << 57] {
        assert_eq!(refusal(player.calls().unmap(addr, size)).0, Status::InvalidArgument);
        assert_eq!(refusal(player.calls().grant(addr, size, &access(PEER))).0, Status::InvalidArgument);
    }
    assert_eq!(
        player.calls().unmap(Addr(1 << 56), u64::MAX).unwrap(),
        vec![(Addr(1 << 56), u64::MAX)],
        "the driver may judge"
    );
    player.check();
    player.calls().lend_range(addr, u64::MAX, "it is part of a multicast object").unwrap().keep();
    player.check_no_leak();
}
