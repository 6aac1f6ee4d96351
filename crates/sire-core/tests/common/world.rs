//! An engine on the test driver, with its naive twin: a map from address to bytes, for which a pause does nothing.
//! The twin knows what each byte must be, or that nobody promised anything about it.

use super::{GRANULARITY, MemDriver};
use sire_core::driver::{Addr, Device, ProgramStream};
use sire_core::engine::*;
use sire_core::error::{Error, Status};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Physical chunks of the tests: four granules.
pub const CHUNK: u64 = 4 * GRANULARITY;

/// The twin's idea of one allocation.
#[derive(Clone, Debug)]
pub struct Twin {
    pub device: Device,
    pub region: RegionId,
    /// `None`: nothing is promised about this byte.
    pub bytes: Vec<Option<u8>>,
    /// Whether a pause keeps the byte.
    pub kept: Vec<bool>,
}

pub struct World {
    pub driver: Arc<MemDriver>,
    pub engine: Engine,
    pub twins: BTreeMap<Addr, Twin>,
    pub policies: BTreeMap<RegionId, Policy>,
    /// Makes every write different.
    seed: u8,
    _dir: tempfile::TempDir,
}

pub fn policy(backup: Backup) -> Policy {
    Policy { backup, ..Policy::default() }
}

pub fn tag(tag: &str) -> Selection {
    Selection::Tag(tag.to_owned())
}

impl World {
    pub fn new(capacity: u64) -> World {
        let driver = Arc::new(MemDriver::new(capacity));
        let dir = tempfile::tempdir().unwrap();
        let config = Config {
            chunk: CHUNK,
            small: 4096,
            copy_piece: GRANULARITY,
            disk_dir: Some(dir.path().to_path_buf()),
            ..Config::default()
        };
        let engine = Engine::new(driver.clone(), config);
        World { driver, engine, twins: BTreeMap::new(), policies: BTreeMap::new(), seed: 0, _dir: dir }
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
        let addr = self.engine.allocate(request)?;
        let size = request.size as usize;
        let overlap = self.twins.range(..Addr(addr.0 + request.size)).next_back();
        assert!(overlap.is_none_or(|(a, t)| a.0 + t.bytes.len() as u64 <= addr.0), "{addr:?} is handed out twice");
        let kept = self.policies[&request.region].backup != Backup::None;
        let twin = Twin { device: request.device, region: request.region, bytes: vec![None; size], kept: vec![kept; size] };
        self.twins.insert(addr, twin);
        Ok(addr)
    }

    /// The program writes the whole allocation.
    pub fn write(&mut self, addr: Addr) {
        self.seed = self.seed.wrapping_add(1);
        let twin = self.twins.get_mut(&addr).unwrap();
        let bytes: Vec<u8> =
            (0..twin.bytes.len()).map(|i| (i as u8).wrapping_mul(31).wrapping_add((i >> 8) as u8) ^ self.seed).collect();
        self.driver.poke(twin.device, addr, &bytes).unwrap();
        twin.bytes = bytes.into_iter().map(Some).collect();
    }

    pub fn free(&mut self, addr: Addr) -> Result<(), Error> {
        self.engine.free(addr, false)?;
        self.twins.remove(&addr);
        Ok(())
    }

    pub fn set_override(&mut self, addr: Addr, from: u64, len: u64, keep: bool) {
        let at = addr.offset(from);
        if keep { self.engine.keep(at, len) } else { self.engine.discard(at, len) }.unwrap();
        self.twins.get_mut(&addr).unwrap().kept[from as usize..(from + len) as usize].fill(keep);
    }

    /// A pause that may have happened: bytes that nobody keeps are not promised any more.
    fn forget(&mut self, states_before: &BTreeMap<RegionId, State>) {
        for twin in self.twins.values_mut().filter(|t| states_before[&t.region] == State::Resident) {
            let zero = self.policies[&twin.region].zero_fill;
            for (byte, _) in twin.bytes.iter_mut().zip(&twin.kept).filter(|(_, kept)| !**kept) {
                *byte = if zero { Some(0) } else { None };
            }
        }
    }

    pub fn states(&self) -> BTreeMap<RegionId, State> {
        self.policies.keys().map(|&id| (id, self.engine.state(id).unwrap())).collect()
    }

    pub fn pause(&mut self, selection: &Selection) -> Result<Report, Error> {
        let before = self.states();
        let outcome = self.engine.pause(selection, PauseOptions::default());
        let after = self.states();
        match &outcome {
            Ok(_) => {
                let paused = before.iter().map(|(&id, &was)| (id, if was != after[&id] { was } else { State::Paused }));
                self.forget(&paused.collect());
            }
            Err(e) if e.status == Status::PausedAfterFailure => self.forget_loosely(&before),
            Err(_) => {
                assert_eq!(before, after, "a failed pause changed a state: {outcome:?}");
                self.forget_loosely(&before);
            }
        }
        outcome
    }

    /// After a failure, unkept bytes may or may not be there.
    fn forget_loosely(&mut self, before: &BTreeMap<RegionId, State>) {
        for twin in self.twins.values_mut().filter(|t| before[&t.region] == State::Resident) {
            for (byte, _) in twin.bytes.iter_mut().zip(&twin.kept).filter(|(_, kept)| !**kept) {
                *byte = None;
            }
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

    /// Every promised byte of every resident allocation is what it must be.
    pub fn check(&self) {
        assert_eq!(self.driver.lost(), None);
        let states = self.states();
        for (&addr, twin) in &self.twins {
            let size = twin.bytes.len() as u64;
            assert!(self.engine.owns(addr) && self.engine.owns(addr.offset(size - 1)));
            assert_eq!(self.engine.allocation(addr.offset(size - 1)), Some((addr, size, twin.device, twin.region)));
            if states[&twin.region] == State::Paused {
                continue;
            }
            let found = self.driver.peek(twin.device, addr, size).unwrap_or_else(|e| panic!("{addr:?} is resident, but {e}"));
            for (i, (found, wanted)) in found.iter().zip(&twin.bytes).enumerate() {
                assert!(wanted.is_none_or(|w| w == *found), "byte {i} of {size} at {addr:?}: {found} instead of {wanted:?}");
            }
        }
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
