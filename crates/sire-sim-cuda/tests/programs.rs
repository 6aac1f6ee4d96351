//! C programs against the interfaces: what a program that is not PyTorch sees.
#![allow(clippy::expect_used, clippy::unwrap_used, clippy::panic)]

mod common;

use common::{Program, passes, scratch};
use std::os::unix::process::ExitStatusExt;

/// A profile adds virtual time and changes nothing else.
fn with_and_without_clock(program: &Program) {
    passes(&mut program.command());
    passes(program.command().env("SIRE_SIM_PROFILE", "a100-pcie4-kvcached"));
}

#[test]
fn structs_and_errors() {
    passes(&mut Program::compile("layout").command());
}

#[test]
fn cuda_12_where_it_differs() {
    passes(&mut Program::compile_for("twelve", "libcudart.so.12").command());
}

/// What both have under one name and with the same arguments is one program's for both.
#[test]
fn programs_for_cuda_12_run() {
    for name in ["memory", "vmm"] {
        passes(&mut Program::compile_for(name, "libcudart.so.12").command());
    }
}

#[test]
fn heap_and_copies() {
    with_and_without_clock(&Program::compile("memory"));
}

#[test]
fn virtual_memory() {
    with_and_without_clock(&Program::compile("vmm"));
}

#[test]
fn a_lost_context_stays_lost() {
    passes(&mut Program::compile("lost").command());
}

#[test]
fn capture_and_replay() {
    with_and_without_clock(&Program::compile("capture"));
}

#[test]
fn streams_and_events() {
    passes(Program::compile("order").command().env("SIRE_SIM_DELAY_US", "20000"));
}

#[test]
fn virtual_time() {
    let program = Program::compile("clock");
    passes(program.command().env("SIRE_SIM_PROFILE", "h100-pcie5-kvcached").arg("h100-pcie5-kvcached"));
    passes(&mut program.command());
}

#[test]
fn kernels_by_name() {
    let output = passes(&mut Program::compile("kernels").command());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("kernel not simulated: ") && stderr.contains("softmax_thing"), "{stderr}");
}

#[test]
fn each_device_has_its_own() {
    passes(&mut Program::compile("devices").command());
}

#[test]
fn driver_entry_points() {
    let names = include_str!("../symbols/driver-entry-points.txt");
    passes(Program::compile("entries").command().args(names.lines().filter(|line| !line.starts_with('#'))));
}

#[test]
fn faults() {
    let program = Program::compile("faults");
    passes(program.command().env("SIRE_SIM_FAULTS", "cudaMalloc#2=error:2; cudaMemset=error:719").arg("environment"));
    passes(program.command().env("SIRE_SIM_FAULTS", "cudaMalloc+4MiB=error:2").arg("bytes"));
    let killed = program.command().env("SIRE_SIM_FAULTS", "cudaFree#2=kill").arg("kill").output().unwrap();
    assert_eq!(killed.status.signal(), Some(9), "{killed:?}");
}

#[test]
fn the_census_at_exit_and_calls_after_it() {
    let program = Program::compile("leave");
    let census = program.dir().join("census.json");
    let output = passes(program.command().env("SIRE_SIM_CENSUS", &census));
    assert!(String::from_utf8_lossy(&output.stderr).contains("late 4"), "{output:?}");
    let census: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(census).unwrap()).unwrap();
    let device = &census["devices"][0];
    assert_eq!(device["used_bytes"], 6 << 20, "{census}");
    let apis: Vec<&str> = device["runs"].as_array().unwrap().iter().filter_map(|run| run["api"].as_str()).collect();
    assert_eq!(apis.len(), 2, "{census}");
}

#[test]
fn memory_of_all_processes() {
    let dir = scratch("environment");
    passes(Program::compile("monitor").command().env("SIRE_SIM_DIR", &dir));
    let _ = std::fs::remove_dir_all(dir);
}

#[test]
fn handles_for_other_processes() {
    let dir = scratch("handles");
    passes(Program::compile("ipc").command().env("SIRE_SIM_DIR", &dir).env("SIRE_SIM_DEVICES", "2"));
    let _ = std::fs::remove_dir_all(dir);
}

#[test]
fn visible_devices() {
    let program = Program::compile("visible");
    let run = |visible: &str| {
        let mut command = program.command();
        command.env("SIRE_SIM_DEVICES", "3").env("CUDA_VISIBLE_DEVICES", visible);
        command
    };
    passes(&mut run("2,0"));
    passes(&mut run("2,0,-1,1"));
    passes(run("").arg("none"));
    passes(run("0,0").arg("none"));
}

#[test]
fn parts_of_gpus() {
    let program = Program::compile("mig");
    let run = |visible: Option<&str>, what: &str| {
        let mut command = program.command();
        command.env("SIRE_SIM_DEVICES", "2").env("SIRE_SIM_MIG", "3").arg(what);
        command.envs(visible.map(|visible| ("CUDA_VISIBLE_DEVICES", visible)));
        passes(&mut command)
    };
    let printed = String::from_utf8(run(None, "print").stdout).unwrap();
    let names: Vec<&str> = printed.lines().collect();
    let [parts @ .., first, second, "ok"] = names.as_slice() else { panic!("{printed}") };
    assert_eq!(parts.len(), 6);
    for (number, part) in parts.iter().enumerate() {
        run(Some(part), &number.to_string());
    }
    // One part at most is seen: the first of what is named.
    run(None, "0");
    run(Some("1,0"), "3");
    run(Some(second), "3");
    run(Some(first), "0");
    run(Some(&format!("{},{}", parts[5], parts[1])), "5");
}

#[test]
fn bad_variables_are_named() {
    let program = Program::compile("layout");
    let output = program.command().env("SIRE_SIM_MEMORY", "lots").output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && stderr.contains("SIRE_SIM_MEMORY=lots"), "{stderr}");
    let output = program.command().env("SIRE_SIM_PROFILE", "fast").output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && stderr.contains("SIRE_SIM_PROFILE=fast: there is no profile fast"), "{stderr}");
}
