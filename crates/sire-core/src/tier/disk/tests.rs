//! The bargain of tiers, quotas, and processes that die at every step of a backup: what they leave behind is nothing, or a file that the
//! next process removes.

use super::super::conformance;
use super::super::step::die_at;
use super::*;
use crate::terms::Config;
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

// Processes that die.

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

/// The child's program: run by the test below in a process of its own.
#[test]
#[ignore = "a part of another test"]
fn child() {
    let Some(dir) = std::env::var_os("SIRE_TEST_DISK_CHILD") else { return };
    let number = std::env::var("SIRE_TEST_DISK_DIE_AT").ok().and_then(|n| n.parse().ok());
    die_at(number.unwrap_or(0));
    let make = if std::env::var_os("SIRE_TEST_DISK_NAMES").is_some() { with_a_name } else { nameless };
    life(&DiskTier { make, ..tier(Path::new(&dir), None) });
}

/// Whether a child that dies at the given step (or ends before) ended well.
fn ends_well(dir: &Path, at: u64, names: bool) -> bool {
    let mut command = Command::new(std::env::current_exe().unwrap_or_default());
    command.args(["--exact", "tier::disk::tests::child", "--ignored", "--quiet", "--test-threads", "1"]);
    command.env("SIRE_TEST_DISK_CHILD", dir).env("SIRE_TEST_DISK_DIE_AT", at.to_string());
    if names {
        command.env("SIRE_TEST_DISK_NAMES", "1");
    }
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
    status.is_ok_and(|status| status.success())
}

fn files(dir: &Path) -> usize {
    fs::read_dir(dir).map_or(usize::MAX, Iterator::count)
}

#[test]
fn a_process_that_dies_at_any_step_leaves_nothing_that_the_next_one_does_not_remove() {
    let dir = here();
    for names in [false, true] {
        let (mut at, mut left) = (1, 0);
        while !ends_well(dir.path(), at, names) {
            let now = files(dir.path());
            assert!(now <= usize::from(names), "step {at}: {now} files are left");
            left += now;
            let next = tier(dir.path(), None);
            assert!(next.reserve(BLOCK).is_ok());
            assert_eq!(files(dir.path()), 0, "step {at}");
            at += 1;
        }
        assert!(at > 30, "the child has only {at} steps");
        assert_eq!(left > 0, names, "a name that was left behind was met");
    }
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
