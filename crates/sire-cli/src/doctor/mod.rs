//! `sire doctor`: what this machine offers, item by item: served, refused with the reason and what to do, or a note.

mod checks;
mod machine;
pub mod probe;
mod torch;

use std::process::ExitCode;

use serde::Serialize;

use crate::arguments::DoctorOptions;
use crate::environment::Changes;
use crate::failure::Failure;
use crate::{output, software_env};

/// What Sire makes of a finding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// It works here.
    Served,
    /// It does not, and Sire will say so rather than do nothing.
    Refused,
    /// Good to know.
    Note,
}

/// One line of the report.
#[derive(Debug, Serialize)]
pub struct Finding {
    name: &'static str,
    status: Status,
    detail: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    advice: Option<String>,
    /// Whether Sire can be used at all while this is refused.
    #[serde(skip)]
    essential: bool,
}

impl Finding {
    fn new(name: &'static str, status: Status, detail: impl Into<String>) -> Self {
        Self { name, status, detail: detail.into(), advice: None, essential: false }
    }

    /// Something that works.
    pub fn served(name: &'static str, detail: impl Into<String>) -> Self {
        Self::new(name, Status::Served, detail)
    }

    /// Something that does not, and what to do.
    pub fn refused(name: &'static str, detail: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { advice: Some(advice.into()), ..Self::new(name, Status::Refused, detail) }
    }

    /// Something to know.
    pub fn note(name: &'static str, detail: impl Into<String>) -> Self {
        Self::new(name, Status::Note, detail)
    }

    /// Without this, Sire is of no use here.
    pub fn essential(self) -> Self {
        Self { essential: true, ..self }
    }

    /// With advice.
    pub fn advice(self, advice: impl Into<String>) -> Self {
        Self { advice: Some(advice.into()), ..self }
    }

    fn print(&self) {
        let status = match self.status {
            Status::Served => "served ",
            Status::Refused => "REFUSED",
            Status::Note => "note   ",
        };
        output::line(&format!("{status}  {:<14} {}", self.name, self.detail));
        if let Some(advice) = &self.advice {
            output::line(&format!("{:24} -> {advice}", ""));
        }
    }
}

/// Prints the report. Exit code 0 if Sire can be used here, 1 if not.
pub fn doctor(options: &DoctorOptions) -> Result<ExitCode, Failure> {
    let changes = match &options.env {
        Some(dir) => software_env::changes(dir)?,
        None => Changes::default(),
    };
    let mut findings = Vec::new();
    let driver = probe::driver(&changes);
    findings.extend(checks::library(&changes));
    findings.extend(checks::driver(&driver));
    findings.extend(torch::torch(options, &changes));
    findings.extend(machine::machine());
    let usable = findings.iter().all(|finding| !finding.essential || finding.status != Status::Refused);
    if options.json {
        let report = serde_json::json!({ "sire": env!("CARGO_PKG_VERSION"), "usable": usable, "driver": driver, "findings": findings });
        output::line(&format!("{report:#}"));
    } else {
        findings.iter().for_each(Finding::print);
        let device = if driver.software { " on the software device (no GPU is involved)" } else { "" };
        output::line(&if usable {
            format!("\nSire can be used here{device}.")
        } else {
            "\nSire cannot be used here yet: see what is refused.".into()
        });
    }
    Ok(if usable { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
