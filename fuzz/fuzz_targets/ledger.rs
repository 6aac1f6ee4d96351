//! A ledger with any bytes in it is refused or read, and grants no more than the device has. Seeds: `fuzz/seeds/ledger`.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../crates/sire-ledger/tests/corpus/check.rs"]
mod corpus;

fuzz_target!(|bytes: &[u8]| corpus::check(bytes));
