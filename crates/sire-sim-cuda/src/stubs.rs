//! Functions that exist so that programs load, and fail by name when called. The names come from `stubs/*.txt`.

use crate::boundary::{contain, explain, remember};
use crate::state;

/// Says which function is missing, and returns its library's "not supported".
fn refuse(name: &'static str, library: &'static str, status: i64) -> i64 {
    contain(name, status, || {
        let message = format!("not simulated: {name}");
        state::say(library, &message);
        let machine = state::existing_machine().filter(|_| !state::is_down());
        if let Some(code) = machine.and_then(|machine| machine.enter_call(name, 0)) {
            return i64::from(code.0);
        }
        if library.starts_with("CUDA") {
            explain(&message);
        }
        if library == "CUDA runtime" {
            remember(status as i32);
        }
        status
    })
}

macro_rules! stub {
    ($name:ident, $library:literal, $status:literal) => {
        #[doc = concat!("Not simulated: ", $library, "'s `", stringify!($name), "`.")]
        #[unsafe(no_mangle)]
        pub extern "C" fn $name() -> i64 {
            refuse(stringify!($name), $library, $status)
        }
    };
}

include!(concat!(env!("OUT_DIR"), "/stubs.rs"));
