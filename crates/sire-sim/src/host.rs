//! Host memory that the devices know: pinned (made here), registered (made elsewhere), managed.
//! Pinned memory is an honest anonymous mapping with every page present: neither cheaper nor dearer
//! than what a program could make itself. Registering makes the pages present that are not yet.

use crate::core::locked;
use crate::error::{Code, Result};
use crate::machine::Machine;
use crate::sys;
use crate::types::{PointerInfo, PointerKind};
use std::collections::BTreeMap;

#[derive(Clone, Copy, Debug)]
struct HostRange {
    size: u64,
    mapped: u64,
    kind: PointerKind,
    flags: u32,
    device: u32,
}

/// All known host ranges, by address.
#[derive(Debug, Default)]
pub struct HostTable {
    ranges: BTreeMap<u64, HostRange>,
}

impl HostTable {
    fn range_of(&self, ptr: u64) -> Option<(u64, &HostRange)> {
        let (base, range) = self.ranges.range(..=ptr).next_back()?;
        (ptr - base < range.size).then_some((*base, range))
    }

    /// Whether the devices know the whole range.
    pub fn covers(&self, ptr: u64, len: u64) -> bool {
        let mut at = ptr;
        let Some(end) = ptr.checked_add(len.max(1)) else { return false };
        while at < end {
            match self.range_of(at) {
                Some((base, range)) => at = base + range.size,
                None => return false,
            }
        }
        true
    }

    fn overlaps(&self, ptr: u64, len: u64) -> bool {
        let below = self.ranges.range(..ptr.saturating_add(len)).next_back();
        below.is_some_and(|(base, range)| base + range.size > ptr)
    }

    /// What is known about a pointer.
    pub fn info(&self, ptr: u64) -> Option<PointerInfo> {
        let (base, range) = self.range_of(ptr)?;
        Some(PointerInfo {
            kind: range.kind,
            device: range.device,
            base,
            size: range.size,
            flags: range.flags,
            vmm: false,
        })
    }
}

impl Drop for HostTable {
    fn drop(&mut self) {
        for (base, range) in &self.ranges {
            if range.mapped > 0 {
                sys::unmap(*base, range.mapped);
            }
        }
    }
}

/// Host memory.
impl Machine {
    /// Page-locked host memory, made in the context of `device`; `flags` are given back by [`Machine::pointer`].
    ///
    /// # Errors
    /// `OUT_OF_MEMORY`; capture prohibitions.
    pub fn host_alloc(&self, device: u32, size: u64, flags: u32) -> Result<u64> {
        self.unsafe_call()?;
        self.host_map(size, flags, PointerKind::Pinned, device)
    }

    /// Memory that host and devices share (here: host memory that every device may touch).
    ///
    /// # Errors
    /// As [`Machine::host_alloc`].
    pub fn malloc_managed(&self, device: u32, size: u64) -> Result<u64> {
        self.core().check_alive(device)?;
        self.unsafe_call()?;
        self.host_map(size, 1, PointerKind::Managed, device)
    }

    fn host_map(&self, size: u64, flags: u32, kind: PointerKind, device: u32) -> Result<u64> {
        self.core().check_open()?;
        if size == 0 {
            return Err(Code::INVALID_VALUE.because("host memory of 0 bytes was asked for"));
        }
        let short = || Code::OUT_OF_MEMORY.because(format!("the host has no {size} bytes to pin"));
        let mapped = size.checked_next_multiple_of(sys::PAGE).ok_or_else(short)?;
        let base = sys::map_memory(mapped, kind == PointerKind::Pinned).map_err(|_| short())?;
        locked(&self.core().host).ranges.insert(base, HostRange { size, mapped, kind, flags, device });
        self.spend(|memory| memory.host_alloc, size);
        Ok(base)
    }

    /// Frees what `host_alloc` made. Waits for all devices first.
    ///
    /// # Errors
    /// `INVALID_VALUE` if it is not such a pointer.
    pub fn host_free(&self, ptr: u64) -> Result<()> {
        self.free_host_range(ptr, PointerKind::Pinned)
    }

    pub(crate) fn free_host_range(&self, ptr: u64, kind: PointerKind) -> Result<()> {
        self.core().check_open()?;
        self.unsafe_call()?;
        if ptr == 0 {
            return Ok(());
        }
        let known = |table: &HostTable| table.ranges.get(&ptr).is_some_and(|range| range.kind == kind);
        if !known(&locked(&self.core().host)) {
            return Err(Code::INVALID_VALUE.because(format!("{ptr:#x} is not the start of host memory of this kind")));
        }
        self.drain_devices();
        let mut table = locked(&self.core().host);
        if let Some(range) = table.ranges.get(&ptr).filter(|range| range.kind == kind).copied() {
            table.ranges.remove(&ptr);
            sys::unmap(ptr, range.mapped);
            self.spend(|memory| memory.host_free, range.size);
        }
        Ok(())
    }

    /// Makes a host range known to the devices, in the context of `device`.
    ///
    /// # Safety
    /// The range stays mapped until [`Machine::host_unregister`].
    ///
    /// # Errors
    /// `HOST_MEMORY_ALREADY_REGISTERED` if any of it is known already; `INVALID_VALUE` for nothing.
    pub unsafe fn host_register(&self, device: u32, ptr: u64, len: u64, flags: u32) -> Result<()> {
        self.core().check_open()?;
        self.unsafe_call()?;
        if ptr == 0 || len == 0 || ptr.checked_add(len).is_none() {
            return Err(Code::INVALID_VALUE.because(format!("register {len} bytes at {ptr:#x}: nothing is there")));
        }
        let mut table = locked(&self.core().host);
        if table.overlaps(ptr, len) {
            return Err(
                Code::HOST_MEMORY_ALREADY_REGISTERED.because(format!("host memory at {ptr:#x} is registered already"))
            );
        }
        table.ranges.insert(ptr, HostRange { size: len, mapped: 0, kind: PointerKind::Registered, flags, device });
        drop(table);
        sys::make_present(ptr, len);
        self.spend(|memory| memory.host_register, len);
        Ok(())
    }

    /// Undoes `host_register`.
    ///
    /// # Errors
    /// `HOST_MEMORY_NOT_REGISTERED` if `ptr` is not the start of a registered range.
    pub fn host_unregister(&self, ptr: u64) -> Result<()> {
        self.core().check_open()?;
        let mut table = locked(&self.core().host);
        let Some(size) = table.ranges.get(&ptr).filter(|range| range.kind == PointerKind::Registered).map(|r| r.size)
        else {
            return Err(Code::HOST_MEMORY_NOT_REGISTERED.because(format!("host memory at {ptr:#x} is not registered")));
        };
        table.ranges.remove(&ptr);
        drop(table);
        self.spend(|memory| memory.host_unregister, size);
        Ok(())
    }

    /// Gives up all host memory that was made or registered in the context of `device`. Nobody is waited for.
    pub(crate) fn end_host_ranges(&self, device: u32) {
        let mut table = locked(&self.core().host);
        table.ranges.retain(|base, range| {
            let stays = range.device != device;
            if !stays && range.mapped > 0 {
                sys::unmap(*base, range.mapped);
            }
            stays
        });
    }

    /// What a pointer points to. Never fails: what nobody knows is pageable host memory.
    #[must_use]
    pub fn pointer(&self, ptr: u64) -> PointerInfo {
        let pageable = PointerInfo { kind: PointerKind::Pageable, device: 0, base: ptr, size: 0, flags: 0, vmm: false };
        if !self.core().is_own_process() {
            return pageable;
        }
        if let Some(info) = self.device_pointer(ptr) {
            return info;
        }
        locked(&self.core().host).info(ptr).unwrap_or(pageable)
    }
}
