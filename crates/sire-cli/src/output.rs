//! Everything the command says. Answers go to standard output, progress and errors to standard error, so that
//! `$(sire path)` and `eval "$(sire run --print-env)"` hold nothing else. A reader that is gone ends the command quietly where it has an answer, and
//! only there: Rust ignores SIGPIPE from the start, so that a socket whose other end has closed is an error of that socket and no more.

use std::io::{ErrorKind, Result, Write as _};

/// One line of the answer.
pub fn line(text: &str) {
    end_if_nobody_reads(writeln!(std::io::stdout().lock(), "{text}"));
}

/// An answer of many lines.
pub fn text(text: &[u8]) {
    end_if_nobody_reads(std::io::stdout().lock().write_all(text));
}

/// As every small Unix tool: `sire doctor | head -1` is no error.
fn end_if_nobody_reads(told: Result<()>) {
    if told.is_err_and(|error| error.kind() == ErrorKind::BrokenPipe) {
        // SAFETY: takes plain numbers; SIG_DFL is a valid disposition for SIGPIPE, which then ends this process.
        unsafe {
            libc::signal(libc::SIGPIPE, libc::SIG_DFL);
            libc::raise(libc::SIGPIPE);
        }
    }
}

/// A line of its own on standard error, as it is: for who reads it by a program.
pub fn report(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// One line about what is going on.
pub fn progress(text: &str) {
    report(&format!("sire: {text}"));
}

/// What went wrong.
pub fn error(text: &str) {
    report(&format!("sire: {text}"));
}
