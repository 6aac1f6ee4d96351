//! The device's own C functions (`sire_sim_*`): what tests, the demo and the Python operations layer need
//! beyond CUDA. Numbers returned are CUDA's; texts take a buffer, its capacity, and a place for the full
//! length without the NUL (a short buffer is not an error).

use crate::boundary::{Out, Text, contain, export, write_text};
use crate::{kernels, state};
use sire_sim::Code;
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

    /// The census of frames, as JSON.
    fn sire_sim_census(buffer: Out<c_char>, capacity: usize, length: Out<usize>) |machine| {
        length.set_if(write_text(buffer, capacity, &machine.census_json()));
        Ok(())
    }

    /// Replaces the fault plan; an empty one ends all faults. `CUDA_ERROR_INVALID_VALUE` if it cannot be read
    /// (what is wrong is said on standard error).
    fn sire_sim_fault(plan: Text) |machine| {
        machine.set_faults(plan.get_or_null()?.unwrap_or_default()).map_err(|message| {
            state::say("sire_sim_fault", &message);
            Code::INVALID_VALUE.because(message)
        })
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
