//! Segments: memory that the program maps itself, with CUDA's virtual-memory functions, made pausable. PyTorch's expandable segments are
//! the case that this is written for: it reserves a large range, makes physical memory piece by piece, maps the pieces side by
//! side, sets access over runs of them, and unmaps and releases single ones.
//!
//! # The bargain
//!
//! The program's calls come here instead of to the driver. It gets a *virtual* handle for physical memory that it makes in a region; what is behind
//! it may go and come back. A mapped handle is an [extent](crate::extent) of one chunk, in the program's addresses, of the region in which the memory was made: pause,
//! resume, switch, clean backups and tiers treat it like any other. What differs:
//!
//! * **Only `create` fails for want of memory or because the region is paused.** What follows it (map, access, unmap, release, giving addresses
//!   back) then goes well, whatever became of the region meanwhile: a pause is refused, after a short wait, while memory of its regions is made and not yet mapped;
//!   unmapping and releasing what is paused is noted, and nothing else; addresses go when the last of ours is gone from them. What the *driver* refuses is tried a second time, and
//!   what must go is tried again later. (What was unmapped while its region was paused is mapped again only after the resume.)
//! * **Access is the program's word**, kept per mapping and replayed. Memory that nobody may touch yet has no content, so it is not backed up.
//! * **What cannot be followed stays.** Memory that the program hands out (exported), maps twice, opens in a way that cannot be replayed, or opens to other devices alone is *held*: a pause
//!   leaves it on the device and says so. Handing out what is paused is refused. What the driver refuses to hand out, or to map a second time, is held only while it is asked ([`Lent`]).
//! * **One region per reservation.** A pause is refused if memory of other regions, or of none, lies in a reservation with what is to be paused ([`ledger`]). Memory made outside
//!   any region joins the region of the reservation that it is mapped in: PyTorch's other threads grow a pool without being in its region.
//! * **An unknown virtual handle is an error**, and never goes to the driver. All other handles are none of our business: calls with them, and parts of calls, are given back to
//!   the caller to be passed on.
//!
//! Calls may come from any thread, with the program's allocator locked. None waits for a transition, but one: mapping addresses that the program unmapped while a
//! transition had them waits until that has let go of them. No lock is held across a driver call.
//! Calls about memory of ours are recorded in a [trace](crate::trace).

mod ledger;
mod lending;

use crate::driver::{Access, Addr, Device, Physical, Properties, Rights};
use crate::error::{Error, Result, Status};
use crate::extent::Extent;
use crate::heap::Orphan;
use crate::heap::mappings::{Hold, Made, Unmapped};
use crate::region::{InHand, Region};
use crate::sync::{Mutex, lock};
use crate::terms::RegionId;
use crate::trace::{Event, SegmentCall, Tracer, status};
use crate::transition::Machine;
use ledger::{Ledger, Mix};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;
use std::sync::Arc;

pub use crate::mapping::Handle;
pub use lending::Lent;

/// Virtual handles have these upper 16 bits, which no handle of a driver's has.
const MARK: u64 = 0x51AE;

/// Where a range of addresses begins, and its bytes.
pub type Addresses = (Addr, u64);

/// What becomes of a mapping: done, or the caller's to do.
type Mapped<'a> = Result<Option<(Physical, Lent<'a>)>>;

/// Physical memory that the program asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NewMemory {
    /// The region that the thread is in.
    pub region: Option<RegionId>,
    /// Where.
    pub device: Device,
    /// Bytes: a multiple of the granularity.
    pub size: u64,
    /// What it must be able to do.
    pub properties: Properties,
    /// Whether a capture is in progress in this process: then nothing is synchronised.
    pub capturing: bool,
}

/// What is behind a virtual handle.
#[derive(Debug)]
enum State {
    /// Memory that is mapped nowhere. While it is in hand, its region is not paused.
    Loose(Physical, Option<InHand>),
    /// Another call has it.
    Moving,
    /// An extent.
    Mapped(Arc<Extent>),
    /// Nothing: it was paused, or being paused, when it was unmapped.
    Gone,
    /// Memory that is used in a way that nobody follows: it stays until the handle is released.
    Stray(Physical),
}

#[derive(Debug)]
struct Entry {
    memory: NewMemory,
    references: u64,
    state: State,
    /// Calls in progress that may hand the memory out, and began while it was loose.
    lending: u32,
    /// It was handed out while another call had its state.
    strayed: bool,
    /// What an unmapping has left while another call had its state.
    returned: Option<State>,
}

#[derive(Debug, Default)]
struct Table {
    made: u64,
    entries: HashMap<Handle, Entry>,
    ledger: Ledger,
}

/// See the [module documentation](self).
#[derive(Debug)]
pub struct Segments {
    machine: Arc<Machine>,
    table: Mutex<Table>,
    trace: Arc<Tracer>,
}

impl Segments {
    pub(crate) fn new(machine: Arc<Machine>, trace: Arc<Tracer>) -> Segments {
        Segments { machine, table: Mutex::default(), trace }
    }

    fn record(&self, call: impl FnOnce() -> SegmentCall) {
        self.trace.record(|| Event::Segment(call()));
    }

    /// Whether a handle is one of ours, live or not.
    #[must_use]
    pub fn is_virtual(handle: u64) -> bool {
        handle >> 48 == MARK
    }

    /// The program has reserved addresses, in `region` or in none.
    pub fn reserved(&self, addr: Addr, size: u64, region: Option<RegionId>) {
        lock(&self.table).ledger.reserve(&range(addr, size), region);
        self.record(|| SegmentCall::Reserve { addr: addr.0, size, region: region.map(|id| id.0) });
    }

    /// The program gives a reservation back. False: it is not known here, and the caller is to do it.
    ///
    /// # Errors
    /// `InvalidArgument` if something is still mapped there.
    pub fn unreserve(&self, addr: Addr, size: u64) -> Result<bool> {
        let there = range(addr, size);
        if !lock(&self.table).ledger.is_reservation(&there) {
            return Ok(false);
        }
        let mapped = self.machine.heap.registry.within(there.clone());
        if let Some(extent) = mapped.iter().find(|extent| !extent.is_freed()) {
            return Err(invalid(format!("{size} bytes at {addr:?} cannot be given back: {:?} is mapped", extent.base)));
        }
        self.record(|| SegmentCall::Unreserve { addr: addr.0, size });
        lock(&self.table).ledger.unreserve(&there);
        self.machine.heap.unreserve(addr, size);
        Ok(true)
    }

    /// Makes physical memory. `None`: it belongs to no region and cannot come to belong to one, and the caller is to make it.
    ///
    /// # Errors
    /// `OutOfDeviceMemory`; `Paused` or `Busy` if the region is not resident; `UnknownTag`; the driver's.
    pub fn create(&self, memory: NewMemory) -> Result<Option<Handle>> {
        let made = self.create_virtual(memory);
        if !matches!(made, Ok(None)) {
            self.record(|| created(&memory, &made));
        }
        made
    }

    fn create_virtual(&self, memory: NewMemory) -> Result<Option<Handle>> {
        let region = match memory.region {
            Some(id) => Some(self.machine.regions.get(id)?),
            None if lock(&self.table).ledger.has_regions() || self.machine.heap.stock.is_used() => None,
            None => return Ok(None),
        };
        let in_hand = region.as_ref().map(Region::take_in_hand).transpose()?;
        let physical = self.make(region.as_deref(), &memory)?;
        if let (Some(region), false) = (&region, memory.capturing) {
            self.machine.make_ready(region, memory.device);
        }
        let mut table = lock(&self.table);
        table.made += 1;
        let handle = Handle((MARK << 48) + table.made);
        let state = State::Loose(physical, in_hand);
        let entry = Entry { memory, references: 1, state, lending: 0, strayed: false, returned: None };
        table.entries.insert(handle, entry);
        Ok(Some(handle))
    }

    /// Where memory is short, what paused regions hold lazily makes way.
    fn make(&self, region: Option<&Region>, memory: &NewMemory) -> Result<Physical> {
        let wanted = (memory.device, memory.size, memory.properties);
        let need = BTreeMap::from([(memory.device, memory.size)]);
        loop {
            let made = self.machine.heap.create_in(region, wanted, memory.capturing);
            let short = made.as_ref().is_err_and(|error| error.status == Status::OutOfDeviceMemory);
            if !short || memory.capturing || self.machine.release_for(&need) == 0 {
                return made;
            }
        }
    }

    /// Drops one reference to a virtual handle. Its memory goes with the last one and the last mapping.
    ///
    /// # Errors
    /// `InvalidArgument` for a handle that is not live.
    pub fn release(&self, handle: Handle) -> Result<()> {
        let mut table = lock(&self.table);
        let entry = table.live(handle)?;
        entry.references -= 1;
        let dropped = table.drop_unused(handle);
        drop(table);
        self.record(|| SegmentCall::Release { handle: handle.0 });
        self.let_go(dropped);
        Ok(())
    }

    /// Releases what an entry held that is no more. The driver may refuse; then a later call tries again.
    fn let_go(&self, dropped: Option<(NewMemory, State)>) {
        if let Some((memory, State::Loose(physical, _) | State::Stray(physical))) = dropped {
            let NewMemory { device, size, .. } = memory;
            self.machine.heap.release_or_keep(Orphan { device, size, plain: false, physical });
        }
    }

    /// [`Segments::map_or_lend`] for a caller who cannot tell whether the mapping was refused: what was lent stays on the device for as long as it lives.
    ///
    /// # Errors
    /// As there.
    pub fn map(&self, addr: Addr, size: u64, offset: u64, handle: Handle, capturing: bool) -> Result<Option<Physical>> {
        let mapped = self.map_or_lend(addr, size, offset, handle, capturing)?;
        Ok(mapped.map(|(physical, lent)| {
            lent.keep();
            physical
        }))
    }

    /// Maps a virtual handle. `Some`: the caller is to map this memory instead, as the program says; when it has, it keeps what was lent, and tells
    /// [`Segments::mapped`]. What the driver refused to map is followed as before.
    ///
    /// # Errors
    /// `InvalidArgument` for a handle that is not live, or where something is mapped; `Paused` if the handle is mapped already, and paused, or was unmapped while its
    /// region was paused, and still is (`Busy` while that is resumed); `OutOfDeviceMemory` if its memory went with a paused mapping, and there is no more; the driver's.
    pub fn map_or_lend(&self, addr: Addr, size: u64, offset: u64, handle: Handle, capturing: bool) -> Mapped<'_> {
        let (mut memory, state, lending) = self.take_out(handle)?;
        memory.capturing = capturing;
        let whole = offset == 0 && size == memory.size && addr.0.is_multiple_of(crate::registry::PAGE);
        let (state, outcome) = match state {
            State::Loose(physical, in_hand) if whole && !lending => {
                self.map_loose(addr, handle, memory, physical, in_hand)
            }
            State::Loose(physical, in_hand) => self.lend_loose(handle, physical, in_hand),
            State::Gone => self.map_gone(addr, handle, memory),
            State::Mapped(extent) => {
                let held = self.hold(&extent, "it is mapped twice");
                let outcome = held.map(|(physical, hold)| Some((physical, self.lent(vec![hold], None))));
                (State::Mapped(extent), outcome)
            }
            State::Stray(physical) => (State::Stray(physical), Ok(Some((physical, self.lent(Vec::new(), None))))),
            State::Moving => (State::Moving, Err(moving(handle))),
        };
        self.put_in(handle, state);
        let call = SegmentCall::Map { handle: handle.0, addr: addr.0, size, offset, status: status(&outcome) };
        match outcome {
            Ok(Some((physical, lent))) => Ok(Some((physical, lent.recorded(call)))),
            other => {
                self.record(|| call);
                other
            }
        }
    }

    /// The state of a handle, which other calls find moving until it is put back in; and whether its memory is being handed out.
    fn take_out(&self, handle: Handle) -> Result<(NewMemory, State, bool)> {
        let mut table = lock(&self.table);
        let entry = table.live(handle)?;
        match std::mem::replace(&mut entry.state, State::Moving) {
            State::Moving => Err(moving(handle)),
            state => Ok((entry.memory, state, entry.lending > 0)),
        }
    }

    /// Puts the state back in that was taken out.
    fn put_in(&self, handle: Handle, state: State) {
        self.change(handle, |entry| entry.put_in(state));
    }

    /// Changes an entry's state, and ends it if its last reference went meanwhile. What was noted before goes without the table's lock, under which no
    /// other is taken.
    fn change(&self, handle: Handle, change: impl FnOnce(&mut Entry) -> State) {
        let mut table = lock(&self.table);
        let Some(entry) = table.entries.get_mut(&handle) else { return };
        let before = change(entry);
        let in_hand = if entry.strayed { entry.state.stray() } else { None };
        let dropped = table.drop_unused(handle);
        drop(table);
        drop((before, in_hand));
        self.let_go(dropped);
    }

    fn map_loose(
        &self,
        addr: Addr,
        handle: Handle,
        memory: NewMemory,
        physical: Physical,
        in_hand: Option<InHand>,
    ) -> (State, Mapped<'_>) {
        let Some(in_hand) = in_hand.or_else(|| self.join(addr)) else {
            return self.lend_loose(handle, physical, None);
        };
        // Unmapped while its region was paused lazily, it has no backup: in a paused region it would go without one.
        if let Err(error) = in_hand.0.require_resident("map memory in") {
            return (State::Loose(physical, Some(in_hand)), Err(error));
        }
        let NewMemory { device, size, properties, .. } = memory;
        let made = Made { handle, device, size, physical, properties };
        match self.machine.heap.take_in(addr, made, &in_hand.0) {
            Ok(extent) => {
                lock(&self.table).ledger.map(&extent.addresses(), Some(extent.region));
                (State::Mapped(extent), Ok(None))
            }
            Err(error) => (State::Loose(physical, Some(in_hand)), Err(error)),
        }
    }

    /// Memory of no region becomes memory of the region of the reservation, if that is resident.
    fn join(&self, addr: Addr) -> Option<InHand> {
        let region = lock(&self.table).ledger.region_at(addr.0)?;
        self.machine.regions.get(region).ok()?.take_in_hand().ok()
    }

    /// What went with a paused mapping has lost its content, as it would have had the program released it.
    fn map_gone(&self, addr: Addr, handle: Handle, memory: NewMemory) -> (State, Mapped<'_>) {
        let made =
            memory.region.map(|id| self.machine.regions.get(id)?.take_in_hand()).transpose().and_then(|in_hand| {
                let region = in_hand.as_ref().map(|in_hand| &*in_hand.0);
                Ok((self.make(region, &memory)?, in_hand))
            });
        match made {
            Ok((physical, in_hand)) => self.map_loose(addr, handle, memory, physical, in_hand),
            Err(error) => (State::Gone, Err(error)),
        }
    }

    /// The program has mapped memory of no region of ours.
    pub fn mapped(&self, addr: Addr, size: u64) {
        let mut table = lock(&self.table);
        table.ledger.map(&range(addr, size), None);
        let known = table.ledger.is_reserved(addr.0);
        drop(table);
        if known {
            self.record(|| SegmentCall::Mapped { addr: addr.0, size });
        }
    }

    /// The program unmaps a range, of one mapping or several. Returns what the caller is to unmap.
    ///
    /// # Errors
    /// `InvalidArgument` if the range cuts a mapping; then nothing was unmapped.
    pub fn unmap(&self, addr: Addr, size: u64) -> Result<Vec<Addresses>> {
        let (ours, others) = self.parts(addr, size)?;
        if !ours.is_empty() || lock(&self.table).ledger.is_reserved(addr.0) {
            self.record(|| SegmentCall::Unmap { addr: addr.0, size });
        }
        for extent in &ours {
            self.unmap_one(extent);
        }
        lock(&self.table).ledger.unmap(&range(addr, size));
        Ok(others)
    }

    fn unmap_one(&self, extent: &Arc<Extent>) {
        let Some(mapping) = &extent.mapping else { return };
        let region = self.machine.regions.get(extent.region).ok();
        let is_resident = || region.as_ref().is_some_and(|region| region.is_resident());
        let back = match self.machine.heap.let_go(extent, is_resident) {
            // Whoever did so first says what became of it.
            Unmapped::Before => return,
            Unmapped::Gone => State::Gone,
            Unmapped::Memory(physical) if extent.handed_out().is_some() => State::Stray(physical),
            Unmapped::Memory(physical) => State::Loose(physical, region.as_ref().map(Region::take_back_in_hand)),
        };
        self.change(mapping.handle, |entry| entry.unmapped(back));
    }

    /// What of a range is mapped by us, and what the caller is to see to. All of it, where nothing is ours: the driver may judge.
    fn parts(&self, addr: Addr, size: u64) -> Result<(Vec<Arc<Extent>>, Vec<Addresses>)> {
        let whole = range(addr, size);
        let mut ours = self.machine.heap.registry.within(whole.clone());
        ours.retain(|extent| extent.mapping.is_some() && !extent.is_freed());
        if ours.is_empty() {
            return Ok((ours, vec![(addr, size)]));
        }
        let cut = |extent: &&Arc<Extent>| extent.base.0 < whole.start || extent.addresses().end > whole.end;
        if let Some(extent) = ours.iter().find(cut) {
            let message = format!("{size} bytes at {addr:?} end inside the mapping at {:?}", extent.base);
            return Err(invalid(message));
        }
        if whole.end > crate::registry::END {
            return Err(invalid(format!("{size} bytes at {addr:?} end beyond the last address there is")));
        }
        let strangers = lock(&self.table).ledger.strangers(&whole);
        Ok((ours, strangers.into_iter().map(|part| (Addr(part.start), part.end - part.start)).collect()))
    }

    /// The program gives devices access to a range. Returns the parts that the caller is to see to.
    ///
    /// # Errors
    /// `InvalidArgument` if the range cuts a mapping; the driver's.
    pub fn grant(&self, addr: Addr, size: u64, access: &[Access]) -> Result<Vec<Addresses>> {
        let (ours, others) = self.parts(addr, size)?;
        let granted = self.machine.heap.grant(&ours, access);
        if !ours.is_empty() {
            let access = || access.iter().map(|access| (access.device.0, access.rights == Rights::ReadWrite)).collect();
            self.record(|| SegmentCall::Grant { addr: addr.0, size, access: access(), status: status(&granted) });
        }
        granted.map(|()| others)
    }

    /// One more reference to the handle that is mapped at `addr`; `None` if none of ours is.
    #[must_use]
    pub fn retain(&self, addr: Addr) -> Option<Handle> {
        let handle = self.extent(addr)?.mapping.as_ref()?.handle;
        let mut table = lock(&self.table);
        table.entries.get_mut(&handle)?.references += 1;
        drop(table);
        self.record(|| SegmentCall::Retain { addr: addr.0 });
        Some(handle)
    }

    fn extent(&self, addr: Addr) -> Option<Arc<Extent>> {
        let extent = self.machine.heap.registry.find(addr)?;
        (extent.mapping.is_some() && !extent.is_freed()).then_some(extent)
    }

    /// The mapping that holds `addr`, paused or not: its start and its bytes.
    #[must_use]
    pub fn mapping(&self, addr: Addr) -> Option<(Addr, u64)> {
        self.extent(addr).map(|extent| (extent.base, extent.size))
    }

    /// What a virtual handle was made as.
    ///
    /// # Errors
    /// `InvalidArgument` for a handle that is not live.
    pub fn memory(&self, handle: Handle) -> Result<NewMemory> {
        Ok(lock(&self.table).live(handle)?.memory)
    }

    fn hold(&self, extent: &Arc<Extent>, why: &'static str) -> Result<(Physical, Hold)> {
        self.machine.heap.hold(extent, &*self.machine.regions.get(extent.region)?, why)
    }

    /// Refuses to pause regions beside whose memory others' lies in one reservation.
    pub(crate) fn refuse_mixed(&self, regions: &[Arc<Region>]) -> Result<()> {
        let ids: BTreeSet<RegionId> = regions.iter().map(|region| region.id).collect();
        let Some(Mix { region, beside, at }) = lock(&self.table).ledger.mix(&ids) else { return Ok(()) };
        let tag =
            |id| self.machine.regions.get(id).map_or_else(|_| String::new(), |region| format!("'{}'", region.tag));
        let other = beside.map_or_else(|| "no region".to_owned(), |id| format!("region {}", tag(id)));
        let message = format!(
            "cannot pause region {}: memory of {other} lies beside its own in the addresses reserved at {at:#x}, and a tensor may lie in \
             both; allocate each region's tensors from a pool of its own (Python's sire.region does), or pause both together",
            tag(region)
        );
        Err(Error::new(Status::Unsupported, message))
    }
}

impl Entry {
    /// Returns what was noted before. What the caller took out as a mapping may have been unmapped meanwhile.
    fn put_in(&mut self, state: State) -> State {
        let is_over = matches!(&state, State::Mapped(extent) if extent.is_freed());
        let returned = if is_over { self.returned.take() } else { None };
        std::mem::replace(&mut self.state, returned.unwrap_or(state))
    }

    /// Its mapping has left `back`. Another call that has its state hears of it when it puts that back in.
    fn unmapped(&mut self, back: State) -> State {
        if matches!(self.state, State::Moving) {
            self.returned = Some(back);
            return State::Moving;
        }
        std::mem::replace(&mut self.state, back)
    }
}

impl Table {
    fn live(&mut self, handle: Handle) -> Result<&mut Entry> {
        let found = self.entries.get_mut(&handle).filter(|entry| entry.references > 0);
        found.ok_or_else(|| invalid(format!("{:#x} is no live handle of physical memory", handle.0)))
    }

    /// Ends an entry that has neither references nor a mapping.
    fn drop_unused(&mut self, handle: Handle) -> Option<(NewMemory, State)> {
        let entry = self.entries.get(&handle)?;
        let used = entry.references > 0 || matches!(entry.state, State::Mapped(_) | State::Moving);
        if used { None } else { self.entries.remove(&handle).map(|entry| (entry.memory, entry.state)) }
    }
}

fn created(memory: &NewMemory, made: &Result<Option<Handle>>) -> SegmentCall {
    SegmentCall::Create {
        handle: made.as_ref().ok().copied().flatten().map_or(0, |handle| handle.0),
        region: memory.region.map(|id| id.0),
        device: memory.device.0,
        size: memory.size,
        shareable: memory.properties.shareable,
        rdma: memory.properties.rdma,
        status: status(made),
    }
}

fn range(addr: Addr, size: u64) -> Range<u64> {
    addr.0..addr.0.saturating_add(size)
}

fn invalid(message: String) -> Error {
    Error::new(Status::InvalidArgument, message)
}

fn moving(handle: Handle) -> Error {
    invalid(format!("{:#x} is being mapped by another thread", handle.0))
}
