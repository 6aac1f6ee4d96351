//! Small allocations: slots of slabs. A bin holds the slabs of one size class for one device, region and stream.
//! A freed slot goes into the bin's quarantine, because the device may still be using it, and becomes ready
//! after the next synchronisation that began later than the free. The bin synchronises by itself only
//! when the quarantine has grown to several slabs, and never during a capture.

use super::{Heap, Plan, unknown};
use crate::driver::{Addr, Device, ProgramStream};
use crate::error::{Error, Result, Status};
use crate::extent::{Extent, Freed, Slab};
use crate::region::Region;
use crate::sync::{Mutex, lock};
use crate::terms::{RegionId, Request};
use dashmap::DashMap;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

/// The smallest slot, and what every slot is aligned to.
const SMALLEST: u64 = 512;
/// A slab has at least this many slots.
const SLOTS: u64 = 8;
/// A quarantine as large as this many slabs is worth a synchronisation.
const QUARANTINED_SLABS: u64 = 4;

/// What a bin is for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Key {
    device: Device,
    region: RegionId,
    stream: ProgramStream,
    class: u64,
}

#[derive(Debug, Default)]
struct Bin {
    slabs: Vec<Arc<Extent>>,
    ready: Vec<Addr>,
    quarantine: Vec<Addr>,
}

/// All bins.
#[derive(Debug, Default)]
pub(super) struct Bins {
    all: DashMap<Key, Arc<Mutex<Bin>>>,
    /// Bins in which freed slots wait, so that a synchronisation looks at no others. A bin is added when its quarantine gets its first slot.
    waiting: Mutex<BTreeMap<Device, Vec<Arc<Mutex<Bin>>>>>,
}

impl Bins {
    fn get(&self, key: Key) -> Arc<Mutex<Bin>> {
        Arc::clone(&self.all.entry(key).or_default())
    }

    /// Copied out, so that no shard of the map is locked while a bin is.
    fn all(&self) -> Vec<Arc<Mutex<Bin>>> {
        self.all.iter().map(|entry| Arc::clone(entry.value())).collect()
    }

    /// Those of a device.
    fn of(&self, device: Device) -> Vec<Arc<Mutex<Bin>>> {
        self.all.iter().filter(|entry| entry.key().device == device).map(|entry| Arc::clone(entry.value())).collect()
    }

    /// Puts slots that may still be in use into quarantine.
    fn quarantine(&self, device: Device, bin: &Arc<Mutex<Bin>>, slots: impl IntoIterator<Item = Addr>) {
        let quarantine = &mut lock(bin).quarantine;
        let was_empty = quarantine.is_empty();
        quarantine.extend(slots);
        if was_empty && !quarantine.is_empty() {
            lock(&self.waiting).entry(device).or_default().push(Arc::clone(bin));
        }
    }

    /// Takes the slots that wait for a synchronisation of `device`.
    fn take_waiting(&self, device: Device) -> Vec<(Arc<Mutex<Bin>>, Vec<Addr>)> {
        let bins = lock(&self.waiting).remove(&device).unwrap_or_default();
        let slots = |bin: Arc<Mutex<Bin>>| {
            let slots = std::mem::take(&mut lock(&bin).quarantine);
            (bin, slots)
        };
        bins.into_iter().map(slots).collect()
    }

    /// Devices on which freed slots wait for a synchronisation.
    pub(super) fn quarantined_devices(&self) -> Vec<Device> {
        lock(&self.waiting).keys().copied().collect()
    }

    /// Bytes of the lists, about.
    pub(super) fn list_bytes(&self) -> u64 {
        let bytes = |bin: Arc<Mutex<Bin>>| {
            let Bin { slabs, ready, quarantine } = &*lock(&bin);
            size_of::<(Key, Arc<Bin>, Bin)>() + 8 * (slabs.capacity() + ready.capacity() + quarantine.capacity())
        };
        self.all().into_iter().map(bytes).sum::<usize>() as u64
    }
}

impl Heap {
    /// A slot for a small allocation.
    pub(super) fn allocate_slot(&self, request: &Request, region: &Region) -> Result<Addr> {
        let class = class_of(request.size);
        let key = Key { device: request.device, region: region.id, stream: request.stream, class };
        let slab_size = (class * SLOTS).next_multiple_of(self.granularity(request.device)?);
        let bin = self.bins.get(key);
        let mut found = lock(&bin).ready.pop();
        let quarantined = || lock(&bin).quarantine.len() as u64 * class;
        if found.is_none() && !request.capturing && quarantined() >= QUARANTINED_SLABS * slab_size {
            // Here it is the program that waits.
            self.callers.note();
            match self.synchronize_bins(&[request.device].into()) {
                Ok(touched) => drop(self.shed_from(touched, 1)),
                // It began after the request was made: a new slab is as good.
                Err(error) if error.status == Status::Capturing => {}
                Err(error) => return Err(error),
            }
            found = lock(&bin).ready.pop();
        }
        let addr = match found {
            Some(addr) => addr,
            None => self.add_slab(&bin, key, region, slab_size)?,
        };
        if let Some(extent) = self.registry.find(addr)
            && let Some(slab) = &extent.slab
        {
            slab.occupy(addr.0 - extent.base.0, request.size);
        }
        Ok(addr)
    }

    /// A new slab; returns its first slot and readies the others.
    fn add_slab(&self, bin: &Mutex<Bin>, key: Key, region: &Region, size: u64) -> Result<Addr> {
        let slab = Slab::new(key.class, key.stream, size);
        let count = slab.count() as u64;
        let plan = Plan { device: key.device, region, size, requested: size, slab: Some(slab) };
        let extent = self.build(plan)?;
        let mut bin = lock(bin);
        bin.ready.extend((1..count).rev().map(|slot| extent.base.offset(slot * key.class)));
        bin.slabs.push(Arc::clone(&extent));
        Ok(extent.base)
    }

    /// Frees a slot: it waits in quarantine.
    pub(super) fn free_slot(&self, extent: &Extent, slab: &Slab, addr: Addr) -> Result<()> {
        let offset = addr.0 - extent.base.0;
        if !slab.vacate(offset) {
            return Err(unknown(addr, "it was freed before, or lies inside an allocation"));
        }
        extent.clear_override(&(offset..offset + slab.class));
        let key = Key { device: extent.device, region: extent.region, stream: slab.stream, class: slab.class };
        self.bins.quarantine(extent.device, &self.bins.get(key), [addr]);
        Ok(())
    }

    /// Waits for everything that may touch memory on `device`, its peers' work included; slots that were freed before are ready then.
    ///
    /// # Errors
    /// `Capturing` if a capture has begun, as far as is known: waiting would void it. Else the driver's.
    pub(crate) fn synchronize(&self, device: Device) -> Result<()> {
        self.synchronize_all(&[device].into())
    }

    /// As `synchronize`, for memory on any of these; each device is waited for once, also where they are one another's peers.
    pub(crate) fn synchronize_all(&self, devices: &BTreeSet<Device>) -> Result<()> {
        self.synchronize_bins(devices).map(drop)
    }

    /// As `synchronize_all`; returns the bins that have more slots ready now.
    fn synchronize_bins(&self, devices: &BTreeSet<Device>) -> Result<Vec<Arc<Mutex<Bin>>>> {
        if let (true, Some(device)) = (self.is_capturing(), devices.first()) {
            let message =
                format!("{device} cannot be waited for: a CUDA graph is being captured; end the capture first");
            return Err(Error::new(Status::Capturing, message));
        }
        let waiting = |&device: &Device| self.bins.take_waiting(device).into_iter().map(move |taken| (device, taken));
        let taken: Vec<_> = devices.iter().flat_map(waiting).collect();
        let users: BTreeSet<Device> = devices.iter().flat_map(|&device| self.users(device)).collect();
        self.callers.note_own();
        let done = users.into_iter().try_for_each(|user| self.driver.synchronize(user));
        for (device, (bin, slots)) in &taken {
            let slots = slots.iter().copied();
            if done.is_ok() { lock(bin).ready.extend(slots) } else { self.bins.quarantine(*device, bin, slots) }
        }
        done?;
        Ok(taken.into_iter().map(|(_, (bin, _))| bin).collect())
    }

    /// Gives back slabs of which every slot is ready, but keeps `keep` of them in each bin. Returns physical bytes.
    pub(super) fn shed(&self, keep: usize) -> u64 {
        self.shed_from(self.bins.all(), keep)
    }

    /// Gives back slabs of a device of which every slot was freed.
    pub(super) fn shed_on(&self, device: Device) {
        if self.bins.quarantined_devices().contains(&device) {
            // A device that cannot be synchronised keeps its quarantine; its slabs are not empty then.
            let _ = self.synchronize(device);
        }
        self.shed_from(self.bins.of(device), 0);
    }

    fn shed_from(&self, bins: Vec<Arc<Mutex<Bin>>>, keep: usize) -> u64 {
        let empty = bins.into_iter().flat_map(|bin| self.take_empty(&mut lock(&bin), keep));
        let empty: Vec<Arc<Extent>> = empty.collect();
        let mut bytes = 0;
        for extent in empty {
            if let Freed::Claimed(claim) = extent.free() {
                bytes += self.destroy(claim);
            }
        }
        bytes
    }

    fn take_empty(&self, bin: &mut Bin, keep: usize) -> Vec<Arc<Extent>> {
        let mut ready: HashMap<Addr, usize> = HashMap::new();
        for extent in bin.ready.iter().filter_map(|&addr| self.registry.find(addr)) {
            *ready.entry(extent.base).or_insert(0) += 1;
        }
        let is_empty =
            |extent: &Extent| extent.slab.as_ref().is_some_and(|slab| ready.get(&extent.base) == Some(&slab.count()));
        let gone: Vec<_> = bin.slabs.iter().filter(|extent| is_empty(extent)).skip(keep).cloned().collect();
        let within = |addr: &Addr| gone.iter().any(|e| e.base <= *addr && addr.0 < e.base.0 + e.size);
        bin.ready.retain(|addr| !within(addr));
        bin.slabs.retain(|extent| !gone.iter().any(|g| Arc::ptr_eq(g, extent)));
        gone
    }
}

/// The slot size for `size` bytes: multiples of 512 up to 2 KiB, then four steps per doubling.
fn class_of(size: u64) -> u64 {
    let size = size.max(1);
    let below = (size.next_power_of_two() / 2).max(4 * SMALLEST);
    size.next_multiple_of(if size <= 4 * SMALLEST { SMALLEST } else { below / 4 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_waste_at_most_a_fifth() {
        assert_eq!([1, 512, 513, 2048, 2049, 4096, 4097].map(class_of), [512, 512, 1024, 2048, 2560, 4096, 5120]);
        for size in (2049..1 << 20).step_by(97) {
            let class = class_of(size);
            assert!(class >= size && class.is_multiple_of(SMALLEST) && (class - size) * 4 < size, "{size} -> {class}");
            assert_eq!(class_of(class), class, "a class is its own class");
        }
    }
}
