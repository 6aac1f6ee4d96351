//! stub
pub mod probe;
use std::process::ExitCode;
use crate::arguments::DoctorOptions;
use crate::failure::Failure;
pub fn doctor(_o: &DoctorOptions) -> Result<ExitCode, Failure> { Ok(ExitCode::SUCCESS) }
