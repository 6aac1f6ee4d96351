//! What is done with backups while nobody waits for them: compressing what is on the disk, moving what host memory has no room for any
//! more, and bringing it back. Each is the same walk: look at the segments of extents that nobody has claimed, write their bytes to a
//! new place, and put that in the place of the old one, if it still is where they are. No claim is held while bytes
//! move, so a resume that comes meanwhile does not wait; it finds the old place or the new one, and both hold the bytes.
//! Host memory that is being read counts as lent meanwhile, so that no pause writes to it.

use super::{Machine, plan};
use crate::clock;
use crate::error::{Error, Result, Status};
use crate::extent::{Chunk, Extent};
use crate::raw::{Reading, Span};
use crate::region::Region;
use crate::sync::{self, Ordering, lock};
use crate::terms::{Backup, Clean, Compress, State, Tended};
use crate::tier::compress::{self, Rates};
use crate::tier::packed::PackedRoom;
use crate::tier::record::{LARGEST_ALIGN, Record};
use crate::tier::spill::{self, Choice, Facts, Held};
use crate::tier::staging::Buffers;
use crate::tier::{Place, Room, Segment, Tier, memory};
use std::ops::Range;
use std::sync::Arc;

/// Segments from which the worth of compressing a region is judged.
const TRIALS: usize = 8;

/// Filled segments of one extent. While this lives, no pause writes to those that are in host memory.
struct Found {
    extent: Arc<Extent>,
    segments: Vec<Segment>,
    _readings: Vec<Reading>,
}

/// What a few segments have shown: their bytes before and after, and how fast they come back.
struct Trials {
    raw: u64,
    packed: u64,
    rates: Rates,
}

impl Trials {
    /// Room for all segments, a little more than the trials say.
    fn guess(&self, segments: &[&Segment]) -> u64 {
        let share = self.packed as f64 / self.raw as f64 * 1.02;
        let pad = |bytes: f64| (bytes as u64).next_multiple_of(LARGEST_ALIGN) + LARGEST_ALIGN;
        segments.iter().map(|segment| pad(segment.len as f64 * share)).sum()
    }
}

/// What came of compressing all segments.
enum Packing {
    /// Their new places, in room of so many bytes.
    Fits(Vec<Place>, u64),
    /// They need so many bytes of room, which is more than there was.
    Needs(u64),
}

/// A segment, and what takes its place.
type Change = (Segment, Vec<Segment>);

impl Machine {
    /// Does all that is worth doing now. What fails is left as it is.
    pub(crate) fn tend(&self) -> Tended {
        let _alone = lock(&self.tending);
        let mut tended = Tended { bytes_demoted: self.spill(), ..Tended::default() };
        if self.settings.compress() != Compress::No {
            for region in self.regions.all().iter().filter(|region| is_squeezable(region)) {
                let (from, to) = self.squeeze(region).unwrap_or_default();
                tended.bytes_compressed += from;
                tended.bytes_saved += from - to;
            }
        }
        tended
    }

    /// Has a thread of its own do that, if there may be anything to do and none is at it.
    pub(crate) fn tend_later(self: &Arc<Self>) {
        let any = || self.settings.compress() != Compress::No || self.regions.any_automatic();
        let wanted = self.settings.tends() && any();
        if cfg!(feature = "shuttle") || !wanted || self.untended.fetch_add(1, Ordering::AcqRel) > 0 {
            return;
        }
        let machine = Arc::clone(self);
        let started = sync::spawn("sire-tend", move || {
            loop {
                let seen = machine.untended.load(Ordering::Acquire);
                machine.tend();
                if machine.untended.compare_exchange(seen, 0, Ordering::AcqRel, Ordering::Acquire).is_ok() {
                    return;
                }
            }
        });
        if started.is_err() {
            self.untended.store(0, Ordering::Release);
        }
    }

    /// Bytes that host memory has left for backups.
    fn host_left(&self) -> u64 {
        let limit = self.settings.host_limit().map_or(u64::MAX, |limit| limit.saturating_sub(self.host.usage().used));
        limit.min(memory::room().bytes)
    }

    /// The tier behind the trait that takes an automatic backup of `need` bytes; `None`: host memory does. `taken`: bytes of host
    /// memory that the same pause has given away already.
    pub(super) fn choose(&self, region: &Region, need: u64, taken: &mut u64) -> Result<Option<Arc<dyn Tier>>> {
        let may_share = region.policy.clean != Clean::No && self.settings.shares();
        let host_left = self.host_left().saturating_sub(*taken);
        match spill::choose(Facts { need, host_left, may_share }) {
            Choice::Disk => self.tiers.of(Backup::Disk).map(Some),
            choice => {
                *taken += need;
                Ok((choice == Choice::Shared).then(|| Arc::clone(&self.tiers.shared) as Arc<dyn Tier>))
            }
        }
    }

    /// Moves automatic backups out of host memory where that has become scarce; returns how many bytes.
    fn spill(&self) -> u64 {
        let paused = |region: &&Arc<Region>| region.policy.backup == Backup::Auto && region.state() == State::Paused;
        let regions = self.regions.all();
        let held: Vec<Held> = regions.iter().filter(paused).map(|region| self.held(region)).collect();
        let in_use = self.host.usage().used;
        let limit = in_use.saturating_add(memory::room().bytes).min(self.settings.host_limit().unwrap_or(u64::MAX));
        let victims = spill::victims(&held, in_use, limit);
        let mut moved = 0;
        for region in victims.iter().filter_map(|id| self.regions.get(*id).ok()) {
            // What fails stays where it is; what had moved before counts.
            let _ = self.demote(&region, &mut moved);
        }
        if moved > 0 {
            self.host.relax();
        }
        moved
    }

    fn held(&self, region: &Region) -> Held {
        let extents = self.heap.registry.extents(|extent| extent.region == region.id);
        let in_host = |chunk: &Chunk| chunk.segments.iter().filter(|s| is_in_host(s)).map(|s| s.len).sum::<u64>();
        let bytes = extents.iter().filter_map(|extent| extent.chunks(|chunks| chunks.iter().map(in_host).sum::<u64>()));
        Held { region: region.id, bytes: bytes.sum(), used: region.history(|history| history.used) }
    }

    /// Moves a region's backup from host memory to the disk, and counts the bytes in `moved`, also where it fails in the middle.
    fn demote(&self, region: &Region, moved: &mut u64) -> Result<()> {
        let need = self.on_disk(&self.find(region, is_in_host));
        if need == 0 {
            return Ok(());
        }
        let room = self.tiers.of(Backup::Disk)?.reserve(need)?;
        // Looked at anew: making room may take long, and meanwhile nothing is kept from being written to.
        let found = self.find(region, is_in_host);
        if self.on_disk(&found) > need {
            // There was a pause in between. The next time is soon.
            return Ok(());
        }
        let buffer = self.buffer()?;
        let mut at = 0;
        self.rewrite(&found, moved, |segment| {
            let mut parts = Vec::new();
            for cut in self.cuts(segment) {
                let part = segment.part(&cut, self.settings.page()).ok_or_else(too_short)?;
                let (Place::Host(span), len) = (&part.place, part.len) else { return Ok(None) };
                copy(span, &buffer)?;
                let sum = Record { room: Arc::clone(&room), at, len }.save(&buffer)?.sum;
                let place = Place::Stored { room: Arc::clone(&room), at, sum };
                parts.push(Segment { place, ..part });
                at += len.next_multiple_of(LARGEST_ALIGN);
            }
            Ok(Some(parts))
        })
    }

    /// The records that a segment of host memory becomes on the disk. Pages that are known stay so.
    fn cuts(&self, segment: &Segment) -> Vec<Range<u64>> {
        plan::records(&segment.range(), segment.pages.iter().any(Option::is_some), &self.settings)
    }

    /// Bytes of room on the disk for what was found.
    fn on_disk(&self, found: &[Found]) -> u64 {
        let padded = |cut: Range<u64>| (cut.end - cut.start).next_multiple_of(LARGEST_ALIGN);
        let segments = found.iter().flat_map(|found| &found.segments);
        segments.flat_map(|segment| self.cuts(segment)).map(padded).sum()
    }

    /// Brings the automatic backups of paused regions back into host memory, as far as there is room; returns how many bytes. What processes share is there
    /// already.
    ///
    /// # Errors
    /// `BackupIo` if one cannot be read: it stays where it is. The message says how many bytes had come back.
    pub(crate) fn promote(&self, regions: &[Arc<Region>]) -> Result<u64> {
        let mut moved = 0;
        for region in regions.iter().filter(|region| region.policy.backup == Backup::Auto) {
            self.promote_one(region, &mut moved).map_err(|error| match moved {
                0 => error,
                _ => error.context(format!("{moved} bytes came back into host memory, the rest did not")),
            })?;
        }
        Ok(moved)
    }

    /// Brings one region's backup back, and counts the bytes in `moved`, also where it fails in the middle.
    fn promote_one(&self, region: &Region, moved: &mut u64) -> Result<()> {
        let found = self.find(region, is_elsewhere);
        let segments = found.iter().flat_map(|found| &found.segments);
        let need: u64 = segments.map(|segment| segment.len).sum();
        if need == 0 || need > self.host_left() {
            return Ok(());
        }
        let kind = found.first().map(|found| self.host_kind(region, found.extent.device)).unwrap_or_default();
        let ranges = self.host.reserve_kind(&[need], self.settings.host_limit(), kind)?;
        let whole = ranges.first().and_then(|range| range.span(0, need)).ok_or_else(too_short)?;
        whole.bring_in()?;
        let buffer = self.buffer()?;
        let mut at = 0;
        self.rewrite(&found, moved, |segment| {
            let Some((record, sum)) = segment.place.record(segment.len) else { return Ok(None) };
            let span = whole.part(at, segment.len).ok_or_else(too_short)?;
            copy(&record.load(&buffer, Some(sum))?.bytes, &span)?;
            at += segment.len;
            Ok(Some(vec![Segment { place: Place::Host(span), ..segment.clone() }]))
        })
    }

    /// Compresses what a region has on the disk, if that pays; returns the bytes before and after.
    fn squeeze(&self, region: &Region) -> Result<(u64, u64)> {
        let found = self.find(region, is_plain);
        let segments: Vec<&Segment> = found.iter().flat_map(|found| &found.segments).collect();
        let raw: u64 = segments.iter().map(|segment| segment.len).sum();
        let seen = (region.history(|history| history.pauses), raw);
        if raw == 0 || region.history(|history| history.misjudged) == Some(seen) {
            return Ok((0, 0));
        }
        let buffer = self.buffer()?;
        let trials = self.try_some(&segments, &buffer)?;
        if !self.is_worth(trials.raw, trials.packed, trials.rates) {
            return Ok((0, 0));
        }
        let mut packing = self.pack(&segments, trials.guess(&segments), &buffer)?;
        if let Packing::Needs(bytes) = packing {
            // The trials said too little. Now it is known; whatever comes of that, this backup is not compressed a third time.
            region.history(|history| history.misjudged = Some(seen));
            if self.is_worth(raw, bytes, trials.rates) {
                packing = self.pack(&segments, bytes, &buffer)?;
            }
        }
        let Packing::Fits(places, need) = packing else { return Ok((0, 0)) };
        let (mut places, mut moved) = (places.into_iter(), 0);
        self.rewrite(&found, &mut moved, |segment| {
            Ok(places.next().map(|place| vec![Segment { place, ..segment.clone() }]))
        })?;
        // Room that was retained for the next backup holds nothing any more.
        drop(lock(&region.room).take());
        Ok((moved, need.min(moved)))
    }

    /// Compresses all segments into new room of `need` bytes. What does not fit is only measured: room that keeps one record keeps all of itself.
    fn pack(&self, segments: &[&Segment], need: u64, buffer: &Span) -> Result<Packing> {
        let mut room = PackedRoom::new(self.tiers.of(Backup::Disk)?.reserve(need)?);
        let (mut kept, mut needs) = (Vec::with_capacity(segments.len()), 0);
        for segment in segments {
            let (record, sum) = segment.place.record(segment.len).ok_or_else(too_short)?;
            let bytes = record.load(buffer, Some(sum))?.bytes;
            let frame = bytes.read(|bytes| compress::pack(bytes).unwrap_or_else(|| compress::keep(bytes)));
            needs += (frame.len() as u64).next_multiple_of(LARGEST_ALIGN);
            if needs <= need {
                kept.push((room.add(&frame, segment.len)?.ok_or_else(too_short)?, sum));
            }
        }
        if needs > need {
            return Ok(Packing::Needs(needs));
        }
        let room: Arc<dyn Room> = Arc::new(room);
        let places = kept.into_iter().map(|(at, sum)| Place::Stored { room: Arc::clone(&room), at, sum });
        Ok(Packing::Fits(places.collect(), need))
    }

    /// Compresses a few of the segments, and keeps nothing of that.
    fn try_some(&self, segments: &[&Segment], buffer: &Span) -> Result<Trials> {
        let step = segments.len().div_ceil(TRIALS).max(1);
        let (mut raw, mut packed, mut reading, mut unpacking) = (0, 0, 0.0, 0.0);
        for segment in segments.iter().step_by(step) {
            let Some((record, sum)) = segment.place.record(segment.len) else { continue };
            let start = clock::now();
            let bytes = record.load(buffer, Some(sum))?.bytes;
            reading += clock::seconds_since(start);
            let mut back = vec![0; segment.len as usize];
            let Some(frame) = bytes.read(compress::pack) else {
                (raw, packed) = (raw + segment.len, packed + segment.len);
                continue;
            };
            let start = clock::now();
            compress::unpack(&frame, &mut back)?;
            unpacking += clock::seconds_since(start);
            if !bytes.read(|bytes| bytes == back) {
                return Err(Error::new(
                    Status::Internal,
                    "compressed bytes did not come back; the backup stays as it is",
                ));
            }
            (raw, packed) = (raw + segment.len, packed + (frame.len() as u64).next_multiple_of(LARGEST_ALIGN));
        }
        let threads = std::thread::available_parallelism().map_or(1.0, |threads| threads.get() as f64);
        let rates =
            Rates { read: raw as f64 / reading.max(1e-9), unpack: raw as f64 / f64::max(unpacking, 1e-9), threads };
        Ok(Trials { raw, packed, rates })
    }

    /// Whether keeping `packed` instead of `raw` bytes is wanted.
    fn is_worth(&self, raw: u64, packed: u64, rates: Rates) -> bool {
        match self.settings.compress() {
            Compress::No => false,
            Compress::Always => packed < raw,
            Compress::IfItPays => compress::pays(raw, packed, rates),
        }
    }

    /// The filled segments of a region that `wanted` says, where nobody is at work.
    fn find(&self, region: &Region, wanted: impl Fn(&Segment) -> bool) -> Vec<Found> {
        let extents = self.heap.registry.extents(|extent| extent.region == region.id);
        let look = |chunks: &[Chunk]| {
            let segments = chunks.iter().flat_map(|chunk| &chunk.segments);
            let wanted = segments.filter(|segment| segment.filled && wanted(segment)).cloned();
            // Here and now: whoever claims the extent next looks whether somebody reads.
            wanted.map(|segment| (segment.reading(), segment)).unzip::<_, _, Vec<_>, Vec<Segment>>()
        };
        let found = extents.into_iter().filter_map(|extent| {
            let (readings, segments) = extent.chunks(look)?;
            Some(Found { extent, segments, _readings: readings.into_iter().flatten().collect() })
        });
        found.filter(|found| !found.segments.is_empty()).collect()
    }

    /// Puts what `write` makes of each segment in its place, extent by extent, and adds the bytes that moved to `moved`. Where it fails, the extents
    /// before have moved.
    fn rewrite(
        &self,
        found: &[Found],
        moved: &mut u64,
        mut write: impl FnMut(&Segment) -> Result<Option<Vec<Segment>>>,
    ) -> Result<()> {
        for Found { extent, segments, .. } in found {
            let mut changes = Vec::with_capacity(segments.len());
            for segment in segments {
                changes.extend(write(segment)?.map(|parts| (segment.clone(), parts)));
            }
            *moved += self.replace(extent, changes);
        }
        Ok(())
    }

    /// Puts new segments in the place of old ones that are still there; returns their bytes.
    fn replace(&self, extent: &Arc<Extent>, changes: Vec<Change>) -> u64 {
        let Some(mut claim) = extent.claim() else { return 0 };
        let mut moved = 0;
        for (old, new) in changes {
            let holds = |segment: &Segment| segment.filled && segment.is_same(&old);
            let chunk = claim.chunks.iter_mut().find(|chunk| chunk.range().contains(&old.offset));
            let Some(chunk) = chunk else { continue };
            if let Some(index) = chunk.segments.iter().position(holds) {
                chunk.segments.splice(index..=index, new);
                moved += old.len;
            }
        }
        self.heap.put_back(claim);
        moved
    }

    /// One staging buffer.
    fn buffer(&self) -> Result<Span> {
        Buffers::new(&self.host, 1, self.settings.staged())?.take().ok_or_else(too_short)
    }
}

fn is_in_host(segment: &Segment) -> bool {
    matches!(segment.place, Place::Host(_))
}

/// Whether it is in a tier that is not host memory: what processes share there is in place, and a copy would be this one's alone.
fn is_elsewhere(segment: &Segment) -> bool {
    matches!(&segment.place, Place::Stored { room, .. } if !room.is_in_memory())
}

/// Whether it is in a tier as it was written.
fn is_plain(segment: &Segment) -> bool {
    matches!(&segment.place, Place::Stored { room, .. } if room.is_rewritable())
}

/// Room that the next pause would write to again is not worth the work.
fn is_squeezable(region: &Arc<Region>) -> bool {
    let on_disk = matches!(region.policy.backup, Backup::Disk | Backup::Auto);
    on_disk && region.state() == State::Paused && !(region.policy.retain && region.policy.clean == Clean::No)
}

/// Copies all of `from` to the start of `to`.
fn copy(from: &Span, to: &Span) -> Result<()> {
    let to = to.part(0, from.len()).ok_or_else(too_short)?;
    from.read(|bytes| to.write(|to| to.copy_from_slice(bytes)));
    Ok(())
}

fn too_short() -> Error {
    Error::new(Status::Internal, "a backup that moves does not fit its buffer")
}
