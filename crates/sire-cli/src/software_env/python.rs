//! Running the environment's Python and pip, with their chatter on standard error.

use std::ffi::{OsStr, OsString};
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde::Deserialize;

use crate::failure::{Failure, While as _};

const DISTRIBUTIONS: &str = include_str!("distributions.py");

/// What `distributions.py` found and did.
#[derive(Debug, Deserialize)]
pub struct Distributions {
    /// Version of the installed torch.
    pub torch: String,
    /// The empty distributions, as name==version.
    pub empty: Vec<String>,
    /// The requirements of torch that are really wanted.
    pub light: Vec<String>,
    /// Packages that brought real NVIDIA libraries.
    pub real: Vec<String>,
}

/// Version and usefulness of an interpreter: `Some("3.11.7")` if it runs and can do `module`.
pub fn version(python: &OsStr, module: &str) -> Option<String> {
    let code = format!("import sys, {module}; print('.'.join(map(str, sys.version_info[:3])))");
    let output = quiet(python).args(["-c", &code]).stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Makes, or repairs, the virtual environment's skeleton.
pub fn make_environment(python: &OsStr, dir: &Path) -> Result<(), Failure> {
    let shown = python.to_string_lossy();
    let found = version(python, "venv, ensurepip");
    let Some(found) = found else {
        return Err(match version(python, "os") {
            None => Failure::new(format!("'{shown}' does not run"))
                .advice("Install Python 3.10 or newer, or name another one: --python python3.12"),
            Some(_) => Failure::new(format!("'{shown}' lacks the modules venv and ensurepip"))
                .advice("On Debian and Ubuntu: apt-get install python3-venv. Or name another Python: --python PROGRAM"),
        });
    };
    if minor(&found) < 10 {
        return Err(Failure::new(format!("'{shown}' is Python {found}; 3.10 or newer is needed"))
            .advice("Name another one: --python python3.12"));
    }
    let mut command = quiet(python);
    command.args(["-m", "venv"]).arg(dir);
    run(command, "make the virtual environment", "Its messages are above; is the disk full?")
}

/// The minor part of a version such as 3.11.7.
pub fn minor(version: &str) -> u32 {
    version.split('.').nth(1).and_then(|part| part.parse().ok()).unwrap_or(0)
}

/// `pip SUBCOMMAND ARGUMENTS...`
pub fn pip<S: AsRef<OsStr>>(
    python: &Path,
    offline: bool,
    arguments: impl IntoIterator<Item = S>,
    doing: &str,
) -> Result<(), Failure> {
    let mut command = quiet(python.as_os_str());
    command.args(["-m", "pip"]).args(arguments);
    command.env("PIP_DISABLE_PIP_VERSION_CHECK", "1").env("PIP_NO_INPUT", "1").env("PIP_ROOT_USER_ACTION", "ignore");
    let mut advice =
        "pip's messages are above. Without a network, put the wheels into a directory and name it in PIP_FIND_LINKS.";
    if offline {
        command.env("PIP_NO_INDEX", "1");
        advice =
            "--offline takes packages from PIP_FIND_LINKS only; run once without it, or add the missing wheel there.";
    }
    run(command, doing, advice)
}

/// Writes the empty distributions for the torch that is installed.
pub fn distributions(python: &Path) -> Result<Distributions, Failure> {
    let mut command = quiet(python.as_os_str());
    command.args(["-c", DISTRIBUTIONS]).stderr(Stdio::piped());
    let output = command.output().while_(|| "run the environment's Python".into())?;
    let failed = |output: &Output| {
        let last = String::from_utf8_lossy(&output.stderr).lines().last().unwrap_or("no message").to_owned();
        Failure::new(format!("could not write the empty distributions: {last}"))
            .advice("Remove the directory and build it again.")
    };
    if !output.status.success() {
        return Err(failed(&output));
    }
    serde_json::from_slice(&output.stdout).map_err(|_| failed(&output))
}

/// A child that sees no Python settings of the caller's, and no pip target other than the environment.
fn quiet(python: &OsStr) -> Command {
    let mut command = Command::new(python);
    for name in [
        "PYTHONPATH",
        "PYTHONHOME",
        "PIP_USER",
        "PIP_TARGET",
        "PIP_PREFIX",
        "PIP_ROOT",
        "LD_PRELOAD",
        "__PYVENV_LAUNCHER__",
    ] {
        command.env_remove(name);
    }
    command.stdin(Stdio::null());
    command
}

fn run(mut command: Command, doing: &str, advice: &str) -> Result<(), Failure> {
    let program: OsString = command.get_program().to_owned();
    let _ = std::io::stderr().flush();
    command.stdout(std::io::stderr());
    let status = command
        .status()
        .map_err(|error| Failure::new(format!("could not start '{}': {error}", program.to_string_lossy())))?;
    if status.success() {
        return Ok(());
    }
    Err(Failure::new(format!("could not {doing} ({status})")).advice(advice))
}
