//! The memory of one device: a sparse file of frames, its ledger, and physicals cut from it.
//!
//! A [`Physical`] owns frames; when its last reference goes, a hole is punched where they were, so that
//! the operating system's count of the file's blocks falls, and then the ledger forgets them.

use crate::error::{Code, Result};
use crate::ledger::{Api, Extent, Ledger, Run, Taken};
use crate::options::{Options, Poison};
use crate::sys;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// What fresh memory is filled with: a float NaN, and as an integer conspicuous.
pub const POISON: [u8; 4] = [0xEF, 0xBE, 0xFE, 0x7F];

/// One device's memory. See the module's documentation.
#[derive(Debug)]
pub struct DeviceMemory {
    /// Which device of the machine.
    pub device: u32,
    /// Bytes of a frame.
    pub frame: u64,
    /// Bytes of the device.
    pub size: u64,
    file: OwnedFd,
    ledger: Ledger,
    poison: Poison,
    alias: Option<u64>,
    left: AtomicBool,
    generation: u64,
}

impl DeviceMemory {
    /// Joins (or makes) the memory of device number `device`.
    pub fn open(device: u32, options: &Options) -> io::Result<DeviceMemory> {
        let frame = options.granularity;
        let size = options.memory / frame * frame;
        let frames =
            u32::try_from(size / frame).map_err(|_| io::Error::other("too many frames: use a larger granularity"))?;
        let (file, ledger) = match &options.dir {
            None => (sys::memfd(size)?, Ledger::private(frames, frame)?),
            Some(dir) => {
                std::fs::create_dir_all(dir)?;
                let path = dir.join(format!("device{device}.ledger"));
                let (ledger, file) = Ledger::join(&path, frames, frame, || sys::memfd(size))?;
                (file, ledger)
            }
        };
        let alias = if options.timing { Some(sys::map_file(&file, size, true)?) } else { None };
        let poison = if options.timing { Poison::Off } else { options.poison };
        Ok(DeviceMemory {
            device,
            frame,
            size,
            file,
            ledger,
            poison,
            alias,
            left: AtomicBool::new(false),
            generation: sys::generation(),
        })
    }

    /// Where frame `index` is in the permanent alias, if there is one.
    pub fn alias_of(&self, index: u32) -> Option<u64> {
        self.alias.map(|base| base + u64::from(index) * self.frame)
    }

    fn punch(&self, extent: Extent) {
        if self.alias.is_some() {
            return;
        }
        // A hole that cannot be punched leaves bytes behind that the census will show; there is nobody to tell.
        let _ = sys::punch(&self.file, u64::from(extent.first) * self.frame, u64::from(extent.count) * self.frame);
    }

    /// Takes memory for a physical of `size` bytes, a multiple of the frame.
    pub fn create(self: &Arc<Self>, size: u64, api: Api, tag: u64) -> Result<Arc<Physical>> {
        let short =
            || Code::OUT_OF_MEMORY.because(format!("device {} has no {size} bytes left of {}", self.device, self.size));
        let count = u32::try_from(size / self.frame).map_err(|_| short())?;
        let mut guard = self.ledger.lock().map_err(os_error)?;
        let mut taken = guard.take(count, api, tag);
        if taken.is_none() {
            guard.bury(|extent| self.punch(extent));
            taken = guard.take(count, api, tag);
        }
        drop(guard);
        let physical = self.physical(taken.ok_or_else(short)?, size, false);
        self.poison(&physical).map_err(|error| {
            Code::OUT_OF_MEMORY.because(format!("the host has no {size} bytes for the software device: {error}"))
        })?;
        Ok(physical)
    }

    fn physical(self: &Arc<Self>, taken: Taken, size: u64, borrowed: bool) -> Arc<Physical> {
        Arc::new(Physical {
            memory: Arc::clone(self),
            size,
            extents: taken.extents,
            serial: taken.serial,
            tag: taken.tag,
            borrowed,
            shared: AtomicBool::new(borrowed),
            refs: AtomicU32::new(1),
        })
    }

    /// The memory that another member of the environment took under this serial, and says to be `size` bytes.
    pub fn borrow(self: &Arc<Self>, serial: u32, size: u64) -> Result<Arc<Physical>> {
        let mut guard = self.ledger.lock().map_err(os_error)?;
        guard.bury(|extent| self.punch(extent));
        let held = guard.hold(serial);
        drop(guard);
        let gone = || Code::INVALID_HANDLE.because("the memory that the handle stands for is gone");
        let physical = self.physical(held.ok_or_else(gone)?, size, true);
        let frames: u64 = physical.extents.iter().map(|extent| u64::from(extent.count)).sum();
        if frames * self.frame != size { Err(gone()) } else { Ok(physical) }
    }

    /// Which file the memory is, all processes of the environment alike.
    pub fn inode(&self) -> Result<u64> {
        sys::blocks_and_inode(&self.file).map(|(_, inode)| inode).map_err(os_error)
    }

    /// Who owns what.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Whether the ledger may still be changed by this process.
    pub fn is_member(&self) -> bool {
        self.generation == sys::generation() && !self.left.load(Ordering::Acquire)
    }

    fn poison(&self, physical: &Physical) -> io::Result<()> {
        let length = match self.poison {
            Poison::Off => return Ok(()),
            Poison::Sample => sys::PAGE,
            Poison::Full => self.frame,
        };
        let pattern = pattern(length as usize);
        for frame in physical.extents.iter().flat_map(|extent| extent.first..extent.first + extent.count) {
            sys::write_at(&self.file, pattern, u64::from(frame) * self.frame)?;
        }
        Ok(())
    }

    /// (free, total) bytes, all processes together.
    pub fn info(&self) -> Result<(u64, u64)> {
        let mut guard = self.ledger.lock().map_err(os_error)?;
        guard.bury(|extent| self.punch(extent));
        Ok((self.size.saturating_sub(u64::from(guard.used()) * self.frame), self.size))
    }

    /// (pid, bytes) of every member that holds memory.
    pub fn holders(&self) -> Result<Vec<(u32, u64)>> {
        let mut guard = self.ledger.lock().map_err(os_error)?;
        guard.bury(|extent| self.punch(extent));
        Ok(guard
            .holders()
            .into_iter()
            .filter(|(_, frames)| *frames > 0)
            .map(|(pid, frames)| (pid, u64::from(frames) * self.frame))
            .collect())
    }

    /// What the census says about this device.
    pub fn census(&self) -> Result<serde_json::Value> {
        let mut guard = self.ledger.lock().map_err(os_error)?;
        guard.bury(|extent| self.punch(extent));
        let runs: Vec<Run> = guard.runs();
        drop(guard);
        let frames: u64 = runs.iter().map(|run| u64::from(run.count)).sum();
        let (blocks, inode) = sys::blocks_and_inode(&self.file).map_err(os_error)?;
        Ok(serde_json::json!({
            "device": self.device,
            "total_bytes": self.size,
            "frame_bytes": self.frame,
            "used_bytes": frames * self.frame,
            "used_frames": frames,
            "committed_bytes": blocks * 512,
            "memory_file": format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd()),
            "memory_inode": inode,
            "runs": runs,
        }))
    }

    /// Leaves the environment: this process's frames are free, and their pages are gone.
    pub fn leave(&self) {
        if self.generation != sys::generation() || self.left.swap(true, Ordering::AcqRel) {
            return;
        }
        if let Ok(mut guard) = self.ledger.lock() {
            guard.leave(|extent| self.punch(extent));
        }
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        self.leave();
        if let Some(alias) = self.alias
            && self.generation == sys::generation()
        {
            sys::unmap(alias, self.size);
        }
    }
}

/// At least `length` bytes of the poison pattern, made once.
fn pattern(length: usize) -> &'static [u8] {
    use std::sync::OnceLock;
    static PATTERN: OnceLock<Vec<u8>> = OnceLock::new();
    static SMALL: OnceLock<Vec<u8>> = OnceLock::new();
    const LARGE: usize = 2 << 20;
    let whole = |cell: &'static OnceLock<Vec<u8>>, bytes: usize| {
        cell.get_or_init(|| POISON.iter().copied().cycle().take(bytes).collect())
    };
    if length <= 4096 { &whole(&SMALL, 4096)[..length] } else { &whole(&PATTERN, LARGE)[..length.min(LARGE)] }
}

/// An operating-system failure as the device would report it.
pub fn os_error(error: io::Error) -> crate::error::SimError {
    Code::UNKNOWN.because(format!("the operating system refused what the software device needs: {error}"))
}

/// Memory of a device: some frames.
#[derive(Debug)]
pub struct Physical {
    /// Whose.
    pub memory: Arc<DeviceMemory>,
    /// Bytes.
    pub size: u64,
    /// Which frames, in order.
    pub extents: Vec<Extent>,
    /// What `create` was given.
    pub tag: u64,
    /// By what other processes find it.
    pub serial: u32,
    /// Whether another process took it.
    pub borrowed: bool,
    shared: AtomicBool,
    refs: AtomicU32,
}

impl Physical {
    /// Notes one handle or mapping more, or fewer, for the census. (Rust's count decides when the memory goes.)
    pub fn note(&self, change: i32) {
        let refs = self.refs.fetch_add(change as u32, Ordering::Relaxed).wrapping_add(change as u32);
        if !self.borrowed {
            self.memory.ledger.set_refs(&self.extents, refs);
        }
    }

    /// Other processes may know of it from now on.
    pub fn share(&self) {
        self.shared.store(true, Ordering::Release);
    }

    /// Puts the bytes at `addr`, a reservation of the same size, without access.
    pub fn map_at(&self, addr: u64) -> io::Result<()> {
        let mut at = addr;
        for extent in &self.extents {
            let len = u64::from(extent.count) * self.memory.frame;
            sys::map_file_at(at, len, &self.memory.file, u64::from(extent.first) * self.memory.frame)?;
            at += len;
        }
        Ok(())
    }

    /// Where byte `offset` is in the permanent alias, and for how many bytes on; `None` without an alias.
    pub fn alias(&self, offset: u64) -> Option<(u64, u64)> {
        self.memory.alias?;
        let mut skipped = 0;
        for extent in &self.extents {
            let len = u64::from(extent.count) * self.memory.frame;
            if offset < skipped + len {
                let inside = offset - skipped;
                return self.memory.alias_of(extent.first).map(|base| (base + inside, len - inside));
            }
            skipped += len;
        }
        None
    }
}

impl Drop for Physical {
    fn drop(&mut self) {
        if !self.memory.is_member() {
            return;
        }
        if self.shared.load(Ordering::Acquire) {
            if let Ok(mut guard) = self.memory.ledger.lock() {
                guard.let_go(self.serial, &self.extents, |extent| self.memory.punch(extent));
            }
            return;
        }
        self.extents.iter().for_each(|extent| self.memory.punch(*extent));
        if let Ok(mut guard) = self.memory.ledger.lock() {
            guard.give(&self.extents);
        }
    }
}
