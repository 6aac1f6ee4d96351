//! A program that maps memory itself, as PyTorch's expandable segments do, with its naive twin: what each mapped piece holds. A pause
//! does nothing to the twin, but that it forgets what has no backup.

use super::{GRANULARITY, MemDriver};
use sire_core::driver::{Access, Addr, Device, Driver, Properties, Rights};
use sire_core::engine::*;
use sire_core::error::{Error, Status};
use sire_core::segments::{Handle, NewMemory, Segments};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Pieces lie this far apart: the engine finds memory by pages of this size.
pub const STRIDE: u64 = 2 << 20;
/// Bytes of a piece on a device with little memory.
pub const SMALL: u64 = 2 * GRANULARITY;

pub const WANTED: Properties = Properties { shareable: 1, rdma: true };
pub const HERE: Device = Device(0);
pub const PEER: Device = Device(1);

/// One mapped piece.
#[derive(Clone, Debug)]
pub struct Piece {
    pub handle: Handle,
    pub region: RegionId,
    /// What it holds, if anything is promised.
    pub holds: Option<u8>,
    pub peer: bool,
    /// It was handed out: no pause takes it, and it keeps what it holds.
    pub lent: bool,
}

#[derive(Debug)]
pub struct Segment {
    pub base: Addr,
    pub slots: u64,
    pub pieces: BTreeMap<u64, Piece>,
}

pub struct Player {
    pub driver: Arc<MemDriver>,
    pub engine: Arc<Engine>,
    pub segments: Vec<Segment>,
    pub policies: BTreeMap<RegionId, Policy>,
    /// Bytes per piece; `STRIDE` makes neighbours touch.
    pub piece: u64,
    seed: u8,
    _dir: tempfile::TempDir,
}

/// A program on a device with little memory, in small pieces.
pub fn small() -> Player {
    Player::new(1 << 20, SMALL)
}

/// What a call was refused with.
pub fn refusal<T: std::fmt::Debug>(outcome: Result<T, Error>) -> (Status, String) {
    let error = outcome.unwrap_err();
    (error.status, error.message)
}

pub fn access(device: Device) -> [Access; 1] {
    [Access { device, rights: Rights::ReadWrite }]
}

impl Player {
    pub fn new(capacity: u64, piece: u64) -> Player {
        let driver = Arc::new(MemDriver::new(capacity));
        let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        let config = Config {
            tends: false,
            copy_piece: piece / 2,
            host_unit: piece.max(8 * GRANULARITY),
            host_threads: if cfg!(feature = "shuttle") { 2 } else { 0 },
            disk_dir: Some(dir.path().to_path_buf()),
            ..Config::default()
        };
        let engine = Arc::new(Engine::new(driver.clone(), config));
        Player { driver, engine, segments: Vec::new(), policies: BTreeMap::new(), piece, seed: 0, _dir: dir }
    }

    pub fn calls(&self) -> &Segments {
        self.engine.segments()
    }

    pub fn region(&mut self, tag: &str, policy: Policy) -> RegionId {
        let region = self.engine.region(tag, policy).unwrap();
        self.policies.insert(region, policy);
        region
    }

    pub fn memory(&self, region: Option<RegionId>) -> NewMemory {
        NewMemory { region, device: HERE, size: self.piece, properties: WANTED, capturing: false }
    }

    /// A new segment; its number.
    pub fn reserve(&mut self, region: Option<RegionId>, slots: u64) -> usize {
        let base = loop {
            if let Ok(base) = self.driver.reserve(slots * STRIDE, STRIDE) {
                break base;
            }
        };
        self.calls().reserved(base, slots * STRIDE, region);
        self.segments.push(Segment { base, slots, pieces: BTreeMap::new() });
        self.segments.len() - 1
    }

    pub fn addr(&self, segment: usize, slot: u64) -> Addr {
        self.segments[segment].base.offset(slot * STRIDE)
    }

    /// Maps new memory into free slots, and writes to it.
    pub fn grow(
        &mut self,
        segment: usize,
        slots: &[u64],
        made_in: Option<RegionId>,
        is: RegionId,
    ) -> Result<(), Error> {
        self.grow_unwritten(segment, slots, made_in, is)?;
        slots.iter().for_each(|&slot| self.write(segment, slot));
        Ok(())
    }

    /// Maps new memory into free slots: all of it is made first; if there is not enough, none is kept.
    pub fn grow_unwritten(
        &mut self,
        segment: usize,
        slots: &[u64],
        made_in: Option<RegionId>,
        is: RegionId,
    ) -> Result<(), Error> {
        let mut handles = Vec::new();
        for _ in slots {
            match self.calls().create(self.memory(made_in)) {
                Ok(handle) => handles.push(handle.expect("it is ours")),
                Err(error) => {
                    handles.into_iter().for_each(|handle| self.calls().release(handle).unwrap());
                    return Err(error);
                }
            }
        }
        for (&slot, &handle) in slots.iter().zip(&handles) {
            let addr = self.addr(segment, slot);
            let passed = persist(|| self.calls().map(addr, self.piece, 0, handle, false));
            assert_eq!(passed, None, "memory of a region is the engine's");
            let piece = Piece { handle, region: is, holds: None, peer: false, lent: false };
            self.segments[segment].pieces.insert(slot, piece);
        }
        self.open(segment, slots, HERE);
        Ok(())
    }

    /// Gives a device access to slots that lie side by side.
    pub fn open(&mut self, segment: usize, slots: &[u64], device: Device) {
        let (Some(&first), Some(&last)) = (slots.first(), slots.last()) else { return };
        if self.piece == STRIDE {
            let (addr, size) = (self.addr(segment, first), (last - first + 1) * STRIDE);
            assert!(persist(|| self.calls().grant(addr, size, &access(device))).is_empty());
        } else {
            for &slot in slots {
                let addr = self.addr(segment, slot);
                assert!(persist(|| self.calls().grant(addr, self.piece, &access(device))).is_empty());
            }
        }
        if device == PEER {
            slots.iter().for_each(|slot| self.segments[segment].pieces.get_mut(slot).unwrap().peer = true);
        }
    }

    /// Hands a piece out, as for another process, if it is there.
    pub fn lend(&mut self, segment: usize, slot: u64) -> Result<(), Error> {
        let Some(piece) = self.segments[segment].pieces.get_mut(&slot) else { return Ok(()) };
        self.engine.segments().lend(piece.handle, "it was exported")?.1.keep();
        piece.lent = true;
        Ok(())
    }

    /// Unmaps and releases one piece.
    pub fn shrink(&mut self, segment: usize, slot: u64) {
        let Some(piece) = self.segments[segment].pieces.remove(&slot) else { return };
        assert!(self.calls().unmap(self.addr(segment, slot), self.piece).unwrap().is_empty());
        self.calls().release(piece.handle).unwrap();
    }

    /// Shrinks a segment to nothing and gives its addresses back.
    pub fn drop_segment(&mut self, segment: usize) {
        for slot in 0..self.segments[segment].slots {
            self.shrink(segment, slot);
        }
        let Segment { base, slots, .. } = self.segments.swap_remove(segment);
        assert!(self.calls().unreserve(base, slots * STRIDE).unwrap());
    }

    fn windows(&self) -> [u64; 3] {
        [0, self.piece / 2 - 32, self.piece - 64]
    }

    /// The program writes, if the memory is there.
    pub fn write(&mut self, segment: usize, slot: u64) {
        self.seed = self.seed.wrapping_add(41);
        let (addr, seed) = (self.addr(segment, slot), self.seed);
        let Some(piece) = self.segments[segment].pieces.get(&slot) else { return };
        if self.engine.state(piece.region).unwrap() == State::Paused && !piece.lent {
            return;
        }
        for at in self.windows() {
            self.driver.poke(HERE, addr.offset(at), &[seed.wrapping_add(at as u8); 64]).unwrap();
        }
        self.segments[segment].pieces.get_mut(&slot).unwrap().holds = Some(seed);
    }

    pub fn pause(&mut self, selection: &Selection) -> Result<Report, Error> {
        let outcome = self.engine.pause(selection, PauseOptions::default());
        self.forget();
        self.check();
        outcome
    }

    /// What is paused, or was thrown away by a pause that failed, is not promised without a backup.
    fn forget(&mut self) {
        let thrown = |region: &RegionId| self.policies.get(region).is_some_and(|p| p.backup == Backup::None);
        for piece in self.segments.iter_mut().flat_map(|segment| segment.pieces.values_mut()) {
            if thrown(&piece.region) && !piece.lent {
                piece.holds = None;
            }
        }
    }

    pub fn resume(&mut self, selection: &Selection) -> Result<Report, Error> {
        let outcome = self.engine.resume(selection, ResumeOptions::default());
        self.check();
        outcome
    }

    /// Everything that is resident or was handed out is there, for everybody who may touch it; of what is paused, nothing is.
    pub fn check(&self) {
        assert_eq!(self.driver.lost(), None);
        for (number, segment) in self.segments.iter().enumerate() {
            for (&slot, piece) in &segment.pieces {
                let addr = self.addr(number, slot);
                if self.engine.state(piece.region).unwrap() == State::Paused && !piece.lent {
                    continue;
                }
                for at in self.windows() {
                    for device in [HERE, PEER].into_iter().take(1 + usize::from(piece.peer)) {
                        let found = self.driver.peek(device, addr.offset(at), 64);
                        let found = found.unwrap_or_else(|e| panic!("piece {slot} of segment {number}: {e}"));
                        if let Some(seed) = piece.holds {
                            assert_eq!(found, [seed.wrapping_add(at as u8); 64], "piece {slot} of segment {number}");
                        }
                    }
                }
            }
        }
    }

    /// The end: everything goes, and nothing is left.
    pub fn check_no_leak(&mut self) {
        self.driver.clear_faults();
        while !self.segments.is_empty() {
            self.drop_segment(0);
        }
        self.engine.trim();
        assert_eq!(self.driver.counts(), (0, 0, 0), "physicals, mappings, reservations are left");
        assert_eq!(self.driver.lost(), None);
    }
}

/// What the program repeats only because a test makes the driver fail twice in a row.
pub fn persist<T>(mut call: impl FnMut() -> Result<T, Error>) -> T {
    for _ in 0..3 {
        match call() {
            Ok(value) => return value,
            Err(error) => assert_ne!(error.status, Status::Internal, "{error}"),
        }
    }
    panic!("it still fails")
}

/// Runs `call` in a thread of its own while a driver call is under way, and looks for a moment whether it comes to an end before that does.
pub fn beside<T: Send + 'static>(
    player: &Player,
    verb: &'static str,
    call: impl FnOnce(&Engine) -> T + Send + 'static,
) -> std::sync::mpsc::Receiver<T> {
    let engine = Arc::clone(&player.engine);
    let (send, outcome) = std::sync::mpsc::sync_channel(1);
    player.driver.at_next(verb, move || {
        let (begins, begun) = std::sync::mpsc::channel();
        let calling = std::thread::spawn(move || {
            begins.send(()).unwrap();
            let outcome = call(&engine);
            drop(engine);
            send.send(outcome).unwrap();
        });
        begun.recv().unwrap();
        let end = std::time::Instant::now() + std::time::Duration::from_millis(30);
        while !calling.is_finished() && std::time::Instant::now() < end {
            std::thread::yield_now();
        }
    });
    outcome
}
