//! The C functions of torch_memory_saver, under their own names, so that its users need no change.
//!
//! Same words, Sire's rules: a thread has a current tag, a switch (`interesting_region`) and a choice of backup; what it
//! allocates while the switch is on belongs to the region of that tag and backup. Where that package ends the process, these functions
//! return a number and keep the reason for `sire_last_error`.

use crate::abi;
use crate::allocate;
use crate::boundary::{self, catch, invalid};
use crate::config::{self, TmsBackend};
use crate::log;
use crate::process;
use crate::region;
use crate::status::sire_status;
use crate::torch;
use sire_core::engine::{Backup, BackupView, Policy, RegionId};
use sire_core::error::{Result, Status};
use std::cell::Cell;
use std::collections::{HashMap, HashSet};
use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{LazyLock, Mutex, PoisonError};

/// A switch that the environment decides until somebody sets it.
const UNSET: u8 = 2;

struct Thread {
    interesting: Cell<u8>,
    cpu_backup: Cell<u8>,
    disk_backup: Cell<u8>,
    backend: Cell<Option<TmsBackend>>,
    /// An interned string; None: "default".
    tag: Cell<Option<&'static CStr>>,
    /// The last tag was refused: nothing may be allocated under the one before.
    refused: Cell<bool>,
    /// The region of the settings above, or `region::NONE` if it must be asked for.
    region: Cell<u32>,
}

thread_local! {
    static THREAD: Thread = const {
        Thread {
            interesting: Cell::new(UNSET),
            cpu_backup: Cell::new(UNSET),
            disk_backup: Cell::new(UNSET),
            backend: Cell::new(None),
            tag: Cell::new(None),
            refused: Cell::new(false),
            region: Cell::new(region::NONE),
        }
    };
}

/// `tms_set_retain_cpu_backup`, for the whole process; `UNSET`: the environment's.
static RETAIN: AtomicU8 = AtomicU8::new(UNSET);

/// The region of this thread's next allocation, if its switch is on.
pub(crate) fn current_region() -> Result<Option<RegionId>> {
    THREAD.with(|thread| {
        if !is_on(&thread.interesting, |settings| settings.tms.enable)? {
            return Ok(None);
        }
        let known = thread.region.get();
        if known != region::NONE {
            return Ok(Some(RegionId(known)));
        }
        if thread.refused.get() {
            return Err(invalid("the thread's tag was refused (see the message at tms_set_current_tag); set another"));
        }
        let tag = current_tag(thread).to_str().map_err(|_| invalid("the thread's tag is not UTF-8"))?;
        let opened = region::open(tag, policy(thread)?)?;
        thread.region.set(opened.0);
        Ok(Some(opened))
    })
}

fn policy(thread: &Thread) -> Result<Policy> {
    let cpu = is_on(&thread.cpu_backup, |settings| settings.tms.cpu_backup)?;
    let disk = is_on(&thread.disk_backup, |settings| settings.tms.disk_backup)?;
    let backup = match (cpu, disk) {
        (true, true) => return Err(invalid("CPU backup and disk backup are both on; choose one")),
        (true, false) => Backup::Host,
        (false, true) => Backup::Disk,
        (false, false) => Backup::None,
    };
    let pageable = cpu && backend(thread)? == TmsBackend::Mmap;
    Ok(Policy { backup, retain: retain()?, pageable, ..Policy::default() })
}

fn backend(thread: &Thread) -> Result<TmsBackend> {
    thread.backend.get().map_or_else(|| Ok(config::get()?.tms.backend), Ok)
}

fn retain() -> Result<bool> {
    Ok(match RETAIN.load(Ordering::Relaxed) {
        UNSET => config::get()?.tms.retain,
        set => set == 1,
    })
}

/// The value of a switch; the environment's, once, if nobody has set it.
fn is_on(switch: &Cell<u8>, default: impl Fn(&config::Settings) -> bool) -> Result<bool> {
    if switch.get() == UNSET {
        switch.set(u8::from(default(config::get()?)));
    }
    Ok(switch.get() == 1)
}

/// A getter cannot fail: settings that are refused read as off.
fn reads_on(switch: impl Fn(&Thread) -> &Cell<u8>, default: impl Fn(&config::Settings) -> bool) -> bool {
    THREAD.with(|thread| is_on(switch(thread), default)).unwrap_or(false)
}

fn set_switch(switch: impl Fn(&Thread) -> &Cell<u8>, on: bool) {
    THREAD.with(|thread| {
        switch(thread).set(u8::from(on));
        thread.region.set(region::NONE);
    });
}

fn current_tag(thread: &Thread) -> &'static CStr {
    thread.tag.get().unwrap_or(c"default")
}

/// The one copy of a tag that lives for good: pointers to it are handed out.
fn intern(tag: &CStr) -> &'static CStr {
    static TAGS: LazyLock<Mutex<HashSet<&'static CStr>>> = LazyLock::new(Mutex::default);
    let mut tags = TAGS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(known) = tags.get(tag) {
        return known;
    }
    let kept: &'static CStr = Box::leak(tag.into());
    tags.insert(kept);
    kept
}

/// Reports the error of a function that returns nothing.
fn complain(doing: &str, done: Result<()>) {
    if let Err(error) = done {
        boundary::remember(&error);
        log::error!("{doing}: {error}");
    }
}

// ---- the switches of a thread ---------------------------------------------------------------------------------------

/// Whether this thread's allocations belong to a region from now on.
#[unsafe(no_mangle)]
pub extern "C" fn tms_set_interesting_region(interesting_region: bool) {
    set_switch(|thread| &thread.interesting, interesting_region);
}

/// What was set, or `TMS_INIT_ENABLE`.
#[unsafe(no_mangle)]
pub extern "C" fn tms_get_interesting_region() -> bool {
    reads_on(|thread| &thread.interesting, |settings| settings.tms.enable)
}

/// The tag of this thread's allocations. A tag that cannot be (NULL, not UTF-8, too long) is refused: allocations then fail.
///
/// # Safety
/// `tag` is NULL or a NUL-terminated string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_set_current_tag(tag: *const c_char) {
    let set = catch(|| {
        // SAFETY: the caller's promise.
        let text = unsafe { boundary::string("the tag", tag) }?;
        if text.len() > 255 {
            return Err(invalid(format!("the tag has {} bytes; the longest has 255", text.len())));
        }
        // SAFETY: as above; it was not refused, so it is not NULL.
        let kept = intern(unsafe { CStr::from_ptr(tag) });
        THREAD.with(|thread| thread.tag.set(Some(kept)));
        Ok(())
    });
    THREAD.with(|thread| {
        thread.refused.set(set.is_err());
        thread.region.set(region::NONE);
    });
    complain("tms_set_current_tag", set);
}

/// This thread's tag; "default" at first. The string is never freed.
#[unsafe(no_mangle)]
pub extern "C" fn tms_get_current_tag() -> *const c_char {
    THREAD.with(|thread| current_tag(thread).as_ptr())
}

/// Whether this thread's allocations are backed up in host memory.
#[unsafe(no_mangle)]
pub extern "C" fn tms_set_enable_cpu_backup(enable_cpu_backup: bool) {
    set_switch(|thread| &thread.cpu_backup, enable_cpu_backup);
}

/// What was set, or `TMS_INIT_ENABLE_CPU_BACKUP`.
#[unsafe(no_mangle)]
pub extern "C" fn tms_get_enable_cpu_backup() -> bool {
    reads_on(|thread| &thread.cpu_backup, |settings| settings.tms.cpu_backup)
}

/// "pinned" or "mmap": whether this thread's next allocations are backed up in memory that is registered with the driver (where that
/// allows it), or in pageable memory.
///
/// # Safety
/// `backend` is NULL or a NUL-terminated string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_set_cpu_backup_backend(backend: *const c_char) {
    let set = catch(|| {
        // SAFETY: the caller's promise.
        let text = unsafe { boundary::string("the backend", backend) }?;
        let parsed = TmsBackend::parse(text)
            .ok_or_else(|| invalid(format!("the backend is {text:?}; it must be pinned or mmap")))?;
        THREAD.with(|thread| {
            thread.backend.set(Some(parsed));
            thread.region.set(region::NONE);
        });
        Ok(())
    });
    complain("tms_set_cpu_backup_backend", set);
}

/// What was set, or `TMS_INIT_CPU_BACKUP_BACKEND`, or "pinned".
#[unsafe(no_mangle)]
pub extern "C" fn tms_get_cpu_backup_backend() -> *const c_char {
    match THREAD.with(backend).unwrap_or_default() {
        TmsBackend::Pinned => c"pinned".as_ptr(),
        TmsBackend::Mmap => c"mmap".as_ptr(),
    }
}

/// Whether this thread's allocations are backed up on disk.
#[unsafe(no_mangle)]
pub extern "C" fn tms_set_enable_disk_backup(enable_disk_backup: bool) {
    set_switch(|thread| &thread.disk_backup, enable_disk_backup);
}

/// What was set, or `TMS_INIT_ENABLE_DISK_BACKUP`.
#[unsafe(no_mangle)]
pub extern "C" fn tms_get_enable_disk_backup() -> bool {
    reads_on(|thread| &thread.disk_backup, |settings| settings.tms.disk_backup)
}

// ---- settings of the process ----------------------------------------------------------------------------------------

/// Where disk backups go from now on.
///
/// # Safety
/// `dir` is NULL or a NUL-terminated string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_set_disk_backup_dir(dir: *const c_char) {
    // SAFETY: the caller's promise.
    let set = catch(|| abi::process::set_disk_directory(unsafe { boundary::string("the directory", dir) }?));
    complain("tms_set_disk_backup_dir", set);
}

/// Whether host backups keep their space after resume. For regions that are first used from now on.
#[unsafe(no_mangle)]
pub extern "C" fn tms_set_retain_cpu_backup(retain_cpu_backup: bool) {
    RETAIN.store(u8::from(retain_cpu_backup), Ordering::Relaxed);
    THREAD.with(|thread| thread.region.set(region::NONE));
}

/// What was set, or `TMS_RETAIN_CPU_BACKUP`.
#[unsafe(no_mangle)]
pub extern "C" fn tms_get_retain_cpu_backup() -> bool {
    retain().unwrap_or(false)
}

/// Device memory that allocations leave free.
#[unsafe(no_mangle)]
pub extern "C" fn set_memory_margin_bytes(value: u64) {
    complain("set_memory_margin_bytes", catch(|| abi::process::set_margin(value)));
}

// ---- transitions ----------------------------------------------------------------------------------------------------

/// Pauses the tag, or everything if it is NULL or empty. 0, or a `sire_status`. Pausing what is paused is 0.
///
/// # Safety
/// `tag` is NULL or a NUL-terminated string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_pause(tag: *const c_char) -> c_int {
    // SAFETY: the caller's promise; no options and no report.
    finish("tms_pause", unsafe { abi::transition::sire_pause(or_everything(tag), ptr::null(), ptr::null_mut()) })
}

/// Resumes the tag, or everything if it is NULL or empty. 0, or a `sire_status`. Resuming what is resident is 0.
///
/// # Safety
/// `tag` is NULL or a NUL-terminated string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_resume(tag: *const c_char) -> c_int {
    // SAFETY: the caller's promise; no options and no report.
    let status = unsafe { abi::transition::sire_resume(or_everything(tag), ptr::null(), ptr::null_mut()) };
    if status == sire_status::Ok {
        drop_views();
    }
    finish("tms_resume", status)
}

/// That package's callers ignore the number, so the reason is written too. A tag that nobody has used is no error there.
fn finish(doing: &str, status: sire_status) -> c_int {
    if status == sire_status::Ok || status == sire_status::UnknownTag {
        return 0;
    }
    let mut text = [0; 1024];
    // SAFETY: the buffer has that room.
    let len = unsafe { boundary::last_error(text.as_mut_ptr().cast(), text.len()) }.min(text.len() - 1);
    log::error!("{doing}: {}", String::from_utf8_lossy(&text[..len]));
    status as c_int
}

/// # Safety
/// `tag` is NULL or a NUL-terminated string.
unsafe fn or_everything(tag: *const c_char) -> *const c_char {
    // SAFETY: a string has at least its NUL.
    if tag.is_null() || unsafe { *tag } == 0 { ptr::null() } else { tag }
}

/// No pause takes the allocation that holds `gpu_ptr` until it is freed. Its bytes; 0 if it is none of Sire's, or is paused.
#[unsafe(no_mangle)]
pub extern "C" fn tms_keep_resident(gpu_ptr: *const c_void) -> u64 {
    let kept = catch(|| {
        let Some(process) = process::started() else { return Ok(0) };
        process.engine.keep_resident(allocate::address(gpu_ptr))
    });
    kept.unwrap_or_else(|error| {
        boundary::remember(&error);
        if error.status != Status::UnknownAddress {
            log::error!("tms_keep_resident: {error}");
        }
        0
    })
}

// ---- backups --------------------------------------------------------------------------------------------------------

/// Backups that were handed out without a token: kept until the next resume, when that package's pointers end too.
struct Views(HashMap<u64, BackupView>);

// SAFETY: a view is an address and a counted owner that is Send and Sync; nothing here follows the address.
unsafe impl Send for Views {}

static VIEWS: LazyLock<Mutex<Views>> = LazyLock::new(|| Mutex::new(Views(HashMap::new())));

fn drop_views() {
    let dropped = std::mem::take(&mut VIEWS.lock().unwrap_or_else(PoisonError::into_inner).0);
    // Outside the lock: the last owner of a backup gives memory back.
    drop(dropped);
}

/// The host backup of `[gpu_ptr, gpu_ptr + size)`, valid until the next resume; NULL if there is none.
#[unsafe(no_mangle)]
pub extern "C" fn tms_get_cpu_backup_pointer(gpu_ptr: *const u8, size: u64) -> *mut u8 {
    let view = catch(|| {
        let Some(process) = process::started() else { return Ok(None) };
        process.engine.backup(allocate::address(gpu_ptr.cast()), size)
    });
    match view {
        Ok(Some(view)) => {
            let start = view.ptr.cast_mut();
            let mut views = VIEWS.lock().unwrap_or_else(PoisonError::into_inner);
            let replaced = views.0.insert(gpu_ptr as u64, view);
            drop(views);
            drop(replaced);
            start
        }
        Ok(None) => ptr::null_mut(),
        Err(error) => {
            boundary::remember(&error);
            if error.status != Status::UnknownAddress {
                log::error!("tms_get_cpu_backup_pointer: {error}");
            }
            ptr::null_mut()
        }
    }
}

// ---- PyTorch --------------------------------------------------------------------------------------------------------

/// For a MemPool, as [`torch::sire_torch_pool_malloc`].
///
/// # Safety
/// As there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_torch_malloc(bytes: isize, device: c_int, stream: *mut c_void) -> *mut c_void {
    // SAFETY: the same contract.
    unsafe { torch::sire_torch_pool_malloc(bytes, device, stream) }
}

/// Frees what [`tms_torch_malloc`] made.
///
/// # Safety
/// As [`torch::sire_torch_free`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tms_torch_free(ptr: *mut c_void, _bytes: isize, _device: c_int, _stream: *mut c_void) {
    torch::give_back(ptr);
}
