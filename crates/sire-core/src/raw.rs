//! The fence: the only file of the engine with unsafe code. Here are host pages that may be registered with the
//! driver, copies between them and the device, and the system calls that the standard library lacks.
//!
//! What makes copies sound: a [`Span`] keeps its pages mapped; a [`Flight`] holds the span of a copy that is
//! under way, and *leaks* it unless it is told that the copy has landed. So pages can be unmapped only
//! after every copy that touches them is known to be done. Bytes are only ever reached through raw
//! pointers or for the length of one call, and a range belongs to one segment of one claimed
//! extent (or to one staging buffer of one lane), so two copies never meet in it.
#![allow(unsafe_code)]

use crate::driver::{Access, Addr, Device, Driver, DriverResult, Event, MemoryInfo, Physical, ProgramStream, Stream};
use memmap2::{Advice, MmapMut, MmapRaw};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Huge pages are this large; pages start at a multiple of it.
const HUGE: usize = 2 << 20;

/// Anonymous host memory, given back when dropped.
#[derive(Debug)]
pub(crate) struct Pages {
    /// `None` once the mapping has been leaked on purpose.
    map: Option<MmapRaw>,
    /// Where the aligned part starts in the mapping.
    skip: usize,
    len: usize,
    registered: Option<Arc<dyn Driver>>,
}

impl Pages {
    /// Maps `len` bytes, aligned to huge pages, and brings every page in (so that later writes cannot fail).
    pub(crate) fn new(len: u64) -> io::Result<Pages> {
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let whole = len.checked_add(HUGE).ok_or(io::ErrorKind::OutOfMemory)?;
        let map = MmapRaw::from(MmapMut::map_anon(whole)?);
        let skip = map.as_mut_ptr().align_offset(HUGE).min(HUGE);
        let pages = Pages { map: Some(map), skip, len, registered: None };
        pages.populate()?;
        Ok(pages)
    }

    fn populate(&self) -> io::Result<()> {
        let Some(map) = &self.map else { return Ok(()) };
        let _ = map.advise_range(Advice::HugePage, self.skip, self.len);
        match map.advise_range(Advice::PopulateWrite, self.skip, self.len) {
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => self.touch(),
            other => return other,
        }
        Ok(())
    }

    /// Brings pages in on kernels before 5.14.
    fn touch(&self) {
        for offset in (0..self.len).step_by(4096) {
            // SAFETY: `offset < len`, and `[ptr, ptr + len)` is a private writable mapping nobody else knows yet.
            unsafe { self.ptr().add(offset).write_volatile(0) };
        }
    }

    /// Registers the pages with `driver`; they stay usable if that fails.
    pub(crate) fn register(&mut self, driver: &Arc<dyn Driver>) -> DriverResult<()> {
        // SAFETY: the range stays mapped until `Drop`, which unregisters it first (or leaks the mapping).
        unsafe { driver.register_host(self.ptr(), self.len as u64)? };
        self.registered = Some(Arc::clone(driver));
        Ok(())
    }

    /// Whether the driver knows these pages.
    pub(crate) fn is_registered(&self) -> bool {
        self.registered.is_some()
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
        let Some(driver) = self.registered.take() else { return };
        // A range that the driver still holds must not be unmapped: after two refusals it is leaked.
        if driver.unregister_host(self.ptr()).or_else(|_| driver.unregister_host(self.ptr())).is_err() {
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
    /// Whether that was noted.
    fn is_lent(&self) -> bool;
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

    /// Bytes.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Whoever keeps it mapped.
    pub(crate) fn keeper(&self) -> &Arc<dyn Keeper> {
        &self.keeper
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

/// Queues a copy of the whole span from the device.
pub(crate) fn copy_to_host(driver: &dyn Driver, stream: Stream, span: Span, src: Addr) -> DriverResult<Flight> {
    // SAFETY: the span keeps the range mapped, and the `Flight` keeps the span until the copy has landed; the
    // range belongs to one segment or staging buffer, so nobody else touches it (see the module's text).
    unsafe { driver.copy_to_host(stream, span.ptr(), src, span.len)? };
    Ok(Flight(Some(span)))
}

/// Queues a copy of the whole span to the device.
pub(crate) fn copy_to_device(driver: &dyn Driver, stream: Stream, dst: Addr, span: Span) -> DriverResult<Flight> {
    // SAFETY: as in `copy_to_host`; a backup is not written to while it is being restored.
    unsafe { driver.copy_to_device(stream, dst, span.ptr(), span.len)? };
    Ok(Flight(Some(span)))
}

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

/// A driver that counts its calls.
#[derive(Debug)]
pub(crate) struct Counted {
    inner: Arc<dyn Driver>,
    calls: Arc<AtomicU64>,
}

impl Counted {
    /// Wraps `inner`; every call adds one to `calls`.
    pub(crate) fn new(inner: Arc<dyn Driver>, calls: Arc<AtomicU64>) -> Counted {
        Counted { inner, calls }
    }

    fn count(&self) -> &dyn Driver {
        self.calls.fetch_add(1, Ordering::Relaxed);
        &*self.inner
    }
}

macro_rules! counted {
    ($($verb:ident($($name:ident: $kind:ty),*) -> $out:ty;)*) => {
        $(fn $verb(&self, $($name: $kind),*) -> DriverResult<$out> { self.count().$verb($($name),*) })*
    };
}

impl Driver for Counted {
    counted! {
        device_count() -> u32;
        granularity(device: Device) -> u64;
        memory_info(device: Device) -> MemoryInfo;
        can_access_peer(device: Device, peer: Device) -> bool;
        reserve(size: u64, align: u64) -> Addr;
        unreserve(addr: Addr, size: u64) -> ();
        create(device: Device, size: u64) -> Physical;
        release(physical: Physical) -> ();
        map(addr: Addr, size: u64, physical: Physical) -> ();
        unmap(addr: Addr, size: u64) -> ();
        set_access(addr: Addr, size: u64, access: &[Access]) -> ();
        synchronize(device: Device) -> ();
        is_capturing(device: Device, stream: ProgramStream) -> bool;
        open_stream(device: Device) -> Stream;
        close_stream(stream: Stream) -> ();
        open_event(device: Device) -> Event;
        close_event(event: Event) -> ();
        record(event: Event, stream: Stream) -> ();
        wait(event: Event) -> ();
        query(event: Event) -> bool;
        fill(stream: Stream, dst: Addr, len: u64, byte: u8) -> ();
        unregister_host(ptr: *mut u8) -> ();
    }

    unsafe fn copy_to_host(&self, stream: Stream, dst: *mut u8, src: Addr, len: u64) -> DriverResult<()> {
        // SAFETY: the caller's promise is passed on unchanged.
        unsafe { self.count().copy_to_host(stream, dst, src, len) }
    }

    unsafe fn copy_to_device(&self, stream: Stream, dst: Addr, src: *const u8, len: u64) -> DriverResult<()> {
        // SAFETY: the caller's promise is passed on unchanged.
        unsafe { self.count().copy_to_device(stream, dst, src, len) }
    }

    unsafe fn register_host(&self, ptr: *mut u8, len: u64) -> DriverResult<()> {
        // SAFETY: the caller's promise is passed on unchanged.
        unsafe { self.count().register_host(ptr, len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_aligned_and_zero() {
        let pages = Pages::new(3 << 20).unwrap_or_else(|e| unreachable!("{e}"));
        assert_eq!(pages.ptr() as usize % HUGE, 0);
        assert_eq!(pages.len(), 3 << 20);
        assert!(!pages.is_registered());
    }
}
