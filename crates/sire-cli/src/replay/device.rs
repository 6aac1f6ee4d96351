//! The device of a replay: a GPU, the software device, or the software device with a model clock.

use std::sync::Arc;
use std::time::Instant;

use sire_core::driver::Driver;
use sire_core::size;
use sire_cuda::CudaDriver;
use sire_sim::{Executor, Machine, Options, Poison, Profile, SimDriver};

use crate::arguments::{Device as Wanted, ReplayOptions};
use crate::failure::Failure;

use super::needs::Needs;

/// What a software device has beyond what a trace needs.
const ROOM: u64 = 64 << 20;
const GRANULE: u64 = 2 << 20;
/// More than any program reserves; a damaged trace asks for more.
const LARGEST: u64 = 1 << 44;

/// A device and its clock.
#[derive(Debug)]
pub struct Device {
    /// The engine's door.
    pub driver: Arc<dyn Driver>,
    /// How many devices there are: fewer than in the trace share the work.
    pub count: u32,
    /// For the figures.
    pub name: String,
    clock: Clock,
}

#[derive(Debug)]
enum Clock {
    Wall(Instant),
    Model(Machine),
}

impl Device {
    /// Seconds on the device's clock.
    pub fn now(&self) -> f64 {
        match &self.clock {
            Clock::Wall(start) => start.elapsed().as_secs_f64(),
            Clock::Model(machine) => machine.now().unwrap_or(0.0),
        }
    }

    /// Whether times are of a model.
    pub fn is_simulated(&self) -> bool {
        matches!(self.clock, Clock::Model(_))
    }
}

/// Opens what the options ask for.
pub fn open(options: &ReplayOptions, needs: &Needs) -> Result<Device, Failure> {
    match (options.device, &options.profile) {
        (Wanted::Cuda, Some(_)) => Err(Failure::usage("--profile is for the software device")),
        (_, Some(profile)) => {
            if options.check {
                return Err(Failure::usage("--check needs bytes, and the model clock moves none; leave --profile out"));
            }
            let profile = Profile::find(profile).map_err(Failure::new)?;
            software(memory(options, needs)?, needs.devices, Some(profile))
        }
        (Wanted::Software, None) => software(memory(options, needs)?, needs.devices, None),
        (Wanted::Cuda, None) => cuda(),
        (Wanted::Auto, None) => cuda().or_else(|_| software(memory(options, needs)?, needs.devices, None)),
    }
}

fn cuda() -> Result<Device, Failure> {
    let named = std::env::var_os("SIRE_LIBCUDA").map(std::path::PathBuf::from);
    let advice = "Install NVIDIA's driver, or replay on the software device: --device software";
    let options = sire_cuda::Options { path: named, exportable: false };
    let opened = CudaDriver::open(&options, None).and_then(|driver| Ok((driver.device_count()?, driver)));
    let (count, driver) = opened.map_err(|error| Failure::new(error.to_string()).advice(advice))?;
    let name = driver.description();
    Ok(Device { driver: Arc::new(driver), count, name, clock: Clock::Wall(Instant::now()) })
}

/// What was asked for, else what the trace held at once.
fn memory(options: &ReplayOptions, needs: &Needs) -> Result<u64, Failure> {
    let Some(text) = &options.device_memory else {
        return Ok(needs.peak.saturating_add(needs.peak / 8).saturating_add(ROOM).min(LARGEST));
    };
    size::parse(text).ok_or_else(|| Failure::usage(format!("--device-memory {text}: expected a size such as 8GiB")))
}

/// A software device of `memory` bytes; with a profile its copies are hollow and its clock is the model's.
pub fn software(memory: u64, devices: u32, profile: Option<Profile>) -> Result<Device, Failure> {
    let model = profile.as_ref().map(|profile| profile.device.clone());
    let machine = Machine::new(Options {
        devices: devices.clamp(1, sire_sim::options::MAX_DEVICES),
        memory: memory.next_multiple_of(GRANULE),
        poison: Poison::Off,
        timing: model.is_none(),
        hollow: model.is_some(),
        executor: if model.is_some() { Executor::Inline } else { Executor::Threads },
        profile,
        ..Options::default()
    })
    .map_err(|error| {
        Failure::new(format!("no software device of {memory} bytes: {error}"))
            .advice("Give it less with --device-memory, or use the model clock: --profile h100-pcie5-kvcached")
    })?;
    let driver = SimDriver::on(machine.clone());
    let (clock, name) = match model {
        Some(model) => (Clock::Model(machine.clone()), format!("model clock, not a GPU: {model}")),
        None => (Clock::Wall(Instant::now()), "software".to_owned()),
    };
    Ok(Device { driver: Arc::new(driver), count: machine.device_count(), name, clock })
}
