//! Asking Sire's processes: what they hold, and to do something. docs/control.md is the page for this.

pub mod act;
pub mod metrics;
pub mod ps;
pub mod view;
pub mod who;

use std::process::ExitCode;

use clap::CommandFactory as _;
use clap_complete::Shell;
use sire_control::place::Place;

use crate::arguments::Arguments;
use crate::failure::Failure;
use crate::output;

/// No such process can be asked.
pub const NOBODY: u8 = 3;
/// There was no safe point in time, or too many ask; nothing has changed.
pub const REFUSED: u8 = 4;
/// The process does not answer.
pub const SILENT: u8 = 5;

/// The private directory in which processes listen.
pub fn place() -> Result<Place, Failure> {
    Place::of_this_user().map_err(|error| {
        Failure::new(format!("the directory of control sockets cannot be used: {error}"))
            .advice("It must be yours alone; remove what is there, or set XDG_RUNTIME_DIR.")
    })
}

/// `sire completions`.
pub fn completions(shell: Shell) -> Result<ExitCode, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Arguments::command(), "sire", &mut script);
    output::text(&script);
    Ok(ExitCode::SUCCESS)
}
