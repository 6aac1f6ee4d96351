//! What threads do at the same time: operations of the engine, each a call or two, on one world that they share; and what must hold
//! when all are done. An operation that every other one should meet belongs in `OPERATIONS`; one test's own stays with its test.

use crate::common;
use crate::common::world::{CHUNK, PROGRAM, World, policy, tag};
use sire_core::driver::{Addr, Device, ProgramStream};
use sire_core::engine::*;
use sire_core::error::{Error, Status};
use std::sync::Mutex;

/// What two threads share.
pub struct Shared {
    pub world: World,
    region: RegionId,
    pub large: Addr,
    small: Addr,
    large_bytes: Vec<u8>,
    /// What the operations allocated.
    more: Mutex<Vec<Addr>>,
    freed: Mutex<Vec<Addr>>,
    /// What was said of device 1's access to device 0's memory, in the end.
    peer: Mutex<Option<bool>>,
    /// No pause may take the large allocation any more.
    stays: Mutex<bool>,
    /// What the large allocation holds now.
    rewritten: Mutex<Option<Vec<u8>>>,
}

impl Shared {
    pub fn new(paused: bool) -> Shared {
        Shared::with_reserve(paused, 0)
    }

    /// As `new`, with a region whose content is declared not to change.
    pub fn clean() -> Shared {
        Shared::with_policy(false, 0, Policy { clean: Clean::Declared, ..policy(Backup::Host) })
    }

    /// As `new`; the first allocation starts a thread that brings `reserve` bytes of host memory in.
    pub fn with_reserve(paused: bool, reserve: u64) -> Shared {
        Shared::with_policy(paused, reserve, policy(Backup::Host))
    }

    pub fn with_policy(paused: bool, reserve: u64, kept: Policy) -> Shared {
        let mut world = World::new(64 * CHUNK);
        world.engine.configure(&|config| config.host_reserve = reserve);
        let region = world.region("a", kept);
        let other = world.region("a/b", policy(Backup::None));
        let away = world.region("c", policy(Backup::Host));
        let [large, small] = [CHUNK + 1, 600].map(|size| world.allocate(region, size).unwrap());
        world.allocate(other, CHUNK).unwrap();
        if reserve > 0 {
            let third = world.region("c", policy(Backup::Host));
            let addr = world.allocate(third, CHUNK + 1).unwrap();
            world.write(addr);
        }
        world.write(large);
        world.write(small);
        let third = world.allocate(away, CHUNK).unwrap();
        world.write(third);
        world.pause(&tag("c")).unwrap();
        let large_bytes = world.twins[&large].bytes.clone();
        if paused {
            world.pause(&Selection::All).unwrap();
        }
        Shared {
            world,
            region,
            large,
            small,
            large_bytes,
            more: Mutex::default(),
            freed: Mutex::default(),
            peer: Mutex::default(),
            stays: Mutex::default(),
            rewritten: Mutex::default(),
        }
    }

    fn allocate(&self, size: u64) -> Result<(), Error> {
        let request = Request { stream: ProgramStream(0), ..World::request(self.region, size) };
        let addr = self.world.engine.allocate(request)?;
        self.more.lock().unwrap().push(addr);
        Ok(())
    }

    /// In a region that nobody pauses, for as much as the device has altogether but one chunk.
    pub fn allocate_elsewhere(&self) -> Result<(), Error> {
        let elsewhere = self.world.engine.region("elsewhere", policy(Backup::None))?;
        let addr = self.world.engine.allocate(World::request(elsewhere, 2 * CHUNK))?;
        self.more.lock().unwrap().push(addr);
        Ok(())
    }

    pub fn free(&self, addr: Addr) -> Result<(), Error> {
        self.world.engine.free(addr, false)?;
        self.freed.lock().unwrap().push(addr);
        Ok(())
    }

    fn visit(&self, on_paused: OnPaused) -> Result<(), Error> {
        self.world.engine.enter(self.region, on_paused)?;
        if self.world.engine.allocation(self.large).is_some() {
            let found = self.world.driver.peek(Device(0), self.large, 1);
            let still_there = self.world.engine.allocation(self.large).is_some();
            assert!(!still_there || found == Ok(vec![self.large_bytes[0]]), "inside, but {found:?}");
        }
        self.world.engine.leave(self.region);
        Ok(())
    }

    pub fn read_backup(&self) -> Result<(), Error> {
        let view = self.world.engine.backup(self.large, CHUNK + 1)?;
        if let Some(view) = view {
            // SAFETY: the view keeps `len` bytes at `ptr` valid.
            let bytes = unsafe { std::slice::from_raw_parts(view.ptr, view.len as usize) };
            assert_eq!(bytes, self.large_bytes);
        }
        Ok(())
    }

    /// A paused region holds no physical memory, but for what was kept resident: nothing slipped in behind the pause.
    fn check_paused_means_released(&self) {
        let stays = *self.stays.lock().unwrap() && self.world.engine.allocation(self.large).is_some();
        let kept = if stays { (CHUNK + 1).next_multiple_of(common::GRANULARITY) } else { 0 };
        let stats: serde_json::Value = serde_json::from_str(&self.world.engine.stats_json()).unwrap();
        for region in stats["regions"].as_array().unwrap() {
            let kept = if region["region"] == self.region.0 { kept } else { 0 };
            let held = kept + region["lazy_bytes"].as_u64().unwrap();
            assert!(region["state"] == "resident" || region["resident_bytes"] == held, "{region}");
        }
        if stays {
            assert_eq!(self.world.driver.peek(Device(0), self.large, CHUNK + 1).as_ref(), Ok(&self.large_bytes));
        }
    }

    fn keep_resident(&self) -> Result<(), Error> {
        self.world.engine.keep_resident(self.large)?;
        *self.stays.lock().unwrap() = true;
        Ok(())
    }

    pub fn limit_host(&self, limit: Option<u64>) {
        self.world.engine.configure(&|config| config.host_limit = limit);
    }

    /// The program has its memory back, changes it, and has it paused again. Nobody else pauses meanwhile.
    pub fn rewrite(&self) -> Result<(), Error> {
        self.world.engine.resume(&tag("a"), ResumeOptions::default())?;
        let bytes: Vec<u8> = self.large_bytes.iter().map(|byte| !byte).collect();
        self.world.driver.poke(Device(0), self.large, &bytes).unwrap();
        *self.rewritten.lock().unwrap() = Some(bytes);
        self.world.engine.pause(&tag("a"), PauseOptions::default()).map(drop)
    }

    pub fn trim(&self) -> Result<(), Error> {
        self.world.engine.trim();
        Ok(())
    }

    /// Whoever waits for a range, or has a stream wait for it, hears of it, or of the failure; so does whoever waits for the end.
    fn resume_behind(&self) -> Result<(), Error> {
        let progress = self.world.engine.resume_start(&Selection::All, ResumeOptions::default())?;
        assert_eq!(progress.wait_on((self.large, CHUNK + 1), PROGRAM, None), Ok(true));
        assert_eq!(progress.wait(self.large, CHUNK + 1, None), Ok(true));
        progress.finished(None).map(drop)
    }

    pub fn cancel(&self) -> Result<(), Error> {
        self.world.engine.cancel();
        Ok(())
    }

    fn look(&self) -> Result<(), Error> {
        assert!(self.world.engine.stats_json().starts_with('{'));
        Ok(())
    }

    /// Whoever was given access has it everywhere, in memory that was just then being made as well.
    fn check_peer(&self) {
        let Some(may) = *self.peer.lock().unwrap() else { return };
        if self.world.engine.state(self.region) == Ok(State::Paused) {
            return;
        }
        let more = self.more.lock().unwrap().clone();
        for addr in more.into_iter().chain([self.large, self.small]) {
            let live = self.world.engine.allocation(addr).is_some();
            let reads = self.world.driver.peek(Device(1), addr, 1).is_ok();
            assert!(!live || reads == may, "the peer reads {addr:?}: {reads}");
        }
    }

    fn allow_peer(&self) -> Result<(), Error> {
        self.world.engine.allow_peer(Device(0), Device(1))?;
        *self.peer.lock().unwrap() = Some(true);
        Ok(())
    }

    pub fn refuse_peer(&self) -> Result<(), Error> {
        self.world.engine.allow_peer(Device(0), Device(1))?;
        self.world.engine.refuse_peer(Device(0), Device(1))?;
        *self.peer.lock().unwrap() = Some(false);
        Ok(())
    }

    /// What must hold when both threads are done.
    pub fn check(self) {
        self.check_paused_means_released();
        self.check_peer();
        let Shared { mut world, more, freed, rewritten, large, .. } = self;
        if let Some(bytes) = rewritten.into_inner().unwrap() {
            world.twins.get_mut(&large).unwrap().bytes = bytes;
        }
        let freed = freed.into_inner().unwrap();
        for addr in &freed {
            assert!(world.twins.remove(addr).is_some(), "{addr:?} was freed twice");
        }
        for (addr, twin) in world.twins.iter_mut().filter(|(_, t)| world.policies[&t.region].backup == Backup::None) {
            let _ = addr;
            twin.promised = common::world::Which::None;
        }
        world.resume(&Selection::All).unwrap();
        world.check();
        for addr in more.into_inner().unwrap() {
            world.engine.free(addr, false).unwrap();
        }
        world.check_no_leak();
    }
}

pub const PRE_COPY: Operation = ("pre-copy", |s| s.world.engine.pre_copy(&tag("a"), false).map(drop));

pub type Operation = (&'static str, fn(&Shared) -> Result<(), Error>);

pub const OPERATIONS: [Operation; 17] = [
    ("pause", |s| s.world.engine.pause(&Selection::Tag("a".into()), PauseOptions::default()).map(drop)),
    ("pause one", |s| s.world.engine.pause(&Selection::Tag("a/b".into()), PauseOptions::default()).map(drop)),
    ("resume", |s| s.world.engine.resume(&Selection::All, ResumeOptions::default()).map(drop)),
    ("allocate", |s| s.allocate(CHUNK)),
    ("allocate small", |s| s.allocate(700)),
    ("free", |s| s.free(s.large)),
    ("free small", |s| s.free(s.small)),
    ("enter", |s| s.visit(OnPaused::Refuse)),
    ("enter and resume", |s| s.visit(OnPaused::Resume)),
    ("cancel", Shared::cancel),
    ("allow a peer", Shared::allow_peer),
    ("trim", Shared::trim),
    ("look", Shared::look),
    ("read the backup", Shared::read_backup),
    ("switch", |s| s.world.engine.switch(&tag("a"), &tag("c"), SwitchOptions::default()).map(drop)),
    ("resume in the background", Shared::resume_behind),
    ("keep resident", Shared::keep_resident),
];

pub const EXPECTED: [Status; 4] = [Status::Busy, Status::Paused, Status::Cancelled, Status::UnknownAddress];

pub fn run(shared: &Shared, (name, operation): Operation) {
    if let Err(error) = operation(shared) {
        assert!(EXPECTED.contains(&error.status), "{name}: {error}");
    }
}
