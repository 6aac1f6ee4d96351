//! Memory rules of the device: virtual memory, heap, host memory, poison, and the proof of release by the
//! operating system's own count of the memory file's blocks.

use sire_sim::{AccessDesc, Code, CopyKind, Machine, Options, POISON, PhysicalId, PointerKind, Poison, Prot};

type Outcome = Result<(), Box<dyn std::error::Error>>;

const MIB: u64 = 1 << 20;
const FRAME: u64 = 2 * MIB;
const RW: [AccessDesc; 1] = [AccessDesc { device: 0, prot: Prot::ReadWrite }];

fn code<T>(result: Result<T, sire_sim::SimError>) -> i32 {
    result.map_or_else(|error| error.code.0, |_| 0)
}

/// Bytes that the system keeps for device 0, by stat of the file that the census names.
fn committed(machine: &Machine) -> Result<u64, Box<dyn std::error::Error>> {
    use std::os::unix::fs::MetadataExt;
    let census = machine.census();
    let path = census["devices"][0]["memory_file"].as_str().ok_or("no memory_file")?.to_string();
    Ok(std::fs::metadata(path)?.blocks() * 512)
}

fn mapped(machine: &Machine, size: u64) -> Result<(u64, PhysicalId), sire_sim::SimError> {
    let addr = machine.reserve(size, 0, 0)?;
    let physical = machine.create(0, size, 77)?;
    machine.map(addr, size, 0, physical)?;
    machine.set_access(addr, size, &RW)?;
    Ok((addr, physical))
}

#[test]
fn release_is_seen_by_the_operating_system() -> Outcome {
    let machine = Machine::new(Options { memory: 64 * MIB, ..Options::default() })?;
    let (addr, physical) = mapped(&machine, 16 * MIB)?;
    assert_eq!(committed(&machine)?, 16 * MIB, "fresh memory is poisoned, so it is all there");
    machine.release(physical)?;
    assert_eq!(committed(&machine)?, 16 * MIB, "a mapping keeps released memory");
    machine.unmap(addr, 16 * MIB)?;
    assert_eq!(committed(&machine)?, 0);
    let kept = machine.create(0, 8 * MIB, 0)?;
    machine.map(addr, 8 * MIB, 0, kept)?;
    machine.unmap(addr, 8 * MIB)?;
    assert_eq!(committed(&machine)?, 8 * MIB, "unmapping alone releases nothing");
    machine.release(kept)?;
    assert_eq!(committed(&machine)?, 0);
    let ptr = machine.malloc(0, 5 * MIB)?;
    assert_eq!(committed(&machine)?, 6 * MIB);
    machine.free(ptr)?;
    assert_eq!(committed(&machine)?, 0);
    assert_eq!(machine.memory_info(0)?, (64 * MIB, 64 * MIB));
    Ok(())
}

#[test]
fn census_names_every_frame() -> Outcome {
    let machine = Machine::new(Options { memory: 64 * MIB, ..Options::default() })?;
    let (_, physical) = mapped(&machine, 4 * MIB)?;
    machine.malloc(0, 100)?;
    let census = machine.census();
    let device = &census["devices"][0];
    assert_eq!(device["used_bytes"], 6 * MIB);
    assert_eq!(device["committed_bytes"], 6 * MIB);
    let runs = device["runs"].as_array().ok_or("runs")?;
    let seen: Vec<_> =
        runs.iter().map(|run| (run["api"].as_str(), run["tag"].as_u64(), run["refs"].as_u64())).collect();
    assert_eq!(seen, [(Some("cuMemCreate"), Some(77), Some(2)), (Some("cudaMalloc"), Some(0), Some(1))]);
    assert_eq!(runs[0]["pid"], std::process::id());
    machine.release(physical)?;
    assert_eq!(machine.census()["devices"][0]["runs"][0]["refs"], 1);
    assert_eq!(machine.processes(0)?, [(std::process::id(), 6 * MIB)]);
    Ok(())
}

#[test]
fn mappings_that_fill_a_range_are_removed_at_once() -> Outcome {
    let machine = Machine::new(Options { memory: 16 * MIB, ..Options::default() })?;
    let addr = machine.reserve(6 * FRAME, 0, 0)?;
    for (at, frames) in [(0, 1), (1, 2), (4, 1)] {
        let physical = machine.create(0, frames * FRAME, 0)?;
        machine.map(addr + at * FRAME, frames * FRAME, 0, physical)?;
        machine.release(physical)?;
    }
    let refused = [(0, 2), (2, 1), (0, 5), (3, 1), (0, 0)];
    for (at, frames) in refused {
        assert_eq!(
            code(machine.unmap_range(addr + at * FRAME, frames * FRAME)),
            Code::INVALID_VALUE.0,
            "{at} {frames}"
        );
    }
    assert_eq!(machine.memory_info(0)?.0, 16 * MIB - 4 * FRAME, "a refused unmap changed something");
    machine.unmap_range(addr, 3 * FRAME)?;
    machine.unmap_range(addr + 4 * FRAME, FRAME)?;
    assert_eq!(machine.memory_info(0)?.0, 16 * MIB);
    machine.unreserve(addr, 6 * FRAME)?;
    Ok(())
}

#[test]
fn virtual_memory_refuses_with_cudas_codes() -> Outcome {
    let machine = Machine::new(Options { memory: 16 * MIB, ..Options::default() })?;
    let invalid = Code::INVALID_VALUE.0;
    assert_eq!(code(machine.reserve(FRAME + 1, 0, 0)), invalid);
    assert_eq!(code(machine.reserve(FRAME, 3 * FRAME, 0)), invalid);
    assert_eq!(code(machine.create(0, MIB, 0)), invalid);
    assert_eq!(code(machine.create(7, FRAME, 0)), Code::INVALID_DEVICE.0);
    assert_eq!(code(machine.create(0, 18 * MIB, 0)), Code::OUT_OF_MEMORY.0);
    let (addr, physical) = mapped(&machine, 2 * FRAME)?;
    assert_eq!(code(machine.map(addr, 2 * FRAME, FRAME, physical)), invalid, "an offset");
    assert_eq!(code(machine.unreserve(addr, 2 * FRAME)), invalid, "memory is mapped there");
    assert_eq!(code(machine.unmap(addr, FRAME)), invalid);
    assert_eq!(code(machine.set_access(addr, FRAME, &RW)), invalid, "half a mapping");
    assert_eq!(code(machine.free(addr)), invalid, "cudaFree of a mapping");
    assert_eq!(machine.get_access(addr, 0)?, Prot::ReadWrite);
    assert_eq!(machine.address_range(addr + 5)?, (addr, 2 * FRAME));
    assert_eq!(machine.pointer(addr).kind, PointerKind::Device);
    assert_eq!(machine.physical_info(physical)?.tag, 77);
    let again = machine.retain(addr + FRAME)?;
    assert_eq!(again, physical, "the same handle, counted once more");
    machine.release(physical)?;
    machine.release(again)?;
    assert_eq!(code(machine.release(physical)), invalid);
    machine.unmap(addr, 2 * FRAME)?;
    assert_eq!(code(machine.get_access(addr, 0)), invalid);
    machine.unreserve(addr, 2 * FRAME)?;
    assert_eq!(machine.memory_info(0)?.0, 16 * MIB);
    Ok(())
}

#[test]
fn read_only_memory_cannot_be_written() -> Outcome {
    let machine = Machine::new(Options { memory: 16 * MIB, ..Options::default() })?;
    let (addr, _) = mapped(&machine, FRAME)?;
    machine.set_access(addr, FRAME, &[AccessDesc { device: 0, prot: Prot::Read }])?;
    assert!(machine.accessible(addr, FRAME, 0, false) && !machine.accessible(addr, FRAME, 0, true));
    let mut out = [0u8; 4];
    // SAFETY: `out` is valid during the call, which waits.
    unsafe { machine.memcpy(0, out.as_mut_ptr() as u64, addr, 4, CopyKind::DeviceToHost) }?;
    assert_eq!(out, POISON);
    machine.memset(0, addr, sire_sim::Pattern::U8(0), 4)?;
    assert_eq!(code(machine.device_synchronize(0)), Code::ILLEGAL_ADDRESS.0);
    Ok(())
}

#[test]
fn another_device_needs_access_of_its_own() -> Outcome {
    let machine = Machine::new(Options { devices: 2, memory: 16 * MIB, ..Options::default() })?;
    let (addr, _) = mapped(&machine, FRAME)?;
    let ptr = machine.malloc(0, 1000)?;
    assert!(!machine.accessible(addr, 8, 1, false) && !machine.accessible(ptr, 8, 1, false));
    machine.set_access(addr, FRAME, &[AccessDesc { device: 1, prot: Prot::ReadWrite }])?;
    machine.enable_peer(1, 0)?;
    assert!(machine.accessible(addr, 8, 1, true) && machine.accessible(ptr, 8, 1, true));
    assert!(machine.accessible(addr, 8, 0, true), "the first device keeps its access");
    assert_eq!(code(machine.enable_peer(1, 0)), Code::PEER_ACCESS_ALREADY_ENABLED.0);
    machine.disable_peer(1, 0)?;
    assert_eq!(code(machine.check_access(ptr, 8, 1, false)), Code::ILLEGAL_ADDRESS.0);
    assert_eq!(code(machine.memory_info(1)), Code::ILLEGAL_ADDRESS.0, "the error is sticky");
    assert_eq!(code(machine.memory_info(0)), 0, "the other device is well");
    Ok(())
}

#[test]
fn exported_memory_comes_back_by_its_descriptor() -> Outcome {
    let machine = Machine::new(Options { memory: 16 * MIB, ..Options::default() })?;
    let physical = machine.create(0, FRAME, 5)?;
    let fd = machine.export_physical(physical)?;
    assert_eq!(machine.import_physical(fd)?, physical);
    machine.release(physical)?;
    machine.release(physical)?;
    assert_eq!(code(machine.import_physical(fd)), Code::INVALID_VALUE.0);
    // SAFETY: the descriptor was made for this test, which owns it.
    unsafe { libc::close(fd) };
    Ok(())
}

#[test]
fn heap_shares_blocks_and_gives_them_back() -> Outcome {
    let machine = Machine::new(Options { memory: 16 * MIB, ..Options::default() })?;
    let small: Vec<u64> = (1..=100).map(|n| machine.malloc(0, n * 37)).collect::<Result<_, _>>()?;
    assert_eq!(machine.memory_info(0)?.0, 14 * MIB, "a hundred small ones share a frame");
    for (n, ptr) in small.iter().enumerate() {
        assert_eq!(ptr % 512, 0);
        let info = machine.pointer(ptr + 3);
        assert_eq!((info.base, info.size, info.vmm), (*ptr, (n as u64 + 1) * 37, false));
    }
    assert_eq!(machine.malloc(0, 0)?, 0);
    let large = machine.malloc(0, 13 * MIB)?;
    assert_eq!(code(machine.malloc(0, 2 * MIB)), Code::OUT_OF_MEMORY.0);
    machine.free(large)?;
    for ptr in small.iter().rev() {
        machine.free(*ptr)?;
    }
    assert_eq!(machine.memory_info(0)?.0, 16 * MIB);
    assert_eq!(code(machine.free(small[0])), Code::INVALID_VALUE.0, "freed twice");
    machine.free(0)?;
    Ok(())
}

#[test]
fn fresh_memory_is_poison_every_time() -> Outcome {
    let first_bytes = |machine: &Machine, ptr: u64, len: usize| {
        let mut out = vec![0u8; len];
        // SAFETY: `out` is valid during the call, which waits.
        unsafe { machine.memcpy(0, out.as_mut_ptr() as u64, ptr, len as u64, CopyKind::DeviceToHost) }.map(|()| out)
    };
    let machine = Machine::new(Options { memory: 16 * MIB, ..Options::default() })?;
    for _ in 0..2 {
        let ptr = machine.malloc(0, 4 * MIB)?;
        let bytes = first_bytes(&machine, ptr, 4 << 20)?;
        assert!(bytes == POISON.repeat(1 << 20));
        machine.memset(0, ptr, sire_sim::Pattern::U32(1), MIB)?;
        machine.free(ptr)?;
    }
    let off = Machine::new(Options { memory: 16 * MIB, poison: Poison::Off, ..Options::default() })?;
    let ptr = off.malloc(0, 4 * MIB)?;
    assert_eq!(committed(&off)?, 0);
    assert_eq!(first_bytes(&off, ptr, 8)?, [0; 8]);
    Ok(())
}

#[test]
fn host_memory_is_known_by_kind() -> Outcome {
    let machine = Machine::new(Options::default())?;
    let pinned = machine.host_alloc(0, 10_000, 3)?;
    let info = machine.pointer(pinned + 9_999);
    assert_eq!((info.kind, info.base, info.size, info.flags), (PointerKind::Pinned, pinned, 10_000, 3));
    let managed = machine.malloc_managed(0, 4096)?;
    assert_eq!(machine.pointer(managed).kind, PointerKind::Managed);
    let mut own = vec![0u8; 8192];
    let ptr = own.as_mut_ptr() as u64;
    assert_eq!(machine.pointer(ptr).kind, PointerKind::Pageable);
    // SAFETY: `own` lives to the end of this function, and is unregistered before.
    unsafe { machine.host_register(0, ptr, 8192, 0) }?;
    assert_eq!(machine.pointer(ptr + 8191).kind, PointerKind::Registered);
    // SAFETY: as above; this one is refused.
    let twice = unsafe { machine.host_register(0, ptr + 4096, 8192, 0) };
    assert_eq!(code(twice), Code::HOST_MEMORY_ALREADY_REGISTERED.0);
    assert_eq!(code(machine.host_free(ptr)), Code::INVALID_VALUE.0);
    machine.host_unregister(ptr)?;
    assert_eq!(code(machine.host_unregister(ptr)), Code::HOST_MEMORY_NOT_REGISTERED.0);
    machine.host_free(pinned)?;
    assert_eq!(machine.pointer(pinned).kind, PointerKind::Pageable);
    machine.free(managed)?;
    Ok(())
}

#[test]
fn timing_mode_keeps_pages_and_copies_right() -> Outcome {
    let machine = Machine::new(Options { memory: 32 * MIB, timing: true, ..Options::default() })?;
    assert_eq!(committed(&machine)?, 32 * MIB, "prefaulted");
    let (first, second) = (machine.malloc(0, 3 * MIB)?, machine.malloc(0, 6 * MIB)?);
    machine.free(first)?;
    // This one is in two pieces: the hole that `first` left, and the rest.
    let large = machine.malloc(0, 24 * MIB)?;
    let bytes: Vec<u8> = (0..24 * MIB).map(|n| (n / 4096) as u8).collect();
    let mut out = vec![0u8; bytes.len()];
    // SAFETY: both buffers are valid during the calls, which wait.
    unsafe {
        machine.memcpy(0, large, bytes.as_ptr() as u64, 24 * MIB, CopyKind::HostToDevice)?;
        machine.memcpy(0, out.as_mut_ptr() as u64, large, 24 * MIB, CopyKind::DeviceToHost)?;
    }
    assert!(out == bytes);
    machine.free(large)?;
    machine.free(second)?;
    assert_eq!(committed(&machine)?, 32 * MIB, "frames stay committed");
    Ok(())
}

#[test]
fn shutdown_gives_everything_back_and_ends_the_machine() -> Outcome {
    let path = std::env::temp_dir().join(format!("sire-sim-census-{}", std::process::id()));
    let machine = Machine::new(Options { census: Some(path.clone()), ..Options::default() })?;
    machine.malloc(0, 5 * MIB)?;
    machine.shutdown();
    machine.shutdown();
    assert_eq!(code(machine.malloc(0, 1)), Code::DEINITIALIZED.0);
    let census: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&path)?)?;
    std::fs::remove_file(&path)?;
    assert_eq!(census["devices"][0]["used_bytes"], 6 * MIB, "the census tells what leaked");
    Ok(())
}
