//! Launches of kernels that the runtime registered (a `CUfunction` of ours is the host function's address).
//! Modules, linking and tensor maps are stubs.

use crate::abi::Handle;
use crate::boundary::export;
use crate::runtime::launch;
use crate::state;
use std::ffi::{c_uint, c_void};

export! { Driver:
    fn cuLaunchKernel(function: *const c_void, _gx: c_uint, _gy: c_uint, _gz: c_uint, _bx: c_uint, _by: c_uint, _bz: c_uint, _shared: c_uint, stream: Handle, arguments: *mut *mut c_void, _extra: *mut *mut c_void) |machine| {
        state::context_device(machine)?;
        launch(machine, function, arguments, stream)
    }
}
