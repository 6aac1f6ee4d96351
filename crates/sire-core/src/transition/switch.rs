//! The switch: one set of regions is put down while another is picked up, as one transaction. The two passes are those of a pause and of a
//! resume; what is new here is that they run side by side, each on its own lane, over one [`pool`](super::pool), and what
//! happens when one of them fails: the other stops, what was picked up is put back, and what was put down is picked up again, out of
//! the very memory that had changed hands.
//!
//! Nothing counts as paused or resident before both passes have ended. So there are three outcomes: both regions have
//! changed state, neither has, or (if the undo cannot get its memory back) both are paused.

use super::batch::Batch;
use super::pick_up::{self, commit, is_claim_away, missing, roll_back};
use super::pieces::At;
use super::pool::Pool;
use super::put_down::put_down;
use super::seam::Staging;
use super::team::{Call, Failure, Team};
use super::{Machine, devices};
use crate::clock;
use crate::driver::Device;
use crate::error::{Error, Result, Status};
use crate::extent::Claim;
use crate::region::{Phase, Region};
use crate::sync::{Runs, beside};
use crate::terms::{Report, SwitchOptions};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// One side of a switch.
struct Side {
    batch: Batch,
    claims: Vec<Claim>,
    report: Report,
}

impl Machine {
    /// Pauses the regions `pause` and resumes the regions `resume`: both, or neither.
    pub(crate) fn switch(
        &self,
        pause: Vec<Arc<Region>>,
        resume: Vec<Arc<Region>>,
        options: SwitchOptions<'_>,
    ) -> Result<(Report, Report)> {
        refuse_overlap(&pause, &resume)?;
        let call = Call::new(self, Duration::ZERO);
        // Asked first, so that a call that is refused closes nothing.
        resume.iter().try_for_each(|region| region.check(Phase::Resident))?;
        let leaving = Batch::close(pause.clone(), Phase::Paused)?;
        let lazy: Vec<Arc<Region>> = pause.into_iter().filter(|region| leaving.region(region.id).is_none()).collect();
        let coming = Batch::close(resume, Phase::Resident)?;
        // Of what is paused already, memory that is held lazily goes now. What the driver refuses will be missed soon enough.
        let mut released = Report::default();
        let _ = self.release_now(&lazy, &mut released);
        if leaving.is_empty() {
            let mut report = leaving.report();
            report.add(&released);
            return Ok((report, self.resume_batch(coming, &call)?));
        }
        if coming.is_empty() {
            return Ok((self.pause_batch(leaving, options.dead, &call)?, coming.report()));
        }
        let mut report = leaving.report();
        let claims = self.claim_live(&leaving, options.dead, &mut report)?;
        let leaving = Side { batch: leaving, claims, report };
        let (mut report, mut claims) = (coming.report(), coming.claim(&self.heap));
        coming.count(&mut claims, &mut report);
        self.switch_sides(leaving, Side { batch: coming, claims, report }, &call)
    }

    fn switch_sides(&self, mut leaving: Side, mut coming: Side, call: &Call) -> Result<(Report, Report)> {
        let prepared = self.prepare_switch(&mut leaving, &mut coming, call);
        let (staging, new, pool) = match prepared {
            Ok(prepared) => prepared,
            Err(error) => return Err(self.undo_switch(leaving, coming, error.into(), &Pool::open(&self.heap))),
        };
        let start = clock::now();
        let outcome = self.exchange(&mut leaving, &mut coming, staging, call, &pool);
        for report in [&mut leaving.report, &mut coming.report] {
            report.seconds_transfer = clock::seconds_since(start);
            report.seconds_total = clock::seconds_since(call.began);
        }
        if let Err(failure) = outcome {
            return Err(self.undo_switch(leaving, coming, failure, &pool));
        }
        pool.release_spare();
        self.share(&mut leaving.claims, &new, &mut leaving.report);
        commit(&mut coming.claims.iter_mut().collect::<Vec<_>>());
        self.commit_pause(leaving.batch, leaving.claims, &leaving.report);
        self.commit_resume(coming.batch, coming.claims, &coming.report);
        Ok((leaving.report, coming.report))
    }

    /// Everything before the first copy: room for every byte that leaves, memory for every byte that comes, idle devices.
    fn prepare_switch(
        &self,
        leaving: &mut Side,
        coming: &mut Side,
        call: &Call,
    ) -> Result<(Staging, Vec<At>, Pool<'_>)> {
        self.lift(coming.claims.iter_mut())?;
        let fits = || self.check_fit(&leaving.claims, &coming.claims);
        fits().or_else(|_| {
            self.heap.reclaim();
            self.release_for(&missing(&coming.claims));
            fits()
        })?;
        let (staging, new) = self.prepare_pause(&mut leaving.batch, &mut leaving.claims, call, &mut leaving.report)?;
        let credit = devices(&coming.claims).into_iter().map(|device| (device, self.credit(device))).collect();
        Ok((staging, new, Pool::limited(&self.heap, coming.claims.iter(), credit)))
    }

    /// Refuses what cannot come to a good end: more bytes than are free now and will be given back.
    fn check_fit(&self, leaving: &[Claim], coming: &[Claim]) -> Result<()> {
        let mut freed: BTreeMap<Device, u64> = BTreeMap::new();
        for claim in leaving {
            *freed.entry(claim.extent.device).or_default() += claim.physical_bytes();
        }
        for (device, bytes) in missing(coming) {
            // A driver that does not say counts as having room: the attempt will show.
            let Ok(info) = self.heap.driver.memory_info(device) else { continue };
            let given = freed.get(&device).copied().unwrap_or(0);
            if info.free.saturating_add(given) < bytes.saturating_add(self.settings.margin()) {
                let doing = format!("switch: {given} bytes would be given back, which is not enough");
                return Err(self.heap.short_of(device, bytes, &doing));
            }
        }
        Ok(())
    }

    /// Bytes that can be made on `device` before anything was given back. A driver that does not say makes the switch wait for what is given.
    fn credit(&self, device: Device) -> u64 {
        let free = self.heap.driver.memory_info(device).map_or(0, |info| info.free);
        free.saturating_sub(self.settings.margin())
    }

    /// Both passes, side by side.
    fn exchange(
        &self,
        leaving: &mut Side,
        coming: &mut Side,
        staging: Staging,
        call: &Call,
        pool: &Pool<'_>,
    ) -> std::result::Result<(), Failure> {
        let team = Team::new(self, call, pool);
        // From now on, so that whoever gives waits for it even if it begins late; but not in turn, where it begins afterwards.
        let taker = pool.taker();
        let out = |runs| {
            let _giver = pool.giver();
            if runs == Runs::InTurn {
                pool.nobody_takes();
            }
            put_down(&team, &mut leaving.claims, staging, &mut leaving.report);
        };
        let mut claims: Vec<&mut Claim> =
            coming.claims.iter_mut().filter(|claim| is_claim_away(claim, |_| true)).collect();
        beside(out, || {
            let _taker = taker;
            pick_up::pick_up(&team, &mut claims, &mut coming.report);
        });
        team.outcome()
    }

    /// Undoes both sides; see the module's text. Returns what to tell.
    fn undo_switch(&self, leaving: Side, mut coming: Side, failure: Failure, pool: &Pool<'_>) -> Error {
        let recycled = Pool::recycling(&self.heap, leaving.claims.iter());
        pool.pour_into(&recycled);
        if failure.drained {
            roll_back(&mut coming.claims.iter_mut().collect::<Vec<_>>(), &recycled);
        }
        let error = self.undo_pause(leaving.batch, leaving.claims, failure.error, recycled);
        self.abandon_resume(coming.batch, coming.claims, &error, true);
        error
    }
}

fn refuse_overlap(pause: &[Arc<Region>], resume: &[Arc<Region>]) -> Result<()> {
    match pause.iter().find(|region| resume.iter().any(|other| other.id == region.id)) {
        None => Ok(()),
        Some(region) => {
            let message = format!("cannot switch: region '{}' is to be paused and to be resumed", region.tag);
            Err(Error::new(Status::InvalidArgument, message))
        }
    }
}
