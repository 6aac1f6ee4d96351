//! Libraries that PyTorch has loaded already, and what is found in them by name. Nothing is loaded for it.

use std::ffi::{CStr, c_void};

/// A library that is loaded; its search order covers what it depends on.
#[derive(Clone, Copy)]
pub(super) struct Library(*mut c_void);

impl Library {
    /// The library of that name, if the process has it.
    pub(super) fn loaded(name: &CStr) -> Option<Library> {
        // SAFETY: RTLD_NOLOAD loads nothing and runs nothing.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_NOLOAD) };
        (!handle.is_null()).then_some(Library(handle))
    }

    /// Where a symbol is.
    pub(super) fn symbol(self, name: &CStr) -> Option<*mut c_void> {
        // SAFETY: the handle is open for good.
        let found = unsafe { libc::dlsym(self.0, name.as_ptr()) };
        (!found.is_null()).then_some(found)
    }
}
