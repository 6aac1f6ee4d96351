//! Single stories: each builds a world of its own, because what the operations share does not have it (pages in common, segments, a
//! cache), or because it asks for more than the bytes at the end (how far a switch runs ahead).

use crate::common::GRANULARITY;
use crate::common::player::{HERE, PEER, Player, SMALL, STRIDE, access, small};
use crate::common::world::{CHUNK, World, policy, tag};
use crate::{check_with_stack, schedules};
use shuttle::rand::Rng as _;
use shuttle::scheduler::{RandomScheduler, Schedule, Scheduler, Task, TaskId};
use sire_core::driver::{Addr, Device, ProgramStream};
use sire_core::engine::*;
use sire_core::error::{Error, Status};
use sire_core::segments::Handle;
use std::sync::Arc;

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

/// A backup comes back from the disk, for which nobody needs a lane, while a device is reset: the arena and the driver agree on what is registered, whatever
/// came in before, during and after that, and no unit is registered twice.
#[test]
fn host_memory_comes_in_beside_a_reset() {
    let once = || {
        let mut world = World::new(64 * CHUNK);
        let region = world.region("a", policy(Backup::Auto));
        let request = Request { device: Device(1), ..World::request(region, 2 * CHUNK) };
        let addr = world.allocate_as(request).unwrap();
        world.write(addr);
        world.engine.configure(&|config| config.host_limit = Some(0));
        world.pause(&tag("a")).unwrap();
        world.engine.configure(&|config| config.host_limit = None);
        let world = Arc::new(world);
        let other = Arc::clone(&world);
        let thread = shuttle::thread::spawn(move || assert_eq!(other.engine.promote(&tag("a")), Ok(2 * CHUNK)));
        let pass =
            |most| (0..shuttle::rand::thread_rng().gen_range(0..most)).for_each(|_| shuttle::thread::yield_now());
        // As far as the other thread may get before the reset, and during it.
        pass(64);
        world.engine.reset(Device(0), || {
            pass(16);
            world.driver.reset(Device(0));
        });
        thread.join().unwrap();
        let mut world = Arc::into_inner(world).unwrap();
        world.resume(&tag("a")).unwrap();
        world.check();
        let registered = |world: &World| {
            let stats: serde_json::Value = serde_json::from_str(&world.engine.stats_json()).unwrap();
            stats["tiers"][0]["registered_bytes"].as_u64().unwrap()
        };
        assert_eq!(registered(&world), world.driver.registered_bytes());
        assert_eq!(world.engine.take_notices(), Vec::<String>::new());
        world.check_no_leak();
        assert_eq!(world.driver.registered(), 0);
    };
    check_with_stack(once, 20 * schedules());
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

/// A mapping goes while another thread maps its handle elsewhere, or takes the same mapping away: its memory is noted once, and goes with the handle.
#[test]
fn what_an_unmapping_leaves_is_noted_once() {
    type Other = fn(&Engine, Addr, Handle);
    let unmap: Other = |engine, addr, _| drop(engine.segments().unmap(addr, SMALL));
    let map: Other = |engine, addr, handle| {
        let there = addr.offset(STRIDE);
        // Where it came after the unmapping, it was a mapping like any other.
        if matches!(engine.segments().map_or_lend(there, SMALL, 0, handle, false), Ok(None)) {
            engine.segments().unmap(there, SMALL).unwrap();
        }
    };
    for other in [unmap, map] {
        let once = move || {
            let mut player = small();
            let region = player.region("a", policy(Backup::Host));
            let segment = player.reserve(Some(region), 2);
            player.grow(segment, &[0], Some(region), region).unwrap();
            let handle = player.segments[segment].pieces.remove(&0).unwrap().handle;
            let (addr, engine) = (player.addr(segment, 0), Arc::clone(&player.engine));
            let thread = shuttle::thread::spawn(move || other(&engine, addr, handle));
            unmap(&player.engine, addr, handle);
            thread.join().unwrap();
            player.calls().release(handle).unwrap();
            player.check_no_leak();
        };
        let scheduler = Stubborn(RandomScheduler::new(80 * schedules()));
        shuttle::Runner::new(scheduler, shuttle::Config::new()).run(once);
        shuttle::check_random(once, 20 * schedules());
    }
}

/// A program unmaps memory and maps it elsewhere while another thread backs it up ahead of a pause: it keeps its content, and nobody hears of what goes
/// on between them. Whoever began to read between the look for readers and the unmapping gave the memory back.
#[test]
fn memory_moves_beside_a_pre_copy() {
    let once = || {
        let mut player = Player::new(1 << 20, 2 * GRANULARITY);
        let region = player.region("a", Policy { clean: Clean::Declared, ..policy(Backup::Host) });
        let segment = player.reserve(Some(region), 4);
        player.grow(segment, &[0, 1], Some(region), region).unwrap();
        let engine = Arc::clone(&player.engine);
        let thread = shuttle::thread::spawn(move || engine.pre_copy(&tag("a"), false).map(|_| ()));
        let moved = player.segments[segment].pieces.remove(&0).unwrap();
        let (here, there) = (player.addr(segment, 0), player.addr(segment, 3));
        let size = player.memory(Some(region)).size;
        // As far as the other thread may get before it reads.
        (0..shuttle::rand::thread_rng().gen_range(0..64)).for_each(|_| shuttle::thread::yield_now());
        player.calls().unmap(here, size).unwrap();
        player.calls().map(there, size, 0, moved.handle, false).unwrap();
        player.calls().grant(there, size, &access(HERE)).unwrap();
        player.segments[segment].pieces.insert(3, moved);
        player.check();
        thread.join().unwrap().unwrap();
        player.check_no_leak();
    };
    shuttle::check_random(once, 200 * schedules());
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
