//! `dlsym`. Whatever does not begin with "cu" is four instructions away from the next `dlsym`; whatever is not in the table follows it there.
//!
//! It *jumps* to the next one instead of calling it, because `dlsym` looks at its return address: RTLD_NEXT means "after the library that
//! asks". A wrapper that called would make every other interposer find itself, and call itself until the stack ends.

use crate::names::{self, PROBE};
use crate::next;
use crate::sire::{self, Found};
use std::cell::Cell;
use std::ffi::{CStr, c_char, c_void};
use std::ptr;

/// What to do with a look-up: jump there with the arguments as they were; if null, return `value`.
#[repr(C)]
struct Verdict {
    value: *mut c_void,
    jump: *mut c_void,
}

impl Verdict {
    fn is(value: *mut c_void) -> Verdict {
        Verdict { value, jump: ptr::null_mut() }
    }

    fn pass_on() -> Verdict {
        Verdict { value: ptr::null_mut(), jump: next::dlsym() as *mut c_void }
    }
}

/// The C library's function of this name; a driver's function of the table is Sire's.
///
/// # Safety
/// As `dlsym`.
#[unsafe(no_mangle)]
#[unsafe(naked)]
#[cfg(target_arch = "x86_64")]
pub unsafe extern "C" fn dlsym(handle: *mut c_void, name: *const c_char) -> *mut c_void {
    core::arch::naked_asm!(
        "test rsi, rsi",
        "je 2f",
        "cmp byte ptr [rsi], 0x63",
        "jne 2f",
        "cmp byte ptr [rsi + 1], 0x75",
        "je 3f",
        // Not "cu": straight on, once it is known where.
        "2: mov rax, qword ptr [rip + {next}]",
        "test rax, rax",
        "je 3f",
        "jmp rax",
        "3: push rdi",
        "push rsi",
        "sub rsp, 8",
        "mov rdx, qword ptr [rsp + 24]",
        "call {judge}",
        "add rsp, 8",
        "pop rsi",
        "pop rdi",
        "test rdx, rdx",
        "je 4f",
        "jmp rdx",
        "4: ret",
        next = sym next::NEXT,
        judge = sym judge,
    )
}

/// The C library's function of this name; a driver's function of the table is Sire's.
///
/// # Safety
/// As `dlsym`.
#[unsafe(no_mangle)]
#[unsafe(naked)]
#[cfg(target_arch = "aarch64")]
pub unsafe extern "C" fn dlsym(handle: *mut c_void, name: *const c_char) -> *mut c_void {
    core::arch::naked_asm!(
        "cbz x1, 2f",
        "ldrb w9, [x1]",
        "cmp w9, #0x63",
        "b.ne 2f",
        "ldrb w9, [x1, #1]",
        "cmp w9, #0x75",
        "b.eq 3f",
        // Not "cu": straight on, once it is known where.
        "2: adrp x16, {next}",
        "ldr x16, [x16, #:lo12:{next}]",
        "cbz x16, 3f",
        "br x16",
        "3: stp x29, x30, [sp, #-32]!",
        "stp x0, x1, [sp, #16]",
        "mov x2, x30",
        "bl {judge}",
        "mov x9, x0",
        "mov x16, x1",
        "ldp x0, x1, [sp, #16]",
        "ldp x29, x30, [sp], #32",
        "cbz x16, 4f",
        "br x16",
        "4: mov x0, x9",
        "ret",
        next = sym next::NEXT,
        judge = sym judge,
    )
}

thread_local! {
    /// This thread is inside [`looked_up`]. A number without a destructor: looking at it allocates nothing in a library that was preloaded.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// What becomes of the look-up that code at `caller` makes.
unsafe extern "C" fn judge(handle: *mut c_void, name: *const c_char, caller: usize) -> Verdict {
    // RTLD_NEXT is what other interposers call: what they find is not for us to change.
    if name.is_null() || handle == libc::RTLD_NEXT {
        return Verdict::pass_on();
    }
    // SAFETY: not null, so by the caller's contract NUL-terminated.
    let name = unsafe { CStr::from_ptr(name) };
    if name == PROBE {
        return Verdict::is(judge as *mut c_void);
    }
    let Some(function) = names::find(name) else { return Verdict::pass_on() };
    // RTLD_DEFAULT finds our exported function by itself.
    if handle == libc::RTLD_DEFAULT {
        let absent = is_only_ours(handle, name, caller);
        return if absent { Verdict::is(nothing(name)) } else { Verdict::pass_on() };
    }
    if INSIDE.with(|inside| inside.replace(true)) {
        // Another interposer's dlsym, which we have called, asks the first dlsym again: no further round.
        // SAFETY: the program's own arguments, as it passed them.
        return Verdict::is(unsafe { next::last_dlsym()(handle, name.as_ptr()) });
    }
    // SAFETY: the program's own arguments, as it passed them.
    let found = unsafe { looked_up(handle, names::EXPORTED[function], caller) };
    INSIDE.with(|inside| inside.set(false));
    Verdict::is(found)
}

/// Whether `handle` finds our exported function although nobody behind us has one: programs ask so whether there is a driver.
fn is_only_ours(handle: *mut c_void, name: &CStr, caller: usize) -> bool {
    // SAFETY: the program's own handle, and a name of the table.
    let found = unsafe { next::last_dlsym()(handle, name.as_ptr()) };
    next::base_of(found as usize) == next::own_base() && next::definition(name, caller).is_null()
}

/// Finds nothing, and leaves the message that `dlerror` then has.
fn nothing(name: &CStr) -> *mut c_void {
    // SAFETY: the handle is the loader's. Nobody behind us has the name.
    unsafe { next::last_dlsym()(libc::RTLD_NEXT, name.as_ptr()) }
}

/// What `handle` has under `name`, or Sire's function in its place.
unsafe fn looked_up(handle: *mut c_void, name: &CStr, caller: usize) -> *mut c_void {
    // SAFETY: the program's own handle and one of its names.
    let found = unsafe { next::dlsym()(handle, name.as_ptr()) };
    if found.is_null() {
        return found;
    }
    let (asking, holding) = (Some(next::base_of(caller)), Some(next::base_of(found as usize)));
    if holding == Some(next::own_base()) {
        return if next::definition(name, caller).is_null() { nothing(name) } else { found };
    }
    // A library that looks for its own functions, Sire itself, and a driver that passes on to another get what is there.
    if asking == holding || [asking, holding].contains(&sire::base()) || next::is_driver(caller) {
        return found;
    }
    sire::answer(name, found, caller, Found::LookedUp)
}
