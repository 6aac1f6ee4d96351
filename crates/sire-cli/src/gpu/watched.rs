//! A program that runs under our eyes: it gets the signals that we get, ends with us, and what it and its children have of a GPU is added up.
//!
//! It stays in our process group, and thereby in the foreground of a terminal, beside whatever else a pipe joins it with. What the terminal sends
//! (Ctrl-C) goes to the whole group, so that the program has it from there; what was sent to us alone is passed on. Of what the terminal has sent the
//! kernel says so. Of what a process has sent it does not say whether it was for us or for the group: `kill -INT -GROUP` reaches the program twice.

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, Command, ExitStatus};
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::{Duration, Instant};

use crate::failure::Failure;

/// The program's number, for the handler of signals.
static PROGRAM: AtomicI32 = AtomicI32::new(0);

/// How long what is told to end may take, and how often it is looked at meanwhile.
const KINDLY: Duration = Duration::from_secs(3);
const GLANCE: Duration = Duration::from_millis(20);

/// What people and schedulers send.
const PASSED_ON: [libc::c_int; 6] =
    [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT, libc::SIGUSR1, libc::SIGUSR2];

extern "C" fn pass_on(signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    let program = PROGRAM.load(Ordering::SeqCst);
    // SAFETY: the kernel passes a valid `siginfo_t` to handlers that are registered with SA_SIGINFO.
    let is_the_groups = unsafe { (*info).si_code } == libc::SI_KERNEL;
    // SAFETY: no memory is touched. The end of a terminal is told to the leader of its session only.
    let is_ours_alone = signal == libc::SIGHUP && unsafe { libc::getsid(0) == libc::getpid() };
    if program > 0 && (!is_the_groups || is_ours_alone) {
        // SAFETY: async-signal-safe, and takes plain numbers.
        unsafe { libc::kill(program, signal) };
    }
}

/// Starts the program, with these variables beside ours.
pub fn start(command: &[OsString], variables: &[(&str, String)]) -> Result<Child, Failure> {
    let Some((program, arguments)) = command.split_first() else {
        return Err(
            Failure::usage("no program was given").advice("Put it behind '--', for example: -- python train.py")
        );
    };
    let parent = std::process::id();
    let mut child = Command::new(program);
    child.args(arguments).envs(variables.iter().map(|(name, value)| (name, value)));
    let later = Later::begin();
    let mask = later.0;
    // SAFETY: only calls that are allowed between fork and exec; plain numbers, and a set of its own.
    unsafe {
        child.pre_exec(move || {
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const mask, std::ptr::null_mut());
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM);
            // We may have ended before that was said.
            if libc::getppid().cast_unsigned() != parent { Err(std::io::ErrorKind::Interrupted.into()) } else { Ok(()) }
        });
    }
    let child = child.spawn().map_err(|error| {
        let code = if error.kind() == std::io::ErrorKind::NotFound { 127 } else { 126 };
        Failure::new(format!("could not start '{}': {error}", program.to_string_lossy())).exits_with(code)
    })?;
    PROGRAM.store(child.id().cast_signed(), Ordering::SeqCst);
    PASSED_ON.into_iter().for_each(listen_for);
    drop(later);
    Ok(child)
}

/// Signals wait as long as this lives: one that comes after the program has begun and before we can pass it on would end us, and not be heard by it.
/// The program itself begins with the mask from before.
struct Later(libc::sigset_t);

impl Later {
    fn begin() -> Later {
        // SAFETY: both are plain sets, which `sigemptyset` and `pthread_sigmask` fill before they are read.
        unsafe {
            let (mut held, mut before) = (std::mem::zeroed(), std::mem::zeroed());
            libc::sigemptyset(&raw mut held);
            for signal in PASSED_ON {
                libc::sigaddset(&raw mut held, signal);
            }
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const held, &raw mut before);
            Later(before)
        }
    }
}

impl Drop for Later {
    fn drop(&mut self) {
        // SAFETY: the mask that `begin` has read.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, std::ptr::null_mut()) };
    }
}

fn listen_for(signal: libc::c_int) {
    // SAFETY: all zeros is a valid value of this plain C struct: no signals are blocked meanwhile.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = pass_on as *const () as libc::sighandler_t;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
    // SAFETY: the handler takes three arguments, as SA_SIGINFO wants, and makes only calls that handlers may make.
    unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) };
}

/// From now on whoever loses his parent among our descendants is left to us, and not to the system: none of them gets out of sight.
pub fn adopt_orphans() {
    // SAFETY: takes plain numbers.
    unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1) };
}

/// Takes away orphans that have ended.
fn bury_orphans(program: u32) {
    loop {
        // SAFETY: all zeros is a valid value of this plain C struct.
        let mut ended: libc::siginfo_t = unsafe { std::mem::zeroed() };
        let how = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
        // SAFETY: `waitid` writes the record that it is given, whose number is 0 where nobody has ended.
        let pid = unsafe {
            if libc::waitid(libc::P_ALL, 0, &raw mut ended, how) != 0 {
                return;
            }
            ended.si_pid()
        };
        if pid == 0 || pid.cast_unsigned() == program {
            return;
        }
        // SAFETY: takes plain numbers, and a null pointer where a status may be left out.
        unsafe { libc::waitpid(pid, std::ptr::null_mut(), libc::WNOHANG) };
    }
}

/// Waits for the end, calling `look` between; `look` says how long until the next time, and `None` ends the program.
pub fn wait(child: &mut Child, mut look: impl FnMut() -> Option<Duration>) -> Result<ExitStatus, Failure> {
    let failed = |error| Failure::new(format!("could not wait for the program: {error}"));
    loop {
        bury_orphans(child.id());
        if let Some(status) = child.try_wait().map_err(failed)? {
            return Ok(status);
        }
        match look() {
            Some(pause) => std::thread::sleep(pause),
            None => return end(child).map_err(failed),
        }
    }
}

/// Ends the program and all that it has started: kindly first.
fn end(child: &mut Child) -> std::io::Result<ExitStatus> {
    let mut told = HashSet::new();
    tell_all(child, libc::SIGTERM, |pid| told.insert(pid))?;
    tell_all(child, libc::SIGKILL, |_| true)?;
    child.try_wait()?.ok_or_else(|| std::io::Error::other("it cannot be ended"))
}

/// Sends a signal to those of our descendants who are to hear it, also to those who come meanwhile, until there are none or patience is over.
fn tell_all(child: &mut Child, signal: libc::c_int, mut hears: impl FnMut(u32) -> bool) -> std::io::Result<()> {
    let begun = Instant::now();
    while begun.elapsed() < KINDLY {
        bury_orphans(child.id());
        child.try_wait()?;
        let living = descendants();
        if living.is_empty() {
            break;
        }
        for pid in living.into_iter().filter(|pid| hears(*pid)) {
            // SAFETY: takes plain numbers.
            unsafe { libc::kill(pid.cast_signed(), signal) };
        }
        std::thread::sleep(GLANCE);
    }
    Ok(())
}

/// The exit code for a program's end, as shells have it.
pub fn exit_code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
}

/// Of these bytes by process, those that our descendants have.
pub fn used(processes: &HashMap<u32, u64>) -> u64 {
    processes.iter().filter(|(pid, _)| is_ours(**pid)).map(|(_, used)| used).sum()
}

/// Our descendants that have not ended.
fn descendants() -> Vec<u32> {
    let Ok(processes) = std::fs::read_dir("/proc") else { return Vec::new() };
    let numbers = processes.filter_map(|each| each.ok()?.file_name().to_str()?.parse().ok());
    numbers.filter(|pid| *pid != std::process::id() && is_ours(*pid)).collect()
}

/// Whether a process is this one, or descends from it, and has not ended.
fn is_ours(pid: u32) -> bool {
    let mut at = Some(pid);
    // No line of descent is longer; a number may be given anew while we look.
    for _ in 0..64 {
        match at {
            Some(pid) if pid == std::process::id() => return true,
            Some(pid) => at = parent(pid),
            None => return false,
        }
    }
    false
}

/// Nobody's where it has ended, or is not to be seen.
fn parent(pid: u32) -> Option<u32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field, the name, may contain anything but its last parenthesis.
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    let has_ended = matches!(fields.next()?, "Z" | "X");
    fields.next()?.parse().ok().filter(|parent| *parent > 0 && !has_ended)
}
