//! Backups that several processes keep once. Here the processes are engines of one process, which share nothing but a directory;
//! processes that die are in the store's own tests.

use crate::common::GRANULARITY;
use crate::common::world::{CHUNK, World, tag};
use sire_core::driver::{Addr, DriverErrorKind};
use sire_core::engine::*;
use std::fs::{DirBuilder, File};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

const SIZE: u64 = 3 * CHUNK;

fn shared() -> Policy {
    Policy { backup: Backup::Host, clean: Clean::Declared, ..Policy::default() }
}

/// A process with one region, whose backups are shared.
fn member(dir: &Path) -> (World, RegionId) {
    let mut world = World::new(1 << 24);
    let dir = dir.to_path_buf();
    world.engine.configure(&move |config| {
        config.shared_backups = true;
        config.shared_dir = Some(dir.clone());
    });
    let region = world.region("weights", shared());
    (world, region)
}

/// (`used_bytes`, `reserved_bytes`) of a tier.
fn figures(world: &World, tier: &str) -> (u64, u64) {
    let stats: serde_json::Value = serde_json::from_str(&world.engine.stats_json()).unwrap();
    let found = stats["tiers"].as_array().unwrap().iter().find(|t| t["tier"] == tier).unwrap();
    (found["used_bytes"].as_u64().unwrap(), found["reserved_bytes"].as_u64().unwrap())
}

/// An allocation with the same content in every process.
fn weights(world: &mut World, region: RegionId) -> Addr {
    let addr = world.allocate(region, SIZE).unwrap();
    // Every world's first write is the same.
    world.write(addr);
    addr
}

#[test]
fn any_number_of_processes_keep_one_copy() {
    let dir = tempfile::tempdir().unwrap();
    let mut members: Vec<(World, RegionId)> = (0..4).map(|_| member(dir.path())).collect();
    for (world, region) in &mut members {
        weights(world, *region);
        let report = world.pause(&Selection::All).unwrap();
        assert_eq!(report.bytes_copied, SIZE);
    }
    let memory: u64 = members.iter().map(|(world, _)| figures(world, "shared").1).sum();
    // Each process has one page of its own, which says whose its memory is.
    assert!(memory <= SIZE + 4 * GRANULARITY && memory * 20 <= SIZE * 21 + 4 * 20 * GRANULARITY, "{memory}");
    assert!(members.iter().all(|(world, _)| figures(world, "shared").0 >= SIZE && figures(world, "host").0 == 0));
    for (world, _) in &mut members {
        world.resume(&Selection::All).unwrap();
        world.check();
        let report = world.pause(&Selection::All).unwrap();
        assert_eq!((report.bytes_copied, report.bytes_clean), (0, SIZE), "the shared backup is clean");
        world.resume(&Selection::All).unwrap();
        world.check();
    }
}

#[test]
fn the_one_who_came_first_may_go() {
    let dir = tempfile::tempdir().unwrap();
    let (mut first, region) = member(dir.path());
    weights(&mut first, region);
    first.pause(&Selection::All).unwrap();
    let (mut second, region) = member(dir.path());
    weights(&mut second, region);
    assert_eq!(second.pause(&Selection::All).unwrap().bytes_shared, SIZE);
    drop(first);
    second.resume(&Selection::All).unwrap();
    second.check();
}

#[test]
fn what_one_process_changes_is_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let mut members: Vec<(World, RegionId)> = (0..2).map(|_| member(dir.path())).collect();
    let mut addrs = Vec::new();
    for (world, region) in &mut members {
        addrs.push(weights(world, *region));
        world.pause(&Selection::All).unwrap();
        world.resume(&Selection::All).unwrap();
    }
    members[1].0.write_part(addrs[1], CHUNK + 5, 100);
    let report = members[1].0.pause(&Selection::All).unwrap();
    assert!(report.bytes_copied < SIZE && report.bytes_copied > 0, "{report:?}");
    let (used, own) = figures(&members[1].0, "shared");
    assert!(used >= SIZE && own < SIZE, "{used} {own}");
    for (world, _) in &mut members {
        world.pause(&Selection::All).unwrap();
        world.resume(&Selection::All).unwrap();
        world.check();
    }
}

#[test]
fn freed_memory_is_given_back_though_others_paused_it() {
    let dir = tempfile::tempdir().unwrap();
    let (mut world, region) = member(dir.path());
    let addr = weights(&mut world, region);
    world.pause(&tag("weights")).unwrap();
    assert!(figures(&world, "shared").0 >= SIZE);
    world.free(addr).unwrap();
    world.resume(&Selection::All).unwrap();
    assert_eq!(figures(&world, "shared"), (0, 0));
    world.check_no_leak();
}

#[test]
fn where_sharing_does_not_work_host_memory_does() {
    let (mut world, region) = member(Path::new("/proc/no/such/place"));
    weights(&mut world, region);
    world.pause(&Selection::All).unwrap();
    assert!(figures(&world, "host").0 >= SIZE);
    let notices = world.engine.take_notices();
    assert!(notices.iter().any(|n| n.contains("cannot be shared")), "{notices:?}");
    world.resume(&Selection::All).unwrap();
    world.check();
}

#[test]
fn regions_that_are_paused_at_the_same_time_do_not_share_each_others_drafts() {
    let dir = tempfile::tempdir().unwrap();
    let (mut world, first) = member(dir.path());
    let second = world.region("other", shared());
    let addrs = [first, second].map(|region| world.allocate(region, SIZE).unwrap());
    for _ in 0..20 {
        addrs.iter().for_each(|&addr| world.write(addr));
        std::thread::scope(|scope| {
            for name in ["weights", "other"] {
                let engine = &world.engine;
                scope.spawn(move || engine.pause(&tag(name), PauseOptions::default()).unwrap());
            }
        });
        world.resume(&Selection::All).unwrap();
        world.check();
    }
    world.check_no_leak();
}

/// The first pause of shared weights failed when some of them had been saved, which count as clean since. Then each window of a `pre_copy` gave
/// back the memory of those before it, and the next resume met zeros.
#[test]
fn what_a_pause_that_failed_had_saved_outlasts_a_pre_copy() {
    let mut call = 0;
    loop {
        call += 1;
        let dir = tempfile::tempdir().unwrap();
        let (mut world, region) = member(dir.path());
        for _ in 0..3 {
            let addr = world.allocate(region, CHUNK).unwrap();
            world.write(addr);
        }
        world.driver.fail_at(world.driver.calls() + call, DriverErrorKind::Other);
        let paused = world.pause(&Selection::All).is_ok();
        if world.driver.pending_faults() > 0 {
            break assert!(call > 10, "a pause has only {call} calls");
        }
        if !paused {
            world.engine.pre_copy(&tag("weights"), false).unwrap();
            world.pause(&Selection::All).unwrap();
        }
        world.resume(&Selection::All).unwrap();
        world.check();
        world.check_no_leak();
    }
}

/// A process of another version of Sire began just then: what it relies on cannot be read, and nothing is shared. The next pause found the backup clean, shared
/// it once more, and gave all of its memory back.
#[test]
fn a_backup_that_was_not_shared_at_first_outlasts_the_next_pauses() {
    let dir = tempfile::tempdir().unwrap();
    let (mut world, region) = member(dir.path());
    weights(&mut world, region);
    DirBuilder::new().mode(0o700).create(dir.path().join("shared-1")).unwrap();
    let newer = File::create(dir.path().join("shared-1/member-newer")).unwrap();
    for is_there in [true, true, false, false] {
        if is_there { newer.lock() } else { newer.unlock() }.unwrap();
        world.pause(&Selection::All).unwrap();
        world.resume(&Selection::All).unwrap();
        world.check();
    }
    let (mut second, region) = member(dir.path());
    weights(&mut second, region);
    assert_eq!(second.pause(&Selection::All).unwrap().bytes_shared, SIZE, "it is shared by now");
    world.check_no_leak();
    second.resume_and_check();
}

/// Processes that kept one copy of their weights had one each after `promote`, which took whatever is behind the trait for something on a disk, and said
/// that it had brought it from there.
#[test]
fn what_is_shared_in_host_memory_is_not_promoted_out_of_it() {
    let dir = tempfile::tempdir().unwrap();
    for clean in [Clean::Declared, Clean::Verified] {
        let (mut world, _) = member(dir.path());
        let region = world.region("automatic", Policy { backup: Backup::Auto, clean, ..Policy::default() });
        weights(&mut world, region);
        world.pause(&Selection::All).unwrap();
        assert_eq!(world.engine.promote(&Selection::All), Ok(0), "{clean:?}");
        assert!(figures(&world, "host").0 == 0 && figures(&world, "shared").0 >= SIZE, "{clean:?}");
        world.resume_and_check();
    }
}
