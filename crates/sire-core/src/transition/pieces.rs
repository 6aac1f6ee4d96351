//! Pieces: what is copied at once, at most so many bytes of one segment of one chunk.

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

/// The pieces of those segments of a chunk that `wanted` says. A record of a tier is one piece.
pub(super) fn pieces(at: At, chunk: &Chunk, settings: &Settings, wanted: impl Fn(&Segment) -> bool) -> Vec<Piece> {
    let segments = chunk.segments.iter().enumerate().filter(|(_, segment)| wanted(segment));
    let cut = |(segment, held): (usize, &Segment)| {
        let len = held.len;
        let step = if held.is_stored() { settings.copy_piece } else { settings.host_piece() };
        (0..len).step_by(step as usize).map(move |from| Piece { at, segment, from, len: step.min(len - from) })
    };
    segments.flat_map(cut).collect()
}
