//! The engine's settings as it uses them: sizes are fixed at the start, limits may change at any time.

use crate::sync::{Mutex, lock};
use crate::terms::{Compress, Config, Retention};
use std::path::PathBuf;

/// Larger sizes mean "all of it"; they are cut so that rounding them up cannot overflow.
const LARGEST_CHUNK: u64 = 1 << 44;
/// A slab has room for eight of these and counts their bytes in 32 bits; two staging buffers must fit in host memory.
const LARGEST_PIECE: u64 = 1 << 30;

/// Copies under way at once on a lane.
pub(crate) const IN_FLIGHT: usize = 2;
/// The longest page of content.
const PAGE: u64 = 2 << 20;
/// The longest record of content whose pages nobody knows. With eight under way and two being copied, what goes through staging buffers stays in the
/// processor's cache, out of which it is summed and sent on (`scripts/bench --only disk`).
const RECORD: u64 = 1 << 20;
/// Beyond this many threads memory comes in no faster.
const MOST_THREADS: usize = 32;

/// See the [module documentation](self).
#[derive(Debug)]
pub(crate) struct Settings {
    /// Physical chunk size wanted for large allocations.
    pub(crate) chunk: u64,
    /// Allocations below this are small.
    pub(crate) small: u64,
    /// What is under way on a lane at first.
    pub(crate) copy_piece: u64,
    /// Host memory is brought in and registered in units of this size, a multiple of the page size.
    pub(crate) host_unit: u64,
    /// Threads that do so behind the first copies.
    pub(crate) host_threads: usize,
    config: Mutex<Config>,
}

impl Settings {
    /// Takes over a configuration.
    pub(crate) fn new(config: Config) -> Settings {
        let (chunk, small) = (config.chunk.clamp(1, LARGEST_CHUNK), config.small.min(LARGEST_PIECE));
        let copy_piece = config.copy_piece.clamp(4096, LARGEST_PIECE).next_multiple_of(4096);
        let host_unit = config.host_unit.clamp(4096, LARGEST_PIECE).next_multiple_of(4096);
        let host_threads = config.host_threads.min(MOST_THREADS);
        Settings { chunk, small, copy_piece, host_unit, host_threads, config: Mutex::new(config) }
    }

    /// Content is judged by pages of this length, a multiple of 16.
    pub(crate) fn page(&self) -> u64 {
        PAGE.min(self.copy_piece) & !15
    }

    /// What goes to a tier is cut into records of this length; known pages are records of their own.
    pub(crate) fn record(&self) -> u64 {
        RECORD.min(self.copy_piece)
    }

    /// The longest record that there can be.
    pub(crate) fn staged(&self) -> u64 {
        self.page().max(self.record())
    }

    /// Applies a change; sizes stay as they are.
    pub(crate) fn change(&self, change: &dyn Fn(&mut Config)) {
        change(&mut lock(&self.config));
    }

    /// Device memory to leave free.
    pub(crate) fn margin(&self) -> u64 {
        lock(&self.config).margin
    }

    /// Whether backups are kept near their device.
    pub(crate) fn host_nodes(&self) -> bool {
        lock(&self.config).host_nodes
    }

    /// Whether a dummy lies behind paused addresses of what was thrown away.
    pub(crate) fn dummies(&self) -> bool {
        lock(&self.config).dummies
    }

    /// Most host memory for backups.
    pub(crate) fn host_limit(&self) -> Option<u64> {
        lock(&self.config).host_limit
    }

    /// What becomes of host memory that nobody uses, and how much of it is kept in any case.
    pub(crate) fn host_keeping(&self) -> (Retention, u64) {
        let config = lock(&self.config);
        (config.host_policy, config.host_reserve)
    }

    /// Most bytes of disk backups.
    pub(crate) fn disk_limit(&self) -> Option<u64> {
        lock(&self.config).disk_limit
    }

    /// Whether a thread tends backups.
    pub(crate) fn tends(&self) -> bool {
        lock(&self.config).tends
    }

    /// Whether disk backups are compressed.
    pub(crate) fn compress(&self) -> Compress {
        lock(&self.config).disk_compress
    }

    /// Whether the kernel's own queue may be used for files.
    pub(crate) fn io_uring(&self) -> bool {
        lock(&self.config).io_uring
    }

    /// Whether clean host backups are shared between processes.
    pub(crate) fn shares(&self) -> bool {
        lock(&self.config).shared_backups
    }

    /// Where processes that share find each other.
    pub(crate) fn shared_dir(&self) -> Option<PathBuf> {
        lock(&self.config).shared_dir.clone()
    }

    /// Where disk backups go.
    pub(crate) fn disk_dir(&self) -> Option<PathBuf> {
        lock(&self.config).disk_dir.clone()
    }
}
