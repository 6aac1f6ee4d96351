//! The library and the driver: what Sire cannot do without.

use crate::environment::Changes;
use crate::library;

use super::Finding;
use super::probe::{self, DeviceReport, DriverReport};

/// The library's file, and whether preloading it works.
pub fn library(changes: &Changes) -> Vec<Finding> {
    let path = match library::sire() {
        Ok(path) => path,
        Err(why) => {
            let text = why.to_string();
            let (what, advice) = text.rsplit_once("\n      ").unwrap_or((&text, "Reinstall the package."));
            return vec![Finding::refused("library", what, advice).essential()];
        }
    };
    let mut with_library = Changes::default();
    for name in ["LD_LIBRARY_PATH", "SIRE_SIM_DIR"] {
        if let Some(value) = changes.value(name) {
            with_library.set(name, value);
        }
    }
    with_library.set("LD_PRELOAD", &path);
    let hook = hook(&path.display().to_string(), &with_library);
    vec![Finding::served("library", path.display().to_string()), hook, driver_hooks(with_library)]
}

/// Whether driver-level hooks can be had here: on request only, so nothing else depends on it.
fn driver_hooks(mut changes: Changes) -> Finding {
    let name = "driver hooks";
    let path = match library::driver() {
        Ok(path) => path,
        Err(why) => return Finding::note(name, why.to_string()),
    };
    changes.prepend("LD_PRELOAD", &path);
    match probe::hook(&changes) {
        Ok(report) if report.driver_live == Some(true) => {
            let detail = "live when libsire_driver.so is preloaded too: sire run --hook-mode driver";
            Finding::served(name, detail)
        }
        Ok(_) => Finding::refused(
            name,
            "libsire_driver.so is preloaded, but look-ups of a program do not reach it",
            "Remove other libraries that hook dlsym from LD_PRELOAD, or put Sire's two first.",
        ),
        Err(why) => Finding::refused(
            name,
            format!("preloading {} fails: {why}", path.display()),
            "Is it a library of this machine's architecture? Everything else works without it.",
        ),
    }
}

fn hook(path: &str, changes: &Changes) -> Finding {
    let refused = |why: String| {
        Finding::refused(
            "hook",
            why,
            format!("Is it a library of this machine's architecture? Try: LD_PRELOAD={path} /bin/true"),
        )
        .essential()
    };
    let report = match probe::hook(changes) {
        Ok(report) => report,
        Err(why) => return refused(format!("preloading the library fails: {why}")),
    };
    if report.library.is_none() {
        return refused("the library is not in a program that preloads it: the dynamic loader left it out".into());
    }
    if report.malloc != report.library {
        let other = report.malloc.unwrap_or_else(|| "nobody".into());
        return Finding::refused(
            "hook",
            format!("cudaMalloc of a program reaches {other} before Sire"),
            "Remove the other library from LD_PRELOAD, or put Sire's first.",
        )
        .essential();
    }
    let version = report.version.unwrap_or_default();
    let build = report.build_id.unwrap_or_default();
    let detail = format!("live when preloaded; version {version}, ABI {}, build {build}", report.abi);
    if version == env!("CARGO_PKG_VERSION") {
        Finding::served("hook", detail)
    } else {
        Finding::note("hook", detail)
            .advice(format!("This command is version {}; install both from one package.", env!("CARGO_PKG_VERSION")))
    }
}

/// The driver and each device.
pub fn driver(report: &DriverReport) -> Vec<Finding> {
    let path = report.path.as_deref().unwrap_or("libcuda.so.1");
    if let Some(why) = &report.error {
        return vec![
            Finding::refused("driver", format!("no usable CUDA driver: {why}"), no_driver_advice()).essential(),
        ];
    }
    let kind = if report.software { "Sire's software device, " } else { "" };
    let package = report.package.as_ref().map(|version| format!(", driver {version}")).unwrap_or_default();
    let cuda = report.cuda.as_deref().unwrap_or("unknown");
    let mut findings = vec![Finding::served("driver", format!("{kind}CUDA {cuda}{package}, {path}"))];
    let any = report.devices.iter().any(|device| device.virtual_memory);
    for device in &report.devices {
        let finding = self::device(device);
        findings.push(if any { finding } else { finding.essential() });
        findings.extend(variants(device));
    }
    findings
}

fn no_driver_advice() -> String {
    let software = "To try Sire without a GPU: sire software-env DIR, then sire doctor --env DIR.";
    if std::path::Path::new("/proc/driver/nvidia/version").exists() {
        format!(
            "The kernel driver is loaded, so its user library is out of reach: in a container, start it with --gpus all. {software}"
        )
    } else {
        format!("Install NVIDIA's driver, or start the container with --gpus all. {software}")
    }
}

fn device(device: &DeviceReport) -> Finding {
    let free = device.free_bytes.map(|bytes| format!(", {} free", size(bytes))).unwrap_or_default();
    let rdma = if device.gpudirect_rdma { ", GPUDirect RDMA" } else { "" };
    let detail = format!("{} {}: {}{free}{rdma}", device.ordinal, device.name, size(device.memory_bytes));
    if device.virtual_memory {
        return Finding::served("device", format!("{detail}, virtual-memory management"));
    }
    Finding::refused(
        "device",
        format!("{detail}, without virtual-memory management"),
        "Memory of this device cannot be paused. Passthrough, MIG or another hypervisor profile usually has it; ask for CUDA's VMM support.",
    )
}

/// Divided and virtual devices.
fn variants(device: &DeviceReport) -> Vec<Finding> {
    let mut findings = Vec::new();
    if device.mig == Some(true) {
        findings.push(
            Finding::note(
                "MIG",
                format!("device {} is divided; each instance is a device of its own to Sire", device.ordinal),
            )
            .advice("Name one in CUDA_VISIBLE_DEVICES. Sire has not been tested on instances."),
        );
    }
    match device.virtualization.as_deref() {
        Some("vgpu") if device.virtual_memory => findings.push(Finding::note(
            "vGPU",
            format!("device {} is a vGPU that has virtual-memory management; untested", device.ordinal),
        )),
        Some("vgpu") => findings.push(Finding::refused(
            "vGPU",
            format!("device {} is a vGPU without virtual-memory management", device.ordinal),
            "Ask the administrator to enable unified memory for the profile, or for GPU passthrough.",
        )),
        _ => {}
    }
    findings
}

/// Bytes for people.
pub fn size(bytes: u64) -> String {
    let gib = bytes as f64 / f64::from(1 << 30);
    if gib >= 1.0 { format!("{gib:.1} GiB") } else { format!("{:.0} MiB", gib * 1024.0) }
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;

    fn found(virtual_memory: bool, mig: Option<bool>, virtualization: Option<&str>) -> Vec<(&'static str, Status)> {
        let device = DeviceReport {
            ordinal: 0,
            name: "NVIDIA Something".into(),
            memory_bytes: 1 << 34,
            free_bytes: None,
            virtual_memory,
            gpudirect_rdma: false,
            mig,
            virtualization: virtualization.map(Into::into),
        };
        let mut all = vec![self::device(&device)];
        all.extend(variants(&device));
        all.iter().map(|finding| (finding.name, finding.status)).collect()
    }

    #[test]
    fn divided_and_virtual_devices_are_served_or_refused_by_name() {
        assert_eq!(found(true, Some(false), Some("passthrough")), [("device", Status::Served)]);
        assert_eq!(found(true, Some(true), None), [("device", Status::Served), ("MIG", Status::Note)]);
        assert_eq!(found(true, None, Some("vgpu")), [("device", Status::Served), ("vGPU", Status::Note)]);
        assert_eq!(found(false, None, Some("vgpu")), [("device", Status::Refused), ("vGPU", Status::Refused)]);
        assert_eq!(found(false, None, None), [("device", Status::Refused)]);
    }
}
