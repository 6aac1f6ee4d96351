//! `sire replay`: makes the calls of a trace again, on this machine's GPU, on the software device, or on the model clock.
//!
//! One thread makes them, in the order in which they were recorded; calls that failed then are left out. As a benchmark it says how
//! long each kind of call took; with `--check` it is a test: every byte that a pause promised to keep is compared after each resume.
//! `needs` finds out what a trace takes, `device` opens one, `player` makes the calls (`views` those about memory that the program
//! mapped itself), `files` stands for the files that were backups, `content` knows the bytes, `figures` tells.

mod content;
mod device;
mod figures;
mod files;
mod needs;
mod player;
#[cfg(test)]
mod tests;
mod views;

use std::path::Path;
use std::process::ExitCode;

use sire_core::trace::{Event, Header, Reader, Record};

use crate::arguments::ReplayOptions;
use crate::failure::{Failure, While as _};
use crate::output;

/// A trace, read.
#[derive(Debug)]
struct Trace {
    header: Header,
    records: Vec<Record>,
    /// Why it ends where it ends, if not because the program did.
    ending: Option<String>,
}

/// Replays the file and prints the figures.
pub fn replay(options: &ReplayOptions) -> Result<ExitCode, Failure> {
    let trace = read(&options.file)?;
    if let Some(ending) = &trace.ending {
        output::progress(&format!("warning: {}: {ending}", options.file.display()));
    }
    let needs = needs::of(&trace);
    if options.info {
        figures::describe(&trace, &needs);
        return Ok(ExitCode::SUCCESS);
    }
    let device = device::open(options, &needs)?;
    let files = if device.is_simulated() { files::Files::default() } else { files::Files::of(&trace)? };
    let mut played = player::Played::default();
    for _ in 0..options.repeats.max(1) {
        played.add(player::play(&trace, &device, &files, options.check)?);
    }
    let list = figures::list(&played, &device);
    let text = serde_json::to_string_pretty(&list).unwrap_or_default();
    match &options.json {
        Some(path) => std::fs::write(path, text + "\n").while_(|| format!("write {}", path.display()))?,
        None => output::line(&text),
    }
    figures::summary(&played).iter().chain(&files.describe()).for_each(|line| output::progress(line));
    match played.trouble() {
        None => Ok(ExitCode::SUCCESS),
        Some(what) => Err(Failure::new(what)),
    }
}

fn read(path: &Path) -> Result<Trace, Failure> {
    let bytes = std::fs::read(path).while_(|| format!("read {}", path.display()))?;
    parse(&bytes).map_err(|damage| Failure::new(format!("{}: {damage}", path.display())))
}

/// What a file holds, as far as it makes sense. Only its beginning must.
fn parse(bytes: &[u8]) -> Result<Trace, sire_core::trace::Damage> {
    let reader = Reader::new(bytes)?;
    let mut trace = Trace { header: reader.header().clone(), records: Vec::new(), ending: None };
    for record in reader {
        match record {
            Ok(Record { event: Event::Cut, .. }) => {
                trace.ending = Some("the file was full; what came after is not in it".to_owned());
            }
            Ok(record) => trace.records.push(record),
            Err(damage) => trace.ending = Some(format!("{damage}; what came before is replayed")),
        }
    }
    Ok(trace)
}
