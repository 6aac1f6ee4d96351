//! `sire run`: the variables that put Sire under a program, applied to it or printed.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use crate::arguments::{Device, HookMode, RunOptions};
use crate::environment::Changes;
use crate::failure::Failure;
use crate::{doctor, library, output, process, software_env};

/// Becomes the program, or prints what it would get.
pub fn run(options: &RunOptions) -> Result<ExitCode, Failure> {
    let library = library::sire()?;
    let mut changes = device(options)?;
    hook(&mut changes, options.hook_mode, &library)?;
    region(&mut changes, options)?;
    turns(&mut changes, options)?;
    if options.print_env {
        changes.shell_lines().iter().for_each(|line| output::line(line));
        return Ok(ExitCode::SUCCESS);
    }
    Err(process::become_program(&options.command, &changes))
}

/// The device's part. `auto` takes a GPU if its driver works, else the software device if its environment is known.
fn device(options: &RunOptions) -> Result<Changes, Failure> {
    let environment = options.env.clone().or_else(|| environment_of(&options.command));
    match (options.device, environment) {
        (Device::Cuda, _) => cuda(),
        (Device::Software, Some(dir)) => software_env::changes(&dir),
        (Device::Software, None) => Err(Failure::new("the software device's environment is not known").advice(
            "Make one with 'sire software-env DIR' and name it: --env DIR, or SIRE_SOFTWARE_ENV=DIR, or run its own bin/python.",
        )),
        // A named environment is a wish; one that merely holds the program's Python is not a reason to look for a GPU either:
        // that Python sees the software device only.
        (Device::Auto, Some(dir)) => software_env::changes(&dir),
        (Device::Auto, None) => Ok(cuda().unwrap_or_else(|why| {
            output::progress(&format!("warning: {why}\n      The program runs, but will find no device; 'sire doctor' says more."));
            Changes::default()
        })),
    }
}

fn cuda() -> Result<Changes, Failure> {
    let driver = doctor::probe::driver(&Changes::default());
    match driver.error {
        None => Ok(Changes::default()),
        Some(why) => Err(Failure::new(format!("no usable CUDA driver: {why}"))
            .advice("Install NVIDIA's driver, or run on the software device: --device software --env DIR")),
    }
}

/// The software-device environment that the program's interpreter lies in, if it is one.
pub fn environment_of(command: &[OsString]) -> Option<PathBuf> {
    let program = Path::new(command.first()?);
    let file = if program.components().count() > 1 {
        program.to_path_buf()
    } else {
        let path = std::env::var_os("PATH")?;
        std::env::split_paths(&path).map(|dir| dir.join(program)).find(|file| file.is_file())?
    };
    let dir = std::path::absolute(file).ok()?.parent()?.parent()?.to_path_buf();
    software_env::is_environment(&dir).then_some(dir)
}

fn hook(changes: &mut Changes, mode: HookMode, library: &Path) -> Result<(), Failure> {
    changes.set("SIRE_LIBRARY", library);
    match mode {
        HookMode::Torch => changes.set("SIRE_HOOK_MODE", "torch"),
        HookMode::Preload => {
            changes.set("SIRE_HOOK_MODE", "preload");
            preload(changes, library)?;
        }
        HookMode::Driver => {
            changes.set("SIRE_HOOK_MODE", "driver");
            preload(changes, library)?;
            preload(changes, &library::driver()?)?;
        }
    }
    Ok(())
}

/// Puts a library before everything else that is preloaded.
fn preload(changes: &mut Changes, library: &Path) -> Result<(), Failure> {
    let shown = library.display().to_string();
    if shown.contains([' ', ':', '\t', '\n']) {
        return Err(Failure::new(format!(
            "LD_PRELOAD cannot hold the path '{shown}': blanks and colons separate its entries"
        ))
        .advice("Put the library elsewhere and name it in SIRE_LIBRARY, or use --hook-mode torch."));
    }
    // Blanks separate LD_PRELOAD's entries too; Changes knows colons.
    if let Some(old) = changes.value("LD_PRELOAD").filter(|old| old.to_string_lossy().contains(char::is_whitespace)) {
        changes.set("LD_PRELOAD", old.to_string_lossy().replace(char::is_whitespace, ":"));
    }
    changes.prepend("LD_PRELOAD", library);
    Ok(())
}

fn turns(changes: &mut Changes, options: &RunOptions) -> Result<(), Failure> {
    let Some(seconds) = options.time_slice else { return Ok(()) };
    if !(seconds > 0.0 && seconds.is_finite()) {
        return Err(Failure::usage(format!("--time-slice {seconds} is not a number of seconds, more than 0")));
    }
    if options.hook_mode == HookMode::Torch {
        return Err(Failure::usage(
            "--time-slice needs everything that PyTorch allocates, which --hook-mode torch does not hear of",
        )
        .advice("Leave --hook-mode out."));
    }
    changes.set("SIRE_TIME_SLICE", seconds.to_string());
    if let Some(group) = &options.group {
        changes.set("SIRE_TIME_SLICE_GROUP", group);
    }
    Ok(())
}

fn region(changes: &mut Changes, options: &RunOptions) -> Result<(), Failure> {
    if options.region.is_none() && options.backup.is_none() {
        return Ok(());
    }
    let tag = options.region.as_deref().unwrap_or("default");
    if tag.is_empty() {
        return Err(Failure::usage("--region needs a tag that is not empty").advice("For example: --region model"));
    }
    changes.set("SIRE_REGION", tag);
    changes.set("SIRE_BACKUP", options.backup.map_or("cpu", crate::arguments::Backup::name));
    Ok(())
}
