//! Makes the calls. The recorded addresses and region numbers are names; this keeps what they mean here.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::Arc;

use sire_core::driver::{Addr, Device as Ordinal, ProgramStream};
use sire_core::engine::{
    Backup, Config, Engine, OnPaused, PauseOptions, Policy, RegionId, Report, Request, ResumeOptions, Selection, State,
    SwitchOptions,
};
use sire_core::error::{Error, Result, Status};
use sire_core::trace::{Attachment, Event, Record, Transition, Verb, means, selection_of};

use crate::failure::Failure;

use super::Trace;
use super::content::{Content, Meaning};
use super::device::Device;
use super::files::Files;
use super::views::Views;

/// How often one kind of call was made, and how long it took.
#[derive(Debug, Default)]
pub struct Timing {
    /// Seconds of each call.
    pub seconds: Vec<f64>,
    /// Seconds that the same calls took when they were recorded (transitions only).
    pub recorded: Vec<f64>,
    /// Device bytes that they gave back or took.
    pub moved: u64,
    /// Bytes that they copied.
    pub copied: u64,
}

/// What came of a replay.
#[derive(Debug, Default)]
pub struct Played {
    /// By kind of call.
    pub timings: BTreeMap<&'static str, Timing>,
    /// Calls that had failed when they were recorded, or that this program does not know.
    pub left_out: u64,
    /// Calls that worked then and failed now: the first few in words, and how many.
    pub failures: Vec<String>,
    /// How many those are.
    pub failed: u64,
    /// Resumes after which bytes were compared, and bytes that were.
    pub compared: u64,
    /// Where bytes were wrong.
    pub wrong: Vec<String>,
}

const MOST_SENTENCES: usize = 10;

impl Played {
    /// Adds another replay of the same trace.
    pub fn add(&mut self, other: Played) {
        for (name, timing) in other.timings {
            let sum = self.timings.entry(name).or_default();
            sum.seconds.extend(timing.seconds);
            sum.recorded.extend(timing.recorded);
            sum.moved += timing.moved;
            sum.copied += timing.copied;
        }
        self.left_out += other.left_out;
        self.failed += other.failed;
        self.compared += other.compared;
        self.failures.extend(other.failures);
        self.wrong.extend(other.wrong);
    }

    /// What makes the replay a failed one.
    pub fn trouble(&self) -> Option<String> {
        if let Some(first) = self.wrong.first() {
            return Some(format!("WRONG BYTES: {first}, and {} more", self.wrong.len() - 1));
        }
        let first = self.failures.first()?;
        Some(format!("{} calls that worked when they were recorded failed: {first}", self.failed))
    }

    fn fail(&mut self, what: &str, error: &Error) {
        self.failed += 1;
        if self.failures.len() < MOST_SENTENCES {
            self.failures.push(format!("{what}: {error}"));
        }
    }
}

/// An allocation of the trace, here.
#[derive(Debug)]
pub(super) struct Allocation {
    pub(super) addr: Addr,
    pub(super) size: u64,
    pub(super) device: u32,
    pub(super) region: u32,
    pub(super) key: u64,
    /// What a pause keeps.
    pub(super) kept: Vec<Range<u64>>,
    /// What files hold, the last of several that say so of a byte. The rest is what `key` means.
    pub(super) attached: Vec<(Range<u64>, Meaning)>,
    /// The program mapped it itself.
    pub(super) mapped: bool,
}

impl Allocation {
    /// A range in parts of one meaning each.
    fn meanings(&self, range: &Range<u64>) -> Vec<(Range<u64>, Meaning)> {
        let edges = self.attached.iter().flat_map(|(part, _)| [part.start, part.end]);
        let mut cuts: Vec<u64> = edges.filter(|at| range.start < *at && *at < range.end).collect();
        cuts.extend([range.start, range.end]);
        cuts.sort_unstable();
        cuts.dedup();
        let meaning = |part: &Range<u64>| {
            let found = self.attached.iter().rev().find(|(file, _)| file.start <= part.start && part.end <= file.end);
            found.map_or(Meaning::Key(self.key), |(_, meaning)| meaning.clone())
        };
        cuts.windows(2).map(|pair| pair[0]..pair[1]).map(|part| (part.clone(), meaning(&part))).collect()
    }
}

#[derive(Debug)]
pub(super) struct Region {
    pub(super) id: RegionId,
    tag: String,
    pub(super) policy: Policy,
    inside: u32,
}

pub(super) struct Player<'a> {
    pub(super) engine: Engine,
    pub(super) device: &'a Device,
    files: &'a Files,
    check: bool,
    pub(super) regions: HashMap<u32, Region>,
    pub(super) allocations: BTreeMap<u64, Allocation>,
    pub(super) views: Views,
    contents: HashMap<u32, Content>,
    pub(super) played: Played,
}

/// Plays the whole trace on a fresh engine. Fails only if bytes cannot even be written or read.
pub fn play(trace: &Trace, device: &Device, files: &Files, check: bool) -> std::result::Result<Played, Failure> {
    let config = Config {
        chunk: trace.header.chunk.max(1),
        small: trace.header.small,
        copy_piece: trace.header.copy_piece.max(4096),
        ..Config::default()
    };
    let mut player = Player {
        engine: Engine::new(device.driver.clone(), config),
        device,
        files,
        check,
        regions: HashMap::new(),
        allocations: BTreeMap::new(),
        views: Views::default(),
        contents: HashMap::new(),
        played: Played::default(),
    };
    for record in &trace.records {
        player.step(record).map_err(|error| Failure::new(format!("at {:?}: {error}", record.time)))?;
    }
    player.clear();
    Ok(player.played)
}

/// Whether a pause that failed left the tag paused all the same.
pub fn ended_paused(status: i32) -> bool {
    status == Status::PausedAfterFailure as i32
}

impl Player<'_> {
    fn step(&mut self, record: &Record) -> Result<()> {
        match &record.event {
            Event::Region { region, tag, policy } => self.open(*region, tag, *policy),
            Event::Enter { region, resume, status: 0 } => self.enter(*region, *resume),
            Event::Leave { region } => self.leave(*region),
            Event::Allocate { region, device, size, stream, addr, status: 0 } => {
                let stream = ProgramStream(*stream);
                return self.allocate(*addr, *region, *device, *size, stream);
            }
            Event::Free { addr } => self.free(*addr),
            Event::Override { addr, len, keep, status: 0 } => self.set_override(*addr, *len, *keep),
            Event::Changed { addr, len, status: 0 } => self.changed(*addr, *len),
            Event::Attach(attached) if attached.status == 0 && attached.len > 0 => return self.attach(attached),
            Event::KeepResident { addr, status: 0 } => self.keep_resident(*addr),
            Event::Peer { device, peer, status: 0 } => self.allow_peer(*device, *peer),
            Event::Segment(call) => return self.segment(call),
            Event::PeerGone { device, peer, status: 0 } => self.refuse_peer(*device, *peer),
            Event::Transition(done) if done.status == 0 || ended_paused(done.status) => return self.transition(done),
            Event::Trim => {
                self.timed("trim", |engine| Ok(engine.trim()));
            }
            _ => self.played.left_out += 1,
        }
        Ok(())
    }

    /// Makes a call, and notes how long it took or that it failed.
    pub(super) fn timed<T>(&mut self, name: &'static str, call: impl FnOnce(&Engine) -> Result<T>) -> Option<T> {
        let start = self.device.now();
        let outcome = call(&self.engine);
        let seconds = self.device.now() - start;
        match outcome {
            Ok(value) => {
                self.played.timings.entry(name).or_default().seconds.push(seconds);
                Some(value)
            }
            Err(error) => {
                self.played.fail(name, &error);
                None
            }
        }
    }

    pub(super) fn ordinal(&self, device: u32) -> Ordinal {
        Ordinal(device % self.device.count.max(1))
    }

    fn open(&mut self, region: u32, tag: &str, policy: Policy) {
        if let Some(id) = self.timed("region", |engine| engine.region(tag, policy)) {
            self.regions.entry(region).or_insert_with(|| Region { id, tag: tag.to_owned(), policy, inside: 0 });
        }
    }

    fn enter(&mut self, region: u32, resume: bool) {
        let Some(id) = self.regions.get(&region).map(|region| region.id) else { return };
        let on_paused = if resume { OnPaused::Resume } else { OnPaused::Refuse };
        if self.timed("enter", |engine| engine.enter(id, on_paused)).is_some() {
            self.regions.entry(region).and_modify(|region| region.inside += 1);
        }
    }

    /// Only as often as an enter worked.
    fn leave(&mut self, region: u32) {
        let Some(region) = self.regions.get_mut(&region).filter(|region| region.inside > 0) else { return };
        region.inside -= 1;
        self.engine.leave(region.id);
    }

    fn allocate(&mut self, name: u64, region: u32, device: u32, size: u64, stream: ProgramStream) -> Result<()> {
        let Some((id, backup)) = self.regions.get(&region).map(|region| (region.id, region.policy.backup)) else {
            self.played.left_out += 1;
            return Ok(());
        };
        let ordinal = self.ordinal(device);
        let request = Request { region: id, device: ordinal, size, stream, capturing: false };
        let Some(addr) = self.timed("allocate", |engine| engine.allocate(request)) else { return Ok(()) };
        let all = 0..size;
        let kept = if backup == Backup::None { Vec::new() } else { vec![all] };
        let allocation =
            Allocation { addr, size, device: ordinal.0, region, key: name, kept, attached: Vec::new(), mapped: false };
        // A name that is alive still was freed without a record.
        if let Some(old) = self.allocations.insert(name, allocation).filter(|old| !old.mapped) {
            let _ = self.engine.free(old.addr, false);
        }
        self.write(name)
    }

    fn free(&mut self, name: u64) {
        let own = self.allocations.get(&name).is_some_and(|found| !found.mapped);
        match own.then(|| self.allocations.remove(&name)).flatten() {
            Some(found) => {
                self.timed("free", |engine| engine.free(found.addr, false));
            }
            None => self.played.left_out += 1,
        }
    }

    /// The allocation that a recorded address lies in, and how far inside.
    pub(super) fn find(&mut self, name: u64) -> Option<(&mut Allocation, u64)> {
        let (start, found) = self.allocations.range_mut(..=name).next_back()?;
        let offset = name - start;
        (offset < found.size).then_some((found, offset))
    }

    fn set_override(&mut self, name: u64, len: u64, keep: bool) {
        let Some((allocation, offset)) = self.find(name) else { return };
        if keep {
            allocation.kept.push(offset..offset.saturating_add(len).min(allocation.size));
        } else {
            // Which bytes are kept around the hole does not matter here: none of them is looked at.
            allocation.kept.clear();
        }
        let addr = allocation.addr.offset(offset);
        self.timed("override", |engine| if keep { engine.keep(addr, len) } else { engine.discard(addr, len) });
    }

    fn changed(&mut self, name: u64, len: u64) {
        let Some(addr) = self.find(name).map(|(allocation, offset)| allocation.addr.offset(offset)) else { return };
        self.timed("changed", |engine| engine.changed(addr, len));
    }

    /// What is attached has the file's bytes, as it had when that was recorded. A model clock moves no bytes: nothing can be proven there.
    fn attach(&mut self, attached: &Attachment) -> Result<()> {
        let standing = self.files.get(attached).filter(|_| !self.device.is_simulated());
        let parts = self.parts(attached.addr, attached.len);
        let (Some(standing), Some(&(first, offset, _))) = (standing, parts.first()) else {
            self.played.left_out += 1;
            return Ok(());
        };
        for &(name, offset, len) in &parts {
            let shift = i128::from(attached.at) + i128::from(name + offset - attached.addr) - i128::from(offset);
            self.give_meaning(name, offset..offset + len, Meaning::File(Arc::clone(&standing.file), shift))?;
        }
        let addr = self.allocations[&first].addr.offset(offset);
        self.timed("attach_file", |engine| engine.attach_file(addr, attached.len, &standing.path, attached.at));
        Ok(())
    }

    /// Recorded addresses as parts of allocations: (name, offset, bytes). Empty unless all of them are there.
    fn parts(&mut self, name: u64, len: u64) -> Vec<(u64, u64, u64)> {
        let (mut parts, mut at, Some(end)) = (Vec::new(), name, name.checked_add(len)) else { return Vec::new() };
        while at < end {
            let Some((found, offset)) = self.find(at) else { return Vec::new() };
            let len = (found.size - offset).min(end - at);
            parts.push((at - offset, offset, len));
            at += len;
        }
        parts
    }

    /// Writes what a range means from now on, unless its memory is away: then it keeps its bytes.
    fn give_meaning(&mut self, name: u64, range: Range<u64>, meaning: Meaning) -> Result<()> {
        let found = &self.allocations[&name];
        let (addr, device) = (found.addr, found.device);
        let region = self.regions.get(&found.region).map(|region| self.engine.state(region.id));
        if !matches!(region, Some(Ok(State::Resident))) {
            return Ok(());
        }
        self.content(device)?.write(addr, &range, &meaning)?;
        self.allocations.entry(name).and_modify(|found| found.attached.push((range, meaning)));
        Ok(())
    }

    fn keep_resident(&mut self, name: u64) {
        let Some(addr) = self.find(name).map(|(allocation, offset)| allocation.addr.offset(offset)) else { return };
        self.timed("keep_resident", |engine| engine.keep_resident(addr));
    }

    fn allow_peer(&mut self, device: u32, peer: u32) {
        let (device, peer) = (self.ordinal(device), self.ordinal(peer));
        self.timed("peer", |engine| engine.allow_peer(device, peer));
    }

    /// What a text of the trace means here, where regions have other numbers.
    fn selection(&self, text: &str) -> Selection {
        match selection_of(text) {
            Selection::Exact(theirs) => {
                Selection::Exact(theirs.iter().filter_map(|id| Some(self.regions.get(&id.0)?.id)).collect())
            }
            selection => selection,
        }
    }

    fn refuse_peer(&mut self, device: u32, peer: u32) {
        let (device, peer) = (self.ordinal(device), self.ordinal(peer));
        self.timed("peer_gone", |engine| engine.refuse_peer(device, peer));
    }

    fn transition(&mut self, done: &Transition) -> Result<()> {
        let [text, rest @ ..] = done.tags.as_slice() else { return Ok(()) };
        let (first, second) = (self.selection(text), self.selection(rest.first().map_or("", String::as_str)));
        let options = ResumeOptions { wait: done.wait, ..ResumeOptions::default() };
        let name = done.verb.name();
        let lazy = done.verb == Verb::PauseLazily;
        let pause = |engine: &Engine| engine.pause(&first, PauseOptions { lazy, ..PauseOptions::default() });
        let report = match done.verb {
            Verb::Pause | Verb::PauseLazily => self.timed(name, pause),
            Verb::PreCopy => self.timed(name, |engine| engine.pre_copy(&first, false)),
            Verb::Resume | Verb::ResumeStart => self.timed(name, |engine| engine.resume(&first, options)),
            Verb::Switch => self.timed(name, |engine| {
                let options = SwitchOptions::default();
                let (paused, resumed) = engine.switch(&first, &second, options)?;
                Ok(Report {
                    bytes_moved: paused.bytes_moved + resumed.bytes_moved,
                    bytes_copied: paused.bytes_copied + resumed.bytes_copied,
                    ..resumed
                })
            }),
            Verb::Prefetch => {
                self.played.left_out += 1;
                return Ok(());
            }
        };
        let Some(report) = report else { return Ok(()) };
        let timing = self.played.timings.entry(name).or_default();
        timing.recorded.push(done.took.as_secs_f64());
        timing.moved += report.bytes_moved;
        timing.copied += report.bytes_copied;
        match done.verb {
            Verb::Pause | Verb::PauseLazily | Verb::PreCopy => Ok(()),
            Verb::Switch => self.compare(rest.first().map_or("", String::as_str)),
            _ => self.compare(text),
        }
    }

    // ---- bytes -------------------------------------------------------------------------------------------------------

    fn content(&mut self, device: u32) -> Result<&mut Content> {
        use std::collections::hash_map::Entry;
        match self.contents.entry(device) {
            Entry::Occupied(found) => Ok(found.into_mut()),
            Entry::Vacant(place) => Ok(place.insert(Content::new(&self.device.driver, Ordinal(device))?)),
        }
    }

    pub(super) fn write(&mut self, name: u64) -> Result<()> {
        let Some(found) = self.allocations.get(&name).filter(|_| self.check) else { return Ok(()) };
        let (addr, size, device, key) = (found.addr, found.size, found.device, found.key);
        self.content(device)?.write(addr, &(0..size), &Meaning::Key(key))
    }

    /// Compares what was kept of everything under the tag.
    fn compare(&mut self, tag: &str) -> Result<()> {
        if !self.check {
            return Ok(());
        }
        let under = |region: &u32| self.regions.get(region).is_some_and(|found| means(tag, *region, &found.tag));
        let meant = self.allocations.iter().filter(|(_, found)| under(&found.region));
        let parts = |name: &u64, found: &Allocation, range: &Range<u64>| {
            let one = |(range, meaning)| (*name, found.device, found.addr, range, meaning);
            found.meanings(range).into_iter().map(one).collect::<Vec<_>>()
        };
        let ranges: Vec<_> = meant
            .flat_map(|(name, found)| found.kept.iter().flat_map(move |range| parts(name, found, range)))
            .collect();
        for (name, device, addr, range, meaning) in ranges {
            self.played.compared += range.end - range.start;
            if let Some(at) = self.content(device)?.wrong(addr, &range, &meaning)? {
                self.played.wrong.push(format!("byte {at} of the allocation recorded at {name:#x}, after a resume"));
            }
        }
        Ok(())
    }

    /// Gives everything back, so that the next replay finds the device as this one did.
    fn clear(&mut self) {
        for found in std::mem::take(&mut self.allocations).into_values().filter(|found| !found.mapped) {
            let _ = self.engine.free(found.addr, false);
        }
        self.clear_views();
        self.engine.trim();
    }
}
