//! The system calls that the device stands on, each as one safe-to-read function. No policy.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Bytes of a page of the operating system.
pub const PAGE: u64 = 4096;

/// Where the system shows the threads of this process.
const TASKS: &str = "/proc/self/task";

static FORKS: AtomicU64 = AtomicU64::new(0);

extern "C" fn count_fork() {
    FORKS.fetch_add(1, Ordering::Relaxed);
}

/// A number that changes in a forked child: what was made under another number must not be used.
pub fn generation() -> u64 {
    static INSTALL: Once = Once::new();
    INSTALL.call_once(|| {
        // SAFETY: count_fork is an extern "C" function without arguments that only adds to an atomic.
        unsafe { libc::pthread_atfork(None, None, Some(count_fork)) };
    });
    FORKS.load(Ordering::Relaxed)
}

/// The calling thread's number in the operating system.
pub fn task() -> u64 {
    thread_local!(static TASK: u64 = {
        // SAFETY: gettid takes nothing, and cannot fail.
        unsafe { libc::gettid() }.unsigned_abs().into()
    });
    TASK.with(|task| *task)
}

/// The threads of this process, for whoever looks at them again and again: files stay open, and a list is made anew where it may be out of date.
#[derive(Debug, Default)]
pub struct Tasks {
    folder: Option<File>,
    listed: Option<Instant>,
    stats: Vec<(u64, File)>,
}

impl Tasks {
    /// How long a list is good for if the number of threads has stayed the same.
    const GOOD_FOR: Duration = Duration::from_millis(1);

    /// Whether there is a thread of which `answer` says yes; where it says nothing, a thread that runs, would run if it had a processor, or waits for a page:
    /// that does anything but sleep (`proc(5)`, `stat`). No where the system does not tell.
    pub fn any(&mut self, answer: impl Fn(u64) -> Option<bool>) -> bool {
        if self.count() != self.stats.len() as u64 || self.listed.is_none_or(|at| at.elapsed() > Tasks::GOOD_FOR) {
            self.list();
        }
        let mut gone = false;
        let found = self.stats.iter().any(|(task, stat)| {
            answer(*task).unwrap_or_else(|| {
                let state = state(stat);
                gone |= state.is_none();
                matches!(state, Some(b'R' | b'D'))
            })
        });
        if gone {
            self.listed = None;
        }
        found
    }

    /// How many there are: a folder has two links more than folders in it.
    fn count(&mut self) -> u64 {
        if self.folder.is_none() {
            self.folder = File::open(TASKS).ok();
        }
        let links = self.folder.as_ref().and_then(|folder| folder.metadata().ok()).map_or(0, |found| found.nlink());
        links.saturating_sub(2)
    }

    fn list(&mut self) {
        self.listed = Some(Instant::now());
        let entries = std::fs::read_dir(TASKS).into_iter().flatten().flatten();
        let tasks: Vec<u64> = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
        self.stats.retain(|(task, _)| tasks.contains(task));
        for task in tasks {
            if !self.stats.iter().any(|(known, _)| *known == task)
                && let Ok(stat) = File::open(format!("{TASKS}/{task}/stat"))
            {
                self.stats.push((task, stat));
            }
        }
    }
}

/// The letter behind the name, which may have any characters; `None` if the thread is gone.
fn state(stat: &File) -> Option<u8> {
    let mut text = [0; 256];
    let len = stat.read_at(&mut text, 0).ok()?;
    let name_ends = text[..len].iter().rposition(|byte| *byte == b')')?;
    text[..len].get(name_ends + 2).copied()
}

fn check(result: i32) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A sparse anonymous file of `size` bytes.
pub fn memfd(size: u64) -> io::Result<OwnedFd> {
    // SAFETY: the name is a NUL-terminated literal.
    let fd = unsafe { libc::memfd_create(c"sire-sim".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: memfd_create has just returned this descriptor, and nobody else knows it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: ftruncate takes plain numbers.
    check(unsafe { libc::ftruncate(fd.as_raw_fd(), size as libc::off_t) })?;
    Ok(fd)
}

/// Gives the file's pages in `[offset, offset + len)` back to the system; they read as zero.
pub fn punch(fd: &OwnedFd, offset: u64, len: u64) -> io::Result<()> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: fallocate takes plain numbers.
    check(unsafe { libc::fallocate(fd.as_raw_fd(), mode, offset as libc::off_t, len as libc::off_t) })
}

/// Writes all of `bytes` at `offset`.
pub fn write_at(fd: &OwnedFd, bytes: &[u8], offset: u64) -> io::Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        let rest = &bytes[done..];
        // SAFETY: the pointer and the length come from the same slice.
        let n = unsafe {
            libc::pwrite(fd.as_raw_fd(), rest.as_ptr().cast(), rest.len(), (offset + done as u64) as libc::off_t)
        };
        match n {
            n if n > 0 => done += n as usize,
            0 => return Err(io::ErrorKind::WriteZero.into()),
            _ if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
            _ => return Err(io::Error::last_os_error()),
        }
    }
    Ok(())
}

/// 512-byte blocks that the file really occupies, and its inode.
pub fn blocks_and_inode(fd: &OwnedFd) -> io::Result<(u64, u64)> {
    // SAFETY: an all-zero stat is a valid value of this plain C struct.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: stat is a live, writable local.
    check(unsafe { libc::fstat(fd.as_raw_fd(), &mut stat) })?;
    Ok((stat.st_blocks as u64, stat.st_ino))
}

fn map_raw(addr: u64, len: u64, prot: i32, flags: i32, fd: i32, offset: u64) -> io::Result<u64> {
    // SAFETY: callers pass MAP_FIXED only for ranges that this crate reserved and owns; other mappings go where nothing is.
    let got = unsafe { libc::mmap(addr as *mut libc::c_void, len as usize, prot, flags, fd, offset as libc::off_t) };
    if got == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(got as u64) }
}

/// Keeps a range out of forked children; failing to do so is no error of the caller's.
fn keep_from_children(addr: u64, len: u64) {
    // SAFETY: MADV_DONTFORK changes what fork does with the range, not its content.
    unsafe { libc::madvise(addr as *mut libc::c_void, len as usize, libc::MADV_DONTFORK) };
}

/// Reserves addresses that nobody may touch.
pub fn reserve(len: u64) -> io::Result<u64> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let addr = map_raw(0, len, libc::PROT_NONE, flags, -1, 0)?;
    keep_from_children(addr, len);
    Ok(addr)
}

/// Turns part of a reservation back into addresses that nobody may touch.
pub fn clear(addr: u64, len: u64) -> io::Result<()> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
    map_raw(addr, len, libc::PROT_NONE, flags, -1, 0)?;
    keep_from_children(addr, len);
    Ok(())
}

/// Puts part of the file into a reservation, without access.
pub fn map_file_at(addr: u64, len: u64, fd: &OwnedFd, offset: u64) -> io::Result<()> {
    map_raw(addr, len, libc::PROT_NONE, libc::MAP_SHARED | libc::MAP_FIXED, fd.as_raw_fd(), offset)?;
    keep_from_children(addr, len);
    Ok(())
}

/// Maps the whole file for reading and writing; `populate` makes every page present now.
pub fn map_file(fd: &OwnedFd, len: u64, populate: bool) -> io::Result<u64> {
    let flags = libc::MAP_SHARED | if populate { libc::MAP_POPULATE } else { 0 };
    let addr = map_raw(0, len, libc::PROT_READ | libc::PROT_WRITE, flags, fd.as_raw_fd(), 0)?;
    keep_from_children(addr, len);
    Ok(addr)
}

/// Fresh private memory; `populate` makes every page present now.
pub fn map_memory(len: u64, populate: bool) -> io::Result<u64> {
    let flags =
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | if populate { libc::MAP_POPULATE } else { libc::MAP_NORESERVE };
    map_raw(0, len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
}

/// Makes every page of a range present, as if it had been written or, where that is not allowed, read. Where the system
/// cannot (before Linux 5.14), pages go on appearing when they are touched.
pub fn make_present(addr: u64, len: u64) {
    let start = addr - addr % PAGE;
    let Some(end) = addr.checked_add(len).and_then(|end| end.checked_next_multiple_of(PAGE)) else { return };
    for advice in [libc::MADV_POPULATE_WRITE, libc::MADV_POPULATE_READ] {
        // SAFETY: populating changes no content, and the system refuses what is not mapped.
        if unsafe { libc::madvise(start as *mut libc::c_void, (end - start) as usize, advice) } == 0 {
            return;
        }
    }
}

/// Gives the whole pages inside a host range back to the system. Private anonymous pages read as zero afterwards; other mappings lose nothing.
pub fn discard(addr: u64, len: u64) {
    let start = addr.next_multiple_of(PAGE);
    let end = addr.saturating_add(len) / PAGE * PAGE;
    if start < end {
        // SAFETY: the range is inside the destination of a copy, which its submitter allowed to be overwritten until the copy is done.
        // Failing (locked pages) leaves the pages as they are.
        unsafe { libc::madvise(start as *mut libc::c_void, (end - start) as usize, libc::MADV_DONTNEED) };
    }
}

/// Changes what the processor may do with a range.
pub fn protect(addr: u64, len: u64, read: bool, write: bool) -> io::Result<()> {
    let prot = if write {
        libc::PROT_READ | libc::PROT_WRITE
    } else if read {
        libc::PROT_READ
    } else {
        libc::PROT_NONE
    };
    // SAFETY: callers pass ranges inside reservations of this crate.
    check(unsafe { libc::mprotect(addr as *mut libc::c_void, len as usize, prot) })
}

/// Removes a mapping that a function above made.
pub fn unmap(addr: u64, len: u64) {
    // SAFETY: callers pass a range that they mapped with a function above and no longer use.
    unsafe { libc::munmap(addr as *mut libc::c_void, len as usize) };
}

fn file_lock(kind: i32, byte: u64) -> libc::flock {
    // SAFETY: an all-zero flock is a valid value of this plain C struct.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = byte as libc::off_t;
    lock.l_len = 1;
    lock
}

/// Takes (waiting) or drops the lock on one byte. The lock belongs to the open file and dies with it.
pub fn lock_byte(fd: &OwnedFd, byte: u64, take: bool) -> io::Result<()> {
    let lock = file_lock(if take { libc::F_WRLCK } else { libc::F_UNLCK }, byte);
    loop {
        // SAFETY: lock is a live local of the type that the command takes.
        match check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_SETLKW, &lock) }) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

/// Whether somebody else holds the lock on one byte.
pub fn byte_is_locked(fd: &OwnedFd, byte: u64) -> bool {
    let mut lock = file_lock(libc::F_WRLCK, byte);
    // SAFETY: lock is a live, writable local of the type that the command takes.
    let rc = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_GETLK, &mut lock) };
    rc == 0 && lock.l_type != libc::F_UNLCK as libc::c_short
}

/// When the process started (clock ticks since boot), and whether it still runs; `None` if there is no such process.
pub fn process_start(pid: u32) -> Option<(u64, bool)> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = text[text.rfind(')')? + 1..].split_ascii_whitespace();
    let state = fields.next()?;
    // Fields 3 (state) .. 20 (threads) .. 22 (start time) of proc(5); `fields` now stands at 4.
    let threads: u64 = fields.nth(16)?.parse().ok()?;
    let start = fields.nth(1)?.parse().ok()?;
    Some((start, !matches!(state, "Z" | "X") || threads > 1))
}
