//! stub
use std::process::ExitCode;
use crate::arguments::Subject;
use crate::environment::Changes;
use crate::failure::Failure;
pub struct Driver { pub error: Option<String> }
pub fn driver(_c: &Changes) -> Driver { Driver { error: Some("x".into()) } }
pub fn answer(_s: Subject) -> Result<ExitCode, Failure> { Ok(ExitCode::SUCCESS) }
