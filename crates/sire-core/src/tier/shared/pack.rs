//! A pack: an anonymous file in memory that holds pieces of backups. Its first page says whose it is, so that a descriptor that
//! has come to mean something else is never mistaken for it. Offsets count from behind that page.

use super::roster::MemberId;
use crate::raw;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use twox_hash::XxHash3_64;

const MAGIC: [u8; 8] = *b"SIREPAK\x01";
/// Bytes in front of the first piece.
const FRONT: u64 = 4096;
const HEADER: usize = 64;

/// Which pack.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(crate) struct PackId {
    /// Who made it.
    pub(super) member: MemberId,
    /// Counts the packs of that process.
    pub(super) number: u32,
}

/// See the [module documentation](self).
#[derive(Debug)]
pub(crate) struct Pack {
    pub(super) id: PackId,
    file: File,
    len: u64,
}

impl Pack {
    /// A pack with `len` bytes of room, all present.
    pub(super) fn create(id: PackId, len: u64) -> io::Result<Pack> {
        let whole = FRONT.checked_add(len).ok_or(io::ErrorKind::OutOfMemory)?;
        let file = raw::memory_file()?;
        raw::preallocate(&file, whole)?;
        raw::seal_length(&file)?;
        file.write_all_at(&header(id), 0)?;
        Ok(Pack { id, file, len })
    }

    /// Another process's pack, under a descriptor of that process.
    pub(super) fn open(pid: u32, fd: i32, id: PackId) -> io::Result<Pack> {
        let path = format!("/proc/{pid}/fd/{fd}");
        // Asked before it is opened: opening a pipe or a device can have effects.
        if !fs::metadata(&path)?.is_file() {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | libc::O_NOCTTY;
        let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)?;
        let len = file.metadata()?.len().checked_sub(FRONT).ok_or(io::ErrorKind::InvalidData)?;
        let mut found = [0; HEADER];
        file.read_exact_at(&mut found, 0)?;
        if found != header(id) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(Pack { id, file, len })
    }

    /// The descriptor under which others can open it.
    pub(super) fn fd(&self) -> i32 {
        self.file.as_raw_fd()
    }

    /// Bytes of room.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Memory that it takes, in bytes.
    pub(super) fn memory(&self) -> u64 {
        self.file.metadata().map_or(0, |found| found.blocks() * 512)
    }

    pub(super) fn write(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, FRONT + at)
    }

    pub(super) fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(into, FRONT + at)
    }

    /// Gives the memory of a range back.
    pub(super) fn punch(&self, range: &Range<u64>) -> io::Result<()> {
        let range = range.start..range.end.min(self.len);
        if range.is_empty() { Ok(()) } else { raw::punch(&self.file, FRONT + range.start, range.end - range.start) }
    }
}

fn header(id: PackId) -> [u8; HEADER] {
    let mut bytes = [0; HEADER];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..24].copy_from_slice(&id.member.to_bytes());
    bytes[24..28].copy_from_slice(&id.number.to_le_bytes());
    let check = XxHash3_64::oneshot(&bytes[..56]);
    bytes[56..].copy_from_slice(&check.to_le_bytes());
    bytes
}
