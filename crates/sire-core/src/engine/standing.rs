//! What the program says about who makes way when memory is short: standings, leases, budgets. The rules are in [`crate::policy`].

use super::Engine;
use crate::driver::Device;
use crate::error::{Error, Result, Status};
use crate::policy::{Budget, Standing};
use crate::sync::lock;
use crate::terms::Selection;

/// A region that made way.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MadeWay {
    /// Its tag.
    pub tag: String,
    /// Bytes of device memory that it gave back, on every device where it had some.
    pub bytes: u64,
}

impl Engine {
    /// What is said about regions from now on.
    ///
    /// # Errors
    /// `UnknownTag`.
    pub fn set_standing(&self, selection: &Selection, standing: Standing) -> Result<()> {
        for region in self.machine.regions.select(selection)? {
            region.history(|history| history.standing = standing);
        }
        Ok(())
    }

    /// Somebody uses the regions: until as many [`Engine::unlease`], they do not make way for others. A pause by name is not refused.
    ///
    /// # Errors
    /// `UnknownTag`.
    pub fn lease(&self, selection: &Selection) -> Result<()> {
        for region in self.machine.regions.select(selection)? {
            region.history(|history| {
                history.leases += 1;
                history.touch();
            });
            region.note_use();
        }
        Ok(())
    }

    /// Undoes one [`Engine::lease`] of the same selection. The regions count as used now.
    ///
    /// # Errors
    /// `UnknownTag`; `InvalidArgument` if one of them has no lease: then nothing has changed.
    pub fn unlease(&self, selection: &Selection) -> Result<()> {
        let regions = self.machine.regions.select(selection)?;
        if let Some(free) = regions.iter().find(|region| region.history(|history| history.leases) == 0) {
            let message = format!("region '{}' has no lease that could end", free.tag);
            return Err(Error::new(Status::InvalidArgument, message));
        }
        for region in regions {
            region.history(|history| {
                history.leases = history.leases.saturating_sub(1);
                history.touch();
            });
            region.note_use();
        }
        Ok(())
    }

    /// What [`Engine::make_room`] may use of a device from now on, and for how long it spares what was just used. Allocations and resumes that
    /// find no room follow the latter only: they take what the device has.
    pub fn set_budget(&self, device: Device, budget: Budget) {
        lock(&self.machine.budgets).insert(device, budget);
    }

    /// What was said of the device last; of one of which nobody has said anything, that everything may be used.
    #[must_use]
    pub fn budget(&self, device: Device) -> Budget {
        self.machine.budget(device)
    }

    /// Makes room for `bytes` more on `device`, within its budget: regions that are paused lazily and that nobody needs give their memory
    /// back, in the order of their standing, no more than necessary. Nothing is copied. Returns who made way.
    ///
    /// # Errors
    /// `OutOfDeviceMemory` if that would not be enough: then nobody made way. `Capturing`, or the driver's.
    pub fn make_room(&self, device: Device, bytes: u64) -> Result<Vec<MadeWay>> {
        let made = self.machine.make_room_on(device, bytes)?;
        Ok(made.into_iter().map(|(region, bytes)| MadeWay { tag: region.tag.clone(), bytes }).collect())
    }
}
