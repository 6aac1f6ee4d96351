//! What a pause will save, and room for all of it, found before anything is touched. What [`draft`] says needs new room gets, in host
//! memory, one contiguous range per extent; on disk one file per region, in segments of one copy piece.

use super::draft::{self, Draft, Part, Wanted};
use super::seam::Staging;
use super::{Machine, batch::Batch};
use crate::error::{Error, Result, Status};
use crate::extent::{Chunk, Claim, Truth};
use crate::ranges::Ranges;
use crate::region::Region;
use crate::sync::lock;
use crate::terms::{Backup, Clean, RegionId};
use crate::tier::disk::DiskFile;
use crate::tier::host::HostRange;
use crate::tier::{Place, Segment};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// What is live and less than this far apart is saved in one copy.
pub(super) const SLOT_GAP: u64 = 64 << 10;

impl Machine {
    /// Gives every chunk that is on the device its segments, with room. If that fails, no chunk has any but those that are known to
    /// hold the same bytes.
    pub(super) fn prepare(&self, batch: &Batch, claims: &mut [Claim]) -> Result<Staging> {
        let room = self.make_room(batch, claims).and_then(|()| self.staging(&*claims));
        if room.is_err() {
            super::forget_unproven(claims, |region| batch.is_clean(region));
        }
        room
    }

    fn make_room(&self, batch: &Batch, claims: &mut [Claim]) -> Result<()> {
        let mut drafts = Vec::new();
        for (index, claim) in claims.iter_mut().enumerate() {
            let Some(region) = batch.region(claim.extent.region) else { continue };
            let wanted = want(region, claim);
            let changed = claim.extent.take_changed();
            let draft = match region.policy.clean {
                Clean::No => draft::unproven(claim, &wanted),
                _ => draft::declared(claim, &wanted, &changed, self.settings.page()),
            };
            if region.policy.clean == Clean::No && draft::missing(&draft) > 0 {
                // Room that is not used again makes way for what is.
                claim.chunks.iter_mut().filter(|c| c.truth == Truth::Device).for_each(|c| c.segments.clear());
            }
            drafts.push(Planned { index, region: region.id, draft, changed });
        }
        let done = self.carry_out(batch, claims, &mut drafts);
        if done.is_err() {
            drafts.iter().for_each(|planned| claims[planned.index].extent.note_changed(&planned.changed));
        }
        done
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
                    (Part::Needs(range), Some(room)) => {
                        let len = range.end - range.start;
                        segments.extend(room.segments(range, at, self.settings.copy_piece)?);
                        at += len;
                    }
                    (Part::Needs(_), None) => return Err(too_short()),
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

fn want(region: &Region, claim: &Claim) -> Wanted {
    let mut save = claim.extent.ranges_to_save(region.keeps(), SLOT_GAP);
    claim.dead.iter().for_each(|dead| save.remove(dead));
    let on_device = |chunk: &Chunk| chunk.truth == Truth::Device;
    let part = |chunk: &Chunk| if on_device(chunk) { save.clip(&chunk.range()) } else { Ranges::new() };
    claim.chunks.iter().map(part).collect()
}

/// One claim's draft.
struct Planned {
    index: usize,
    region: RegionId,
    draft: Draft,
    /// Offsets that were known to have changed.
    changed: Ranges,
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
    /// Segments for `range`, `at` bytes into the room; in a file none is longer than `piece`.
    fn segments(&self, range: Range<u64>, at: u64, piece: u64) -> Result<Vec<Segment>> {
        match self {
            Room::Host(room) => {
                let span = room.span(at, range.end - range.start).ok_or_else(too_short)?;
                Ok(vec![Segment::new(&range, Place::Host(span))])
            }
            Room::Disk(file, start) => {
                let each = range.clone().step_by(piece as usize).map(|offset| {
                    let place = Place::Disk { file: Arc::clone(file), at: start + at + offset - range.start, sum: 0 };
                    Segment::new(&(offset..range.end.min(offset + piece)), place)
                });
                Ok(each.collect())
            }
        }
    }
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
