//! Which GPU is meant: that of `--gpu`; else the first that CUDA_VISIBLE_DEVICES names, as CUDA reads it; else the first that there is.

use super::nvml::{self, Gpu, Machine};
use crate::arguments::GpuJob;
use crate::failure::Failure;
use crate::output;

/// The GPU for a program.
pub fn chosen(job: &GpuJob) -> Result<Gpu, Failure> {
    let machine = nvml::look()?;
    let visible = std::env::var_os("CUDA_VISIBLE_DEVICES").map(|text| text.to_string_lossy().into_owned());
    let at = match (&job.gpu, visible) {
        (Some(gpu), Some(visible)) => told(&machine, gpu, &visible)?,
        (Some(gpu), None) => machine.find(gpu)?,
        (None, Some(visible)) => first(&machine, &visible)?,
        (None, None) => machine.find("0")?,
    };
    Ok(machine.take(at))
}

/// What is said counts, and more than what the variable says.
fn told(machine: &Machine, gpu: &str, visible: &str) -> Result<usize, Failure> {
    let at = machine.find(gpu)?;
    let entries: Vec<&str> = visible.split(',').map(str::trim).collect();
    let is_clear = entries.iter().all(|entry| !is_unclear(machine, entry));
    if is_clear && !entries.iter().any(|entry| meant(machine, entry) == Some(at)) {
        output::progress(&format!("--gpu {gpu} is none of CUDA_VISIBLE_DEVICES={visible}; --gpu counts"));
    }
    Ok(at)
}

fn first(machine: &Machine, visible: &str) -> Result<usize, Failure> {
    let entry = visible.split(',').next().unwrap_or_default().trim();
    if is_unclear(machine, entry) {
        let why = format!("CUDA_VISIBLE_DEVICES={visible}: CUDA counts GPUs of several kinds by their speed");
        return Err(
            Failure::usage(why).advice("Set CUDA_DEVICE_ORDER=PCI_BUS_ID, or name a GPU: --gpu NUMBER or UUID.")
        );
    }
    let none = || {
        Failure::usage(format!("CUDA_VISIBLE_DEVICES={visible} names no GPU at its beginning"))
            .advice(format!("Name one with --gpu, which counts. There are: {}.", machine.names()))
    };
    meant(machine, entry).ok_or_else(none)
}

/// Whether CUDA may count in another order than NVML, which goes by the bus.
fn is_unclear(machine: &Machine, entry: &str) -> bool {
    let by_bus = std::env::var_os("CUDA_DEVICE_ORDER").is_some_and(|order| order == "PCI_BUS_ID");
    entry.parse::<u32>().is_ok() && !by_bus && !machine.is_of_one_kind()
}

/// What an entry of the variable means; of a GPU that is divided, the first part.
fn meant(machine: &Machine, entry: &str) -> Option<usize> {
    match entry.parse::<u32>() {
        Ok(ordinal) => machine.at_number(&ordinal.to_string()).or_else(|| machine.at_number(&format!("{ordinal}:"))),
        Err(_) => machine.at_uuid(entry),
    }
}
