//! Which device a driver call is for: the current context's, as the driver itself says.

use super::entry::{self, Code};
use super::original::{loaded, open_library_of};
use crate::log;
use crate::process::Process;
use sire_core::driver::Device;
use std::ffi::{CStr, c_int, c_void};
use std::ptr;
use std::sync::{Once, OnceLock};

const SUCCESS: Code = 0;

/// What is asked of the driver.
struct Functions {
    device: unsafe extern "C" fn(*mut c_int) -> Code,
    current: unsafe extern "C" fn(*mut *mut c_void) -> Code,
    push: unsafe extern "C" fn(*mut c_void) -> Code,
    pop: unsafe extern "C" fn(*mut *mut c_void) -> Code,
}

/// The device of this thread's current context; None: there is none.
pub(super) fn device() -> Option<c_int> {
    let mut device = 0;
    // SAFETY: writes one int.
    (unsafe { (functions()?.device)(&raw mut device) } == SUCCESS).then_some(device)
}

/// A number for this thread's current context; 0: there is none.
pub(super) fn current() -> usize {
    let mut context = ptr::null_mut();
    // SAFETY: writes one pointer.
    let found = functions().is_some_and(|functions| unsafe { (functions.current)(&raw mut context) } == SUCCESS);
    if found { context as usize } else { 0 }
}

/// Whether a pause waits for what runs in this thread's current context: it does for the primary context of each device, and for no context that a
/// program made for itself (`cuCtxCreate`), whose kernels might still run when the memory goes. Memory for those is the driver's own.
pub(super) fn is_waited_for(process: &Process) -> bool {
    static SAID: Once = Once::new();
    let (context, device) = (current(), device());
    let is_primary = |device: c_int| {
        process.driver.is_primary_context(Device(device.cast_unsigned()), ptr::without_provenance_mut(context))
    };
    let is_waited_for = device.is_none_or(is_primary);
    if !is_waited_for {
        SAID.call_once(|| {
            log::warning!(
                "memory is allocated inside a region in a context that the program made itself: it is the driver's and \
                is not paused; use the device's primary context"
            );
        });
    }
    is_waited_for
}

/// The device of `context`; None: it is no context. The thread's current context stays.
pub(super) fn device_of(context: *mut c_void) -> Option<c_int> {
    let functions = functions()?;
    // SAFETY: the driver checks contexts.
    if unsafe { (functions.push)(context) } != SUCCESS {
        return None;
    }
    let device = self::device();
    let mut pushed = ptr::null_mut();
    // SAFETY: takes back what was pushed above.
    let _ = unsafe { (functions.pop)(&raw mut pushed) };
    device
}

/// Found once, in the driver that is loaded; not found is not remembered.
fn functions() -> Option<&'static Functions> {
    static FUNCTIONS: OnceLock<Functions> = OnceLock::new();
    if let Some(known) = FUNCTIONS.get() {
        return Some(known);
    }
    let found = find(loaded(c"libcuda.so.1")).or_else(|| find(open_library_of(entry::any_original() as usize)))?;
    Some(FUNCTIONS.get_or_init(|| found))
}

fn find(library: *mut c_void) -> Option<Functions> {
    let function = |name: &CStr| {
        // SAFETY: the handle is open. Of what this library asks for, `dlsym` gives the driver's own.
        let found = if library.is_null() { library } else { unsafe { libc::dlsym(library, name.as_ptr()) } };
        (!found.is_null()).then_some(found)
    };
    let (device, current) = (function(c"cuCtxGetDevice")?, function(c"cuCtxGetCurrent")?);
    let (push, pop) = (function(c"cuCtxPushCurrent_v2")?, function(c"cuCtxPopCurrent_v2")?);
    // SAFETY: the addresses were found under these names, in a driver; the signatures are cuda.h's.
    unsafe {
        Some(Functions {
            device: std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*mut c_int) -> Code>(device),
            current: std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*mut *mut c_void) -> Code>(current),
            push: std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*mut c_void) -> Code>(push),
            pop: std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*mut *mut c_void) -> Code>(pop),
        })
    }
}
