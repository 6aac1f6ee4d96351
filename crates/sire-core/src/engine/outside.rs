//! What touches memory from outside of the engine: questions that are asked on behalf of whoever is about to use an address, or has handed it out.

use super::Engine;
use super::remarks::in_no_allocation;
use crate::driver::Addr;
use crate::error::Result;

impl Engine {
    /// Tells that a call which may wait for a device is about to be made past the engine. What the engine is copying goes on in shorter pieces for a while, so
    /// that it does not wait long. Wait-free, and calls no driver.
    pub fn note_caller(&self) {
        self.machine.heap.callers.note();
    }

    /// Whether the memory at `addr` may be used now. What a pause leaves on the device may be; of what is being resumed, only the [`crate::progress::Progress`] knows.
    /// Costs a look-up and one lock, and calls no driver.
    ///
    /// # Errors
    /// `Paused`: its region is paused, or being paused. `UnknownAddress`: no live allocation of the engine's holds it.
    pub fn require_usable(&self, addr: Addr) -> Result<()> {
        let (extent, ..) = self.find(addr).ok_or_else(|| in_no_allocation(addr, 1))?;
        if extent.stays_because().is_some() {
            return Ok(());
        }
        self.machine.regions.get(extent.region)?.require_usable(addr)
    }
}
