//! The seam between the passes and the tiers. The passes know pieces and spans of host memory; where a span's bytes go once a
//! piece has left the device, and where they come from before it is sent there, is decided here and nowhere else. A segment in host
//! memory is its own span. What is in another tier goes through staging buffers and a [`Queue`]: a [`Sink`] has it written out while
//! the next pieces leave the device, a [`Source`] has it read ahead while the last ones arrive there.

use super::Machine;
use super::pieces::{At, Piece};
use crate::driver::Device;
use crate::error::{Error, Result, Status};
use crate::extent::Claim;
use crate::raw::Span;
use crate::settings::IN_FLIGHT;
use crate::tier::queue::{Done, Queue};
use crate::tier::record::{Answer, Record, Sum};
use crate::tier::staging::Buffers;
use crate::tier::{Place, Segment, repeat};
use std::collections::{BTreeMap, VecDeque};

/// Less than this is moved by the calling thread: starting others would take longer.
const WORTH_THREADS: u64 = 1 << 20;

/// What each device needs for its segments in tiers.
pub(super) type Staging = BTreeMap<Device, Desk>;

/// Staging buffers, and how many requests to have under way with them.
#[derive(Debug, Default)]
pub(super) struct Desk {
    pub(super) buffers: Buffers,
    pub(super) depth: usize,
    /// Whether files may be asked through the kernel's own queue.
    pub(super) ring: bool,
}

impl Desk {
    /// The buffers, and a queue of requests for them.
    pub(super) fn open<T: Send + 'static>(self) -> (Buffers, Queue<T>) {
        (self.buffers, Queue::new(self.depth, self.ring))
    }
}

/// Records, their bytes, those of the longest, and how many requests their tiers like to have under way.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Need {
    pub(super) count: usize,
    pub(super) bytes: u64,
    pub(super) longest: u64,
    pub(super) depth: usize,
}

impl Need {
    /// One more segment: a record is one piece, anything else goes in pieces of at most `record` bytes.
    fn add(self, segment: &Segment, record: u64) -> Need {
        let longest = if segment.is_stored() { segment.len } else { segment.len.min(record) };
        let (count, bytes) = (self.count + 1, self.bytes + segment.len);
        Need { count, bytes, longest: self.longest.max(longest), ..self }
    }
}

impl Machine {
    /// A desk for every device that has a segment outside host memory.
    pub(super) fn staging<'a>(&self, claims: impl IntoIterator<Item = &'a Claim>) -> Result<Staging> {
        let mut needs: BTreeMap<Device, Need> = BTreeMap::new();
        for claim in claims {
            let segments = claim.chunks.iter().flat_map(|chunk| &chunk.segments);
            let mut staged = segments.filter(|segment| is_staged(segment)).peekable();
            if staged.peek().is_some() {
                let depth = self.tiers.depth(self.regions.get(claim.extent.region)?.policy.backup);
                let need = needs.entry(claim.extent.device).or_default();
                need.depth = need.depth.max(depth);
                *need = staged.fold(*need, |need, segment| need.add(segment, self.settings.record()));
            }
        }
        needs.into_iter().map(|(device, need)| Ok((device, self.desk(need)?))).collect()
    }

    /// A desk for so much.
    pub(super) fn desk(&self, need: Need) -> Result<Desk> {
        let depth = if need.bytes < WORTH_THREADS { 0 } else { need.depth.min(need.count) };
        let buffers = Buffers::new(&self.host, (depth + IN_FLIGHT).min(need.count), need.longest)?;
        Ok(Desk { buffers, depth, ring: self.settings.io_uring() })
    }
}

/// Whether the segment's bytes do not go straight between the device and host memory.
fn is_staged(segment: &Segment) -> bool {
    match segment.place {
        Place::Host(_) => false,
        Place::Stored { .. } => true,
        Place::Constant(_) => segment.byte().is_none(),
    }
}

/// A piece that is where it belongs, and where that is if it was not clear before.
#[derive(Debug)]
pub(super) struct Safe {
    pub(super) piece: Piece,
    pub(super) place: Option<Place>,
}

/// Where pieces go that leave a device.
#[derive(Debug)]
pub(super) struct Sink<'a> {
    machine: &'a Machine,
    buffers: Buffers,
    queue: Queue<(Piece, Record)>,
    /// Pieces that are where they belong, and were not yet told of.
    safe: VecDeque<Safe>,
}

impl<'a> Sink<'a> {
    pub(super) fn new(machine: &'a Machine, desk: Desk) -> Sink<'a> {
        let (buffers, queue) = desk.open();
        Sink { machine, buffers, queue, safe: VecDeque::new() }
    }

    /// Host memory for a piece to land in; `None` if another piece must become safe first.
    pub(super) fn room(&mut self, segment: &Segment, piece: &Piece) -> Result<Option<Span>> {
        match &segment.place {
            Place::Host(span) => span.part(piece.from, piece.len).ok_or_else(too_short).map(Some),
            Place::Stored { .. } => {
                let Some(buffer) = self.buffers.take() else { return Ok(None) };
                buffer.part(0, piece.len).ok_or_else(too_short).map(Some)
            }
            // Found at the start, and never written.
            Place::Constant(_) => Err(too_short()),
        }
    }

    /// The piece has landed in `span`: it is safe, or on its way to its tier.
    pub(super) fn landed(&mut self, segment: &Segment, piece: Piece, span: &Span) -> Result<()> {
        let Some((record, _)) = segment.place.record(segment.len) else {
            self.safe.push_back(Safe { piece, place: None });
            return Ok(());
        };
        let buffer = self.buffers.around(span).filter(|_| piece.len == segment.len).ok_or_else(too_short)?;
        self.queue.write(record.clone(), buffer, (piece, record));
        Ok(())
    }

    /// A piece that became safe since. If there is none, and `wait`, the next that does; `None` if none is on its way.
    pub(super) fn next_safe(&mut self, wait: bool) -> Result<Option<Safe>> {
        if let Some(safe) = self.safe.pop_front() {
            return Ok(Some(safe));
        }
        let done = if wait { self.queue.wait() } else { self.queue.poll() };
        let Some(Done { ticket: (piece, record), buffer, outcome }) = done else { return Ok(None) };
        let place = match (outcome, &buffer) {
            (Ok(Answer { sum, .. }), _) => Place::Stored { room: record.room, at: record.at, sum },
            (Err(error), Some(buffer)) => self.fall_back(piece.len, buffer, error)?,
            (Err(error), None) => return Err(error),
        };
        self.buffers.put_back(buffer);
        Ok(Some(Safe { piece, place: Some(place) }))
    }

    /// A tier has refused a piece: host memory takes it.
    fn fall_back(&self, len: u64, buffer: &Span, error: Error) -> Result<Place> {
        let staged = buffer.part(0, len).ok_or_else(too_short)?;
        let room = self.machine.host.reserve(&[len], self.machine.settings.host_limit());
        let room = room.map_err(|second| error.clone().context(second.message))?;
        let span = room.first().and_then(|range| range.span(0, len)).ok_or(error)?;
        span.bring_in()?;
        staged.read(|bytes| span.write(|to| to.copy_from_slice(bytes)));
        Ok(Place::Host(span))
    }
}

/// A record that the pass will ask for.
#[derive(Debug)]
struct Ahead {
    at: At,
    segment: usize,
    record: Record,
    sum: Sum,
}

/// Where pieces come from that go to a device.
#[derive(Debug)]
pub(super) struct Source {
    buffers: Buffers,
    queue: Queue<usize>,
    /// All records, in the order in which the pass asks for them.
    ahead: Vec<Ahead>,
    /// The first that was not asked for yet, and the first that was not requested yet.
    asked: usize,
    requested: usize,
    /// Buffers that are not for reading ahead, because constants need one.
    kept: usize,
    /// Answers that came before they were asked for.
    ready: BTreeMap<usize, (Option<Span>, Result<Answer>)>,
}

impl Source {
    /// For a pass over these chunks, in this order.
    pub(super) fn new(desk: Desk, claims: &[&mut Claim], chunks: impl Iterator<Item = At>) -> Source {
        let (mut ahead, mut kept) = (Vec::new(), 0);
        for at in chunks {
            for (segment, held) in claims[at.0].chunks[at.1].segments.iter().enumerate() {
                match held.place.record(held.len) {
                    Some((record, sum)) => ahead.push(Ahead { at, segment, record, sum }),
                    None if is_staged(held) => kept = 1,
                    None => {}
                }
            }
        }
        let (buffers, queue) = desk.open();
        Source { buffers, queue, ahead, asked: 0, requested: 0, kept, ready: BTreeMap::new() }
    }

    /// The bytes of a piece, checked; `None` if another piece must land first. Pieces are asked for in the order of the pass; some
    /// may be left out.
    pub(super) fn bytes(&mut self, segment: &Segment, piece: &Piece) -> Result<Option<Span>> {
        match &segment.place {
            Place::Host(span) => span.part(piece.from, piece.len).ok_or_else(too_short).map(Some),
            Place::Stored { .. } => self.stored(piece),
            Place::Constant(word) => {
                let Some(buffer) = self.buffers.take() else { return Ok(None) };
                let span = buffer.part(0, piece.len).ok_or_else(too_short)?;
                // Pieces begin at multiples of a page, so at a word's first byte.
                span.write(|bytes| repeat(*word, bytes));
                Ok(Some(span))
            }
        }
    }

    fn stored(&mut self, piece: &Piece) -> Result<Option<Span>> {
        self.skip_to(piece)?;
        loop {
            self.read_ahead();
            if let Some((buffer, outcome)) = self.ready.remove(&self.asked) {
                let answer = outcome.inspect_err(|_| self.buffers.put_back(buffer))?;
                self.asked += 1;
                return Ok(Some(answer.bytes));
            }
            let Some(done) = self.queue.wait() else { return Ok(None) };
            self.note(done);
        }
    }

    /// Records that the pass has left out (their memory was freed) are not waited for.
    fn skip_to(&mut self, piece: &Piece) -> Result<()> {
        let wanted = |ahead: &Ahead| ahead.at == piece.at && ahead.segment == piece.segment;
        let skipped = self.ahead[self.asked..].iter().position(wanted);
        self.asked += skipped.ok_or_else(|| Error::new(Status::Internal, "a record was asked for out of order"))?;
        self.requested = self.requested.max(self.asked);
        let (buffers, asked) = (&mut self.buffers, self.asked);
        self.ready.retain(|&index, (buffer, _)| {
            if index < asked {
                buffers.put_back(buffer.take());
            }
            index >= asked
        });
        Ok(())
    }

    fn read_ahead(&mut self) {
        while let Some(Ahead { record, sum, .. }) = self.ahead.get(self.requested) {
            if self.buffers.free() <= self.kept {
                return;
            }
            let Some(buffer) = self.buffers.take() else { return };
            if self.buffers.free() < self.kept {
                return self.buffers.put(&buffer);
            }
            self.queue.read(record.clone(), buffer, Some(*sum), self.requested);
            self.requested += 1;
        }
    }

    fn note(&mut self, done: Done<usize>) {
        if done.ticket < self.asked {
            self.buffers.put_back(done.buffer);
        } else {
            self.ready.insert(done.ticket, (done.buffer, done.outcome));
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
