//! The bargain of tiers, quotas, requests past the page cache, several at once, and processes that die at every step of a backup: what they leave
//! behind is nothing, or a file that the next process removes.

use super::super::conformance;
use super::super::queue::{Queue, tests::buffers, tests::has_ring};
use super::super::record::{Record, Sum};
use super::super::step::{die_at, have_met, meet};
use super::*;
use crate::terms::Config;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};

/// A tier in a directory, with a quota.
fn tier(dir: &Path, disk_limit: Option<u64>) -> DiskTier {
    let config = Config { disk_dir: Some(dir.to_path_buf()), disk_limit, ..Config::default() };
    DiskTier::new(Arc::new(Settings::new(config)))
}

fn here() -> tempfile::TempDir {
    tempfile::tempdir().unwrap_or_else(|e| unreachable!("{e}"))
}

#[test]
fn keeps_the_bargain() {
    let dir = here();
    conformance::suite(|| Arc::new(tier(dir.path(), None)));
    let left = fs::read_dir(dir.path()).map(Iterator::count);
    assert!(matches!(left, Ok(0)), "files have no name");
}

#[test]
fn keeps_the_bargain_where_the_page_cache_cannot_be_passed_by() {
    conformance::suite(|| Arc::new(tier(Path::new("/dev/shm/sire-tests"), None)));
    let _ = fs::remove_dir("/dev/shm/sire-tests");
}

#[test]
fn a_quota_is_kept() {
    let dir = here();
    let tier = tier(dir.path(), Some(3 * BLOCK));
    let held = tier.reserve(BLOCK + 1);
    let refused = tier.reserve(BLOCK + 1).map(drop).map_err(|error| (error.status, error.message));
    let Err((Status::OutOfBackupSpace, message)) = refused else { unreachable!("{refused:?}") };
    assert!(message.contains("disk limit of 12288 bytes leaves 4096"), "{message}");
    drop(held);
    assert!(tier.reserve(3 * BLOCK).is_ok());
}

// The page cache.

/// Bytes that this thread has had read from disks; `None` where the kernel does not count them.
fn read_from_disks() -> Option<u64> {
    let counters = fs::read_to_string("/proc/thread-self/io").ok()?;
    counters.lines().find_map(|line| line.strip_prefix("read_bytes: ")?.parse().ok())
}

/// Bytes that the kernel counts for one direct read of a page here: none where there is no disk behind the file system.
fn counted(path: &Path, page: &mut [u8]) -> Option<u64> {
    let mut both = OpenOptions::new();
    let file = both.read(true).write(true).custom_flags(libc::O_DIRECT).open(path).ok()?;
    file.write_all_at(page, 0).ok()?;
    let before = read_from_disks()?;
    file.read_exact_at(page, 0).ok()?;
    Some(read_from_disks()? - before)
}

/// The flags of an open file, as the kernel tells them.
fn flags(file: BorrowedFd<'_>) -> Option<i32> {
    let about = fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd())).ok()?;
    about.lines().find_map(|line| i32::from_str_radix(line.strip_prefix("flags:")?.trim(), 8).ok())
}

#[test]
fn the_page_cache_is_passed_by_where_that_can_be() {
    let dir = here();
    let path = dir.path().join("direct");
    let mut direct = OpenOptions::new();
    if direct.write(true).create(true).custom_flags(libc::O_DIRECT).open(&path).is_err() {
        return eprintln!("{} is on a file system whose page cache cannot be passed by", dir.path().display());
    }
    let Ok(room) = tier(dir.path(), None).reserve(6 * BLOCK) else { unreachable!("there is room") };
    // The way of the kernel's queue.
    let flags = room.file().and_then(flags);
    assert!(flags.is_some_and(|flags| flags & libc::O_DIRECT != 0), "{flags:?}");
    // The way of threads: what was just written is not found in memory.
    let pages = buffers();
    if pages[0].write(|bytes| counted(&path, &mut bytes[..BLOCK as usize])).is_none_or(|counted| counted < BLOCK) {
        return eprintln!("{} is on no disk of which the kernel counts what is read", dir.path().display());
    }
    let moved = pages[0].write(|bytes| {
        let bytes = &mut bytes[..6 * BLOCK as usize];
        let written = room.write(0, bytes);
        let before = read_from_disks();
        let read = room.read(0, bytes);
        assert!(written.is_ok() && read.is_ok(), "{written:?} {read:?}");
        Some(read_from_disks()? - before?)
    });
    assert!(moved.is_some_and(|moved| moved >= 6 * BLOCK), "{moved:?}");
}

// Processes that die, or whose threads meet.

fn with_a_name(dir: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    unlinked(dir, options.read(true).write(true).mode(0o600))
}

fn content(number: u64) -> Vec<u8> {
    vec![number as u8 ^ 0x5A; BLOCK as usize]
}

/// Two backups of three threads each.
fn life(tier: &DiskTier) {
    for _ in 0..2 {
        let Ok(room) = tier.reserve(6 * BLOCK) else { unreachable!("there is room") };
        std::thread::scope(|scope| {
            for thread in 0..3 {
                let room = Arc::clone(&room);
                scope.spawn(move || {
                    let written = [thread, thread + 3].map(|n| room.write(n * BLOCK, &content(n)));
                    assert!(written.iter().all(Result::is_ok), "{written:?}");
                });
            }
        });
        for number in 0..6 {
            let mut found = vec![0; BLOCK as usize];
            assert!(room.read(number * BLOCK, &mut found).is_ok() && found == content(number));
        }
    }
}

/// Two backups through the engine's queue, each written and read back. Without the kernel's, threads meet while they write.
fn queued_life(tier: &DiskTier, ring: bool) {
    let pages = buffers();
    for _ in 0..2 {
        let Ok(room) = tier.reserve(6 * BLOCK) else { unreachable!("there is room") };
        if !ring {
            meet();
        }
        let record = |number: u64| Record { room: Arc::clone(&room), at: number * BLOCK, len: BLOCK };
        let mut queue = Queue::new(DEPTH, ring);
        let mut sums = [Sum::default(); 6];
        for (number, page) in (0..6).zip(&pages) {
            page.write(|bytes| bytes[..BLOCK as usize].copy_from_slice(&content(number)));
            queue.write(record(number), page.clone(), number);
        }
        while let Some(done) = queue.wait() {
            let Ok(answer) = done.outcome else { unreachable!("{:?}", done.outcome) };
            sums[done.ticket as usize] = answer.sum;
        }
        for (number, page) in (0..6).zip(&pages) {
            page.write(|bytes| bytes.fill(0xEE));
            queue.read(record(number), page.clone(), Some(sums[number as usize]), number);
        }
        while let Some(done) = queue.wait() {
            let is_right = done.outcome.is_ok_and(|answer| answer.bytes.read(|bytes| bytes == content(done.ticket)));
            assert!(is_right, "record {}", done.ticket);
        }
    }
}

/// What the child's program does.
const THREADS: &str = "threads write to a room";
const NAMES: &str = "the same, to a file that has a name at first";
const QUEUE: &str = "the engine's queue";
const MEETING: &str = "the engine's queue without the kernel's, in which two threads meet";

/// The child's program: run by the tests below in a process of its own.
#[test]
#[ignore = "a part of another test"]
fn child() {
    let Some(dir) = std::env::var_os("SIRE_TEST_DISK_CHILD") else { return };
    let what = std::env::var("SIRE_TEST_DISK_LIFE").unwrap_or_default();
    let number = std::env::var("SIRE_TEST_DISK_DIE_AT").ok().and_then(|n| n.parse().ok());
    let tier = tier(Path::new(&dir), None);
    die_at(number.unwrap_or(0));
    match &*what {
        NAMES => life(&DiskTier { make: with_a_name, ..tier }),
        QUEUE => queued_life(&tier, true),
        MEETING => {
            queued_life(&tier, false);
            assert!(have_met(), "requests come one after the other");
        }
        _ => life(&tier),
    }
}

/// Whether a child that does that, and dies at the given step (or ends before), ended well.
fn ends_well(dir: &Path, at: u64, what: &str) -> bool {
    let mut command = Command::new(std::env::current_exe().unwrap_or_default());
    command.args(["--exact", "tier::disk::tests::child", "--ignored", "--quiet", "--test-threads", "1"]);
    command.env("SIRE_TEST_DISK_CHILD", dir).env("SIRE_TEST_DISK_DIE_AT", at.to_string());
    command.env("SIRE_TEST_DISK_LIFE", what);
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
    status.is_ok_and(|status| status.success())
}

fn files(dir: &Path) -> usize {
    fs::read_dir(dir).map_or(usize::MAX, Iterator::count)
}

/// Lets a child die at every step; returns how many steps it has, and how many files it left behind, one at a time.
fn die_at_every_step(what: &str) -> (u64, usize) {
    let dir = here();
    let (mut at, mut left) = (1, 0);
    while !ends_well(dir.path(), at, what) {
        let now = files(dir.path());
        assert!(now <= usize::from(what == NAMES), "step {at}: {now} files are left");
        left += now;
        let next = tier(dir.path(), None);
        assert!(next.reserve(BLOCK).is_ok());
        assert_eq!(files(dir.path()), 0, "step {at}");
        at += 1;
        assert!(at < 1000, "the child does not end well, however late it dies");
    }
    (at - 1, left)
}

#[test]
fn a_process_that_dies_at_any_step_leaves_nothing_that_the_next_one_does_not_remove() {
    for what in [THREADS, NAMES] {
        let (steps, left) = die_at_every_step(what);
        assert!(steps >= 30, "the child has only {steps} steps");
        assert_eq!(left > 0, what == NAMES, "a name that was left behind was met");
    }
}

#[test]
fn a_process_that_dies_while_the_kernel_has_its_requests_leaves_nothing() {
    let (steps, left) = die_at_every_step(QUEUE);
    assert_eq!(left, 0);
    // Each request has a step before it is sent and one when it has ended; a thread has two for a write.
    let has_file = tier(here().path(), None).reserve(BLOCK).is_ok_and(|room| room.file().is_some());
    let least = if has_ring() && has_file { 2 * 24 } else { 2 * 12 };
    assert!(steps >= least, "the child has only {steps} steps");
}

#[test]
fn two_threads_carry_out_requests_at_once() {
    assert!(ends_well(here().path(), 0, MEETING));
}

#[test]
fn only_what_dead_processes_left_is_swept_away() {
    let dir = here();
    let (mut private, mut public) = (OpenOptions::new(), OpenOptions::new());
    private.write(true).create_new(true).mode(0o600);
    public.write(true).create_new(true).mode(0o644);
    let me = std::process::id();
    let gone = [format!("{PREFIX}4294967295-0"), format!("{PREFIX}{me}-18446744073709551615")];
    let stay = [format!("{PREFIX}1-0"), "sire-backup-9".to_owned(), "backup-4294967295-0".to_owned()];
    for name in gone.iter().chain(&stay) {
        assert!(private.open(dir.path().join(name)).is_ok());
    }
    assert!(public.open(dir.path().join(format!("{PREFIX}4294967295-1"))).is_ok());
    assert!(fs::create_dir(dir.path().join(format!("{PREFIX}4294967295-2"))).is_ok());
    // A namesake's file is neither taken nor stumbled over.
    let tier = DiskTier { make: with_a_name, ..tier(dir.path(), None) };
    assert!(tier.reserve(BLOCK).is_ok());
    assert_eq!(files(dir.path()), stay.len() + 2);
    assert!(stay.iter().all(|name| dir.path().join(name).exists()));
}
