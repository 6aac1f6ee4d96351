//! The pass that makes chunks give their memory back. A chunk whose bytes are on the device is first copied to its
//! segments, piece by piece; as soon as its last piece has landed it is unmapped and released, while
//! the next chunk is copied. Chunks that are only discarded come last, after those of every device: what fails before them costs
//! them nothing.

use super::{Call, Machine, devices};
use crate::driver::Device;
use crate::error::{Error, Result, Status};
use crate::extent::{Chunk, Claim, Truth};
use crate::raw::Span;
use crate::terms::Report;
use crate::tier::{Place, Segment};
use crate::transfer::Pipe;

/// Which piece of which segment of which chunk.
#[derive(Clone, Copy, Debug)]
struct Ticket {
    chunk: (usize, usize),
    segment: usize,
    /// The chunk's last piece.
    last: bool,
}

/// One pass over one device.
struct Pass<'a> {
    machine: &'a Machine,
    claims: &'a mut [Claim],
    staging: &'a [Span],
    call: &'a Call,
    report: &'a mut Report,
}

impl Machine {
    /// Saves and releases every chunk. The devices are synchronised already, and every chunk on the device has its segments.
    pub(super) fn put_down(
        &self,
        claims: &mut [Claim],
        staging: &[Span],
        call: &Call,
        report: &mut Report,
    ) -> Result<()> {
        for device in devices(claims) {
            Pass { machine: self, claims, staging, call, report }.save(device)?;
        }
        // From here on content without a backup goes, which no undo brings back: the last moment to cancel.
        call.check_cancelled(self)?;
        for device in devices(claims) {
            Pass { machine: self, claims, staging, call, report }.release_rest(device)?;
        }
        Ok(())
    }
}

impl Pass<'_> {
    fn chunk(&mut self, at: (usize, usize)) -> &mut Chunk {
        &mut self.claims[at.0].chunks[at.1]
    }

    /// Chunks of `device` that `wanted` says, in order.
    fn chunks(&self, device: Device, wanted: impl Fn(&Chunk) -> bool) -> Vec<(usize, usize)> {
        let claims = self.claims.iter().enumerate().filter(|(_, claim)| claim.extent.device == device);
        let each = claims.flat_map(|(i, claim)| claim.chunks.iter().enumerate().map(move |(j, chunk)| ((i, j), chunk)));
        each.filter(|(_, chunk)| wanted(chunk)).map(|(at, _)| at).collect()
    }

    fn save(&mut self, device: Device) -> Result<()> {
        let chunks = self.chunks(device, |chunk| chunk.truth == Truth::Device && !chunk.segments.is_empty());
        if chunks.iter().all(|&at| self.chunk(at).is_saved()) {
            return self.release_clean(&chunks);
        }
        let machine = self.machine;
        let mut pipe = Pipe::new(&*machine.heap.driver, machine.lanes.take(device)?);
        let saved = self.save_chunks(&mut pipe, &chunks);
        let drained = pipe.drain(&machine.lanes);
        saved?;
        Ok(drained?)
    }

    /// Releases chunks whose backups hold every byte already.
    fn release_clean(&mut self, chunks: &[(usize, usize)]) -> Result<()> {
        for &at in chunks {
            self.call.check_cancelled(self.machine)?;
            if !self.claims[at.0].extent.is_freed() {
                self.release(at)?;
            }
        }
        Ok(())
    }

    fn save_chunks(&mut self, pipe: &mut Pipe<'_, Ticket>, chunks: &[(usize, usize)]) -> Result<()> {
        for &at in chunks {
            self.call.check_cancelled(self.machine)?;
            if self.claims[at.0].extent.is_freed() {
                continue;
            }
            if self.chunk(at).is_saved() { self.release(at)? } else { self.send_chunk(pipe, at)? }
        }
        while self.land(pipe)? {}
        Ok(())
    }

    fn send_chunk(&mut self, pipe: &mut Pipe<'_, Ticket>, at: (usize, usize)) -> Result<()> {
        let pending = self.chunk(at).segments.iter().enumerate().filter(|(_, segment)| !segment.filled);
        let pending: Vec<usize> = pending.map(|(index, _)| index).collect();
        for &segment in &pending {
            let Segment { offset, len, .. } = self.chunk(at).segments[segment];
            let step = self.machine.settings.copy_piece;
            for from in (0..len).step_by(step as usize) {
                if pipe.is_full() {
                    self.land(pipe)?;
                }
                let piece = step.min(len - from);
                let last = Some(&segment) == pending.last() && from + piece == len;
                let span = self.target(pipe, at, segment, from, piece)?;
                let src = self.claims[at.0].extent.base.offset(offset + from);
                pipe.send_out(src, span, Ticket { chunk: at, segment, last })?;
                self.report.bytes_copied += piece;
            }
        }
        Ok(())
    }

    /// Where a piece goes: to its place in host memory, or to the staging buffer that is free.
    fn target(
        &mut self,
        pipe: &Pipe<'_, Ticket>,
        at: (usize, usize),
        segment: usize,
        from: u64,
        piece: u64,
    ) -> Result<Span> {
        let span = match &self.claims[at.0].chunks[at.1].segments[segment].place {
            Place::Host(span) => span.part(from, piece),
            Place::Disk { .. } => self.staging.get(pipe.next_place()).and_then(|buffer| buffer.part(0, piece)),
        };
        span.ok_or_else(|| Error::new(Status::Internal, "a segment is longer than its place"))
    }

    /// Waits for the oldest piece and does what follows from it. False if nothing was under way.
    fn land(&mut self, pipe: &mut Pipe<'_, Ticket>) -> Result<bool> {
        let Some((ticket, span)) = pipe.land()? else { return Ok(false) };
        if let Some(span) = span {
            self.write_out(ticket, &span)?;
        }
        if ticket.last {
            self.release(ticket.chunk)?;
        }
        Ok(true)
    }

    /// Writes a staged piece to its file; if that fails, host memory takes it.
    fn write_out(&mut self, ticket: Ticket, staged: &Span) -> Result<()> {
        let machine = self.machine;
        let Segment { place, len, .. } = &mut self.chunk(ticket.chunk).segments[ticket.segment];
        let Place::Disk { file, at, sum } = place else { return Ok(()) };
        match file.write(*at, staged) {
            Ok(found) => *sum = found,
            Err(error) => {
                let room = machine.host.reserve(&[*len], machine.settings.host_limit());
                let room = room.map_err(|second| error.clone().context(second.message))?;
                let span = room.first().and_then(|range| range.span(0, *len)).ok_or(error)?;
                staged.read(|bytes| span.write(|to| to.copy_from_slice(bytes)));
                *place = Place::Host(span);
            }
        }
        Ok(())
    }

    /// The chunk's bytes are safe: its memory goes back. If the mapping stays, so do the bytes on the device.
    fn release(&mut self, at: (usize, usize)) -> Result<()> {
        let base = self.claims[at.0].extent.base;
        let machine = self.machine;
        let chunk = self.chunk(at);
        chunk.truth = Truth::Backup;
        chunk.segments.iter_mut().for_each(|segment| segment.filled = true);
        let released = machine.heap.strip(base, chunk);
        if released.is_err() && chunk.mapped {
            chunk.truth = Truth::Device;
        }
        self.report.bytes_moved += released?;
        Ok(())
    }

    /// Releases what needs no copy: chunks without segments, and leftovers of an earlier call.
    fn release_rest(&mut self, device: Device) -> Result<()> {
        let rest = self.chunks(device, |chunk| match chunk.truth {
            Truth::Device => chunk.segments.is_empty(),
            Truth::Backup => chunk.is_leftover(),
        });
        for at in rest {
            if self.claims[at.0].extent.is_freed() {
                continue;
            }
            match self.chunk(at).truth {
                Truth::Device => self.release(at)?,
                Truth::Backup => self.report.bytes_moved += self.release_leftover(at)?,
            }
        }
        Ok(())
    }

    fn release_leftover(&mut self, at: (usize, usize)) -> Result<u64> {
        let base = self.claims[at.0].extent.base;
        let machine = self.machine;
        Ok(machine.heap.strip(base, self.chunk(at))?)
    }
}
