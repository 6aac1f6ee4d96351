//! What pauses, resumes and switches take on the model clock, held to what `docs/benchmarks.md` promises of them. Of less memory than there, so that it takes
//! seconds.

#[path = "../../../benches/simulated/figures.rs"]
mod figures;

use figures::{Measured, Result, measure, measure_switch};
use sire_sim::Profile;
use std::sync::{Mutex, PoisonError};

const GIB: u64 = 2;
const REPETITIONS: usize = 2;

/// One at a time: each takes three quarters of a GiB of host memory, and two cores at best.
static ALONE: Mutex<()> = Mutex::new(());

/// Every time is held to it, since none of them depends on how fast this machine is.
fn check_one(profile: &Profile, measured: &Measured, wanted: f64) {
    let Measured { verb, times, ceiling, bytes } = measured;
    for time in times {
        let found = ceiling / time;
        assert!(
            found >= wanted,
            "{verb} of {bytes} bytes, {}: {found:.4} of its ceiling, not {wanted:.4}",
            profile.name
        );
    }
    let (fastest, slowest) = (times[0], times[times.len() - 1]);
    assert!(slowest <= 1.01 * fastest, "{verb}, {}: {fastest} s once, {slowest} s another time", profile.name);
}

fn check(profile: &str) -> Result<()> {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let profile = Profile::find(profile)?;
    for measured in measure(&profile, GIB, REPETITIONS)? {
        check_one(&profile, &measured, 0.95);
    }
    for (is_clean, wanted) in [(true, 1.0 / 1.05), (false, 0.95)] {
        check_one(&profile, &measure_switch(&profile, GIB, is_clean, REPETITIONS)?, wanted);
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
