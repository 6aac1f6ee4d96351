//! A tier from outside: backups as objects in a bucket, the way an object store has them (whole objects, no appending, no
//! holes). The bucket here is a directory; another one replaces [`Bucket`] and nothing else. docs/add-a-tier.md explains it.
//!
//! `cargo run --example object_store -p sire-core` pauses a region of the software device into it, and resumes it.

use sire_core::driver::{Device, ProgramStream};
use sire_core::engine::{Config, Engine, PauseOptions, Policy, Request, ResumeOptions, Selection};
use sire_core::error::{Error, Result, Status};
use sire_core::tier::{Room, Tier};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::{fs, io};

/// What an object store can do.
#[derive(Debug)]
struct Bucket(PathBuf);

impl Bucket {
    fn path(&self, room: u64, at: u64) -> PathBuf {
        self.0.join(format!("room-{room}/at-{at}"))
    }

    /// All of an object or none of it: a reader never meets half a one.
    fn put(&self, room: u64, at: u64, bytes: &[u8]) -> io::Result<()> {
        let whole = self.path(room, at);
        let part = whole.with_extension("part");
        fs::create_dir_all(self.0.join(format!("room-{room}")))?;
        fs::write(&part, bytes)?;
        fs::rename(part, whole)
    }

    fn delete_all(&self, room: u64) {
        // What cannot be deleted costs space, and is nobody's backup any more.
        let _ = fs::remove_dir_all(self.0.join(format!("room-{room}")));
    }
}

/// The tier: hands out rooms until the quota is used up. An object store is never full, so the quota is what makes room certain.
#[derive(Debug)]
struct ObjectStore {
    bucket: Arc<Bucket>,
    quota: u64,
    used: Arc<AtomicU64>,
    rooms: AtomicU64,
}

impl Tier for ObjectStore {
    fn name(&self) -> &'static str {
        "object store"
    }

    fn reserve(&self, len: u64) -> Result<Arc<dyn Room>> {
        let more = |used: u64| used.checked_add(len).filter(|&sum| sum <= self.quota);
        let counted = self.used.fetch_update(Relaxed, Relaxed, more);
        counted.map_err(|used| {
            let message = format!("{len} bytes do not fit in the bucket: {used} of {} are taken", self.quota);
            Error::new(Status::OutOfBackupSpace, message)
        })?;
        let (bucket, used) = (Arc::clone(&self.bucket), Arc::clone(&self.used));
        Ok(Arc::new(Objects { bucket, used, number: self.rooms.fetch_add(1, Relaxed), len }))
    }

    fn used(&self) -> u64 {
        self.used.load(Relaxed)
    }
}

/// Room: each piece is an object, named by where it begins. The engine reads exactly what it wrote.
#[derive(Debug)]
struct Objects {
    bucket: Arc<Bucket>,
    used: Arc<AtomicU64>,
    number: u64,
    len: u64,
}

impl Objects {
    fn failed(&self, doing: &str, at: u64, len: usize, why: &dyn std::fmt::Display) -> Error {
        Error::new(Status::BackupIo, format!("cannot {doing} the {len} bytes at {at} of {}: {why}", self.place()))
    }

    fn check(&self, doing: &str, at: u64, len: usize) -> Result<()> {
        let inside = at.checked_add(len as u64).is_some_and(|end| end <= self.len);
        if inside { Ok(()) } else { Err(self.failed(doing, at, len, &"they are not inside the room")) }
    }
}

impl Room for Objects {
    fn len(&self) -> u64 {
        self.len
    }

    fn place(&self) -> String {
        format!("room {} in the bucket {}", self.number, self.bucket.0.display())
    }

    fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        self.check("put", at, bytes.len())?;
        self.bucket.put(self.number, at, bytes).map_err(|e| self.failed("put", at, bytes.len(), &e))
    }

    fn read(&self, at: u64, into: &mut [u8]) -> Result<()> {
        self.check("get", at, into.len())?;
        let object = fs::read(self.bucket.path(self.number, at)).map_err(|e| self.failed("get", at, into.len(), &e))?;
        if object.len() != into.len() {
            return Err(self.failed("get", at, into.len(), &format!("the object has {}", object.len())));
        }
        into.copy_from_slice(&object);
        Ok(())
    }
}

impl Drop for Objects {
    fn drop(&mut self) {
        self.bucket.delete_all(self.number);
        self.used.fetch_sub(self.len, Relaxed);
    }
}

fn store(dir: &std::path::Path) -> Arc<dyn Tier> {
    let bucket = Arc::new(Bucket(dir.to_path_buf()));
    Arc::new(ObjectStore { bucket, quota: 1 << 30, used: Arc::default(), rooms: AtomicU64::new(0) })
}

#[test]
fn keeps_the_bargain() {
    let dir = tempfile::tempdir().unwrap_or_else(|e| unreachable!("{e}"));
    sire_core::tier::conformance::suite(|| store(dir.path()));
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let dir = tempfile::tempdir()?;
    let engine = Engine::new(Arc::new(sire_sim::SimDriver::new(sire_sim::Options::default())?), Config::default());
    let backup = engine.add_tier(store(dir.path()))?;
    let region = engine.region("weights", Policy { backup, ..Policy::default() })?;
    engine.allocate(Request {
        region,
        device: Device(0),
        size: 16 << 20,
        stream: ProgramStream(0),
        capturing: false,
    })?;
    let tag = Selection::Tag("weights".to_owned());
    println!("{:?}", engine.pause(&tag, PauseOptions::default())?);
    println!("{} objects in the bucket", fs::read_dir(dir.path().join("room-0"))?.count());
    println!("{:?}", engine.resume(&tag, ResumeOptions::default())?);
    Ok(())
}
