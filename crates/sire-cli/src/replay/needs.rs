//! What a trace takes: devices, and the most device memory that was there at once.

use std::collections::{BTreeMap, HashMap};

use sire_core::trace::{Event, Verb};

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

#[derive(Debug)]
struct Region {
    tag: String,
    paused: bool,
    /// Bytes per device.
    bytes: BTreeMap<u32, u64>,
}

/// Goes through the trace without a device.
pub fn of(trace: &Trace) -> Needs {
    let mut regions: HashMap<u32, Region> = HashMap::new();
    let mut alive: HashMap<u64, (u32, u32, u64)> = HashMap::new();
    let mut needs = Needs { devices: 1, ..Needs::default() };
    for record in &trace.records {
        match &record.event {
            Event::Region { region, tag, .. } => {
                regions.entry(*region).or_insert_with(|| Region {
                    tag: tag.clone(),
                    paused: false,
                    bytes: BTreeMap::new(),
                });
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
                if let Some(held) = regions.get_mut(&region).and_then(|region| region.bytes.get_mut(&device)) {
                    *held = held.saturating_sub(bytes);
                }
            }
            Event::Peer { device, peer, .. } => {
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
                    let meant = regions.values_mut().filter(|region| is_under(&region.tag, tag));
                    meant.for_each(|region| region.paused = *paused);
                }
            }
            _ => {}
        }
        needs.allocations = needs.allocations.max(alive.len());
        measure(&mut needs, &regions);
    }
    needs
}

fn add(sum: &mut u64, bytes: u64) {
    *sum = sum.saturating_add(bytes);
}

/// Large allocations take whole granules, small ones a share of a slab.
fn rounded(size: u64, small: u64) -> u64 {
    let unit = if size < small { 512 } else { GRANULE };
    size.checked_next_multiple_of(unit).unwrap_or(u64::MAX)
}

fn measure(needs: &mut Needs, regions: &HashMap<u32, Region>) {
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

/// Whether a selection by `tag` means a region of tag `found`. No tag means everything.
pub fn is_under(found: &str, tag: &str) -> bool {
    tag.is_empty() || found == tag || found.strip_prefix(tag).is_some_and(|rest| rest.starts_with('/'))
}
