//! Processes that share the devices of an environment: one budget, one memory file, and nothing left
//! behind, neither by those who leave nor by those who are killed. Limits of a process as well.
//!
//! The other processes are this test binary again, running one ignored test (`child_*`) that reads what
//! to do from the environment.

use sire_sim::{Code, CopyKind, EventId, IPC_HANDLE, Machine, Options, Pattern, PointerKind, Poison};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

type Outcome = Result<(), Box<dyn std::error::Error>>;

const MIB: u64 = 1 << 20;

/// An environment directory that goes away.
struct Environment(PathBuf);

impl Environment {
    fn new(name: &str) -> std::io::Result<Environment> {
        let path = std::env::temp_dir().join(format!("sire-sim-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path)?;
        Ok(Environment(path))
    }

    fn options(&self) -> Options {
        Options { memory: 64 * MIB, dir: Some(self.0.clone()), ..Options::default() }
    }

    fn ledger(&self) -> PathBuf {
        self.0.join("device0.ledger")
    }
}

impl Drop for Environment {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A child that holds memory until it is told to go, or killed.
struct Holder {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl Holder {
    fn start(test: &str, dir: &Path, extra: &[(&str, &str)]) -> Result<Holder, Box<dyn std::error::Error>> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["--exact", test, "--ignored", "--nocapture", "--test-threads=1"])
            .env("SIRE_SIM_TEST_DIR", dir)
            .envs(extra.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let lines = BufReader::new(child.stdout.take().ok_or("no stdout")?);
        Ok(Holder { child, lines })
    }

    /// The next line that the child says to us.
    fn said(&mut self) -> Result<String, Box<dyn std::error::Error>> {
        loop {
            let mut line = String::new();
            if self.lines.read_line(&mut line)? == 0 {
                return Err("the child ended without a word".into());
            }
            if let Some(at) = line.find("child:") {
                return Ok(line[at + 6..].trim().to_string());
            }
        }
    }

    fn kill(mut self) -> std::io::Result<()> {
        self.child.kill()?; // SIGKILL
        self.child.wait().map(drop)
    }

    /// Tells the child to end, and waits until it has. A child that has said all it has to say may be gone already:
    /// a run was once refused because writing to it met a closed pipe.
    fn leave(mut self) -> Outcome {
        if let Some(mut stdin) = self.child.stdin.take() {
            match stdin.write_all(b"go\n") {
                Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => return Err(error.into()),
                _ => {}
            }
        }
        assert!(self.child.wait()?.success());
        Ok(())
    }
}

fn say(what: &str) {
    println!("\nchild: {what}");
}

fn wait_for_word() -> Outcome {
    std::io::stdin().read_line(&mut String::new())?;
    Ok(())
}

fn child_dir() -> Option<PathBuf> {
    std::env::var_os("SIRE_SIM_TEST_DIR").map(PathBuf::from)
}

#[test]
#[ignore = "run by the other tests as another process"]
fn child_holds_memory() -> Outcome {
    let Some(dir) = child_dir() else { return Ok(()) };
    let machine = Machine::new(Options { memory: 64 * MIB, dir: Some(dir), ..Options::default() })?;
    machine.create(0, 32 * MIB, 9)?;
    machine.malloc(0, 8 * MIB)?;
    if std::env::var_os("SIRE_SIM_TEST_FORK").is_some() {
        // SAFETY: the forked child only sleeps and ends, by calls that need no locks.
        unsafe {
            if libc::fork() == 0 {
                libc::close(0);
                libc::close(1);
                libc::close(2);
                libc::sleep(5);
                libc::_exit(0);
            }
        }
    }
    say("holding");
    wait_for_word()
}

#[test]
#[ignore = "run by the other tests as another process"]
fn child_never_rests() -> Outcome {
    let Some(dir) = child_dir() else { return Ok(()) };
    let machine = Machine::new(Options { dir: Some(dir), poison: Poison::Sample, ..Options::tiny(16 * MIB) })?;
    say("busy");
    loop {
        let (small, large) = (machine.create(0, 16 << 10, 0)?, machine.create(0, 4 * MIB, 0)?);
        machine.release(small)?;
        machine.release(large)?;
    }
}

#[test]
#[ignore = "run by the other tests as another process"]
fn child_is_killed_by_its_fault_plan() -> Outcome {
    let Some(dir) = child_dir() else { return Ok(()) };
    let faults = "cuMemCreate#3=kill".to_string();
    let machine = Machine::new(Options { memory: 64 * MIB, dir: Some(dir), faults, ..Options::default() })?;
    for _ in 0..3 {
        assert!(machine.enter_call("cuMemCreate", 2 * MIB).is_none());
        machine.create(0, 2 * MIB, 0)?;
    }
    say("alive");
    Ok(())
}

#[test]
#[ignore = "run by the other tests as another process"]
fn child_has_few_descriptors() -> Outcome {
    if child_dir().is_none() {
        return Ok(());
    }
    let limit = libc::rlimit { rlim_cur: 1024, rlim_max: 1024 };
    // SAFETY: `limit` is a live local of the right type.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) }, 0);
    let size = 80u64 << 30;
    let machine = Machine::new(Options { memory: size, poison: Poison::Off, ..Options::default() })?;
    let addr = machine.reserve(size, 0, 0)?;
    let frame = 2 * MIB;
    let rights = [sire_sim::AccessDesc { device: 0, prot: sire_sim::Prot::ReadWrite }];
    let handles: Vec<_> = (0..5000).map(|_| machine.create(0, frame, 0)).collect::<Result<_, _>>()?;
    for (n, handle) in handles.iter().enumerate() {
        machine.map(addr + n as u64 * frame, frame, 0, *handle)?;
    }
    machine.set_access(addr, 5000 * frame, &rights)?;
    let maps = std::fs::read_to_string("/proc/self/maps")?.lines().count();
    assert!(maps < 500, "neighbouring frames make one map: {maps}");
    let rest = machine.create(0, size - 5000 * frame, 0)?;
    assert_eq!(machine.memory_info(0)?, (0, size));
    assert_eq!(machine.create(0, frame, 0).map_err(|error| error.code), Err(Code::OUT_OF_MEMORY));
    machine.map(addr + 5000 * frame, size - 5000 * frame, 0, rest)?;
    machine.set_access(addr + 5000 * frame, size - 5000 * frame, &rights)?;
    machine.memset(0, addr + size - 4096, sire_sim::Pattern::U8(1), 4096)?;
    machine.device_synchronize(0)?;
    let committed = machine.census()["devices"][0]["committed_bytes"].as_u64();
    assert_eq!(committed, Some(4096), "sparse: only what was written is there");
    say("fits");
    Ok(())
}

#[test]
#[ignore = "run by the other tests as another process"]
fn child_forks() -> Outcome {
    if child_dir().is_none() {
        return Ok(());
    }
    let machine = Machine::new(Options::tiny(1 << 20))?;
    let ptr = machine.malloc(0, 4096)?;
    // SAFETY: the child calls only what needs no lock held by other threads of the parent: there are none that use the machine.
    match unsafe { libc::fork() } {
        0 => {
            let inert = machine.malloc(0, 4096).map_err(|error| error.code) == Err(Code::NOT_INITIALIZED);
            let mut page = 0u8;
            // SAFETY: mincore only looks; it fails with ENOMEM where nothing is mapped.
            let mapped = unsafe { libc::mincore(ptr as *mut libc::c_void, 4096, &mut page) } == 0;
            drop(machine);
            // SAFETY: _exit ends the forked child without running the parent's exit handlers.
            unsafe { libc::_exit(i32::from(!inert) + 2 * i32::from(mapped)) };
        }
        pid => {
            let mut status = -1;
            // SAFETY: `status` is a live, writable local.
            unsafe { libc::waitpid(pid, &mut status, 0) };
            assert_eq!(libc::WEXITSTATUS(status), 0, "1: verbs work in the child; 2: the mapping was inherited");
        }
    }
    assert_eq!(machine.memory_info(0)?.0, (1 << 20) - 4096, "the child's end took nothing away");
    machine.memset(0, ptr, sire_sim::Pattern::U8(1), 4096)?;
    machine.device_synchronize(0)?;
    say("inert");
    Ok(())
}

fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(text: &str) -> Result<[u8; IPC_HANDLE], Box<dyn std::error::Error>> {
    let bytes: Result<Vec<u8>, _> =
        (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16)).collect();
    bytes?.try_into().map_err(|_| "not as long as a handle".into())
}

/// Fills `bytes` at `ptr`, or says whether they all are what was filled in.
fn fill(machine: &Machine, ptr: u64, value: u8, bytes: u64) -> Outcome {
    machine.memset(0, ptr, Pattern::U8(value), bytes)?;
    Ok(machine.device_synchronize(0)?)
}

fn holds(machine: &Machine, ptr: u64, value: u8, bytes: u64) -> Result<bool, Box<dyn std::error::Error>> {
    let mut seen = vec![0u8; bytes as usize];
    let stream = machine.legacy_stream(0)?;
    // SAFETY: `seen` is as long as the copy and lives until the device is synchronised.
    unsafe { machine.memcpy_async(seen.as_mut_ptr() as u64, ptr, bytes, CopyKind::Default, stream)? };
    machine.device_synchronize(0)?;
    Ok(seen.iter().all(|byte| *byte == value))
}

/// What a child has in the memory that it hands out.
const LARGE: u64 = 6 * MIB;
const SMALL: u64 = 4096;

#[test]
#[ignore = "run by the other tests as another process"]
fn child_hands_memory_out() -> Outcome {
    let Some(dir) = child_dir() else { return Ok(()) };
    let machine = Machine::new(Options { memory: 64 * MIB, dir: Some(dir), ..Options::default() })?;
    let (_, small, large) = (machine.malloc(0, 512)?, machine.malloc(0, SMALL)?, machine.malloc(0, LARGE)?);
    fill(&machine, small, 1, SMALL)?;
    fill(&machine, large, 2, LARGE)?;
    let event = machine.event_create_shared(0)?;
    for handle in [machine.ipc_handle(small + 100)?, machine.ipc_handle(large)?, machine.ipc_event_handle(event)?] {
        say(&to_hex(&handle));
    }
    assert_eq!(machine.ipc_open(&machine.ipc_handle(large)?, 0).map_err(|error| error.code.0), Err(201));
    assert_eq!(machine.ipc_open_event(0, &machine.ipc_event_handle(event)?).map_err(|error| error.code.0), Err(201));
    // Something that takes until the word comes, and an event behind it.
    let stream = machine.stream_create(0, false, 0)?;
    let heard = std::sync::Arc::new(AtomicBool::new(false));
    let waits = std::sync::Arc::clone(&heard);
    let wait = move || {
        while !waits.load(Ordering::Acquire) {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    };
    machine.launch_host(stream, std::sync::Arc::new(wait))?;
    machine.memset_async(large, Pattern::U8(3), MIB, stream)?;
    machine.event_record(event, stream)?;
    say("recorded");
    wait_for_word()?;
    heard.store(true, Ordering::Release);
    machine.device_synchronize(0)?;
    assert!(machine.event_query(event)?);
    assert!(holds(&machine, small, 9, SMALL)?, "what the other process wrote is here");
    if std::env::var_os("SIRE_SIM_TEST_FREE").is_some() {
        machine.free(large)?;
        machine.free(small)?;
        say("freed");
        wait_for_word()?;
    }
    Ok(())
}

/// A machine, and a child whose memory and event it has opened.
struct Visit {
    environment: Environment,
    machine: Machine,
    holder: Holder,
    handles: [[u8; IPC_HANDLE]; 3],
    small: u64,
    large: u64,
    event: EventId,
}

impl Visit {
    fn start(name: &str, extra: &[(&str, &str)]) -> Result<Visit, Box<dyn std::error::Error>> {
        let environment = Environment::new(name)?;
        let machine = Machine::new(environment.options())?;
        let mut holder = Holder::start("child_hands_memory_out", &environment.0, extra)?;
        let handles = [from_hex(&holder.said()?)?, from_hex(&holder.said()?)?, from_hex(&holder.said()?)?];
        assert_eq!(holder.said()?, "recorded");
        let (small, large) = (machine.ipc_open(&handles[0], 0)?, machine.ipc_open(&handles[1], 0)?);
        let event = machine.ipc_open_event(0, &handles[2])?;
        Ok(Visit { environment, machine, holder, handles, small, large, event })
    }

    fn used(&self) -> Result<u64, sire_sim::SimError> {
        self.machine.memory_info(0).map(|(free, total)| total - free)
    }

    /// (bytes, uses by others) of the runs that a process owns.
    fn owned(&self, pid: u32) -> (u64, Vec<u64>) {
        let census = self.machine.census();
        let runs = census["devices"][0]["runs"].as_array().cloned().unwrap_or_default();
        let own: Vec<_> = runs.iter().filter(|run| run["pid"].as_u64() == Some(pid.into())).collect();
        let frames: u64 = own.iter().filter_map(|run| run["count"].as_u64()).sum();
        (frames * 2 * MIB, own.iter().filter_map(|run| run["held"].as_u64()).collect())
    }

    /// Lets the child's stream go on, and the child end when nothing more is asked of it.
    fn word(&mut self) -> Outcome {
        Ok(self.holder.child.stdin.as_mut().ok_or("no stdin")?.write_all(b"go\n")?)
    }
}

#[test]
fn memory_and_events_of_another_process() -> Outcome {
    let mut visit = Visit::start("opened", &[])?;
    let (machine, other) = (visit.machine.clone(), visit.holder.child.id());
    assert!(holds(&machine, visit.small, 1, SMALL)? && holds(&machine, visit.large, 2, LARGE)?);
    let info = machine.pointer(visit.small + 5);
    assert_eq!((info.kind, info.base, info.size), (PointerKind::Device, visit.small, SMALL));
    assert_eq!(visit.used()?, 8 * MIB, "what is shared counts once");
    assert_eq!(visit.owned(other), (8 * MIB, vec![1]));
    assert_eq!(visit.owned(std::process::id()), (0, vec![]));
    assert_eq!(machine.ipc_open(&visit.handles[0], 0)?, visit.small, "open already: the same address");
    machine.ipc_close(visit.small)?;
    for refused in
        [machine.free(visit.large), machine.ipc_close(visit.large + 512), machine.ipc_handle(visit.large).map(drop)]
    {
        assert_eq!(refused.map_err(|error| error.code), Err(Code::INVALID_VALUE));
    }
    assert_eq!(machine.ipc_open(&visit.handles[2], 0).map_err(|error| error.code), Err(Code::INVALID_HANDLE));
    assert_eq!(machine.ipc_open_event(0, &visit.handles[0]).map_err(|error| error.code), Err(Code::INVALID_HANDLE));
    fill(&machine, visit.small, 9, SMALL)?;

    // The other process's stream has not come to the event, so what is behind it here waits.
    assert!(!machine.event_query(visit.event)?);
    let stream = machine.stream_create(0, false, 0)?;
    machine.stream_wait_event(stream, visit.event)?;
    let copy = machine.malloc(0, MIB)?;
    // SAFETY: both are device memory of at least MIB bytes.
    unsafe { machine.memcpy_async(copy, visit.large, MIB, CopyKind::Default, stream)? };
    assert!(!machine.stream_query(stream)?);
    visit.word()?;
    machine.stream_synchronize(stream)?;
    machine.event_synchronize(visit.event)?;
    assert!(holds(&machine, copy, 3, MIB)?);
    assert!(visit.holder.child.wait()?.success());
    machine.free(copy)?;
    assert_eq!(visit.used()?, 8 * MIB, "its maker has left, but it is open here");
    assert_eq!(visit.owned(std::process::id()), (8 * MIB, vec![0]));
    assert!(holds(&machine, visit.large, 3, MIB)? && holds(&machine, visit.large + MIB, 2, LARGE - MIB)?);
    assert_eq!(machine.ipc_open(&visit.handles[1], 0)?, visit.large);
    machine.ipc_close(visit.large)?;
    machine.ipc_close(visit.large)?;
    machine.ipc_close(visit.small)?;
    machine.event_destroy(visit.event)?;
    assert_eq!(visit.used()?, 0);
    assert_eq!(machine.census()["devices"][0]["committed_bytes"], 0);
    assert_eq!(machine.ipc_open(&visit.handles[1], 0).map_err(|error| error.code), Err(Code::INVALID_HANDLE));
    assert_eq!(machine.ipc_open_event(0, &visit.handles[2]).map_err(|error| error.code), Err(Code::INVALID_HANDLE));
    assert!(visit.environment.ledger().exists());
    Ok(())
}

#[test]
fn memory_that_its_maker_frees_while_it_is_open() -> Outcome {
    let mut visit = Visit::start("freed", &[("SIRE_SIM_TEST_FREE", "1")])?;
    fill(&visit.machine, visit.small, 9, SMALL)?;
    visit.word()?;
    assert_eq!(visit.holder.said()?, "freed");
    assert_eq!(visit.used()?, 8 * MIB);
    assert!(holds(&visit.machine, visit.large + MIB, 2, LARGE - MIB)?);
    visit.machine.ipc_close(visit.large)?;
    assert_eq!(visit.used()?, 2 * MIB, "the child's other small allocation is in the same frame");
    visit.machine.ipc_close(visit.small)?;
    assert_eq!(visit.used()?, 2 * MIB);
    visit.holder.leave()?;
    assert_eq!(visit.machine.memory_info(0)?.0, 64 * MIB);
    Ok(())
}

#[test]
fn the_maker_of_open_memory_is_killed() -> Outcome {
    let visit = Visit::start("maker-killed", &[])?;
    let stream = visit.machine.stream_create(0, false, 0)?;
    visit.machine.stream_wait_event(stream, visit.event)?;
    assert!(!visit.machine.stream_query(stream)?);
    visit.holder.kill()?;
    visit.machine.stream_synchronize(stream)?;
    assert!(visit.machine.event_query(visit.event)?, "nobody will come to it any more");
    let used = |machine: &Machine| machine.memory_info(0).map(|(free, total)| total - free);
    assert_eq!(used(&visit.machine)?, 8 * MIB);
    assert!(holds(&visit.machine, visit.large + MIB, 2, LARGE - MIB)?);
    visit.machine.ipc_close(visit.large)?;
    visit.machine.ipc_close(visit.small)?;
    assert_eq!(used(&visit.machine)?, 0);
    assert_eq!(visit.machine.census()["devices"][0]["committed_bytes"], 0);
    Ok(())
}

#[test]
#[ignore = "run by the other tests as another process"]
fn child_opens_memory() -> Outcome {
    let Some(dir) = child_dir() else { return Ok(()) };
    let machine = Machine::new(Options { memory: 64 * MIB, dir: Some(dir), ..Options::default() })?;
    let opened = machine.ipc_open(&from_hex(&std::env::var("SIRE_SIM_TEST_HANDLE")?)?, 0)?;
    assert!(holds(&machine, opened, 5, LARGE)?);
    say("open");
    wait_for_word()
}

#[test]
fn who_has_opened_memory_is_killed() -> Outcome {
    let environment = Environment::new("opener-killed")?;
    let machine = Machine::new(environment.options())?;
    let ptr = machine.malloc(0, LARGE)?;
    fill(&machine, ptr, 5, LARGE)?;
    let handle = to_hex(&machine.ipc_handle(ptr)?);
    let start = || Holder::start("child_opens_memory", &environment.0, &[("SIRE_SIM_TEST_HANDLE", &handle)]);
    let (mut first, mut second) = (start()?, start()?);
    assert_eq!((first.said()?.as_str(), second.said()?.as_str()), ("open", "open"));
    first.kill()?;
    assert_eq!(machine.memory_info(0)?.0, 58 * MIB);
    machine.free(ptr)?;
    assert_eq!(machine.memory_info(0)?.0, 58 * MIB, "the second one has it still");
    assert_eq!(machine.processes(0)?, [(second.child.id(), LARGE)]);
    second.kill()?;
    assert_eq!(machine.memory_info(0)?.0, 64 * MIB);
    assert_eq!(machine.census()["devices"][0]["committed_bytes"], 0);
    Ok(())
}

#[test]
fn exported_descriptors_work_in_other_machines() -> Outcome {
    let environment = Environment::new("descriptors")?;
    let (mine, other) = (Machine::new(environment.options())?, Machine::new(environment.options())?);
    let physical = mine.create(0, 4 * MIB, 77)?;
    // SAFETY: the descriptor was made for us.
    let fd = unsafe { OwnedFd::from_raw_fd(mine.export_physical(physical)?) };
    let (first, second) = (other.import_physical(fd.as_raw_fd())?, other.import_physical(fd.as_raw_fd())?);
    assert_eq!(other.physical_info(first)?, mine.physical_info(physical)?);
    let map = |machine: &Machine, physical| -> Result<u64, sire_sim::SimError> {
        let at = machine.reserve(4 * MIB, 0, 0)?;
        machine.map(at, 4 * MIB, 0, physical)?;
        machine.set_access(at, 4 * MIB, &[sire_sim::AccessDesc { device: 0, prot: sire_sim::Prot::ReadWrite }])?;
        Ok(at)
    };
    let (here, there) = (map(&mine, physical)?, map(&other, first)?);
    fill(&mine, here, 4, 4 * MIB)?;
    assert!(holds(&other, there, 4, 4 * MIB)?);
    assert_eq!(mine.memory_info(0)?.0, 60 * MIB);
    mine.release(physical)?;
    mine.unmap(here, 4 * MIB)?;
    other.release(first)?;
    assert_eq!(mine.memory_info(0)?.0, 60 * MIB, "mapped in the other machine");
    other.unmap(there, 4 * MIB)?;
    assert_eq!(mine.memory_info(0)?.0, 60 * MIB, "and imported twice");
    other.release(second)?;
    assert_eq!(mine.memory_info(0)?.0, 64 * MIB);
    assert_eq!(other.import_physical(fd.as_raw_fd()).map_err(|error| error.code), Err(Code::INVALID_VALUE));
    let stranger = Machine::new(Options::default())?;
    assert_eq!(stranger.import_physical(fd.as_raw_fd()).map_err(|error| error.code), Err(Code::INVALID_VALUE));
    Ok(())
}

#[test]
fn processes_share_one_budget_and_one_file() -> Outcome {
    let environment = Environment::new("budget")?;
    let machine = Machine::new(environment.options())?;
    let mut holder = Holder::start("child_holds_memory", &environment.0, &[])?;
    assert_eq!(holder.said()?, "holding");
    assert_eq!(machine.memory_info(0)?, (24 * MIB, 64 * MIB));
    assert_eq!(machine.create(0, 26 * MIB, 0).map_err(|error| error.code), Err(Code::OUT_OF_MEMORY));
    let mine = machine.create(0, 24 * MIB, 0)?;
    let census = machine.census();
    let device = &census["devices"][0];
    assert_eq!(device["committed_bytes"], 64 * MIB, "the memory of both is in one file");
    let pids: Vec<_> = device["runs"].as_array().ok_or("runs")?.iter().map(|run| run["pid"].as_u64()).collect();
    assert!(pids.contains(&Some(u64::from(holder.child.id()))) && pids.contains(&Some(u64::from(std::process::id()))));
    machine.release(mine)?;
    holder.leave()?;
    assert_eq!(machine.memory_info(0)?, (64 * MIB, 64 * MIB));
    assert_eq!(machine.census()["devices"][0]["committed_bytes"], 0);
    assert!(environment.ledger().exists());
    drop(machine);
    assert!(!environment.ledger().exists(), "the last one out leaves nothing");
    Ok(())
}

#[test]
fn a_killed_process_gives_its_memory_back() -> Outcome {
    let environment = Environment::new("killed")?;
    let machine = Machine::new(environment.options())?;
    let census = machine.census();
    let file = census["devices"][0]["memory_file"].as_str().ok_or("memory_file")?;
    let mut holder = Holder::start("child_holds_memory", &environment.0, &[])?;
    assert_eq!(holder.said()?, "holding");
    assert_eq!(std::fs::metadata(file)?.blocks() * 512, 40 * MIB);
    holder.kill()?;
    assert_eq!(machine.create(0, 64 * MIB, 0).map(drop), Ok(()), "who needs the frames gets them");
    assert_eq!(std::fs::metadata(file)?.blocks() * 512, 64 * MIB);
    Ok(())
}

/// A forked child keeps its parent's descriptors, and with them the parent's locks: that must not keep
/// the memory of a parent that was killed.
#[test]
fn a_killed_process_gives_its_memory_back_though_its_child_lives() -> Outcome {
    let environment = Environment::new("orphan")?;
    let machine = Machine::new(environment.options())?;
    let mut holder = Holder::start("child_holds_memory", &environment.0, &[("SIRE_SIM_TEST_FORK", "1")])?;
    assert_eq!(holder.said()?, "holding");
    assert_eq!(machine.memory_info(0)?.0, 24 * MIB);
    holder.kill()?;
    assert_eq!(machine.memory_info(0)?.0, 64 * MIB);
    assert_eq!(machine.census()["devices"][0]["committed_bytes"], 0);
    Ok(())
}

/// Whenever the kill comes, also in the middle of a change of the ledger, nothing is lost and nobody waits.
#[test]
fn a_process_may_be_killed_at_any_moment() -> Outcome {
    let environment = Environment::new("moment")?;
    let options = Options { dir: Some(environment.0.clone()), poison: Poison::Off, ..Options::tiny(16 * MIB) };
    let machine = Machine::new(options)?;
    for round in 0..8 {
        let mut holder = Holder::start("child_never_rests", &environment.0, &[])?;
        assert_eq!(holder.said()?, "busy");
        std::thread::sleep(std::time::Duration::from_micros(700 * round));
        holder.kill()?;
        assert_eq!(machine.memory_info(0)?, (16 * MIB, 16 * MIB), "round {round}");
        let all = machine.create(0, 16 * MIB, 0)?;
        machine.release(all)?;
        assert_eq!(machine.census()["devices"][0]["committed_bytes"], 0);
    }
    Ok(())
}

#[test]
fn the_next_one_buries_an_environment_of_the_dead() -> Outcome {
    let environment = Environment::new("dead")?;
    let mut holder = Holder::start("child_holds_memory", &environment.0, &[])?;
    assert_eq!(holder.said()?, "holding");
    holder.kill()?;
    assert!(environment.ledger().exists());
    let machine = Machine::new(Options { memory: 32 * MIB, ..environment.options() })?;
    assert_eq!(machine.memory_info(0)?, (32 * MIB, 32 * MIB), "even with devices of another size");
    let other = Machine::new(environment.options());
    assert!(
        other.is_err_and(|error| error.message.contains("SIRE_SIM_MEMORY")),
        "while somebody lives, sizes are fixed"
    );
    let second = Machine::new(Options { memory: 32 * MIB, ..environment.options() })?;
    second.create(0, 8 * MIB, 0)?;
    assert_eq!(machine.memory_info(0)?.0, 24 * MIB, "two machines of one process are two members");
    drop(second);
    assert_eq!(machine.memory_info(0)?.0, 32 * MIB);
    Ok(())
}

#[test]
fn the_maker_may_leave_first() -> Outcome {
    let environment = Environment::new("maker")?;
    let maker = Machine::new(environment.options())?;
    maker.create(0, 4 * MIB, 0)?;
    let mut holder = Holder::start("child_holds_memory", &environment.0, &[])?;
    assert_eq!(holder.said()?, "holding");
    drop(maker);
    let machine = Machine::new(environment.options())?;
    assert_eq!(machine.memory_info(0)?.0, 24 * MIB, "the memory came from the one who stayed");
    assert_eq!(machine.processes(0)?, [(holder.child.id(), 40 * MIB)]);
    holder.leave()
}

#[test]
fn a_fault_plan_can_kill() -> Outcome {
    use std::os::unix::process::ExitStatusExt;
    let environment = Environment::new("fault")?;
    let machine = Machine::new(environment.options())?;
    let mut holder = Holder::start("child_is_killed_by_its_fault_plan", &environment.0, &[])?;
    assert!(holder.said().is_err(), "it never got past the third call");
    assert_eq!(holder.child.wait()?.signal(), Some(libc::SIGKILL));
    assert_eq!(machine.memory_info(0)?.0, 64 * MIB);
    Ok(())
}

#[test]
fn eighty_gibibytes_with_a_thousand_descriptors() -> Outcome {
    let mut holder = Holder::start("child_has_few_descriptors", Path::new("/"), &[])?;
    assert_eq!(holder.said()?, "fits");
    holder.leave()
}

#[test]
fn a_forked_child_has_nothing() -> Outcome {
    let mut holder = Holder::start("child_forks", Path::new("/"), &[])?;
    assert_eq!(holder.said()?, "inert");
    holder.leave()
}
