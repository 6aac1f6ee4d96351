//! What a pause will save, and room for all of it, found before anything is touched. What [`draft`] says needs new room gets, in host
//! memory, one contiguous range per extent; in another tier one room per region, in segments of one record.

use super::draft::{self, Draft, Part};
use super::seam::Staging;
use super::survey::Survey;
use super::{Machine, batch::Batch};
use crate::driver::Device;
use crate::error::{Error, Result, Status};
use crate::extent::{Chunk, Claim, Held, Truth};
use crate::ranges::Ranges;
use crate::raw::Span;
use crate::region::Region;
use crate::settings::Settings;
use crate::sync::lock;
use crate::terms::{Backup, Clean, RegionId, Report};
use crate::tier::host::{HostRange, Kind};
use crate::tier::record::{LARGEST_ALIGN, Sum, guarded};
use crate::tier::{PageId, Place, Room, Segment, Tier, page_cuts, repeat};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// What is live and less than this far apart is saved in one copy.
const SLOT_GAP: u64 = 64 << 10;

/// That gap in a region. Where files hold what is live, what lies between would be all that needs host memory.
pub(super) fn slot_gap(region: &Region) -> u64 {
    if region.has_files() { 0 } else { SLOT_GAP }
}

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
        let room = self.make_room(claims, &surveys, report).and_then(|()| self.staging(&*claims));
        if room.is_err() {
            give_up(claims, surveys, batch);
        }
        room
    }

    fn make_room(&self, claims: &mut [Claim], surveys: &[Survey], report: &mut Report) -> Result<()> {
        let mut drafts = Vec::new();
        for survey in surveys {
            let claim = &mut claims[survey.index];
            let draft = draft::draft(survey, claim, &self.pages, self.settings.page(), report);
            if survey.region.judged() == Clean::No && draft::missing(&draft) > 0 {
                // Room that is not used again makes way for what is.
                claim.chunks.iter_mut().filter(|c| c.truth == Truth::Device).for_each(|c| c.segments.clear());
            }
            let kind = self.host_kind(&survey.region, claim.extent.device);
            drafts.push(Planned { index: survey.index, region: survey.region.id, kind, draft });
        }
        self.carry_out(claims, &mut drafts)
    }

    /// As [`Machine::prepare`], for a shadow of chunks that stay the program's. What fails changes nothing.
    pub(super) fn prepare_ahead(&self, shadow: &mut Claim, survey: &Survey, report: &mut Report) -> Result<Staging> {
        let draft = draft::draft(survey, shadow, &self.pages, self.settings.page(), report);
        let kind = self.host_kind(&survey.region, shadow.extent.device);
        let mut planned = Planned { index: 0, region: survey.region.id, kind, draft };
        let claims = std::slice::from_mut(shadow);
        self.carry_out(claims, std::slice::from_mut(&mut planned))?;
        self.staging(&*claims)
    }

    /// Finds room for all drafts, and only then gives the chunks their new segments.
    fn carry_out(&self, claims: &mut [Claim], drafts: &mut [Planned]) -> Result<()> {
        let mut stored = self.rooms(drafts)?;
        let mut spaces = match self.host_spaces(drafts, &stored) {
            Err(error) if error.status == Status::OutOfBackupSpace => {
                // There was less than it seemed: what may go to the disk does.
                let spilled = self.disk_rooms(drafts, &stored);
                let spilled = spilled.map_err(|disk| error.clone().context(disk.message))?;
                if spilled.is_empty() {
                    return Err(error);
                }
                stored.extend(spilled);
                self.host_spaces(drafts, &stored)
            }
            outcome => outcome,
        }?;
        for planned in drafts.iter_mut() {
            let mut space = spaces.remove(&planned.index);
            let space = space.as_mut().or_else(|| stored.get_mut(&planned.region));
            self.settle(&mut claims[planned.index], std::mem::take(&mut planned.draft), space)?;
        }
        Ok(())
    }

    /// The host memory that a region's backups of memory on `device` are to take.
    pub(super) fn host_kind(&self, region: &Region, device: Device) -> Kind {
        let node = self.settings.host_nodes().then(|| self.heap.driver.host_node(device)).flatten();
        Kind { plain: region.policy.pageable, node, ..Kind::default() }
    }

    /// Room in host memory for every draft whose region has none elsewhere.
    fn host_spaces(&self, drafts: &[Planned], stored: &BTreeMap<RegionId, Space>) -> Result<BTreeMap<usize, Space>> {
        let stays = |planned: &&Planned| !stored.contains_key(&planned.region) && planned.missing() > 0;
        let mut kinds: BTreeMap<Kind, Vec<&Planned>> = BTreeMap::new();
        drafts.iter().filter(stays).for_each(|planned| kinds.entry(planned.kind).or_default().push(planned));
        let mut spaces = BTreeMap::new();
        for (kind, in_host) in kinds {
            let lens: Vec<u64> = in_host.iter().map(|planned| planned.missing()).collect();
            let ranges = self.host.reserve_kind(&lens, self.settings.host_limit(), kind)?;
            spaces.extend(in_host.iter().zip(ranges).map(|(planned, range)| (planned.index, Space::Host(range, 0))));
        }
        Ok(spaces)
    }

    /// Bytes of room behind the trait that each region would need.
    fn needs(&self, drafts: &[Planned]) -> BTreeMap<RegionId, u64> {
        let mut needs = BTreeMap::new();
        for planned in drafts {
            *needs.entry(planned.region).or_insert(0) += planned.padded(&self.settings);
        }
        needs.retain(|_, need| *need > 0);
        needs
    }

    /// Room on the disk for automatic backups that have none yet.
    fn disk_rooms(&self, drafts: &[Planned], stored: &BTreeMap<RegionId, Space>) -> Result<BTreeMap<RegionId, Space>> {
        let is_auto = |id| self.regions.get(id).is_ok_and(|region| region.policy.backup == Backup::Auto);
        let wanting = self.needs(drafts).into_iter().filter(|(id, _)| is_auto(*id) && !stored.contains_key(id));
        let disk = self.tiers.of(Backup::Disk)?;
        wanting.map(|(id, need)| Ok((id, Space::Tier(disk.reserve(need)?, 0)))).collect()
    }

    /// Room for each region whose backups go to a tier behind the trait. Where sharing does not work out, host memory does.
    fn rooms(&self, drafts: &[Planned]) -> Result<BTreeMap<RegionId, Space>> {
        let mut rooms = BTreeMap::new();
        let mut taken = 0;
        for (id, need) in self.needs(drafts) {
            let region = self.regions.get(id)?;
            let is_auto = region.policy.backup == Backup::Auto;
            let tier =
                if is_auto { self.choose(&region, need, &mut taken) } else { self.tiers.for_policy(&region.policy) };
            let Some(tier) = tier? else { continue };
            let room = if is_auto { tier.reserve(need) } else { room_for(&region, &*tier, need) };
            match room {
                Err(error) if is_auto || region.policy.backup == Backup::Host => self.heap.notices.add(error.message),
                room => drop(rooms.insert(id, Space::Tier(room?, 0))),
            }
        }
        Ok(rooms)
    }

    /// Gives the chunks of a claim the segments that the draft says, with places in `space` for those that have none.
    fn settle(&self, claim: &mut Claim, draft: Draft, mut space: Option<&mut Space>) -> Result<()> {
        for (chunk, parts) in claim.chunks.iter_mut().zip(draft) {
            let Some(parts) = parts else { continue };
            let mut segments = Vec::with_capacity(parts.len());
            for part in parts {
                match (part, &mut space) {
                    (Part::Has(segment), _) => segments.push(segment),
                    (Part::Needs(range, pages), Some(space)) => {
                        segments.extend(space.segments(&range, pages, &self.settings)?);
                    }
                    (Part::Needs(..), None) => return Err(too_short()),
                }
            }
            chunk.segments = segments;
        }
        Ok(())
    }
}

/// The region's retained room if it is large enough and no chunk's bytes are in it, else new room.
fn room_for(region: &Region, tier: &dyn Tier, need: u64) -> Result<Arc<dyn Room>> {
    // Segments that are to be written anew are gone by now: whoever else holds the room has its bytes there.
    let unused = |room: &Arc<dyn Room>| room.len() >= need && Arc::strong_count(room) == 1;
    let kept = lock(&region.room).take().filter(unused);
    let room = kept.map_or_else(|| guarded(|| tier.reserve(need)), Ok)?;
    if region.policy.retain && room.is_rewritable() {
        *lock(&region.room) = Some(Arc::clone(&room));
    }
    Ok(room)
}

/// One claim's draft.
struct Planned {
    index: usize,
    region: RegionId,
    /// What host memory it would take.
    kind: Kind,
    draft: Draft,
}

impl Planned {
    fn missing(&self) -> u64 {
        draft::missing(&self.draft)
    }

    /// The same in a tier, where each record begins at a multiple of any alignment.
    fn padded(&self, settings: &Settings) -> u64 {
        let all = draft::open(&self.draft).flat_map(|(range, pages)| records(range, !pages.is_empty(), settings));
        all.map(|cut| (cut.end - cut.start).next_multiple_of(LARGEST_ALIGN)).sum()
    }
}

/// New room, and how much of it is taken.
enum Space {
    /// A contiguous range of the arena, for one claim.
    Host(Arc<HostRange>, u64),
    /// Room in a tier, for a region.
    Tier(Arc<dyn Room>, u64),
}

impl Space {
    /// Segments for `range`, with what is known of its pages.
    fn segments(
        &mut self,
        range: &Range<u64>,
        pages: Vec<Option<PageId>>,
        settings: &Settings,
    ) -> Result<Vec<Segment>> {
        match self {
            Space::Host(room, at) => {
                let len = range.end - range.start;
                let span = room.span(*at, len).ok_or_else(too_short)?;
                *at += len;
                Ok(vec![Segment { pages, ..Segment::new(range, Place::Host(span)) }])
            }
            Space::Tier(room, at) => {
                let cuts = records(range, !pages.is_empty(), settings);
                let mut pages = pages.into_iter();
                let each = cuts.into_iter().map(|cut| {
                    let place = Place::Stored { room: Arc::clone(room), at: *at, sum: Sum::default() };
                    *at += (cut.end - cut.start).next_multiple_of(LARGEST_ALIGN);
                    let known = pages.next().into_iter().collect();
                    Segment { pages: known, ..Segment::new(&cut, place) }
                });
                let segments = each.collect();
                if *at <= room.len() { Ok(segments) } else { Err(too_short()) }
            }
        }
    }
}

/// What a range is cut into on its way to a tier: none is longer than a record; of known pages, each is on its own.
pub(super) fn records(range: &Range<u64>, known: bool, settings: &Settings) -> Vec<Range<u64>> {
    if known {
        return page_cuts(range, settings.page()).collect();
    }
    let (end, step) = (range.end, settings.record());
    range.clone().step_by(step as usize).map(|start| start..end.min(start + step)).collect()
}

/// Forgets what a pause that comes to nothing has planned, but neither clean backups nor what is known to have changed.
pub(super) fn give_up(claims: &mut [Claim], surveys: Vec<Survey>, batch: &Batch) {
    surveys.iter().for_each(|survey| claims[survey.index].extent.note_changed(&survey.changed));
    super::forget_unproven(claims, |region| batch.is_clean(region));
}

fn too_short() -> Error {
    Error::new(Status::Internal, "a tier gave less room than was asked for")
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

/// Whether one chunk has bytes of allocations that no segment will save.
pub(super) fn is_discarded(claim: &Claim, chunk: usize) -> bool {
    unsaved_of(&claim.live_ranges(), &claim.chunks[chunk]) > 0
}

fn unsaved(claim: &Claim, truth: Truth) -> u64 {
    let live = claim.live_ranges();
    claim.chunks.iter().filter(|chunk| chunk.truth == truth).map(|chunk| unsaved_of(&live, chunk)).sum()
}

fn unsaved_of(live: &Ranges, chunk: &Chunk) -> u64 {
    let saved = |segment: &Segment| live.clip(&segment.range()).total();
    live.clip(&chunk.range()).total() - chunk.segments.iter().map(saved).sum::<u64>()
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
    /// Before that, what may be shared with other processes is.
    pub(super) fn share(&self, claims: &mut [Claim], chunks: &[(usize, usize)], report: &mut Report) {
        let saved = claims.iter_mut().flat_map(|claim| &mut claim.chunks).flat_map(|chunk| &mut chunk.segments);
        report.bytes_shared += self.tiers.shared.share(saved);
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
        whole.keeper().show();
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
