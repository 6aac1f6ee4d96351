//! The command line: names, defaults and help texts, and nothing else.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::control::who::Who;

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
    /// List the processes that can be asked from outside (SIRE_CONTROL=1), with what they hold
    Ps(PsOptions),
    /// Watch devices, processes, tags and events on the whole screen
    Top(TopOptions),
    /// Pause a process, or one of its tags, at its next safe point
    Pause(PauseOptions),
    /// Resume what was paused from outside, or a tag
    Resume(ResumeOptions),
    /// Make a process give back device memory that it only caches
    Evict(EvictOptions),
    /// Say what a process's managed models may take of a device
    Budget(BudgetOptions),
    /// Make a process record its calls, for `sire replay`
    Record(AskOptions),
    /// Serve the live view as a web page, and as Prometheus text at /metrics
    Dashboard(DashboardOptions),
    /// Print a shell's completions: source <(sire completions bash)
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
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
    /// Use the device in turns of so many seconds with other programs of the group (docs/time-slices.md); the program imports sire
    #[arg(long, value_name = "SECONDS")]
    pub time_slice: Option<f64>,
    /// Whose turns: programs of the same name
    #[arg(long, value_name = "GROUP", requires = "time_slice")]
    pub group: Option<String>,
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

/// A program that is run on one GPU.
#[derive(Debug, Args)]
pub struct GpuJob {
    /// Which GPU: its number as nvidia-smi counts (of a divided one the part: 0:1), or its UUID (or how that begins). The program sees only this one [default: the first that CUDA_VISIBLE_DEVICES names, else 0]
    #[arg(long)]
    pub gpu: Option<String>,
    /// The software device's environment (made by `sire software-env DIR`)
    #[arg(long, value_name = "DIR", env = "SIRE_SOFTWARE_ENV")]
    pub env: Option<PathBuf>,
    /// Started anew in the environment
    #[arg(long, hide = true)]
    pub inside: bool,
    /// The program and its arguments
    #[arg(last = true, value_name = "CMD", required = true)]
    pub command: Vec<OsString>,
}

/// Options of `sire reserve`.
#[derive(Debug, Args)]
pub struct ReserveOptions {
    /// How much, for example 6GiB; left out: the GPU for this program alone
    #[arg(long, value_name = "SIZE", value_parser = some_bytes)]
    pub bytes: Option<u64>,
    /// How long to wait in the queue, in seconds (exit code 75 after that) [default: for as long as it takes]
    #[arg(long, value_name = "SECONDS", value_parser = time)]
    pub timeout: Option<Duration>,
    /// Where memory is short, ask your other processes for what they have marked as reclaimable, for a need of this priority
    #[arg(long, value_name = "PRIORITY", num_args = 0..=1, default_missing_value = "0", require_equals = true)]
    #[arg(allow_negative_numbers = true, requires = "bytes")]
    pub preempt: Option<i32>,
    /// Say on standard error, as JSON, what was reserved and how long that took
    #[arg(long)]
    pub json: bool,
    /// What runs where
    #[command(flatten)]
    pub job: GpuJob,
}

/// Options of `sire probe`.
#[derive(Debug, Args)]
pub struct ProbeOptions {
    /// End the program, and all that it has started, after so many seconds (exit code 124)
    #[arg(long, value_name = "SECONDS", value_parser = time)]
    pub timeout: Option<Duration>,
    /// The figures as JSON
    #[arg(long)]
    pub json: bool,
    /// What runs where
    #[command(flatten)]
    pub job: GpuJob,
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

/// Options of `sire ps`.
#[derive(Debug, Args)]
pub struct PsOptions {
    /// Everything, as JSON
    #[arg(long, conflicts_with = "metrics")]
    pub json: bool,
    /// As Prometheus text
    #[arg(long)]
    pub metrics: bool,
    /// Tags too
    #[arg(long, short)]
    pub tags: bool,
    /// Seconds to wait for a process's answer
    #[arg(long, value_name = "S", default_value_t = 2.0, value_parser = seconds)]
    pub timeout: f64,
}

/// Options of `sire top`.
#[derive(Debug, Args)]
pub struct TopOptions {
    /// Seconds between two looks
    #[arg(long, short, value_name = "S", default_value_t = 1.0, value_parser = interval)]
    pub interval: f64,
    /// A line of JSON for each look, instead of the screen
    #[arg(long)]
    pub json: bool,
    /// End after this many looks
    #[arg(long, value_name = "N")]
    pub looks: Option<u64>,
}

/// A process, and how the answer is printed.
#[derive(Debug, Args)]
pub struct AskOptions {
    /// The process's number, as `sire ps` shows it; `PID-N` where several containers have one of that number
    #[arg(value_name = "PID")]
    pub who: Who,
    /// The answer as JSON
    #[arg(long)]
    pub json: bool,
}

/// Options of `sire pause`.
#[derive(Debug, Args)]
pub struct PauseOptions {
    #[command(flatten)]
    pub ask: AskOptions,
    /// This tag and what is under it, instead of everything
    #[arg(long, short, value_name = "TAG")]
    pub tag: Option<String>,
    /// Seconds to wait for a safe point
    #[arg(long, value_name = "S", default_value_t = 10.0, value_parser = seconds)]
    pub timeout: f64,
}

/// Options of `sire resume`.
#[derive(Debug, Args)]
pub struct ResumeOptions {
    #[command(flatten)]
    pub ask: AskOptions,
    /// This tag and what is under it, whoever paused it
    #[arg(long, short, value_name = "TAG")]
    pub tag: Option<String>,
    /// Seconds to wait for a safe point
    #[arg(long, value_name = "S", default_value_t = 10.0, value_parser = seconds)]
    pub timeout: f64,
    /// Seconds to wait for memory that somebody else holds
    #[arg(long, value_name = "S", default_value_t = 0.0, value_parser = seconds)]
    pub wait: f64,
}

/// Options of `sire evict`.
#[derive(Debug, Args)]
pub struct EvictOptions {
    #[command(flatten)]
    pub ask: AskOptions,
    /// Which device, as the process counts
    #[arg(long, value_name = "N", requires = "bytes")]
    pub device: Option<u32>,
    /// How much room to make, for example 2GiB
    #[arg(long, value_name = "SIZE", requires = "device", value_parser = size)]
    pub bytes: Option<u64>,
}

/// Options of `sire budget`.
#[derive(Debug, Args)]
pub struct BudgetOptions {
    #[command(flatten)]
    pub ask: AskOptions,
    /// Which device, as the process counts
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub device: u32,
    /// The most that managed models may hold, for example 6GiB [default: what there is]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub limit: Option<u64>,
    /// What stays free for others
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = size)]
    pub headroom: u64,
    /// Seconds for which what was just used is spared
    #[arg(long, value_name = "S", default_value_t = 0.0, value_parser = seconds)]
    pub residency: f64,
}

/// Options of `sire dashboard`.
#[derive(Debug, Args)]
pub struct DashboardOptions {
    /// Where to listen; port 0: any that is free
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:7473")]
    pub listen: std::net::SocketAddr,
    /// Seconds between two looks
    #[arg(long, short, value_name = "S", default_value_t = 1.0, value_parser = interval)]
    pub interval: f64,
    /// The token, in a file that only you can read [default: a new one each time]
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// Let everybody who reaches the address see figures and tags; controls need the token all the same
    #[arg(long)]
    pub public_view: bool,
}

/// Seconds, as the protocol allows them.
fn seconds(text: &str) -> Result<f64, String> {
    let most = sire_control::message::LONGEST_PATIENCE;
    let seconds: f64 = text.parse().map_err(|_| "not a number of seconds".to_owned())?;
    (0.0..=most).contains(&seconds).then_some(seconds).ok_or_else(|| format!("it must be 0 to {most} seconds"))
}

/// Seconds, as many as one likes.
fn time(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number of seconds".to_owned())?;
    Duration::try_from_secs_f64(seconds).map_err(|_| "it must be a number of seconds, 0 or more".to_owned())
}

/// Time between two looks.
fn interval(text: &str) -> Result<f64, String> {
    seconds(text).and_then(|seconds| {
        (seconds >= 0.1)
            .then_some(seconds)
            .ok_or_else(|| "looking more often than ten times a second costs more than it shows".to_owned())
    })
}

/// Bytes: `4096`, `512MiB`, `6GiB`, `2GB`.
pub fn size(text: &str) -> Result<u64, String> {
    sire_core::size::parse(text).ok_or_else(|| "it is not a size such as 4096, 512MiB or 6GiB".to_owned())
}

/// The same, and not nothing.
fn some_bytes(text: &str) -> Result<u64, String> {
    let bytes = size(text)?;
    if bytes > 0 { Ok(bytes) } else { Err("0 bytes are nothing; leave it out for all of the GPU".to_owned()) }
}

#[cfg(test)]
mod tests {
    use super::{Arguments, Command};
    use clap::Parser as _;

    #[test]
    fn the_dashboard_is_for_this_machine_and_its_owner_unless_it_is_told_otherwise() {
        let told = Arguments::try_parse_from(["sire", "dashboard"]).map(|arguments| arguments.command);
        let seen = match told {
            Ok(Command::Dashboard(options)) => Some((options.listen.ip().is_loopback(), options.public_view)),
            _ => None,
        };
        assert_eq!(seen, Some((true, false)));
    }
}
