//! Memory that a lazy pause leaves where it is: the region is paused, what is to be kept of it is in backups, but its chunks stay mapped,
//! with their content, until somebody needs the memory. A resume before that finds every byte on the device and has nothing to do.
//!
//! Who needs it: an allocation or a resume for which there is no room, a pause of the same tag that is not lazy, a trim. Then the region
//! is *released*, which is the second half of a pause: nothing is copied, and no device waited for, since nothing was submitted on that
//! memory after the pause. Which region goes first is said by [`crate::policy`]. What the driver refuses to take stays held.
//!
//! What a pause has left because the program does something with it was not saved, and is used on: only another pause takes it, once it need not stay.

use super::Machine;
use super::batch::Batch;
use super::seam::Staging;
use super::team::Call;
use crate::driver::Device;
use crate::error::Result;
use crate::extent::Claim;
use crate::region::{Phase, Region};
use crate::terms::{PauseOptions, Report};
use std::collections::BTreeMap;
use std::sync::Arc;

impl Machine {
    /// Ends a pause, or a release: what is still on the device stays until somebody needs it.
    pub(super) fn end_holding(&self, batch: Batch, mut claims: Vec<Claim>) {
        self.veil(&batch, &mut claims);
        let left = batch.left(&claims, |_| true);
        self.end_with(batch, claims, |_| Phase::Paused, &left);
    }

    /// Gives back what the region holds lazily. Returns what was done, also if it failed half-way; `None` if it holds nothing so.
    fn release(&self, region: &Arc<Region>) -> Option<(Report, Result<()>)> {
        let batch = Batch::release(region)?;
        let mut report = batch.report();
        let mut claims = batch.claim(&self.heap);
        batch.count(&mut claims, &mut report);
        let outcome = self.put_down(&mut claims, Staging::default(), &Call::undo(), &mut report);
        if let Err(error) = &outcome {
            batch.note_error(error);
        }
        self.end_holding(batch, claims);
        Some((report, outcome))
    }

    /// Gives back what these regions hold lazily, and reports it as part of a pause in which they counted as unchanged.
    pub(super) fn release_now(&self, regions: &[Arc<Region>], report: &mut Report) -> Result<()> {
        for region in regions {
            let Some((released, outcome)) = self.release(region) else { continue };
            report.regions_changed += 1;
            report.regions_unchanged = report.regions_unchanged.saturating_sub(1);
            report.allocations += released.allocations;
            report.bytes_expected += released.bytes_expected;
            report.add(&released);
            outcome?;
        }
        Ok(())
    }

    /// Takes what an earlier pause has left of a region that was paused already: memory that is held lazily goes, and what had to stay on the device, and
    /// no longer has to, is paused.
    pub(super) fn pause_rest(
        &self,
        region: &Arc<Region>,
        options: PauseOptions<'_>,
        call: &Call,
        report: &mut Report,
    ) -> Result<()> {
        let changed = report.regions_changed;
        self.release_now(std::slice::from_ref(region), report)?;
        let extents = self.heap.registry.extents_of(std::iter::once(region.id));
        if !extents.iter().any(|extent| extent.may_go_after_all()) || !region.note_left_over() {
            return Ok(());
        }
        let batch = Batch::close(vec![Arc::clone(region)], Phase::Paused)?.keeping_all(options.keep_all);
        let rest = self.pause_batch(batch, options.dead, call)?;
        if report.regions_changed == changed {
            report.regions_changed += rest.regions_changed;
            report.regions_unchanged = report.regions_unchanged.saturating_sub(rest.regions_changed);
        }
        report.bytes_expected += rest.bytes_moved;
        report.bytes_discarded += rest.bytes_discarded;
        report.bytes_held += rest.bytes_held;
        report.add(&rest);
        Ok(())
    }

    /// Makes room on devices that need so many bytes: regions that hold memory there lazily give it back, one at least, in the order of
    /// the policy. Returns how many bytes. Not during a capture, which does not survive it; nor for more than a device has, which would help nobody.
    pub(crate) fn release_for(&self, need: &BTreeMap<Device, u64>) -> u64 {
        if self.heap.is_capturing() || need.iter().any(|(&device, &bytes)| self.heap.is_beyond(device, bytes)) {
            return 0;
        }
        let mut released = 0;
        for region in self.by_policy(|device| need.contains_key(&device)) {
            if released > 0 && need.iter().all(|(&device, &bytes)| self.has_room(device, bytes)) {
                break;
            }
            released += self.release_bytes(&region);
        }
        released
    }

    /// Gives back what the region holds lazily; how many bytes.
    pub(super) fn release_bytes(&self, region: &Arc<Region>) -> u64 {
        self.release(region).map_or(0, |(report, _)| report.bytes_moved)
    }

    /// Gives back all that is held lazily, as far as the driver takes it; returns how many bytes.
    pub(crate) fn release_all(&self) -> u64 {
        if self.heap.is_capturing() {
            return 0;
        }
        self.lazy_regions().iter().map(|region| self.release_bytes(region)).sum()
    }

    /// Regions that hold memory lazily.
    pub(super) fn lazy_regions(&self) -> Vec<Arc<Region>> {
        let mut lazy = self.regions.all();
        lazy.retain(|region| region.is_lazy());
        lazy
    }
}
