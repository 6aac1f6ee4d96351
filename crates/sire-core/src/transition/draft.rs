//! What becomes of a claim's backups in a pause: which retained segments still hold the device's bytes, which are written
//! again where they are, and what needs new room. A draft changes nothing; [`plan`](super::plan) makes room for it and carries it out.
//!
//! Bytes are judged by *pieces*: what lies between two multiples of the page length, cut at the ends of what is to be saved and of
//! what the old segments hold. Neighbours with the same fate become one segment again.

use crate::extent::{Chunk, Claim, Truth};
use crate::ranges::Ranges;
use crate::tier::{Place, Segment};
use std::ops::Range;

/// What each chunk of a claim is to save; nothing where its bytes are not on the device.
pub(super) type Wanted = Vec<Ranges>;

/// What becomes of some bytes.
#[derive(Debug)]
pub(super) enum Part {
    /// They have a segment: filled if it holds them already, else to be written again.
    Has(Segment),
    /// They need new room.
    Needs(Range<u64>),
}

/// What each chunk's segments are to be; `None` leaves a chunk as it is.
pub(super) type Draft = Vec<Option<Vec<Part>>>;

/// Bytes of new room that the draft needs.
pub(super) fn missing(draft: &Draft) -> u64 {
    let parts = draft.iter().flatten().flatten();
    parts.map(|part| if let Part::Needs(range) = part { range.end - range.start } else { 0 }).sum()
}

/// A draft in which nothing is known about old content: retained room is used again if it has exactly the wanted shape
/// and nobody else may be reading it.
pub(super) fn unproven(claim: &Claim, wanted: &Wanted) -> Draft {
    let reuse = is_reusable(claim, wanted);
    let each = claim.chunks.iter().zip(wanted).map(|(chunk, ranges)| {
        let again = |segment: &Segment| Part::Has(Segment { filled: false, ..segment.clone() });
        let on_device = chunk.truth == Truth::Device;
        on_device.then(|| match reuse {
            true => chunk.segments.iter().map(again).collect(),
            false => ranges.iter().cloned().map(Part::Needs).collect(),
        })
    });
    each.collect()
}

/// Whether retained host segments have exactly the wanted shape, and may be written to.
fn is_reusable(claim: &Claim, wanted: &Wanted) -> bool {
    let fits = |chunk: &Chunk, ranges: &Ranges| {
        let usable = |segment: &Segment| matches!(segment.place, Place::Host(_)) && segment.is_writable();
        chunk.truth == Truth::Device && has_shape(chunk, ranges) && chunk.segments.iter().all(usable)
    };
    wanted.iter().any(|ranges| ranges.total() > 0) && claim.chunks.iter().zip(wanted).all(|(c, r)| fits(c, r))
}

fn has_shape(chunk: &Chunk, ranges: &Ranges) -> bool {
    chunk.segments.iter().map(Segment::range).eq(ranges.iter().cloned())
}

/// A draft that keeps what is filled, except for what has `changed`.
pub(super) fn declared(claim: &Claim, wanted: &Wanted, changed: &Ranges, page: u64) -> Draft {
    let each = claim.chunks.iter().zip(wanted).map(|(chunk, ranges)| {
        let untouched = changed.clip(&chunk.range()).total() == 0;
        if chunk.truth != Truth::Device || (untouched && chunk.is_saved() && has_shape(chunk, ranges)) {
            return None;
        }
        Some(Drafter { chunk, page }.draft(ranges, &|piece, _| changed.clip(piece).total() == 0))
    });
    each.collect()
}

/// Whether a filled segment's bytes in a piece are still the device's.
type Proof<'a> = &'a dyn Fn(&Range<u64>, &Segment) -> bool;

/// Drafts one chunk.
struct Drafter<'a> {
    chunk: &'a Chunk,
    page: u64,
}

impl Drafter<'_> {
    fn draft(&self, ranges: &Ranges, proof: Proof<'_>) -> Vec<Part> {
        let mut parts = Vec::new();
        for range in ranges.iter() {
            let mut at = range.start;
            while at < range.end {
                let (end, part) = self.next(at..range.end, proof);
                push(&mut parts, part);
                at = end;
            }
        }
        parts
    }

    /// What becomes of the first bytes of `rest`, and where they end.
    fn next(&self, rest: Range<u64>, proof: Proof<'_>) -> (u64, Part) {
        let next = self.chunk.segments.partition_point(|segment| segment.end() <= rest.start);
        let boundary = (rest.start / self.page + 1) * self.page;
        let Some(old) = self.chunk.segments.get(next).filter(|old| old.offset <= rest.start) else {
            let gap_end = self.chunk.segments.get(next).map_or(rest.end, |old| old.offset);
            let end = rest.end.min(gap_end);
            return (end, Part::Needs(rest.start..end));
        };
        let whole = old.offset == rest.start && old.end() <= rest.end;
        let piece = match old.place {
            // A stored segment has one checksum: all of it stays, or none.
            Place::Disk { .. } if whole => old.range(),
            Place::Disk { .. } => return (rest.end.min(old.end()), Part::Needs(rest.start..rest.end.min(old.end()))),
            Place::Host(_) => rest.start..rest.end.min(old.end()).min(boundary),
        };
        let Some(part) = old.part(&piece) else { return (piece.end, Part::Needs(piece)) };
        let filled = old.filled && proof(&piece, old);
        let part = if filled || old.is_writable() {
            Part::Has(Segment { filled, ..part })
        } else {
            Part::Needs(piece.clone())
        };
        (piece.end, part)
    }
}

/// Adds a part, joined to the last one if they can be one.
fn push(parts: &mut Vec<Part>, part: Part) {
    let joined = match (parts.last(), &part) {
        (Some(Part::Needs(last)), Part::Needs(next)) if last.end == next.start => {
            Some(Part::Needs(last.start..next.end))
        }
        (Some(Part::Has(last)), Part::Has(next)) => last.joined(next).map(Part::Has),
        _ => None,
    };
    if joined.is_some() {
        parts.pop();
    }
    parts.push(joined.unwrap_or(part));
}
