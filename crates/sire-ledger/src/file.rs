//! The ledger's file: made whole or not at all, opened without following what others may have put in its place, and locked byte by byte
//! through locks of the *open file description*, which the kernel drops with its last holder. What that means for forked children is
//! the concern of [`forks`].
#![allow(unsafe_code)]

use crate::error::{Error, Result};
use crate::forks::{self, Description};
use crate::layout;
use std::ffi::CString;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The byte whose lock belongs to whoever changes more than its own slot.
const DESK: i64 = 0;
/// The byte whose lock says that slot 0 is in use; the others follow. Locks may lie beyond a file's end.
const FIRST_SLOT: i64 = 1 << 20;
/// The byte whose lock says that somebody is just moving into slot 0; the others follow.
const FIRST_MOVE: i64 = 1 << 21;
/// How often to look whether whoever replaces a damaged ledger is done, and how long between two looks: ten seconds, because it may be preempted.
const TRIES: usize = 5000;
const PAUSE: Duration = Duration::from_millis(2);

/// One open description of a ledger's file.
#[derive(Debug)]
pub(crate) struct Desk {
    file: Description,
    path: PathBuf,
    /// The process that opened it.
    pid: u32,
}

impl Desk {
    /// Opens the ledger at `path`, and makes it if it is not there. All users may write to it, as in a directory for locks.
    pub(crate) fn open(path: &Path) -> Result<Desk> {
        for _ in 0..TRIES {
            match open_existing(path) {
                Ok(file) => match Desk::checked(file, path) {
                    Err(foreign @ Error::Foreign { .. }) => match remove_wreck(path)? {
                        Wreck::Gone => {}
                        Wreck::Going => std::thread::sleep(PAUSE),
                        Wreck::Stays => return Err(foreign),
                    },
                    checked => return checked,
                },
                Err(error) if error.kind() == io::ErrorKind::NotFound => make(path)?,
                Err(error) => return Err(Error::io("open the ledger", path, error)),
            }
        }
        Err(Error::io("open the ledger", path, io::Error::other("it disappears as often as it is made")))
    }

    /// Another description of the same file, whose locks are its own.
    pub(crate) fn again(&self) -> Result<Desk> {
        let same = |file: &File| Ok::<_, io::Error>(id(file)? == id(&self.file)?);
        let file = open_existing(&self.path).map_err(|error| Error::io("open the ledger", &self.path, error))?;
        match same(&file) {
            Ok(true) => Desk::checked(file, &self.path),
            Ok(false) => Err(Error::Foreign {
                path: self.path.clone(),
                found: "it was replaced by another file meanwhile".into(),
            }),
            Err(error) => Err(Error::io("look at the ledger", &self.path, error)),
        }
    }

    fn checked(file: Description, path: &Path) -> Result<Desk> {
        let foreign = |found: String| Error::Foreign { path: path.to_owned(), found };
        let info = file.metadata().map_err(|error| Error::io("look at the ledger", path, error))?;
        if !info.is_file() {
            let what = if info.file_type().is_fifo() { "a pipe" } else { "no ordinary file" };
            return Err(foreign(format!("it is {what}")));
        }
        if info.len() != layout::FILE {
            return Err(foreign(format!("it has {} bytes, not {}", info.len(), layout::FILE)));
        }
        let mut header = [0; layout::HEADER_USED];
        file.read_exact_at(&mut header, 0).map_err(|error| Error::io("read the ledger", path, error))?;
        layout::check_header(&header).map_err(foreign)?;
        Ok(Desk { file, path: path.to_owned(), pid: std::process::id() })
    }

    /// Whether this is the process that opened it.
    pub(crate) fn is_ours(&self) -> Result<()> {
        if self.pid == std::process::id() { Ok(()) } else { Err(Error::Forked) }
    }

    /// The bytes of one slot.
    pub(crate) fn read(&self, slot: u32) -> Result<[u8; layout::SLOT as usize]> {
        let mut bytes = [0; layout::SLOT as usize];
        let read = self.file.read_exact_at(&mut bytes, at(slot, 0));
        read.map_err(|error| Error::io("read the ledger", &self.path, error))?;
        Ok(bytes)
    }

    /// Makes the slot one that was never written.
    fn wipe(&self, slot: u32) -> Result<()> {
        (0..2).try_for_each(|copy| self.write(slot, copy, &[0; layout::COPY]))
    }

    /// Writes one copy of one slot's record.
    pub(crate) fn write(&self, slot: u32, copy: usize, bytes: &[u8; layout::COPY]) -> Result<()> {
        let written = self.file.write_all_at(bytes, at(slot, copy));
        written.map_err(|error| Error::io("write to the ledger", &self.path, error))
    }

    /// Takes the lock of a slot, wiped before: whatever was written there, by whomever, is at no moment taken for the new one's. False if somebody
    /// has the slot, or is just moving in.
    pub(crate) fn move_in(&self, slot: u32) -> Result<bool> {
        let moving = FIRST_MOVE + i64::from(slot);
        if self.is_taken(slot)? || !self.lock(moving)? {
            return Ok(false);
        }
        let moved = self.wipe_and_take(slot);
        self.unlock(moving);
        moved
    }

    /// Nobody else can, meanwhile, because only who is moving in takes a slot's lock; but somebody may have before that began.
    fn wipe_and_take(&self, slot: u32) -> Result<bool> {
        if self.is_taken(slot)? {
            return Ok(false);
        }
        self.wipe(slot)?;
        self.lock(FIRST_SLOT + i64::from(slot))
    }

    /// Whether another description has the slot's lock.
    pub(crate) fn is_taken(&self, slot: u32) -> Result<bool> {
        let mut lock = range(FIRST_SLOT + i64::from(slot), libc::F_WRLCK);
        // SAFETY: the descriptor is open (self.file lives) and `lock` is a live, initialised flock.
        let result = unsafe { libc::fcntl(self.file.as_raw_fd(), libc::F_OFD_GETLK, &mut lock) };
        match result {
            0 => Ok(lock.l_type != libc::F_UNLCK as libc::c_short),
            _ => Err(Error::io("look at a lock of", &self.path, io::Error::last_os_error())),
        }
    }

    /// Takes the lock that changes need; false if somebody has it.
    pub(crate) fn sit_down(&self) -> Result<bool> {
        self.lock(DESK)
    }

    /// Gives that lock back.
    pub(crate) fn stand_up(&self) {
        self.unlock(DESK);
    }

    fn unlock(&self, byte: i64) {
        let mut lock = range(byte, libc::F_UNLCK);
        // SAFETY: as in `is_taken`. Giving a lock back cannot fail on an open descriptor.
        unsafe { libc::fcntl(self.file.as_raw_fd(), libc::F_OFD_SETLK, &mut lock) };
    }

    fn lock(&self, byte: i64) -> Result<bool> {
        let mut lock = range(byte, libc::F_WRLCK);
        // SAFETY: as in `is_taken`.
        if unsafe { libc::fcntl(self.file.as_raw_fd(), libc::F_OFD_SETLK, &mut lock) } == 0 {
            return Ok(true);
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EAGAIN | libc::EACCES) => Ok(false),
            _ => Err(Error::io("lock a byte of", &self.path, error)),
        }
    }
}

impl Drop for Desk {
    /// Gives every lock back by name: closing alone would leave them to a child that was forked a moment ago and has not run its handler yet.
    fn drop(&mut self) {
        if self.is_ours().is_ok() {
            let mut lock = range(0, libc::F_UNLCK);
            lock.l_len = 0;
            // SAFETY: as in `is_taken`; a length of 0 means all bytes. It cannot fail on an open descriptor.
            unsafe { libc::fcntl(self.file.as_raw_fd(), libc::F_OFD_SETLK, &mut lock) };
        }
    }
}

fn at(slot: u32, copy: usize) -> u64 {
    layout::HEADER + u64::from(slot) * layout::SLOT + (copy * layout::COPY) as u64
}

fn id(file: &File) -> io::Result<(u64, u64)> {
    file.metadata().map(|info| (info.dev(), info.ino()))
}

fn range(byte: i64, kind: i32) -> libc::flock {
    // SAFETY: an all-zero flock is a valid value of this plain C struct; l_pid must be 0 for these locks.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = byte;
    lock.l_len = 1;
    lock
}

fn open_existing(path: &Path) -> io::Result<Description> {
    let name = CString::new(path.as_os_str().as_bytes())?;
    forks::open(&name, libc::O_NOFOLLOW | libc::O_NONBLOCK)
}

/// What has become of a damaged ledger.
enum Wreck {
    /// It is not there any more, whoever removed it.
    Gone,
    /// Somebody else is removing it.
    Going,
    /// It is not ours to remove, or somebody lives in it.
    Stays,
}

/// Removes a damaged ledger if it is of our layout, this user's own, and nobody has a lock in it: then nothing in it counts any more. Whoever
/// opened it before meets another file when it joins, and is told so.
fn remove_wreck(path: &Path) -> Result<Wreck> {
    let failed = |error| Error::io("look at the damaged ledger", path, error);
    let file = match open_existing(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Wreck::Gone),
        opened => opened.map_err(failed)?,
    };
    let info = file.metadata().map_err(failed)?;
    if !info.is_file() || info.uid() != own_user() {
        return Ok(Wreck::Stays);
    }
    let mut header = [0; layout::HEADER_USED];
    let read = file.read_at(&mut header, 0).map_err(failed)?;
    // Replaced since the caller looked: what is whole is nobody's to remove.
    if info.len() == layout::FILE && layout::check_header(&header[..read]).is_ok() {
        return Ok(Wreck::Gone);
    }
    if !layout::is_wreck(&header[..read]) {
        return Ok(Wreck::Stays);
    }
    if !lock_all(&file) {
        return Ok(if is_locked_all(&file) { Wreck::Going } else { Wreck::Stays });
    }
    // Held until the name is gone, so that nobody joins meanwhile; and only if the name is still this file's: another who found it damaged may have
    // removed it before we had the lock, and a new one be there already.
    let is_same = match open_existing(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => false,
        now => now.and_then(|now| Ok(id(&now)? == id(&file)?)).map_err(failed)?,
    };
    if is_same {
        fs::remove_file(path).map_err(|error| Error::io("remove the damaged ledger", path, error))?;
    }
    Ok(Wreck::Gone)
}

/// Takes the lock of every byte, that of the desk and of all slots; false if somebody has one of them.
fn lock_all(file: &File) -> bool {
    let mut all = range(0, libc::F_WRLCK);
    all.l_len = 0;
    // SAFETY: as in `is_taken`; a length of 0 means all bytes.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &mut all) == 0 }
}

/// Whether somebody else has the lock of every byte, or nobody has any: whoever had it has just gone.
fn is_locked_all(file: &File) -> bool {
    let mut lock = range(0, libc::F_WRLCK);
    lock.l_len = 0;
    // SAFETY: as in `is_taken`; it writes the first lock in the way into `lock`.
    let asked = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &mut lock) } == 0;
    asked && (lock.l_type == libc::F_UNLCK as libc::c_short || (lock.l_start == 0 && lock.l_len == 0))
}

/// The user of this process.
pub(crate) fn own_user() -> u32 {
    // SAFETY: geteuid touches no memory and cannot fail.
    unsafe { libc::geteuid() }
}

/// Makes the file under another name, whole and with all its blocks, and gives it its name only then; whoever is first wins.
fn make(path: &Path) -> Result<()> {
    let failed = |doing: &str, error| Error::io(doing, path, error);
    let dir = path.parent().unwrap_or(Path::new("."));
    let name = format!(".sire-ledger-{}-{:x}", std::process::id(), nonce());
    let draft = dir.join(name);
    let made = draft_file(&draft).and_then(|()| match fs::hard_link(&draft, path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    });
    // Best effort: a draft that stays is a few KiB under a hidden name.
    let _ = fs::remove_file(&draft);
    made.map_err(|error| failed("make the ledger", error))
}

fn nonce() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::collections::hash_map::RandomState::new().build_hasher().finish()
}

fn draft_file(draft: &Path) -> io::Result<()> {
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(draft)?;
    let mut bytes = vec![0; layout::FILE as usize];
    bytes[..layout::HEADER_USED].copy_from_slice(&layout::header());
    // Written, not only sized: a change of a slot must never find the disk full.
    file.write_all_at(&bytes, 0)?;
    // Not through `mode`: the user's umask must not keep other users out.
    file.set_permissions(Permissions::from_mode(0o666))
}

#[cfg(test)]
mod tests {
    use super::{Desk, Wreck, is_locked_all, lock_all, open_existing, remove_wreck};
    use crate::{Ledger, layout};
    use std::os::unix::fs::FileExt;
    use std::path::Path;
    use std::sync::Barrier;

    type Outcome = Result<(), Box<dyn std::error::Error>>;

    /// A ledger whose header is damaged.
    fn wreck(path: &Path) -> Result<(), Box<dyn std::error::Error>> {
        drop(Desk::open(path)?);
        Ok(std::fs::OpenOptions::new().write(true).open(path)?.write_all_at(&[0xff], 20)?)
    }

    #[test]
    fn who_comes_while_another_replaces_a_wreck_waits_for_the_new_one() -> Outcome {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("ledger");
        wreck(&path)?;
        // Another process, between its lock and the removal.
        let other = open_existing(&path)?;
        assert!(lock_all(&other));
        let own = open_existing(&path)?;
        assert!(is_locked_all(&own));
        assert!(matches!(remove_wreck(&path)?, Wreck::Going));
        std::thread::scope(|scope| -> Outcome {
            let opening = scope.spawn(|| Desk::open(&path).map(drop).map_err(|error| error.to_string()));
            std::fs::remove_file(&path)?;
            drop(other);
            assert_eq!(opening.join().map_err(|_| "it panicked")?, Ok(()));
            Ok(())
        })?;
        assert_eq!(std::fs::metadata(&path)?.len(), layout::FILE);
        std::fs::remove_file(&path)?;
        assert!(matches!(remove_wreck(&path)?, Wreck::Gone), "it was removed before it was looked at");
        Ok(())
    }

    #[test]
    fn all_who_find_a_wreck_at_once_end_in_one_new_ledger() -> Outcome {
        for round in 0..30 {
            let dir = tempfile::tempdir()?;
            wreck(&dir.path().join("sire-ledger-GPU-1"))?;
            let start = Barrier::new(8);
            let members = std::thread::scope(|scope| {
                let join = || {
                    start.wait();
                    Ledger::open(dir.path(), "GPU-1")?.join()
                };
                let threads: Vec<_> = (0..8).map(|_| scope.spawn(join)).collect();
                threads.into_iter().map(|thread| thread.join()).collect::<Result<Vec<_>, _>>()
            })
            .map_err(|_| "a thread panicked")?;
            let members =
                members.into_iter().collect::<Result<Vec<_>, _>>().map_err(|error| format!("{round}: {error}"))?;
            assert_eq!(
                Ledger::open(dir.path(), "GPU-1")?.entries()?.len(),
                members.len(),
                "somebody is in another file"
            );
        }
        Ok(())
    }
}
