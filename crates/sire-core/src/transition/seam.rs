//! The seam between the passes and the tiers. The passes know pieces and spans of host memory; where a span's bytes go once a
//! piece has left the device, and where they come from before it is sent there, is decided here and nowhere else. A segment in host
//! memory is its own span. What is on disk goes through staging buffers: a [`Sink`] writes it out, a [`Source`] reads it in.

use super::Machine;
use super::pieces::Piece;
use crate::driver::Device;
use crate::error::{Error, Result, Status};
use crate::extent::Claim;
use crate::raw::Span;
use crate::tier::{Place, Segment, repeat};
use crate::transfer::IN_FLIGHT;
use std::collections::{BTreeMap, VecDeque};

/// Staging buffers, by device.
pub(super) type Staging = BTreeMap<Device, Buffers>;

/// Staging buffers of one copy piece each.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    all: Vec<Span>,
    free: Vec<usize>,
}

impl Buffers {
    /// `len` bytes of a buffer that nobody uses.
    fn take(&mut self, len: u64) -> Result<Option<Span>> {
        let Some(index) = self.free.pop() else { return Ok(None) };
        self.all[index].part(0, len).ok_or_else(too_short).map(Some)
    }

    /// The buffer that begins where `span` does is free again.
    fn put(&mut self, span: &Span) {
        let index = self.all.iter().position(|buffer| buffer.ptr() == span.ptr());
        self.free.extend(index);
    }
}

impl Machine {
    /// Buffers for every device that has a segment whose bytes are not in host memory.
    pub(super) fn staging<'a>(&self, claims: impl IntoIterator<Item = &'a Claim>) -> Result<Staging> {
        let mut staging = Staging::new();
        for claim in claims {
            let device = claim.extent.device;
            let mut segments = claim.chunks.iter().flat_map(|chunk| &chunk.segments);
            if !staging.contains_key(&device) && segments.any(is_staged) {
                staging.insert(device, self.buffers()?);
            }
        }
        Ok(staging)
    }

    fn buffers(&self) -> Result<Buffers> {
        let piece = self.settings.copy_piece;
        // The limit is for backups; staging buffers are not counted against it.
        let ranges = self.host.reserve(&[piece; IN_FLIGHT], None)?;
        let all: Option<Vec<Span>> = ranges.iter().map(|range| range.span(0, piece)).collect();
        let all = all.ok_or_else(too_short)?;
        Ok(Buffers { free: (0..all.len()).collect(), all })
    }
}

/// Whether the segment's bytes do not go straight between the device and host memory.
fn is_staged(segment: &Segment) -> bool {
    match segment.place {
        Place::Host(_) => false,
        Place::Disk { .. } => true,
        Place::Constant(_) => segment.byte().is_none(),
    }
}

/// Where pieces go that leave a device.
#[derive(Debug)]
pub(super) struct Sink<'a> {
    machine: &'a Machine,
    buffers: Buffers,
    /// Pieces that are where they belong, and were not yet told of.
    safe: VecDeque<Piece>,
}

impl<'a> Sink<'a> {
    pub(super) fn new(machine: &'a Machine, buffers: Buffers) -> Sink<'a> {
        Sink { machine, buffers, safe: VecDeque::new() }
    }

    /// Host memory for a piece to land in; `None` if another piece must become safe first.
    pub(super) fn room(&mut self, segment: &Segment, piece: &Piece) -> Result<Option<Span>> {
        match &segment.place {
            Place::Host(span) => span.part(piece.from, piece.len).ok_or_else(too_short).map(Some),
            Place::Disk { .. } => self.buffers.take(piece.len),
            // Found at the start, and never written.
            Place::Constant(_) => Err(too_short()),
        }
    }

    /// The piece has landed in `span`. If its tier refuses it, host memory takes the segment.
    pub(super) fn landed(&mut self, segment: &mut Segment, piece: Piece, span: &Span) -> Result<()> {
        if let Place::Disk { file, at, sum } = &mut segment.place {
            match file.write(*at, span) {
                Ok(found) => *sum = found,
                Err(error) => segment.place = self.fall_back(segment.len, span, error)?,
            }
            self.buffers.put(span);
        }
        self.safe.push_back(piece);
        Ok(())
    }

    fn fall_back(&self, len: u64, staged: &Span, error: Error) -> Result<Place> {
        let room = self.machine.host.reserve(&[len], self.machine.settings.host_limit());
        let room = room.map_err(|second| error.clone().context(second.message))?;
        let span = room.first().and_then(|range| range.span(0, len)).ok_or(error)?;
        span.bring_in()?;
        staged.read(|bytes| span.write(|to| to.copy_from_slice(bytes)));
        Ok(Place::Host(span))
    }

    /// A piece that became safe since. If there is none, and `wait`, the next that does; `None` if none is on its way.
    // Writes are done by the time that `landed` returns, so there is nothing to wait for yet.
    pub(super) fn next_safe(&mut self, wait: bool) -> Result<Option<Piece>> {
        let _ = wait;
        Ok(self.safe.pop_front())
    }
}

/// Where pieces come from that go to a device.
#[derive(Debug)]
pub(super) struct Source {
    buffers: Buffers,
}

impl Source {
    pub(super) fn new(buffers: Buffers) -> Source {
        Source { buffers }
    }

    /// The bytes of a piece, checked; `None` if another piece must land first. Pieces are asked for in the order of the pass.
    pub(super) fn bytes(&mut self, segment: &Segment, piece: &Piece) -> Result<Option<Span>> {
        match &segment.place {
            Place::Host(span) => span.part(piece.from, piece.len).ok_or_else(too_short).map(Some),
            Place::Disk { file, at, sum } => {
                let Some(span) = self.buffers.take(piece.len)? else { return Ok(None) };
                file.read(*at, &span, *sum)?;
                Ok(Some(span))
            }
            Place::Constant(word) => {
                let span = self.buffers.take(piece.len)?;
                // Pieces begin at multiples of the copy piece, which may cut a word.
                let word = word.rotate_right(8 * (piece.from % 8) as u32);
                Ok(span.inspect(|span| span.write(|bytes| repeat(word, bytes))))
            }
        }
    }

    /// The piece is on the device: a staging buffer is free again.
    pub(super) fn landed(&mut self, segment: &Segment, span: &Span) {
        if !matches!(segment.place, Place::Host(_)) {
            self.buffers.put(span);
        }
    }
}

fn too_short() -> Error {
    Error::new(Status::Internal, "a segment is longer than its place")
}
