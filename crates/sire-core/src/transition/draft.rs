//! What becomes of a claim's backups in a pause: which retained segments still hold the device's bytes, which are written
//! again where they are, and what needs new room. A draft changes no chunk; [`plan`](super::plan) makes room for it and carries it out.

use super::survey::{Fact, Piece, Survey, Wanted};
use crate::digest::Digest;
use crate::extent::{Chunk, Claim, Truth};
use crate::pages::Pages;
use crate::ranges::Ranges;
use crate::terms::{Backup, Clean, Report};
use crate::tier::{PageId, Place, Segment};
use std::ops::Range;

/// What becomes of some bytes.
#[derive(Debug)]
pub(super) enum Part {
    /// They have a segment: filled if it holds them already, else to be written again.
    Has(Segment),
    /// They need new room. With what is known of their pages.
    Needs(Range<u64>, Vec<Option<PageId>>),
}

impl Part {
    /// Where it begins.
    fn start(&self) -> u64 {
        match self {
            Part::Has(segment) => segment.offset,
            Part::Needs(range, _) => range.start,
        }
    }
}

/// What each chunk's segments are to be; `None` leaves a chunk as it is.
pub(super) type Draft = Vec<Option<Vec<Part>>>;

/// Bytes of new room that the draft needs.
pub(super) fn missing(draft: &Draft) -> u64 {
    open(draft).map(|(range, _)| range.end - range.start).sum()
}

/// The ranges that need new room, and what is known of their pages.
pub(super) fn open(draft: &Draft) -> impl Iterator<Item = (&Range<u64>, &Vec<Option<PageId>>)> {
    let parts = draft.iter().flatten().flatten();
    parts.filter_map(|part| if let Part::Needs(range, pages) = part { Some((range, pages)) } else { None })
}

/// The draft for a survey. Pages that `known` has elsewhere in host memory are not saved again.
pub(super) fn draft(survey: &Survey, claim: &Claim, known: &Pages, page: u64, report: &mut Report) -> Draft {
    if survey.region.judged() == Clean::No {
        return unproven(claim, &survey.wanted);
    }
    let shares = matches!(survey.region.policy.backup, Backup::None | Backup::Host | Backup::File);
    let mut drafter = Drafter { known, shares, page, in_place: claim.is_held(), report };
    survey.chunks.iter().map(|pieces| Some(drafter.draft(pieces.as_ref()?))).collect()
}

/// A draft in which nothing is known about old content, but for what files were just proven to hold: retained room is used again if it has
/// exactly the wanted shape and nobody else may be reading it.
fn unproven(claim: &Claim, wanted: &Wanted) -> Draft {
    let both = || claim.chunks.iter().zip(wanted);
    let open: Wanted = both().map(|(chunk, ranges)| without_files(chunk, ranges)).collect();
    let reuse = is_reusable(claim, &open);
    let again = |segment: &Segment| Part::Has(Segment { filled: false, ..segment.clone() });
    let each = both().zip(&open).map(|((chunk, ranges), open)| {
        let on_device = chunk.truth == Truth::Device;
        on_device.then(|| {
            let mut parts: Vec<Part> = in_files(chunk, ranges).cloned().map(Part::Has).collect();
            match reuse {
                true => parts.extend(elsewhere(chunk).map(again)),
                false => parts.extend(open.iter().map(|range| Part::Needs(range.clone(), Vec::new()))),
            }
            parts.sort_by_key(Part::start);
            parts
        })
    });
    each.collect()
}

/// The chunk's segments that are in files, and wanted as they are.
fn in_files<'a>(chunk: &'a Chunk, wanted: &'a Ranges) -> impl Iterator<Item = &'a Segment> {
    let is_wanted = |segment: &&Segment| wanted.clip(&segment.range()).total() == segment.len;
    chunk.segments.iter().filter(|segment| segment.filled && segment.is_borrowed()).filter(is_wanted)
}

/// The chunk's other segments.
fn elsewhere(chunk: &Chunk) -> impl Iterator<Item = &Segment> {
    chunk.segments.iter().filter(|segment| !segment.is_borrowed())
}

/// What is wanted of a chunk and in no file.
fn without_files(chunk: &Chunk, wanted: &Ranges) -> Ranges {
    let mut open = wanted.clone();
    in_files(chunk, wanted).for_each(|segment| open.remove(&segment.range()));
    open
}

/// Whether retained host segments have exactly the wanted shape, and may be written to.
fn is_reusable(claim: &Claim, wanted: &Wanted) -> bool {
    let fits = |chunk: &Chunk, ranges: &Ranges| {
        let same = elsewhere(chunk).map(Segment::range).eq(ranges.iter().cloned());
        let usable = |segment: &Segment| matches!(&segment.place, Place::Host(span) if !span.keeper().is_lent());
        chunk.truth == Truth::Device && same && elsewhere(chunk).all(usable)
    };
    wanted.iter().any(|ranges| ranges.total() > 0) && claim.chunks.iter().zip(wanted).all(|(c, r)| fits(c, r))
}

/// Drafts from what is known.
struct Drafter<'a> {
    known: &'a Pages,
    /// Whether pages in host memory will do.
    shares: bool,
    page: u64,
    /// Whether old room may be written again: not while others may come to rely on what it has.
    in_place: bool,
    report: &'a mut Report,
}

impl Drafter<'_> {
    fn draft(&mut self, pieces: &[Piece]) -> Vec<Part> {
        let mut parts = Vec::with_capacity(pieces.len());
        for piece in pieces {
            let part = self.part(piece);
            push(&mut parts, part, self.page);
        }
        parts
    }

    fn part(&mut self, piece: &Piece) -> Part {
        let id = match piece.fact {
            Fact::Same => return piece.old.clone().map_or_else(|| needs(piece, None), Part::Has),
            Fact::Unknown => None,
            Fact::Hashed(digest) => Some((digest.low, digest.high)),
        };
        if let (Some(old), Some(id)) = (&piece.old, id)
            && old.filled
            && old.pages == [Some(id)]
        {
            return Part::Has(old.clone());
        }
        let elsewhere = if let Fact::Hashed(digest) = piece.fact { self.elsewhere(piece, &digest) } else { None };
        if let Some(place) = elsewhere {
            return Part::Has(Segment { filled: true, pages: vec![id], ..Segment::new(&piece.range, place) });
        }
        match &piece.old {
            Some(old) if self.in_place && self.may_write(old) => {
                Part::Has(Segment { filled: false, pages: vec![id], ..old.clone() })
            }
            _ => needs(piece, id),
        }
    }

    /// A place that holds the piece's bytes already.
    fn elsewhere(&mut self, piece: &Piece, digest: &Digest) -> Option<Place> {
        let len = piece.range.end - piece.range.start;
        if let Some(word) = digest.constant() {
            self.report.bytes_constant += len;
            return Some(Place::Constant(word));
        }
        if !self.shares {
            // What is found is lent, and its owner's next pause could not write there again.
            return None;
        }
        let span = self.known.find((digest.low, digest.high), len)?;
        self.report.bytes_shared += len;
        Some(Place::Host(span))
    }

    /// Whether the segment's room can be written to: nobody else reads it, or will find it.
    fn may_write(&self, old: &Segment) -> bool {
        match &old.place {
            Place::Host(span) => self.known.withdraw(span),
            Place::Stored { room, .. } => room.is_rewritable(),
            Place::Constant(_) => false,
        }
    }
}

fn needs(piece: &Piece, id: Option<PageId>) -> Part {
    Part::Needs(piece.range.clone(), vec![id])
}

/// Adds a part, joined to the last one if they can be one.
fn push(parts: &mut Vec<Part>, part: Part, page: u64) {
    let joined = match (parts.last_mut(), &part) {
        (Some(Part::Needs(last, pages)), Part::Needs(next, more))
            if last.end == next.start && next.start.is_multiple_of(page) =>
        {
            last.end = next.end;
            pages.extend(more);
            true
        }
        (Some(Part::Has(last)), Part::Has(next)) => last.join(next, page),
        _ => false,
    };
    if !joined {
        parts.push(part);
    }
}
