//! Messages to file descriptor 2, at the level of `SIRE_LOG`.
//!
//! Hooks log too, so: one `write` of a line that was put together on the stack, no lock, no allocation, and
//! nothing at all if the descriptor would block. Standard error's own lock is not used: a forked child may
//! inherit it taken.

use std::fmt::{self, Write};
use std::sync::atomic::{AtomicU8, Ordering};

/// How important a message is. Those above the level in force are not written.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[repr(u8)]
pub(crate) enum Level {
    /// Only as a setting: nothing is written.
    Off = 0,
    Error = 1,
    Warn = 2,
    Info = 3,
    Debug = 4,
}

const UNREAD: u8 = u8::MAX;
static LEVEL: AtomicU8 = AtomicU8::new(UNREAD);

/// Bytes of the longest line, newline included; pipes take this much in one piece.
const LINE: usize = 1024;

impl Level {
    /// The level that `text` names.
    pub(crate) fn parse(text: &str) -> Option<Level> {
        Some(match text {
            "off" => Level::Off,
            "error" => Level::Error,
            "warn" => Level::Warn,
            "info" => Level::Info,
            "debug" => Level::Debug,
            _ => return None,
        })
    }

    const fn word(self) -> &'static str {
        match self {
            Level::Off => "",
            Level::Error => "error: ",
            Level::Warn => "warning: ",
            Level::Info => "",
            Level::Debug => "debug: ",
        }
    }
}

/// Whether a message of this level would be written.
pub(crate) fn enabled(level: Level) -> bool {
    let mut known = LEVEL.load(Ordering::Relaxed);
    if known == UNREAD {
        let named = std::env::var("SIRE_LOG").ok();
        known = named.as_deref().and_then(Level::parse).unwrap_or(Level::Warn) as u8;
        LEVEL.store(known, Ordering::Relaxed);
    }
    level as u8 <= known
}

/// Writes one line, if the level is in force and the descriptor can take it now.
pub(crate) fn write(level: Level, message: fmt::Arguments<'_>) {
    if !enabled(level) {
        return;
    }
    let mut line = Line { bytes: [0; LINE], used: 0 };
    // Line never fails: it cuts.
    let _ = write!(line, "sire: {}{message}", level.word());
    line.send();
}

macro_rules! error {
    ($($what:tt)*) => { $crate::log::write($crate::log::Level::Error, format_args!($($what)*)) };
}
macro_rules! warning {
    ($($what:tt)*) => { $crate::log::write($crate::log::Level::Warn, format_args!($($what)*)) };
}
macro_rules! info {
    ($($what:tt)*) => { $crate::log::write($crate::log::Level::Info, format_args!($($what)*)) };
}
macro_rules! debug {
    ($($what:tt)*) => { $crate::log::write($crate::log::Level::Debug, format_args!($($what)*)) };
}
pub(crate) use {debug, error, info, warning};

struct Line {
    bytes: [u8; LINE],
    used: usize,
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        // One byte stays for the newline.
        let room = LINE - 1 - self.used;
        let taken = text.len().min(room);
        self.bytes[self.used..self.used + taken].copy_from_slice(&text.as_bytes()[..taken]);
        self.used += taken;
        Ok(())
    }
}

impl Line {
    fn send(&mut self) {
        self.bytes[self.used] = b'\n';
        let mut ready = libc::pollfd { fd: 2, events: libc::POLLOUT, revents: 0 };
        // SAFETY: polls one local entry without waiting.
        let writable = unsafe { libc::poll(&raw mut ready, 1, 0) } == 1 && ready.revents & libc::POLLOUT != 0;
        if writable {
            // SAFETY: writes initialised bytes of a local buffer. A failed write has nobody to be told.
            let _ = unsafe { libc::write(2, self.bytes.as_ptr().cast(), self.used + 1) };
        }
    }
}
