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

use serde_json::{Value, json};
use sire_core::driver::{Device, ProgramStream};
use sire_core::engine::{
    Backup, Clean, Config, Engine, PauseOptions, Policy, Report, Request, ResumeOptions, Selection, SwitchOptions,
};
use sire_sim::{Executor, Machine, Options, Poison, Profile, SimDriver};
use std::error::Error;
use std::io::Write;
use std::sync::Arc;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const GIB: u64 = 1 << 30;
const REPETITIONS: usize = 3;
const TAG: &str = "model";
/// What it changes places with.
const OTHER: &str = "other";

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

/// What is timed: an engine with models of `gib` allocations of 1 GiB, of which one fits on the device, and the clock.
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
            paced: true,
            ..Options::default()
        })?;
        let engine = Engine::new(Arc::new(SimDriver::on(machine.clone())), config);
        Ok(Subject { machine, engine, gib })
    }

    /// A resident model, and the host memory of all its backups.
    fn load(&self, tag: &str, clean: Clean) -> Result<()> {
        let policy = Policy { backup: Backup::Host, retain: true, clean, ..Policy::default() };
        for part in 0..self.gib {
            let name = format!("{tag}/{part}");
            let region = self.engine.region(&name, policy)?;
            let stream = ProgramStream::default();
            self.engine.allocate(Request { region, device: Device(0), size: GIB, stream, capturing: false })?;
            self.engine.pause(&Selection::Tag(name.clone()), PauseOptions::default())?;
            self.engine.resume(&Selection::Tag(name), ResumeOptions::default())?;
        }
        Ok(())
    }

    /// Virtual seconds of a call whose report must say that it copied `copied` GiB.
    fn time(&self, copied: u64, call: impl FnOnce() -> sire_core::error::Result<u64>) -> Result<f64> {
        let now = || self.machine.now_picoseconds().ok_or("the machine has no clock");
        let begin = now()?;
        let bytes = call()?;
        let seconds = (now()? - begin) as f64 / 1e12;
        if bytes != copied * GIB {
            return Err(format!("{bytes} bytes were copied, not {copied} GiB").into());
        }
        Ok(seconds)
    }

    fn pause(&self) -> Result<f64> {
        let copied = |report: Report| report.bytes_copied;
        self.time(self.gib, || self.engine.pause(&tag(TAG), PauseOptions::default()).map(copied))
    }

    fn resume(&self) -> Result<f64> {
        let copied = |report: Report| report.bytes_copied;
        self.time(self.gib, || self.engine.resume(&tag(TAG), ResumeOptions::default()).map(copied))
    }

    fn switch(&self, out: &str, back: &str, copied: u64) -> Result<f64> {
        let bytes = |(paused, resumed): (Report, Report)| paused.bytes_copied + resumed.bytes_copied;
        self.time(copied, || self.engine.switch(&tag(out), &tag(back), SwitchOptions::default()).map(bytes))
    }
}

fn tag(tag: &str) -> Selection {
    Selection::Tag(tag.into())
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

fn measure(profile: &Profile, gib: u64) -> Result<Vec<Value>> {
    let config = Config::default();
    let (pause_ceiling, resume_ceiling) = ceilings(profile, gib * GIB, config.chunk);
    let subject = Subject::new(profile, gib, config)?;
    subject.load(TAG, Clean::No)?;
    let (mut pauses, mut resumes) = (Vec::new(), Vec::new());
    for _ in 0..REPETITIONS {
        pauses.push(subject.pause()?);
        resumes.push(subject.resume()?);
    }
    drop(subject);
    Ok(vec![
        figure(profile, "pause", pauses, pause_ceiling, gib),
        figure(profile, "resume", resumes, resume_ceiling, gib),
        measure_switch(profile, (gib / 2).max(1), Clean::Declared)?,
        measure_switch(profile, (gib / 2).max(1), Clean::No)?,
    ])
}

/// There and back, `gib` GiB each way.
fn measure_switch(profile: &Profile, gib: u64, clean: Clean) -> Result<Value> {
    let config = Config::default();
    let chunk = config.chunk;
    let subject = Subject::new(profile, gib, config)?;
    subject.load(TAG, clean)?;
    subject.engine.pause(&tag(TAG), PauseOptions::default())?;
    subject.load(OTHER, clean)?;
    let is_clean = clean == Clean::Declared;
    let copied = if is_clean { gib } else { 2 * gib };
    let mut times = Vec::new();
    for _ in 0..REPETITIONS {
        times.push(subject.switch(OTHER, TAG, copied)?);
        times.push(subject.switch(TAG, OTHER, copied)?);
    }
    let copies = &profile.copies;
    let moving = |bytes: u64, gb_s: f64| bytes as f64 / (gb_s * 1e9);
    let (name, ceiling) = if is_clean {
        ("switch.clean", moving(gib * GIB, copies.to_device_gb_s))
    } else {
        let slower = copies.to_host_gb_s.min(copies.to_device_gb_s) * copies.duplex;
        ("switch.duplex", moving(gib * GIB, slower) + moving(chunk, copies.to_device_gb_s))
    };
    Ok(figure(profile, name, times, ceiling, gib))
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
