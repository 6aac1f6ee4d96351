//! What regions hold on the devices, and how long they have lain idle: for whoever decides, outside of this process's own needs, which of them make way.
//!
//! A region is *used* when memory is made in it, when a thread enters or leaves it, when a lease on it begins or ends, when it is resumed, and when the
//! program [says so](Engine::say_used). What the program's kernels do with memory that is there already nobody sees. Uses are noted from
//! [`Engine::observe`] on.

use super::Engine;
use crate::driver::Device;
use crate::error::Result;
use crate::region::Region;
use crate::terms::{Backup, RegionId, Selection, State};
use std::collections::BTreeMap;
use std::time::Duration;

/// A region, as who might ask it to make way sees it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Holding {
    /// Which one.
    pub region: RegionId,
    /// Its tag.
    pub tag: String,
    /// Its lasting state.
    pub state: State,
    /// By device: bytes that a pause would give back.
    pub resident: BTreeMap<Device, u64>,
    /// By device: bytes that a resume would take.
    pub away: BTreeMap<Device, u64>,
    /// Whether a pause keeps its content.
    pub keeps: bool,
    /// A thread is inside, or it is leased.
    pub in_use: bool,
    /// How long it has not been used, as far as that is observed.
    pub idle: Duration,
    /// How often it was paused.
    pub pauses: u64,
}

impl Engine {
    /// Uses of the regions that `selection` means are noted from now on; what was not noted before counts as used now.
    ///
    /// # Errors
    /// `UnknownTag`.
    pub fn observe(&self, selection: &Selection) -> Result<()> {
        self.machine.regions.select(selection)?.iter().for_each(|region| region.observe());
        Ok(())
    }

    /// The program has used the regions `ago` for the last time.
    ///
    /// # Errors
    /// `UnknownTag`.
    pub fn say_used(&self, selection: &Selection, ago: Duration) -> Result<()> {
        let ago = u64::try_from(ago.as_millis()).unwrap_or(u64::MAX);
        self.machine.regions.select(selection)?.iter().for_each(|region| region.say_used(ago));
        Ok(())
    }

    /// The regions of the tag itself, without what is under it.
    ///
    /// # Errors
    /// `UnknownTag`, or `InvalidArgument` if that can be no tag.
    pub fn alone(&self, tag: &str) -> Result<Selection> {
        let regions = self.machine.regions.at(tag)?;
        Ok(Selection::Exact(regions.iter().map(|region| region.id).collect()))
    }

    /// Fails if there is nothing that `selection` means.
    ///
    /// # Errors
    /// `UnknownTag`.
    pub fn refuse_unknown(&self, selection: &Selection) -> Result<()> {
        self.machine.regions.select(selection).map(drop)
    }

    /// The regions that `selection` means, by number.
    ///
    /// # Errors
    /// `UnknownTag`.
    pub fn holdings(&self, selection: &Selection) -> Result<Vec<Holding>> {
        let regions = self.machine.regions.select(selection)?;
        Ok(regions.iter().map(|region| self.holding(region)).collect())
    }

    /// How often a region was paused.
    ///
    /// # Errors
    /// `UnknownTag` if there is no such region.
    pub fn pauses(&self, region: RegionId) -> Result<u64> {
        Ok(self.machine.regions.get(region)?.history(|history| history.pauses))
    }

    fn holding(&self, region: &Region) -> Holding {
        let (mut resident, mut away) = (BTreeMap::new(), BTreeMap::new());
        for extent in self.machine.heap.registry.extents_of(std::iter::once(region.id)) {
            if extent.stays_because().is_none() {
                *resident.entry(extent.device).or_insert(0) += extent.resident();
            }
            *away.entry(extent.device).or_insert(0) += extent.size.saturating_sub(extent.resident());
        }
        Holding {
            region: region.id,
            tag: region.tag.clone(),
            state: region.state(),
            resident,
            away,
            keeps: region.policy.backup != Backup::None,
            in_use: region.is_in_use(),
            idle: Duration::from_millis(region.idle()),
            pauses: region.history(|history| history.pauses),
        }
    }
}
