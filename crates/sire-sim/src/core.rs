//! What machine and workers share: memory, addresses, host ranges, sticky errors; and the carrying out
//! of work on them. Nothing here knows streams or handles.
//!
//! Work touches bytes in pieces. Each piece is looked up under the read lock of the address table, and its mapping held
//! while its bytes are touched; unmapping takes the write lock and waits for whoever holds the mapping: an operation that
//! races with an unmap finds the range gone and reports an illegal address, instead of crashing the process.

use crate::clock::Clock;
use crate::error::{Code, Result};
use crate::host::HostTable;
use crate::in_use::Held;
use crate::memory::DeviceMemory;
use crate::options::Options;
use crate::space::{Maker, Mapping, Space};
use crate::sys;
use crate::types::{Copy2d, Pattern, Prot};
use sire_core::digest::Digest;
use std::collections::HashSet;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

const PIECE: u64 = 4 << 20;

/// Outcome of device work: the error becomes the device's sticky error.
pub type Done = std::result::Result<(), Code>;

/// Device work given as a closure. It runs on a stream's worker, perhaps many times (graphs); an error
/// that it returns becomes the device's sticky error.
pub type Kernel = Arc<dyn Fn(&OpContext<'_>) -> Done + Send + Sync>;

/// A host function in a stream.
pub type HostFn = Arc<dyn Fn() + Send + Sync>;

/// One operation of a stream or graph.
#[derive(Clone)]
pub enum Work {
    /// Rows of bytes from one address to another. The rights of the stream's device, or of the memory's own, will do.
    Copy(Copy2d),
    /// Bytes that were staged at submission.
    Staged { copy: Copy2d, bytes: Arc<[u8]> },
    /// Rows of a pattern; `width` in elements.
    Fill { dst: u64, pitch: u64, pattern: Pattern, width: u64, height: u64 },
    /// Digests of `len` bytes at `src`, one per `page` bytes, to `out` (host or device memory).
    Hash { src: u64, len: u64, page: u64, out: u64 },
    /// A host function.
    Host(HostFn),
    /// A closure.
    Kernel(Kernel),
    /// The nodes of a graph, in an order that respects their edges.
    Graph(Arc<Vec<Work>>),
    /// Nothing.
    Empty,
}

impl fmt::Debug for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Work::Copy(copy) | Work::Staged { copy, .. } => f.debug_tuple("Copy").field(copy).finish(),
            Work::Fill { dst, width, .. } => write!(f, "Fill({dst:#x}, {width})"),
            Work::Hash { src, len, .. } => write!(f, "Hash({src:#x}, {len})"),
            Work::Host(_) => f.write_str("Host"),
            Work::Kernel(_) => f.write_str("Kernel"),
            Work::Graph(nodes) => write!(f, "Graph({})", nodes.len()),
            Work::Empty => f.write_str("Empty"),
        }
    }
}

/// What device work sees while it runs.
#[derive(Debug)]
pub struct OpContext<'a> {
    core: &'a Core,
    device: u32,
}

impl OpContext<'_> {
    /// The device that runs the work.
    #[must_use]
    pub fn device(&self) -> u32 {
        self.device
    }

    /// Fills `count` elements.
    ///
    /// # Errors
    /// `ILLEGAL_ADDRESS` if the device may not write there.
    pub fn fill(&self, ptr: u64, pattern: Pattern, count: u64) -> Done {
        self.core.fill(self.device, ptr, pattern, count)
    }

    /// Copies `len` bytes of device-visible memory.
    ///
    /// # Errors
    /// `ILLEGAL_ADDRESS` if the device may not read or write there.
    pub fn copy(&self, dst: u64, src: u64, len: u64) -> Done {
        if !self.core.visible(dst, len) || !self.core.visible(src, len) {
            return Err(Code::ILLEGAL_ADDRESS);
        }
        self.core.copy(self.device, dst, src, len, false)
    }

    /// Whether the device may touch the range.
    ///
    /// # Errors
    /// `ILLEGAL_ADDRESS` if not.
    pub fn check(&self, ptr: u64, len: u64, write: bool) -> Done {
        if self.core.accessible(ptr, len, self.device, write) { Ok(()) } else { Err(Code::ILLEGAL_ADDRESS) }
    }
}

/// Bytes that the processor may touch while this lives.
struct View {
    at: u64,
    len: u64,
    /// Their mapping, if they have one.
    _held: Option<Held>,
}

/// See the module's documentation.
pub struct Core {
    /// The settings.
    pub options: Options,
    /// The devices' memory.
    pub devices: Vec<Arc<DeviceMemory>>,
    /// Host ranges that the devices know.
    pub host: Mutex<HostTable>,
    /// Virtual time, if there is a profile.
    pub clock: Option<Clock>,
    space: RwLock<Space>,
    lost: Vec<AtomicI32>,
    peers: Mutex<HashSet<(u32, u32)>>,
    closed: AtomicBool,
    generation: u64,
}

impl fmt::Debug for Core {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Core").field("devices", &self.devices.len()).finish_non_exhaustive()
    }
}

/// Locks, whether or not another thread panicked while it held the lock.
pub fn locked<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Core {
    /// The devices that `options` describe.
    pub fn new(options: Options) -> std::io::Result<Core> {
        let granularity = options.granularity;
        if !granularity.is_power_of_two() || !(sys::PAGE..=2 << 20).contains(&granularity) {
            return Err(std::io::Error::other(format!("granularity {granularity}: a power of two from 4096 to 2 MiB")));
        }
        let devices = (0..options.devices)
            .map(|device| DeviceMemory::open(device, &options).map(Arc::new))
            .collect::<std::io::Result<Vec<_>>>()?;
        let sizes: Vec<u64> = devices.iter().map(|memory| memory.size).collect();
        Ok(Core {
            clock: options.profile.clone().map(|profile| Clock::new(profile, &sizes, options.paced)),
            lost: devices.iter().map(|_| AtomicI32::new(0)).collect(),
            devices,
            host: Mutex::new(HostTable::default()),
            space: RwLock::new(Space::new(granularity)),
            peers: Mutex::new(HashSet::new()),
            closed: AtomicBool::new(false),
            generation: sys::generation(),
            options,
        })
    }

    /// Reads the address table.
    pub fn space(&self) -> RwLockReadGuard<'_, Space> {
        self.space.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the address table.
    pub fn space_mut(&self) -> RwLockWriteGuard<'_, Space> {
        self.space.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// After this every verb fails.
    pub fn close(&self) -> bool {
        !self.closed.swap(true, Ordering::AcqRel)
    }

    /// Whether this is the process that made the machine.
    pub fn is_own_process(&self) -> bool {
        self.generation == sys::generation()
    }

    /// Whether verbs may be used at all.
    pub fn check_open(&self) -> Result<()> {
        if !self.is_own_process() {
            return Err(Code::NOT_INITIALIZED
                .because("the device cannot be used in a forked child; start the process afresh (spawn)"));
        }
        if self.closed.load(Ordering::Acquire) {
            return Err(Code::DEINITIALIZED.because("the device is shut down"));
        }
        Ok(())
    }

    /// Whether verbs on `device` may be used.
    pub fn check_alive(&self, device: u32) -> Result<()> {
        self.check_open()?;
        self.memory(device)?;
        match self.lost(device) {
            Code::SUCCESS => Ok(()),
            code => Err(code.because(format!("device {device} is lost since an earlier operation failed"))),
        }
    }

    /// The memory of a device.
    pub fn memory(&self, device: u32) -> Result<&Arc<DeviceMemory>> {
        self.devices.get(device as usize).ok_or_else(|| {
            Code::INVALID_DEVICE.because(format!("there is no device {device}, only {}", self.devices.len()))
        })
    }

    /// The device's sticky error.
    pub fn lost(&self, device: u32) -> Code {
        Code(self.lost.get(device as usize).map_or(0, |lost| lost.load(Ordering::Acquire)))
    }

    /// Sets the device's sticky error; the first one stays.
    pub fn lose(&self, device: u32, code: Code) {
        if let Some(lost) = self.lost.get(device as usize)
            && lost.compare_exchange(0, code.0, Ordering::AcqRel, Ordering::Acquire).is_ok()
            && self.options.log
        {
            eprintln!("sire-sim: device {device} is lost: {} ({})", code.name(), code.0);
        }
    }

    /// Forgets the device's sticky error.
    pub fn revive(&self, device: u32) {
        if let Some(lost) = self.lost.get(device as usize) {
            lost.store(0, Ordering::Release);
        }
    }

    /// The pairs (device, peer) where device may touch peer's heap.
    pub fn peers(&self) -> MutexGuard<'_, HashSet<(u32, u32)>> {
        locked(&self.peers)
    }

    fn allows(&self, mapping: &Mapping, device: u32, write: bool) -> bool {
        let needed = if write { Prot::ReadWrite } else { Prot::Read };
        if mapping.prot(device) >= needed {
            return true;
        }
        let home = mapping.physical.memory.device;
        mapping.maker != Maker::Vmm && home != device && self.peers().contains(&(device, home))
    }

    /// Whether `device` may touch the whole range.
    pub fn accessible(&self, ptr: u64, len: u64, device: u32, write: bool) -> bool {
        let Some(end) = ptr.checked_add(len).filter(|_| self.is_own_process()) else { return false };
        let space = self.space();
        if !space.contains(ptr) {
            drop(space);
            return len == 0 || locked(&self.host).covers(ptr, len);
        }
        let mut at = ptr;
        while at < end {
            match space.mapping(at) {
                Some((base, mapping)) if self.allows(mapping, device, write) => at = base + mapping.size,
                _ => return false,
            }
        }
        true
    }

    /// Whether the range is memory that devices know at all (device, pinned, registered, managed).
    pub fn visible(&self, ptr: u64, len: u64) -> bool {
        self.space().contains(ptr) || locked(&self.host).covers(ptr, len)
    }

    /// Where the processor finds the bytes at `addr`, for how many bytes on (at most `len`), and their mapping, held.
    fn view(
        &self,
        space: &Space,
        addr: u64,
        len: u64,
        device: u32,
        write: bool,
        peer: bool,
    ) -> std::result::Result<View, Code> {
        if !space.contains(addr) {
            return Ok(View { at: addr, len, _held: None });
        }
        let (base, mapping) = space.mapping(addr).ok_or(Code::ILLEGAL_ADDRESS)?;
        let home = mapping.physical.memory.device;
        let allowed = self.allows(mapping, device, write) || (peer && self.allows(mapping, home, write));
        if !allowed {
            return Err(Code::ILLEGAL_ADDRESS);
        }
        let rest = len.min(base + mapping.size - addr);
        let (at, len) = match mapping.physical.alias(addr - base) {
            Some((alias, run)) => (alias, rest.min(run)),
            None => (addr, rest),
        };
        Ok(View { at, len, _held: Some(mapping.in_use.hold()) })
    }

    /// Copies; host ranges are taken on trust (the unsafe callers vouch for them). `peer`: the rights of the memory's own device will do.
    pub fn copy(&self, device: u32, dst: u64, src: u64, len: u64, peer: bool) -> Done {
        let mut done = 0;
        while done < len {
            let space = self.space();
            let want = (len - done).min(PIECE);
            let to = self.view(&space, dst + done, want, device, true, peer)?;
            let from = self.view(&space, src + done, want, device, false, peer)?;
            drop(space);
            let n = to.len.min(from.len);
            // SAFETY: device ranges are mapped with sufficient rights for n bytes, and stay so while `to` and `from` hold them;
            // host ranges are valid by the contract of the unsafe functions that submit copies. memmove allows overlap.
            unsafe { std::ptr::copy(from.at as *const u8, to.at as *mut u8, n as usize) };
            done += n;
        }
        Ok(())
    }

    /// Fills `count` elements from `dst` on.
    pub fn fill(&self, device: u32, dst: u64, pattern: Pattern, count: u64) -> Done {
        let len = count * pattern.width();
        if !self.visible(dst, len) {
            return Err(Code::ILLEGAL_ADDRESS);
        }
        let mut done = 0;
        while done < len {
            let space = self.space();
            let to = self.view(&space, dst + done, (len - done).min(PIECE), device, true, false)?;
            drop(space);
            // SAFETY: the range is device memory mapped writable, which stays so while `to` holds it, or host memory that the
            // host table covers; it is a multiple of the element long, because mappings and pieces are and `dst` is aligned to it.
            unsafe { fill_bytes(to.at, to.len, pattern) };
            done += to.len;
        }
        Ok(())
    }

    /// Writes the digest of each page of `(src, len)` to `out`; host ranges are taken on trust.
    fn hash(&self, device: u32, (src, len): (u64, u64), page: u64, out: u64) -> Done {
        let mut buffer = Vec::new();
        for (index, at) in (0..len).step_by(page as usize).enumerate() {
            let digest = self.digest(device, src + at, page.min(len - at), &mut buffer)?;
            self.put_digest(device, out + (index * size_of::<Digest>()) as u64, &digest)?;
        }
        Ok(())
    }

    fn put_digest(&self, device: u32, out: u64, digest: &Digest) -> Done {
        self.copy(device, out, std::ptr::from_ref(digest) as u64, size_of::<Digest>() as u64, false)
    }

    /// The digest of one page; `buffer` is for pages that lie in several mappings.
    fn digest(&self, device: u32, src: u64, len: u64, buffer: &mut Vec<u8>) -> std::result::Result<Digest, Code> {
        if !self.visible(src, len) {
            return Err(Code::ILLEGAL_ADDRESS);
        }
        let from = self.view(&self.space(), src, len, device, false, false)?;
        if from.len == len {
            // SAFETY: `len` bytes are mapped readable there, and stay so while `from` holds them. A program that writes to what it lets be
            // hashed gets an undefined digest, as on a device.
            let page = unsafe { std::slice::from_raw_parts(from.at as *const u8, len as usize) };
            return Ok(Digest::of(page));
        }
        drop(from);
        buffer.resize(len as usize, 0);
        self.copy(device, buffer.as_mut_ptr() as u64, src, len, false)?;
        Ok(Digest::of(buffer))
    }

    /// Carries out one operation; says what went wrong.
    pub fn run(&self, device: u32, work: &Work) -> Done {
        match work {
            Work::Empty => return Ok(()),
            Work::Graph(nodes) => return nodes.iter().try_for_each(|node| self.run(device, node)),
            _ => self.take_time(),
        }
        if self.options.hollow && !matches!(work, Work::Host(_) | Work::Kernel(_)) {
            return self.run_hollow(device, work);
        }
        match work {
            Work::Copy(copy) => rows(copy, |dst, src, len| self.copy(device, dst, src, len, true)),
            Work::Staged { copy, bytes } => {
                let staged = Copy2d { src: bytes.as_ptr() as u64, src_pitch: copy.width, ..*copy };
                rows(&staged, |dst, src, len| self.copy(device, dst, src, len, true))
            }
            Work::Fill { dst, pitch, pattern, width, height } => {
                (0..*height).try_for_each(|row| self.fill(device, dst + row * pitch, *pattern, *width))
            }
            Work::Hash { src, len, page, out } => self.hash(device, (*src, *len), *page, *out),
            Work::Host(function) => {
                function();
                Ok(())
            }
            Work::Kernel(kernel) => kernel(&OpContext { core: self, device }),
            Work::Graph(_) | Work::Empty => Ok(()),
        }
    }

    /// Checks what a copy or fill touches, and moves nothing.
    fn run_hollow(&self, device: u32, work: &Work) -> Done {
        match work {
            Work::Copy(copy) => rows(copy, |dst, src, len| {
                self.check_hollow(device, src, len, false)?;
                self.check_hollow(device, dst, len, true)
            }),
            Work::Staged { copy, .. } => rows(copy, |dst, _, len| self.check_hollow(device, dst, len, true)),
            Work::Fill { dst, pitch, pattern, width, height } => {
                let len = width * pattern.width();
                (0..*height).try_for_each(|row| self.check_hollow(device, dst + row * pitch, len, true))
            }
            // Every page has a digest of its own, which never changes.
            Work::Hash { src, len, page, out } => {
                self.check_hollow(device, *src, *len, false)?;
                (0..len.div_ceil(*page)).try_for_each(|index| {
                    let digest = Digest { low: src + index * page, high: *len, word: 0, varies: 1 };
                    self.put_digest(device, out + index * size_of::<Digest>() as u64, &digest)
                })
            }
            _ => Ok(()),
        }
    }

    fn check_hollow(&self, device: u32, addr: u64, len: u64, write: bool) -> Done {
        let space = self.space();
        if !space.contains(addr) {
            drop(space);
            if write {
                sys::discard(addr, len);
            }
            return Ok(());
        }
        let mut done = 0;
        while done < len {
            done += self.view(&space, addr + done, len - done, device, write, true)?.len;
        }
        Ok(())
    }

    fn take_time(&self) {
        if !self.options.delay.is_zero() {
            std::thread::sleep(self.options.delay);
        }
    }
}

fn rows(copy: &Copy2d, mut row: impl FnMut(u64, u64, u64) -> Done) -> Done {
    if copy.height == 1 || (copy.width == copy.dst_pitch && copy.width == copy.src_pitch) {
        return row(copy.dst, copy.src, copy.width * copy.height);
    }
    (0..copy.height).try_for_each(|n| row(copy.dst + n * copy.dst_pitch, copy.src + n * copy.src_pitch, copy.width))
}

/// # Safety
/// `len` bytes at `addr` are writable, aligned to the element, and a whole number of elements.
unsafe fn fill_bytes(addr: u64, len: u64, pattern: Pattern) {
    let bytes = len as usize;
    match pattern {
        // SAFETY: the caller's guarantee.
        Pattern::U8(byte) => unsafe { std::ptr::write_bytes(addr as *mut u8, byte, bytes) },
        Pattern::U16(value) => {
            // SAFETY: the caller's guarantee.
            let elements = unsafe { std::slice::from_raw_parts_mut(addr as *mut u16, bytes / 2) };
            elements.fill(value);
        }
        Pattern::U32(value) => {
            // SAFETY: the caller's guarantee.
            let elements = unsafe { std::slice::from_raw_parts_mut(addr as *mut u32, bytes / 4) };
            elements.fill(value);
        }
    }
}
