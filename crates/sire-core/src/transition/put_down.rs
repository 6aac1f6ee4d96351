//! The pass that makes chunks give their memory back. A chunk whose bytes are on the device is first copied to its
//! segments, piece by piece; once its last piece is safe and the next copies are under way it is unmapped and released, while
//! the next chunk is copied. All devices work at the same time. Chunks that are only discarded come last, after those of every device: what
//! fails before them costs them nothing.

use super::pieces::{At, Piece, Pieces, chunks};
use super::pool::Pool;
use super::seam::{Safe, Sink, Staging};
use super::stride::Stride;
use super::team::{Call, Failure, Team};
use super::{Machine, by_device, plan};
use crate::driver::Device;
use crate::error::{Error, Result};
use crate::extent::{Chunk, Claim, Truth};
use crate::sync::{Mutex, at_once, lock};
use crate::terms::Report;
use crate::tier::Promised;
use crate::transfer::Pipe;
use std::collections::BTreeMap;

/// The pass over one device.
struct Part<'a, 'c> {
    team: &'a Team<'a>,
    device: Device,
    claims: Vec<&'c mut Claim>,
    sink: Sink<'a>,
    stride: Stride<'a>,
    /// How many bytes of a chunk are not safe yet.
    unsafe_bytes: BTreeMap<At, u64>,
    promised: &'a Promised,
    /// Chunks whose bytes are safe, and which wait for the lane to be busy, or for the room of all others to be certain.
    safe: Vec<At>,
    report: Report,
}

impl Machine {
    /// Saves and releases every chunk. The devices are synchronised already, and every chunk on the device has its segments.
    pub(super) fn put_down(
        &self,
        claims: &mut [Claim],
        staging: Staging,
        call: &Call,
        report: &mut Report,
    ) -> Result<()> {
        let pool = Pool::open(&self.heap);
        let team = Team::new(self, call, &pool);
        put_down(&team, claims, staging, report);
        team.outcome().map_err(|failure| failure.error)
    }
}

/// As [`Machine::put_down`], for a team.
pub(super) fn put_down(team: &Team<'_>, claims: &mut [Claim], mut staging: Staging, report: &mut Report) {
    let report = Mutex::new(report);
    let on_device = claims.iter().flat_map(|claim| &claim.chunks).filter(|chunk| chunk.truth == Truth::Device);
    let promised = Promised::to(on_device.flat_map(|chunk| &chunk.segments));
    each_device(team, claims, (&mut staging, &promised), &report, |part| part.save());
    // From here on content without a backup goes, which no undo brings back: the last moment to stop.
    if let Err(error) = team.check() {
        return team.fail(error);
    }
    if claims.iter().flat_map(|claim| &claim.chunks).any(is_rest) {
        each_device(team, claims, (&mut staging, &promised), &report, |part| part.release_rest());
    }
}

/// Whether a chunk needs no copy: it has no segments, or is a leftover of an earlier call.
fn is_rest(chunk: &Chunk) -> bool {
    chunk.is_leftover() || (chunk.truth == Truth::Device && chunk.segments.is_empty())
}

fn each_device(
    team: &Team<'_>,
    claims: &mut [Claim],
    (staging, promised): (&mut Staging, &Promised),
    report: &Mutex<&mut Report>,
    work: impl Fn(&mut Part<'_, '_>) -> std::result::Result<(), Failure> + Sync,
) {
    let parts = by_device(claims.iter_mut());
    let part = |(device, claims)| Part {
        team,
        device,
        claims,
        sink: Sink::new(team.machine, staging.remove(&device).unwrap_or_default()),
        stride: team.stride(),
        unsafe_bytes: BTreeMap::new(),
        promised,
        safe: Vec::new(),
        report: Report::default(),
    };
    at_once(parts.into_iter().map(part).collect(), |mut part: Part<'_, '_>| {
        team.part(|| work(&mut part));
        lock(report).add(&part.report);
    });
}

impl Part<'_, '_> {
    fn chunk(&mut self, at: At) -> &mut Chunk {
        &mut self.claims[at.0].chunks[at.1]
    }

    fn is_freed(&self, at: At) -> bool {
        self.claims[at.0].extent.is_freed()
    }

    fn save(&mut self) -> std::result::Result<(), Failure> {
        let chunks = chunks(&self.claims, |chunk| chunk.truth == Truth::Device && !chunk.segments.is_empty());
        if chunks.iter().all(|&at| self.chunk(at).is_saved()) {
            return Ok(self.release_clean(&chunks)?);
        }
        let machine = self.team.machine;
        let mut pipe = Pipe::new(&*machine.heap.driver, machine.lanes.take(self.device)?);
        let saved = self.save_chunks(&mut pipe, &chunks);
        let drained = pipe.drain(&machine.lanes);
        saved?;
        Ok(drained.map_err(Error::from)?)
    }

    /// Releases chunks whose backups hold every byte already.
    fn release_clean(&mut self, chunks: &[At]) -> Result<()> {
        self.promised.keep()?;
        for &at in chunks {
            self.team.check()?;
            if !self.is_freed(at) {
                self.release(at)?;
            }
        }
        Ok(())
    }

    fn save_chunks(&mut self, pipe: &mut Pipe<'_, Piece>, chunks: &[At]) -> Result<()> {
        for &at in chunks {
            self.team.check()?;
            if self.is_freed(at) {
                continue;
            }
            if self.chunk(at).is_saved() {
                self.safe.push(at)
            } else {
                self.send_chunk(pipe, at)?
            }
            self.release_safe()?;
        }
        while self.land(pipe)? {
            self.release_safe()?;
        }
        while self.settle(true)? {}
        self.promised.keep()?;
        self.release_safe()
    }

    fn send_chunk(&mut self, pipe: &mut Pipe<'_, Piece>, at: At) -> Result<()> {
        let settings = &self.team.machine.settings;
        let mut pieces = Pieces::of(at, self.chunk(at), settings, |segment| !segment.filled);
        self.unsafe_bytes.insert(at, pieces.left());
        while let Some(piece) = self.next_piece(pipe, &mut pieces)? {
            let span = loop {
                let segment = &self.claims[at.0].chunks[at.1].segments[piece.segment];
                match self.sink.room(segment, &piece)? {
                    Some(span) => break span,
                    None => self.make_room(pipe)?,
                }
            };
            let claim = &self.claims[at.0];
            let offset = claim.chunks[at.1].segments[piece.segment].offset + piece.from;
            pipe.send_out(claim.extent.base.offset(offset), span, piece)?;
            self.report.bytes_copied += piece.len;
            // Only now that the lane has its next piece: an unmap may have to wait for the copy that is under way.
            self.release_safe()?;
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

    /// Something on its way becomes safe.
    fn make_room(&mut self, pipe: &mut Pipe<'_, Piece>) -> Result<()> {
        if !self.settle(true)? {
            self.land(pipe)?;
        }
        Ok(())
    }

    /// Waits for the oldest piece; it is safe, or on its way to be. False if nothing was under way.
    fn land(&mut self, pipe: &mut Pipe<'_, Piece>) -> Result<bool> {
        let Some((piece, span)) = pipe.land()? else { return Ok(false) };
        if let Some(span) = span {
            let Part { claims, sink, .. } = self;
            let segment = &claims[piece.at.0].chunks[piece.at.1].segments[piece.segment];
            sink.landed(segment, piece, &span)?;
        }
        while self.settle(false)? {}
        Ok(true)
    }

    /// Notes the chunk whose last piece has become safe. False if no piece has.
    fn settle(&mut self, wait: bool) -> Result<bool> {
        let Some(Safe { piece, place }) = self.sink.next_safe(wait)? else { return Ok(false) };
        if let Some(place) = place {
            self.chunk(piece.at).segments[piece.segment].place = place;
        }
        let left = self.unsafe_bytes.entry(piece.at).or_insert(piece.len);
        *left -= piece.len;
        if *left == 0 {
            self.unsafe_bytes.remove(&piece.at);
            self.safe.push(piece.at);
        }
        Ok(true)
    }

    /// Chunks whose bytes are safe go, unless room for others is still only promised: nothing is given up before that is certain.
    fn release_safe(&mut self) -> Result<()> {
        if self.safe.is_empty() || !self.promised.is_kept() {
            return Ok(());
        }
        std::mem::take(&mut self.safe).into_iter().try_for_each(|at| self.release(at))
    }

    /// The chunk's bytes are safe: its memory goes. If the mapping stays, so do the bytes on the device.
    fn release(&mut self, at: At) -> Result<()> {
        let stays = self.team.call.lazy && !self.must_be_zeroed(at)?;
        let chunk = self.chunk(at);
        chunk.segments.iter_mut().for_each(|segment| segment.filled = true);
        if stays {
            return Ok(());
        }
        chunk.truth = Truth::Backup;
        let given = self.give(at);
        let chunk = self.chunk(at);
        if given.is_err() && chunk.mapped {
            chunk.truth = Truth::Device;
        }
        given
    }

    /// Whether content of the chunk is thrown away that is promised to read as zero afterwards: a lazy pause cannot leave it there.
    fn must_be_zeroed(&self, at: At) -> Result<bool> {
        let claim = &self.claims[at.0];
        let region = self.team.machine.regions.get(claim.extent.region)?;
        Ok(region.policy.zero_fill && plan::is_discarded(claim, at.1))
    }

    fn give(&mut self, at: At) -> Result<()> {
        let (team, device, base) = (self.team, self.device, self.claims[at.0].extent.base);
        let given = team.pool.give(device, base, self.chunk(at))?;
        self.report.bytes_moved += given.released;
        self.report.bytes_recycled += given.recycled;
        Ok(())
    }

    /// Releases what needs no copy.
    fn release_rest(&mut self) -> std::result::Result<(), Failure> {
        for at in chunks(&self.claims, is_rest) {
            if self.is_freed(at) {
                continue;
            }
            match self.chunk(at).truth {
                Truth::Device => self.release(at)?,
                Truth::Backup => self.give(at)?,
            }
        }
        Ok(())
    }
}
