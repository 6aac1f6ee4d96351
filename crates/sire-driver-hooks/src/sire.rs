//! The one `libsire_alloc.so` of the process, which knows what a program gets in the place of a driver's function.

use crate::next;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};

/// `sire_driver_answer`: name, what was found, who asks, whether it was found as the next definition (1) or by a look-up (0).
type Answer = unsafe extern "C" fn(*const c_char, *mut c_void, usize, c_int) -> *mut c_void;

/// The other library's function; null until it was found.
static ANSWER: AtomicPtr<c_void> = AtomicPtr::new(ptr::null_mut());

/// How `found` was found.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Found {
    /// By a look-up in a library that the program named.
    LookedUp = 0,
    /// As the next definition after ours.
    Next = 1,
}

/// What code at `caller` gets for `name`, where without us it would have got `found` (not null).
pub(crate) fn answer(name: &CStr, found: *mut c_void, caller: usize, how: Found) -> *mut c_void {
    match ask() {
        // SAFETY: the name is NUL-terminated; the other arguments are looked at, not followed.
        Some(answer) => unsafe { answer(name.as_ptr(), found, caller, how as c_int) },
        None => found,
    }
}

fn ask() -> Option<Answer> {
    // SAFETY: null, which is None, or found under this name in the library whose interface this is.
    unsafe { std::mem::transmute::<*mut c_void, Option<Answer>>(function()) }
}

fn function() -> *mut c_void {
    let known = ANSWER.load(Ordering::Acquire);
    if !known.is_null() {
        return known;
    }
    let found = find();
    ANSWER.store(found, Ordering::Release);
    found
}

#[cold]
fn find() -> *mut c_void {
    // SAFETY: RTLD_NOLOAD loads nothing; a library that is preloaded is found by the name that it calls itself.
    let library = unsafe { libc::dlopen(c"libsire_alloc.so".as_ptr(), libc::RTLD_LAZY | libc::RTLD_NOLOAD) };
    if library.is_null() {
        next::forget_error();
        complain();
        return ptr::null_mut();
    }
    // SAFETY: the handle is open, the name NUL-terminated.
    unsafe { next::last_dlsym()(library, c"sire_driver_answer".as_ptr()) }
}

/// Says once, and only to programs that use CUDA, that half of the preload is missing.
fn complain() {
    const SENTENCE: &str = "sire: libsire_driver.so was preloaded without libsire_alloc.so, so no driver-level call is heard; \
                            preload both: LD_PRELOAD=\"$(sire path --driver) $(sire path)\"\n";
    static SAID: AtomicBool = AtomicBool::new(false);
    if !SAID.swap(true, Ordering::Relaxed) {
        // SAFETY: writes bytes of a constant; what cannot be written is lost.
        let _ = unsafe { libc::write(2, SENTENCE.as_ptr().cast(), SENTENCE.len()) };
    }
}

/// Where `libsire_alloc.so` is loaded, if it is. It looks functions up itself, and may be the first to do so.
pub(crate) fn base() -> Option<usize> {
    static BASE: AtomicUsize = AtomicUsize::new(0);
    let function = function();
    (!function.is_null()).then(|| next::base_once(&BASE, function as usize))
}
