//! A life is recorded, and replayed on the software device with every byte compared.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::Arc;

use sire_core::driver::{Access, Addr, Device as Ordinal, Driver, ProgramStream, Properties, Rights};
use sire_core::engine::*;
use sire_core::segments::NewMemory;
use sire_core::trace::{Attachment, Event, Record, SegmentCall, Transition, Verb};
use sire_sim::{Machine, Options, Profile, SimDriver};

use super::content::{Content, Meaning, pattern};
use super::files::Files;
use super::{Trace, device, needs, parse, player};

const MIB: u64 = 1 << 20;

fn config() -> Config {
    Config { chunk: 2 * MIB, small: 64 << 10, copy_piece: 1 << 20, ..Config::default() }
}

/// Two models that do not fit together, each paused while the other works; small and large allocations, frees in between.
fn record() -> Trace {
    let dir =
        std::env::temp_dir().join(format!("sire-replay-{}-{:?}", std::process::id(), std::thread::current().id()));
    let machine = Machine::new(Options { memory: 24 * MIB, ..Options::default() }).unwrap();
    let engine = Engine::new(Arc::new(SimDriver::on(machine)), config());
    let path = engine.trace(&dir).unwrap();
    let policy = |backup| Policy { backup, ..Policy::default() };
    let (select, pause, resume) =
        (|tag: &str| Selection::Tag(tag.into()), PauseOptions::default(), ResumeOptions::default());
    let mut small = Vec::new();
    for tag in ["a", "b"] {
        let weights = engine.region(&format!("{tag}/weights"), policy(Backup::Host)).unwrap();
        let cache = engine.region(&format!("{tag}/cache"), policy(Backup::None)).unwrap();
        engine.enter(weights, OnPaused::Refuse).unwrap();
        let allocate = |region, size| {
            let request = Request { region, device: Ordinal(0), size, stream: ProgramStream(0), capturing: false };
            engine.allocate(request).unwrap()
        };
        allocate(weights, 5 * MIB + 12345);
        small.extend((0..40).map(|i| allocate(weights, 100 + 64 * i)));
        engine.leave(weights);
        let kept = allocate(cache, 3 * MIB);
        engine.keep(kept.offset(8192), 70_001).unwrap();
        engine.discard(allocate(weights, MIB), 4096).unwrap();
        engine.pause(&select(tag), pause).unwrap();
    }
    for _ in 0..2 {
        engine.resume(&select("a"), resume).unwrap();
        engine.free(small.swap_remove(3), false).unwrap();
        engine.pause(&select("a"), pause).unwrap();
        engine.resume(&select("b/weights"), resume).unwrap();
        engine.pause(&select("b"), pause).unwrap();
    }
    assert!(engine.free(Addr(1), false).is_err());
    let bytes = std::fs::read(&path).unwrap();
    std::fs::remove_file(path).unwrap();
    parse(&bytes).unwrap()
}

#[test]
fn a_replay_makes_the_same_calls_and_keeps_every_byte() {
    let trace = record();
    let needs = needs::of(&trace);
    assert_eq!((needs.devices, needs.allocations), (1, 86));
    assert!(needs.peak < 40 * MIB && needs.virtual_bytes > 20 * MIB, "{needs:?}");
    let device = device::software(needs.peak, needs.devices, None).unwrap();
    let played = player::play(&trace, &device, &Files::default(), true).unwrap();
    assert_eq!(played.trouble(), None);
    assert!(played.compared > 4 * 5 * MIB, "{} bytes were compared", played.compared);
    let count = |name: &str| played.timings[name].seconds.len();
    assert_eq!((count("pause"), count("resume"), count("allocate"), count("free")), (6, 4, 86, 2));
    assert_eq!(played.left_out, 1, "the free of an address that never was");
    // What it copied is what was copied when it was recorded.
    let copied = |verb: Verb| -> u64 {
        let of = |record: &Record| match &record.event {
            Event::Transition(done) if done.verb == verb => done.copied,
            _ => 0,
        };
        trace.records.iter().map(of).sum()
    };
    assert_eq!(played.timings["pause"].copied, copied(Verb::Pause));
    assert_eq!(played.timings["resume"].copied, copied(Verb::Resume));
    // A second replay finds the device empty again.
    assert_eq!(player::play(&trace, &device, &Files::default(), true).unwrap().trouble(), None);
}

#[test]
fn lazy_pauses_and_pre_copies_are_played_as_what_they_were() {
    let machine = Machine::new(Options { memory: 24 * MIB, ..Options::default() }).unwrap();
    let engine = Engine::new(Arc::new(SimDriver::on(machine)), config());
    let path = engine.trace(&std::env::temp_dir().join(format!("sire-replay-lazy-{}", std::process::id()))).unwrap();
    let policy = Policy { backup: Backup::Host, clean: Clean::Declared, ..Policy::default() };
    let region = engine.region("weights", policy).unwrap();
    let request = Request { region, device: Ordinal(0), size: 6 * MIB, stream: ProgramStream(0), capturing: false };
    engine.allocate(request).unwrap();
    let all = Selection::All;
    engine.pre_copy(&all, false).unwrap();
    engine.pause(&all, PauseOptions { lazy: true, ..PauseOptions::default() }).unwrap();
    engine.resume(&all, ResumeOptions::default()).unwrap();
    let trace = parse(&std::fs::read(&path).unwrap()).unwrap();
    std::fs::remove_file(path).unwrap();

    let device = device::software(24 * MIB, 1, None).unwrap();
    let played = player::play(&trace, &device, &Files::default(), true).unwrap();
    assert_eq!((played.trouble(), played.left_out), (None, 0));
    assert!(played.timings["pre_copy"].copied >= 6 * MIB, "the backup was made beforehand");
    let pause = &played.timings["pause_lazily"];
    assert_eq!((pause.seconds.len(), pause.copied, pause.moved), (1, 0, 0), "a lazy pause gives nothing back");
    assert_eq!(played.timings["resume"].copied, 0);
}

/// A program that maps its memory itself, as PyTorch's expandable segments do: chunks side by side in one reservation, some of which go
/// while they are paused and come again.
fn record_mapped() -> Trace {
    const CHUNK: u64 = 2 * MIB;
    let file = std::env::temp_dir().join(format!("sire-replay-mapped-{}-%p", std::process::id()));
    let driver = Arc::new(SimDriver::on(Machine::new(Options { memory: 24 * MIB, ..Options::default() }).unwrap()));
    let engine = Engine::new(driver.clone(), config());
    let path = engine.trace(&file).unwrap();
    let region = engine.region("cache", Policy { backup: Backup::Host, ..Policy::default() }).unwrap();
    let segments = engine.segments();
    let base = driver.reserve(8 * CHUNK, 0).unwrap();
    segments.reserved(base, 8 * CHUNK, Some(region));
    let all = Selection::Tag("cache".into());
    let access = [Access { device: Ordinal(0), rights: Rights::ReadWrite }];
    let map = |place: u64, region| {
        let properties = Properties { shareable: 1, ..Properties::default() };
        let memory = NewMemory { region, device: Ordinal(0), size: CHUNK, properties, capturing: false };
        let handle = segments.create(memory).unwrap().unwrap();
        assert_eq!(segments.map(base.offset(place * CHUNK), CHUNK, 0, handle, false).unwrap(), None);
        handle
    };
    let handles: Vec<_> = (0..4).map(|place| map(place, (place != 2).then_some(region))).collect();
    segments.grant(base, 4 * CHUNK, &access).unwrap();
    engine.pause(&all, PauseOptions::default()).unwrap();
    assert!(segments.create(NewMemory { region: Some(region), ..segments.memory(handles[0]).unwrap() }).is_err());
    segments.unmap(base.offset(CHUNK), CHUNK).unwrap();
    segments.release(handles[1]).unwrap();
    engine.resume(&all, ResumeOptions::default()).unwrap();
    let again = map(1, Some(region));
    segments.grant(base.offset(CHUNK), CHUNK, &access).unwrap();
    assert_eq!(segments.retain(base), Some(handles[0]));
    segments.release(handles[0]).unwrap();
    engine.pause(&all, PauseOptions::default()).unwrap();
    engine.resume(&all, ResumeOptions::default()).unwrap();
    segments.unmap(base, 4 * CHUNK).unwrap();
    [handles[0], again, handles[2], handles[3]].into_iter().for_each(|handle| segments.release(handle).unwrap());
    assert!(segments.unreserve(base, 8 * CHUNK).unwrap());
    let bytes = std::fs::read(&path).unwrap();
    std::fs::remove_file(path).unwrap();
    parse(&bytes).unwrap()
}

#[test]
fn memory_that_the_program_maps_itself_is_replayed_with_every_byte() {
    let trace = record_mapped();
    assert_eq!(trace.ending, None);
    let needs = needs::of(&trace);
    assert_eq!((needs.devices, needs.allocations, needs.virtual_bytes), (1, 4, 8 * MIB));
    let device = device::software(needs.peak, needs.devices, None).unwrap();
    for _ in 0..2 {
        let played = player::play(&trace, &device, &Files::default(), true).unwrap();
        assert_eq!(played.trouble(), None);
        assert_eq!(played.left_out, 1, "the create that was refused while the region was paused");
        // The chunk that went while it was paused is not compared after the first resume, its successor after the second.
        assert_eq!(played.compared, (3 + 4) * 2 * MIB);
        let count = |name: &str| played.timings[name].seconds.len();
        assert_eq!((count("create"), count("map"), count("grant"), count("release")), (5, 5, 2, 6));
        assert_eq!((count("reserve"), count("unmap"), count("retain"), count("unreserve")), (1, 2, 1, 1));
        let moved: u64 = played.timings["pause"].moved;
        assert_eq!(moved, 2 * 8 * MIB, "all four chunks went, twice");
    }
}

/// Weights in two files, one of which is gone when the trace is replayed; nothing of either is backed up anywhere else.
fn record_files(dir: &std::path::Path) -> Trace {
    const SIZE: u64 = 5 * MIB + 100;
    let driver: Arc<dyn Driver> =
        Arc::new(SimDriver::on(Machine::new(Options { memory: 32 * MIB, ..Options::default() }).unwrap()));
    let engine = Engine::new(Arc::clone(&driver), config());
    let path = engine.trace(&dir.join("trace")).unwrap();
    let region = engine.region("weights", Policy { backup: Backup::File, ..Policy::default() }).unwrap();
    let mut content = Content::new(&driver, Ordinal(0)).unwrap();
    for (name, at) in [("stays", 1237), ("goes", 24)] {
        let mut bytes = vec![0; SIZE as usize];
        pattern(&mut bytes, at, 0);
        std::fs::write(dir.join(name), [vec![0xAA; at as usize], bytes, vec![0xBB; 5]].concat()).unwrap();
        let file = Arc::new(std::fs::File::open(dir.join(name)).unwrap());
        let request = Request { region, device: Ordinal(0), size: SIZE, stream: ProgramStream(0), capturing: false };
        let addr = engine.allocate(request).unwrap();
        content.write(addr, &(0..SIZE), &Meaning::File(file, at.into())).unwrap();
        engine.attach_file(addr, SIZE, &dir.join(name), at).unwrap();
        assert!(engine.attach_file(addr, SIZE, &dir.join("never"), 0).is_err());
    }
    for _ in 0..2 {
        engine.pause(&Selection::All, PauseOptions::default()).unwrap();
        engine.resume(&Selection::All, ResumeOptions::default()).unwrap();
    }
    std::fs::remove_file(dir.join("goes")).unwrap();
    parse(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn files_stand_for_content_whether_or_not_they_are_still_there() {
    let dir = Folder::new("files");
    let trace = record_files(&dir.0);
    let files = Files::of(&trace).unwrap();
    let told = files.describe().join("\n");
    assert!(told.contains("stays (5244222 bytes): the recorded file itself") && !told.contains("never"), "{told}");
    assert!(told.contains("goes (5243009 bytes): made here, content generated"), "{told}");
    let needs = needs::of(&trace);
    let device = device::software(needs.peak, needs.devices, None).unwrap();
    for check in [true, false] {
        let played = player::play(&trace, &device, &files, check).unwrap();
        assert_eq!((played.trouble(), played.left_out), (None, 2), "two attachments had failed");
        assert_eq!(played.timings["attach_file"].seconds.len(), 2);
        assert_eq!(played.timings["pause"].copied, 0, "all of it is in the files");
        let whole = 2 * 2 * (5 * MIB + 100);
        assert_eq!(played.compared, if check { whole } else { 0 });
        assert_eq!(played.timings["resume"].copied, whole);
    }
    // Where no bytes move, nothing can be proven.
    let profile = Profile::find("h100-pcie5-kvcached").unwrap();
    let device = device::software(64 * MIB, 1, Some(profile)).unwrap();
    let played = player::play(&trace, &device, &files, false).unwrap();
    assert_eq!((played.trouble(), played.left_out), (None, 4));
}

#[test]
fn a_file_of_the_same_name_and_another_length_is_another_file() {
    let dir = Folder::new("length");
    let trace = record_files(&dir.0);
    std::fs::write(dir.0.join("goes"), "something else").unwrap();
    let told = Files::of(&trace).unwrap().describe().join("\n");
    assert!(told.contains("goes (5243009 bytes): made here"), "{told}");
}

/// What other processes see: memory that was exported, that was imported, and that is mapped twice. It stays on the device, the rest goes.
fn record_shared() -> Trace {
    const CHUNK: u64 = 2 * MIB;
    let file = Folder::new("shared");
    let driver = Arc::new(SimDriver::on(Machine::new(Options { memory: 32 * MIB, ..Options::default() }).unwrap()));
    let engine = Engine::new(driver.clone(), config());
    let path = engine.trace(&file.0.join("trace")).unwrap();
    let region = engine.region("cache", Policy { backup: Backup::None, ..Policy::default() }).unwrap();
    let request = Request { region, device: Ordinal(0), size: CHUNK, stream: ProgramStream(0), capturing: false };
    let lent = engine.allocate(request).unwrap();
    let segments = engine.segments();
    let (base, foreign) = (driver.reserve(8 * CHUNK, 0).unwrap(), driver.reserve(8 * CHUNK, 0).unwrap());
    segments.reserved(base, 8 * CHUNK, Some(region));
    segments.reserved(foreign, 8 * CHUNK, None);
    let properties = Properties { shareable: 1, ..Properties::default() };
    let memory = NewMemory { region: Some(region), device: Ordinal(0), size: CHUNK, properties, capturing: false };
    let handles = [0, 1, 2, 3].map(|place| {
        let handle = segments.create(memory).unwrap().unwrap();
        assert_eq!(segments.map(base.offset(place * CHUNK), CHUNK, 0, handle, false).unwrap(), None);
        handle
    });
    segments.grant(base, 4 * CHUNK, &[Access { device: Ordinal(0), rights: Rights::ReadWrite }]).unwrap();
    segments.lend(handles[0], "it was exported").unwrap().1.keep();
    segments.lend_range(base.offset(CHUNK), 1, "it is bound").unwrap().keep();
    segments.lend_range(lent, CHUNK, "it was retained").unwrap().keep();
    // A second mapping of our own memory, and one of memory that another process has made.
    let twice = segments.map(foreign, CHUNK, 0, handles[2], false).unwrap().unwrap();
    driver.map(foreign, CHUNK, twice).unwrap();
    segments.mapped(foreign, CHUNK);
    let imported = driver.create(Ordinal(0), 2 * CHUNK).unwrap();
    driver.map(foreign.offset(CHUNK), 2 * CHUNK, imported).unwrap();
    segments.mapped(foreign.offset(CHUNK), 2 * CHUNK);
    for _ in 0..2 {
        let report = engine.pause(&Selection::All, PauseOptions::default()).unwrap();
        assert_eq!(report.bytes_moved, CHUNK, "all the others stay");
        assert!(segments.lend(handles[3], "it was exported").is_err());
        engine.resume(&Selection::All, ResumeOptions::default()).unwrap();
    }
    for (addr, size) in segments.unmap(foreign, 3 * CHUNK).unwrap() {
        assert_eq!((addr, size), (foreign, 3 * CHUNK));
    }
    driver.unmap(foreign, CHUNK).unwrap();
    driver.unmap(foreign.offset(CHUNK), 2 * CHUNK).unwrap();
    segments.unmap(base, 4 * CHUNK).unwrap();
    handles.into_iter().for_each(|handle| segments.release(handle).unwrap());
    parse(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn what_was_handed_out_or_came_from_elsewhere_stays_on_the_device_in_a_replay_too() {
    let trace = record_shared();
    let needs = needs::of(&trace);
    // Four chunks, one of them mapped twice, the allocation, and two chunks from elsewhere.
    assert_eq!(needs.virtual_bytes, (4 + 1 + 2) * 2 * MIB);
    let device = device::software(needs.peak, needs.devices, None).unwrap();
    for _ in 0..2 {
        let played = player::play(&trace, &device, &Files::default(), true).unwrap();
        assert_eq!(
            (played.trouble(), played.left_out),
            (None, 2),
            "two exports were refused while the memory was away"
        );
        let count = |name: &str| played.timings[name].seconds.len();
        assert_eq!((count("lend"), count("map"), count("unmap")), (3, 4 + 1 + 2, 2));
        assert_eq!(played.timings["pause"].moved, 2 * 2 * MIB, "the one chunk that nobody else has, twice");
        assert_eq!(
            played.compared,
            2 * 2 * MIB,
            "the exported chunk has its bytes, though its region throws them away"
        );
    }
}

/// A directory that goes with the test.
struct Folder(std::path::PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let dir = std::env::temp_dir().join(format!(
            "sire-replay-test-{name}-{}-{:?}",
            std::process::id(),
            std::thread::current().id()
        ));
        std::fs::create_dir_all(&dir).unwrap();
        Folder(dir)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn one_wrong_byte_is_found_where_it_is() {
    let device = device::software(16 * MIB, 1, None).unwrap();
    let engine = Engine::new(device.driver.clone(), config());
    let region = engine.region("r", Policy::default()).unwrap();
    let size = 5 * MIB + 24;
    let request = Request { region, device: Ordinal(0), size, stream: ProgramStream(0), capturing: false };
    let addr = engine.allocate(request).unwrap();
    let mut content = Content::new(&device.driver, Ordinal(0)).unwrap();
    content.write(addr, &(0..size), &Meaning::Key(77)).unwrap();
    assert_eq!(content.wrong(addr, &(0..size), &Meaning::Key(77)).unwrap(), None);
    assert_eq!(content.wrong(addr, &(4096..size), &Meaning::Key(78)).unwrap(), Some(4096));
    // A word in the second piece that belongs to another allocation.
    content.write(addr, &(5 * MIB..5 * MIB + 8), &Meaning::Key(78)).unwrap();
    assert_eq!(content.wrong(addr, &(0..size), &Meaning::Key(77)).unwrap(), Some(5 * MIB));
}

#[test]
fn too_small_a_device_fails_calls_and_says_so() {
    let device = device::software(4 * MIB, 1, None).unwrap();
    let played = player::play(&record(), &device, &Files::default(), true).unwrap();
    assert!(played.trouble().unwrap().contains("failed"));
}

#[test]
fn the_model_clock_gives_simulated_figures() {
    let trace = record();
    let profile = Profile::find("h100-pcie5-kvcached").unwrap();
    let device = device::software(64 * MIB, 1, Some(profile)).unwrap();
    let played = player::play(&trace, &device, &Files::default(), false).unwrap();
    assert_eq!(played.trouble(), None);
    let again = player::play(&trace, &device, &Files::default(), false).unwrap();
    assert_eq!(played.timings["resume"].seconds.len(), again.timings["resume"].seconds.len());
    let list = super::figures::list(&played, &device);
    let pause = list.iter().find(|figure| figure["name"] == "replay.pause").unwrap();
    assert_eq!(pause["simulated"], true);
    assert!(pause["value"].as_f64().unwrap() > 0.0 && pause["device"].as_str().unwrap().contains("not a GPU"));
}

/// Anything that parses is played without a panic, whatever it asks for.
#[test]
fn nonsense_is_played_without_harm() {
    let (zero, huge) = (0u64, u64::MAX);
    let transition = |verb, tags: &[&str]| {
        let tags = tags.iter().map(|tag| (*tag).to_owned()).collect();
        let none = std::time::Duration::ZERO;
        Event::Transition(Transition { verb, tags, wait: none, took: none, status: 0, moved: huge, copied: huge })
    };
    let attach = |addr, len, at, size| {
        Event::Attach(Attachment { addr, len, at, size, status: 0, name: "/dev/null".to_owned() })
    };
    let create = |handle, size| {
        let (region, device, shareable, rdma, status) = (Some(8), 1, u32::MAX, true, 0);
        Event::Segment(SegmentCall::Create { handle, region, device, size, shareable, rdma, status })
    };
    let events = [
        Event::Leave { region: 9 },
        Event::Allocate { region: 9, device: u32::MAX, size: huge, stream: huge, addr: 5, status: 0 },
        Event::Region { region: 9, tag: "//".into(), policy: Policy::default() },
        Event::Region { region: 8, tag: "x".into(), policy: Policy::default() },
        Event::Allocate { region: 8, device: u32::MAX, size: huge, stream: huge, addr: 5, status: 0 },
        Event::Allocate { region: 8, device: 0, size: zero, stream: 0, addr: 0, status: 0 },
        Event::Allocate { region: 8, device: 3, size: 100, stream: 0, addr: 7, status: 0 },
        Event::Allocate { region: 8, device: 3, size: 100, stream: 0, addr: 7, status: 0 },
        Event::Override { addr: huge, len: huge, keep: true, status: 0 },
        Event::Override { addr: 8, len: huge, keep: true, status: 0 },
        Event::Peer { device: 0, peer: huge as u32, status: 0 },
        Event::Segment(SegmentCall::Reserve { addr: huge, size: huge, region: Some(9) }),
        Event::Segment(SegmentCall::Reserve { addr: 64 * MIB, size: 4 * MIB, region: Some(8) }),
        Event::Segment(SegmentCall::Reserve { addr: 65 * MIB, size: 2 * MIB, region: None }),
        create(1, huge),
        create(2, 2 * MIB),
        create(2, 2 * MIB),
        Event::Segment(SegmentCall::Map { handle: 2, addr: huge, size: huge, offset: huge, status: 0 }),
        Event::Segment(SegmentCall::Map { handle: 2, addr: 64 * MIB, size: 2 * MIB, offset: 0, status: 0 }),
        Event::Segment(SegmentCall::Map { handle: 7, addr: 64 * MIB, size: 2 * MIB, offset: 0, status: 0 }),
        Event::Segment(SegmentCall::Retain { addr: 3 }),
        Event::Segment(SegmentCall::Mapped { addr: 66 * MIB, size: 2 * MIB }),
        Event::Segment(SegmentCall::Mapped { addr: 66 * MIB, size: huge }),
        Event::Segment(SegmentCall::Mapped { addr: huge, size: huge }),
        Event::Segment(SegmentCall::Lend { handle: 2, status: 0 }),
        Event::Segment(SegmentCall::Lend { handle: huge, status: 0 }),
        Event::Segment(SegmentCall::LendRange { addr: huge, size: huge, status: 0 }),
        Event::Segment(SegmentCall::LendRange { addr: 64 * MIB, size: huge, status: 0 }),
        attach(7, 100, 0, 100),
        attach(7, huge, huge, huge),
        attach(7, 99, 1, huge),
        attach(64 * MIB, 3 * MIB, 5, 4 * MIB),
        attach(huge, huge, 0, huge),
        Event::Segment(SegmentCall::Grant {
            addr: 64 * MIB,
            size: 2 * MIB,
            access: vec![(0, true), (huge as u32, false)],
            status: 0,
        }),
        Event::Free { addr: 64 * MIB },
        Event::Segment(SegmentCall::Unmap { addr: 64 * MIB + 1, size: 7 }),
        Event::Segment(SegmentCall::Unmap { addr: 1, size: huge }),
        Event::Segment(SegmentCall::Release { handle: 2 }),
        Event::Segment(SegmentCall::Release { handle: 2 }),
        Event::Segment(SegmentCall::Unreserve { addr: 64 * MIB, size: 4 * MIB }),
        Event::Segment(SegmentCall::Unreserve { addr: 64 * MIB, size: 4 * MIB }),
        transition(Verb::Pause, &[]),
        transition(Verb::Switch, &["x"]),
        transition(Verb::Resume, &["y", "z"]),
        transition(Verb::Pause, &[""]),
        Event::Free { addr: 7 },
        Event::Free { addr: 7 },
        Event::Unknown(200),
        Event::Trim,
    ];
    let record = |event| Record { time: std::time::Duration::MAX, thread: 0, event };
    let header = sire_core::trace::Header::default();
    let trace = Trace { header, records: events.into_iter().map(record).collect(), ending: None };
    let needs = needs::of(&trace);
    let device = device::software(16 * MIB, needs.devices.min(2), None).unwrap();
    assert!(player::play(&trace, &device, &Files::default(), true).unwrap().failed > 0);
    // With files, too: no file system has one that is as long as this asks for.
    let few =
        Trace { records: trace.records.iter().filter(|record| !asks_for_much(record)).cloned().collect(), ..trace };
    assert!(player::play(&few, &device, &Files::of(&few).unwrap(), true).unwrap().failed > 0);
    let much = Trace { records: vec![record(attach(7, 99, 1, huge))], ..few };
    assert!(Files::of(&much).unwrap_err().to_string().contains("cannot make a file of 18446744073709551615 bytes"));
}

fn asks_for_much(record: &Record) -> bool {
    matches!(&record.event, Event::Attach(attached) if attached.size == u64::MAX)
}
