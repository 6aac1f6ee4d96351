//! `sire pause`, `resume`, `evict`, `budget`, `record`: asking one process to do something, and saying what came of it.

use std::process::ExitCode;
use std::time::Duration;

use serde_json::Value;
use sire_control::client::{Client, Failure as Silence};
use sire_control::message::{Code, Refusal, Verb};
use sire_control::place::{Name, Place};

use super::view::size;
use super::who::Who;
use super::{NOBODY, REFUSED, SILENT, place};
use crate::arguments::{AskOptions, BudgetOptions, EvictOptions, PauseOptions, ResumeOptions};
use crate::failure::Failure;
use crate::output;

/// How long a living process may take to say who it is.
pub const GREETING: Duration = Duration::from_secs(3);
/// How long it may copy, once it has begun.
pub const WORK: Duration = Duration::from_secs(1800);

/// `sire pause`.
pub fn pause(options: &PauseOptions) -> Result<ExitCode, Failure> {
    let verb = Verb::Pause { tag: options.tag.clone(), timeout: options.timeout };
    let answer = ask(options.ask.who, verb, options.timeout)?;
    say(&options.ask, &answer, || {
        let report = &answer["report"];
        match report["regions_changed"].as_u64() {
            Some(0) => "was paused already; from now on the program waits for sire resume".to_owned(),
            _ => {
                format!("paused: {} given back, {} copied", bytes(report, "bytes_moved"), bytes(report, "bytes_copied"))
            }
        }
    })
}

/// `sire resume`.
pub fn resume(options: &ResumeOptions) -> Result<ExitCode, Failure> {
    let verb = Verb::Resume { tag: options.tag.clone(), timeout: options.timeout, wait: options.wait };
    let answer = ask(options.ask.who, verb, options.timeout + options.wait)?;
    say(&options.ask, &answer, || {
        let sum = |name: &str| {
            let reports = answer["reports"].as_array().map(Vec::as_slice).unwrap_or_default();
            size(reports.iter().filter_map(|report| report[name].as_u64()).sum())
        };
        let left = answer["paused"].as_array().map_or(0, Vec::len);
        let rest = if left > 0 {
            format!("; {left} more stay paused from outside, and the program waits")
        } else {
            String::new()
        };
        format!("resumed: {} taken, {} copied{rest}", sum("bytes_moved"), sum("bytes_copied"))
    })
}

/// `sire evict`.
pub fn evict(options: &EvictOptions) -> Result<ExitCode, Failure> {
    let answer = ask(options.ask.who, Verb::Evict { device: options.device, bytes: options.bytes }, 0.0)?;
    say(&options.ask, &answer, || format!("{} given back", bytes(&answer, "device_bytes")))
}

/// `sire budget`.
pub fn budget(options: &BudgetOptions) -> Result<ExitCode, Failure> {
    let &BudgetOptions { device, limit, headroom, residency, .. } = options;
    let answer = ask(options.ask.who, Verb::Budget { device, limit, headroom, residency }, 0.0)?;
    let most = limit.map_or_else(|| "what there is".to_owned(), size);
    say(&options.ask, &answer, || format!("device {device}: at most {most}, {} stay free", size(headroom)))
}

/// `sire record`.
pub fn record(options: &AskOptions) -> Result<ExitCode, Failure> {
    let answer = ask(options.who, Verb::Trace, 0.0)?;
    say(options, &answer, || format!("recording in {}", answer["path"].as_str().unwrap_or("?")))
}

fn bytes(report: &Value, name: &str) -> String {
    size(report[name].as_u64().unwrap_or(0))
}

fn say(options: &AskOptions, answer: &Value, sentence: impl FnOnce() -> String) -> Result<ExitCode, Failure> {
    if options.json {
        output::line(&answer.to_string());
    } else {
        output::line(&format!("{} {}", options.who, sentence()));
    }
    Ok(ExitCode::SUCCESS)
}

/// The answer of a process; failures with the exit codes of docs/control.md.
pub fn ask(who: Who, verb: Verb, seconds: f64) -> Result<Value, Failure> {
    let mut client = connect(&place()?, who).map_err(|unreached| unreached.of(who))?;
    let silent = |silence: Silence| {
        Failure::new(format!("process {who}: {silence}"))
            .advice("Is it stopped (kill -STOP, a debugger)? What was asked may still happen.")
            .exits_with(SILENT)
    };
    // Whoever is stopped meanwhile answers nothing at all.
    let patience = Duration::from_secs_f64(seconds) + GREETING;
    client.ask_alive(verb, patience, patience + WORK).map_err(silent)?.map_err(|refusal| refused(who, &refusal))
}

/// Why there is no connection to a process.
pub enum Unreached {
    /// It has no socket that anybody listens on.
    Nobody,
    /// They have the same number.
    Several(Vec<Name>),
    /// It wants no more visitors now.
    Refused(Refusal),
    /// It does not answer, or not as a process of Sire's.
    Silent(Silence),
    /// The directory of sockets cannot be read.
    Place(std::io::Error),
}

impl Unreached {
    fn of(self, who: Who) -> Failure {
        match self {
            Unreached::Nobody => Failure::new(format!("process {who} cannot be asked: it has no control socket"))
                .advice("sire ps lists those that can; a program opens one with SIRE_CONTROL=1 or sire.control.open().")
                .exits_with(NOBODY),
            Unreached::Several(names) => {
                Failure::new(format!("several processes have the number {who}: {}", list(&names)))
                    .advice("They are in different containers; sire ps says what each is. Name one, with its -N.")
                    .exits_with(NOBODY)
            }
            Unreached::Refused(refusal) => refused(who, &refusal),
            Unreached::Silent(silence) => Failure::new(format!("process {who}: {silence}"))
                .advice("Is it stopped (kill -STOP, a debugger)?")
                .exits_with(SILENT),
            Unreached::Place(error) => Failure::new(format!("the control sockets cannot be listed: {error}")),
        }
    }

    /// As an answer that the process might have given itself.
    pub fn as_refusal(&self, who: Who) -> Refusal {
        match self {
            Unreached::Nobody => Refusal::new(Code::Invalid, format!("process {who} has no control socket")),
            Unreached::Several(names) => {
                Refusal::new(Code::Invalid, format!("several processes have the number {who}: {}", list(names)))
            }
            Unreached::Refused(refusal) => refusal.clone(),
            Unreached::Silent(silence) => Refusal::new(Code::Failed, silence.to_string()),
            Unreached::Place(error) => Refusal::new(Code::Failed, error.to_string()),
        }
    }
}

/// A connection to a process that has said who it is. Of several with one number (containers that share the directory) it is the one that has this number here
/// too; if none has, somebody must say which.
pub fn connect(place: &Place, who: Who) -> Result<Client, Unreached> {
    let sockets = place.sockets().map_err(Unreached::Place)?;
    let mut unreached = Unreached::Nobody;
    let mut reached: Vec<(Name, Client)> = Vec::new();
    for found in sockets.iter().filter(|found| who.means(found.name)) {
        let greeted = Client::connect(&found.path, GREETING)
            .and_then(|mut client| client.ask(Verb::Hello, GREETING).map(|answer| (client, answer)));
        match greeted {
            Ok((client, Ok(_))) => reached.push((found.name, client)),
            Ok((_, Err(refusal))) => unreached = Unreached::Refused(refusal),
            Err(Silence::Gone) => {}
            Err(silence) => unreached = Unreached::Silent(silence),
        }
    }
    // The one that does not answer may be the one that has this number here, and is meant.
    let is_here = |(_, client): &(Name, Client)| client.peer() == Some(who.pid);
    if !matches!(unreached, Unreached::Nobody) && !reached.iter().any(is_here) {
        return Err(unreached);
    }
    chosen(who, reached).unwrap_or(Err(unreached))
}

/// None if there is none.
fn chosen(who: Who, mut reached: Vec<(Name, Client)>) -> Option<Result<Client, Unreached>> {
    if reached.len() > 1
        && let Some(here) = reached.iter().position(|(_, client)| client.peer() == Some(who.pid))
    {
        return Some(Ok(reached.swap_remove(here).1));
    }
    if reached.len() > 1 {
        return Some(Err(Unreached::Several(reached.into_iter().map(|(name, _)| name).collect())));
    }
    reached.pop().map(|(_, client)| Ok(client))
}

fn list(names: &[Name]) -> String {
    let names: Vec<String> = names.iter().map(|name| format!("{}-{}", name.pid, name.namesake)).collect();
    names.join(", ")
}

fn refused(who: Who, refusal: &Refusal) -> Failure {
    let failure = Failure::new(format!("process {who}: {}", refusal.message));
    match refusal.code {
        Code::Refused | Code::Busy => failure.advice("Nothing has changed.").exits_with(REFUSED),
        Code::Invalid => failure,
        Code::Failed => match &refusal.status {
            Some(status) => failure.advice(format!("{status}: docs/troubleshooting.md says what that means.")),
            None => failure,
        },
    }
}
