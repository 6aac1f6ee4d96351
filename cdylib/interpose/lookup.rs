//! Driver level: who is heard there, and what they find in the place of the driver's functions.
//!
//! `dlsym` and the driver's own names are taken over by a library of their own, `libsire_driver.so`, which asks here
//! ([`sire_driver_answer`]); who got `cuGetProcAddress` that way asks ours. What is answered is in [`super::entry`]. A library that is not heard gets
//! what it would have got without Sire, so its calls never come here.

use super::entry::{Code, Question, has_versions, original, replace, replace_next};
use super::{guard, original as found_by, stub};
use crate::boundary::catch;
use crate::config;
use std::ffi::{CStr, OsStr, c_char, c_int, c_ulonglong, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Look-ups at driver level that were answered with a function of ours.
pub(crate) static ANSWERED: AtomicU64 = AtomicU64::new(0);

/// What `libsire_driver.so` gives to code at `caller`, which would have got `found` for the driver's function `name`; `next`: as the next
/// definition in the order of loading. Only that library calls this; it is not part of the interface.
///
/// # Safety
/// `name` is NULL or NUL-terminated; `found` is NULL or the function that the driver, or another interposer, exports under this name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_driver_answer(
    name: *const c_char,
    found: *mut c_void,
    caller: usize,
    next: c_int,
) -> *mut c_void {
    if name.is_null() {
        return found;
    }
    // SAFETY: not NULL, hence NUL-terminated.
    let name = unsafe { CStr::from_ptr(name) };
    let answer = || match next {
        _ if !hears(caller) => found,
        0 => replace(&Question::Exported(name), found, true),
        _ => replace_next(name, found),
    };
    counted(catch(|| Ok(answer())).unwrap_or(found), found)
}

/// The answer, where without us it would have been `found`.
fn counted(answer: *mut c_void, found: *mut c_void) -> *mut c_void {
    if answer != found {
        ANSWERED.fetch_add(1, Ordering::Relaxed);
    }
    answer
}

/// Whether look-ups of this process reach us at driver level. Not a matter of environment variables: the process' own `dlsym` is
/// asked for a name that only `libsire_driver.so` knows.
pub(crate) fn live() -> bool {
    library() != 0
}

/// Where `libsire_driver.so` is loaded; 0: it is not there, or another library's `dlsym` comes first and does not ask it.
fn library() -> usize {
    /// Not asked yet. (A lock could be asked for again by another interposer's `dlsym` that looks something up meanwhile.)
    const UNKNOWN: usize = usize::MAX;
    static LIBRARY: AtomicUsize = AtomicUsize::new(UNKNOWN);
    let known = LIBRARY.load(Ordering::Relaxed);
    if known != UNKNOWN {
        return known;
    }
    // SAFETY: NULL names the program itself, which is loaded; its handle stays valid.
    let program = unsafe { libc::dlopen(ptr::null(), libc::RTLD_NOW) };
    // SAFETY: the handle is open, the name NUL-terminated.
    let found = unsafe { libc::dlsym(program, c"cuSireHookProbe".as_ptr()) };
    let base = if found.is_null() { 0 } else { found_by::base_of(found as usize) };
    LIBRARY.store(base, Ordering::Relaxed);
    base
}

/// Whether a function is one of ours, or leads there: it was replaced already.
pub(super) fn is_replaced(function: *mut c_void) -> bool {
    let base = found_by::base_of(function as usize);
    base != 0 && (base == found_by::own_base() || base == library())
}

/// Whether the library at `caller` is one whose driver calls Sire hears.
pub(super) fn hears(caller: usize) -> bool {
    // Under settings that are refused it is heard, so that its allocations fail and say why.
    let Ok(settings) = config::get() else { return true };
    if settings.disabled || !settings.driver_hooks {
        return false;
    }
    let (allow, deny) = (&settings.driver_allow, &settings.driver_deny);
    if allow.is_empty() && deny.is_empty() {
        return true;
    }
    let names = names_of(caller);
    let is_in = |list: &[String]| list.iter().any(|pattern| names.iter().any(|name| matches(pattern, name)));
    (allow.is_empty() || is_in(allow)) && !is_in(deny)
}

/// The file name of the object that holds an address. The program itself has two: what it was called as, and its file's.
fn names_of(address: usize) -> Vec<String> {
    let Some(path) = found_by::path_of(address) else { return Vec::new() };
    let file_name = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned());
    let called = Path::new(OsStr::from_bytes(path.to_bytes()));
    let program = if called.is_absolute() { None } else { std::fs::read_link("/proc/self/exe").ok() };
    file_name(called).into_iter().chain(program.as_deref().and_then(file_name)).collect()
}

/// Whether an entry of a list means this file: `libnccl` and `libnccl.so` mean `libnccl.so.2`, `*` any characters.
fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => name.strip_prefix(pattern).is_some_and(|rest| rest.is_empty() || rest.starts_with('.')),
        Some((before, after)) => name.strip_prefix(before).is_some_and(|rest| {
            let ends = rest.char_indices().map(|(at, _)| at).chain([rest.len()]);
            ends.into_iter().any(|at| matches(after, &rest[at..]))
        }),
    }
}

// ---- cuGetProcAddress ------------------------------------------------------------------------------------------------

/// `cuGetProcAddress` of CUDA 11, with four arguments.
#[unsafe(naked)]
pub(super) unsafe extern "C" fn proc_address(
    name: *const c_char,
    out: *mut *mut c_void,
    version: c_int,
    flags: c_ulonglong,
) -> Code {
    stub!(proc_address_for, ("r8", "x4"))
}

/// `cuGetProcAddress_v2`: as CUDA 12 has it, with a status.
#[unsafe(naked)]
pub(super) unsafe extern "C" fn proc_address_with_status(
    name: *const c_char,
    out: *mut *mut c_void,
    version: c_int,
    flags: c_ulonglong,
    status: *mut c_int,
) -> Code {
    stub!(proc_address_with_status_for, ("r9", "x5"))
}

unsafe extern "C" fn proc_address_for(
    name: *const c_char,
    out: *mut *mut c_void,
    version: c_int,
    flags: c_ulonglong,
    caller: usize,
) -> Code {
    // SAFETY: the program's own arguments, as it passed them.
    unsafe { answered(original::proc_address(name, out, version, flags), name, out, version, flags, caller) }
}

unsafe extern "C" fn proc_address_with_status_for(
    name: *const c_char,
    out: *mut *mut c_void,
    version: c_int,
    flags: c_ulonglong,
    status: *mut c_int,
    caller: usize,
) -> Code {
    // SAFETY: the program's own arguments, as it passed them.
    unsafe {
        let code = original::proc_address_with_status(name, out, version, flags, status);
        answered(code, name, out, version, flags, caller)
    }
}

/// Puts our function in the place of the driver's, for whoever is heard.
unsafe fn answered(
    code: Code,
    name: *const c_char,
    out: *mut *mut c_void,
    version: c_int,
    flags: c_ulonglong,
    caller: usize,
) -> Code {
    if code != 0 || name.is_null() || out.is_null() || guard::is_own_question() {
        return code;
    }
    let _ = catch(|| {
        // SAFETY: the driver has just read a NUL-terminated name there, and written to `out`.
        let (name, found) = unsafe { (CStr::from_ptr(name), out.read_unaligned()) };
        if !found.is_null() && hears(caller) {
            let version = u32::try_from(version).unwrap_or(0);
            let mut answer = replace(&Question::Versioned(name, version, flags), found, true);
            if answer == found && !has_versions(name) {
                // Not CUDA's way, but some drivers take the exported name too.
                answer = replace(&Question::Exported(name), found, true);
            }
            // SAFETY: the driver has just written there.
            unsafe { out.write_unaligned(counted(answer, found)) };
        }
        Ok(())
    });
    code
}
