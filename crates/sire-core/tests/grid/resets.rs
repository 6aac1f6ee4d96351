//! A device that the program resets: what was there is gone, all else stays.

use crate::common::world::{CHUNK, World, policy, tag};
use sire_core::driver::{Device, DriverErrorKind};
use sire_core::engine::*;
use sire_core::error::Error;
use std::sync::atomic::{AtomicBool, Ordering};

const OTHER: Device = Device(1);

fn on_other(region: RegionId, size: u64) -> Request {
    Request { device: OTHER, ..World::request(region, size) }
}

/// A figure of host memory, in bytes.
fn figure(world: &World, name: &str) -> u64 {
    let stats: serde_json::Value = serde_json::from_str(&world.engine.stats_json()).unwrap_or_default();
    let tiers = stats["tiers"].as_array().cloned().unwrap_or_default();
    tiers.iter().filter(|tier| tier["tier"] == "host").filter_map(|tier| tier[name].as_u64()).sum()
}

/// Host memory that is there, in bytes.
fn present(world: &World) -> u64 {
    figure(world, "present_bytes")
}

#[test]
fn only_the_devices_own_memory_goes() -> Result<(), Error> {
    for cached in [false, true] {
        let mut world = World::new(1 << 22);
        world.cached = cached;
        let region = world.region("a", policy(Backup::Host));
        for _ in 0..3 {
            let gone = [world.allocate(region, 3 * CHUNK)?, world.allocate(region, 100)?];
            let stays = [world.allocate_as(on_other(region, 2 * CHUNK))?, world.allocate_as(on_other(region, 100))?];
            gone.into_iter().chain(stays).for_each(|addr| world.write(addr));
            world.pause(&tag("a"))?;
            let there = present(&world);
            world.reset(Device(0));
            assert_eq!(
                (present(&world), there > 0),
                (there, true),
                "backups that stay, but count as memory that is still to come"
            );
            assert!(gone.iter().all(|&addr| !world.engine.owns(addr)), "cached: {cached}");
            assert_eq!((world.driver.used_bytes(), world.driver.registered()), (0, 0), "cached: {cached}");
            // What was registered through that device is registered anew.
            let before = world.driver.log().len();
            world.resume(&tag("a"))?;
            assert!(world.driver.log()[before..].contains(&"register_host"), "cached: {cached}");
            world.check();
            world.reset(OTHER);
            assert_eq!(world.driver.used_bytes(), 0);
            assert!(stays.iter().all(|&addr| !world.engine.owns(addr)));
        }
        world.check_no_leak();
    }
    Ok(())
}

/// What the driver refuses while the device is lost, it takes after the reset.
#[test]
fn a_lost_device_is_left_empty() -> Result<(), Error> {
    for cached in [false, true] {
        let mut world = World::new(1 << 22);
        world.cached = cached;
        let region = world.region("a", policy(Backup::Host));
        world.allocate(region, 3 * CHUNK)?;
        world.allocate(region, 100)?;
        world.pause(&tag("a"))?;
        world.resume(&tag("a"))?;
        for verb in ["synchronize", "unmap"] {
            world.driver.fail_always(Some((verb, DriverErrorKind::Lost)));
            world.engine.reset(Device(0), || {
                world.driver.fail_always(None);
                world.driver.reset(Device(0));
            });
            world.twins.clear();
            assert_eq!(world.driver.used_bytes(), 0, "{verb}, cached: {cached}");
            let addr = world.allocate(region, CHUNK)?;
            world.write(addr);
            world.pause(&tag("a"))?;
            world.resume(&tag("a"))?;
            world.check();
        }
    }
    Ok(())
}

/// Whoever needs no lane may bring host memory in while a device is being reset. The reset dropped what it had registered, and the arena went on to count on
/// that: copies were slow from then on, and the memory could never be given back.
#[test]
fn what_comes_in_during_a_reset_is_registered_after_it() -> Result<(), Error> {
    let mut world = World::new(1 << 22);
    let region = world.region("a", policy(Backup::Auto));
    let addr = world.allocate_as(on_other(region, 4 * CHUNK))?;
    world.write(addr);
    world.engine.configure(&|config| config.host_limit = Some(0));
    world.pause(&tag("a"))?;
    world.engine.configure(&|config| config.host_limit = None);
    world.engine.reset(Device(0), || {
        assert_eq!(world.engine.promote(&tag("a")), Ok(4 * CHUNK));
        world.driver.reset(Device(0));
    });
    assert!(figure(&world, "present_bytes") >= 4 * CHUNK);
    assert_eq!((figure(&world, "registered_bytes"), world.driver.registered()), (0, 0));
    let before = world.driver.log().len();
    world.resume(&tag("a"))?;
    assert!(world.driver.log()[before..].contains(&"register_host"));
    world.check();
    world.check_no_leak();
    assert_eq!((figure(&world, "reserved_bytes"), world.driver.registered()), (0, 0));
    Ok(())
}

/// A slab that is just being given back is in no list any more, and the driver knows it still. The reset went by: what the driver was to forget then, it had
/// forgotten, so that the memory counted as one that it holds, and was never unmapped.
#[test]
fn what_is_being_given_back_is_gone_before_the_reset() -> Result<(), Error> {
    let mut world = World::new(1 << 22);
    let region = world.region("a", policy(Backup::Host));
    let addr = world.allocate(region, 3 * CHUNK)?;
    world.write(addr);
    world.pause(&tag("a"))?;
    world.resume(&tag("a"))?;
    let (begins, begun) = std::sync::mpsc::channel();
    world.driver.at_next("unregister_host", move || {
        let _ = begins.send(());
        std::thread::sleep(std::time::Duration::from_millis(100));
    });
    let known = std::thread::scope(|scope| {
        scope.spawn(|| world.engine.trim());
        assert_eq!(begun.recv(), Ok(()));
        world.engine.reset(Device(0), || {
            let known = world.driver.registered();
            world.driver.reset(Device(0));
            known
        })
    });
    assert_eq!((known, figure(&world, "reserved_bytes")), (0, 0));
    world.twins.clear();
    world.check_no_leak();
    Ok(())
}

/// Another thread pauses and resumes meanwhile: no stream goes under its copies, and what it is at on the other device comes through.
#[test]
fn a_reset_beside_pauses() -> Result<(), Error> {
    let mut world = World::new(1 << 22);
    let (a, b) = (world.region("a", policy(Backup::Host)), world.region("b", policy(Backup::Host)));
    let stays = world.allocate_as(on_other(b, 6 * CHUNK))?;
    world.write(stays);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let pausing = scope.spawn(|| {
            let mut rounds = 0;
            while !done.load(Ordering::SeqCst) || rounds < 10 {
                world.engine.pause(&Selection::All, PauseOptions::default())?;
                world.engine.resume(&Selection::All, ResumeOptions::default())?;
                rounds += 1;
            }
            Ok::<(), Error>(())
        });
        for _ in 0..100 {
            // Paused at this moment: then there is less to go.
            let _ = world.engine.allocate(World::request(a, 2 * CHUNK));
            world.engine.reset(Device(0), || world.driver.reset(Device(0)));
        }
        done.store(true, Ordering::SeqCst);
        pausing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })?;
    world.check();
    world.check_no_leak();
    Ok(())
}
