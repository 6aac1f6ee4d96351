//! The CUDA driver and NVML, asked through their C interface. Nothing here creates a context or allocates.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

use libloading::Library;
use serde::{Deserialize, Serialize};

/// What the driver library said.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct DriverReport {
    /// Why there is no usable driver.
    pub error: Option<String>,
    /// The file that was loaded.
    pub path: Option<String>,
    /// CUDA version of the driver, such as 13.2.
    pub cuda: Option<String>,
    /// Version of the driver package, such as 580.95.05.
    pub package: Option<String>,
    /// Whether it is Sire's software device.
    pub software: bool,
    /// The devices.
    pub devices: Vec<DeviceReport>,
}

/// One device.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct DeviceReport {
    /// As CUDA counts.
    pub ordinal: i32,
    /// Its name.
    pub name: String,
    /// All of its memory.
    pub memory_bytes: u64,
    /// Memory that nobody uses, if NVML says.
    pub free_bytes: Option<u64>,
    /// Whether it has the virtual-memory functions that pausing needs.
    pub virtual_memory: bool,
    /// Whether such memory can be reached by other PCIe devices.
    pub gpudirect_rdma: bool,
    /// Whether it is, or can be, divided (MIG), if NVML says.
    pub mig: Option<bool>,
    /// How it is virtualised, if NVML says.
    pub virtualization: Option<String>,
}

const VIRTUAL_MEMORY: c_int = 102;
const GPUDIRECT_RDMA_WITH_VMM: c_int = 110;

/// Loads the driver and asks.
pub fn look() -> DriverReport {
    let mut report = DriverReport::default();
    if let Err(why) = ask_driver(&mut report) {
        report.error = Some(why);
    }
    // NVML is extra: what it does not say stays unknown.
    let _ = ask_nvml(&mut report);
    report
}

fn open(name: &str) -> Result<Library, String> {
    // SAFETY: loading runs the library's initialisers; a driver that misbehaves there ends this child process only.
    unsafe { Library::new(name) }.map_err(|error| {
        let cause = std::error::Error::source(&error).map(ToString::to_string);
        cause.unwrap_or_else(|| error.to_string())
    })
}

/// A function's address as a typed pointer.
macro_rules! function {
    ($library:expr, $name:literal, fn($($argument:ty),*)) => {
        // SAFETY: the signature is the one in the vendor's documentation of this name, and both live until the process ends.
        unsafe { $library.get::<unsafe extern "C" fn($($argument),*) -> c_int>($name.as_bytes()) }
            .map(|symbol| *symbol)
            .map_err(|_| concat!("it has no function ", $name).to_owned())
    };
}

/// Turns a CUDA result into ours.
fn done(code: c_int, doing: &str) -> Result<(), String> {
    match code {
        0 => Ok(()),
        100 => Err("it finds no device (CUDA_ERROR_NO_DEVICE)".into()),
        803 | 804 => Err(format!("{doing} failed with CUDA error {code}: driver and libcuda.so.1 do not fit together")),
        code => Err(format!("{doing} failed with CUDA error {code}")),
    }
}

fn ask_driver(report: &mut DriverReport) -> Result<(), String> {
    let named = std::env::var("SIRE_LIBCUDA").ok().filter(|path| !path.is_empty());
    let library = open(named.as_deref().unwrap_or("libcuda.so.1"))?;
    let init = function!(library, "cuInit", fn(c_uint))?;
    report.path = file_of(init as *const c_void);
    report.software = report.path.as_ref().is_some_and(|path| path.contains("sire_sim_cuda"));
    let version = function!(library, "cuDriverGetVersion", fn(*mut c_int))?;
    let mut number = 0;
    // SAFETY: the output is a valid int.
    if unsafe { version(&raw mut number) } == 0 {
        report.cuda = Some(format!("{}.{}", number / 1000, number % 1000 / 10));
    }
    // SAFETY: cuInit takes flags that must be 0.
    done(unsafe { init(0) }, "cuInit")?;
    let count = function!(library, "cuDeviceGetCount", fn(*mut c_int))?;
    let mut devices = 0;
    // SAFETY: the output is a valid int.
    done(unsafe { count(&raw mut devices) }, "cuDeviceGetCount")?;
    for ordinal in 0..devices {
        report.devices.push(ask_device(&library, ordinal)?);
    }
    std::mem::forget(library);
    if report.devices.is_empty() { Err("it finds no device".into()) } else { Ok(()) }
}

fn ask_device(library: &Library, ordinal: c_int) -> Result<DeviceReport, String> {
    let name_of = function!(library, "cuDeviceGetName", fn(*mut c_char, c_int, c_int))?;
    let memory_of = function!(library, "cuDeviceTotalMem_v2", fn(*mut usize, c_int))?;
    let attribute_of = function!(library, "cuDeviceGetAttribute", fn(*mut c_int, c_int, c_int))?;
    let mut name = [0 as c_char; 256];
    // SAFETY: the buffer has the length that is passed; a device's handle is its ordinal.
    done(unsafe { name_of(name.as_mut_ptr(), name.len() as c_int - 1, ordinal) }, "cuDeviceGetName")?;
    let mut memory = 0;
    // SAFETY: the output is a valid size_t.
    done(unsafe { memory_of(&raw mut memory, ordinal) }, "cuDeviceTotalMem")?;
    let attribute = |number| {
        let mut value = 0;
        // SAFETY: the output is a valid int; unknown attributes are answered with an error.
        unsafe { attribute_of(&raw mut value, number, ordinal) == 0 && value != 0 }
    };
    Ok(DeviceReport {
        ordinal,
        name: text(&name),
        memory_bytes: memory as u64,
        virtual_memory: attribute(VIRTUAL_MEMORY),
        gpudirect_rdma: attribute(GPUDIRECT_RDMA_WITH_VMM),
        ..DeviceReport::default()
    })
}

/// NVML's memory record, first version.
#[repr(C)]
#[derive(Default)]
struct Memory {
    total: u64,
    free: u64,
    used: u64,
}

fn ask_nvml(report: &mut DriverReport) -> Result<(), String> {
    let library = open("libnvidia-ml.so.1")?;
    let init = function!(library, "nvmlInit_v2", fn())?;
    // SAFETY: nvmlInit takes nothing.
    done(unsafe { init() }, "nvmlInit")?;
    if let Ok(version) = function!(library, "nvmlSystemGetDriverVersion", fn(*mut c_char, c_uint)) {
        let mut buffer = [0 as c_char; 96];
        // SAFETY: the buffer has the length that is passed.
        if unsafe { version(buffer.as_mut_ptr(), buffer.len() as c_uint - 1) } == 0 {
            report.package = Some(text(&buffer));
        }
    }
    // NVML counts in PCI order and ignores CUDA_VISIBLE_DEVICES: its figures are ours only where the two agree.
    if std::env::var_os("CUDA_VISIBLE_DEVICES").is_some() {
        return Ok(());
    }
    let handle_of = function!(library, "nvmlDeviceGetHandleByIndex_v2", fn(c_uint, *mut *mut c_void))?;
    for device in &mut report.devices {
        let mut handle = std::ptr::null_mut();
        // SAFETY: the output is a valid pointer.
        if unsafe { handle_of(device.ordinal as c_uint, &raw mut handle) } == 0 {
            ask_nvml_device(&library, handle, device);
        }
    }
    std::mem::forget(library);
    Ok(())
}

fn ask_nvml_device(library: &Library, handle: *mut c_void, device: &mut DeviceReport) {
    if let Ok(memory_of) = function!(library, "nvmlDeviceGetMemoryInfo", fn(*mut c_void, *mut Memory)) {
        let mut memory = Memory::default();
        // SAFETY: the handle is NVML's and the record has the layout of nvmlMemory_t.
        if unsafe { memory_of(handle, &raw mut memory) } == 0 && memory.total > 0 {
            device.free_bytes = Some(memory.free);
        }
    }
    if let Ok(mode_of) = function!(library, "nvmlDeviceGetMigMode", fn(*mut c_void, *mut c_uint, *mut c_uint)) {
        let (mut current, mut pending) = (0, 0);
        // SAFETY: both outputs are valid.
        if unsafe { mode_of(handle, &raw mut current, &raw mut pending) } == 0 {
            device.mig = Some(current != 0);
        }
    }
    if let Ok(mode_of) = function!(library, "nvmlDeviceGetVirtualizationMode", fn(*mut c_void, *mut c_uint)) {
        let mut mode = 0;
        // SAFETY: the output is a valid enumeration, which is an unsigned int.
        if unsafe { mode_of(handle, &raw mut mode) } == 0 {
            let names = ["none", "passthrough", "vgpu", "host-vgpu", "host-vsga"];
            device.virtualization = Some((*names.get(mode as usize).unwrap_or(&"unknown")).to_owned());
        }
    }
}

/// A C string in a buffer whose last byte nobody wrote.
fn text(buffer: &[c_char]) -> String {
    // SAFETY: every buffer here starts as zeros and is filled at most up to its last byte but one, so a NUL is in it.
    unsafe { CStr::from_ptr(buffer.as_ptr()) }.to_string_lossy().into_owned()
}

/// The file that holds an address.
pub(super) fn file_of(address: *const c_void) -> Option<String> {
    let mut info = std::mem::MaybeUninit::<libc::Dl_info>::zeroed();
    // SAFETY: dladdr accepts any address and fills the record if it returns non-zero.
    let info = unsafe {
        if libc::dladdr(address, info.as_mut_ptr()) == 0 {
            return None;
        }
        info.assume_init()
    };
    if info.dli_fname.is_null() {
        return None;
    }
    // SAFETY: a non-null dli_fname is the loader's own string, alive as long as the library is loaded.
    let name = unsafe { CStr::from_ptr(info.dli_fname) }.to_string_lossy().into_owned();
    Some(std::fs::canonicalize(&name).map_or(name, |path| path.display().to_string()))
}
