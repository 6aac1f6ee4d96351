//! What the program says about ranges of its memory: what a pause saves whatever the policy, throws away or leaves, and what
//! has changed.

use super::Engine;
use crate::driver::Addr;
use crate::error::{Error, Result, Status};
use crate::extent::Extent;
use crate::ranges::Ranges;
use crate::trace::{self, Event};
use std::ops::Range;
use std::sync::Arc;

impl Engine {
    /// Backs up `[addr, addr + len)` whatever the region's policy.
    ///
    /// # Errors
    /// `UnknownAddress` unless the range lies inside one allocation.
    pub fn keep(&self, addr: Addr, len: u64) -> Result<()> {
        self.set_override(addr, len, true)
    }

    /// Throws `[addr, addr + len)` away in a pause, whatever the region's policy.
    ///
    /// # Errors
    /// `UnknownAddress` unless the range lies inside one allocation.
    pub fn discard(&self, addr: Addr, len: u64) -> Result<()> {
        self.set_override(addr, len, false)
    }

    /// Says that the program has written to `[addr, addr + len)` of a region whose content is declared not to change: the
    /// next pause copies it again.
    ///
    /// # Errors
    /// `UnknownAddress` unless the range lies inside one allocation.
    pub fn changed(&self, addr: Addr, len: u64) -> Result<()> {
        let note =
            |parts: Vec<Part>| parts.into_iter().for_each(|part| part.extent.note_changed(&Ranges::of(part.range)));
        let outcome = self.parts(addr, len).map(note);
        self.trace.record(|| Event::Changed { addr: addr.0, len, status: trace::status(&outcome) });
        outcome
    }

    /// From now on no pause takes the memory of the allocation that holds `addr`, until it is freed: it stays on the device, at the cost
    /// of its bytes, while the rest of its region goes. A small allocation takes its neighbours in the same slab with it, memory that the program
    /// maps itself takes what is mapped side by side with it. Returns the allocation's bytes; saying it again changes nothing.
    ///
    /// # Errors
    /// `UnknownAddress` if no live allocation holds it; `Paused` or `Busy` if its region is not resident.
    pub fn keep_resident(&self, addr: Addr) -> Result<u64> {
        let outcome = self.hold(addr);
        self.trace.record(|| Event::KeepResident { addr: addr.0, status: trace::status(&outcome) });
        outcome
    }

    fn hold(&self, addr: Addr) -> Result<u64> {
        let mut bytes = self.hold_one(addr)?;
        let Some((first, size)) = self.segments.mapping(addr) else { return Ok(bytes) };
        // A tensor knows no borders between the program's mappings: what lies beside, without a gap, stays too.
        let mut above = first.offset(size);
        while let Some((base, size)) = self.segments.mapping(above) {
            bytes += self.hold_one(base)?;
            above = base.offset(size);
        }
        let mut below = first;
        while let Some((base, _)) = below.0.checked_sub(1).and_then(|at| self.segments.mapping(Addr(at))) {
            bytes += self.hold_one(base)?;
            below = base;
        }
        Ok(bytes)
    }

    fn hold_one(&self, addr: Addr) -> Result<u64> {
        let (extent, base, size) = self.find(addr).ok_or_else(|| in_no_allocation(addr, 1))?;
        if extent.cached.is_some() {
            return self.hold_cached(&extent, base, size);
        }
        let whole = base.0 - extent.base.0..base.0 - extent.base.0 + size;
        if extent.stays_resident(&whole) {
            return Ok(size);
        }
        let region = self.machine.regions.get(extent.region)?;
        // A pause that was waiting for this finds the extent marked.
        let _admission = region.admit("keep memory resident in")?;
        extent.keep_resident(whole.clone());
        if extent.allocation(addr) != Some((base, size)) {
            extent.clear_override(&whole);
            return Err(in_no_allocation(addr, 1));
        }
        self.machine.drop_backups(&extent);
        Ok(size)
    }

    /// The pieces of a cache in which the block lies stay.
    fn hold_cached(&self, extent: &Arc<Extent>, base: Addr, size: u64) -> Result<u64> {
        let region = self.machine.regions.get(extent.region)?;
        let _admission = region.admit("keep memory resident in")?;
        for part in self.parts_remarked(base, size)? {
            part.extent.keep_resident(part.range);
            self.machine.drop_backups(&part.extent);
        }
        Ok(size)
    }

    fn set_override(&self, addr: Addr, len: u64, keep: bool) -> Result<()> {
        let set = |parts: Vec<Part>| parts.into_iter().for_each(|part| part.extent.set_override(&part.range, keep));
        let outcome = self.parts_remarked(addr, len).map(set);
        self.trace.record(|| Event::Override { addr: addr.0, len, keep, status: trace::status(&outcome) });
        outcome
    }

    /// `[addr, addr + len)` as offsets of its extent; of several that lie side by side, where the program maps memory itself.
    pub(super) fn parts(&self, addr: Addr, len: u64) -> Result<Vec<Part>> {
        let nowhere = || in_no_allocation(addr, len);
        let end = addr.0.checked_add(len).ok_or_else(nowhere)?;
        let mut parts: Vec<Part> = Vec::new();
        let mut at = addr.0;
        loop {
            let (extent, base, size) = self.find(Addr(at)).ok_or_else(nowhere)?;
            let reached = end.min(base.0 + size);
            let (start, whole) = (extent.base.0, base.0 + size);
            // A block of a cache may lie in several pieces, but nothing lies in several blocks.
            let reached = reached.min(extent.addresses().end);
            let may_go_on = extent.mapping.is_some() || (extent.cached.is_some() && reached < whole);
            parts.push(Part { extent, range: at - start..reached - start });
            match reached == end {
                true => return Ok(parts),
                false if may_go_on => at = reached,
                false => return Err(nowhere()),
            }
        }
    }

    /// The same, of which something is about to be said: the free of a cached block takes it back.
    pub(super) fn parts_remarked(&self, addr: Addr, len: u64) -> Result<Vec<Part>> {
        if let Some(depot) = self.machine.heap.cache_of(addr) {
            depot.note_remarks();
        }
        self.parts(addr, len)
    }
}

pub(super) fn in_no_allocation(addr: Addr, len: u64) -> Error {
    let message = format!("{len} bytes at {addr:?} do not lie inside one live allocation of Sire's");
    Error::new(Status::UnknownAddress, message)
}

/// A part of a range of addresses: offsets of one extent.
pub(super) struct Part {
    pub(super) extent: Arc<Extent>,
    pub(super) range: Range<u64>,
}
