//! GPUs seen from outside a program: NVML's figures ([`nvml`]), and programs that are watched while they run ([`watched`]). Nothing here has a
//! CUDA context, so that looking costs no memory of the device.

pub mod nvml;
pub mod watched;

use std::ffi::OsString;
use std::path::PathBuf;

use crate::environment::Changes;
use crate::failure::Failure;
use crate::{process, run, software_env};

/// Starts this command anew in the software device's environment, if one is named or the program's interpreter lies in one: NVML is found there.
/// Returns where there is none, or this is the second start.
pub fn enter_environment(inside: bool, named: Option<&PathBuf>, command: &[OsString]) -> Result<(), Failure> {
    let environment = named.cloned().or_else(|| run::environment_of(command));
    let Some(dir) = environment.filter(|_| !inside) else { return Ok(()) };
    let changes: Changes = software_env::changes(&dir)?;
    let mut again: Vec<OsString> = std::env::args_os().collect();
    let exe = std::env::current_exe()
        .map_err(|error| Failure::new(format!("could not find this command's own file: {error}")))?;
    again[0] = exe.into();
    again.insert(2, "--inside".into());
    Err(process::become_program(&again, &changes))
}

/// A size such as `6GiB`.
pub fn size(text: &str) -> Result<u64, Failure> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => Some(1_u64),
        "k" | "kib" => Some(1 << 10),
        "m" | "mib" => Some(1 << 20),
        "g" | "gib" => Some(1 << 30),
        "t" | "tib" => Some(1 << 40),
        "kb" => Some(1000),
        "mb" => Some(1_000_000),
        "gb" => Some(1_000_000_000),
        "tb" => Some(1_000_000_000_000),
        _ => None,
    };
    let bytes = digits.trim().parse::<f64>().ok().zip(unit).map(|(number, unit)| number * unit as f64);
    bytes.filter(|bytes| bytes.is_finite() && *bytes >= 1.0).map(|bytes| bytes as u64).ok_or_else(|| {
        Failure::usage(format!("'{text}' is not a size")).advice("Write for example 6GiB, 512MiB or a number of bytes.")
    })
}

#[cfg(test)]
mod tests {
    use super::size;

    #[test]
    fn sizes_are_read_as_elsewhere() {
        let read = |text| size(text).ok();
        assert_eq!(read("6GiB"), Some(6 << 30));
        assert_eq!(read("1.5g"), Some(3 << 29));
        assert_eq!(read("10MB"), Some(10_000_000));
        assert_eq!(read("12"), Some(12));
        assert_eq!([read("0"), read("-1"), read("x"), read("3XB"), read(""), read("inf")], [None; 6]);
    }
}
