//! Memory: allocating without a hook, asking about addresses, keeping and discarding ranges, looking at backups.

use crate::allocate;
use crate::boundary::{self, call, invalid};
use crate::process;
use crate::region;
use crate::status::sire_status;
use sire_core::engine::BackupView;
use sire_core::error::{Error, Status};
use std::ffi::{c_char, c_void};

/// Allocates in this thread's region, of those that take the device's memory the innermost; an error outside one. `stream`: where the memory will first be used.
///
/// # Safety
/// `out` is NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_allocate(
    bytes: usize,
    device: i32,
    stream: *mut c_void,
    out: *mut *mut c_void,
) -> sire_status {
    call(|| {
        if out.is_null() {
            return Err(invalid("out is NULL: the memory could not be freed again"));
        }
        if bytes == 0 {
            return Err(invalid("0 bytes were asked for"));
        }
        let none = || invalid(format!("this thread is in no region of device {device}; call sire_region_enter first"));
        let region = region::current_on(&|| Some(device))?.ok_or_else(none)?;
        let address = allocate::allocate(process::get()?, region, device, bytes, stream)?;
        // SAFETY: the caller's promise.
        unsafe { boundary::put(out, address) };
        Ok(())
    })
}

/// Frees an allocation of Sire's, resident or paused. NULL is nothing to do.
#[unsafe(no_mangle)]
pub extern "C" fn sire_free(ptr: *mut c_void) -> sire_status {
    call(|| {
        let process = process::get()?;
        if ptr.is_null() {
            return Ok(());
        }
        if !allocate::owns(process, ptr) {
            return Err(allocate::unknown(ptr));
        }
        allocate::free(process, ptr)
    })
}

/// The allocation that holds an address.
///
/// # Safety
/// Every output is NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_allocation(
    ptr: *const c_void,
    out_base: *mut *mut c_void,
    out_bytes: *mut usize,
    out_device: *mut i32,
    out_region: *mut u32,
) -> sire_status {
    call(|| {
        let found = process::get()?.engine.allocation(allocate::address(ptr));
        let (base, bytes, device, region) = found.ok_or_else(|| allocate::unknown(ptr))?;
        // SAFETY: the caller's promise.
        unsafe {
            boundary::put(out_base, allocate::pointer(base));
            boundary::put(out_bytes, bytes as usize);
            boundary::put(out_device, device.0.cast_signed());
            boundary::put(out_region, region.0);
        }
        Ok(())
    })
}

/// Whether the memory at an address may be used now: `SIRE_STATUS_PAUSED` while its region is paused or being paused (the sentence names it), unless it is memory that
/// pauses leave on the device; `SIRE_STATUS_UNKNOWN_ADDRESS` if no live allocation of Sire's holds it. Calls no driver, and waits for nobody.
#[unsafe(no_mangle)]
pub extern "C" fn sire_require_usable(ptr: *const c_void) -> sire_status {
    call(|| process::get()?.engine.require_usable(allocate::address(ptr)))
}

/// These bytes are backed up by a pause, whatever their region's policy.
#[unsafe(no_mangle)]
pub extern "C" fn sire_keep(ptr: *const c_void, bytes: usize) -> sire_status {
    call(|| process::get()?.engine.keep(allocate::address(ptr), bytes as u64))
}

/// These bytes are thrown away by a pause, whatever their region's policy.
#[unsafe(no_mangle)]
pub extern "C" fn sire_discard(ptr: *const c_void, bytes: usize) -> sire_status {
    call(|| process::get()?.engine.discard(allocate::address(ptr), bytes as u64))
}

/// The program has written to these bytes of a region whose content is declared not to change (`clean` 1): the next pause
/// copies them again.
#[unsafe(no_mangle)]
pub extern "C" fn sire_changed(ptr: *const c_void, bytes: usize) -> sire_status {
    call(|| process::get()?.engine.changed(allocate::address(ptr), bytes as u64))
}

/// The file at `path` holds these bytes, from byte `offset` on. The next pause compares them: what is equal is backed up nowhere else, and
/// read from the file by the resume; the rest goes to host memory, or with `backup` 4 where the engine chooses. The range lies inside one allocation of a
/// region with `backup` 3 or 4.
/// The file may be renamed or removed afterwards, but must not be written to while the region is paused: a resume that meets other bytes fails, with the
/// region paused as before, and works again when the file is as it was.
///
/// # Safety
/// `path` is NULL or NUL-terminated.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_attach_file(
    ptr: *const c_void,
    bytes: usize,
    path: *const c_char,
    offset: u64,
) -> sire_status {
    call(|| {
        // SAFETY: the caller's promise.
        let path = unsafe { boundary::path("the path", path) }?;
        process::get()?.engine.attach_file(allocate::address(ptr), bytes as u64, path, offset)
    })
}

/// From now on no pause takes the allocation that holds `ptr`, until it is freed: it stays on the device while the rest of its region
/// goes. A small one takes its neighbours with it. Its bytes go to `out_bytes`.
///
/// # Safety
/// `out_bytes` is NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_keep_resident(ptr: *const c_void, out_bytes: *mut usize) -> sire_status {
    call(|| {
        let bytes = process::get()?.engine.keep_resident(allocate::address(ptr))?;
        // SAFETY: the caller's promise.
        unsafe { boundary::put(out_bytes, bytes as usize) };
        Ok(())
    })
}

/// The host backup of a range inside one allocation; `SIRE_STATUS_UNKNOWN_ADDRESS` if there is none. `*out_data` can be
/// read until `sire_backup_put(*out_token)`.
///
/// # Safety
/// Both outputs are NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_backup_get(
    ptr: *const c_void,
    bytes: usize,
    out_data: *mut *const c_void,
    out_token: *mut *mut c_void,
) -> sire_status {
    call(|| {
        if out_token.is_null() {
            return Err(invalid("out_token is NULL: the data could not be given back"));
        }
        let view = process::get()?.engine.backup(allocate::address(ptr), bytes as u64)?.ok_or_else(|| {
            Error::new(
                Status::UnknownAddress,
                format!("{bytes} bytes at {ptr:p} have no host backup; was the region paused with one?"),
            )
        })?;
        let data = view.ptr.cast::<c_void>();
        // SAFETY: the caller's promise. The token is the view itself; `sire_backup_put` takes it back.
        unsafe {
            boundary::put(out_data, data);
            boundary::put(out_token, Box::into_raw(Box::new(view)).cast::<c_void>());
        }
        Ok(())
    })
}

/// Gives a backup's data back. NULL is nothing to do.
///
/// # Safety
/// `token` is NULL or came from `sire_backup_get` and was not given back yet.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sire_backup_put(token: *mut c_void) -> sire_status {
    call(|| {
        if !token.is_null() {
            // SAFETY: the caller's promise: a box that `sire_backup_get` leaked, taken back once.
            drop(unsafe { Box::from_raw(token.cast::<BackupView>()) });
        }
        Ok(())
    })
}
