//! What a disk can do to a backup: end requests with an error, be full, take several requests at once. Whatever it does, no byte is lost.

use crate::common::GRANULARITY;
use crate::common::player::refusal;
use crate::common::world::{World, policy, tag};
use crate::namespaces::{place, run_with_own};
use sire_core::engine::*;
use sire_core::error::{Error, Result, Status};
use sire_core::tier::{Room, Tier};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

const SIZE: u64 = (1 << 20) + 100;

/// A world with one written region whose backup goes to `tier`: large enough that several requests are worth it.
fn world(tier: Arc<dyn Tier>) -> World {
    let mut world = World::with(1 << 23, 32 * GRANULARITY);
    let backup = world.engine.add_tier(tier).unwrap();
    let region = world.region("weights", policy(backup));
    let addr = world.allocate(region, SIZE).unwrap();
    world.write(addr);
    world
}

fn states(world: &World, state: State) -> bool {
    world.states().values().all(|found| *found == state)
}

// Errors.

/// A file, and while it is broken another one in its place: the process's own memory, open for reading. Where nothing is mapped, a read of that ends
/// with EIO; a write with EBADF.
#[derive(Debug)]
struct Fickle {
    whole: File,
    bad: File,
    broken: AtomicBool,
    /// Requests that were made by a thread, and failed.
    failed: AtomicU64,
}

#[derive(Clone, Debug)]
struct FickleRoom(Arc<Fickle>, u64);

#[derive(Debug)]
struct FickleTier(Arc<Fickle>);

impl Fickle {
    fn new() -> Arc<Fickle> {
        let bad = File::open("/proc/self/mem").unwrap();
        let (broken, failed) = (AtomicBool::new(false), AtomicU64::new(0));
        Arc::new(Fickle { whole: tempfile::tempfile().unwrap(), bad, broken, failed })
    }

    fn file(&self) -> &File {
        if self.broken.load(SeqCst) { &self.bad } else { &self.whole }
    }

    fn outcome(&self, outcome: io::Result<()>) -> Result<()> {
        outcome.map_err(|error| {
            self.failed.fetch_add(1, SeqCst);
            Error::new(Status::BackupIo, format!("the disk is broken: {error}"))
        })
    }

    /// Whether requests have failed since this was last asked.
    fn has_failed(&self) -> bool {
        self.failed.swap(0, SeqCst) > 0
    }
}

impl Tier for FickleTier {
    fn name(&self) -> &'static str {
        "fickle"
    }
    fn reserve(&self, len: u64) -> Result<Arc<dyn Room>> {
        let len = len.next_multiple_of(4096);
        self.0.whole.set_len(len).unwrap();
        Ok(Arc::new(FickleRoom(Arc::clone(&self.0), len)))
    }
    fn used(&self) -> u64 {
        0
    }
}

impl Room for FickleRoom {
    fn len(&self) -> u64 {
        self.1
    }
    fn align(&self) -> u64 {
        4096
    }
    fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        self.0.outcome(self.0.file().write_all_at(bytes, at))
    }
    fn read(&self, at: u64, into: &mut [u8]) -> Result<()> {
        self.0.outcome(self.0.file().read_exact_at(into, at))
    }
    fn file(&self) -> Option<BorrowedFd<'_>> {
        Some(self.0.file().as_fd())
    }
}

#[test]
fn errors_of_a_disk_lose_nothing() {
    for io_uring in [true, false] {
        let fickle = Fickle::new();
        let mut world = world(Arc::new(FickleTier(Arc::clone(&fickle))));
        world.engine.configure(&|config| config.io_uring = io_uring);
        let limit = |world: &World, limit| world.engine.configure(&|config| config.host_limit = limit);
        // What cannot be written goes to host memory.
        fickle.broken.store(true, SeqCst);
        world.pause(&Selection::All).unwrap();
        assert!(fickle.has_failed());
        world.resume(&Selection::All).unwrap();
        world.check();
        // Without that, it stays on the device.
        limit(&world, Some(0));
        let (status, message) = refusal(world.pause(&Selection::All));
        assert!(status == Status::BackupIo && message.contains("Bad file descriptor"), "{message}");
        assert!(fickle.has_failed() && states(&world, State::Resident));
        world.check();
        // What cannot be read stays where it is.
        fickle.broken.store(false, SeqCst);
        world.pause(&Selection::All).unwrap();
        fickle.broken.store(true, SeqCst);
        for _ in 0..2 {
            let (status, message) = refusal(world.resume(&Selection::All));
            assert!(status == Status::BackupIo && message.contains("Input/output error"), "{message}");
            assert!(fickle.has_failed() && states(&world, State::Paused));
        }
        fickle.broken.store(false, SeqCst);
        world.resume(&Selection::All).unwrap();
        world.check();
        assert!(!fickle.has_failed());
        world.check_no_leak();
    }
}

// A full disk.

#[test]
fn a_full_disk_refuses_a_pause_and_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    run_with_own(dir.path(), "size=256k,nr_inodes=16", "disk::full_disk");
}

/// How many there may be is the kernel's own sum: labels of files count as well.
fn leave_room_for_one_file(dir: &Path) {
    let names = (0..).map(|number| dir.join(format!("filler-{number}")));
    let made: Vec<_> = names.map_while(|name| fs::File::create_new(&name).ok().map(|_| name)).collect();
    fs::remove_file(made.last().unwrap()).unwrap();
}

/// The child's program.
#[test]
#[ignore = "a part of another test"]
fn full_disk() {
    let Some(dir) = place() else { return };
    leave_room_for_one_file(&dir);
    let mut world = World::new(1 << 22);
    world.engine.configure(&|config| config.disk_dir = Some(dir.clone()));
    for (tag, size) in [("a", 64 << 10), ("b", 64 << 10), ("large", 512 << 10)] {
        let region = world.region(tag, policy(Backup::Disk));
        let addr = world.allocate(region, size).unwrap();
        world.write(addr);
    }
    let refuses = |world: &mut World, name: &str, why: &str| {
        let (status, message) = refusal(world.pause(&tag(name)));
        assert_eq!(status, Status::OutOfBackupSpace, "{message}");
        assert!(message.contains(why) && message.contains("free space there"), "{message}");
        assert!(states(world, State::Resident) || name == "b");
        world.check();
    };
    refuses(&mut world, "large", "are left");
    world.pause(&tag("a")).unwrap();
    refuses(&mut world, "b", "No space left on device");
    world.resume(&tag("a")).unwrap();
    world.pause(&tag("b")).unwrap();
    world.resume(&Selection::All).unwrap();
    world.check();
    world.check_no_leak();
}

// Several requests at once.

#[derive(Debug, Default)]
struct Attendance {
    there: usize,
    over: bool,
    took_place: bool,
}

/// Two meet, or nobody does within ten seconds; then nobody waits any more.
#[derive(Debug, Default)]
struct Meeting {
    state: Mutex<Attendance>,
    changed: Condvar,
}

impl Meeting {
    fn attend(&self) {
        let mut state = self.state.lock().unwrap();
        state.there += 1;
        state.took_place |= state.there > 1;
        state.over |= state.took_place;
        self.changed.notify_all();
        let waited = self.changed.wait_timeout_while(state, Duration::from_secs(10), |state| !state.over);
        let mut state = waited.unwrap().0;
        state.there -= 1;
        state.over = true;
    }

    fn took_place(&self) -> bool {
        self.state.lock().unwrap().took_place
    }
}

/// A tier of byte vectors whose requests wait for one another.
#[derive(Debug, Default)]
struct Sociable {
    writers: Arc<Meeting>,
    readers: Arc<Meeting>,
}

#[derive(Debug)]
struct SociableRoom {
    bytes: Mutex<Vec<u8>>,
    len: u64,
    writers: Arc<Meeting>,
    readers: Arc<Meeting>,
}

impl Tier for Sociable {
    fn name(&self) -> &'static str {
        "sociable"
    }
    fn reserve(&self, len: u64) -> Result<Arc<dyn Room>> {
        let bytes = Mutex::new(vec![0; len as usize]);
        Ok(Arc::new(SociableRoom {
            bytes,
            len,
            writers: Arc::clone(&self.writers),
            readers: Arc::clone(&self.readers),
        }))
    }
    fn depth(&self) -> usize {
        2
    }
    fn used(&self) -> u64 {
        0
    }
}

impl Room for SociableRoom {
    fn len(&self) -> u64 {
        self.len
    }
    fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        self.writers.attend();
        self.bytes.lock().unwrap()[at as usize..][..bytes.len()].copy_from_slice(bytes);
        Ok(())
    }
    fn read(&self, at: u64, into: &mut [u8]) -> Result<()> {
        self.readers.attend();
        into.copy_from_slice(&self.bytes.lock().unwrap()[at as usize..][..into.len()]);
        Ok(())
    }
}

#[test]
fn two_requests_are_under_way_at_once() {
    let tier = Sociable::default();
    let (writers, readers) = (Arc::clone(&tier.writers), Arc::clone(&tier.readers));
    let mut world = world(Arc::new(tier));
    world.pause(&Selection::All).unwrap();
    assert!(writers.took_place(), "writes come one after the other");
    world.resume(&Selection::All).unwrap();
    assert!(readers.took_place(), "reads come one after the other");
    world.check();
}
