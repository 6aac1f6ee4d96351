//! The line between C and Rust: typed views of a caller's pointers, and the frame that every exported
//! function runs in (shutdown, counters and faults, panics, the thread's last error).

use crate::{names, nvml, state};
use sire_sim::{Code, Machine, Result};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_int};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;

/// Where a caller wants a `T`: null, or valid for writing one.
#[repr(transparent)]
pub struct Out<T>(*mut T);

/// Where a caller has `T`s: null, or valid for reading them.
#[repr(transparent)]
pub struct In<T>(*const T);

/// A caller's C string: null, or NUL-terminated.
#[repr(transparent)]
pub struct Text(*const c_char);

impl<T> Clone for Out<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Out<T> {}
impl<T> Clone for In<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for In<T> {}

impl<T> Out<T> {
    /// No place.
    pub fn none() -> Out<T> {
        Out(std::ptr::null_mut())
    }

    /// A place whose type only another argument tells.
    pub fn from_caller(place: *mut T) -> Out<T> {
        Out(place)
    }

    /// Whether the caller gave no place.
    pub fn is_null(self) -> bool {
        self.0.is_null()
    }

    /// The same place for another type, where a number elsewhere says which type is meant.
    pub fn cast<U>(self) -> Out<U> {
        Out(self.0.cast())
    }

    /// Refuses null, before anything is done that a refusal would have to undo.
    pub fn required(self) -> Result<Out<T>> {
        if self.0.is_null() { Err(Code::INVALID_VALUE.because("an output pointer is null")) } else { Ok(self) }
    }

    /// Writes `value`; null is an error.
    pub fn set(self, value: T) -> Result<()> {
        self.required()?.set_if(value);
        Ok(())
    }

    /// Writes `value` unless the caller gave no place.
    pub fn set_if(self, value: T) {
        if !self.0.is_null() {
            // SAFETY: not null, so by the caller's contract valid for writing one `T`.
            unsafe { self.0.write_unaligned(value) }
        }
    }

    /// Writes `values` one after another, for outputs that are arrays.
    pub fn set_all(self, values: &[T])
    where
        T: Copy,
    {
        if !self.0.is_null() {
            for (at, value) in values.iter().enumerate() {
                // SAFETY: the caller gave room for the count it stated, and `values` is no longer than that.
                unsafe { self.0.add(at).write_unaligned(*value) }
            }
        }
    }

    /// Reads what is there (for in-and-out arguments).
    pub fn get(self) -> Result<T>
    where
        T: Copy,
    {
        In(self.0.cast_const()).get()
    }
}

impl<T: Copy> In<T> {
    /// The same place for another type, where a number elsewhere says which type is meant.
    pub fn cast<U>(self) -> In<U> {
        In(self.0.cast())
    }

    /// The first value; null is an error.
    pub fn get(self) -> Result<T> {
        if self.0.is_null() {
            return Err(Code::INVALID_VALUE.because("an input pointer is null"));
        }
        // SAFETY: not null, so by the caller's contract valid for reading one `T`.
        Ok(unsafe { self.0.read_unaligned() })
    }

    /// The first `count` values.
    pub fn all(self, count: usize) -> Result<Vec<T>> {
        if count == 0 {
            return Ok(Vec::new());
        }
        if self.0.is_null() {
            return Err(Code::INVALID_VALUE.because("an input array is null"));
        }
        // SAFETY: not null, and the caller states that there are `count` values.
        Ok((0..count).map(|at| unsafe { self.0.add(at).read_unaligned() }).collect())
    }
}

impl Text {
    /// The string; null and text that is not UTF-8 are errors.
    pub fn get<'a>(self) -> Result<&'a str> {
        self.get_or_null()?.ok_or_else(|| Code::INVALID_VALUE.because("a string is null"))
    }

    /// The string, or `None` for null.
    pub fn get_or_null<'a>(self) -> Result<Option<&'a str>> {
        if self.0.is_null() {
            return Ok(None);
        }
        // SAFETY: not null, so by the caller's contract NUL-terminated, and alive during this call.
        let text = unsafe { CStr::from_ptr(self.0) };
        text.to_str().map(Some).map_err(|_| Code::INVALID_VALUE.because("a string is not UTF-8"))
    }
}

/// Writes `text` NUL-terminated into `capacity` bytes at `buffer`, cut if it must be. Returns its full length.
pub fn write_text(buffer: Out<c_char>, capacity: usize, text: &str) -> usize {
    if capacity > 0 && !buffer.is_null() {
        let kept = text.len().min(capacity - 1);
        let bytes: Vec<c_char> = text.as_bytes()[..kept].iter().map(|byte| *byte as c_char).chain([0]).collect();
        buffer.set_all(&bytes);
    }
    text.len()
}

thread_local! {
    static LAST: Cell<c_int> = const { Cell::new(0) };
}

/// The thread's last error (`cudaPeekAtLastError`).
pub fn last_error() -> c_int {
    LAST.with(Cell::get)
}

/// The thread's last error, which it then forgets (`cudaGetLastError`).
pub fn take_last_error() -> c_int {
    LAST.with(|last| last.replace(0))
}

/// Makes `status` the thread's last error.
pub fn remember(status: c_int) {
    LAST.with(|last| last.set(status));
}

/// Which interface a function belongs to.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Face {
    /// cudart, called with a device: makes the primary context current, and remembers errors.
    Runtime,
    /// cudart, needing no context; remembers errors.
    RuntimeQuery,
    /// The driver: no last error, and no context by itself.
    Driver,
    /// NVML: no last error, and its own numbers.
    Nvml,
}

/// Runs the body of an exported function.
pub fn enter(face: Face, name: &'static str, bytes: u64, body: impl FnOnce(&Machine) -> Result<()>) -> c_int {
    let status = match catch_unwind(AssertUnwindSafe(|| attempt(face, name, bytes, body))) {
        Ok(status) => status,
        Err(_) => {
            state::say(name, "a bug in the software device (a caught panic, printed above)");
            Code::UNKNOWN.0
        }
    };
    match face {
        Face::Runtime | Face::RuntimeQuery if status != 0 => remember(status),
        Face::Nvml => return nvml::number(status),
        _ => {}
    }
    status
}

fn attempt(face: Face, name: &'static str, bytes: u64, body: impl FnOnce(&Machine) -> Result<()>) -> c_int {
    if state::is_down() {
        return Code::DEINITIALIZED.0;
    }
    if state::is_forked() {
        return Code::NOT_INITIALIZED.0;
    }
    let Some(machine) = state::machine() else { return Code::NOT_INITIALIZED.0 };
    if let Some(code) = machine.enter_call(name, bytes) {
        return code.0;
    }
    let ready = if face == Face::Runtime { state::make_current(machine) } else { Ok(()) };
    match ready.and_then(|()| body(machine)) {
        Ok(()) => 0,
        Err(error) => {
            if machine.options().log {
                state::say(name, &error.to_string());
            }
            if error.code == Code::NOT_SUPPORTED {
                explain(&error.message);
            }
            error.code.0
        }
    }
}

thread_local! {
    /// Why this thread's last "not supported" was said.
    static REASON: Cell<Option<&'static CStr>> = const { Cell::new(None) };
}

/// Sentences that C callers may hold on to; as many as there are different reasons.
static REASONS: Mutex<BTreeMap<String, &'static CStr>> = Mutex::new(BTreeMap::new());

/// Keeps the reason of a "not supported", so that the error's text can name what is missing.
pub fn explain(message: &str) {
    let mut reasons = state::lock(&REASONS);
    let reason = match reasons.get(message) {
        Some(reason) => Some(*reason),
        None => CString::new(format!("operation not supported: {message}")).ok().map(|text| {
            let text: &'static CStr = Box::leak(text.into_boxed_c_str());
            reasons.insert(message.to_string(), text);
            text
        }),
    };
    REASON.with(|kept| kept.set(reason));
}

/// The text of an error number; for "not supported", with this thread's reason.
pub fn error_text(number: c_int) -> *const c_char {
    let reason = if number == Code::NOT_SUPPORTED.0 { REASON.with(Cell::get) } else { None };
    reason.unwrap_or_else(|| names::text(number)).as_ptr()
}

/// Runs a body that neither fails nor needs a machine, but must not unwind into C.
pub fn contain<T>(name: &'static str, otherwise: T, body: impl FnOnce() -> T) -> T {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|_| {
        state::say(name, "a bug in the software device (a caught panic, printed above)");
        otherwise
    })
}

/// Defines exported functions that return an error number:
/// `fn cudaName(arguments) bytes(count) |machine| { body }`, where `bytes(...)` (what faults count) may be left out
/// and the body is a `Result<()>`.
macro_rules! export {
    ($face:ident: $($(#[$meta:meta])* fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(bytes($bytes:expr))? |$machine:pat_param| $body:block)*) => {$(
        $(#[$meta])*
        #[unsafe(no_mangle)]
        pub extern "C" fn $name($($arg: $ty),*) -> std::ffi::c_int {
            #[allow(unused_mut, unused_assignments)]
            let mut bytes = 0_u64;
            $(bytes = $bytes as u64;)?
            $crate::boundary::enter($crate::boundary::Face::$face, stringify!($name), bytes, move |$machine: &sire_sim::Machine| $body)
        }
    )*};
}
pub(crate) use export;
