//! How much host memory a backup may take: what the machine has available and what the process's control
//! groups (version 2 or 1) still allow. Read anew before each growth; a file that cannot be read sets no limit.

use std::fs;
use std::path::{Path, PathBuf};

/// Bytes that can be taken now, and which limit says so.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Room {
    pub(crate) bytes: u64,
    pub(crate) set_by: String,
}

/// The tightest of the machine's and the control groups' limits.
pub(crate) fn room() -> Room {
    let machine = available(&fs::read_to_string("/proc/meminfo").unwrap_or_default());
    let machine = Room { bytes: machine.unwrap_or(u64::MAX), set_by: "the machine's available memory".into() };
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    group_rooms(Path::new("/sys/fs/cgroup"), &groups).into_iter().fold(machine, tighter)
}

/// Whether host memory lies on several NUMA nodes, so that it matters where a copy goes.
pub(crate) fn has_nodes() -> bool {
    fs::read_to_string("/sys/devices/system/node/has_memory").is_ok_and(|nodes| nodes.contains([',', '-']))
}

fn tighter(a: Room, b: Room) -> Room {
    if b.bytes < a.bytes { b } else { a }
}

/// `MemAvailable` of a /proc/meminfo text, in bytes.
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// One room per control group above the process that has a limit.
fn group_rooms(root: &Path, groups: &str) -> Vec<Room> {
    let mut rooms = Vec::new();
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        if controllers.is_empty() {
            rooms.extend(walk(root, path, "memory.max", "memory.current"));
        } else if controllers.split(',').any(|c| c == "memory") {
            rooms.extend(walk(&root.join("memory"), path, "memory.limit_in_bytes", "memory.usage_in_bytes"));
        }
    }
    rooms
}

/// The limits of the group at `path` and of all above it. Inside a container the path may not exist: the root counts then.
fn walk(root: &Path, path: &str, limit: &str, usage: &str) -> Vec<Room> {
    let here: PathBuf = root.join(path.trim_start_matches('/'));
    here.ancestors().take_while(|p| p.starts_with(root)).filter_map(|group| one(group, limit, usage)).collect()
}

fn one(group: &Path, limit: &str, usage: &str) -> Option<Room> {
    let number = |name: &str| fs::read_to_string(group.join(name)).ok()?.trim().parse::<u64>().ok();
    // "max" does not parse, and version 1 writes a number near 2^63: neither is a limit.
    let limit = number(limit).filter(|&bytes| bytes < 1 << 60)?;
    let used = number(usage)?.saturating_sub(reclaimable(group));
    Some(Room { bytes: limit.saturating_sub(used), set_by: format!("the control group {}", group.display()) })
}

/// Page cache that the kernel drops before it runs out.
fn reclaimable(group: &Path) -> u64 {
    let stat = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
    let field = |name: &str| stat.lines().find_map(|l| l.strip_prefix(name)?.trim().parse::<u64>().ok());
    field("total_inactive_file ").or_else(|| field("inactive_file ")).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(dir: &Path, files: &[(&str, &str)]) {
        fs::create_dir_all(dir).unwrap_or_else(|e| unreachable!("{e}"));
        for (name, text) in files {
            fs::write(dir.join(name), text).unwrap_or_else(|e| unreachable!("{e}"));
        }
    }

    #[test]
    fn reads_mem_available() {
        assert_eq!(available("MemTotal: 9 kB\nMemAvailable:   12 kB\n"), Some(12 * 1024));
        assert_eq!(available("nothing"), None);
    }

    #[test]
    fn the_tightest_group_counts_in_both_versions() {
        let root = tempfile::tempdir().unwrap_or_else(|e| unreachable!("{e}"));
        let root = root.path();
        put(root, &[("memory.max", "max\n"), ("memory.current", "5\n")]);
        put(
            &root.join("a"),
            &[("memory.max", "1000\n"), ("memory.current", "300\n"), ("memory.stat", "inactive_file 100\n")],
        );
        put(&root.join("a/b"), &[("memory.max", "5000\n"), ("memory.current", "10\n")]);
        let rooms = group_rooms(root, "0::/a/b\n");
        assert_eq!(rooms.iter().map(|r| r.bytes).min(), Some(800));
        put(&root.join("memory/x"), &[("memory.limit_in_bytes", "700"), ("memory.usage_in_bytes", "200")]);
        assert_eq!(group_rooms(root, "4:cpu,memory:/x\n").first().map(|r| r.bytes), Some(500));
        put(
            &root.join("memory/y"),
            &[("memory.limit_in_bytes", "9223372036854771712"), ("memory.usage_in_bytes", "1")],
        );
        assert!(group_rooms(root, "4:memory:/y\n").is_empty());
    }

    #[test]
    fn this_machine_has_room() {
        assert!(room().bytes > 0);
    }
}
