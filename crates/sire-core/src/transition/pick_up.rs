//! The pass that gives chunks their memory back. While backups are copied in, memory is made and mapped ahead of them
//! ([`maker`](super::maker)); all devices work at the same time. Only when everything has arrived do the chunks count as being on
//! the device. Until then every backup stays, so that any failure is answered by releasing what is new.

use super::background::Order;
use super::maker::{Arrivals, Job, Made, Maker};
use super::pieces::{At, Piece, Pieces, chunks};
use super::pool::Pool;
use super::seam::{Source, Staging};
use super::stride::Stride;
use super::team::{Call, Failure, Team, stopped};
use super::{Machine, background, by_device};
use crate::clock;
use crate::driver::{Device, Event};
use crate::error::{Error, Result, Status};
use crate::extent::{Chunk, Claim, Truth};
use crate::heap::{doing, is_shortage};
use crate::ranges::Ranges;
use crate::sync::{Mutex, at_once, beside, lock, mpsc};
use crate::terms::{RegionId, Report};
use crate::tier::Segment;
use crate::transfer::Pipe;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

/// So many copy pieces are on the device before memory that a thread has made ahead of them could make up for starting it.
const SOON: u64 = 16;

/// The first and the longest sleep while waiting for memory.
const SLEEP: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(50));

impl Machine {
    /// Brings every chunk of the `wanted` regions whose bytes are in a backup back to the device: all of them, or none. Memory comes
    /// from `pool`, as far as it has any.
    pub(super) fn pick_up<'a>(
        &'a self,
        claims: &mut [Claim],
        wanted: impl Fn(RegionId) -> bool,
        call: &Call,
        pool: Pool<'a>,
        report: &mut Report,
    ) -> Result<()> {
        let mut claims: Vec<&mut Claim> = claims.iter_mut().filter(|claim| is_claim_away(claim, &wanted)).collect();
        if claims.is_empty() {
            pool.release_spare();
            return Ok(());
        }
        self.lift(claims.iter_mut().map(|claim| &mut **claim))?;
        report.seconds_prepare = clock::seconds_since(call.began);
        let start = clock::now();
        let outcome = self.bring_in(&mut claims, call, pool, report);
        report.seconds_transfer = clock::seconds_since(start);
        outcome.map(|()| commit(&mut claims))
    }

    /// Brings everything in, or holds no memory: a call that waits must not keep from others what they wait for. If there is
    /// not enough, what is only cached is given back; then the call's patience is used up.
    fn bring_in<'a>(
        &'a self,
        claims: &mut [&mut Claim],
        call: &Call,
        mut pool: Pool<'a>,
        report: &mut Report,
    ) -> Result<()> {
        let mut sleep = SLEEP.0;
        let mut reclaimed = false;
        loop {
            let mut attempt = Report::default();
            let team = Team::new(self, call, &pool);
            if let Some(progress) = call.progress {
                progress.begin(chunks(claims, is_away).len());
            }
            pick_up(&team, claims, &mut attempt);
            let outcome = team.outcome();
            pool.release_spare();
            let Err(Failure { error, drained }) = outcome else {
                report.add(&attempt);
                return Ok(());
            };
            pool = Pool::open(&self.heap);
            if let Some(progress) = call.progress {
                background::keep_what_was_told(claims, progress, drained);
            }
            if drained {
                roll_back(claims, &pool);
            }
            if !drained || !is_shortage(&error) {
                return Err(error);
            }
            if !std::mem::replace(&mut reclaimed, true) {
                self.heap.reclaim();
                self.release_for(&missing(claims.iter().map(|claim| &**claim)));
            } else if call.patience().is_zero() {
                return Err(self.explain(claims, error));
            } else {
                self.await_room(claims, call, &mut sleep)?;
            }
        }
    }

    /// Waits until every device seems to have room for what is missing there, or the call's patience is used up.
    fn await_room(&self, claims: &[&mut Claim], call: &Call, sleep: &mut Duration) -> Result<()> {
        loop {
            call.check_cancelled(self)?;
            let left = call.patience();
            if left.is_zero() {
                return Ok(());
            }
            clock::sleep(left.min(*sleep));
            *sleep = (*sleep * 2).min(SLEEP.1);
            let missing = missing(claims.iter().map(|claim| &**claim));
            let is_room = || missing.iter().all(|(&device, &bytes)| self.has_room(device, bytes));
            if is_room() || self.release_for(&missing) > 0 {
                return Ok(());
            }
        }
    }

    /// A driver that does not say counts as having room: the attempt will show.
    pub(super) fn has_room(&self, device: Device, bytes: u64) -> bool {
        let needed = bytes.saturating_add(self.settings.margin());
        self.heap.driver.memory_info(device).map_or(true, |info| info.free >= needed)
    }

    /// Names the device that is short, what all regions need there, and what it has now that nothing of theirs is on it.
    fn explain(&self, claims: &[&mut Claim], error: Error) -> Error {
        let missing = missing(claims.iter().map(|claim| &**claim));
        let short =
            missing.iter().find(|&(&device, &bytes)| !self.has_room(device, bytes)).or(missing.first_key_value());
        let Some((&device, &bytes)) = short else { return error };
        let there = claims.iter().filter(|claim| claim.extent.device == device);
        let ids: BTreeSet<RegionId> = there.map(|claim| claim.extent.region).collect();
        let Some(Ok(first)) = ids.first().map(|&id| self.regions.get(id)) else { return error };
        let doing = match ids.len() - 1 {
            0 => doing("bring back", &first),
            others => format!("{} and {others} more", doing("bring back", &first)),
        };
        self.heap.short_of(device, bytes, &doing)
    }
}

pub(super) fn is_away(chunk: &Chunk) -> bool {
    chunk.truth == Truth::Backup
}

/// Whether the claim is of a wanted region and has a chunk whose bytes are in a backup.
pub(super) fn is_claim_away(claim: &Claim, wanted: impl Fn(RegionId) -> bool) -> bool {
    claim.chunks.iter().any(is_away) && wanted(claim.extent.region)
}

/// Physical bytes that are still to be made, by device.
pub(super) fn missing<'a>(claims: impl IntoIterator<Item = &'a Claim>) -> BTreeMap<Device, u64> {
    let mut missing = BTreeMap::new();
    for claim in claims.into_iter().filter(|claim| !claim.extent.is_freed()) {
        let away = claim.chunks.iter().filter(|chunk| is_away(chunk) && chunk.physical.is_none());
        *missing.entry(claim.extent.device).or_insert(0) += away.map(|chunk| chunk.size).sum::<u64>();
    }
    missing
}

/// The chunks are on the device. To be called when all of them are.
pub(super) fn commit(claims: &mut [&mut Claim]) {
    let chunks = claims.iter_mut().flat_map(|claim| &mut claim.chunks);
    chunks.for_each(|chunk| chunk.truth = Truth::Device);
}

/// Gives what is new back. What the driver refuses to take stays noted in its chunk; the next call tries again.
pub(super) fn roll_back(claims: &mut [&mut Claim], pool: &Pool<'_>) {
    for claim in claims {
        let (device, base) = (claim.extent.device, claim.extent.base);
        for chunk in claim.chunks.iter_mut().filter(|chunk| is_away(chunk)) {
            let _ = pool.give(device, base, chunk);
        }
    }
}

/// One attempt: fills every chunk of the claims that is away. What came of it is the team's to say; chunks keep what they got.
pub(super) fn pick_up(team: &Team<'_>, claims: &mut [&mut Claim], report: &mut Report) {
    let mut staging = match team.machine.staging(claims.iter().map(|claim| &**claim)) {
        Ok(staging) => staging,
        Err(error) => return team.fail(error),
    };
    let report = Mutex::new(report);
    let parts = by_device(claims.iter_mut().map(|claim| &mut **claim));
    let parts = parts.into_iter().map(|(device, claims)| Part::new(team, device, claims, &mut staging)).collect();
    at_once(parts, |mut part: Part<'_, '_>| {
        team.part(|| part.run());
        lock(&report).add(&part.report);
    });
}

/// The pass over one device.
struct Part<'a, 'c> {
    team: &'a Team<'a>,
    device: Device,
    claims: Vec<&'c mut Claim>,
    /// The chunks to fill, in order.
    away: Vec<At>,
    source: Source,
    stride: Stride<'a>,
    /// How many bytes of a chunk have not landed yet.
    unlanded: BTreeMap<At, u64>,
    /// Chunks without pieces.
    filled: Vec<At>,
    report: Report,
}

impl<'a, 'c> Part<'a, 'c> {
    fn new(team: &'a Team<'a>, device: Device, claims: Vec<&'c mut Claim>, staging: &mut Staging) -> Part<'a, 'c> {
        let away = in_order(&claims, team.call.order);
        let source = Source::new(staging.remove(&device).unwrap_or_default(), &claims, away.iter().copied());
        let (stride, unlanded) = (team.stride(), BTreeMap::new());
        Part { team, device, claims, away, source, stride, unlanded, filled: Vec::new(), report: Report::default() }
    }

    fn run(&mut self) -> std::result::Result<(), Failure> {
        let jobs: Vec<Job> = self.away.iter().map(|&at| Job::new(&self.claims, at)).collect();
        let machine = self.team.machine;
        let mut pipe = Pipe::new(&*machine.heap.driver, machine.lanes.take(self.device)?);
        let maker = Maker::new(self.team, &jobs);
        let sent = if self.is_over_soon() {
            self.fill(&mut pipe, &jobs, Arrivals::InTurn(maker, VecDeque::new()))
        } else {
            let (sender, made) = mpsc::channel();
            let make = |_| {
                let sender = sender;
                maker.make_all(&sender);
            };
            beside(make, || self.fill(&mut pipe, &jobs, Arrivals::Ahead(made)))
        };
        let drained = pipe.drain(&machine.lanes);
        let is_drained = drained.is_ok();
        sent.and(drained.map_err(Error::from)).map_err(|error| Failure { error, drained: is_drained })
    }

    /// Whether everything is copied before a thread could be of use. With a progress, all memory is to be there as soon as can be: before that nothing of
    /// it is ready.
    fn is_over_soon(&self) -> bool {
        let bytes = |at: &At| self.claims[at.0].chunks[at.1].size;
        let is_little = || self.away.iter().map(bytes).sum::<u64>() <= SOON * self.team.machine.settings.copy_piece;
        self.away.len() < 2 || (self.team.call.progress.is_none() && is_little())
    }

    fn addresses(&self, at: At) -> std::ops::Range<u64> {
        addresses(&self.claims, at)
    }

    /// Copies backups in as memory arrives. A failure is the team's at once, so that the maker stops too.
    fn fill(&mut self, pipe: &mut Pipe<'_, Piece>, jobs: &[Job], mut made: Arrivals<'_>) -> Result<()> {
        let filled = jobs.iter().try_for_each(|job| {
            self.team.check()?;
            // The maker ends early only after a failure that it has told.
            let made = made.next().ok_or_else(stopped)?;
            if self.note(made) { self.send_chunk(pipe, job.at) } else { Ok(()) }
        });
        if let Err(error) = &filled {
            self.team.fail(error.clone());
        }
        for rest in made.rest() {
            self.note(rest);
        }
        let landed = filled.and_then(|()| {
            while self.land(pipe)? {}
            pipe.finish()?;
            std::mem::take(&mut self.filled).into_iter().for_each(|at| self.tell(at));
            Ok(())
        });
        landed.inspect_err(|error| self.team.fail(error.clone()))
    }

    /// Notes what a chunk has now; whether copies may begin.
    fn note(&mut self, made: Made) -> bool {
        let chunk = &mut self.claims[made.at.0].chunks[made.at.1];
        (chunk.physical, chunk.mapped) = (made.physical, made.mapped);
        self.report.bytes_moved += made.created;
        self.report.bytes_recycled += made.recycled;
        made.ready
    }

    fn send_chunk(&mut self, pipe: &mut Pipe<'_, Piece>, at: At) -> Result<()> {
        let machine = self.team.machine;
        let claim = &self.claims[at.0];
        // What nobody may touch yet holds nothing that could be undefined.
        if machine.regions.get(claim.extent.region)?.policy.zero_fill && claim.extent.is_open() {
            self.report.bytes_zeroed += zero_gaps(pipe, claim, at.1)?;
        }
        for segment in &claim.chunks[at.1].segments {
            if let Some(byte) = segment.byte() {
                pipe.fill(claim.extent.base.offset(segment.offset), segment.len, byte)?;
                self.report.bytes_constant += segment.len;
            }
        }
        let copied = |segment: &Segment| segment.byte().is_none();
        let mut pieces = Pieces::of(at, &claim.chunks[at.1], &machine.settings, copied);
        if pieces.is_over() {
            // What was filled has no event of its own: it is known to have arrived when everything has.
            self.filled.push(at);
        }
        self.unlanded.insert(at, pieces.left());
        let mut sent = None;
        while let Some(piece) = self.next_piece(pipe, &mut pieces)? {
            sent = Some(self.send_piece(pipe, piece)?);
        }
        if let (Some(event), Some(progress)) = (sent, self.team.call.progress) {
            // It cannot have landed: its last piece was sent just now, and is landed by this thread.
            progress.sent(self.addresses(at), event);
        }
        Ok(())
    }

    /// The next piece, once the pipe has room for it: by then the stride knows who called meanwhile.
    fn next_piece(&mut self, pipe: &mut Pipe<'_, Piece>, pieces: &mut Pieces) -> Result<Option<Piece>> {
        if !pieces.is_over() && pipe.is_full() {
            self.land(pipe)?;
        }
        Ok(pieces.next(&mut self.stride))
    }

    /// The event behind the piece. The pipe must not be full.
    fn send_piece(&mut self, pipe: &mut Pipe<'_, Piece>, piece: Piece) -> Result<Event> {
        loop {
            let claim = &self.claims[piece.at.0];
            let segment = &claim.chunks[piece.at.1].segments[piece.segment];
            if let Some(span) = self.source.bytes(segment, &piece)? {
                let event = pipe.send_in(claim.extent.base.offset(segment.offset + piece.from), span, piece)?;
                self.report.bytes_copied += piece.len;
                return Ok(event);
            }
            if !self.land(pipe)? {
                return Err(Error::new(Status::Internal, "there is no buffer for a piece"));
            }
        }
    }

    /// Waits for the oldest piece. False if nothing was under way.
    fn land(&mut self, pipe: &mut Pipe<'_, Piece>) -> Result<bool> {
        let Some((piece, span)) = pipe.land()? else { return Ok(false) };
        if let Some(span) = span {
            self.source.landed(&self.claims[piece.at.0].chunks[piece.at.1].segments[piece.segment], &span);
        }
        let left = self.unlanded.entry(piece.at).or_insert(piece.len);
        *left -= piece.len;
        if *left == 0 {
            self.unlanded.remove(&piece.at);
            self.tell(piece.at);
        }
        Ok(true)
    }

    /// Tells that a chunk has arrived. Fills of a chunk are queued before its pieces, so they have, too.
    fn tell(&self, at: At) {
        if let Some(progress) = self.team.call.progress {
            progress.landed(self.addresses(at));
        }
    }
}

/// The chunks that are away, in the order in which they are to come back.
fn in_order(claims: &[&mut Claim], order: Option<&Order>) -> Vec<At> {
    let mut chunks = chunks(claims, is_away);
    if let Some(order) = order {
        chunks.sort_by_cached_key(|&at| order.rank(&addresses(claims, at)));
    }
    chunks
}

fn addresses(claims: &[&mut Claim], at: At) -> std::ops::Range<u64> {
    claims[at.0].addresses(&claims[at.0].chunks[at.1])
}

/// Fills what no segment of the chunk covers.
fn zero_gaps(pipe: &mut Pipe<'_, Piece>, claim: &Claim, index: usize) -> Result<u64> {
    let chunk = &claim.chunks[index];
    let mut covered = Ranges::new();
    chunk.segments.iter().for_each(|segment| covered.add(segment.range()));
    let gaps = covered.gaps(&chunk.range());
    for gap in gaps.iter() {
        pipe.fill(claim.extent.base.offset(gap.start), gap.end - gap.start, 0)?;
    }
    Ok(gaps.total())
}
