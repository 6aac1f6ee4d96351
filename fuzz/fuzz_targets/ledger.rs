//! A ledger's file with any bytes in it: it is refused or read, and a member that joins is granted no more than the device has.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sire_ledger::{Ledger, Memory, Patience, Want, layout};
use std::time::Duration;

fuzz_target!(|bytes: &[u8]| {
    let _ = (layout::check_header(bytes), layout::newest(bytes), layout::decode(bytes), layout::is_wreck(bytes));
    let Ok(dir) = tempfile::tempdir() else { return };
    // As they are, and as slots of a file whose header is right.
    let mut whole = vec![0; layout::FILE as usize];
    whole[..layout::HEADER_USED].copy_from_slice(&layout::header());
    for (to, from) in whole[layout::HEADER as usize..].iter_mut().zip(bytes.iter().cycle()) {
        *to = *from;
    }
    for file in [bytes, &whole] {
        if std::fs::write(dir.path().join("sire-ledger-GPU-1"), file).is_err() {
            return;
        }
        let memory = || Some(Memory { free: 100, total: 100 });
        let now = Patience { timeout: Some(Duration::ZERO), cancelled: &|| false };
        if let Ok(ledger) = Ledger::open(dir.path(), "GPU-1") {
            assert!(ledger.entries().is_ok_and(|entries| entries.is_empty()), "nobody lives there");
            let member = ledger.join().expect("there is a free slot");
            assert_eq!(member.reserve(Want::Bytes(100), &memory, now).expect("all of it is free"), 100);
        }
    }
});
