//! Random lives against the oracle: any sequence of allocate, write, free, keep, discard, pre-copy, pause, resume, trim, backup, new
//! peers, over tags, devices, streams, policies and sizes, with a device that is often full and calls that fail.

use crate::common::GRANULARITY;
use crate::common::world::{CHUNK, World, flip, tag};
use proptest::prelude::*;
use sire_core::driver::{Addr, Device, DriverErrorKind, ProgramStream};
use sire_core::engine::*;
use sire_core::error::Status;
use std::fs::OpenOptions;
use std::path::PathBuf;

#[derive(Clone, Debug)]
enum Step {
    Allocate {
        region: usize,
        device: u32,
        stream: u64,
        size: u64,
        capturing: bool,
    },
    Write(usize),
    /// The same bytes for every allocation: pages of one word, and pages that allocations have in common.
    WriteAlike(usize, bool),
    WritePart {
        which: usize,
        from: u64,
        len: u64,
    },
    Free {
        which: usize,
        capturing: bool,
    },
    Override {
        which: usize,
        from: u64,
        len: u64,
        keep: bool,
    },
    KeepResident(usize),
    Pause(usize),
    /// The program holds part of an allocation free.
    PauseWithout {
        selection: usize,
        which: usize,
        from: u64,
        len: u64,
    },
    Resume(usize),
    Switch {
        pause: usize,
        resume: usize,
    },
    ResumeBehind(usize),
    /// The n-th call from now fails.
    Fault {
        after: u64,
        short: bool,
    },
    Capacity(u64),
    Trim,
    Backup(usize),
    Peer(u32, bool),
    /// A file is said to hold a part of an allocation, rightly or not.
    Attach {
        which: usize,
        from: u64,
        len: u64,
        stale: bool,
    },
    /// Somebody writes to a file while nothing depends on it.
    Harm(usize),
    /// What is done in the background.
    Tend,
    Promote(usize),
    PreCopy(usize),
    PauseLazily(usize),
    HostLimit(Option<u64>),
    Enter(usize),
    /// Whether the driver can hash.
    Hashing(bool),
}

const TAGS: [&str; 15] =
    ["a", "a/b", "a/b/c", "d", "e", "a/f", "g", "a/h", "d/i", "g/j", "a/k", "d/l", "e/m", "g/n", "d/o"];
const SELECTIONS: [Option<&str>; 6] = [None, Some("a"), Some("a/b"), Some("d"), Some("e"), Some("g")];

fn policy(index: usize) -> Policy {
    use Backup::{Auto, Disk, File, Host, None};
    let backup = [Host, None, Disk, Auto, None, Host, Disk, Host, Disk, Host, File, File, Auto, Auto, Auto][index];
    let clean = match index {
        0..5 | 10 | 12 => Clean::No,
        5 | 6 | 11 | 13 => Clean::Declared,
        7 | 8 | 14 => Clean::Verified,
        _ => Clean::Paranoid,
    };
    Policy {
        backup,
        zero_fill: index.is_multiple_of(2),
        retain: index >= 2 && index != 12,
        clean,
        pageable: index == 5,
        whole: index == 3 || index == 7,
    }
}

fn size() -> impl Strategy<Value = u64> {
    prop_oneof![1_u64..3000, Just(4096), CHUNK - 3..CHUNK + 3, 1..3 * CHUNK]
}

fn step() -> impl Strategy<Value = Step> {
    let place = (0..TAGS.len(), 0..2_u32, 0..2_u64, size(), prop::bool::weighted(0.1));
    let fault = (1..40_u64, any::<bool>());
    prop_oneof![
        6 => place.prop_map(|(region, device, stream, size, capturing)| Step::Allocate { region, device, stream, size, capturing }),
        4 => any::<usize>().prop_map(Step::Write),
        2 => any::<(usize, bool)>().prop_map(|(which, constant)| Step::WriteAlike(which, constant)),
        1 => any::<bool>().prop_map(Step::Hashing),
        3 => (any::<usize>(), 0..3 * CHUNK, 1..CHUNK).prop_map(|(which, from, len)| Step::WritePart { which, from, len }),
        3 => (any::<usize>(), prop::bool::weighted(0.2)).prop_map(|(which, capturing)| Step::Free { which, capturing }),
        1 => (any::<usize>(), 0..3 * CHUNK, 1..CHUNK, any::<bool>())
            .prop_map(|(which, from, len, keep)| Step::Override { which, from, len, keep }),
        3 => (any::<usize>(), 0..3 * CHUNK, 1..3 * CHUNK, prop::bool::weighted(0.2))
            .prop_map(|(which, from, len, stale)| Step::Attach { which, from, len, stale }),
        1 => any::<usize>().prop_map(Step::Harm),
        1 => any::<usize>().prop_map(Step::KeepResident),
        4 => (0..SELECTIONS.len()).prop_map(Step::Pause),
        1 => (0..SELECTIONS.len(), any::<usize>(), 0..3 * CHUNK, 1..2 * CHUNK)
            .prop_map(|(selection, which, from, len)| Step::PauseWithout { selection, which, from, len }),
        4 => (0..SELECTIONS.len()).prop_map(Step::Resume),
        4 => (1..SELECTIONS.len(), 1..SELECTIONS.len()).prop_map(|(pause, resume)| Step::Switch { pause, resume }),
        1 => (0..SELECTIONS.len()).prop_map(Step::ResumeBehind),
        2 => fault.prop_map(|(after, short)| Step::Fault { after, short }),
        1 => (2..12_u64).prop_map(|chunks| Step::Capacity(chunks * CHUNK)),
        1 => Just(Step::Trim),
        1 => any::<usize>().prop_map(Step::Backup),
        1 => (0..2_u32, any::<bool>()).prop_map(|(device, may)| Step::Peer(device, may)),
        2 => Just(Step::Tend),
        1 => (0..SELECTIONS.len()).prop_map(Step::Promote),
        2 => (0..TAGS.len()).prop_map(Step::PreCopy),
        3 => (0..SELECTIONS.len()).prop_map(Step::PauseLazily),
        1 => prop::option::of(0..8_u64).prop_map(|chunks| Step::HostLimit(chunks.map(|chunks| chunks * CHUNK))),
        1 => (0..TAGS.len()).prop_map(Step::Enter),
    ]
}

fn has_files(backup: Backup) -> bool {
    matches!(backup, Backup::File | Backup::Auto)
}

fn selection(index: usize) -> Selection {
    SELECTIONS[index].map_or(Selection::All, tag)
}

struct Life {
    world: World,
    regions: Vec<RegionId>,
    attached: Vec<PathBuf>,
}

impl Life {
    /// With `shares`, clean host backups are in shared memory; with `dummies`, what is thrown away has one behind it.
    fn new(shares: bool, dummies: bool) -> Life {
        let mut world = World::with(8 * CHUNK, 2 * GRANULARITY);
        world.engine.configure(&|config| {
            config.disk_compress = Compress::Always;
            config.shared_backups = shares;
            config.dummies = dummies;
            config.shared_dir = config.disk_dir.clone();
        });
        let regions = TAGS.iter().enumerate().map(|(i, tag)| world.region(tag, policy(i))).collect();
        Life { world, regions, attached: Vec::new() }
    }

    fn pick(&self, which: usize) -> Option<Addr> {
        let count = self.world.twins.len();
        (count > 0).then(|| *self.world.twins.keys().nth(which % count).unwrap())
    }

    fn is_there(&self, addr: Addr) -> bool {
        let twin = &self.world.twins[&addr];
        twin.resident || !self.is_paused(twin.region)
    }

    fn is_paused(&self, region: RegionId) -> bool {
        self.world.engine.state(region) == Ok(State::Paused)
    }

    /// One that is there.
    fn pick_present(&self, which: usize) -> Option<Addr> {
        self.pick(which).filter(|addr| self.is_there(*addr))
    }

    /// A part of an allocation: where it begins, and how long it is.
    fn part_of(&self, addr: Addr, from: u64, len: u64) -> (u64, u64) {
        let size = self.world.twins[&addr].bytes.len() as u64;
        (from % size, len.min(size - from % size))
    }

    fn take(&mut self, step: Step) {
        let world = &mut self.world;
        match step {
            Step::Allocate { region, device, stream, size, capturing } => {
                let (region, stream) = (self.regions[region], ProgramStream(stream));
                self.allocate(Request { region, device: Device(device), size, stream, capturing });
            }
            Step::Write(which) => self.write(which),
            Step::WriteAlike(which, constant) => self.write_alike(which, constant),
            Step::WritePart { which, from, len } => self.write_part(which, from, len),
            Step::Free { which, capturing } => self.free(which, capturing),
            Step::Attach { which, from, len, stale } => self.attach(which, from, len, stale),
            Step::Harm(which) => self.harm(which),
            Step::Override { which, from, len, keep } => self.set_override(which, from, len, keep),
            Step::KeepResident(which) => self.keep_resident(which),
            Step::Backup(which) => self.read_backup(which),
            Step::PauseWithout { selection: index, which, from, len } => self.pause_without(index, which, from, len),
            Step::Enter(index) => self.enter(self.regions[index]),
            Step::Pause(index) => drop(world.pause(&selection(index))),
            Step::PauseLazily(index) => drop(world.pause_lazily(&selection(index))),
            Step::Resume(index) => drop(world.resume(&selection(index))),
            Step::ResumeBehind(index) => drop(world.resume_behind(&selection(index))),
            Step::Switch { pause, resume } => drop(world.switch(&selection(pause), &selection(resume))),
            Step::PreCopy(index) => drop(world.engine.pre_copy(&tag(TAGS[index]), false)),
            Step::Promote(index) => drop(world.engine.promote(&selection(index))),
            Step::Tend => drop(world.engine.tend()),
            Step::Trim => drop(world.engine.trim()),
            Step::HostLimit(limit) => world.engine.configure(&|config| config.host_limit = limit),
            Step::Peer(device, true) => drop(world.engine.allow_peer(Device(device), Device(1 - device))),
            Step::Peer(device, false) => drop(world.engine.refuse_peer(Device(device), Device(1 - device))),
            Step::Hashing(hashing) => world.driver.set_hashing(hashing),
            Step::Capacity(bytes) => world.driver.set_capacity(bytes),
            Step::Fault { after, short } => {
                let kind = if short { DriverErrorKind::OutOfMemory } else { DriverErrorKind::Other };
                world.driver.fail_at(world.driver.calls() + after, kind);
            }
        }
    }

    fn allocate(&mut self, request: Request) {
        let region = request.region;
        match self.world.allocate_as(request) {
            Ok(_) => assert!(!self.is_paused(region)),
            Err(e) => assert_eq!(e.status == Status::Paused, self.is_paused(region), "{e}"),
        }
    }

    fn write(&mut self, which: usize) {
        if let Some(addr) = self.pick_present(which) {
            self.world.write(addr);
        }
    }

    fn write_alike(&mut self, which: usize, constant: bool) {
        if let Some(addr) = self.pick_present(which) {
            let common: Vec<u8> = (0..6007_u32).map(|i| (i / 23) as u8).collect();
            self.world.write_repeated(addr, if constant { b"\x00\x3c" } else { &common });
        }
    }

    fn write_part(&mut self, which: usize, from: u64, len: u64) {
        if let Some(addr) = self.pick_present(which) {
            let (from, len) = self.part_of(addr, from, len);
            self.world.write_part(addr, from, len);
        }
    }

    fn free(&mut self, which: usize, capturing: bool) {
        if let Some(addr) = self.pick(which)
            && self.world.engine.free(addr, capturing).is_ok()
        {
            self.world.twins.remove(&addr);
            assert_eq!(self.world.engine.free(addr, true).unwrap_err().status, Status::UnknownAddress);
        }
    }

    fn pause_without(&mut self, index: usize, which: usize, from: u64, len: u64) {
        let Some(addr) = self.pick(which) else { return };
        let (from, len) = self.part_of(addr, from, len);
        drop(self.world.pause_without(&selection(index), &[(addr.offset(from), len)]));
    }

    fn enter(&mut self, region: RegionId) {
        if self.world.engine.enter(region, OnPaused::Resume).is_ok() {
            assert!(!self.is_paused(region));
            assert_eq!(self.world.pause(&Selection::All).unwrap_err().status, Status::Busy);
            self.world.engine.leave(region);
        }
    }

    /// Only while resident: an override of paused bytes changes the next pause, not this one's backup.
    fn set_override(&mut self, which: usize, from: u64, len: u64, keep: bool) {
        let Some(addr) = self.pick(which) else { return };
        let (from, len) = self.part_of(addr, from, len);
        self.world.set_override(addr, from, len, keep);
        let twin = &self.world.twins[&addr];
        if !keep && self.is_paused(twin.region) {
            // A resume that fails may leave chunks on the device, and the next pause of them throws these bytes away.
            let range = from as usize..(from + len) as usize;
            let twin = self.world.twins.get_mut(&addr).unwrap();
            twin.promised.set(twin.bytes.len(), range, false);
        }
    }

    /// The file is as the memory is now, also if that is written to afterwards.
    fn attach(&mut self, which: usize, from: u64, len: u64, stale: bool) {
        let Some(addr) = self.pick(which) else { return };
        let twin = &self.world.twins[&addr];
        let (size, backup) = (twin.bytes.len() as u64, self.world.policies[&twin.region].backup);
        let from = from % size;
        match self.world.attach(addr, from, len.min(size - from), stale) {
            Ok(path) => self.attached.push(path),
            Err(e) => assert_eq!((e.status, has_files(backup)), (Status::InvalidArgument, false), "{e}"),
        }
    }

    /// While regions with files are resident, what happens to files is of no consequence.
    fn harm(&mut self, which: usize) {
        let in_files = |region: &&RegionId| has_files(self.world.policies[*region].backup);
        let depends = self.regions.iter().filter(in_files).any(|region| self.is_paused(*region));
        if let Some(path) = self.attached.get(which % self.attached.len().max(1)).filter(|_| !depends) {
            let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
            let len = file.metadata().unwrap().len();
            if which.is_multiple_of(3) {
                file.set_len(len / 2).unwrap()
            } else if len > 0 {
                flip(&file, len - 1)
            }
        }
    }

    fn keep_resident(&mut self, which: usize) {
        let suits = |addr: &Addr| {
            let twin = &self.world.twins[addr];
            let policy = self.world.policies[&twin.region];
            // What stays with it, in its slab, is neither thrown away nor zero afterwards.
            !World::is_small(twin) || policy.backup != Backup::None && !policy.zero_fill
        };
        let Some(addr) = self.pick(which).filter(suits) else { return };
        let twin = &self.world.twins[&addr];
        let (known, paused) = (twin.resident, self.is_paused(twin.region));
        let outcome = self.world.keep_resident(addr);
        assert_eq!(outcome.err().map(|e| e.status), (paused && !known).then_some(Status::Paused));
    }

    /// A backup that can be read holds the promised bytes.
    fn read_backup(&self, which: usize) {
        let Some(addr) = self.pick(which) else { return };
        let twin = &self.world.twins[&addr];
        if self.is_there(addr) {
            return;
        }
        let view = match self.world.engine.backup(addr, twin.bytes.len() as u64) {
            // Pages that have no room of their own have to be put together, for which the limit may leave none.
            Err(e) if e.status == Status::OutOfBackupSpace => return,
            found => found.unwrap(),
        };
        if let Some(view) = view {
            // SAFETY: the view keeps `len` bytes at `ptr` valid.
            let bytes = unsafe { std::slice::from_raw_parts(view.ptr, view.len as usize) };
            twin.assert_equal(addr, bytes);
        }
    }

    /// With faults gone and memory there, everything comes back.
    fn end(mut self) {
        self.world.driver.clear_faults();
        self.world.driver.set_capacity(1 << 30);
        self.world.resume(&Selection::All).unwrap();
        self.world.check();
        self.world.check_no_leak();
    }
}

fn cases() -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(250)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_life_equals_the_oracle(shares in prop::bool::weighted(0.3), dummies in prop::bool::weighted(0.3), steps in prop::collection::vec(step(), 1..60)) {
        let mut life = Life::new(shares, dummies);
        for step in steps {
            life.take(step);
            life.world.check();
        }
        life.end();
    }
}
