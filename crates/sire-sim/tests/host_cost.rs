//! What host memory costs on the device: what the same pages would cost any program, neither less nor more. A device
//! whose pinned memory came for nothing would make every backup look fast; one that was slow would hide a slow engine.
//!
//! Each cost is compared with a plain mapping's, in pairs of which either may be first, and judged by the median of
//! the pairs' ratios. It is the processor's time that is compared, of the whole process (no helping thread is overlooked), by
//! one test at a time: what else the machine does counts for neither half of a pair.

use sire_sim::{Machine, Options};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

type Outcome = Result<(), Box<dyn std::error::Error>>;

const BYTES: usize = 16 << 20;
const PAGE: usize = 4096;
const PAIRS: usize = 15;

/// The honest way to have `BYTES` of present host memory, and back.
struct Plain(*mut libc::c_void);

impl Plain {
    fn new() -> Result<Self, std::io::Error> {
        Self::with(libc::MAP_POPULATE)
    }

    fn with(flag: i32) -> Result<Self, std::io::Error> {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | flag;
        // SAFETY: a new anonymous mapping where nothing is.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), BYTES, prot, flags, -1, 0) };
        if at == libc::MAP_FAILED { Err(std::io::Error::last_os_error()) } else { Ok(Self(at)) }
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and nothing uses it any more.
        unsafe { libc::munmap(self.0, BYTES) };
    }
}

/// The tests of this file share a process, and each measures all of it.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Processor time that this process has used.
fn used() -> Result<Duration, std::io::Error> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a live local of the right type.
    if unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(Duration::new(time.tv_sec as u64, time.tv_nsec as u32))
}

fn timed(what: impl FnOnce() -> Outcome) -> Result<Duration, Box<dyn std::error::Error>> {
    let start = used()?;
    what()?;
    Ok(used()? - start)
}

/// The median over the pairs of (cost of `ours`) / (cost of `plain`).
fn median_ratio(
    mut ours: impl FnMut() -> Result<Duration, Box<dyn std::error::Error>>,
    mut plain: impl FnMut() -> Result<Duration, Box<dyn std::error::Error>>,
) -> Result<f64, Box<dyn std::error::Error>> {
    // Once unmeasured: the first ones pay for the machine's own caches.
    ours()?;
    plain()?;
    let mut ratios = Vec::with_capacity(PAIRS);
    for pair in 0..PAIRS {
        let (mine, theirs) = if pair % 2 == 0 {
            let mine = ours()?;
            (mine, plain()?)
        } else {
            let theirs = plain()?;
            (ours()?, theirs)
        };
        ratios.push(mine.as_secs_f64() / theirs.as_secs_f64().max(1e-9));
    }
    ratios.sort_by(f64::total_cmp);
    Ok(ratios[PAIRS / 2])
}

/// Writes a byte into every page.
fn touch(at: *mut u8, value: u8) {
    for page in (0..BYTES).step_by(PAGE) {
        // SAFETY: callers pass the start of `BYTES` writable bytes that are theirs.
        unsafe { at.add(page).write_volatile(value) };
    }
}

/// How many of the range's pages are present.
fn present(at: u64) -> Result<usize, std::io::Error> {
    let mut seen = vec![0u8; BYTES / PAGE];
    // SAFETY: the vector has a byte for every page of the range, which is mapped.
    let status = unsafe { libc::mincore(at as *mut libc::c_void, BYTES, seen.as_mut_ptr()) };
    if status != 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(seen.iter().filter(|page| **page & 1 == 1).count())
}

#[test]
fn pinned_memory_costs_what_a_present_mapping_costs() -> Outcome {
    let _alone = alone();
    let machine = Machine::new(Options::default())?;
    let at = machine.host_alloc(0, BYTES as u64, 0)?;
    assert_eq!(present(at)?, BYTES / PAGE, "pinned memory is all there before anybody touches it");
    machine.host_free(at)?;
    let pinned = || timed(|| Ok(machine.host_free(machine.host_alloc(0, BYTES as u64, 0)?)?));
    let ratio = median_ratio(pinned, || timed(|| Ok(Plain::new().map(drop)?)))?;
    assert!((0.5..=2.0).contains(&ratio), "making and freeing pinned memory costs {ratio:.2} of a present mapping");
    Ok(())
}

#[test]
fn touching_pinned_memory_costs_what_touching_a_present_mapping_costs() -> Outcome {
    let _alone = alone();
    let machine = Machine::new(Options::default())?;
    let pinned = machine.host_alloc(0, BYTES as u64, 0)?;
    let plain = Plain::new()?;
    let pages = |at: *mut u8| {
        timed(move || {
            for round in 0..8 {
                touch(at, round);
            }
            Ok(())
        })
    };
    let ratio = median_ratio(|| pages(pinned as *mut u8), || pages(plain.0.cast()))?;
    assert!((0.5..=2.0).contains(&ratio), "touching pinned memory costs {ratio:.2} of touching a present mapping");
    machine.host_free(pinned)?;
    Ok(())
}

#[test]
fn registering_neither_pays_for_the_programs_pages_nor_takes_them() -> Outcome {
    let _alone = alone();
    let machine = Machine::new(Options::default())?;
    let registered = || {
        timed(|| {
            let plain = Plain::new()?;
            // SAFETY: the range stays mapped until it is unregistered, in the next statement.
            unsafe { machine.host_register(0, plain.0 as u64, BYTES as u64, 0) }?;
            Ok(machine.host_unregister(plain.0 as u64)?)
        })
    };
    let ratio = median_ratio(registered, || timed(|| Ok(Plain::new().map(drop)?)))?;
    assert!((0.5..=2.0).contains(&ratio), "a mapping that is registered costs {ratio:.2} of one that is not");

    Ok(())
}

#[test]
fn registering_untouched_memory_makes_its_pages_present_at_their_price() -> Outcome {
    let _alone = alone();
    let machine = Machine::new(Options::default())?;
    let untouched = Plain::with(0)?;
    assert_eq!(present(untouched.0 as u64)?, 0);
    // SAFETY: the range stays mapped until it is unregistered.
    unsafe { machine.host_register(0, untouched.0 as u64, BYTES as u64, 0) }?;
    if present(untouched.0 as u64)? == 0 {
        println!("this system cannot populate a mapping that exists (Linux 5.14 and newer can)");
        return Ok(machine.host_unregister(untouched.0 as u64)?);
    }
    assert_eq!(present(untouched.0 as u64)?, BYTES / PAGE);
    machine.host_unregister(untouched.0 as u64)?;
    let registered = || {
        timed(|| {
            let fresh = Plain::with(0)?;
            // SAFETY: as above.
            unsafe { machine.host_register(0, fresh.0 as u64, BYTES as u64, 0) }?;
            Ok(machine.host_unregister(fresh.0 as u64)?)
        })
    };
    let ratio = median_ratio(registered, || timed(|| Ok(Plain::new().map(drop)?)))?;
    assert!((0.5..=2.0).contains(&ratio), "registering untouched memory costs {ratio:.2} of a present mapping");
    Ok(())
}
