//! What a pause will save, and room for all of it, found before anything is touched. Host backups get one
//! contiguous range per extent; disk backups one file per region, in segments of one copy piece.

use super::{Machine, batch::Batch};
use crate::error::{Error, Result, Status};
use crate::extent::{Chunk, Claim, Truth};
use crate::ranges::Ranges;
use crate::raw::Span;
use crate::region::Region;
use crate::sync::lock;
use crate::terms::{Backup, RegionId};
use crate::tier::disk::DiskFile;
use crate::tier::host::HostRange;
use crate::tier::{Place, Segment};
use crate::transfer::IN_FLIGHT;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Live slots of a slab that are less than this far apart are saved in one copy.
const SLOT_GAP: u64 = 64 << 10;

/// What each chunk of a claim is to save.
type Wanted = Vec<Ranges>;

impl Machine {
    /// Gives every chunk that is on the device its segments, with room. If that fails, no chunk has any.
    pub(super) fn prepare(&self, batch: &Batch, claims: &mut [Claim]) -> Result<Vec<Span>> {
        let room = self.make_room(batch, claims).and_then(|()| self.staging(claims));
        if room.is_err() {
            super::forget_backups(claims, |_| false);
        }
        room
    }

    fn make_room(&self, batch: &Batch, claims: &mut [Claim]) -> Result<()> {
        let mut in_host = Vec::new();
        let mut on_disk: BTreeMap<RegionId, Vec<(usize, Wanted)>> = BTreeMap::new();
        for (index, claim) in claims.iter_mut().enumerate() {
            let Some(region) = batch.region(claim.extent.region) else { continue };
            let wanted = want(region, claim);
            if is_reusable(claim, &wanted) {
                continue;
            }
            claim.chunks.iter_mut().filter(|c| c.truth == Truth::Device).for_each(|c| c.segments.clear());
            match region.policy.backup {
                _ if total(&wanted) == 0 => {}
                Backup::Disk => on_disk.entry(region.id).or_default().push((index, wanted)),
                Backup::None | Backup::Host => in_host.push((index, wanted)),
            }
        }
        let lens: Vec<u64> = in_host.iter().map(|(_, wanted)| total(wanted)).collect();
        let ranges = self.host.reserve(&lens, self.settings.host_limit())?;
        for ((index, wanted), range) in in_host.iter().zip(&ranges) {
            place_in_host(&mut claims[*index], wanted, range)?;
        }
        for (id, list) in on_disk {
            let need = list.iter().map(|(_, wanted)| total(wanted)).sum();
            if let Some(region) = batch.region(id) {
                self.place_on_disk(claims, &list, &self.file_for(region, need)?);
            }
        }
        Ok(())
    }

    fn place_on_disk(&self, claims: &mut [Claim], list: &[(usize, Wanted)], file: &Arc<DiskFile>) {
        let mut at = 0;
        for (index, wanted) in list {
            for (chunk, ranges) in claims[*index].chunks.iter_mut().zip(wanted) {
                for range in ranges.iter() {
                    for offset in range.clone().step_by(self.settings.copy_piece as usize) {
                        let len = self.settings.copy_piece.min(range.end - offset);
                        let place = Place::Disk { file: Arc::clone(file), at, sum: 0 };
                        chunk.segments.push(Segment { offset, len, place });
                        at += len;
                    }
                }
            }
        }
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

    /// Two buffers of one copy piece if any segment is on disk.
    pub(super) fn staging(&self, claims: &[Claim]) -> Result<Vec<Span>> {
        let mut segments = claims.iter().flat_map(|claim| &claim.chunks).flat_map(|chunk| &chunk.segments);
        if !segments.any(|segment| matches!(segment.place, Place::Disk { .. })) {
            return Ok(Vec::new());
        }
        let piece = self.settings.copy_piece;
        // The limit is for backups; two staging buffers are not counted against it.
        let ranges = self.host.reserve(&[piece; IN_FLIGHT], None)?;
        ranges.iter().map(|range| range.span(0, piece).ok_or_else(too_short)).collect()
    }
}

fn want(region: &Region, claim: &Claim) -> Wanted {
    let save = claim.extent.ranges_to_save(region.keeps(), SLOT_GAP);
    let on_device = |chunk: &Chunk| chunk.truth == Truth::Device;
    let part = |chunk: &Chunk| if on_device(chunk) { save.clip(&chunk.range()) } else { Ranges::new() };
    claim.chunks.iter().map(part).collect()
}

fn total(wanted: &Wanted) -> u64 {
    wanted.iter().map(Ranges::total).sum()
}

/// Whether retained host segments have exactly the wanted shape, and nobody else may be reading them.
fn is_reusable(claim: &Claim, wanted: &Wanted) -> bool {
    let fits = |chunk: &Chunk, ranges: &Ranges| {
        let same = chunk.segments.iter().map(Segment::range).eq(ranges.iter().cloned());
        let free = |segment: &Segment| matches!(&segment.place, Place::Host(span) if !span.keeper().is_lent());
        chunk.truth == Truth::Device && same && chunk.segments.iter().all(free)
    };
    total(wanted) > 0 && claim.chunks.iter().zip(wanted).all(|(chunk, ranges)| fits(chunk, ranges))
}

fn place_in_host(claim: &mut Claim, wanted: &Wanted, room: &Arc<HostRange>) -> Result<()> {
    let mut at = 0;
    for (chunk, ranges) in claim.chunks.iter_mut().zip(wanted) {
        for range in ranges.iter() {
            let len = range.end - range.start;
            let span = room.span(at, len).ok_or_else(too_short)?;
            chunk.segments.push(Segment { offset: range.start, len, place: Place::Host(span) });
            at += len;
        }
    }
    Ok(())
}

fn too_short() -> Error {
    Error::new(Status::Internal, "the host arena gave less room than was asked for")
}

/// Bytes of allocations on the device that no segment of the claim will save.
pub(super) fn discarded(claim: &Claim) -> u64 {
    unsaved(claim, Truth::Device)
}

/// Bytes of allocations that were on the device, and are gone for good.
pub(super) fn lost(claim: &Claim) -> u64 {
    unsaved(claim, Truth::Backup)
}

fn unsaved(claim: &Claim, truth: Truth) -> u64 {
    let live = claim.extent.live_ranges();
    let lost = |chunk: &Chunk| {
        let saved = |segment: &Segment| live.clip(&segment.range()).total();
        live.clip(&chunk.range()).total() - chunk.segments.iter().map(saved).sum::<u64>()
    };
    claim.chunks.iter().filter(|chunk| chunk.truth == truth).map(lost).sum()
}
