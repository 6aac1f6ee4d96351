//! A member that is killed before and after every system call that changes anything: whatever it was doing, the ledger is usable at once, the
//! dead one holds nothing, and who was there before still holds what it held. (A write that is cut in the middle is the concern of a property of
//! `layout`.)
//!
//! The member is a forked child that the test traces, system call by system call. (By the registers of x86-64; the ledger itself knows no
//! architecture.) Where that cannot be done the test counts as ignored, with the reason, and so this binary has a `main` of its own.

use libtest_mimic::{Arguments, Trial};
use std::process::ExitCode;

fn main() -> ExitCode {
    let test = Trial::ignorable_test("killed_at_every_step_a_member_leaves_the_ledger_usable", steps::test);
    libtest_mimic::run(&Arguments::from_args(), vec![test]).exit_code()
}

#[cfg(not(target_arch = "x86_64"))]
mod steps {
    use libtest_mimic::{Completion, Failed};

    pub fn test() -> Result<Completion, Failed> {
        Ok(Completion::ignored_with("steps are told by the registers of x86-64"))
    }
}

#[cfg(target_arch = "x86_64")]
#[path = "steps/x86_64.rs"]
mod steps;
