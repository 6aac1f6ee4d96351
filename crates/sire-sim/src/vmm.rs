//! Virtual-memory management, as the CUDA manual states it: reservations, physicals, mappings, access.

use crate::core::locked;
use crate::error::{Code, Result};
use crate::ipc::SHARE;
use crate::ledger::Api;
use crate::machine::Machine;
use crate::memory::{Physical, os_error};
use crate::space::Maker;
use crate::sys;
use crate::types::{AccessDesc, PhysicalId, PhysicalInfo, Prot};
use std::collections::HashMap;
use std::os::fd::IntoRawFd;
use std::sync::{Arc, Weak};

/// The live handles of physicals.
#[derive(Debug, Default)]
pub struct Handles {
    live: HashMap<PhysicalId, Handle>,
    exports: HashMap<u64, Weak<Physical>>,
    last: u64,
}

#[derive(Debug)]
struct Handle {
    physical: Arc<Physical>,
    count: u32,
}

impl Handles {
    /// The handle of a physical, counted once more; the one it has, or a new one.
    fn hold(&mut self, physical: Arc<Physical>, fresh: bool) -> PhysicalId {
        if !fresh {
            physical.note(1);
            if let Some((id, handle)) =
                self.live.iter_mut().find(|(_, handle)| Arc::ptr_eq(&handle.physical, &physical))
            {
                handle.count += 1;
                return *id;
            }
        }
        self.last += 1;
        let id = PhysicalId(0x5151_0000_0000 + self.last);
        self.live.insert(id, Handle { physical, count: 1 });
        id
    }

    /// Drops all handles.
    pub fn clear(&mut self) {
        self.live.clear();
    }
}

/// Virtual memory.
impl Machine {
    /// Reserves addresses. `align` 0: the granularity. `hint` 0: anywhere (and a hint may be ignored).
    ///
    /// # Errors
    /// `INVALID_VALUE` for a size that is no multiple of the granularity, or an alignment that is no power of two; `OUT_OF_MEMORY`.
    pub fn reserve(&self, size: u64, align: u64, hint: u64) -> Result<u64> {
        self.core().check_open()?;
        let addr = self.core().space_mut().reserve(size, align, hint, Maker::Vmm)?;
        self.account(|clock| clock.reserved(size));
        Ok(addr)
    }

    /// Gives back a whole reservation.
    ///
    /// # Errors
    /// `INVALID_VALUE` if it is not one, or something is mapped in it.
    pub fn unreserve(&self, addr: u64, size: u64) -> Result<()> {
        self.core().check_open()?;
        self.core().space_mut().unreserve(addr, size, Maker::Vmm)?;
        self.account(|clock| clock.reserved(size));
        Ok(())
    }

    /// Makes physical memory. `tag` is given back by [`Machine::physical_info`] and shown in the census.
    ///
    /// # Errors
    /// `INVALID_VALUE` for a size that is no multiple of the granularity; `OUT_OF_MEMORY` beyond the budget.
    pub fn create(&self, device: u32, size: u64, tag: u64) -> Result<PhysicalId> {
        self.core().check_alive(device)?;
        let memory = self.core().memory(device)?;
        if size == 0 || !size.is_multiple_of(memory.frame) {
            return Err(
                Code::INVALID_VALUE.because(format!("create of {size} bytes: sizes are multiples of {}", memory.frame))
            );
        }
        let physical = memory.create(size, Api::Create, tag)?;
        let id = locked(self.handles()).hold(physical, true);
        self.account(|clock| clock.created(id, device, size));
        Ok(id)
    }

    /// Drops one count of the handle; the memory goes when no handle and no mapping is left.
    ///
    /// # Errors
    /// `INVALID_VALUE` if the handle is not live.
    pub fn release(&self, physical: PhysicalId) -> Result<()> {
        self.core().check_open()?;
        let mut handles = locked(self.handles());
        let handle = handles.live.get_mut(&physical).ok_or_else(|| dead(physical))?;
        handle.count -= 1;
        handle.physical.note(-1);
        let dead = handle.count == 0;
        let last = if dead { handles.live.remove(&physical) } else { None };
        drop(handles);
        let freed = last.as_ref().and_then(|handle| freed_with(&handle.physical));
        drop(last);
        self.account(|clock| clock.released(physical, dead, freed));
        Ok(())
    }

    /// The handle of what is mapped at `addr`, counted once more.
    ///
    /// # Errors
    /// `INVALID_VALUE` if nothing is mapped there.
    pub fn retain(&self, addr: u64) -> Result<PhysicalId> {
        self.core().check_open()?;
        let space = self.core().space();
        let (_, mapping) =
            space.mapping(addr).filter(|(_, mapping)| mapping.maker == Maker::Vmm).ok_or_else(|| nothing_at(addr))?;
        let physical = Arc::clone(&mapping.physical);
        drop(space);
        Ok(locked(self.handles()).hold(physical, false))
    }

    /// What the physical is.
    ///
    /// # Errors
    /// `INVALID_VALUE` if the handle is not live.
    pub fn physical_info(&self, physical: PhysicalId) -> Result<PhysicalInfo> {
        let found = self.physical(physical)?;
        Ok(PhysicalInfo { device: found.memory.device, size: found.size, tag: found.tag })
    }

    fn physical(&self, physical: PhysicalId) -> Result<Arc<Physical>> {
        self.core().check_open()?;
        locked(self.handles())
            .live
            .get(&physical)
            .map(|handle| Arc::clone(&handle.physical))
            .ok_or_else(|| dead(physical))
    }

    /// Maps the whole physical inside one reservation where nothing is mapped. No device has access yet.
    ///
    /// # Errors
    /// `INVALID_VALUE` as the manual says; `OUT_OF_MEMORY` if the system has no more maps.
    pub fn map(&self, addr: u64, size: u64, offset: u64, physical: PhysicalId) -> Result<()> {
        if offset != 0 {
            return Err(Code::INVALID_VALUE.because(format!("map with offset {offset}: only 0 is allowed")));
        }
        self.maybe_unsafe_call()?;
        let (id, physical) = (physical, self.physical(physical)?);
        self.core().check_alive(physical.memory.device)?;
        self.core().space_mut().map(addr, size, &physical, Maker::Vmm)?;
        self.account(|clock| clock.mapped(addr, size, id));
        Ok(())
    }

    /// Removes exactly one mapping; the addresses stay reserved.
    ///
    /// # Errors
    /// `INVALID_VALUE` if the range is not one mapping.
    pub fn unmap(&self, addr: u64, size: u64) -> Result<()> {
        self.core().check_open()?;
        self.maybe_unsafe_call()?;
        let home = self.core().space().mapping(addr).map(|(_, mapping)| mapping.physical.memory.device);
        if let Some(device) = home {
            self.core().check_alive(device)?;
            if self.core().options.unmap_syncs {
                self.drain(device);
            }
        }
        let physical = self.core().space_mut().unmap(addr, size, Maker::Vmm)?;
        let freed = freed_with(&physical);
        drop(physical);
        self.account(|clock| clock.unmapped(addr, size, freed));
        Ok(())
    }

    /// Removes all mappings of a range that whole mappings fill, as CUDA does it: llama.cpp's pools, and NVIDIA's own samples, unmap at once what
    /// they have mapped piece by piece.
    ///
    /// # Errors
    /// `INVALID_VALUE` if it is not mapped throughout, or cuts a mapping; then nothing has changed.
    pub fn unmap_range(&self, addr: u64, size: u64) -> Result<()> {
        self.core().check_open()?;
        let whole = self.core().space().filling(addr, size, Maker::Vmm)?;
        whole.into_iter().try_for_each(|(addr, size)| self.unmap(addr, size))
    }

    /// Sets the rights of devices on a range that whole mappings fill.
    ///
    /// # Errors
    /// `INVALID_VALUE` if it is not mapped throughout; `INVALID_DEVICE`.
    pub fn set_access(&self, addr: u64, size: u64, access: &[AccessDesc]) -> Result<()> {
        self.core().check_open()?;
        self.maybe_unsafe_call()?;
        if access.is_empty() {
            return Err(Code::INVALID_VALUE.because("access for no device"));
        }
        for desc in access {
            self.core().check_alive(desc.device)?;
        }
        self.core().space_mut().set_access(addr, size, access, Maker::Vmm)?;
        self.account(|clock| clock.access_set(addr, size));
        Ok(())
    }

    /// The rights of `device` at `addr`.
    ///
    /// # Errors
    /// `INVALID_VALUE` if nothing is mapped there.
    pub fn get_access(&self, addr: u64, device: u32) -> Result<Prot> {
        self.core().check_open()?;
        self.core().memory(device)?;
        self.core().space().mapping(addr).map(|(_, mapping)| mapping.prot(device)).ok_or_else(|| nothing_at(addr))
    }

    /// Start and size of the allocation or mapping at `addr`.
    ///
    /// # Errors
    /// `NOT_FOUND` if nothing is there.
    pub fn address_range(&self, addr: u64) -> Result<(u64, u64)> {
        self.core().check_open()?;
        let info = self.pointer(addr);
        if info.size == 0 {
            return Err(Code::NOT_FOUND.because(format!("{addr:#x} is not memory that the devices know")));
        }
        Ok((info.base, info.size))
    }

    /// A file descriptor that stands for the physical, for every process of the environment; the caller closes it. While no handle and
    /// no mapping of it is left anywhere, it stands for nothing (a real driver's keeps the memory).
    ///
    /// # Errors
    /// `INVALID_VALUE` if the handle is not live.
    pub fn export_physical(&self, physical: PhysicalId) -> Result<i32> {
        let found = self.physical(physical)?;
        let share = self.share(&found)?;
        let mut handles = locked(self.handles());
        handles.exports.retain(|_, weak| weak.strong_count() > 0);
        handles.last += 1;
        let key = handles.last;
        handles.exports.insert(key, Arc::downgrade(&found));
        drop(handles);
        let text = format!("{}{share}", self.ticket(key));
        let fd = sys::memfd(0).and_then(|fd| sys::write_at(&fd, text.as_bytes(), 0).map(|()| fd)).map_err(os_error)?;
        Ok(fd.into_raw_fd())
    }

    /// The physical that a descriptor of [`Machine::export_physical`] stands for, as a handle of its own count.
    ///
    /// # Errors
    /// `INVALID_VALUE` if it stands for none, or for one that is gone.
    pub fn import_physical(&self, fd: i32) -> Result<PhysicalId> {
        self.core().check_open()?;
        let wrong = || Code::INVALID_VALUE.because(format!("descriptor {fd} stands for no memory of this environment"));
        let text = std::fs::read_to_string(format!("/proc/self/fd/{fd}")).map_err(|_| wrong())?;
        let mut handles = locked(self.handles());
        let own = handles.exports.iter().find(|(key, _)| text.starts_with(&self.ticket(**key)));
        if let Some(own) = own.and_then(|(_, weak)| weak.upgrade()) {
            return Ok(handles.hold(own, false));
        }
        drop(handles);
        let share = text.split_once(SHARE).and_then(|(_, share)| share.parse().ok()).ok_or_else(wrong)?;
        let borrowed = self.borrow(&share).map_err(|error| Code::INVALID_VALUE.because(error.message))?;
        Ok(locked(self.handles()).hold(borrowed, true))
    }

    /// How the content of an exported descriptor begins: it names process, machine and export.
    fn ticket(&self, key: u64) -> String {
        let machine = std::ptr::from_ref(self.core()) as usize;
        format!("sire-sim physical {} {machine:#x} {key}{SHARE}", std::process::id())
    }
}

/// (device, bytes) that go back with this last reference; `None` if it is not the last.
fn freed_with(physical: &Arc<Physical>) -> Option<(u32, u64)> {
    (Arc::strong_count(physical) == 1 && !physical.borrowed).then(|| (physical.memory.device, physical.size))
}

fn dead(physical: PhysicalId) -> crate::error::SimError {
    Code::INVALID_VALUE.because(format!("physical {:#x} is not live", physical.0))
}

fn nothing_at(addr: u64) -> crate::error::SimError {
    Code::INVALID_VALUE.because(format!("nothing is mapped at {addr:#x}"))
}
