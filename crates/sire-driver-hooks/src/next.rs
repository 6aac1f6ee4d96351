//! Whoever would have been called without this library: the next `dlsym` in the order of loading (another interposer's, or the C library's),
//! and the next definition of a driver's function.

use std::ffi::{CStr, c_char, c_void};
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

/// `dlsym`'s own type.
pub(crate) type Dlsym = unsafe extern "C" fn(*mut c_void, *const c_char) -> *mut c_void;

unsafe extern "C" {
    fn dlvsym(handle: *mut c_void, name: *const c_char, version: *const c_char) -> *mut c_void;
}

/// The versions under which the C library exports `dlsym`, the oldest of each architecture first: that one is always there, and a
/// failed search would leave a message for `dlerror`.
#[cfg(target_arch = "x86_64")]
const VERSIONS: [&CStr; 2] = [c"GLIBC_2.2.5", c"GLIBC_2.34"];
#[cfg(target_arch = "aarch64")]
const VERSIONS: [&CStr; 2] = [c"GLIBC_2.17", c"GLIBC_2.34"];

/// The next `dlsym`; null until first needed. Read by the assembly of [`crate::dlsym`].
pub(crate) static NEXT: AtomicPtr<c_void> = AtomicPtr::new(ptr::null_mut());
/// The C library's own.
static LAST: AtomicPtr<c_void> = AtomicPtr::new(ptr::null_mut());

/// The next `dlsym`.
pub(crate) fn dlsym() -> Dlsym {
    known(&NEXT).unwrap_or_else(|| {
        let last = last_dlsym();
        // SAFETY: asks for the next definition after this library, which is the caller; the name is NUL-terminated.
        let next = unsafe { last(libc::RTLD_NEXT, c"dlsym".as_ptr()) };
        let next = if next.is_null() || is_own(next) { last as *mut c_void } else { next };
        NEXT.store(next, Ordering::Release);
        // SAFETY: found under this name, or the C library's own.
        unsafe { std::mem::transmute::<*mut c_void, Dlsym>(next) }
    })
}

/// The C library's `dlsym`. It is found by its version, so that no other library's is taken for it.
pub(crate) fn last_dlsym() -> Dlsym {
    known(&LAST).unwrap_or_else(|| {
        let handles = [libc::RTLD_NEXT, libc::RTLD_DEFAULT];
        let places = handles.into_iter().flat_map(|handle| VERSIONS.map(|version| (handle, version)));
        // SAFETY: both names are NUL-terminated, and the handles are the loader's.
        let mut found = places.map(|(handle, version)| unsafe { dlvsym(handle, c"dlsym".as_ptr(), version.as_ptr()) });
        let Some(found) = found.find(|found| !found.is_null() && !is_own(*found)) else { return nothing };
        LAST.store(found, Ordering::Release);
        // SAFETY: found under this name in the C library.
        unsafe { std::mem::transmute::<*mut c_void, Dlsym>(found) }
    })
}

fn known(place: &AtomicPtr<c_void>) -> Option<Dlsym> {
    let found = place.load(Ordering::Acquire);
    // SAFETY: the places hold null or the address of a `dlsym`; null is None.
    unsafe { std::mem::transmute::<*mut c_void, Option<Dlsym>>(found) }
}

/// In a process without a C library that has `dlsym`: finds nothing.
unsafe extern "C" fn nothing(_handle: *mut c_void, _name: *const c_char) -> *mut c_void {
    ptr::null_mut()
}

/// The definition of `name` that code at `caller` would have called: the next in the order of loading, else the one of its own library's
/// dependencies, else the driver's.
pub(crate) fn definition(name: &CStr, caller: usize) -> *mut c_void {
    let ask = |handle: *mut c_void| {
        // SAFETY: the handle is the loader's, or open; the name is NUL-terminated.
        let found = unsafe { last_dlsym()(handle, name.as_ptr()) };
        Some(found).filter(|found| !found.is_null() && !is_own(*found))
    };
    let loaded = |file: *const c_char| {
        // SAFETY: the name is NUL-terminated; RTLD_NOLOAD loads nothing and runs nothing. The handle is kept for good.
        let handle = unsafe { libc::dlopen(file, libc::RTLD_LAZY | libc::RTLD_NOLOAD) };
        Some(handle).filter(|handle| !handle.is_null())
    };
    let dependency = || {
        let library = library_of(caller)?;
        let found = loaded(library.dli_fname).and_then(ask)?;
        // A library that exports the function itself, such as another interposer, is not its own next.
        (base_of(found as usize) != library.dli_fbase as usize).then_some(found)
    };
    let found = ask(libc::RTLD_NEXT).or_else(dependency).or_else(|| loaded(c"libcuda.so.1".as_ptr()).and_then(ask));
    forget_error();
    found.unwrap_or(ptr::null_mut())
}

/// Searches of ours that failed leave no message for the program.
pub(crate) fn forget_error() {
    // SAFETY: takes nothing; the message belongs to the C library.
    unsafe { libc::dlerror() };
}

/// The library that holds an address.
pub(crate) fn library_of(address: usize) -> Option<libc::Dl_info> {
    let mut info = MaybeUninit::<libc::Dl_info>::zeroed();
    // SAFETY: dladdr takes any address and fills the struct if it knows it.
    let known = unsafe { libc::dladdr(ptr::without_provenance(address), info.as_mut_ptr()) } != 0;
    // SAFETY: the struct was zeroed, and all-zero is a valid value of it.
    known.then(|| unsafe { info.assume_init() }).filter(|info| !info.dli_fname.is_null())
}

/// Whether an address is in a driver's own library. WSL's `libcuda.so.1` is a loader, which looks each function up in the driver behind it: with ours in its
/// place it would call itself without end. Libraries that have stubs of the driver's names are none.
pub(crate) fn is_driver(address: usize) -> bool {
    let Some(library) = library_of(address) else { return false };
    // SAFETY: not null, and the loader keeps the name, NUL-terminated, while the library is loaded, which its code that asks sees to.
    let path = unsafe { CStr::from_ptr(library.dli_fname) }.to_bytes();
    let name = path.rsplit(|&byte| byte == b'/').next().unwrap_or(path);
    name.starts_with(b"libcuda.so")
}

/// Where the library that holds an address is loaded; 0: nobody's.
pub(crate) fn base_of(address: usize) -> usize {
    library_of(address).map_or(0, |library| library.dli_fbase as usize)
}

/// Whether an address is in this very library.
fn is_own(address: *mut c_void) -> bool {
    base_of(address as usize) == own_base()
}

/// Where this library is loaded.
pub(crate) fn own_base() -> usize {
    static BASE: AtomicUsize = AtomicUsize::new(0);
    base_once(&BASE, own_base as *const () as usize)
}

/// [`base_of`] an address that does not change, kept in `place`: such a question takes microseconds.
pub(crate) fn base_once(place: &AtomicUsize, address: usize) -> usize {
    let known = place.load(Ordering::Relaxed);
    if known != 0 {
        return known;
    }
    let base = base_of(address);
    place.store(base, Ordering::Relaxed);
    base
}
