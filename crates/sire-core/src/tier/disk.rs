//! The disk tier: private files for backups. A file is readable by its owner alone and has no name (so that a
//! crash leaves nothing behind); all its blocks exist before the first page is released. Bytes pass the page cache by
//! where the file system can.
//!
//! Where a file system cannot make files without a name, a file has one for a moment, which says whose it is. Who dies in that moment
//! leaves it behind, empty; the next process that uses the directory removes it. A name that goes early harms nobody: the file is open.

use super::direct::{BLOCK, DirectFile};
use super::step::step;
use super::{Room, Tier, memory, private};
use crate::error::{Error, Result, Status};
use crate::raw::{file_system, preallocate};
use crate::settings::Settings;
use crate::sync::{AtomicU64, Mutex, Ordering, lock};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Requests under way, of one record each.
const DEPTH: usize = 8;

/// A nameless file with `len` bytes of room, counted in `used` while it lives.
struct DiskFile {
    file: DirectFile,
    /// For messages only.
    dir: PathBuf,
    len: u64,
    used: Arc<AtomicU64>,
}

/// Makes files, and counts their bytes.
#[derive(Debug)]
pub(crate) struct DiskTier {
    settings: Arc<Settings>,
    used: Arc<AtomicU64>,
    /// How a file without a name is made.
    make: fn(&Path) -> io::Result<File>,
    /// The directory that was looked through last for what dead processes left.
    swept: Mutex<Option<PathBuf>>,
}

impl DiskTier {
    /// No files yet.
    pub(crate) fn new(settings: Arc<Settings>) -> DiskTier {
        DiskTier { settings, used: Arc::default(), make: nameless, swept: Mutex::default() }
    }

    fn create(&self, len: u64) -> Result<DiskFile> {
        let dir = match self.settings.disk_dir() {
            Some(dir) => dir,
            None => private::home(&std::env::temp_dir())
                .map_err(|e| failed("find the backup directory", &std::env::temp_dir(), &e))?,
        };
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&dir);
        made.map_err(|e| failed("use the backup directory", &dir, &e))?;
        self.sweep_once(&dir);
        step();
        let file = (self.make)(&dir).map_err(|e| failed("create a backup file", &dir, &e))?;
        step();
        check_room(&file, &dir, len)?;
        preallocate(&file, len).map_err(|e| failed(&format!("preallocate {len} bytes"), &dir, &e))?;
        step();
        Ok(DiskFile { file: DirectFile::new(file, true), dir, len, used: Arc::clone(&self.used) })
    }

    fn sweep_once(&self, dir: &Path) {
        let mut swept = lock(&self.swept);
        if swept.as_deref() != Some(dir) {
            sweep(dir);
            *swept = Some(dir.to_path_buf());
        }
    }

    /// Counts bytes that are about to be taken, unless they pass the quota.
    fn count(&self, len: u64) -> Result<()> {
        let limit = self.limit();
        let more = |used: u64| used.checked_add(len).filter(|&sum| limit.is_none_or(|limit| sum <= limit));
        match self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more) {
            Ok(_) => Ok(()),
            Err(used) => {
                let (limit, left) = (limit.unwrap_or(u64::MAX), limit.unwrap_or(u64::MAX).saturating_sub(used));
                let message = format!(
                    "no room for {len} bytes of backup on disk: the disk limit of {limit} bytes leaves {left}; raise it"
                );
                Err(Error::new(Status::OutOfBackupSpace, message))
            }
        }
    }
}

impl Tier for DiskTier {
    fn name(&self) -> &'static str {
        "disk"
    }

    fn reserve(&self, len: u64) -> Result<Arc<dyn Room>> {
        let len = len.checked_next_multiple_of(BLOCK).unwrap_or(u64::MAX);
        self.count(len)?;
        let file = self.create(len).inspect_err(|_| {
            self.used.fetch_sub(len, Ordering::Relaxed);
        })?;
        Ok(Arc::new(file))
    }

    fn depth(&self) -> usize {
        DEPTH
    }

    fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    fn limit(&self) -> Option<u64> {
        self.settings.disk_limit()
    }
}

impl std::fmt::Debug for DiskFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.place())
    }
}

impl Drop for DiskFile {
    fn drop(&mut self) {
        self.used.fetch_sub(self.len, Ordering::Relaxed);
    }
}

impl DiskFile {
    fn check(&self, doing: &str, at: u64, len: usize) -> Result<()> {
        let inside = at.checked_add(len as u64).is_some_and(|end| end <= self.len);
        let outside = || io::Error::new(io::ErrorKind::InvalidInput, "that is not inside the room");
        if inside { Ok(()) } else { Err(self.failed(doing, at, len, &outside())) }
    }

    fn failed(&self, doing: &str, at: u64, len: usize, error: &io::Error) -> Error {
        failed(&format!("{doing} {len} bytes at {at} of a backup file"), &self.dir, error)
    }
}

impl Room for DiskFile {
    fn len(&self) -> u64 {
        self.len
    }

    fn place(&self) -> String {
        format!("a backup file in {}", self.dir.display())
    }

    fn align(&self) -> u64 {
        BLOCK
    }

    fn file(&self) -> Option<BorrowedFd<'_>> {
        self.file.direct()
    }

    fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        self.check("write", at, bytes.len())?;
        step();
        let written = self.file.write(bytes, at).map_err(|error| self.failed("write", at, bytes.len(), &error));
        step();
        written
    }

    fn read(&self, at: u64, into: &mut [u8]) -> Result<()> {
        self.check("read", at, into.len())?;
        let wanted = into.len();
        match self.file.read(into, at) {
            Ok(count) if count == wanted => Ok(()),
            Ok(count) => {
                let short = io::Error::new(io::ErrorKind::UnexpectedEof, format!("it ends after {count} of them"));
                Err(self.failed("read", at, wanted, &short))
            }
            Err(error) => Err(self.failed("read", at, wanted, &error)),
        }
    }
}

fn failed(doing: &str, dir: &Path, error: &io::Error) -> Error {
    let full = matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG));
    let status = if full { Status::OutOfBackupSpace } else { Status::BackupIo };
    let advice = if full { "; free space there or set another disk directory" } else { "" };
    Error::new(status, format!("cannot {doing} in {}: {error}{advice}", dir.display()))
}

/// Asked before a block is taken: filling a disk to the last byte, or memory that a file system calls a disk, to find out that
/// it is not enough would hurt everybody else. A file system that does not say counts as having room.
fn check_room(file: &File, dir: &Path, len: u64) -> Result<()> {
    let Ok(mut left) = file_system(file) else { return Ok(()) };
    if left.in_memory {
        left.bytes = left.bytes.min(memory::room().bytes);
    }
    if len <= left.bytes {
        return Ok(());
    }
    let kind = if left.in_memory { " (it is host memory, not a disk)" } else { "" };
    let message = format!(
        "no room for {len} bytes of backup in {}{kind}: {} are left; free space there or set another disk directory",
        dir.display(),
        left.bytes
    );
    Err(Error::new(Status::OutOfBackupSpace, message))
}

/// A file without a name: made so where the file system can, else unlinked at once.
fn nameless(dir: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    let made = options.clone().custom_flags(libc::O_TMPFILE | libc::O_CLOEXEC).open(dir);
    match made {
        Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR | libc::EINVAL | libc::ENOENT)) => {
            unlinked(dir, &options)
        }
        other => other,
    }
}

/// How the names of such files begin; the process's number and a count follow.
const PREFIX: &str = "sire-backup-";
/// Names of an earlier process with our number are passed over; there are never many.
const NAMES: usize = 1000;

fn unlinked(dir: &Path, options: &OpenOptions) -> io::Result<File> {
    static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
    for _ in 0..NAMES {
        let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = dir.join(format!("{PREFIX}{}-{number}", std::process::id()));
        let file = match options.clone().create_new(true).open(&path) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => continue,
            outcome => outcome?,
        };
        step();
        match fs::remove_file(&path) {
            // A process that does not see this one (in another container) has swept it away.
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => return Ok(file),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

/// Removes what processes have left that died before a file had lost its name.
fn sweep(dir: &Path) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let owner = entry.file_name().to_str().and_then(owner);
        if owner.is_some_and(is_gone) && entry.metadata().is_ok_and(|found| is_private(&found)) {
            // Whoever was quicker did the same.
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// The number of the process that a name says.
fn owner(name: &str) -> Option<u32> {
    let (process, number) = name.strip_prefix(PREFIX)?.split_once('-')?;
    number.parse::<u64>().ok()?;
    process.parse().ok()
}

/// Whether a process has ended. One with our own number has: this one has made no file yet.
fn is_gone(process: u32) -> bool {
    process == std::process::id() || !Path::new("/proc").join(process.to_string()).exists()
}

/// Whether a file is what this tier makes, and this user's.
fn is_private(found: &fs::Metadata) -> bool {
    found.is_file() && found.mode() & 0o777 == 0o600 && private::user().is_ok_and(|me| me == found.uid())
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests;
