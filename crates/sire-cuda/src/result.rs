//! What a `CUresult` means to the engine.

use crate::table::EntryPoints;
use sire_core::driver::{DriverError, DriverErrorKind};
use std::ffi::{CStr, c_char};

pub(crate) const SUCCESS: i32 = 0;
pub(crate) const NOT_READY: i32 = 600;
/// The legacy stream was asked about while another stream captures: somebody captures.
pub(crate) const STREAM_CAPTURE_IMPLICIT: i32 = 906;
const INVALID_VALUE: i32 = 1;

/// The class of a failure.
pub(crate) fn kind(code: i32) -> DriverErrorKind {
    match code {
        2 => DriverErrorKind::OutOfMemory,
        // invalid value, device, handle
        1 | 101 | 400 => DriverErrorKind::Invalid,
        801 => DriverErrorKind::Unsupported,
        // not initialised, deinitialised, stub library, no device, unavailable device, system not ready, mismatched driver
        3 | 4 | 34 | 46 | 100 | 802 | 803 | 804 => DriverErrorKind::Unavailable,
        // uncorrectable memory or link error, contained error, illegal address, launch timeout, context destroyed, assertion,
        // hardware stack error .. launch failure, tensor memory leak, MPS client terminated: the process has to begin anew
        214 | 220 | 226 | 700 | 702 | 709 | 710 | 714..=719 | 721 | 810 => DriverErrorKind::Lost,
        // not while a stream captures, a capture that was voided, the legacy stream beside a capture
        900 | 901 | STREAM_CAPTURE_IMPLICIT => DriverErrorKind::Capturing,
        _ => DriverErrorKind::Other,
    }
}

/// The error for `code`: `what` says what was asked.
pub(crate) fn failure(table: &EntryPoints, verb: &'static str, code: i32, what: &str) -> DriverError {
    let name = text(table.get_error_name, code);
    let advice = text(table.get_error_string, code);
    DriverError { kind: kind(code), verb, code, message: format!("{what}: {name}, {advice}") }
}

/// An argument that the driver must not even see.
pub(crate) fn invalid(verb: &'static str, message: String) -> DriverError {
    DriverError { kind: DriverErrorKind::Invalid, verb, code: INVALID_VALUE, message }
}

/// There is no driver to ask.
pub(crate) fn unavailable(verb: &'static str, message: String) -> DriverError {
    DriverError { kind: DriverErrorKind::Unavailable, verb, code: 0, message }
}

fn text(get: unsafe extern "C" fn(i32, *mut *const c_char) -> i32, code: i32) -> String {
    let mut out: *const c_char = std::ptr::null();
    // SAFETY: both functions take any code and write one pointer.
    let status = unsafe { get(code, &raw mut out) };
    if status != SUCCESS || out.is_null() {
        return format!("CUresult {code}");
    }
    // SAFETY: the driver answered with a static, NUL-terminated string.
    unsafe { CStr::from_ptr(out) }.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_map_to_what_the_engine_does_about_them() {
        assert_eq!(kind(2), DriverErrorKind::OutOfMemory);
        assert_eq!(kind(1), DriverErrorKind::Invalid);
        assert_eq!(kind(4), DriverErrorKind::Unavailable);
        assert_eq!(kind(100), DriverErrorKind::Unavailable);
        assert_eq!(kind(700), DriverErrorKind::Lost);
        for lost in [719, 226, 721, 810] {
            assert_eq!(kind(lost), DriverErrorKind::Lost, "{lost}");
        }
        assert_eq!(kind(801), DriverErrorKind::Unsupported);
        assert_eq!(kind(900), DriverErrorKind::Capturing);
        assert_eq!(kind(906), DriverErrorKind::Capturing);
        assert_eq!(kind(999), DriverErrorKind::Other);
    }
}
