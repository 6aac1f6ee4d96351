//! A member that is killed before and after every system call that changes anything: whatever it was doing, the ledger is usable at once, the
//! dead one holds nothing, and who was there before still holds what it held. (A write that is cut in the middle is the concern of a property of
//! `layout`.)
//!
//! The member is a forked child that the test traces, system call by system call. (By the registers of x86-64; the ledger itself knows no
//! architecture.) Where that cannot be done the test counts as ignored, with the reason, and so this binary has a `main` of its own.

#[cfg(not(target_arch = "x86_64"))]
use libtest_mimic::Completion;
use libtest_mimic::{Arguments, Trial};
use std::process::ExitCode;

#[cfg(target_arch = "x86_64")]
#[path = "steps/x86_64.rs"]
mod steps;

#[cfg(target_arch = "x86_64")]
fn tests() -> Vec<Trial> {
    let lives: [(&str, steps::Life); 3] =
        [("reserves", steps::reserve), ("resizes", steps::resize), ("takes_a_turn", steps::take_turn)];
    let test = |(does, life)| {
        let name = format!("killed_at_every_step_who_{does}_leaves_the_ledger_usable");
        Trial::ignorable_test(name, move || steps::test(life))
    };
    lives.into_iter().map(test).collect()
}

#[cfg(not(target_arch = "x86_64"))]
fn tests() -> Vec<Trial> {
    let ignored = || Ok(Completion::ignored_with("steps are told by the registers of x86-64"));
    vec![Trial::ignorable_test("killed_at_every_step_a_member_leaves_the_ledger_usable", ignored)]
}

fn main() -> ExitCode {
    libtest_mimic::run(&Arguments::from_args(), tests()).exit_code()
}
