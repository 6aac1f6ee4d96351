//! What a program has of a GPU. NVML's figures of it and its descendants say it exactly. Where NVML lists nobody who is known here, as in a container,
//! it is what the device has in use beyond the least since the beginning: right as long as nobody else comes or goes.

use std::collections::HashMap;
use std::path::Path;

use super::nvml::Gpu;
use super::watched;

/// Where figures are from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// NVML's figures of processes.
    Processes,
    /// What the device has in use altogether.
    Device,
}

impl Source {
    /// As JSON has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Processes => "processes",
            Self::Device => "device",
        }
    }
}

/// The bytes of one GPU that this process's descendants have.
pub struct Gauge<'a> {
    gpu: &'a Gpu,
    /// In use by everybody, at least.
    least: Option<u64>,
    /// Of the processes once somebody was listed who is known here.
    pub source: Source,
    /// The most so far, by that source.
    pub peak: u64,
}

impl<'a> Gauge<'a> {
    /// To be made before the program begins.
    pub fn of(gpu: &'a Gpu) -> Self {
        let mut gauge = Self { gpu, least: in_use(gpu), source: Source::Device, peak: 0 };
        gauge.listen(&gpu.processes());
        gauge
    }

    /// Bytes now.
    pub fn read(&mut self) -> u64 {
        let processes = self.gpu.processes();
        self.listen(&processes);
        let bytes = match self.source {
            Source::Processes => watched::used(&processes),
            Source::Device => self.growth(),
        };
        self.peak = self.peak.max(bytes);
        bytes
    }

    /// Whether NVML speaks of processes that are here. It does so for good: what was taken for the program's before was not certain.
    fn listen(&mut self, processes: &HashMap<u32, u64>) {
        let is_here = |pid: &u32| Path::new(&format!("/proc/{pid}")).exists();
        if self.source == Source::Device && processes.keys().any(is_here) {
            (self.source, self.peak) = (Source::Processes, 0);
        }
    }

    fn growth(&mut self) -> u64 {
        let Some(now) = in_use(self.gpu) else { return 0 };
        let least = self.least.map_or(now, |least| least.min(now));
        self.least = Some(least);
        now - least
    }
}

/// By all processes together.
fn in_use(gpu: &Gpu) -> Option<u64> {
    gpu.memory().map(|memory| memory.total.saturating_sub(memory.free))
}
