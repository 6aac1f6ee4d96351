//! Moments inside of the ledger's calls: the C library's functions that read and write files are replaced in this test binary, and each thread may
//! have something done there. What is done there itself reads and writes undisturbed.

use std::cell::RefCell;

/// A moment of every call of the kind.
#[derive(Clone, Copy)]
pub enum Moment {
    /// Something has been read.
    AfterRead,
    /// Something is about to be written.
    BeforeWrite,
}

type Deed = Box<dyn FnMut()>;

thread_local! {
    static DEEDS: RefCell<[Option<Deed>; 2]> = const { RefCell::new([None, None]) };
}

/// From now on this thread does `deed` at each such moment, while `meanwhile` runs.
pub fn at_each<R>(moment: Moment, deed: impl FnMut() + 'static, meanwhile: impl FnOnce() -> R) -> R {
    DEEDS.with_borrow_mut(|deeds| deeds[moment as usize] = Some(Box::new(deed)));
    let result = meanwhile();
    DEEDS.with_borrow_mut(|deeds| deeds[moment as usize] = None);
    result
}

fn reached(moment: Moment) {
    // Taken out meanwhile. A thread that ends has none any more.
    let all = DEEDS.try_with(|deeds| std::mem::take(&mut *deeds.borrow_mut()));
    let Ok(mut all) = all else { return };
    if let Some(deed) = &mut all[moment as usize] {
        deed();
    }
    let _ = DEEDS.try_with(|deeds| *deeds.borrow_mut() = all);
}

/// As the C library's.
#[unsafe(no_mangle)]
unsafe extern "C" fn pread64(
    file: libc::c_int,
    bytes: *mut libc::c_void,
    count: libc::size_t,
    at: libc::off64_t,
) -> libc::ssize_t {
    // SAFETY: the kernel checks what the caller gives.
    let read = unsafe { libc::syscall(libc::SYS_pread64, file, bytes, count, at) as libc::ssize_t };
    if read >= 0 {
        reached(Moment::AfterRead);
    }
    read
}

/// As the C library's.
#[unsafe(no_mangle)]
unsafe extern "C" fn pwrite64(
    file: libc::c_int,
    bytes: *const libc::c_void,
    count: libc::size_t,
    at: libc::off64_t,
) -> libc::ssize_t {
    reached(Moment::BeforeWrite);
    // SAFETY: the kernel checks what the caller gives.
    unsafe { libc::syscall(libc::SYS_pwrite64, file, bytes, count, at) as libc::ssize_t }
}
