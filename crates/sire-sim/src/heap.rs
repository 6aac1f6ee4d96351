//! `cudaMalloc`'s heap: sizes up to half a frame are cut, in steps of 512 bytes, from blocks of one frame;
//! larger ones get frames of their own. An empty block goes back to the device.

use crate::core::{Core, locked};
use crate::error::{Code, Result};
use crate::ledger::Api;
use crate::machine::Machine;
use crate::memory::Physical;
use crate::space::Maker;
use crate::types::{AccessDesc, PointerInfo, PointerKind, Prot, StreamId};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

/// Alignment of every heap pointer.
pub const HEAP_ALIGN: u64 = 512;

#[derive(Clone, Copy, Debug)]
struct Allocation {
    device: u32,
    /// What the program asked for.
    size: u64,
    /// What it got.
    room: u64,
    /// Start of the block that it was cut from; `None`: a mapping of its own.
    block: Option<u64>,
    api: Api,
}

#[derive(Debug)]
struct Block {
    device: u32,
    free: BTreeMap<u64, u64>,
}

/// The heaps of all devices.
#[derive(Debug, Default)]
pub struct Heap {
    allocations: BTreeMap<u64, Allocation>,
    blocks: BTreeMap<u64, Block>,
}

impl Heap {
    fn carve(&mut self, device: u32, room: u64) -> Option<(u64, u64)> {
        let mut candidates = self.blocks.iter_mut().filter(|(_, block)| block.device == device);
        candidates.find_map(|(base, block)| block.carve(room).map(|ptr| (ptr, *base)))
    }

    fn allocation_of(&self, ptr: u64) -> Option<(u64, &Allocation)> {
        let (base, found) = self.allocations.range(..=ptr).next_back()?;
        (ptr - base < found.room).then_some((*base, found))
    }
}

impl Block {
    fn carve(&mut self, room: u64) -> Option<u64> {
        let (start, len) = self.free.iter().find(|(_, len)| **len >= room).map(|(start, len)| (*start, *len))?;
        self.free.remove(&start);
        if len > room {
            self.free.insert(start + room, len - room);
        }
        Some(start)
    }

    fn give(&mut self, mut start: u64, mut room: u64) {
        if let Some((&base, &len)) = self.free.range(..start).next_back()
            && base + len == start
        {
            self.free.remove(&base);
            (start, room) = (base, room + len);
        }
        if let Some(len) = self.free.remove(&(start + room)) {
            room += len;
        }
        self.free.insert(start, room);
    }
}

/// Fresh frames at a fresh address, usable by their device.
fn map_frames(core: &Core, device: u32, size: u64, api: Api) -> Result<u64> {
    let physical = core.memory(device)?.create(size, api, 0)?;
    if let Some(clock) = &core.clock {
        clock.taken(device, size);
    }
    let mut space = core.space_mut();
    let addr = space.reserve(size, 0, 0, Maker::Heap)?;
    let access = [AccessDesc { device, prot: Prot::ReadWrite }];
    let mapped = space.map(addr, size, &physical, Maker::Heap).and_then(|()| {
        physical.note(-1);
        space.set_access(addr, size, &access, Maker::Heap)
    });
    if let Err(error) = mapped {
        // What was not mapped cannot be unmapped; the reservation goes either way.
        let kept = space.unmap(addr, size, Maker::Heap);
        let _ = space.unreserve(addr, size, Maker::Heap);
        drop(space);
        drop(kept);
        return Err(error);
    }
    Ok(addr)
}

fn unmap_frames(core: &Core, addr: u64, size: u64) -> Result<()> {
    let mut space = core.space_mut();
    let physical = space.unmap(addr, size, Maker::Heap)?;
    space.unreserve(addr, size, Maker::Heap)?;
    drop(space);
    if let Some(clock) = &core.clock {
        clock.given(physical.memory.device, size);
    }
    drop(physical);
    Ok(())
}

/// Allocates from the heap. Nobody is waited for, and large frames are made outside the heap's lock.
fn allocate(core: &Core, heap: &Mutex<Heap>, device: u32, size: u64, api: Api) -> Result<u64> {
    let frame = core.memory(device)?.frame;
    let short = || Code::OUT_OF_MEMORY.because(format!("device {device} has no {size} bytes left"));
    if size > frame / 2 {
        let room = size.checked_next_multiple_of(frame).ok_or_else(short)?;
        let ptr = map_frames(core, device, room, api)?;
        locked(heap).allocations.insert(ptr, Allocation { device, size, room, block: None, api });
        return Ok(ptr);
    }
    let room = size.next_multiple_of(HEAP_ALIGN);
    let mut heap = locked(heap);
    let (ptr, block) = match heap.carve(device, room) {
        Some(found) => found,
        None => {
            let base = map_frames(core, device, frame, api)?;
            heap.blocks.insert(base, Block { device, free: BTreeMap::from([(base, frame)]) });
            heap.carve(device, room).ok_or_else(short)?
        }
    };
    heap.allocations.insert(ptr, Allocation { device, size, room, block: Some(block), api });
    Ok(ptr)
}

/// Frees a heap pointer. Nobody is waited for, and frames are given up outside the heap's lock.
fn deallocate(core: &Core, heap: &Mutex<Heap>, ptr: u64) -> Result<()> {
    let mut guard = locked(heap);
    let found = guard.allocations.remove(&ptr).ok_or_else(|| foreign(ptr))?;
    let (base, size) = match found.block {
        None => (ptr, found.room),
        Some(base) => {
            let frame = core.memory(found.device)?.frame;
            let Some(block) = guard.blocks.get_mut(&base) else { return Ok(()) };
            block.give(ptr, found.room);
            if block.free.get(&base) != Some(&frame) {
                return Ok(());
            }
            guard.blocks.remove(&base);
            (base, frame)
        }
    };
    drop(guard);
    unmap_frames(core, base, size)
}

fn foreign(ptr: u64) -> crate::error::SimError {
    Code::INVALID_VALUE.because(format!("{ptr:#x} is not the start of an allocation"))
}

/// The heap.
impl Machine {
    /// Device memory, aligned to 512 bytes. Its content is poison. 0 bytes give the null pointer.
    ///
    /// # Errors
    /// `OUT_OF_MEMORY`; capture prohibitions; the device's sticky error.
    pub fn malloc(&self, device: u32, size: u64) -> Result<u64> {
        self.core().check_alive(device)?;
        self.unsafe_call()?;
        if size == 0 {
            return Ok(0);
        }
        let ptr = allocate(self.core(), self.heap(), device, size, Api::Malloc)?;
        self.spend(|memory| memory.malloc, size);
        Ok(ptr)
    }

    /// Frees what `malloc` or `malloc_managed` made, after waiting for the device. The null pointer is fine.
    ///
    /// # Errors
    /// `INVALID_VALUE` for anything else; capture prohibitions; the device's sticky error.
    pub fn free(&self, ptr: u64) -> Result<()> {
        self.core().check_open()?;
        self.unsafe_call()?;
        if ptr == 0 {
            return Ok(());
        }
        let found = locked(self.heap()).allocations.get(&ptr).copied();
        let Some(allocation) = found else {
            return self.free_host_range(ptr, PointerKind::Managed).map_err(|_| foreign(ptr));
        };
        self.drain(allocation.device);
        self.core().check_alive(allocation.device)?;
        deallocate(self.core(), self.heap(), ptr)?;
        self.spend(|memory| memory.free, allocation.room);
        Ok(())
    }

    /// Stream-ordered allocation; here the memory is there at once.
    ///
    /// # Errors
    /// As [`Machine::malloc`]; `CAPTURE_UNSUPPORTED` on a capturing stream.
    pub fn malloc_async(&self, device: u32, size: u64, stream: StreamId) -> Result<u64> {
        self.core().check_alive(device)?;
        self.refuse_capturing(stream)?;
        if size == 0 {
            return Ok(0);
        }
        allocate(self.core(), self.heap(), device, size, Api::MallocAsync)
    }

    /// Frees when the stream gets there.
    ///
    /// # Errors
    /// `INVALID_VALUE` if it is no heap pointer; `CAPTURE_UNSUPPORTED` on a capturing stream.
    pub fn free_async(&self, ptr: u64, stream: StreamId) -> Result<()> {
        self.core().check_open()?;
        self.refuse_capturing(stream)?;
        if ptr == 0 {
            return Ok(());
        }
        if !locked(self.heap()).allocations.contains_key(&ptr) {
            return Err(foreign(ptr));
        }
        let (core, heap) = (Arc::downgrade(self.core()), Arc::downgrade(self.heap()));
        let free = move || {
            if let (Some(core), Some(heap)) = (core.upgrade(), heap.upgrade()) {
                // Freed twice: the second time it is not there any more, which nobody can be told.
                let _ = deallocate(&core, &heap, ptr);
            }
        };
        self.launch_host(stream, Arc::new(free))
    }

    /// Frees everything on the device. Nobody is waited for.
    pub(crate) fn end_heap(&self, device: u32) {
        let mut heap = locked(self.heap());
        let frame = self.core().memory(device).map_or(0, |memory| memory.frame);
        let own = heap.allocations.iter().filter(|(_, found)| found.device == device && found.block.is_none());
        let blocks = heap.blocks.iter().filter(|(_, block)| block.device == device);
        let frames: Vec<(u64, u64)> =
            own.map(|(ptr, found)| (*ptr, found.room)).chain(blocks.map(|(base, _)| (*base, frame))).collect();
        heap.allocations.retain(|_, found| found.device != device);
        heap.blocks.retain(|_, block| block.device != device);
        drop(heap);
        for (addr, size) in frames {
            // They were the heap's until now: nobody else can have unmapped them.
            let _ = unmap_frames(self.core(), addr, size);
        }
    }

    /// The `cudaMalloc` allocation that holds `ptr`: start and size; its memory, and where in that it begins.
    pub(crate) fn allocation(&self, ptr: u64) -> Result<(u64, u64, Arc<Physical>, u64)> {
        let heap = locked(self.heap());
        let (base, found) = heap.allocation_of(ptr).map(|(base, found)| (base, *found)).ok_or_else(|| foreign(ptr))?;
        drop(heap);
        if found.api != Api::Malloc {
            return Err(
                Code::INVALID_VALUE.because(format!("{ptr:#x} is memory of a pool, which has no legacy handle"))
            );
        }
        let space = self.core().space();
        let (start, mapping) = space.mapping(base).ok_or_else(|| foreign(ptr))?;
        Ok((base, found.size, Arc::clone(&mapping.physical), base - start))
    }

    /// What is known about a device address.
    pub(crate) fn device_pointer(&self, ptr: u64) -> Option<PointerInfo> {
        let space = self.core().space();
        if !space.contains(ptr) {
            return None;
        }
        let (base, mapping) = space.mapping(ptr)?;
        let device = mapping.physical.memory.device;
        let vmm = mapping.maker == Maker::Vmm;
        let opened = mapping.maker == Maker::Opened;
        let info = PointerInfo { kind: PointerKind::Device, device, base, size: mapping.size, flags: 0, vmm };
        drop(space);
        if vmm {
            return Some(info);
        }
        if opened {
            let (base, size) = locked(self.opened()).allocation_of(ptr)?;
            return Some(PointerInfo { base, size, ..info });
        }
        let heap = locked(self.heap());
        let (base, found) = heap.allocation_of(ptr)?;
        Some(PointerInfo { base, size: found.size, ..info })
    }
}
