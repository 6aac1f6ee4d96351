//! Pairs of concurrent operations, model-checked: shuttle runs each pair under many schedules, in which a thread can
//! be interrupted at every lock, every atomic and every driver call. Whatever the order, the operations answer
//! with one of the promised statuses, a thread inside a region finds its bytes, and at the end every
//! byte with a backup is there and nothing has leaked.
//!
//! `cargo test -p sire-core --features shuttle --test concurrency`; `SHUTTLE_SCHEDULES=1000` looks longer.
#![cfg(feature = "shuttle")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::GRANULARITY;
use common::player::{PEER, Player};
use common::world::{CHUNK, PROGRAM, World, policy, tag};
use shuttle::scheduler::{RandomScheduler, Schedule, Scheduler, Task, TaskId};
use sire_core::driver::{Addr, Device, ProgramStream};
use sire_core::engine::*;
use sire_core::error::{Error, Status};
use std::sync::{Arc, Mutex};

/// What two threads share.
struct Shared {
    world: World,
    region: RegionId,
    large: Addr,
    small: Addr,
    large_bytes: Vec<u8>,
    /// What the operations allocated.
    more: Mutex<Vec<Addr>>,
    freed: Mutex<Vec<Addr>>,
    /// Device 1 was given access to device 0's memory.
    /// What was said of the peer, in the end.
    peer: Mutex<Option<bool>>,
    /// No pause may take the large allocation any more.
    stays: Mutex<bool>,
    /// What the large allocation holds now.
    rewritten: Mutex<Option<Vec<u8>>>,
}

impl Shared {
    fn new(paused: bool) -> Shared {
        Shared::with_reserve(paused, 0)
    }

    /// As `new`, with a region whose content is declared not to change.
    fn clean() -> Shared {
        Shared::with_policy(false, 0, Policy { clean: Clean::Declared, ..policy(Backup::Host) })
    }

    /// As `new`; the first allocation starts a thread that brings `reserve` bytes of host memory in.
    fn with_reserve(paused: bool, reserve: u64) -> Shared {
        Shared::with_policy(paused, reserve, policy(Backup::Host))
    }

    fn with_policy(paused: bool, reserve: u64, kept: Policy) -> Shared {
        let mut world = World::new(64 * CHUNK);
        world.engine.configure(&|config| config.host_reserve = reserve);
        let region = world.region("a", kept);
        let other = world.region("a/b", policy(Backup::None));
        let away = world.region("c", policy(Backup::Host));
        let [large, small] = [CHUNK + 1, 600].map(|size| world.allocate(region, size).unwrap());
        world.allocate(other, CHUNK).unwrap();
        if reserve > 0 {
            let third = world.region("c", policy(Backup::Host));
            let addr = world.allocate(third, CHUNK + 1).unwrap();
            world.write(addr);
        }
        world.write(large);
        world.write(small);
        let third = world.allocate(away, CHUNK).unwrap();
        world.write(third);
        world.pause(&tag("c")).unwrap();
        let large_bytes = world.twins[&large].bytes.clone();
        if paused {
            world.pause(&Selection::All).unwrap();
        }
        Shared {
            world,
            region,
            large,
            small,
            large_bytes,
            more: Mutex::default(),
            freed: Mutex::default(),
            peer: Mutex::default(),
            stays: Mutex::default(),
            rewritten: Mutex::default(),
        }
    }

    fn allocate(&self, size: u64) -> Result<(), Error> {
        let request = Request { stream: ProgramStream(0), ..World::request(self.region, size) };
        let addr = self.world.engine.allocate(request)?;
        self.more.lock().unwrap().push(addr);
        Ok(())
    }

    /// In a region that nobody pauses, for as much as the device has altogether but one chunk.
    fn allocate_elsewhere(&self) -> Result<(), Error> {
        let elsewhere = self.world.engine.region("elsewhere", policy(Backup::None))?;
        let addr = self.world.engine.allocate(World::request(elsewhere, 2 * CHUNK))?;
        self.more.lock().unwrap().push(addr);
        Ok(())
    }

    fn free(&self, addr: Addr) -> Result<(), Error> {
        self.world.engine.free(addr, false)?;
        self.freed.lock().unwrap().push(addr);
        Ok(())
    }

    fn visit(&self, on_paused: OnPaused) -> Result<(), Error> {
        self.world.engine.enter(self.region, on_paused)?;
        if self.world.engine.allocation(self.large).is_some() {
            let found = self.world.driver.peek(Device(0), self.large, 1);
            let still_there = self.world.engine.allocation(self.large).is_some();
            assert!(!still_there || found == Ok(vec![self.large_bytes[0]]), "inside, but {found:?}");
        }
        self.world.engine.leave(self.region);
        Ok(())
    }

    fn read_backup(&self) -> Result<(), Error> {
        let view = self.world.engine.backup(self.large, CHUNK + 1)?;
        if let Some(view) = view {
            // SAFETY: the view keeps `len` bytes at `ptr` valid.
            let bytes = unsafe { std::slice::from_raw_parts(view.ptr, view.len as usize) };
            assert_eq!(bytes, self.large_bytes);
        }
        Ok(())
    }

    /// A paused region holds no physical memory, but for what was kept resident: nothing slipped in behind the pause.
    fn check_paused_means_released(&self) {
        let stays = *self.stays.lock().unwrap() && self.world.engine.allocation(self.large).is_some();
        let kept = if stays { (CHUNK + 1).next_multiple_of(common::GRANULARITY) } else { 0 };
        let stats: serde_json::Value = serde_json::from_str(&self.world.engine.stats_json()).unwrap();
        for region in stats["regions"].as_array().unwrap() {
            let kept = if region["region"] == self.region.0 { kept } else { 0 };
            let held = kept + region["lazy_bytes"].as_u64().unwrap();
            assert!(region["state"] == "resident" || region["resident_bytes"] == held, "{region}");
        }
        if stays {
            assert_eq!(self.world.driver.peek(Device(0), self.large, CHUNK + 1).as_ref(), Ok(&self.large_bytes));
        }
    }

    fn keep_resident(&self) -> Result<(), Error> {
        self.world.engine.keep_resident(self.large)?;
        *self.stays.lock().unwrap() = true;
        Ok(())
    }

    fn limit_host(&self, limit: Option<u64>) {
        self.world.engine.configure(&|config| config.host_limit = limit);
    }

    /// The program has its memory back, changes it, and has it paused again. Nobody else pauses meanwhile.
    fn rewrite(&self) -> Result<(), Error> {
        self.world.engine.resume(&tag("a"), ResumeOptions::default())?;
        let bytes: Vec<u8> = self.large_bytes.iter().map(|byte| !byte).collect();
        self.world.driver.poke(Device(0), self.large, &bytes).unwrap();
        *self.rewritten.lock().unwrap() = Some(bytes);
        self.world.engine.pause(&tag("a"), PauseOptions::default()).map(drop)
    }

    fn trim(&self) -> Result<(), Error> {
        self.world.engine.trim();
        Ok(())
    }

    /// Whoever waits for a range, or has a stream wait for it, hears of it, or of the failure; so does whoever waits for the end.
    fn resume_behind(&self) -> Result<(), Error> {
        let progress = self.world.engine.resume_start(&Selection::All, ResumeOptions::default())?;
        assert_eq!(progress.wait_on((self.large, CHUNK + 1), PROGRAM, None), Ok(true));
        assert_eq!(progress.wait(self.large, CHUNK + 1, None), Ok(true));
        progress.finished(None).map(drop)
    }

    fn cancel(&self) -> Result<(), Error> {
        self.world.engine.cancel();
        Ok(())
    }

    fn look(&self) -> Result<(), Error> {
        assert!(self.world.engine.stats_json().starts_with('{'));
        Ok(())
    }

    /// Whoever was given access has it everywhere, in memory that was just then being made as well.
    fn check_peer(&self) {
        let Some(may) = *self.peer.lock().unwrap() else { return };
        if self.world.engine.state(self.region) == Ok(State::Paused) {
            return;
        }
        let more = self.more.lock().unwrap().clone();
        for addr in more.into_iter().chain([self.large, self.small]) {
            let live = self.world.engine.allocation(addr).is_some();
            let reads = self.world.driver.peek(Device(1), addr, 1).is_ok();
            assert!(!live || reads == may, "the peer reads {addr:?}: {reads}");
        }
    }

    fn allow_peer(&self) -> Result<(), Error> {
        self.world.engine.allow_peer(Device(0), Device(1))?;
        *self.peer.lock().unwrap() = Some(true);
        Ok(())
    }

    fn refuse_peer(&self) -> Result<(), Error> {
        self.world.engine.allow_peer(Device(0), Device(1))?;
        self.world.engine.refuse_peer(Device(0), Device(1))?;
        *self.peer.lock().unwrap() = Some(false);
        Ok(())
    }

    /// What must hold when both threads are done.
    fn check(self) {
        self.check_paused_means_released();
        self.check_peer();
        let Shared { mut world, more, freed, rewritten, large, .. } = self;
        if let Some(bytes) = rewritten.into_inner().unwrap() {
            world.twins.get_mut(&large).unwrap().bytes = bytes;
        }
        let freed = freed.into_inner().unwrap();
        for addr in &freed {
            assert!(world.twins.remove(addr).is_some(), "{addr:?} was freed twice");
        }
        for (addr, twin) in world.twins.iter_mut().filter(|(_, t)| world.policies[&t.region].backup == Backup::None) {
            let _ = addr;
            twin.promised = common::world::Which::None;
        }
        world.resume(&Selection::All).unwrap();
        world.check();
        for addr in more.into_inner().unwrap() {
            world.engine.free(addr, false).unwrap();
        }
        world.check_no_leak();
    }
}

const PRE_COPY: Operation = ("pre-copy", |s| s.world.engine.pre_copy(&tag("a"), false).map(drop));

type Operation = (&'static str, fn(&Shared) -> Result<(), Error>);

const OPERATIONS: [Operation; 17] = [
    ("pause", |s| s.world.engine.pause(&Selection::Tag("a".into()), PauseOptions::default()).map(drop)),
    ("pause one", |s| s.world.engine.pause(&Selection::Tag("a/b".into()), PauseOptions::default()).map(drop)),
    ("resume", |s| s.world.engine.resume(&Selection::All, ResumeOptions::default()).map(drop)),
    ("allocate", |s| s.allocate(CHUNK)),
    ("allocate small", |s| s.allocate(700)),
    ("free", |s| s.free(s.large)),
    ("free small", |s| s.free(s.small)),
    ("enter", |s| s.visit(OnPaused::Refuse)),
    ("enter and resume", |s| s.visit(OnPaused::Resume)),
    ("cancel", Shared::cancel),
    ("allow a peer", Shared::allow_peer),
    ("trim", Shared::trim),
    ("look", Shared::look),
    ("read the backup", Shared::read_backup),
    ("switch", |s| s.world.engine.switch(&tag("a"), &tag("c"), SwitchOptions::default()).map(drop)),
    ("resume in the background", Shared::resume_behind),
    ("keep resident", Shared::keep_resident),
];

const EXPECTED: [Status; 4] = [Status::Busy, Status::Paused, Status::Cancelled, Status::UnknownAddress];

fn run(shared: &Shared, (name, operation): Operation) {
    if let Err(error) = operation(shared) {
        assert!(EXPECTED.contains(&error.status), "{name}: {error}");
    }
}

fn schedules() -> usize {
    std::env::var("SHUTTLE_SCHEDULES").ok().and_then(|n| n.parse().ok()).unwrap_or(12)
}

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

/// A runner for operations that hash, which needs more stack than shuttle's threads have without being asked.
fn check_with_stack(once: impl Fn() + Send + Sync + 'static, schedules: usize) {
    let mut config = shuttle::Config::new();
    config.stack_size = 1 << 18;
    shuttle::Runner::new(RandomScheduler::new(schedules), config).run(once);
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
            let thread = shuttle::thread::spawn(move || run_short(&other, second));
            run_short(&shared, first);
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

/// Goes on with the same thread most of the time, so that others are late.
struct Stubborn(RandomScheduler);

impl Scheduler for Stubborn {
    fn new_execution(&mut self) -> Option<Schedule> {
        self.0.new_execution()
    }

    fn next_task(&mut self, runnable: &[&Task], current: Option<TaskId>, is_yielding: bool) -> Option<TaskId> {
        let goes_on = runnable.iter().map(|task| task.id()).find(|id| Some(*id) == current);
        let is_changed = self.0.next_u64().is_multiple_of(32);
        goes_on.filter(|_| !is_changed).or_else(|| self.0.next_task(runnable, current, is_yielding))
    }

    fn next_u64(&mut self) -> u64 {
        self.0.next_u64()
    }
}

/// Memory is given only as fast as it is mapped anew: else, where there is nothing to copy, the driver would be busy with all that is unmapped before the
/// first copy in could begin. However late whoever takes begins or is woken, what lies between an unmap and the next map is bounded.
#[test]
fn a_switch_gives_memory_as_it_is_taken() {
    const CHUNKS: u64 = 16;
    let once = |clean: Clean| {
        let mut world = World::new(CHUNKS * CHUNK);
        for name in ["a", "b"] {
            let region = world.region(name, Policy { clean, ..policy(Backup::Host) });
            let addr = world.allocate(region, CHUNKS * CHUNK).unwrap();
            world.write(addr);
            world.pause(&tag(name)).unwrap();
        }
        world.resume(&tag("a")).unwrap();
        let before = world.driver.log().len();
        world.switch(&tag("a"), &tag("b")).unwrap();
        let (mut unmapped, mut most) = (0i64, 0);
        for verb in &world.driver.log()[before..] {
            unmapped += i64::from(*verb == "unmap") - i64::from(*verb == "map");
            most = most.max(unmapped);
        }
        assert!((1..=5).contains(&most), "{most} chunks of {CHUNKS} were unmapped and not yet mapped anew");
        world.check();
        world.check_no_leak();
    };
    for clean in [Clean::Declared, Clean::No] {
        let scheduler = Stubborn(RandomScheduler::new(20 * schedules()));
        shuttle::Runner::new(scheduler, shuttle::Config::new()).run(move || once(clean));
        shuttle::check_random(move || once(clean), schedules());
    }
}

/// As `run`, where memory may be short.
fn run_short(shared: &Shared, (name, operation): Operation) {
    if let Err(error) = operation(shared) {
        let expected = EXPECTED.contains(&error.status) || error.status == Status::OutOfDeviceMemory;
        assert!(expected, "{name}: {error}");
    }
}

/// An automatic backup moves, to the disk because host memory has become scarce, or back, while its region is paused, resumed, resumed and changed and paused
/// again, or loses an allocation: whoever looks for it finds the old place or the new one, both hold the bytes, and none comes back from before.
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
    for ((moves, other), paused) in pairs.flat_map(|pair| [(pair, true), (pair, false)]) {
        let once = move || {
            let shared = Arc::new(Shared::with_policy(paused, 0, policy(Backup::Auto)));
            if moves.0 == PROMOTE.0 {
                run_scarce(&shared, TEND);
            }
            let thread = {
                let shared = Arc::clone(&shared);
                shuttle::thread::spawn(move || run_scarce(&shared, other))
            };
            run_scarce(&shared, moves);
            thread.join().unwrap();
            shared.limit_host(None);
            Arc::into_inner(shared).unwrap().check();
        };
        println!("{} || {}, paused: {paused}", moves.0, other.0);
        check_with_stack(once, schedules());
    }
    assert!(MOVED.iter().all(|bytes| bytes.load(Ordering::SeqCst) > 0), "nothing moved: {MOVED:?}");
}

/// As `run`, where host memory may be short.
fn run_scarce(shared: &Shared, (name, operation): Operation) {
    if let Err(error) = operation(shared) {
        let expected = EXPECTED.contains(&error.status) || error.status == Status::OutOfBackupSpace;
        assert!(expected, "{name}: {error}");
    }
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

/// One region writes a page again of which the other, meanwhile, finds that it has the same: whoever comes first, neither sees the
/// other's bytes afterwards.
#[test]
fn pages_in_common_never_change() {
    let once = || {
        let mut world = World::new(64 * CHUNK);
        let policy = Policy { backup: Backup::Host, clean: Clean::Verified, ..Policy::default() };
        let content: Vec<u8> = (0..6007_u32).map(|i| (i / 23) as u8).collect();
        let addrs = ["one", "other"].map(|tag| {
            let region = world.region(tag, policy);
            let addr = world.allocate(region, CHUNK + 1).unwrap();
            world.write_repeated(addr, &content);
            addr
        });
        world.pause(&Selection::Tag("one".into())).unwrap();
        world.resume(&Selection::Tag("one".into())).unwrap();
        world.write_part(addrs[0], 5, 1);
        let world = Arc::new(world);
        let shared = Arc::clone(&world);
        let cycle = |world: &World, tag: &str| {
            let selection = Selection::Tag(tag.into());
            world.engine.pause(&selection, PauseOptions::default()).unwrap();
            world.engine.resume(&selection, ResumeOptions::default()).unwrap();
        };
        let thread = shuttle::thread::spawn(move || cycle(&shared, "other"));
        cycle(&world, "one");
        thread.join().unwrap();
        let mut world = Arc::into_inner(world).unwrap();
        world.check();
        world.pause(&Selection::All).unwrap();
        world.resume(&Selection::All).unwrap();
        world.check();
        world.check_no_leak();
    };
    check_with_stack(once, 8 * schedules());
}

/// A program enlarges, opens and shrinks its segments while another thread pauses and resumes: only making memory may be refused, what was there before is
/// there afterwards, and addresses that were given back can be used again.
#[test]
fn segments_change_beside_a_transition() {
    type Change = fn(&mut Player, RegionId);
    let changes: [(&str, Change); 4] = [
        ("grow", |player, region| {
            if let Err(error) = player.grow_unwritten(0, &[2], Some(region), region) {
                assert!(matches!(error.status, Status::Paused | Status::Busy), "{error}");
            }
        }),
        ("shrink and grow", |player, region| {
            player.shrink(0, 1);
            let _ = player.grow_unwritten(0, &[1], Some(region), region);
        }),
        ("open", |player, _| player.open(0, &[0, 1], PEER)),
        ("drop", |player, _| player.drop_segment(1)),
    ];
    for (name, change) in changes {
        println!("{name}");
        let once = move || {
            let mut player = Player::new(1 << 20, 2 * GRANULARITY);
            let region = player.region("a", policy(Backup::Host));
            for slots in [&[0_u64, 1][..], &[0]] {
                let segment = player.reserve(Some(region), 4);
                player.grow(segment, slots, Some(region), region).unwrap();
            }
            let engine = Arc::clone(&player.engine);
            let thread = shuttle::thread::spawn(move || {
                for _ in 0..2 {
                    match engine.pause(&Selection::All, PauseOptions::default()) {
                        Ok(_) => drop(engine.resume(&Selection::All, ResumeOptions::default()).unwrap()),
                        // Memory that is made and not mapped yet is in nobody's place.
                        Err(error) => assert_eq!(error.status, Status::Busy, "{error}"),
                    }
                }
            });
            change(&mut player, region);
            thread.join().unwrap();
            player.check();
            player.check_no_leak();
        };
        shuttle::check_random(once, 20 * schedules());
    }
}

/// What meets in a cache: two threads that allocate and free there, that make it grow or give back, beside pauses of its region, on a device
/// that has not enough for everybody's growth at once.
#[test]
fn a_cache_serves_threads_beside_pauses() {
    const MIB: u64 = 1 << 20;
    type Cached = fn(&World, RegionId) -> Result<(), Error>;
    fn there_and_back(world: &World, region: RegionId, size: u64, stream: u64) -> Result<(), Error> {
        let request = Request { stream: ProgramStream(stream), ..World::request(region, size) };
        let addr = world.engine.allocate_cached(request, PoolNumber::NONE)?;
        assert!(world.engine.caches(addr));
        world.engine.record_stream(addr, ProgramStream(9));
        world.engine.free(addr, false)
    }
    const CACHED: [Cached; 5] = [
        |world, region| there_and_back(world, region, 600, 0),
        |world, region| there_and_back(world, region, 2 * MIB, 0),
        |world, region| there_and_back(world, region, 4 * MIB, 1),
        |world, _| {
            world.engine.pause(&tag("cached"), PauseOptions::default())?;
            world.engine.resume(&tag("cached"), ResumeOptions::default()).map(drop)
        },
        |world, _| {
            world.engine.empty_caches();
            Ok(())
        },
    ];
    fn run_cached(world: &World, region: RegionId, operation: Cached) {
        for _ in 0..2 {
            if let Err(error) = operation(world, region) {
                let fine = [Status::Paused, Status::Busy, Status::OutOfDeviceMemory].contains(&error.status);
                assert!(fine, "{error}");
            }
        }
    }
    for (number, first) in CACHED.into_iter().enumerate() {
        for second in CACHED.into_iter().skip(number) {
            let once = move || {
                let mut world = World::with(8 * MIB, MIB);
                world.cached = true;
                let region = world.region("cached", policy(Backup::Host));
                let stays = world.allocate(region, 600).unwrap();
                world.write(stays);
                let world = Arc::new(world);
                let other = Arc::clone(&world);
                let thread = shuttle::thread::spawn(move || run_cached(&other, region, second));
                run_cached(&world, region, first);
                thread.join().unwrap();
                let mut world = Arc::into_inner(world).unwrap();
                world.driver.pass_stream(ProgramStream(9));
                world.resume(&Selection::All).unwrap();
                world.check();
                world.check_no_leak();
            };
            shuttle::check_random(once, schedules());
        }
    }
}
