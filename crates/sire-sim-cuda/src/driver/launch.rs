//! Modules and launches. A `CUfunction` is the host function's address of a kernel that the runtime registered, or the one kernel that
//! the device knows as PTX: Sire's own, which hashes pages. Other modules are refused by name, linking and tensor maps are stubs.

use crate::abi::Handle;
use crate::boundary::{Out, Text, export};
use crate::runtime::{launch, launch_stream};
use crate::state;
use sire_sim::{Code, Machine, Result};
use std::ffi::{CStr, c_char, c_uint, c_void};

/// The entry of the module that the device knows, and what makes the module known.
const HASH: &str = "sire_hash_1";
const HASH_ENTRY: &str = ".visible .entry sire_hash_1(";

/// The handle of the module that the device knows, and of its function: an address of ours.
fn known() -> Handle {
    static KNOWN: u8 = 0;
    (&raw const KNOWN).cast_mut().cast()
}

/// Whether an image is PTX text with the entry that the device knows.
fn is_known(image: *const c_char) -> bool {
    // SAFETY: an image is at least a few bytes of text, or the header of a binary.
    let first = unsafe { image.cast::<u8>().read() };
    if !matches!(first, b'/' | b'.' | b'\n' | b' ') {
        return false;
    }
    // SAFETY: what begins like PTX is text, which is NUL-terminated.
    unsafe { CStr::from_ptr(image) }.to_str().is_ok_and(|text| text.contains(HASH_ENTRY))
}

fn refuse(name: &str) -> Result<()> {
    let message = format!("not simulated: {name}");
    state::say("CUDA driver", &message);
    Err(Code::NOT_SUPPORTED.because(message))
}

/// Queues what `sire_hash_1` does: its arguments are the source, the bytes, the bytes of a page, and where the digests go.
fn launch_hash(machine: &Machine, arguments: *mut *mut c_void, stream: Handle) -> Result<()> {
    if arguments.is_null() {
        return Err(Code::INVALID_VALUE.because("a launch without arguments"));
    }
    // SAFETY: whoever launches this kernel passes the addresses of its four 64-bit arguments.
    let [src, len, page, out] = unsafe { arguments.cast::<[*const u64; 4]>().read().map(|argument| argument.read()) };
    let stream = launch_stream(machine, stream)?;
    // SAFETY: a kernel is given device memory; host memory here would be the program's error on a GPU as well.
    unsafe { machine.hash(stream, src, len, page, out) }
}

export! { Driver:
    fn cuLaunchKernel(function: *const c_void, _gx: c_uint, _gy: c_uint, _gz: c_uint, _bx: c_uint, _by: c_uint, _bz: c_uint, _shared: c_uint, stream: Handle, arguments: *mut *mut c_void, _extra: *mut *mut c_void) |machine| {
        state::context_device(machine)?;
        if function == known().cast_const() { launch_hash(machine, arguments, stream) } else { launch(machine, function, arguments, stream) }
    }
    fn cuModuleLoadData(module: Out<Handle>, image: *const c_char) |machine| {
        state::context_device(machine)?;
        let module = module.required()?;
        if image.is_null() {
            return Err(Code::INVALID_VALUE.because("a module without an image"));
        }
        if is_known(image) { module.set(known()) } else { refuse("cuModuleLoadData") }
    }
    fn cuModuleUnload(module: Handle) |machine| {
        state::context_device(machine)?;
        if module == known() { Ok(()) } else { refuse("cuModuleUnload") }
    }
    fn cuModuleGetFunction(function: Out<Handle>, module: Handle, name: Text) |machine| {
        state::context_device(machine)?;
        let (function, name) = (function.required()?, name.get()?);
        if module != known() {
            return refuse("cuModuleGetFunction");
        }
        if name == HASH { function.set(known()) } else { Err(Code::NOT_FOUND.because(format!("the module has no {name}"))) }
    }
}
