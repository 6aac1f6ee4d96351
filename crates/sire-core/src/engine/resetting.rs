//! A device that the program resets: its allocations there end, as if each had been freed, and what the engine keeps in the device's context goes. Regions
//! stay, and so does physical memory that the program made and mapped itself, which the driver leaves to the program too.

use super::{Engine, Reuse};
use crate::driver::Device;
use crate::sync::lock;

impl Engine {
    /// Lets go of all that the program and the engine have on `device`, has it `reset`, and returns what came of that. Copies of transitions are
    /// waited for, up to ten seconds, on every device, because host memory is registered for all of them at once; new ones wait until the reset is
    /// over. What a lost device does not give back before is taken after it; what a transition in another thread is at, when that ends.
    pub fn reset<R>(&self, device: Device, reset: impl FnOnce() -> R) -> R {
        let _still = self.machine.lanes.hold_still();
        self.end_all(device);
        // Not everybody who brings host memory in needs a lane: the reset would drop what they have registered meanwhile, and the arena not know.
        let _quiet = self.machine.host.unregister();
        self.machine.lanes.close(device);
        lock(&self.machine.hashing).remove(&device);
        let outcome = reset();
        self.end_all(device);
        outcome
    }

    fn end_all(&self, device: Device) {
        let capturing = self.machine.heap.is_capturing();
        for addr in self.machine.heap.allocations_on(device) {
            // What is refused is not freed, and found again.
            let _ = self.free_cached(addr, Reuse::AfterDevice, capturing);
        }
        self.machine.heap.retire(device);
    }
}
