//! Which of the machine's devices the process sees, and under which ordinals: `CUDA_VISIBLE_DEVICES`, read
//! once, with CUDA's rules (ordinals or UUIDs; the list ends at the first entry that names no device).
//! NVML numbers devices as the machine does. Of GPUs that are divided (MIG) a process sees one part: the one that is named, or the first.

use crate::properties;
use sire_sim::Machine;
use std::sync::OnceLock;

static VISIBLE: OnceLock<Vec<u32>> = OnceLock::new();

fn devices(machine: &Machine) -> &'static [u32] {
    VISIBLE.get_or_init(|| {
        let mut listed = listed(std::env::var("CUDA_VISIBLE_DEVICES").ok().as_deref(), machine);
        listed.truncate(if properties::parts() == 0 { listed.len() } else { 1 });
        listed
    })
}

/// The device that an entry of the list means; of a GPU that is divided, the first part.
fn named(entry: &str, machine: &Machine) -> Option<u32> {
    let gpus = 0..properties::gpus(machine);
    let first_of = |gpu| properties::devices_of(gpu).start;
    match entry.parse::<u32>() {
        Ok(ordinal) => gpus.contains(&ordinal).then(|| first_of(ordinal)),
        Err(_) if entry.starts_with("MIG-") => {
            (0..machine.device_count()).find(|device| properties::uuid_text(*device).starts_with(entry))
        }
        Err(_) if entry.starts_with("GPU-") => {
            gpus.into_iter().find(|gpu| properties::gpu_uuid_text(*gpu).starts_with(entry)).map(first_of)
        }
        Err(_) => None,
    }
}

fn listed(text: Option<&str>, machine: &Machine) -> Vec<u32> {
    let Some(text) = text else { return (0..machine.device_count()).collect() };
    let mut devices = Vec::new();
    for entry in text.split(',').map(str::trim) {
        match named(entry, machine) {
            Some(device) if !devices.contains(&device) => devices.push(device),
            // CUDA sees no device at all if one is listed twice.
            Some(_) => return Vec::new(),
            None => break,
        }
    }
    devices
}

/// How many devices the process sees.
pub fn count(machine: &Machine) -> u32 {
    devices(machine).len() as u32
}

/// The machine's number of the process's device `ordinal`.
pub fn to_machine(machine: &Machine, ordinal: u32) -> Option<u32> {
    devices(machine).get(ordinal as usize).copied()
}

/// The process's ordinal of the machine's `device`; -1 if the process does not see it.
pub fn to_program(machine: &Machine, device: u32) -> i32 {
    devices(machine).iter().position(|visible| *visible == device).map_or(-1, |at| at as i32)
}

/// The process's ordinal of what it sees of a GPU.
pub fn part_of(machine: &Machine, gpu: u32) -> Option<i32> {
    devices(machine).iter().position(|visible| properties::gpu_of(*visible) == gpu).map(|at| at as i32)
}
