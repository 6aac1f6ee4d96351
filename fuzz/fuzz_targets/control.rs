//! The control socket's protocol survives any bytes. Seeds: `crates/sire-control/tests/corpus`.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../crates/sire-control/tests/corpus/check.rs"]
mod corpus;

fuzz_target!(|bytes: &[u8]| corpus::check(bytes));
