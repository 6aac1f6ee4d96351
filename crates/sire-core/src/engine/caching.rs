//! The engine as a caching allocator: for programs that allocate far more often than a driver should be asked, such as PyTorch with every tensor.

use super::{Engine, RegionId, Request, Reuse};
use crate::driver::{Addr, Device, ProgramStream};
use crate::error::{Error, Result, Status};
use crate::sync::Ordering;
use crate::trace::{self, Event};
use serde::Serialize;

/// A private pool: its blocks serve nobody else as long as it lives. `NONE` is the memory that all share.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct PoolNumber(u32);

impl PoolNumber {
    /// No private pool.
    pub const NONE: PoolNumber = PoolNumber(0);
}

/// A segment of the snapshot, with what only the engine knows.
#[derive(Serialize)]
struct TaggedSegment {
    #[serde(flatten)]
    segment: crate::cache::Segment,
    tag: String,
}

impl Engine {
    /// Device memory from a cache. Blocks are multiples of 512 bytes and start at multiples of 512; what was freed is given out again to the same
    /// region, stream and pool, without a driver call. Where the cache has to grow and memory is short, what it holds free goes back first, then what was only
    /// cached elsewhere, then what paused regions hold lazily. In a region that is [whole](crate::engine::Policy::whole) it is as [`Engine::allocate`].
    ///
    /// # Errors
    /// As [`Engine::allocate`].
    pub fn allocate_cached(&self, request: Request, pool: PoolNumber) -> Result<Addr> {
        let is_possible = (1..crate::heap::LARGEST).contains(&request.size);
        let ready = is_possible.then(|| self.machine.heap.take_cached(&request, pool.0)).flatten();
        let outcome = ready.map_or_else(|| self.grow_cache(&request, pool), Ok);
        if outcome.is_ok() {
            self.allocated.fetch_add(1, Ordering::Relaxed);
        }
        self.trace.record(|| trace::allocation(&request, &outcome));
        outcome
    }

    #[cold]
    fn grow_cache(&self, request: &Request, pool: PoolNumber) -> Result<Addr> {
        if request.size == 0 {
            return Err(Error::new(Status::InvalidArgument, "an allocation of 0 bytes was asked for"));
        }
        let heap = &self.machine.heap;
        let region = self.machine.regions.get(request.region)?;
        let _admission = region.admit("allocate in")?;
        if request.size >= crate::heap::LARGEST {
            let what = format!("allocate in region '{}'", region.tag);
            return Err(heap.short_of(request.device, request.size, &what));
        }
        let grow = || match heap.take_cached(request, pool.0) {
            Some(ready) => Ok(ready),
            // What lies in pieces is not whole.
            None if region.policy.whole => heap.allocate(request, &region),
            None => heap.allocate_cached(request, pool.0, &region),
        };
        let outcome = self.or_make_way(request, &region, grow);
        if outcome.as_ref().is_err_and(|error| error.status == Status::OutOfDeviceMemory) {
            heap.depot(request.device)?.counts(|counts| counts.out_of_memory += 1);
        }
        if !request.capturing {
            self.machine.make_ready(&region, request.device);
        }
        outcome
    }

    /// As [`Engine::free`], of a cached block whose reuse has to wait as `reuse` says.
    ///
    /// # Errors
    /// As [`Engine::free`].
    pub fn free_cached(&self, addr: Addr, reuse: Reuse, capturing: bool) -> Result<()> {
        // Before it happens: nobody can be given the address, and be recorded, earlier.
        self.trace.record(|| Event::Free { addr: addr.0 });
        match self.machine.heap.free_cached(addr, reuse, capturing) {
            Some(freed) => freed?,
            None => self.machine.heap.free(addr, capturing)?,
        }
        self.freed.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// As [`Engine::free_cached`], if `addr` lies in memory of a cache; else `None`: nothing was done, nor `reuse` asked.
    #[inline]
    pub fn free_if_cached(&self, addr: Addr, reuse: impl FnOnce() -> Reuse, capturing: bool) -> Option<Result<()>> {
        let heap = &self.machine.heap;
        let depot = heap.cache_of(addr)?;
        self.trace.record(|| Event::Free { addr: addr.0 });
        let freed = heap.free_in(depot, addr, reuse(), capturing);
        if freed.is_ok() {
            self.freed.fetch_add(1, Ordering::Relaxed);
        }
        Some(freed)
    }

    /// Whether `addr` lies in memory of a cache. Wait-free.
    #[must_use]
    pub fn caches(&self, addr: Addr) -> bool {
        self.machine.heap.cache_of(addr).is_some()
    }

    /// `stream` uses the cached block at `addr`, too: when it is freed, it is not given out again before what the stream has been given until
    /// then is done. False if `addr` is the start of no cached block.
    pub fn record_stream(&self, addr: Addr, stream: ProgramStream) -> bool {
        self.machine.heap.cache_of(addr).is_some_and(|depot| depot.record(addr, stream))
    }

    /// Holds the private pool that the program calls `id`, once more; it is made if there is none. For allocations that a graph replays: what is
    /// freed in the pool serves only the pool, and its memory stays until it was released as often as it was held.
    ///
    /// # Errors
    /// `InvalidArgument` if there is no such device; the driver's.
    pub fn hold_pool(&self, device: Device, id: (u64, u64)) -> Result<PoolNumber> {
        Ok(PoolNumber(self.machine.heap.depot(device)?.hold_pool(id)))
    }

    /// Releases it once. False if there is no such pool.
    pub fn release_pool(&self, device: Device, id: (u64, u64)) -> bool {
        self.machine.heap.depot(device).is_ok_and(|depot| depot.release_pool(id))
    }

    /// Gives the driver what caches hold free. Returns how many bytes. Not to be called during a capture (nothing happens then).
    pub fn empty_caches(&self) -> u64 {
        self.machine.heap.trim_caches()
    }

    /// The most memory that the cache of a device may hold, as a part of what the device has: 1 or more is no limit. What is paused counts like what is not:
    /// it comes back.
    ///
    /// # Errors
    /// `InvalidArgument` for a number below 0 or no number; the driver's.
    pub fn set_memory_fraction(&self, device: Device, fraction: f64) -> Result<()> {
        if fraction.is_nan() || fraction < 0.0 {
            return Err(Error::new(Status::InvalidArgument, format!("{fraction} is no part of a device's memory")));
        }
        let total = self.machine.heap.driver.memory_info(device)?.total;
        let limit = (fraction < 1.0).then_some((fraction * total as f64) as u64);
        self.machine.heap.depot(device)?.set_limit(limit);
        Ok(())
    }

    /// What the cache of a device counts, as a JSON object with the names of `torch.cuda.memory_stats`.
    ///
    /// # Errors
    /// `InvalidArgument` if there is no such device; the driver's.
    pub fn memory_stats_json(&self, device: Device) -> Result<String> {
        let named = self.machine.heap.depot(device)?.counts(|counts| counts.named());
        Ok(serde_json::to_string(&named).unwrap_or_default())
    }

    /// The most that there has been is from now on what there is now; with `accumulated`, what has come and gone is counted anew instead.
    ///
    /// # Errors
    /// `InvalidArgument` if there is no such device; the driver's.
    pub fn reset_memory_stats(&self, device: Device, accumulated: bool) -> Result<()> {
        self.machine
            .heap
            .depot(device)?
            .counts(|counts| if accumulated { counts.reset_accumulated() } else { counts.reset_peaks() });
        Ok(())
    }

    /// Every segment and block of every cache, as a JSON list in the shape of `torch.cuda.memory_snapshot`, with the region's `tag`.
    #[must_use]
    pub fn memory_snapshot_json(&self) -> String {
        let tag = |region| self.machine.regions.get(RegionId(region)).map_or_else(|_| String::new(), |r| r.tag.clone());
        let segments = self.machine.heap.caches().flat_map(|depot| depot.segments());
        let tagged: Vec<TaggedSegment> =
            segments.map(|segment| TaggedSegment { tag: tag(segment.region), segment }).collect();
        serde_json::to_string(&tagged).unwrap_or_default()
    }
}
