//! The disk tier: private files for backups. A file is readable by its owner alone and has no name (so that a
//! crash leaves nothing behind); all its blocks exist before the first page is released. Bytes pass the page cache by
//! where the file system can.

use super::direct::{BLOCK, DirectFile};
use super::{Room, Tier, memory};
use crate::error::{Error, Result, Status};
use crate::raw::{file_system, preallocate};
use crate::settings::Settings;
use crate::sync::{AtomicU64, Ordering};
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Requests under way: a disk behind a hypervisor is full at four, an NVMe disk of its own at eight of our size.
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
}

impl DiskTier {
    /// No files yet.
    pub(crate) fn new(settings: Arc<Settings>) -> DiskTier {
        DiskTier { settings, used: Arc::default() }
    }

    fn create(&self, len: u64) -> Result<DiskFile> {
        let dir = match self.settings.disk_dir() {
            Some(dir) => dir,
            None => default_dir().map_err(|e| failed("find the backup directory", &std::env::temp_dir(), &e))?,
        };
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&dir);
        made.map_err(|e| failed("use the backup directory", &dir, &e))?;
        let file = nameless(&dir).map_err(|e| failed("create a backup file", &dir, &e))?;
        check_room(&file, &dir, len)?;
        preallocate(&file, len).map_err(|e| failed(&format!("preallocate {len} bytes"), &dir, &e))?;
        Ok(DiskFile { file: DirectFile::new(file, true), dir, len, used: Arc::clone(&self.used) })
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

    fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        self.check("write", at, bytes.len())?;
        self.file.write(bytes, at).map_err(|error| self.failed("write", at, bytes.len(), &error))
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

/// `sire-<uid>` in the system's temporary directory. Where anybody may create it, it must be ours.
fn default_dir() -> io::Result<PathBuf> {
    let me = fs::metadata("/proc/self")?.uid();
    let dir = std::env::temp_dir().join(format!("sire-{me}"));
    match DirBuilder::new().mode(0o700).create(&dir) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
        _ => {}
    }
    let found = fs::symlink_metadata(&dir)?;
    if !found.is_dir() || found.uid() != me {
        let why = format!("{} is not a directory of this user; remove it or set a disk directory", dir.display());
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
    }
    if found.mode() & 0o077 != 0 {
        fs::set_permissions(&dir, Permissions::from_mode(0o700))?;
    }
    Ok(dir)
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

fn unlinked(dir: &Path, options: &OpenOptions) -> io::Result<File> {
    static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
    let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let path = dir.join(format!("backup-{}-{number}", std::process::id()));
    let file = options.clone().create_new(true).open(&path)?;
    fs::remove_file(&path)?;
    Ok(file)
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::super::conformance;
    use super::*;
    use crate::terms::Config;

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
}
