//! Several engines' stores in one process, and processes that die at every step. What a survivor relies on is there, byte for byte;
//! what nobody relies on is gone, by the kernel's count of blocks and by the directory.

use super::roster::{Entry, MemberId, Roster, others};
use super::*;
use crate::terms::Config;
use crate::tier::step::{die_at, step};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

const PIECE: u64 = 64 << 10;
fn content(seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..PIECE).map(|_| next()).collect()
}

fn tempdir() -> tempfile::TempDir {
    tempfile::tempdir().unwrap_or_else(|e| unreachable!("{e}"))
}

fn must<T, E: std::fmt::Display>(result: std::result::Result<T, E>) -> T {
    result.unwrap_or_else(|e| unreachable!("{e}"))
}

fn limited(dir: &Path, host_limit: Option<u64>) -> SharedTier {
    let config = Config { shared_dir: Some(dir.to_path_buf()), host_limit, ..Config::default() };
    SharedTier::new(Arc::new(Settings::new(config)))
}

fn tier(dir: &Path) -> SharedTier {
    limited(dir, None)
}

/// One process's share of a backup: seeds, and where they are kept.
struct Backup {
    pieces: Vec<(u64, Arc<Piece>)>,
}

impl Backup {
    fn new(tier: &SharedTier, seeds: &[u64]) -> Backup {
        let draft = must(tier.draft(seeds.len() as u64 * PIECE));
        for (i, &seed) in seeds.iter().enumerate() {
            step();
            must(draft.write(i as u64 * PIECE, &content(seed)));
        }
        let mut shared = draft.share(|_| true);
        let place = |(i, &seed): (usize, &u64)| Some((seed, shared.remove(&(i as u64 * PIECE))?));
        Backup { pieces: seeds.iter().enumerate().filter_map(place).collect() }
    }

    fn check(&self) {
        for (seed, piece) in &self.pieces {
            let mut bytes = vec![0; piece.len() as usize];
            must(piece.read(0, &mut bytes));
            assert!(bytes == content(*seed), "the piece with seed {seed} has changed");
        }
    }
}

/// Files in the directory apart from the gate.
fn rosters(dir: &Path) -> usize {
    must(std::fs::read_dir(dir.join("shared-1"))).filter(|f| f.as_ref().is_ok_and(|f| f.file_name() != "gate")).count()
}

/// Bytes of the pages that hold `pieces` pieces and a pack's front.
fn memory(pieces: u64) -> u64 {
    4096 + pieces * PIECE
}

#[test]
fn two_members_keep_one_copy() {
    let dir = tempdir();
    let (a, b) = (tier(dir.path()), tier(dir.path()));
    let first = Backup::new(&a, &[1, 2, 3, 4]);
    let second = Backup::new(&b, &[4, 3, 9, 1, 9]);
    assert_eq!((first.pieces.len(), second.pieces.len()), (4, 5));
    assert_eq!(a.usage(), SharedUse { own: memory(4), borrowed: 0 });
    assert_eq!(b.usage(), SharedUse { own: memory(1), borrowed: 3 * PIECE });
    first.check();
    second.check();
}

#[test]
fn what_a_borrower_needs_outlives_the_creator_and_nothing_else_does() {
    let dir = tempdir();
    let (a, b) = (tier(dir.path()), tier(dir.path()));
    let first = Backup::new(&a, &[1, 2, 3]);
    let second = Backup::new(&b, &[2]);
    let pack = Arc::clone(&second.pieces[0].1.pack);
    assert_eq!(pack.memory(), memory(3));
    drop((first, a));
    second.check();
    assert_eq!((pack.memory(), rosters(dir.path())), (memory(1), 1));
    drop(second);
    b.settle();
    assert_eq!(pack.memory(), memory(0));
    drop((pack, b));
    assert_eq!(rosters(dir.path()), 0);
}

#[test]
fn equal_hashes_are_not_believed() {
    let dir = tempdir();
    let (a, b) = (tier(dir.path()), tier(dir.path()));
    let first = Backup::new(&a, &[1]);
    let draft = must(b.draft(PIECE));
    must(draft.write(0, &content(2)));
    lock(&draft.pieces).insert(0, first.pieces[0].1.address);
    for _ in 0..2 {
        assert!(draft.share(|_| true).is_empty(), "other content was taken for its own");
        let mut bytes = vec![0; PIECE as usize];
        must(draft.read(0, &mut bytes));
        assert!(bytes == content(2), "what could not be shared was given back");
    }
    b.settle();
    assert_eq!(b.usage(), SharedUse { own: memory(1), borrowed: 0 });
}

#[test]
fn an_unfinished_draft_is_nobodys() {
    let dir = tempdir();
    let (a, b) = (tier(dir.path()), tier(dir.path()));
    let draft = must(a.draft(2 * PIECE));
    must(draft.write(0, &content(1)));
    let other = Backup::new(&b, &[1]);
    assert_eq!(b.usage().borrowed, 0);
    assert!(draft.write(PIECE + 1, &content(1)).is_err() && draft.read(2 * PIECE, &mut [0]).is_err());
    drop(draft);
    assert_eq!(a.usage(), SharedUse::default());
    other.check();
}

/// A user's second pause failed and could not be undone, so its backup stayed in a draft; or two threads paused two regions at the
/// same time. The next pause that ended well shared every draft there was. It had no use for the pieces of the
/// others, dropped them, and their memory was given back under a backup that somebody relied on.
#[test]
fn what_one_pause_shares_leaves_the_drafts_of_others_alone() {
    let dir = tempdir();
    let tier = tier(dir.path());
    let [mine, other] = [1, 2].map(|seed| {
        let draft = must(tier.draft(3 * PIECE));
        must(draft.write(0, &content(seed)));
        must(draft.write(PIECE, &content(seed + 10)));
        draft
    });
    let room = Arc::clone(&mine) as Arc<dyn Room>;
    let place = Place::Stored { room, at: 0, sum: crate::tier::record::Sum::default() };
    let mut segment = Segment { filled: true, ..Segment::new(&(0..PIECE), place) };
    assert_eq!(tier.share(std::iter::once(&mut segment)), 0);
    tier.settle();
    let Place::Stored { room, at: 0, .. } = &segment.place else { unreachable!("{segment:?}") };
    let mut found = vec![0; PIECE as usize];
    must(room.read(0, &mut found));
    assert!(found == content(1) && room.len() == PIECE, "the segment has a piece now");
    for (draft, at, seed) in [(&mine, PIECE, 11), (&other, 0, 2), (&other, PIECE, 12)] {
        must(draft.read(at, &mut found));
        assert!(found == content(seed), "what nobody shared has changed");
    }
    must(other.write(2 * PIECE, &content(5)));
    // It can still be shared, with what it has got since.
    assert_eq!((mine.share(|_| true).len(), other.share(|_| true).len()), (1, 3));
    must(room.read(0, &mut found));
    assert!(found == content(1), "what was shared earlier was given back");
}

/// A pause was cancelled after two extents had been saved, and `pre_copy` shared their backups one after the other. The second time it gave back
/// all of the draft's memory that it knew no use for, with the first extent's piece, on which two processes relied: their next resumes met
/// zeros.
#[test]
fn a_draft_that_is_shared_bit_by_bit_keeps_what_is_needed_and_nothing_else() {
    let dir = tempdir();
    let (a, b) = (tier(dir.path()), tier(dir.path()));
    let known = Backup::new(&b, &[9]);
    let draft = must(a.draft(5 * PIECE));
    for (at, seed) in [(0, 1), (PIECE, 9), (2 * PIECE, 3), (3 * PIECE, 9)] {
        must(draft.write(at, &content(seed)));
    }
    let share = |at: u64, seed: u64| {
        let shared = draft.share(|start| start == at);
        Backup { pieces: shared.into_values().map(|piece| (seed, piece)).collect() }
    };
    let mut kept = Vec::new();
    let mut borrower = None;
    for (at, seed, pieces) in [(0, 1, 4), (PIECE, 9, 3), (2 * PIECE, 3, 3), (3 * PIECE, 9, 2)] {
        kept.push(share(at, seed));
        assert!(kept.iter().all(|backup| backup.pieces.len() == 1));
        borrower.get_or_insert_with(|| Backup::new(&b, &[1])).check();
        kept.iter().for_each(Backup::check);
        assert_eq!(draft.pack.memory(), memory(pieces), "what nobody wrote or needs is given back, once");
    }
    let pack = Arc::clone(&draft.pack);
    drop((kept, known));
    a.settle();
    assert_eq!(pack.memory(), memory(1), "the borrower's piece is left");
    borrower.iter().for_each(Backup::check);
}

#[test]
fn room_is_limited() {
    let dir = tempdir();
    let tier = limited(dir.path(), Some(memory(1) + PIECE));
    let kept = Backup::new(&tier, &[1]);
    assert_eq!(tier.draft(PIECE + 1).map(|_| ()).map_err(|e| e.status), Err(Status::OutOfBackupSpace));
    assert!(tier.draft(PIECE).is_ok() && limited(dir.path(), None).draft(1 << 62).is_err());
    kept.check();
}

#[test]
fn it_keeps_the_bargain_of_tiers() {
    let dir = tempdir();
    crate::tier::conformance::suite(|| Arc::new(tier(dir.path())));
}

#[test]
fn a_directory_of_somebody_else_is_refused() {
    let dir = tempdir();
    must(std::os::unix::fs::symlink("/tmp", dir.path().join("shared-1")));
    let refused = tier(dir.path()).draft(PIECE);
    assert!(refused.is_err_and(|e| e.status == Status::BackupIo && e.message.contains("not a directory of this user")));
}

/// A member whose roster a test writes itself.
fn forged(dir: &Path, number: u32) -> Roster {
    must(Roster::enlist(&dir.join("shared-1"), must(MemberId::here(number))))
}

/// What of a draft had not been shared when it went stayed in memory as long as anybody relied on what had.
#[test]
fn what_a_draft_did_not_share_goes_with_it() {
    let dir = tempdir();
    let tier = tier(dir.path());
    let draft = must(tier.draft(3 * PIECE));
    for (at, seed) in [(0, 1), (PIECE, 2), (2 * PIECE, 3)] {
        must(draft.write(at, &content(seed)));
    }
    let shared = draft.share(|start| start == PIECE);
    assert_eq!(tier.usage().own, memory(3));
    drop(draft);
    assert_eq!(tier.usage().own, memory(1));
    Backup { pieces: shared.into_values().map(|piece| (2, piece)).collect() }.check();
}

#[test]
fn damaged_and_newer_rosters_are_not_misread() {
    use std::os::unix::fs::FileExt;
    let dir = tempdir();
    let tier = tier(dir.path());
    let kept = Backup::new(&tier, &[1, 2]);
    let mut other = forged(dir.path(), 1_000_000);
    let entry = Entry { address: Address { hash: 7, len: PIECE }, pack: kept.pieces[0].1.pack.id, at: 0, fd: 0 };
    must(other.add(entry));
    let file = must(std::fs::OpenOptions::new().write(true).open(&other.path));
    // A torn entry of a living member: nothing is given back while it lives.
    must(file.write_all_at(&[1], 64 + 20));
    drop(kept);
    tier.settle();
    let store = lock(&tier.store).clone().unwrap_or_else(|| unreachable!());
    let seen = must(others(&dir.path().join("shared-1"), store.me()));
    assert!(seen.len() == 1 && seen[0].is_alive && !seen[0].is_whole && seen[0].entries.is_empty());
    // Another version: nothing is shared, nothing fails.
    must(file.write_all_at(&2_u32.to_le_bytes(), 8));
    let draft = must(tier.draft(PIECE));
    must(draft.write(0, &content(1)));
    assert!(draft.share(|_| true).is_empty());
    // Its owner dies: it is cleared away.
    drop((other, file, draft));
    assert_eq!(Backup::new(&tier, &[5]).pieces.len(), 1);
    assert_eq!(rosters(dir.path()), 1);
}

/// One pause could not look for what others have, so its backup stayed in a draft. The next one found all of it clean, shared that draft again, which
/// knew of no bytes any more, and gave back the memory of all of it.
#[test]
fn what_could_not_be_shared_once_is_kept_and_can_be_shared_later() {
    let dir = tempdir();
    let tier = tier(dir.path());
    let draft = must(tier.draft(3 * PIECE));
    [0, 1].iter().for_each(|&i| must(draft.write(i * PIECE, &content(i))));
    let newer = forged(dir.path(), 1_000_002);
    let file = must(std::fs::OpenOptions::new().write(true).open(&newer.path));
    must(std::os::unix::fs::FileExt::write_all_at(&file, &2_u32.to_le_bytes(), 8));
    let mut found = vec![0; PIECE as usize];
    for _ in 0..2 {
        assert!(draft.share(|_| true).is_empty() && draft.write(2 * PIECE, &content(2)).is_err());
        for i in [0, 1] {
            must(draft.read(i * PIECE, &mut found));
            assert!(found == content(i), "what could not be shared was given back");
        }
    }
    drop((newer, file));
    let shared = draft.share(|_| true);
    assert_eq!((shared.len(), draft.pack.memory()), (2, memory(2)));
    for (at, piece) in shared {
        must(piece.read(0, &mut found));
        assert!(found == content(at / PIECE), "the piece at {at} has changed");
    }
}

#[test]
fn a_descriptor_that_means_something_else_is_refused() {
    let dir = tempdir();
    let (a, tier) = (tier(dir.path()), tier(dir.path()));
    let first = Backup::new(&a, &[1]);
    let mut other = forged(dir.path(), 1_000_001);
    let file = must(std::fs::File::open("/dev/zero"));
    let mut entry = Entry { address: Address::of(&content(2)), pack: first.pieces[0].1.pack.id, at: 0, fd: 0 };
    entry.pack.number += 100;
    for fd in [std::os::fd::AsRawFd::as_raw_fd(&file), first.pieces[0].1.pack.fd(), 9999, -1] {
        must(other.add(Entry { fd, ..entry }));
    }
    let kept = Backup::new(&tier, &[2]);
    assert_eq!(tier.usage().borrowed, 0, "it was taken from a descriptor that is no such pack");
    kept.check();
    other.resign();
}

// Processes that die.

/// What a child does until it is told to stop: pieces that the parent has, that other children have, of its own; drops, repeats.
fn life(dir: &Path, seed: u64, rounds: u64) {
    let tier = tier(dir);
    let mut kept: Vec<Backup> = Vec::new();
    for round in 0..rounds {
        let own = 1000 + seed * 100 + round % 3;
        kept.push(Backup::new(&tier, &[1, 100 + round % 5, own, 2, own]));
        kept.iter().for_each(Backup::check);
        if round % 2 == 1 {
            kept.remove((round as usize * 7) % kept.len());
        }
        step();
        tier.settle();
    }
}

/// The child's program: run by the tests below in a process of its own.
#[test]
#[ignore = "a part of other tests"]
fn child() {
    let Some(dir) = std::env::var_os("SIRE_TEST_SHARED_CHILD") else { return };
    let number = |name: &str| std::env::var(name).ok().and_then(|n| n.parse().ok()).unwrap_or(0);
    die_at(number("SIRE_TEST_SHARED_DIE_AT"));
    life(Path::new(&dir), number("SIRE_TEST_SHARED_SEED"), number("SIRE_TEST_SHARED_ROUNDS"));
}

fn spawn(dir: &Path, seed: u64, rounds: u64, die_at: u64) -> Child {
    let mut command = Command::new(must(std::env::current_exe()));
    command.args(["--exact", "tier::shared::tests::child", "--ignored", "--quiet", "--test-threads", "1"]);
    command.env("SIRE_TEST_SHARED_CHILD", dir).env("SIRE_TEST_SHARED_SEED", seed.to_string());
    command.env("SIRE_TEST_SHARED_ROUNDS", rounds.to_string()).env("SIRE_TEST_SHARED_DIE_AT", die_at.to_string());
    must(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn())
}

#[test]
fn a_process_that_dies_at_any_step_takes_nothing_along_and_leaves_nothing() {
    let dir = tempdir();
    let tier = tier(dir.path());
    let kept = Backup::new(&tier, &[1, 2, 3]);
    let mut at = 0;
    loop {
        at += 1;
        let died = !must(spawn(dir.path(), 1, 3, at).wait()).success();
        kept.check();
        // What it had has to be taken over, or made anew; then nothing of it is left.
        let again = Backup::new(&tier, &[100, 1100, 3]);
        again.check();
        assert_eq!(again.pieces.len(), 3);
        drop(again);
        tier.settle();
        assert_eq!((rosters(dir.path()), tier.usage()), (1, SharedUse { own: memory(3), borrowed: 0 }), "step {at}");
        if !died {
            break;
        }
    }
    assert!(at > 30, "the child has only {at} steps");
}

#[test]
fn processes_killed_at_random_moments_leave_the_others_whole() {
    let dir = tempdir();
    let tier = tier(dir.path());
    let mut kept = vec![Backup::new(&tier, &[1, 2, 3])];
    let mut children: Vec<Child> = (0..3).map(|seed| spawn(dir.path(), seed, 1 << 40, 0)).collect();
    for round in 0..18 {
        std::thread::sleep(Duration::from_millis(20 + round * 13 % 50));
        // Pieces that, if they can be had, children made: they must outlive their makers.
        kept.push(Backup::new(&tier, &[100 + round % 5, 1000 + (round % 3) * 100]));
        let victim = &mut children[round as usize % 3];
        must(victim.kill());
        assert!(!must(victim.wait()).success(), "a child ended by itself: it found something wrong");
        kept.iter().for_each(Backup::check);
        *victim = spawn(dir.path(), round % 3, 1 << 40, 0);
    }
    for child in &mut children {
        must(child.kill());
        must(child.wait());
    }
    kept.iter().for_each(Backup::check);
    kept.truncate(1);
    tier.settle();
    assert_eq!((rosters(dir.path()), tier.usage()), (1, SharedUse { own: memory(3), borrowed: 0 }));
}
