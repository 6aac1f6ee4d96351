//! Transitions: pausing and resuming a set of regions, all or nothing.
//!
//! Both directions are built on two idempotent passes over chunks, each of which only looks at where a
//! chunk's bytes are: [`put_down`] saves what is on the device and releases its memory, [`pick_up`]
//! makes memory for what is in a backup and restores it. So the undo of a pause is `pick_up`, the
//! undo of a resume is the releasing half of `put_down`, and a call that failed half-way can simply be repeated.
//! [`plan`] decides beforehand what will be saved, and makes room for all of it. [`batch`] closes and opens the regions.
//!
//! Both passes cut segments into [`pieces`] and move them through a pipe per device; [`seam`] is where a piece's bytes meet a tier. The parts
//! of a transition that work at the same time (devices, and the [`maker`] ahead of the copy in) are a [`team`], whose
//! memory goes through a [`pool`]. A [`switch`] is both passes at once, over different regions and one pool. What can be saved before a pause is
//! copied [`ahead`]; what nobody needs yet may stay where it is, [`lazy`], until somebody wants [`room`].

mod ahead;
mod background;
mod batch;
mod draft;
mod lazy;
mod maker;
mod pick_up;
mod pieces;
mod plan;
mod pool;
mod prove;
mod put_down;
mod room;
mod seam;
mod stride;
mod survey;
mod switch;
mod team;
mod tend;
mod veil;

use crate::clock;
use crate::driver::Device;
use crate::error::{Error, Result, Status};
use crate::extent::{Claim, Extent, Truth};
use crate::heap::Heap;
use crate::pages::Pages;
use crate::policy::Budget;
use crate::progress::Progress;
use crate::ranges::Ranges;
use crate::region::{Left, Phase, Region, Regions};
use crate::settings::Settings;
use crate::sync::{AtomicU64, Mutex, lock};
use crate::terms::{Clean, DeadRanges, PauseOptions, RegionId, Report, ResumeOptions, State};
use crate::tier::host::HostTier;
use crate::tier::{Segment, Tiers};
use crate::transfer::Lanes;
use background::Order;
use batch::Batch;
use pieces::At;
use pool::Pool;
use seam::Staging;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Weak};
use std::time::Duration;
use team::Call;

/// Everything a transition works with.
#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) settings: Arc<Settings>,
    pub(crate) regions: Regions,
    pub(crate) heap: Heap,
    pub(crate) host: Arc<HostTier>,
    pub(crate) tiers: Tiers,
    pub(crate) lanes: Lanes,
    pub(crate) pages: Pages,
    /// Devices that were told to make ready what hashing needs.
    pub(crate) hashing: Mutex<BTreeSet<Device>>,
    /// Held by whoever tends backups.
    pub(crate) tending: Mutex<()>,
    /// Pauses since whose end backups were not tended; 0: nobody is to.
    pub(crate) untended: AtomicU64,
    /// How often `cancel` was called. A transition stops when this is no longer what it was at its start.
    pub(crate) cancels: AtomicU64,
    /// What may be used of each device; of those that are not here, everything.
    pub(crate) budgets: Mutex<BTreeMap<Device, Budget>>,
    /// Resumes in the background that somebody may still wait for.
    pub(crate) running: Mutex<Vec<Weak<Progress>>>,
}

impl Machine {
    /// Pauses the regions.
    pub(crate) fn pause(&self, regions: Vec<Arc<Region>>, options: PauseOptions<'_>) -> Result<Report> {
        let call = Call::new(self, Duration::ZERO).lazily(options.lazy).on_idle(options.idle);
        let batch = Batch::close(regions.clone(), Phase::Paused)?.keeping_all(options.keep_all);
        let before: Vec<Arc<Region>> = regions.into_iter().filter(|r| batch.region(r.id).is_none()).collect();
        let mut report = self.pause_batch(batch, options.dead, &call)?;
        let paused = report.regions_changed;
        if options.lazy {
            return Ok(report);
        }
        match before.iter().try_for_each(|region| self.pause_rest(region, options, &call, &mut report)) {
            Err(error) if paused == 0 => Err(error),
            Err(error) => {
                // The pause itself came to its end, which an error would deny.
                self.heap
                    .notices
                    .add(format!("memory that an earlier pause had left stays for now: {error}; pause it again"));
                Ok(report)
            }
            Ok(()) => Ok(report),
        }
    }

    fn pause_batch(&self, mut batch: Batch, dead: Option<&dyn DeadRanges>, call: &Call) -> Result<Report> {
        let mut report = batch.report();
        if batch.is_empty() {
            return Ok(report);
        }
        let mut claims = self.claim_live(&batch, dead, &mut report)?;
        let outcome = self.pause_claimed(&mut batch, &mut claims, call, &mut report);
        report.seconds_total = clock::seconds_since(call.began);
        match outcome {
            Ok(()) => {
                report.bytes_lazy = claims.iter().map(Claim::resident_bytes).sum();
                self.commit_pause(batch, claims, &report);
                Ok(report)
            }
            Err(error) => Err(self.undo_pause(batch, claims, error, Pool::open(&self.heap))),
        }
    }

    /// Claims what is to be paused, and marks in it what holds nothing.
    fn claim_live(&self, batch: &Batch, dead: Option<&dyn DeadRanges>, report: &mut Report) -> Result<Vec<Claim>> {
        self.heap.exhume();
        let dead = dead.map_or(Ok(Ranges::new()), |map| batch.dead_ranges(map))?;
        let mut claims = batch.claim(&self.heap);
        let gap = |claim: &Claim| {
            let region = batch.region(claim.extent.region);
            region.map_or(0, |region| plan::slot_gap(region).min(self.settings.copy_piece))
        };
        report.bytes_dead = claims.iter_mut().map(|claim| claim.mark_dead(&dead, gap(claim))).sum();
        batch.count(&mut claims, report);
        report.bytes_held = batch.held_bytes(&self.heap);
        Ok(claims)
    }

    fn pause_claimed(&self, batch: &mut Batch, claims: &mut [Claim], call: &Call, report: &mut Report) -> Result<()> {
        let (staging, new) = self.prepare_pause(batch, claims, call, report)?;
        let start = clock::now();
        let done = self.put_down(claims, staging, call, report);
        report.seconds_transfer = clock::seconds_since(start);
        if done.is_ok() {
            self.share(claims, &new, report);
        }
        done
    }

    /// Everything before the first copy: what has changed, room for every byte, then idle devices, unless they are vouched for. Returns staging buffers, and what
    /// [`Machine::share`] is to be told when all is saved.
    fn prepare_pause(
        &self,
        batch: &mut Batch,
        claims: &mut [Claim],
        call: &Call,
        report: &mut Report,
    ) -> Result<(Staging, Vec<At>)> {
        let proven = self.prove(batch, claims, call, report)?;
        let mut surveys = self.survey(batch, claims);
        let looked = survey::is_needed(&surveys);
        if looked {
            let idle = if proven || call.idle { Ok(()) } else { self.synchronize(claims, report) };
            let found = idle.and_then(|()| self.look(claims, &mut surveys, call, report));
            if let Err(error) = found {
                plan::give_up(claims, surveys, batch);
                return Err(error);
            }
        }
        let prepared = self.prepare(batch, claims, surveys, report);
        report.seconds_prepare = clock::seconds_since(call.began) - report.seconds_synchronize;
        let staging = prepared?;
        let new = Machine::unshared(claims);
        batch.note_pending(claims);
        report.bytes_discarded = batch.discarded_bytes();
        let saved: u64 = claims.iter().map(plan::clean).sum();
        report.bytes_clean = saved.saturating_sub(report.bytes_constant + report.bytes_shared);
        if !looked && !proven && !call.idle {
            self.synchronize(claims, report)?;
        }
        Ok((staging, new))
    }

    /// Waits once for each device of the claims, and for each of their peers.
    fn synchronize(&self, claims: &[Claim], report: &mut Report) -> Result<()> {
        let start = clock::now();
        let done = self.heap.synchronize_all(&devices(claims));
        report.seconds_synchronize = clock::seconds_since(start);
        done
    }

    /// Has what the first pause of a region will need made ready, once its first memory is there.
    pub(crate) fn make_ready(&self, region: &Region, device: Device) {
        self.host.prepare();
        if matches!(region.judged(), Clean::Declared | Clean::Verified) {
            self.prepare_hash(device);
        }
    }

    /// Has the driver make ready what hashing needs on a device, once.
    pub(crate) fn prepare_hash(&self, device: Device) {
        if lock(&self.hashing).insert(device) {
            self.lanes.prepare_hash(device);
        }
    }

    fn commit_pause(&self, batch: Batch, claims: Vec<Claim>, report: &Report) {
        batch.note_success(report, Phase::Paused);
        self.end_holding(batch, claims);
    }

    /// Undoes a pause that failed with `error`, with memory from `pool`; if the undo fails too, what can be paused is, and
    /// the regions end paused. Returns what to tell.
    fn undo_pause(&self, batch: Batch, mut claims: Vec<Claim>, mut error: Error, pool: Pool<'_>) -> Error {
        let was_resident = |region| batch.was(region) == Some(Phase::Resident);
        let lost: u64 = claims.iter().filter(|claim| was_resident(claim.extent.region)).map(plan::lost).sum();
        if lost > 0 {
            error.message = format!("{}; {lost} bytes without a backup had been thrown away already", error.message);
        }
        batch.note_error(&error);
        let Err(second) = self.pick_up(&mut claims, was_resident, &Call::undo(), pool, &mut Report::default()) else {
            forget_unproven(&mut claims, |region| batch.is_clean(region));
            self.end(batch, claims, |was| was);
            return error;
        };
        let error = self.give_up(&mut claims, error, &second);
        batch.note_error(&error);
        batch.note_pause();
        self.end(batch, claims, |_| Phase::Paused);
        error
    }

    /// After a failed undo: pauses what still can be. Every byte is on the device or in a backup either way.
    fn give_up(&self, claims: &mut [Claim], error: Error, second: &Error) -> Error {
        let idle = self.heap.synchronize_all(&devices(claims));
        if let (Ok(()), Ok(staging)) = (idle, self.staging(&*claims)) {
            // Best effort: what fails here keeps its physical memory, and a later call tries again.
            let _ = self.put_down(claims, staging, &Call::undo(), &mut Report::default());
        }
        if error.status == Status::DeviceLost {
            return error;
        }
        let message = format!(
            "the pause failed ({error}) and could not be undone ({second}); \
            the region is paused, nothing with a backup is lost: resume it when memory is free"
        );
        Error::new(Status::PausedAfterFailure, message)
    }

    /// Resumes the regions.
    pub(crate) fn resume(&self, regions: Vec<Arc<Region>>, options: &ResumeOptions<'_>) -> Result<Report> {
        let order = Order::of(options);
        let call = Call::new(self, options.wait).ordered(&order);
        let batch = Batch::close(regions, Phase::Resident)?;
        self.resume_batch(batch, &call)
    }

    fn resume_batch(&self, batch: Batch, call: &Call) -> Result<Report> {
        let mut report = batch.report();
        if batch.is_empty() {
            return Ok(report);
        }
        self.heap.exhume();
        let mut claims = batch.claim(&self.heap);
        batch.count(&mut claims, &mut report);
        self.resume_claimed(batch, claims, report, call)
    }

    fn resume_claimed(
        &self,
        batch: Batch,
        mut claims: Vec<Claim>,
        mut report: Report,
        call: &Call<'_>,
    ) -> Result<Report> {
        let outcome = self.pick_up(&mut claims, |_| true, call, Pool::open(&self.heap), &mut report);
        report.seconds_total = clock::seconds_since(call.began);
        if let Err(error) = outcome {
            // With a progress, what was held lazily counted as ready: it may have been written to.
            self.abandon_resume(batch, claims, &error, call.progress.is_none());
            return Err(error);
        }
        self.commit_resume(batch, claims, &report);
        Ok(report)
    }

    fn commit_resume(&self, batch: Batch, mut claims: Vec<Claim>, report: &Report) {
        batch.note_success(report, Phase::Resident);
        forget_backups(&mut claims, |region, segment| batch.retains(region) || segment.is_borrowed());
        self.end(batch, claims, |_| Phase::Resident);
        self.host.relax();
    }

    /// After a resume that failed and was rolled back. `untouched`: nobody can have used what was held lazily, which stays so then.
    fn abandon_resume(&self, batch: Batch, mut claims: Vec<Claim>, error: &Error, untouched: bool) {
        batch.note_error(error);
        self.veil(&batch, &mut claims);
        let left = batch.left(&claims, |region| untouched && region.was_lazy());
        self.end_with(batch, claims, |_| Phase::Paused, &left);
    }

    /// Drops the retained backups of what is resident.
    pub(crate) fn drop_retained(&self) {
        self.heap.registry.extents(|_| true).iter().for_each(|extent| self.drop_backups(extent));
    }

    /// Drops the retained backups of an extent that is resident and that nobody is working on.
    pub(crate) fn drop_backups(&self, extent: &Arc<Extent>) {
        // Asked of a claimed extent: no pause can have ended with it meanwhile. A paused region may hold what is on the device lazily.
        let is_paused = |id: RegionId| self.regions.get(id).is_ok_and(|region| region.state() == State::Paused);
        if let Some(claim) = extent.claim() {
            let mut claims = [claim];
            forget_backups(&mut claims, |region, _| is_paused(region));
            claims.into_iter().for_each(|claim| self.heap.put_back(claim));
        }
    }

    /// Puts all claims back and opens the regions in the phase that `phase` makes of the one before.
    fn end(&self, batch: Batch, claims: Vec<Claim>, phase: impl Fn(Phase) -> Phase) {
        let left = batch.left(&claims, |_| false);
        self.end_with(batch, claims, phase, &left);
    }

    fn end_with(
        &self,
        batch: Batch,
        claims: Vec<Claim>,
        phase: impl Fn(Phase) -> Phase,
        left: &BTreeMap<RegionId, Left>,
    ) {
        for claim in claims {
            self.heap.put_back(claim);
        }
        batch.open(phase, left);
        self.tiers.shared.settle();
        self.host.drop_buffers();
    }
}

/// Drops backups of what is on the device, except where they are retained.
fn forget_backups(claims: &mut [Claim], retains: impl Fn(RegionId, &Segment) -> bool) {
    for claim in claims {
        let region = claim.extent.region;
        let resident = claim.chunks.iter_mut().filter(|chunk| chunk.truth == Truth::Device);
        resident.for_each(|chunk| chunk.segments.retain(|segment| retains(region, segment)));
    }
}

/// Drops backups of what is on the device, except for what is known to be the same in regions that `cleans` says.
fn forget_unproven(claims: &mut [Claim], cleans: impl Fn(RegionId) -> bool) {
    for claim in claims {
        let clean = cleans(claim.extent.region);
        let resident = claim.chunks.iter_mut().filter(|chunk| chunk.truth == Truth::Device);
        resident.for_each(|chunk| chunk.segments.retain(|segment| clean && segment.filled));
    }
}

/// The devices of the claims.
fn devices(claims: &[Claim]) -> BTreeSet<Device> {
    claims.iter().map(|claim| claim.extent.device).collect()
}

/// The claims of each device.
fn by_device<'a>(claims: impl Iterator<Item = &'a mut Claim>) -> BTreeMap<Device, Vec<&'a mut Claim>> {
    let mut groups: BTreeMap<Device, Vec<&mut Claim>> = BTreeMap::new();
    claims.for_each(|claim| groups.entry(claim.extent.device).or_default().push(claim));
    groups
}
