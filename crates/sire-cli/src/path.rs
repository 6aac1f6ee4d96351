//! `sire path`: where the library is, for `LD_PRELOAD=$(sire path)`.

use std::process::ExitCode;

use crate::arguments::PathOptions;
use crate::failure::Failure;
use crate::{library, output};

/// Prints the path of `libsire_alloc.so`, or of the software device's library.
pub fn path(options: &PathOptions) -> Result<ExitCode, Failure> {
    let found = if options.stand_in { library::stand_in(None)? } else { library::sire()? };
    output::line(&found.display().to_string());
    Ok(ExitCode::SUCCESS)
}
