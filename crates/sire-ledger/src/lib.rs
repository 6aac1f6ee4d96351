//! The ledger: who has reserved how many bytes of which GPU, shared by all processes of a machine.
//!
//! One file per physical GPU holds a fixed number of slots. A process that wants memory *joins* (takes a slot), says
//! how much it wants, waits for its turn, and holds its reservation until it lets go or ends. Nothing in the file says whether a
//! process lives: that is a lock on the slot's byte, which the kernel drops with the process, however it ends. So a stopped process
//! keeps what it reserved, a killed one loses it at once, and neither clocks nor process numbers are trusted.
//!
//! * [`layout`]: the bytes of the file; pure, and suspicious of all it reads.
//! * [`turn`]: whose turn it is and whether there is room; a pure function.
//! * [`mod@file`]: the file itself: creating, opening, locks.
//! * [`forks`]: what a forked child must not keep. Only these two modules have unsafe code.
//! * [`Ledger`] and [`Member`]: what callers use.
//! * [`slices`]: turns of processes that share a device by time, in a ledger of their own.
//!
//! Shared records carry only uid, pid, start time and bytes: what a process calls its memory stays its own.

mod error;
mod file;
mod forks;
pub mod layout;
mod ledger;
pub mod slices;
pub mod turn;

pub use error::{Error, Result};
pub use ledger::{Entry, Ledger, Member, Memory, Patience};
pub use turn::Want;

use std::ffi::OsString;
use std::path::PathBuf;

/// Where processes find each other's ledgers: `TORCHTOOLS_LOCK_DIR`, or else `/tmp`, whatever TMPDIR says: that may be a user's own.
#[must_use]
pub fn directory() -> PathBuf {
    directory_of(std::env::var_os("TORCHTOOLS_LOCK_DIR"))
}

/// An empty variable is one that is not set.
fn directory_of(variable: Option<OsString>) -> PathBuf {
    variable.filter(|dir| !dir.is_empty()).map_or_else(|| "/tmp".into(), PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::directory_of;
    use std::path::Path;

    #[test]
    fn processes_meet_in_tmp_unless_the_variable_names_a_directory() {
        for (variable, directory) in [(None, "/tmp"), (Some(""), "/tmp"), (Some("/var/lock/gpus"), "/var/lock/gpus")] {
            assert_eq!(
                directory_of(variable.map(Into::into)),
                Path::new(directory),
                "TORCHTOOLS_LOCK_DIR={variable:?}"
            );
        }
    }
}
