//! Memory that the program hands out: held while the driver is asked, and for good where the driver does it.

use crate::common::player::{PEER, Player, SMALL, STRIDE, access, beside, refusal, small};
use crate::common::world::{policy, tag};
use sire_core::driver::Addr;
use sire_core::engine::*;
use sire_core::error::Status;
use sire_core::segments::Handle;
use std::sync::Arc;

#[test]
fn what_was_handed_out_stays_and_is_named() {
    let mut player = small();
    let a = player.region("a", policy(Backup::Host));
    let segment = player.reserve(Some(a), 4);
    player.grow(segment, &[0, 1], Some(a), a).unwrap();
    let handle = player.segments[segment].pieces[&0].handle;
    player.calls().lend(handle, "it was exported").unwrap().1.keep();
    let report = player.engine.pause(&tag("a"), PauseOptions::default()).unwrap();
    assert_eq!((report.bytes_moved, player.driver.used_bytes()), (SMALL, SMALL));
    let notices = player.engine.take_notices();
    assert!(notices.iter().any(|notice| notice.contains("'a'") && notice.contains("exported")), "{notices:?}");
    let paused = player.segments[segment].pieces[&1].handle;
    assert_eq!(refusal(player.calls().lend(paused, "it was exported")).0, Status::Paused);
    player.resume(&tag("a")).unwrap();
    player.check_no_leak();
}

/// A library that tried whether there are fabric handles, and heard that there are none, once kept that memory on the device at every later pause.
#[test]
fn what_the_driver_refuses_to_hand_out_is_held_only_while_it_is_asked() {
    let mut player = small();
    let a = player.region("a", policy(Backup::Host));
    let segment = player.reserve(Some(a), 4);
    player.grow(segment, &[0, 1], Some(a), a).unwrap();
    let handle = player.segments[segment].pieces[&0].handle;
    let moved = |player: &Player| {
        let moved = player.engine.pause(&tag("a"), PauseOptions::default()).unwrap().bytes_moved;
        player.engine.resume(&tag("a"), ResumeOptions::default()).unwrap();
        moved
    };
    let (_, asking) = player.calls().lend(handle, "it was exported").unwrap();
    let report = player.engine.pause(&tag("a"), PauseOptions::default()).unwrap();
    assert_eq!((report.bytes_moved, report.bytes_held), (SMALL, SMALL), "the driver may just be handing it out");
    drop(asking);
    // The driver has refused while the region was paused: that piece is there, and comes back with the others.
    assert_eq!(player.driver.used_bytes(), SMALL);
    assert_eq!(player.engine.resume(&tag("a"), ResumeOptions::default()).unwrap().bytes_moved, SMALL);
    player.check();
    assert_eq!(moved(&player), 2 * SMALL);
    player.check();
    // Of several calls at once the one that came to something counts.
    let (_, refused) = player.calls().lend(handle, "it was tried").unwrap();
    let kept = player.calls().lend_range(player.addr(segment, 0), SMALL, "it was bound").unwrap();
    kept.keep();
    drop(refused);
    assert_eq!(moved(&player), SMALL);
    let notices = player.engine.take_notices();
    assert!(notices.last().is_some_and(|notice| notice.contains("stay on the device: it was bound")), "{notices:?}");
    player.segments[segment].pieces.get_mut(&0).unwrap().lent = true;
    player.check_no_leak();
}

/// What a lazy pause had left because the driver was being asked was given back, unsaved, once the driver had refused and somebody needed memory.
#[test]
fn what_was_being_handed_out_when_its_region_was_paused_lazily_is_not_given_back() {
    let mut player = small();
    let a = player.region("a", Policy { clean: Clean::Verified, ..policy(Backup::Host) });
    let segment = player.reserve(Some(a), 4);
    player.grow(segment, &[0, 1], Some(a), a).unwrap();
    let handle = player.segments[segment].pieces[&0].handle;
    let lazily = |player: &Player| {
        player.engine.pause(&tag("a"), PauseOptions { lazy: true, ..PauseOptions::default() }).unwrap();
    };
    // With the backup of an earlier pause, and without.
    for earlier in [false, true] {
        if earlier {
            player.pause(&tag("a")).unwrap();
            player.resume(&tag("a")).unwrap();
            player.write(segment, 0);
        }
        let (_, asking) = player.calls().lend(handle, "it was exported").unwrap();
        lazily(&player);
        drop(asking);
        assert_eq!(player.engine.trim().0, SMALL, "the other one");
        assert_eq!(player.driver.used_bytes(), SMALL);
        player.engine.resume(&tag("a"), ResumeOptions::default()).unwrap();
        player.check();
    }
    lazily(&player);
    assert_eq!(player.engine.trim().0, 2 * SMALL, "the next pause took both");
    player.engine.resume(&tag("a"), ResumeOptions::default()).unwrap();
    player.check();
    player.check_no_leak();
}

#[test]
fn a_range_of_which_a_part_is_away_is_not_held() {
    let mut player = small();
    let (a, b) = (player.region("a", policy(Backup::Host)), player.region("b", policy(Backup::Host)));
    let first = player.reserve(Some(a), 1);
    let second = player.reserve(Some(b), 1);
    player.grow(first, &[0], Some(a), a).unwrap();
    player.grow(second, &[0], Some(b), b).unwrap();
    let (from, to) = (player.addr(first, 0), player.addr(second, 0));
    assert!(from < to, "the reservations lie in order");
    player.pause(&tag("b")).unwrap();
    let size = to.0 + SMALL - from.0;
    assert_eq!(refusal(player.calls().lend_range(from, size, "it was bound")).0, Status::Paused);
    assert_eq!(player.pause(&tag("a")).unwrap().bytes_moved, SMALL);
    player.resume(&Selection::All).unwrap();
    player.check_no_leak();
}

#[test]
fn memory_that_is_mapped_nowhere_is_managed_again_after_a_refusal() {
    let mut player = small();
    let a = player.region("a", policy(Backup::Host));
    let segment = player.reserve(Some(a), 4);
    let [refused, exported, racing] =
        [(); 3].map(|()| player.calls().create(player.memory(Some(a))).unwrap().expect("it is ours"));
    drop(player.calls().lend(refused, "it was exported").unwrap());
    player.calls().lend(exported, "it was exported").unwrap().1.keep();
    let addr = player.addr(segment, 0);
    assert_eq!(player.calls().map(addr, SMALL, 0, refused, false).unwrap(), None);
    // Another thread maps it while the driver is asked: whatever that says, it is not followed.
    let (physical, asking) = player.calls().lend(racing, "it was exported").unwrap();
    assert_eq!(player.calls().map(player.addr(segment, 1), SMALL, 0, racing, false).unwrap(), Some(physical));
    drop(asking);
    let report = player.engine.pause(&tag("a"), PauseOptions::default()).unwrap();
    assert_eq!((report.bytes_moved, player.driver.used_bytes()), (SMALL, 2 * SMALL));
    player.engine.resume(&tag("a"), ResumeOptions::default()).unwrap();
    assert!(player.calls().unmap(addr, SMALL).unwrap().is_empty());
    [refused, exported, racing].into_iter().for_each(|handle| player.calls().release(handle).unwrap());
    player.check_no_leak();
}

/// A handle of memory that a pre-copy was reading could not be exported, retained or mapped twice: the memory was said to be being paused.
#[test]
fn memory_is_handed_out_while_a_pre_copy_reads_it() {
    let mut player = small();
    let a = player.region("a", Policy { clean: Clean::Verified, ..policy(Backup::Host) });
    let segment = player.reserve(Some(a), 4);
    player.grow(segment, &[0, 1], Some(a), a).unwrap();
    let (engine, handle) = (Arc::clone(&player.engine), player.segments[segment].pieces[&0].handle);
    player.driver.at_next("copy_to_host", move || {
        engine.segments().lend(handle, "it was exported").unwrap().1.keep();
    });
    assert_eq!(player.engine.pre_copy(&tag("a"), false).unwrap().bytes_copied, 2 * SMALL);
    player.segments[segment].pieces.get_mut(&0).unwrap().lent = true;
    assert_eq!(player.pause(&tag("a")).unwrap().bytes_moved, SMALL);
    player.resume(&tag("a")).unwrap();
    player.check_no_leak();
}

/// Does two things at the same time with a mapped handle whose memory is being opened to a peer: both wait for that, and go on in any order. Whatever that
/// is, its memory goes with the handle.
fn both_at_once(calls: [fn(&Engine, Addr, Handle); 2]) {
    for _ in 0..40 {
        let mut player = small();
        let a = player.region("a", policy(Backup::Host));
        let segment = player.reserve(Some(a), 2);
        player.grow(segment, &[0], Some(a), a).unwrap();
        let addr = player.addr(segment, 0);
        let handle = player.segments[segment].pieces.remove(&0).unwrap().handle;
        let (engine, (send, threads)) = (Arc::clone(&player.engine), std::sync::mpsc::channel());
        player.driver.at_next("set_access", move || {
            for call in calls {
                let engine = Arc::clone(&engine);
                send.send(std::thread::spawn(move || call(&engine, addr, handle))).unwrap();
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        });
        player.calls().grant(addr, SMALL, &access(PEER)).unwrap();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        player.calls().release(handle).unwrap();
        player.check_no_leak();
    }
}

/// Who mapped the handle elsewhere noted the mapping from before again, over what the unmapping had noted: the memory was nobody's, for good.
#[test]
fn memory_that_is_unmapped_while_it_is_mapped_elsewhere_is_not_lost() {
    both_at_once([
        |engine, addr, _| drop(engine.segments().unmap(addr, SMALL)),
        |engine, addr, handle| {
            let there = addr.offset(STRIDE);
            // Where it came after the unmapping, it was a mapping like any other.
            if matches!(engine.segments().map_or_lend(there, SMALL, 0, handle, false), Ok(None)) {
                engine.segments().unmap(there, SMALL).unwrap();
            }
        },
    ]);
}

/// Of two threads the one that came late noted that the memory was gone, which the other had in hand.
#[test]
fn memory_that_is_unmapped_twice_is_not_lost() {
    let unmap: fn(&Engine, Addr, Handle) = |engine, addr, _| drop(engine.segments().unmap(addr, SMALL));
    both_at_once([unmap; 2]);
}

/// While access is being given to memory of a resident region, a hand-out was refused as if the region were being paused.
#[test]
fn a_hand_out_waits_for_access_that_is_being_given() {
    let mut player = small();
    let a = player.region("a", policy(Backup::Host));
    let segment = player.reserve(Some(a), 4);
    player.grow(segment, &[0], Some(a), a).unwrap();
    let handle = player.segments[segment].pieces[&0].handle;
    let lent = beside(&player, "set_access", move |engine| engine.segments().lend(handle, "it was exported").map(drop));
    player.open(segment, &[0], PEER);
    assert_eq!(lent.recv().unwrap(), Ok(()));
    player.check_no_leak();
}
