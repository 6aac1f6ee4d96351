//! Processes that race for one device's memory while some of them are killed and stopped at any moment, the wall clock of each jumps whenever it is
//! read, and the disk is full now and then. The judge is the software device, which enforces its budget: whoever was granted bytes must get them
//! from it, every time.
//!
//! The other processes are this test binary again, running `child_races`.

use sire_ledger::{Error, Ledger, Member, Memory, Patience, Want};
use sire_sim::{Machine, Options, Poison};
use std::cell::{Cell, RefCell};
use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

mod weather;

type Outcome = Result<(), Box<dyn std::error::Error>>;

const MIB: u64 = 1 << 20;
const DEVICE: u64 = 64 * MIB;
const RACERS: usize = 8;
const DEVICES: u32 = 2;

/// Numbers that need no quality, only variety.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }
}

fn device(dir: &Path) -> Result<Machine, Box<dyn std::error::Error>> {
    Ok(Machine::new(Options {
        devices: DEVICES,
        memory: DEVICE,
        dir: Some(dir.join("device")),
        poison: Poison::Off,
        ..Options::default()
    })?)
}

/// The ledger of a device. Its name is the device's own, not the number under which a process happens to see it.
fn ledger(dir: &Path, device: u32) -> sire_ledger::Result<Ledger> {
    Ledger::open(dir, &format!("GPU-race-{device}"))
}

fn memory(machine: &Machine, device: u32) -> Option<Memory> {
    machine.memory_info(device).ok().map(|(free, total)| Memory { free, total })
}

fn patient(timeout: Duration) -> Patience<'static> {
    Patience { timeout: Some(timeout), cancelled: &|| false }
}

#[test]
#[ignore = "run by the other tests as another process"]
fn child_races() -> Outcome {
    let Some(dir) = std::env::var_os("SIRE_LEDGER_TEST_DIR") else { return Ok(()) };
    let (dir, rounds) = (Path::new(&dir), std::env::var("SIRE_LEDGER_TEST_ROUNDS")?.parse::<usize>()?);
    let machine = device(dir)?;
    // What came of each round, also of those before this racer was killed.
    let path = dir.join(format!("rounds-{}", std::env::var("SIRE_LEDGER_TEST_RACER")?));
    let mut log = OpenOptions::new().create(true).append(true).open(&path)?;
    let done = std::fs::read_to_string(&path)?.lines().count();
    let mut dice = Dice(u64::from(std::process::id()) * 0x9e37_79b9 + 1);
    weather::begin(dice.roll(u64::MAX));
    let mut members = Vec::new();
    while members.len() < DEVICES as usize {
        members.extend(room(ledger(dir, members.len() as u32).and_then(|ledger| ledger.join()))?);
    }
    for _ in done..rounds {
        let gpu = dice.roll(u64::from(DEVICES)) as u32;
        let waited = reserve_and_use(&machine, gpu, &members[gpu as usize], dir, &mut dice)?;
        // What everybody else's clock says at this moment: nobody may ask it.
        let _ = SystemTime::now();
        let met = weather::met();
        // At once: whoever is killed has said all of it or nothing.
        log.write_all(format!("{} {} {}\n", waited.as_micros(), met.jumps, met.full).as_bytes())?;
    }
    Ok(())
}

/// One round; how long it waited.
fn reserve_and_use(
    machine: &Machine,
    gpu: u32,
    member: &Member,
    dir: &Path,
    dice: &mut Dice,
) -> Result<Duration, Box<dyn std::error::Error>> {
    let bytes = (1 + dice.roll(20)) * 2 * MIB;
    let begun = Instant::now();
    let free = || memory(machine, gpu);
    while !written(member.reserve(Want::Bytes(bytes), &free, patient(Duration::from_secs(60))))? {}
    let waited = begun.elapsed();
    let mut owned = Vec::new();
    while (owned.len() as u64) * 2 * MIB < bytes {
        // The point of it all: what was granted is there.
        let Ok(handle) = machine.create(gpu, 2 * MIB, 0) else {
            std::fs::write(dir.join(format!("overcommit-{}-{}", std::process::id(), dice.0)), [])?;
            break;
        };
        owned.push(handle);
        while !written(member.note_owned(owned.len() as u64 * 2 * MIB))? {}
    }
    std::thread::sleep(Duration::from_micros(dice.roll(2000)));
    let keep = dice.roll(owned.len().max(1) as u64) as usize;
    while !written(member.note_owned(keep as u64 * 2 * MIB))? {}
    for handle in owned.drain(keep..) {
        machine.release(handle)?;
    }
    while !written(member.shrink(keep as u64 * 2 * MIB))? {}
    while !written(member.note_owned(0))? {}
    for handle in owned {
        machine.release(handle)?;
    }
    while !written(member.release())? {}
    Ok(waited)
}

/// None if the disk had no room for it; other errors are errors.
fn room<T>(outcome: sire_ledger::Result<T>) -> sire_ledger::Result<Option<T>> {
    match outcome {
        Err(Error::Io { error, .. }) if error.kind() == std::io::ErrorKind::StorageFull => Ok(None),
        done => done.map(Some),
    }
}

/// Whether the disk had room for it.
fn written<T>(outcome: sire_ledger::Result<T>) -> sire_ledger::Result<bool> {
    room(outcome).map(|done| done.is_some())
}

/// What the racers say of their rounds: microseconds that each waited (sorted), jumps of the wall clock, times that the disk was full.
fn rounds_of(dir: &Path) -> Result<(Vec<u64>, u64, u64), Box<dyn std::error::Error>> {
    let (mut waits, mut jumps, mut full) = (Vec::new(), 0, 0);
    for racer in 0..RACERS {
        for line in std::fs::read_to_string(dir.join(format!("rounds-{racer}")))?.lines() {
            let numbers = line.split(' ').map(str::parse).collect::<Result<Vec<u64>, _>>()?;
            let [waited, jumped, times_full] = numbers[..] else {
                return Err(format!("a line is torn: {line}").into());
            };
            waits.push(waited);
            jumps += jumped;
            full += times_full;
        }
    }
    waits.sort_unstable();
    Ok((waits, jumps, full))
}

fn racer(dir: &Path, number: usize, rounds: usize) -> std::io::Result<Child> {
    Command::new(std::env::current_exe()?)
        .args(["--exact", "child_races", "--ignored", "--nocapture", "--test-threads=1"])
        .env("SIRE_LEDGER_TEST_DIR", dir)
        .env("SIRE_LEDGER_TEST_ROUNDS", rounds.to_string())
        .env("SIRE_LEDGER_TEST_RACER", number.to_string())
        .stdout(Stdio::null())
        .spawn()
}

fn signal(child: &Child, signal: i32) {
    // SAFETY: kill takes plain numbers; the child has not been waited for, so its number is its own.
    unsafe { libc::kill(child.id() as i32, signal) };
}

/// Kills and stops racers until all have done their rounds; how many of each.
fn disturb(dir: &Path, racers: &mut [Child], rounds: usize) -> Result<(usize, usize), Box<dyn std::error::Error>> {
    let mut dice = Dice(0x5eed);
    let (mut killed, mut stopped) = (0, 0);
    let begun = Instant::now();
    let patience = Duration::from_secs(120 + rounds as u64);
    while racers.iter_mut().any(|child| child.try_wait().is_ok_and(|status| status.is_none())) {
        assert!(begun.elapsed() < patience, "the race does not end: somebody waits for ever");
        std::thread::sleep(Duration::from_millis(3 + dice.roll(20)));
        let number = dice.roll(RACERS as u64) as usize;
        let Some(victim) = racers.get_mut(number) else { continue };
        if victim.try_wait()?.is_some() {
            continue;
        }
        if dice.roll(3) == 0 && killed < RACERS * rounds {
            signal(victim, libc::SIGKILL);
            victim.wait()?;
            killed += 1;
            *victim = racer(dir, number, rounds)?;
        } else {
            signal(victim, libc::SIGSTOP);
            std::thread::sleep(Duration::from_millis(dice.roll(15)));
            signal(victim, libc::SIGCONT);
            stopped += 1;
        }
    }
    Ok((killed, stopped))
}

/// Bytes of the devices that nobody can reserve any more.
fn lost(dir: &Path, machine: &Machine) -> Result<u64, Box<dyn std::error::Error>> {
    let mut lost = 0;
    for device in 0..DEVICES {
        let ledger = ledger(dir, device)?;
        assert!(ledger.entries()?.is_empty(), "the dead hold nothing: {:?}", ledger.entries()?);
        let rest = Want::Rest { margin: 0 };
        lost += DEVICE - ledger.join()?.reserve(rest, &|| memory(machine, device), patient(Duration::ZERO))?;
    }
    Ok(lost)
}

#[test]
fn what_is_granted_is_there_whoever_is_killed_or_stopped() -> Outcome {
    let dir = tempfile::tempdir()?;
    std::fs::create_dir(dir.path().join("device"))?;
    let machine = device(dir.path())?;
    let rounds = std::env::var("SIRE_TEST_LEDGER_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(63);
    let mut racers = (0..RACERS).map(|number| racer(dir.path(), number, rounds)).collect::<Result<Vec<_>, _>>()?;
    let (killed, stopped) = disturb(dir.path(), &mut racers, rounds)?;
    for mut racer in racers {
        assert!(racer.wait()?.success(), "a racer met an error");
    }
    assert!(killed > 0 && stopped > 0, "nobody was disturbed: {killed} killed, {stopped} stopped");
    let lost = lost(dir.path(), &machine)?;
    let (waits, jumps, full) = rounds_of(dir.path())?;
    let count = waits.len();
    assert_eq!(count, RACERS * rounds, "a round was lost, or done twice");
    assert_eq!(jumps, count as u64, "the racers read the wall clock once a round; somebody else did, too");
    assert!(full > 0, "the weather was fine");
    println!(
        "{count} rounds, {killed} killed, {stopped} stopped, {jumps} jumps of a wall clock, {full} times a full disk"
    );
    let starts_so = |entry: &std::fs::DirEntry| entry.file_name().to_string_lossy().starts_with("overcommit-");
    let overcommits = std::fs::read_dir(dir.path())?.flatten().filter(starts_so).count();
    let at = |share: usize| waits[(count * share / 100).min(count - 1)] as f64 / 1e3;
    println!("figure: reserve.overcommits {overcommits}\nfigure: reserve.lost {lost}");
    println!("figure: reserve.wait_p50_ms {}\nfigure: reserve.wait_p99_ms {}", at(50), at(99));
    assert_eq!(
        (overcommits, lost),
        (0, 0),
        "what was granted was not there; or bytes that nobody can reserve any more"
    );
    Ok(())
}

/// Where no file may grow.
#[test]
#[ignore = "run by another test as another process, which it limits"]
fn child_on_a_full_disk() -> Outcome {
    let Some(dir) = std::env::var_os("SIRE_LEDGER_TEST_DIR") else { return Ok(()) };
    let dir = Path::new(&dir);
    let old = ledger(dir, 0)?;
    let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: plain numbers, a live local; nobody else is in this process.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &raw const none), 0);
    }
    let full = || Some(Memory { free: 100, total: 100 });
    let refused = ledger(dir, 1);
    let Err(Error::Io { .. }) = &refused else { return Err(format!("made on a full disk: {refused:?}").into()) };
    let member = old.join();
    // A limit on the size of files also stops writes inside of a file, unlike a full disk: that is refused, and nothing is half said.
    if let Ok(member) = member {
        assert!(member.reserve(Want::Bytes(40), &full, patient(Duration::ZERO)).is_err());
    }
    Ok(())
}

#[test]
fn a_full_disk_is_refused_and_nothing_is_left() -> Outcome {
    let dir = tempfile::tempdir()?;
    let other = ledger(dir.path(), 0)?.join()?;
    let full = || Some(Memory { free: 100, total: 100 });
    other.reserve(Want::Bytes(30), &full, patient(Duration::ZERO))?;
    let child = Command::new(std::env::current_exe()?)
        .args(["--exact", "child_on_a_full_disk", "--ignored", "--nocapture", "--test-threads=1"])
        .env("SIRE_LEDGER_TEST_DIR", dir.path())
        .output()?;
    assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stdout));
    assert_eq!(std::fs::read_dir(dir.path())?.count(), 1, "a draft was left");
    let entries = ledger(dir.path(), 0)?.entries()?;
    assert_eq!(
        entries.iter().map(|entry| entry.bytes).collect::<Vec<_>>(),
        [30],
        "others lost, or the failed one left something"
    );
    other.reserve(Want::Bytes(100), &full, patient(Duration::ZERO))?;
    Ok(())
}

#[test]
fn saying_what_is_owned_is_one_small_write() -> Outcome {
    let dir = tempfile::tempdir()?;
    let ledger = Ledger::open(dir.path(), "GPU-1")?;
    let member = ledger.join()?;
    let full = || Some(Memory { free: 10_000, total: 10_000 });
    member.reserve(Want::Bytes(10_000), &full, patient(Duration::ZERO))?;
    let mut times = Vec::new();
    for owned in 0..2000 {
        let begun = Instant::now();
        member.note_owned(owned)?;
        times.push(begun.elapsed());
    }
    times.sort_unstable();
    assert_eq!(ledger.entries()?[0].owned, 1999);
    println!("figure: ledger.update_ns {}", times[times.len() / 2].as_nanos());
    Ok(())
}

#[test]
fn what_is_missing_is_said_and_more_than_there_is_refused_at_once() -> Outcome {
    let dir = tempfile::tempdir()?;
    let ledger = Ledger::open(dir.path(), "GPU-a/b")?;
    let full = || Some(Memory { free: 100, total: 100 });
    let (first, second) = (ledger.join()?, ledger.join()?);
    first.reserve(Want::Bytes(70), &full, patient(Duration::ZERO))?;
    let refused = second.reserve(Want::Bytes(40), &full, patient(Duration::from_millis(50)));
    let Err(Error::TimedOut { why, .. }) = refused else { return Err(format!("not a time-out: {refused:?}").into()) };
    assert!(why.contains("10 bytes are missing"), "{why}");
    let refused = second.reserve(Want::Bytes(101), &full, patient(Duration::ZERO));
    assert!(matches!(refused, Err(Error::TooLarge { wanted: 101, total: 100 })), "{refused:?}");
    Ok(())
}

#[test]
fn a_wait_can_be_ended_and_leaves_the_queue() -> Outcome {
    let dir = tempfile::tempdir()?;
    let ledger = Ledger::open(dir.path(), "GPU-1")?;
    let full = || Some(Memory { free: 100, total: 100 });
    let (first, second, third) = (ledger.join()?, ledger.join()?, ledger.join()?);
    first.reserve(Want::Bytes(60), &full, patient(Duration::ZERO))?;
    let cancelled = Patience { timeout: None, cancelled: &|| true };
    assert!(matches!(second.reserve(Want::Bytes(50), &full, cancelled), Err(Error::Cancelled)));
    // Had the second stayed in the queue, the third would be behind it.
    third.reserve(Want::Bytes(40), &full, patient(Duration::ZERO))?;
    Ok(())
}

/// The file was gone when somebody cancelled, and what was said was that the ledger could not be written to.
#[test]
fn why_a_wait_ended_is_said_even_if_the_place_in_the_queue_cannot_be_given_up() -> Outcome {
    let dir = tempfile::tempdir()?;
    let ledger = Ledger::open(dir.path(), "GPU-1")?;
    let (first, second) = (ledger.join()?, ledger.join()?);
    let full = || Some(Memory { free: 100, total: 100 });
    first.reserve(Want::Bytes(60), &full, patient(Duration::ZERO))?;
    let file = OpenOptions::new().write(true).open(dir.path().join("sire-ledger-GPU-1"))?;
    let cancelled = Patience { timeout: None, cancelled: &|| file.set_len(0).is_ok() };
    let refused = second.reserve(Want::Bytes(50), &full, cancelled);
    assert!(matches!(refused, Err(Error::Cancelled)), "{refused:?}");
    Ok(())
}

/// A driver may take its time, and whoever asks it may be stopped meanwhile: the desk is not his.
#[test]
fn others_take_their_places_while_somebody_asks_the_driver() -> Outcome {
    let dir = tempfile::tempdir()?;
    let ledger = || Ledger::open(dir.path(), "GPU-1");
    let (member, other) = (ledger()?.join()?, ledger()?.join()?);
    let full = || Some(Memory { free: 100, total: 100 });
    let (answers, refused) = (Cell::new(0), RefCell::new(None));
    let slow = || {
        answers.set(answers.get() + 1);
        // The first answer is how much there is; this one is wanted for a look.
        if answers.get() == 2 {
            refused.replace(other.reserve(Want::Bytes(10), &full, patient(Duration::ZERO)).err());
        }
        full()
    };
    assert_eq!(member.reserve(Want::Bytes(70), &slow, patient(Duration::ZERO))?, 70);
    let why = refused.take().ok_or("it was not asked for a look")?.to_string();
    assert!(why.contains("one other process came first"), "{why}");
    Ok(())
}

/// A holder gave its memory back and took it again between two looks at what it says, and in between the driver was asked: bytes counted as free that
/// were promised.
#[test]
fn what_is_free_only_while_a_holder_has_given_it_back_is_not_granted() -> Outcome {
    let dir = tempfile::tempdir()?;
    let ledger = Ledger::open(dir.path(), "GPU-1")?;
    let (holder, member) = (ledger.join()?, ledger.join()?);
    let free = |free| move || Some(Memory { free, total: 100 });
    holder.reserve(Want::Bytes(60), &free(100), patient(Duration::ZERO))?;
    holder.note_owned(60)?;
    let gives_and_takes = || {
        holder.note_owned(0).ok()?;
        let answer = free(100)();
        holder.note_owned(60).ok()?;
        answer
    };
    let refused = member.reserve(Want::Bytes(50), &gives_and_takes, patient(Duration::ZERO));
    let Err(Error::TimedOut { why, .. }) = refused else { return Err(format!("not a time-out: {refused:?}").into()) };
    assert!(why.contains("changed what they have"), "{why}");
    assert_eq!(member.reserve(Want::Bytes(40), &free(40), patient(Duration::ZERO))?, 40);
    Ok(())
}

/// Many times, because the parent may leave before the child has run a single instruction of its own.
#[test]
fn a_forked_child_has_no_reservation_and_keeps_none_alive() -> Outcome {
    (0..200).try_for_each(|_| fork_and_leave())
}

fn fork_and_leave() -> Outcome {
    let dir = tempfile::tempdir()?;
    let ledger = Ledger::open(dir.path(), "GPU-1")?;
    let full = || Some(Memory { free: 100, total: 100 });
    let member = ledger.join()?;
    member.reserve(Want::Bytes(100), &full, patient(Duration::ZERO))?;
    let mut ends = [0; 2];
    // SAFETY: `ends` is a live array of two.
    assert_eq!(unsafe { libc::pipe(ends.as_mut_ptr()) }, 0);
    // SAFETY: the child only asks the ledger, which takes no lock of another thread here, and ends by _exit.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let forked = matches!(member.shrink(1), Err(Error::Forked)) && matches!(ledger.entries(), Err(Error::Forked));
        let mut byte = 0u8;
        // SAFETY: the child waits until the parent closes its end, then ends without running the parent's handlers.
        unsafe {
            libc::close(ends[1]);
            libc::read(ends[0], (&raw mut byte).cast(), 1);
            libc::_exit(i32::from(!forked));
        }
    }
    drop(member);
    assert!(ledger.entries()?.is_empty(), "the child keeps the lock of its parent alive");
    let mut status = -1;
    // SAFETY: plain descriptors of ours; `status` is a live local.
    unsafe {
        libc::close(ends[1]);
        libc::close(ends[0]);
        libc::waitpid(child, &mut status, 0);
    }
    assert_eq!(libc::WEXITSTATUS(status), 0, "the child could use its parent's reservation");
    Ok(())
}

/// One thread joins and leaves, another forks: no child, whenever it was forked, has a description of the ledger. One that was open but
/// not noted at the fork would keep the lock that its parent takes a moment later, after the parent's death too.
#[test]
fn a_fork_meets_no_description_that_is_only_half_opened() -> Outcome {
    use std::os::unix::fs::MetadataExt;
    let dir = tempfile::tempdir()?;
    let ledger = Ledger::open(dir.path(), "GPU-1")?;
    let file = std::fs::metadata(dir.path().join("sire-ledger-GPU-1"))?;
    let (stop, joined) = (AtomicBool::new(false), AtomicU64::new(0));
    let found = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                joined.fetch_add(u64::from(ledger.join().is_ok()), Ordering::Relaxed);
            }
        });
        let found = (0..400).find(|_| fork_and_count(file.dev(), file.ino()) != 0);
        stop.store(true, Ordering::Relaxed);
        found
    });
    assert!(joined.load(Ordering::Relaxed) > 100, "nothing was opened meanwhile");
    assert_eq!(found, None, "a child had a description of the ledger");
    Ok(())
}

/// How many descriptors of a forked child are of that file.
fn fork_and_count(device: u64, inode: u64) -> i32 {
    // SAFETY: the child calls only fstat and _exit, which are allowed there.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let mut count = 0;
        for fd in 0..256 {
            // SAFETY: an all-zero stat is a valid value; fstat writes it or fails.
            let mut info: libc::stat = unsafe { std::mem::zeroed() };
            // SAFETY: as above.
            let known = unsafe { libc::fstat(fd, &raw mut info) } == 0;
            count += i32::from(known && info.st_dev == device && info.st_ino == inode);
        }
        // SAFETY: ends the child without running the parent's handlers.
        unsafe { libc::_exit(count.min(100)) };
    }
    let mut status = -1;
    // SAFETY: a child of ours; `status` is a live local.
    unsafe { libc::waitpid(child, &raw mut status, 0) };
    libc::WEXITSTATUS(status)
}
