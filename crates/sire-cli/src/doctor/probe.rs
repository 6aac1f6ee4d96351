//! Looking at things that may crash or hang, each in a child process: the CUDA driver, and a preloaded library. The
//! child is this same command (`sire look driver`, `sire look hook`) and answers with one line of JSON.

mod cuda;
mod hook;

use std::io::Read as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::arguments::Subject;
use crate::environment::Changes;
use crate::failure::Failure;
use crate::output;

pub use cuda::{DeviceReport, DriverReport};
pub use hook::HookReport;

/// A driver that does not answer in this time is as good as broken.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the CUDA driver of an environment says about itself.
pub fn driver(changes: &Changes) -> DriverReport {
    ask("driver", changes).unwrap_or_else(|why| DriverReport { error: Some(why), ..DriverReport::default() })
}

/// Whether a library that is preloaded by `changes` answers for the process.
pub fn hook(changes: &Changes) -> Result<HookReport, String> {
    ask("hook", changes)
}

/// The child's part.
pub fn answer(subject: Subject) -> Result<ExitCode, Failure> {
    match subject {
        Subject::Driver => print(&cuda::look()),
        Subject::Hook => print(&hook::look()),
    }
}

fn print(report: &impl Serialize) -> Result<ExitCode, Failure> {
    let text =
        serde_json::to_string(report).map_err(|error| Failure::new(format!("could not write the report: {error}")))?;
    output::line(&text);
    Ok(ExitCode::SUCCESS)
}

fn ask<T: DeserializeOwned>(subject: &str, changes: &Changes) -> Result<T, String> {
    let exe = std::env::current_exe().map_err(|error| format!("could not find this command's own file: {error}"))?;
    let mut command = Command::new(exe);
    command.args(["look", subject]).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    changes.apply(&mut command);
    let mut child = command.spawn().map_err(|error| format!("could not start a child process: {error}"))?;
    let status = wait(&mut child).ok_or_else(|| format!("no answer within {} s", PATIENCE.as_secs()))?;
    let mut answer = String::new();
    if let Some(mut pipe) = child.stdout.take() {
        let _ = pipe.read_to_string(&mut answer);
    }
    if let Some(signal) = status.signal() {
        return Err(format!("the child that tried it was killed by signal {signal}"));
    }
    // What a library prints while it loads stands before our line.
    let line = answer.lines().rev().find(|line| line.starts_with('{')).unwrap_or_default();
    serde_json::from_str(line).map_err(|_| match std::mem::take(&mut child.stderr).map(std::io::read_to_string) {
        Some(Ok(text)) if !text.trim().is_empty() => format!("the child that tried it said: {}", text.trim()),
        _ => format!("the child that tried it ended with {status} and said nothing"),
    })
}

/// The child's end; None, and the child killed, if it does not come. The answers fit into a pipe's buffer.
fn wait(child: &mut Child) -> Option<std::process::ExitStatus> {
    let start = Instant::now();
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) if start.elapsed() < PATIENCE => std::thread::sleep(Duration::from_millis(5)),
            _ => {
                let _ = child.kill();
                let _ = child.wait();
                return None;
            }
        }
    }
}
