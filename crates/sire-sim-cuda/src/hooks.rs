//! The device's own C functions (`sire_sim_*`): what tests, the demo and the Python operations layer need
//! beyond CUDA. Numbers returned are CUDA's; texts take a buffer, its capacity, and a place for the full
//! length without the NUL (a short buffer is not an error).

use crate::boundary::{Out, Text, contain, export, write_text};
use crate::driver::LABEL_SHIFT;
use crate::{kernels, state};
use serde_json::Value;
use sire_sim::{Code, Machine};
use std::ffi::{c_char, c_int};
use std::fmt::Write as _;

export! { RuntimeQuery:
    /// Whether work on `device` may touch the range. If not, the device gets the sticky illegal-address error,
    /// which is returned: what a kernel on a GPU would have met.
    fn sire_sim_check(ptr: u64, length: usize, device: c_int, write: c_int) |machine| {
        let device = state::check_device(machine, device)?;
        machine.check_access(ptr, length as u64, device, write != 0)
    }

    /// The same question without consequences: `answer` is 1 or 0.
    fn sire_sim_accessible(ptr: u64, length: usize, device: c_int, write: c_int, answer: Out<c_int>) |machine| {
        let device = state::check_device(machine, device)?;
        answer.set(c_int::from(machine.accessible(ptr, length as u64, device, write != 0)))
    }

    /// The census of frames, as JSON. Runs whose memory was made under a tag also say `label`.
    fn sire_sim_census(buffer: Out<c_char>, capacity: usize, length: Out<usize>) |machine| {
        length.set_if(write_text(buffer, capacity, &labelled_census(machine).to_string()));
        Ok(())
    }

    /// A path through which anybody may look at the device's memory file (its blocks are what the system holds).
    fn sire_sim_memfd(device: c_int, buffer: Out<c_char>, capacity: usize) |machine| {
        let device = state::check_device(machine, device)?;
        let census = machine.census();
        let path = census["devices"][device as usize]["memory_file"].as_str().unwrap_or_default();
        if path.is_empty() || path.len() >= capacity {
            return Err(Code::INVALID_VALUE.because(format!("{capacity} bytes for the path '{path}'")));
        }
        write_text(buffer.required()?, capacity, path);
        Ok(())
    }

    /// The census label of physical memory that this thread makes from now on (`cuMemCreate`); null or empty ends it.
    fn sire_sim_set_tag(tag: Text) |_machine| { state::set_label(tag.get_or_null()?) }

    /// Replaces the fault plan; an empty one ends all faults. `CUDA_ERROR_INVALID_VALUE` if it cannot be read
    /// (what is wrong is said on standard error).
    fn sire_sim_fault(plan: Text) |machine| {
        machine.set_faults(plan.get_or_null()?.unwrap_or_default()).map_err(|message| {
            state::say("sire_sim_fault", &message);
            Code::INVALID_VALUE.because(message)
        })
    }

    /// The name of the profile that virtual time follows; empty without one.
    fn sire_sim_profile(buffer: Out<c_char>, capacity: usize, length: Out<usize>) |machine| {
        let name = machine.options().profile.as_ref().map_or("", |profile| &profile.name);
        length.set_if(write_text(buffer, capacity, name));
        Ok(())
    }

    /// How often each function was called, as a JSON object; `registered kernels` counts those.
    fn sire_sim_counters(buffer: Out<c_char>, capacity: usize, length: Out<usize>) |machine| {
        let mut text = format!("{{\"registered kernels\": {}", kernels::count());
        for (name, count) in machine.call_counts() {
            // Writing to a String cannot fail; function names need no escapes.
            let _ = write!(text, ", \"{name}\": {count}");
        }
        text.push('}');
        length.set_if(write_text(buffer, capacity, &text));
        Ok(())
    }
}

/// The machine's census with the names of labels, which only this crate knows.
fn labelled_census(machine: &Machine) -> Value {
    let mut census = machine.census();
    let devices = census["devices"].as_array_mut().into_iter().flatten();
    for run in devices.filter_map(|device| device["runs"].as_array_mut()).flatten() {
        let label = run["tag"].as_u64().map_or(0, |tag| (tag >> LABEL_SHIFT) as u16);
        if let Some(name) = state::label_name(label) {
            run["label"] = Value::String(name);
        }
    }
    census
}

/// Bytes of the device in use by all processes; 0 for a device that does not exist.
#[unsafe(no_mangle)]
pub extern "C" fn sire_sim_used(device: c_int) -> u64 {
    let used = || {
        let machine = state::machine()?;
        let device = state::check_device(machine, device).ok()?;
        let (free, total) = machine.memory_info(device).ok()?;
        Some(total - free)
    };
    contain("sire_sim_used", None, used).unwrap_or(0)
}

/// Virtual seconds since the device was made, by the profile of `SIRE_SIM_PROFILE`: the latest of all threads' clocks; whatever is called later
/// begins no earlier. -1 without a profile. A model's time, not a GPU's.
#[unsafe(no_mangle)]
pub extern "C" fn sire_sim_now() -> f64 {
    let now = || if state::is_forked() { None } else { state::machine()?.now() };
    contain("sire_sim_now", None, now).unwrap_or(-1.0)
}
