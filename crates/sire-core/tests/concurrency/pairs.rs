//! Operations side by side on what they share: every one beside every other, three at once, and those that one state of memory brings
//! together. Whatever the order, the operations answer with one of the promised statuses, a thread inside a region finds its bytes,
//! and at the end every byte with a backup is there and nothing has leaked.

use crate::common::world::{CHUNK, policy, tag};
use crate::operations::{EXPECTED, OPERATIONS, Operation, PRE_COPY, Shared, run};
use crate::{check_with_stack, schedules};
use sire_core::engine::*;
use sire_core::error::{Error, Status};
use std::sync::Arc;

fn check_pairs(paused: bool) {
    for (i, first) in OPERATIONS.into_iter().enumerate() {
        for second in OPERATIONS.into_iter().skip(i) {
            let once = move || {
                let shared = Arc::new(Shared::new(paused));
                let other = Arc::clone(&shared);
                let thread = shuttle::thread::spawn(move || run(&other, second));
                run(&shared, first);
                thread.join().unwrap();
                Arc::into_inner(shared).unwrap().check();
            };
            println!("{} || {}", first.0, second.0);
            shuttle::check_random(once, schedules());
        }
    }
}

#[test]
fn pairs_on_resident_regions() {
    check_pairs(false);
}

#[test]
fn pairs_on_paused_regions() {
    check_pairs(true);
}

#[test]
fn a_peer_that_is_refused_meanwhile_has_no_access_afterwards() {
    for name in ["pause", "resume", "allocate", "free", "pre-copy", "switch"] {
        let others = OPERATIONS.into_iter().chain([PRE_COPY]).filter(|(other, _)| *other == name);
        for (paused, other) in others.flat_map(|other| [(false, other), (true, other)]) {
            let once = move || {
                // Only of what is declared not to change is anything copied beforehand.
                let shared = Arc::new(if name == PRE_COPY.0 { Shared::clean() } else { Shared::new(paused) });
                let thread = {
                    let shared = Arc::clone(&shared);
                    shuttle::thread::spawn(move || run(&shared, other))
                };
                run(&shared, ("refuse a peer", Shared::refuse_peer));
                thread.join().unwrap();
                Arc::into_inner(shared).unwrap().check();
            };
            check_with_stack(once, 8 * schedules());
        }
    }
}

#[test]
fn three_at_once() {
    for [a, b, c] in [
        [0, 5, 3],
        [0, 7, 2],
        [2, 5, 10],
        [0, 2, 9],
        [0, 8, 4],
        [0, 11, 6],
        [8, 8, 0],
        [14, 5, 9],
        [14, 14, 2],
        [0, 16, 2],
    ] {
        let once = move || {
            let shared = Arc::new(Shared::new(false));
            let threads = [b, c].map(|n| {
                let shared = Arc::clone(&shared);
                shuttle::thread::spawn(move || run(&shared, OPERATIONS[n]))
            });
            run(&shared, OPERATIONS[a]);
            threads.into_iter().for_each(|thread| thread.join().unwrap());
            Arc::into_inner(shared).unwrap().check();
        };
        shuttle::check_random(once, 8 * schedules());
    }
}

/// Two pauses find room in slabs that a third thread is bringing in, in units that they share; a trim takes slabs away from under it. Every unit
/// is registered once, and a pause that has returned has all of its backup.
#[test]
fn host_memory_comes_in_once() {
    let once = move |second: fn(&Shared) -> Result<(), Error>| {
        let shared = Arc::new(Shared::with_reserve(false, 3 * CHUNK));
        let other = Arc::clone(&shared);
        let thread = shuttle::thread::spawn(move || run(&other, ("second", second)));
        run(
            &shared,
            ("pause", |s| s.world.engine.pause(&Selection::Tag("a".into()), PauseOptions::default()).map(drop)),
        );
        run(&shared, ("read the backup", Shared::read_backup));
        thread.join().unwrap();
        assert_eq!(shared.world.engine.take_notices(), Vec::<String>::new());
        Arc::into_inner(shared).unwrap().check();
    };
    type Other = fn(&Shared) -> Result<(), Error>;
    let others: [Other; 4] = [
        |s| s.world.engine.pause(&Selection::Tag("c".into()), PauseOptions::default()).map(drop),
        Shared::trim,
        Shared::cancel,
        |s| s.free(s.large),
    ];
    for second in others {
        shuttle::check_random(move || once(second), 20 * schedules());
    }
}

/// A backup is made ahead while the program, or a pause, does what it wants with the memory.
#[test]
fn a_backup_that_is_made_ahead_is_in_nobodys_way() {
    for second in OPERATIONS.into_iter().chain([PRE_COPY]) {
        let once = move || {
            let shared = Arc::new(Shared::clean());
            let other = Arc::clone(&shared);
            let thread = shuttle::thread::spawn(move || run(&other, PRE_COPY));
            run(&shared, second);
            thread.join().unwrap();
            Arc::into_inner(shared).unwrap().check();
        };
        println!("pre-copy || {}", second.0);
        check_with_stack(once, 2 * schedules());
    }
}

/// Memory that stays until somebody needs it: an allocation, a resume, a pause and a trim want it at the same time. It is given back once, or comes
/// back as it was.
#[test]
fn memory_that_is_held_lazily_goes_once() {
    const LAZILY: Operation = ("pause lazily", |s| {
        let options = PauseOptions { lazy: true, ..PauseOptions::default() };
        s.world.engine.pause(&tag("a"), options).map(drop)
    });
    const ELSEWHERE: Operation = ("allocate elsewhere", Shared::allocate_elsewhere);
    const RESUME_ONE: Operation =
        ("resume one", |s| s.world.engine.resume(&tag("a"), ResumeOptions::default()).map(drop));
    const RESUME_OTHER: Operation =
        ("resume the other", |s| s.world.engine.resume(&tag("c"), ResumeOptions::default()).map(drop));
    let needs = [ELSEWHERE, RESUME_ONE, RESUME_OTHER];
    let others = [LAZILY, OPERATIONS[0], OPERATIONS[5], OPERATIONS[6], OPERATIONS[8], OPERATIONS[10], OPERATIONS[11]];
    let others = others.into_iter().chain([OPERATIONS[13], OPERATIONS[14]]).chain(needs);
    for (first, second) in needs.into_iter().flat_map(|first| others.clone().map(move |second| (first, second))) {
        let once = move || {
            let shared = Arc::new(Shared::new(false));
            LAZILY.1(&shared).unwrap();
            shared.world.driver.set_capacity(shared.world.driver.used_bytes() + CHUNK);
            let other = Arc::clone(&shared);
            let thread = shuttle::thread::spawn(move || run_short(&other, second, Status::OutOfDeviceMemory));
            run_short(&shared, first, Status::OutOfDeviceMemory);
            thread.join().unwrap();
            shared.world.driver.set_capacity(64 * CHUNK);
            Arc::into_inner(shared).unwrap().check();
        };
        println!("{} || {}", first.0, second.0);
        shuttle::check_random(once, schedules());
    }
}

/// A pause that is not lazy takes everything, also what one that is lazy has just left, or is about to; and so does a switch.
#[test]
fn a_pause_beside_a_lazy_one_leaves_nothing() {
    type Pause = fn(&Shared, bool) -> Result<(), Error>;
    const PAUSES: [Pause; 2] = [
        |s, lazy| s.world.engine.pause(&tag("a"), PauseOptions { lazy, ..PauseOptions::default() }).map(drop),
        |s, _| s.world.engine.switch(&tag("a"), &tag("c"), SwitchOptions::default()).map(drop),
    ];
    for eagerly in PAUSES {
        let once = move || {
            let shared = Arc::new(Shared::new(false));
            let other = Arc::clone(&shared);
            let insist = |shared: &Shared, pause: Pause, lazy| {
                while let Err(error) = pause(shared, lazy) {
                    assert_eq!(error.status, Status::Busy, "{error}");
                    shuttle::thread::yield_now();
                }
            };
            let thread = shuttle::thread::spawn(move || insist(&other, PAUSES[0], true));
            insist(&shared, eagerly, false);
            thread.join().unwrap();
            let stats: serde_json::Value = serde_json::from_str(&shared.world.engine.stats_json()).unwrap();
            let region = stats["regions"].as_array().unwrap().iter().find(|region| region["tag"] == "a").unwrap();
            assert_eq!(region["lazy_bytes"], 0);
            Arc::into_inner(shared).unwrap().check();
        };
        shuttle::check_random(once, schedules());
    }
}

/// As `run`, where something may be short, so that calls may fail with `shortage`.
fn run_short(shared: &Shared, (name, operation): Operation, shortage: Status) {
    if let Err(error) = operation(shared) {
        assert!(EXPECTED.contains(&error.status) || error.status == shortage, "{name}: {error}");
    }
}

/// An automatic backup moves, to the disk because host memory has become scarce, or back, while its region is paused, resumed, resumed and changed and paused
/// again, or loses an allocation: whoever looks for it finds the old place or the new one, both hold the bytes, and none comes back from before. A verified
/// region writes what has changed to its backup again where it is, but not while that is being read.
#[test]
fn a_backup_that_moves_is_in_nobodys_way() {
    use std::sync::atomic::{AtomicU64, Ordering};
    static MOVED: [AtomicU64; 2] = [AtomicU64::new(0), AtomicU64::new(0)];
    const TEND: Operation = ("tend", |s| {
        s.limit_host(Some(CHUNK));
        MOVED[0].fetch_add(s.world.engine.tend().bytes_demoted, Ordering::SeqCst);
        Ok(())
    });
    const PROMOTE: Operation = ("promote", |s| {
        s.limit_host(None);
        MOVED[1].fetch_add(s.world.engine.promote(&tag("a"))?, Ordering::SeqCst);
        Ok(())
    });
    const REWRITE: Operation = ("rewrite", Shared::rewrite);
    let others = [0, 2, 5, 6, 13, 15].map(|index| OPERATIONS[index]);
    let others = others.into_iter().chain([TEND, PROMOTE, REWRITE]);
    let pairs = [TEND, PROMOTE].into_iter().flat_map(|moves| others.clone().map(move |other| (moves, other)));
    let kinds = [(true, Clean::No), (false, Clean::No), (true, Clean::Verified)];
    for ((moves, other), (paused, clean)) in pairs.flat_map(|pair| kinds.map(|kind| (pair, kind))) {
        let once = move || {
            let shared = Arc::new(Shared::with_policy(paused, 0, Policy { clean, ..policy(Backup::Auto) }));
            if moves.0 == PROMOTE.0 {
                run_short(&shared, TEND, Status::OutOfBackupSpace);
            }
            let thread = {
                let shared = Arc::clone(&shared);
                shuttle::thread::spawn(move || run_short(&shared, other, Status::OutOfBackupSpace))
            };
            run_short(&shared, moves, Status::OutOfBackupSpace);
            thread.join().unwrap();
            shared.limit_host(None);
            Arc::into_inner(shared).unwrap().check();
        };
        println!("{} || {}, paused: {paused}, {clean:?}", moves.0, other.0);
        check_with_stack(once, schedules());
    }
    assert!(MOVED.iter().all(|bytes| bytes.load(Ordering::SeqCst) > 0), "nothing moved: {MOVED:?}");
}

/// A free while somebody reads the memory, and a peer that comes just then; or a pause between.
#[test]
fn three_at_once_with_a_backup_ahead() {
    for [b, c] in [[5, 10], [0, 5], [0, 2], [5, 3]] {
        let once = move || {
            let shared = Arc::new(Shared::clean());
            let threads = [PRE_COPY, OPERATIONS[b]].map(|operation| {
                let shared = Arc::clone(&shared);
                shuttle::thread::spawn(move || run(&shared, operation))
            });
            run(&shared, OPERATIONS[c]);
            threads.into_iter().for_each(|thread| thread.join().unwrap());
            Arc::into_inner(shared).unwrap().check();
        };
        check_with_stack(once, 8 * schedules());
    }
}
