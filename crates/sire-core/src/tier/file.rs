//! The file tier: a file of the program's (weights in safetensors, say) that holds the bytes already, so that a backup costs
//! neither room nor a write. Nothing is believed: a range counts only after each of its records was compared with the device's
//! bytes ([`prove`](crate::transition)), and what comes back has the checksum that it had then. Files are read by position, never mapped:
//! one that was truncated is an error, not a signal.

use super::direct::{BLOCK, DirectFile};
use super::{Place, Room, Segment};
use crate::error::{Error, Result, Status};
use crate::sync::{AtomicU64, Mutex, Ordering, lock};
use std::fs::{File, Metadata};
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

/// Requests under way: of two MiB each, so that they are as many bytes as the disk tier's.
pub(crate) const DEPTH: usize = 4;

/// What tells a file apart from another one, and from itself after a change.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Identity {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Identity {
    fn of(found: &Metadata) -> Identity {
        Identity {
            device: found.dev(),
            inode: found.ino(),
            size: found.size(),
            modified: (found.mtime(), found.mtime_nsec()),
            changed: (found.ctime(), found.ctime_nsec()),
        }
    }
}

/// A file, open for reading. It stays readable if its name goes to another file.
pub(crate) struct FileRoom {
    path: PathBuf,
    file: DirectFile,
    seen: Mutex<Identity>,
    version: AtomicU64,
}

impl FileRoom {
    fn open(path: &Path) -> Result<FileRoom> {
        let failed = |error: &io::Error| {
            Error::new(Status::BackupIo, format!("cannot use {} as a backup: {error}", path.display()))
        };
        let file = File::open(path).map_err(|error| failed(&error))?;
        let found = file.metadata().map_err(|error| failed(&error))?;
        if !found.is_file() {
            return Err(failed(&io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file")));
        }
        let seen = Mutex::new(Identity::of(&found));
        Ok(FileRoom { path: path.to_path_buf(), file: DirectFile::new(file, false), seen, version: AtomicU64::new(1) })
    }

    /// Bytes, as they were last seen.
    pub(crate) fn size(&self) -> u64 {
        lock(&self.seen).size
    }

    fn now(&self) -> Option<Identity> {
        self.file.plain().metadata().ok().map(|found| Identity::of(&found))
    }

    /// A number that is another one after the file was changed, as far as its inode tells. Never 0.
    pub(crate) fn version(&self) -> u64 {
        let now = self.now();
        let mut seen = lock(&self.seen);
        match now {
            Some(now) if now == *seen => {}
            _ => {
                self.version.fetch_add(1, Ordering::Relaxed);
            }
        }
        *seen = now.unwrap_or(*seen);
        self.version.load(Ordering::Relaxed)
    }

    fn failed(&self, at: u64, len: usize, why: &dyn std::fmt::Display) -> Error {
        let message = format!("cannot read {len} bytes at {at} of {self:?}: {why}; put the file back as it was");
        Error::new(Status::BackupIo, message)
    }
}

impl std::fmt::Debug for FileRoom {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.place())
    }
}

impl Room for FileRoom {
    fn len(&self) -> u64 {
        self.size().next_multiple_of(BLOCK)
    }

    fn place(&self) -> String {
        let changed = self.now() != Some(*lock(&self.seen));
        format!("{}{}", self.path.display(), if changed { " (which was changed)" } else { "" })
    }

    fn align(&self) -> u64 {
        BLOCK
    }

    fn file(&self) -> Option<BorrowedFd<'_>> {
        self.file.direct()
    }

    fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        let message = format!("{} bytes were to be written at {at} of {self:?}, which is only read", bytes.len());
        Err(Error::new(Status::Internal, message))
    }

    fn is_rewritable(&self) -> bool {
        false
    }

    fn is_borrowed(&self) -> bool {
        true
    }

    /// The last block of a file may be short: what is not there is zero.
    fn read(&self, at: u64, into: &mut [u8]) -> Result<()> {
        let count = self.file.read(into, at).map_err(|error| self.failed(at, into.len(), &error))?;
        let missing = &mut into[count..];
        if !missing.is_empty() && at + (count as u64) < self.size() {
            return Err(self.failed(at, count + missing.len(), &format!("it ends after {count} of them")));
        }
        missing.fill(0);
        Ok(())
    }
}

/// Bytes of a file that stand for bytes of an allocation, counted while this lives.
#[derive(Debug)]
pub(crate) struct FileBytes {
    pub(crate) room: Arc<FileRoom>,
    len: u64,
    used: Arc<AtomicU64>,
}

/// Offsets of an extent whose bytes a file is said to hold.
#[derive(Clone, Debug)]
pub(crate) struct Attached {
    pub(crate) range: Range<u64>,
    /// Where they begin in the file.
    pub(crate) at: u64,
    pub(crate) bytes: Arc<FileBytes>,
    /// The file's version when the proof began that its segments rest on.
    pub(crate) proven: Arc<AtomicU64>,
}

impl Attached {
    /// Nothing is proven yet.
    pub(crate) fn new(range: Range<u64>, at: u64, bytes: Arc<FileBytes>) -> Attached {
        Attached { range, at, bytes, proven: Arc::default() }
    }

    /// Whether a segment is these bytes of the file.
    pub(crate) fn has(&self, segment: &Segment) -> bool {
        let Place::Stored { room, at, .. } = &segment.place else { return false };
        let is_inside = self.range.start <= segment.offset && segment.end() <= self.range.end;
        let is_here = std::ptr::addr_eq(Arc::as_ptr(room), Arc::as_ptr(&self.bytes.room));
        is_inside && is_here && self.at + (segment.offset - self.range.start) == *at
    }

    /// Whether what was proven may not be so any more. From now on it counts as proven.
    pub(crate) fn begin_proof(&self) -> bool {
        let version = self.bytes.room.version();
        self.proven.swap(version, Ordering::Relaxed) != version
    }

    /// What is left without `range`: up to two pieces.
    pub(crate) fn without(&self, range: &Range<u64>) -> impl Iterator<Item = Attached> {
        let both = [self.range.start..self.range.end.min(range.start), self.range.start.max(range.end)..self.range.end];
        let (at, start, bytes) = (self.at, self.range.start, Arc::clone(&self.bytes));
        let proven = self.proven.load(Ordering::Relaxed);
        both.into_iter().filter(|part| part.start < part.end).map(move |part| Attached {
            at: at + (part.start - start),
            range: part,
            bytes: Arc::clone(&bytes),
            proven: Arc::new(AtomicU64::new(proven)),
        })
    }
}

impl Drop for FileBytes {
    fn drop(&mut self) {
        self.used.fetch_sub(self.len, Ordering::Relaxed);
    }
}

/// Opens each file once.
#[derive(Debug, Default)]
pub(crate) struct FileTier {
    open: Mutex<Vec<Weak<FileRoom>>>,
    used: Arc<AtomicU64>,
}

impl FileTier {
    /// `len` bytes at `at` of the file at `path`.
    pub(crate) fn bytes(&self, path: &Path, at: u64, len: u64) -> Result<Arc<FileBytes>> {
        let room = self.room(path)?;
        let size = room.size();
        if at.checked_add(len).is_none_or(|end| end > size) {
            let message = format!("{len} bytes at {at} are not inside {}, which has {size}", path.display());
            return Err(Error::new(Status::InvalidArgument, message));
        }
        self.used.fetch_add(len, Ordering::Relaxed);
        Ok(Arc::new(FileBytes { room, len, used: Arc::clone(&self.used) }))
    }

    fn room(&self, path: &Path) -> Result<Arc<FileRoom>> {
        let new = Arc::new(FileRoom::open(path)?);
        let identity = *lock(&new.seen);
        let mut open = lock(&self.open);
        open.retain(|room| room.strong_count() > 0);
        let known = open.iter().filter_map(Weak::upgrade).find(|room| *lock(&room.seen) == identity);
        Ok(known.unwrap_or_else(|| {
            open.push(Arc::downgrade(&new));
            new
        }))
    }

    /// Bytes of allocations that files stand for.
    pub(crate) fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;
    use std::fs;

    fn bytes(room: &FileRoom, at: u64, len: usize) -> Result<Vec<u8>> {
        let mut found = vec![0xEE; len];
        room.read(at, &mut found).map(|()| found)
    }

    #[test]
    fn a_file_is_read_to_its_end_and_not_beyond() {
        let dir = tempfile::tempdir().unwrap_or_else(|e| unreachable!("{e}"));
        let path = dir.path().join("weights");
        fs::write(&path, vec![7; 5000]).unwrap_or_else(|e| unreachable!("{e}"));
        let tier = FileTier::default();
        let held = tier.bytes(&path, 4999, 1).unwrap_or_else(|e| unreachable!("{e}"));
        let room = &held.room;
        let mut expected = vec![7; 904];
        expected.resize(4096, 0);
        assert_eq!(bytes(room, 4096, 4096), Ok(expected));
        assert_eq!((room.version(), room.version()), (1, 1));
        assert_eq!(tier.bytes(&path, 4999, 2).map_err(|e| e.status).err(), Some(Status::InvalidArgument));
        assert_eq!(tier.used(), 1);
        fs::OpenOptions::new()
            .write(true)
            .open(&path)
            .and_then(|f| f.set_len(4500))
            .unwrap_or_else(|e| unreachable!("{e}"));
        let Err(error) = bytes(room, 4096, 4096) else { unreachable!("it is shorter now") };
        assert!(error.message.contains("which was changed") && error.message.contains("ends after 404"), "{error}");
        assert_eq!((room.version(), room.version()), (2, 2));
    }

    #[test]
    fn a_file_is_opened_once() {
        let dir = tempfile::tempdir().unwrap_or_else(|e| unreachable!("{e}"));
        let path = dir.path().join("weights");
        fs::write(&path, [1; 100]).unwrap_or_else(|e| unreachable!("{e}"));
        let tier = FileTier::default();
        let both = [0, 50].map(|at| tier.bytes(&path, at, 50).unwrap_or_else(|e| unreachable!("{e}")));
        assert!(Arc::ptr_eq(&both[0].room, &both[1].room));
        assert!(tier.bytes(dir.path(), 0, 1).is_err() && tier.bytes(&dir.path().join("none"), 0, 1).is_err());
    }
}
