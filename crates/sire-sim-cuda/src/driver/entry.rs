//! Finding the driver's functions by name: `cuGetProcAddress` and what the runtime offers of it.

use super::versions;
use crate::abi::Handle;
use crate::boundary::{Out, Text, export};
use crate::{properties, release};
use sire_sim::{Code, Result};
use std::ffi::{CString, c_int, c_uint, c_ulonglong, c_void};
use std::sync::OnceLock;

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

/// What a look-up comes to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Found {
    /// This function.
    Function(Handle),
    /// There is one of this name, but not yet in the version that was asked for.
    Later,
    /// There is none.
    Nothing,
}

impl Found {
    /// The address, or null.
    pub fn address(self) -> Handle {
        if let Found::Function(function) = self { function } else { std::ptr::null_mut() }
    }

    /// `CUdriverProcAddressQueryResult`, `cudaDriverEntryPointQueryResult`.
    pub fn status(self) -> c_int {
        match self {
            Found::Function(_) => 0,
            Found::Nothing => 1,
            Found::Later => 2,
        }
    }

    fn of(function: Option<Handle>) -> Found {
        function.map_or(Found::Nothing, Found::Function)
    }
}

/// The function that a program built for CUDA `version` means by `name`, with the default stream that `flags` say.
fn find(name: &str, version: c_uint, flags: c_ulonglong) -> Found {
    if !name.starts_with("cu") || name.starts_with("cuda") {
        return Found::Nothing;
    }
    if let Some(forms) = versions::forms(name) {
        let form = forms.iter().find(|(first, _)| *first <= version);
        return form.map_or(Found::Later, |(_, form)| Found::of(exported(form)));
    }
    let variants = |stream: &str| ["_v2", ""].iter().find_map(|suffix| exported(&format!("{name}{suffix}{stream}")));
    // Most functions know no streams and have one form.
    let own = if flags & PER_THREAD == 0 { None } else { variants("_ptsz") };
    match own.or_else(|| variants("")) {
        Some(_) if versions::is_before(version, name) => Found::Later,
        found => Found::of(found),
    }
}

/// As `cuGetProcAddress` has it.
///
/// # Errors
/// `INVALID_VALUE` for a version that is newer than the driver.
pub fn look_up(name: &str, version: c_uint, flags: c_ulonglong) -> Result<Found> {
    if version > properties::CUDA_VERSION.cast_unsigned() {
        return Err(Code::INVALID_VALUE.because(format!("{name} of CUDA {version}, which is newer than the driver")));
    }
    Ok(find(name, version, flags))
}

/// The answer, and whether something was found. The runtime asks for the empty name to see whether the function works at all.
fn answer(name: Text, out: Out<Handle>, version: c_int, flags: c_ulonglong) -> Result<Option<Found>> {
    let (name, out) = (name.get()?, out.required()?);
    if name.is_empty() {
        out.set_if(std::ptr::null_mut());
        return Ok(None);
    }
    let found = look_up(name, c_uint::try_from(version).unwrap_or(0), flags)?;
    out.set_if(found.address());
    Ok(Some(found))
}

export! { Driver:
    fn cuGetProcAddress_v2(name: Text, out: Out<Handle>, version: c_int, flags: c_ulonglong, status: Out<c_int>) |_machine| {
        let found = answer(name, out, version, flags)?;
        // Since CUDA 12 nothing found is no error: the status says so, and the address is null.
        found.into_iter().for_each(|found| status.set_if(found.status()));
        Ok(())
    }
    /// The form of CUDA 11, without a status: there it is an error.
    fn cuGetProcAddress(name: Text, out: Out<Handle>, version: c_int, flags: c_ulonglong) |_machine| {
        match answer(name, out, version, flags)? {
            None | Some(Found::Function(_)) => Ok(()),
            Some(_) => Err(Code::NOT_FOUND.because(format!("not simulated, or not in CUDA {version}"))),
        }
    }
}
