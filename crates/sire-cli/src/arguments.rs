//! The command line: names, defaults and help texts, and nothing else.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// GPU memory that a program can put down and pick up again.
#[derive(Debug, Parser)]
#[command(name = "sire", version, propagate_version = true)]
pub struct Arguments {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Print the library's path: LD_PRELOAD=$(sire path) python train.py
    Path(PathOptions),
    /// Run a program with Sire preloaded
    Run(RunOptions),
    /// Say what this machine offers, what Sire serves or refuses, and what to do
    Doctor(DoctorOptions),
    /// Make the calls of a trace (SIRE_TRACE=FILE) again, as a benchmark or as a test
    Replay(ReplayOptions),
    /// Build and use an environment in which the CUDA build of PyTorch runs without a GPU
    SoftwareEnv(SoftwareEnvOptions),
    /// Run a program with bytes of a GPU reserved for it, once they are to be had
    Reserve(ReserveOptions),
    /// Run a program, and say how much memory of a GPU it needed
    Probe(ProbeOptions),
    /// Look at something that may crash, in a process of its own
    #[command(hide = true)]
    Look {
        /// What to look at
        subject: Subject,
    },
}

/// What `sire look` looks at.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Subject {
    /// The CUDA driver and NVML.
    Driver,
    /// Whether the preloaded library answers.
    Hook,
}

/// Options of `sire path`.
#[derive(Debug, Args)]
pub struct PathOptions {
    /// The software device's library instead
    #[arg(long)]
    pub stand_in: bool,
    /// The library for driver-level hooks: LD_PRELOAD="$(sire path --driver) $(sire path)"
    #[arg(long, conflicts_with = "stand_in")]
    pub driver: bool,
}

/// Options of `sire run`.
#[derive(Debug, Args)]
pub struct RunOptions {
    /// Which device: a GPU, the software device, or whichever is there
    #[arg(long, value_enum, default_value_t = Device::Auto)]
    pub device: Device,
    /// Make the whole process one region with this backup
    #[arg(long, value_enum)]
    pub backup: Option<Backup>,
    /// Make the whole process one region with this tag (backup: cpu, unless --backup says otherwise)
    #[arg(long, value_name = "TAG")]
    pub region: Option<String>,
    /// How allocations reach Sire
    #[arg(long, value_enum, default_value_t = HookMode::Preload)]
    pub hook_mode: HookMode,
    /// The software device's environment (made by `sire software-env DIR`)
    #[arg(long, value_name = "DIR", env = "SIRE_SOFTWARE_ENV")]
    pub env: Option<PathBuf>,
    /// Print the variables as shell lines instead of running: eval "$(sire run --print-env)"
    #[arg(long)]
    pub print_env: bool,
    /// The program and its arguments
    #[arg(last = true, value_name = "CMD", required_unless_present = "print_env")]
    pub command: Vec<OsString>,
}

/// Which device a program is to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Device {
    /// A GPU if there is a usable driver, else the software device
    Auto,
    /// A GPU
    Cuda,
    /// The software CUDA device
    Software,
}

/// What happens to the content of a paused process-wide region.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Backup {
    /// Thrown away
    None,
    /// Kept in host memory
    Cpu,
    /// Kept on disk
    Disk,
}

impl Backup {
    /// As SIRE_BACKUP spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Cpu => "cpu",
            Self::Disk => "disk",
        }
    }
}

/// How allocations reach Sire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum HookMode {
    /// LD_PRELOAD: every allocation of the process that is made by cudaMalloc
    Preload,
    /// The same, and what libraries ask the driver for (docs/driver-hooks.md)
    Driver,
    /// PyTorch's pluggable allocator: what the Python package routes
    Torch,
}

/// Options of `sire reserve`.
#[derive(Debug, Args)]
pub struct ReserveOptions {
    /// Which GPU: its number as nvidia-smi counts, or its UUID (or how that begins). The program sees only this one
    #[arg(long, default_value = "0")]
    pub gpu: String,
    /// How much, for example 6GiB; left out: the GPU for this program alone
    #[arg(long, value_name = "SIZE")]
    pub bytes: Option<String>,
    /// How long to wait in the queue, in seconds (exit code 75 after that) [default: for as long as it takes]
    #[arg(long, value_name = "SECONDS")]
    pub timeout: Option<f64>,
    /// The software device's environment (made by `sire software-env DIR`)
    #[arg(long, value_name = "DIR", env = "SIRE_SOFTWARE_ENV")]
    pub env: Option<PathBuf>,
    /// Say on standard error, as JSON, what was reserved and how long that took
    #[arg(long)]
    pub json: bool,
    /// Started anew in the environment
    #[arg(long, hide = true)]
    pub inside: bool,
    /// The program and its arguments
    #[arg(last = true, value_name = "CMD", required = true)]
    pub command: Vec<OsString>,
}

/// Options of `sire probe`.
#[derive(Debug, Args)]
pub struct ProbeOptions {
    /// Which GPU: its number as nvidia-smi counts, or its UUID (or how that begins). The program sees only this one
    #[arg(long, default_value = "0")]
    pub gpu: String,
    /// End the program after so many seconds (exit code 124)
    #[arg(long, value_name = "SECONDS")]
    pub timeout: Option<f64>,
    /// The software device's environment (made by `sire software-env DIR`)
    #[arg(long, value_name = "DIR", env = "SIRE_SOFTWARE_ENV")]
    pub env: Option<PathBuf>,
    /// The figures as JSON
    #[arg(long)]
    pub json: bool,
    /// Started anew in the environment
    #[arg(long, hide = true)]
    pub inside: bool,
    /// The program and its arguments
    #[arg(last = true, value_name = "CMD", required = true)]
    pub command: Vec<OsString>,
}

/// Options of `sire doctor`.
#[derive(Debug, Args)]
pub struct DoctorOptions {
    /// The findings as JSON
    #[arg(long)]
    pub json: bool,
    /// Look inside the software device's environment in this directory
    #[arg(long, value_name = "DIR", env = "SIRE_SOFTWARE_ENV")]
    pub env: Option<PathBuf>,
    /// The Python to look for PyTorch in
    #[arg(long, value_name = "PROGRAM")]
    pub python: Option<OsString>,
}

/// Options of `sire replay`.
#[derive(Debug, Args)]
pub struct ReplayOptions {
    /// The trace
    pub file: PathBuf,
    /// Which device: a GPU, the software device, or whichever is there
    #[arg(long, value_enum, default_value_t = Device::Auto)]
    pub device: Device,
    /// Memory of each software device, for example 8GiB (default: what the trace held at once)
    #[arg(long, value_name = "SIZE")]
    pub device_memory: Option<String>,
    /// Times of the model clock, by a built-in profile or a file: simulated, not a GPU's
    #[arg(long, value_name = "NAME|FILE")]
    pub profile: Option<String>,
    /// Write bytes into every allocation and compare what was kept after each resume
    #[arg(long)]
    pub check: bool,
    /// How often
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub repeats: u32,
    /// Write the figures to this file instead of standard output
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Say what the trace holds, and replay nothing
    #[arg(long)]
    pub info: bool,
}

/// Options of `sire software-env`.
#[derive(Debug, Args)]
pub struct SoftwareEnvOptions {
    /// The environment's directory
    pub dir: PathBuf,
    /// The version of PyTorch
    #[arg(long, value_name = "VERSION", default_value = "2.15.0")]
    pub torch: String,
    /// The Python that the environment is made with [default: python3]
    #[arg(long, value_name = "PROGRAM")]
    pub python: Option<OsString>,
    /// Another package to install, as pip spells it; may be repeated
    #[arg(long, value_name = "PKG")]
    pub extra: Vec<String>,
    /// Use no network: what is missing must be in PIP_FIND_LINKS
    #[arg(long)]
    pub offline: bool,
    /// The software device's library (else SIRE_SIM_LIBRARY, else beside this command)
    #[arg(long, value_name = "PATH")]
    pub stand_in: Option<PathBuf>,
    /// What to do with the environment; builds or refreshes it if left out
    #[command(subcommand)]
    pub action: Option<SoftwareEnvAction>,
}

/// What to do with an environment that exists.
#[derive(Debug, Subcommand)]
pub enum SoftwareEnvAction {
    /// Run a program on the software device (PyTorch or not)
    Exec {
        /// Memory of each device, for example 8GiB
        #[arg(long, value_name = "SIZE")]
        device_memory: Option<String>,
        /// How many devices
        #[arg(long, value_name = "N")]
        devices: Option<u32>,
        /// The program and its arguments
        #[arg(last = true, required = true, value_name = "CMD")]
        command: Vec<OsString>,
    },
    /// Say what the environment holds
    Info {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
}
