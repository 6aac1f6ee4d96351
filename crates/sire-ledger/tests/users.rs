//! Five users who share one device through one ledger. Only root can be other users, and they must be able to get to the directory: elsewhere
//! these tests count as ignored, by name and with the reason, and so this binary has a `main` of its own.
//!
//! The users are this test binary again.

use libtest_mimic::{Arguments, Completion, Failed, Trial};
use sire_ledger::layout::State;
use sire_ledger::{Error, Ledger, Member, Memory, Patience, Want};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

type Outcome = Result<(), Box<dyn std::error::Error>>;

const MIB: u64 = 1 << 20;
const DEVICE: u64 = 64 * MIB;
const USERS: std::ops::Range<u32> = 20_001..20_006;
const ROUNDS: usize = 40;
/// How long anything may take on a machine that does much else.
const LIMIT: Duration = Duration::from_secs(120);

fn main() -> ExitCode {
    if let Ok(part) = std::env::var("SIRE_LEDGER_TEST_PART") {
        return play(&part);
    }
    let tests = vec![
        Trial::ignorable_test("five_users_share_one_device_through_one_ledger", || users_race(&FOR_ALL)),
        Trial::ignorable_test("five_users_of_a_group_share_one_and_nobody_else_gets_in", || users_race(&FOR_A_GROUP)),
    ];
    libtest_mimic::run(&Arguments::from_args(), tests).exit_code()
}

fn own_user() -> u32 {
    // SAFETY: geteuid touches no memory and cannot fail.
    unsafe { libc::geteuid() }
}

// ---- one of the users -----------------------------------------------------------------------------------------------

const NOBODY: &str = "nobody";
const USER: &str = "a user";
const STRANGER: &str = "a stranger";

fn play(part: &str) -> ExitCode {
    let outcome = match part {
        USER => be_a_user(),
        STRANGER => be_a_stranger(),
        _ => Ok(()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{part}, {}: {error}", own_user());
            ExitCode::FAILURE
        }
    }
}

fn directory() -> Result<PathBuf, Box<dyn std::error::Error>> {
    Ok(std::env::var_os("SIRE_LEDGER_TEST_DIR").ok_or("no directory is named")?.into())
}

fn open() -> sire_ledger::Result<Ledger> {
    Ledger::open(&sire_ledger::directory(), "GPU-race-0")
}

fn full() -> Option<Memory> {
    Some(Memory { free: DEVICE, total: DEVICE })
}

fn patient() -> Patience<'static> {
    Patience { timeout: Some(LIMIT), cancelled: &|| false }
}

/// Nanoseconds on a clock that all processes of the machine share.
fn now() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a live local.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

fn until(what: &str, mut is_so: impl FnMut() -> sire_ledger::Result<bool>) -> Outcome {
    let begun = Instant::now();
    while !is_so()? {
        if begun.elapsed() > LIMIT {
            return Err(format!("in vain: {what}").into());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Reserves, holds while `meanwhile` runs, and gives back; notes from when until when it surely had how much, on the clock that all share.
fn hold(member: &Member, log: &mut String, bytes: u64, meanwhile: impl FnOnce() -> Outcome) -> Outcome {
    member.reserve(Want::Bytes(bytes), &full, patient())?;
    let from = now();
    meanwhile()?;
    *log += &format!("{from} {} {bytes}\n", now());
    Ok(member.release()?)
}

/// Returns when all users have come here.
fn meet(dir: &Path, place: &str) -> Outcome {
    std::fs::write(dir.join(format!("{place}-{}", own_user())), [])?;
    until(place, || Ok(USERS.into_iter().all(|user| dir.join(format!("{place}-{user}")).exists())))
}

fn be_a_user() -> Outcome {
    let (dir, user, ledger) = (directory()?, own_user(), open()?);
    let member = ledger.join()?;
    let mut log = String::new();
    let count = |state| Ok(ledger.entries()?.iter().filter(|entry| entry.state == state).count());
    until("all five are there", || Ok(ledger.entries()?.len() == USERS.len()))?;
    // All want everything, and the first lets it go only when the others wait for it.
    let first = dir.join("first");
    hold(&member, &mut log, DEVICE, || match std::fs::create_dir(&first) {
        Ok(()) => until("the others wait", || Ok(count(State::Waiting)? == USERS.len() - 1)),
        _ => Ok(()),
    })?;
    // All hold a part at once. Not before all have had everything: who holds would be in the way.
    meet(&dir, "had-all")?;
    hold(&member, &mut log, DEVICE / USERS.len() as u64, || meet(&dir, "has-part"))?;
    // And as it comes.
    let mut number = u64::from(user) * 0x9e37_79b9 + 1;
    for _ in 0..ROUNDS {
        number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let (bytes, time) = ((1 + (number >> 33) % 20) * 2 * MIB, (number >> 40) % 1500);
        hold(&member, &mut log, bytes, || {
            std::thread::sleep(Duration::from_micros(time));
            Ok(())
        })?;
    }
    // What another user may know of this one.
    member.reserve(Want::Bytes(2 * MIB), &full, patient())?;
    assert!(open()?.entries()?.iter().any(|entry| entry.uid == user && entry.bytes == 2 * MIB));
    Ok(std::fs::write(dir.join(format!("log-{user}")), log)?)
}

/// Whom the directory is closed to.
fn be_a_stranger() -> Outcome {
    let refused = open();
    let Err(Error::Io { error, .. }) = &refused else { return Err(format!("it was let in: {refused:?}").into()) };
    assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
    Ok(())
}

// ---- who has them share ---------------------------------------------------------------------------------------------

/// The directory of the ledgers, as whoever sets it up for several users makes it.
struct Shared {
    mode: u32,
    /// The group of all who use it; None: each has its own.
    group: Option<u32>,
}

/// As the system's temporary directory is.
const FOR_ALL: Shared = Shared { mode: 0o1777, group: None };
const FOR_A_GROUP: Shared = Shared { mode: 0o2770, group: Some(20_100) };

/// A process of another user, who says where the ledgers are. It is killed when the test is over, however it ends.
struct User(Child);

impl User {
    fn start(part: &str, dir: &Path, user: u32, group: u32) -> std::io::Result<User> {
        // Not by its path, which may lead through directories that are closed to others.
        let child = Command::new("/proc/self/exe")
            .env("SIRE_LEDGER_TEST_PART", part)
            .env("SIRE_LEDGER_TEST_DIR", dir)
            .env("TORCHTOOLS_LOCK_DIR", dir.join("locks"))
            // Another one's, of which the ledgers know nothing.
            .env("SIRE_SHARED_DIR", dir.join("shared"))
            .stdout(Stdio::null())
            .uid(user)
            .gid(group)
            .spawn()?;
        Ok(User(child))
    }

    /// Whether it ends well, and in time.
    fn ends_well(&mut self) -> std::io::Result<bool> {
        let begun = Instant::now();
        while begun.elapsed() < LIMIT {
            if let Some(status) = self.0.try_wait()? {
                return Ok(status.success());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(false)
    }
}

impl Drop for User {
    fn drop(&mut self) {
        drop((self.0.kill(), self.0.wait()));
    }
}

/// Why this process cannot have other users share; None: it can.
fn obstacle(dir: &Path) -> Result<Option<String>, Box<dyn std::error::Error>> {
    let above = dir.ancestors().skip(1).map(std::fs::metadata).collect::<Result<Vec<_>, _>>()?;
    if own_user() != 0 {
        return Ok(Some("only root can be other users".to_owned()));
    }
    if above.iter().any(|info| info.permissions().mode() & 1 == 0) {
        return Ok(Some("other users cannot get to the temporary directory".to_owned()));
    }
    match User::start(NOBODY, dir, USERS.start, USERS.start) {
        Ok(mut nobody) => match nobody.ends_well()? {
            true => Ok(None),
            false => Err("the test binary cannot be run by another user".into()),
        },
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            Ok(Some(format!("this root may not be other users ({error})")))
        }
        Err(error) => Err(error.into()),
    }
}

fn users_race(shared: &Shared) -> Result<Completion, Failed> {
    let dir = tempfile::tempdir()?;
    if let Some(obstacle) = obstacle(dir.path())? {
        return Ok(Completion::ignored_with(obstacle));
    }
    race(dir.path(), shared)?;
    Ok(Completion::Completed)
}

fn race(dir: &Path, shared: &Shared) -> Outcome {
    let open_to = |path: &Path, mode| std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode));
    open_to(dir, 0o1777)?;
    let [locks, other] = ["locks", "shared"].map(|name| dir.join(name));
    for path in [&locks, &other] {
        std::fs::create_dir(path)?;
    }
    open_to(&other, 0o1777)?;
    std::os::unix::fs::chown(&locks, None, shared.group)?;
    open_to(&locks, shared.mode)?;
    let start = |user| User::start(USER, dir, user, shared.group.unwrap_or(user));
    let mut users = USERS.map(start).collect::<Result<Vec<_>, _>>()?;
    let outcomes = users.iter_mut().map(User::ends_well).collect::<Result<Vec<_>, _>>()?;
    assert_eq!(outcomes, [true; 5], "a user met an error");
    check_logs(dir)?;
    let names = |path: &Path| {
        Ok::<_, std::io::Error>(std::fs::read_dir(path)?.flatten().map(|entry| entry.file_name()).collect::<Vec<_>>())
    };
    assert_eq!(names(&locks)?.len(), 1, "there is one ledger: {:?}", names(&locks)?);
    assert_eq!(names(&other)?.len(), 0, "it was used for the ledger: {:?}", names(&other)?);
    assert!(Ledger::open(&locks, "GPU-race-0")?.entries()?.is_empty());
    if shared.group.is_some() {
        assert!(User::start(STRANGER, dir, USERS.end, USERS.end)?.ends_well()?, "a stranger was let in");
    }
    Ok(())
}

/// Who held how much when: from, until, bytes.
type Held = (u64, u64, u64);

/// Of all that was held at one moment, the most by `measure`.
fn most_at_once(held: &[Held], measure: impl Fn(&Held) -> u64) -> u64 {
    let is_held = |(from, until, _): &&Held, moment: u64| *from <= moment && moment < *until;
    let at = |moment: u64| held.iter().filter(|each| is_held(each, moment)).map(&measure).sum();
    held.iter().map(|(from, ..)| at(*from)).max().unwrap_or(0)
}

/// Never more than there is, though all wanted all of it, and all five had some at once.
fn check_logs(dir: &Path) -> Outcome {
    let mut held = Vec::new();
    for user in USERS {
        for line in std::fs::read_to_string(dir.join(format!("log-{user}")))?.lines() {
            let numbers = line.split(' ').map(str::parse).collect::<Result<Vec<u64>, _>>()?;
            held.push((numbers[0], numbers[1], numbers[2]));
        }
    }
    assert_eq!(held.len(), USERS.len() * (ROUNDS + 2));
    let most = most_at_once(&held, |each| each.2);
    assert!(most <= DEVICE, "{most} bytes were granted at once, of {DEVICE}");
    assert_eq!(most_at_once(&held, |_| 1), USERS.len() as u64, "they did not share");
    // The first held everything while the others waited for it: so says who ended well, and here that it was so for each.
    assert!(dir.join("first").exists() && held.iter().filter(|each| each.2 == DEVICE).count() == USERS.len());
    Ok(())
}
