//! PyTorch and the Python package, as the Python that the person would use sees them. torch is not imported: that takes
//! seconds and starts CUDA.

use std::ffi::OsString;
use std::path::Path;
use std::process::{Command, Stdio};

use serde::Deserialize;

use crate::arguments::DoctorOptions;
use crate::environment::Changes;

use super::Finding;

const LOOK: &str = r#"
import importlib.metadata, importlib.util, json, re, sys
from pathlib import Path
def version(name):
    try: return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError: return None
def cuda():
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations: return None
    file = Path(list(spec.submodule_search_locations)[0], "version.py")
    found = re.search(r"^cuda\b.*?=\s*(?:'|\")([\d.]+)", file.read_text(), re.M) if file.is_file() else None
    return found and found[1]
sire = importlib.util.find_spec("sire")
print(json.dumps({"python": sys.version.split()[0], "torch": version("torch"), "cuda": cuda(), "package": version("sire-alloc"),
                  "sire": (sire.origin or str(sire.submodule_search_locations)) if sire else None}))
"#;

#[derive(Deserialize)]
struct Seen {
    python: String,
    torch: Option<String>,
    cuda: Option<String>,
    package: Option<String>,
    sire: Option<String>,
}

/// The versions of PyTorch that the tests run with.
const TESTED: [(u32, u32); 3] = [(2, 9), (2, 11), (2, 15)];

/// What the Python on the PATH (or in the environment, or the named one) has.
pub fn torch(options: &DoctorOptions, changes: &Changes) -> Vec<Finding> {
    let python = options.python.clone().unwrap_or_else(|| default_python(options.env.as_deref()));
    let mut findings = match look(&python, changes) {
        Ok(seen) => seen_findings(&seen, &python),
        Err(why) => vec![Finding::note("python", why).advice("Name one with --python PROGRAM. C programs need none.")],
    };
    findings.push(expandable_segments());
    findings
}

fn default_python(env: Option<&Path>) -> OsString {
    env.map_or_else(|| "python3".into(), |dir| dir.join("bin/python").into_os_string())
}

fn look(python: &OsString, changes: &Changes) -> Result<Seen, String> {
    let shown = python.to_string_lossy();
    let mut command = Command::new(python);
    // Not from the working directory: a checkout's own directories are no installed packages.
    command.args(["-P", "-c", LOOK]).stdin(Stdio::null()).stderr(Stdio::null());
    changes.apply(&mut command);
    let mut output = command.output().map_err(|error| format!("'{shown}' does not start: {error}"))?;
    if !output.status.success() {
        // -P is new in Python 3.11.
        let mut older = Command::new(python);
        older.args(["-c", LOOK]).stdin(Stdio::null()).stderr(Stdio::null());
        changes.apply(&mut older);
        output = older.output().map_err(|error| format!("'{shown}' does not start: {error}"))?;
    }
    serde_json::from_slice(&output.stdout).map_err(|_| format!("'{shown}' did not answer ({})", output.status))
}

fn seen_findings(seen: &Seen, python: &OsString) -> Vec<Finding> {
    vec![
        pytorch_finding(seen, &format!("Python {} ({})", seen.python, python.to_string_lossy())),
        package_finding(seen),
    ]
}

fn pytorch_finding(seen: &Seen, shown: &str) -> Finding {
    match (&seen.torch, &seen.cuda) {
        (None, _) => Finding::note("torch", format!("not installed in {shown}"))
            .advice("Name another Python with --python PROGRAM. C programs need no PyTorch."),
        (Some(version), None) => Finding::refused(
            "torch",
            format!("{version} in {shown} is a build without CUDA"),
            "Install PyTorch's CUDA build: pip install torch",
        ),
        (Some(version), Some(cuda)) if is_tested(version) => {
            Finding::served("torch", format!("{version} for CUDA {cuda} in {shown}"))
        }
        (Some(version), Some(cuda)) => Finding::note(
            "torch",
            format!("{version} for CUDA {cuda} in {shown}: Sire is tested with 2.9, 2.11 and 2.15 only"),
        )
        .advice("It may work; if not, install one of these."),
    }
}

fn package_finding(seen: &Seen) -> Finding {
    match (&seen.package, &seen.sire) {
        (Some(version), _) if version == env!("CARGO_PKG_VERSION") => {
            Finding::served("package", format!("sire-alloc {version}"))
        }
        (Some(version), _) => Finding::refused(
            "package",
            format!("sire-alloc {version} is not of this command's version, {}", env!("CARGO_PKG_VERSION")),
            "Install both from one wheel; check 'which -a sire'.",
        ),
        (None, Some(origin)) => {
            Finding::note("package", format!("'import sire' finds {origin}, which sire-alloc did not install"))
                .advice("Another distribution has that import name too; if it is that one, use separate environments.")
        }
        (None, None) => Finding::note("package", "the Python package sire-alloc is not installed")
            .advice("pip install sire-alloc (or ./python-shim from a checkout)"),
    }
}

fn is_tested(version: &str) -> bool {
    let mut parts = version.split(['.', '+']).map(|part| part.parse::<u32>().unwrap_or(0));
    TESTED.contains(&(parts.next().unwrap_or(0), parts.next().unwrap_or(0)))
}

/// PyTorch's own use of virtual memory, which bypasses cudaMalloc: regions hold it by the hooks on PyTorch's way to the driver.
fn expandable_segments() -> Finding {
    match asked_expandable_segments() {
        None => Finding::served("segments", "PyTorch's expandable segments are not asked for"),
        Some((name, value)) => {
            Finding::served("segments", format!("{name}={value}: regions hold expandable segments too"))
        }
    }
}

/// The variable that asks PyTorch for expandable segments, and its value.
fn asked_expandable_segments() -> Option<(&'static str, String)> {
    ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"]
        .into_iter()
        .map(|name| (name, std::env::var(name).unwrap_or_default()))
        .find(|(_, value)| asks_for_expandable_segments(value))
}

fn asks_for_expandable_segments(value: &str) -> bool {
    let plain: String = value.chars().filter(|c| !c.is_whitespace()).collect();
    plain.split(',').any(|setting| setting.eq_ignore_ascii_case("expandable_segments:true"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_with_a_local_part_are_understood() {
        assert!(is_tested("2.15.0+cu132") && is_tested("2.9.1+cu128"));
        assert!(!is_tested("2.8.0") && !is_tested("3.0") && !is_tested("nonsense"));
    }

    #[test]
    fn expandable_segments_are_seen_among_other_settings() {
        assert!(asks_for_expandable_segments("max_split_size_mb:64, expandable_segments:True"));
        assert!(!asks_for_expandable_segments("expandable_segments:False"));
    }
}
