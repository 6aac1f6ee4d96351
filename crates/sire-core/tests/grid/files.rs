//! Files of the program's as backups: what they are proven to hold takes no room, what they do not hold is kept elsewhere, and a file
//! that was changed is noticed before a wrong byte reaches the device.

use crate::common::GRANULARITY;
use crate::common::world::{CHUNK, World, policy, tag};
use sire_core::driver::Addr;
use sire_core::engine::*;
use sire_core::error::Status;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};

/// Tensors rarely begin at a round offset of their file.
const AT: u64 = 1237;
const SIZE: u64 = 2 * CHUNK + GRANULARITY + 100;

struct Life {
    world: World,
    region: RegionId,
    addr: Addr,
    path: PathBuf,
    dir: tempfile::TempDir,
}

impl Life {
    /// One of a region whose backup is in files, and one of a region with automatic backup.
    fn each(clean: Clean) -> impl Iterator<Item = Life> {
        [Backup::File, Backup::Auto].into_iter().map(move |backup| Life::of(Policy { clean, ..policy(backup) }))
    }

    fn of(policy: Policy) -> Life {
        Life::attached(policy, SIZE)
    }

    /// The file is said to hold the first `len` bytes.
    fn attached(policy: Policy, len: u64) -> Life {
        let mut world = World::new(1 << 22);
        let region = world.region("weights", policy);
        let addr = world.allocate(region, SIZE).unwrap();
        world.write(addr);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("weights.bin");
        fs::write(&path, file(&world.twins[&addr].bytes)).unwrap();
        world.engine.attach_file(addr, len, &path, AT).unwrap();
        Life { world, region, addr, path, dir }
    }

    fn pause(&mut self) -> Report {
        let report = self.world.pause(&tag("weights")).unwrap();
        self.world.check();
        report
    }

    fn resume(&mut self) {
        self.world.resume(&tag("weights")).unwrap();
        self.world.check();
    }

    fn used(&self, tier: &str) -> u64 {
        let stats: serde_json::Value = serde_json::from_str(&self.world.engine.stats_json()).unwrap();
        let tiers = stats["tiers"].as_array().unwrap();
        tiers.iter().find(|found| found["tier"] == tier).unwrap()["used_bytes"].as_u64().unwrap()
    }

    /// Bytes of the region's backup that are outside host memory.
    fn stored(&self) -> u64 {
        let stats: serde_json::Value = serde_json::from_str(&self.world.engine.stats_json()).unwrap();
        stats["regions"][0]["stored_bytes"].as_u64().unwrap()
    }

    /// The program writes one byte of the device's memory.
    fn poke(&mut self, offset: u64) {
        let twin = self.world.twins.get_mut(&self.addr).unwrap();
        twin.bytes[offset as usize] ^= 0x40;
        let byte = twin.bytes[offset as usize];
        self.world.driver.poke(twin.device, self.addr.offset(offset), &[byte]).unwrap();
    }

    /// Somebody flips one bit of the file; twice, and it is as before.
    fn damage(&self, offset: u64) {
        let file = OpenOptions::new().read(true).write(true).open(&self.path).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, AT + offset).unwrap();
        file.write_all_at(&[byte[0] ^ 1], AT + offset).unwrap();
    }
}

/// A header, the bytes, and something behind them.
fn file(bytes: &[u8]) -> Vec<u8> {
    [vec![0xAA; AT as usize], bytes.to_vec(), vec![0xBB; 5]].concat()
}

#[test]
fn what_a_file_holds_takes_no_room() {
    for mut life in Life::each(Clean::No) {
        for _ in 0..2 {
            let report = life.pause();
            assert_eq!((report.bytes_copied, report.bytes_hashed, report.bytes_clean), (0, SIZE, SIZE));
            assert_eq!((life.used("host"), life.used("disk"), life.used("file")), (0, 0, SIZE));
            life.resume();
        }
        life.world.check_no_leak();
    }
}

#[test]
fn what_is_declared_not_to_change_is_compared_once() {
    for mut life in Life::each(Clean::Declared) {
        assert_eq!(life.pause().bytes_hashed, SIZE);
        life.resume();
        let report = life.pause();
        assert_eq!((report.bytes_hashed, report.bytes_copied, report.bytes_clean), (0, 0, SIZE));
        life.resume();
    }
}

/// A pre-copy forgot what files were proven to hold: the next pause read all of it again, and kept no copy of what the files do not hold.
#[test]
fn what_was_proven_stays_proven_through_a_pre_copy() {
    let auto = [Clean::Declared, Clean::Verified, Clean::Paranoid].map(|clean| (Backup::Auto, clean));
    for (backup, clean) in auto.into_iter().chain([(Backup::File, Clean::Declared)]) {
        let mut life = Life::of(Policy { clean, ..policy(backup) });
        life.poke(CHUNK + 5);
        life.pause();
        let (file, other) = (life.used("file"), life.used("host") + life.used("disk"));
        life.resume();
        let ahead = life.world.engine.pre_copy(&tag("weights"), false).unwrap();
        assert_eq!((ahead.bytes_copied, ahead.bytes_clean), (0, SIZE), "{backup:?}, {clean:?}");
        assert_eq!((life.used("file"), life.used("host") + life.used("disk")), (file, other));
        let hashed = if clean == Clean::Declared { 0 } else { SIZE };
        let report = life.pause();
        assert_eq!((report.bytes_copied, report.bytes_hashed, report.bytes_clean), (0, hashed, SIZE), "{clean:?}");
        life.resume();
        life.poke(CHUNK / 2);
        life.world.engine.changed(life.addr.offset(CHUNK / 2), 1).unwrap();
        assert!(life.world.engine.pre_copy(&tag("weights"), false).unwrap().bytes_copied > 0);
        assert!(life.pause().bytes_copied <= GRANULARITY, "{clean:?}: what the file is found not to hold");
        life.resume();
        life.world.check_no_leak();
    }
}

/// A pause hashes what no file holds: what that needs is there before memory is short.
#[test]
fn hashing_is_made_ready_with_the_first_memory() {
    for clean in [Clean::No, Clean::Declared, Clean::Verified] {
        let life = Life::of(Policy { clean, ..policy(Backup::File) });
        assert!(life.world.driver.log().contains(&"hash"), "{clean:?}");
    }
}

#[test]
fn what_the_file_does_not_hold_is_kept_in_host_memory() {
    for mut life in [Clean::No, Clean::Declared].into_iter().flat_map(Life::each) {
        life.poke(CHUNK + 1);
        assert_eq!(life.pause().bytes_copied, GRANULARITY);
        assert_eq!(life.used("file"), SIZE);
        life.resume();
        life.pause();
        life.resume();
    }
}

#[test]
fn a_change_on_the_device_is_found_by_the_next_pause() {
    for mut life in Life::each(Clean::No) {
        life.pause();
        life.resume();
        life.poke(0);
        assert_eq!(life.pause().bytes_copied, GRANULARITY);
        life.resume();
        life.poke(3);
        life.poke(SIZE - 1);
        life.pause();
        life.resume();
    }
}

#[test]
fn a_file_changed_while_paused_is_refused_until_it_is_put_back() {
    for mut life in Life::each(Clean::Declared) {
        life.pause();
        life.damage(CHUNK);
        let error = life.world.resume(&tag("weights")).unwrap_err();
        assert_eq!(error.status, Status::BackupIo);
        assert!(error.message.contains("was changed") && error.message.contains("device was not touched"), "{error}");
        life.damage(CHUNK);
        life.resume();
    }
}

#[test]
fn a_file_cut_short_while_paused_is_an_error_and_not_a_signal() {
    for mut life in Life::each(Clean::No) {
        life.pause();
        let whole = fs::read(&life.path).unwrap();
        let file = OpenOptions::new().write(true).open(&life.path).unwrap();
        for len in [0, AT + CHUNK] {
            file.set_len(len).unwrap();
            let error = life.world.resume(&tag("weights")).unwrap_err();
            assert_eq!(error.status, Status::BackupIo);
            assert!(error.message.contains("weights.bin"), "{error}");
        }
        file.write_all_at(&whole, 0).unwrap();
        life.resume();
    }
}

#[test]
fn a_name_that_goes_to_another_file_does_not_matter() {
    for mut life in Life::each(Clean::No) {
        life.pause();
        let other = life.dir.path().join("other");
        fs::write(&other, b"shorter").unwrap();
        fs::rename(other, &life.path).unwrap();
        life.resume();
        fs::remove_file(&life.path).unwrap();
        life.pause();
        life.resume();
    }
}

#[test]
fn a_file_changed_while_resident_proves_nothing_any_more() {
    for mut life in Life::each(Clean::Declared) {
        life.pause();
        life.resume();
        life.damage(5);
        let report = life.pause();
        assert!(report.bytes_hashed >= SIZE);
        assert_eq!(report.bytes_copied, GRANULARITY);
        life.resume();
    }
}

#[test]
fn small_allocations_have_files_too_until_they_are_freed() {
    for mut life in Life::each(Clean::No) {
        let small = [300, 700].map(|size| life.world.allocate(life.region, size).unwrap());
        small.iter().for_each(|&addr| life.world.write(addr));
        for (name, addr) in ["a", "b"].iter().zip(small) {
            let bytes = &life.world.twins[&addr].bytes;
            let path = life.dir.path().join(name);
            fs::write(&path, file(bytes)).unwrap();
            life.world.engine.attach_file(addr, bytes.len() as u64, &path, AT).unwrap();
        }
        life.pause();
        assert_eq!(life.used("file"), SIZE + 1000);
        life.resume();
        life.world.free(small[0]).unwrap();
        assert_eq!(life.used("file"), SIZE + 700);
        life.pause();
        life.resume();
        let again = life.world.allocate(life.region, 300).unwrap();
        life.world.write(again);
        life.pause();
        life.resume();
    }
}

/// Lines of this process's map of addresses that name the file.
fn mappings(path: &Path) -> usize {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|line| line.ends_with(path.to_str().unwrap())).count()
}

/// Says so at its end, however that comes.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}

#[test]
fn a_file_is_never_mapped() {
    assert!(mappings(&std::env::current_exe().unwrap()) > 0, "the map is not read as it is written");
    for mut life in Life::each(Clean::No) {
        let (done, looks) = (AtomicBool::new(false), AtomicUsize::new(0));
        let path = life.path.canonicalize().unwrap();
        std::thread::scope(|scope| {
            let _ends = Ends(&done);
            let look = || {
                while !done.load(SeqCst) {
                    assert_eq!(mappings(&path), 0);
                    looks.fetch_add(1, SeqCst);
                }
            };
            let watcher = scope.spawn(look);
            // Until it was looked at during many pauses and resumes, and at rest between them.
            while looks.load(SeqCst) < 100 && !watcher.is_finished() {
                life.pause();
                assert_eq!(mappings(&path), 0);
                life.resume();
                assert_eq!(mappings(&path), 0);
            }
        });
    }
}

#[test]
fn what_cannot_be_is_refused() {
    for mut life in Life::each(Clean::No) {
        let engine = &life.world.engine;
        let status = |outcome: Result<(), sire_core::error::Error>| outcome.unwrap_err().status;
        assert_eq!(status(engine.attach_file(life.addr, SIZE + 1, &life.path, 0)), Status::UnknownAddress);
        let error = engine.attach_file(life.addr, SIZE, &life.path, AT + 6).unwrap_err();
        assert_eq!(error.status, Status::InvalidArgument);
        assert!(
            error.message.contains("bytes at 1243 are not inside") && error.message.contains("which has"),
            "{error}"
        );
        assert_eq!(status(engine.attach_file(life.addr, 1, &life.dir.path().join("none"), 0)), Status::BackupIo);
        assert_eq!(status(engine.attach_file(life.addr, 1, life.dir.path(), 0)), Status::BackupIo);
        let host = life.world.region("host", policy(Backup::Host));
        let addr = life.world.allocate(host, 8192).unwrap();
        assert_eq!(status(life.world.engine.attach_file(addr, 1, &life.path, 0)), Status::InvalidArgument);
    }
}

#[test]
fn what_was_attached_last_counts() {
    for mut life in Life::each(Clean::No) {
        let other = life.dir.path().join("other");
        fs::write(&other, &life.world.twins[&life.addr].bytes[..100]).unwrap();
        life.world.engine.attach_file(life.addr, 100, &other, 0).unwrap();
        assert_eq!(life.pause().bytes_copied, 0);
        fs::write(&other, vec![0; 100]).unwrap();
        assert_eq!(life.world.resume(&tag("weights")).unwrap_err().status, Status::BackupIo);
        fs::write(&other, &life.world.twins[&life.addr].bytes[..100]).unwrap();
        life.resume();
    }
}

/// What a file holds of a region with automatic backup.
const HALF: u64 = CHUNK + 100;

#[test]
fn an_automatic_backup_puts_the_rest_where_there_is_room() {
    for (limit, tier) in [(None, "host"), (Some(0), "disk")] {
        let mut life = Life::attached(policy(Backup::Auto), HALF);
        life.world.engine.configure(&|config| config.host_limit = limit);
        for _ in 0..2 {
            let report = life.pause();
            assert_eq!((report.bytes_copied, report.bytes_clean), (SIZE - HALF, HALF));
            assert_eq!(life.used("file"), HALF);
            let (used, other) = (life.used(tier), life.used(if tier == "host" { "disk" } else { "host" }));
            assert!((SIZE - HALF..SIZE - HALF + 2 * GRANULARITY).contains(&used) && other == 0, "{used} {other}");
            life.resume();
            // Where nothing is to be retained, only what costs nothing is: the next pause need not read the file.
            assert_eq!((life.used("host"), life.used("disk"), life.stored()), (0, 0, HALF));
        }
        life.world.check_no_leak();
    }
}

#[test]
fn what_is_verified_beside_a_file_is_not_copied_again() {
    for clean in [Clean::Declared, Clean::Verified, Clean::Paranoid] {
        let mut life = Life::attached(Policy { clean, ..policy(Backup::Auto) }, HALF);
        assert_eq!(life.pause().bytes_copied, SIZE - HALF);
        life.resume();
        let report = life.pause();
        assert_eq!((report.bytes_copied, report.bytes_clean), (0, SIZE), "{clean:?}");
        assert_eq!(report.bytes_hashed, if clean == Clean::Declared { 0 } else { SIZE });
        life.resume();
    }
}

#[test]
fn a_file_that_is_named_later_takes_the_place_of_another_backup() {
    for clean in [Clean::No, Clean::Declared, Clean::Verified] {
        let mut world = World::new(1 << 22);
        let region = world.region("weights", Policy { clean, retain: true, ..policy(Backup::Auto) });
        let addr = world.allocate(region, SIZE).unwrap();
        world.write(addr);
        for limit in [None, Some(0)] {
            world.engine.configure(&|config| config.host_limit = limit);
            world.pause(&Selection::All).unwrap();
            world.resume(&Selection::All).unwrap();
            world.check();
            world.write_part(addr, 5, 1);
        }
        world.attach(addr, 0, SIZE, false).unwrap();
        let report = world.pause(&Selection::All).unwrap();
        assert_eq!((report.bytes_copied, report.bytes_clean), (0, SIZE), "{clean:?}");
        world.resume(&Selection::All).unwrap();
        world.check();
        world.check_no_leak();
    }
}

#[test]
fn what_is_promoted_comes_from_host_memory_and_goes_back_to_the_file() {
    let mut life = Life::of(Policy { clean: Clean::Declared, ..policy(Backup::Auto) });
    life.pause();
    assert_eq!(life.world.engine.promote(&Selection::All), Ok(SIZE));
    assert!(life.used("host") >= SIZE);
    life.damage(9);
    life.resume();
    life.damage(9);
    assert_eq!(life.pause().bytes_copied, 0);
    assert_eq!(life.used("host"), 0);
    life.resume();
}

/// A block that is given out again is attached to nothing, whatever its neighbour in time was; where it had the same bytes it was taken for backed
/// up by that file, of which nobody looked any more whether it changed.
#[test]
fn a_file_of_which_nothing_is_said_any_more_is_no_backup() {
    for backup in [Backup::File, Backup::Auto] {
        for clean in [Clean::No, Clean::Verified] {
            let mut world = World::new(1 << 22);
            world.cached = true;
            let region = world.region("weights", Policy { clean, ..policy(backup) });
            let addr = world.allocate(region, SIZE).unwrap();
            world.write(addr);
            let bytes = world.twins[&addr].bytes.clone();
            let path = world.attach(addr, 0, SIZE, false).unwrap();
            world.pause(&tag("weights")).unwrap();
            world.resume(&tag("weights")).unwrap();
            world.free(addr).unwrap();
            assert_eq!(world.allocate(region, SIZE).unwrap(), addr);
            world.write_bytes(addr, 0, &bytes);
            fs::write(&path, b"saved anew").unwrap();
            world.pause(&tag("weights")).unwrap();
            world.resume(&tag("weights")).unwrap();
            world.check();
            world.check_no_leak();
        }
    }
}
