//! Resumes that go on in the background. What can be refused at once is: the regions are closed and claimed before the call returns. The
//! rest is an ordinary resume on a thread of its own, which tells its [`Progress`] what has arrived.

use super::batch::Batch;
use super::team::Call;
use super::{Machine, pick_up};
use crate::error::{Error, Result, Status};
use crate::extent::{Claim, Truth};
use crate::progress::Progress;
use crate::ranges::Ranges;
use crate::region::{Phase, Region};
use crate::sync::{hand_over, lock};
use crate::terms::{Report, ResumeOptions};
use std::sync::Arc;
use std::time::Duration;

/// The order in which memory is to come back: each range before those behind it, everything else last.
#[derive(Clone, Debug, Default)]
pub(super) struct Order(Vec<std::ops::Range<u64>>);

impl Order {
    pub(super) fn of(options: &ResumeOptions<'_>) -> Order {
        let ranges = options.order.unwrap_or_default().iter();
        Order(ranges.map(|&(start, len)| start.0..start.0.saturating_add(len)).collect())
    }

    /// The place of some addresses.
    pub(super) fn rank(&self, addresses: &std::ops::Range<u64>) -> usize {
        let meets = |range: &std::ops::Range<u64>| range.start < addresses.end && addresses.start < range.end;
        self.0.iter().position(meets).unwrap_or(usize::MAX)
    }
}

/// A resume under way: whatever happens to its thread, whoever waits is told.
struct Work {
    machine: Arc<Machine>,
    progress: Arc<Progress>,
    /// What is left to do, until somebody does it.
    open: Option<(Batch, Vec<Claim>, Report)>,
    order: Order,
    wait: Duration,
}

impl Work {
    fn run(&mut self) {
        let Some((batch, claims, report)) = self.open.take() else { return };
        let call = Call::in_background(self.wait, &self.order, &self.progress);
        let outcome = self.machine.resume_claimed(batch, claims, report, &call);
        self.progress.finish(outcome);
    }
}

impl Drop for Work {
    /// After a panic only: a finished one cannot be finished again.
    fn drop(&mut self) {
        let why = "a bug in Sire: a resume in the background ended without an answer";
        self.progress.finish(Err(Error::new(Status::Internal, why)));
    }
}

impl Machine {
    /// Starts to resume the regions.
    pub(crate) fn resume_start(
        self: &Arc<Self>,
        regions: Vec<Arc<Region>>,
        options: &ResumeOptions<'_>,
    ) -> Result<Arc<Progress>> {
        let batch = Batch::close(regions, Phase::Resident)?;
        let mut report = batch.report();
        if batch.is_empty() {
            return Ok(Arc::new(Progress::done(report)));
        }
        let mut claims = batch.claim(&self.heap);
        batch.count(&mut claims, &mut report);
        let progress = Arc::new(Progress::new(away(&claims)).on(Arc::clone(&self.heap.driver)));
        self.note_running(&progress);
        let work = Work {
            machine: Arc::clone(self),
            progress: Arc::clone(&progress),
            open: Some((batch, claims, report)),
            order: Order::of(options),
            wait: options.wait,
        };
        hand_over(work, Work::run);
        Ok(progress)
    }

    fn note_running(&self, progress: &Arc<Progress>) {
        let mut running = lock(&self.running);
        running.retain(|each| each.strong_count() > 0);
        running.push(Arc::downgrade(progress));
    }

    /// Stops what goes on in the background, and waits until it has stopped or the deadline has passed.
    pub(crate) fn quiesce(&self, deadline: std::time::Instant) {
        let running: Vec<Arc<Progress>> = lock(&self.running).iter().filter_map(std::sync::Weak::upgrade).collect();
        running.iter().for_each(|progress| progress.cancel());
        // What came of each is for those who wait for it.
        running.iter().for_each(|progress| drop(progress.finished(Some(deadline))));
    }
}

/// The addresses whose bytes are in a backup.
fn away(claims: &[Claim]) -> Ranges {
    let mut away = Ranges::new();
    for claim in claims {
        let chunks = claim.chunks.iter().filter(|chunk| pick_up::is_away(chunk));
        chunks.for_each(|chunk| away.add(claim.addresses(chunk)));
    }
    away
}

/// After a failure: chunks that somebody may use already stay on the device. `drained`: nothing is under way any more, so that what streams were made
/// to wait for has arrived. If that is not known, its backup stays the truth, and, as nothing is given back then, its memory stays, too.
pub(super) fn keep_what_was_told(claims: &mut [&mut Claim], progress: &Progress, drained: bool) {
    progress.stop(drained);
    for claim in claims {
        let base = claim.extent.base;
        let told = claim.chunks.iter_mut().filter(|chunk| {
            pick_up::is_away(chunk) && chunk.mapped && progress.is_told(&crate::extent::addresses(base, chunk))
        });
        told.for_each(|chunk| chunk.truth = Truth::Device);
    }
}
