//! What the process and the thread remember: the machine, its end, contexts and the current device.

use crate::visible;
use sire_sim::{Code, Machine, Result};
use std::cell::Cell;
use std::fmt::Display;
use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

static MACHINE: OnceLock<Option<Machine>> = OnceLock::new();
static DOWN: AtomicBool = AtomicBool::new(false);
static FORKED: AtomicBool = AtomicBool::new(false);

/// Prints one line about `name` to standard error, without the lock that a forked child could find taken.
pub fn say(name: &str, message: &str) {
    // SAFETY: descriptor 2 stays open for as long as the process means it to; `ManuallyDrop` keeps us from closing it.
    let mut stderr = std::mem::ManuallyDrop::new(unsafe { <std::fs::File as std::os::fd::FromRawFd>::from_raw_fd(2) });
    let line = format!("sire-sim: {name}: {message}\n");
    // A closed standard error is no reason to fail.
    let _ = stderr.write_all(line.as_bytes());
}

/// The process's machine, made from the environment on first use; `None` if that failed (and was said).
pub fn machine() -> Option<&'static Machine> {
    MACHINE
        .get_or_init(|| match Machine::from_env() {
            Ok(machine) => {
                // SAFETY: both are functions without arguments that do not unwind.
                unsafe {
                    libc::atexit(at_exit);
                    libc::pthread_atfork(None, None, Some(forked));
                }
                Some(machine)
            }
            Err(error) => {
                say("start", &error.message);
                None
            }
        })
        .as_ref()
}

/// The machine if some call already made one.
pub fn existing_machine() -> Option<&'static Machine> {
    MACHINE.get().and_then(Option::as_ref)
}

extern "C" fn at_exit() {
    crate::boundary::contain("exit", (), || {
        if is_forked() {
            return;
        }
        if let Some(machine) = existing_machine() {
            machine.shutdown();
        }
    });
    DOWN.store(true, Ordering::Release);
}

extern "C" fn forked() {
    FORKED.store(true, Ordering::Release);
}

/// Whether this is the child of a process that had a machine: CUDA does not survive a fork.
pub fn is_forked() -> bool {
    FORKED.load(Ordering::Acquire)
}

/// Whether the process is past the device's shutdown: static destructors still call, and get `cudaErrorCudartUnloading`.
pub fn is_down() -> bool {
    DOWN.load(Ordering::Acquire)
}

/// Names that programs gave to memory; a label is a position here plus one.
static LABELS: Mutex<Vec<String>> = Mutex::new(Vec::new());

thread_local! {
    static LABEL: Cell<u16> = const { Cell::new(0) };
}

/// The label for physical memory that this thread makes; 0 is none.
pub fn label() -> u16 {
    LABEL.get()
}

/// Sets this thread's label; `None` ends it.
pub fn set_label(name: Option<&str>) -> Result<()> {
    let Some(name) = name.filter(|name| !name.is_empty()) else {
        LABEL.set(0);
        return Ok(());
    };
    let mut labels = lock(&LABELS);
    let at = labels.iter().position(|known| known == name).unwrap_or_else(|| {
        labels.push(name.to_string());
        labels.len() - 1
    });
    let label = u16::try_from(at + 1).map_err(|_| Code::INVALID_VALUE.because("more than 65535 different tags"))?;
    LABEL.set(label);
    Ok(())
}

/// The name of a label.
pub fn label_name(label: u16) -> Option<String> {
    lock(&LABELS).get(usize::from(label).checked_sub(1)?).cloned()
}

/// Locks, also if a panic (caught at the boundary) left the lock poisoned.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A context: what a `CUcontext` value says. 0 is none.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Context(pub u64);

const PRIMARY: u64 = 0x5152_0000_0000;
const CREATED: u64 = 0x5153_0000_0000;

/// Handles that are no machine's objects (contexts, pools, NVML's devices) are numbers of a family: a base
/// that no mapping has, plus an index times this.
pub const STRIDE: u64 = 64;

/// The index of a handle in the family that starts at `base`.
fn family_index(base: u64, handle: u64) -> Option<u64> {
    let offset = handle.checked_sub(base)?;
    offset.is_multiple_of(STRIDE).then_some(offset / STRIDE)
}

/// The device of a handle in a family with one member for each device.
pub fn device_of_family(machine: &Machine, base: u64, handle: u64) -> Option<u32> {
    family_index(base, handle)
        .and_then(|index| u32::try_from(index).ok())
        .filter(|device| *device < machine.device_count())
}

/// Contexts that `cuCtxCreate` made: device, or `None` once destroyed.
static CREATED_CONTEXTS: Mutex<Vec<Option<u32>>> = Mutex::new(Vec::new());

/// How often each device's primary context is retained. The runtime's own reference is one.
static PRIMARY_COUNT: [AtomicU32; sire_sim::options::MAX_DEVICES as usize] =
    [const { AtomicU32::new(0) }; sire_sim::options::MAX_DEVICES as usize];
static RUNTIME_HOLDS: [AtomicBool; sire_sim::options::MAX_DEVICES as usize] =
    [const { AtomicBool::new(false) }; sire_sim::options::MAX_DEVICES as usize];

impl Context {
    /// The primary context of `device`.
    pub fn primary(device: u32) -> Context {
        Context(PRIMARY + u64::from(device) * STRIDE)
    }

    /// A new context on `device`.
    pub fn create(device: u32) -> Context {
        let mut created = lock(&CREATED_CONTEXTS);
        created.push(Some(device));
        Context(CREATED + (created.len() as u64 - 1) * STRIDE)
    }

    /// Ends a context that `create` made.
    pub fn destroy(self) -> Result<()> {
        let mut created = lock(&CREATED_CONTEXTS);
        match created.get_mut(self.created_index()) {
            Some(slot @ Some(_)) => {
                *slot = None;
                Ok(())
            }
            _ => Err(not_a_context(self)),
        }
    }

    fn created_index(self) -> usize {
        family_index(CREATED, self.0).and_then(|index| usize::try_from(index).ok()).unwrap_or(usize::MAX)
    }

    /// The device of a live context.
    pub fn device(self, machine: &Machine) -> Result<u32> {
        if let Some(device) = device_of_family(machine, PRIMARY, self.0) {
            return Ok(device);
        }
        lock(&CREATED_CONTEXTS).get(self.created_index()).copied().flatten().ok_or_else(|| not_a_context(self))
    }
}

fn not_a_context(context: Context) -> sire_sim::SimError {
    INVALID_CONTEXT.because(format!("{:#x} is not a live context", context.0))
}

/// `CUDA_ERROR_INVALID_CONTEXT`.
pub const INVALID_CONTEXT: Code = Code(201);

/// Adds a reference to the primary context.
pub fn retain_primary(device: u32) -> Context {
    PRIMARY_COUNT[device as usize].fetch_add(1, Ordering::AcqRel);
    Context::primary(device)
}

/// Takes one of the driver API's references away.
pub fn release_primary(device: u32) -> Result<()> {
    let taken =
        PRIMARY_COUNT[device as usize].fetch_update(Ordering::AcqRel, Ordering::Acquire, |count| count.checked_sub(1));
    taken
        .map(drop)
        .map_err(|_| INVALID_CONTEXT.because(format!("the primary context of device {device} is not retained")))
}

/// Whether anybody holds the primary context.
pub fn primary_is_active(device: u32) -> bool {
    PRIMARY_COUNT[device as usize].load(Ordering::Acquire) > 0
}

/// Drops the runtime's reference (`cudaDeviceReset`).
pub fn reset_primary(device: u32) {
    if RUNTIME_HOLDS[device as usize].swap(false, Ordering::AcqRel) {
        // An unmatched release elsewhere can only have made the count zero, which is what is wanted.
        let _ = release_primary(device);
    }
}

const DEPTH: usize = 16;

#[derive(Clone, Copy)]
struct Stack {
    depth: usize,
    contexts: [Context; DEPTH],
}

thread_local! {
    static STACK: Cell<Stack> = const { Cell::new(Stack { depth: 0, contexts: [Context(0); DEPTH] }) };
}

/// The thread's current context.
pub fn current_context() -> Option<Context> {
    let stack = STACK.get();
    stack.depth.checked_sub(1).map(|top| stack.contexts[top]).filter(|context| context.0 != 0)
}

/// Replaces the top of the thread's contexts (`cuCtxSetCurrent`); `None` pops it.
pub fn set_current_context(context: Option<Context>) {
    let mut stack = STACK.get();
    match context {
        None => stack.depth = stack.depth.saturating_sub(1),
        Some(context) => {
            stack.depth = stack.depth.max(1);
            stack.contexts[stack.depth - 1] = context;
        }
    }
    STACK.set(stack);
}

/// `cuCtxPushCurrent`.
pub fn push_context(context: Context) -> Result<()> {
    let mut stack = STACK.get();
    if stack.depth == DEPTH {
        return Err(Code::INVALID_VALUE.because(format!("more than {DEPTH} contexts pushed in one thread")));
    }
    stack.contexts[stack.depth] = context;
    stack.depth += 1;
    STACK.set(stack);
    Ok(())
}

/// `cuCtxPopCurrent`.
pub fn pop_context() -> Result<Context> {
    let mut stack = STACK.get();
    let Some(top) = stack.depth.checked_sub(1) else {
        return Err(INVALID_CONTEXT.because("no context is current in this thread"));
    };
    stack.depth = top;
    STACK.set(stack);
    Ok(stack.contexts[top])
}

/// The device of the thread's current context, or an error if there is none (the driver's view).
pub fn context_device(machine: &Machine) -> Result<u32> {
    current_context().ok_or_else(|| INVALID_CONTEXT.because("no context is current in this thread"))?.device(machine)
}

/// The thread's device as the runtime sees it (the machine's number): that of the current context, else the first.
pub fn current_device(machine: &Machine) -> u32 {
    let current = current_context().and_then(|context| context.device(machine).ok());
    current.or_else(|| visible::to_machine(machine, 0)).unwrap_or(0)
}

/// Makes `device`'s primary context current, and alive if it was not.
pub fn use_device(device: u32) {
    if !RUNTIME_HOLDS[device as usize].swap(true, Ordering::AcqRel) {
        retain_primary(device);
    }
    set_current_context(Some(Context::primary(device)));
}

/// Gives the thread a context if it has none, as every runtime call that needs one does.
pub fn make_current(machine: &Machine) -> Result<()> {
    let first = visible::to_machine(machine, 0).ok_or_else(no_device)?;
    match current_context() {
        Some(context) => {
            let device = context.device(machine)?;
            if RUNTIME_HOLDS[device as usize].load(Ordering::Acquire) || context != Context::primary(device) {
                return Ok(());
            }
            use_device(device);
        }
        None => use_device(first),
    }
    Ok(())
}

/// The machine's device of the process's ordinal.
pub fn check_device(machine: &Machine, ordinal: impl Into<i64> + Copy + Display) -> Result<u32> {
    let wide: i64 = ordinal.into();
    let device = u32::try_from(wide).ok().and_then(|ordinal| visible::to_machine(machine, ordinal));
    device.ok_or_else(|| {
        let count = visible::count(machine);
        if count == 0 { no_device() } else { Code::INVALID_DEVICE.because(format!("device {ordinal} of {count}")) }
    })
}

/// The error of a process that sees no device.
pub fn no_device() -> sire_sim::SimError {
    Code::NO_DEVICE.because("the process sees no device (SIRE_SIM_DEVICES, CUDA_VISIBLE_DEVICES)")
}
