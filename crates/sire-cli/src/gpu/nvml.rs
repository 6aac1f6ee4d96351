//! NVIDIA's management library, as far as it is needed here: which GPUs there are, their memory, and who has how much of it.

use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

use libloading::Library;
use sire_ledger::Memory;

use crate::failure::Failure;

/// A process as NVML lists it.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Process {
    pid: c_uint,
    used: u64,
    gpu_instance: c_uint,
    compute_instance: c_uint,
}

/// NVML's memory record, first version.
#[repr(C)]
#[derive(Default)]
struct Figures {
    total: u64,
    free: u64,
    used: u64,
}

type Handle = *mut c_void;

/// One GPU, or one MIG device of a GPU that is divided.
pub struct Gpu {
    library: Library,
    handle: Handle,
    /// Its UUID, as NVML spells it.
    pub uuid: String,
}

/// A function's address as a typed pointer.
macro_rules! function {
    ($library:expr, $name:literal, fn($($argument:ty),*)) => {
        // SAFETY: the signature is the one in NVIDIA's documentation of this name, and the library lives as long as the pointer is used.
        unsafe { $library.get::<unsafe extern "C" fn($($argument),*) -> c_int>($name.as_bytes()) }.map(|symbol| *symbol)
    };
}

fn missing(error: impl std::fmt::Display) -> Failure {
    Failure::new(format!("NVIDIA's management library (libnvidia-ml.so.1) cannot be used: {error}"))
        .advice("Install NVIDIA's driver, or name the software device's environment: --env DIR.")
}

/// The GPU of this number, or whose UUID begins so; of a GPU that is divided, the MIG device: `0:1` is the second of the first GPU.
pub fn find(wanted: &str) -> Result<Gpu, Failure> {
    // SAFETY: loading runs the initialisers of NVIDIA's library (or of the software device's), which may be loaded at any time.
    let library = unsafe { Library::new("libnvidia-ml.so.1") }.map_err(missing)?;
    let init = function!(library, "nvmlInit_v2", fn()).map_err(missing)?;
    let count = function!(library, "nvmlDeviceGetCount_v2", fn(*mut c_uint)).map_err(missing)?;
    let by_index = function!(library, "nvmlDeviceGetHandleByIndex_v2", fn(c_uint, *mut Handle)).map_err(missing)?;
    let mut devices = 0;
    // SAFETY: takes nothing; the output is a valid unsigned int.
    let code = unsafe { if init() == 0 { count(&raw mut devices) } else { -1 } };
    if code != 0 {
        return Err(missing(format!("it answers {code}")));
    }
    let mut found = Vec::new();
    for index in 0..devices {
        let mut gpu = std::ptr::null_mut();
        // SAFETY: the output is a valid pointer.
        if unsafe { by_index(index, &raw mut gpu) } != 0 {
            continue;
        }
        let parts = parts_of(&library, gpu);
        // A GPU that is divided can be used by its parts only.
        if parts.is_empty() {
            found.push((index.to_string(), gpu, uuid_of(&library, gpu)?));
        }
        for (part, handle) in parts {
            found.push((format!("{index}:{part}"), handle, uuid_of(&library, handle)?));
        }
    }
    let is_wanted = |(number, _, uuid): &&(String, Handle, String)| {
        wanted == number || (wanted.len() >= 4 && uuid.starts_with(wanted))
    };
    if let Some((_, handle, uuid)) = found.iter().find(is_wanted) {
        let (handle, uuid) = (*handle, uuid.clone());
        return Ok(Gpu { library, handle, uuid });
    }
    let there: Vec<String> = found.iter().map(|(number, _, uuid)| format!("{number} ({uuid})")).collect();
    Err(Failure::usage(format!("there is no GPU '{wanted}'")).advice(format!("There are: {}.", there.join(", "))))
}

/// The MIG devices of a GPU, by number; none where it is not divided, or NVML knows nothing of that.
fn parts_of(library: &Library, gpu: Handle) -> Vec<(c_uint, Handle)> {
    let most = function!(library, "nvmlDeviceGetMaxMigDeviceCount", fn(Handle, *mut c_uint));
    let by_index = function!(library, "nvmlDeviceGetMigDeviceHandleByIndex", fn(Handle, c_uint, *mut Handle));
    let (Ok(most), Ok(by_index)) = (most, by_index) else { return Vec::new() };
    let mut count = 0;
    // SAFETY: the handle is NVML's own; the output is a valid unsigned int.
    if unsafe { most(gpu, &raw mut count) } != 0 {
        return Vec::new();
    }
    let part = |index| {
        let mut handle = std::ptr::null_mut();
        // SAFETY: the handle is NVML's own; the output is a valid pointer. Numbers may be missing in between.
        (unsafe { by_index(gpu, index, &raw mut handle) } == 0).then_some((index, handle))
    };
    (0..count).filter_map(part).collect()
}

fn uuid_of(library: &Library, handle: Handle) -> Result<String, Failure> {
    let ask = function!(library, "nvmlDeviceGetUUID", fn(Handle, *mut c_char, c_uint)).map_err(missing)?;
    let mut text = [0 as c_char; 96];
    // SAFETY: the handle is NVML's own; the buffer has the length that is passed, and stays NUL-terminated.
    let code = unsafe { ask(handle, text.as_mut_ptr(), text.len() as c_uint - 1) };
    if code != 0 {
        return Err(missing(format!("it does not say the GPU's UUID ({code})")));
    }
    // SAFETY: the last byte is still 0.
    Ok(unsafe { CStr::from_ptr(text.as_ptr()) }.to_string_lossy().into_owned())
}

impl Gpu {
    /// Its memory, all processes together.
    pub fn memory(&self) -> Option<Memory> {
        let ask = function!(self.library, "nvmlDeviceGetMemoryInfo", fn(Handle, *mut Figures)).ok()?;
        let mut figures = Figures::default();
        // SAFETY: the handle is NVML's own, and the output is the record that this function writes.
        let code = unsafe { ask(self.handle, &raw mut figures) };
        (code == 0).then_some(Memory { free: figures.free, total: figures.total })
    }

    /// Bytes by process; nothing where NVML does not say, as in a container.
    pub fn processes(&self) -> HashMap<u32, u64> {
        const MOST: usize = 512;
        let mut list = vec![Process::default(); MOST];
        let mut count = MOST as c_uint;
        let Ok(ask) =
            function!(self.library, "nvmlDeviceGetComputeRunningProcesses_v3", fn(Handle, *mut c_uint, *mut Process))
        else {
            return HashMap::new();
        };
        // SAFETY: the handle is NVML's own; the list has room for as many as `count` says.
        if unsafe { ask(self.handle, &raw mut count, list.as_mut_ptr()) } != 0 {
            return HashMap::new();
        }
        let known = list.iter().take(count as usize).filter(|each| each.used != u64::MAX);
        known.map(|each| (each.pid, each.used)).collect()
    }
}
