//! The fence: the only files of the engine with unsafe code are this one, [`ring`] and [`front`]. Here are host pages that may be registered with the
//! driver, copies between them and the device, and the system calls that the standard library lacks.
//!
//! What makes copies sound: a [`Span`] keeps its pages mapped; a [`Flight`] holds the span of a copy that is
//! under way, and *leaks* it unless it is told that the copy has landed. So pages can be unmapped only
//! after every copy that touches them is known to be done. Bytes are only ever reached through raw
//! pointers or for the length of one call, and a range belongs to one segment of one claimed
//! extent (or to one staging buffer of one lane), so two copies never meet in it. A range that several segments share
//! ([`pages`](crate::pages)) is lent, and what is lent is only read.
#![allow(unsafe_code)]

pub(crate) mod front;
pub(crate) mod ring;

use crate::digest::Digest;
use crate::driver::{Addr, Driver, DriverError, DriverErrorKind, DriverResult, Stream};
use crate::error::Result;
use crate::sync::{Mutex, lock};
use memmap2::{Advice, MmapMut, MmapRaw};
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Weak};

/// Huge pages are this large; pages start at a multiple of it.
const HUGE: usize = 2 << 20;
/// Brought in by one system call: other threads that map memory wait for it.
const BROUGHT_IN_AT_ONCE: usize = 4 << 20;

/// Anonymous host memory, given back when dropped. It is brought in and registered part by part, and no part that is
/// registered by itself crosses a *seam*: a copy must not either, because drivers refuse a range of which only some is registered.
#[derive(Debug)]
pub(crate) struct Pages {
    /// `None` once the mapping has been leaked on purpose.
    map: Option<MmapRaw>,
    /// Where the aligned part starts in the mapping.
    skip: usize,
    len: usize,
    seam: usize,
    registered: Mutex<Vec<Registered>>,
}

/// A part that a driver knows.
#[derive(Debug)]
struct Registered {
    driver: Arc<dyn Driver>,
    at: usize,
    len: usize,
}

impl Pages {
    /// Maps `len` bytes, aligned to huge pages, with seams at the multiples of `seam` (a multiple of the page size). Nothing is brought in yet.
    pub(crate) fn new(len: u64, seam: u64) -> io::Result<Pages> {
        let size = |bytes: u64| usize::try_from(bytes).map_err(|_| io::ErrorKind::OutOfMemory);
        let (len, seam) = (size(len)?, size(seam)?.max(1));
        let whole = len.checked_add(HUGE).ok_or(io::ErrorKind::OutOfMemory)?;
        let map = MmapRaw::from(MmapMut::map_anon(whole)?);
        let skip = map.as_mut_ptr().align_offset(HUGE).min(HUGE);
        // A wish: small pages do as well, more slowly.
        let _ = map.advise_range(Advice::HugePage, skip, len);
        // A child of fork(2) has no use for backups. With them, the system would copy every page that is pinned for a device at the fork itself
        // (Linux since 5.9), or, before that, might leave the device with pages that are no longer this process's.
        let _ = map.advise_range(Advice::DontFork, 0, whole);
        Ok(Pages { map: Some(map), skip, len, seam, registered: Mutex::default() })
    }

    /// Children of fork(2) get a copy of `part` from now on, as they do of any other memory.
    pub(crate) fn share_with_children(&self, part: Range<u64>) {
        let (Some(map), part) = (&self.map, self.clip(part)) else { return };
        // Huge pages consist of whole pages, whatever their size here.
        let (start, end) = (part.start / HUGE * HUGE, part.end.next_multiple_of(HUGE).min(self.len));
        let _ = map.advise_range(Advice::DoFork, self.skip + start, end - start);
    }

    /// Takes that back, as far as huge pages have nothing else in them.
    pub(crate) fn keep_from_children(&self, part: Range<u64>) {
        let (Some(map), part) = (&self.map, self.clip(part)) else { return };
        let (start, end) = (part.start.next_multiple_of(HUGE), part.end / HUGE * HUGE);
        if start < end {
            let _ = map.advise_range(Advice::DontFork, self.skip + start, end - start);
        }
    }

    /// Wishes that what is brought in from now on lies on the host's NUMA node `node`. Where that is full, or the system knows no such node, memory
    /// comes from elsewhere (mbind(2), MPOL_PREFERRED).
    pub(crate) fn prefer(&self, node: u32) {
        const BITS: u32 = libc::c_ulong::BITS;
        let mut mask = [0 as libc::c_ulong; 16];
        let Some(word) = mask.get_mut((node / BITS) as usize) else { return };
        *word = 1 << (node % BITS);
        let bits = (mask.len() as u32 * BITS) as libc::c_ulong;
        // SAFETY: the range is this mapping's own, and no content of it depends on its policy; `mask` is a live array of `bits` bits.
        unsafe { libc::syscall(libc::SYS_mbind, self.ptr(), self.len, libc::MPOL_PREFERRED, mask.as_ptr(), bits, 0) };
    }

    /// Brings every page of `part` in, so that later writes cannot fail. What is there already keeps its content.
    pub(crate) fn bring_in(&self, part: Range<u64>) -> io::Result<()> {
        let Some(map) = &self.map else { return Ok(()) };
        let part = self.clip(part);
        for at in part.clone().step_by(BROUGHT_IN_AT_ONCE) {
            let len = BROUGHT_IN_AT_ONCE.min(part.end - at);
            loop {
                match map.advise_range(Advice::PopulateWrite, self.skip + at, len) {
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(e) if e.raw_os_error() == Some(libc::EINVAL) => break self.touch(at..at + len),
                    other => break other?,
                }
            }
        }
        Ok(())
    }

    fn clip(&self, part: Range<u64>) -> Range<usize> {
        part.start.min(self.len as u64) as usize..part.end.min(self.len as u64) as usize
    }

    /// Brings pages in on kernels before 5.14.
    fn touch(&self, part: Range<usize>) {
        for offset in part.step_by(4096) {
            // SAFETY: `offset < len`, and `[ptr, ptr + len)` is mapped; adding nothing, atomically, changes no byte that somebody
            // else has there.
            unsafe { AtomicU8::from_ptr(self.ptr().add(offset)) }.fetch_or(0, Ordering::Relaxed);
        }
    }

    /// Registers `part`, which crosses no seam and is not registered yet, with `driver`; it stays usable if that fails.
    pub(crate) fn register(&self, driver: &Arc<dyn Driver>, part: Range<u64>) -> DriverResult<()> {
        let part = self.clip(part);
        let (at, len) = (part.start, part.end - part.start);
        // SAFETY: the range stays mapped until `Drop`, which unregisters it first (or leaks the mapping); `at < len`, so
        // the pointer is inside the mapping.
        unsafe { driver.register_host(self.ptr().add(at), len as u64)? };
        lock(&self.registered).push(Registered { driver: Arc::clone(driver), at, len });
        Ok(())
    }

    /// The driver is not to know any part of it any more. No copy is under way here.
    pub(crate) fn unregister(&self) {
        for part in std::mem::take(&mut *lock(&self.registered)) {
            // SAFETY: `register` made sure that `at` is inside the mapping, which is still there.
            let ptr = unsafe { self.ptr().add(part.at) };
            // What is refused goes with the context that it was registered in.
            let _ = part.driver.unregister_host(ptr);
        }
    }

    /// Bytes that the driver knows.
    pub(crate) fn registered(&self) -> u64 {
        lock(&self.registered).iter().map(|part| part.len as u64).sum()
    }

    /// Bytes.
    pub(crate) fn len(&self) -> u64 {
        self.len as u64
    }

    /// The first byte.
    pub(crate) fn ptr(&self) -> *mut u8 {
        match &self.map {
            // SAFETY: the mapping is `len + HUGE` bytes long and `skip <= HUGE`, so the result is inside it.
            Some(map) => unsafe { map.as_mut_ptr().add(self.skip) },
            None => std::ptr::null_mut(),
        }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        let mut known = std::mem::take(&mut *lock(&self.registered));
        let first = self.ptr();
        let is_known = |part: &mut Registered| {
            // SAFETY: `register` made sure that `at` is inside the mapping, which is still there.
            let ptr = unsafe { first.add(part.at) };
            part.driver.unregister_host(ptr).or_else(|_| part.driver.unregister_host(ptr)).is_err()
        };
        known.retain_mut(is_known);
        // A range that the driver still holds must not be unmapped: after two refusals it is leaked.
        if !known.is_empty() {
            std::mem::forget(self.map.take());
        }
    }
}

/// Whoever keeps pages mapped: a range of the host arena.
pub(crate) trait Keeper: Send + Sync + std::fmt::Debug + 'static {
    /// The pages it keeps.
    fn pages(&self) -> &Pages;
    /// Notes that somebody outside the engine may read the memory for as long as the keeper lives.
    fn lend(&self);
    /// Whether that was noted, or somebody is [reading](Span::reading).
    fn is_lent(&self) -> bool;
    /// Somebody in the engine begins to read the memory beside its owner, and will end.
    fn begin_reading(&self) {}
    /// Whoever began has ended.
    fn end_reading(&self) {}
    /// As [`Keeper::lend`], to the program: its children of fork(2) may read the memory, too.
    fn show(&self) {
        self.lend();
    }
    /// Makes sure that a part of the pages is there, so that no write to it can fail. Blocks.
    ///
    /// # Errors
    /// `OutOfBackupSpace` if the system has no memory for it.
    fn bring_in(&self, _part: Range<u64>) -> Result<()> {
        Ok(())
    }
    /// Whether it is there already.
    fn is_in(&self, _part: Range<u64>) -> bool {
        true
    }
}

/// A piece of host memory, kept mapped by this value.
#[derive(Clone, Debug)]
pub(crate) struct Span {
    keeper: Arc<dyn Keeper>,
    start: u64,
    len: u64,
}

impl Span {
    /// `[start, start + len)` of the keeper's pages; `None` if that is not inside them.
    pub(crate) fn new(keeper: Arc<dyn Keeper>, start: u64, len: u64) -> Option<Span> {
        let end = start.checked_add(len)?;
        (end <= keeper.pages().len()).then_some(Span { keeper, start, len })
    }

    /// `[at, at + len)` of this span; `None` if that is not inside it.
    pub(crate) fn part(&self, at: u64, len: u64) -> Option<Span> {
        let inside = at.checked_add(len).is_some_and(|end| end <= self.len);
        inside.then(|| Span { keeper: Arc::clone(&self.keeper), start: self.start + at, len })
    }

    /// This span and `next` as one, if they lie side by side in the same pages.
    pub(crate) fn joined(&self, next: &Span) -> Option<Span> {
        let same = Arc::ptr_eq(&self.keeper, &next.keeper) && self.start + self.len == next.start;
        same.then(|| Span { keeper: Arc::clone(&self.keeper), start: self.start, len: self.len + next.len })
    }

    /// A reference that keeps nothing alive.
    pub(crate) fn downgrade(&self) -> SpanRef {
        SpanRef { keeper: Arc::downgrade(&self.keeper), start: self.start, len: self.len }
    }

    /// Bytes.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Makes sure that its memory is there. Blocks while that is being done by others.
    ///
    /// # Errors
    /// `OutOfBackupSpace` if the system has no memory for it.
    pub(crate) fn bring_in(&self) -> Result<()> {
        self.keeper.bring_in(self.start..self.start + self.len)
    }

    /// Whether its memory is there, so that nothing can fail any more.
    pub(crate) fn is_in(&self) -> bool {
        self.keeper.is_in(self.start..self.start + self.len)
    }

    /// The parts between the seams of its pages: where each starts in the span, and its bytes.
    fn parts(&self) -> impl Iterator<Item = (u64, u64)> {
        let (first, end, seam) = (self.start, self.start + self.len, self.keeper.pages().seam as u64);
        std::iter::successors((first < end).then_some(first), move |at| {
            Some(at - at % seam + seam).filter(|&at| at < end)
        })
        .map(move |at| (at - first, (at - at % seam + seam).min(end) - at))
    }

    /// `len` bytes of it that cross no seam, if its halves are that long.
    pub(crate) fn between_seams(&self, len: u64) -> Option<Span> {
        let halves = [self.part(0, len), self.part(self.len - self.len / 2, len)];
        halves.into_iter().flatten().find(|half| half.parts().count() == 1)
    }

    /// Whoever keeps it mapped.
    pub(crate) fn keeper(&self) -> &Arc<dyn Keeper> {
        &self.keeper
    }

    /// While the result lives, all that the keeper has counts as lent.
    pub(crate) fn reading(&self) -> Reading {
        self.keeper.begin_reading();
        Reading(Arc::clone(&self.keeper))
    }

    /// The first byte.
    pub(crate) fn ptr(&self) -> *mut u8 {
        // SAFETY: `new` and `part` made sure that `start + len` is inside the pages.
        unsafe { self.keeper.pages().ptr().add(self.start as usize) }
    }

    /// The bytes, for the length of one call. No copy may be under way here.
    pub(crate) fn read<R>(&self, with: impl FnOnce(&[u8]) -> R) -> R {
        // SAFETY: the range is mapped (the keeper lives) and initialised (anonymous pages are zeroed);
        // it belongs to the caller's segment or staging buffer, whose copies have landed.
        with(unsafe { std::slice::from_raw_parts(self.ptr(), self.len as usize) })
    }

    /// As [`Span::read`], for writing.
    pub(crate) fn write<R>(&self, with: impl FnOnce(&mut [u8]) -> R) -> R {
        // SAFETY: as in `read`; nobody else reads or writes the range meanwhile.
        with(unsafe { std::slice::from_raw_parts_mut(self.ptr(), self.len as usize) })
    }
}

/// Somebody reads host memory; see [`Span::reading`].
#[derive(Debug)]
pub(crate) struct Reading(Arc<dyn Keeper>);

impl Drop for Reading {
    fn drop(&mut self) {
        self.0.end_reading();
    }
}

/// A piece of host memory that may be gone.
#[derive(Debug)]
pub(crate) struct SpanRef {
    keeper: Weak<dyn Keeper>,
    start: u64,
    len: u64,
}

impl SpanRef {
    /// The span, if it is still there.
    pub(crate) fn upgrade(&self) -> Option<Span> {
        Some(Span { keeper: self.keeper.upgrade()?, start: self.start, len: self.len })
    }

    /// Whether it is still there.
    pub(crate) fn is_alive(&self) -> bool {
        self.keeper.strong_count() > 0
    }

    /// Whether it is this very span.
    pub(crate) fn is(&self, span: &Span) -> bool {
        std::ptr::addr_eq(self.keeper.as_ptr(), Arc::as_ptr(&span.keeper))
            && self.start == span.start
            && self.len == span.len
    }
}

/// A copy that may still be under way. Dropped without [`Flight::land`], it leaks its span, so that
/// the device never writes into memory that has a new owner.
#[derive(Debug)]
#[must_use]
pub(crate) struct Flight(Option<Span>);

impl Flight {
    /// The copy is known to be done.
    pub(crate) fn land(mut self) -> Option<Span> {
        self.0.take()
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        std::mem::forget(self.0.take());
    }
}

/// A copy that could not be queued; some of it may be under way.
#[derive(Debug)]
pub(crate) struct Broken {
    pub(crate) error: DriverError,
    pub(crate) begun: Option<Flight>,
}

/// Queues the parts of a span between its seams, one by one.
fn queue(span: Span, mut one: impl FnMut(u64, u64) -> DriverResult<()>) -> std::result::Result<Flight, Broken> {
    let failed = span.parts().find_map(|(at, len)| one(at, len).err().map(|error| (at, error)));
    match failed {
        None => Ok(Flight(Some(span))),
        Some((0, error)) => Err(Broken { error, begun: None }),
        Some((_, error)) => Err(Broken { error, begun: Some(Flight(Some(span))) }),
    }
}

/// Queues a copy of the whole span from the device.
pub(crate) fn copy_to_host(
    driver: &dyn Driver,
    stream: Stream,
    span: Span,
    src: Addr,
) -> std::result::Result<Flight, Broken> {
    let ptr = span.ptr();
    // SAFETY: the span keeps the range mapped, and the `Flight` keeps the span until the copy has landed; the
    // range belongs to one segment or staging buffer, so nobody else touches it (see the module's text).
    // A stride lies inside the span.
    queue(span, |at, len| unsafe { driver.copy_to_host(stream, ptr.add(at as usize), src.offset(at), len) })
}

/// Queues a copy of the whole span to the device.
pub(crate) fn copy_to_device(
    driver: &dyn Driver,
    stream: Stream,
    dst: Addr,
    span: Span,
) -> std::result::Result<Flight, Broken> {
    let ptr = span.ptr();
    // SAFETY: as in `copy_to_host`; a backup is not written to while it is being restored.
    queue(span, |at, len| unsafe { driver.copy_to_device(stream, dst.offset(at), ptr.add(at as usize), len) })
}

/// Keeps signals of the program away from the calling thread, which is one of ours.
#[cfg(not(feature = "shuttle"))]
pub(crate) fn block_signals() {
    let mut all = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: `sigfillset` initialises the set that `pthread_sigmask` reads; the old mask is not asked for.
    unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), std::ptr::null_mut());
    }
}

/// Queues hashing of `len` bytes at `src`: the span gets a digest per `page`. Refused if it is too short for them.
pub(crate) fn hash(
    driver: &dyn Driver,
    stream: Stream,
    (src, len): (Addr, u64),
    page: u64,
    span: Span,
) -> DriverResult<Flight> {
    let fits = len.div_ceil(page) * size_of::<Digest>() as u64 <= span.len;
    let out = span.ptr().cast::<Digest>();
    if !fits || !out.is_aligned() {
        let message = format!("the digests of {len} bytes do not fit into {} bytes", span.len);
        return Err(DriverError { kind: DriverErrorKind::Invalid, verb: "hash", code: 0, message });
    }
    // SAFETY: the span has room for the digests (checked) and keeps it mapped; the `Flight` keeps the span until the work is
    // done; it is a staging buffer, so nobody else touches it.
    unsafe { driver.hash(stream, src, len, page, out)? };
    Ok(Flight(Some(span)))
}

/// Has the driver make ready what hashing on the stream's device needs.
pub(crate) fn prepare_hash(driver: &dyn Driver, stream: Stream) -> DriverResult<()> {
    // SAFETY: hashing of no bytes writes no digest.
    unsafe { driver.hash(stream, Addr(0), 0, 16, std::ptr::NonNull::dangling().as_ptr()) }
}

/// The digests that [`hash`] has left in a span.
pub(crate) fn digests(span: &Span) -> Vec<Digest> {
    let each = |bytes: &[u8]| {
        let word = |at: usize| bytes[8 * at..].iter().take(8).rev().fold(0, |word, &byte| word << 8 | u64::from(byte));
        Digest { low: word(0), high: word(1), word: word(2), varies: word(3) }
    };
    span.read(|bytes| bytes.chunks_exact(size_of::<Digest>()).map(each).collect())
}

/// What a file system has left for this user.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Left {
    pub(crate) bytes: u64,
    /// Its bytes are the machine's memory.
    pub(crate) in_memory: bool,
}

/// What the file's file system has left.
pub(crate) fn file_system(file: &std::fs::File) -> io::Result<Left> {
    // SAFETY: `statfs` is plain data for which all zeros is a value.
    let mut found: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open (`file` is borrowed), and `found` is a local of the right type.
    if unsafe { libc::fstatfs(file.as_raw_fd(), &raw mut found) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let bytes = (found.f_bavail as u64).saturating_mul(u64::try_from(found.f_bsize).unwrap_or(0));
    Ok(Left { bytes, in_memory: matches!(found.f_type as i64, libc::TMPFS_MAGIC | RAMFS_MAGIC) })
}

const RAMFS_MAGIC: i64 = 0x8584_58f6;

/// A signal makes tmpfs give the whole step up, so steps are small: a profiler's timer must not stop a large file for ever.
const ALLOCATED_AT_ONCE: libc::off_t = 32 << 20;

/// Makes the file `len` bytes long with every block present, so that writes inside it do not run out of space.
pub(crate) fn preallocate(file: &std::fs::File, len: u64) -> io::Result<()> {
    let len = libc::off_t::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut at = 0;
    while at < len {
        let part = ALLOCATED_AT_ONCE.min(len - at);
        // SAFETY: the descriptor is open (`file` is borrowed); the call touches no memory of ours.
        match unsafe { libc::posix_fallocate(file.as_raw_fd(), at, part) } {
            0 => at += part,
            libc::EINTR => {}
            code => return Err(io::Error::from_raw_os_error(code)),
        }
    }
    Ok(())
}

/// An anonymous file in memory. It is gone with the last descriptor, whoever holds that and however it dies.
pub(crate) fn memory_file() -> io::Result<std::fs::File> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: the name is a string constant with its NUL; the call touches no other memory of ours.
    let fd = unsafe { libc::memfd_create(c"sire-shared".as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call above has just made this descriptor, and nobody else knows it.
    Ok(unsafe { std::fs::File::from_raw_fd(fd) })
}

/// Fixes the length of a file that [`memory_file`] made, for everybody and for ever.
pub(crate) fn seal_length(file: &std::fs::File) -> io::Result<()> {
    let seals = libc::F_SEAL_GROW | libc::F_SEAL_SHRINK | libc::F_SEAL_SEAL;
    // SAFETY: the descriptor is open (`file` is borrowed); the call touches no memory of ours.
    let done = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Gives the blocks of `[at, at + len)` back to the file system; the bytes read as zero from now on.
pub(crate) fn punch(file: &std::fs::File, at: u64, len: u64) -> io::Result<()> {
    let whole = |n: u64| libc::off_t::try_from(n).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput));
    let (at, len) = (whole(at)?, whole(len)?);
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: the descriptor is open (`file` is borrowed); the call touches no memory of ours.
    let done = unsafe { libc::fallocate(file.as_raw_fd(), mode, at, len) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Pages that stay for as long as a span of them, for tests.
#[cfg(all(test, not(feature = "shuttle")))]
#[derive(Debug)]
pub(crate) struct Kept(pub(crate) Pages);

#[cfg(all(test, not(feature = "shuttle")))]
impl Keeper for Kept {
    fn pages(&self) -> &Pages {
        &self.0
    }
    fn lend(&self) {}
    fn is_lent(&self) -> bool {
        false
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;

    fn pages(len: u64, seam: u64) -> Pages {
        Pages::new(len, seam).unwrap_or_else(|e| unreachable!("{e}"))
    }

    #[test]
    fn pages_are_aligned_and_keep_what_is_there() {
        let pages = pages(3 << 20, 1 << 20);
        assert_eq!((pages.ptr() as usize % HUGE, pages.len(), pages.registered()), (0, 3 << 20, 0));
        assert!(pages.bring_in(0..3 << 20).is_ok());
        let span = Span::new(Arc::new(Kept(pages)), 0, 3 << 20).unwrap_or_else(|| unreachable!("it is inside"));
        assert!(span.read(|bytes| bytes.iter().all(|&byte| byte == 0)));
        span.write(|bytes| bytes.fill(7));
        assert!(span.keeper().pages().bring_in(0..3 << 20).is_ok());
        span.keeper().pages().touch(0..3 << 20);
        assert!(span.read(|bytes| bytes.iter().all(|&byte| byte == 7)));
    }

    /// Whether a child of fork(2) would not get the page at `ptr` ("dc" in its VmFlags).
    fn is_kept_from_children(ptr: *const u8) -> bool {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap_or_default();
        let mut inside = false;
        for line in maps.lines() {
            let bounds = line.split(' ').next().and_then(|range| range.split_once('-'));
            let bound = |hex| usize::from_str_radix(hex, 16).ok();
            if let Some((Some(start), Some(end))) = bounds.map(|(start, end)| (bound(start), bound(end))) {
                inside = (start..end).contains(&(ptr as usize));
            } else if inside && line.starts_with("VmFlags:") {
                return line.split_whitespace().any(|flag| flag == "dc");
            }
        }
        unreachable!("the system does not know the page")
    }

    #[test]
    fn a_fork_copies_only_what_the_program_was_lent() {
        let pages = pages(8 << 20, 1 << 20);
        assert!(pages.bring_in(0..8 << 20).is_ok());
        let at = |offset: usize| pages.ptr().wrapping_add(offset).cast_const();
        assert!(is_kept_from_children(at(0)) && is_kept_from_children(at(7 << 20)));
        pages.share_with_children((4 << 20) + 100..(4 << 20) + 200);
        assert!(!is_kept_from_children(at(4 << 20)) && !is_kept_from_children(at((6 << 20) - 1)));
        assert!(is_kept_from_children(at(0)) && is_kept_from_children(at(6 << 20)));
        pages.keep_from_children(4 << 20..6 << 20);
        assert!(is_kept_from_children(at(4 << 20)) && is_kept_from_children(at((6 << 20) - 1)));
    }

    #[test]
    fn parts_end_at_seams() {
        let keeper: Arc<dyn Keeper> = Arc::new(Kept(pages(4096 * 4, 4096)));
        let parts = |at, len| Span::new(Arc::clone(&keeper), at, len).map(|span| span.parts().collect::<Vec<_>>());
        assert_eq!(parts(4000, 4096 + 200), Some(vec![(0, 96), (96, 4096), (4192, 104)]));
        assert_eq!(parts(4096, 4096), Some(vec![(0, 4096)]));
        assert_eq!(parts(8192, 0), Some(vec![]));
    }
}
