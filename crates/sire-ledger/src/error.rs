//! What can go wrong with a ledger, as sentences.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// What ledger calls return.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a ledger call failed. The ledger is as usable afterwards as before.
#[derive(Debug)]
pub enum Error {
    /// The system refused something.
    Io {
        /// What was tried.
        doing: String,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// The file is not a ledger, or not of this layout. It is never changed then.
    Foreign {
        /// The file.
        path: PathBuf,
        /// What was found.
        found: String,
    },
    /// Every slot belongs to a living process.
    Full {
        /// How many slots there are.
        slots: u32,
    },
    /// More was asked for than the device has.
    TooLarge {
        /// Bytes wanted.
        wanted: u64,
        /// Bytes that the device has.
        total: u64,
    },
    /// The driver does not say how much memory the device has.
    Speechless,
    /// The time to wait was over.
    TimedOut {
        /// Bytes wanted.
        wanted: u64,
        /// What was in the way at the last look.
        why: String,
    },
    /// The caller stopped waiting.
    Cancelled,
    /// Another process is in the middle of a change and does not go on (it is probably stopped).
    Stuck,
    /// The member was inherited by a forked child, which has no reservation of its own.
    Forked,
}

impl Error {
    pub(crate) fn io(doing: impl Into<String>, path: &Path, error: io::Error) -> Error {
        Error::Io { doing: doing.into(), path: path.to_owned(), error }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Io { doing, path, error } => write!(f, "cannot {doing} {}: {error}", path.display()),
            Error::Foreign { path, found } => write!(
                f,
                "{} is not a ledger that this version of Sire can use ({found}); use the newer version, or end every process \
                 that uses it and remove the file",
                path.display()
            ),
            Error::Full { slots } => {
                write!(f, "all {slots} slots of the ledger belong to living processes; end one of them")
            }
            Error::TooLarge { wanted, total } => {
                write!(f, "{wanted} bytes can never be reserved on a device that has {total}; ask for less")
            }
            Error::Speechless => f.write_str(
                "the driver does not say how much memory the device has and how much of it is free, so nothing of it can be reserved; \
                 go on without a reservation, or see why (nvidia-smi)",
            ),
            Error::TimedOut { wanted, why } => write!(f, "no reservation of {wanted} bytes in the time given: {why}"),
            Error::Cancelled => f.write_str("the wait for a reservation was cancelled; nothing is reserved"),
            Error::Stuck => f.write_str(
                "another process is in the middle of changing the ledger and does not go on; if one is stopped, continue or end it",
            ),
            Error::Forked => f.write_str("this reservation belongs to the parent process; a forked child must join anew"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Io { error, .. } => Some(error),
            _ => None,
        }
    }
}
