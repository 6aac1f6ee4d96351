//! Addresses of the devices: arenas that the process reserves from the system, the reservations cut
//! from them, and what is mapped where. Pure bookkeeping plus the system calls that make it true; every
//! function checks everything before it changes anything.

use crate::error::{Code, Result};
use crate::in_use::InUse;
use crate::memory::Physical;
use crate::sys;
use crate::types::{AccessDesc, Prot};
use std::collections::BTreeMap;
use std::sync::Arc;

const FIRST_ARENA: u64 = 64 << 30;

/// Who made a reservation or mapping.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Maker {
    /// `cuMemAddressReserve`, `cuMemMap`.
    Vmm,
    /// `cudaMalloc`.
    Heap,
    /// `cudaIpcOpenMemHandle`.
    Opened,
}

#[derive(Debug)]
struct Reservation {
    size: u64,
    maker: Maker,
}

/// A physical at an address.
#[derive(Debug)]
pub struct Mapping {
    /// Bytes.
    pub size: u64,
    /// What.
    pub physical: Arc<Physical>,
    /// Who made it.
    pub maker: Maker,
    /// Who touches its bytes.
    pub in_use: Arc<InUse>,
    access: Vec<AccessDesc>,
}

impl Mapping {
    /// The rights of `device`.
    pub fn prot(&self, device: u32) -> Prot {
        self.access.iter().find(|desc| desc.device == device).map_or(Prot::None, |desc| desc.prot)
    }
}

/// Everything that has a device address. See the module's documentation.
#[derive(Debug)]
pub struct Space {
    granularity: u64,
    arenas: Vec<(u64, u64)>,
    free: BTreeMap<u64, u64>,
    reservations: BTreeMap<u64, Reservation>,
    mappings: BTreeMap<u64, Mapping>,
    generation: u64,
}

impl Space {
    /// No addresses yet.
    pub fn new(granularity: u64) -> Space {
        let (arenas, free, reservations, mappings) = Default::default();
        Space { granularity, arenas, free, reservations, mappings, generation: sys::generation() }
    }

    /// Whether the address belongs to the devices (reserved or not, mapped or not).
    pub fn contains(&self, addr: u64) -> bool {
        self.arenas.iter().any(|(base, size)| addr >= *base && addr - base < *size)
    }

    /// Cuts `size` bytes of addresses, aligned.
    pub fn reserve(&mut self, size: u64, align: u64, hint: u64, maker: Maker) -> Result<u64> {
        let align = if align == 0 { self.granularity } else { align.max(self.granularity) };
        if size == 0 || !size.is_multiple_of(self.granularity) || !align.is_power_of_two() {
            return Err(Code::INVALID_VALUE.because(format!(
                "reserve of {size} bytes aligned to {align}: sizes are multiples of {}",
                self.granularity
            )));
        }
        let start = match self.find(size, align, hint) {
            Some(start) => start,
            None => {
                self.grow(size, align)?;
                self.find(size, align, 0)
                    .ok_or_else(|| Code::OUT_OF_MEMORY.because("the address space is exhausted"))?
            }
        };
        self.cut(start, size);
        self.reservations.insert(start, Reservation { size, maker });
        Ok(start)
    }

    fn find(&self, size: u64, align: u64, hint: u64) -> Option<u64> {
        let fits =
            |start: u64, base: u64, len: u64| start >= base && start - base <= len && len - (start - base) >= size;
        if hint != 0 && hint.is_multiple_of(align) {
            let below = self.free.range(..=hint).next_back();
            if below.is_some_and(|(base, len)| fits(hint, *base, *len)) {
                return Some(hint);
            }
        }
        self.free
            .iter()
            .map(|(base, len)| (base.next_multiple_of(align), *base, *len))
            .find(|(start, base, len)| fits(*start, *base, *len))
            .map(|found| found.0)
    }

    fn grow(&mut self, size: u64, align: u64) -> Result<()> {
        let exhausted = || Code::OUT_OF_MEMORY.because(format!("the address space has no {size} bytes left"));
        let wanted = size.checked_add(align).filter(|bytes| *bytes < 1 << 47).ok_or_else(exhausted)?;
        let len = wanted.max(FIRST_ARENA << self.arenas.len().min(6)).next_multiple_of(self.granularity);
        let base = sys::reserve(len)
            .or_else(|_| sys::reserve(wanted.next_multiple_of(self.granularity)))
            .map_err(|_| exhausted())?;
        self.arenas.push((base, len));
        let start = base.next_multiple_of(self.granularity);
        self.join_free(start, (base + len - start) / self.granularity * self.granularity);
        Ok(())
    }

    fn cut(&mut self, start: u64, size: u64) {
        let Some((&base, &len)) = self.free.range(..=start).next_back() else { return };
        self.free.remove(&base);
        if start > base {
            self.free.insert(base, start - base);
        }
        if start + size < base + len {
            self.free.insert(start + size, base + len - start - size);
        }
    }

    fn join_free(&mut self, mut start: u64, mut size: u64) {
        if let Some((&base, &len)) = self.free.range(..start).next_back()
            && base + len == start
        {
            self.free.remove(&base);
            (start, size) = (base, len + size);
        }
        if let Some(len) = self.free.remove(&(start + size)) {
            size += len;
        }
        self.free.insert(start, size);
    }

    /// Gives a whole reservation back.
    pub fn unreserve(&mut self, addr: u64, size: u64, maker: Maker) -> Result<()> {
        let known = self.reservations.get(&addr).is_some_and(|found| found.size == size && found.maker == maker);
        if !known {
            return Err(Code::INVALID_VALUE.because(format!("{addr:#x} with {size} bytes is not a reservation")));
        }
        if self.mappings.range(addr..addr + size).next().is_some() {
            return Err(
                Code::INVALID_VALUE.because(format!("the reservation at {addr:#x} still has memory mapped in it"))
            );
        }
        self.reservations.remove(&addr);
        self.join_free(addr, size);
        Ok(())
    }

    fn reservation_of(&self, addr: u64, size: u64, maker: Maker) -> bool {
        let below = self.reservations.range(..=addr).next_back();
        below.is_some_and(|(base, found)| {
            found.maker == maker && addr - base < found.size && size <= found.size - (addr - base)
        })
    }

    fn aligned(&self, addr: u64, size: u64) -> Result<()> {
        if size == 0
            || !addr.is_multiple_of(self.granularity)
            || !size.is_multiple_of(self.granularity)
            || addr.checked_add(size).is_none()
        {
            return Err(Code::INVALID_VALUE.because(format!(
                "{addr:#x} with {size} bytes: address and size are multiples of {}",
                self.granularity
            )));
        }
        Ok(())
    }

    /// Maps the whole physical inside one reservation, where nothing is mapped; without access.
    pub fn map(&mut self, addr: u64, size: u64, physical: &Arc<Physical>, maker: Maker) -> Result<()> {
        self.aligned(addr, size)?;
        if size != physical.size {
            return Err(Code::INVALID_VALUE
                .because(format!("map of {size} bytes: the physical has {}, and is mapped whole", physical.size)));
        }
        if !self.reservation_of(addr, size, maker) {
            return Err(Code::INVALID_VALUE
                .because(format!("map at {addr:#x}: {size} bytes there are not inside one reservation")));
        }
        let below = self.mappings.range(..addr + size).next_back();
        if below.is_some_and(|(base, mapping)| base + mapping.size > addr) {
            return Err(Code::INVALID_VALUE.because(format!("map at {addr:#x}: something is mapped there already")));
        }
        if let Err(error) = physical.map_at(addr) {
            // Part of the range may be mapped; a fresh reservation over all of it needs no more maps than before.
            let _ = sys::clear(addr, size);
            return Err(Code::OUT_OF_MEMORY.because(format!(
                "map at {addr:#x}: the operating system refused ({error}); vm.max_map_count may be reached"
            )));
        }
        physical.note(1);
        let (physical, in_use) = (Arc::clone(physical), Arc::default());
        self.mappings.insert(addr, Mapping { size, physical, maker, in_use, access: Vec::new() });
        Ok(())
    }

    /// Removes exactly one mapping, once nothing touches its bytes. The physical comes back, so that its memory is given up
    /// outside the caller's lock.
    pub fn unmap(&mut self, addr: u64, size: u64, maker: Maker) -> Result<Arc<Physical>> {
        let known = self.mappings.get(&addr).filter(|found| found.size == size && found.maker == maker);
        let Some(mapping) = known else {
            return Err(Code::INVALID_VALUE.because(format!("{addr:#x} with {size} bytes is not one whole mapping")));
        };
        mapping.in_use.wait_idle();
        sys::clear(addr, size).map_err(|error| {
            Code::UNKNOWN.because(format!("unmap at {addr:#x}: the operating system refused ({error})"))
        })?;
        let Some(mapping) = self.mappings.remove(&addr) else {
            return Err(Code::UNKNOWN.because("the mapping vanished"));
        };
        mapping.physical.note(-1);
        Ok(mapping.physical)
    }

    /// The mappings of a range that is mapped throughout and begins and ends with mappings: where they begin, and their sizes.
    pub fn filling(&self, addr: u64, size: u64, maker: Maker) -> Result<Vec<(u64, u64)>> {
        self.aligned(addr, size)?;
        let (mut found, mut at) = (Vec::new(), addr);
        while at < addr + size {
            let mapping = self.mappings.get(&at).filter(|one| one.maker == maker && one.size <= addr + size - at);
            let Some(mapping) = mapping else {
                return Err(Code::INVALID_VALUE
                    .because(format!("{addr:#x} with {size} bytes: nothing whole is mapped at {at:#x}")));
            };
            found.push((at, mapping.size));
            at += mapping.size;
        }
        Ok(found)
    }

    /// Sets rights on a range that is mapped throughout and begins and ends with mappings.
    pub fn set_access(&mut self, addr: u64, size: u64, access: &[AccessDesc], maker: Maker) -> Result<()> {
        self.filling(addr, size, maker)?;
        let mut changed: Vec<(u64, u64, Vec<AccessDesc>)> = Vec::new();
        for (base, mapping) in self.mappings.range(addr..addr + size) {
            let merged = merge(&mapping.access, access);
            mapping.in_use.wait_idle();
            if let Err(error) = protect(*base, mapping.size, &merged) {
                self.restore(&changed, *base);
                return Err(
                    Code::UNKNOWN.because(format!("access for {base:#x}: the operating system refused ({error})"))
                );
            }
            changed.push((*base, mapping.size, merged));
        }
        for (base, _, merged) in changed {
            if let Some(mapping) = self.mappings.get_mut(&base) {
                mapping.access = merged;
            }
        }
        Ok(())
    }

    /// Puts the processor's rights back to what the table says.
    fn restore(&self, changed: &[(u64, u64, Vec<AccessDesc>)], failed: u64) {
        for base in changed.iter().map(|(base, ..)| *base).chain([failed]) {
            if let Some(mapping) = self.mappings.get(&base) {
                // Nothing better can be done than to try.
                let _ = protect(base, mapping.size, &mapping.access);
            }
        }
    }

    /// The mapping that holds `addr`, and where it begins.
    pub fn mapping(&self, addr: u64) -> Option<(u64, &Mapping)> {
        let (base, mapping) = self.mappings.range(..=addr).next_back()?;
        (addr - base < mapping.size).then_some((*base, mapping))
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        self.mappings.clear();
        if self.generation == sys::generation() {
            self.arenas.iter().for_each(|(base, len)| sys::unmap(*base, *len));
        }
    }
}

fn merge(old: &[AccessDesc], new: &[AccessDesc]) -> Vec<AccessDesc> {
    let mut merged = old.to_vec();
    for desc in new {
        match merged.iter_mut().find(|have| have.device == desc.device) {
            Some(have) => have.prot = desc.prot,
            None => merged.push(*desc),
        }
    }
    merged.retain(|desc| desc.prot != Prot::None);
    merged
}

fn protect(addr: u64, size: u64, access: &[AccessDesc]) -> std::io::Result<()> {
    let prot = access.iter().map(|desc| desc.prot).max().unwrap_or(Prot::None);
    sys::protect(addr, size, prot >= Prot::Read, prot == Prot::ReadWrite)
}
