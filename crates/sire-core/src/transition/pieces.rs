//! Pieces: what is copied at once, some bytes of one segment of one chunk.

use super::stride::Stride;
use crate::extent::{Chunk, Claim};
use crate::settings::Settings;
use crate::tier::Segment;

/// A chunk of one of a pass's claims: (claim, chunk).
pub(super) type At = (usize, usize);

/// Bytes `[from, from + len)` of a segment of a chunk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Piece {
    pub(super) at: At,
    pub(super) segment: usize,
    pub(super) from: u64,
    pub(super) len: u64,
}

/// The chunks that `wanted` says, in order.
pub(super) fn chunks(claims: &[&mut Claim], wanted: impl Fn(&Chunk) -> bool) -> Vec<At> {
    let each = claims.iter().enumerate();
    let each = each.flat_map(|(i, claim)| claim.chunks.iter().enumerate().map(move |(j, chunk)| ((i, j), chunk)));
    each.filter(|(_, chunk)| wanted(chunk)).map(|(at, _)| at).collect()
}

/// The pieces of some segments of a chunk, cut one after the other: how long the next one may be is known only when it is sent.
#[derive(Debug)]
pub(super) struct Pieces {
    at: At,
    /// The segments that are not cut up, the last one first.
    segments: Vec<Whole>,
    /// Bytes cut from the one whose turn it is.
    cut: u64,
}

/// A segment to cut.
#[derive(Clone, Copy, Debug)]
struct Whole {
    segment: usize,
    len: u64,
    /// A constant is written from a staging buffer, which has room for a record.
    longest: u64,
    /// A record of a tier is one piece.
    is_record: bool,
}

impl Pieces {
    /// Those of the segments that `wanted` says.
    pub(super) fn of(at: At, chunk: &Chunk, settings: &Settings, wanted: impl Fn(&Segment) -> bool) -> Pieces {
        let segments = chunk.segments.iter().enumerate().rev().filter(|(_, held)| held.len > 0 && wanted(held));
        let whole = |(segment, held): (usize, &Segment)| {
            let is_record = held.is_stored();
            let longest = if is_record || held.is_in_host() { u64::MAX } else { settings.record() };
            Whole { segment, len: held.len, longest, is_record }
        };
        Pieces { at, segments: segments.map(whole).collect(), cut: 0 }
    }

    /// Bytes that are not cut yet. Looks at every segment.
    pub(super) fn left(&self) -> u64 {
        self.segments.iter().map(|whole| whole.len).sum::<u64>() - self.cut
    }

    /// Whether there is no next one.
    pub(super) fn is_over(&self) -> bool {
        self.segments.is_empty()
    }

    /// The next piece, at most as long as `stride` says.
    pub(super) fn next(&mut self, stride: &mut Stride<'_>) -> Option<Piece> {
        let &Whole { segment, len, longest, is_record } = self.segments.last()?;
        let (from, left) = (self.cut, len - self.cut);
        let most = left.min(longest);
        let len = if is_record { most } else { stride.next(most) };
        self.cut += len;
        if len == left {
            self.segments.pop();
            self.cut = 0;
        }
        Some(Piece { at: self.at, segment, from, len })
    }
}
