//! Device variables (`__device__`, `__constant__`): memory on the current device, made when first named.
//! Their initial content is not read from the program's image; it is zero.

use crate::abi::Handle;
use crate::boundary::{Out, contain, export};
use crate::state::{self, lock};
use sire_sim::{Code, CopyKind, Machine, Pattern, Result};
use std::collections::HashMap;
use std::ffi::{c_char, c_int, c_void};
use std::sync::{LazyLock, Mutex};

#[derive(Default)]
struct Symbols {
    sizes: HashMap<usize, usize>,
    addresses: HashMap<(usize, u32), u64>,
}

static SYMBOLS: LazyLock<Mutex<Symbols>> = LazyLock::new(Mutex::default);

/// One device variable of a library.
#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments)]
pub extern "C" fn __cudaRegisterVar(
    _handle: *mut *mut c_void,
    host: *const c_void,
    _device: *mut c_char,
    _name: *const c_char,
    _external: c_int,
    size: usize,
    _constant: c_int,
    _global: c_int,
) {
    contain("__cudaRegisterVar", (), || {
        lock(&SYMBOLS).sizes.insert(host as usize, size);
    });
}

/// One managed variable of a library: not simulated, which shows when it is used.
#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments)]
pub extern "C" fn __cudaRegisterManagedVar(
    _handle: *mut *mut c_void,
    _host: *mut *mut c_void,
    _device: *mut c_char,
    _name: *const c_char,
    _external: c_int,
    _size: usize,
    _constant: c_int,
    _global: c_int,
) {
}

/// Address and size of a variable on the thread's device.
fn symbol(machine: &Machine, host: *const c_void) -> Result<(u64, usize)> {
    let mut symbols = lock(&SYMBOLS);
    let size = *symbols
        .sizes
        .get(&(host as usize))
        .ok_or_else(|| Code(13).because(format!("{host:?} is not a device variable")))?;
    let device = state::current_device(machine);
    if let Some(address) = symbols.addresses.get(&(host as usize, device)) {
        return Ok((*address, size));
    }
    let address = machine.malloc(device, size as u64)?;
    machine.memset(device, address, Pattern::U8(0), size as u64)?;
    machine.stream_synchronize(machine.legacy_stream(device)?)?;
    symbols.addresses.insert((host as usize, device), address);
    Ok((address, size))
}

fn part(machine: &Machine, host: *const c_void, offset: usize, count: usize) -> Result<u64> {
    let (address, size) = symbol(machine, host)?;
    match offset.checked_add(count) {
        Some(end) if end <= size => Ok(address + offset as u64),
        _ => Err(Code::INVALID_VALUE.because(format!("{count} bytes at {offset} of a variable of {size} bytes"))),
    }
}

fn direction(kind: c_int) -> Result<CopyKind> {
    match kind {
        1 => Ok(CopyKind::HostToDevice),
        2 => Ok(CopyKind::DeviceToHost),
        3 => Ok(CopyKind::DeviceToDevice),
        4 => Ok(CopyKind::Default),
        _ => Err(Code(21).because(format!("{kind} is not a direction for a device variable"))),
    }
}

export! { Runtime:
    fn cudaGetSymbolAddress(out: Out<u64>, host: *const c_void) |machine| { out.required()?.set(symbol(machine, host)?.0) }
    fn cudaGetSymbolSize(out: Out<usize>, host: *const c_void) |machine| { out.required()?.set(symbol(machine, host)?.1) }
    fn cudaMemcpyToSymbol(host: *const c_void, src: u64, count: usize, offset: usize, kind: c_int) bytes(count) |machine| {
        let dst = part(machine, host, offset, count)?;
        // SAFETY: the caller vouches for `src` during the call.
        unsafe { machine.memcpy(state::current_device(machine), dst, src, count as u64, direction(kind)?) }
    }
    fn cudaMemcpyFromSymbol(dst: u64, host: *const c_void, count: usize, offset: usize, kind: c_int) bytes(count) |machine| {
        let src = part(machine, host, offset, count)?;
        // SAFETY: the caller vouches for `dst` during the call.
        unsafe { machine.memcpy(state::current_device(machine), dst, src, count as u64, direction(kind)?) }
    }
    fn cudaMemcpyToSymbolAsync(host: *const c_void, src: u64, count: usize, offset: usize, kind: c_int, stream: Handle) bytes(count) |machine| {
        let dst = part(machine, host, offset, count)?;
        let stream = super::memory::stream_of(machine, stream)?;
        // SAFETY: the caller keeps `src` valid until the stream has passed the copy.
        unsafe { machine.memcpy_async(dst, src, count as u64, direction(kind)?, stream) }
    }
}
