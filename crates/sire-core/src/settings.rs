//! The engine's settings as it uses them: sizes are fixed at the start, limits may change at any time.

use crate::sync::{Mutex, lock};
use crate::terms::Config;
use std::path::PathBuf;

/// See the [module documentation](self).
#[derive(Debug)]
pub(crate) struct Settings {
    /// Physical chunk size wanted for large allocations.
    pub(crate) chunk: u64,
    /// Allocations below this are small.
    pub(crate) small: u64,
    /// Largest copy queued at once.
    pub(crate) copy_piece: u64,
    config: Mutex<Config>,
}

impl Settings {
    /// Takes over a configuration.
    pub(crate) fn new(config: Config) -> Settings {
        let (chunk, small, copy_piece) = (config.chunk.max(1), config.small, config.copy_piece.max(4096));
        Settings { chunk, small, copy_piece, config: Mutex::new(config) }
    }

    /// Applies a change; sizes stay as they are.
    pub(crate) fn change(&self, change: &dyn Fn(&mut Config)) {
        change(&mut lock(&self.config));
    }

    /// Device memory to leave free.
    pub(crate) fn margin(&self) -> u64 {
        lock(&self.config).margin
    }

    /// Most host memory for backups.
    pub(crate) fn host_limit(&self) -> Option<u64> {
        lock(&self.config).host_limit
    }

    /// Where disk backups go.
    pub(crate) fn disk_dir(&self) -> Option<PathBuf> {
        lock(&self.config).disk_dir.clone()
    }
}
