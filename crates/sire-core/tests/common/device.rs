//! The device itself, without locks, faults or orders: what is reserved, made and mapped, what its streams still have to do, and what that does when
//! somebody waits for it.

use super::{Call, invalid};
use sire_core::digest::Digest;
use sire_core::driver::*;
use std::collections::{BTreeMap, HashMap, VecDeque};

#[derive(Debug)]
pub(super) struct Memory {
    pub(super) device: Device,
    pub(super) bytes: Vec<u8>,
    /// The handle is live.
    pub(super) held: bool,
    pub(super) mappings: u32,
    pub(super) properties: Option<Properties>,
}

#[derive(Clone, Debug)]
pub(super) struct Mapping {
    pub(super) size: u64,
    pub(super) physical: u64,
    pub(super) access: Vec<Access>,
}

#[derive(Debug)]
pub(super) enum Op {
    Out { dst: usize, src: u64, len: u64 },
    In { dst: u64, src: usize, len: u64 },
    Fill { dst: u64, len: u64, byte: u8 },
    Hash { src: u64, len: u64, page: u64, out: usize },
    Mark { event: u64, ticket: u64 },
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) capacity: u64,
    pub(super) next: u64,
    pub(super) reservations: BTreeMap<u64, u64>,
    pub(super) memories: HashMap<u64, Memory>,
    pub(super) mappings: BTreeMap<u64, Mapping>,
    pub(super) streams: HashMap<u64, (Device, VecDeque<Op>)>,
    /// Event -> (device, ticket last recorded, ticket last passed).
    pub(super) events: HashMap<u64, (Device, u64, u64)>,
    /// Points in the program's streams that nothing has passed yet: stream, event, ticket.
    pub(super) marks: Vec<(u64, u64, u64)>,
    /// What the program's streams wait for: device, stream, event, ticket.
    pub(super) waits: Vec<(Device, u64, u64, u64)>,
    /// Start -> bytes.
    pub(super) registered: BTreeMap<usize, usize>,
    pub(super) lost: Option<String>,
    /// How often memory was asked for that was not there.
    pub(super) refused: u64,
    pub(super) calls: u64,
    pub(super) log: Vec<Call>,
    /// Calls that an order let pass only because its time was over.
    pub(super) overdue: Vec<Call>,
    pub(super) faults: BTreeMap<u64, DriverErrorKind>,
    pub(super) fail_verb: Option<(&'static str, DriverErrorKind)>,
    pub(super) widest_access: Option<u64>,
    /// After so many calls of a verb, the next waits.
    pub(super) gate: Option<(&'static str, u64)>,
    pub(super) registration: bool,
    pub(super) hashing: bool,
    pub(super) capturing: bool,
    /// Where reservations begin.
    pub(super) lowest: u64,
}

pub(super) fn error(kind: DriverErrorKind, verb: &'static str, message: impl Into<String>) -> DriverError {
    DriverError { kind, verb, code: -1, message: message.into() }
}

impl State {
    pub(super) fn id(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    pub(super) fn used(&self, device: Device) -> u64 {
        self.memories.values().filter(|m| m.device == device).map(|m| m.bytes.len() as u64).sum()
    }

    /// Splits a device range at mappings, checking access; calls `with` for each part.
    pub(super) fn touch(
        &mut self,
        device: Device,
        addr: u64,
        len: u64,
        mut with: impl FnMut(&mut [u8], u64),
    ) -> Result<(), String> {
        let mut at = addr;
        while at < addr + len {
            let (start, mapping) =
                self.mappings.range(..=at).next_back().ok_or_else(|| format!("{at:#x} is not mapped"))?;
            if at >= start + mapping.size {
                return Err(format!("{at:#x} is not mapped"));
            }
            if !mapping.access.iter().any(|a| a.device == device && a.rights == Rights::ReadWrite) {
                return Err(format!("{at:#x} may not be accessed by {device}"));
            }
            let from = at - start;
            let part = (mapping.size - from).min(addr + len - at);
            let memory = self.memories.get_mut(&mapping.physical).ok_or("a mapping without memory")?;
            with(&mut memory.bytes[from as usize..(from + part) as usize], at - addr);
            at += part;
        }
        Ok(())
    }

    pub(super) fn pass_marks(&mut self, passes: impl Fn(u64) -> bool) {
        let (passed, left): (Vec<_>, Vec<_>) = self.marks.drain(..).partition(|(stream, ..)| passes(*stream));
        self.marks = left;
        for (_, event, ticket) in passed {
            if let Some(known) = self.events.get_mut(&event) {
                known.2 = known.2.max(ticket);
            }
        }
    }

    pub(super) fn execute(&mut self, device: Device, op: Op) {
        let done = match op {
            Op::Out { dst, src, len } => self.touch(device, src, len, |bytes, at| {
                // SAFETY: the caller of `copy_to_host` keeps the range valid until its stream has passed.
                unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), (dst as *mut u8).add(at as usize), bytes.len()) }
            }),
            Op::In { dst, src, len } => self.touch(device, dst, len, |bytes, at| {
                // SAFETY: the caller of `copy_to_device` keeps the range valid until its stream has passed.
                unsafe {
                    std::ptr::copy_nonoverlapping((src as *const u8).add(at as usize), bytes.as_mut_ptr(), bytes.len())
                }
            }),
            Op::Fill { dst, len, byte } => self.touch(device, dst, len, |bytes, _| bytes.fill(byte)),
            Op::Hash { src, len, page, out } => {
                let mut bytes = vec![0; len as usize];
                let read = self.touch(device, src, len, |part, at| {
                    bytes[at as usize..at as usize + part.len()].copy_from_slice(part);
                });
                for (index, page) in bytes.chunks(page as usize).enumerate().filter(|_| read.is_ok()) {
                    // SAFETY: the caller of `hash` keeps room for the digests valid until its stream has passed.
                    unsafe { (out as *mut Digest).add(index).write(Digest::of(page)) };
                }
                read
            }
            Op::Mark { event, ticket } => {
                if let Some(state) = self.events.get_mut(&event) {
                    state.2 = ticket;
                }
                Ok(())
            }
        };
        if let Err(why) = done {
            self.lost.get_or_insert(why);
        }
    }

    pub(super) fn run(&mut self, stream: u64, until: Option<(u64, u64)>) {
        loop {
            let Some((device, queue)) = self.streams.get_mut(&stream) else { return };
            let (device, Some(op)) = (*device, queue.pop_front()) else { return };
            let reached = matches!((&op, until), (Op::Mark { event, ticket }, Some(u)) if (*event, *ticket) == u);
            self.execute(device, op);
            if reached {
                return;
            }
        }
    }

    /// Runs the stream that has this point up to it.
    pub(super) fn reach(&mut self, event: u64, ticket: u64) {
        let holds = |queue: &VecDeque<Op>| {
            queue.iter().any(|op| matches!(op, Op::Mark { event: e, ticket: t } if (*e, *t) == (event, ticket)))
        };
        let found = self.streams.iter().find(|(_, (_, queue))| holds(queue)).map(|(id, _)| *id);
        if let Some(stream) = found {
            self.run(stream, Some((event, ticket)));
        }
    }

    /// Registered ranges that have bytes of `[at, at + len)`.
    pub(super) fn meets_registered(&self, at: usize, len: usize) -> impl Iterator<Item = (usize, usize)> {
        let below = self.registered.range(..at + len).rev().map(|(start, len)| (*start, *len));
        below.take_while(move |(start, len)| start + len > at)
    }

    /// As on a GPU, a copy may touch one registered range or none, not a part of one, nor two.
    pub(super) fn check_host_range(&self, verb: &'static str, at: usize, len: usize) -> DriverResult<()> {
        let crosses = self.meets_registered(at, len).any(|(start, size)| at < start || at + len > start + size);
        if crosses { invalid(verb, "the host range is registered in parts") } else { Ok(()) }
    }

    pub(super) fn check_lost(&self, verb: &'static str) -> DriverResult<()> {
        self.lost.as_ref().map_or(Ok(()), |why| Err(error(DriverErrorKind::Lost, verb, why.clone())))
    }
}
