//! The program's own map of its blocks: what it holds free is neither copied nor restored, everything else is.

use crate::common::GRANULARITY;
use crate::common::world::{CHUNK, World, policy, tag};
use sire_core::driver::Addr;
use sire_core::engine::*;
use sire_core::error::{Error, Status};

/// Holes below this are copied with what is around them.
const GAP: u64 = GRANULARITY;
const SIZE: u64 = 64 * GAP;

fn world(backup: Backup) -> (World, Addr) {
    let mut world = World::new(1 << 30);
    let region = world.region("pool", policy(backup));
    let addr = world.allocate(region, SIZE).unwrap();
    world.write(addr);
    (world, addr)
}

#[test]
fn dead_bytes_are_neither_copied_nor_counted_as_discarded() {
    for backup in [Backup::Host, Backup::Disk] {
        let (mut world, addr) = world(backup);
        let dead = [(addr.offset(5 * GAP), 7 * GAP), (addr.offset(40 * GAP), 9 * GAP + 13)];
        let report = world.pause_without(&tag("pool"), &dead).unwrap();
        let bytes = 16 * GAP + 13;
        assert_eq!((report.bytes_dead, report.bytes_discarded), (bytes, 0));
        assert_eq!(report.bytes_copied, SIZE - bytes);
        assert_eq!((report.bytes_moved, world.driver.used_bytes()), (SIZE, 0), "dead memory is released too");
        assert_eq!(world.resume(&tag("pool")).unwrap().bytes_copied, SIZE - bytes);
        world.check();
        world.write(addr);
        assert_eq!(world.pause(&tag("pool")).unwrap().bytes_copied, SIZE, "the next pause asks anew");
        world.resume(&tag("pool")).unwrap();
        world.check();
        world.check_no_leak();
    }
}

#[test]
fn without_a_backup_dead_bytes_are_not_among_the_discarded() {
    let (mut world, addr) = world(Backup::None);
    let report = world.pause_without(&tag("pool"), &[(addr, 10 * GAP)]).unwrap();
    assert_eq!((report.bytes_dead, report.bytes_discarded), (10 * GAP, SIZE - 10 * GAP));
}

#[test]
fn small_holes_are_copied_with_their_neighbours() {
    let (mut world, addr) = world(Backup::Host);
    let dead: Vec<(Addr, u64)> = (0..64).map(|i| (addr.offset(i * GAP), GAP - 1)).collect();
    let report = world.pause_without(&tag("pool"), &dead).unwrap();
    assert_eq!((report.bytes_dead, report.bytes_copied), (0, SIZE));
}

#[test]
fn neighbours_overlaps_and_strangers_are_understood() {
    let (mut world, addr) = world(Backup::Host);
    let other = world.region("other", policy(Backup::Host));
    let stranger = world.allocate(other, SIZE).unwrap();
    world.write(stranger);
    let dead = [
        (addr.offset(SIZE - GAP), u64::MAX),
        (addr.offset(GAP / 2), GAP / 2),
        (addr, GAP / 2),
        (addr, GAP),
        (stranger, SIZE),
        (Addr(0), 4096),
        (addr.offset(30 * GAP), 0),
    ];
    let report = world.pause_without(&tag("pool"), &dead[1..5]).unwrap();
    assert_eq!(report.bytes_dead, GAP, "another region's memory is not this one's");
    world.resume(&tag("pool")).unwrap();
    let report = world.engine.pause(&tag("pool"), with(&crate::common::world::Dead(dead.to_vec()))).unwrap();
    assert_eq!(report.bytes_dead, 2 * GAP);
    world.engine.pause(&tag("other"), PauseOptions::default()).unwrap();
    world.engine.resume(&Selection::All, ResumeOptions::default()).unwrap();
    let found = world.driver.peek(sire_core::driver::Device(0), stranger, SIZE).unwrap();
    world.twins[&stranger].assert_equal(stranger, &found);
}

fn with(dead: &dyn DeadRanges) -> PauseOptions<'_> {
    PauseOptions { dead: Some(dead), ..PauseOptions::default() }
}

/// A map that cannot be taken.
#[derive(Debug)]
struct Broken;

impl DeadRanges for Broken {
    fn dead_ranges(&self, regions: &[RegionId]) -> Result<Vec<(Addr, u64)>, Error> {
        Err(Error::new(Status::Cancelled, format!("no map of {regions:?}")))
    }
}

#[test]
fn a_map_that_cannot_be_taken_refuses_the_pause_and_changes_nothing() {
    let (mut world, addr) = world(Backup::Host);
    let error = world.engine.pause(&tag("pool"), with(&Broken)).unwrap_err();
    assert_eq!(error.status, Status::Cancelled);
    assert_eq!(world.engine.state(RegionId(0)), Ok(State::Resident));
    world.check();
    world.write(addr);
    world.pause(&tag("pool")).unwrap();
    assert!(world.engine.pause(&tag("pool"), with(&Broken)).is_ok(), "what is paused is not asked about");
    world.resume(&tag("pool")).unwrap();
    world.check();
}

/// A program that gives memory back while it is being asked, and looks whether anything is closed.
#[derive(Debug)]
struct Frees<'a> {
    engine: &'a Engine,
    addr: Addr,
}

impl DeadRanges for Frees<'_> {
    fn dead_ranges(&self, regions: &[RegionId]) -> Result<Vec<(Addr, u64)>, Error> {
        assert_eq!(regions, [RegionId(0)]);
        self.engine.free(self.addr, false)?;
        let refused = self.engine.allocate(World::request(RegionId(0), GRANULARITY)).unwrap_err();
        assert_eq!(refused.status, Status::Paused, "the region is closed while the map is taken");
        assert_eq!(self.engine.enter(RegionId(0), OnPaused::Refuse).unwrap_err().status, Status::Paused);
        Ok(Vec::new())
    }
}

#[test]
fn memory_can_be_freed_while_the_map_is_taken_and_nothing_be_allocated() {
    let (mut world, addr) = world(Backup::Host);
    let stays = world.allocate(RegionId(0), CHUNK).unwrap();
    world.write(stays);
    let report = world.engine.pause(&tag("pool"), with(&Frees { engine: &world.engine, addr })).unwrap();
    world.twins.remove(&addr);
    assert_eq!((report.allocations, report.bytes_moved), (1, CHUNK), "only what is left is paused");
    world.resume(&tag("pool")).unwrap();
    world.check();
    world.check_no_leak();
}
