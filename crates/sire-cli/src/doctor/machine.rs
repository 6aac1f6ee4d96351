//! The machine around the device: WSL, resource limits, host memory for backups.

use std::fs;
use std::path::{Path, PathBuf};

use super::Finding;
use super::checks::size;

/// Every note on the machine.
pub fn machine() -> Vec<Finding> {
    let mut findings = vec![wsl(&fs::read_to_string("/proc/version").unwrap_or_default())];
    findings.push(files());
    findings.push(locked());
    findings.push(host_memory());
    findings
}

fn wsl(version: &str) -> Finding {
    if sire_cuda::is_wsl(version) {
        return Finding::note("WSL", "this is Windows' Linux: Sire is untested here; the device line above says whether its driver has virtual-memory management")
            .advice("Pinned host memory is scarce in WSL2; raise memory= in .wslconfig for large backups.");
    }
    Finding::served("WSL", "not WSL")
}

fn limit(resource: libc::__rlimit_resource_t) -> Option<u64> {
    let mut value = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the output is a valid rlimit.
    (unsafe { libc::getrlimit(resource, &raw mut value) } == 0 && value.rlim_cur != libc::RLIM_INFINITY)
        .then_some(value.rlim_cur)
}

fn files() -> Finding {
    match limit(libc::RLIMIT_NOFILE) {
        Some(count) if count < 256 => Finding::refused(
            "open files",
            format!("at most {count}; the driver alone needs about a hundred"),
            "ulimit -n 1024",
        ),
        Some(count) => Finding::served("open files", format!("at most {count}")),
        None => Finding::served("open files", "unlimited"),
    }
}

fn locked() -> Finding {
    match limit(libc::RLIMIT_MEMLOCK) {
        Some(bytes) => Finding::note(
            "locked memory",
            format!("at most {}; memory that the CUDA driver pins does not count", size(bytes)),
        ),
        None => Finding::served("locked memory", "unlimited"),
    }
}

/// What backups can use: the machine's memory, or less in a control group.
fn host_memory() -> Finding {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let available = kilobytes(&meminfo, "MemAvailable:").unwrap_or(0);
    let total = kilobytes(&meminfo, "MemTotal:").unwrap_or(0);
    let machine = format!("{} of {} available for backups", size(available), size(total));
    match control_group(Path::new("/sys/fs/cgroup"), &fs::read_to_string("/proc/self/cgroup").unwrap_or_default()) {
        Some((limit, used)) if limit < total => Finding::served(
            "host memory",
            format!("{machine}; the control group has {} left of {}", size(limit.saturating_sub(used)), size(limit)),
        ),
        _ => Finding::served("host memory", machine),
    }
}

fn kilobytes(meminfo: &str, name: &str) -> Option<u64> {
    let line = meminfo.lines().find(|line| line.starts_with(name))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|value| value * 1024)
}

/// The tightest memory limit (and its use) of the process's control groups, version 2 or 1.
fn control_group(root: &Path, membership: &str) -> Option<(u64, u64)> {
    let mut tightest: Option<(u64, u64)> = None;
    for line in membership.lines() {
        let mut fields = line.splitn(3, ':');
        let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        let (base, limit_file, used_file) = if controllers.is_empty() {
            (root.to_path_buf(), "memory.max", "memory.current")
        } else if controllers.split(',').any(|name| name == "memory") {
            (root.join("memory"), "memory.limit_in_bytes", "memory.usage_in_bytes")
        } else {
            continue;
        };
        for directory in upwards(&base, path.trim_start_matches('/')) {
            let number = |file: &str| fs::read_to_string(directory.join(file)).ok()?.trim().parse::<u64>().ok();
            if let (Some(limit), Some(used)) = (number(limit_file), number(used_file)) {
                tightest =
                    tightest.into_iter().chain([(limit, used)]).min_by_key(|(limit, used)| limit.saturating_sub(*used));
            }
        }
    }
    tightest
}

/// `base/a/b`, `base/a`, `base`.
fn upwards(base: &Path, below: &str) -> Vec<PathBuf> {
    base.join(below).ancestors().take_while(|path| path.starts_with(base)).map(Path::to_path_buf).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tightest_control_group_above_us_counts() {
        let root = std::env::temp_dir().join(format!("sire-cgroup-{}", std::process::id()));
        let leaf = root.join("a/b");
        fs::create_dir_all(&leaf).unwrap_or_default();
        for (dir, max, current) in [(&leaf, "max", "5"), (&root.join("a"), "1000", "400")] {
            fs::write(dir.join("memory.max"), max).unwrap_or_default();
            fs::write(dir.join("memory.current"), current).unwrap_or_default();
        }
        assert_eq!(control_group(&root, "0::/a/b\n"), Some((1000, 400)));
        assert_eq!(control_group(&root, ""), None);
        fs::remove_dir_all(root).unwrap_or_default();
    }

    #[test]
    fn wsl_is_known_by_its_kernel() {
        assert_eq!(wsl("Linux version 6.6.87-microsoft-standard-WSL2").status, super::super::Status::Note);
    }
}
