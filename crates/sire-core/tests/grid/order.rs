//! What comes before what: when devices are waited for, and what goes on beside the copies. The driver notes each call with its thread and what
//! it was about; an order holds a call back until others were made, which they never are where the engine does things one after the other.

use crate::common::world::{CHUNK, World, policy, tag};
use crate::common::{Call, GRANULARITY};
use sire_core::driver::{Addr, Device};
use sire_core::engine::*;
use sire_core::error::Status;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::ThreadId;

const MANY: u64 = 1 << 30;
const DEVICES: [Device; 2] = [Device(0), Device(1)];

fn on(device: Device, region: RegionId, size: u64) -> Request {
    Request { device, ..World::request(region, size) }
}

/// A written allocation.
fn written(world: &mut World, request: Request) -> Addr {
    let addr = world.allocate_as(request).unwrap();
    world.write(addr);
    addr
}

fn is(verb: &'static str) -> impl Fn(&&Call) -> bool {
    move |call| call.verb == verb
}

/// How many calls have been made.
fn now(world: &World) -> usize {
    world.driver.calls() as usize
}

// Devices are waited for.

/// The devices that were waited for, in order; nothing that needs them idle came before.
fn waited_for(trail: &[Call]) -> Vec<u64> {
    let needs_idle = |call: &Call| ["copy_to_host", "hash", "unmap", "release"].contains(&call.verb);
    let first = trail.iter().position(needs_idle).unwrap_or(trail.len());
    assert!(trail[first..].iter().all(|call| call.verb != "synchronize"), "too late: {trail:?}");
    let mut devices: Vec<u64> = trail.iter().filter(is("synchronize")).map(|call| call.of).collect();
    devices.sort_unstable();
    devices
}

/// Regions with memory of every kind on the devices, written, with as many rounds behind them as `rounds`.
fn regions_on(devices: &[Device], rule: Policy, rounds: usize) -> World {
    let mut world = World::new(MANY);
    for name in ["m/a", "m/b"] {
        let region = world.region(name, rule);
        for &device in devices {
            let large = written(&mut world, on(device, region, 2 * CHUNK + 7));
            written(&mut world, on(device, region, 600));
            if rule.backup == Backup::File {
                world.attach(large, 0, CHUNK, false).unwrap();
            }
        }
    }
    for _ in 0..rounds {
        world.pause(&Selection::All).unwrap();
        world.resume(&Selection::All).unwrap();
    }
    world
}

#[test]
fn a_pause_waits_once_for_each_device_that_owns_memory_and_for_its_peers() {
    let kinds = [Backup::None, Backup::Host, Backup::Disk, Backup::File].into_iter();
    let rules = kinds.flat_map(|backup| {
        [Clean::No, Clean::Declared, Clean::Verified, Clean::Paranoid].map(|clean| Policy {
            backup,
            clean,
            ..policy(backup)
        })
    });
    for (rule, rounds) in rules.flat_map(|rule| [(rule, 0), (rule, 1)]) {
        for (owners, peers, wanted) in [
            (&DEVICES[..1], 0, &[0][..]),
            (&DEVICES[..], 0, &[0, 1]),
            (&DEVICES[..1], 1, &[0, 1]),
            (&DEVICES[..], 2, &[0, 1]),
        ] {
            for lazy in [false, true] {
                let world = regions_on(owners, rule, rounds);
                for (device, peer) in [(0, 1), (1, 0)].into_iter().take(peers) {
                    world.engine.allow_peer(Device(device), Device(peer)).unwrap();
                }
                let begun = now(&world);
                let options = PauseOptions { lazy, ..PauseOptions::default() };
                world.engine.pause(&Selection::All, options).unwrap();
                assert_eq!(
                    waited_for(&world.driver.trail(begun)),
                    wanted,
                    "{rule:?}, {rounds}, {peers} peers, lazily {lazy}"
                );
            }
        }
    }
}

#[test]
fn a_switch_waits_once_for_the_devices_of_what_it_puts_down() {
    for clean in [Clean::No, Clean::Verified] {
        let mut world = regions_on(&DEVICES, Policy { clean, ..policy(Backup::Host) }, 1);
        let other = world.region("other", policy(Backup::Host));
        written(&mut world, on(Device(0), other, CHUNK));
        world.pause(&tag("other")).unwrap();
        let begun = now(&world);
        world.switch(&tag("m"), &tag("other")).unwrap();
        assert_eq!(waited_for(&world.driver.trail(begun)), [0, 1], "{clean:?}");
    }
}

/// What the program did before is waited for; what it does next must not reach the memory: so the tag is closed first.
#[test]
fn a_tag_is_closed_before_the_device_is_waited_for() {
    type Attempt = fn(&Engine, RegionId) -> Status;
    const ATTEMPTS: [Attempt; 2] = [
        |engine, region| engine.allocate(World::request(region, 600)).unwrap_err().status,
        |engine, region| engine.enter(region, OnPaused::Refuse).unwrap_err().status,
    ];
    for (clean, lazy) in [Clean::No, Clean::Verified, Clean::Paranoid].into_iter().flat_map(|c| [(c, false), (c, true)])
    {
        let mut world = World::new(MANY);
        let region = world.region("m", Policy { clean, ..policy(Backup::Host) });
        written(&mut world, World::request(region, 2 * CHUNK));
        world.pause(&Selection::All).unwrap();
        world.resume(&Selection::All).unwrap();
        let (driver, engine) = (world.driver.clone(), Arc::new(world.engine));
        let found = Arc::new(Mutex::new(Vec::new()));
        let (inside, finds) = (Arc::downgrade(&engine), Arc::clone(&found));
        driver.at_next("synchronize", move || {
            let engine = inside.upgrade().unwrap();
            finds.lock().unwrap().extend(ATTEMPTS.map(|attempt| attempt(&engine, region)));
        });
        engine.pause(&Selection::All, PauseOptions { lazy, ..PauseOptions::default() }).unwrap();
        assert_eq!(*found.lock().unwrap(), [Status::Paused; 2], "{clean:?}, lazily {lazy}");
    }
}

// Out of the device.

/// How many pieces were still under way at each unmap; none of them was of the memory that went.
fn under_way_at_unmaps(trail: &[Call]) -> Vec<usize> {
    let (mut queued, mut flying, mut found) = (Vec::new(), Vec::<(u64, Vec<Call>)>::new(), Vec::new());
    for call in trail {
        match call.verb {
            "copy_to_host" => queued.push(*call),
            "record" => flying.push((call.of, std::mem::take(&mut queued))),
            "wait" => {
                assert_eq!(flying.remove(0).0, call.of, "waited for another piece than the oldest");
            }
            "unmap" => {
                let meets = |copy: &Call| copy.of < call.of + call.size && call.of < copy.of + copy.size;
                assert!(!flying.iter().flat_map(|(_, copies)| copies).any(meets), "unmapped under a copy: {trail:?}");
                found.push(flying.len());
            }
            _ => {}
        }
    }
    found
}

#[test]
fn each_unmap_waits_for_its_own_copy_and_for_no_later_one() {
    for (copy_piece, wanted) in
        [(2 * CHUNK, [2, 2, 2, 2, 1, 0]), (CHUNK, [2, 2, 2, 2, 1, 0]), (GRANULARITY, [2, 2, 2, 2, 2, 0])]
    {
        let mut world = World::with(MANY, copy_piece);
        let region = world.region("m", policy(Backup::Host));
        written(&mut world, World::request(region, 6 * CHUNK));
        for _ in 0..2 {
            let begun = now(&world);
            world.pause(&Selection::All).unwrap();
            assert_eq!(under_way_at_unmaps(&world.driver.trail(begun)), wanted, "in pieces of {copy_piece}");
            world.resume(&Selection::All).unwrap();
            world.check();
        }
        world.check_no_leak();
    }
}

const UNITS: u64 = 40;

/// A world whose host memory comes in by `threads` threads, in 40 units and a shorter last one; with one allocation that needs all of it.
fn cold(threads: usize) -> World {
    let mut world = World::configured(MANY, |config| config.host_threads = threads);
    let region = world.region("m", policy(Backup::Host));
    written(&mut world, World::request(region, UNITS * CHUNK + GRANULARITY));
    world
}

/// The first pause's host memory comes in behind its first copy, but nothing is given up before all of it is there.
#[test]
fn host_memory_comes_in_behind_the_first_copy() {
    for threads in [0, 1, 3] {
        let mut world = cold(threads);
        world.driver.set_order(|call, log| {
            let is_last_unit = call.verb == "register_host" && call.size < CHUNK;
            !is_last_unit || log.iter().any(|call| call.verb == "copy_to_host")
        });
        world.pause(&Selection::All).unwrap();
        world.driver.end_order();
        let trail = world.driver.trail(0);
        let last = trail.iter().rposition(|call| call.verb == "register_host");
        assert!(last < trail.iter().position(|call| call.verb == "unmap"), "given up too early: {trail:?}");
        assert_eq!(trail.iter().filter(is("register_host")).count() as u64, UNITS + 1);
        world.resume(&Selection::All).unwrap();
        world.check();
        world.check_no_leak();
    }
}

/// Two devices are paused at once. While the part that is done first brought in what the other's backup still lacked, the other one took that for there and
/// gave memory up: its first chunk goes only after the last unit has come.
#[test]
fn no_device_gives_memory_up_before_the_room_for_all_is_there() {
    let mut world = World::new(MANY);
    let region = world.region("m", policy(Backup::Host));
    written(&mut world, on(DEVICES[0], region, CHUNK));
    let base = written(&mut world, on(DEVICES[1], region, 4 * CHUNK)).0;
    let is_third_chunk =
        move |call: &Call| call.verb == "copy_to_host" && call.of.wrapping_sub(base + 2 * CHUNK) < CHUNK;
    let asked = AtomicBool::new(false);
    world.driver.set_order(move |call, log| {
        if call.verb == "register_host" && log.iter().filter(is("register_host")).count() == 4 {
            // The last unit. The other device is to send all of its third chunk first, when its first one has long been safe.
            asked.store(true, Ordering::SeqCst);
            return log.iter().filter(|call| is_third_chunk(call)).map(|call| call.size).sum::<u64>() == CHUNK;
        }
        !is_third_chunk(call) || asked.load(Ordering::SeqCst)
    });
    world.pause(&Selection::All).unwrap();
    world.driver.end_order();
    let trail = world.driver.trail(0);
    assert_eq!(trail.iter().filter(is("register_host")).count(), 5);
    let last = trail.iter().rposition(|call| call.verb == "register_host");
    assert!(last < trail.iter().position(|call| call.verb == "unmap"), "given up too early: {trail:?}");
    world.resume_and_check();
}

/// Nobody registers a third unit, the pausing thread included, before two others have registered one.
#[test]
fn several_threads_bring_host_memory_in() {
    let mut world = cold(3);
    let me = std::thread::current().id();
    world.driver.set_order(move |call, log| {
        let registered = || log.iter().filter(is("register_host"));
        let others: BTreeSet<String> = registered().filter(|c| c.thread != me).map(|c| name(c.thread)).collect();
        let mine = registered().filter(|c| c.thread == call.thread).count();
        call.verb != "register_host" || mine < 2 || others.len() >= 2
    });
    world.pause(&Selection::All).unwrap();
    world.driver.end_order();
    world.resume(&Selection::All).unwrap();
    world.check();
    world.check_no_leak();
}

fn name(thread: ThreadId) -> String {
    format!("{thread:?}")
}

/// Backups of memory on different devices are not mixed in one slab of the arena, so that each slab can lie at one NUMA node.
#[test]
fn each_numa_node_has_slabs_of_its_own() {
    let reserved = |world: &World| {
        let stats: serde_json::Value = serde_json::from_str(&world.engine.stats_json()).unwrap();
        stats["tiers"][0]["reserved_bytes"].as_u64().unwrap() / CHUNK
    };
    for (host_nodes, wanted) in [(true, [8, 10, 10]), (false, [8, 8, 8])] {
        let mut world = World::new(MANY);
        world.engine.configure(&|config| config.host_nodes = host_nodes);
        let region = world.region("first", policy(Backup::Host));
        let [half, _] = [4, 4].map(|chunks| written(&mut world, World::request(region, chunks * CHUNK)));
        world.pause(&Selection::All).unwrap();
        let mut found = vec![reserved(&world)];
        // Room for four more chunks, in a slab that is in use.
        world.free(half).unwrap();
        for device in [Device(1), Device(0)] {
            let region = world.region(&format!("on {device}"), policy(Backup::Host));
            written(&mut world, on(device, region, 2 * CHUNK));
            world.pause(&Selection::All).unwrap();
            found.push(reserved(&world));
        }
        assert_eq!(found, wanted, "by node: {host_nodes}");
        world.resume(&Selection::All).unwrap();
        world.check();
        world.check_no_leak();
    }
}

// Back to the device.

/// Memory is made and mapped while the copy into the first chunk is under way; that copy does not wait for all of it.
#[test]
fn memory_is_made_ahead_of_the_copies_but_they_do_not_wait_for_all_of_it() {
    let mut world = World::with(MANY, 2 * CHUNK);
    let region = world.region("m", policy(Backup::Host));
    let addr = written(&mut world, World::request(region, 40 * CHUNK));
    world.pause(&Selection::All).unwrap();
    let begun = now(&world);
    world.driver.set_order(move |call, log| {
        let log = &log[begun..];
        let made = |verb| log.iter().filter(is(verb)).count();
        match call.verb {
            "copy_to_device" => made("create") >= 3 && made("map") >= 3,
            "map" if call.of == addr.0 + 39 * CHUNK => made("copy_to_device") >= 1,
            _ => true,
        }
    });
    world.resume(&Selection::All).unwrap();
    world.driver.end_order();
    world.check();
    world.check_no_leak();
}

/// Where little comes back, a thread that runs ahead would not have started before most of it is there: what copies makes memory itself, run by run,
/// each while the copies into the one before are under way.
#[test]
fn what_is_little_is_made_run_by_run_between_the_copies() {
    let mut world = World::with(MANY, 2 * CHUNK);
    let region = world.region("m", policy(Backup::Host));
    written(&mut world, World::request(region, 12 * CHUNK));
    world.pause(&Selection::All).unwrap();
    let begun = now(&world);
    world.resume(&Selection::All).unwrap();
    let trail = world.driver.trail(begun);
    let verbs = trail.iter().filter(|call| ["create", "copy_to_device"].contains(&call.verb));
    let runs: Vec<(&str, usize)> = verbs.fold(Vec::new(), |mut runs, call| {
        match runs.last_mut() {
            Some((verb, count)) if *verb == call.verb => *count += 1,
            _ => runs.push((call.verb, 1)),
        }
        runs
    });
    let each = [1, 2, 4, 5].map(|length| [("create", length), ("copy_to_device", length)]);
    assert_eq!(runs, each.concat());
    world.check();
    world.check_no_leak();
}

/// One call gives access to chunks that lie side by side: few calls for many chunks, and a first one that lets the copy begin.
#[test]
fn access_is_set_for_runs_of_chunks_that_double() {
    for (chunks, wanted) in [(64, &[1, 2, 4, 8, 16, 32, 1][..]), (200, &[1, 2, 4, 8, 16, 32, 64, 64, 9])] {
        let mut world = World::new(MANY);
        let region = world.region("m", policy(Backup::Host));
        written(&mut world, World::request(region, chunks * CHUNK));
        world.pause(&Selection::All).unwrap();
        let begun = now(&world);
        world.resume(&Selection::All).unwrap();
        let trail = world.driver.trail(begun);
        let runs: Vec<u64> = trail.iter().filter(is("set_access")).map(|call| call.size / CHUNK).collect();
        assert_eq!(runs, wanted);
        world.check();
        world.check_no_leak();
    }
}

/// On every device some copy waits for one on the other: nobody is served first.
#[test]
fn devices_are_paused_and_resumed_at_the_same_time() {
    for (held, other) in [(0, 1), (1, 0)] {
        let mut world = World::new(MANY);
        let region = world.region("m", policy(Backup::Host));
        let bases = DEVICES.map(|device| written(&mut world, on(device, region, 4 * CHUNK)).0);
        let wait_for_the_other = |world: &World, verb: &'static str| {
            let begun = now(world);
            let is_copy_on =
                move |device: usize, call: &Call| call.verb == verb && call.of.wrapping_sub(bases[device]) < 4 * CHUNK;
            world.driver.set_order(move |call, log| {
                !is_copy_on(held, call) || log[begun..].iter().any(|call| is_copy_on(other, call))
            });
        };
        wait_for_the_other(&world, "copy_to_host");
        world.pause(&Selection::All).unwrap();
        world.driver.end_order();
        wait_for_the_other(&world, "copy_to_device");
        world.resume(&Selection::All).unwrap();
        world.driver.end_order();
        world.check();
        world.check_no_leak();
    }
}
