//! The one engine of the process: started when first needed, gone in a forked child.

use crate::boundary::catch;
use crate::capture;
use crate::config;
use crate::control;
use crate::interpose::{original, peer};
use crate::log;
use once_cell::sync::OnceCell;
use sire_core::engine::Engine;
use sire_core::error::{Error, Result, Status};
use sire_cuda::{CudaDriver, Options, Resolver};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// What was started.
#[derive(Debug)]
pub(crate) struct Process {
    pub engine: Engine,
    pub driver: Arc<CudaDriver>,
}

/// A start can fail (no driver yet) and be tried again, hence `OnceCell`.
static PROCESS: OnceCell<Process> = OnceCell::new();

/// Set in the child of a fork whose parent had started: the device memory is the parent's.
static FORKED: AtomicBool = AtomicBool::new(false);

/// What was started, if anything was and it is usable here. Wait-free.
pub(crate) fn started() -> Option<&'static Process> {
    PROCESS.get().filter(|_| !is_forked())
}

/// Whether this is the child of a fork whose parent had started.
pub(crate) fn is_forked() -> bool {
    FORKED.load(Ordering::Relaxed)
}

/// The process' engine, started if need be. Any CUDA runtime that is loaded is the last place to look for the driver.
pub(crate) fn get() -> Result<&'static Process> {
    get_with(&|name, version| original::runtime(0).driver_function(name, version))
}

/// As [`get`]; `resolver` is the caller's own CUDA runtime.
pub(crate) fn get_with(resolver: Resolver<'_>) -> Result<&'static Process> {
    if is_forked() {
        return Err(inactive("this process was forked from one that used Sire; device memory does not survive a fork"));
    }
    if let Some(process) = PROCESS.get() {
        return Ok(process);
    }
    if config::get()?.disabled {
        return Err(inactive("SIRE_DISABLE is set"));
    }
    let process = PROCESS.get_or_try_init(|| catch(|| start(resolver)))?;
    peer::replay(process);
    Ok(process)
}

fn start(resolver: Resolver<'_>) -> Result<Process> {
    let settings = config::get()?;
    let options = Options { path: settings.libcuda.clone(), exportable: settings.exportable };
    let driver = Arc::new(CudaDriver::open(&options, Some(resolver))?);
    // SAFETY: the handler is a plain function of this library, which is linked to stay loaded for good.
    if unsafe { libc::pthread_atfork(None, None, Some(after_fork_in_child)) } != 0 {
        log::warning!("no fork handler could be registered; a forked child must not use device memory");
    }
    log::info!("started: {}", driver.description());
    let engine = Engine::new(driver.clone(), settings.engine.clone());
    engine.watch_captures(capture::in_progress);
    if let Some(path) = &settings.trace {
        // A program that runs without its trace is better than none.
        match engine.trace(path) {
            Ok(path) => log::info!("recording calls in {}", path.display()),
            Err(error) => log::warning!("SIRE_TRACE: {error}"),
        }
    }
    if settings.control {
        match control::open() {
            Ok(path) => log::info!("answering other processes at {}", path.display()),
            Err(error) => log::warning!("SIRE_CONTROL: {error}"),
        }
    }
    Ok(Process { engine, driver })
}

/// Only an atomic store: nothing else is safe between fork and exec.
extern "C" fn after_fork_in_child() {
    FORKED.store(true, Ordering::Relaxed);
}

fn inactive(why: &str) -> Error {
    Error::new(Status::Inactive, format!("Sire is not active here: {why}"))
}
