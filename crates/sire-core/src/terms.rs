//! The engine's vocabulary: what callers say and what they are told. Plain data, no behaviour.

use crate::driver::{Addr, Device, ProgramStream};
use crate::error::Result;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// A region: one (tag, policy). Dense, never reused within a process.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, serde::Serialize)]
#[serde(transparent)]
pub struct RegionId(pub u32);

/// Where a region's content goes while it is paused.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backup {
    /// Nowhere: the content is thrown away.
    #[default]
    None,
    /// Host memory.
    Host,
    /// A private file.
    Disk,
    /// A file of the program's that holds the bytes already, where that was said and proven; host memory for the rest.
    File,
    /// A file of the program's for what it holds already, where that was said and proven. For the rest host memory, as long as there is room; then
    /// the disk, for what was used least recently.
    Auto,
    /// A tier from outside, as [`Engine::add_tier`](crate::engine::Engine::add_tier) numbered it.
    Tier(u8),
}

/// What a pause may conclude from a backup that an earlier pause made and that was retained. Memory without such a backup (it
/// is new, was freed and given out again, was not kept before) is always copied.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Clean {
    /// Nothing: every pause copies.
    #[default]
    No,
    /// The program promises that it does not write to what was backed up (weights), or says so with
    /// [`Engine::changed`](crate::engine::Engine::changed): nothing is copied again.
    Declared,
    /// Each page is compared by a 128-bit hash; what differs is copied. Where the driver cannot hash: as `Paranoid`.
    Verified,
    /// Each page is compared byte by byte; what differs is copied.
    Paranoid,
}

/// What a region promises about its content.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct Policy {
    /// Where the content goes.
    pub backup: Backup,
    /// Whether bytes that were not backed up read as zero after resume (else they are undefined).
    pub zero_fill: bool,
    /// Whether the backup's space stays allocated after resume, for the next pause.
    pub retain: bool,
    /// Whether the retained backup may stand for content that has not changed; anything but `No` retains it.
    pub clean: Clean,
    /// Whether the backup's host memory is left pageable: it does not count against what a process may lock, but copies are slower.
    pub pageable: bool,
    /// Whether each large allocation is one physical of its size, and no chunks: for memory that is registered with others by what the driver says of a
    /// pointer. A pause gives it back as a whole when all of it is saved.
    pub whole: bool,
}

/// Whether backups on the disk are compressed, in the background after a pause.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Compress {
    /// Never.
    #[default]
    No,
    /// Where a read then takes no longer: bytes and times of a few records decide.
    IfItPays,
    /// Wherever bytes are saved.
    Always,
}

/// What was done in the background. Bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Serialize)]
pub struct Tended {
    /// Moved from host memory to the disk.
    pub bytes_demoted: u64,
    /// Compressed, as they were before.
    pub bytes_compressed: u64,
    /// Room on the disk that is free for it.
    pub bytes_saved: u64,
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

/// What becomes of host memory that no backup uses any more.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Retention {
    /// As much stays as was ever in use at once; [`Engine::trim`](crate::engine::Engine::trim) gives it back.
    Retain,
    /// As much stays as was in use at once in one of the last four rounds of pause and resume, so that the next pause need not bring it in
    /// again; but no more than the machine has available beside it.
    #[default]
    Shrink,
    /// All of it goes back to the system at the end of each resume.
    Release,
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
    /// What becomes of host memory that no backup uses any more (default: [`Retention::Shrink`]).
    pub host_policy: Retention,
    /// Host memory that is brought in and registered in the background before the first pause, and kept (default: 0).
    pub host_reserve: u64,
    /// Host memory is brought in and registered in units of this size (default 32 MiB), fixed at the start.
    pub host_unit: u64,
    /// Threads that bring host memory in behind the first copies (default: one per CPU, at most 4), fixed at the start. With 0 each copy brings in
    /// what it needs.
    pub host_threads: usize,
    /// Whether host memory for backups is taken from the NUMA node that is nearest to the device (default: where the machine has several).
    pub host_nodes: bool,
    /// Most bytes of disk that backups may hold (default: no limit but the file system's).
    pub disk_limit: Option<u64>,
    /// Directory of disk backups (default: `sire-<uid>` in the system's temporary directory, mode 0700).
    pub disk_dir: Option<PathBuf>,
    /// Whether host backups of clean regions are kept once for all processes of this user that say so, too (default: no).
    pub shared_backups: bool,
    /// Directory in which such processes find each other (default: `sire-<uid>` in `/dev/shm`, mode 0700). It holds no backup.
    pub shared_dir: Option<PathBuf>,
    /// Whether a thread of the engine's own tends backups after a pause (default: yes): moves automatic ones out of scarce host
    /// memory, compresses those on the disk. If not, [`Engine::tend`](crate::engine::Engine::tend) does it when it is called.
    pub tends: bool,
    /// Whether disk backups are compressed after the pause (default: no).
    pub disk_compress: Compress,
    /// Whether requests to files go through the kernel's own queue, io_uring, where it allows that (default: yes). If not, each has a thread.
    pub io_uring: bool,
    /// What is queued on a lane between a device and host memory, in two copies (default 4 MiB): half of it while other calls wait for the device, up to four times
    /// of it when a pass has come on without one. And the largest record of a tier.
    pub copy_piece: u64,
    /// Bytes of device memory that pause/resume/allocate leave free (default 0).
    pub margin: u64,
    /// Whether paused addresses of regions without a backup lead to a shared dummy, one granule of each device, so that a kernel that uses them by mistake
    /// does not end the context (default: no).
    pub dummies: bool,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            chunk: 64 << 20,
            small: 1 << 20,
            host_limit: None,
            host_policy: Retention::default(),
            host_reserve: 0,
            host_unit: 32 << 20,
            host_threads: std::thread::available_parallelism().map_or(1, std::num::NonZero::get).min(4),
            host_nodes: crate::tier::memory::has_nodes(),
            disk_limit: None,
            disk_dir: None,
            shared_backups: false,
            shared_dir: None,
            tends: true,
            disk_compress: Compress::No,
            io_uring: true,
            copy_piece: 4 << 20,
            margin: 0,
            dummies: false,
        }
    }
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

/// When freed memory of a cache can be given out again.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Reuse {
    /// To work that is submitted to the same stream later, and at once; other streams that used it were named
    /// ([`Engine::record_stream`](crate::engine::Engine::record_stream)).
    #[default]
    InStreamOrder,
    /// When everything that was submitted to the device before the free is done: who frees does not say which streams used it.
    AfterDevice,
}

/// Which regions a call means.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Selection {
    /// All of them.
    All,
    /// The tag, and what is under it: `model` means `model` and `model/weights`.
    Tag(String),
    /// These, and nothing that lies under their tags. In another order, or twice, they mean the same; none is nothing to do.
    Exact(Vec<RegionId>),
}

/// What the program's own allocator (such as PyTorch's) knows about memory that it got from Sire: which of it holds nothing.
pub trait DeadRanges: Send + Sync + std::fmt::Debug {
    /// Addresses `[start, start + bytes)` in the `regions` whose content nobody needs: neither copied nor restored.
    /// Asked once per pause, when the regions are closed (nobody is inside, none can enter, nothing is allocated there)
    /// and before anything is planned; no lock is held, and memory of the regions may be freed meanwhile. What lies
    /// outside the regions is ignored.
    ///
    /// # Errors
    /// Any: the pause is then refused with it, and nothing has changed.
    fn dead_ranges(&self, regions: &[RegionId]) -> Result<Vec<(Addr, u64)>>;
}

/// Settings of one pause.
#[derive(Clone, Copy, Debug, Default)]
pub struct PauseOptions<'a> {
    /// Whether a capture is in progress: then the call is refused.
    pub capturing: bool,
    /// Who knows which memory of the regions holds nothing (default: all of it counts).
    pub dead: Option<&'a dyn DeadRanges>,
    /// Whether physical memory stays until somebody needs it, so that a resume before that costs nothing (default: it goes at once).
    pub lazy: bool,
    /// Whether content of regions without a backup is kept as well, in host memory (default: it is thrown away). For pauses that the program
    /// did not ask for, and of which it knows nothing.
    pub keep_all: bool,
    /// Whether the caller vouches that no work that a device was given uses the memory any more: then devices are not waited for (default:
    /// they are).
    pub idle: bool,
}

/// Settings of one resume.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ResumeOptions<'a> {
    /// How long to wait for device memory that somebody else still holds (default: not at all).
    pub wait: Duration,
    /// Whether a capture is in progress: then the call is refused.
    pub capturing: bool,
    /// (Start, bytes) of memory in the order in which it is to come back, chunk by chunk; what is not named comes last.
    pub order: Option<&'a [(Addr, u64)]>,
}

/// Settings of one switch.
#[derive(Clone, Copy, Debug, Default)]
pub struct SwitchOptions<'a> {
    /// Whether a capture is in progress: then the call is refused.
    pub capturing: bool,
    /// As for a pause, about what is paused.
    pub dead: Option<&'a dyn DeadRanges>,
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
    /// Physical bytes that changed hands within a switch, without the driver.
    pub bytes_recycled: u64,
    /// Physical bytes that stay until somebody needs them (lazy pause).
    pub bytes_lazy: u64,
    /// Physical bytes that stay because the program has handed them out, or keeps them resident (pause).
    pub bytes_held: u64,
    /// Bytes copied to or from backups.
    pub bytes_copied: u64,
    /// Bytes whose content was thrown away (pause).
    pub bytes_discarded: u64,
    /// Bytes that an earlier pause had backed up and that had not changed: nothing was copied (pause).
    pub bytes_clean: u64,
    /// Bytes that were hashed or compared to find out (pause).
    pub bytes_hashed: u64,
    /// Bytes that were found to repeat one 8-byte pattern and take no room in a backup (pause); bytes filled with one (resume).
    pub bytes_constant: u64,
    /// Bytes that another backup of this process has already, page by page, and that share its room (pause).
    pub bytes_shared: u64,
    /// Bytes filled with zeros (resume).
    pub bytes_zeroed: u64,
    /// Bytes that the program's own allocator holds free: neither copied nor counted as discarded (pause).
    pub bytes_dead: u64,
    /// Finding, checking, reserving room for backups.
    pub seconds_prepare: f64,
    /// Waiting for the devices.
    pub seconds_synchronize: f64,
    /// Copies and virtual-memory calls, overlapped.
    pub seconds_transfer: f64,
    /// The whole call.
    pub seconds_total: f64,
}

impl Report {
    /// Adds the bytes of a part of the same call.
    pub(crate) fn add(&mut self, part: &Report) {
        self.bytes_moved += part.bytes_moved;
        self.bytes_recycled += part.bytes_recycled;
        self.bytes_copied += part.bytes_copied;
        self.bytes_zeroed += part.bytes_zeroed;
        self.bytes_constant += part.bytes_constant;
    }
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

impl std::fmt::Debug for BackupView {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BackupView").field("ptr", &self.ptr).field("len", &self.len).finish_non_exhaustive()
    }
}
