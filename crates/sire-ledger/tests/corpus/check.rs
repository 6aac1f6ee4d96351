// What must hold for any bytes that somebody writes into a ledger. Included by the fuzz target `ledger` and by the plain test that goes through the seeds.
#![allow(clippy::expect_used)]

use sire_ledger::{Error, Ledger, Member, Memory, Patience, Want, layout};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

const NOW: Patience<'static> = Patience { timeout: Some(Duration::ZERO), cancelled: &|| false };
const ALL: u64 = 100;
const HELD: u64 = 40;

/// As a file, as the slots of a file whose header is right, and as what a living member writes beside others.
pub fn check(bytes: &[u8]) {
    let _ = (layout::check_header(bytes), layout::newest(bytes), layout::decode(bytes), layout::is_wreck(bytes));
    let dir = tempfile::tempdir().expect("a temporary directory can be made");
    let mut whole = vec![0; layout::FILE as usize];
    whole[..layout::HEADER_USED].copy_from_slice(&layout::header());
    for (to, from) in whole[layout::HEADER as usize..].iter_mut().zip(bytes.iter().cycle()) {
        *to = *from;
    }
    assert!(is_served(dir.path(), &whole), "a file whose header is right was refused");
    is_served(dir.path(), bytes);
    beside_the_living(dir.path(), bytes);
}

/// Whether the file is taken for a ledger: then nobody lives in it, and a member is granted all that the device has.
fn is_served(dir: &Path, file: &[u8]) -> bool {
    std::fs::write(dir.join("sire-ledger-GPU-1"), file).expect("the file can be written");
    let memory = || Some(Memory { free: ALL, total: ALL });
    let Ok(ledger) = Ledger::open(dir, "GPU-1") else { return false };
    assert!(ledger.entries().is_ok_and(|entries| entries.is_empty()), "nobody lives there");
    let member = ledger.join().expect("there is a free slot");
    assert_eq!(member.reserve(Want::Bytes(ALL), &memory, NOW).expect("all of it is free"), ALL);
    true
}

/// Of three members one holds, one writes `bytes` where its own record is, and one wants the rest: it gets no more than is free, or is told to wait, and the
/// first keeps what it has. Then they are written where the first one's record is: until it changes anything, and no longer.
fn beside_the_living(dir: &Path, bytes: &[u8]) {
    let memory = |free| move || Some(Memory { free, total: ALL });
    let ledger = Ledger::open(dir, "GPU-2").expect("a new ledger can be made");
    let join = || ledger.join().expect("there is a free slot");
    let (holds, lies, wants) = (join(), join(), join());
    holds.reserve(Want::Bytes(HELD), &memory(ALL), NOW).expect("all of it is free");
    holds.note_owned(HELD).expect("the record can be written");
    let file = std::fs::OpenOptions::new().write(true).open(dir.join("sire-ledger-GPU-2")).expect("it is there");
    let lie = &bytes[..bytes.len().min(layout::SLOT as usize)];
    let write = |slot: u64| file.write_all_at(lie, layout::HEADER + slot * layout::SLOT).expect("it can be written");
    let kept = || {
        let entries = ledger.entries().expect("it can be read");
        entries.iter().find(|entry| entry.slot == 0).map(|entry| (entry.bytes, entry.owned))
    };
    write(1);
    wants_the_rest(&wants);
    assert_eq!(kept(), Some((HELD, HELD)), "what somebody writes into his own place changed another's");
    drop(lies);
    write(0);
    wants_the_rest(&wants);
    holds.note_owned(HELD).expect("the record can be written");
    assert_eq!(kept(), Some((HELD, HELD)), "what somebody wrote into another's place outlasts its owner's next change");
    wants.release().expect("the record can be written");
    assert_eq!(wants.reserve(Want::Bytes(ALL - HELD), &memory(ALL - HELD), NOW).expect("it is free"), ALL - HELD);
}

/// It gets no more than is free, or is told to wait.
fn wants_the_rest(member: &Member) {
    let memory = || Some(Memory { free: ALL - HELD, total: ALL });
    for want in [Want::Bytes(ALL - HELD), Want::Rest { margin: 1 }] {
        match member.reserve(want, &memory, NOW) {
            Ok(granted) => assert!(granted <= ALL - HELD, "{granted} bytes were granted"),
            Err(error) => assert!(matches!(error, Error::TimedOut { .. }), "{error}"),
        }
    }
}
