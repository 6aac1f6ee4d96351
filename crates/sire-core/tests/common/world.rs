//! An engine on the test driver, with its naive twin: a map from address to bytes, for which a pause does nothing.
//! The twin knows what each byte must be, or that nobody promised anything about it.

use super::{GRANULARITY, MemDriver};
use sire_core::driver::{Addr, Device, ProgramStream};
use sire_core::engine::*;
use sire_core::error::{Error, Status};
use sire_core::progress::Progress;
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

/// Physical chunks of the tests: four granules.
pub const CHUNK: u64 = 4 * GRANULARITY;

/// Smaller allocations share slabs.
const SMALL: u64 = 4096;

/// A stream of the program's.
pub const PROGRAM: (Device, ProgramStream) = (Device(0), ProgramStream(77));

/// A set of an allocation's bytes. All or none is by far the most frequent, and fast.
#[derive(Clone, Debug)]
pub enum Which {
    All,
    None,
    Some(Vec<bool>),
}

impl Which {
    fn of(all: bool) -> Which {
        if all { Which::All } else { Which::None }
    }

    fn has(&self, at: usize) -> bool {
        match self {
            Which::All => true,
            Which::None => false,
            Which::Some(flags) => flags[at],
        }
    }

    pub fn set(&mut self, len: usize, range: std::ops::Range<usize>, value: bool) {
        let mut flags: Vec<bool> = (0..len).map(|i| self.has(i)).collect();
        flags[range].fill(value);
        *self = Which::Some(flags);
    }

    fn and(&self, other: &Which) -> Which {
        match (self, other) {
            (Which::None, _) | (_, Which::None) => Which::None,
            (Which::All, which) | (which, Which::All) => which.clone(),
            (Which::Some(a), Which::Some(b)) => Which::Some(a.iter().zip(b).map(|(a, b)| *a && *b).collect()),
        }
    }
}

/// The twin's idea of one allocation.
#[derive(Clone, Debug)]
pub struct Twin {
    pub device: Device,
    pub region: RegionId,
    pub bytes: Vec<u8>,
    /// Bytes that must be what `bytes` says; about the others nothing is promised.
    pub promised: Which,
    /// Bytes that a pause keeps.
    pub kept: Which,
    /// No pause takes it.
    pub resident: bool,
}

impl Twin {
    /// A pause has thrown away what is not kept; with `zero`, those bytes are zero afterwards.
    fn forget(&mut self, zero: bool) {
        if self.resident {
            return;
        }
        if !zero {
            self.promised = self.promised.and(&self.kept);
        } else if matches!(self.kept, Which::None) {
            self.bytes.fill(0);
            self.promised = Which::All;
        } else {
            let len = self.bytes.len();
            self.promised = Which::Some((0..len).map(|i| self.promised.has(i) || !self.kept.has(i)).collect());
            let lost = self.bytes.iter_mut().enumerate().filter(|(i, _)| !self.kept.has(*i));
            lost.for_each(|(_, byte)| *byte = 0);
        }
    }

    pub fn assert_equal(&self, addr: Addr, found: &[u8]) {
        match &self.promised {
            Which::All if found == self.bytes => return,
            Which::None => return,
            _ => {}
        }
        for (i, (found, wanted)) in found.iter().zip(&self.bytes).enumerate() {
            let fine = found == wanted || !self.promised.has(i);
            assert!(fine, "byte {i} of {} at {addr:?} is {found} instead of {wanted}", self.bytes.len());
        }
    }
}

pub struct World {
    pub driver: Arc<MemDriver>,
    pub engine: Engine,
    pub twins: BTreeMap<Addr, Twin>,
    pub policies: BTreeMap<RegionId, Policy>,
    /// Allocations come from the engine's cache.
    pub cached: bool,
    /// Makes every write different.
    seed: u8,
    /// How many files were attached.
    attached: usize,
    dir: tempfile::TempDir,
}

/// The files open in this process whose names (without "(deleted)" and the like, so to begin with) are wanted, each once.
pub fn open_files(wanted: impl Fn(&Path) -> bool) -> Vec<File> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir("/proc/self/fd").unwrap().flatten() {
        let target = std::fs::read_link(entry.path()).unwrap_or_default();
        // Another thread may have closed it meanwhile.
        let file = wanted(&target).then(|| OpenOptions::new().read(true).write(true).open(entry.path()).ok()).flatten();
        if let Some(file) = file {
            found.insert(file.metadata().unwrap().ino(), file);
        }
    }
    found.into_values().collect()
}

/// Changes one bit of a file; twice, and it is as before.
pub fn flip(file: &File, at: u64) {
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

/// Memory that the program holds free.
#[derive(Debug)]
pub struct Dead(pub Vec<(Addr, u64)>);

impl DeadRanges for Dead {
    fn dead_ranges(&self, _: &[RegionId]) -> Result<Vec<(Addr, u64)>, Error> {
        Ok(self.0.clone())
    }
}

pub fn policy(backup: Backup) -> Policy {
    Policy { backup, ..Policy::default() }
}

pub fn tag(tag: &str) -> Selection {
    Selection::Tag(tag.to_owned())
}

impl World {
    pub fn new(capacity: u64) -> World {
        World::with(capacity, GRANULARITY)
    }

    /// A world in which pieces of `copy_piece` bytes are copied.
    pub fn with(capacity: u64, copy_piece: u64) -> World {
        World::configured(capacity, |config| config.copy_piece = copy_piece)
    }

    /// A world with settings of its own.
    pub fn configured(capacity: u64, change: impl FnOnce(&mut Config)) -> World {
        let driver = Arc::new(MemDriver::new(capacity));
        // Memory where there is some: what a disk does is asked elsewhere, and thousands of lives would wait for it.
        let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        let mut config = Config {
            chunk: CHUNK,
            // Tests decide when.
            tends: false,
            small: SMALL,
            copy_piece: GRANULARITY,
            host_unit: CHUNK,
            // In one thread every life is the same each time; under the model checker several meet.
            host_threads: if cfg!(feature = "shuttle") { 2 } else { 0 },
            disk_dir: Some(dir.path().to_path_buf()),
            ..Config::default()
        };
        change(&mut config);
        let engine = Engine::new(driver.clone(), config);
        World {
            driver,
            engine,
            twins: BTreeMap::new(),
            policies: BTreeMap::new(),
            cached: false,
            seed: 0,
            attached: 0,
            dir,
        }
    }

    /// Whether the allocation shares a slab.
    pub fn is_small(twin: &Twin) -> bool {
        (twin.bytes.len() as u64) < SMALL
    }

    pub fn region(&mut self, tag: &str, policy: Policy) -> RegionId {
        let region = self.engine.region(tag, policy).unwrap();
        self.policies.insert(region, policy);
        region
    }

    pub fn request(region: RegionId, size: u64) -> Request {
        Request { region, device: Device(0), size, stream: ProgramStream(0), capturing: false }
    }

    pub fn allocate(&mut self, region: RegionId, size: u64) -> Result<Addr, Error> {
        self.allocate_as(World::request(region, size))
    }

    pub fn allocate_as(&mut self, request: Request) -> Result<Addr, Error> {
        let addr = match self.cached {
            true => self.engine.allocate_cached(request, PoolNumber::NONE)?,
            false => self.engine.allocate(request)?,
        };
        let size = request.size as usize;
        let overlap = self.twins.range(..Addr(addr.0 + request.size)).next_back();
        assert!(overlap.is_none_or(|(a, t)| a.0 + t.bytes.len() as u64 <= addr.0), "{addr:?} is handed out twice");
        let kept = Which::of(self.policies[&request.region].backup != Backup::None);
        let (device, region) = (request.device, request.region);
        let twin = Twin { device, region, bytes: vec![0; size], promised: Which::None, kept, resident: false };
        self.twins.insert(addr, twin);
        Ok(addr)
    }

    /// The program writes the whole allocation.
    pub fn write(&mut self, addr: Addr) {
        self.seed = self.seed.wrapping_add(1);
        let twin = self.twins.get_mut(&addr).unwrap();
        let size = twin.bytes.len() as u64;
        for (i, part) in twin.bytes.chunks_mut(61).enumerate() {
            part.fill((i as u8).wrapping_mul(31) ^ self.seed);
        }
        self.driver.poke(twin.device, addr, &twin.bytes).unwrap();
        twin.promised = Which::All;
        self.tell(addr, 0, size);
    }

    /// The program writes `len` bytes of the allocation.
    pub fn write_part(&mut self, addr: Addr, from: u64, len: u64) {
        self.seed = self.seed.wrapping_add(1);
        let twin = self.twins.get_mut(&addr).unwrap();
        let range = from as usize..(from + len) as usize;
        twin.bytes[range.clone()].fill(self.seed.wrapping_mul(7));
        self.driver.poke(twin.device, addr.offset(from), &twin.bytes[range.clone()]).unwrap();
        twin.promised.set(twin.bytes.len(), range, true);
        self.tell(addr, from, len);
    }

    /// The program writes these bytes, again and again, over the whole allocation.
    pub fn write_repeated(&mut self, addr: Addr, bytes: &[u8]) {
        let twin = self.twins.get_mut(&addr).unwrap();
        let size = twin.bytes.len();
        twin.bytes.iter_mut().zip(bytes.iter().cycle()).for_each(|(to, from)| *to = *from);
        self.driver.poke(twin.device, addr, &twin.bytes).unwrap();
        twin.promised = Which::All;
        self.tell(addr, 0, size as u64);
    }

    /// The program writes one word again and again into a part of the allocation.
    pub fn write_constant(&mut self, addr: Addr, from: u64, len: u64, word: [u8; 8]) {
        let twin = self.twins.get_mut(&addr).unwrap();
        let range = from as usize..(from + len) as usize;
        twin.bytes[range.clone()].chunks_mut(8).for_each(|part| part.copy_from_slice(&word[..part.len()]));
        self.driver.poke(twin.device, addr.offset(from), &twin.bytes[range]).unwrap();
        self.tell(addr, from, len);
    }

    /// The program writes these bytes.
    pub fn write_bytes(&mut self, addr: Addr, from: u64, bytes: &[u8]) {
        let twin = self.twins.get_mut(&addr).unwrap();
        let range = from as usize..from as usize + bytes.len();
        self.driver.poke(twin.device, addr.offset(from), bytes).unwrap();
        twin.bytes[range.clone()].copy_from_slice(bytes);
        twin.promised.set(twin.bytes.len(), range, true);
        self.tell(addr, from, bytes.len() as u64);
    }

    /// Where the content was declared not to change, a write is told.
    fn tell(&self, addr: Addr, from: u64, len: u64) {
        if self.policies[&self.twins[&addr].region].clean == Clean::Declared {
            self.engine.changed(addr.offset(from), len).unwrap();
        }
    }

    pub fn free(&mut self, addr: Addr) -> Result<(), Error> {
        self.engine.free(addr, false)?;
        self.twins.remove(&addr);
        Ok(())
    }

    /// The program resets a device.
    pub fn reset(&mut self, device: Device) {
        self.engine.reset(device, || self.driver.reset(device));
        self.twins.retain(|_, twin| twin.device != device);
    }

    pub fn set_override(&mut self, addr: Addr, from: u64, len: u64, keep: bool) {
        let at = addr.offset(from);
        if keep { self.engine.keep(at, len) } else { self.engine.discard(at, len) }.unwrap();
        let twin = self.twins.get_mut(&addr).unwrap();
        twin.kept.set(twin.bytes.len(), from as usize..(from + len) as usize, keep);
    }

    /// Nothing takes the allocation from now on.
    pub fn keep_resident(&mut self, addr: Addr) -> Result<(), Error> {
        let size = self.engine.keep_resident(addr)?;
        let twin = self.twins.get_mut(&addr).unwrap();
        assert_eq!(size, twin.bytes.len() as u64);
        twin.resident = true;
        Ok(())
    }

    /// A pause that may have happened: bytes that nobody keeps are not promised any more.
    fn forget(&mut self, states_before: &BTreeMap<RegionId, State>) {
        for twin in self.twins.values_mut().filter(|t| states_before[&t.region] == State::Resident) {
            twin.forget(self.policies[&twin.region].zero_fill);
        }
    }

    pub fn states(&self) -> BTreeMap<RegionId, State> {
        self.policies.keys().map(|&id| (id, self.engine.state(id).unwrap())).collect()
    }

    pub fn pause(&mut self, selection: &Selection) -> Result<Report, Error> {
        self.pause_with(selection, PauseOptions::default())
    }

    /// A pause in which the program says that these bytes hold nothing.
    pub fn pause_without(&mut self, selection: &Selection, dead: &[(Addr, u64)]) -> Result<Report, Error> {
        let map = Dead(dead.to_vec());
        let resident = self.states();
        let outcome = self.pause_with(selection, PauseOptions { dead: Some(&map), ..PauseOptions::default() });
        for &(start, bytes) in dead {
            let end = start.0 + bytes;
            let touched = self.twins.iter_mut().filter(|(addr, twin)| {
                !twin.resident
                    && addr.0 < end
                    && start.0 < addr.0 + twin.bytes.len() as u64
                    // Of what is paused, a slab may have stayed.
                    && (resident[&twin.region] == State::Resident || World::is_small(twin))
            });
            for (addr, twin) in touched {
                let len = twin.bytes.len();
                let range = start.0.saturating_sub(addr.0) as usize..len.min((end - addr.0) as usize);
                twin.promised.set(len, range, false);
            }
        }
        outcome
    }

    /// A pause after which physical memory stays until somebody needs it.
    pub fn pause_lazily(&mut self, selection: &Selection) -> Result<Report, Error> {
        self.pause_with(selection, PauseOptions { lazy: true, ..PauseOptions::default() })
    }

    fn pause_with(&mut self, selection: &Selection, options: PauseOptions<'_>) -> Result<Report, Error> {
        let before = self.states();
        let outcome = self.engine.pause(selection, options);
        self.after_pause(&before, outcome.as_ref().err());
        outcome
    }

    pub fn switch(&mut self, pause: &Selection, resume: &Selection) -> Result<(Report, Report), Error> {
        let before = self.states();
        let outcome = self.engine.switch(pause, resume, SwitchOptions::default());
        self.after_pause(&before, outcome.as_ref().err());
        outcome
    }

    /// What a call that pauses has done to what is promised.
    fn after_pause(&mut self, before: &BTreeMap<RegionId, State>, error: Option<&Error>) {
        let after = self.states();
        match error {
            None => {
                let paused = before.iter().map(|(&id, &was)| (id, if was != after[&id] { was } else { State::Paused }));
                self.forget(&paused.collect());
            }
            Some(e) if e.status == Status::PausedAfterFailure => self.forget_loosely(before),
            Some(e) => {
                assert_eq!(*before, after, "a failed call changed a state: {e}");
                self.forget_loosely(before);
            }
        }
    }

    /// After a failure, unkept bytes may or may not be there.
    fn forget_loosely(&mut self, before: &BTreeMap<RegionId, State>) {
        for twin in self.twins.values_mut().filter(|t| before[&t.region] == State::Resident) {
            twin.forget(false);
        }
    }

    pub fn resume(&mut self, selection: &Selection) -> Result<Report, Error> {
        let before = self.states();
        let outcome = self.engine.resume(selection, ResumeOptions::default());
        if outcome.is_err() {
            assert_eq!(before, self.states(), "a failed resume changed a state: {outcome:?}");
        }
        outcome
    }

    /// A resume in the background, to its end.
    pub fn resume_behind(&mut self, selection: &Selection) -> Result<Report, Error> {
        let before = self.states();
        let progress = self.engine.resume_start(selection, ResumeOptions::default());
        let outcome = progress.and_then(|progress| progress.finished(None));
        if outcome.is_err() {
            assert_eq!(before, self.states(), "a failed resume changed a state: {outcome:?}");
        }
        outcome.map(|report| report.expect("it is over"))
    }

    /// The same; when `waits` pieces have landed, a stream of the program is made to wait for `range`. What it was told is there stays, whatever becomes of the
    /// call.
    pub fn resume_for_stream(
        &mut self,
        selection: &Selection,
        range: (Addr, u64),
        waits: u64,
    ) -> Result<Report, Error> {
        let before = self.states();
        let (sender, started) = mpsc::channel::<Arc<Progress>>();
        let (tell, told) = mpsc::channel();
        self.driver.at_later("wait", waits, move || {
            let soon = Some(Instant::now() + Duration::from_millis(20));
            let queued = started.recv().is_ok_and(|progress| progress.wait_on(range, PROGRAM, soon) == Ok(true));
            let _ = tell.send(queued);
        });
        let progress = self.engine.resume_start(selection, ResumeOptions::default());
        progress.iter().for_each(|progress| sender.send(Arc::clone(progress)).unwrap());
        drop(sender);
        let outcome = progress.and_then(|progress| progress.finished(None));
        if told.try_recv() == Ok(true) {
            let found = self.driver.peek_on(PROGRAM, range.0, range.1).expect("it was told to be there");
            assert_eq!(found, self.twins[&range.0].bytes[..range.1 as usize]);
        }
        if outcome.is_err() {
            assert_eq!(before, self.states(), "a failed resume changed a state: {outcome:?}");
        }
        outcome.map(|report| report.expect("it is over"))
    }

    /// Every promised byte of every resident allocation is what it must be.
    pub fn check(&self) {
        assert_eq!(self.driver.lost(), None);
        let states = self.states();
        for (&addr, twin) in &self.twins {
            let size = twin.bytes.len() as u64;
            assert!(self.engine.owns(addr) && self.engine.owns(addr.offset(size - 1)));
            assert_eq!(self.engine.allocation(addr.offset(size - 1)), Some((addr, size, twin.device, twin.region)));
            if states[&twin.region] == State::Paused && !twin.resident {
                continue;
            }
            let found =
                self.driver.peek(twin.device, addr, size).unwrap_or_else(|e| panic!("{addr:?} is resident, but {e}"));
            twin.assert_equal(addr, &found);
        }
    }

    /// The directory of disk backups.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Every backup file that is open, each once.
    pub fn files(&self) -> Vec<File> {
        open_files(|target| target.starts_with(self.dir.path()))
    }

    /// Changes the first byte of every backup file.
    pub fn damage_files(&self) {
        let files = self.files();
        assert!(!files.is_empty(), "there is no backup file");
        files.iter().for_each(|file| flip(file, 0));
    }

    /// Writes a part of an allocation to a file of its own, behind something else, and says that the file holds it. With
    /// `stale`, one byte there is another one. Returns the file's path.
    pub fn attach(&mut self, addr: Addr, from: u64, len: u64, stale: bool) -> Result<PathBuf, Error> {
        const AT: usize = 1237;
        let range = from as usize..(from + len) as usize;
        let mut bytes = [vec![0xAA; AT], self.twins[&addr].bytes[range].to_vec()].concat();
        bytes[AT + len as usize / 2] ^= u8::from(stale);
        self.attached += 1;
        let path = self.dir.path().join(format!("attached-{}", self.attached));
        std::fs::write(&path, bytes).unwrap();
        self.engine.attach_file(addr.offset(from), len, &path, AT as u64)?;
        Ok(path)
    }

    /// Everything is as it was, and can be given back.
    pub fn resume_and_check(mut self) {
        self.resume(&Selection::All).unwrap();
        self.check();
        self.check_no_leak();
    }

    /// Frees everything; afterwards the driver must have nothing left.
    pub fn check_no_leak(&mut self) {
        self.driver.clear_faults();
        for addr in self.twins.keys().copied().collect::<Vec<_>>() {
            self.free(addr).unwrap();
        }
        self.engine.trim();
        assert_eq!(self.driver.counts(), (0, 0, 0), "physicals, mappings, reservations are left");
        assert_eq!(self.driver.lost(), None);
        let stats: serde_json::Value = serde_json::from_str(&self.engine.stats_json()).unwrap();
        for tier in stats["tiers"].as_array().unwrap() {
            assert_eq!(tier["used_bytes"], 0, "{tier}");
        }
    }
}
