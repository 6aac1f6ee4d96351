//! The ledger: who owns which frame of one device.
//!
//! A ledger is a small mapped table: a header, the member processes, a bitmap of used frames, and one
//! entry per frame. With an environment directory it is a file that all members map; otherwise it is
//! private memory. Every change happens between [`Ledger::lock`] and the guard's drop: a mutex orders
//! the threads of a process, a lock on the file's first byte orders the processes. Each member also
//! holds, for life, the lock on a byte of its own; the kernel drops both at death, so that a killed
//! member neither blocks the others nor keeps its frames. A forked child holds its parent's locks, so a
//! member also counts as dead when its process is gone or another one has its number. (Members must see
//! each other in `/proc`: processes in different PID namespaces cannot share an environment.)
//!
//! What one call takes has a *serial*, by which other members find it. A member that uses such frames
//! without owning them has a *hold* per use; whoever lets go of frames that others hold leaves them to one
//! of those, so that memory goes when its last user goes, dead or alive. Beside the frames the table has
//! [`mark`]s, which is how streams of different processes wait for each other.

use self::runs::{choose, join, next_used};
use crate::sys;
use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering, compiler_fence};
use std::sync::{Mutex, MutexGuard, PoisonError};

mod hold;
pub mod mark;
mod runs;

const MAGIC: u64 = u64::from_le_bytes(*b"SIRESIM\x02");
const MEMBERS: usize = 512;
/// Byte of the file that member `n` keeps locked: this plus `n`. (Locks may lie behind the file's end.)
const LIVENESS: u64 = 1 << 40;

/// A run of frames.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// First frame.
    pub first: u32,
    /// How many.
    pub count: u32,
}

/// Which call made memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Api {
    /// `cuMemCreate`.
    Create = 1,
    /// `cudaMalloc`.
    Malloc = 2,
    /// `cudaMallocAsync`.
    MallocAsync = 3,
}

impl Api {
    /// The call's name, from the number in the table.
    pub fn name(number: u8) -> &'static str {
        match number {
            1 => "cuMemCreate",
            2 => "cudaMalloc",
            3 => "cudaMallocAsync",
            _ => "unknown",
        }
    }
}

#[repr(C)]
struct Header {
    magic: u64,
    frame_size: u64,
    frames: u32,
    used: u32,
    inode: u64,
    /// The serial of what was taken last.
    serial: u32,
    /// How many holds there are.
    holds: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Member {
    pid: u32,
    fd: i32,
    start: u64,
    used: u32,
    _reserved: u32,
}

impl Member {
    const NOBODY: Member = Member { pid: 0, fd: -1, start: 0, used: 0, _reserved: 0 };
}

#[repr(C)]
struct Frame {
    owner: u16, // slot + 1; 0: free
    api: u8,
    _reserved: u8,
    serial: u32,
    tag: u64,
}

/// What one call took, or what another member's call took and this one uses.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Taken {
    /// Which frames, in order.
    pub extents: Vec<Extent>,
    /// How other members find them.
    pub serial: u32,
    /// What the call gave as a tag.
    pub tag: u64,
}

/// A run of frames with one owner and purpose, for the census.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Run {
    /// First frame.
    pub first: u32,
    /// How many.
    pub count: u32,
    /// Process that owns them.
    pub pid: u32,
    /// The call that made them.
    pub api: &'static str,
    /// What the call gave as a tag.
    pub tag: u64,
    /// Handles and mappings of the owner's.
    pub refs: u32,
    /// Uses by other processes.
    pub held: u32,
}

/// Offsets of the parts, from the number of frames alone.
struct Layout {
    members: usize,
    bitmap: usize,
    table: usize,
    holds: usize,
    marks: usize,
    refs: usize,
    total: usize,
}

impl Layout {
    fn of(frames: u32) -> Layout {
        let members = 64;
        let bitmap = members + MEMBERS * size_of::<Member>();
        let table = bitmap + (frames as usize).div_ceil(64) * 8;
        let holds = table + frames as usize * size_of::<Frame>();
        let marks = holds + hold::MOST * size_of::<hold::Hold>();
        let refs = marks + mark::MOST * size_of::<mark::Entry>();
        let total = (refs + frames as usize * 4).next_multiple_of(sys::PAGE as usize);
        Layout { members, bitmap, table, holds, marks, refs, total }
    }
}

/// The table of one device. See the module's documentation.
#[derive(Debug)]
pub struct Ledger {
    base: u64,
    frames: u32,
    total: usize,
    slot: usize,
    file: Option<(OwnedFd, PathBuf)>,
    mutex: Mutex<()>,
    generation: u64,
}

/// The right to read and change the table.
pub struct Guard<'a> {
    ledger: &'a Ledger,
    _thread: MutexGuard<'a, ()>,
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        if let Some((fd, _)) = &self.ledger.file {
            // Unlocking a lock that is held cannot fail; there would be nothing to do about it.
            let _ = sys::lock_byte(fd, 0, false);
        }
    }
}

impl Ledger {
    /// A table for this process alone.
    pub fn private(frames: u32, frame_size: u64) -> io::Result<Ledger> {
        let layout = Layout::of(frames);
        let base = sys::map_memory(layout.total as u64, false)?;
        let ledger = Ledger {
            base,
            frames,
            total: layout.total,
            slot: 0,
            file: None,
            mutex: Mutex::new(()),
            generation: sys::generation(),
        };
        let mut guard = ledger.lock()?;
        guard.start(frame_size);
        guard.members()[0].pid = std::process::id();
        drop(guard);
        Ok(ledger)
    }

    /// Joins the table at `path`, or makes it. The memory comes from a live member, or from `make` if there is none.
    pub fn join(
        path: &Path,
        frames: u32,
        frame_size: u64,
        make: impl FnOnce() -> io::Result<OwnedFd>,
    ) -> io::Result<(Ledger, OwnedFd)> {
        let layout = Layout::of(frames);
        let fd = open_locked(path)?;
        let result = Ledger::enter(&fd, &layout, frames, frame_size, make);
        sys::lock_byte(&fd, 0, false)?;
        let (base, slot, memory) = result?;
        let file = Some((fd, path.to_path_buf()));
        Ok((
            Ledger {
                base,
                frames,
                total: layout.total,
                slot,
                file,
                mutex: Mutex::new(()),
                generation: sys::generation(),
            },
            memory,
        ))
    }

    /// With the file locked: checks the header, finds the memory, takes a slot.
    fn enter(
        fd: &OwnedFd,
        layout: &Layout,
        frames: u32,
        frame_size: u64,
        make: impl FnOnce() -> io::Result<OwnedFd>,
    ) -> io::Result<(u64, usize, OwnedFd)> {
        let was = file_size(fd)?;
        let slots_end = (layout.bitmap) as u64;
        if was >= slots_end && other_sizes(fd, frames, frame_size)? {
            if (0..MEMBERS).any(|slot| sys::byte_is_locked(fd, LIVENESS + slot as u64)) {
                return Err(io::Error::other(
                    "the environment's devices have another size; use the same SIRE_SIM_MEMORY, or another SIRE_SIM_DIR",
                ));
            }
            truncate(fd, 0)?;
        }
        truncate(fd, layout.total as u64)?;
        let base = sys::map_file(fd, layout.total as u64, false)?;
        let ledger = Ledger {
            base,
            frames,
            total: 0,
            slot: usize::MAX,
            file: None,
            mutex: Mutex::new(()),
            generation: sys::generation(),
        };
        let mut guard = ledger.lock()?;
        guard.start(frame_size);
        let memory = match guard.find_memory(fd) {
            Some(memory) => memory,
            None => make()?,
        };
        let slot = guard
            .take_slot(fd)
            .ok_or_else(|| io::Error::other(format!("the environment has {MEMBERS} members already")))?;
        sys::lock_byte(fd, LIVENESS + slot as u64, true)?;
        guard.announce(slot, &memory)?;
        drop(guard);
        Ok((base, slot, memory))
    }

    /// Waits for the right to use the table.
    pub fn lock(&self) -> io::Result<Guard<'_>> {
        let thread = self.mutex.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((fd, _)) = &self.file {
            sys::lock_byte(fd, 0, true)?;
        }
        Ok(Guard { ledger: self, _thread: thread })
    }

    /// Writes the number of handles and mappings into the entries of frames that this process owns.
    pub fn set_refs(&self, extents: &[Extent], refs: u32) {
        for frame in extents.iter().flat_map(|extent| extent.first..extent.first + extent.count) {
            self.refs()[frame as usize].store(refs, Ordering::Relaxed);
        }
    }

    fn refs(&self) -> &[AtomicU32] {
        let at = self.base as usize + Layout::of(self.frames).refs;
        // SAFETY: the mapping of `Layout::total` bytes at `base` lives as long as self and holds one u32 per frame there,
        // which every process touches through atomics only.
        unsafe { std::slice::from_raw_parts(at as *const AtomicU32, self.frames as usize) }
    }

    fn is_alive(&self, slot: usize, member: Member) -> bool {
        if slot == self.slot {
            return true;
        }
        let locked = self.file.as_ref().is_some_and(|(fd, _)| sys::byte_is_locked(fd, LIVENESS + slot as u64));
        locked && sys::process_start(member.pid).is_some_and(|(start, runs)| runs && start == member.start)
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        if self.total > 0 && self.generation == sys::generation() {
            sys::unmap(self.base, self.total as u64);
        }
    }
}

impl Guard<'_> {
    fn part<T>(&mut self, offset: usize, count: usize) -> &mut [T] {
        // SAFETY: the callers below pass offsets and counts of `Layout::of(frames)`, which fit the mapping and are aligned to 8 bytes;
        // all integers are valid values of T; the guard makes this the only reference of this process, and the file lock of all.
        unsafe { std::slice::from_raw_parts_mut((self.ledger.base as usize + offset) as *mut T, count) }
    }

    fn header(&mut self) -> &mut Header {
        &mut self.part::<Header>(0, 1)[0]
    }

    fn members(&mut self) -> &mut [Member] {
        self.part(Layout::of(0).members, MEMBERS)
    }

    fn bitmap(&mut self) -> &mut [u64] {
        let frames = self.ledger.frames;
        self.part(Layout::of(frames).bitmap, (frames as usize).div_ceil(64))
    }

    fn table(&mut self) -> &mut [Frame] {
        let frames = self.ledger.frames;
        self.part(Layout::of(frames).table, frames as usize)
    }

    fn start(&mut self, frame_size: u64) {
        let frames = self.ledger.frames;
        let header = self.header();
        if header.magic != MAGIC {
            *header = Header { magic: MAGIC, frame_size, frames, used: 0, inode: 0, serial: 0, holds: 0 };
        }
    }

    /// The memory of some live member; if there is none, the table is emptied.
    fn find_memory(&mut self, fd: &OwnedFd) -> Option<OwnedFd> {
        let inode = self.header().inode;
        let members = self.members().to_vec();
        for (slot, member) in members.iter().enumerate().filter(|(_, member)| member.pid != 0) {
            if !sys::byte_is_locked(fd, LIVENESS + slot as u64) {
                continue;
            }
            let path = format!("/proc/{}/fd/{}", member.pid, member.fd);
            let Ok(file) = OpenOptions::new().read(true).write(true).open(path) else { continue };
            let memory = OwnedFd::from(file);
            if sys::blocks_and_inode(&memory).is_ok_and(|(_, found)| found == inode) {
                return Some(memory);
            }
        }
        self.members().fill(Member::NOBODY);
        self.bitmap().fill(0);
        self.table().iter_mut().for_each(|frame| frame.owner = 0);
        self.clear_holds();
        self.header().used = 0;
        self.clear_marks(|_| true);
        None
    }

    fn take_slot(&mut self, fd: &OwnedFd) -> Option<usize> {
        let free =
            |(slot, member): &(usize, &Member)| member.pid == 0 && !sys::byte_is_locked(fd, LIVENESS + *slot as u64);
        self.members().iter().enumerate().find(free).map(|(slot, _)| slot)
    }

    /// Tells the others where this member's descriptor of the memory is.
    fn announce(&mut self, slot: usize, memory: &OwnedFd) -> io::Result<()> {
        let (_, inode) = sys::blocks_and_inode(memory)?;
        let pid = std::process::id();
        let start = sys::process_start(pid).map_or(0, |(start, _)| start);
        self.members()[slot] = Member { pid, fd: memory.as_raw_fd(), start, used: 0, _reserved: 0 };
        self.header().inode = inode;
        Ok(())
    }

    /// Frames in use by anyone.
    pub fn used(&mut self) -> u32 {
        self.header().used
    }

    /// Takes `count` frames in as few runs as possible, in ascending order; `None` if there are not enough.
    pub fn take(&mut self, count: u32, api: Api, tag: u64) -> Option<Taken> {
        let frames = self.ledger.frames;
        if frames.saturating_sub(self.header().used) < count {
            return None;
        }
        let extents = choose(self.bitmap(), frames, count);
        let owner = self.ledger.slot as u16 + 1;
        let serial = self.header().serial.wrapping_add(1).max(1);
        self.header().serial = serial;
        for extent in &extents {
            for index in extent.first..extent.first + extent.count {
                self.table()[index as usize] = Frame { owner, api: api as u8, _reserved: 0, serial, tag };
                // Who is killed here must not leave a used frame without an owner.
                compiler_fence(Ordering::SeqCst);
                self.bitmap()[index as usize / 64] |= 1 << (index % 64);
            }
        }
        self.ledger.set_refs(&extents, 1);
        self.count(self.ledger.slot, i64::from(count));
        Some(Taken { extents, serial, tag })
    }

    /// Gives frames back that no other member can know of.
    pub fn give(&mut self, extents: &[Extent]) {
        let slot = self.ledger.slot;
        self.free_of(slot, extents);
    }

    fn free_of(&mut self, slot: usize, extents: &[Extent]) {
        for extent in extents {
            for index in extent.first..extent.first + extent.count {
                self.bitmap()[index as usize / 64] &= !(1 << (index % 64));
                self.table()[index as usize].owner = 0;
            }
            self.count(slot, -i64::from(extent.count));
        }
    }

    fn count(&mut self, slot: usize, change: i64) {
        let header = self.header();
        header.used = (i64::from(header.used) + change).max(0) as u32;
        let member = &mut self.members()[slot];
        member.used = (i64::from(member.used) + change).max(0) as u32;
    }

    /// Takes the frames of dead members out of the table; `punch` is called for each run first.
    pub fn bury(&mut self, punch: impl Fn(Extent)) {
        if self.ledger.file.is_none() {
            return;
        }
        let members = self.members().to_vec();
        let is_dead = |(slot, member): &(usize, Member)| member.pid != 0 && !self.ledger.is_alive(*slot, *member);
        let dead: Vec<usize> = members.into_iter().enumerate().filter(is_dead).map(|(slot, _)| slot).collect();
        if dead.is_empty() {
            return;
        }
        // They inherit nothing from each other.
        self.forget_uses(&dead);
        for slot in dead {
            self.pass_on_all(slot, &punch);
            self.members()[slot] = Member::NOBODY;
        }
        // The dead may have been in the middle of a change: count afresh.
        self.header().used = self.bitmap().iter().map(|word| word.count_ones()).sum();
    }

    /// The frames of one member, by serial.
    fn owned(&mut self, slot: usize) -> BTreeMap<u32, Vec<Extent>> {
        let owner = slot as u16 + 1;
        let mut owned: BTreeMap<u32, Vec<Extent>> = BTreeMap::new();
        for index in self.used_frames() {
            let frame = &self.table()[index as usize];
            if frame.owner == owner {
                join(owned.entry(frame.serial).or_default(), index);
            }
        }
        owned
    }

    fn used_frames(&mut self) -> Vec<u32> {
        let frames = self.ledger.frames;
        let bitmap = self.bitmap();
        let first = next_used(bitmap, 0, frames);
        let all = std::iter::successors(Some(first), |index| Some(next_used(bitmap, index + 1, frames)));
        all.take_while(|index| *index < frames).collect()
    }

    /// (pid, frames) of each member.
    pub fn holders(&mut self) -> Vec<(u32, u32)> {
        self.members().iter().filter(|member| member.pid != 0).map(|member| (member.pid, member.used)).collect()
    }

    /// Every run of used frames.
    pub fn runs(&mut self) -> Vec<Run> {
        let pids: Vec<u32> = self.members().iter().map(|member| member.pid).collect();
        let refs = self.ledger.refs();
        let held = self.held();
        let mut runs: Vec<Run> = Vec::new();
        for index in self.used_frames() {
            let frame = &self.table()[index as usize];
            let pid = pids.get((frame.owner as usize).wrapping_sub(1)).copied().unwrap_or(0);
            let (api, tag) = (Api::name(frame.api), frame.tag);
            let refs = refs[index as usize].load(Ordering::Relaxed);
            let held = held.get(&frame.serial).copied().unwrap_or(0);
            let run = Run { first: index, count: 1, pid, api, tag, refs, held };
            match runs.last_mut() {
                Some(last) if joins(last, &run) => last.count += 1,
                _ => runs.push(run),
            }
        }
        runs
    }

    /// Leaves: this member's frames are free (after `punch`), and the last one out removes the file.
    pub fn leave(&mut self, punch: impl Fn(Extent)) {
        let slot = self.ledger.slot;
        self.forget_uses(&[slot]);
        self.pass_on_all(slot, &punch);
        self.members()[slot].pid = 0;
        self.bury(punch);
        if let Some((_, path)) = &self.ledger.file
            && self.members().iter().all(|member| member.pid == 0)
        {
            // The file may be gone already, with its directory: that is what is wanted.
            let _ = std::fs::remove_file(path);
        }
    }
}

fn joins(last: &Run, next: &Run) -> bool {
    last.first + last.count == next.first
        && (last.pid, last.api, last.tag, last.refs, last.held) == (next.pid, next.api, next.tag, next.refs, next.held)
}

/// Opens the file and takes its lock; again, if the last member removed it meanwhile.
fn open_locked(path: &Path) -> io::Result<OwnedFd> {
    loop {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        let inode = file.metadata()?.ino();
        let fd = OwnedFd::from(file);
        sys::lock_byte(&fd, 0, true)?;
        if std::fs::metadata(path).is_ok_and(|found| found.ino() == inode) {
            return Ok(fd);
        }
    }
}

fn file_size(fd: &OwnedFd) -> io::Result<u64> {
    Ok(std::fs::File::from(fd.try_clone()?).metadata()?.len())
}

fn truncate(fd: &OwnedFd, size: u64) -> io::Result<()> {
    std::fs::File::from(fd.try_clone()?).set_len(size)
}

/// Whether the file's header is of devices with other sizes (or of another version).
fn other_sizes(fd: &OwnedFd, frames: u32, frame_size: u64) -> io::Result<bool> {
    use std::os::unix::fs::FileExt;
    let mut bytes = [0u8; 20];
    std::fs::File::from(fd.try_clone()?).read_exact_at(&mut bytes, 0)?;
    let mut expected = [0u8; 20];
    expected[..8].copy_from_slice(&MAGIC.to_ne_bytes());
    expected[8..16].copy_from_slice(&frame_size.to_ne_bytes());
    expected[16..].copy_from_slice(&frames.to_ne_bytes());
    Ok(bytes != [0; 20] && bytes != expected)
}
