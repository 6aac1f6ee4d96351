//! The life that is cut at every step, and the tracer.

use libtest_mimic::{Completion, Failed};
use sire_ledger::slices::{Next, Turn};
use sire_ledger::{Ledger, Memory, Patience, Want};
use std::path::Path;
use std::time::Duration;

type Outcome = Result<(), Box<dyn std::error::Error>>;

const PATIENT: Patience<'static> = Patience { timeout: Some(Duration::from_secs(20)), cancelled: &|| false };
const TOTAL: u64 = 1000;
/// Held by the test's own member throughout.
const BEFORE: u64 = 300;

fn full() -> Option<Memory> {
    Some(Memory { free: TOTAL, total: TOTAL })
}

/// What a child does from its beginning to its end, in a ledger in which others may have `BEFORE` bytes.
pub type Life = fn(&Path) -> Outcome;

/// A reservation that becomes smaller, ends, and is made again.
pub fn reserve(dir: &Path) -> Outcome {
    let member = Ledger::open(dir, "GPU-1")?.join()?;
    member.reserve(Want::Bytes(200), &full, PATIENT)?;
    member.note_owned(150)?;
    member.shrink(100)?;
    member.release()?;
    member.reserve(Want::Bytes(TOTAL - BEFORE), &full, PATIENT)?;
    Ok(())
}

/// A reservation that becomes larger.
pub fn resize(dir: &Path) -> Outcome {
    let ledger = Ledger::open(dir, "GPU-1")?;
    let (member, more) = (ledger.join()?, ledger.join()?);
    member.reserve(Want::Bytes(200), &full, PATIENT)?;
    more.reserve(Want::Bytes(50), &full, PATIENT)?;
    member.absorb(&more)?;
    drop(more);
    Ok(member.note_owned(250)?)
}

/// A turn, which must be free, and is queued for again.
pub fn take_turn(dir: &Path) -> Outcome {
    let turn = Turn::join(dir, "GPU-1", "")?;
    turn.queue()?;
    match turn.take()? {
        Next::Mine => Ok(turn.queue()?),
        other => Err(format!("the turn is not to be had: {other:?}").into()),
    }
}

/// What the child did before it was killed.
struct Lived {
    /// System calls that change something, before and after which it was stopped.
    stops: usize,
    /// It came to its end.
    ended: bool,
}

/// The exit status of a child that nobody may trace.
const UNTRACED: i32 = 77;

/// Lets a child live until stop number `last`, and kills it there.
fn live_until(life: Life, dir: &Path, last: usize) -> Result<Lived, Box<dyn std::error::Error>> {
    // SAFETY: the child uses its own descriptors and the heap of a process whose other threads hold no lock that it needs (glibc's heap is
    // made usable by fork); it ends by _exit.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: plain numbers; the child waits for its parent's first step.
        unsafe {
            if libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) != 0 {
                libc::_exit(UNTRACED);
            }
            libc::raise(libc::SIGSTOP);
            libc::_exit(i32::from(life(dir).is_err()));
        }
    }
    let mut lived = Lived { stops: 0, ended: false };
    let mut status = 0;
    // SAFETY: a child of ours, which nobody else waits for; `status` is a live local.
    while unsafe { libc::waitpid(child, &raw mut status, 0) } == child
        && !libc::WIFEXITED(status)
        && !libc::WIFSIGNALED(status)
    {
        lived.stops += usize::from(changes_something(child));
        if lived.stops > last {
            // SAFETY: plain numbers; the child has not been waited for, so its number is its own.
            unsafe { libc::kill(child, libc::SIGKILL) };
        } else {
            // SAFETY: a stopped child of ours.
            unsafe { libc::ptrace(libc::PTRACE_SYSCALL, child, 0, 0) };
        }
    }
    lived.ended = libc::WIFEXITED(status);
    if lived.ended && ![0, UNTRACED].contains(&libc::WEXITSTATUS(status)) {
        return Err("the child met an error".into());
    }
    Ok(lived)
}

/// Whether a stopped child is before or after a system call that writes, locks, opens, links or removes.
fn changes_something(child: libc::pid_t) -> bool {
    // SAFETY: all zeros is a value of this struct of numbers.
    let mut registers: libc::user_regs_struct = unsafe { std::mem::zeroed() };
    // SAFETY: a stopped child of ours; the struct is what this request writes.
    if unsafe { libc::ptrace(libc::PTRACE_GETREGS, child, 0, &raw mut registers) } != 0 {
        return false;
    }
    let is_question = registers.rdx == 0 || registers.rsi == libc::F_OFD_GETLK as u64;
    match registers.orig_rax as i64 {
        libc::SYS_fcntl => !is_question,
        libc::SYS_pwrite64
        | libc::SYS_openat
        | libc::SYS_linkat
        | libc::SYS_unlink
        | libc::SYS_fchmod
        | libc::SYS_close => true,
        _ => false,
    }
}

pub fn test(life: Life) -> Result<Completion, Failed> {
    let dir = tempfile::tempdir()?;
    let whole = live_until(life, dir.path(), usize::MAX)?;
    if whole.stops == 0 {
        return Ok(Completion::ignored_with("this system lets nobody trace a child"));
    }
    assert!(whole.ended && whole.stops > 30, "only {} stops: the child was not followed", whole.stops);
    (0..whole.stops).try_for_each(|stop| killed_at(life, stop)).map(|()| Completion::Completed)
}

fn killed_at(life: Life, stop: usize) -> Result<(), Failed> {
    // Every other time nobody was there before, so that the file has to be made.
    let dir = tempfile::tempdir()?;
    let before = if stop.is_multiple_of(2) { None } else { Some(Ledger::open(dir.path(), "GPU-1")?.join()?) };
    let held = if before.is_some() { BEFORE } else { 0 };
    if let Some(before) = &before {
        before.reserve(Want::Bytes(BEFORE), &full, PATIENT)?;
    }
    let lived = live_until(life, dir.path(), stop)?;
    assert!(!lived.ended || before.is_some(), "stop {stop} was not reached");
    let ledger = Ledger::open(dir.path(), "GPU-1")?;
    let bytes: Vec<u64> = ledger.entries()?.iter().map(|entry| entry.bytes).collect();
    assert_eq!(bytes, before.iter().map(|_| BEFORE).collect::<Vec<_>>(), "after stop {stop}");
    let now = Patience { timeout: Some(Duration::ZERO), ..PATIENT };
    let rest = ledger.join()?.reserve(Want::Bytes(TOTAL - held), &full, now);
    rest.map_err(|error| format!("after stop {stop}: {error}"))?;
    take_turn(dir.path()).map_err(|error| format!("after stop {stop}: {error}"))?;
    // The two ledgers, and a draft of one.
    let left = std::fs::read_dir(dir.path())?.count();
    assert!(left <= 3, "{left} files are left after stop {stop}");
    Ok(())
}
