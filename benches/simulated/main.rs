//! Pauses and resumes memory of an H100's size on the model clock, and compares the virtual time with what the link and the virtual-memory
//! calls allow at best. Every figure is of a model, not of a GPU, and says so.
//!
//!     cargo run --release -p sire-sim --example simulated -- [--profile NAME|FILE]... [--gib N] [--json FILE]
//!
//! The engine is the real one; copies are hollow, so that only one GiB of host memory is present at a time. Host backups are
//! made and pinned beforehand, GiB by GiB, and retained: what is timed is a warm pause. The ceilings, for N bytes in chunks of c bytes:
//!
//!     pause  = synchronize + max(N / to_host, chunks * (unmap + release)) + c / to_host
//!     resume = max(N / to_device, chunks * (create + map) + allocations * set_access) + (create + map + set_access)
//!
//! and, for a switch between two models of N/2 bytes each on a device that holds just one of them, where the other one's backup is
//!
//!     clean (nothing has changed since):  the copy in alone, N/2 / to_device
//!     outdated (everything is copied):    max(N/2 / (duplex * to_host), N/2 / (duplex * to_device)) + c / to_device

mod figures;

use figures::{Measured, Result, measure, measure_switch};
use serde_json::{Value, json};
use sire_sim::Profile;
use std::io::Write;

const REPETITIONS: usize = 2;

struct Arguments {
    profiles: Vec<Profile>,
    gib: u64,
    json: Option<String>,
}

fn arguments() -> Result<Arguments> {
    let (mut profiles, mut gib, mut file) = (Vec::new(), 64, None);
    let mut given = std::env::args().skip(1);
    while let Some(name) = given.next() {
        let mut value = || given.next().ok_or_else(|| format!("{name} needs a value"));
        match name.as_str() {
            "--profile" => profiles.push(Profile::find(&value()?)?),
            "--gib" => gib = value()?.parse().ok().filter(|gib| *gib > 0).ok_or("--gib: expected a whole number")?,
            "--json" => file = Some(value()?),
            other => return Err(format!("{other}: expected --profile, --gib or --json").into()),
        }
    }
    if profiles.is_empty() {
        profiles = Profile::names().map(Profile::find).collect::<std::result::Result<_, _>>()?;
    }
    Ok(Arguments { profiles, gib, json: file })
}

fn figure(profile: &Profile, measured: &Measured) -> Value {
    let Measured { verb, times, ceiling, bytes } = measured;
    let median = times[times.len() / 2];
    json!({
        "name": format!("sim.{}.{verb}", profile.name),
        "value": median,
        "unit": "s",
        "min": times[0],
        "median": median,
        "max": times[times.len() - 1],
        "ceiling": ceiling,
        "ratio": ceiling / median,
        "samples": times.len(),
        "bytes": bytes,
        "simulated": true,
        "device": format!("model clock, not a GPU: {}", profile.device),
    })
}

fn figures(profile: &Profile, gib: u64) -> Result<Vec<Value>> {
    let half = (gib / 2).max(1);
    let mut all = Vec::from(measure(profile, gib, REPETITIONS)?);
    for is_clean in [true, false] {
        all.push(measure_switch(profile, half, is_clean, REPETITIONS)?);
    }
    Ok(all.iter().map(|measured| figure(profile, measured)).collect())
}

fn main() -> Result<()> {
    let arguments = arguments()?;
    let mut file = arguments.json.map(std::fs::File::create).transpose()?;
    for profile in &arguments.profiles {
        for figure in figures(profile, arguments.gib)? {
            println!("{figure}");
            if let Some(file) = &mut file {
                writeln!(file, "{figure}")?;
            }
        }
    }
    Ok(())
}
