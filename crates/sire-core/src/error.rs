//! The engine's one error type: a stable status, and a sentence that helps.
//!
//! [`Status`] numbers are the C ABI's numbers; they are never reused. A message says what was asked
//! (tag, bytes, device), what is missing, and what to do.

use crate::driver::{DriverError, DriverErrorKind};
use std::fmt;

/// Why a call failed. The numbers are part of the C ABI (`sire_status`) and never change.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, serde::Serialize)]
#[repr(i32)]
pub enum Status {
    /// It worked.
    Ok = 0,
    /// An argument is outside what the function accepts.
    InvalidArgument = 1,
    /// Not enough physical memory on the device; nothing was lost, and the call can be repeated.
    OutOfDeviceMemory = 2,
    /// Not enough room for backups (host limit, cgroup, disk); nothing was lost.
    OutOfBackupSpace = 3,
    /// No region has this tag.
    UnknownTag = 4,
    /// The address is not an allocation of Sire's.
    UnknownAddress = 5,
    /// The region is paused, and the call needs it resident.
    Paused = 6,
    /// The region is in use (a thread is inside it, or another transition runs).
    Busy = 7,
    /// A graph capture is in progress: Sire must not synchronise now.
    Capturing = 8,
    /// The call was cancelled at a chunk boundary and rolled back.
    Cancelled = 9,
    /// Reading or writing a backup failed; what the message names is still safe elsewhere.
    BackupIo = 10,
    /// There is no usable driver or device.
    NoDriver = 11,
    /// The environment cannot be served (for example memory of two regions in one segment of PyTorch's).
    Unsupported = 12,
    /// The device context is lost; only a new process helps.
    DeviceLost = 13,
    /// The driver failed in another way.
    Driver = 14,
    /// The library is not active in this process (forked child, hook not live, being unloaded).
    Inactive = 15,
    /// The caller was built for another version of the library.
    VersionMismatch = 16,
    /// A transition could not be undone; the tag ended paused with every byte in a backup.
    PausedAfterFailure = 17,
    /// A bug in Sire (a caught panic). Nothing is known about the call's effect.
    Internal = 18,
}

impl Status {
    /// The constant's name in C.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Status::Ok => "SIRE_STATUS_OK",
            Status::InvalidArgument => "SIRE_STATUS_INVALID_ARGUMENT",
            Status::OutOfDeviceMemory => "SIRE_STATUS_OUT_OF_DEVICE_MEMORY",
            Status::OutOfBackupSpace => "SIRE_STATUS_OUT_OF_BACKUP_SPACE",
            Status::UnknownTag => "SIRE_STATUS_UNKNOWN_TAG",
            Status::UnknownAddress => "SIRE_STATUS_UNKNOWN_ADDRESS",
            Status::Paused => "SIRE_STATUS_PAUSED",
            Status::Busy => "SIRE_STATUS_BUSY",
            Status::Capturing => "SIRE_STATUS_CAPTURING",
            Status::Cancelled => "SIRE_STATUS_CANCELLED",
            Status::BackupIo => "SIRE_STATUS_BACKUP_IO",
            Status::NoDriver => "SIRE_STATUS_NO_DRIVER",
            Status::Unsupported => "SIRE_STATUS_UNSUPPORTED",
            Status::DeviceLost => "SIRE_STATUS_DEVICE_LOST",
            Status::Driver => "SIRE_STATUS_DRIVER",
            Status::Inactive => "SIRE_STATUS_INACTIVE",
            Status::VersionMismatch => "SIRE_STATUS_VERSION_MISMATCH",
            Status::PausedAfterFailure => "SIRE_STATUS_PAUSED_AFTER_FAILURE",
            Status::Internal => "SIRE_STATUS_INTERNAL",
        }
    }
}

/// A failed call.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Error {
    /// The class, for programs.
    pub status: Status,
    /// The sentence, for people.
    pub message: String,
}

/// What the engine's functions return.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error of class `status` that says `message`.
    pub fn new(status: Status, message: impl Into<String>) -> Error {
        Error { status, message: message.into() }
    }

    /// Puts what was being done in front of the message.
    #[must_use]
    pub fn context(mut self, doing: impl fmt::Display) -> Error {
        self.message = format!("{doing}: {}", self.message);
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

impl From<DriverError> for Error {
    fn from(error: DriverError) -> Error {
        let status = match error.kind {
            DriverErrorKind::OutOfMemory => Status::OutOfDeviceMemory,
            DriverErrorKind::Invalid | DriverErrorKind::Other => Status::Driver,
            DriverErrorKind::Unsupported => Status::Unsupported,
            DriverErrorKind::Unavailable => Status::NoDriver,
            DriverErrorKind::Lost => Status::DeviceLost,
            DriverErrorKind::Capturing => {
                let message = format!("{error}: not while a CUDA graph is being captured; end the capture first");
                return Error::new(Status::Capturing, message);
            }
        };
        Error::new(status, error.to_string())
    }
}
