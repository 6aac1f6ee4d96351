//! `sire software-env DIR`: a virtual environment in which the unmodified CUDA build of PyTorch runs without a GPU.
//!
//! PyTorch is installed without NVIDIA's packages. In their place in site-packages lies the software device's library,
//! once, under every name that PyTorch's libraries look up; empty local distributions answer for the packages' names, so
//! that pip never pulls the real ones over it. Every step looks at what is there first: a directory that was left half
//! made is completed, and one that is complete costs no network.

mod build;
mod layout;
mod marker;
mod python;

use std::path::Path;
use std::process::ExitCode;

use crate::arguments::{SoftwareEnvAction, SoftwareEnvOptions};
use crate::environment::Changes;
use crate::failure::{Failure, While as _};
use crate::{output, process};

use layout::Layout;
use marker::Marker;

/// Builds the environment, runs a program in it, or describes it.
pub fn software_env(options: &SoftwareEnvOptions) -> Result<ExitCode, Failure> {
    match &options.action {
        None => build::build(options),
        Some(SoftwareEnvAction::Info { json }) => info(&options.dir, *json),
        Some(SoftwareEnvAction::Exec { device_memory, devices, command }) => {
            let mut changes = changes(&options.dir)?;
            if let Some(size) = device_memory {
                if !size.starts_with(|first: char| first.is_ascii_digit()) {
                    return Err(Failure::usage(format!("--device-memory {size}: this is not a size"))
                        .advice("Write bytes, or a size such as 8GiB."));
                }
                changes.set("SIRE_SIM_MEMORY", size);
            }
            if let Some(count) = devices {
                changes.set("SIRE_SIM_DEVICES", count.to_string());
            }
            Err(process::become_program(command, &changes))
        }
    }
}

/// What a program needs in its environment to run on the software device of `dir`. Programs that share `dir` share the
/// device, unless SIRE_SIM_DIR is set already.
pub fn changes(dir: &Path) -> Result<Changes, Failure> {
    let layout = complete(dir)?;
    let mut changes = Changes::default();
    changes.prepend("PATH", layout.bin());
    changes.set("VIRTUAL_ENV", layout.dir.as_os_str());
    changes.prepend("LD_LIBRARY_PATH", layout.libraries()?);
    let device = layout.dir.join("device");
    std::fs::create_dir_all(&device).while_(|| format!("make {}", device.display()))?;
    changes.set_default("SIRE_SIM_DIR", device);
    Ok(changes)
}

/// Whether `dir` was made by this command.
pub fn is_environment(dir: &Path) -> bool {
    Marker::read(dir).is_some()
}

fn complete(dir: &Path) -> Result<Layout, Failure> {
    let make = format!("Make it with: sire software-env {}", dir.display());
    let layout = Layout::existing(dir).map_err(|why| why.advice(&make))?;
    match Marker::read(&layout.dir) {
        Some(marker) if marker.complete => Ok(layout),
        Some(_) => Err(Failure::new(format!("{} is only half made", dir.display()))
            .advice(format!("Complete it with: sire software-env {}", dir.display()))),
        None => Err(Failure::new(format!("{} is not a software-device environment", dir.display())).advice(make)),
    }
}

fn info(dir: &Path, json: bool) -> Result<ExitCode, Failure> {
    let layout = complete(dir)?;
    let Some(marker) = Marker::read(&layout.dir) else {
        return Err(Failure::new(format!("the marker file of {} disappeared", dir.display())));
    };
    let library = layout.libraries()?.join(layout::STAND_IN);
    let intact = crate::files::sha256(&library).is_ok_and(|sum| sum == marker.stand_in_sha256);
    if json {
        let value = serde_json::json!({
            "dir": layout.dir, "python": layout.bin().join("python"), "stand_in": library, "stand_in_intact": intact, "marker": marker,
        });
        output::line(&format!("{value:#}"));
    } else {
        output::line(&format!("environment  {}", layout.dir.display()));
        output::line(&format!("python       {} ({})", layout.bin().join("python").display(), marker.python));
        output::line(&format!("torch        {}", marker.torch.as_deref().unwrap_or("none")));
        output::line(&format!("stand-in     {}", library.display()));
        output::line(&format!(
            "             sha256 {}{}",
            marker.stand_in_sha256,
            if intact { "" } else { " (the file is another one now!)" }
        ));
        output::line(&format!("op layer     sha256 {}", marker.op_layer_sha256));
        output::line(&format!("made by      sire {}", marker.sire));
        output::line(&format!("empty        {}", marker.empty.join(", ")));
        output::line(&format!(
            "extra        {}",
            if marker.extra.is_empty() { "none".into() } else { marker.extra.join(", ") }
        ));
    }
    if intact {
        return Ok(ExitCode::SUCCESS);
    }
    Err(Failure::new(format!("{} was replaced by something else", library.display()))
        .advice(format!("Put it back with: sire software-env {}", dir.display())))
}
