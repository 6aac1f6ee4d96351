//! The smallest complete driver, to start a new one from (docs/add-a-driver.md): its device memory is a heap of byte vectors,
//! its addresses are just numbers, and all work is done at once, in the calling thread, under one lock.
//! The last function asks it the whole conformance suite.

use sire_core::driver::{
    Access, Addr, Device, Driver, DriverError, DriverErrorKind, DriverResult, Event, MemoryInfo, Physical,
    ProgramStream, Rights, Stream,
};
use sire_sim::conformance;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

const GRANULARITY: u64 = 4096;
const MEMORY: u64 = 1 << 20;

/// Physical memory. It goes back to the device when the last handle or mapping drops it: that is the whole reference count.
#[derive(Debug)]
struct Bytes {
    content: Mutex<Vec<u8>>,
    size: u64,
    used: Arc<AtomicU64>,
}

impl Drop for Bytes {
    fn drop(&mut self) {
        self.used.fetch_sub(self.size, Ordering::SeqCst);
    }
}

#[derive(Debug)]
struct Mapping {
    size: u64,
    physical: Arc<Bytes>,
    accessible: bool,
}

#[derive(Debug, Default)]
struct State {
    reservations: BTreeMap<u64, u64>,
    physicals: HashMap<u64, Arc<Bytes>>,
    mappings: BTreeMap<u64, Mapping>,
    streams: HashSet<u64>,
    events: HashSet<u64>,
    registered: HashSet<usize>,
    last: u64,
}

/// The driver.
#[derive(Debug, Default)]
struct SmallestDriver {
    state: Mutex<State>,
    used: Arc<AtomicU64>,
}

fn error<T>(kind: DriverErrorKind, verb: &'static str, message: String) -> DriverResult<T> {
    Err(DriverError { kind, verb, code: 0, message })
}

/// `Invalid`, unless what the bargain demands is so.
fn demand(so: bool, verb: &'static str, otherwise: &str) -> DriverResult<()> {
    if so { Ok(()) } else { error(DriverErrorKind::Invalid, verb, otherwise.to_owned()) }
}

fn whole(verb: &'static str, addr: Addr, size: u64) -> DriverResult<()> {
    demand(
        size > 0 && size.is_multiple_of(GRANULARITY) && addr.0.is_multiple_of(GRANULARITY),
        verb,
        "not a whole number of granules",
    )
}

fn here(verb: &'static str, device: Device) -> DriverResult<()> {
    demand(device == Device(0), verb, "there is one device, number 0")
}

impl State {
    fn id(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    /// Starts of the mappings that touch `[addr, addr + size)`, if together they cover it.
    fn covering(&self, addr: Addr, size: u64) -> Option<Vec<u64>> {
        let (mut at, end, mut found) = (addr.0, addr.0 + size, Vec::new());
        while at < end {
            let (start, mapping) = self.mappings.range(..=at).next_back()?;
            at = Some(start + mapping.size).filter(|next| *next > at)?;
            found.push(*start);
        }
        Some(found)
    }

    /// Hands `work` each piece of device memory behind `[addr, addr + len)`, with its offset from `addr`.
    fn touch(
        &self,
        verb: &'static str,
        addr: Addr,
        len: u64,
        mut work: impl FnMut(&mut [u8], usize),
    ) -> DriverResult<()> {
        let starts = self.covering(addr, len).unwrap_or_default();
        let ready = len == 0 || (!starts.is_empty() && starts.iter().all(|start| self.mappings[start].accessible));
        demand(ready, verb, "the range is not mapped with access")?;
        for start in starts {
            let mapping = &self.mappings[&start];
            let (from, to) = (addr.0.max(start), (addr.0 + len).min(start + mapping.size));
            let mut content = mapping.physical.content.lock().unwrap_or_else(PoisonError::into_inner);
            work(&mut content[(from - start) as usize..(to - start) as usize], (from - addr.0) as usize);
        }
        Ok(())
    }
}

impl SmallestDriver {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn on_stream(&self, verb: &'static str, stream: Stream) -> DriverResult<MutexGuard<'_, State>> {
        let state = self.state();
        demand(state.streams.contains(&stream.0), verb, "the stream is not open")?;
        Ok(state)
    }

    fn at_event(&self, verb: &'static str, event: Event) -> DriverResult<()> {
        demand(self.state().events.contains(&event.0), verb, "the event is not open")
    }
}

impl Driver for SmallestDriver {
    fn device_count(&self) -> DriverResult<u32> {
        Ok(1)
    }

    fn granularity(&self, device: Device) -> DriverResult<u64> {
        here("granularity", device).map(|()| GRANULARITY)
    }

    fn memory_info(&self, device: Device) -> DriverResult<MemoryInfo> {
        here("memory_info", device)?;
        Ok(MemoryInfo { free: MEMORY - self.used.load(Ordering::SeqCst), total: MEMORY })
    }

    fn can_access_peer(&self, device: Device, peer: Device) -> DriverResult<bool> {
        here("can_access_peer", device)?;
        here("can_access_peer", peer).map(|()| false)
    }

    fn reserve(&self, size: u64, align: u64) -> DriverResult<Addr> {
        whole("reserve", Addr(0), size)?;
        let mut state = self.state();
        let end = state.reservations.iter().next_back().map_or(1 << 40, |(start, size)| start + size);
        let addr = end.next_multiple_of(align.max(GRANULARITY));
        state.reservations.insert(addr, size);
        Ok(Addr(addr))
    }

    fn unreserve(&self, addr: Addr, size: u64) -> DriverResult<()> {
        let mut state = self.state();
        demand(state.reservations.get(&addr.0) == Some(&size), "unreserve", "not a reservation")?;
        let empty = state.mappings.range(addr.0..addr.0 + size).next().is_none();
        demand(empty, "unreserve", "something is mapped there")?;
        state.reservations.remove(&addr.0);
        Ok(())
    }

    fn create(&self, device: Device, size: u64) -> DriverResult<Physical> {
        here("create", device)?;
        whole("create", Addr(0), size)?;
        let mut state = self.state();
        let free = MEMORY - self.used.load(Ordering::SeqCst);
        if size > free {
            return error(DriverErrorKind::OutOfMemory, "create", format!("{size} bytes asked for, {free} free"));
        }
        self.used.fetch_add(size, Ordering::SeqCst);
        let content = Mutex::new(vec![0xEF; size as usize]);
        let id = state.id();
        state.physicals.insert(id, Arc::new(Bytes { content, size, used: Arc::clone(&self.used) }));
        Ok(Physical(id))
    }

    fn release(&self, physical: Physical) -> DriverResult<()> {
        let gone = self.state().physicals.remove(&physical.0);
        demand(gone.is_some(), "release", "not a live physical")
    }

    fn map(&self, addr: Addr, size: u64, physical: Physical) -> DriverResult<()> {
        whole("map", addr, size)?;
        let mut state = self.state();
        let reserved = state.reservations.range(..=addr.0).next_back();
        demand(reserved.is_some_and(|(start, len)| addr.0 + size <= start + len), "map", "outside a reservation")?;
        let before = state.mappings.range(..addr.0 + size).next_back();
        demand(before.is_none_or(|(start, other)| start + other.size <= addr.0), "map", "something is mapped there")?;
        let bytes = state.physicals.get(&physical.0).filter(|bytes| bytes.size == size).cloned();
        let Some(physical) = bytes else {
            return error(DriverErrorKind::Invalid, "map", "not a live physical of this size".to_owned());
        };
        state.mappings.insert(addr.0, Mapping { size, physical, accessible: false });
        Ok(())
    }

    fn unmap(&self, addr: Addr, size: u64) -> DriverResult<()> {
        let mut state = self.state();
        let exact = state.mappings.get(&addr.0).is_some_and(|mapping| mapping.size == size);
        demand(exact, "unmap", "not exactly one mapping")?;
        state.mappings.remove(&addr.0);
        Ok(())
    }

    fn set_access(&self, addr: Addr, size: u64, access: &[Access]) -> DriverResult<()> {
        whole("set_access", addr, size)?;
        let mut state = self.state();
        let starts = state.covering(addr, size).unwrap_or_default();
        demand(!starts.is_empty(), "set_access", "not mapped throughout")?;
        for start in starts {
            let said = access.iter().rev().find(|one| one.device == Device(0));
            if let (Some(mapping), Some(said)) = (state.mappings.get_mut(&start), said) {
                mapping.accessible = said.rights != Rights::None;
            }
        }
        Ok(())
    }

    fn synchronize(&self, device: Device) -> DriverResult<()> {
        here("synchronize", device)
    }

    fn is_capturing(&self, device: Device, _: ProgramStream) -> DriverResult<bool> {
        here("is_capturing", device).map(|()| false)
    }

    fn open_stream(&self, device: Device) -> DriverResult<Stream> {
        here("open_stream", device)?;
        let mut state = self.state();
        let id = state.id();
        state.streams.insert(id);
        Ok(Stream(id))
    }

    fn close_stream(&self, stream: Stream) -> DriverResult<()> {
        demand(self.state().streams.remove(&stream.0), "close_stream", "the stream is not open")
    }

    fn open_event(&self, device: Device) -> DriverResult<Event> {
        here("open_event", device)?;
        let mut state = self.state();
        let id = state.id();
        state.events.insert(id);
        Ok(Event(id))
    }

    fn close_event(&self, event: Event) -> DriverResult<()> {
        demand(self.state().events.remove(&event.0), "close_event", "the event is not open")
    }

    fn record(&self, event: Event, stream: Stream) -> DriverResult<()> {
        drop(self.on_stream("record", stream)?);
        self.at_event("record", event)
    }

    fn wait(&self, event: Event) -> DriverResult<()> {
        self.at_event("wait", event)
    }

    fn query(&self, event: Event) -> DriverResult<bool> {
        self.at_event("query", event).map(|()| true)
    }

    unsafe fn copy_to_host(&self, stream: Stream, dst: *mut u8, src: Addr, len: u64) -> DriverResult<()> {
        self.on_stream("copy_to_host", stream)?.touch("copy_to_host", src, len, |piece, offset| {
            // SAFETY: the caller guarantees `[dst, dst + len)` for writes, and `offset + piece.len()` is at most `len`.
            unsafe { std::ptr::copy_nonoverlapping(piece.as_ptr(), dst.add(offset), piece.len()) }
        })
    }

    unsafe fn copy_to_device(&self, stream: Stream, dst: Addr, src: *const u8, len: u64) -> DriverResult<()> {
        self.on_stream("copy_to_device", stream)?.touch("copy_to_device", dst, len, |piece, offset| {
            // SAFETY: the caller guarantees `[src, src + len)` for reads, and `offset + piece.len()` is at most `len`.
            unsafe { std::ptr::copy_nonoverlapping(src.add(offset), piece.as_mut_ptr(), piece.len()) }
        })
    }

    fn fill(&self, stream: Stream, dst: Addr, len: u64, byte: u8) -> DriverResult<()> {
        self.on_stream("fill", stream)?.touch("fill", dst, len, |piece, _| piece.fill(byte))
    }

    unsafe fn register_host(&self, ptr: *mut u8, _: u64) -> DriverResult<()> {
        demand(self.state().registered.insert(ptr as usize), "register_host", "registered already")
    }

    fn unregister_host(&self, ptr: *mut u8) -> DriverResult<()> {
        demand(self.state().registered.remove(&(ptr as usize)), "unregister_host", "not registered")
    }
}

#[test]
fn the_smallest_driver_keeps_the_bargain() {
    conformance::suite(SmallestDriver::default);
    conformance::losing_suite(SmallestDriver::default);
}
