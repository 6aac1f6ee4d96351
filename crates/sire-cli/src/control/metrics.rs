//! Figures as Prometheus text (version 0.0.4). The names are in docs/control.md.

use std::fmt::Write as _;

use super::view::{Gpu, Process, Region, View};

/// The whole page.
pub fn text(view: &View) -> String {
    let mut page = Page(String::new());
    page.family("sire_processes", "gauge", "Processes that can be asked.");
    page.sample("sire_processes", &[], view.processes.len() as u64);
    for (name, help, value) in DEVICE {
        page.family(name, "gauge", help);
        for gpu in &view.devices {
            page.sample(name, &[("uuid", &gpu.uuid)], value(gpu));
        }
    }
    page.processes(&view.processes);
    page.0
}

/// The page so far. All samples of a family stand together: the format wants it.
struct Page(String);

/// Of a device: a name, its help, and where the number is.
type DeviceFamily = (&'static str, &'static str, fn(&Gpu) -> u64);

const DEVICE: [DeviceFamily; 3] = [
    ("sire_device_total_bytes", "Memory of the device, by its driver.", |gpu| gpu.total_bytes),
    ("sire_device_free_bytes", "Of that free, by its driver.", |gpu| gpu.free_bytes),
    ("sire_device_sire_bytes", "Of that held by processes of Sire's.", |gpu| gpu.sire_bytes),
];

/// Of a region: a name, its type, its help, and where the number is.
type Family = (&'static str, &'static str, &'static str, fn(&Region) -> u64);

const REGION: [Family; 7] = [
    ("sire_tag_resident_bytes", "gauge", "Device memory that the tag holds.", |region| region.resident_bytes),
    (
        "sire_tag_paused_bytes",
        "gauge",
        "Device memory that it would hold if it were resident, beyond that.",
        |region| region.paused_bytes,
    ),
    ("sire_tag_backup_bytes", "gauge", "Bytes of its backups.", |region| region.backup_bytes),
    ("sire_tag_paused", "gauge", "1 if it is paused.", |region| u64::from(region.state == "paused")),
    ("sire_tag_pauses_total", "counter", "Pauses since the process's start.", |region| region.pauses),
    ("sire_tag_resumes_total", "counter", "Resumes since the process's start.", |region| region.resumes),
    ("sire_tag_copied_bytes_total", "counter", "Bytes copied to and from backups.", |region| region.bytes_copied),
];

impl Page {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = write!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: u64) {
        let labels: Vec<String> = labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escaped(value))).collect();
        let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
        let _ = writeln!(self.0, "{name}{labels} {value}");
    }

    fn processes(&mut self, processes: &[Process]) {
        self.family("sire_process_up", "gauge", "1 if the process answers.");
        for process in processes {
            let (pid, up) = (process.name.to_string(), u64::from(process.silence.is_none()));
            self.sample("sire_process_up", &[("pid", &pid), ("command", &process.command)], up);
        }
        self.family("sire_process_paused", "gauge", "1 if everything, or a part, is paused from outside.");
        for process in processes {
            let paused = u64::from(!process.control.paused.is_empty());
            self.sample("sire_process_paused", &[("pid", &process.name.to_string())], paused);
        }
        self.family("sire_tier_used_bytes", "gauge", "Bytes of backups in the tier.");
        for process in processes {
            let pid = process.name.to_string();
            for tier in &process.stats.tiers {
                self.sample("sire_tier_used_bytes", &[("pid", &pid), ("tier", &tier.tier)], tier.used_bytes);
            }
        }
        for (name, kind, help, value) in REGION {
            self.family(name, kind, help);
            for process in processes {
                let pid = process.name.to_string();
                for region in &process.stats.regions {
                    let labels = [("pid", pid.as_str()), ("tag", &region.tag), ("backup", &region.backup)];
                    self.sample(name, &labels, value(region));
                }
            }
        }
    }
}

/// As the format wants label values.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::super::view::{Gpu, Process, Region, View};
    use super::text;
    use sire_control::place::Name;

    #[test]
    fn each_family_is_in_one_piece_and_labels_are_escaped() {
        let region = |tag: &str| Region { tag: tag.to_owned(), resident_bytes: 7, ..Region::default() };
        let mut process = Process { name: Name { pid: 4, namesake: 1 }, ..Process::default() };
        process.stats.regions = vec![region("a\"b\\c\nd"), region("plain")];
        let view = View { time: 0.0, devices: vec![Gpu::default(), Gpu::default()], processes: vec![process] };
        let page = text(&view);
        assert!(page.contains(r#"sire_tag_resident_bytes{pid="4-1",tag="a\"b\\c\nd",backup=""} 7"#), "{page}");
        let names: Vec<&str> = page
            .lines()
            .filter(|line| !line.starts_with('#'))
            .filter_map(|line| line.split(['{', ' ']).next())
            .collect();
        let mut families = names.clone();
        families.dedup();
        let mut unique = families.clone();
        unique.sort_unstable();
        unique.dedup();
        assert_eq!(families.len(), unique.len(), "a family is in two pieces: {families:?}");
        assert!(names.iter().all(|name| page.contains(&format!("# TYPE {name} "))));
    }
}
