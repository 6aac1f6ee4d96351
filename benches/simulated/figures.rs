//! What of memory of a device's size is timed on the model clock, and its ceilings (for the formulas see `main.rs`). The program prints the figures; a test of
//! `sire-sim` holds them to their targets.

use sire_core::driver::{Device, ProgramStream};
use sire_core::engine::{
    Backup, Clean, Config, Engine, PauseOptions, Policy, Report, Request, ResumeOptions, Selection, SwitchOptions,
};
use sire_sim::{Executor, Machine, Options, Poison, Profile, SimDriver};
use std::error::Error;
use std::sync::Arc;

pub type Result<T> = std::result::Result<T, Box<dyn Error>>;

pub const GIB: u64 = 1 << 30;
const TAG: &str = "model";
/// What it changes places with.
const OTHER: &str = "other";

/// What a verb took, in virtual seconds, and what it takes at best.
pub struct Measured {
    pub verb: &'static str,
    /// In rising order.
    pub times: Vec<f64>,
    pub ceiling: f64,
    pub bytes: u64,
}

impl Measured {
    fn new(verb: &'static str, mut times: Vec<f64>, ceiling: f64, gib: u64) -> Measured {
        times.sort_by(f64::total_cmp);
        Measured { verb, times, ceiling, bytes: gib * GIB }
    }
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

/// Pause and resume of `gib` GiB.
pub fn measure(profile: &Profile, gib: u64, repetitions: usize) -> Result<[Measured; 2]> {
    let config = Config::default();
    let (pause_ceiling, resume_ceiling) = ceilings(profile, gib * GIB, config.chunk);
    let subject = Subject::new(profile, gib, config)?;
    subject.load(TAG, Clean::No)?;
    let (mut pauses, mut resumes) = (Vec::new(), Vec::new());
    for _ in 0..repetitions {
        pauses.push(subject.pause()?);
        resumes.push(subject.resume()?);
    }
    Ok([Measured::new("pause", pauses, pause_ceiling, gib), Measured::new("resume", resumes, resume_ceiling, gib)])
}

/// A switch of `gib` GiB each way, of content that has not changed since its backup, or of content that is copied: there and back, so many times.
pub fn measure_switch(profile: &Profile, gib: u64, is_clean: bool, repetitions: usize) -> Result<Measured> {
    let config = Config::default();
    let chunk = config.chunk;
    let clean = if is_clean { Clean::Declared } else { Clean::No };
    let subject = Subject::new(profile, gib, config)?;
    subject.load(TAG, clean)?;
    subject.engine.pause(&tag(TAG), PauseOptions::default())?;
    subject.load(OTHER, clean)?;
    let copied = if is_clean { gib } else { 2 * gib };
    let copies = &profile.copies;
    let moving = |bytes: u64, gb_s: f64| bytes as f64 / (gb_s * 1e9);
    let (verb, ceiling) = if is_clean {
        ("switch.clean", moving(gib * GIB, copies.to_device_gb_s))
    } else {
        let slower = copies.to_host_gb_s.min(copies.to_device_gb_s) * copies.duplex;
        ("switch.duplex", moving(gib * GIB, slower) + moving(chunk, copies.to_device_gb_s))
    };
    let mut times = Vec::new();
    for _ in 0..repetitions {
        times.push(subject.switch(OTHER, TAG, copied)?);
        times.push(subject.switch(TAG, OTHER, copied)?);
    }
    Ok(Measured::new(verb, times, ceiling, gib))
}
