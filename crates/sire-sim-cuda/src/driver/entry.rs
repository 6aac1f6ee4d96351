//! Finding the driver's functions by name: `cuGetProcAddress` and what the runtime offers of it.

use crate::abi::Handle;
use crate::boundary::{Out, Text, export};
use crate::release;
use sire_sim::{Code, Result};
use std::ffi::{CString, c_int, c_uint, c_ulonglong, c_void};
use std::sync::OnceLock;

/// `CU_GET_PROC_ADDRESS_SUCCESS`.
pub const SUCCESS: c_int = 0;
/// `CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND`.
pub const NOT_FOUND: c_int = 1;

/// A handle of this very library, whatever else in the process exports the same names.
fn library() -> *mut c_void {
    static LIBRARY: OnceLock<usize> = OnceLock::new();
    let handle = LIBRARY.get_or_init(|| {
        release::own_file().map_or(0, |file| {
            // SAFETY: a NUL-terminated name; RTLD_NOLOAD only looks a loaded library up.
            unsafe { libc::dlopen(file.as_ptr(), libc::RTLD_LAZY | libc::RTLD_NOLOAD) as usize }
        })
    });
    if *handle == 0 { libc::RTLD_DEFAULT } else { *handle as *mut c_void }
}

fn exported(name: &str) -> Option<Handle> {
    let name = CString::new(name).ok()?;
    // SAFETY: a NUL-terminated name and a valid handle.
    let symbol = unsafe { libc::dlsym(library(), name.as_ptr()) };
    (!symbol.is_null()).then_some(symbol)
}

/// `CU_GET_PROC_ADDRESS_PER_THREAD_DEFAULT_STREAM`.
const PER_THREAD: c_ulonglong = 2;

/// Functions whose arguments CUDA has changed: for each, its forms as exported and the first version that has them, newest first.
const FORMS: &[(&str, &[(c_uint, &str)])] = &[
    ("cuCtxCreate", &[(12_050, "cuCtxCreate_v4"), (11_040, "cuCtxCreate_v3"), (3_020, "cuCtxCreate_v2")]),
    ("cuEventElapsedTime", &[(12_080, "cuEventElapsedTime_v2"), (2_000, "cuEventElapsedTime")]),
    ("cuGetProcAddress", &[(12_000, "cuGetProcAddress_v2"), (11_030, "cuGetProcAddress")]),
    ("cuMemAdvise", &[(12_020, "cuMemAdvise_v2"), (8_000, "cuMemAdvise")]),
    ("cuMemPrefetchAsync", &[(12_020, "cuMemPrefetchAsync_v2"), (8_000, "cuMemPrefetchAsync")]),
    (
        "cuStreamGetCaptureInfo",
        &[
            (12_030, "cuStreamGetCaptureInfo_v3"),
            (11_030, "cuStreamGetCaptureInfo_v2"),
            (10_010, "cuStreamGetCaptureInfo"),
        ],
    ),
];

/// The function that a program built for CUDA `version` means by `name`, with the default stream that `flags` say.
pub fn find(name: &str, version: c_uint, flags: c_ulonglong) -> Option<Handle> {
    if !name.starts_with("cu") || name.starts_with("cuda") {
        return None;
    }
    if let Some((_, forms)) = FORMS.iter().find(|(known, _)| *known == name) {
        let form = forms.iter().find(|(first, _)| *first <= version);
        return form.and_then(|(_, form)| exported(form));
    }
    let variants = |stream: &str| ["_v2", ""].iter().find_map(|suffix| exported(&format!("{name}{suffix}{stream}")));
    // Most functions know no streams and have one form.
    let own = if flags & PER_THREAD == 0 { None } else { variants("_ptsz") };
    own.or_else(|| variants(""))
}

fn answer(name: Text, out: Out<Handle>, version: c_int, flags: c_ulonglong, status: Out<c_int>) -> Result<()> {
    let (name, out) = (name.get()?, out.required()?);
    if name.is_empty() {
        // The runtime asks for the empty name to see whether the function works at all.
        return out.set(std::ptr::null_mut());
    }
    let found = find(name, c_uint::try_from(version).unwrap_or(0), flags);
    out.set(found.unwrap_or(std::ptr::null_mut()))?;
    status.set_if(if found.is_some() { SUCCESS } else { NOT_FOUND });
    if found.is_some() { Ok(()) } else { Err(Code::NOT_FOUND.because(format!("not simulated: {name}"))) }
}

export! { Driver:
    fn cuGetProcAddress_v2(name: Text, out: Out<Handle>, version: c_int, flags: c_ulonglong, status: Out<c_int>) |_machine| {
        answer(name, out, version, flags, status)
    }
}

/// The form of CUDA 11, without a status.
#[unsafe(no_mangle)]
pub extern "C" fn cuGetProcAddress(name: Text, out: Out<Handle>, version: c_int, flags: c_ulonglong) -> c_int {
    cuGetProcAddress_v2(name, out, version, flags, Out::none())
}
