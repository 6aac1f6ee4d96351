//! Which of the machine's devices the process sees, and under which ordinals: `CUDA_VISIBLE_DEVICES`, read
//! once, with CUDA's rules (ordinals or UUIDs; the list ends at the first entry that names no device).
//! NVML numbers devices as the machine does.

use crate::properties;
use sire_sim::Machine;
use std::sync::OnceLock;

static VISIBLE: OnceLock<Vec<u32>> = OnceLock::new();

fn devices(machine: &Machine) -> &'static [u32] {
    VISIBLE.get_or_init(|| parse(std::env::var("CUDA_VISIBLE_DEVICES").ok().as_deref(), machine.device_count()))
}

fn parse(text: Option<&str>, count: u32) -> Vec<u32> {
    let Some(text) = text else { return (0..count).collect() };
    let mut devices = Vec::new();
    for entry in text.split(',').map(str::trim) {
        let named = match entry.parse::<u32>() {
            Ok(ordinal) => Some(ordinal).filter(|ordinal| *ordinal < count),
            Err(_) if entry.starts_with("GPU-") => {
                (0..count).find(|device| properties::uuid_text(*device).starts_with(entry))
            }
            Err(_) => None,
        };
        match named {
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
