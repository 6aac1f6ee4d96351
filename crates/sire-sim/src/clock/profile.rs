//! Profiles: what calls cost and how fast links are, read from JSON (docs/software-device.md lists the fields). Some are built in.

use super::Time;
use serde::Deserialize;

/// Picoseconds in a microsecond.
const MICRO: f64 = 1e6;
/// 20 hours.
const LONGEST: Time = 1 << 56;
const GIB: f64 = (1u64 << 30) as f64;

/// The built-in profiles.
const BUILT_IN: [(&str, &str); 3] = [
    ("h100-pcie5-kvcached", include_str!("../../profiles/h100-pcie5-kvcached.json")),
    ("h100-pcie5-vattention", include_str!("../../profiles/h100-pcie5-vattention.json")),
    ("a100-pcie4-kvcached", include_str!("../../profiles/a100-pcie4-kvcached.json")),
];

/// What a call costs: so much per call, and so much per GiB.
#[derive(Clone, Copy, PartialEq, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cost {
    /// Microseconds per call.
    pub us: f64,
    /// Microseconds per GiB, on top.
    #[serde(default)]
    pub us_per_gib: f64,
}

impl Cost {
    /// Of a call about `bytes`.
    pub(crate) fn of(self, bytes: u64) -> Time {
        picos(self.us + self.us_per_gib * (bytes as f64 / GIB))
    }

    /// Of one call, in seconds, for a formula outside.
    #[must_use]
    pub fn seconds(self, bytes: u64) -> f64 {
        super::seconds(self.of(bytes))
    }
}

/// A number of microseconds as time. Nothing lasts longer than some hours, so that sums stay far from overflowing.
pub(crate) fn picos(us: f64) -> Time {
    ((us * MICRO).round() as Time).min(LONGEST)
}

/// Microseconds that calls take on the host.
#[derive(Clone, PartialEq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Calls {
    /// Putting a copy, fill, kernel, graph or host function on a stream.
    pub submit_us: f64,
    /// Recording an event, or making a stream wait for one.
    pub record_us: f64,
    /// Asking whether an event or stream is done.
    pub query_us: f64,
    /// Waiting for an event or stream, from its end on.
    pub wait_us: f64,
    /// Waiting for the device, from its end on.
    pub synchronize_us: f64,
}

/// Copies and other work of the device.
#[derive(Clone, PartialEq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Copies {
    /// Microseconds that an engine needs for each operation before bytes move.
    pub latency_us: f64,
    /// From known (pinned or registered) host memory, in 10^9 bytes per second.
    pub to_device_gb_s: f64,
    /// To known host memory.
    pub to_host_gb_s: f64,
    /// Share of its speed that each direction keeps while both are busy.
    pub duplex: f64,
    /// From and to pageable host memory.
    pub pageable_gb_s: f64,
    /// Copies and fills on the device.
    pub on_device_gb_s: f64,
    /// Microseconds of a kernel, whatever it is.
    pub kernel_us: f64,
}

/// Virtual-memory management.
#[derive(Clone, PartialEq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vmm {
    /// Whether the driver carries out these calls one at a time, whichever thread makes them.
    pub one_at_a_time: bool,
    /// `cuMemAddressReserve` and `cuMemAddressFree`.
    pub reserve: Cost,
    /// `cuMemCreate`.
    pub create: Cost,
    /// `cuMemMap`.
    pub map: Cost,
    /// `cuMemSetAccess`.
    pub set_access: Cost,
    /// `cuMemUnmap`.
    pub unmap: Cost,
    /// `cuMemRelease`.
    pub release: Cost,
    /// How fast released memory is cleared before it can be had again; `null`: at once.
    pub scrub_gb_s: Option<f64>,
}

/// Other memory calls.
#[derive(Clone, PartialEq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Memory {
    /// `cudaMalloc`.
    pub malloc: Cost,
    /// `cudaFree`, after it has waited.
    pub free: Cost,
    /// `cudaHostAlloc`.
    pub host_alloc: Cost,
    /// `cudaFreeHost`.
    pub host_free: Cost,
    /// `cudaHostRegister`.
    pub host_register: Cost,
    /// `cudaHostUnregister`.
    pub host_unregister: Cost,
}

/// See the module's documentation.
#[derive(Clone, PartialEq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// What figures made with it are called.
    pub name: String,
    /// Which device it describes.
    pub device: String,
    /// Where its numbers come from, and which are assumptions.
    pub sources: Vec<String>,
    /// Host calls.
    pub calls: Calls,
    /// Device work.
    pub copies: Copies,
    /// Virtual-memory management.
    pub vmm: Vmm,
    /// Other memory calls.
    pub memory: Memory,
}

impl Profile {
    /// The names of the built-in profiles.
    pub fn names() -> impl Iterator<Item = &'static str> {
        BUILT_IN.iter().map(|(name, _)| *name)
    }

    /// The built-in profile of that name, or else the file at that path.
    ///
    /// # Errors
    /// A sentence: no such name or file, or what is wrong in it.
    pub fn find(text: &str) -> Result<Profile, String> {
        if let Some((_, json)) = BUILT_IN.iter().find(|(name, _)| *name == text) {
            return Profile::parse(json);
        }
        let json = std::fs::read_to_string(text).map_err(|error| {
            let names: Vec<_> = Profile::names().collect();
            format!("there is no profile {text}: neither a name ({}) nor a readable file ({error})", names.join(", "))
        })?;
        Profile::parse(&json).map_err(|message| format!("{text}: {message}"))
    }

    /// Reads a profile.
    ///
    /// # Errors
    /// A sentence about the first thing that is wrong.
    pub fn parse(json: &str) -> Result<Profile, String> {
        let profile: Profile = serde_json::from_str(json).map_err(|error| format!("not a profile: {error}"))?;
        profile.check()?;
        Ok(profile)
    }

    fn check(&self) -> Result<(), String> {
        let name_fits = |c: char| c.is_ascii_alphanumeric() || "-_".contains(c);
        if self.name.is_empty() || !self.name.chars().all(name_fits) {
            return Err(format!("name '{}': letters, digits, - and _ make the names of figures", self.name));
        }
        for (field, value) in self.durations() {
            if !(0.0..=1e12).contains(&value) {
                return Err(format!("{field} is {value}: expected microseconds, 0 or more"));
            }
        }
        if self.calls.query_us <= 0.0 {
            return Err("calls.query_us is 0: a loop of queries would never see time pass; expected more".into());
        }
        for (field, value) in self.rates() {
            if !(value > 1e-6 && value < 1e9) {
                return Err(format!("{field} is {value}: expected 10^9 bytes per second, more than 0"));
            }
        }
        if !(self.copies.duplex > 0.0 && self.copies.duplex <= 1.0) {
            return Err(format!(
                "copies.duplex is {}: expected a share, more than 0 and at most 1",
                self.copies.duplex
            ));
        }
        Ok(())
    }

    fn durations(&self) -> impl Iterator<Item = (String, f64)> {
        let (calls, vmm, memory) = (&self.calls, &self.vmm, &self.memory);
        let plain = [
            ("calls.submit_us", calls.submit_us),
            ("calls.record_us", calls.record_us),
            ("calls.query_us", calls.query_us),
            ("calls.wait_us", calls.wait_us),
            ("calls.synchronize_us", calls.synchronize_us),
            ("copies.latency_us", self.copies.latency_us),
            ("copies.kernel_us", self.copies.kernel_us),
        ];
        let costs = [
            ("vmm.reserve", vmm.reserve),
            ("vmm.create", vmm.create),
            ("vmm.map", vmm.map),
            ("vmm.set_access", vmm.set_access),
            ("vmm.unmap", vmm.unmap),
            ("vmm.release", vmm.release),
            ("memory.malloc", memory.malloc),
            ("memory.free", memory.free),
            ("memory.host_alloc", memory.host_alloc),
            ("memory.host_free", memory.host_free),
            ("memory.host_register", memory.host_register),
            ("memory.host_unregister", memory.host_unregister),
        ];
        let each = |(name, cost): (&str, Cost)| {
            [(format!("{name}.us"), cost.us), (format!("{name}.us_per_gib"), cost.us_per_gib)]
        };
        plain.into_iter().map(|(name, value)| (name.to_string(), value)).chain(costs.into_iter().flat_map(each))
    }

    fn rates(&self) -> impl Iterator<Item = (&'static str, f64)> {
        let copies = &self.copies;
        let scrub = self.vmm.scrub_gb_s.map(|rate| ("vmm.scrub_gb_s", rate));
        [
            ("copies.to_device_gb_s", copies.to_device_gb_s),
            ("copies.to_host_gb_s", copies.to_host_gb_s),
            ("copies.pageable_gb_s", copies.pageable_gb_s),
            ("copies.on_device_gb_s", copies.on_device_gb_s),
        ]
        .into_iter()
        .chain(scrub)
    }
}

/// How long `bytes` take at so many 10^9 bytes per second.
pub(crate) fn moving(bytes: u64, gb_s: f64) -> Time {
    ((bytes as f64 * 1e3 / gb_s).round() as Time).min(LONGEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn built_in_profiles_are_well_formed_and_named_after_themselves() {
        for name in Profile::names() {
            let profile = Profile::find(name).unwrap_or_else(|message| unreachable!("{name}: {message}"));
            assert_eq!(profile.name, name);
            assert!(!profile.sources.is_empty());
        }
    }

    #[test]
    fn what_is_wrong_is_said() {
        let good = BUILT_IN[0].1;
        let without = |from: &str, to: &str| {
            assert!(good.contains(from), "{from}");
            Profile::parse(&good.replacen(from, to, 1)).err().unwrap_or_default()
        };
        assert!(without("\"duplex\": 0.71", "\"duplex\": 1.5").contains("copies.duplex is 1.5"));
        assert!(without("\"to_host_gb_s\": 53.0", "\"to_host_gb_s\": 0").contains("copies.to_host_gb_s is 0"));
        assert!(without("\"map\": { \"us\": 1.45 }", "\"map\": { \"us\": -1 }").contains("vmm.map.us is -1"));
        assert!(without("\"scrub_gb_s\"", "\"scrub\"").contains("unknown field `scrub`"));
        assert!(without("\"query_us\": 1.0", "\"query_us\": 0").contains("calls.query_us"));
        let unknown = Profile::find("h200").err().unwrap_or_default();
        assert!(unknown.contains("there is no profile h200") && unknown.contains("h100-pcie5-kvcached"), "{unknown}");
    }

    #[test]
    fn costs() {
        let cost = Cost { us: 2.0, us_per_gib: 8.0 };
        assert_eq!(cost.of(0), 2_000_000);
        assert_eq!(cost.of(512 << 20), 6_000_000);
        assert_eq!(moving(55_600, 55.6), 1_000_000);
    }
}
