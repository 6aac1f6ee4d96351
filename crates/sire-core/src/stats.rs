//! Statistics: everything observable about the engine, gathered when asked for, as JSON (schema in docs/abi.md).

use crate::extent::Figures;
use crate::region::Region;
use crate::terms::{RegionId, State};
use crate::tier::Tier;
use crate::tier::shared::SharedUse;
use crate::transition::Machine;
use serde::Serialize;
use std::collections::BTreeMap;

/// Calls since the start.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Counters {
    pub(crate) allocate: u64,
    pub(crate) free: u64,
    pub(crate) forwarded_allocate: u64,
    pub(crate) forwarded_free: u64,
    pub(crate) driver_calls: u64,
}

/// Bytes that stay on the device, by the reason.
type Held = BTreeMap<&'static str, u64>;

#[derive(Serialize)]
struct DeviceStats {
    device: u32,
    resident_bytes: u64,
    paused_bytes: u64,
    /// Resident, of paused regions: they stay until somebody needs them.
    lazy_bytes: u64,
    slab_bytes: u64,
    allocations: u64,
}

#[derive(Serialize)]
struct RegionStats {
    region: u32,
    tag: String,
    backup: String,
    state: State,
    allocations: u64,
    requested_bytes: u64,
    resident_bytes: u64,
    paused_bytes: u64,
    /// Resident though the region is paused: they stay until somebody needs them.
    lazy_bytes: u64,
    /// Bytes that no pause takes, by the reason.
    held: Held,
    backup_bytes: u64,
    /// Of those, what is outside this process's host memory: in files, on the disk, shared, in a tier from outside.
    stored_bytes: u64,
    pauses: u64,
    resumes: u64,
    bytes_copied: u64,
    bytes_discarded: u64,
    seconds_paused_last: f64,
    seconds_resumed_last: f64,
    last_error: Option<String>,
}

#[derive(Serialize)]
struct TierStats {
    tier: String,
    used_bytes: u64,
    reserved_bytes: u64,
    present_bytes: u64,
    registered_bytes: u64,
    limit_bytes: Option<u64>,
}

#[derive(Serialize)]
struct Stats {
    version: &'static str,
    driver: Option<String>,
    hook_live: Option<bool>,
    devices: Vec<DeviceStats>,
    regions: Vec<RegionStats>,
    tiers: Vec<TierStats>,
    dummies: Dummies,
    bookkeeping: Bookkeeping,
    counters: Counters,
}

/// What lies behind paused addresses.
#[derive(Serialize)]
struct Dummies {
    /// Memory of the dummies themselves.
    bytes: u64,
    /// Paused bytes behind which one lies.
    veiled_bytes: u64,
    /// How often something was found written when memory came back.
    strays: u64,
}

/// What it costs to know what is where.
#[derive(Serialize)]
struct Bookkeeping {
    /// Host memory of the engine's own tables, about.
    bytes: u64,
    /// The same for each live allocation; 0 if there are none.
    bytes_per_allocation: u64,
}

/// What extents add up to.
#[derive(Clone, Copy, Default)]
struct Sum {
    figures: Figures,
    size: u64,
    slab: u64,
    lazy: u64,
}

impl Sum {
    fn add(&mut self, figures: Figures, size: u64, (is_slab, is_lazy): (bool, bool)) {
        self.figures.allocations += figures.allocations;
        self.figures.requested += figures.requested;
        self.figures.resident += figures.resident;
        self.figures.backed_up += figures.backed_up;
        self.figures.stored += figures.stored;
        self.size += size;
        self.slab += if is_slab { figures.resident } else { 0 };
        self.lazy += if is_lazy { figures.resident } else { 0 };
    }

    fn away(&self) -> u64 {
        self.size.saturating_sub(self.figures.resident)
    }
}

/// The statistics of `machine`.
pub(crate) fn json(machine: &Machine, counters: Counters) -> String {
    let mut by_device: BTreeMap<u32, Sum> = BTreeMap::new();
    let mut by_region: BTreeMap<RegionId, Sum> = BTreeMap::new();
    let mut held: BTreeMap<RegionId, Held> = BTreeMap::new();
    let mut bookkeeping = machine.heap.bookkeeping();
    let regions = machine.regions.all();
    let lazy: Vec<bool> = regions.iter().map(|region| region.is_lazy()).collect();
    for extent in machine.heap.registry.extents(|_| true) {
        bookkeeping += extent.bookkeeping();
        let stays = extent.stays_because();
        let is_lazy = lazy.get(extent.region.0 as usize).copied().unwrap_or(false) && extent.may_be_given_back();
        let (figures, kind) = (extent.figures(), (extent.slab.is_some(), is_lazy));
        by_device.entry(extent.device.0).or_default().add(figures, extent.size, kind);
        by_region.entry(extent.region).or_default().add(figures, extent.size, kind);
        if let Some(why) = stays {
            *held.entry(extent.region).or_default().entry(why).or_default() += figures.resident;
        }
    }
    let allocations: u64 = by_device.values().map(|sum| sum.figures.allocations).sum();
    let stats = Stats {
        version: env!("CARGO_PKG_VERSION"),
        driver: None,
        hook_live: None,
        devices: by_device.iter().map(|(&device, sum)| device_stats(device, sum)).collect(),
        regions: regions
            .iter()
            .map(|r| {
                let sum = by_region.get(&r.id).copied().unwrap_or_default();
                region_stats(machine, r, sum, held.remove(&r.id).unwrap_or_default())
            })
            .collect(),
        tiers: tiers(machine),
        dummies: Dummies {
            bytes: machine.heap.veils.dummy_bytes(),
            veiled_bytes: machine.heap.veils.veiled_bytes(),
            strays: machine.heap.veils.strays.load(std::sync::atomic::Ordering::Relaxed),
        },
        bookkeeping: Bookkeeping {
            bytes: bookkeeping,
            bytes_per_allocation: bookkeeping.checked_div(allocations).unwrap_or(0),
        },
        counters,
    };
    serde_json::to_string(&stats).unwrap_or_else(|_| "{}".to_owned())
}

fn device_stats(device: u32, sum: &Sum) -> DeviceStats {
    DeviceStats {
        device,
        resident_bytes: sum.figures.resident,
        paused_bytes: sum.away(),
        lazy_bytes: sum.lazy,
        slab_bytes: sum.slab,
        allocations: sum.figures.allocations,
    }
}

fn region_stats(machine: &Machine, region: &Region, sum: Sum, held: Held) -> RegionStats {
    let history = region.history(|history| history.clone());
    RegionStats {
        region: region.id.0,
        tag: region.tag.clone(),
        backup: machine.tiers.name(region.policy.backup),
        state: region.state(),
        allocations: sum.figures.allocations,
        requested_bytes: sum.figures.requested,
        resident_bytes: sum.figures.resident,
        paused_bytes: sum.away(),
        lazy_bytes: sum.lazy,
        held,
        backup_bytes: sum.figures.backed_up,
        stored_bytes: sum.figures.stored,
        pauses: history.pauses,
        resumes: history.resumes,
        bytes_copied: history.bytes_copied,
        bytes_discarded: history.bytes_discarded,
        seconds_paused_last: history.seconds_paused_last,
        seconds_resumed_last: history.seconds_resumed_last,
        last_error: history.last_error,
    }
}

fn tiers(machine: &Machine) -> Vec<TierStats> {
    let host = machine.host.usage();
    let host = TierStats {
        tier: "host".to_owned(),
        used_bytes: host.used,
        reserved_bytes: host.reserved,
        present_bytes: host.present,
        registered_bytes: host.registered,
        limit_bytes: machine.settings.host_limit(),
    };
    let stored = |tier: &str, used_bytes, limit_bytes| {
        let tier = tier.to_owned();
        TierStats {
            tier,
            used_bytes,
            reserved_bytes: used_bytes,
            present_bytes: used_bytes,
            registered_bytes: 0,
            limit_bytes,
        }
    };
    let mut all: Vec<_> =
        machine.tiers.all().iter().map(|tier| stored(tier.name(), tier.used(), tier.limit())).collect();
    all.splice(0..0, [host]);
    all.insert(2, TierStats { reserved_bytes: 0, ..stored("file", machine.tiers.files.used(), None) });
    all.extend(shared_tier(machine));
    all
}

/// Of memory that is shared, `reserved_bytes` counts what this process has made: over all processes, each byte once.
fn shared_tier(machine: &Machine) -> Option<TierStats> {
    let SharedUse { own, borrowed } = machine.tiers.shared.usage();
    (machine.settings.shares() || own + borrowed > 0).then(|| TierStats {
        tier: machine.tiers.shared.name().to_owned(),
        used_bytes: own + borrowed,
        reserved_bytes: own,
        present_bytes: own,
        registered_bytes: 0,
        limit_bytes: machine.tiers.shared.limit(),
    })
}
