//! What all processes hold at one moment, as far as they said: the model behind `sire ps`, `sire top` and the dashboard.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sire_control::client::{self, Failure as Silence};
use sire_control::message::Verb;
use sire_control::place::{Name, Place};
use sire_control::preempt::plan::Mark;
use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use crate::failure::{Failure, While as _};

/// One look at everything.
#[derive(Debug, Clone, Default, Serialize)]
pub struct View {
    /// Seconds since the epoch.
    pub time: f64,
    /// Devices that somebody uses through Sire.
    pub devices: Vec<Gpu>,
    /// By number.
    pub processes: Vec<Process>,
}

/// A physical device, whatever its processes call it.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Gpu {
    /// As `nvidia-smi -L` writes it.
    pub uuid: String,
    /// By the driver.
    pub total_bytes: u64,
    /// By the driver, as the process said that was asked last.
    pub free_bytes: u64,
    /// What Sire's processes hold.
    pub sire_bytes: u64,
}

/// A process, as it describes itself; fields that an older one does not know are empty.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Process {
    pub pid: u32,
    /// Its number, unless others in the same directory have that, too.
    #[serde(skip_deserializing)]
    pub name: Name,
    pub command: String,
    pub version: String,
    pub time: f64,
    pub opened: f64,
    pub stats: Stats,
    pub devices: Vec<Device>,
    pub control: Control,
    /// What happened last, the oldest first.
    pub journal: Vec<Happened>,
    /// What only the program knows: managed models and their events.
    pub program: Value,
    /// Why there are no figures, if there are none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub silence: Option<String>,
}

/// A device as a process counts.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Device {
    pub device: u32,
    pub uuid: Option<String>,
    pub total_bytes: Option<u64>,
    pub free_bytes: Option<u64>,
}

/// The library's statistics (docs/abi.md), as far as they are shown.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Stats {
    pub driver: Option<String>,
    pub hook_live: Option<bool>,
    pub devices: Vec<Held>,
    pub regions: Vec<Region>,
    pub tiers: Vec<Tier>,
    pub counters: BTreeMap<String, u64>,
    /// Where it is in its turns, if it takes turns on a device.
    pub time_slice: Option<TimeSlice>,
    /// What would give way to others.
    pub reclaimable: Vec<Mark>,
}

/// Turns on a device.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct TimeSlice {
    pub gpu: String,
    pub group: String,
    pub state: String,
    pub quantum_seconds: f64,
    pub residency_seconds: f64,
    pub turns: u64,
    pub switches: u64,
    pub resident_seconds: f64,
    pub waited_seconds: f64,
    pub switch_seconds: f64,
    pub last_error: Option<String>,
}

/// A part of a model that is on the device while it is used.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Unit {
    pub of: String,
    pub name: String,
    pub tier: String,
    pub bytes: u64,
    pub uses: u64,
}

/// What a process holds of a device.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Held {
    pub device: u32,
    pub resident_bytes: u64,
    pub paused_bytes: u64,
    pub lazy_bytes: u64,
}

/// A tag with one policy.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Region {
    pub tag: String,
    pub backup: String,
    pub state: String,
    pub allocations: u64,
    pub resident_bytes: u64,
    pub paused_bytes: u64,
    pub lazy_bytes: u64,
    pub backup_bytes: u64,
    pub stored_bytes: u64,
    pub pauses: u64,
    pub resumes: u64,
    pub bytes_copied: u64,
    pub last_error: Option<String>,
}

/// Where backups are.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Tier {
    pub tier: String,
    pub used_bytes: u64,
    pub reserved_bytes: u64,
    pub limit_bytes: Option<u64>,
}

/// What is asked from outside.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Control {
    /// None: everything.
    pub paused: Vec<Option<String>>,
    pub asked: u64,
    pub safe_points: Vec<SafePoint>,
}

/// Something that happened.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Happened {
    pub number: u64,
    pub time: f64,
    pub what: String,
    pub text: String,
}

/// A thread that passes safe points.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct SafePoint {
    pub thread: String,
    pub waiting: bool,
    pub seconds_ago: f64,
}

impl View {
    /// Asks everybody, for at most `patience`.
    pub fn look(place: &Place, patience: Duration) -> Result<View, Failure> {
        let answers = client::ask_all(place, &Verb::List, patience)
            .while_(|| format!("list the processes in {}", place.path().display()))?;
        let mut processes: Vec<Process> =
            answers.into_iter().map(|(found, answer)| Process::of(found.name, answer)).collect();
        processes.sort_by_key(|process| process.name);
        let time = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        Ok(View { time, devices: gpus(&processes), processes })
    }
}

/// Those that take turns on a device, by its UUID and the group's name: who, and where each is.
pub fn turns(processes: &[Process]) -> BTreeMap<(&str, &str), Vec<(Name, &TimeSlice)>> {
    let mut found: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for process in processes {
        if let Some(slice) = &process.stats.time_slice {
            found.entry((slice.gpu.as_str(), slice.group.as_str())).or_default().push((process.name, slice));
        }
    }
    found
}

impl Process {
    fn of(name: Name, answer: Result<sire_control::message::Answer, Silence>) -> Process {
        let pid = name.pid;
        let silent = |why: String| Process { pid, name, silence: Some(why), ..Process::default() };
        match answer {
            Ok(Ok(value)) => serde_json::from_value(value)
                .map(|process| Process { pid, name, ..process })
                .unwrap_or_else(|error| silent(format!("its figures cannot be read: {error}"))),
            Ok(Err(refusal)) => silent(refusal.message),
            Err(silence) => silent(silence.to_string()),
        }
    }

    /// In a word: running, paused (from outside, everything), held (from outside, in part), lent (to a process that needs it), waiting (for its turn),
    /// silent.
    pub fn state(&self) -> &'static str {
        if self.silence.is_some() {
            return "silent";
        }
        let turns = self.stats.time_slice.as_ref();
        match self.control.paused.as_slice() {
            [] if turns.is_some_and(|turns| turns.state != "resident") => "waiting",
            [] if self.stats.reclaimable.iter().any(|mark| mark.state == "lent") => "lent",
            [] => "running",
            some if some.contains(&None) => "paused",
            _ => "held",
        }
    }

    /// Bytes of devices that it holds through Sire.
    pub fn resident(&self) -> u64 {
        self.stats.devices.iter().map(|held| held.resident_bytes).sum()
    }

    /// Bytes of devices that it would hold if nothing were paused, beyond that.
    pub fn away(&self) -> u64 {
        self.stats.devices.iter().map(|held| held.paused_bytes).sum()
    }

    /// Bytes of backups, wherever they are.
    pub fn backups(&self) -> u64 {
        self.stats.tiers.iter().map(|tier| tier.used_bytes).sum()
    }

    /// Bytes copied since its start.
    pub fn copied(&self) -> u64 {
        self.stats.regions.iter().map(|region| region.bytes_copied).sum()
    }

    /// Slices and layers whose place `sire.slyce` and `sire.memory` choose, as the program lists them.
    pub fn units(&self) -> Vec<Unit> {
        let listed = self.program["units"].as_array().map(Vec::as_slice).unwrap_or_default();
        listed.iter().filter_map(|unit| Unit::deserialize(unit).ok()).collect()
    }

    /// Managed models, as the program summarises them: name, whether it is loaded, bytes on the device, uses.
    pub fn models(&self) -> Vec<(String, bool, u64, u64)> {
        let objects = self.program["models"]["objects"].as_array().map(Vec::as_slice).unwrap_or_default();
        let model = |object: &Value| {
            let number = |name: &str| object[name].as_u64().unwrap_or(0);
            let name = object["name"].as_str().unwrap_or("?").to_owned();
            (name, object["loaded"].as_bool().unwrap_or(false), number("device_bytes"), number("uses"))
        };
        objects.iter().map(model).collect()
    }
}

/// Each physical device once.
fn gpus(processes: &[Process]) -> Vec<Gpu> {
    let mut found: BTreeMap<String, Gpu> = BTreeMap::new();
    for process in processes {
        for device in &process.devices {
            let uuid = device.uuid.clone().unwrap_or_else(|| format!("device {}", device.device));
            let held = process.stats.devices.iter().filter(|held| held.device == device.device);
            let gpu = found.entry(uuid.clone()).or_insert_with(|| Gpu { uuid, ..Gpu::default() });
            gpu.total_bytes = device.total_bytes.unwrap_or(gpu.total_bytes);
            gpu.free_bytes = device.free_bytes.unwrap_or(gpu.free_bytes);
            gpu.sire_bytes += held.map(|held| held.resident_bytes).sum::<u64>();
        }
    }
    found.into_values().collect()
}

/// Bytes for people, in at most eight columns.
pub fn size(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "KiB", "MiB", "GiB", "TiB", "PiB"] {
        if value < 999.5 {
            let digits = if unit == "B" || value >= 99.95 { 0 } else { 1 };
            return format!("{value:.digits$} {unit}");
        }
        value /= 1024.0;
    }
    format!("{value:.1} EiB")
}

/// The end of a UUID, by which people tell devices apart.
pub fn short_uuid(uuid: &str) -> &str {
    let at = uuid.char_indices().rev().nth(7).map_or(0, |(at, _)| at);
    &uuid[at..]
}

#[cfg(test)]
mod tests {
    use super::{Process, gpus, size};
    use serde_json::json;

    fn process(uuid: &str, device: u32, resident: u64) -> Process {
        serde_json::from_value(json!({
            "pid": 1, "unknown": {"later": true},
            "devices": [{"device": device, "uuid": uuid, "total_bytes": 100, "free_bytes": 40}],
            "stats": {"devices": [{"device": device, "resident_bytes": resident}]},
        }))
        .unwrap_or_default()
    }

    #[test]
    fn a_device_that_two_processes_count_differently_is_one() {
        let all = gpus(&[process("GPU-a", 0, 10), process("GPU-a", 3, 20), process("GPU-b", 0, 1)]);
        let seen: Vec<_> = all.iter().map(|gpu| (gpu.uuid.as_str(), gpu.total_bytes, gpu.sire_bytes)).collect();
        assert_eq!(seen, [("GPU-a", 100, 30), ("GPU-b", 100, 1)]);
    }

    #[test]
    fn the_state_says_what_is_paused_from_outside() {
        let mut process = Process::default();
        assert_eq!(process.state(), "running");
        process.stats.time_slice = Some(super::TimeSlice { state: "waiting".to_owned(), ..Default::default() });
        assert_eq!(process.state(), "waiting");
        process.control.paused = vec![Some("a".to_owned())];
        assert_eq!(process.state(), "held");
        process.control.paused.push(None);
        assert_eq!(process.state(), "paused");
    }

    #[test]
    fn sizes_fit_their_column() {
        let shown = [0, 999, 1000, 1023 << 10, 1 << 20, 1536 << 20, 999 << 30, 1 << 40].map(size);
        assert_eq!(shown, ["0 B", "999 B", "1.0 KiB", "1.0 MiB", "1.0 MiB", "1.5 GiB", "999 GiB", "1.0 TiB"]);
        assert!((0..64).map(|bit| size(1 << bit)).all(|text| text.len() <= 8));
    }
}
