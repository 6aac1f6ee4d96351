//! A roster: the file in which one member lists the pieces that it relies on. 64 bytes say whose it is and which version; then come
//! entries of 64 bytes, each with its checksum. An entry that is all zero, torn or damaged is not there.

use super::Address;
use super::pack::PackId;
use crate::tier::step::step;
use std::collections::HashMap;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use twox_hash::XxHash3_64;

const MAGIC: [u8; 8] = *b"SIREROS\x01";
const VERSION: u32 = 1;
/// Bytes of the header, and of an entry.
const UNIT: usize = 64;
/// Where a unit's checksum is.
const CHECK: usize = 56;
const PREFIX: &str = "member-";
/// No member relies on more pieces than this: 64 TiB in pieces of 4 MiB.
const MOST: u64 = 1 << 24;

/// Which member: a process, and which of its engines.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(crate) struct MemberId {
    pub(super) pid: u32,
    pub(super) number: u32,
    /// When the process started, in the kernel's own unit: a process number can come again.
    pub(super) start: u64,
}

impl MemberId {
    /// Engine `number` of this process.
    pub(super) fn here(number: u32) -> io::Result<MemberId> {
        let pid = std::process::id();
        let start = proc_start(pid).ok_or_else(|| io::Error::other("/proc does not show this process"))?;
        Ok(MemberId { pid, number, start })
    }

    pub(super) fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&self.pid.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.number.to_le_bytes());
        bytes[8..].copy_from_slice(&self.start.to_le_bytes());
        bytes
    }

    fn from_bytes(bytes: &[u8]) -> MemberId {
        MemberId { pid: u32_at(bytes, 0), number: u32_at(bytes, 4), start: u64_at(bytes, 8) }
    }

    fn file_name(self) -> String {
        format!("{PREFIX}{}-{}-{}", self.pid, self.start, self.number)
    }
}

/// When a process started; `None` if there is no such process.
pub(super) fn proc_start(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the program's name in parentheses, which may contain anything; the 22nd is the start.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

/// The PID namespace in which process numbers mean something.
fn namespace() -> u64 {
    fs::metadata("/proc/self/ns/pid").map_or(0, |found| found.ino())
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
}

fn u128_at(bytes: &[u8], at: usize) -> u128 {
    bytes.get(at..at + 16).and_then(|b| b.try_into().ok()).map_or(0, u128::from_le_bytes)
}

/// An entry: a member relies on `address`, which is at `at` of a pack that the member has open as `fd`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Entry {
    pub(super) address: Address,
    pub(super) pack: PackId,
    pub(super) at: u64,
    pub(super) fd: i32,
}

impl Entry {
    /// The range of the pack.
    pub(super) fn range(&self) -> std::ops::Range<u64> {
        self.at..self.at.saturating_add(self.address.len)
    }

    fn to_bytes(self) -> [u8; UNIT] {
        let mut bytes = [0; UNIT];
        bytes[..16].copy_from_slice(&self.address.hash.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.address.len.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.at.to_le_bytes());
        bytes[32..48].copy_from_slice(&self.pack.member.to_bytes());
        bytes[48..52].copy_from_slice(&self.pack.number.to_le_bytes());
        bytes[52..56].copy_from_slice(&self.fd.to_le_bytes());
        sign(bytes)
    }

    fn from_bytes(bytes: &[u8]) -> Option<Entry> {
        if !is_signed(bytes) {
            return None;
        }
        let address = Address { hash: u128_at(bytes, 0), len: u64_at(bytes, 16) };
        let pack = PackId { member: MemberId::from_bytes(&bytes[32..48]), number: u32_at(bytes, 48) };
        Some(Entry { address, pack, at: u64_at(bytes, 24), fd: u32_at(bytes, 52) as i32 })
    }
}

fn sign(mut bytes: [u8; UNIT]) -> [u8; UNIT] {
    let check = XxHash3_64::oneshot(&bytes[..CHECK]);
    bytes[CHECK..].copy_from_slice(&check.to_le_bytes());
    bytes
}

fn is_signed(bytes: &[u8]) -> bool {
    bytes.len() == UNIT && u64_at(bytes, CHECK) == XxHash3_64::oneshot(&bytes[..CHECK])
}

fn header(id: MemberId) -> [u8; UNIT] {
    let mut bytes = [0; UNIT];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[16..32].copy_from_slice(&id.to_bytes());
    bytes[32..40].copy_from_slice(&namespace().to_le_bytes());
    sign(bytes)
}

/// This member's roster.
#[derive(Debug)]
pub(super) struct Roster {
    pub(super) path: PathBuf,
    file: File,
    entries: HashMap<u32, Entry>,
    /// Entries that were struck and can be written again.
    free: Vec<u32>,
    count: u32,
}

impl Roster {
    /// Makes the caller a member. The gate is held.
    pub(super) fn enlist(dir: &Path, id: MemberId) -> io::Result<Roster> {
        let path = dir.join(id.file_name());
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
        step();
        file.try_lock().map_err(io::Error::from)?;
        step();
        file.write_all_at(&header(id), 0)?;
        Ok(Roster { path, file, entries: HashMap::new(), free: Vec::new(), count: 0 })
    }

    /// Adds an entry.
    pub(super) fn add(&mut self, entry: Entry) -> io::Result<u32> {
        let slot = self.free.last().copied().unwrap_or(self.count);
        self.put(slot, &entry.to_bytes())?;
        if self.free.pop().is_none() {
            self.count += 1;
        }
        self.entries.insert(slot, entry);
        Ok(slot)
    }

    /// Takes an entry out.
    pub(super) fn strike(&mut self, slot: u32) -> io::Result<()> {
        self.put(slot, &[0; UNIT])?;
        if self.entries.remove(&slot).is_some() {
            self.free.push(slot);
        }
        Ok(())
    }

    fn put(&self, slot: u32, bytes: &[u8]) -> io::Result<()> {
        step();
        self.file.write_all_at(bytes, (u64::from(slot) + 1) * UNIT as u64)
    }

    /// All entries.
    pub(super) fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.entries.values()
    }

    /// Ends the membership.
    pub(super) fn resign(&self) {
        // Best effort: a file that stays is found unlocked, and buried by the next that comes.
        let _ = fs::remove_file(&self.path);
    }
}

/// Another member, as its roster shows it.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) id: MemberId,
    pub(super) is_alive: bool,
    /// Its process number means something here.
    pub(super) is_reachable: bool,
    /// Every entry could be read.
    pub(super) is_whole: bool,
    pub(super) entries: Vec<Entry>,
    pub(super) path: PathBuf,
}

/// Every other member, dead or alive. The gate is held.
///
/// # Errors
/// `InvalidData` if a living member's file is of another version or damaged: nobody knows what that member relies on.
pub(super) fn others(dir: &Path, me: MemberId) -> io::Result<Vec<Member>> {
    let mut members = Vec::new();
    for found in fs::read_dir(dir)? {
        let name = found?.file_name();
        let Some(name) = name.to_str().filter(|name| name.starts_with(PREFIX)) else { continue };
        if me.file_name() != name {
            members.extend(read_member(&dir.join(name))?);
        }
    }
    Ok(members)
}

/// `None`: it has gone.
fn read_member(path: &Path) -> io::Result<Option<Member>> {
    let file = match File::open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    // A roster is made and locked inside the gate: one without a lock is a dead member's.
    let is_locked = matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock));
    let len = file.metadata()?.len().min((MOST + 1) * UNIT as u64);
    let mut bytes = vec![0; len as usize];
    file.read_exact_at(&mut bytes, 0)?;
    let (front, rest) = bytes.split_at(UNIT.min(bytes.len()));
    if !is_signed(front) || front[..8] != MAGIC || u32_at(front, 8) != VERSION {
        if is_locked {
            let why = format!("{} is of another version of Sire, or damaged", path.display());
            return Err(io::Error::new(io::ErrorKind::InvalidData, why));
        }
        // Its owner died before it had written the header, or was another version: nobody needs it.
        let _ = fs::remove_file(path);
        return Ok(None);
    }
    let id = MemberId::from_bytes(&front[16..32]);
    let is_reachable = u64_at(front, 32) == namespace();
    let runs = !is_reachable || proc_start(id.pid) == Some(id.start);
    let used = || rest.chunks_exact(UNIT).filter(|unit| unit.iter().any(|&byte| byte != 0));
    let entries: Vec<Entry> = used().filter_map(Entry::from_bytes).collect();
    let is_whole = entries.len() == used().count();
    Ok(Some(Member { id, is_alive: is_locked && runs, is_reachable, is_whole, entries, path: path.to_path_buf() }))
}
