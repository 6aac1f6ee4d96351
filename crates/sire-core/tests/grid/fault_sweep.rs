//! Every driver call of a scripted life fails once, and every pair of calls, inside the undo as well. Afterwards
//! every byte that had a backup is compared with the oracle, every failed step has been repeated, and
//! nothing is left in the driver. A sweep over pairs is a few ten thousand lives, so the script is short and its
//! memory tiny; `SIRE_SWEEP=full` runs all pairs of the long script too.

use crate::common::GRANULARITY;
use crate::common::world::{CHUNK, World, policy, tag};
use sire_core::driver::{Addr, Device, DriverErrorKind};
use sire_core::engine::*;
use sire_core::error::{Error, Status};

/// Copies that are under way at once.
const IN_FLIGHT: u64 = 2;

/// A step fails at most this often with two planned faults, so that it must succeed in the end.
const ATTEMPTS: usize = 4;

/// One life: what it does until it is done, through all failures.
struct Life {
    world: World,
}

impl Life {
    fn new() -> Life {
        Life { world: World::new(1 << 22) }
    }

    /// Repeats a step until it succeeds; after each attempt everything promised is there.
    fn step<T>(&mut self, name: &str, mut step: impl FnMut(&mut World) -> Result<T, Error>) -> T {
        for _ in 0..ATTEMPTS {
            let outcome = step(&mut self.world);
            self.world.check();
            match outcome {
                Ok(value) => return value,
                Err(e) => assert_ne!(e.status, Status::Internal, "{name}: {e}"),
            }
        }
        panic!("{name} still fails after {ATTEMPTS} attempts");
    }

    fn allocate(&mut self, region: RegionId, size: u64) -> Addr {
        let addr = self.step("allocate", |world| world.allocate(region, size));
        self.world.write(addr);
        addr
    }

    fn pause(&mut self, selection: &Selection) {
        self.step("pause", |world| world.pause(selection));
        let paused = self.world.states().values().all(|state| *state == State::Paused);
        assert!(paused || *selection != Selection::All);
    }

    fn switch(&mut self, pause: &Selection, resume: &Selection) {
        self.step("switch", |world| world.switch(pause, resume));
    }

    fn resume(&mut self, selection: &Selection) {
        self.step("resume", |world| world.resume(selection));
    }
}

/// A switch there and back on a device that cannot hold both: content out and in, something that is only discarded, one chunk that changes
/// hands, one of another size that waits for credit.
fn short_switch(life: &mut Life) {
    life.world.driver.set_capacity(3 * CHUNK + 2 * GRANULARITY);
    let a = life.world.region("a", policy(Backup::Host));
    let b = life.world.region("b", policy(Backup::Host));
    let cache = life.world.region("b/cache", policy(Backup::None));
    life.allocate(a, 2 * CHUNK);
    life.pause(&tag("a"));
    life.allocate(b, CHUNK + GRANULARITY);
    life.allocate(cache, CHUNK);
    life.switch(&tag("b"), &tag("a"));
    life.switch(&tag("a"), &tag("b"));
}

/// The same with a backup on disk on one side, and two devices.
fn short_switch_on_disk(life: &mut Life) {
    life.world.driver.set_capacity(CHUNK + GRANULARITY);
    let a = life.world.region("a", policy(Backup::Disk));
    let b = life.world.region("b", policy(Backup::Host));
    life.allocate(a, CHUNK);
    life.pause(&tag("a"));
    life.allocate(b, CHUNK);
    let there = Request { device: Device(1), ..World::request(b, 600) };
    let there = life.step("allocate", |world| world.allocate_as(there));
    life.world.write(there);
    life.switch(&tag("b"), &tag("a"));
}

type Script = fn(&mut Life);

/// Three policies, several chunks, a slab; partial pauses; frees while resident and while paused.
fn long(life: &mut Life) {
    let host = life.world.region("m/host", policy(Backup::Host));
    let disk = life.world.region("m/disk", policy(Backup::Disk));
    let none = life.world.region("none", Policy { zero_fill: true, ..Policy::default() });
    let a = life.allocate(host, 2 * CHUNK + GRANULARITY);
    let b = life.allocate(host, 700);
    let c = life.allocate(disk, CHUNK + 1);
    life.allocate(none, CHUNK);
    life.pause(&tag("m"));
    life.step("free", |world| world.free(b));
    life.resume(&tag("m/host"));
    life.pause(&Selection::All);
    life.resume(&Selection::All);
    life.step("free", |world| world.free(c));
    life.world.write(a);
    life.pause(&tag("m"));
    life.step("free", |world| world.free(a));
    life.resume(&Selection::All);
}

/// One host-backed allocation of two chunks: the smallest life with a partial undo.
fn short_host(life: &mut Life) {
    let region = life.world.region("host", policy(Backup::Host));
    let addr = life.allocate(region, CHUNK + GRANULARITY);
    life.pause(&tag("host"));
    life.resume(&tag("host"));
    life.world.check();
    life.step("free", |world| world.free(addr));
}

/// The same on disk, with a slab and retained space.
fn short_disk(life: &mut Life) {
    let retaining = Policy { backup: Backup::Disk, zero_fill: false, retain: true, ..Policy::default() };
    let region = life.world.region("disk", retaining);
    life.allocate(region, CHUNK + GRANULARITY);
    life.allocate(region, 600);
    life.pause(&tag("disk"));
    life.resume(&tag("disk"));
}

/// A mixture in one region: what is kept, what is discarded, what is zeroed.
fn short_mixed(life: &mut Life) {
    let region = life.world.region("mixed", Policy { zero_fill: true, ..Policy::default() });
    let addr = life.allocate(region, 2 * CHUNK);
    life.world.set_override(addr, CHUNK - 100, 50, true);
    life.pause(&tag("mixed"));
    life.resume(&tag("mixed"));
}

/// What is thrown away has a dummy behind it while it is away: two chunks, and a free while paused.
fn short_veiled(life: &mut Life) {
    life.world.engine.configure(&|config| config.dummies = true);
    let region = life.world.region("veiled", policy(Backup::None));
    let addr = life.allocate(region, CHUNK + GRANULARITY);
    let gone = life.allocate(region, GRANULARITY);
    life.pause(&tag("veiled"));
    life.step("free", |world| world.free(gone));
    life.resume(&tag("veiled"));
    life.world.write(addr);
    life.world.check();
}

/// Clean backups: what has not changed is not copied, what has changed, is new or was given out again is.
fn clean(life: &mut Life, clean: Clean, backup: Backup) {
    let region = life.world.region("clean", Policy { backup, clean, ..Policy::default() });
    let addr = life.allocate(region, CHUNK + 2 * GRANULARITY);
    let slot = life.allocate(region, 600);
    life.pause(&tag("clean"));
    life.resume(&tag("clean"));
    life.world.write_part(addr, GRANULARITY + 1, 10);
    life.step("free", |world| world.free(slot));
    life.allocate(region, 500);
    life.pause(&tag("clean"));
    life.resume(&tag("clean"));
    life.world.check();
}

fn short_declared(life: &mut Life) {
    clean(life, Clean::Declared, Backup::Host);
}

fn short_verified(life: &mut Life) {
    clean(life, Clean::Verified, Backup::Host);
}

fn short_verified_on_disk(life: &mut Life) {
    clean(life, Clean::Verified, Backup::Disk);
}

fn short_paranoid(life: &mut Life) {
    clean(life, Clean::Paranoid, Backup::Host);
}

/// Constant pages, and pages that two regions have in common, before and after one of them changes.
fn short_shared(life: &mut Life) {
    let policy = Policy { backup: Backup::Host, clean: Clean::Verified, ..Policy::default() };
    let regions = [life.world.region("one", policy), life.world.region("other", policy)];
    let content: Vec<u8> = (0..CHUNK).map(|i| (i / 13 % 251) as u8).collect();
    let addrs = regions.map(|region| life.allocate(region, CHUNK + GRANULARITY));
    let half = CHUNK / 2;
    for addr in addrs {
        life.world.write_repeated(addr, &content);
        life.world.write_constant(addr, half, half, [0, 1, 2, 3, 4, 5, 6, 7]);
        life.pause(&Selection::All);
        life.resume(&Selection::All);
    }
    life.world.write_part(addrs[0], 1, 1);
    life.pause(&Selection::All);
    life.step("free", |world| world.free(addrs[0]));
    life.resume(&Selection::All);
    life.world.check();
}

fn short_declared_on_disk(life: &mut Life) {
    clean(life, Clean::Declared, Backup::Disk);
}

/// A resume in the background, of two allocations.
fn short_behind(life: &mut Life) {
    let region = life.world.region("host", policy(Backup::Host));
    let addr = life.allocate(region, CHUNK + GRANULARITY);
    life.allocate(region, 4096);
    life.pause(&tag("host"));
    life.step("resume", |world| world.resume_behind(&tag("host")));
    life.world.write(addr);
    life.pause(&tag("host"));
    life.resume(&tag("host"));
}

/// A resume in the background, for which a stream of the program's waits when the copies are queued and have not landed. A single chunk is made before
/// copies begin, so that this is so in every life.
fn short_streamed(life: &mut Life) {
    let region = life.world.region("host", policy(Backup::Host));
    let addr = life.allocate(region, CHUNK);
    life.pause(&tag("host"));
    let sent = CHUNK / GRANULARITY - IN_FLIGHT;
    life.step("resume", |world| world.resume_for_stream(&tag("host"), (addr, CHUNK), sent));
    life.world.write(addr);
    life.pause(&tag("host"));
    life.resume(&tag("host"));
}

/// Automatic backups: one finds host memory full; then one makes way, is compressed, and comes back into host memory.
fn short_auto(life: &mut Life) {
    let host_limit = |life: &mut Life, limit| life.world.engine.configure(&move |config| config.host_limit = limit);
    life.world.engine.configure(&|config| config.disk_compress = Compress::Always);
    for tag_of in ["auto/a", "auto/b"] {
        let region = life.world.region(tag_of, policy(Backup::Auto));
        life.allocate(region, CHUNK + GRANULARITY);
    }
    host_limit(life, Some(CHUNK + 4 * GRANULARITY));
    life.pause(&tag("auto"));
    life.world.engine.tend();
    host_limit(life, None);
    life.step("promote", |world| world.engine.promote(&Selection::All));
    host_limit(life, Some(GRANULARITY));
    life.world.engine.tend();
    host_limit(life, None);
    life.resume(&tag("auto"));
    life.world.check();
}

/// Backups in memory that processes share.
fn short_between_processes(life: &mut Life) {
    life.world.engine.configure(&|config| (config.shared_backups, config.shared_dir) = (true, config.disk_dir.clone()));
    clean(life, Clean::Declared, Backup::Host);
}

/// A file that holds a part of an allocation, and another that holds other bytes than it is said to.
fn in_files(life: &mut Life, clean: Clean, backup: Backup) {
    let region = life.world.region("file", Policy { clean, ..policy(backup) });
    let addr = life.allocate(region, CHUNK + 2 * GRANULARITY);
    let slot = life.allocate(region, 600);
    life.world.attach(addr, 100, CHUNK, false).unwrap();
    life.world.attach(slot, 0, 600, true).unwrap();
    life.pause(&tag("file"));
    life.resume(&tag("file"));
    life.world.write_part(addr, GRANULARITY + 1, 10);
    life.pause(&tag("file"));
    life.step("free", |world| world.free(slot));
    life.resume(&tag("file"));
    life.world.check();
}

fn short_file(life: &mut Life) {
    in_files(life, Clean::No, Backup::File);
}

fn short_declared_file(life: &mut Life) {
    in_files(life, Clean::Declared, Backup::File);
}

fn short_automatic_file(life: &mut Life) {
    in_files(life, Clean::No, Backup::Auto);
}

fn short_verified_automatic_file(life: &mut Life) {
    in_files(life, Clean::Verified, Backup::Auto);
}

/// Backups made ahead, of which a part changes before the next, and before the pause.
fn ahead(life: &mut Life, clean: Clean, backup: Backup) {
    let region = life.world.region("ahead", Policy { backup, clean, ..Policy::default() });
    let addr = life.allocate(region, 5 * CHUNK);
    let slot = life.allocate(region, 600);
    life.world.write_constant(addr, 2 * CHUNK, 3 * CHUNK - GRANULARITY, [9; 8]);
    life.step("pre-copy", |world| world.engine.pre_copy(&tag("ahead"), false));
    life.world.write_part(addr, GRANULARITY + 1, 10);
    life.step("pre-copy", |world| world.engine.pre_copy(&tag("ahead"), false));
    life.world.write_part(addr, 5 * CHUNK - 9, 9);
    life.step("free", |world| world.free(slot));
    life.pause(&tag("ahead"));
    life.resume(&tag("ahead"));
    life.world.check();
}

fn short_ahead_declared(life: &mut Life) {
    ahead(life, Clean::Declared, Backup::Host);
}

fn short_ahead_verified(life: &mut Life) {
    ahead(life, Clean::Verified, Backup::Host);
}

fn short_ahead_on_disk(life: &mut Life) {
    ahead(life, Clean::Paranoid, Backup::Disk);
}

/// Memory that stays until somebody needs it: nobody does, an allocation does, a resume does, a pause says so. The device cannot hold both.
fn lazy(life: &mut Life, backup: Backup) {
    life.world.driver.set_capacity(3 * CHUNK);
    let a = life.world.region("a", policy(backup));
    let zeroed = life.world.region("a/zeroed", Policy { zero_fill: true, ..Policy::default() });
    let b = life.world.region("b", policy(Backup::Host));
    let addr = life.allocate(a, CHUNK + GRANULARITY);
    life.allocate(zeroed, 2 * GRANULARITY);
    life.step("lazy pause", |world| world.pause_lazily(&tag("a")));
    life.resume(&tag("a"));
    life.world.write(addr);
    life.step("lazy pause", |world| world.pause_lazily(&tag("a")));
    life.allocate(b, 2 * CHUNK);
    life.step("lazy pause", |world| world.pause_lazily(&tag("b")));
    life.resume(&tag("a"));
    life.step("lazy pause", |world| world.pause_lazily(&tag("a")));
    life.pause(&Selection::All);
    life.resume(&tag("b"));
    life.world.check();
}

fn short_lazy(life: &mut Life) {
    lazy(life, Backup::Host);
}

fn short_lazy_on_disk(life: &mut Life) {
    lazy(life, Backup::Disk);
}

/// A pool of which the program holds a part free.
fn short_dead(life: &mut Life) {
    const HOLE: u64 = 2 * GRANULARITY;
    let region = life.world.region("pool", policy(Backup::Host));
    let addr = life.allocate(region, HOLE + 2 * GRANULARITY);
    life.step("pause", |world| world.pause_without(&tag("pool"), &[(addr.offset(GRANULARITY), HOLE)]));
    life.resume(&tag("pool"));
    life.step("free", |world| world.free(addr));
}

/// Of two allocations one stays, of a slab's two slots both; one that stayed is freed while the rest is paused.
fn short_resident(life: &mut Life) {
    let region = life.world.region("mixed", Policy { pageable: true, ..policy(Backup::Host) });
    let stays = life.allocate(region, CHUNK + 1);
    let goes = life.allocate(region, CHUNK);
    let slots = [600, 600].map(|size| life.allocate(region, size));
    for addr in [stays, slots[0]] {
        life.step("keep resident", |world| world.keep_resident(addr));
    }
    life.pause(&tag("mixed"));
    life.world.write(stays);
    life.step("free", |world| world.free(slots[0]));
    life.resume(&tag("mixed"));
    life.pause(&tag("mixed"));
    life.step("free", |world| world.free(stays));
    life.step("free", |world| world.free(goes));
    life.resume(&tag("mixed"));
}

/// A peer is allowed, over a pause, and refused again; what it may do is what was said last, in everything that is there.
fn short_peer(life: &mut Life) {
    let (here, there) = (Device(0), Device(1));
    let region = life.world.region("shared", policy(Backup::Host));
    let addrs = [CHUNK + GRANULARITY, 700].map(|size| life.allocate(region, size));
    let check = |life: &Life, may: bool| {
        assert!(addrs.iter().all(|addr| life.world.driver.peek(there, *addr, 1).is_ok() == may), "it may: {may}");
    };
    life.step("allow", |world| world.engine.allow_peer(here, there));
    check(life, true);
    life.pause(&tag("shared"));
    life.resume(&tag("shared"));
    check(life, true);
    life.step("refuse", |world| world.engine.refuse_peer(here, there));
    check(life, false);
    life.step("allow", |world| world.engine.allow_peer(here, there));
    life.pause(&tag("shared"));
    life.step("refuse", |world| world.engine.refuse_peer(here, there));
    life.resume(&tag("shared"));
    check(life, false);
}

/// A reset, with memory that is resident, paused and freed before, large and small; then all again.
fn short_reset(life: &mut Life) {
    let a = life.world.region("a", policy(Backup::Host));
    let b = life.world.region("b", policy(Backup::Disk));
    for _ in 0..2 {
        life.allocate(a, 2 * CHUNK);
        life.allocate(a, 100);
        let freed = life.allocate(a, 200);
        life.step("free", |world| world.free(freed));
        life.allocate(b, CHUNK);
        life.pause(&tag("a"));
        life.resume(&tag("a"));
        life.pause(&tag("b"));
        life.world.reset(Device(0));
        life.world.check();
        life.resume(&tag("b"));
    }
    life.allocate(a, CHUNK);
    life.pause(&tag("a"));
    life.resume(&tag("a"));
}

/// Runs the script with faults at `faults`; returns the calls it made, and how many faults did not come to pass.
fn live(script: Script, faults: &[(u64, DriverErrorKind)]) -> (u64, usize) {
    let mut life = Life::new();
    for &(number, kind) in faults {
        life.world.driver.fail_at(number, kind);
    }
    script(&mut life);
    let (calls, pending) = (life.world.driver.calls(), life.world.driver.pending_faults());
    life.world.check_no_leak();
    (calls, pending)
}

const KINDS: [DriverErrorKind; 2] = [DriverErrorKind::OutOfMemory, DriverErrorKind::Other];

fn every_call(script: Script) {
    for kind in KINDS {
        let mut number = 1;
        while live(script, &[(number, kind)]).1 == 0 {
            number += 1;
        }
        assert!(number > 20, "the script made only {number} calls");
    }
}

/// Every pair (i, j), where j runs over the calls that the life makes once i has failed; in steps of `stride`.
fn every_pair(script: Script, kind: DriverErrorKind, stride: usize) {
    let calls = live(script, &[]).0;
    for first in 1..=calls {
        let mut second = first + 1 + first % stride as u64;
        while live(script, &[(first, kind), (second, kind)]).1 == 0 {
            second += stride as u64;
        }
    }
}

fn is_full() -> bool {
    std::env::var_os("SIRE_SWEEP").is_some_and(|value| value == "full")
}

#[test]
fn every_call_of_the_long_life_fails_once() {
    every_call(long);
}

#[test]
fn every_call_of_the_short_lives_fails_once() {
    [
        short_host,
        short_disk,
        short_mixed,
        short_veiled,
        short_declared,
        short_declared_on_disk,
        short_verified,
        short_verified_on_disk,
        short_paranoid,
        short_shared,
        short_dead,
        short_behind,
        short_streamed,
        short_resident,
        short_peer,
        short_auto,
        short_between_processes,
        short_file,
        short_declared_file,
        short_automatic_file,
        short_verified_automatic_file,
        short_reset,
    ]
    .into_iter()
    .for_each(every_call);
}

#[test]
fn every_call_of_a_backup_ahead_fails_once() {
    [short_ahead_declared, short_ahead_verified, short_ahead_on_disk].into_iter().for_each(every_call);
}

#[test]
fn every_call_of_a_lazy_pause_fails_once() {
    [short_lazy, short_lazy_on_disk].into_iter().for_each(every_call);
}

#[test]
fn every_pair_of_calls_fails_in_host_memory() {
    KINDS.into_iter().for_each(|kind| every_pair(short_host, kind, 1));
}

#[test]
fn every_pair_of_calls_fails_on_disk() {
    every_pair(short_disk, DriverErrorKind::Other, 1);
}

#[test]
fn every_pair_of_calls_fails_in_automatic_backups() {
    every_pair(short_auto, DriverErrorKind::Other, 7);
}

#[test]
fn pairs_of_calls_fail_behind_a_stream() {
    let mut life = Life::new();
    short_streamed(&mut life);
    assert!(life.world.driver.log().contains(&"wait_on"), "no stream was made to wait");
    every_pair(short_streamed, DriverErrorKind::Other, if is_full() { 1 } else { 7 });
}

#[test]
fn every_pair_of_calls_fails_in_shared_memory() {
    every_pair(short_between_processes, DriverErrorKind::Other, 7);
}

#[test]
fn pairs_of_calls_fail_with_files() {
    [short_file, short_declared_file, short_automatic_file].into_iter().for_each(|script| {
        every_pair(script, DriverErrorKind::Other, if is_full() { 1 } else { 29 });
    });
}

#[test]
fn every_pair_of_calls_fails_under_a_veil() {
    every_pair(short_veiled, DriverErrorKind::Other, 1);
}

#[test]
fn every_pair_of_calls_fails_in_a_mixture() {
    every_pair(short_mixed, DriverErrorKind::Other, 1);
}

#[test]
fn every_call_of_a_switch_fails_once() {
    [short_switch, short_switch_on_disk].into_iter().for_each(every_call);
}

#[test]
fn pairs_of_calls_of_a_switch_fail() {
    KINDS.into_iter().for_each(|kind| every_pair(short_switch, kind, if is_full() { 1 } else { 41 }));
    every_pair(short_switch_on_disk, DriverErrorKind::Other, if is_full() { 1 } else { 13 });
}

#[test]
fn pairs_of_calls_fail_with_clean_backups() {
    for script in [
        short_declared,
        short_verified,
        short_verified_on_disk,
        short_paranoid,
        short_shared,
        short_ahead_declared,
        short_ahead_verified,
        short_lazy,
    ] {
        every_pair(script, DriverErrorKind::Other, if is_full() { 1 } else { 61 });
    }
}

#[test]
fn pairs_of_calls_of_the_long_life_fail() {
    every_pair(long, DriverErrorKind::Other, if is_full() { 1 } else { 79 });
}
