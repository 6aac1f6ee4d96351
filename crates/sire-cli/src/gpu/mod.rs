//! GPUs seen from outside a program: NVML's figures ([`nvml`]), which of them is meant ([`visible`]), and programs that are watched while they run
//! ([`watched`]), with what they have of a GPU ([`gauge`]). Nothing here has a CUDA context, so that looking costs no memory of the device.

pub mod gauge;
pub mod nvml;
pub mod visible;
pub mod watched;

use std::ffi::OsString;

use crate::arguments::GpuJob;
use crate::environment::Changes;
use crate::failure::Failure;
use crate::{process, run, software_env};

/// Starts this command anew in the software device's environment, if one is named or the program's interpreter lies in one: NVML is found there.
/// Returns where there is none, or this is the second start.
pub fn enter_environment(job: &GpuJob) -> Result<(), Failure> {
    let environment = job.env.clone().or_else(|| run::environment_of(&job.command));
    let Some(dir) = environment.filter(|_| !job.inside) else { return Ok(()) };
    let changes: Changes = software_env::changes(&dir)?;
    let mut again: Vec<OsString> = std::env::args_os().collect();
    let exe = std::env::current_exe()
        .map_err(|error| Failure::new(format!("could not find this command's own file: {error}")))?;
    again[0] = exe.into();
    again.insert(2, "--inside".into());
    Err(process::become_program(&again, &changes))
}
