//! The `sire` command. This file parses the arguments and hands over: each subcommand is a module, and each either
//! prints its answer, replaces this process by the user's program, or returns a [`failure::Failure`] with advice.

mod arguments;
mod control;
mod dashboard;
mod doctor;
mod environment;
mod failure;
mod files;
mod gpu;
mod library;
mod output;
mod path;
mod probe;
mod process;
mod replay;
mod reserve;
mod run;
mod software_env;
mod top;

use std::process::ExitCode;

use clap::Parser;

use arguments::{Arguments, Command};
use failure::Failure;

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Path(options) => path::path(&options),
        Command::Run(options) => run::run(&options),
        Command::Replay(options) => replay::replay(&options),
        Command::Doctor(options) => doctor::doctor(&options),
        Command::Ps(options) => control::ps::ps(&options),
        Command::Top(options) => top::top(&options),
        Command::Pause(options) => control::act::pause(&options),
        Command::Resume(options) => control::act::resume(&options),
        Command::Evict(options) => control::act::evict(&options),
        Command::Budget(options) => control::act::budget(&options),
        Command::Record(options) => control::act::record(&options),
        Command::Dashboard(options) => dashboard::dashboard(&options),
        Command::Completions { shell } => control::completions(shell),
        Command::SoftwareEnv(options) => software_env::software_env(&options),
        Command::Reserve(options) => reserve::reserve(&options),
        Command::Probe(options) => probe::probe(&options),
        Command::Look { subject } => doctor::probe::answer(subject),
    };
    result.unwrap_or_else(|failure: Failure| {
        output::error(&failure.to_string());
        ExitCode::from(failure.exit_code())
    })
}
