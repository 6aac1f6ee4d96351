//! What a person sees when a command cannot do what was asked: what happened, and what to do about it.

use std::fmt;

/// A failed command, with advice and the exit code by which scripts can tell failures apart.
#[derive(Debug)]
pub struct Failure {
    what: String,
    advice: Option<String>,
    exit_code: u8,
}

impl Failure {
    /// A failure that ends the command with exit code 1.
    pub fn new(what: impl Into<String>) -> Self {
        Self { what: what.into(), advice: None, exit_code: 1 }
    }

    /// Wrong use of the command line: exit code 2, as clap's own.
    pub fn usage(what: impl Into<String>) -> Self {
        Self { exit_code: 2, ..Self::new(what) }
    }

    /// What the person can do.
    pub fn advice(mut self, advice: impl Into<String>) -> Self {
        self.advice = Some(advice.into());
        self
    }

    /// Another exit code, for example 127 for a program that does not exist, as shells have it.
    pub fn exits_with(mut self, exit_code: u8) -> Self {
        self.exit_code = exit_code;
        self
    }

    /// The exit code of the command.
    pub fn exit_code(&self) -> u8 {
        self.exit_code
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        match &self.advice {
            Some(advice) => write!(f, "\n      {advice}"),
            None => Ok(()),
        }
    }
}

/// Adds what was being done to an input/output error.
pub trait While<T> {
    /// `read_dir(path).while_("list DIR")` reads "could not list DIR: permission denied".
    fn while_(self, doing: impl FnOnce() -> String) -> Result<T, Failure>;
}

impl<T> While<T> for std::io::Result<T> {
    fn while_(self, doing: impl FnOnce() -> String) -> Result<T, Failure> {
        self.map_err(|error| Failure::new(format!("could not {}: {error}", doing())))
    }
}
