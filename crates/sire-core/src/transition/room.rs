//! Room on a device: what is known goes to [`crate::policy`], and what its plan says is done.

use super::Machine;
use crate::clock;
use crate::driver::Device;
use crate::error::{Error, Result, Status};
use crate::extent::Extent;
use crate::policy::{self, Budget, Candidate, Need};
use crate::region::Region;
use crate::sync::lock;
use std::sync::Arc;

impl Machine {
    /// Regions that hold memory lazily on one of these devices and may give it back, the first to go first.
    pub(super) fn by_policy(&self, on: impl Fn(Device) -> bool + Copy) -> Vec<Arc<Region>> {
        let residency =
            lock(&self.budgets).iter().filter(|(device, _)| on(**device)).map(|(_, each)| each.residency).max();
        let need = Need { bytes: 0, now: clock::milliseconds(), residency: residency.unwrap_or(0) };
        let order = policy::order(&self.candidates(on), &need);
        order.iter().filter_map(|each| self.regions.get(each.region).ok()).collect()
    }

    /// What the policy has to know of regions that hold memory lazily on one of these devices.
    fn candidates(&self, on: impl Fn(Device) -> bool + Copy) -> Vec<Candidate> {
        let candidate = |region: Arc<Region>| {
            let bytes = self.resident_on(&region, on);
            region.history(|history| Candidate {
                region: region.id,
                bytes,
                standing: history.standing,
                leases: history.leases,
                // A region is backed up before it holds anything lazily.
                dirty: false,
                used: history.used,
                used_at: history.used_at,
            })
        };
        self.lazy_regions().into_iter().map(candidate).collect()
    }

    fn resident_on(&self, region: &Region, on: impl Fn(Device) -> bool) -> u64 {
        let extents = self.heap.registry.extents_of(std::iter::once(region.id));
        let there = |extent: &&Arc<Extent>| on(extent.device) && extent.may_be_given_back();
        extents.iter().filter(there).map(|extent| extent.resident()).sum()
    }

    /// Makes room for `bytes` more on `device`, within its budget, by giving back what regions hold lazily; which ones did, and how much.
    ///
    /// # Errors
    /// `OutOfDeviceMemory` if all who may make way would not be enough: then nobody did, unless it turned out so only afterwards, because somebody
    /// was in use after all, or others took what had become free. `Capturing`, or the driver's.
    pub(crate) fn make_room_on(&self, device: Device, bytes: u64) -> Result<Vec<(Arc<Region>, u64)>> {
        if self.heap.is_capturing() {
            let message = "cannot make room while a CUDA graph is being captured; end the capture first";
            return Err(Error::new(Status::Capturing, message));
        }
        if self.missing_on(device, bytes)? == 0 {
            return Ok(Vec::new());
        }
        self.heap.reclaim();
        let missing = self.missing_on(device, bytes)?;
        let need = Need { bytes: missing, now: clock::milliseconds(), residency: self.budget(device).residency };
        let candidates = self.candidates(|each| each == device);
        let plan = policy::plan(&candidates, &need);
        if !plan.enough {
            return Err(self.no_room(device, bytes, missing, plan.bytes, candidates.len() - plan.victims.len()));
        }
        let victims = plan.victims.iter().filter_map(|&id| self.regions.get(id).ok());
        let made: Vec<(Arc<Region>, u64)> =
            victims.map(|region| (Arc::clone(&region), self.release_bytes(&region))).collect();
        match self.missing_on(device, bytes)? {
            0 => Ok(made),
            missing => Err(self.no_room(device, bytes, missing, 0, candidates.len())),
        }
    }

    /// How many bytes are missing for `bytes` more.
    fn missing_on(&self, device: Device, bytes: u64) -> Result<u64> {
        let free = self.heap.driver.memory_info(device)?.free.saturating_sub(self.settings.margin());
        let extents = self.heap.registry.extents(|extent| extent.device == device);
        let held = extents.iter().map(|extent| extent.resident()).sum();
        Ok(self.budget(device).missing(bytes, free, held))
    }

    pub(crate) fn budget(&self, device: Device) -> Budget {
        lock(&self.budgets).get(&device).copied().unwrap_or_default()
    }

    fn no_room(&self, device: Device, bytes: u64, missing: u64, could: u64, stay: usize) -> Error {
        let message = format!(
            "cannot make room for {bytes} bytes on device {}: {missing} bytes are missing, and regions that nobody uses hold {could} \
             there ({stay} more are leased, pinned or hold nothing). Pause something, raise the budget, or ask for less",
            device.0
        );
        Error::new(Status::OutOfDeviceMemory, message)
    }
}
