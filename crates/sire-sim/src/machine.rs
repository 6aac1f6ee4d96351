//! The machine: the set of devices of an environment, as one process sees it. Here are its life, its
//! figures, its peers and its faults; the other verbs are in the modules named after them.

use crate::clock::{self, Clock, Cost, profile};
use crate::core::{Core, locked};
use crate::error::{Code, Result};
use crate::fault::Faults;
use crate::graph::Captures;
use crate::heap::Heap;
use crate::ipc::Opened;
use crate::memory::os_error;
use crate::options::Options;
use crate::stream::Streams;
use crate::vmm::Handles;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

/// A set of devices. Cheap to clone: all clones are the same machine. All functions may be called from
/// any thread. In a forked child every function fails with `NOT_INITIALIZED`.
#[derive(Clone, Debug)]
pub struct Machine(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    core: Arc<Core>,
    handles: Mutex<Handles>,
    heap: Arc<Mutex<Heap>>,
    opened: Mutex<Opened>,
    streams: Streams,
    captures: Captures,
    faults: Faults,
}

impl Inner {
    fn finish(&self) {
        if !self.core.is_own_process() || !self.core.close() {
            return;
        }
        self.streams.shutdown(&self.core);
        locked(&self.handles).clear();
        *locked(&self.heap) = Heap::default();
        self.core.devices.iter().for_each(|memory| memory.leave());
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.finish();
    }
}

/// Life.
impl Machine {
    /// The devices that `options` describe; joins the environment that `options.dir` names.
    ///
    /// # Errors
    /// `INVALID_VALUE` for a fault plan that cannot be read; `UNKNOWN` if the operating system refuses what is needed.
    pub fn new(options: Options) -> Result<Machine> {
        let faults = Faults::new(&options.faults).map_err(|message| Code::INVALID_VALUE.because(message))?;
        let core = Arc::new(Core::new(options).map_err(os_error)?);
        Ok(Machine(Arc::new(Inner {
            core,
            handles: Mutex::default(),
            heap: Arc::default(),
            opened: Mutex::default(),
            streams: Streams::default(),
            captures: Captures::default(),
            faults,
        })))
    }

    /// The devices that `SIRE_SIM_*` describe.
    ///
    /// # Errors
    /// As [`Machine::new`], and `INVALID_VALUE` for a variable that cannot be read. The message is meant for standard error.
    pub fn from_env() -> Result<Machine> {
        Machine::new(Options::from_env().map_err(|message| Code::INVALID_VALUE.because(message))?)
    }

    /// The settings.
    #[must_use]
    pub fn options(&self) -> &Options {
        &self.0.core.options
    }

    /// Finishes all work, writes the census file, gives all memory back, leaves the environment. Every later
    /// call fails with `DEINITIALIZED`. To be called at exit where machines are not dropped.
    pub fn shutdown(&self) {
        if self.0.core.check_open().is_err() {
            return;
        }
        if let Some(path) = &self.options().census {
            self.drain_devices();
            if let Err(error) = std::fs::write(path, self.census_json()) {
                eprintln!("sire-sim: the census could not be written to {}: {error}", path.display());
            }
        }
        self.0.finish();
    }

    /// How many devices there are.
    #[must_use]
    pub fn device_count(&self) -> u32 {
        self.0.core.devices.len() as u32
    }

    /// Whether verbs on `device` may be used. Every verb asks this itself.
    ///
    /// # Errors
    /// The device's sticky error; `INVALID_DEVICE`; `NOT_INITIALIZED` in a forked child; `DEINITIALIZED` after shutdown.
    pub fn check_alive(&self, device: u32) -> Result<()> {
        self.core().check_alive(device)
    }

    /// Gives the device a sticky error.
    pub fn lose(&self, device: u32, code: Code) {
        self.core().lose(device, code);
    }

    /// Ends what this process has on the device, as `cudaDeviceReset` does: streams and events, after the work that they hold, what the heap gave out,
    /// host memory that was made or registered there, access of peers, and the sticky error. Physical memory that was made for the program to map stays.
    pub fn reset(&self, device: u32) {
        self.end_streams(device);
        self.end_heap(device);
        self.end_host_ranges(device);
        self.core().peers().retain(|(accessor, owner)| *accessor != device && *owner != device);
        self.revive(device);
    }

    /// Forgets the device's sticky error.
    pub fn revive(&self, device: u32) {
        self.core().revive(device);
    }

    pub(crate) fn core(&self) -> &Arc<Core> {
        &self.0.core
    }

    pub(crate) fn handles(&self) -> &Mutex<Handles> {
        &self.0.handles
    }

    pub(crate) fn heap(&self) -> &Arc<Mutex<Heap>> {
        &self.0.heap
    }

    pub(crate) fn opened(&self) -> &Mutex<Opened> {
        &self.0.opened
    }

    pub(crate) fn streams(&self) -> &Streams {
        &self.0.streams
    }

    pub(crate) fn captures(&self) -> &Captures {
        &self.0.captures
    }
}

/// Virtual time (see docs/software-device.md for its rules).
impl Machine {
    /// Virtual seconds since the machine was made: the latest of all threads' clocks. Nothing that is called
    /// later begins before. `None` without a profile.
    #[must_use]
    pub fn now(&self) -> Option<f64> {
        self.core().clock.as_ref().map(|clock| clock::seconds(clock.now()))
    }

    /// As [`Machine::now`], exactly.
    #[must_use]
    pub fn now_picoseconds(&self) -> Option<u64> {
        self.core().clock.as_ref().map(Clock::now)
    }

    /// Virtual seconds of the calling thread alone, which nothing else is held to.
    #[must_use]
    pub fn thread_now(&self) -> Option<f64> {
        self.core().clock.as_ref().map(|clock| clock::seconds(clock.mine()))
    }

    /// Tells the clock, if there is one, what has been done.
    pub(crate) fn account(&self, tell: impl FnOnce(&Clock)) {
        if let Some(clock) = &self.core().clock {
            tell(clock);
        }
    }

    /// The calling thread's call took what the profile says.
    pub(crate) fn spend(&self, cost: impl FnOnce(&profile::Memory) -> Cost, bytes: u64) {
        self.account(|clock| clock.spend(cost(&clock.profile.memory).of(bytes)));
    }
}

/// Faults and counters.
impl Machine {
    /// To be called at the entry of every function of an interface: counts the call, and says which error it
    /// must return, if any (a delay is over by then; a kill does not return; in a forked child it is `NOT_INITIALIZED`). `bytes`: what the call is about to allocate or copy.
    #[must_use]
    pub fn enter_call(&self, name: &str, bytes: u64) -> Option<Code> {
        if !self.core().is_own_process() {
            return Some(Code::NOT_INITIALIZED);
        }
        if self.options().log {
            eprintln!("sire-sim: {name} ({bytes})");
        }
        self.0.faults.enter(name, bytes)
    }

    /// Replaces the fault plan; counting starts again.
    ///
    /// # Errors
    /// A sentence about the part of the text that cannot be read.
    pub fn set_faults(&self, plan: &str) -> std::result::Result<(), String> {
        self.0.faults.replace(plan)
    }

    /// How often each function was entered.
    #[must_use]
    pub fn call_counts(&self) -> BTreeMap<String, u64> {
        self.0.faults.counts()
    }
}

/// Figures and peers.
impl Machine {
    /// (free, total) bytes of the device, all processes together.
    ///
    /// # Errors
    /// As [`Machine::check_alive`].
    pub fn memory_info(&self, device: u32) -> Result<(u64, u64)> {
        self.core().check_alive(device)?;
        self.core().memory(device)?.info()
    }

    /// The granularity of virtual-memory verbs.
    ///
    /// # Errors
    /// `INVALID_DEVICE`.
    pub fn granularity(&self, device: u32) -> Result<u64> {
        Ok(self.core().memory(device)?.frame)
    }

    /// Whether `device` can be given access to memory of `peer`: always, but not to its own.
    ///
    /// # Errors
    /// `INVALID_DEVICE`.
    pub fn can_access_peer(&self, device: u32, peer: u32) -> Result<bool> {
        self.core().memory(device)?;
        self.core().memory(peer)?;
        Ok(device != peer)
    }

    /// Lets `device` touch the heap of `peer`.
    ///
    /// # Errors
    /// `PEER_ACCESS_ALREADY_ENABLED`; `INVALID_DEVICE`, also for the device itself.
    pub fn enable_peer(&self, device: u32, peer: u32) -> Result<()> {
        self.core().check_alive(device)?;
        if !self.can_access_peer(device, peer)? {
            return Err(Code::INVALID_DEVICE.because(format!("device {device} is not its own peer")));
        }
        if !self.core().peers().insert((device, peer)) {
            return Err(Code::PEER_ACCESS_ALREADY_ENABLED
                .because(format!("device {device} has access to device {peer} already")));
        }
        Ok(())
    }

    /// Undoes [`Machine::enable_peer`].
    ///
    /// # Errors
    /// `PEER_ACCESS_NOT_ENABLED`.
    pub fn disable_peer(&self, device: u32, peer: u32) -> Result<()> {
        self.core().check_alive(device)?;
        if !self.core().peers().remove(&(device, peer)) {
            return Err(
                Code::PEER_ACCESS_NOT_ENABLED.because(format!("device {device} has no access to device {peer}"))
            );
        }
        Ok(())
    }

    /// Whether device work on `device` may touch the whole range. If not, the device gets the sticky error
    /// `ILLEGAL_ADDRESS`, as it would on touching it.
    ///
    /// # Errors
    /// `ILLEGAL_ADDRESS`, or the sticky error that was there.
    pub fn check_access(&self, ptr: u64, len: u64, device: u32, write: bool) -> Result<()> {
        self.core().check_alive(device)?;
        if !self.core().accessible(ptr, len, device, write) {
            self.core().lose(device, Code::ILLEGAL_ADDRESS);
            let doing = if write { "write" } else { "read" };
            return Err(
                Code::ILLEGAL_ADDRESS.because(format!("device {device} may not {doing} {len} bytes at {ptr:#x}"))
            );
        }
        Ok(())
    }

    /// The same question without consequences.
    #[must_use]
    pub fn accessible(&self, ptr: u64, len: u64, device: u32, write: bool) -> bool {
        self.core().accessible(ptr, len, device, write)
    }
}
