//! The disk tier: private files for backups. A file is readable by its owner alone and has no name (so that a
//! crash leaves nothing behind); all its blocks exist before the first page is released; and every
//! segment is checked by length and checksum before its bytes may reach a device.

use crate::error::{Error, Result, Status};
use crate::raw::{Span, preallocate};
use crate::sync::{AtomicU64, Ordering};
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A nameless file with `len` bytes of room.
#[derive(Debug)]
pub(crate) struct DiskFile {
    file: File,
    /// For messages only.
    dir: PathBuf,
    len: u64,
    used: Arc<AtomicU64>,
}

/// Makes files, and counts their bytes.
#[derive(Debug, Default)]
pub(crate) struct DiskTier {
    used: Arc<AtomicU64>,
}

impl DiskTier {
    /// A file with room for `len` bytes in `dir` (or in the default directory).
    pub(crate) fn create(&self, dir: Option<&Path>, len: u64) -> Result<Arc<DiskFile>> {
        let dir = match dir {
            Some(dir) => dir.to_path_buf(),
            None => default_dir().map_err(|e| failed("find the backup directory", &std::env::temp_dir(), &e))?,
        };
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&dir);
        made.map_err(|e| failed("use the backup directory", &dir, &e))?;
        let file = nameless(&dir).map_err(|e| failed("create a backup file", &dir, &e))?;
        preallocate(&file, len).map_err(|e| failed(&format!("preallocate {len} bytes"), &dir, &e))?;
        self.used.fetch_add(len, Ordering::Relaxed);
        Ok(Arc::new(DiskFile { file, dir, len, used: Arc::clone(&self.used) }))
    }

    /// Bytes of all files.
    pub(crate) fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }
}

impl Drop for DiskFile {
    fn drop(&mut self) {
        self.used.fetch_sub(self.len, Ordering::Relaxed);
    }
}

impl DiskFile {
    /// Bytes of room.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Writes the span at `at`; returns its checksum.
    pub(crate) fn write(&self, at: u64, span: &Span) -> Result<u32> {
        span.read(|bytes| {
            let doing = || format!("write {} bytes at {at} of a backup file", bytes.len());
            self.file.write_all_at(bytes, at).map_err(|e| failed(&doing(), &self.dir, &e))?;
            Ok(crc32fast::hash(bytes))
        })
    }

    /// Fills the span from `at`; its bytes must have the checksum `sum`.
    pub(crate) fn read(&self, at: u64, span: &Span, sum: u32) -> Result<()> {
        span.write(|bytes| {
            let doing = || format!("read {} bytes at {at} of a backup file", span.len());
            self.file.read_exact_at(bytes, at).map_err(|e| failed(&doing(), &self.dir, &e))?;
            if crc32fast::hash(bytes) == sum {
                return Ok(());
            }
            let what = format!("{} bytes at {at} of a backup file in {} are damaged", bytes.len(), self.dir.display());
            Err(Error::new(Status::BackupIo, format!("{what} (checksum differs); the device was not touched")))
        })
    }
}

fn failed(doing: &str, dir: &Path, error: &io::Error) -> Error {
    let full = matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG));
    let status = if full { Status::OutOfBackupSpace } else { Status::BackupIo };
    let advice = if full { "; free space there or set another disk directory" } else { "" };
    Error::new(status, format!("cannot {doing} in {}: {error}{advice}", dir.display()))
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
