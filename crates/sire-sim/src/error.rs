//! Error numbers of the software device: CUDA's own numbers (the runtime's and the driver's agree on
//! those used here), and the error type that carries one together with a sentence.

use std::borrow::Cow;
use std::fmt;

/// A CUDA error number (`cudaError_t`, equal to the `CUresult` of the same meaning).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Code(pub i32);

macro_rules! codes {
    ($($(#[$doc:meta])* $konst:ident = $number:literal, $name:literal;)*) => {
        impl Code {
            $($(#[$doc])* pub const $konst: Code = Code($number);)*

            /// The driver API's name of the number.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self.0 {
                    $($number => $name,)*
                    _ => "CUDA_ERROR_UNKNOWN",
                }
            }
        }
    };
}

codes! {
    /// No error.
    SUCCESS = 0, "CUDA_SUCCESS";
    /// An argument is outside what the call accepts.
    INVALID_VALUE = 1, "CUDA_ERROR_INVALID_VALUE";
    /// The device, or the host, has not enough memory.
    OUT_OF_MEMORY = 2, "CUDA_ERROR_OUT_OF_MEMORY";
    /// Used in a forked child, or before start.
    NOT_INITIALIZED = 3, "CUDA_ERROR_NOT_INITIALIZED";
    /// After shutdown.
    DEINITIALIZED = 4, "CUDA_ERROR_DEINITIALIZED";
    /// There is no device at all.
    NO_DEVICE = 100, "CUDA_ERROR_NO_DEVICE";
    /// No device of this ordinal.
    INVALID_DEVICE = 101, "CUDA_ERROR_INVALID_DEVICE";
    /// Mapping memory failed in the operating system.
    MAP_FAILED = 205, "CUDA_ERROR_MAP_FAILED";
    /// These devices cannot reach each other's memory.
    PEER_ACCESS_UNSUPPORTED = 217, "CUDA_ERROR_PEER_ACCESS_UNSUPPORTED";
    /// A handle that does not exist.
    INVALID_HANDLE = 400, "CUDA_ERROR_INVALID_HANDLE";
    /// The object is in a state that forbids the call.
    ILLEGAL_STATE = 401, "CUDA_ERROR_ILLEGAL_STATE";
    /// A name that does not exist.
    NOT_FOUND = 500, "CUDA_ERROR_NOT_FOUND";
    /// Not done yet; not an error proper.
    NOT_READY = 600, "CUDA_ERROR_NOT_READY";
    /// A device operation touched memory that it may not touch. Sticky.
    ILLEGAL_ADDRESS = 700, "CUDA_ERROR_ILLEGAL_ADDRESS";
    /// Peer access was enabled before.
    PEER_ACCESS_ALREADY_ENABLED = 704, "CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED";
    /// Peer access was never enabled.
    PEER_ACCESS_NOT_ENABLED = 705, "CUDA_ERROR_PEER_ACCESS_NOT_ENABLED";
    /// The host range was registered before.
    HOST_MEMORY_ALREADY_REGISTERED = 712, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED";
    /// The host range was never registered.
    HOST_MEMORY_NOT_REGISTERED = 713, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED";
    /// A kernel failed in a way that is not an address.
    LAUNCH_FAILED = 719, "CUDA_ERROR_LAUNCH_FAILED";
    /// The operation is not permitted.
    NOT_PERMITTED = 800, "CUDA_ERROR_NOT_PERMITTED";
    /// Not offered by the device (or not simulated).
    NOT_SUPPORTED = 801, "CUDA_ERROR_NOT_SUPPORTED";
    /// Not permitted while the stream captures.
    CAPTURE_UNSUPPORTED = 900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED";
    /// The capture was made invalid by an earlier error.
    CAPTURE_INVALIDATED = 901, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED";
    /// Two captures would have been merged.
    CAPTURE_MERGE = 902, "CUDA_ERROR_STREAM_CAPTURE_MERGE";
    /// The stream did not begin this capture.
    CAPTURE_UNMATCHED = 903, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED";
    /// A forked stream was not joined to the origin before the end.
    CAPTURE_UNJOINED = 904, "CUDA_ERROR_STREAM_CAPTURE_UNJOINED";
    /// A dependency would cross the capture's boundary.
    CAPTURE_ISOLATION = 905, "CUDA_ERROR_STREAM_CAPTURE_ISOLATION";
    /// An implicit dependency on a capture through the legacy stream.
    CAPTURE_IMPLICIT = 906, "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT";
    /// The event was last recorded in a capture.
    CAPTURED_EVENT = 907, "CUDA_ERROR_CAPTURED_EVENT";
    /// The capture was begun by another thread, not in relaxed mode.
    CAPTURE_WRONG_THREAD = 908, "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD";
    /// Anything else.
    UNKNOWN = 999, "CUDA_ERROR_UNKNOWN";
}

impl Code {
    /// An error of this number that says `message`.
    pub fn because(self, message: impl Into<Cow<'static, str>>) -> SimError {
        SimError { code: self, message: message.into() }
    }
}

/// A call that the device refused: the number for programs, the sentence for people.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SimError {
    /// CUDA's number.
    pub code: Code,
    /// What was asked, and what is wrong.
    pub message: Cow<'static, str>,
}

impl fmt::Display for SimError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({} {})", self.message, self.code.name(), self.code.0)
    }
}

impl std::error::Error for SimError {}

/// What the device's functions return.
pub type Result<T> = std::result::Result<T, SimError>;
