//! The pass that gives chunks their memory back: all physical memory is made and mapped first, then backups are copied
//! in, and only when everything has arrived do the chunks count as being on the device. Until then
//! every backup stays, so that any failure is answered by releasing what is new.

use super::{Call, Machine};
use crate::clock;
use crate::driver::{Addr, Device, Physical};
use crate::error::{Error, Result, Status};
use crate::extent::{Chunk, Claim, Truth};
use crate::heap::{doing, is_shortage};
use crate::ranges::Ranges;
use crate::raw::Span;
use crate::terms::{RegionId, Report};
use crate::tier::{Place, Segment};
use crate::transfer::Pipe;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// The first and the longest sleep while waiting for memory.
const SLEEP: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(50));

/// A failure, and whether it is known that no copy is under way any more.
struct Failure {
    error: Error,
    drained: bool,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure { error, drained: true }
    }
}

impl Machine {
    /// Brings every chunk of the `wanted` regions whose bytes are in a backup back to the device: all of them, or none.
    pub(super) fn pick_up(
        &self,
        claims: &mut [Claim],
        wanted: impl Fn(RegionId) -> bool,
        call: &Call,
        report: &mut Report,
    ) -> Result<()> {
        let away = |claim: &Claim| claim.chunks.iter().any(is_away) && wanted(claim.extent.region);
        if !claims.iter().any(away) {
            return Ok(());
        }
        let staging = self.staging(claims)?;
        let claims: Vec<&mut Claim> = claims.iter_mut().filter(|claim| away(claim)).collect();
        let mut pass = Pass { machine: self, claims, staging, call, report };
        pass.report.seconds_prepare = clock::seconds_since(call.began);
        let start = clock::now();
        let outcome = pass.acquire().map_err(Failure::from).and_then(|()| pass.restore());
        pass.report.seconds_transfer = clock::seconds_since(start);
        match outcome {
            Ok(()) => pass.commit(),
            Err(Failure { error, drained }) => {
                if drained {
                    pass.roll_back();
                }
                return Err(error);
            }
        }
        Ok(())
    }
}

fn is_away(chunk: &Chunk) -> bool {
    chunk.truth == Truth::Backup
}

/// One pass.
struct Pass<'a> {
    machine: &'a Machine,
    claims: Vec<&'a mut Claim>,
    staging: Vec<Span>,
    call: &'a Call,
    report: &'a mut Report,
}

impl Pass<'_> {
    /// Makes and maps all memory, or holds none: a call that waits must not keep from others what they wait for. If there is
    /// not enough, what is only cached is given back; then the call's patience is used up.
    fn acquire(&mut self) -> Result<()> {
        let mut sleep = SLEEP.0;
        let mut reclaimed = false;
        loop {
            let error = match self.take_all() {
                Err(error) if is_shortage(&error) => error,
                other => return other,
            };
            self.roll_back();
            if !std::mem::replace(&mut reclaimed, true) {
                self.machine.heap.reclaim(false);
            } else if self.call.patience().is_zero() {
                return Err(self.explain(error));
            } else {
                self.await_room(&mut sleep)?;
            }
        }
    }

    fn take_all(&mut self) -> Result<()> {
        let (machine, call) = (self.machine, self.call);
        self.report.bytes_moved = 0;
        for claim in &mut self.claims {
            let Claim { extent, chunks, .. } = &mut **claim;
            for chunk in chunks.iter_mut().filter(|chunk| is_away(chunk)) {
                call.check_cancelled(machine)?;
                if extent.is_freed() {
                    break;
                }
                if chunk.physical.is_none() {
                    chunk.physical = Some(machine.create_for(call, extent.device, chunk.size)?);
                    self.report.bytes_moved += chunk.size;
                }
                machine.heap.map(extent.base, chunk)?;
            }
            machine.heap.set_access(claim)?;
        }
        Ok(())
    }

    /// Waits until every device seems to have room for what is missing there, or the call's patience is used up.
    fn await_room(&self, sleep: &mut Duration) -> Result<()> {
        loop {
            self.call.check_cancelled(self.machine)?;
            let left = self.call.patience();
            if left.is_zero() {
                return Ok(());
            }
            clock::sleep(left.min(*sleep));
            *sleep = (*sleep * 2).min(SLEEP.1);
            if self.missing().iter().all(|(&device, &bytes)| self.has_room(device, bytes)) {
                return Ok(());
            }
        }
    }

    /// Physical bytes that are still to be made, by device.
    fn missing(&self) -> BTreeMap<Device, u64> {
        let mut missing = BTreeMap::new();
        for claim in self.claims.iter().filter(|claim| !claim.extent.is_freed()) {
            let away = claim.chunks.iter().filter(|chunk| is_away(chunk) && chunk.physical.is_none());
            *missing.entry(claim.extent.device).or_insert(0) += away.map(|chunk| chunk.size).sum::<u64>();
        }
        missing
    }

    /// A driver that does not say counts as having room: the attempt will show.
    fn has_room(&self, device: Device, bytes: u64) -> bool {
        let needed = bytes.saturating_add(self.machine.settings.margin());
        self.machine.heap.driver.memory_info(device).map_or(true, |info| info.free >= needed)
    }

    /// Names the device that is short, what all regions need there, and what it has now that nothing of theirs is on it.
    fn explain(&self, error: Error) -> Error {
        let missing = self.missing();
        let short =
            missing.iter().find(|&(&device, &bytes)| !self.has_room(device, bytes)).or(missing.first_key_value());
        let Some((&device, &bytes)) = short else { return error };
        let there = self.claims.iter().filter(|claim| claim.extent.device == device);
        let ids: BTreeSet<RegionId> = there.map(|claim| claim.extent.region).collect();
        let Some(Ok(first)) = ids.first().map(|&id| self.machine.regions.get(id)) else { return error };
        let doing = match ids.len() - 1 {
            0 => doing("bring back", &first),
            others => format!("{} and {others} more", doing("bring back", &first)),
        };
        self.machine.heap.short_of(device, bytes, &doing)
    }

    /// Copies all backups in.
    fn restore(&mut self) -> std::result::Result<(), Failure> {
        let devices: BTreeSet<Device> = self.claims.iter().map(|claim| claim.extent.device).collect();
        for device in devices {
            let machine = self.machine;
            let mut pipe = Pipe::new(&*machine.heap.driver, machine.lanes.take(device)?);
            let sent = self.send_device(&mut pipe, device);
            let drained = pipe.drain(&machine.lanes);
            let is_drained = drained.is_ok();
            sent.and(drained.map_err(Error::from)).map_err(|error| Failure { error, drained: is_drained })?;
        }
        Ok(())
    }

    fn send_device(&mut self, pipe: &mut Pipe<'_, ()>, device: Device) -> Result<()> {
        let Pass { machine, claims, staging, call, report } = self;
        for claim in claims.iter().filter(|claim| claim.extent.device == device) {
            let zero_fill = machine.regions.get(claim.extent.region)?.policy.zero_fill;
            for chunk in claim.chunks.iter().filter(|chunk| is_away(chunk) && chunk.mapped) {
                call.check_cancelled(machine)?;
                if zero_fill {
                    report.bytes_zeroed += zero_gaps(pipe, claim.extent.base, chunk)?;
                }
                for segment in &chunk.segments {
                    report.bytes_copied += machine.send_segment(pipe, claim.extent.base, segment, staging)?;
                }
            }
        }
        Ok(pipe.finish()?)
    }

    fn commit(&mut self) {
        let chunks = self.claims.iter_mut().flat_map(|claim| &mut claim.chunks);
        chunks.for_each(|chunk| chunk.truth = Truth::Device);
    }

    /// Releases what is new. What the driver refuses to take back stays noted in its chunk; the next call tries again.
    fn roll_back(&mut self) {
        for claim in &mut self.claims {
            let base = claim.extent.base;
            for chunk in claim.chunks.iter_mut().filter(|chunk| is_away(chunk)) {
                let _ = self.machine.heap.strip(base, chunk);
            }
        }
    }
}

/// Fills what no segment of the chunk covers.
fn zero_gaps(pipe: &mut Pipe<'_, ()>, base: Addr, chunk: &Chunk) -> Result<u64> {
    let mut covered = Ranges::new();
    chunk.segments.iter().for_each(|segment| covered.add(segment.range()));
    let gaps = covered.gaps(&chunk.range());
    for gap in gaps.iter() {
        pipe.zero(base.offset(gap.start), gap.end - gap.start)?;
    }
    Ok(gaps.total())
}

impl Machine {
    fn send_segment(&self, pipe: &mut Pipe<'_, ()>, base: Addr, segment: &Segment, staging: &[Span]) -> Result<u64> {
        let short = || Error::new(Status::Internal, "a segment is longer than its place");
        let step = self.settings.copy_piece;
        for from in (0..segment.len).step_by(step as usize) {
            if pipe.is_full() {
                pipe.land()?;
            }
            let piece = step.min(segment.len - from);
            let span = match &segment.place {
                Place::Host(span) => span.part(from, piece).ok_or_else(short)?,
                Place::Disk { file, at, sum } => {
                    let buffer = staging.get(pipe.next_place()).and_then(|b| b.part(0, piece)).ok_or_else(short)?;
                    file.read(*at, &buffer, *sum)?;
                    buffer
                }
            };
            pipe.send_in(base.offset(segment.offset + from), span, ())?;
        }
        Ok(segment.len)
    }

    /// Physical memory. An undo takes back what the region had before, so the margin does not concern it.
    fn create_for(&self, call: &Call, device: Device, size: u64) -> Result<Physical> {
        if call.is_undo() { Ok(self.heap.driver.create(device, size)?) } else { self.heap.create(device, size) }
    }
}
