//! Backups that are made ahead of a pause, while the program goes on using the memory. The pause then copies only what has changed
//! since: of `Verified` and `Paranoid` content it finds that out by looking, as always; `Declared` content has not changed, or the
//! program has said so. Without such a policy a copy of memory in use proves nothing, and is refused.
//!
//! The memory is cut into windows of a few chunks. Of each, a *shadow* says what is backed up already; survey, look and
//! draft are those of a pause; what needs room is copied there, and when all of it has arrived the chunks get their new segments. Nothing
//! is claimed: as long as a window is read ([`Reading`](crate::heap::reading::Reading)) nobody unmaps it, and a free,
//! a pause or a cancellation is seen between two pieces. The window is given up then, those before it stay.
//!
//! Writes of the program that race with a copy do no harm: what is recorded of a page is the digest of the bytes that arrived in
//! host memory, never of the device's; and what [`Engine::changed`](crate::engine::Engine::changed) is told after the devices were
//! synchronised stays told.

use super::pieces::Piece;
use super::seam::{Safe, Sink, Staging};
use super::survey::{self, Survey};
use super::team::{Call, stopped};
use super::{Machine, plan};
use crate::clock;
use crate::digest::Digest;
use crate::driver::Device;
use crate::error::{Error, Result, Status};
use crate::extent::{Claim, Extent};
use crate::ranges::Ranges;
use crate::raw::Span;
use crate::region::{Ahead, Region};
use crate::terms::Report;
use crate::tier::{Segment, page_cuts};
use crate::transfer::Pipe;
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// Chunks that are backed up, or given up, together.
const WINDOW: u64 = 4;

impl Machine {
    /// Backs up what the regions hold, while they stay open. After a failure what was copied before stays.
    pub(crate) fn pre_copy(&self, regions: &[Arc<Region>]) -> Result<Report> {
        let call = Call::new(self, Duration::ZERO);
        let mut report = Report::default();
        let mut open = Vec::new();
        for region in able(regions)? {
            match region.copy_ahead()? {
                Some(ahead) => open.push(ahead),
                None => report.regions_unchanged += 1,
            }
        }
        report.regions_changed = open.len() as u32;
        let outcome = self.copy_ahead(&open, &call, &mut report);
        self.tiers.shared.settle();
        report.bytes_clean = report.bytes_clean.saturating_sub(report.bytes_constant + report.bytes_shared);
        report.seconds_total = clock::seconds_since(call.began);
        let copied = report.bytes_copied;
        outcome.map(|()| report).map_err(|error| {
            let message = format!("{}; the {copied} bytes that were pre-copied before stay backed up", error.message);
            Error { message, ..error }
        })
    }

    fn copy_ahead(&self, regions: &[Ahead], call: &Call, report: &mut Report) -> Result<()> {
        let extents = |region: &Region| {
            let mut extents = self.heap.registry.extents_of(std::iter::once(region.id));
            extents.retain(|extent| extent.stays_because().is_none());
            extents
        };
        let found: Vec<(&Arc<Region>, Vec<Arc<Extent>>)> =
            regions.iter().map(|ahead| (&ahead.0, extents(&ahead.0))).collect();
        let all = || found.iter().flat_map(|(_, extents)| extents);
        all().for_each(|extent| extent.begin_settling());
        let devices: BTreeSet<Device> = all().map(|extent| extent.device).collect();
        let start = clock::now();
        self.heap.synchronize_all(&devices)?;
        report.seconds_synchronize = clock::seconds_since(start);
        let start = clock::now();
        let copied = found.iter().try_for_each(|(region, extents)| {
            extents.iter().try_for_each(|extent| self.copy_extent(region, extent, call, report))
        });
        report.seconds_transfer = clock::seconds_since(start);
        copied
    }

    fn copy_extent(&self, region: &Arc<Region>, extent: &Arc<Extent>, call: &Call, report: &mut Report) -> Result<()> {
        let call = call.watching(region, extent);
        let step = WINDOW * self.settings.chunk.next_multiple_of(self.heap.granularity(extent.device)?);
        report.allocations += extent.figures().allocations;
        report.bytes_expected += extent.size;
        for start in (0..extent.size).step_by(step as usize) {
            match self.copy_window(region, extent, &(start..start + step), &call, report) {
                // Freed, or being paused: whoever does that takes care of the rest.
                Err(error) if error == stopped() => return Ok(()),
                outcome => outcome?,
            }
        }
        Ok(())
    }

    fn copy_window(
        &self,
        region: &Arc<Region>,
        extent: &Arc<Extent>,
        window: &Range<u64>,
        call: &Call,
        report: &mut Report,
    ) -> Result<()> {
        let _reading = loop {
            call.check_cancelled(self)?;
            match self.heap.read(extent) {
                Some(reading) => break reading,
                // A new peer, or whoever tends backups: neither takes long.
                None => clock::sleep(Duration::from_micros(50)),
            }
        };
        let Some(mut shadow) = extent.shadow(window) else { return Ok(()) };
        if region.has_files() {
            // What a file is said to hold, and nobody has looked at yet, is proven at the pause.
            let mut known = Ranges::new();
            shadow.chunks.iter().flat_map(|chunk| &chunk.segments).for_each(|segment| known.add(segment.range()));
            for file in extent.attached() {
                known.gaps(&file.range).iter().for_each(|gap| shadow.dead.add(gap.clone()));
            }
        }
        let mut attempt = Report::default();
        let mut surveys = [Survey::new(0, region, &shadow, extent.known_changed(), self.settings.page())];
        if survey::is_needed(&surveys) {
            self.look(std::slice::from_ref(&shadow), &mut surveys, call, &mut attempt)?;
        }
        call.check_cancelled(self)?;
        let staging = self.prepare_ahead(&mut shadow, &surveys[0], &mut attempt)?;
        attempt.bytes_clean = plan::clean(&shadow);
        self.save_ahead(&mut shadow, surveys[0].is_hashed(), staging, call, &mut attempt)?;
        if extent.keep_backups(shadow) {
            report.add(&attempt);
            report.bytes_clean += attempt.bytes_clean;
            report.bytes_hashed += attempt.bytes_hashed;
            report.bytes_shared += attempt.bytes_shared;
        }
        Ok(())
    }

    /// Copies what the shadow's segments do not hold yet.
    fn save_ahead(
        &self,
        shadow: &mut Claim,
        hashed: bool,
        mut staging: Staging,
        call: &Call,
        report: &mut Report,
    ) -> Result<()> {
        let new = Machine::unshared(std::slice::from_ref(shadow));
        if shadow.chunks.iter().any(|chunk| !chunk.is_saved()) {
            let device = shadow.extent.device;
            let sink = Sink::new(self, staging.remove(&device).unwrap_or_default());
            let mut copier = Copier { machine: self, shadow, hashed, sink, report };
            let mut pipe = Pipe::new(&*self.heap.driver, self.lanes.take(device)?);
            let saved = copier.save(&mut pipe, call);
            let drained = pipe.drain(&self.lanes);
            saved?;
            drained?;
        }
        shadow.chunks.iter_mut().flat_map(|chunk| &mut chunk.segments).for_each(|segment| segment.filled = true);
        // Who shares may wait for other processes, and whoever unmaps the memory would wait, too. The next pause shares it.
        if !call.is_over() {
            self.share(std::slice::from_mut(shadow), &new, report);
        }
        Ok(())
    }
}

/// The regions that can be backed up ahead; those that keep nothing are left out.
fn able(regions: &[Arc<Region>]) -> Result<Vec<&Arc<Region>>> {
    let able: Vec<&Arc<Region>> = regions.iter().filter(|region| region.may_copy_ahead()).collect();
    match regions.iter().find(|region| !region.may_copy_ahead() && (region.keeps() || able.is_empty())) {
        None => Ok(able),
        Some(region) => {
            let message = format!(
                "cannot pre-copy region '{}': nothing would tell a pause which of its bytes have changed since; open it as \
                 immutable, or with verification by hash or by bytes",
                region.tag
            );
            Err(Error::new(Status::InvalidArgument, message))
        }
    }
}

/// Copies one window.
struct Copier<'a> {
    machine: &'a Machine,
    shadow: &'a mut Claim,
    /// Whether pages are known by their digest.
    hashed: bool,
    sink: Sink<'a>,
    report: &'a mut Report,
}

impl Copier<'_> {
    fn save(&mut self, pipe: &mut Pipe<'_, Piece>, call: &Call) -> Result<()> {
        for index in 0..self.shadow.chunks.len() {
            for piece in self.pieces(index) {
                call.check_cancelled(self.machine)?;
                self.send(pipe, piece)?;
            }
        }
        while self.land(pipe)? {}
        while self.settle(true)? {}
        Ok(())
    }

    /// What is to be copied of a chunk: into host memory page by page, so that each can be hashed as it arrives.
    fn pieces(&mut self, index: usize) -> Vec<Piece> {
        let (page, chunk) = (self.machine.settings.page(), &mut self.shadow.chunks[index]);
        let at = (0, index);
        let records = chunk.segments.iter().enumerate().filter(|(_, held)| !held.filled && held.is_stored());
        let record = |(segment, held): (usize, &Segment)| Piece { at, segment, from: 0, len: held.len };
        let mut all: Vec<Piece> = records.map(record).collect();
        for (segment, held) in chunk.segments.iter_mut().enumerate().filter(|(_, held)| !held.filled) {
            if self.hashed {
                held.pages.clear();
            }
            if !held.is_stored() {
                let piece = |cut: Range<u64>| (cut.start - held.offset, cut.end - cut.start);
                let cuts = page_cuts(&held.range(), page).map(piece);
                all.extend(cuts.map(|(from, len)| Piece { at, segment, from, len }));
            }
        }
        all
    }

    fn segment(&mut self, piece: &Piece) -> &mut Segment {
        &mut self.shadow.chunks[piece.at.1].segments[piece.segment]
    }

    fn send(&mut self, pipe: &mut Pipe<'_, Piece>, piece: Piece) -> Result<()> {
        if pipe.is_full() {
            self.land(pipe)?;
        }
        let span = loop {
            let segment = &self.shadow.chunks[piece.at.1].segments[piece.segment];
            if let Some(span) = self.sink.room(segment, &piece)? {
                break span;
            }
            if !self.settle(true)? && !self.land(pipe)? {
                return Err(Error::new(Status::Internal, "there is no buffer for a piece"));
            }
        };
        let offset = self.segment(&piece).offset + piece.from;
        pipe.send_out(self.shadow.extent.base.offset(offset), span, piece)?;
        self.report.bytes_copied += piece.len;
        Ok(())
    }

    /// Waits for the oldest piece. False if nothing was under way.
    fn land(&mut self, pipe: &mut Pipe<'_, Piece>) -> Result<bool> {
        let Some((piece, span)) = pipe.land()? else { return Ok(false) };
        if let Some(span) = span {
            self.note(&piece, &span);
            let segment = &self.shadow.chunks[piece.at.1].segments[piece.segment];
            self.sink.landed(segment, piece, &span)?;
        }
        while self.settle(false)? {}
        Ok(true)
    }

    /// Notes what has arrived. Pieces of a segment arrive in order.
    fn note(&mut self, piece: &Piece, span: &Span) {
        if self.hashed {
            let digest = span.read(Digest::of);
            self.segment(piece).pages.push(Some((digest.low, digest.high)));
        }
    }

    /// Notes where a piece is that has become safe. False if none has.
    fn settle(&mut self, wait: bool) -> Result<bool> {
        let Some(Safe { piece, place }) = self.sink.next_safe(wait)? else { return Ok(false) };
        if let Some(place) = place {
            self.segment(&piece).place = place;
        }
        Ok(true)
    }
}
