//! [`Faulty`]: a driver in front of a driver that counts its calls, remembers their verbs, and fails the
//! ones it was told to fail. A failed call never reaches the driver beneath.
//!
//! A sweep runs an operation once to count its calls, then once per call with that call planned to fail,
//! then once per pair of calls.

use crate::core::locked;
use sire_core::digest::Digest;
use sire_core::driver::{
    Access, Addr, Device, Driver, DriverError, DriverErrorKind, DriverResult, Event, MemoryInfo, Physical,
    ProgramStream, Properties, Stream,
};
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex};

/// Which call a planned failure means; counted from 1, since the plan was set.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum At {
    /// The n-th call of all.
    Call(u64),
    /// The n-th call of a verb.
    Verb(&'static str, u64),
    /// Every call of a verb from the n-th on.
    VerbFrom(&'static str, u64),
}

/// One planned failure. `Lost` is for good: every later call fails too.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Planned {
    /// Which call.
    pub at: At,
    /// How it fails.
    pub kind: DriverErrorKind,
}

impl Planned {
    /// The n-th call of all fails with `kind`.
    #[must_use]
    pub fn call(n: u64, kind: DriverErrorKind) -> Planned {
        Planned { at: At::Call(n), kind }
    }

    /// The n-th call of `verb` fails with `kind`.
    #[must_use]
    pub fn verb(verb: &'static str, n: u64, kind: DriverErrorKind) -> Planned {
        Planned { at: At::Verb(verb, n), kind }
    }
}

type Hook = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct State {
    plan: Vec<Planned>,
    verbs: Vec<&'static str>,
    counts: HashMap<&'static str, u64>,
    fired: u64,
    lost: bool,
    hooks: Vec<(u64, Hook)>,
    partial: bool,
}

/// See the module's documentation. Clones share the driver, the plan and the counts.
#[derive(Clone)]
pub struct Faulty<D> {
    inner: Arc<D>,
    state: Arc<Mutex<State>>,
}

impl<D: fmt::Debug> fmt::Debug for Faulty<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = locked(&self.state);
        f.debug_struct("Faulty").field("inner", &self.inner).field("plan", &state.plan).finish_non_exhaustive()
    }
}

impl<D: Driver> Faulty<D> {
    /// In front of `inner`, with nothing planned.
    pub fn new(inner: D) -> Faulty<D> {
        Faulty { inner: Arc::new(inner), state: Arc::default() }
    }

    /// The driver beneath.
    #[must_use]
    pub fn inner(&self) -> &D {
        &self.inner
    }

    /// Plans failures, and starts to count calls again. An empty plan makes the driver well (a lost device too).
    pub fn plan(&self, plan: impl IntoIterator<Item = Planned>) {
        let mut state = locked(&self.state);
        let partial = state.partial;
        *state = State { plan: plan.into_iter().collect(), partial, ..State::default() };
    }

    /// Runs `hook` before the n-th call since the last [`Faulty::plan`].
    pub fn before(&self, n: u64, hook: impl FnOnce() + Send + 'static) {
        locked(&self.state).hooks.push((n, Box::new(hook)));
    }

    /// Whether a copy to the host that is made to fail spoils half of its destination first, as the bargain allows.
    pub fn partial_copies(&self, partial: bool) {
        locked(&self.state).partial = partial;
    }

    /// Calls since the last [`Faulty::plan`].
    #[must_use]
    pub fn calls(&self) -> u64 {
        locked(&self.state).verbs.len() as u64
    }

    /// The verbs of those calls, in order.
    #[must_use]
    pub fn verbs(&self) -> Vec<&'static str> {
        locked(&self.state).verbs.clone()
    }

    /// How many of those calls were made to fail.
    #[must_use]
    pub fn fired(&self) -> u64 {
        locked(&self.state).fired
    }

    fn enter(&self, verb: &'static str) -> DriverResult<()> {
        let mut state = locked(&self.state);
        state.verbs.push(verb);
        let call = state.verbs.len() as u64;
        let count = state.counts.entry(verb).or_default();
        *count += 1;
        let nth = *count;
        let due = state.hooks.iter().position(|(n, _)| *n == call);
        if let Some(index) = due {
            let (_, hook) = state.hooks.swap_remove(index);
            drop(state);
            hook();
            state = locked(&self.state);
        }
        let kind = match state.plan.iter().find(|planned| planned.is_due(verb, call, nth)) {
            Some(planned) => planned.kind,
            None if state.lost => DriverErrorKind::Lost,
            None => return Ok(()),
        };
        state.fired += 1;
        state.lost |= kind == DriverErrorKind::Lost;
        let message = format!("call {call} ({verb}) was planned to fail");
        Err(DriverError { kind, verb, code: number(kind), message })
    }
}

impl Planned {
    fn is_due(&self, verb: &str, call: u64, nth: u64) -> bool {
        match self.at {
            At::Call(n) => n == call,
            At::Verb(name, n) => name == verb && n == nth,
            At::VerbFrom(name, n) => name == verb && nth >= n,
        }
    }
}

fn number(kind: DriverErrorKind) -> i32 {
    match kind {
        DriverErrorKind::OutOfMemory => 2,
        DriverErrorKind::Invalid => 1,
        DriverErrorKind::Unsupported => 801,
        DriverErrorKind::Unavailable => 4,
        DriverErrorKind::Lost => 700,
        DriverErrorKind::Capturing => 900,
        DriverErrorKind::Other => 999,
    }
}

/// Verbs that only count, perhaps fail, and pass on.
macro_rules! pass_on {
    ($($verb:ident($($arg:ident: $type:ty),*) -> $output:ty;)*) => {
        $(fn $verb(&self, $($arg: $type),*) -> DriverResult<$output> {
            self.enter(stringify!($verb))?;
            self.inner.$verb($($arg),*)
        })*
    };
}

impl<D: Driver> Driver for Faulty<D> {
    fn host_node(&self, device: Device) -> Option<u32> {
        self.inner.host_node(device)
    }

    pass_on! {
        device_count() -> u32;
        granularity(device: Device) -> u64;
        memory_info(device: Device) -> MemoryInfo;
        can_access_peer(device: Device, peer: Device) -> bool;
        reserve(size: u64, align: u64) -> Addr;
        unreserve(addr: Addr, size: u64) -> ();
        create(device: Device, size: u64) -> Physical;
        create_with(device: Device, size: u64, properties: Properties) -> Physical;
        release(physical: Physical) -> ();
        map(addr: Addr, size: u64, physical: Physical) -> ();
        unmap(addr: Addr, size: u64) -> ();
        set_access(addr: Addr, size: u64, access: &[Access]) -> ();
        synchronize(device: Device) -> ();
        is_capturing(device: Device, stream: ProgramStream) -> bool;
        open_stream(device: Device) -> Stream;
        close_stream(stream: Stream) -> ();
        open_event(device: Device) -> Event;
        close_event(event: Event) -> ();
        record(event: Event, stream: Stream) -> ();
        record_on(event: Event, stream: ProgramStream) -> ();
        wait_on(event: Event, device: Device, stream: ProgramStream) -> ();
        wait(event: Event) -> ();
        query(event: Event) -> bool;
        fill(stream: Stream, dst: Addr, len: u64, byte: u8) -> ();
        unregister_host(ptr: *mut u8) -> ();
    }

    unsafe fn copy_to_host(&self, stream: Stream, dst: *mut u8, src: Addr, len: u64) -> DriverResult<()> {
        let entered = self.enter("copy_to_host");
        if entered.is_err() && locked(&self.state).partial {
            // SAFETY: the caller lets us write all of [dst, dst + len).
            unsafe { std::ptr::write_bytes(dst, 0xA5, (len / 2) as usize) };
        }
        entered?;
        // SAFETY: the caller's guarantee, passed on.
        unsafe { self.inner.copy_to_host(stream, dst, src, len) }
    }

    unsafe fn copy_to_device(&self, stream: Stream, dst: Addr, src: *const u8, len: u64) -> DriverResult<()> {
        self.enter("copy_to_device")?;
        // SAFETY: the caller's guarantee, passed on.
        unsafe { self.inner.copy_to_device(stream, dst, src, len) }
    }

    unsafe fn hash(&self, stream: Stream, src: Addr, len: u64, page: u64, out: *mut Digest) -> DriverResult<()> {
        self.enter("hash")?;
        // SAFETY: the caller's guarantee, passed on.
        unsafe { self.inner.hash(stream, src, len, page, out) }
    }

    unsafe fn register_host(&self, ptr: *mut u8, len: u64) -> DriverResult<()> {
        self.enter("register_host")?;
        // SAFETY: the caller's guarantee, passed on.
        unsafe { self.inner.register_host(ptr, len) }
    }
}
