//! The engine's face: allocate, free, pause, resume, and what can be asked about them.
//!
//! CONTRACT FIRST: signatures below are agreed between crates; bodies are to be written.

use crate::driver::{Addr, Device, Driver, ProgramStream};
use crate::error::Result;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// A region: one (tag, policy). Dense, never reused within a process.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, serde::Serialize)]
#[serde(transparent)]
pub struct RegionId(pub u32);

/// Where a region's content goes while it is paused.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Backup {
    /// Nowhere: the content is thrown away.
    #[default]
    None,
    /// Host memory.
    Host,
    /// A private file.
    Disk,
}

/// What a region promises about its content.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, serde::Serialize)]
pub struct Policy {
    /// Where the content goes.
    pub backup: Backup,
    /// Whether bytes that were not backed up read as zero after resume (else they are undefined).
    pub zero_fill: bool,
    /// Whether the backup's space stays allocated after resume, for the next pause.
    pub retain: bool,
}

/// What entering a paused region does.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum OnPaused {
    /// It is an error (`Paused`).
    #[default]
    Refuse,
    /// The region is resumed first.
    Resume,
}

/// Engine-wide settings. Sizes in bytes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Config {
    /// Physical chunk size of large allocations (default 64 MiB); rounded up to the granularity.
    pub chunk: u64,
    /// Allocations below this go to shared slabs (default 1 MiB).
    pub small: u64,
    /// Most bytes of host memory that backups may hold (default: no limit but the machine's and the cgroup's).
    pub host_limit: Option<u64>,
    /// Directory of disk backups (default: `sire-<uid>` in the system's temporary directory, mode 0700).
    pub disk_dir: Option<PathBuf>,
    /// Largest copy that is queued at once (default 4 MiB); two are in flight.
    pub copy_piece: u64,
    /// Bytes of device memory that pause/resume/allocate leave free (default 0).
    pub margin: u64,
}

/// A request for memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Request {
    /// The region it belongs to.
    pub region: RegionId,
    /// Where.
    pub device: Device,
    /// Bytes, more than 0.
    pub size: u64,
    /// The stream that the program will first use it on (slabs are kept per stream).
    pub stream: ProgramStream,
    /// Whether a capture is in progress in this process: then nothing is synchronised.
    pub capturing: bool,
}

/// Which regions a call means.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Selection {
    /// All of them.
    All,
    /// The tag, and what is under it: `model` means `model` and `model/weights`.
    Tag(String),
}

/// Settings of one pause.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PauseOptions {
    /// Whether a capture is in progress: then the call is refused.
    pub capturing: bool,
}

/// Settings of one resume.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ResumeOptions {
    /// How long to wait for device memory that somebody else still holds (default: not at all).
    pub wait: Duration,
    /// Whether a capture is in progress: then the call is refused.
    pub capturing: bool,
}

/// What a pause or resume did. Bytes are device bytes; times are wall-clock seconds.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct Report {
    /// Regions whose state the call changed.
    pub regions_changed: u32,
    /// Regions that were already in the wanted state.
    pub regions_unchanged: u32,
    /// Allocations in the changed regions.
    pub allocations: u64,
    /// Physical bytes that the changed regions hold when resident.
    pub bytes_expected: u64,
    /// Physical bytes given back to (pause) or taken from (resume) the driver.
    pub bytes_moved: u64,
    /// Bytes copied to or from backups.
    pub bytes_copied: u64,
    /// Bytes whose content was thrown away (pause).
    pub bytes_discarded: u64,
    /// Bytes filled with zeros (resume).
    pub bytes_zeroed: u64,
    /// Finding, checking, reserving room for backups.
    pub seconds_prepare: f64,
    /// Waiting for the devices.
    pub seconds_synchronize: f64,
    /// Copies and virtual-memory calls, overlapped.
    pub seconds_transfer: f64,
    /// The whole call.
    pub seconds_total: f64,
}

/// A region's lasting state.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Memory is there.
    Resident,
    /// Addresses are kept, memory is not there.
    Paused,
}

/// The bytes of one allocation's host backup, kept alive by this value.
pub struct BackupView {
    /// Start of the copy in host memory.
    pub ptr: *const u8,
    /// Bytes.
    pub len: u64,
    /// Keeps `ptr` valid.
    pub keep: Arc<dyn std::any::Any + Send + Sync>,
}

/// The engine: one per process. All functions may be called from any thread.
#[derive(Debug)]
pub struct Engine {
    _driver: Arc<dyn Driver>,
}

#[allow(unused_variables, clippy::todo, missing_docs, clippy::missing_errors_doc)]
impl Engine {
    pub fn new(driver: Arc<dyn Driver>, config: Config) -> Engine { Engine { _driver: driver } }

    /// The region for (tag, policy), made if there is none. Tags are paths of `/`-separated, non-empty
    /// segments without NUL, at most 255 bytes.
    pub fn region(&self, tag: &str, policy: Policy) -> Result<RegionId> { todo!() }
    /// The calling thread goes inside: a pause of the region is refused until it leaves. Counted.
    pub fn enter(&self, region: RegionId, on_paused: OnPaused) -> Result<()> { todo!() }
    pub fn leave(&self, region: RegionId) { todo!() }
    pub fn state(&self, region: RegionId) -> Result<State> { todo!() }

    /// `OutOfDeviceMemory` if there is no room; `Paused` if the region is paused.
    pub fn allocate(&self, request: Request) -> Result<Addr> { todo!() }
    /// Whether the address lies in memory of ours. Wait-free, never a lock.
    pub fn owns(&self, addr: Addr) -> bool { todo!() }
    /// `(base, size)` of the allocation that holds `addr`.
    pub fn allocation(&self, addr: Addr) -> Option<(Addr, u64, Device, RegionId)> { todo!() }
    /// `addr` must be an allocation's base. Waits for the device before pages go (unless capturing or mid-transition).
    pub fn free(&self, addr: Addr, capturing: bool) -> Result<()> { todo!() }

    pub fn pause(&self, selection: &Selection, options: PauseOptions) -> Result<Report> { todo!() }
    pub fn resume(&self, selection: &Selection, options: ResumeOptions) -> Result<Report> { todo!() }
    /// Makes a running pause or resume stop at the next chunk and roll back. Async-signal-safe.
    pub fn cancel(&self) { todo!() }

    /// Overrides the region's policy for a byte range of one allocation: back it up / throw it away.
    pub fn keep(&self, addr: Addr, len: u64) -> Result<()> { todo!() }
    pub fn discard(&self, addr: Addr, len: u64) -> Result<()> { todo!() }
    /// The host backup of `[addr, addr + len)`, inside one allocation; None if there is none.
    pub fn backup(&self, addr: Addr, len: u64) -> Result<Option<BackupView>> { todo!() }

    /// Gives `peer` access to present and future memory on `device`.
    pub fn allow_peer(&self, device: Device, peer: Device) -> Result<()> { todo!() }
    /// Changes settings that can change at run time (`host_limit`, `disk_dir`, `margin`).
    pub fn configure(&self, change: &dyn Fn(&mut Config)) { todo!() }
    /// Everything observable, as a JSON object (schema in docs/abi.md).
    pub fn stats_json(&self) -> String { todo!() }
    /// Frees what is only cached: retained backups, arena slack, empty slabs. Returns (device bytes, host bytes).
    pub fn trim(&self) -> (u64, u64) { todo!() }
}
