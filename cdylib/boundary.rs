//! What stands between C and the engine: caught panics, NULL and string rules, sized structs, the last error.

use crate::status::sire_status;
use sire_core::error::{Error, Result, Status};
use std::cell::{Cell, UnsafeCell};
use std::ffi::{CStr, OsStr, c_char};
use std::os::unix::ffi::OsStrExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

/// Longest tag or path that is looked at, in bytes. Tags may have 255, paths `PATH_MAX`.
const LONGEST_STRING: usize = 4096;

/// Runs the body of an ABI function: its error becomes the status and this thread's last error, a panic `Internal`.
pub(crate) fn call(body: impl FnOnce() -> Result<()>) -> sire_status {
    match catch(body) {
        Ok(()) => sire_status::Ok,
        Err(error) => {
            remember(&error);
            error.status.into()
        }
    }
}

/// Runs `body`; a panic becomes an `Internal` error.
pub(crate) fn catch<T>(body: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| {
        let said = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
        Err(Error::new(Status::Internal, format!("a bug in Sire: {}", said.unwrap_or("a panic without a message"))))
    })
}

// ---- the last error of a thread -------------------------------------------------------------------------------------

const LAST_ERROR: usize = 1024;

/// A fixed buffer: filling it must not fail, and it must outlive every destructor of the thread.
struct LastError {
    text: UnsafeCell<[u8; LAST_ERROR]>,
    len: Cell<usize>,
}

thread_local! {
    static LAST: LastError = const { LastError { text: UnsafeCell::new([0; LAST_ERROR]), len: Cell::new(0) } };
}

/// Keeps the message for `sire_last_error`, cut at a character if it is very long.
pub(crate) fn remember(error: &Error) {
    let mut len = error.message.len().min(LAST_ERROR);
    while !error.message.is_char_boundary(len) {
        len -= 1;
    }
    LAST.with(|last| {
        // SAFETY: the buffer is this thread's, and no reference to it outlives this or the next function.
        unsafe { (&mut (*last.text.get()))[..len].copy_from_slice(&error.message.as_bytes()[..len]) };
        last.len.set(len);
    });
}

/// Writes the last message as the text rule says; returns its full length.
///
/// # Safety
/// `buf` is NULL or has room for `cap` bytes.
pub(crate) unsafe fn last_error(buf: *mut c_char, cap: usize) -> usize {
    LAST.with(|last| {
        // SAFETY: as in `remember`; the slice is only read, here.
        let text = unsafe { &(&(*last.text.get()))[..last.len.get()] };
        // SAFETY: the caller's promise.
        unsafe { put_text(text, buf, cap) };
        text.len()
    })
}

// ---- strings --------------------------------------------------------------------------------------------------------

/// Copies as much of `text` as fits, always NUL-terminated if there is room for anything.
///
/// # Safety
/// `buf` is NULL or has room for `cap` bytes.
pub(crate) unsafe fn put_text(text: &[u8], buf: *mut c_char, cap: usize) {
    if buf.is_null() || cap == 0 {
        return;
    }
    let taken = text.len().min(cap - 1);
    // SAFETY: `taken` bytes and the NUL fit in `cap`; the caller's buffer is not our text.
    unsafe {
        std::ptr::copy_nonoverlapping(text.as_ptr(), buf.cast::<u8>(), taken);
        *buf.add(taken) = 0;
    }
}

/// A text output: as much as fits, and the full length.
///
/// # Safety
/// As for [`put_text`]; `out_len` is NULL or writable.
pub(crate) unsafe fn put_whole_text(text: &str, buf: *mut c_char, cap: usize, out_len: *mut usize) {
    // SAFETY: the caller's promises.
    unsafe {
        put_text(text.as_bytes(), buf, cap);
        put(out_len, text.len());
    }
}

/// The string at `text`; None if it is NULL.
///
/// # Safety
/// `text` is NULL, or a NUL-terminated string that lives for `'a`.
pub(crate) unsafe fn optional_string<'a>(what: &str, text: *const c_char) -> Result<Option<&'a str>> {
    // SAFETY: the caller's promise.
    let Some(bytes) = unsafe { optional_bytes(what, text) }? else { return Ok(None) };
    bytes.to_str().map(Some).map_err(|_| invalid(format!("{what} is not UTF-8: {}", bytes.to_string_lossy())))
}

/// # Safety
/// As for [`optional_string`].
unsafe fn optional_bytes<'a>(what: &str, text: *const c_char) -> Result<Option<&'a CStr>> {
    if text.is_null() {
        return Ok(None);
    }
    // SAFETY: strnlen reads no further than the NUL.
    if unsafe { libc::strnlen(text, LONGEST_STRING + 1) } > LONGEST_STRING {
        return Err(invalid(format!("{what} is longer than {LONGEST_STRING} bytes; the longest tag has 255")));
    }
    // SAFETY: the string is NUL-terminated, as the caller promised.
    Ok(Some(unsafe { CStr::from_ptr(text) }))
}

/// The path at `text`, which must be there and not empty. Paths need not be UTF-8.
///
/// # Safety
/// As for [`optional_string`].
pub(crate) unsafe fn path<'a>(what: &str, text: *const c_char) -> Result<&'a Path> {
    // SAFETY: the caller's promise.
    let bytes = unsafe { optional_bytes(what, text) }?.map_or(&[][..], CStr::to_bytes);
    if bytes.is_empty() {
        return Err(invalid(format!("{what} is NULL or empty, but is needed")));
    }
    Ok(Path::new(OsStr::from_bytes(bytes)))
}

/// The string at `text`, of at most `longest` bytes, which must be there.
///
/// # Safety
/// As for [`optional_string`].
pub(crate) unsafe fn long_string<'a>(what: &str, text: *const c_char, longest: usize) -> Result<&'a str> {
    if text.is_null() {
        return Err(invalid(format!("{what} is NULL, but is needed")));
    }
    // SAFETY: strnlen reads no further than the NUL.
    if unsafe { libc::strnlen(text, longest + 1) } > longest {
        return Err(invalid(format!("{what} is longer than {longest} bytes")));
    }
    // SAFETY: the string is NUL-terminated, as the caller promised.
    unsafe { CStr::from_ptr(text) }.to_str().map_err(|_| invalid(format!("{what} is not UTF-8")))
}

/// The string at `text`, which must be there.
///
/// # Safety
/// As for [`optional_string`].
pub(crate) unsafe fn string<'a>(what: &str, text: *const c_char) -> Result<&'a str> {
    // SAFETY: the caller's promise.
    unsafe { optional_string(what, text) }?.ok_or_else(|| invalid(format!("{what} is NULL, but is needed")))
}

// ---- structs and outputs --------------------------------------------------------------------------------------------

/// The `struct_size` that a caller wrote at the front of a struct.
///
/// # Safety
/// `start` points to a struct that begins with a `size_t`.
pub(crate) unsafe fn struct_size<T>(what: &str, start: *const T) -> Result<usize> {
    // SAFETY: the caller's promise; unaligned structs are forgiven.
    let size = unsafe { start.cast::<usize>().read_unaligned() };
    if size < size_of::<usize>() {
        return Err(invalid(format!("{what}: struct_size is {size}; set it to sizeof({what})")));
    }
    Ok(size)
}

/// Refuses a struct from a newer header that sets something this library does not know.
///
/// # Safety
/// `start` points to `size` readable bytes.
pub(crate) unsafe fn refuse_unknown_fields<T>(what: &str, start: *const T, size: usize) -> Result<()> {
    for offset in size_of::<T>()..size {
        // SAFETY: `offset` is inside the `size` bytes.
        if unsafe { start.cast::<u8>().add(offset).read() } != 0 {
            return Err(Error::new(
                Status::VersionMismatch,
                format!(
                    "{what}: byte {offset} is set, but this library knows only {}; use one header for both",
                    size_of::<T>()
                ),
            ));
        }
    }
    Ok(())
}

/// One field of a sized struct, or None if the caller's struct ends before it.
macro_rules! sized_field {
    ($start:expr, $size:expr, $type:ty, $field:ident: $raw:ty) => {{
        const OFFSET: usize = std::mem::offset_of!($type, $field);
        if OFFSET + size_of::<$raw>() <= $size {
            // SAFETY: the field lies inside the `struct_size` bytes that the caller vouched for.
            Some(unsafe { $start.cast::<u8>().add(OFFSET).cast::<$raw>().read_unaligned() })
        } else {
            None
        }
    }};
}
pub(crate) use sized_field;

/// Writes an output that the caller may not want.
///
/// # Safety
/// `out` is NULL or valid for writes.
pub(crate) unsafe fn put<T>(out: *mut T, value: T) {
    if !out.is_null() {
        // SAFETY: the caller's promise.
        unsafe { out.write_unaligned(value) };
    }
}

/// An `InvalidArgument` error.
pub(crate) fn invalid(message: impl Into<String>) -> Error {
    Error::new(Status::InvalidArgument, message)
}

#[cfg(test)]
#[allow(clippy::panic)]
mod tests {
    use super::{call, catch, last_error};
    use crate::status::sire_status;
    use sire_core::error::Status;
    use std::panic::panic_any;

    fn last() -> String {
        let mut text = vec![0_u8; 256];
        // SAFETY: so many bytes lie there.
        let length = unsafe { last_error(text.as_mut_ptr().cast(), text.len()) };
        String::from_utf8_lossy(&text[..length]).into_owned()
    }

    #[test]
    fn a_panic_is_a_status_and_a_sentence() {
        assert!(call(|| panic!("chunk {} is gone", 7)) == sire_status::Internal);
        assert_eq!(last(), "a bug in Sire: chunk 7 is gone");
        assert!(call(|| panic_any(7)) == sire_status::Internal);
        assert_eq!(last(), "a bug in Sire: a panic without a message");
        assert_eq!(
            catch(|| -> Result<(), _> { panic!("at once") }).map_err(|error| error.status),
            Err(Status::Internal)
        );
    }
}
