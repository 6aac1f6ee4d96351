//! A file that is read and written past the page cache where the file system can (`O_DIRECT`), else through it. A disk's
//! own speed needs the first; and pages that backups leave in the cache would push out what programs want there.

use crate::sync::{AtomicBool, Ordering};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};

/// Offsets, lengths and addresses of direct requests are multiples of this.
pub(crate) const BLOCK: u64 = 4096;

/// See the [module documentation](self).
#[derive(Debug)]
pub(crate) struct DirectFile {
    plain: File,
    direct: Option<File>,
    /// The file system has refused a direct request that was as aligned as can be.
    refused: AtomicBool,
}

impl DirectFile {
    /// Opens a second way into `plain`. With `write`, both ways.
    pub(crate) fn new(plain: File, write: bool) -> DirectFile {
        let path = format!("/proc/self/fd/{}", plain.as_raw_fd());
        let direct =
            OpenOptions::new().read(true).write(write).custom_flags(libc::O_DIRECT | libc::O_CLOEXEC).open(path);
        DirectFile { plain, direct: direct.ok(), refused: AtomicBool::new(false) }
    }

    /// For questions about the file.
    pub(crate) fn plain(&self) -> &File {
        &self.plain
    }

    /// Whether requests pass the page cache by.
    pub(crate) fn is_direct(&self) -> bool {
        self.direct.is_some() && !self.refused.load(Ordering::Relaxed)
    }

    /// The direct way itself, unless the file system has refused it.
    pub(crate) fn direct(&self) -> Option<BorrowedFd<'_>> {
        self.direct.as_ref().filter(|_| self.is_direct()).map(File::as_fd)
    }

    /// The direct way, for a request that can take it.
    fn way(&self, at: u64, bytes: &[u8]) -> Option<&File> {
        let aligned = at.is_multiple_of(BLOCK) && (bytes.len() as u64).is_multiple_of(BLOCK);
        let fits = aligned && (bytes.as_ptr() as usize).is_multiple_of(BLOCK as usize);
        self.direct.as_ref().filter(|_| fits && self.is_direct())
    }

    /// Writes all of `bytes` at `at`. Through the page cache it also waits for the disk, because an error there would come too late.
    pub(crate) fn write(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        if let Some(direct) = self.way(at, bytes) {
            match direct.write_all_at(bytes, at) {
                Err(error) if is_refusal(&error) => self.refused.store(true, Ordering::Relaxed),
                outcome => return outcome,
            }
        }
        self.plain.write_all_at(bytes, at)?;
        self.plain.sync_data()
    }

    /// Reads into `bytes` until they are full or the file ends; returns how many were read.
    pub(crate) fn read(&self, bytes: &mut [u8], at: u64) -> io::Result<usize> {
        if let Some(direct) = self.way(at, bytes) {
            match fill(direct, bytes, at) {
                Err(error) if is_refusal(&error) => self.refused.store(true, Ordering::Relaxed),
                outcome => return outcome,
            }
        }
        fill(&self.plain, bytes, at)
    }
}

fn is_refusal(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EINVAL)
}

/// A direct read that meets the end of the file in the middle of a block stops there; the next one would be unaligned.
fn fill(file: &File, bytes: &mut [u8], at: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < bytes.len() {
        match file.read_at(&mut bytes[done..], at + done as u64) {
            Ok(0) => break,
            Ok(count) if !(count as u64).is_multiple_of(BLOCK) => return Ok(done + count),
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}
