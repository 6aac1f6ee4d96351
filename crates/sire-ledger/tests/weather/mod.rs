//! Bad weather for the racers of race.rs: a wall clock that jumps, and a disk that is full now and then. The C library's functions for both are
//! replaced in this test binary, for whatever is in it; each process switches the weather on for itself.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

static BAD: AtomicBool = AtomicBool::new(false);
static JUMPS: AtomicU64 = AtomicU64::new(0);
static FULL: AtomicU64 = AtomicU64::new(0);
static NUMBERS: AtomicU64 = AtomicU64::new(0);
/// Seconds that the wall clock may be off, each time anew.
const YEAR: i64 = 365 * 86_400;
/// One write into a file in so many finds the disk full.
const SELDOM: u64 = 40;

/// What a process has met since it was asked last.
pub struct Met {
    /// Readings of the wall clock, each of which had jumped.
    pub jumps: u64,
    /// Writes that found the disk full.
    pub full: u64,
}

/// From now on, in this process.
pub fn begin(seed: u64) {
    NUMBERS.store(seed, Ordering::Relaxed);
    BAD.store(true, Ordering::Release);
}

pub fn met() -> Met {
    Met { jumps: JUMPS.swap(0, Ordering::Relaxed), full: FULL.swap(0, Ordering::Relaxed) }
}

fn is_bad() -> bool {
    BAD.load(Ordering::Acquire)
}

/// Of no quality, but the same for all threads.
fn number() -> u64 {
    let mixed = NUMBERS.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
    let mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed ^ (mixed >> 31)
}

/// Up to a year, forward or backward.
fn jump() -> i64 {
    JUMPS.fetch_add(1, Ordering::Relaxed);
    (number() % (2 * YEAR as u64)) as i64 - YEAR
}

fn is_wall(clock: libc::clockid_t) -> bool {
    matches!(clock, libc::CLOCK_REALTIME | libc::CLOCK_REALTIME_COARSE | libc::CLOCK_TAI)
}

/// As the C library's; the wall clock jumps.
#[unsafe(no_mangle)]
unsafe extern "C" fn clock_gettime(clock: libc::clockid_t, time: *mut libc::timespec) -> libc::c_int {
    // SAFETY: the kernel checks the pointer that the caller gives.
    let done = unsafe { libc::syscall(libc::SYS_clock_gettime, clock, time) } as libc::c_int;
    if done == 0 && is_wall(clock) && is_bad() {
        // SAFETY: the kernel has just written there.
        unsafe { (*time).tv_sec += jump() };
    }
    done
}

/// As the C library's, with the same clock.
#[unsafe(no_mangle)]
unsafe extern "C" fn time(out: *mut libc::time_t) -> libc::time_t {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is a live local, and the caller's pointer is null or his own.
    unsafe {
        clock_gettime(libc::CLOCK_REALTIME, &raw mut now);
        if !out.is_null() {
            *out = now.tv_sec;
        }
    }
    now.tv_sec
}

/// As the C library's; now and then the disk is full, as a file system that never writes in place may be also inside of a file.
#[unsafe(no_mangle)]
unsafe extern "C" fn pwrite64(
    file: libc::c_int,
    bytes: *const libc::c_void,
    count: libc::size_t,
    at: libc::off64_t,
) -> libc::ssize_t {
    if is_bad() && number().is_multiple_of(SELDOM) {
        FULL.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the C library's own place for it, of this thread.
        unsafe { *libc::__errno_location() = libc::ENOSPC };
        return -1;
    }
    // SAFETY: the kernel checks what the caller gives.
    unsafe { libc::syscall(libc::SYS_pwrite64, file, bytes, count, at) as libc::ssize_t }
}
