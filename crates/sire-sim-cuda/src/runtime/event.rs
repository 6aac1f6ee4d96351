//! Events.

use super::memory::stream_of;
use crate::abi::Handle;
use crate::boundary::{Out, export};
use crate::state;
use sire_sim::{Code, EventId, Machine, Result};
use std::ffi::{c_float, c_uint};

const DISABLE_TIMING: c_uint = 2;
const INTERPROCESS: c_uint = 4;
const ALL_FLAGS: c_uint = 7;

/// Makes an event on `device`.
pub fn create(machine: &Machine, out: Out<Handle>, device: u32, flags: c_uint) -> Result<()> {
    let out = out.required()?;
    if flags > ALL_FLAGS {
        return Err(Code::INVALID_VALUE.because(format!("{flags:#x} are not flags of an event")));
    }
    let timing = flags & DISABLE_TIMING == 0;
    let event = match flags & INTERPROCESS == 0 {
        true => machine.event_create(device, timing)?,
        false if timing => {
            return Err(Code::INVALID_VALUE.because("an interprocess event has no timing: cudaEventDisableTiming"));
        }
        false => machine.event_create_shared(device)?,
    };
    out.set(event.0 as Handle)
}

/// Whether the event has passed, as a status.
pub fn query(machine: &Machine, event: Handle) -> Result<()> {
    if machine.event_query(EventId(event as u64))? {
        Ok(())
    } else {
        Err(Code::NOT_READY.because("the event has not passed"))
    }
}

export! { Runtime:
    fn cudaEventCreate(out: Out<Handle>) |machine| { create(machine, out, state::current_device(machine), 0) }
    fn cudaEventCreateWithFlags(out: Out<Handle>, flags: c_uint) |machine| {
        create(machine, out, state::current_device(machine), flags)
    }
    fn cudaEventRecord(event: Handle, stream: Handle) |machine| {
        machine.event_record(EventId(event as u64), stream_of(machine, stream)?)
    }
    fn cudaEventRecordWithFlags(event: Handle, stream: Handle, _flags: c_uint) |machine| {
        machine.event_record(EventId(event as u64), stream_of(machine, stream)?)
    }
    fn cudaEventQuery(event: Handle) |machine| { query(machine, event) }
    fn cudaEventSynchronize(event: Handle) |machine| { machine.event_synchronize(EventId(event as u64)) }
    fn cudaEventElapsedTime(milliseconds: Out<c_float>, start: Handle, end: Handle) |machine| {
        milliseconds.set(machine.event_elapsed(EventId(start as u64), EventId(end as u64))?)
    }
    fn cudaEventElapsedTime_v2(milliseconds: Out<c_float>, start: Handle, end: Handle) |machine| {
        milliseconds.set(machine.event_elapsed(EventId(start as u64), EventId(end as u64))?)
    }
}

export! { RuntimeQuery:
    fn cudaEventDestroy(event: Handle) |machine| { machine.event_destroy(EventId(event as u64)) }
}
