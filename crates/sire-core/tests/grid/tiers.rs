//! Tiers that lie: they refuse, cut short, damage, forget and panic, at every call in turn, one at a time and in pairs. Whatever
//! happens, no byte that had a backup is lost: a pause that fails leaves everything on the device or in host memory, a resume that
//! fails leaves everything paused, and both can be repeated.

use crate::common::GRANULARITY;
use crate::common::player::refusal;
use crate::common::world::{CHUNK, World, policy, tag};
use sire_core::driver::Addr;
use sire_core::engine::*;
use sire_core::error::{Error, Result, Status};
use sire_core::tier::{Room, Tier, conformance};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

/// How a call goes wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Lie {
    /// It says so.
    Refuse,
    /// It says that there is no room, in spite of what it promised.
    Full,
    /// A write keeps, or a read brings, only half, and nobody says so.
    Short,
    /// One bit is another.
    Damage,
    /// Nothing is done, and success is reported.
    Forget,
    Panic,
}

const LIES: [Lie; 6] = [Lie::Refuse, Lie::Full, Lie::Short, Lie::Damage, Lie::Forget, Lie::Panic];

#[derive(Debug, Default)]
struct Plan {
    calls: AtomicU64,
    lies: Mutex<BTreeMap<u64, Lie>>,
    used: AtomicU64,
}

impl Plan {
    /// Counts a call; what is to go wrong with it.
    fn next(&self) -> Option<Lie> {
        let number = self.calls.fetch_add(1, SeqCst) + 1;
        let lie = self.lies.lock().unwrap().remove(&number);
        assert!(lie != Some(Lie::Panic), "planned");
        lie
    }
}

/// A tier of byte vectors.
#[derive(Debug, Default)]
struct Liar(Arc<Plan>);

#[derive(Debug)]
struct Bytes {
    plan: Arc<Plan>,
    bytes: Mutex<Vec<u8>>,
    len: u64,
}

fn refused(what: &str) -> Error {
    Error::new(Status::BackupIo, format!("the liar will not {what}"))
}

impl Tier for Liar {
    fn name(&self) -> &'static str {
        "liar"
    }

    fn reserve(&self, len: u64) -> Result<Arc<dyn Room>> {
        if self.0.next().is_some() || len > 1 << 30 {
            return Err(refused("reserve"));
        }
        let len = len.next_multiple_of(64);
        self.0.used.fetch_add(len, SeqCst);
        Ok(Arc::new(Bytes { plan: Arc::clone(&self.0), bytes: Mutex::new(vec![0xEE; len as usize]), len }))
    }

    fn used(&self) -> u64 {
        self.0.used.load(SeqCst)
    }
}

impl Drop for Bytes {
    fn drop(&mut self) {
        self.plan.used.fetch_sub(self.len, SeqCst);
    }
}

impl Bytes {
    fn range(&self, at: u64, len: usize) -> Result<std::ops::Range<usize>> {
        let end = at.checked_add(len as u64).filter(|&end| end <= self.len).ok_or_else(|| refused("go outside"))?;
        Ok(at as usize..end as usize)
    }
}

/// Copies as the lie says.
fn copy(lie: Option<Lie>, from: &[u8], to: &mut [u8]) -> Result<()> {
    match lie {
        Some(Lie::Refuse) => return Err(refused("copy")),
        Some(Lie::Full) => return Err(Error::new(Status::OutOfBackupSpace, "the liar has no room, it says")),
        Some(Lie::Forget | Lie::Panic) => {}
        Some(Lie::Short) => to[..from.len() / 2].copy_from_slice(&from[..from.len() / 2]),
        Some(Lie::Damage) => {
            to.copy_from_slice(from);
            to[0] ^= 1;
        }
        None => to.copy_from_slice(from),
    }
    Ok(())
}

fn aligned(at: u64, bytes: &[u8]) -> bool {
    [at, bytes.len() as u64, bytes.as_ptr() as u64].iter().all(|number| number.is_multiple_of(64))
}

impl Room for Bytes {
    fn len(&self) -> u64 {
        self.len
    }

    fn place(&self) -> String {
        "the liar's memory".to_owned()
    }

    fn align(&self) -> u64 {
        64
    }

    fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        assert!(aligned(at, bytes));
        let range = self.range(at, bytes.len())?;
        copy(self.plan.next(), bytes, &mut self.bytes.lock().unwrap()[range])
    }

    fn read(&self, at: u64, into: &mut [u8]) -> Result<()> {
        assert!(aligned(at, into));
        let range = self.range(at, into.len())?;
        copy(self.plan.next(), &self.bytes.lock().unwrap()[range], into)
    }
}

#[test]
fn an_honest_liar_keeps_the_bargain() {
    conformance::suite(|| Arc::new(Liar::default()));
}

#[test]
fn more_tiers_than_can_be_named_are_refused() {
    let world = World::new(1 << 22);
    for number in 0..=u8::MAX {
        assert_eq!(world.engine.add_tier(Arc::new(Liar::default())).unwrap(), Backup::Tier(number));
    }
    let (status, message) = refusal(world.engine.add_tier(Arc::new(Liar::default())));
    assert_eq!((status, &*message), (Status::InvalidArgument, "there are 256 tiers from outside already"));
}

/// A region of three chunks and a slab, kept by a liar.
struct Life {
    world: World,
    plan: Arc<Plan>,
    addrs: Vec<Addr>,
}

impl Life {
    fn new() -> Life {
        Life::of(World::new(1 << 22), 2 * CHUNK + GRANULARITY + 100)
    }

    /// Large enough that threads do the work.
    fn large() -> Life {
        Life::of(World::with(1 << 23, 32 * GRANULARITY), (1 << 20) + 100)
    }

    fn of(mut world: World, size: u64) -> Life {
        let liar = Liar::default();
        let plan = Arc::clone(&liar.0);
        let backup = world.engine.add_tier(Arc::new(liar)).unwrap();
        let region = world.region("liar", policy(backup));
        let addrs: Vec<_> = [size, 600].map(|size| world.allocate(region, size).unwrap()).into();
        addrs.iter().for_each(|&addr| world.write(addr));
        Life { world, plan, addrs }
    }

    fn lie(&self, number: u64, lie: Lie) {
        self.plan.lies.lock().unwrap().insert(number, lie);
    }

    fn lies_left(&self) -> usize {
        self.plan.lies.lock().unwrap().len()
    }

    fn cycle(&mut self) -> Result<()> {
        self.world.pause(&tag("liar"))?;
        self.world.resume(&tag("liar")).map(drop)
    }
}

/// Lies that a write admits, and reads that go wrong once: everything comes back in the end.
#[test]
fn whatever_a_call_does_once_nothing_is_lost() {
    assert!(every_call_lies_once(Life::new, &LIES, 1) > 20);
}

#[test]
fn whatever_a_call_does_once_nothing_is_lost_by_threads_either() {
    assert!(every_call_lies_once(Life::large, &[Lie::Refuse, Lie::Damage, Lie::Panic], 4) > 16);
}

/// One call in `stride` does. Returns how many calls a life makes.
fn every_call_lies_once(new: fn() -> Life, lies: &[Lie], stride: usize) -> u64 {
    let mut calls = 0;
    for &lie in lies {
        for number in (1..).step_by(stride) {
            let mut life = new();
            life.lie(number, lie);
            let outcome = life.cycle();
            life.world.check();
            if life.lies_left() > 0 {
                outcome.unwrap();
                calls = number - 1;
                break;
            }
            settle(&mut life, lie, &outcome);
        }
    }
    calls
}

#[test]
fn whatever_two_calls_do_nothing_is_lost() {
    for first in 1..24 {
        for second in first + 1..first + 12 {
            for lie in [Lie::Refuse, Lie::Damage] {
                let mut life = Life::new();
                life.lie(first, Lie::Refuse);
                life.lie(second, lie);
                let outcome = life.cycle();
                life.world.check();
                if outcome.is_err() || lie == Lie::Damage {
                    settle(&mut life, lie, &outcome);
                }
            }
        }
    }
}

/// After a call went wrong: every later attempt either brings everything back, or says that the tier has damaged it and leaves it paused.
fn settle(life: &mut Life, lie: Lie, outcome: &Result<()>) {
    if life.world.states().values().any(|state| *state == State::Resident) {
        // The pause was refused, or the region is back.
        let _ = life.cycle();
    } else {
        let status = outcome.as_ref().unwrap_err().status;
        let full = lie == Lie::Full && status == Status::OutOfBackupSpace;
        assert!(full || matches!(status, Status::BackupIo | Status::Internal), "{status:?}");
    }
    let mut again = || life.world.resume(&tag("liar"));
    match again().or_else(|_| again()).or_else(|_| again()) {
        Ok(_) => life.world.check(),
        // Only a write that was reported as done, and was not, can end here.
        Err(error) => {
            assert!(!matches!(lie, Lie::Refuse | Lie::Full), "{error}");
            assert_eq!(error.status, Status::BackupIo, "{error}");
            assert!(error.message.contains("damaged"), "{error}");
            assert_eq!(life.world.resume(&tag("liar")).unwrap_err().status, Status::BackupIo, "it says so every time");
        }
    }
}

#[test]
fn a_pause_that_finds_no_room_changes_nothing() {
    let mut life = Life::new();
    life.lie(1, Lie::Refuse);
    assert_eq!(life.world.pause(&tag("liar")).unwrap_err().status, Status::BackupIo);
    life.world.check();
    life.cycle().unwrap();
    life.world.check();
}

#[test]
fn what_a_tier_refuses_goes_to_host_memory() {
    let mut life = Life::new();
    life.lie(3, Lie::Refuse);
    life.world.pause(&tag("liar")).unwrap();
    let stats: serde_json::Value = serde_json::from_str(&life.world.engine.stats_json()).unwrap();
    assert_eq!(stats["tiers"][0]["used_bytes"].as_u64().unwrap() / GRANULARITY, 1, "{}", stats["tiers"]);
    life.world.resume(&tag("liar")).unwrap();
    life.world.check();
}

/// The tier is full in the middle of a pause, and so is host memory.
#[test]
fn where_nobody_takes_a_byte_nothing_is_given_up() {
    for lie in [Lie::Full, Lie::Refuse] {
        let mut number = 2;
        loop {
            let mut life = Life::new();
            life.world.engine.configure(&|config| config.host_limit = Some(0));
            life.lie(number, lie);
            let outcome = life.world.pause(&tag("liar"));
            life.world.check();
            if life.lies_left() > 0 {
                outcome.unwrap();
                break;
            }
            let error = outcome.unwrap_err();
            assert_eq!(error.status, if lie == Lie::Full { Status::OutOfBackupSpace } else { Status::BackupIo });
            assert!(error.message.contains("the liar"), "{error}");
            assert!(life.world.states().values().all(|state| *state == State::Resident));
            life.cycle().unwrap();
            life.world.check();
            life.world.check_no_leak();
            number += 1;
        }
        assert!(number > 8, "only {number} calls");
    }
}

#[test]
fn room_is_given_back() {
    let mut life = Life::new();
    life.world.pause(&tag("liar")).unwrap();
    assert!(life.plan.used.load(SeqCst) > 2 * CHUNK);
    for addr in std::mem::take(&mut life.addrs) {
        life.world.free(addr).unwrap();
    }
    life.world.resume(&tag("liar")).unwrap();
    assert_eq!(life.plan.used.load(SeqCst), 0);
    life.world.check_no_leak();
}

#[test]
fn statistics_name_the_tier() {
    let life = Life::new();
    let stats: serde_json::Value = serde_json::from_str(&life.world.engine.stats_json()).unwrap();
    let names: Vec<_> = stats["tiers"].as_array().unwrap().iter().map(|tier| tier["tier"].as_str().unwrap()).collect();
    assert!(names.ends_with(&["liar"]) && names.starts_with(&["host", "disk"]), "{names:?}");
    assert_eq!(stats["regions"][0]["backup"], "liar");
}
