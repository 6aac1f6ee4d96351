//! The numbers of the C ABI.

use sire_core::error::Status;
use std::ffi::CStr;

/// What a function returns. The numbers never change and are never reused.
#[repr(i32)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum sire_status {
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
    /// The region is in use: a thread is inside it, or another transition runs.
    Busy = 7,
    /// A graph capture is in progress: Sire must not synchronise now.
    Capturing = 8,
    /// The call was cancelled and rolled back.
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
    /// The library is not active in this process (forked child, `SIRE_DISABLE`).
    Inactive = 15,
    /// The caller was built for another version of the library.
    VersionMismatch = 16,
    /// A transition could not be undone; the tag ended paused with every byte in a backup.
    PausedAfterFailure = 17,
    /// A bug in Sire (a caught panic). Nothing is known about the call's effect.
    Internal = 18,
}

/// Pairs every number of the C ABI with the engine's; the two lists cannot drift apart.
macro_rules! same_numbers {
    ($($name:ident = $c_name:literal),* $(,)?) => {
        const _: () = { $(assert!(sire_status::$name as i32 == Status::$name as i32);)* };

        impl From<Status> for sire_status {
            fn from(status: Status) -> sire_status {
                match status { $(Status::$name => sire_status::$name),* }
            }
        }

        /// The engine's word for a number; None for one that there is not.
        pub(crate) fn engine_status(number: i32) -> Option<Status> {
            match number {
                $(_ if number == Status::$name as i32 => Some(Status::$name),)*
                _ => None,
            }
        }

        /// The name of the constant that has this number.
        pub(crate) fn name(number: i32) -> &'static CStr {
            match number {
                $(_ if number == Status::$name as i32 => $c_name,)*
                _ => c"SIRE_STATUS_UNKNOWN",
            }
        }
    };
}

same_numbers!(
    Ok = c"SIRE_STATUS_OK",
    InvalidArgument = c"SIRE_STATUS_INVALID_ARGUMENT",
    OutOfDeviceMemory = c"SIRE_STATUS_OUT_OF_DEVICE_MEMORY",
    OutOfBackupSpace = c"SIRE_STATUS_OUT_OF_BACKUP_SPACE",
    UnknownTag = c"SIRE_STATUS_UNKNOWN_TAG",
    UnknownAddress = c"SIRE_STATUS_UNKNOWN_ADDRESS",
    Paused = c"SIRE_STATUS_PAUSED",
    Busy = c"SIRE_STATUS_BUSY",
    Capturing = c"SIRE_STATUS_CAPTURING",
    Cancelled = c"SIRE_STATUS_CANCELLED",
    BackupIo = c"SIRE_STATUS_BACKUP_IO",
    NoDriver = c"SIRE_STATUS_NO_DRIVER",
    Unsupported = c"SIRE_STATUS_UNSUPPORTED",
    DeviceLost = c"SIRE_STATUS_DEVICE_LOST",
    Driver = c"SIRE_STATUS_DRIVER",
    Inactive = c"SIRE_STATUS_INACTIVE",
    VersionMismatch = c"SIRE_STATUS_VERSION_MISMATCH",
    PausedAfterFailure = c"SIRE_STATUS_PAUSED_AFTER_FAILURE",
    Internal = c"SIRE_STATUS_INTERNAL",
);
