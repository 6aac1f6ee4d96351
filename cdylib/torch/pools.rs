//! Private pools: which allocations belong to one. While PyTorch captures a graph it says which streams' allocations are the graph's, and until the graph is
//! gone nothing else may get that memory, because each replay writes there.

use super::function::Filter;
use crate::capture;
use crate::process::Process;
use sire_core::driver::Device;
use sire_core::engine::PoolNumber;
use sire_core::error::Result;
use std::ffi::c_void;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

struct Route {
    device: Device,
    id: (u64, u64),
    pool: PoolNumber,
    filter: Filter,
}

static ROUTES: Mutex<Vec<Arc<Route>>> = Mutex::new(Vec::new());
/// How many there are, so that nobody need lock to find none.
static COUNT: AtomicUsize = AtomicUsize::new(0);

fn routes<R>(with: impl FnOnce(&mut Vec<Arc<Route>>) -> R) -> R {
    let mut routes = ROUTES.lock().unwrap_or_else(PoisonError::into_inner);
    let result = with(&mut routes);
    COUNT.store(routes.len(), Ordering::Release);
    result
}

/// The pool for an allocation on `stream` of `device`. The newest route goes first.
pub(super) fn of(device: Device, stream: *mut c_void) -> PoolNumber {
    if COUNT.load(Ordering::Acquire) == 0 {
        return PoolNumber::NONE;
    }
    // A filter asks the driver, so it is called without the lock.
    let here: Vec<Arc<Route>> =
        routes(|routes| routes.iter().filter(|route| route.device == device).cloned().collect());
    here.iter().rev().find(|route| route.filter.takes(stream)).map_or(PoolNumber::NONE, |route| route.pool)
}

/// From now on, allocations on `device` that `filter` takes are the pool's. PyTorch does this before a capture begins.
pub(super) fn begin(process: &Process, device: Device, id: (u64, u64), filter: Filter) -> Result<()> {
    let pool = process.engine.hold_pool(device, id)?;
    capture::begin();
    routes(|routes| routes.push(Arc::new(Route { device, id, pool, filter })));
    Ok(())
}

/// Not any more. False if they were not.
pub(super) fn end(device: Device, id: (u64, u64)) -> bool {
    let route = routes(|routes| {
        let at = routes.iter().rposition(|route| route.device == device && route.id == id)?;
        Some(routes.remove(at))
    });
    route.is_some_and(|_| capture::end())
}
