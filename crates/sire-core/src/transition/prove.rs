//! The proof that files hold what allocations hold. Before a pause plans anything, the records of attached files that are not proven
//! are compared, byte by byte, with the device's; those that are equal become segments that need no copy. Later pauses compare the
//! device's bytes with the checksum that a record had then, without reading the file; of a region whose content is declared not to
//! change, nothing. A file that was changed meanwhile proves nothing any more: it is compared again.
//!
//! What is not equal is no error: it goes to host memory like everything that no file has.

use super::seam::{Desk, Need};
use super::{Machine, batch::Batch, team::Call};
use crate::driver::{Addr, Device};
use crate::error::{Error, Result};
use crate::extent::{Chunk, Claim, Truth};
use crate::ranges::Ranges;
use crate::raw::Span;
use crate::settings::IN_FLIGHT;
use crate::terms::{Backup, Clean, Policy, Report};
use crate::tier::file::Attached;
use crate::tier::queue::Queue;
use crate::tier::record::{Answer, Record, Sum};
use crate::tier::staging::Buffers;
use crate::tier::{Place, Room, Segment, file, page_cuts};
use crate::transfer::Pipe;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// A record that is to be compared with the device.
struct Check {
    claim: usize,
    chunk: usize,
    /// Offsets of the extent.
    range: Range<u64>,
    addr: Addr,
    record: Record,
    /// Its checksum, if it was proven before.
    known: Option<Sum>,
}

impl Machine {
    /// Makes segments of what files are proven to hold. True if it had to look at the devices, which are synchronised then.
    pub(super) fn prove(&self, batch: &Batch, claims: &mut [Claim], call: &Call, report: &mut Report) -> Result<bool> {
        let mut checks: BTreeMap<Device, Vec<Check>> = BTreeMap::new();
        for (index, claim) in claims.iter_mut().enumerate() {
            let Some(region) = batch.region(claim.extent.region) else { continue };
            if region.has_files() {
                let list = to_check(index, claim, &region.policy, self.settings.page());
                checks.entry(claim.extent.device).or_default().extend(list);
            }
        }
        checks.retain(|_, list| !list.is_empty());
        if checks.is_empty() {
            return Ok(false);
        }
        self.synchronize(claims, report)?;
        for (&device, list) in &checks {
            let proven = self.prove_device(device, list, call, report)?;
            for (check, sum) in list.iter().zip(proven) {
                settle(&mut claims[check.claim], check, sum);
            }
        }
        Ok(true)
    }

    fn prove_device(
        &self,
        device: Device,
        list: &[Check],
        call: &Call,
        report: &mut Report,
    ) -> Result<Vec<Option<Sum>>> {
        let mut pipe = Pipe::new(&*self.heap.driver, self.lanes.take(device)?);
        let compared = self.compare(&mut pipe, list, call, report);
        let drained = pipe.drain(&self.lanes);
        let compared = compared?;
        drained.map_err(Error::from)?;
        Ok(compared)
    }

    /// The checksums of the records that are the same on the device.
    fn compare(
        &self,
        pipe: &mut Pipe<'_, usize>,
        list: &[Check],
        call: &Call,
        report: &mut Report,
    ) -> Result<Vec<Option<Sum>>> {
        let lens = list.iter().map(|check| check.record.len);
        let (bytes, longest) = (lens.clone().sum(), lens.max().unwrap_or(0));
        let mut staging = self.desk(Need { count: IN_FLIGHT, longest, ..Need::default() })?;
        let mut files = Files::new(self.desk(Need { count: list.len(), bytes, longest, depth: file::DEPTH })?, list);
        let mut proven = Vec::with_capacity(list.len());
        let mut sent = 0;
        while proven.len() < list.len() {
            call.check_cancelled(self)?;
            while let Some(check) = list.get(sent).filter(|_| !pipe.is_full()) {
                let Some(span) = staging.buffers.take().and_then(|buffer| buffer.part(0, check.record.len)) else {
                    break;
                };
                pipe.send_out(check.addr, span, sent)?;
                sent += 1;
            }
            let Some((index, Some(span))) = pipe.land()? else { continue };
            let check = &list[index];
            report.bytes_hashed += check.record.len;
            proven.push(match check.known {
                Some(sum) => (span.read(Sum::of) == sum).then_some(sum),
                None => files.same(index, &span),
            });
            staging.buffers.put(&span);
        }
        Ok(proven)
    }
}

/// Reads the records that are to be compared byte by byte, ahead of the comparison.
struct Files<'a> {
    buffers: Buffers,
    list: &'a [Check],
    queue: Queue<usize>,
    requested: usize,
    ready: BTreeMap<usize, (Option<Span>, Result<Answer>)>,
}

impl<'a> Files<'a> {
    fn new(desk: Desk, list: &'a [Check]) -> Files<'a> {
        let (buffers, queue) = desk.open();
        Files { buffers, list, queue, requested: 0, ready: BTreeMap::new() }
    }

    fn read_ahead(&mut self) {
        while let Some(check) = self.list.get(self.requested) {
            if check.known.is_none() {
                let Some(buffer) = self.buffers.take() else { return };
                self.queue.read(check.record.clone(), buffer, None, self.requested);
            }
            self.requested += 1;
        }
    }

    /// The record's checksum if its bytes are `device`'s. A file that cannot be read proves nothing.
    fn same(&mut self, index: usize, device: &Span) -> Option<Sum> {
        self.read_ahead();
        while !self.ready.contains_key(&index) {
            let done = self.queue.wait()?;
            self.ready.insert(done.ticket, (done.buffer, done.outcome));
        }
        let (buffer, outcome) = self.ready.remove(&index)?;
        let same = |answer: Answer| answer.bytes.read(|file| device.read(|bytes| bytes == file)).then_some(answer.sum);
        let sum = outcome.ok().and_then(same);
        self.buffers.put_back(buffer);
        sum
    }
}

/// What has to be compared of a claim before its files' records can be used; segments of which nothing is known are not filled afterwards.
fn to_check(index: usize, claim: &mut Claim, policy: &Policy, page: u64) -> Vec<Check> {
    let extent = Arc::clone(&claim.extent);
    let attached = extent.attached();
    let changed = extent.take_changed();
    let mut void = changed.clone();
    attached.iter().filter(|file| file.begin_proof()).for_each(|file| void.add(file.range.clone()));
    let mut checks = Vec::new();
    for (number, chunk) in claim.chunks.iter_mut().enumerate().filter(|(_, chunk)| chunk.truth == Truth::Device) {
        // Of a file of which nothing is said any more nobody looks whether it changes.
        let stands = |segment: &Segment| {
            let range = segment.range();
            within(&attached, &range).iter().any(|file| file.has(segment)) && void.clip(&range).total() == 0
        };
        chunk.segments.retain(|segment| !segment.is_borrowed() || stands(segment));
        checks.extend(known(index, number, extent.base, chunk, policy));
        checks.extend(unknown(index, number, extent.base, chunk, &attached, page));
    }
    // What a file is proven to hold is not new any more, whatever else is.
    extent.put_changed(&changed);
    checks
}

/// Records that were proven before. What such a region keeps elsewhere is to be written again, unless its backups are automatic: then its policy
/// says how that is judged.
fn known(claim: usize, number: usize, base: Addr, chunk: &mut Chunk, policy: &Policy) -> Vec<Check> {
    if policy.clean == Clean::Declared {
        return Vec::new();
    }
    let check = |segment: &mut Segment| {
        let is_borrowed = segment.is_borrowed();
        segment.filled &= policy.backup == Backup::Auto && !is_borrowed;
        let (record, sum) = segment.place.record(segment.len).filter(|_| is_borrowed)?;
        let (range, addr) = (segment.range(), base.offset(segment.offset));
        Some(Check { claim, chunk: number, range, addr, record, known: Some(sum) })
    };
    chunk.segments.iter_mut().filter_map(check).collect()
}

/// Those of the attached files, which are sorted and apart, that hold something of `range`.
fn within<'a>(attached: &'a [Attached], range: &Range<u64>) -> &'a [Attached] {
    let rest = &attached[attached.partition_point(|file| file.range.end <= range.start)..];
    &rest[..rest.partition_point(|file| file.range.start < range.end)]
}

/// Records of attached files that no segment stands for.
fn unknown(claim: usize, number: usize, base: Addr, chunk: &Chunk, attached: &[Attached], page: u64) -> Vec<Check> {
    let mut checks = Vec::new();
    let whole = chunk.offset..chunk.offset + chunk.size;
    for file in within(attached, &whole) {
        let mut open = Ranges::of(file.range.start.max(whole.start)..file.range.end.min(whole.end));
        let met = &chunk.segments[chunk.segments.partition_point(|segment| segment.end() <= file.range.start)..];
        let proven = met.iter().take_while(|segment| segment.offset < file.range.end);
        proven.filter(|segment| segment.is_borrowed()).for_each(|segment| open.remove(&segment.range()));
        for range in open.iter() {
            for cut in page_cuts(range, page) {
                let (offset, len) = (cut.start, cut.end - cut.start);
                let at = file.at + (offset - file.range.start);
                let record = Record { room: Arc::clone(&file.bytes.room) as Arc<dyn Room>, at, len };
                let (range, addr) = (cut, base.offset(offset));
                checks.push(Check { claim, chunk: number, range, addr, record, known: None });
            }
        }
    }
    checks
}

/// Notes what came of a check.
fn settle(claim: &mut Claim, check: &Check, sum: Option<Sum>) {
    let extent = Arc::clone(&claim.extent);
    let segments = &mut claim.chunks[check.chunk].segments;
    segments.retain(|segment| segment.end() <= check.range.start || check.range.end <= segment.offset);
    let Some(sum) = sum else {
        if check.known.is_none() {
            extent.detach(&check.range);
        }
        return;
    };
    let Record { room, at, .. } = check.record.clone();
    let next = segments.partition_point(|segment| segment.end() <= check.range.start);
    let segment = Segment { filled: true, ..Segment::new(&check.range, Place::Stored { room, at, sum }) };
    segments.insert(next, segment);
    extent.forget_changed(&check.range);
}
