//! Backups that move from tier to tier: automatic ones when host memory becomes scarce, compressed ones, promoted ones. Wherever they are, every
//! byte comes back.

use crate::common::GRANULARITY;
use crate::common::player::refusal;
use crate::common::world::{CHUNK, World, policy, tag};
use crate::namespaces::{place, run_alone, run_with_own};
use sire_core::driver::{Addr, Device};
use sire_core::engine::*;
use sire_core::error::Status;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

const SIZE: u64 = 4 * CHUNK;

fn figure(world: &World, tier: &str, name: &str) -> u64 {
    let stats: serde_json::Value = serde_json::from_str(&world.engine.stats_json()).unwrap();
    let found = stats["tiers"].as_array().unwrap().iter().find(|t| t["tier"] == tier).unwrap();
    found[name].as_u64().unwrap()
}

fn used(world: &World, tier: &str) -> u64 {
    figure(world, tier, "used_bytes")
}

/// A world with one written allocation in each of some regions with automatic backup.
fn automatic(tags: &[&str], policy: Policy) -> (World, Vec<Addr>) {
    // Records of four pages, so that smaller ones take less.
    let mut world = World::with(1 << 24, CHUNK);
    let regions: Vec<RegionId> = tags.iter().map(|tag| world.region(tag, policy)).collect();
    let addrs = regions.iter().map(|&region| world.allocate(region, SIZE).unwrap()).collect();
    for &addr in &addrs {
        world.write(addr);
    }
    (world, addrs)
}

fn compressed(how: Compress, policy: Policy) -> World {
    let (mut world, _) = automatic(&["disk"], policy);
    world.engine.configure(&move |config| config.disk_compress = how);
    world.pause(&Selection::All).unwrap();
    world
}

#[test]
fn what_is_on_the_disk_is_compressed_where_bytes_are_saved() {
    for clean in [Clean::No, Clean::Declared] {
        let mut world = compressed(Compress::Always, Policy { clean, ..policy(Backup::Disk) });
        let before = used(&world, "disk");
        let tended = world.engine.tend();
        assert_eq!(tended.bytes_compressed, SIZE);
        let after = used(&world, "disk");
        assert!(after < before && before - after >= tended.bytes_saved.min(1), "{before} {after} {tended:?}");
        assert_eq!(world.engine.tend(), Tended::default(), "it is done");
        world.resume(&Selection::All).unwrap();
        world.check();
        let report = world.pause(&Selection::All).unwrap();
        assert_eq!(report.bytes_copied, if clean == Clean::No { SIZE } else { 0 });
        world.resume(&Selection::All).unwrap();
        world.check();
        world.check_no_leak();
    }
}

/// Records of the tests below.
const PIECE: u64 = 256 << 10;

/// Bytes that no compressor makes smaller, but for how few bits are set in each.
fn noise(len: u64, mask: u8) -> Vec<u8> {
    let mut state = 0x1234_5678_9ABC_DEF1_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as u8 & mask
    };
    (0..len).map(|_| next()).collect()
}

/// A paused world with `pieces` records on the disk: `first` is what those hold that trials look at, `other` the rest.
fn misleading(pieces: u64, first: &[u8], other: &[u8]) -> World {
    let mut world = World::configured(1 << 25, |config| (config.chunk, config.copy_piece) = (PIECE, PIECE));
    world.engine.configure(&|config| config.disk_compress = Compress::Always);
    let region = world.region("disk", policy(Backup::Disk));
    let addr = world.allocate(region, pieces * PIECE).unwrap();
    let content = (0..pieces).flat_map(|piece| if piece % (pieces / 8) == 0 { first } else { other });
    world.write_repeated(addr, &content.copied().collect::<Vec<u8>>());
    world.pause(&Selection::All).unwrap();
    world
}

/// A backup whose trials promised too much was read and compressed after every pause, and kept as it was each time.
#[test]
fn where_trials_promise_too_much_the_backup_is_compressed_all_the_same() {
    let mut world = misleading(16, &[7; PIECE as usize], &noise(PIECE, 0x0F));
    let tended = world.engine.tend();
    let after = used(&world, "disk");
    assert_eq!((tended.bytes_compressed, tended.bytes_saved), (16 * PIECE, 16 * PIECE - after));
    assert!(after < 6 * PIECE, "{after}");
    assert_eq!(world.engine.tend(), Tended::default(), "it is done");
    world.resume(&Selection::All).unwrap();
    world.check();
    world.check_no_leak();
}

/// The same where the whole does not become smaller: that is found out once per backup.
#[test]
fn a_backup_that_turns_out_not_to_become_smaller_is_left_alone() {
    let noise = noise(PIECE, 0xFF);
    let mut nearly = noise.clone();
    nearly[(PIECE - PIECE / 14) as usize..].fill(0);
    let mut world = misleading(64, &nearly, &noise);
    // Whoever looks needs a buffer.
    let looks = |world: &World| {
        world.engine.trim();
        let before = world.driver.log().len();
        assert_eq!(world.engine.tend(), Tended::default());
        world.driver.log()[before..].contains(&"register_host")
    };
    for round in 0..2 {
        assert_eq!([looks(&world), looks(&world)], [true, false], "round {round}");
        assert_eq!(used(&world, "disk"), 64 * PIECE);
        world.resume(&Selection::All).unwrap();
        world.check();
        world.pause(&Selection::All).unwrap();
    }
    world.resume_and_check();
}

#[test]
fn nothing_is_compressed_unasked_or_for_room_that_is_written_again() {
    let world = compressed(Compress::No, policy(Backup::Disk));
    assert_eq!(world.engine.tend(), Tended::default());
    let world = compressed(Compress::Always, Policy { retain: true, ..policy(Backup::Disk) });
    assert_eq!(world.engine.tend(), Tended::default());
    let world = compressed(Compress::Always, policy(Backup::Host));
    assert_eq!(world.engine.tend(), Tended::default());
}

#[test]
fn only_what_changed_is_written_beside_a_compressed_backup() {
    let declared = Policy { clean: Clean::Declared, ..policy(Backup::Disk) };
    let (mut world, addrs) = automatic(&["disk"], declared);
    world.engine.configure(&|config| config.disk_compress = Compress::Always);
    world.pause(&Selection::All).unwrap();
    world.engine.tend();
    for round in 0..3 {
        world.resume(&Selection::All).unwrap();
        world.check();
        world.write_part(addrs[0], round * CHUNK + 7, 100);
        let report = world.pause(&Selection::All).unwrap();
        assert!(report.bytes_copied > 0 && report.bytes_copied < SIZE, "{report:?}");
        world.engine.tend();
    }
    world.resume(&Selection::All).unwrap();
    world.check();
    world.check_no_leak();
}

#[test]
fn automatic_backups_go_to_the_disk_when_host_memory_is_full() {
    let (mut world, _) = automatic(&["a", "b"], policy(Backup::Auto));
    world.engine.configure(&|config| config.host_limit = Some(SIZE + CHUNK));
    world.pause(&tag("a")).unwrap();
    assert!(used(&world, "host") >= SIZE && used(&world, "disk") == 0);
    world.pause(&tag("b")).unwrap();
    assert!(used(&world, "disk") >= SIZE);
    world.resume(&Selection::All).unwrap();
    world.check();
    world.check_no_leak();
}

/// Host memory was full, and the disk that was to help out could not be used: the pause said that a directory cannot be made, and not what it was short of.
#[test]
fn where_the_disk_fails_as_well_the_want_of_host_memory_is_told() {
    let (mut world, _) = automatic(&["auto"], policy(Backup::Auto));
    let region = world.region("host", policy(Backup::Host));
    let addr = world.allocate(region, SIZE).unwrap();
    world.write(addr);
    let nowhere = Some(Path::new("/dev/null/backups").to_path_buf());
    world.engine.configure(&move |config| (config.host_limit, config.disk_dir) = (Some(SIZE), nowhere.clone()));
    let (status, message) = refusal(world.pause(&Selection::All));
    assert_eq!(status, Status::OutOfBackupSpace, "{message}");
    assert!(message.contains("host limit") && message.contains("/dev/null/backups"), "{message}");
    world.engine.configure(&|config| config.host_limit = None);
    world.pause(&Selection::All).unwrap();
    world.resume_and_check();
}

#[test]
fn what_files_hold_is_not_compressed_and_the_rest_is() {
    let (mut world, addrs) = automatic(&["auto"], policy(Backup::Auto));
    world.attach(addrs[0], 0, 3 * CHUNK, false).unwrap();
    world.engine.configure(&|config| (config.host_limit, config.disk_compress) = (Some(0), Compress::Always));
    world.pause(&Selection::All).unwrap();
    assert_eq!(world.engine.tend().bytes_compressed, SIZE - 3 * CHUNK);
    world.resume(&Selection::All).unwrap();
    world.check();
    world.check_no_leak();
}

#[test]
fn the_least_recently_used_make_way_and_come_back() {
    let (mut world, _) = automatic(&["a", "b", "c"], policy(Backup::Auto));
    for tag_of in ["b", "c", "a"] {
        world.pause(&tag(tag_of)).unwrap();
    }
    assert_eq!((used(&world, "disk"), world.engine.tend().bytes_demoted), (0, 0));
    // Now the limit falls: below 75 % of it only one of the three may stay.
    world.engine.configure(&|config| config.host_limit = Some(2 * SIZE));
    assert_eq!(world.engine.tend().bytes_demoted, 2 * SIZE);
    assert!(used(&world, "disk") >= 2 * SIZE && used(&world, "host") < 2 * SIZE);
    // The last one that was used is the one that stays.
    assert_eq!(world.engine.promote(&tag("a")), Ok(0));
    world.engine.configure(&|config| config.host_limit = Some(SIZE + CHUNK));
    assert_eq!(world.engine.promote(&tag("b")), Ok(0), "there is no room");
    world.engine.configure(&|config| config.host_limit = None);
    assert_eq!(world.engine.promote(&tag("b")), Ok(SIZE));
    assert!(used(&world, "disk") < 2 * SIZE);
    world.resume(&Selection::All).unwrap();
    world.check();
    world.check_no_leak();
}

/// The hashes of what moved were thrown away, so that the next pause copied all of it again, to the place where it was.
#[test]
fn what_has_moved_to_the_disk_is_known_there() {
    let (mut world, addrs) = automatic(&["a"], Policy { clean: Clean::Verified, ..policy(Backup::Auto) });
    world.pause(&Selection::All).unwrap();
    world.engine.configure(&|config| config.host_limit = Some(CHUNK));
    assert_eq!(world.engine.tend().bytes_demoted, SIZE);
    for (written, copied) in [(false, 0), (true, CHUNK)] {
        world.resume(&Selection::All).unwrap();
        world.check();
        if written {
            world.write_part(addrs[0], CHUNK + 3, 100);
        }
        let report = world.pause(&Selection::All).unwrap();
        assert_eq!((report.bytes_copied, report.bytes_clean), (copied, SIZE - copied));
    }
    world.resume_and_check();
}

/// Each small allocation had a whole copy piece set aside for it on the disk, thousands of times what it holds, so that a disk with room refused.
#[test]
fn what_moves_to_the_disk_takes_no_more_room_than_it_needs() {
    let mut world = World::with(1 << 24, 2 * GRANULARITY);
    let region = world.region("auto", policy(Backup::Auto));
    let sizes = [GRANULARITY, GRANULARITY, 3 * GRANULARITY + 5, CHUNK + 1];
    for size in sizes {
        let addr = world.allocate(region, size).unwrap();
        world.write(addr);
    }
    world.pause(&Selection::All).unwrap();
    let whole: u64 = sizes.iter().map(|size| size.next_multiple_of(GRANULARITY)).sum();
    world.engine.configure(&move |config| (config.host_limit, config.disk_limit) = (Some(CHUNK), Some(whole)));
    assert_eq!(world.engine.tend().bytes_demoted, sizes.iter().sum::<u64>());
    assert_eq!(used(&world, "disk"), whole);
    world.resume_and_check();
}

/// The disk had no room for a backup that was to make way. The attempt left it marked as one that somebody reads, for good: the next pause wrote all that
/// had changed to new room, which was refused where host memory was full.
#[test]
fn a_backup_that_could_not_make_way_is_written_to_again() {
    for clean in [Clean::Verified, Clean::Paranoid] {
        let (mut world, addrs) = automatic(&["a"], Policy { clean, ..policy(Backup::Auto) });
        world.pause(&Selection::All).unwrap();
        world.engine.configure(&|config| (config.host_limit, config.disk_limit) = (Some(SIZE), Some(0)));
        assert_eq!(world.engine.tend(), Tended::default());
        world.resume(&Selection::All).unwrap();
        world.write_part(addrs[0], CHUNK + 3, 100);
        let copied = world.pause(&Selection::All).map(|report| report.bytes_copied);
        assert_eq!((copied, used(&world, "host")), (Ok(CHUNK), SIZE), "{clean:?}");
        world.resume_and_check();
    }
}

/// The disk took the backup of one allocation and failed with the next. What had moved was not counted, its host memory stayed with the process, and the
/// rest could not be written to again.
#[test]
fn a_move_that_fails_in_the_middle_counts_what_moved() {
    let dir = tempfile::tempdir().unwrap();
    run_alone(dir.path(), "tend::half_a_disk");
}

/// No file of this process can be written to from there on.
fn limit_files(bytes: u64) {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` lives as long as the calls, which fill and read it; what is ignored is a signal that nothing else here means.
    let set = unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        libc::getrlimit(libc::RLIMIT_FSIZE, &raw mut limit) == 0 && {
            limit.rlim_cur = bytes.min(limit.rlim_max);
            libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit) == 0
        }
    };
    assert!(set, "{}", std::io::Error::last_os_error());
}

/// The child's program.
#[test]
#[ignore = "a part of another test"]
fn half_a_disk() {
    if place().is_none() {
        return;
    }
    let (mut world, mut addrs) = automatic(&["a"], Policy { clean: Clean::Verified, ..policy(Backup::Auto) });
    world.engine.configure(&|config| config.host_policy = Retention::Release);
    world.pause(&Selection::All).unwrap();
    world.resume(&Selection::All).unwrap();
    // In host memory of its own.
    addrs.push(world.allocate(world.twins[&addrs[0]].region, SIZE).unwrap());
    world.write(addrs[1]);
    world.pause(&Selection::All).unwrap();
    world.engine.configure(&|config| config.host_limit = Some(2 * SIZE));
    // The buffer comes in when there is room on the disk, and before anything is written there.
    world.driver.at_next("register_host", || limit_files(SIZE));
    assert_eq!(world.engine.tend().bytes_demoted, SIZE);
    limit_files(u64::MAX);
    let reserved = figure(&world, "host", "reserved_bytes");
    assert_eq!((used(&world, "host"), reserved, used(&world, "disk")), (SIZE, SIZE, 2 * SIZE));
    // Both are written to where they are.
    world.engine.configure(&|config| config.host_limit = Some(SIZE));
    world.resume(&Selection::All).unwrap();
    addrs.iter().for_each(|&addr| world.write_part(addr, 5, 1));
    world.pause(&Selection::All).unwrap();
    assert_eq!((used(&world, "host"), used(&world, "disk")), (SIZE, 2 * SIZE));
    world.resume_and_check();
}

#[test]
fn a_thread_tends_backups_after_a_pause() {
    let (mut world, _) = automatic(&["disk"], policy(Backup::Disk));
    world.engine.configure(&|config| (config.disk_compress, config.tends) = (Compress::Always, true));
    world.pause(&Selection::All).unwrap();
    let full = SIZE;
    let until = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while used(&world, "disk") >= full && std::time::Instant::now() < until {
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    assert!(used(&world, "disk") < full);
    world.resume(&Selection::All).unwrap();
    world.check();
}

/// In the middle of a move the program has its memory back, changes it, and has it paused again: what was moved is from before, and is put nowhere. Nor is
/// what is being read written to: a verified region, which would do that, takes new room.
#[test]
fn a_backup_that_was_replaced_while_it_moved_is_not_put_back() {
    for (promotes, clean) in [(false, Clean::No), (true, Clean::No), (false, Clean::Verified)] {
        let (mut world, addrs) = automatic(&["a"], Policy { clean, ..policy(Backup::Auto) });
        let scarce = |world: &World, limit| world.engine.configure(&|config| config.host_limit = limit);
        world.pause(&Selection::All).unwrap();
        if promotes {
            scarce(&world, Some(CHUNK));
            assert_eq!(world.engine.tend().bytes_demoted, SIZE);
        }
        scarce(&world, if promotes { None } else { Some(SIZE / 2) });
        let bytes: Vec<u8> = world.twins[&addrs[0]].bytes.iter().map(|byte| !byte).collect();
        world.twins.get_mut(&addrs[0]).unwrap().bytes = bytes.clone();
        let engine = Arc::new(world.engine);
        let (driver, inside, came) = (world.driver.clone(), Arc::downgrade(&engine), Arc::new(AtomicBool::new(false)));
        let (comes, addr) = (Arc::clone(&came), addrs[0]);
        // Both moves have host memory brought in after they have looked, and before they write.
        world.driver.at_next("register_host", move || {
            let engine = inside.upgrade().unwrap();
            engine.resume(&Selection::All, ResumeOptions::default()).unwrap();
            driver.poke(Device(0), addr, &bytes).unwrap();
            engine.configure(&|config| config.host_limit = None);
            engine.pause(&Selection::All, PauseOptions::default()).unwrap();
            comes.store(true, Ordering::SeqCst);
        });
        let moved = if promotes { engine.promote(&tag("a")) } else { Ok(engine.tend().bytes_demoted) };
        assert_eq!((moved, came.load(Ordering::SeqCst)), (Ok(0), true), "promotes: {promotes}, {clean:?}");
        world.engine = Arc::into_inner(engine).unwrap();
        world.resume(&Selection::All).unwrap();
        world.check();
        world.check_no_leak();
    }
}

const GROUPS: &str = "/sys/fs/cgroup";

#[test]
fn a_control_group_that_is_nearly_full_makes_backups_move() {
    let mine = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let counts_memory = |line: &str| {
        line.starts_with("0::") || line.split(':').nth(1).is_some_and(|all| all.split(',').any(|one| one == "memory"))
    };
    if !Path::new(GROUPS).exists() || !mine.lines().any(counts_memory) {
        return eprintln!("this process is in no control group for memory");
    }
    run_with_own(Path::new(GROUPS), "size=1m", "tend::nearly_full_group");
}

/// What the files of control groups say that is left, in both versions.
fn leave(bytes: u64) {
    const USED: u64 = 1 << 30;
    let old = Path::new(GROUPS).join("memory");
    fs::create_dir_all(&old).unwrap();
    for (name, bytes) in [("memory.current", USED), ("memory.max", USED + bytes)] {
        fs::write(Path::new(GROUPS).join(name), bytes.to_string()).unwrap();
    }
    for (name, bytes) in [("memory.usage_in_bytes", USED), ("memory.limit_in_bytes", USED + bytes)] {
        fs::write(old.join(name), bytes.to_string()).unwrap();
    }
}

/// The child's program.
#[test]
#[ignore = "a part of another test"]
fn nearly_full_group() {
    if place().is_none() {
        return;
    }
    leave(64 * SIZE);
    let tags = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l"];
    let (mut world, _) = automatic(&tags, policy(Backup::Auto));
    // A disk that is no memory.
    let disk = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    world.engine.configure(&|config| config.disk_dir = Some(disk.path().to_path_buf()));
    // The last of these was used first.
    for tag_of in tags.iter().rev() {
        world.pause(&tag(tag_of)).unwrap();
    }
    assert_eq!((used(&world, "disk"), world.engine.tend().bytes_demoted), (0, 0));
    // More than 90 % of what there is are backups now; without the three that were used first it is less than 75 %.
    leave(SIZE * 5 / 4);
    assert_eq!(world.engine.tend().bytes_demoted, 3 * SIZE);
    assert_eq!(stored(&world), ["j", "k", "l"]);
    // What there is no room for goes to the disk at once.
    let region = world.region("z/large", policy(Backup::Auto));
    let addr = world.allocate(region, 2 * SIZE).unwrap();
    world.write(addr);
    world.pause(&tag("z/large")).unwrap();
    assert_eq!(used(&world, "disk"), 5 * SIZE);
    leave(64 * SIZE);
    assert_eq!(world.engine.tend().bytes_demoted, 0);
    world.resume(&Selection::All).unwrap();
    world.check();
    world.check_no_leak();
}

/// The tags of regions whose backups are wholly outside host memory.
fn stored(world: &World) -> Vec<String> {
    let stats: serde_json::Value = serde_json::from_str(&world.engine.stats_json()).unwrap();
    let regions = stats["regions"].as_array().unwrap().iter();
    let found = regions.filter(|region| region["stored_bytes"] == SIZE);
    found.map(|region| region["tag"].as_str().unwrap().to_owned()).collect()
}
