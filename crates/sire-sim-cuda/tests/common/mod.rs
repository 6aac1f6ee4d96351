//! Finding the built library, laying it out as programs expect it, and compiling and running C programs.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

/// The library: `SIRE_SIM_LIBRARY`, or what cargo builds beside this test.
pub fn library() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| std::env::var_os("SIRE_SIM_LIBRARY").map_or_else(build, PathBuf::from))
}

fn build() -> PathBuf {
    let test = std::env::current_exe().expect("the path of this test");
    let profile = test.ancestors().nth(2).expect("a target directory").to_path_buf();
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["build", "--offline", "--quiet", "--package", "sire-sim-cuda"]).current_dir(env!("CARGO_MANIFEST_DIR"));
    cargo.env("CARGO_TARGET_DIR", profile.parent().expect("a target directory"));
    if profile.ends_with("release") {
        cargo.arg("--release");
    }
    assert!(cargo.status().expect("cargo runs").success(), "the library does not build");
    profile.join("libsire_sim_cuda.so")
}

/// A new directory for this test process.
pub fn scratch(name: &str) -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let path = std::env::temp_dir().join(format!("sire-sim-cuda-{}-{number}-{name}", std::process::id()));
    std::fs::create_dir_all(&path).expect("a scratch directory");
    path
}

/// A compiled program in a directory of its own.
pub struct Program {
    dir: PathBuf,
    binary: PathBuf,
}

impl Program {
    /// Compiles `tests/c/NAME.c` against the library under its CUDA names.
    pub fn compile(name: &str) -> Program {
        Program::compile_for(name, "libcudart.so.13")
    }

    /// The same, with the runtime under the name that says which CUDA the program is built for.
    pub fn compile_for(name: &str, runtime: &str) -> Program {
        let dir = scratch(name);
        let sonames = [runtime, "libcuda.so.1", "libnvidia-ml.so.1"];
        for soname in sonames {
            std::os::unix::fs::symlink(library(), dir.join(soname)).expect("a link");
        }
        let binary = dir.join(name);
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/c").join(name).with_extension("c");
        let mut cc = Command::new(std::env::var_os("CC").unwrap_or_else(|| "cc".into()));
        cc.args(["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O1", "-o"]).arg(&binary).arg(source);
        cc.arg("-Wl,--no-as-needed").args(sonames.map(|soname| dir.join(soname)));
        cc.arg(format!("-Wl,-rpath,{}", dir.display()));
        let output = cc.output().expect("a C compiler");
        assert!(output.status.success(), "{name}.c: {}", String::from_utf8_lossy(&output.stderr));
        Program { dir, binary }
    }

    /// The program, ready for arguments and variables: two devices of 256 MiB.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.binary);
        for (name, _) in
            std::env::vars().filter(|(name, _)| name.starts_with("SIRE_") || name == "CUDA_VISIBLE_DEVICES")
        {
            command.env_remove(name);
        }
        command
            .env("SIRE_SIM_DEVICES", "2")
            .env("SIRE_SIM_MEMORY", "256MiB")
            .env("SIRE_SIM_POISON", "sample")
            .current_dir(&self.dir);
        command
    }

    /// Where the program may leave files.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // A directory that stays behind is a nuisance, not an error.
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// Runs it, asserts that it said "ok", and returns what it wrote.
pub fn passes(command: &mut Command) -> Output {
    let output = command.output().expect("the program runs");
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && stdout.contains("ok"), "{command:?}: {}\n{stdout}{stderr}", output.status);
    output
}
