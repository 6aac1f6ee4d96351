//! Processes that are stopped and killed at chosen moments, and what the others notice of it.
//!
//! The other processes are this test binary again, running `child_wants`.

use sire_ledger::layout::{self, Record, State};
use sire_ledger::{Entry, Error, Ledger, Member, Memory, Patience, Want};
use std::cell::{Cell, RefCell};
use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

mod calls;

use calls::Moment;

type Outcome = Result<(), Box<dyn std::error::Error>>;

const ALL: u64 = 100;
/// How long conditions are waited for that come about at once on a machine that is idle.
const LIMIT: Duration = Duration::from_secs(60);
const NOW: Patience<'static> = Patience { timeout: Some(Duration::ZERO), cancelled: &|| false };
const PATIENT: Patience<'static> = Patience { timeout: Some(LIMIT), cancelled: &|| false };

fn full() -> Option<Memory> {
    Some(Memory { free: ALL, total: ALL })
}

fn open(dir: &Path) -> sire_ledger::Result<Ledger> {
    Ledger::open(dir, "GPU-1")
}

/// Why a request was refused for which no time was given.
fn refusal(member: &Member, bytes: u64) -> Result<String, Box<dyn std::error::Error>> {
    match member.reserve(Want::Bytes(bytes), &full, NOW) {
        Err(Error::TimedOut { why, .. }) => Ok(why),
        other => Err(format!("not a time-out: {other:?}").into()),
    }
}

fn until(what: &str, mut is_so: impl FnMut() -> Result<bool, Box<dyn std::error::Error>>) -> Outcome {
    let begun = Instant::now();
    while !is_so()? {
        if begun.elapsed() > LIMIT {
            return Err(format!("in vain: {what}").into());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// What a child does when it has got what it wants.
const KEEP: &str = "keep";
const PASS_ON: &str = "pass on";
/// Before that: stops itself, once, when it is at the desk for its place in the queue.
const STOP_AT_THE_DESK: &str = "stop at the desk";

#[test]
#[ignore = "run by the other tests as another process"]
fn child_wants() -> Outcome {
    let Some(dir) = std::env::var_os("SIRE_LEDGER_TEST_DIR") else { return Ok(()) };
    let (dir, then) = (Path::new(&dir), std::env::var("SIRE_LEDGER_TEST_THEN")?);
    let bytes = std::env::var("SIRE_LEDGER_TEST_BYTES")?.parse()?;
    let member = open(dir)?.join()?;
    let reserve = || member.reserve(Want::Bytes(bytes), &full, PATIENT);
    if then == STOP_AT_THE_DESK {
        // The first that is written now is the place in the queue.
        let stopped = Cell::new(false);
        calls::at_each(Moment::BeforeWrite, move || stop_once(&stopped), reserve)?;
    } else {
        reserve()?;
    }
    let mut granted = OpenOptions::new().create(true).append(true).open(dir.join("granted"))?;
    granted.write_all(format!("{}\n", std::process::id()).as_bytes())?;
    if then == PASS_ON {
        return Ok(());
    }
    // Until it is killed, or whoever started it is gone.
    std::thread::sleep(LIMIT);
    Ok(())
}

fn stop_once(stopped: &Cell<bool>) {
    if !stopped.replace(true) {
        // SAFETY: a plain number; the process goes on here when it is told to.
        unsafe { libc::raise(libc::SIGSTOP) };
    }
}

/// A child that is killed when the test is over, however it ends.
struct Other(Child);

impl Other {
    fn start(dir: &Path, bytes: u64, then: &str) -> std::io::Result<Other> {
        let child = Command::new(std::env::current_exe()?)
            .args(["--exact", "child_wants", "--ignored", "--nocapture", "--test-threads=1"])
            .env("SIRE_LEDGER_TEST_DIR", dir)
            .env("SIRE_LEDGER_TEST_BYTES", bytes.to_string())
            .env("SIRE_LEDGER_TEST_THEN", then)
            .stdout(Stdio::null())
            .spawn()?;
        Ok(Other(child))
    }

    fn signal(&self, signal: i32) {
        // SAFETY: kill takes plain numbers; the child has not been waited for, so its number is its own.
        unsafe { libc::kill(self.0.id() as i32, signal) };
    }

    /// Returns when it has stopped, by itself or because it was told to.
    fn wait_until_stopped(&self) -> Outcome {
        let (mut status, mut changed) = (0, 0);
        until("the child stops", || {
            // SAFETY: a child of ours; `status` is a live local.
            changed = unsafe { libc::waitpid(self.0.id() as i32, &raw mut status, libc::WUNTRACED | libc::WNOHANG) };
            Ok(changed != 0)
        })?;
        if changed > 0 && libc::WIFSTOPPED(status) { Ok(()) } else { Err("the child has ended".into()) }
    }

    fn stop(&self) -> Outcome {
        self.signal(libc::SIGSTOP);
        self.wait_until_stopped()
    }

    fn kill(&mut self) -> std::io::Result<()> {
        self.0.kill()?;
        self.0.wait().map(drop)
    }

    /// Its place in the ledger, as soon as it is in that state.
    fn wait_until(&self, ledger: &Ledger, state: State) -> Result<Entry, Box<dyn std::error::Error>> {
        let mut found = None;
        until("the child gets that far", || {
            let is_it = |entry: &Entry| entry.pid == self.0.id() && entry.state == state;
            found = ledger.entries()?.into_iter().find(is_it);
            Ok(found.is_some())
        })?;
        Ok(found.ok_or("there is none")?)
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

/// Somebody had pressed Ctrl-Z in a program that was just taking its place in the queue. Others that would not wait (`blocking=False`) waited for five
/// seconds, and those that would wait for ever were refused after them: while a process sat at the desk nobody else's time counted.
#[test]
fn who_is_stopped_at_the_desk_costs_others_no_more_than_their_time() -> Outcome {
    let dir = tempfile::tempdir()?;
    let ledger = open(dir.path())?;
    let (holder, member) = (ledger.join()?, ledger.join()?);
    holder.reserve(Want::Bytes(10), &full, NOW)?;
    let mut stopped = Other::start(dir.path(), ALL, STOP_AT_THE_DESK)?;
    stopped.wait_until_stopped()?;
    let begun = Instant::now();
    assert!(refusal(&member, 10)?.contains("if one is stopped"), "{}", refusal(&member, 10)?);
    let short = Patience { timeout: Some(Duration::from_millis(100)), ..NOW };
    assert!(matches!(member.reserve(Want::Bytes(10), &full, short), Err(Error::TimedOut { .. })));
    assert!(begun.elapsed() < Duration::from_secs(3), "two refusals took {:?}", begun.elapsed());
    // Whoever makes room needs no desk.
    holder.shrink(5)?;
    // Who would wait for ever is still waiting when the other one is gone.
    let looks = AtomicU64::new(0);
    let counted = || {
        looks.fetch_add(1, Ordering::Relaxed);
        false
    };
    std::thread::scope(|scope| -> Outcome {
        let waits = scope
            .spawn(|| member.reserve(Want::Bytes(ALL - 5), &full, Patience { timeout: None, cancelled: &counted }));
        until("it looks", || Ok(looks.load(Ordering::Relaxed) >= 3 || waits.is_finished()))?;
        stopped.kill()?;
        assert_eq!(waits.join().map_err(|_| "it panicked")??, ALL - 5);
        Ok(())
    })
}

#[test]
fn a_waiter_that_is_stopped_is_passed_by_and_keeps_its_place() -> Outcome {
    let dir = tempfile::tempdir()?;
    let ledger = open(dir.path())?;
    let (holder, passing, last) = (ledger.join()?, ledger.join()?, ledger.join()?);
    holder.reserve(Want::Bytes(60), &full, NOW)?;
    let first = Other::start(dir.path(), ALL, KEEP)?;
    first.wait_until(&ledger, State::Waiting)?;
    first.stop()?;
    let begun = Instant::now();
    assert!(refusal(&passing, 40)?.contains("came first"), "it was passed by at once");
    passing.reserve(Want::Bytes(40), &full, PATIENT)?;
    assert!(begun.elapsed() > Duration::from_secs(1), "it was passed by after {:?}", begun.elapsed());
    assert!(refusal(&last, 1)?.contains("are missing"), "it is waited for again, though it sleeps");
    first.signal(libc::SIGCONT);
    until("it has its place back", || Ok(refusal(&last, 1)?.contains("came first")))?;
    drop((holder, passing));
    assert_eq!(first.wait_until(&ledger, State::Holding)?.bytes, ALL);
    Ok(())
}

#[test]
fn a_holder_that_is_stopped_keeps_what_it_has_and_a_dead_one_does_not() -> Outcome {
    let dir = tempfile::tempdir()?;
    let ledger = open(dir.path())?;
    let mut first = Other::start(dir.path(), 70, KEEP)?;
    first.wait_until(&ledger, State::Holding)?;
    first.stop()?;
    let second = ledger.join()?;
    assert_eq!(refusal(&second, 40)?, "10 bytes are missing: others own or have reserved them");
    assert_eq!(second.reserved(), 0);
    // Also when it has been silent for so long that a waiter would be passed by.
    let long = Patience { timeout: Some(Duration::from_millis(2200)), ..NOW };
    assert!(matches!(second.reserve(Want::Bytes(40), &full, long), Err(Error::TimedOut { .. })));
    second.reserve(Want::Bytes(30), &full, NOW)?;
    first.kill()?;
    second.reserve(Want::Bytes(ALL), &full, NOW)?;
    assert_eq!(ledger.entries()?.iter().map(|entry| entry.bytes).collect::<Vec<_>>(), [ALL]);
    Ok(())
}

/// The places that they have in the file are others than those in the queue: those alone count.
#[test]
fn eight_processes_are_served_in_the_order_in_which_they_came() -> Outcome {
    let dir = tempfile::tempdir()?;
    let ledger = open(dir.path())?;
    let holder = ledger.join()?;
    holder.reserve(Want::Bytes(ALL), &full, NOW)?;
    let mut seats = (0..8).map(|_| ledger.join().map(Some)).collect::<sire_ledger::Result<Vec<_>>>()?;
    let mut came = Vec::new();
    for seat in [5, 2, 7, 0, 3, 6, 1, 4] {
        // The only slot in front that is free.
        seats[seat] = None;
        let other = Other::start(dir.path(), ALL, PASS_ON)?;
        let entry = other.wait_until(&ledger, State::Waiting)?;
        assert_eq!(entry.slot as usize, seat + 1);
        came.push((entry.ticket, other));
    }
    assert!(came.is_sorted_by(|a, b| a.0 < b.0), "who came later has the earlier ticket");
    let granted = dir.path().join("granted");
    assert!(!granted.exists(), "somebody was served before there was room");
    holder.release()?;
    let expected: String = came.iter().map(|(_, other)| format!("{}\n", other.0.id())).collect();
    until("all are served", || {
        Ok(std::fs::read_to_string(&granted).is_ok_and(|served| served.len() >= expected.len()))
    })?;
    assert_eq!(std::fs::read_to_string(&granted)?, expected);
    Ok(())
}

/// What a process leaves behind that is killed while it holds everything.
fn leave_a_dead_holder(dir: &Path) -> Outcome {
    let dead = Record { sequence: 3, state: State::Holding, bytes: ALL, ticket: 1, ..Record::default() };
    let file = OpenOptions::new().write(true).open(dir.join("sire-ledger-GPU-1"))?;
    Ok(file.write_all_at(&layout::encode(&dead), layout::HEADER)?)
}

/// Somebody who would not wait was refused all bytes of an idle GPU: a new member had just taken the slot of one that was killed, and for a moment the
/// dead one's record counted as the new one's.
#[test]
fn a_new_member_is_at_no_moment_taken_for_its_dead_predecessor() -> Outcome {
    let dir = tempfile::tempdir()?;
    let (ledger, newcomer) = (open(dir.path())?, open(dir.path())?.join()?);
    // The newcomer has slot 0, which the dead one is to have had.
    drop(newcomer);
    leave_a_dead_holder(dir.path())?;
    let (looks, held) = (Rc::new(Cell::new(0)), Rc::new(Cell::new(0)));
    let (looked, seen, watching) = (Rc::clone(&looks), Rc::clone(&held), ledger.clone());
    let look = move || {
        looked.set(looked.get() + 1);
        let entries = watching.entries().unwrap_or_default();
        seen.set(seen.get() + entries.iter().map(|entry| entry.bytes).sum::<u64>());
    };
    let member = calls::at_each(Moment::BeforeWrite, look, || open(dir.path())?.join())?;
    assert!(looks.get() >= 3, "only {} writes were seen", looks.get());
    assert_eq!(held.get(), 0, "bytes that nobody holds were counted");
    assert_eq!(ledger.entries()?.len(), 1);
    drop(member);
    Ok(())
}

/// The same for whoever has read the dead one's record, and is slow to look whether somebody lives there.
#[test]
fn who_moves_in_while_a_dead_ones_record_is_read_is_not_taken_for_it() -> Outcome {
    let dir = tempfile::tempdir()?;
    let ledger = open(dir.path())?;
    leave_a_dead_holder(dir.path())?;
    let moved_in = Rc::new(RefCell::new(None));
    let (place, joining) = (Rc::clone(&moved_in), ledger.clone());
    let join_once = move || {
        let mut place = place.borrow_mut();
        if place.is_none() {
            *place = joining.join().ok();
        }
    };
    let entries = calls::at_each(Moment::AfterRead, join_once, || ledger.entries())?;
    assert!(moved_in.borrow().is_some(), "nobody moved in");
    assert_eq!(entries.iter().map(|entry| entry.bytes).sum::<u64>(), 0, "the dead one counts: {entries:?}");
    Ok(())
}
