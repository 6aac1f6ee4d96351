//! What the parts of one transition share while they work at the same time: the call they belong to, the pool their memory comes from, and
//! the first failure, at which the others stop.

use super::Machine;
use super::background::Order;
use super::pool::Pool;
use super::stride::Stride;
use crate::callers::Heard;
use crate::clock;
use crate::error::{Error, Result, Status};
use crate::extent::Extent;
use crate::progress::Progress;
use crate::region::Region;
use crate::sync::{AtomicBool, Mutex, Ordering, lock};
use std::time::{Duration, Instant};

/// One call: when it began, when it may stop waiting, and whether it has been cancelled.
#[derive(Clone, Copy, Debug)]
pub(super) struct Call<'a> {
    pub(super) began: Instant,
    wait_until: Instant,
    /// `None` for an undo, which cannot be cancelled.
    cancels: Option<u64>,
    /// What is to come back first.
    pub(super) order: Option<&'a Order>,
    /// Who is told what has arrived, and cancels the call instead.
    pub(super) progress: Option<&'a Progress>,
    /// Whether memory stays where it is once its bytes are safe.
    pub(super) lazy: bool,
    /// Whether the caller vouches that no device uses the memory any more.
    pub(super) idle: bool,
    /// At what the call stops.
    pub(super) watch: Option<Watch<'a>>,
}

/// What is read while the program goes on using it: it may close, or go.
#[derive(Clone, Copy, Debug)]
pub(super) struct Watch<'a> {
    pub(super) region: &'a Region,
    pub(super) extent: &'a Extent,
}

impl Watch<'_> {
    pub(super) fn is_over(&self) -> bool {
        self.extent.is_wanted() || !self.region.is_resident()
    }
}

impl<'a> Call<'a> {
    pub(super) fn new(machine: &Machine, wait: Duration) -> Call<'a> {
        let began = clock::now();
        let wait_until = began.checked_add(wait).unwrap_or(began + Duration::from_secs(1 << 30));
        let cancels = Some(machine.cancels.load(Ordering::SeqCst));
        Call { began, wait_until, cancels, order: None, progress: None, lazy: false, idle: false, watch: None }
    }

    /// The same call, which brings memory back in this order.
    pub(super) fn ordered(self, order: &'a Order) -> Call<'a> {
        Call { order: Some(order), ..self }
    }

    /// The same call; whether memory stays where it is once its bytes are safe.
    pub(super) fn lazily(self, lazy: bool) -> Call<'a> {
        Call { lazy, ..self }
    }

    /// The same call; whether devices need not be waited for.
    pub(super) fn on_idle(self, idle: bool) -> Call<'a> {
        Call { idle, ..self }
    }

    /// The same call, about one extent, which others may use meanwhile.
    pub(super) fn watching(self, region: &'a Region, extent: &'a Extent) -> Call<'a> {
        Call { watch: Some(Watch { region, extent }), ..self }
    }

    /// A call that goes on after its function has returned: cancelled only by its progress.
    pub(super) fn in_background(wait: Duration, order: &'a Order, progress: &'a Progress) -> Call<'a> {
        let began = clock::now();
        let wait_until = began.checked_add(wait).unwrap_or(began + Duration::from_secs(1 << 30));
        Call {
            began,
            wait_until,
            cancels: Some(0),
            order: Some(order),
            progress: Some(progress),
            lazy: false,
            idle: false,
            watch: None,
        }
    }

    /// An undo: does not wait, cannot be cancelled.
    pub(super) fn undo() -> Call<'a> {
        let began = clock::now();
        Call {
            began,
            wait_until: began,
            cancels: None,
            order: None,
            progress: None,
            lazy: false,
            idle: false,
            watch: None,
        }
    }

    /// Whether what the call watches has closed or gone.
    pub(super) fn is_over(&self) -> bool {
        self.watch.is_some_and(|watch| watch.is_over())
    }

    /// Whether this is the undo of something else.
    pub(super) fn is_undo(&self) -> bool {
        self.cancels.is_none()
    }

    /// How much longer the call may wait for memory.
    pub(super) fn patience(&self) -> Duration {
        self.wait_until.saturating_duration_since(clock::now())
    }

    pub(super) fn check_cancelled(&self, machine: &Machine) -> Result<()> {
        if let Some(progress) = self.progress {
            return progress.check_cancelled();
        }
        if let Some(watch) = self.watch {
            if watch.is_over() {
                return Err(stopped());
            }
            machine.heap.refuse_capture()?;
        }
        match self.cancels {
            Some(cancels) if cancels != machine.cancels.load(Ordering::SeqCst) => {
                Err(Error::new(Status::Cancelled, "the call was cancelled and rolled back; it can be repeated"))
            }
            _ => Ok(()),
        }
    }
}

/// A failure, and whether it is known that no copy is under way any more.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) error: Error,
    pub(super) drained: bool,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure { error, drained: true }
    }
}

/// See the [module documentation](self).
#[derive(Debug)]
pub(super) struct Team<'a> {
    pub(super) machine: &'a Machine,
    pub(super) call: &'a Call<'a>,
    pub(super) pool: &'a Pool<'a>,
    failed: AtomicBool,
    first: Mutex<Option<Failure>>,
    /// What the thread that made the call knew of others that wait for a device.
    heard: Heard,
}

impl<'a> Team<'a> {
    /// To be made by the thread that makes the call.
    pub(super) fn new(machine: &'a Machine, call: &'a Call<'a>, pool: &'a Pool<'a>) -> Team<'a> {
        let heard = machine.heap.callers.heard();
        Team { machine, call, pool, failed: AtomicBool::new(false), first: Mutex::new(None), heard }
    }

    /// The stride of a pass of the call. In the background the program goes on beside it.
    pub(super) fn stride(&self) -> Stride<'a> {
        Stride::new(&self.machine.heap.callers, self.heard, &self.machine.settings, self.call.progress.is_none())
    }

    /// Fails if the call was cancelled or another part has failed.
    pub(super) fn check(&self) -> Result<()> {
        if self.failed.load(Ordering::SeqCst) {
            return Err(stopped());
        }
        self.call.check_cancelled(self.machine)
    }

    /// Notes a failure and stops the others. Of several errors the first is told; one copy that may still be under way is remembered in any case.
    pub(super) fn fail(&self, failure: impl Into<Failure>) {
        let Failure { error, drained } = failure.into();
        let mut first = lock(&self.first);
        first.get_or_insert(Failure { error, drained: true }).drained &= drained;
        drop(first);
        self.failed.store(true, Ordering::SeqCst);
        self.pool.stop();
    }

    /// Does a part of the work.
    pub(super) fn part(&self, work: impl FnOnce() -> std::result::Result<(), Failure>) {
        if let Err(failure) = work() {
            self.fail(failure);
        }
    }

    /// What came of it, once every part has ended.
    pub(super) fn outcome(self) -> std::result::Result<(), Failure> {
        lock(&self.first).take().map_or(Ok(()), Err)
    }
}

/// What a part says that stops because another one failed. Nobody is told.
pub(super) fn stopped() -> Error {
    Error::new(Status::Cancelled, "another part of the call has failed")
}
