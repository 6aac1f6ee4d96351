//! Traces: what is written is read back, whatever a file holds the reader survives it, and an engine that records nothing behaves the same.
//! The naive twin of the reader's promise: of a file cut off anywhere, exactly the whole records are read.

use crate::common::world::{World, policy, tag};
use proptest::prelude::*;
use sire_core::driver::{Addr, Device, ProgramStream};
use sire_core::engine::*;
use sire_core::error::Status;
use sire_core::trace::{Event, Reader, Record, Verb};
use std::path::Path;

const MIB: u64 = 1 << 20;

fn records(path: &Path) -> Vec<Record> {
    let bytes = std::fs::read(path).unwrap();
    Reader::new(&bytes).unwrap().collect::<Result<_, _>>().unwrap()
}

fn request(region: RegionId, size: u64) -> Request {
    Request { region, device: Device(0), size, stream: ProgramStream(7), capturing: false }
}

/// Some calls of every kind, with failures among them. Returns the address of the first allocation.
fn live(engine: &Engine) -> Addr {
    let region = engine.region("model/weights", policy(Backup::Host)).unwrap();
    engine.enter(region, OnPaused::Refuse).unwrap();
    let large = engine.allocate(request(region, 40_000)).unwrap();
    let small = engine.allocate(request(region, 100)).unwrap();
    assert!(engine.allocate(request(region, 0)).is_err());
    engine.leave(region);
    engine.keep(large, 4096).unwrap();
    assert!(engine.discard(Addr(12), 1).is_err());
    engine.changed(large.offset(8), 9).unwrap();
    assert!(engine.keep_resident(Addr(12)).is_err());
    engine.pause(&tag("model"), PauseOptions::default()).unwrap();
    assert!(engine.enter(region, OnPaused::Refuse).is_err());
    assert!(engine.pause(&tag("nobody"), PauseOptions::default()).is_err());
    engine.free(small, false).unwrap();
    engine.resume(&Selection::All, ResumeOptions::default()).unwrap();
    engine.trim();
    large
}

#[test]
fn a_life_is_recorded_call_by_call() {
    let (world, dir) = (World::new(4 * MIB), tempfile::tempdir().unwrap());
    let path = world.engine.trace(&dir.path().join("t")).unwrap();
    let large = live(&world.engine);
    let found = records(&path);
    let status = |status: Status| status as i32;
    let weights = RegionId(0);
    assert!(found.windows(2).all(|pair| pair[0].time <= pair[1].time));
    let mut events = found.iter().map(|record| &record.event);
    let mut next = || events.next().expect("a record is missing");

    assert!(
        matches!(next(), Event::Region { region: 0, tag, policy } if tag == "model/weights" && policy.backup == Backup::Host)
    );
    assert_eq!(*next(), Event::Enter { region: weights.0, resume: false, status: 0 });
    let Event::Allocate { size: 40_000, stream: 7, device: 0, addr, status: 0, .. } = next() else { panic!() };
    assert_eq!(*addr, large.0);
    assert!(matches!(next(), Event::Allocate { size: 100, status: 0, .. }));
    let failed = status(Status::InvalidArgument);
    assert!(matches!(next(), Event::Allocate { size: 0, addr: 0, status, .. } if *status == failed));
    assert_eq!(*next(), Event::Leave { region: 0 });
    assert_eq!(*next(), Event::Override { addr: large.0, len: 4096, keep: true, status: 0 });
    assert!(matches!(next(), Event::Override { keep: false, status, .. } if *status == Status::UnknownAddress as i32));
    assert_eq!(*next(), Event::Changed { addr: large.0 + 8, len: 9, status: 0 });
    let refused = Status::UnknownAddress as i32;
    assert!(matches!(next(), Event::KeepResident { addr: 12, status } if *status == refused));
    let Event::Transition(pause) = next() else { panic!() };
    assert_eq!((pause.verb, pause.tags.as_slice(), pause.status), (Verb::Pause, &["model".to_owned()][..], 0));
    assert!(pause.copied >= 40_000 && pause.moved >= pause.copied && !pause.took.is_zero());
    assert!(matches!(next(), Event::Enter { status, .. } if *status == Status::Paused as i32));
    assert!(matches!(next(), Event::Transition(t) if t.status == Status::UnknownTag as i32 && t.tags == ["nobody"]));
    assert!(matches!(next(), Event::Free { .. }));
    assert!(matches!(next(), Event::Transition(t) if t.verb == Verb::Resume && t.tags == [""] && t.status == 0));
    assert_eq!(*next(), Event::Trim);
    assert_eq!(events.next(), None);
}

#[test]
fn what_is_no_trace_is_not_overwritten() {
    let (world, dir) = (World::new(MIB), tempfile::tempdir().unwrap());
    let path = dir.path().join("thesis.txt");
    std::fs::write(&path, "years of work").unwrap();
    let error = world.engine.trace(&path).unwrap_err();
    assert_eq!(error.status, Status::InvalidArgument);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "years of work");
    let missing = world.engine.trace(&dir.path().join("no/such/folder/t")).unwrap_err();
    assert!(missing.message.contains("no/such/folder"), "{missing}");
}

#[test]
fn two_engines_do_not_share_a_file_and_a_later_one_replaces_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t");
    let (first, second) = (World::new(4 * MIB), World::new(4 * MIB));
    assert_eq!(first.engine.trace(&path).unwrap(), path);
    let other = second.engine.trace(&path).unwrap();
    assert_ne!(other, path);
    assert!(first.engine.trace(&path).is_err(), "one trace per engine");
    live(&first.engine);
    live(&second.engine);
    assert_eq!(records(&path).len(), records(&other).len());
    drop(first);
    let third = World::new(MIB);
    third.engine.trace(&path).unwrap();
    assert_eq!(records(&path), []);
}

/// A second trace of one engine was refused only after the file had been emptied, or another made beside it.
#[test]
fn a_second_trace_is_refused_before_any_file_is_touched() {
    let dir = tempfile::tempdir().unwrap();
    let (path, older) = (dir.path().join("t"), dir.path().join("older"));
    let (world, before) = (World::new(4 * MIB), World::new(4 * MIB));
    before.engine.trace(&older).unwrap();
    live(&before.engine);
    drop(before);
    let bytes = std::fs::read(&older).unwrap();
    world.engine.trace(&path).unwrap();
    for again in [&older, &path, &dir.path().join("new")] {
        let error = world.engine.trace(again).unwrap_err();
        assert!(error.message.contains("already"), "{error}");
    }
    assert_eq!(std::fs::read(&older).unwrap(), bytes);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
}

/// Processes of two containers may have one number: the second once emptied the file that the first was writing.
#[test]
fn a_file_of_ones_own_that_somebody_else_is_writing_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t");
    let worlds = [(); 3].map(|()| World::new(4 * MIB));
    worlds[0].engine.trace(&path).unwrap();
    let own = worlds[1].engine.trace(&path).unwrap();
    live(&worlds[1].engine);
    let bytes = std::fs::read(&own).unwrap();
    let error = worlds[2].engine.trace(&path).unwrap_err();
    assert_eq!(error.status, Status::InvalidArgument);
    assert_eq!(std::fs::read(&own).unwrap(), bytes);
}

/// Threads write whole records, each once.
#[test]
fn records_of_several_threads_do_not_mix() {
    let (world, dir) = (World::new(4 * MIB), tempfile::tempdir().unwrap());
    let path = world.engine.trace(&dir.path().join("t")).unwrap();
    let region = world.engine.region("r", Policy::default()).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..50 {
                    let addr = world.engine.allocate(request(region, 300)).unwrap();
                    world.engine.free(addr, false).unwrap();
                }
            });
        }
    });
    let found = records(&path);
    assert_eq!(found.len(), 1 + 4 * 50 * 2);
    let threads: std::collections::BTreeSet<_> = found[1..].iter().map(|record| record.thread).collect();
    assert_eq!(threads.len(), 4);
    // No address is handed out twice without a free in between.
    let mut alive = std::collections::BTreeSet::new();
    for record in &found {
        match record.event {
            Event::Allocate { addr, .. } => assert!(alive.insert(addr), "{addr:#x} is alive already"),
            Event::Free { addr } => assert!(alive.remove(&addr), "{addr:#x} is not alive"),
            _ => {}
        }
    }
}

fn sample() -> Vec<u8> {
    let (world, dir) = (World::new(4 * MIB), tempfile::tempdir().unwrap());
    let path = world.engine.trace(&dir.path().join("t")).unwrap();
    live(&world.engine);
    std::fs::read(path).unwrap()
}

#[test]
fn a_file_cut_off_anywhere_gives_the_whole_records_before_the_cut() {
    let whole = sample();
    let all: Vec<Record> = Reader::new(&whole).unwrap().map(Result::unwrap).collect();
    let mut counts = vec![];
    for len in 0..whole.len() {
        let Ok(reader) = Reader::new(&whole[..len]) else { continue };
        let found: Vec<_> = reader.collect();
        let good: Vec<Record> = found.iter().filter_map(|record| record.clone().ok()).collect();
        assert_eq!(good, all[..good.len()]);
        assert!(found.iter().filter_map(|record| record.as_ref().err()).all(|damage| damage.torn), "cut at {len}");
        counts.push(good.len());
    }
    assert!(counts.is_sorted());
    assert_eq!(counts.last(), Some(&(all.len() - 1)));
}

#[test]
fn a_newer_version_and_other_files_are_refused_with_a_sentence() {
    for (bytes, word) in [(&b"#!/bin/sh\n"[..], "not a trace"), (b"", "not a trace"), (b"sire-trc", "ends inside")] {
        let damage = Reader::new(bytes).unwrap_err();
        assert!(damage.to_string().contains(word), "{damage}");
    }
    let text = br#"{"version":999}"#;
    let sum = crc(text);
    let newer = [&b"sire-trc"[..], &[text.len() as u8], text, &sum].concat();
    assert!(Reader::new(&newer).unwrap_err().what.contains("version 999"));
}

/// CRC-32 bit by bit: the twin of the fast one.
fn crc(bytes: &[u8]) -> [u8; 2] {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0xEDB8_8320 } else { crc >> 1 };
        }
    }
    let [low, high, ..] = (!crc).to_le_bytes();
    [low, high]
}

/// A file whose check sums are right and whose payloads are anything.
fn framed(payloads: &[Vec<u8>]) -> Vec<u8> {
    let mut out = b"sire-trc".to_vec();
    for payload in [br#"{"version":1,"chunk":4096}"#.to_vec()].iter().chain(payloads) {
        let len = payload.len();
        out.extend(if len < 128 { vec![len as u8] } else { vec![len as u8 | 0x80, (len >> 7) as u8] });
        out.extend_from_slice(payload);
        out.extend(crc(payload));
    }
    out
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_are_survived(tail in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = Reader::new(&tail).map(Iterator::count);
        let bytes = [framed(&[]), tail].concat();
        let found: Vec<_> = Reader::new(&bytes).unwrap().collect();
        prop_assert!(found.iter().rev().skip(1).all(Result::is_ok), "reading goes on after damage");
    }

    #[test]
    fn any_payload_with_a_right_sum_is_survived(payloads in proptest::collection::vec((0..32u8, proptest::collection::vec(any::<u8>(), 0..200)), 0..5)) {
        let payloads: Vec<Vec<u8>> = payloads.into_iter().map(|(kind, rest)| [&[kind][..], &rest].concat()).collect();
        let found: Vec<_> = Reader::new(&framed(&payloads)).unwrap().collect();
        prop_assert!(found.len() <= payloads.len());
        prop_assert!(found.iter().all(|record| record.as_ref().err().is_none_or(|damage| !damage.torn)));
    }

    #[test]
    fn a_flipped_bit_is_found_or_changes_nothing_before_it(at in any::<prop::sample::Index>(), bit in 0..8u8) {
        static SAMPLE: std::sync::LazyLock<Vec<u8>> = std::sync::LazyLock::new(sample);
        let whole: Vec<Record> = Reader::new(&SAMPLE).unwrap().map(Result::unwrap).collect();
        let mut bytes = SAMPLE.clone();
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        if let Ok(reader) = Reader::new(&bytes) {
            let found: Vec<Record> = reader.map_while(Result::ok).collect();
            let same = found.iter().zip(&whole).take_while(|(a, b)| a == b).count();
            prop_assert!(found.len() - same <= 1, "one flipped bit may hide in at most one record");
        }
    }
}
