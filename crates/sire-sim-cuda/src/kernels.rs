//! Kernels: the names that programs register, and the few that the device can run.
//!
//! A launch carries no argument sizes, so a kernel is run only if its name says exactly what its arguments
//! are. That is PyTorch's fill; everything else is refused by name.

use crate::state::lock;
use sire_sim::{Code, Kernel, OpContext, Pattern};
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::{Arc, LazyLock, Mutex};

/// Host function to registered name (a string that lives as long as the library that registered it).
static NAMES: LazyLock<Mutex<HashMap<usize, usize>>> = LazyLock::new(|| Mutex::new(HashMap::with_capacity(1 << 15)));

/// Remembers a kernel; the name stays where the program has it.
pub fn register(host: *const c_void, name: *const c_char) {
    if !name.is_null() {
        lock(&NAMES).insert(host as usize, name as usize);
    }
}

/// The registered (mangled) name of a kernel.
pub fn name_of(host: *const c_void) -> Option<String> {
    let name = *lock(&NAMES).get(&(host as usize))?;
    // SAFETY: registered names are NUL-terminated literals of a library that is still loaded, for it launches.
    let name = unsafe { CStr::from_ptr(name as *const c_char) };
    Some(name.to_string_lossy().into_owned())
}

/// How many kernels are registered.
pub fn count() -> usize {
    lock(&NAMES).len()
}

type Demangle = unsafe extern "C" fn(*const c_char, *mut c_char, *mut usize, *mut c_int) -> *mut c_char;

/// C++'s demangler, if the process has libstdc++ loaded.
fn demangler() -> Option<Demangle> {
    // SAFETY: RTLD_NOLOAD only looks a loaded library up; the reference is kept for good.
    let library = unsafe { libc::dlopen(c"libstdc++.so.6".as_ptr(), libc::RTLD_LAZY | libc::RTLD_NOLOAD) };
    let handle = if library.is_null() { libc::RTLD_DEFAULT } else { library };
    // SAFETY: the name is NUL-terminated and the handle valid.
    let symbol = unsafe { libc::dlsym(handle, c"__cxa_demangle".as_ptr()) };
    if symbol.is_null() {
        return None;
    }
    // SAFETY: the C++ ABI fixes this signature for this name.
    Some(unsafe { std::mem::transmute::<*mut c_void, Demangle>(symbol) })
}

/// A readable form of a mangled name; the name itself if there is no demangler.
pub fn readable(name: &str) -> String {
    let (Some(demangle), Ok(text)) = (demangler(), CString::new(name)) else { return name.to_string() };
    let mut status = 0;
    // SAFETY: a NUL-terminated name, no buffer (so the function allocates one), and a place for the status.
    let buffer = unsafe { demangle(text.as_ptr(), std::ptr::null_mut(), std::ptr::null_mut(), &raw mut status) };
    if buffer.is_null() {
        return name.to_string();
    }
    // SAFETY: on success the result is a NUL-terminated string that `malloc` made and that is ours to free.
    unsafe {
        let readable = CStr::from_ptr(buffer).to_string_lossy().into_owned();
        libc::free(buffer.cast());
        readable
    }
}

/// A value of at most 16 bytes that a fill repeats.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Element {
    bytes: [u8; 16],
    size: usize,
}

/// Bytes of the element type of PyTorch's `FillFunctor<T>` in a mangled name.
fn fill_element_size(name: &str) -> Option<usize> {
    const TYPES: &[(&str, usize)] = &[
        ("bE", 1),
        ("hE", 1),
        ("aE", 1),
        ("cE", 1),
        ("sE", 2),
        ("tE", 2),
        ("iE", 4),
        ("jE", 4),
        ("fE", 4),
        ("lE", 8),
        ("mE", 8),
        ("xE", 8),
        ("yE", 8),
        ("dE", 8),
        ("N3c104HalfEE", 2),
        ("N3c108BFloat16EE", 2),
        ("N3c1011Float8_e5m2EE", 1),
        ("N3c1013Float8_e4m3fnEE", 1),
        ("N3c1014Float8_e8m0fnuEE", 1),
        ("N3c1015Float8_e4m3fnuzEE", 1),
        ("N3c1015Float8_e5m2fnuzEE", 1),
        ("N3c1016Float4_e2m1fn_x2EE", 1),
        ("N3c107complexIfEEE", 8),
        ("N3c107complexIdEEE", 16),
        ("N3c107complexINS3_4HalfEEEE", 4),
        ("N3c107complexINS3_8BFloat16EEEE", 4),
    ];
    if !is_flat(name) {
        return None;
    }
    let (_, parameter) = name.split_once("11FillFunctorI")?;
    TYPES.iter().find(|(mangled, _)| parameter.starts_with(mangled)).map(|(_, size)| *size)
}

/// Whether the kernel walks one contiguous array, so that its arguments are (count, functor, {pointer}, ...).
fn is_flat(name: &str) -> bool {
    let vectorized = name.starts_with("_ZN2at6native29vectorized_elementwise_kernelILi");
    let unrolled = name.contains("27unrolled_elementwise_kernelINS0_11FillFunctorI")
        && name.contains("23TrivialOffsetCalculatorILi0E")
        && name.contains("15LoadWithoutCast")
        && name.contains("16StoreWithoutCast");
    (vectorized || unrolled) && name.contains("St5arrayIPcLm1EE")
}

/// What a launch of the kernel `name` does, if the device can run it.
///
/// # Safety
/// `arguments` is what the program launches a kernel of that name with.
pub unsafe fn recognise(name: &str, arguments: *mut *mut c_void) -> Option<Kernel> {
    let size = fill_element_size(name)?;
    let mut element = Element { bytes: [0; 16], size };
    // SAFETY: by its name the kernel takes (int count, FillFunctor<T>, array<char*, 1>): a functor is its value,
    // of `size` bytes, and the array is one pointer.
    let (count, destination) = unsafe {
        let count = arguments.read().cast::<c_int>().read();
        arguments.add(1).read().cast::<u8>().copy_to_nonoverlapping(element.bytes.as_mut_ptr(), size);
        (count, arguments.add(2).read().cast::<u64>().read())
    };
    let count = u64::try_from(count).unwrap_or(0);
    Some(Arc::new(move |context: &OpContext<'_>| fill(context, destination, element, count)))
}

fn fill(context: &OpContext<'_>, destination: u64, element: Element, count: u64) -> Result<(), Code> {
    let bytes = &element.bytes;
    let word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    match element.size {
        1 => context.fill(destination, Pattern::U8(bytes[0]), count),
        2 => context.fill(destination, Pattern::U16(word as u16), count),
        4 => context.fill(destination, Pattern::U32(word), count),
        size if bytes[..size].chunks(4).all(|chunk| chunk == &bytes[..4]) => {
            context.fill(destination, Pattern::U32(word), count * (size as u64 / 4))
        }
        size => fill_wide(context, destination, &bytes[..size], count),
    }
}

/// Elements of 8 or 16 bytes: the first is put together from words, the rest by doubling copies.
fn fill_wide(context: &OpContext<'_>, destination: u64, element: &[u8], count: u64) -> Result<(), Code> {
    if count == 0 {
        return Ok(());
    }
    let size = element.len() as u64;
    for (at, word) in element.chunks_exact(4).enumerate() {
        let word = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
        context.fill(destination + 4 * at as u64, Pattern::U32(word), 1)?;
    }
    let (total, mut done) = (size * count, size);
    while done < total {
        let piece = done.min(total - done);
        context.copy(destination + done, destination, piece)?;
        done += piece;
    }
    Ok(())
}
