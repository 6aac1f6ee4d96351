//! What a trace takes: devices, and the most device memory that was there at once.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use sire_core::trace::{Event, SegmentCall, Verb, means};

use super::Trace;

/// Physical memory comes in multiples of this.
const GRANULE: u64 = 2 << 20;
/// Slabs of one region that are partly empty.
const SLABS: u64 = 8 << 20;

/// See the [module documentation](self).
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// How many devices.
    pub devices: u32,
    /// Most bytes of one device that were resident at once, rounded as the engine rounds.
    pub peak: u64,
    /// Allocations that were alive at once.
    pub allocations: usize,
    /// Bytes that all allocations had together at most, resident or not.
    pub virtual_bytes: u64,
}

#[derive(Debug, Default)]
struct Region {
    /// None: memory of no region, which no pause takes.
    tag: Option<String>,
    paused: bool,
    /// Bytes per device.
    bytes: BTreeMap<u32, u64>,
}

/// The key of memory of no region.
const NONE: u32 = u32::MAX;

type Regions = HashMap<u32, Region>;

/// Physical memory that the program made itself, and how often it is referred to and mapped.
#[derive(Debug)]
struct Memory {
    region: u32,
    device: u32,
    size: u64,
    references: u64,
    mapped: u64,
    /// No pause takes it.
    stays: bool,
}

impl Memory {
    /// From now on it is memory of no region.
    fn stay(&mut self, regions: &mut Regions) {
        self.stays = true;
        let before = std::mem::replace(&mut self.region, NONE);
        transfer(regions, before, self.device, self.size);
    }
}

/// Memory that the program maps itself, by its names.
#[derive(Debug, Default)]
struct Views {
    memory: HashMap<u64, Memory>,
    /// What is mapped: the handle.
    mapped: BTreeMap<u64, u64>,
    /// The region of reserved addresses.
    reserved: BTreeMap<u64, u32>,
    /// What the program mapped that is not followed: bytes on the first device.
    strangers: BTreeMap<u64, u64>,
}

impl Views {
    fn follow(&mut self, call: &SegmentCall, regions: &mut Regions) {
        match *call {
            SegmentCall::Reserve { addr, region, .. } => {
                self.reserved.insert(addr, region.filter(|region| regions.contains_key(region)).unwrap_or(NONE));
            }
            SegmentCall::Unreserve { addr, .. } => drop(self.reserved.remove(&addr)),
            SegmentCall::Create { handle, region, device, size, status: 0, .. } => {
                let region = region.filter(|region| regions.contains_key(region)).unwrap_or(NONE);
                add(regions.entry(region).or_default().bytes.entry(device).or_default(), size);
                self.memory.insert(handle, Memory { region, device, size, references: 1, mapped: 0, stays: false });
            }
            SegmentCall::Map { handle, addr, status: 0, .. } => {
                let Some(memory) = self.memory.get_mut(&handle) else { return };
                memory.mapped += 1;
                self.mapped.insert(addr, handle);
                let joined = self.reserved.range(..=addr).next_back().map(|(_, region)| *region);
                if memory.mapped > 1 {
                    memory.stay(regions);
                } else if let (NONE, Some(region), false) = (memory.region, joined, memory.stays) {
                    // Memory of no region joins that of the addresses.
                    subtract(regions, NONE, memory.device, memory.size);
                    add(regions.entry(region).or_default().bytes.entry(memory.device).or_default(), memory.size);
                    memory.region = region;
                }
            }
            SegmentCall::Mapped { addr, size }
                if !self.mapped.contains_key(&addr) && self.strangers.insert(addr, size).is_none() =>
            {
                add(regions.entry(NONE).or_default().bytes.entry(0).or_default(), size);
            }
            SegmentCall::Lend { handle, status: 0 } => {
                self.memory.get_mut(&handle).into_iter().for_each(|memory| memory.stay(regions));
            }
            SegmentCall::LendRange { addr, size, status: 0 } => {
                for handle in self.mapped.range(addr..addr.saturating_add(size)).map(|(_, handle)| handle) {
                    self.memory.get_mut(handle).into_iter().for_each(|memory| memory.stay(regions));
                }
            }
            SegmentCall::Unmap { addr, size } => {
                let there = addr..addr.saturating_add(size);
                for (_, size) in taken(&mut self.strangers, there.clone()) {
                    subtract(regions, NONE, 0, size);
                }
                let there: Vec<_> = self.mapped.range(there).map(|(at, _)| *at).collect();
                for at in there {
                    let Some(handle) = self.mapped.remove(&at) else { continue };
                    self.drop_one(handle, regions, |memory| &mut memory.mapped);
                }
            }
            SegmentCall::Release { handle } => self.drop_one(handle, regions, |memory| &mut memory.references),
            SegmentCall::Retain { addr } => {
                let handle = self.mapped.get(&addr);
                if let Some(memory) = handle.and_then(|handle| self.memory.get_mut(handle)) {
                    memory.references += 1;
                }
            }
            _ => {}
        }
    }

    /// One use fewer; the memory goes with the last.
    fn drop_one(&mut self, handle: u64, regions: &mut Regions, count: fn(&mut Memory) -> &mut u64) {
        let Some(memory) = self.memory.get_mut(&handle) else { return };
        let count = count(memory);
        *count = count.saturating_sub(1);
        if (memory.references, memory.mapped) == (0, 0)
            && let Some(memory) = self.memory.remove(&handle)
        {
            subtract(regions, memory.region, memory.device, memory.size);
        }
    }
}

/// Takes what lies in a range out of a map.
pub(super) fn taken<T>(map: &mut BTreeMap<u64, T>, there: Range<u64>) -> Vec<(u64, T)> {
    let names: Vec<u64> = if there.is_empty() { Vec::new() } else { map.range(there).map(|(at, _)| *at).collect() };
    names.into_iter().filter_map(|at| map.remove_entry(&at)).collect()
}

/// Goes through the trace without a device.
pub fn of(trace: &Trace) -> Needs {
    let mut regions = Regions::new();
    let mut views = Views::default();
    let mut alive: BTreeMap<u64, (u32, u32, u64)> = BTreeMap::new();
    let mut needs = Needs { devices: 1, ..Needs::default() };
    for record in &trace.records {
        match &record.event {
            Event::Region { region, tag, .. } => {
                regions.entry(*region).or_insert_with(|| Region { tag: Some(tag.clone()), ..Region::default() });
            }
            Event::Allocate { region, device, size, addr, status: 0, .. } => {
                let bytes = rounded(*size, trace.header.small);
                alive.insert(*addr, (*region, *device, bytes));
                needs.devices = needs.devices.max(device.saturating_add(1));
                if let Some(region) = regions.get_mut(region) {
                    add(region.bytes.entry(*device).or_default(), bytes);
                }
            }
            Event::Free { addr } => {
                let Some((region, device, bytes)) = alive.remove(addr) else { continue };
                subtract(&mut regions, region, device, bytes);
            }
            Event::KeepResident { addr, status: 0 } => stay(&mut alive, &mut regions, *addr),
            Event::Segment(call) => {
                match call {
                    SegmentCall::Create { device, .. } => needs.devices = needs.devices.max(device.saturating_add(1)),
                    SegmentCall::LendRange { addr, status: 0, .. } => stay(&mut alive, &mut regions, *addr),
                    _ => {}
                }
                views.follow(call, &mut regions);
            }
            Event::Peer { device, peer, .. } | Event::PeerGone { device, peer, .. } => {
                needs.devices = needs.devices.max(device.max(peer).saturating_add(1));
            }
            Event::Enter { region, resume: true, status: 0 } => {
                regions.get_mut(region).into_iter().for_each(|region| region.paused = false);
            }
            Event::Transition(done) => {
                let verbs: &[bool] = match done.verb {
                    Verb::Pause | Verb::PauseLazily => &[true],
                    Verb::Switch => &[true, false],
                    Verb::Resume | Verb::ResumeStart => &[false],
                    Verb::Prefetch | Verb::PreCopy => &[],
                };
                if done.status != 0 && !(done.verb.is_pause() && super::player::ended_paused(done.status)) {
                    continue;
                }
                for (tag, paused) in done.tags.iter().zip(verbs) {
                    let is_meant = |(number, region): &(&u32, &mut Region)| {
                        region.tag.as_deref().is_some_and(|found| means(tag, **number, found))
                    };
                    let meant = regions.iter_mut().filter(is_meant);
                    meant.for_each(|(_, region)| region.paused = *paused);
                }
            }
            _ => {}
        }
        needs.allocations = needs.allocations.max(alive.len() + views.mapped.len());
        measure(&mut needs, &regions);
    }
    needs
}

/// The allocation that holds an address is taken by no pause from now on.
fn stay(alive: &mut BTreeMap<u64, (u32, u32, u64)>, regions: &mut Regions, addr: u64) {
    if let Some((start, (region, device, bytes))) = alive.range_mut(..=addr).next_back()
        && addr - start < *bytes
    {
        transfer(regions, std::mem::replace(region, NONE), *device, *bytes);
    }
}

/// Bytes of a region become bytes of none.
fn transfer(regions: &mut Regions, from: u32, device: u32, bytes: u64) {
    subtract(regions, from, device, bytes);
    add(regions.entry(NONE).or_default().bytes.entry(device).or_default(), bytes);
}

fn subtract(regions: &mut Regions, region: u32, device: u32, bytes: u64) {
    if let Some(held) = regions.get_mut(&region).and_then(|region| region.bytes.get_mut(&device)) {
        *held = held.saturating_sub(bytes);
    }
}

fn add(sum: &mut u64, bytes: u64) {
    *sum = sum.saturating_add(bytes);
}

/// Large allocations take whole granules, small ones a share of a slab.
fn rounded(size: u64, small: u64) -> u64 {
    let unit = if size < small { 512 } else { GRANULE };
    size.checked_next_multiple_of(unit).unwrap_or(u64::MAX)
}

fn measure(needs: &mut Needs, regions: &Regions) {
    let mut resident: BTreeMap<u32, u64> = BTreeMap::new();
    let mut all = 0u64;
    for region in regions.values() {
        for (device, bytes) in &region.bytes {
            add(&mut all, *bytes);
            if !region.paused {
                add(resident.entry(*device).or_default(), bytes.saturating_add(SLABS));
            }
        }
    }
    needs.virtual_bytes = needs.virtual_bytes.max(all);
    needs.peak = needs.peak.max(resident.into_values().max().unwrap_or(0));
}
