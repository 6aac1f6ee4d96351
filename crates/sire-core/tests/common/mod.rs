//! The engine's test kit: a driver in plain memory that is as unkind as a GPU may be, and an oracle.
//!
//! The driver executes queued work as late as it is allowed to, only when somebody waits for it. So a page that is
//! unmapped before its copy was waited for, or a byte that is read too early, always shows, without
//! any thread or sleep. Work that meets unmapped memory loses the device for good.
//! Every verb is numbered; a plan says which numbers fail. `device.rs` is what it drives.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use device::{Mapping, Memory, Op, State, error};
use sire_core::digest::Digest;
use sire_core::driver::*;
use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard};

mod device;
pub mod player;
pub mod world;

pub const GRANULARITY: u64 = 4096;

/// What is to happen when a verb is called.
type Surprise = Box<dyn FnOnce() + Send>;

/// One call: who made it, and what it was about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    pub verb: &'static str,
    pub thread: std::thread::ThreadId,
    /// An address, an event, a device or host memory, as fits the verb.
    pub of: u64,
    /// Bytes.
    pub size: u64,
}

/// Whether a call may pass now, after the calls that have passed.
type Order = Box<dyn Fn(&Call, &[Call]) -> bool + Send>;

/// How long an order is obeyed.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(20);

/// A driver in plain memory.
pub struct MemDriver(Mutex<State>, Mutex<Option<(&'static str, u64, Surprise)>>, Mutex<Option<Order>>);

impl std::fmt::Debug for MemDriver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

fn aligned(verb: &'static str, values: &[u64]) -> DriverResult<()> {
    let bad = values.iter().any(|v| v % GRANULARITY != 0);
    if bad { Err(error(DriverErrorKind::Invalid, verb, "not a multiple of the granularity")) } else { Ok(()) }
}

fn invalid<T>(verb: &'static str, message: impl Into<String>) -> DriverResult<T> {
    Err(error(DriverErrorKind::Invalid, verb, message))
}

impl MemDriver {
    pub fn new(capacity: u64) -> MemDriver {
        let state = State {
            capacity,
            registration: true,
            hashing: true,
            next: 16,
            lowest: 0x7000_0000_0000,
            ..State::default()
        };
        MemDriver(Mutex::new(state), Mutex::new(None), Mutex::new(None))
    }

    fn peek_state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Begins a verb: a chance for other threads, a number, perhaps a fault.
    fn begin(&self, verb: &'static str) -> DriverResult<MutexGuard<'_, State>> {
        self.begin_on(verb, 0, 0)
    }

    /// The same, for a verb that says what it is about.
    fn begin_on(&self, verb: &'static str, of: u64, size: u64) -> DriverResult<MutexGuard<'_, State>> {
        #[cfg(feature = "shuttle")]
        shuttle::thread::yield_now();
        let is_due = |(awaited, before, _): &mut (&'static str, u64, Surprise)| {
            let due = *awaited == verb && *before == 0;
            *before -= u64::from(*awaited == verb && !due);
            due
        };
        let surprise = self.1.lock().unwrap().take_if(is_due);
        if let Some((.., surprise)) = surprise {
            surprise();
        }
        while !self.may_pass(verb) {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        let mut state = self.in_order(Call { verb, thread: std::thread::current().id(), of, size });
        state.calls += 1;
        let number = state.calls;
        if let Some(kind) = state.faults.remove(&number) {
            return Err(error(kind, verb, format!("planned fault at call {number}")));
        }
        if let Some((failing, kind)) = state.fail_verb
            && failing == verb
        {
            return Err(error(kind, verb, "this verb fails always"));
        }
        state.check_lost(verb)?;
        Ok(state)
    }

    fn may_pass(&self, verb: &'static str) -> bool {
        let mut state = self.peek_state();
        let fails = state.fail_verb.is_some_and(|(failing, _)| failing == verb);
        match &mut state.gate {
            Some((closed, 0)) if *closed == verb => fails,
            Some((closed, left)) if *closed == verb => {
                *left -= 1;
                true
            }
            _ => true,
        }
    }

    /// Notes the call, once the order lets it pass.
    fn in_order(&self, call: Call) -> MutexGuard<'_, State> {
        let begun = std::time::Instant::now();
        loop {
            let order = self.2.lock().unwrap();
            let mut state = self.peek_state();
            let may = order.as_ref().is_none_or(|order| order(&call, &state.log));
            // One call that waits in vain is enough to know.
            if may || !state.overdue.is_empty() || begun.elapsed() > PATIENCE {
                state.log.push(call);
                state.overdue.extend((!may).then_some(call));
                return state;
            }
            drop((state, order));
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }

    fn make(&self, device: Device, size: u64, properties: Option<Properties>) -> DriverResult<Physical> {
        let mut state = self.begin_on("create", device.0.into(), size)?;
        aligned("create", &[size])?;
        if state.used(device) + size > state.capacity {
            state.refused += 1;
            return Err(error(DriverErrorKind::OutOfMemory, "create", "the device is full"));
        }
        let id = state.id();
        let memory = Memory { device, bytes: vec![0xCD; size as usize], held: true, mappings: 0, properties };
        state.memories.insert(id, memory);
        Ok(Physical(id))
    }

    // What tests ask and do.

    /// At the next call of `verb`, before it does anything.
    pub fn at_next(&self, verb: &'static str, surprise: impl FnOnce() + Send + 'static) {
        self.at_later(verb, 0, surprise);
    }

    /// The same, once `before` calls of it have passed.
    pub fn at_later(&self, verb: &'static str, before: u64, surprise: impl FnOnce() + Send + 'static) {
        *self.1.lock().unwrap() = Some((verb, before, Box::new(surprise)));
    }

    /// What the program has given to `stream` is done.
    pub fn pass_stream(&self, stream: ProgramStream) {
        self.peek_state().pass_marks(|at| at == stream.0);
    }

    /// Reservations begin there from now on.
    pub fn reserve_from(&self, lowest: u64) {
        self.peek_state().lowest = lowest;
    }

    pub fn set_capturing(&self, capturing: bool) {
        self.peek_state().capturing = capturing;
    }

    /// What the program's reset of a device does to what was made in its context. Host memory counts as registered there.
    pub fn reset(&self, device: Device) {
        let mut state = self.peek_state();
        state.streams.retain(|_, (on, _)| *on != device);
        state.events.retain(|_, (on, ..)| *on != device);
        state.registered.clear();
        state.lost = None;
    }

    /// `calls` more calls of the verb pass; then they wait, until it is `None`, or fail if the verb fails always.
    pub fn set_gate(&self, gate: Option<(&'static str, u64)>) {
        self.peek_state().gate = gate;
    }

    pub fn calls(&self) -> u64 {
        self.peek_state().calls
    }

    pub fn refused(&self) -> u64 {
        self.peek_state().refused
    }

    pub fn log(&self) -> Vec<&'static str> {
        self.peek_state().log.iter().map(|call| call.verb).collect()
    }

    /// The calls since so many had been made.
    pub fn trail(&self, since: usize) -> Vec<Call> {
        self.peek_state().log[since..].to_vec()
    }

    /// Every later call waits until `order` lets it pass. It is asked with the driver locked: it may look at what it is told, and call nobody.
    pub fn set_order(&self, order: impl Fn(&Call, &[Call]) -> bool + Send + 'static) {
        *self.2.lock().unwrap() = Some(Box::new(order));
    }

    /// Ends the order. Nothing may have waited in vain.
    pub fn end_order(&self) {
        *self.2.lock().unwrap() = None;
        let overdue = std::mem::take(&mut self.peek_state().overdue);
        assert!(overdue.is_empty(), "waited in vain for what was to come first: {overdue:?}");
    }

    pub fn fail_at(&self, number: u64, kind: DriverErrorKind) {
        self.peek_state().faults.insert(number, kind);
    }

    /// Every later call of `verb` fails, until `None`.
    pub fn fail_always(&self, verb: Option<(&'static str, DriverErrorKind)>) {
        self.peek_state().fail_verb = verb;
    }

    /// Access cannot be given to more than `bytes` in one call.
    pub fn set_widest_access(&self, bytes: Option<u64>) {
        self.peek_state().widest_access = bytes;
    }

    /// Whether the driver can hash.
    pub fn set_hashing(&self, hashing: bool) {
        self.peek_state().hashing = hashing;
    }

    pub fn pending_faults(&self) -> usize {
        self.peek_state().faults.len()
    }

    pub fn clear_faults(&self) {
        self.peek_state().faults.clear();
    }

    pub fn set_capacity(&self, bytes: u64) {
        self.peek_state().capacity = bytes;
    }

    pub fn used_bytes(&self) -> u64 {
        self.peek_state().memories.values().map(|m| m.bytes.len() as u64).sum()
    }

    /// (physicals, mappings, reservations) that exist.
    pub fn counts(&self) -> (usize, usize, usize) {
        let state = self.peek_state();
        (state.memories.len(), state.mappings.len(), state.reservations.len())
    }

    /// What was asked of the memory that exists.
    pub fn properties(&self) -> Vec<Option<Properties>> {
        self.peek_state().memories.values().map(|memory| memory.properties).collect()
    }

    pub fn registered(&self) -> usize {
        self.peek_state().registered.len()
    }

    pub fn registered_bytes(&self) -> u64 {
        self.peek_state().registered.values().map(|len| *len as u64).sum()
    }

    pub fn lost(&self) -> Option<String> {
        self.peek_state().lost.clone()
    }

    /// The program writes: a kernel that has run to its end.
    pub fn poke(&self, device: Device, addr: Addr, bytes: &[u8]) -> Result<(), String> {
        self.peek_state().touch(device, addr.0, bytes.len() as u64, |part, at| {
            part.copy_from_slice(&bytes[at as usize..at as usize + part.len()]);
        })
    }

    /// The program reads on one of its streams, behind what that was made to wait for.
    pub fn peek_on(&self, (device, stream): (Device, ProgramStream), addr: Addr, len: u64) -> Result<Vec<u8>, String> {
        let mut state = self.peek_state();
        let waits: Vec<_> = state.waits.extract_if(.., |wait| (wait.0, wait.1) == (device, stream.0)).collect();
        waits.into_iter().for_each(|(_, _, event, ticket)| state.reach(event, ticket));
        drop(state);
        self.peek(device, addr, len)
    }

    /// The program reads.
    pub fn peek(&self, device: Device, addr: Addr, len: u64) -> Result<Vec<u8>, String> {
        let mut bytes = vec![0; len as usize];
        self.peek_state().touch(device, addr.0, len, |part, at| {
            bytes[at as usize..at as usize + part.len()].copy_from_slice(part);
        })?;
        Ok(bytes)
    }
}

impl Driver for MemDriver {
    fn device_count(&self) -> DriverResult<u32> {
        self.begin("device_count").map(|_| 2)
    }

    fn granularity(&self, device: Device) -> DriverResult<u64> {
        let _state = self.begin("granularity")?;
        if device.0 < 2 { Ok(GRANULARITY) } else { invalid("granularity", "no such device") }
    }

    fn host_node(&self, device: Device) -> Option<u32> {
        Some(device.0)
    }

    fn memory_info(&self, device: Device) -> DriverResult<MemoryInfo> {
        let state = self.begin("memory_info")?;
        Ok(MemoryInfo { free: state.capacity.saturating_sub(state.used(device)), total: state.capacity })
    }

    fn can_access_peer(&self, _: Device, _: Device) -> DriverResult<bool> {
        self.begin("can_access_peer").map(|_| true)
    }

    fn reserve(&self, size: u64, align: u64) -> DriverResult<Addr> {
        let mut state = self.begin("reserve")?;
        aligned("reserve", &[size])?;
        let align = align.max(GRANULARITY);
        // First fit, so that addresses are reused as soon as they can be.
        let mut at = state.lowest.next_multiple_of(align);
        for (&start, &len) in state.reservations.range(at..) {
            if at + size <= start {
                break;
            }
            at = at.max((start + len).next_multiple_of(align));
        }
        state.reservations.insert(at, size);
        Ok(Addr(at))
    }

    fn unreserve(&self, addr: Addr, size: u64) -> DriverResult<()> {
        let mut state = self.begin("unreserve")?;
        if state.reservations.get(&addr.0) != Some(&size) {
            return invalid("unreserve", "not a reservation");
        }
        if state.mappings.range(addr.0..addr.0 + size).next().is_some() {
            return invalid("unreserve", "something is mapped there");
        }
        state.reservations.remove(&addr.0);
        Ok(())
    }

    fn create(&self, device: Device, size: u64) -> DriverResult<Physical> {
        self.make(device, size, None)
    }

    fn create_with(&self, device: Device, size: u64, properties: Properties) -> DriverResult<Physical> {
        self.make(device, size, Some(properties))
    }

    fn release(&self, physical: Physical) -> DriverResult<()> {
        let mut state = self.begin("release")?;
        let Some(memory) = state.memories.get_mut(&physical.0).filter(|m| m.held) else {
            return invalid("release", "not a live physical");
        };
        memory.held = false;
        if memory.mappings == 0 {
            state.memories.remove(&physical.0);
        }
        Ok(())
    }

    fn map(&self, addr: Addr, size: u64, physical: Physical) -> DriverResult<()> {
        let mut state = self.begin_on("map", addr.0, size)?;
        aligned("map", &[addr.0, size])?;
        let inside = state.reservations.range(..=addr.0).next_back().is_some_and(|(s, l)| addr.0 + size <= s + l);
        let before = state.mappings.range(..addr.0 + size).next_back();
        let overlaps = before.is_some_and(|(start, m)| start + m.size > addr.0);
        let whole = state.memories.get(&physical.0).is_some_and(|m| m.held && m.bytes.len() as u64 == size);
        if !inside || overlaps || !whole {
            return invalid("map", format!("inside {inside}, overlaps {overlaps}, whole {whole}"));
        }
        state.memories.get_mut(&physical.0).expect("checked").mappings += 1;
        state.mappings.insert(addr.0, Mapping { size, physical: physical.0, access: Vec::new() });
        Ok(())
    }

    fn unmap(&self, addr: Addr, size: u64) -> DriverResult<()> {
        let mut state = self.begin_on("unmap", addr.0, size)?;
        if state.mappings.get(&addr.0).is_none_or(|m| m.size != size) {
            return invalid("unmap", "not exactly one mapping");
        }
        let mapping = state.mappings.remove(&addr.0).expect("checked");
        let memory = state.memories.get_mut(&mapping.physical).expect("mapped memory exists");
        memory.mappings -= 1;
        if memory.mappings == 0 && !memory.held {
            state.memories.remove(&mapping.physical);
        }
        Ok(())
    }

    fn set_access(&self, addr: Addr, size: u64, access: &[Access]) -> DriverResult<()> {
        let mut state = self.begin_on("set_access", addr.0, size)?;
        if state.widest_access.is_some_and(|widest| size > widest) {
            return invalid("set_access", "spans too much for one call");
        }
        let mut at = addr.0;
        while at < addr.0 + size {
            let Some(mapping) = state.mappings.get(&at) else { return invalid("set_access", "not mapped throughout") };
            at += mapping.size;
        }
        if at != addr.0 + size {
            return invalid("set_access", "ends inside a mapping");
        }
        for (_, mapping) in state.mappings.range_mut(addr.0..at) {
            mapping.access.retain(|old| access.iter().all(|new| new.device != old.device));
            mapping.access.extend(access);
        }
        Ok(())
    }

    fn synchronize(&self, device: Device) -> DriverResult<()> {
        let mut state = self.begin_on("synchronize", device.0.into(), 0)?;
        assert!(!state.capturing, "synchronize during a capture");
        let streams: Vec<u64> = state.streams.iter().filter(|(_, s)| s.0 == device).map(|(id, _)| *id).collect();
        streams.into_iter().for_each(|stream| state.run(stream, None));
        state.pass_marks(|_| true);
        state.check_lost("synchronize")
    }

    fn is_capturing(&self, _: Device, _: ProgramStream) -> DriverResult<bool> {
        self.begin("is_capturing").map(|state| state.capturing)
    }

    fn open_stream(&self, device: Device) -> DriverResult<Stream> {
        let mut state = self.begin("open_stream")?;
        let id = state.id();
        state.streams.insert(id, (device, VecDeque::new()));
        Ok(Stream(id))
    }

    fn close_stream(&self, stream: Stream) -> DriverResult<()> {
        let mut state = self.begin("close_stream")?;
        state.run(stream.0, None);
        state.streams.remove(&stream.0).map_or_else(|| invalid("close_stream", "not open"), |_| Ok(()))
    }

    fn open_event(&self, device: Device) -> DriverResult<Event> {
        let mut state = self.begin("open_event")?;
        let id = state.id();
        state.events.insert(id, (device, 0, 0));
        Ok(Event(id))
    }

    fn close_event(&self, event: Event) -> DriverResult<()> {
        let mut state = self.begin("close_event")?;
        state.events.remove(&event.0).map_or_else(|| invalid("close_event", "not open"), |_| Ok(()))
    }

    fn record(&self, event: Event, stream: Stream) -> DriverResult<()> {
        let mut state = self.begin_on("record", event.0, 0)?;
        let ticket = state.id();
        let Some(known) = state.events.get_mut(&event.0) else { return invalid("record", "event not open") };
        known.1 = ticket;
        let Some(queue) = state.streams.get_mut(&stream.0) else { return invalid("record", "stream not open") };
        queue.1.push_back(Op::Mark { event: event.0, ticket });
        Ok(())
    }

    fn record_on(&self, event: Event, stream: ProgramStream) -> DriverResult<()> {
        let mut state = self.begin("record_on")?;
        assert!(!state.capturing, "a point in a stream that may be captured");
        let ticket = state.id();
        let Some(known) = state.events.get_mut(&event.0) else { return invalid("record_on", "event not open") };
        known.1 = ticket;
        state.marks.push((stream.0, event.0, ticket));
        Ok(())
    }

    fn wait_on(&self, event: Event, device: Device, stream: ProgramStream) -> DriverResult<()> {
        let mut state = self.begin("wait_on")?;
        assert!(!state.capturing, "a stream that is captured would wait for what is outside");
        let Some(&(_, recorded, _)) = state.events.get(&event.0) else { return invalid("wait_on", "not open") };
        state.waits.push((device, stream.0, event.0, recorded));
        Ok(())
    }

    fn wait(&self, event: Event) -> DriverResult<()> {
        let mut state = self.begin_on("wait", event.0, 0)?;
        let Some(&(_, recorded, passed)) = state.events.get(&event.0) else { return invalid("wait", "not open") };
        if recorded != passed {
            state.reach(event.0, recorded);
        }
        state.check_lost("wait")
    }

    fn query(&self, event: Event) -> DriverResult<bool> {
        let state = self.begin("query")?;
        state.events.get(&event.0).map_or_else(|| invalid("query", "not open"), |e| Ok(e.1 == e.2))
    }

    unsafe fn copy_to_host(&self, stream: Stream, dst: *mut u8, src: Addr, len: u64) -> DriverResult<()> {
        let mut state = self.begin_on("copy_to_host", src.0, len)?;
        state.check_host_range("copy_to_host", dst as usize, len as usize)?;
        let Some(queue) = state.streams.get_mut(&stream.0) else { return invalid("copy_to_host", "not open") };
        queue.1.push_back(Op::Out { dst: dst as usize, src: src.0, len });
        Ok(())
    }

    unsafe fn copy_to_device(&self, stream: Stream, dst: Addr, src: *const u8, len: u64) -> DriverResult<()> {
        let mut state = self.begin_on("copy_to_device", dst.0, len)?;
        state.check_host_range("copy_to_device", src as usize, len as usize)?;
        let Some(queue) = state.streams.get_mut(&stream.0) else { return invalid("copy_to_device", "not open") };
        queue.1.push_back(Op::In { dst: dst.0, src: src as usize, len });
        Ok(())
    }

    fn fill(&self, stream: Stream, dst: Addr, len: u64, byte: u8) -> DriverResult<()> {
        let mut state = self.begin("fill")?;
        let Some(queue) = state.streams.get_mut(&stream.0) else { return invalid("fill", "not open") };
        queue.1.push_back(Op::Fill { dst: dst.0, len, byte });
        Ok(())
    }

    unsafe fn hash(&self, stream: Stream, src: Addr, len: u64, page: u64, out: *mut Digest) -> DriverResult<()> {
        let mut state = self.begin("hash")?;
        if !state.hashing {
            return Err(error(DriverErrorKind::Unsupported, "hash", "this driver does not hash"));
        }
        if !src.0.is_multiple_of(16) || !page.is_multiple_of(16) || page == 0 {
            return invalid("hash", "not a multiple of 16");
        }
        let Some(queue) = state.streams.get_mut(&stream.0) else { return invalid("hash", "not open") };
        queue.1.push_back(Op::Hash { src: src.0, len, page, out: out as usize });
        Ok(())
    }

    unsafe fn register_host(&self, ptr: *mut u8, len: u64) -> DriverResult<()> {
        let mut state = self.begin_on("register_host", ptr as u64, len)?;
        if !state.registration {
            return Err(error(DriverErrorKind::Unsupported, "register_host", "not allowed"));
        }
        if state.meets_registered(ptr as usize, len as usize).next().is_some() {
            return Err(error(DriverErrorKind::Other, "register_host", "registered already"));
        }
        state.registered.insert(ptr as usize, len as usize);
        Ok(())
    }

    fn unregister_host(&self, ptr: *mut u8) -> DriverResult<()> {
        let mut state = self.begin("unregister_host")?;
        if state.registered.remove(&(ptr as usize)).is_some() {
            Ok(())
        } else {
            invalid("unregister_host", "not registered")
        }
    }
}
