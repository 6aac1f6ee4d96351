//! What a pause finds out about content before it decides what to copy. A survey lists, for one claim, the *pieces* that are to be
//! saved: what lies between two multiples of the page length, cut at the ends of what is to be saved and of what the old segments
//! hold. Looking at the device then says of each piece what it is: hashed by the driver, or copied to a buffer and compared.
//!
//! Who is looked at: `Verified` content always; what is new in `Declared` content once, because it is copied anyway and a hash is cheap beside
//! that; `Paranoid` content is compared. Content of which nothing is promised is copied unseen.

use super::plan;
use super::team::Call;
use super::{Machine, batch::Batch, devices};
use crate::digest::Digest;
use crate::driver::{Addr, Device, DriverErrorKind};
use crate::error::{Error, Result, Status};
use crate::extent::{Chunk, Claim, Truth};
use crate::ranges::Ranges;
use crate::raw::{self, Span};
use crate::region::{Phase, Region};
use crate::settings::IN_FLIGHT;
use crate::terms::{Clean, Report};
use crate::tier::host::HostRange;
use crate::tier::{Segment, page_cuts};
use crate::transfer::Pipe;
use std::ops::Range;
use std::sync::Arc;

/// Pages that are hashed by one call: few enough for nothing to wait long behind it, enough to keep a GPU busy (16 blocks each).
const RUN: usize = 64;

/// What each chunk of a claim is to save; nothing where its bytes are not on the device.
pub(super) type Wanted = Vec<Ranges>;

/// What is known about a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fact {
    /// Nothing.
    Unknown,
    /// Its old segment holds the same bytes.
    Same,
    /// What the driver says about its bytes.
    Hashed(Digest),
}

/// Some bytes that are to be saved, what an earlier pause saved of them, and what is known.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) range: Range<u64>,
    pub(super) old: Option<Segment>,
    pub(super) fact: Fact,
}

/// One claim's survey.
#[derive(Debug)]
pub(super) struct Survey {
    /// Which claim.
    pub(super) index: usize,
    pub(super) region: Arc<Region>,
    pub(super) wanted: Wanted,
    /// Offsets that are known to have changed.
    pub(super) changed: Ranges,
    /// By chunk; `None` where nothing is to be found out and the segments stay as they are.
    pub(super) chunks: Vec<Option<Vec<Piece>>>,
}

/// Which piece: of which survey, of which chunk.
type At = (usize, usize, usize);

impl Survey {
    pub(super) fn new(index: usize, region: &Arc<Region>, claim: &Claim, changed: Ranges, page: u64) -> Survey {
        Survey::keeping(region.keeps(), index, region, claim, changed, page)
    }

    /// As [`Survey::new`]; `keep`: whether what nothing is said about is saved.
    fn keeping(keep: bool, index: usize, region: &Arc<Region>, claim: &Claim, changed: Ranges, page: u64) -> Survey {
        let wanted = want(region, keep, claim);
        let declared = match region.judged() {
            Clean::No => None,
            Clean::Declared => Some(true),
            Clean::Verified | Clean::Paranoid => Some(false),
        };
        let each = claim.chunks.iter().zip(&wanted).map(|(chunk, ranges)| {
            let declared = declared.filter(|_| chunk.truth == Truth::Device)?;
            let touched = changed.clip(&chunk.range()).total() > 0;
            if declared && !touched && chunk.is_saved() && has_shape(chunk, ranges) {
                return None;
            }
            let mut pieces: Vec<Piece> = ranges.iter().flat_map(|range| pieces(chunk, range, page)).collect();
            for piece in &mut pieces {
                // What is in a file was proven just now.
                let filled = piece.old.as_ref().is_some_and(|old| old.filled && (declared || old.is_borrowed()));
                if filled && changed.clip(&piece.range).total() == 0 {
                    piece.fact = Fact::Same;
                }
            }
            Some(pieces)
        });
        let chunks = each.collect();
        Survey { index, region: Arc::clone(region), wanted, changed, chunks }
    }

    fn pieces(&self) -> impl Iterator<Item = ((usize, usize), &Piece)> {
        let chunks = self.chunks.iter().enumerate().filter_map(|(i, pieces)| Some((i, pieces.as_ref()?)));
        chunks.flat_map(|(i, pieces)| pieces.iter().enumerate().map(move |(j, piece)| ((i, j), piece)))
    }

    pub(super) fn is_hashed(&self) -> bool {
        matches!(self.region.judged(), Clean::Declared | Clean::Verified)
    }

    fn is_compared(&self) -> bool {
        matches!(self.region.judged(), Clean::Verified | Clean::Paranoid)
    }
}

fn want(region: &Region, keep: bool, claim: &Claim) -> Wanted {
    let mut save = claim.extent.ranges_to_save(keep, plan::slot_gap(region));
    claim.dead.iter().for_each(|dead| save.remove(dead));
    let on_device = |chunk: &Chunk| chunk.truth == Truth::Device;
    let part = |chunk: &Chunk| if on_device(chunk) { save.clip(&chunk.range()) } else { Ranges::new() };
    claim.chunks.iter().map(part).collect()
}

/// Whether the chunk's segments cover exactly `ranges`, one each, or in neighbours.
fn has_shape(chunk: &Chunk, ranges: &Ranges) -> bool {
    let mut covered = Ranges::new();
    chunk.segments.iter().for_each(|segment| covered.add(segment.range()));
    covered == *ranges
}

/// The pieces of `range`, with what old segments hold of them.
fn pieces(chunk: &Chunk, range: &Range<u64>, page: u64) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let next = chunk.segments.partition_point(|segment| segment.end() <= at);
        let old = chunk.segments.get(next);
        let covering = old.filter(|old| old.offset <= at);
        let limit = match (covering, old) {
            (Some(covering), _) => covering.end(),
            (None, Some(later)) => later.offset,
            (None, None) => range.end,
        };
        for piece in page_cuts(&(at..limit.min(range.end)), page) {
            let old = covering.and_then(|old| old.part(&piece, page));
            pieces.push(Piece { range: piece, old, fact: Fact::Unknown });
        }
        at = limit.min(range.end);
    }
    pieces
}

/// Neighbouring pieces that one call hashes.
struct Run {
    src: Addr,
    len: u64,
    pieces: Vec<At>,
}

impl Machine {
    /// Lists what is to be saved.
    pub(super) fn survey(&self, batch: &Batch, claims: &[Claim]) -> Vec<Survey> {
        let each = claims.iter().enumerate().filter_map(|(index, claim)| {
            let region = batch.region(claim.extent.region)?;
            let (keep, changed) = (batch.keeps_all() || region.keeps(), claim.extent.take_changed());
            if batch.was(region.id) == Some(Phase::Paused) {
                // Nobody has written there since the first pause: what was noted late is for the one after the resume.
                claim.extent.note_changed(&changed);
            }
            Some(Survey::keeping(keep, index, region, claim, changed, self.settings.page()))
        });
        each.collect()
    }

    /// Finds out what the surveys ask for. Nothing may use the devices' memory of the claims meanwhile.
    pub(super) fn look(
        &self,
        claims: &[Claim],
        surveys: &mut [Survey],
        call: &Call,
        report: &mut Report,
    ) -> Result<()> {
        for device in devices(claims) {
            let mut looker = Looker { machine: self, claims, surveys, device, call, report };
            looker.hash()?;
            looker.compare()?;
        }
        Ok(())
    }

    /// Buffers of `len` bytes, each in memory that drivers know as a whole.
    pub(super) fn looking_buffers(&self, len: u64) -> Result<Vec<Span>> {
        let ranges = self.host.reserve(&[2 * len; IN_FLIGHT], None)?;
        let short = || Error::new(Status::Internal, "the host arena gave less room than was asked for");
        let buffer = |range: &Arc<HostRange>| range.span(0, 2 * len)?.between_seams(len);
        let buffers = ranges.iter().map(|range| buffer(range).ok_or_else(short)).collect::<Result<Vec<Span>>>()?;
        buffers.iter().try_for_each(Span::bring_in)?;
        Ok(buffers)
    }
}

/// Whether anything is to be looked at.
pub(super) fn is_needed(surveys: &[Survey]) -> bool {
    let open = |survey: &Survey| survey.pieces().any(|(_, piece)| piece.fact == Fact::Unknown);
    surveys.iter().any(|survey| (survey.is_hashed() || survey.is_compared()) && open(survey))
}

/// Looks at one device.
struct Looker<'a> {
    machine: &'a Machine,
    claims: &'a [Claim],
    surveys: &'a mut [Survey],
    device: Device,
    call: &'a Call<'a>,
    report: &'a mut Report,
}

impl Looker<'_> {
    /// Pieces on the device of which nothing is known.
    fn unknown(&self, of: impl Fn(&Survey) -> bool) -> Vec<(At, Addr)> {
        let mut found = Vec::new();
        for (index, survey) in self.surveys.iter().enumerate().filter(|(_, survey)| of(survey)) {
            let extent = &self.claims[survey.index].extent;
            if extent.device == self.device {
                let open = survey.pieces().filter(|(_, piece)| piece.fact == Fact::Unknown);
                found.extend(open.map(|((i, j), piece)| ((index, i, j), extent.base.offset(piece.range.start))));
            }
        }
        found
    }

    fn piece(&mut self, (survey, chunk, piece): At) -> Option<&mut Piece> {
        self.surveys[survey].chunks[chunk].as_mut()?.get_mut(piece)
    }

    fn len(&mut self, at: At) -> u64 {
        self.piece(at).map_or(0, |piece| piece.range.end - piece.range.start)
    }

    /// Has the driver hash; where it cannot, nothing is known afterwards.
    fn hash(&mut self) -> Result<()> {
        let page = self.machine.settings.page();
        let mut runs: Vec<Run> = Vec::new();
        for (at, src) in self.unknown(Survey::is_hashed) {
            let len = self.len(at);
            match runs.last_mut() {
                Some(run) if run.takes(at, src, page) => run.add(at, len),
                _ if src.0.is_multiple_of(16) => runs.push(Run { src, len, pieces: vec![at] }),
                _ => {}
            }
        }
        if runs.is_empty() {
            return Ok(());
        }
        let machine = self.machine;
        let buffers = machine.looking_buffers((RUN * size_of::<Digest>()) as u64)?;
        let mut pipe = Pipe::new(&*machine.heap.driver, machine.lanes.take(self.device)?);
        let sent = self.hash_runs(&mut pipe, runs, &buffers);
        let drained = pipe.drain(&machine.lanes);
        sent?;
        Ok(drained?)
    }

    fn hash_runs(&mut self, pipe: &mut Pipe<'_, Run>, runs: Vec<Run>, buffers: &[Span]) -> Result<()> {
        let page = self.machine.settings.page();
        for run in runs {
            self.call.check_cancelled(self.machine)?;
            if pipe.is_full() {
                self.land_digests(pipe)?;
            }
            let len = (run.pieces.len() * size_of::<Digest>()) as u64;
            let buffer = buffers[pipe.next_place()].part(0, len);
            let buffer =
                buffer.ok_or_else(|| Error::new(Status::Internal, "a run has more pages than digests have room"))?;
            match pipe.send_hash((run.src, run.len), page, buffer, run) {
                Err(error) if error.kind == DriverErrorKind::Unsupported => return Ok(()),
                sent => sent?,
            }
        }
        while self.land_digests(pipe)? {}
        Ok(())
    }

    fn land_digests(&mut self, pipe: &mut Pipe<'_, Run>) -> Result<bool> {
        let Some((run, span)) = pipe.land()? else { return Ok(false) };
        let digests = span.as_ref().map(raw::digests).unwrap_or_default();
        self.report.bytes_hashed += run.len;
        for (at, digest) in run.pieces.into_iter().zip(digests) {
            if let Some(piece) = self.piece(at) {
                piece.fact = Fact::Hashed(digest);
            }
        }
        Ok(true)
    }

    /// Compares, byte by byte, what has an old segment in host memory.
    fn compare(&mut self) -> Result<()> {
        let unknown = self.unknown(Survey::is_compared);
        let mut wanted = Vec::new();
        for (at, src) in unknown {
            let old = self.piece(at).and_then(|piece| piece.old.as_ref());
            if old.is_some_and(|old| old.filled && !old.is_stored()) {
                wanted.push((at, src));
            }
        }
        if wanted.is_empty() {
            return Ok(());
        }
        let machine = self.machine;
        let buffers = machine.looking_buffers(machine.settings.page())?;
        let mut pipe = Pipe::new(&*machine.heap.driver, machine.lanes.take(self.device)?);
        let sent = self.compare_all(&mut pipe, &wanted, &buffers);
        let drained = pipe.drain(&machine.lanes);
        sent?;
        Ok(drained?)
    }

    fn compare_all(&mut self, pipe: &mut Pipe<'_, At>, wanted: &[(At, Addr)], buffers: &[Span]) -> Result<()> {
        for &(at, src) in wanted {
            self.call.check_cancelled(self.machine)?;
            if pipe.is_full() {
                self.land_compared(pipe)?;
            }
            let len = self.len(at);
            let buffer = buffers[pipe.next_place()].part(0, len);
            let buffer = buffer.ok_or_else(|| Error::new(Status::Internal, "a piece is longer than a page"))?;
            pipe.send_out(src, buffer, at)?;
        }
        while self.land_compared(pipe)? {}
        Ok(())
    }

    fn land_compared(&mut self, pipe: &mut Pipe<'_, At>) -> Result<bool> {
        let Some((at, span)) = pipe.land()? else { return Ok(false) };
        self.report.bytes_hashed += self.len(at);
        if let (Some(span), Some(piece)) = (span, self.piece(at))
            && piece.old.as_ref().is_some_and(|old| old.holds(&span))
        {
            piece.fact = Fact::Same;
        }
        Ok(true)
    }
}

impl Run {
    /// Whether the piece at `src` can be hashed with the others: right behind them, all of which are whole pages.
    fn takes(&self, at: At, src: Addr, page: u64) -> bool {
        let same = self.pieces.last().is_some_and(|last| last.0 == at.0);
        let whole = self.len == page * self.pieces.len() as u64;
        same && whole && self.pieces.len() < RUN && self.src.offset(self.len) == src
    }

    fn add(&mut self, at: At, len: u64) {
        self.pieces.push(at);
        self.len += len;
    }
}
