//! `sire path`: where the library is, for `LD_PRELOAD=$(sire path)`.

use std::process::ExitCode;

use crate::arguments::PathOptions;
use crate::failure::Failure;
use crate::{library, output};

/// Prints the path of `libsire_alloc.so`, or of one of the other libraries.
pub fn path(options: &PathOptions) -> Result<ExitCode, Failure> {
    let found = match options {
        PathOptions { stand_in: true, .. } => library::stand_in(None)?,
        PathOptions { driver: true, .. } => library::driver()?,
        _ => library::sire()?,
    };
    output::line(&found.display().to_string());
    Ok(ExitCode::SUCCESS)
}
