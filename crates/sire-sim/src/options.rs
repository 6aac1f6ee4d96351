//! Settings of a machine, and how they are read from the environment (docs/environment.md).

use crate::clock::Profile;
use sire_core::size;
use std::path::PathBuf;
use std::time::Duration;

/// 2 MiB: what CUDA's virtual-memory calls use on today's devices.
pub const DEFAULT_GRANULARITY: u64 = 2 << 20;

/// Who runs the work of streams.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Executor {
    /// One worker thread per stream, started with its first operation.
    #[default]
    Threads,
    /// The submitting thread, at once.
    Inline,
    /// Whoever waits, and not before: a missing wait shows at once.
    Deferred,
}

/// What fresh device memory contains.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Poison {
    /// Zeros, and no host memory until it is written.
    Off,
    /// A pattern at the start of each frame, else zeros: cheap.
    Sample,
    /// A pattern in every byte: host memory is committed at once.
    #[default]
    Full,
}

/// Settings of a [`Machine`](crate::Machine).
#[derive(Clone, Debug)]
pub struct Options {
    /// How many devices.
    pub devices: u32,
    /// Memory of each device, in bytes.
    pub memory: u64,
    /// How many devices in a row are the MIG devices of one GPU; 0: each device is a GPU.
    pub mig: u32,
    /// Frame size and virtual-memory granularity: a power of two, at least the page size.
    pub granularity: u64,
    /// Directory through which processes share the devices; `None`: private to this machine.
    pub dir: Option<PathBuf>,
    /// Fault plan (grammar in [`crate::fault`]).
    pub faults: String,
    /// Every device operation takes this much longer.
    pub delay: Duration,
    /// Copies go through a permanent, prefaulted alias; frames stay committed; no poison.
    pub timing: bool,
    /// Whoever waits for a stream spins for a while before it sleeps.
    pub spin: bool,
    /// All work of a stream is done by its own thread, as a GPU's engines do it, whoever waits for what. Without, who waits for a whole stream may do it.
    pub engines: bool,
    /// Unmap waits for the device, as some drivers do.
    pub unmap_syncs: bool,
    /// Captures forbid mapping memory and waiting for events, too, where they forbid unsafe calls.
    pub strict_capture: bool,
    /// What fresh memory contains.
    pub poison: Poison,
    /// Who runs the work of streams.
    pub executor: Executor,
    /// Where [`Machine::shutdown`](crate::Machine::shutdown) writes the census.
    pub census: Option<PathBuf>,
    /// NVML lists no processes, as in a container.
    pub hidden: bool,
    /// Physical memory can be handed out as a file descriptor.
    pub descriptors: bool,
    /// Print every call to standard error.
    pub log: bool,
    /// What things cost in virtual time; `None`: there is none.
    pub profile: Option<Profile>,
    /// Copies and fills check their ranges and move no bytes, and copies give their destination's host pages back to the
    /// system: for modelled times of more memory than the host has.
    pub hollow: bool,
    /// Threads keep in step in virtual time, at the price of some real time: a wait does not end before every thread that could delay what is waited for
    /// has had its turn. For programs all of whose threads use this machine, and sleep when they wait for one another.
    pub paced: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            devices: 1,
            memory: 64 << 20,
            mig: 0,
            granularity: DEFAULT_GRANULARITY,
            dir: None,
            faults: String::new(),
            delay: Duration::ZERO,
            timing: false,
            spin: false,
            engines: false,
            unmap_syncs: false,
            strict_capture: false,
            poison: Poison::Full,
            executor: Executor::Threads,
            census: None,
            hidden: false,
            descriptors: true,
            log: false,
            profile: None,
            hollow: false,
            paced: false,
        }
    }
}

impl Options {
    /// Reads `SIRE_SIM_*`.
    ///
    /// # Errors
    /// A sentence that names the variable whose value cannot be read.
    pub fn from_env() -> Result<Options, String> {
        Options::from_lookup(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
    }

    /// Reads the same variables from `lookup`.
    ///
    /// # Errors
    /// A sentence that names the variable whose value cannot be read.
    pub fn from_lookup(lookup: impl Fn(&str) -> Option<String>) -> Result<Options, String> {
        let choice = |name: &str, default: bool| match lookup(name).as_deref() {
            None => Ok(default),
            Some("0") => Ok(false),
            Some("1") => Ok(true),
            Some(other) => Err(format!("{name}={other}: expected 0 or 1")),
        };
        let flag = |name: &str| choice(name, false);
        let number = |name: &str, default: u64| match lookup(name) {
            None => Ok(default),
            Some(text) => text.trim().parse().map_err(|_| format!("{name}={text}: expected a whole number")),
        };
        let poison = match lookup("SIRE_SIM_POISON").as_deref() {
            None | Some("full" | "1") => Poison::Full,
            Some("sample") => Poison::Sample,
            Some("off" | "0") => Poison::Off,
            Some(other) => return Err(format!("SIRE_SIM_POISON={other}: expected full, sample or off")),
        };
        let memory = match lookup("SIRE_SIM_MEMORY") {
            None => 8 << 30,
            Some(text) => size::parse(text.trim())
                .ok_or_else(|| format!("SIRE_SIM_MEMORY={text}: expected bytes, or a size such as 8GiB"))?,
        };
        let (gpus, mig) = (number("SIRE_SIM_DEVICES", 1)?, number("SIRE_SIM_MIG", 0)?);
        if mig > MOST_PARTS {
            return Err(format!("SIRE_SIM_MIG={mig}: a GPU has at most {MOST_PARTS} MIG devices"));
        }
        let devices = gpus.saturating_mul(mig.max(1));
        if devices > u64::from(MAX_DEVICES) {
            let parts = if mig == 0 { String::new() } else { format!(" with SIRE_SIM_MIG={mig}") };
            return Err(format!("SIRE_SIM_DEVICES={gpus}{parts}: at most {MAX_DEVICES} devices"));
        }
        Ok(Options {
            devices: devices as u32,
            memory: memory / mig.max(1),
            mig: mig as u32,
            dir: lookup("SIRE_SIM_DIR").map(PathBuf::from),
            faults: lookup("SIRE_SIM_FAULTS").unwrap_or_default(),
            delay: Duration::from_micros(number("SIRE_SIM_DELAY_US", 0)?),
            timing: flag("SIRE_SIM_TIMING")?,
            spin: flag("SIRE_SIM_SPIN")?,
            engines: flag("SIRE_SIM_ENGINES")?,
            unmap_syncs: flag("SIRE_SIM_UNMAP_SYNCS")?,
            strict_capture: flag("SIRE_SIM_STRICT_CAPTURE")?,
            poison,
            census: lookup("SIRE_SIM_CENSUS").map(PathBuf::from),
            hidden: flag("SIRE_SIM_HIDDEN")?,
            descriptors: choice("SIRE_SIM_DESCRIPTORS", true)?,
            log: flag("SIRE_SIM_LOG")?,
            profile: lookup("SIRE_SIM_PROFILE")
                .map(|text| Profile::find(&text).map_err(|message| format!("SIRE_SIM_PROFILE={text}: {message}")))
                .transpose()?,
            ..Options::default()
        })
    }

    /// One private device of `memory` bytes and small frames, for tests that make many.
    #[must_use]
    pub fn tiny(memory: u64) -> Options {
        Options { memory, granularity: 4096, ..Options::default() }
    }
}

/// Most MIG devices of one GPU, as of NVIDIA's.
const MOST_PARTS: u64 = 7;

/// Most devices of one machine.
pub const MAX_DEVICES: u32 = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn environment() {
        let lookup = |name: &str| match name {
            "SIRE_SIM_DEVICES" => Some("3".to_string()),
            "SIRE_SIM_MEMORY" => Some("1GiB".to_string()),
            "SIRE_SIM_TIMING" => Some("1".to_string()),
            _ => None,
        };
        let options = Options::from_lookup(lookup).unwrap_or_default();
        assert_eq!((options.devices, options.memory, options.timing), (3, 1 << 30, true));
        let wrong = Options::from_lookup(|name| (name == "SIRE_SIM_LOG").then(|| "maybe".to_string()));
        assert!(wrong.is_err_and(|message| message.contains("SIRE_SIM_LOG=maybe")));
        assert!(options.profile.is_none());
    }

    #[test]
    fn divided_devices() {
        let divided = |parts: &'static str| {
            Options::from_lookup(move |name| match name {
                "SIRE_SIM_DEVICES" => Some("2".to_string()),
                "SIRE_SIM_MEMORY" => Some("1GiB".to_string()),
                "SIRE_SIM_MIG" => Some(parts.to_string()),
                _ => None,
            })
        };
        let options = divided("4").unwrap_or_default();
        assert_eq!((options.devices, options.memory, options.mig), (8, 256 << 20, 4));
        assert_eq!(divided("0").unwrap_or_default().devices, 2);
        assert!(divided("8").is_err_and(|message| message.contains("SIRE_SIM_MIG=8: a GPU has at most 7")));
    }

    #[test]
    fn profiles_by_name() {
        let chosen = |text: &'static str| {
            Options::from_lookup(move |name| (name == "SIRE_SIM_PROFILE").then(|| text.to_string()))
        };
        let options = chosen("h100-pcie5-kvcached").unwrap_or_default();
        assert_eq!(options.profile.map(|profile| profile.name).as_deref(), Some("h100-pcie5-kvcached"));
        assert!(
            chosen("tpu").is_err_and(|message| message.starts_with("SIRE_SIM_PROFILE=tpu: there is no profile tpu"))
        );
    }
}
