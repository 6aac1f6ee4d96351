//! The maker: makes, maps and opens memory ahead of the copies that will fill it. It changes no chunk itself: what became of each goes, in order, to
//! whoever copies, and is noted there. It does so on a thread of its own, unless all copies together are over soon: then whoever copies asks for one run
//! after the other, and copies that are under way go on meanwhile. To start a thread, and to wake another one for each run, would take longer.
//!
//! Access is set for runs of chunks that lie side by side, because one call for many costs what one for a single chunk does. Not for all of them in one
//! call, because no copy into a run begins before the last of its chunks is made: the first run is one chunk, and each next one is twice as long, while the
//! copies into those before it are under way. Where memory is made more slowly than it is filled (the small pieces of PyTorch's segments), a last run of
//! half of everything would leave half of the copies to the end: hence a longest run.

use super::pieces::At;
use super::pool::{Kind, Supply};
use super::team::{Team, stopped};
use crate::driver::{Addr, Physical, Properties};
use crate::error::Result;
use crate::extent::{Claim, Extent};
use crate::sync::mpsc::{Receiver, Sender};
use std::collections::VecDeque;
use std::sync::Arc;

/// The longest run of chunks that get access in one call.
const LONGEST_RUN: usize = 64;

/// A chunk that is to have memory; what it has already is left over from an earlier call.
#[derive(Clone, Debug)]
pub(super) struct Job {
    pub(super) at: At,
    extent: Arc<Extent>,
    offset: u64,
    size: u64,
    properties: Option<Properties>,
    physical: Option<Physical>,
    mapped: bool,
}

impl Job {
    pub(super) fn new(claims: &[&mut Claim], at: At) -> Job {
        let claim = &claims[at.0];
        let chunk = &claim.chunks[at.1];
        let (offset, size, physical, mapped) = (chunk.offset, chunk.size, chunk.physical, chunk.mapped);
        Job { at, extent: Arc::clone(&claim.extent), offset, size, properties: chunk.properties, physical, mapped }
    }

    fn kind(&self) -> Kind {
        Kind { device: self.extent.device, size: self.size, properties: self.properties }
    }

    fn start(&self) -> u64 {
        self.extent.base.0 + self.offset
    }

    /// Whether one call can give access to both.
    fn is_joined_to(&self, next: &Job) -> bool {
        let alike = Arc::ptr_eq(&self.extent, &next.extent) || self.extent.opens_like(&next.extent);
        alike && self.start() + self.size == next.start()
    }
}

/// What became of a chunk.
#[derive(Clone, Copy, Debug)]
pub(super) struct Made {
    pub(super) at: At,
    pub(super) physical: Option<Physical>,
    pub(super) mapped: bool,
    /// Copies may begin. If not, the extent was freed, or the maker gave up here.
    pub(super) ready: bool,
    /// Bytes taken from the driver, and from a chunk that needs them no more.
    pub(super) created: u64,
    pub(super) recycled: u64,
}

/// Makes memory for jobs, one run after the other.
pub(super) struct Maker<'a> {
    team: &'a Team<'a>,
    left: &'a [Job],
    longest: usize,
}

impl<'a> Maker<'a> {
    pub(super) fn new(team: &'a Team<'a>, jobs: &'a [Job]) -> Maker<'a> {
        Maker { team, left: jobs, longest: 1 }
    }

    /// Makes memory for every job, until the team stops.
    pub(super) fn make_all(mut self, sender: &Sender<Made>) {
        while let Some(run) = self.make_next() {
            // Whoever copies still takes what is in the channel after a failure.
            for made in run {
                let _ = sender.send(made);
            }
        }
    }

    /// Makes the next run; `None` if there is none any more. A failure is the team's, and the end.
    pub(super) fn make_next(&mut self) -> Option<Vec<Made>> {
        if self.left.is_empty() {
            return None;
        }
        let mut made = Vec::new();
        let outcome = make_run(self.team, &self.left[..run_length(self.left, self.longest)], &mut made);
        self.left = &self.left[made.len()..];
        self.longest = (2 * self.longest).min(LONGEST_RUN);
        if let (Ok(_), Some(progress)) = (&outcome, self.team.call.progress) {
            progress.made(made.len());
        }
        let open = *outcome.as_ref().unwrap_or(&0);
        made.iter_mut().take(open).for_each(|one| one.ready = true);
        if let Err(error) = outcome {
            self.left = &[];
            self.team.fail(error);
        }
        Some(made)
    }
}

/// What was made, in order: by the maker itself when it is asked for, or by its thread.
pub(super) enum Arrivals<'a> {
    InTurn(Maker<'a>, VecDeque<Made>),
    Ahead(Receiver<Made>),
}

impl Arrivals<'_> {
    /// The next; `None` after a failure, which was told.
    pub(super) fn next(&mut self) -> Option<Made> {
        match self {
            Arrivals::InTurn(maker, waiting) => {
                if waiting.is_empty() {
                    waiting.extend(maker.make_next()?);
                }
                waiting.pop_front()
            }
            Arrivals::Ahead(receiver) => receiver.recv().ok(),
        }
    }

    /// What was made and not asked for.
    pub(super) fn rest(self) -> Vec<Made> {
        match self {
            Arrivals::InTurn(_, waiting) => waiting.into(),
            Arrivals::Ahead(receiver) => receiver.iter().collect(),
        }
    }
}

/// How many of the jobs lie side by side.
fn run_length(jobs: &[Job], longest: usize) -> usize {
    1 + jobs.windows(2).take(longest - 1).take_while(|pair| pair[0].is_joined_to(&pair[1])).count()
}

/// Makes as much of a run as there is memory for now, at least one chunk, and opens it. Returns how many are open: the last one
/// is not if it was freed meanwhile, and what is mapped of it, by this call or an earlier one, nobody may touch.
fn make_run(team: &Team<'_>, run: &[Job], made: &mut Vec<Made>) -> Result<usize> {
    for job in run {
        if !made.is_empty() && team.pool.would_wait(job.kind()) {
            break;
        }
        let Job { at, physical, mapped, .. } = *job;
        made.push(Made { at, physical, mapped, ready: false, created: 0, recycled: 0 });
        team.check()?;
        if job.extent.is_freed() {
            if job.physical.is_none() {
                team.pool.skip(job.kind());
            }
            // Those before it may be of other extents, and stay.
            open(team, &run[..made.len() - 1])?;
            return Ok(made.len() - 1);
        }
        let Some(one) = made.last_mut() else { continue };
        supply(team, job, one)?;
        map(team, job, one)?;
    }
    open(team, &run[..made.len()])?;
    Ok(made.len())
}

fn supply(team: &Team<'_>, job: &Job, made: &mut Made) -> Result<()> {
    if made.physical.is_some() {
        return Ok(());
    }
    match team.pool.take(job.kind()).ok_or_else(stopped)? {
        Supply::Recycled(physical) => {
            (made.physical, made.recycled) = (Some(physical), job.size);
        }
        Supply::Driver => {
            let heap = &team.machine.heap;
            // An undo takes back what the region had before, so the margin does not concern it.
            let new = if team.call.is_undo() {
                heap.make(job.extent.device, job.size, job.properties)?
            } else {
                heap.create(job.extent.device, job.size, job.properties)?
            };
            (made.physical, made.created) = (Some(new), job.size);
        }
    }
    Ok(())
}

fn map(team: &Team<'_>, job: &Job, made: &mut Made) -> Result<()> {
    if let (false, Some(physical)) = (made.mapped, made.physical) {
        team.machine.heap.driver.map(job.extent.base.offset(job.offset), job.size, physical)?;
        made.mapped = true;
    }
    Ok(())
}

fn open(team: &Team<'_>, run: &[Job]) -> Result<()> {
    let heap = &team.machine.heap;
    let open = |part: &[Job]| {
        let Some(first) = part.first() else { return Ok(()) };
        heap.open(&first.extent, Addr(first.start()), part.iter().map(|job| job.size).sum())
    };
    // The driver's manual does not say whether one call may span several reservations, which can lie side by side.
    open(run).or_else(|joint| if run.len() == 1 { Err(joint) } else { run.chunks(1).try_for_each(open) })
}
