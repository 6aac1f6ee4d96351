//! `sire ps`: who can be asked, and what they hold.

use std::process::ExitCode;
use std::time::Duration;

use super::view::{Process, View, size};
use super::{metrics, place};
use crate::arguments::PsOptions;
use crate::failure::Failure;
use crate::output;

/// Prints the list. Exit code 0 also if there is nobody: that is an answer.
pub fn ps(options: &PsOptions) -> Result<ExitCode, Failure> {
    let view = View::look(&place()?, Duration::from_secs_f64(options.timeout))?;
    if options.metrics {
        output::line(metrics::text(&view).trim_end());
    } else if options.json {
        output::line(&serde_json::to_string_pretty(&view).unwrap_or_default());
    } else if view.processes.is_empty() {
        output::progress("no process can be asked; start one with SIRE_CONTROL=1, or call sire.control.open()");
    } else {
        table(&view, options.tags).iter().for_each(|line| output::line(line));
    }
    Ok(ExitCode::SUCCESS)
}

fn table(view: &View, tags: bool) -> Vec<String> {
    let mut lines =
        vec![format!("{:>8}  {:<8} {:>8} {:>8} {:>8}  {}", "PID", "STATE", "DEVICE", "AWAY", "BACKUPS", "COMMAND")];
    for process in &view.processes {
        lines.push(row(process));
        if tags {
            lines.extend(process.stats.regions.iter().map(|region| {
                let (device, away, backup) =
                    (size(region.resident_bytes), size(region.paused_bytes), size(region.backup_bytes));
                format!("{:>8}  {:<8} {device:>8} {away:>8} {backup:>8}  {}", "", region.state, region.tag)
            }));
            lines.extend(process.stats.reclaimable.iter().map(|mark| {
                let idle = format!("idle {:.0} s of {:.0} s", mark.idle_seconds, mark.after_idle);
                let terms = format!("reclaimable: {}, priority {}, {idle}", mark.tag, mark.priority);
                format!("{:>8}  {:<8} {:>8} {:>8} {:>8}  {terms}", "", mark.state, "", "", "")
            }));
        }
    }
    lines
}

fn row(process: &Process) -> String {
    let said = process.silence.as_deref().unwrap_or(&process.command);
    let (device, away, backups) = (size(process.resident()), size(process.away()), size(process.backups()));
    format!("{:>8}  {:<8} {device:>8} {away:>8} {backups:>8}  {said}", process.name, process.state())
}
