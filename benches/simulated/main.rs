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

use serde_json::{Value, json};
use sire_core::driver::{Device, ProgramStream};
use sire_core::engine::{Backup, Config, Engine, PauseOptions, Policy, Report, Request, ResumeOptions, Selection};
use sire_sim::{Executor, Machine, Options, Poison, Profile, SimDriver};
use std::error::Error;
use std::io::Write;
use std::sync::Arc;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const GIB: u64 = 1 << 30;
const REPETITIONS: usize = 3;
const TAG: &str = "model";

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

/// What is timed: an engine with `gib` allocations of 1 GiB, and the clock.
struct Subject {
    machine: Machine,
    engine: Engine,
    gib: u64,
}

impl Subject {
    fn new(profile: &Profile, gib: u64, config: Config) -> Result<Subject> {
        let machine = Machine::new(Options {
            memory: gib * GIB,
            poison: Poison::Off,
            executor: Executor::Inline,
            profile: Some(profile.clone()),
            hollow: true,
            ..Options::default()
        })?;
        let engine = Engine::new(Arc::new(SimDriver::on(machine.clone())), config);
        let policy = Policy { backup: Backup::Host, retain: true, ..Policy::default() };
        for part in 0..gib {
            let region = engine.region(&format!("{TAG}/{part}"), policy)?;
            let stream = ProgramStream::default();
            engine.allocate(Request { region, device: Device(0), size: GIB, stream, capturing: false })?;
        }
        Ok(Subject { machine, engine, gib })
    }

    /// Builds the host memory of all backups.
    fn warm(&self) -> Result<()> {
        for part in 0..self.gib {
            let tag = Selection::Tag(format!("{TAG}/{part}"));
            self.engine.pause(&tag, PauseOptions::default())?;
            self.engine.resume(&tag, ResumeOptions::default())?;
        }
        Ok(())
    }

    /// Virtual seconds of a call that must copy everything.
    fn time(&self, call: impl FnOnce(&Selection) -> sire_core::error::Result<Report>) -> Result<f64> {
        let now = || self.machine.now_picoseconds().ok_or("the machine has no clock");
        let begin = now()?;
        let report = call(&Selection::Tag(TAG.into()))?;
        let seconds = (now()? - begin) as f64 / 1e12;
        if report.bytes_copied != self.gib * GIB {
            return Err(format!("{} bytes were copied, not {} GiB", report.bytes_copied, self.gib).into());
        }
        Ok(seconds)
    }
}

/// Ceilings of pause and resume, in seconds.
fn ceilings(profile: &Profile, bytes: u64, chunk: u64) -> (f64, f64) {
    let (copies, vmm) = (&profile.copies, &profile.vmm);
    let (chunks, allocations) = (bytes.div_ceil(chunk) as f64, (bytes / GIB) as f64);
    let moving = |bytes: u64, gb_s: f64| bytes as f64 / (gb_s * 1e9);
    let per_chunk = |cost: sire_sim::Cost| cost.seconds(chunk);
    let scrub = vmm.scrub_gb_s.map_or(0.0, |rate| moving(bytes, rate));
    let away = chunks * (per_chunk(vmm.unmap) + per_chunk(vmm.release));
    let pause = profile.calls.synchronize_us * 1e-6
        + moving(bytes, copies.to_host_gb_s).max(away).max(scrub)
        + moving(chunk, copies.to_host_gb_s);
    let made = per_chunk(vmm.create) + per_chunk(vmm.map);
    let back = chunks * made + allocations * vmm.set_access.seconds(GIB);
    let resume = moving(bytes, copies.to_device_gb_s).max(back) + made + vmm.set_access.seconds(chunk);
    (pause, resume)
}

fn figure(profile: &Profile, verb: &str, mut times: Vec<f64>, ceiling: f64, gib: u64) -> Value {
    times.sort_by(f64::total_cmp);
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
        "bytes": gib * GIB,
        "simulated": true,
        "device": format!("model clock, not a GPU: {}", profile.device),
    })
}

fn measure(profile: &Profile, gib: u64) -> Result<[Value; 2]> {
    let config = Config::default();
    let (pause_ceiling, resume_ceiling) = ceilings(profile, gib * GIB, config.chunk);
    let subject = Subject::new(profile, gib, config)?;
    subject.warm()?;
    let (mut pauses, mut resumes) = (Vec::new(), Vec::new());
    for _ in 0..REPETITIONS {
        pauses.push(subject.time(|tag| subject.engine.pause(tag, PauseOptions::default()))?);
        resumes.push(subject.time(|tag| subject.engine.resume(tag, ResumeOptions::default()))?);
    }
    let pause = figure(profile, "pause", pauses, pause_ceiling, gib);
    Ok([pause, figure(profile, "resume", resumes, resume_ceiling, gib)])
}

fn main() -> Result<()> {
    let arguments = arguments()?;
    let mut file = arguments.json.map(std::fs::File::create).transpose()?;
    for profile in &arguments.profiles {
        for figure in measure(profile, arguments.gib)? {
            println!("{figure}");
            if let Some(file) = &mut file {
                writeln!(file, "{figure}")?;
            }
        }
    }
    Ok(())
}
