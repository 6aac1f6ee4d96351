//! The library offers every name that the PyTorch wheels import, and nothing that it should not.
#![allow(clippy::expect_used, clippy::unwrap_used, clippy::panic)]

#[allow(dead_code)]
mod common;

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

fn exported() -> BTreeSet<String> {
    let output = Command::new("nm").args(["-D", "--defined-only"]).arg(common::library()).output().expect("nm");
    assert!(output.status.success());
    String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .filter_map(|line| line.split_whitespace().nth(2).map(str::to_string))
        .collect()
}

fn listed(name: &str) -> Vec<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).map(str::to_string).collect()
}

#[test]
fn everything_the_wheels_import_is_there() {
    let exported = exported();
    for wheel in ["symbols/torch-2.15.0-cu132.txt", "symbols/torch-2.11.0-cu130.txt", "symbols/torch-2.9.1-cu128.txt"] {
        let wanted = listed(wheel);
        assert!(wanted.len() > 700, "{wheel} has only {} names", wanted.len());
        let missing: Vec<_> = wanted.iter().filter(|name| !exported.contains(*name)).collect();
        assert!(missing.is_empty(), "{wheel}: {missing:?}");
    }
}

#[test]
fn names_are_unversioned_and_of_nvidias_families_or_ours() {
    let families = ["cu", "__cuda", "nv", "nccl", "sire_sim_"];
    for name in exported() {
        assert!(!name.contains('@'), "{name} has a version");
        assert!(families.iter().any(|family| name.starts_with(family)), "{name} leaks out of the library");
    }
}

#[test]
fn no_stub_hides_what_is_implemented() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("stubs");
    let mut names = BTreeSet::new();
    for entry in std::fs::read_dir(source).unwrap() {
        let text = std::fs::read_to_string(entry.unwrap().path()).unwrap();
        for line in text
            .lines()
            .filter(|line| !line.is_empty() && !["#", "library ", "status "].iter().any(|head| line.starts_with(head)))
        {
            assert!(names.insert(line.split(' ').next().unwrap().to_string()), "{line} is listed twice");
        }
    }
    let library = exported();
    assert!(names.iter().all(|name| library.contains(name)));
}

#[test]
fn it_loads_without_anything_else_of_nvidias() {
    let output = Command::new("readelf").arg("-d").arg(common::library()).output().expect("readelf");
    let text = String::from_utf8(output.stdout).unwrap();
    let needed: Vec<&str> = text.lines().filter(|line| line.contains("(NEEDED)")).collect();
    assert!(
        !needed.is_empty() && needed.iter().all(|line| !line.contains("libcu") && !line.contains("libnv")),
        "{needed:?}"
    );
    assert!(!text.contains("(SONAME)"), "one file serves under many names only without a SONAME");
    // SAFETY: the library's initialisers do nothing.
    let library = unsafe { libloading::Library::new(common::library()) }.expect("dlopen");
    // SAFETY: the signature is the library's.
    let stub = unsafe { library.get::<unsafe extern "C" fn() -> i64>(b"cublasSgemm_v2\0") }.expect("a stub");
    // SAFETY: a stub looks at no argument.
    assert_eq!(unsafe { stub() }, 15, "CUBLAS_STATUS_NOT_SUPPORTED");
}

#[test]
fn sonames_cover_what_torch_links() {
    let common =
        ["libcuda.so.1", "libnvidia-ml.so.1", "libcudnn.so.9", "libnccl.so.2", "libcurand.so.10", "libcusparseLt.so.0"];
    let thirteen = ["libcudart.so.13", "libcublas.so.13", "libcusolver.so.12", "libcusparse.so.12", "libcufft.so.12"];
    let twelve = ["libcudart.so.12", "libcublas.so.12", "libcusolver.so.11", "libcusparse.so.12", "libcufft.so.11"];
    for (list, own) in [("sonames-cuda13.txt", thirteen), ("sonames-cuda12.txt", twelve)] {
        let sonames = listed(list);
        for needed in common.iter().chain(&own) {
            assert!(sonames.iter().any(|soname| soname == needed), "{list}: {needed}");
        }
        let runtimes = sonames.iter().filter(|soname| soname.starts_with("libcudart.so.")).count();
        assert_eq!(runtimes, 1, "{list}: the runtime's name says which CUDA is meant");
    }
}
