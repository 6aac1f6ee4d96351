//! What a program gets in the place of the driver's virtual-memory functions: C's arguments into `sire_core::segments`, its answers back into C's.
//! That module has the contract. What it does not want (other handles, other addresses, no region, Sire switched off) goes to the
//! original as it came.
//!
//! Of these functions only `create` fails for Sire's reasons, and then as out of memory: anything else would break PyTorch's cache for good.

use super::context;
use super::entry::{AccessDescription, Code, Location, MemoryProperties, original};
use super::guard::Guard;
use super::runtime::{ask_again, report, wanted};
use crate::boundary::catch;
use crate::capture;
use crate::log;
use crate::process::{self, Process};
use sire_core::driver::{Access, Addr, Device, Physical, Properties, Rights};
use sire_core::error::{Error, Result, Status};
use sire_core::segments::{Handle, Lent, NewMemory, Segments};
use std::ffi::{c_int, c_ulonglong, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::{ptr, slice};

const SUCCESS: Code = 0;
const INVALID_VALUE: Code = 1;
const OUT_OF_MEMORY: Code = 2;
const NOT_SUPPORTED: Code = 801;

/// `CU_MEM_ALLOCATION_TYPE_PINNED`, `CU_MEM_LOCATION_TYPE_DEVICE`, `CU_MEM_ACCESS_FLAGS_PROT_READWRITE`, `CU_MEM_HANDLE_TYPE_*`.
const PINNED: c_int = 1;
const ON_DEVICE: c_int = 1;
const READ_AND_WRITE: c_int = 3;
const FILE_DESCRIPTOR: u32 = 1;
const FABRIC: u32 = 8;

/// Why memory stays.
const EXPORTED: &str = "it was exported to other processes";
const RETAINED: &str = "a handle of it was retained";
const IN_GROUP: &str = "it is bound to a multicast object";
const AS_DMA_BUF: &str = "a dma-buf handle of it was made";
const ODD_ACCESS: &str = "access to it was set in a way that cannot be repeated";

/// Runs `call` on the engine's segments, if there is an engine; virtual-memory calls do not void a capture meanwhile.
fn with_segments<T>(
    what: &str,
    call: impl FnOnce(&Process, &Segments) -> Result<T>,
) -> Option<std::result::Result<T, Code>> {
    let process = process::started()?;
    let done = catch(|| call(process, process.engine.segments()));
    Some(done.map_err(|error| report(what, &error)))
}

/// As [`with_segments`]; without an engine nothing is ours, and the answer is `otherwise`.
fn ask<T>(what: &str, otherwise: T, call: impl FnOnce(&Segments) -> Result<T>) -> std::result::Result<T, Code> {
    with_segments(what, |_, segments| call(segments)).unwrap_or(Ok(otherwise))
}

fn code(done: std::result::Result<Code, Code>) -> Code {
    done.unwrap_or_else(|code| code)
}

// ---- addresses ------------------------------------------------------------------------------------------------------

pub(super) unsafe extern "C" fn reserve(
    out: *mut u64,
    size: usize,
    align: usize,
    wanted_at: u64,
    flags: c_ulonglong,
) -> Code {
    // SAFETY: the program's own arguments, as it passed them.
    let code = unsafe { original::reserve(out, size, align, wanted_at, flags) };
    if code == SUCCESS && !out.is_null() {
        // SAFETY: the driver has just written there.
        let addr = unsafe { out.read_unaligned() };
        // A region that cannot be had now is none: what is made there later will say so.
        let region = catch(|| wanted(&context::device)).unwrap_or_default();
        let _ = ask("a reservation", (), |segments| {
            segments.reserved(Addr(addr), size as u64, region);
            Ok(())
        });
    }
    code
}

pub(super) unsafe extern "C" fn unreserve(addr: u64, size: usize) -> Code {
    match ask("giving back a reservation", false, |segments| segments.unreserve(Addr(addr), size as u64)) {
        Ok(true) => SUCCESS,
        // SAFETY: the program's own arguments, as it passed them.
        Ok(false) => unsafe { original::unreserve(addr, size) },
        Err(code) => code,
    }
}

// ---- physical memory ------------------------------------------------------------------------------------------------

pub(super) unsafe extern "C" fn create(
    out: *mut u64,
    size: usize,
    properties: *const MemoryProperties,
    flags: c_ulonglong,
) -> Code {
    // SAFETY: the program's own arguments: a description, or NULL.
    let served = unsafe { properties.as_ref() }
        .filter(|_| !out.is_null() && flags == 0 && size > 0)
        .and_then(|properties| Some((Guard::enter()?, ordinary(properties)?)))
        .and_then(|(_guard, (device, properties))| create_ours(device, size as u64, properties));
    match served {
        Some(Ok(handle)) => {
            // SAFETY: not NULL, and the program's own place for the result.
            unsafe { out.write_unaligned(handle.0) };
            SUCCESS
        }
        Some(Err(code)) => code,
        // SAFETY: the program's own arguments, as it passed them.
        None => unsafe { create_outside(out, size, properties, flags) },
    }
}

/// Makes memory of no region, and once more when something has made way.
///
/// # Safety
/// As for `cuMemCreate`.
unsafe fn create_outside(out: *mut u64, size: usize, properties: *const MemoryProperties, flags: c_ulonglong) -> Code {
    // SAFETY: the caller's promise.
    let ask = || unsafe { original::create(out, size, properties, flags) };
    // SAFETY: the program's own argument: a description, or NULL.
    let asked = unsafe { properties.as_ref() }.and_then(ordinary);
    let Some((device, properties)) = asked else { return ask() };
    let code = ask_again(ask, size, || Some(device), || ());
    note_fabric(code == SUCCESS, properties);
    code
}

/// The device and what is asked for besides, if memory that takes its place can be made from that.
fn ordinary(asked: &MemoryProperties) -> Option<(Device, Properties)> {
    let device = u32::try_from(asked.location.id).ok().filter(|_| asked.location.kind == ON_DEVICE)?;
    let plain = asked.kind == PINNED && asked.win32.is_null() && asked.compression == 0 && asked.usage == 0;
    let properties = Properties { shareable: u32::try_from(asked.shareable).ok()?, rdma: asked.rdma != 0 };
    let known = matches!(properties.shareable, 0 | FILE_DESCRIPTOR | FABRIC) && asked.rdma <= 1;
    (plain && known).then_some((Device(device), properties))
}

/// None: it is none of ours.
fn create_ours(device: Device, size: u64, properties: Properties) -> Option<std::result::Result<Handle, Code>> {
    let made = catch(|| {
        let region = wanted(&|| c_int::try_from(device.0).ok())?;
        let process = if region.is_some() { Some(process::get()?) } else { process::started() };
        let Some(process) = process else { return Ok(None) };
        if region.is_some() && !context::is_waited_for(process) {
            return Ok(None);
        }
        let capturing = capture::in_progress();
        process.engine.segments().create(NewMemory { region, device, size, properties, capturing })
    });
    match made {
        Ok(handle) => {
            note_fabric(handle.is_some(), properties);
            handle.map(Ok)
        }
        // Disabled, or a forked child: as if Sire were not there.
        Err(error) if error.status == Status::Inactive => None,
        Err(error) => Some(Err(refusal(&error, properties))),
    }
}

/// Whether memory with a fabric handle was ever made here.
static HAS_FABRIC: AtomicBool = AtomicBool::new(false);

fn note_fabric(made: bool, properties: Properties) {
    if made && properties.shareable == FABRIC {
        HAS_FABRIC.store(true, Ordering::Relaxed);
    }
}

/// Out of memory is the one failure that PyTorch recovers from. Only where it asks for a fabric handle to see whether there is one, it
/// is to hear that there is none: it would take "out of memory" for a yes, and ask for no other kind any more.
fn refusal(error: &Error, properties: Properties) -> Code {
    let short = matches!(error.status, Status::OutOfDeviceMemory | Status::Paused | Status::Busy);
    if properties.shareable == FABRIC && !(short && HAS_FABRIC.load(Ordering::Relaxed)) {
        log::info!("there are no fabric handles: {error}");
        return NOT_SUPPORTED;
    }
    report("making physical memory", error);
    OUT_OF_MEMORY
}

pub(super) unsafe extern "C" fn release(handle: u64) -> Code {
    if !Segments::is_virtual(handle) {
        // SAFETY: the program's own argument, as it passed it.
        return unsafe { original::release(handle) };
    }
    code(ask("a release", INVALID_VALUE, |segments| segments.release(Handle(handle)).map(|()| SUCCESS)))
}

pub(super) unsafe extern "C" fn properties(out: *mut MemoryProperties, handle: u64) -> Code {
    if !Segments::is_virtual(handle) {
        // SAFETY: the program's own arguments, as it passed them.
        return unsafe { original::properties(out, handle) };
    }
    match ask("a question", None, |segments| segments.memory(Handle(handle)).map(Some)) {
        Ok(Some(memory)) if !out.is_null() => {
            // SAFETY: not NULL, and the program's own place for the result.
            unsafe { out.write_unaligned(described(&memory)) };
            SUCCESS
        }
        Ok(_) => INVALID_VALUE,
        Err(code) => code,
    }
}

/// The opposite of [`ordinary`].
fn described(memory: &NewMemory) -> MemoryProperties {
    MemoryProperties {
        kind: PINNED,
        shareable: memory.properties.shareable.cast_signed(),
        location: Location { kind: ON_DEVICE, id: memory.device.0.cast_signed() },
        win32: ptr::null_mut(),
        compression: 0,
        rdma: memory.properties.rdma.into(),
        usage: 0,
        reserved: [0; 4],
    }
}

/// Has the driver hand out the memory behind a virtual handle: `call` gets its own handle for it. From before that no pause takes the memory, and later ones
/// only if the driver refused. Any other handle goes on as it is.
fn hand_out(handle: u64, why: &'static str, call: impl FnOnce(u64) -> Code) -> Code {
    if !Segments::is_virtual(handle) {
        return call(handle);
    }
    code(ask("handing out physical memory", INVALID_VALUE, |segments| {
        let (Physical(handle), lent) = segments.lend(Handle(handle), why)?;
        Ok(kept(lent, call(handle)))
    }))
}

/// The same for all of ours in a range, whoever mapped it.
fn hand_out_range(addr: u64, size: usize, why: &'static str, call: impl Fn() -> Code) -> Code {
    let handed_out = with_segments("handing out memory", |_, segments| {
        let lent = segments.lend_range(Addr(addr), size as u64, why)?;
        Ok(kept(lent, call()))
    });
    handed_out.map_or_else(&call, code)
}

/// What the driver has refused to hand out is lent no more.
fn kept(lent: Lent<'_>, code: Code) -> Code {
    if code == SUCCESS {
        lent.keep();
    }
    code
}

pub(super) unsafe extern "C" fn export(out: *mut c_void, handle: u64, kind: c_int, flags: c_ulonglong) -> Code {
    // SAFETY: the program's own arguments, as it passed them; the handle is the driver's.
    hand_out(handle, EXPORTED, |handle| unsafe { original::export(out, handle, kind, flags) })
}

pub(super) unsafe extern "C" fn bind_memory(
    group: u64,
    at: usize,
    handle: u64,
    offset: usize,
    size: usize,
    flags: c_ulonglong,
) -> Code {
    // SAFETY: the program's own arguments, as it passed them; the handle is the driver's.
    hand_out(handle, IN_GROUP, |handle| unsafe { original::bind_memory(group, at, handle, offset, size, flags) })
}

pub(super) unsafe extern "C" fn bind_memory_of_device(
    group: u64,
    device: c_int,
    at: usize,
    handle: u64,
    offset: usize,
    size: usize,
    flags: c_ulonglong,
) -> Code {
    // SAFETY: the program's own arguments, as it passed them; the handle is the driver's.
    let bind = |handle| unsafe { original::bind_memory_of_device(group, device, at, handle, offset, size, flags) };
    hand_out(handle, IN_GROUP, bind)
}

pub(super) unsafe extern "C" fn bind_address(
    group: u64,
    at: usize,
    addr: u64,
    size: usize,
    flags: c_ulonglong,
) -> Code {
    // SAFETY: the program's own arguments, as it passed them.
    hand_out_range(addr, size, IN_GROUP, || unsafe { original::bind_address(group, at, addr, size, flags) })
}

pub(super) unsafe extern "C" fn bind_address_of_device(
    group: u64,
    device: c_int,
    at: usize,
    addr: u64,
    size: usize,
    flags: c_ulonglong,
) -> Code {
    // SAFETY: the program's own arguments, as it passed them.
    let bind = || unsafe { original::bind_address_of_device(group, device, at, addr, size, flags) };
    hand_out_range(addr, size, IN_GROUP, bind)
}

pub(super) unsafe extern "C" fn range_handle(
    out: *mut c_void,
    addr: u64,
    size: usize,
    kind: c_int,
    flags: c_ulonglong,
) -> Code {
    // SAFETY: the program's own arguments, as it passed them.
    hand_out_range(addr, size, AS_DMA_BUF, || unsafe { original::range_handle(out, addr, size, kind, flags) })
}

// ---- mappings -------------------------------------------------------------------------------------------------------

pub(super) unsafe extern "C" fn map(addr: u64, size: usize, offset: usize, handle: u64, flags: c_ulonglong) -> Code {
    // SAFETY: the program's own arguments, as it passed them.
    let outside = |handle| unsafe { map_outside(addr, size, offset, handle, flags, None) };
    if flags != 0 || !Segments::is_virtual(handle) {
        return hand_out(handle, ODD_ACCESS, outside);
    }
    let capturing = capture::in_progress();
    code(ask("a mapping", INVALID_VALUE, |segments| {
        let mapped = segments.map_or_lend(Addr(addr), size as u64, offset as u64, Handle(handle), capturing)?;
        Ok(mapped.map_or(SUCCESS, |(Physical(handle), lent)| {
            // SAFETY: the program's own arguments, as it passed them; the handle is the driver's.
            unsafe { map_outside(addr, size, offset, handle, flags, Some(lent)) }
        }))
    }))
}

/// Maps what nobody follows. `lent`: what of it was followed so far, and still is if the driver refuses.
///
/// # Safety
/// As for `cuMemMap`; the handle is the driver's.
unsafe fn map_outside(
    addr: u64,
    size: usize,
    offset: usize,
    handle: u64,
    flags: c_ulonglong,
    lent: Option<Lent<'_>>,
) -> Code {
    // What is paused is mapped too, though the driver does not know.
    if process::started().is_some_and(|process| process.engine.segments().mapping(Addr(addr)).is_some()) {
        return INVALID_VALUE;
    }
    // SAFETY: the caller's promise.
    let code = unsafe { original::map(addr, size, offset, handle, flags) };
    if code == SUCCESS {
        lent.into_iter().for_each(Lent::keep);
        let _ = ask("a mapping", (), |segments| {
            segments.mapped(Addr(addr), size as u64);
            Ok(())
        });
    }
    code
}

/// The first code of several calls that is no success.
fn each(parts: Vec<(Addr, u64)>, call: impl Fn(u64, usize) -> Code) -> Code {
    let codes = parts.into_iter().map(|(addr, size)| call(addr.0, size as usize));
    codes.fold(SUCCESS, |first, code| if first == SUCCESS { code } else { first })
}

pub(super) unsafe extern "C" fn unmap(addr: u64, size: usize) -> Code {
    let whole = || vec![(Addr(addr), size as u64)];
    let parts = ask("unmapping", whole(), |segments| segments.unmap(Addr(addr), size as u64));
    // SAFETY: the program's own range, or parts of it that it has mapped itself.
    code(parts.map(|parts| each(parts, |addr, size| unsafe { original::unmap(addr, size) })))
}

pub(super) unsafe extern "C" fn set_access(
    addr: u64,
    size: usize,
    access: *const AccessDescription,
    count: usize,
) -> Code {
    let described = if access.is_null() || count == 0 {
        &[][..]
    } else {
        // SAFETY: the program's own arguments: so many descriptions lie there.
        unsafe { slice::from_raw_parts(access, count) }
    };
    // SAFETY: the program's own descriptions for its own range, or parts of it that it has mapped itself.
    let set = |addr, size| unsafe { original::set_access(addr, size, access, count) };
    let Some(repeated) = repeatable(described) else {
        return hand_out_range(addr, size, ODD_ACCESS, || set(addr, size));
    };
    let whole = || vec![(Addr(addr), size as u64)];
    let parts = ask("setting access", whole(), |segments| segments.grant(Addr(addr), size as u64, &repeated));
    code(parts.map(|parts| each(parts, set)))
}

/// What can be kept and replayed: reading and writing, for devices.
fn repeatable(described: &[AccessDescription]) -> Option<Vec<Access>> {
    let one = |description: &AccessDescription| {
        let device = u32::try_from(description.location.id).ok()?;
        let ordinary = description.location.kind == ON_DEVICE && description.flags == READ_AND_WRITE;
        ordinary.then_some(Access { device: Device(device), rights: Rights::ReadWrite })
    };
    let all: Option<Vec<Access>> = described.iter().map(one).collect();
    all.filter(|all| !all.is_empty())
}

pub(super) unsafe extern "C" fn retain(out: *mut u64, addr: *mut c_void) -> Code {
    let ours = if out.is_null() { None } else { process::started() };
    match ours.and_then(|process| process.engine.segments().retain(Addr(addr as u64))) {
        Some(handle) => {
            // SAFETY: not NULL, and the program's own place for the result.
            unsafe { out.write_unaligned(handle.0) };
            SUCCESS
        }
        None => {
            // With one reference more, a pause would give nothing back.
            // SAFETY: the program's own arguments, as it passed them.
            hand_out_range(addr as u64, 1, RETAINED, || unsafe { original::retain(out, addr) })
        }
    }
}

/// What one handle stands for, as the driver has it where memory is there: who asks takes the handle at the start for all of it.
pub(super) unsafe extern "C" fn address_range(base: *mut u64, size: *mut usize, addr: u64) -> Code {
    let found = process::started().and_then(|process| process.engine.physical_around(Addr(addr)));
    let Some((start, bytes)) = found else {
        // SAFETY: the program's own arguments, as it passed them.
        return unsafe { original::address_range(base, size, addr) };
    };
    // SAFETY: each is NULL or the program's own place for a result.
    unsafe {
        if !base.is_null() {
            base.write_unaligned(start.0);
        }
        if !size.is_null() {
            size.write_unaligned(bytes as usize);
        }
    }
    SUCCESS
}
