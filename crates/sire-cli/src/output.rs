//! Everything the command says. Answers go to standard output, progress and errors to standard error, so that
//! `$(sire path)` and `eval "$(sire run --print-env)"` hold nothing else. A closed pipe ends the command quietly.

use std::io::Write as _;

/// As every small Unix tool: `sire doctor | head -1` is no error.
pub fn end_quietly_on_a_closed_pipe() {
    // SAFETY: SIG_DFL is a valid disposition for SIGPIPE, and no other thread exists yet.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
    }
}

/// One line of the answer.
pub fn line(text: &str) {
    let _ = writeln!(std::io::stdout().lock(), "{text}");
}

/// One line about what is going on.
pub fn progress(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "sire: {text}");
}

/// What went wrong.
pub fn error(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "sire: {text}");
}
