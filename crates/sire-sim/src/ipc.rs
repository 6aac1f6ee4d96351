//! What other processes of the environment are told of this one's memory and events: the legacy handles of
//! `cudaIpc*`, and what exported descriptors contain. Memory is found by its serial in the ledger, events by
//! their mark there; both belong to the environment's devices and to no other.

use crate::core::locked;
use crate::error::{Code, Result, SimError};
use crate::ledger::mark::Mark;
use crate::machine::Machine;
use crate::memory::{DeviceMemory, Physical, os_error};
use crate::space::Maker;
use crate::types::{AccessDesc, EventId, Prot, StreamId};
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

/// Bytes of a handle.
pub const IPC_HANDLE: usize = 64;

/// What is between the two parts of an exported descriptor's content.
pub const SHARE: &str = " shared ";

/// Memory of an environment, as any of its processes finds it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Share {
    inode: u64,
    device: u32,
    serial: u32,
    size: u64,
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {} {}", self.inode, self.device, self.serial, self.size)
    }
}

impl FromStr for Share {
    type Err = ();

    fn from_str(text: &str) -> std::result::Result<Share, ()> {
        let numbers: Vec<u64> = text.split(' ').map_while(|word| word.parse().ok()).collect();
        let [inode, device, serial, size] = numbers[..] else { return Err(()) };
        let small = |number: u64| u32::try_from(number).map_err(|_| ());
        Ok(Share { inode, device: small(device)?, serial: small(serial)?, size })
    }
}

/// What a legacy handle says: eight numbers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Handle {
    kind: u64,
    pid: u64,
    share: Share,
    /// Where the allocation begins in the memory; of a mark: its place.
    offset: u64,
    /// Its bytes.
    bytes: u64,
}

const MEMORY: u64 = u64::from_le_bytes(*b"SIREIPCM");
const EVENT: u64 = u64::from_le_bytes(*b"SIREIPCE");

impl Handle {
    fn to_bytes(self) -> [u8; IPC_HANDLE] {
        let share = self.share;
        let place = u64::from(share.device) | u64::from(share.serial) << 32;
        let numbers = [self.kind, self.pid, share.inode, place, share.size, self.offset, self.bytes, 0];
        let mut bytes = [0; IPC_HANDLE];
        for (slot, number) in bytes.chunks_exact_mut(8).zip(numbers) {
            slot.copy_from_slice(&number.to_le_bytes());
        }
        bytes
    }

    fn read(bytes: &[u8; IPC_HANDLE], kind: u64) -> Result<Handle> {
        let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|byte| bytes[at * 8 + byte]));
        if number(0) != kind {
            return Err(Code::INVALID_HANDLE.because("that is no handle of this kind"));
        }
        let (device, serial) = (number(3) as u32, (number(3) >> 32) as u32);
        let share = Share { inode: number(2), device, serial, size: number(4) };
        Ok(Handle { kind, pid: number(1), share, offset: number(5), bytes: number(6) })
    }

    /// Refuses handles of this very process, as CUDA does.
    fn checked(self, function: &str) -> Result<Handle> {
        if self.pid != u64::from(std::process::id()) {
            return Ok(self);
        }
        Err(INVALID_CONTEXT.because(format!("{function} in the process that made the handle")))
    }
}

/// `CUDA_ERROR_INVALID_CONTEXT`.
const INVALID_CONTEXT: Code = Code(201);

/// Memory of other processes that is open here, by where it is mapped.
#[derive(Debug, Default)]
pub struct Opened(BTreeMap<u64, Open>);

#[derive(Debug)]
struct Open {
    share: Share,
    /// What was opened, by its address: bytes, and how often.
    allocations: BTreeMap<u64, (u64, u32)>,
}

impl Opened {
    /// Start and size of the opened allocation that holds `ptr`.
    pub fn allocation_of(&self, ptr: u64) -> Option<(u64, u64)> {
        let (_, open) = self.0.range(..=ptr).next_back()?;
        let (base, (bytes, _)) = open.allocations.range(..=ptr).next_back()?;
        (ptr - base < *bytes).then_some((*base, *bytes))
    }

    /// Counts an opening; where the allocation is.
    fn count(&mut self, at: u64, handle: &Handle) -> Option<u64> {
        let address = at.checked_add(handle.offset)?;
        let open = self.0.get_mut(&at)?;
        open.allocations.entry(address).or_insert((handle.bytes, 0)).1 += 1;
        Some(address)
    }

    /// Takes an opening back; the mapping that nobody uses any more, and its size.
    fn discount(&mut self, address: u64) -> Result<Option<(u64, u64)>> {
        let unknown = || Code::INVALID_VALUE.because(format!("{address:#x} is not an open handle's memory"));
        let (at, open) = self.0.range_mut(..=address).next_back().ok_or_else(unknown)?;
        let (at, allocation) = (*at, open.allocations.get_mut(&address).ok_or_else(unknown)?);
        allocation.1 -= 1;
        if allocation.1 == 0 {
            open.allocations.remove(&address);
        }
        let over = open.allocations.is_empty().then_some((at, open.share.size));
        if over.is_some() {
            self.0.remove(&at);
        }
        Ok(over)
    }
}

/// Handles of memory.
impl Machine {
    /// How other processes of the environment find this memory, which they may do from now on.
    pub(crate) fn share(&self, physical: &Physical) -> Result<Share> {
        physical.share();
        let memory = &physical.memory;
        Ok(Share { inode: memory.inode()?, device: memory.device, serial: physical.serial, size: physical.size })
    }

    /// The memory that another process (or machine) shares.
    pub(crate) fn borrow(&self, share: &Share) -> Result<Arc<Physical>> {
        let memory = self.core().memory(share.device)?;
        if memory.inode()? != share.inode {
            return Err(elsewhere());
        }
        memory.borrow(share.serial, share.size)
    }

    /// The handle of the `malloc` allocation that holds `ptr`, for other processes. The allocation must stay until they have closed it.
    ///
    /// # Errors
    /// `INVALID_VALUE` for any other memory: virtual-memory management's, a pool's, the host's, and another process's.
    pub fn ipc_handle(&self, ptr: u64) -> Result<[u8; IPC_HANDLE]> {
        self.core().check_open()?;
        let (_, bytes, physical, offset) = self.allocation(ptr)?;
        self.core().check_alive(physical.memory.device)?;
        let share = self.share(&physical)?;
        Ok(Handle { kind: MEMORY, pid: std::process::id().into(), share, offset, bytes }.to_bytes())
    }

    /// Whether [`Machine::ipc_handle`] would make a handle.
    #[must_use]
    pub fn ipc_capable(&self, ptr: u64) -> bool {
        self.allocation(ptr).is_ok()
    }

    /// Makes another process's allocation usable by its own device and, if that is another one, by `device`: the address of its start. An
    /// allocation that is open has the same address again, and is to be closed once more.
    ///
    /// # Errors
    /// `INVALID_CONTEXT` (201) in the process that made the handle; `INVALID_HANDLE` if it is no handle, of another environment, or its
    /// memory is gone; `OUT_OF_MEMORY`.
    pub fn ipc_open(&self, handle: &[u8; IPC_HANDLE], device: u32) -> Result<u64> {
        self.core().check_alive(device)?;
        let handle = Handle::read(handle, MEMORY)?.checked("cudaIpcOpenMemHandle")?;
        self.core().check_alive(handle.share.device)?;
        let fits = handle.offset.checked_add(handle.bytes).is_some_and(|end| end <= handle.share.size);
        if !fits {
            return Err(Code::INVALID_HANDLE.because("the handle was changed on its way"));
        }
        let mut opened = locked(self.opened());
        let known = opened.0.iter().find(|(_, open)| open.share == handle.share).map(|(at, _)| *at);
        let at = match known {
            Some(at) => at,
            None => {
                let at = self.map_borrowed(&handle.share)?;
                opened.0.insert(at, Open { share: handle.share, allocations: BTreeMap::new() });
                at
            }
        };
        let address = opened.count(at, &handle).ok_or_else(elsewhere)?;
        drop(opened);
        if let Err(error) = self.reach(device, handle.share.device) {
            self.ipc_close(address)?;
            return Err(error);
        }
        Ok(address)
    }

    fn reach(&self, device: u32, home: u32) -> Result<()> {
        if device == home {
            return Ok(());
        }
        match self.enable_peer(device, home) {
            Err(error) if error.code != Code::PEER_ACCESS_ALREADY_ENABLED => Err(error),
            _ => Ok(()),
        }
    }

    fn map_borrowed(&self, share: &Share) -> Result<u64> {
        let physical = self.borrow(share)?;
        let mut space = self.core().space_mut();
        let at = space.reserve(share.size, 0, 0, Maker::Opened)?;
        let access = [AccessDesc { device: share.device, prot: Prot::ReadWrite }];
        let mapped = space
            .map(at, share.size, &physical, Maker::Opened)
            .and_then(|()| space.set_access(at, share.size, &access, Maker::Opened));
        let undone = mapped.is_err().then(|| {
            // What was not mapped cannot be unmapped; the reservation goes either way.
            let kept = space.unmap(at, share.size, Maker::Opened);
            let _ = space.unreserve(at, share.size, Maker::Opened);
            kept
        });
        drop(space);
        drop(undone);
        mapped.map(|()| at)
    }

    /// Takes one [`Machine::ipc_open`] back. With the last one the addresses are gone; whoever opened it waits for its device first.
    ///
    /// # Errors
    /// `INVALID_VALUE` if the address is not an opened allocation's.
    pub fn ipc_close(&self, address: u64) -> Result<()> {
        self.core().check_open()?;
        let Some((at, size)) = locked(self.opened()).discount(address)? else { return Ok(()) };
        let mut space = self.core().space_mut();
        let physical = space.unmap(at, size, Maker::Opened)?;
        space.unreserve(at, size, Maker::Opened)?;
        drop(space);
        drop(physical);
        Ok(())
    }
}

/// An event that other processes can wait for.
#[derive(Debug)]
pub struct SharedEvent {
    memory: Arc<DeviceMemory>,
    mark: Mark,
    own: bool,
}

impl Drop for SharedEvent {
    fn drop(&mut self) {
        if self.own
            && self.memory.is_member()
            && let Ok(mut guard) = self.memory.ledger().lock()
        {
            guard.remove_mark(self.mark);
        }
    }
}

impl SharedEvent {
    /// How often it was recorded, by anybody.
    fn recorded(&self) -> u64 {
        self.memory.ledger().begun_of_mark(self.mark)
    }

    /// Whether the record of this number has passed, or its process is gone.
    fn has_passed(&self, number: u64, look: bool) -> bool {
        self.memory.ledger().mark_has_passed(self.mark, number, look)
    }

    fn wait(&self, number: u64) {
        // Short at first; whether the other process lives is looked at rarely.
        for turn in 0u32.. {
            if self.has_passed(number, turn % 64 == 63) {
                return;
            }
            std::thread::sleep(Duration::from_micros(u64::from(turn.min(40)) * 25));
        }
    }
}

/// Events of several processes. Their order is kept by numbers in the ledger, not by points of streams.
impl Machine {
    /// Makes an event that other processes can be told of. It has no timing.
    ///
    /// # Errors
    /// `INVALID_DEVICE`, the device's sticky error; `OUT_OF_MEMORY` if the environment has too many.
    pub fn event_create_shared(&self, device: u32) -> Result<EventId> {
        self.core().check_alive(device)?;
        let memory = Arc::clone(self.core().memory(device)?);
        let mut guard = memory.ledger().lock().map_err(os_error)?;
        let mark = guard.make_mark();
        drop(guard);
        let mark =
            mark.ok_or_else(|| Code::OUT_OF_MEMORY.because("the environment has no more interprocess events"))?;
        self.insert_shared(device, SharedEvent { memory, mark, own: true })
    }

    /// The handle of an event, for other processes. The event must stay until they have destroyed theirs.
    ///
    /// # Errors
    /// `INVALID_HANDLE` unless [`Machine::event_create_shared`] made it.
    pub fn ipc_event_handle(&self, event: EventId) -> Result<[u8; IPC_HANDLE]> {
        let no = || Code::INVALID_HANDLE.because("the event was not made for other processes (cudaEventInterprocess)");
        let shared = self.shared_event(event)?.filter(|shared| shared.own).ok_or_else(no)?;
        let (inode, device) = (shared.memory.inode()?, shared.memory.device);
        let share = Share { inode, device, serial: shared.mark.serial, size: 0 };
        let offset = shared.mark.index.into();
        Ok(Handle { kind: EVENT, pid: std::process::id().into(), share, offset, bytes: 0 }.to_bytes())
    }

    /// Another process's event, as one of this machine's, of the device `current`; to be destroyed as any other.
    ///
    /// # Errors
    /// `INVALID_CONTEXT` (201) in the process that made the handle; `INVALID_HANDLE` if it is no handle, of another environment, or the
    /// event is gone; `INVALID_DEVICE`.
    pub fn ipc_open_event(&self, current: u32, handle: &[u8; IPC_HANDLE]) -> Result<EventId> {
        let handle = Handle::read(handle, EVENT)?.checked("cudaIpcOpenEventHandle")?;
        let device = handle.share.device;
        self.core().check_alive(device)?;
        self.core().check_alive(current)?;
        let memory = Arc::clone(self.core().memory(device)?);
        let mark = Mark { index: handle.offset as u32, serial: handle.share.serial };
        if memory.inode()? != handle.share.inode {
            return Err(elsewhere());
        }
        if !memory.ledger().has_mark(mark) {
            return Err(Code::INVALID_HANDLE.because("the event that the handle stands for is gone"));
        }
        self.insert_shared(current, SharedEvent { memory, mark, own: false })
    }

    /// Moves the event behind what the stream holds now.
    pub(crate) fn record_shared(&self, shared: Arc<SharedEvent>, stream: StreamId) -> Result<()> {
        self.refuse_capturing(stream)?;
        let number = shared.memory.ledger().begin_mark(shared.mark);
        let done = move || shared.memory.ledger().finish_mark(shared.mark, number);
        self.launch_host(stream, Arc::new(done))?;
        if self.options().executor == crate::options::Executor::Deferred {
            // There, work goes on only while this process waits, and the others must not wait for that.
            self.stream_synchronize(stream)?;
        }
        Ok(())
    }

    /// Makes the stream wait for the last record.
    pub(crate) fn wait_shared_on(&self, shared: Arc<SharedEvent>, stream: StreamId) -> Result<()> {
        self.refuse_capturing(stream)?;
        let number = shared.recorded();
        if shared.has_passed(number, false) {
            return Ok(());
        }
        self.launch_host(stream, Arc::new(move || shared.wait(number)))
    }

    /// Waits for the last record.
    pub(crate) fn wait_shared(&self, shared: &SharedEvent) -> Result<()> {
        shared.wait(shared.recorded());
        self.core().check_alive(shared.memory.device)
    }

    /// Whether the last record has passed.
    pub(crate) fn query_shared(&self, shared: &SharedEvent) -> Result<bool> {
        let passed = shared.has_passed(shared.recorded(), true);
        self.core().check_alive(shared.memory.device)?;
        Ok(passed)
    }
}

fn elsewhere() -> SimError {
    Code::INVALID_HANDLE.because("the handle is of another environment (SIRE_SIM_DIR)")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handles_come_through_as_they_were() {
        let share = Share { inode: u64::MAX - 3, device: 7, serial: u32::MAX, size: 2 << 20 };
        let handle = Handle { kind: MEMORY, pid: 12, share, offset: 512, bytes: 1024 };
        assert_eq!(Handle::read(&handle.to_bytes(), MEMORY), Ok(handle));
        assert!(Handle::read(&handle.to_bytes(), EVENT).is_err(), "a handle of memory is none of an event");
        assert!(Handle::read(&[0; IPC_HANDLE], MEMORY).is_err());
        assert_eq!(share.to_string().parse(), Ok(share));
        for text in ["", "1 2 3", "1 2 3 4 5", "1 2 x 4", "1 4294967296 3 4"] {
            assert_eq!(text.parse::<Share>(), Err(()), "{text:?}");
        }
    }
}
