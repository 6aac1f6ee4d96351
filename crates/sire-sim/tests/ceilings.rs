//! What pauses, resumes and switches take on the model clock, held to what `docs/benchmarks.md` promises of them. Of less memory than there, so that it takes
//! seconds.

#[path = "../../../benches/simulated/figures.rs"]
mod figures;

use figures::{Measured, Result, measure, measure_switch};
use sire_sim::Profile;
use std::sync::{Mutex, PoisonError};

const GIB: u64 = 8;
/// How many switches are tried until one is as fast as all are on an idle machine. Their two directions are threads that wait for one another; where the
/// machine is busy, one that comes late in real time may come late in virtual time, too.
const TRIES: usize = 16;

/// One at a time: each takes both cores, and three quarters of a GiB of host memory.
static ALONE: Mutex<()> = Mutex::new(());

fn check_one(profile: &Profile, measured: &Measured, wanted: f64) {
    let Measured { verb, times, ceiling, bytes } = measured;
    let found = ceiling / times[0];
    assert!(
        found >= wanted,
        "{verb} of {bytes} bytes, {}: {found:.4} of its ceiling instead of {wanted:.4}",
        profile.name
    );
}

fn check(profile: &str) -> Result<()> {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let profile = Profile::find(profile)?;
    for measured in measure(&profile, GIB, 1)? {
        check_one(&profile, &measured, 0.95);
    }
    for (is_clean, wanted) in [(true, 1.0 / 1.05), (false, 0.95)] {
        let is_met = |times: &[f64], ceiling: f64| times.iter().any(|time| ceiling / time >= wanted);
        let tried = measure_switch(&profile, GIB, is_clean, |times, best| times.len() >= TRIES || is_met(times, best))?;
        check_one(&profile, &tried, wanted);
    }
    Ok(())
}

#[test]
fn an_h100_with_slow_memory_calls() -> Result<()> {
    check("h100-pcie5-kvcached")
}

#[test]
fn an_h100_with_fast_memory_calls() -> Result<()> {
    check("h100-pcie5-vattention")
}

#[test]
fn an_a100() -> Result<()> {
    check("a100-pcie4-kvcached")
}
