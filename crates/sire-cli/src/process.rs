//! Becoming another program. `exec` keeps the process id, so signals, job control and exit codes are the program's own.

use std::ffi::OsString;
use std::io::ErrorKind;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::Command;

use crate::environment::Changes;
use crate::failure::Failure;

/// Replaces this process by `command`, in the environment with `changes`. Returns only if that failed.
pub fn become_program(command: &[OsString], changes: &Changes) -> Failure {
    let Some((program, arguments)) = command.split_first() else {
        return Failure::usage("no program was given").advice("Put it behind '--', for example: -- python train.py");
    };
    let located = find(program, changes).unwrap_or_else(|| PathBuf::from(program));
    let mut child = Command::new(&located);
    child.arg0(program).args(arguments);
    changes.apply(&mut child);
    let error = child.exec();
    let shown = program.to_string_lossy();
    match error.kind() {
        ErrorKind::NotFound => Failure::new(format!("could not start '{shown}': no such program"))
            .advice("Check the spelling and the PATH.")
            .exits_with(127),
        ErrorKind::PermissionDenied => Failure::new(format!("could not start '{shown}': it is not executable"))
            .advice("chmod +x it, or name its interpreter first.")
            .exits_with(126),
        _ => Failure::new(format!("could not start '{shown}': {error}")).exits_with(126),
    }
}

/// The program's file, along the PATH that it will itself see.
fn find(program: &OsString, changes: &Changes) -> Option<PathBuf> {
    if PathBuf::from(program).components().count() > 1 {
        return None;
    }
    let path = changes.value("PATH")?;
    std::env::split_paths(&path).map(|directory| directory.join(program)).find(|file| is_executable(file))
}

fn is_executable(file: &std::path::Path) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    file.metadata().is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
}
