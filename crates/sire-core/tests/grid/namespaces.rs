//! Tests that need a machine of another kind, or change what holds for a whole process: each runs as a child of another test, with a directory of its
//! own, or a file system in the place of one.

use std::path::Path;
use std::process::{Command, Output};
use std::{fs, io};

/// What tells the child where its directory is.
const PLACE: &str = "SIRE_TEST_OWN_FILE_SYSTEM";

/// How many seconds a child may take.
const LONGEST: &str = "300";

/// Where a child's directory is; `None` outside of one.
pub fn place() -> Option<std::path::PathBuf> {
    std::env::var_os(PLACE).map(Into::into)
}

/// Runs an ignored test of this program with a file system in memory, made with these options, in the place of `dir`. Where this machine lets nobody do
/// that, it says so and nothing is asked.
pub fn run_with_own(dir: &Path, options: &str, test: &str) {
    if !behind(dir, options, Path::new("true"), &[]).is_ok_and(|done| done.status.success()) {
        eprintln!("this machine lets nobody mount a file system, or has no unshare (util-linux): {test} was not run");
        return;
    }
    let me = std::env::current_exe().unwrap();
    check(&behind(dir, options, &me, &alone(test)).unwrap());
}

/// Runs an ignored test of this program in a process of its own.
pub fn run_alone(dir: &Path, test: &str) {
    let mut command = Command::new("timeout");
    command.arg(LONGEST).arg(std::env::current_exe().unwrap()).args(alone(test)).env(PLACE, dir);
    check(&command.output().unwrap());
}

/// The arguments with which this program runs that test and nothing else.
fn alone(test: &str) -> [&str; 6] {
    ["--exact", test, "--ignored", "--test-threads", "1", "--nocapture"]
}

fn check(done: &Output) {
    let said = String::from_utf8_lossy(&done.stdout) + String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success() && said.contains("1 passed"), "{said}");
}

fn behind(dir: &Path, options: &str, program: &Path, arguments: &[&str]) -> io::Result<Output> {
    use std::os::unix::fs::MetadataExt;
    let is_root = fs::metadata("/proc/self")?.uid() == 0;
    let script = r#"mount -t tmpfs -o "$1" none "$0" && shift && exec "$@""#;
    let mut command = Command::new("timeout");
    command
        .args([LONGEST, "unshare", "--mount"])
        .args((!is_root).then_some("--map-root-user"))
        .args(["sh", "-c", script]);
    command.arg(dir).arg(options).arg(program).args(arguments).env(PLACE, dir).output()
}
