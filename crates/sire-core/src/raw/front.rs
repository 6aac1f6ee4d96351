//! Drivers in front of the driver: every verb is passed on, but those that the one in front sees to itself. Here because passing an unsafe verb
//! on is itself unsafe; what [`Stock`] does otherwise is safe, and in its own file.

use crate::digest::Digest;
use crate::driver::{
    Access, Addr, Device, Driver, DriverResult, Event, MemoryInfo, Physical, ProgramStream, Properties, Stream,
};
use crate::stock::Stock;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

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

    fn next(&self) -> &dyn Driver {
        self.calls.fetch_add(1, Ordering::Relaxed);
        &*self.inner
    }

    fn nearest_host_node(&self, device: Device) -> Option<u32> {
        self.inner.host_node(device)
    }
}

macro_rules! passed_on {
    ($($verb:ident($($name:ident: $kind:ty),*) -> $out:ty;)*) => {
        $(fn $verb(&self, $($name: $kind),*) -> DriverResult<$out> { self.next().$verb($($name),*) })*
    };
}

/// The verbs of a driver in front of another (`self.next()`), but for those that make memory and count it, which are given.
macro_rules! in_front {
    ($front:ty { $($own:tt)* }) => {
        impl Driver for $front {
            $($own)*

            passed_on! {
                device_count() -> u32;
                granularity(device: Device) -> u64;
                can_access_peer(device: Device, peer: Device) -> bool;
                reserve(size: u64, align: u64) -> Addr;
                unreserve(addr: Addr, size: u64) -> ();
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
                record_on(event: Event, stream: ProgramStream) -> ();
                wait_on(event: Event, device: Device, stream: ProgramStream) -> ();
                wait(event: Event) -> ();
                query(event: Event) -> bool;
                fill(stream: Stream, dst: Addr, len: u64, byte: u8) -> ();
                unregister_host(ptr: *mut u8) -> ();
            }

            fn host_node(&self, device: Device) -> Option<u32> {
                self.nearest_host_node(device)
            }

            unsafe fn copy_to_host(&self, stream: Stream, dst: *mut u8, src: Addr, len: u64) -> DriverResult<()> {
                // SAFETY: the caller's promise is passed on unchanged.
                unsafe { self.next().copy_to_host(stream, dst, src, len) }
            }

            unsafe fn copy_to_device(&self, stream: Stream, dst: Addr, src: *const u8, len: u64) -> DriverResult<()> {
                // SAFETY: the caller's promise is passed on unchanged.
                unsafe { self.next().copy_to_device(stream, dst, src, len) }
            }

            unsafe fn hash(&self, stream: Stream, src: Addr, len: u64, page: u64, out: *mut Digest) -> DriverResult<()> {
                // SAFETY: the caller's promise is passed on unchanged.
                unsafe { self.next().hash(stream, src, len, page, out) }
            }

            unsafe fn register_host(&self, ptr: *mut u8, len: u64) -> DriverResult<()> {
                // SAFETY: the caller's promise is passed on unchanged.
                unsafe { self.next().register_host(ptr, len) }
            }
        }
    };
}

in_front! { Counted {
    passed_on! {
        memory_info(device: Device) -> MemoryInfo;
        create(device: Device, size: u64) -> Physical;
        create_with(device: Device, size: u64, properties: Properties) -> Physical;
    }
} }

in_front! { Stock {
    fn memory_info(&self, device: Device) -> DriverResult<MemoryInfo> {
        self.count_free(device)
    }

    fn create(&self, device: Device, size: u64) -> DriverResult<Physical> {
        self.make(device, size)
    }

    fn create_with(&self, device: Device, size: u64, properties: Properties) -> DriverResult<Physical> {
        self.make_with(device, size, properties)
    }
} }
