//! What a pause will save, and room for all of it, found before anything is touched. What [`draft`] says needs new room gets, in host
//! memory, one contiguous range per extent; on disk one file per region, in segments of one copy piece.

use super::draft::{self, Draft, Part};
use super::seam::Staging;
use super::survey::Survey;
use super::{Machine, batch::Batch};
use crate::error::{Error, Result, Status};
use crate::extent::{Chunk, Claim, Held, Truth};
use crate::raw::Span;
use crate::region::Region;
use crate::settings::Settings;
use crate::sync::lock;
use crate::terms::{Backup, Clean, RegionId, Report};
use crate::tier::disk::DiskFile;
use crate::tier::host::HostRange;
use crate::tier::{PageId, Place, Segment, page_cuts, repeat};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// What is live and less than this far apart is saved in one copy.
pub(super) const SLOT_GAP: u64 = 64 << 10;

impl Machine {
    /// Gives every chunk that is on the device its segments, with room, after what the surveys found. If that fails, no chunk has any but
    /// those that are known to hold the same bytes.
    pub(super) fn prepare(
        &self,
        batch: &Batch,
        claims: &mut [Claim],
        surveys: Vec<Survey>,
        report: &mut Report,
    ) -> Result<Staging> {
        let room = self.make_room(batch, claims, &surveys, report).and_then(|()| self.staging(&*claims));
        if room.is_err() {
            give_up(claims, surveys, batch);
        }
        room
    }

    fn make_room(&self, batch: &Batch, claims: &mut [Claim], surveys: &[Survey], report: &mut Report) -> Result<()> {
        let mut drafts = Vec::new();
        for survey in surveys {
            let claim = &mut claims[survey.index];
            let draft = draft::draft(survey, claim, &self.pages, self.settings.page(), report);
            if survey.region.policy.clean == Clean::No && draft::missing(&draft) > 0 {
                // Room that is not used again makes way for what is.
                claim.chunks.iter_mut().filter(|c| c.truth == Truth::Device).for_each(|c| c.segments.clear());
            }
            drafts.push(Planned { index: survey.index, region: survey.region.id, draft });
        }
        self.carry_out(batch, claims, &mut drafts)
    }

    /// Finds room for all drafts, and only then gives the chunks their new segments.
    fn carry_out(&self, batch: &Batch, claims: &mut [Claim], drafts: &mut [Planned]) -> Result<()> {
        let on_disk =
            |planned: &&Planned| batch.region(planned.region).is_some_and(|r| r.policy.backup == Backup::Disk);
        let in_host: Vec<&Planned> =
            drafts.iter().filter(|planned| !on_disk(planned) && planned.missing() > 0).collect();
        let lens: Vec<u64> = in_host.iter().map(|planned| planned.missing()).collect();
        let ranges = self.host.reserve(&lens, self.settings.host_limit())?;
        let mut rooms: BTreeMap<usize, Room> = BTreeMap::new();
        in_host.iter().zip(ranges).for_each(|(planned, range)| drop(rooms.insert(planned.index, Room::Host(range))));
        let mut needs: BTreeMap<RegionId, u64> = BTreeMap::new();
        drafts
            .iter()
            .filter(on_disk)
            .for_each(|planned| *needs.entry(planned.region).or_default() += planned.missing());
        let mut files = BTreeMap::new();
        for (id, need) in needs.into_iter().filter(|(_, need)| *need > 0) {
            if let Some(region) = batch.region(id) {
                files.insert(id, (self.file_for(region, need)?, 0));
            }
        }
        for planned in drafts.iter_mut() {
            let room = rooms.remove(&planned.index).or_else(|| {
                let (file, at) = files.get_mut(&planned.region)?;
                let start = *at;
                *at += planned.missing();
                Some(Room::Disk(Arc::clone(file), start))
            });
            self.settle(&mut claims[planned.index], std::mem::take(&mut planned.draft), room)?;
        }
        Ok(())
    }

    /// Gives the chunks of a claim the segments that the draft says, with places in `room` for those that have none.
    fn settle(&self, claim: &mut Claim, draft: Draft, room: Option<Room>) -> Result<()> {
        let mut at = 0;
        for (chunk, parts) in claim.chunks.iter_mut().zip(draft) {
            let Some(parts) = parts else { continue };
            let mut segments = Vec::with_capacity(parts.len());
            for part in parts {
                match (part, &room) {
                    (Part::Has(segment), _) => segments.push(segment),
                    (Part::Needs(range, pages), Some(room)) => {
                        let len = range.end - range.start;
                        segments.extend(room.segments(range, pages, at, &self.settings)?);
                        at += len;
                    }
                    (Part::Needs(..), None) => return Err(too_short()),
                }
            }
            chunk.segments = segments;
        }
        Ok(())
    }

    /// The region's retained file if it is large enough and no chunk's bytes are in it, else a new one.
    fn file_for(&self, region: &Region, need: u64) -> Result<Arc<DiskFile>> {
        // Segments of chunks on the device are gone by now: whoever else holds the file has its bytes there.
        let unused = |file: &Arc<DiskFile>| file.len() >= need && Arc::strong_count(file) == 1;
        let kept = lock(&region.file).take().filter(unused);
        let file = match kept {
            Some(file) => file,
            None => self.disk.create(self.settings.disk_dir().as_deref(), need)?,
        };
        if region.policy.retain {
            *lock(&region.file) = Some(Arc::clone(&file));
        }
        Ok(file)
    }
}

/// One claim's draft.
struct Planned {
    index: usize,
    region: RegionId,
    draft: Draft,
}

impl Planned {
    fn missing(&self) -> u64 {
        draft::missing(&self.draft)
    }
}

/// New room for one claim.
enum Room {
    /// A contiguous range of the arena.
    Host(Arc<HostRange>),
    /// A file, from an offset on.
    Disk(Arc<DiskFile>, u64),
}

impl Room {
    /// Segments for `range`, `at` bytes into the room, with what is known of its pages. In a file none is longer than a copy piece; of known
    /// pages, each has one of its own.
    fn segments(
        &self,
        range: Range<u64>,
        pages: Vec<Option<PageId>>,
        at: u64,
        settings: &Settings,
    ) -> Result<Vec<Segment>> {
        match self {
            Room::Host(room) => {
                let span = room.span(at, range.end - range.start).ok_or_else(too_short)?;
                Ok(vec![Segment { pages, ..Segment::new(&range, Place::Host(span)) }])
            }
            Room::Disk(file, start) => {
                let place = |cut: &Range<u64>| Place::Disk {
                    file: Arc::clone(file),
                    at: start + at + cut.start - range.start,
                    sum: 0,
                };
                if pages.is_empty() {
                    let cuts = range.clone().step_by(settings.copy_piece as usize);
                    let cuts = cuts.map(|offset| offset..range.end.min(offset + settings.copy_piece));
                    return Ok(cuts.map(|cut| Segment::new(&cut, place(&cut))).collect());
                }
                let cuts = page_cuts(&range, settings.page()).zip(pages);
                Ok(cuts.map(|(cut, id)| Segment { pages: vec![id], ..Segment::new(&cut, place(&cut)) }).collect())
            }
        }
    }
}

/// Forgets what a pause that comes to nothing has planned, but neither clean backups nor what is known to have changed.
pub(super) fn give_up(claims: &mut [Claim], surveys: Vec<Survey>, batch: &Batch) {
    surveys.iter().for_each(|survey| claims[survey.index].extent.note_changed(&survey.changed));
    super::forget_unproven(claims, |region| batch.is_clean(region));
}

fn too_short() -> Error {
    Error::new(Status::Internal, "the host arena gave less room than was asked for")
}

/// Bytes of allocations on the device that no segment of the claim will save.
pub(super) fn discarded(claim: &Claim) -> u64 {
    unsaved(claim, Truth::Device)
}

/// Bytes on the device whose backup holds them already.
pub(super) fn clean(claim: &Claim) -> u64 {
    to_save(claim).filter(|segment| segment.filled).map(|segment| segment.len).sum()
}

/// Bytes on the device that are to be copied.
pub(super) fn pending(claim: &Claim) -> u64 {
    to_save(claim).filter(|segment| !segment.filled).map(|segment| segment.len).sum()
}

fn to_save(claim: &Claim) -> impl Iterator<Item = &Segment> {
    claim.chunks.iter().filter(|chunk| chunk.truth == Truth::Device).flat_map(|chunk| &chunk.segments)
}

/// Bytes of allocations that were on the device, and are gone for good.
pub(super) fn lost(claim: &Claim) -> u64 {
    unsaved(claim, Truth::Backup)
}

fn unsaved(claim: &Claim, truth: Truth) -> u64 {
    let live = claim.live_ranges();
    let lost = |chunk: &Chunk| {
        let saved = |segment: &Segment| live.clip(&segment.range()).total();
        live.clip(&chunk.range()).total() - chunk.segments.iter().map(saved).sum::<u64>()
    };
    claim.chunks.iter().filter(|chunk| chunk.truth == truth).map(lost).sum()
}

impl Machine {
    /// Chunks that get new content in this pause, and know its pages.
    pub(super) fn unshared(claims: &[Claim]) -> Vec<(usize, usize)> {
        let is_new = |segment: &Segment| !segment.filled && segment.pages.iter().any(Option::is_some);
        let claims = claims.iter().enumerate();
        let each = claims.flat_map(|(i, claim)| claim.chunks.iter().enumerate().map(move |(j, chunk)| ((i, j), chunk)));
        each.filter(|(_, chunk)| chunk.segments.iter().any(is_new)).map(|(at, _)| at).collect()
    }

    /// Makes the pages of these chunks findable. A page that another backup has as well (both were made by the same pause) is kept once.
    pub(super) fn share(&self, claims: &mut [Claim], chunks: &[(usize, usize)], report: &mut Report) {
        let page = self.settings.page();
        for &(claim, chunk) in chunks {
            let mut shared: Vec<Segment> = Vec::new();
            for segment in std::mem::take(&mut claims[claim].chunks[chunk].segments) {
                for part in self.shared_parts(segment, report) {
                    if !shared.last_mut().is_some_and(|last| last.join(&part, page)) {
                        shared.push(part);
                    }
                }
            }
            claims[claim].chunks[chunk].segments = shared;
        }
    }

    /// A copy of a backup in one piece of host memory.
    pub(crate) fn assemble(&self, parts: &[Held], len: u64) -> Result<Span> {
        let room = self.host.reserve(&[len], self.settings.host_limit())?;
        let whole = room.first().and_then(|range| range.span(0, len)).ok_or_else(too_short)?;
        whole.bring_in()?;
        let mut at = 0;
        for part in parts {
            let len = match part {
                Held::Span(span) => span.len(),
                Held::Repeated(_, len) => *len,
            };
            let to = whole.part(at, len).ok_or_else(too_short)?;
            to.write(|to| match part {
                Held::Span(span) => span.read(|bytes| to.copy_from_slice(bytes)),
                Held::Repeated(word, _) => repeat(*word, to),
            });
            at += len;
        }
        Ok(whole)
    }

    fn shared_parts(&self, segment: Segment, report: &mut Report) -> Vec<Segment> {
        let page = self.settings.page();
        if !segment.filled || !matches!(segment.place, Place::Host(_)) || segment.pages.iter().all(Option::is_none) {
            return vec![segment];
        }
        let parts = page_cuts(&segment.range(), page).filter_map(|cut| segment.part(&cut, page));
        let parts = parts.map(|mut part| {
            if let (Place::Host(span), Some(&Some(id))) = (&part.place, part.pages.first()) {
                self.pages.insert(id, span);
                if let Some(other) = self.pages.find_other(id, span) {
                    report.bytes_shared += part.len;
                    part.place = Place::Host(other);
                }
            }
            part
        });
        parts.collect()
    }
}
