//! Resets of a device, by the runtime's function or the driver's: what Sire has there goes before CUDA ends everything. CUDA does not unmap memory that
//! was made and mapped piece by piece, as ours is, and nobody tells us that streams, events and registered memory are gone.

use super::entry::{Code, original as driver};
use super::guard::Guard;
use super::runtime::current_device;
use super::{cudaError, original, peer};
use crate::boundary::catch;
use crate::capture;
use crate::log;
use crate::process;
use crate::reservation;
use sire_core::driver::Device;
use std::cell::Cell;
use std::ffi::c_int;
use std::sync::atomic::{AtomicU64, Ordering};

const SUCCESS: Code = 0;

static RESETS: AtomicU64 = AtomicU64::new(0);

/// How often a device was reset: what was known of a thread's contexts before may not hold any more.
pub(super) fn count() -> u64 {
    RESETS.load(Ordering::Relaxed)
}

pub(super) unsafe extern "C" fn runtime(caller: usize) -> cudaError {
    let runtime = original::runtime(caller);
    // SAFETY: takes nothing.
    around(|| current_device(runtime).unwrap_or(-1), || unsafe { runtime.device_reset() })
}

pub(super) unsafe extern "C" fn primary_context(device: c_int) -> Code {
    // SAFETY: the program's own argument, as it passed it.
    around(|| device, || unsafe { driver::primary_context(device) })
}

pub(super) unsafe extern "C" fn primary_context_before_11(device: c_int) -> Code {
    // SAFETY: the program's own argument, as it passed it.
    around(|| device, || unsafe { driver::primary_context_before_11(device) })
}

/// Passes a reset on, behind what Sire does. A runtime's call of the driver inside of its own is only passed on.
fn around(device: impl FnOnce() -> c_int, reset: impl Fn() -> Code) -> Code {
    let Some(_guard) = Guard::enter() else { return reset() };
    let Ok(device) = u32::try_from(device()).map(Device) else { return reset() };
    let pass_on = || {
        let code = reset();
        note(device, code);
        code
    };
    let_go(device, &pass_on).unwrap_or_else(pass_on)
}

/// `None`: it was not passed on.
fn let_go(device: Device, pass_on: &impl Fn() -> Code) -> Option<Code> {
    let process = process::started()?;
    let code = Cell::new(None);
    let done = catch(|| {
        process.engine.reset(device, || {
            process.driver.forget(device);
            code.set(Some(pass_on()));
        });
        Ok(())
    });
    if let Err(error) = done {
        log::warning!("what Sire has on {device} did not end with its reset: {error}");
    }
    code.get()
}

/// What else is not so any more.
fn note(device: Device, code: Code) {
    RESETS.fetch_add(1, Ordering::Relaxed);
    if code == SUCCESS {
        capture::end_on(device);
        peer::forget_contexts_of(device);
        reservation::ended(device);
    }
}
