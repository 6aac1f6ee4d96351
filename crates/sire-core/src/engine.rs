//! The engine's face: allocate, free, pause, resume, and what can be asked about them. It decides nothing itself.

use crate::driver::{Addr, Device, Driver};
use crate::error::{Error, Result, Status};
use crate::extent::{self, Extent};
use crate::heap::{Heap, doing};
use crate::pages::Pages;
use crate::progress::Progress;
use crate::raw::front::Counted;
use crate::region::{Region, Regions};
use crate::segments::Segments;
use crate::settings::Settings;
use crate::stats;
use crate::stock::Stock;
use crate::sync::{AtomicU64, Mutex, Ordering, lock};
use crate::tier::{Tier, Tiers, file::Attached, host::HostTier};
use crate::trace::{self, Event, Tracer, Verb};
use crate::transfer::Lanes;
use crate::transition::Machine;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

mod caching;
mod remarks;

pub use crate::terms::{
    Backup, BackupView, Clean, Compress, Config, DeadRanges, OnPaused, PauseOptions, Policy, RegionId, Report, Request,
    ResumeOptions, Retention, Reuse, Selection, State, SwitchOptions, Tended,
};
pub use caching::PoolNumber;
use remarks::Part;

mod outside;

mod holdings;
pub use holdings::Holding;

mod resetting;

mod standing;
pub use standing::MadeWay;

mod stocking;
pub use crate::stock::{Stocked, Watch};

/// The engine: one per process. All functions may be called from any thread.
#[derive(Debug)]
pub struct Engine {
    machine: Arc<Machine>,
    calls: Arc<std::sync::atomic::AtomicU64>,
    allocated: AtomicU64,
    freed: AtomicU64,
    trace: Arc<Tracer>,
    segments: Segments,
}

impl Engine {
    /// An engine without memory, on `driver`.
    #[must_use]
    pub fn new(driver: Arc<dyn Driver>, config: Config) -> Engine {
        let calls = Arc::new(std::sync::atomic::AtomicU64::new(0));
        let stock = Arc::new(Stock::new(Arc::new(Counted::new(driver, Arc::clone(&calls)))));
        let driver: Arc<dyn Driver> = stock.clone();
        let settings = Arc::new(Settings::new(config));
        let machine = Arc::new(Machine {
            settings: Arc::clone(&settings),
            regions: Regions::default(),
            host: Arc::new(HostTier::new(Arc::clone(&driver), Arc::clone(&settings))),
            heap: Heap::new(stock, Arc::clone(&settings)),
            tiers: Tiers::new(settings),
            lanes: Lanes::new(driver),
            pages: Pages::default(),
            hashing: Mutex::default(),
            cancels: AtomicU64::new(0),
            running: Mutex::default(),
            budgets: Mutex::default(),
            tending: Mutex::default(),
            untended: AtomicU64::new(0),
        });
        let trace = Arc::new(Tracer::default());
        let segments = Segments::new(Arc::clone(&machine), Arc::clone(&trace));
        let (allocated, freed) = (AtomicU64::new(0), AtomicU64::new(0));
        Engine { machine, calls, allocated, freed, trace, segments }
    }

    /// The region for (tag, policy), made if there is none. Tags are paths of `/`-separated, non-empty
    /// segments without NUL, at most 255 bytes.
    ///
    /// # Errors
    /// `InvalidArgument` for any other tag.
    pub fn region(&self, tag: &str, policy: Policy) -> Result<RegionId> {
        let region = self.machine.regions.intern(tag, policy)?;
        self.trace.record(|| Event::Region { region: region.0, tag: tag.to_owned(), policy });
        Ok(region)
    }

    /// The tag and policy of a region.
    ///
    /// # Errors
    /// `UnknownTag` if there is no such region.
    pub fn region_info(&self, region: RegionId) -> Result<(String, Policy)> {
        let region = self.machine.regions.get(region)?;
        Ok((region.tag.clone(), region.policy))
    }

    /// The calling thread goes inside: a pause of the region is refused until it leaves. Counted.
    ///
    /// # Errors
    /// `Paused` if the region is paused, unless `on_paused` resumes it; then whatever that resume fails with.
    /// `Busy` while another thread resumes it, unless `on_paused` waits for that.
    pub fn enter(&self, region: RegionId, on_paused: OnPaused) -> Result<()> {
        let outcome = self.go_inside(region, on_paused);
        let (resume, status) = (on_paused == OnPaused::Resume, trace::status(&outcome));
        self.trace.record(|| Event::Enter { region: region.0, resume, status });
        outcome
    }

    fn go_inside(&self, region: RegionId, on_paused: OnPaused) -> Result<()> {
        let region = self.machine.regions.get(region)?;
        loop {
            let refused = match region.enter() {
                Err(error) if on_paused == OnPaused::Resume => error,
                outcome => return outcome,
            };
            if region.settled_state() == State::Paused {
                match self.machine.resume(vec![Arc::clone(&region)], &ResumeOptions::default()) {
                    Err(error) if error.status != Status::Busy => return Err(error.context(refused.message)),
                    _ => {}
                }
            }
        }
    }

    /// The calling thread comes out, once. Nothing happens if it is not inside.
    pub fn leave(&self, region: RegionId) {
        self.trace.record(|| Event::Leave { region: region.0 });
        if let Ok(region) = self.machine.regions.get(region) {
            region.leave();
        }
    }

    /// The region's lasting state.
    ///
    /// # Errors
    /// `UnknownTag` if there is no such region.
    pub fn state(&self, region: RegionId) -> Result<State> {
        Ok(self.machine.regions.get(region)?.state())
    }

    /// Device memory for the program.
    ///
    /// # Errors
    /// `OutOfDeviceMemory` if there is no room, after what was only cached has been given back; `Paused` if
    /// the region is paused; `InvalidArgument` for 0 bytes.
    pub fn allocate(&self, request: Request) -> Result<Addr> {
        let outcome = self.make(&request);
        self.trace.record(|| trace::allocation(&request, &outcome));
        outcome
    }

    fn make(&self, request: &Request) -> Result<Addr> {
        if request.size == 0 {
            return Err(Error::new(Status::InvalidArgument, "an allocation of 0 bytes was asked for"));
        }
        let region = self.machine.regions.get(request.region)?;
        let _admission = region.admit("allocate in")?;
        let addr = self.find_memory(request, &region)?;
        if !request.capturing {
            self.machine.make_ready(&region, request.device);
        }
        self.allocated.fetch_add(1, Ordering::Relaxed);
        Ok(addr)
    }

    /// Where memory is short, what paused regions hold lazily makes way.
    fn find_memory(&self, request: &Request, region: &Region) -> Result<Addr> {
        self.or_make_way(request, region, || self.machine.heap.allocate(request, region))
    }

    fn or_make_way(&self, request: &Request, region: &Region, allocate: impl Fn() -> Result<Addr>) -> Result<Addr> {
        let heap = &self.machine.heap;
        if heap.is_beyond(request.device, request.size) {
            return Err(heap.short_of(request.device, request.size, &doing("allocate in", region)));
        }
        loop {
            let outcome = allocate();
            let Err(error) = &outcome else { return outcome };
            let short = error.status == Status::OutOfDeviceMemory && !request.capturing;
            if !short || !self.make_way(request.device, request.size) {
                return outcome;
            }
        }
    }

    /// Gives physical memory of `device` back that paused regions hold until somebody needs it ([`PauseOptions::lazy`]), until `bytes`
    /// are free, or nothing is held any more. False if nothing was given back, as for more than the device has. For allocations outside the engine that have
    /// failed.
    #[must_use]
    pub fn make_way(&self, device: Device, bytes: u64) -> bool {
        self.machine.release_for(&BTreeMap::from([(device, bytes)])) > 0
    }

    /// Memory that the program maps itself.
    #[must_use]
    pub fn segments(&self) -> &Segments {
        &self.segments
    }

    /// Whether the address lies in memory of ours, to 2 MiB. Wait-free, never a lock.
    #[must_use]
    pub fn owns(&self, addr: Addr) -> bool {
        self.machine.heap.registry.owns(addr)
    }

    /// `(base, size, device, region)` of the allocation that holds `addr`.
    #[must_use]
    pub fn allocation(&self, addr: Addr) -> Option<(Addr, u64, Device, RegionId)> {
        let (extent, base, size) = self.find(addr)?;
        Some((base, size, extent.device, extent.region))
    }

    /// `(base, size)` of the one physical around `addr`, whether it is there or paused: an allocation's chunk, the slab or the piece of a cache that it lies in, a
    /// mapping of the program's. What a handle of it stands for, and what the driver says of the address.
    #[must_use]
    pub fn physical_around(&self, addr: Addr) -> Option<(Addr, u64)> {
        let extent = self.machine.heap.registry.find(addr).filter(|extent| !extent.is_freed())?;
        let chunk = extent.chunk_around(addr);
        Some((Addr(chunk.start), chunk.end - chunk.start))
    }

    /// The tag of the region whose memory holds `addr`, to 2 MiB: an allocation's, or what the program has mapped.
    #[must_use]
    pub fn tag_at(&self, addr: Addr) -> Option<String> {
        let region = self.machine.heap.registry.find(addr)?.region;
        Some(self.machine.regions.get(region).ok()?.tag.to_string())
    }

    fn find(&self, addr: Addr) -> Option<(Arc<Extent>, Addr, u64)> {
        let extent = self.machine.heap.registry.find(addr)?;
        let (base, size) = extent.allocation(addr)?;
        Some((extent, base, size))
    }

    /// Frees the allocation that starts at `addr`. Waits for the device before pages go, unless `capturing`, or a
    /// transition has the allocation: then whoever comes next, or the transition, gives the pages back.
    ///
    /// # Errors
    /// `UnknownAddress` if no live allocation starts there; `DeviceLost`: it is not freed then.
    pub fn free(&self, addr: Addr, capturing: bool) -> Result<()> {
        self.free_cached(addr, Reuse::InStreamOrder, capturing)
    }

    /// Pauses what `selection` means: all of it, or nothing. With `options.lazy` the regions are paused and backed up, but their physical
    /// memory stays until an allocation or a resume finds no room, [`Engine::trim`], or a pause that is not lazy; a resume before that
    /// copies nothing and calls no driver. Other processes cannot have that memory. What is paused already stays so; unless `options.lazy`, what its pause had
    /// to leave on the device, and need not stay there any more, goes now.
    ///
    /// # Errors
    /// `Capturing`, `UnknownTag`, `Busy` (a thread is inside, or another transition runs), `OutOfBackupSpace`,
    /// `Cancelled`, what `options.dead` fails with, or the driver's: then everything is as before.
    /// `PausedAfterFailure`: everything is paused, nothing is lost.
    pub fn pause(&self, selection: &Selection, options: PauseOptions<'_>) -> Result<Report> {
        refuse_capture(options.capturing, "pause")?;
        let pause = || {
            let regions = self.machine.regions.select(selection)?;
            self.segments.refuse_mixed(&regions)?;
            self.machine.pause(regions, options)
        };
        let outcome = self.trace.timed(Verb::of_pause(options.lazy), selection, Duration::ZERO, pause);
        if outcome.is_ok() {
            self.machine.tend_later();
        }
        outcome
    }

    /// Backs up what `selection` means while the program goes on using it; a later pause copies only what has changed since. Each device is
    /// waited for once, before the first copy: all work that was given to it before this call is in the backup. What the program
    /// writes afterwards is found by the pause, or, in a region whose content is declared not to change, must be told with
    /// [`Engine::changed`]. Regions stay open: memory may be allocated and freed meanwhile. A pause that comes meanwhile goes first, and
    /// takes over what has been copied. Regions that are paused, and those that keep nothing, are left out. In the report `regions_changed`
    /// counts the regions that were looked at.
    ///
    /// # Errors
    /// `InvalidArgument` if a region has no policy that could tell at a pause what has changed ([`Clean::No`]): then nothing was copied.
    /// `Capturing`, `UnknownTag`, `Busy` (a transition or another pre-copy of a region is under way), `OutOfBackupSpace`, `Cancelled`, or
    /// the driver's: what was copied before stays.
    pub fn pre_copy(&self, selection: &Selection, capturing: bool) -> Result<Report> {
        refuse_capture(capturing, "pre-copy")?;
        let copy = || self.machine.pre_copy(&self.machine.regions.select(selection)?);
        self.trace.timed(Verb::PreCopy, selection, Duration::ZERO, copy)
    }

    /// Does now, on this thread, what else is done in the background after a pause: moves automatic backups out of scarce host
    /// memory, compresses what is on the disk (if `disk_compress` says so). What fails stays as it is.
    pub fn tend(&self) -> Tended {
        self.machine.tend()
    }

    /// Brings the automatic backups of what `selection` means from the disk back into host memory, as far as there is room, so that a
    /// resume is fast; returns how many bytes.
    ///
    /// # Errors
    /// `UnknownTag`; `OutOfBackupSpace` or `BackupIo`: what has not moved stays where it is.
    pub fn promote(&self, selection: &Selection) -> Result<u64> {
        self.machine.promote(&self.machine.regions.select(selection)?)
    }

    /// Resumes what `selection` means: all of it, or nothing.
    ///
    /// # Errors
    /// `Capturing`, `UnknownTag`, `Busy`, `OutOfDeviceMemory`, `BackupIo`, `Cancelled`, or the driver's: then
    /// everything is paused as before, with its backups.
    pub fn resume(&self, selection: &Selection, options: ResumeOptions<'_>) -> Result<Report> {
        refuse_capture(options.capturing, "resume")?;
        let resume = || self.machine.resume(self.machine.regions.select(selection)?, &options);
        self.trace.timed(Verb::Resume, selection, options.wait, resume)
    }

    /// Pauses what `pause` means and resumes what `resume` means, in one call: both, or neither. Content travels in both directions at
    /// once, and memory goes from the one to the other, so that the device never needs more than it has. What is
    /// in its state already stays there. Does not wait for memory that somebody else holds. Returns the reports of the
    /// pause and of the resume.
    ///
    /// # Errors
    /// As for [`Engine::pause`] and [`Engine::resume`], and `InvalidArgument` if a region is meant by both: then everything is as
    /// before. `PausedAfterFailure`: everything is paused, nothing is lost.
    pub fn switch(
        &self,
        pause: &Selection,
        resume: &Selection,
        options: SwitchOptions<'_>,
    ) -> Result<(Report, Report)> {
        refuse_capture(options.capturing, "switch")?;
        let regions = &self.machine.regions;
        let switch = || {
            let leaving = regions.select(pause)?;
            self.segments.refuse_mixed(&leaving)?;
            self.machine.switch(leaving, regions.select(resume)?, options)
        };
        let outcome = self.trace.timed_switch([pause, resume], Duration::ZERO, switch);
        if outcome.is_ok() {
            self.machine.tend_later();
        }
        outcome
    }

    /// Starts to resume what `selection` means, and returns; the progress tells which memory can be used already, and what came of
    /// it. Nothing is ready before all memory is there; what was told to be ready stays, even if the call fails later. Until it is over the
    /// regions are being resumed: nobody can enter them. The progress may be dropped; `cancel` does not concern it.
    ///
    /// # Errors
    /// `Capturing`, `UnknownTag`, `Busy`: then nothing was started. All others come from the progress.
    pub fn resume_start(&self, selection: &Selection, options: ResumeOptions<'_>) -> Result<Arc<Progress>> {
        refuse_capture(options.capturing, "resume")?;
        let mut started = None;
        let start = || {
            started = Some(self.machine.resume_start(self.machine.regions.select(selection)?, &options)?);
            Ok(Report::default())
        };
        self.trace.timed(Verb::Resume, selection, options.wait, start)?;
        started.ok_or_else(|| Error::new(Status::Internal, "a resume was neither started nor refused"))
    }

    /// Cancels what goes on in the background, and waits for that until `deadline`: before the process, or the driver, ends.
    pub fn quiesce(&self, deadline: std::time::Instant) {
        self.machine.quiesce(deadline);
    }

    /// Makes running pauses and resumes stop at the next chunk and roll back. Async-signal-safe.
    pub fn cancel(&self) {
        self.machine.cancels.fetch_add(1, Ordering::SeqCst);
    }

    /// The host backup of `[addr, addr + len)`, inside one allocation; `None` if there is none in host memory. Where it is not contiguous
    /// (pages that are constant, or shared with other backups) this is a copy that lives as long as the view.
    ///
    /// # Errors
    /// `UnknownAddress` unless the range lies inside one allocation; `Busy` during a transition; `OutOfBackupSpace` for a copy.
    pub fn backup(&self, addr: Addr, len: u64) -> Result<Option<BackupView>> {
        let busy = || Error::new(Status::Busy, format!("the allocation at {addr:?} is being paused or resumed"));
        let mut parts = Vec::new();
        for Part { extent, range } in self.parts(addr, len)? {
            let found = extent.chunks(|chunks| extent::held(chunks, &range));
            let Some(held) = found.ok_or_else(busy)? else { return Ok(None) };
            parts.extend(held);
        }
        let span = match extent::contiguous(&parts) {
            Some(span) => span,
            None => self.machine.assemble(&parts, len)?,
        };
        Ok(Some(BackupView { ptr: span.ptr(), len, keep: Arc::new(span) }))
    }

    /// Gives `peer` access to present and future memory on `device`.
    ///
    /// # Errors
    /// `Unsupported` if the devices cannot do that, or the driver's; it can be repeated.
    pub fn allow_peer(&self, device: Device, peer: Device) -> Result<()> {
        let outcome = self.machine.heap.allow_peer(device, peer);
        self.trace.record(|| Event::Peer { device: device.0, peer: peer.0, status: trace::status(&outcome) });
        outcome
    }

    /// Takes back what [`Engine::allow_peer`] gave: `peer` may touch neither present nor future memory on `device`, what comes back from a pause included.
    /// Memory that the program maps itself is its own to say. What `peer` was given to do before is not waited for.
    ///
    /// # Errors
    /// The driver's; then some memory may still be accessible, and it can be repeated.
    pub fn refuse_peer(&self, device: Device, peer: Device) -> Result<()> {
        let outcome = self.machine.heap.refuse_peer(device, peer);
        self.trace.record(|| Event::PeerGone { device: device.0, peer: peer.0, status: trace::status(&outcome) });
        outcome
    }

    /// Records every call from now on in a file (docs/trace.md): `path`, where `%p` is this process's number, or `path.PID` where another
    /// process is recording there. Returns the file's name. Costs one relaxed load per call until then, and one small write afterwards.
    ///
    /// # Errors
    /// `InvalidArgument` if the file cannot be made, holds something else than a trace, or recording has begun before.
    pub fn trace(&self, path: &Path) -> Result<PathBuf> {
        self.trace.start(path, &trace::Header::of(&self.machine.settings))
    }

    /// Tells the engine how to ask whether a capture is in progress, for calls during which one may begin. The function is called from any
    /// thread that uses the engine, must not call it, and stays for good; a second one is ignored.
    pub fn watch_captures(&self, in_progress: fn() -> bool) {
        let _ = self.machine.heap.captures.set(in_progress);
    }

    /// Says that the file at `path` holds `[addr, addr + len)` from byte `at` on. The next pause compares them; what is equal is not backed up
    /// anywhere else, and read from the file by the resume. The region's backup must be [`Backup::File`] or [`Backup::Auto`].
    ///
    /// # Errors
    /// `UnknownAddress` unless the range lies inside one allocation; `InvalidArgument` for another backup or bytes that the file
    /// does not have; `BackupIo` if it cannot be opened.
    pub fn attach_file(&self, addr: Addr, len: u64, path: &Path, at: u64) -> Result<()> {
        let outcome = self.attach(addr, len, path, at);
        self.trace.record(|| trace::attachment(addr, len, path, at, &outcome));
        outcome.map(drop)
    }

    /// Returns the file's length, if it had to be looked at.
    fn attach(&self, addr: Addr, len: u64, path: &Path, at: u64) -> Result<u64> {
        let parts = self.parts_remarked(addr, len)?;
        for part in &parts {
            self.require_files(part.extent.region)?;
        }
        if len == 0 {
            return Ok(0);
        }
        let bytes = self.machine.tiers.files.bytes(path, at, len)?;
        let mut at = at;
        for Part { extent, range } in parts {
            let len = range.end - range.start;
            self.machine.regions.get(extent.region)?.note_files();
            extent.attach(Attached::new(range, at, Arc::clone(&bytes)));
            at += len;
        }
        Ok(bytes.room.size())
    }

    fn require_files(&self, region: RegionId) -> Result<()> {
        let region = self.machine.regions.get(region)?;
        if matches!(region.policy.backup, Backup::File | Backup::Auto) {
            return Ok(());
        }
        let message = format!(
            "region '{}' does not keep its content in files; make it with the backup \"file\" or \"auto\"",
            region.tag
        );
        Err(Error::new(Status::InvalidArgument, message))
    }

    /// Makes a tier from outside known; the result is the policy that sends backups there, for as long as the engine lives.
    ///
    /// # Errors
    /// `InvalidArgument` for the 257th.
    pub fn add_tier(&self, tier: Arc<dyn Tier>) -> Result<Backup> {
        self.machine.tiers.add(tier)
    }

    /// Changes settings that can change at run time (`host_limit`, `host_policy`, `host_reserve`, `disk_limit`, `disk_dir`, `margin`).
    pub fn configure(&self, change: &dyn Fn(&mut Config)) {
        self.machine.settings.change(change);
    }

    /// Everything observable, as a JSON object (schema in docs/abi.md). What only the library knows
    /// (`driver`, `hook_live`, forwarded calls) is null or 0.
    #[must_use]
    pub fn stats_json(&self) -> String {
        let counters = stats::Counters {
            allocate: self.allocated.load(Ordering::Relaxed),
            free: self.freed.load(Ordering::Relaxed),
            forwarded_allocate: 0,
            forwarded_free: 0,
            driver_calls: self.calls.load(std::sync::atomic::Ordering::Relaxed),
        };
        stats::json(&self.machine, counters)
    }

    /// Bytes that allocations hold on the device now, without the slabs that are kept for small ones to come.
    #[must_use]
    pub fn held_on(&self, device: Device) -> u64 {
        let there = self.machine.heap.registry.extents(|extent| extent.device == device && extent.slab.is_none());
        there.iter().map(|extent| extent.figures().resident).sum()
    }

    /// Frees what is only cached: memory that paused regions hold lazily, retained backups, arena slack, empty slabs. Returns (device bytes, host bytes).
    pub fn trim(&self) -> (u64, u64) {
        self.trace.record(|| Event::Trim);
        let machine = &self.machine;
        let device = machine.release_all() + machine.heap.reclaim();
        machine.drop_retained();
        for region in machine.regions.all() {
            drop(lock(&region.room).take());
        }
        machine.tiers.shared.settle();
        (device, machine.host.tidy(0))
    }

    /// Sentences that the user should hear of though no call failed; each is told once.
    pub fn take_notices(&self) -> Vec<String> {
        let mut notices = self.machine.heap.notices.take();
        notices.extend(self.machine.host.take_notices());
        notices.extend(self.trace.notices.take());
        notices
    }
}

fn refuse_capture(capturing: bool, what: &str) -> Result<()> {
    if !capturing {
        return Ok(());
    }
    let message = format!("cannot {what} while a CUDA graph is being captured; end the capture first");
    Err(Error::new(Status::Capturing, message))
}
