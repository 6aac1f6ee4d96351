//! Physical memory that the process owns ahead of its need: what a reservation between processes keeps for it. See [`crate::stock`].

use super::Engine;
use crate::driver::{Device, MemoryInfo};
use crate::error::{Error, Result, Status};
use crate::stock::{Stocked, Watch};
use crate::sync::Ordering;

impl Engine {
    /// Takes `bytes` (rounded up to the granularity) of `device` into the stock: from now on nobody else can have them, and what the engine makes
    /// there comes out of them first. What the engine gives back while part of the stock is in use goes into it again, not to other processes;
    /// reports and statistics count it as given back all the same. `grown` hears, while that goes on, how many bytes lie there. Returns the bytes taken.
    ///
    /// # Errors
    /// `OutOfDeviceMemory`, after what is only cached has been given back; or the driver's: then the stock is as before. `Capturing`.
    pub fn stock_up(&self, device: Device, bytes: u64, grown: &mut dyn FnMut(u64)) -> Result<u64> {
        let heap = &self.machine.heap;
        if heap.is_capturing() {
            let message =
                "cannot take memory into the stock while a CUDA graph is being captured; end the capture first";
            return Err(Error::new(Status::Capturing, message));
        }
        let granularity = heap.granularity(device)?;
        let bytes = bytes.checked_next_multiple_of(granularity).unwrap_or(u64::MAX);
        let piece = heap.settings.chunk.next_multiple_of(granularity);
        let doing = "take memory into the stock";
        if bytes > heap.driver.memory_info(device)?.total {
            return Err(heap.short_of(device, bytes, doing));
        }
        let done = heap.stock.grow(device, bytes, piece, grown).or_else(|_| {
            heap.reclaim();
            heap.stock.grow(device, bytes, piece, grown)
        });
        match done.map_err(Error::from) {
            Ok(()) => Ok(bytes),
            Err(error) if error.status == Status::OutOfDeviceMemory => Err(heap.short_of(device, bytes, doing)),
            Err(error) => Err(error),
        }
    }

    /// Wants `bytes` less (rounded down to the granularity) in the stock of `device`. What lies there goes back to the driver; what is in use
    /// stays in use, and goes back when it is given back.
    pub fn stock_down(&self, device: Device, bytes: u64) {
        let heap = &self.machine.heap;
        // Who has stocked anything up knows the granularity.
        if let Ok(granularity) = heap.granularity(device) {
            heap.stock.shrink(device, bytes - bytes % granularity);
        }
    }

    /// Somebody outside the engine, but in this process, is about to make `bytes` on `device`: they are to come out of the stock. Returns how many were
    /// made free for that: they are missing until they were [taken](Engine::stock_settle), or are [regained](Engine::stock_regain), and as long as neither
    /// is said they are kept for whoever is on his way. None are for more than the device has.
    #[must_use]
    pub fn stock_spend(&self, device: Device, bytes: u64) -> u64 {
        let heap = &self.machine.heap;
        if !self.has_stock() || heap.is_beyond(device, bytes) {
            return 0;
        }
        let rounded = heap.granularity(device).ok().and_then(|granularity| bytes.checked_next_multiple_of(granularity));
        heap.stock.spend(device, rounded.unwrap_or(0))
    }

    /// What was made free was taken, and counts as the stock's until it is [let go](Engine::stock_let_go).
    pub fn stock_settle(&self, device: Device, bytes: u64) {
        self.machine.heap.stock.settle(device, bytes);
    }

    /// What was made free was taken by something whose end nobody hears: it is missing until anything is [regained](Engine::stock_regain) and it is free
    /// again.
    pub fn stock_give_up(&self, device: Device, bytes: u64) {
        self.machine.heap.stock.give_up(device, bytes);
    }

    /// What was taken is about to be freed. Returns how many bytes are missing from now on, until they are [regained](Engine::stock_regain).
    #[must_use]
    pub fn stock_let_go(&self, device: Device, bytes: u64) -> u64 {
        self.machine.heap.stock.let_go(device, bytes)
    }

    /// `watch` is told, by whoever causes it and with no lock held, that bytes of a device's stock are about to go to the driver, or have come back,
    /// and can ask how many are missing. Only the first who asks for it is told.
    pub fn stock_watch(&self, watch: Watch) {
        self.machine.heap.stock.watch(watch);
    }

    /// What was missing is free again, and goes back into the stock; with it what else is missing, unless somebody else is on his way to take it.
    pub fn stock_regain(&self, device: Device, bytes: u64) {
        self.machine.heap.stock.regain(device, bytes);
    }

    /// Whether anything was ever taken into a stock. Wait-free.
    #[must_use]
    pub fn has_stock(&self) -> bool {
        self.machine.heap.stock.is_used()
    }

    /// What is known of the stock of `device`.
    #[must_use]
    pub fn stocked(&self, device: Device) -> Stocked {
        self.machine.heap.stock.figures(device)
    }

    /// Free and total memory of `device`, all processes together; what lies in the stock is not free.
    ///
    /// # Errors
    /// The driver's.
    pub fn memory_of(&self, device: Device) -> Result<MemoryInfo> {
        Ok(self.machine.heap.stock.next().memory_info(device)?)
    }

    /// How often [`Engine::cancel`] was called: waits that the engine knows nothing of end when this changes.
    #[must_use]
    pub fn cancels(&self) -> u64 {
        self.machine.cancels.load(Ordering::SeqCst)
    }
}
