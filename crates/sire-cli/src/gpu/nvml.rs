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
    ($library:expr, $name:expr, fn($($argument:ty),*)) => {
        // SAFETY: the signature is the one in NVIDIA's documentation of this name, and the library lives as long as the pointer is used.
        unsafe { $library.get::<unsafe extern "C" fn($($argument),*) -> c_int>($name.as_bytes()) }.map(|symbol| *symbol)
    };
}

fn missing(error: impl std::fmt::Display) -> Failure {
    Failure::new(format!("NVIDIA's management library (libnvidia-ml.so.1) cannot be used: {error}"))
        .advice("Install NVIDIA's driver, or name the software device's environment: --env DIR.")
}

/// One of what there is: a whole GPU, or a part of one that is divided, which can be used by its parts only.
struct Listed {
    /// As nvidia-smi counts; of a part, `0:1`.
    number: String,
    handle: Handle,
    uuid: String,
    /// What the whole is called; nothing where NVML does not say.
    kind: String,
}

/// All that there is.
pub struct Machine {
    library: Library,
    listed: Vec<Listed>,
}

/// Asks NVML what there is.
pub fn look() -> Result<Machine, Failure> {
    // SAFETY: loading runs the initialisers of NVIDIA's library (or of the software device's), which may be loaded at any time.
    let library = unsafe { Library::new("libnvidia-ml.so.1") }.map_err(missing)?;
    let mut listed = Vec::new();
    for (index, gpu) in gpus(&library)? {
        let kind = text_of(&library, "nvmlDeviceGetName", gpu).unwrap_or_default();
        let parts = parts_of(&library, gpu);
        let whole = parts.is_empty().then(|| (index.to_string(), gpu));
        let parts = parts.into_iter().map(|(part, handle)| (format!("{index}:{part}"), handle));
        for (number, handle) in whole.into_iter().chain(parts) {
            let uuid = text_of(&library, "nvmlDeviceGetUUID", handle)?;
            listed.push(Listed { number, handle, uuid, kind: kind.clone() });
        }
    }
    Ok(Machine { library, listed })
}

/// The GPUs, by number. One that does not answer is left out.
fn gpus(library: &Library) -> Result<Vec<(c_uint, Handle)>, Failure> {
    let init = function!(library, "nvmlInit_v2", fn()).map_err(missing)?;
    let count = function!(library, "nvmlDeviceGetCount_v2", fn(*mut c_uint)).map_err(missing)?;
    let by_index = function!(library, "nvmlDeviceGetHandleByIndex_v2", fn(c_uint, *mut Handle)).map_err(missing)?;
    let mut devices = 0;
    // SAFETY: takes nothing; the output is a valid unsigned int.
    let code = unsafe { if init() == 0 { count(&raw mut devices) } else { -1 } };
    if code != 0 {
        return Err(missing(format!("it answers {code}")));
    }
    let gpu = |index| {
        let mut handle = std::ptr::null_mut();
        // SAFETY: the output is a valid pointer.
        (unsafe { by_index(index, &raw mut handle) } == 0).then_some((index, handle))
    };
    Ok((0..devices).filter_map(gpu).collect())
}

impl Machine {
    /// The one of this number, or whose UUID begins so; of a GPU that is divided, the part: `0:1` is the second of the first GPU.
    pub fn find(&self, wanted: &str) -> Result<usize, Failure> {
        let is_wanted = |each: &Listed| wanted == each.number || (wanted.len() >= 4 && each.uuid.starts_with(wanted));
        self.listed.iter().position(is_wanted).ok_or_else(|| {
            Failure::usage(format!("there is no GPU '{wanted}'")).advice(format!("There are: {}.", self.names()))
        })
    }

    /// The one of this number, or with `0:` the first part of a GPU.
    pub fn at_number(&self, number: &str) -> Option<usize> {
        let is_part = |each: &Listed| number.ends_with(':') && each.number.starts_with(number);
        self.listed.iter().position(|each| each.number == number || is_part(each))
    }

    /// The one whose UUID begins so, with what UUIDs begin with.
    pub fn at_uuid(&self, beginning: &str) -> Option<usize> {
        let is_one = beginning.starts_with("GPU-") || beginning.starts_with("MIG-");
        self.listed.iter().position(|each| is_one && each.uuid.starts_with(beginning))
    }

    /// Whether all GPUs are called the same.
    pub fn is_of_one_kind(&self) -> bool {
        self.listed.windows(2).all(|pair| pair[0].kind == pair[1].kind)
    }

    /// All of them, for people.
    pub fn names(&self) -> String {
        let names: Vec<String> = self.listed.iter().map(|each| format!("{} ({})", each.number, each.uuid)).collect();
        names.join(", ")
    }

    /// The one at this place, which is one of those that were found.
    pub fn take(mut self, at: usize) -> Gpu {
        let Listed { handle, uuid, .. } = self.listed.swap_remove(at);
        Gpu { library: self.library, handle, uuid }
    }
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

/// What a function of NVML's says of a GPU in a text.
fn text_of(library: &Library, name: &str, handle: Handle) -> Result<String, Failure> {
    let ask = function!(library, name, fn(Handle, *mut c_char, c_uint)).map_err(missing)?;
    let mut text = [0 as c_char; 96];
    // SAFETY: the handle is NVML's own; the buffer has the length that is passed, and stays NUL-terminated.
    let code = unsafe { ask(handle, text.as_mut_ptr(), text.len() as c_uint - 1) };
    if code != 0 {
        return Err(missing(format!("{name} answers {code}")));
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
