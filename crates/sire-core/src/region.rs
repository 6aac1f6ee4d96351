//! Regions: tags, policies, who is inside, and the state that the user sees. A region's gate decides what may
//! happen: threads enter a resident region, allocations are admitted to it, and a transition closes
//! it against both. A gate is locked for a few instructions, never across a driver call.

mod all;

use crate::clock;
use crate::driver::Addr;
use crate::error::{Error, Result, Status};
use crate::policy::Standing;
use crate::sync::{AtomicBool, Condvar, Mutex, MutexGuard, Ordering, ThreadId, lock, this_thread, wait, wait_until};
use crate::terms::{Backup, Clean, Policy, RegionId, State};
use crate::tier::Room;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

pub(crate) use all::Regions;

/// How long a pause waits for memory that is being mapped; a program does that in microseconds, or not at all.
const MAPPING: Duration = Duration::from_millis(100);

/// Milliseconds of the process's clock, from a beginning before which nobody says that anything was used.
fn use_clock() -> u64 {
    (1 << 40) + clock::milliseconds()
}

/// What a region is doing. `Pausing`, `Resuming` and `Releasing` never outlast a call.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Phase {
    Resident,
    Pausing,
    Paused,
    Resuming,
    /// Paused, and memory that was left there goes now.
    Releasing,
}

impl Phase {
    fn doing(self) -> &'static str {
        match self {
            Phase::Resident => "resident",
            Phase::Pausing => "being paused",
            Phase::Paused | Phase::Releasing => "paused",
            Phase::Resuming => "being resumed",
        }
    }
}

#[derive(Debug)]
struct Gate {
    phase: Phase,
    /// The phase before the transition that is under way, or was last.
    before: Phase,
    /// How often each thread is inside.
    inside: HashMap<ThreadId, usize>,
    /// Allocations, and what else [`Region::admit`] let in, under way.
    admitted: usize,
    /// Somebody makes backups ahead of a pause.
    copied_ahead: bool,
    /// Physical memory that the program has made, and neither mapped nor released yet.
    in_hand: usize,
    left: Left,
}

/// Physical memory that a paused region still holds.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Left {
    /// An earlier call could not release it.
    pub(crate) over: bool,
    /// It stays until somebody needs it, with the content; what is to be kept of that is in backups.
    pub(crate) lazy: bool,
}

/// What a region has been through.
#[derive(Clone, Debug, Default)]
pub(crate) struct History {
    pub(crate) pauses: u64,
    pub(crate) resumes: u64,
    pub(crate) bytes_copied: u64,
    pub(crate) bytes_discarded: u64,
    pub(crate) seconds_paused_last: f64,
    pub(crate) seconds_resumed_last: f64,
    pub(crate) last_error: Option<String>,
    /// The backup, by pauses and bytes, that trials said would become smaller than it did.
    pub(crate) misjudged: Option<(u64, u64)>,
    /// When it was paused or resumed last, in an order of the process's own.
    pub(crate) used: u64,
    /// The same in milliseconds of the process's clock.
    pub(crate) used_at: u64,
    /// What the program says about who makes way.
    pub(crate) standing: Standing,
    /// How many use it, as far as they said.
    pub(crate) leases: u64,
}

impl History {
    /// It is being used now.
    pub(crate) fn touch(&mut self) {
        static NOW: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);
        self.used = NOW.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        self.used_at = clock::milliseconds();
    }
}

/// One (tag, policy).
#[derive(Debug)]
pub(crate) struct Region {
    pub(crate) id: RegionId,
    pub(crate) tag: String,
    pub(crate) policy: Policy,
    gate: Mutex<Gate>,
    changed: Condvar,
    /// Whether the gate's phase is `Resident`, for whoever cannot wait for its lock.
    door: Arc<AtomicBool>,
    history: Mutex<History>,
    /// When it was used last, by [`use_clock`], as far as somebody [wants to know](Region::observe); 0: nobody does.
    last_use: AtomicU64,
    /// Whether a file was ever said to hold some of its content.
    in_files: AtomicBool,
    /// The room of the last backup in a tier, kept for the next one if the policy says so.
    pub(crate) room: Mutex<Option<Arc<dyn Room>>>,
}

impl Region {
    fn new(id: RegionId, tag: &str, policy: Policy) -> Region {
        let gate = Gate {
            phase: Phase::Resident,
            before: Phase::Resident,
            inside: HashMap::new(),
            admitted: 0,
            copied_ahead: false,
            in_hand: 0,
            left: Left::default(),
        };
        Region {
            id,
            tag: tag.to_owned(),
            policy,
            gate: Mutex::new(gate),
            changed: Condvar::new(),
            door: Arc::new(AtomicBool::new(true)),
            history: Mutex::default(),
            last_use: AtomicU64::new(0),
            in_files: AtomicBool::new(false),
            room: Mutex::new(None),
        }
    }

    /// The calling thread goes inside; `Paused` or `Busy` if the region is not resident.
    pub(crate) fn enter(&self) -> Result<()> {
        let mut gate = lock(&self.gate);
        self.admits(&gate, "enter")?;
        *gate.inside.entry(this_thread()).or_insert(0) += 1;
        self.note_use();
        Ok(())
    }

    /// The calling thread comes out once. Nothing happens if it is not inside.
    pub(crate) fn leave(&self) {
        let mut gate = lock(&self.gate);
        let me = this_thread();
        if let Some(count) = gate.inside.get_mut(&me) {
            *count -= 1;
            if *count == 0 {
                gate.inside.remove(&me);
            }
        }
        self.note_use();
    }

    /// Its uses are noted from now on; what was not noted before counts as used now.
    pub(crate) fn observe(&self) {
        let _ = self.last_use.compare_exchange(0, use_clock(), Relaxed, Relaxed);
    }

    /// The program says that it was used last so many milliseconds ago.
    pub(crate) fn say_used(&self, ago: u64) {
        self.last_use.store(use_clock().saturating_sub(ago).max(1), Relaxed);
    }

    /// It is being used. Costs nothing unless somebody wants to know.
    pub(crate) fn note_use(&self) {
        if self.last_use.load(Relaxed) > 0 {
            self.last_use.fetch_max(use_clock(), Relaxed);
        }
    }

    /// For how many milliseconds it has not been used; 0 while it is in use, or nobody observes it.
    pub(crate) fn idle(&self) -> u64 {
        match self.last_use.load(Relaxed) {
            0 => 0,
            _ if self.is_in_use() => 0,
            last => use_clock().saturating_sub(last),
        }
    }

    /// Whether a thread is inside, or it is leased.
    pub(crate) fn is_in_use(&self) -> bool {
        !lock(&self.gate).inside.is_empty() || self.history(|history| history.leases) > 0
    }

    /// Admits one allocation, or what else needs the region to be resident: until the result is dropped, no transition begins.
    pub(crate) fn admit(self: &Arc<Self>, doing: &str) -> Result<Admission> {
        let mut gate = lock(&self.gate);
        self.admits(&gate, doing)?;
        self.note_use();
        gate.admitted += 1;
        Ok(Admission(Arc::clone(self)))
    }

    /// Memory that the program makes and will map: until the result is dropped, no transition begins.
    pub(crate) fn take_in_hand(self: &Arc<Self>) -> Result<InHand> {
        let mut gate = lock(&self.gate);
        self.admits(&gate, "make memory in")?;
        self.note_use();
        gate.in_hand += 1;
        Ok(InHand(Arc::clone(self)))
    }

    /// The same for memory that was mapped until now, whatever the region is doing.
    pub(crate) fn take_back_in_hand(self: &Arc<Self>) -> InHand {
        lock(&self.gate).in_hand += 1;
        InHand(Arc::clone(self))
    }

    /// `Paused` or `Busy` if the region is not resident.
    pub(crate) fn require_resident(&self, doing: &str) -> Result<()> {
        self.admits(&lock(&self.gate), doing)
    }

    fn admits(&self, gate: &Gate, doing: &str) -> Result<()> {
        let status = match gate.phase {
            Phase::Resident => return Ok(()),
            Phase::Pausing | Phase::Paused | Phase::Releasing => Status::Paused,
            Phase::Resuming => Status::Busy,
        };
        let phase = gate.phase.doing();
        Err(Error::new(status, format!("cannot {doing} region '{}': it is {phase}; resume it first", self.tag)))
    }

    /// Fails while the region's memory is away, or going.
    pub(crate) fn require_usable(&self, addr: Addr) -> Result<()> {
        let phase = lock(&self.gate).phase;
        if matches!(phase, Phase::Resident | Phase::Resuming) {
            return Ok(());
        }
        let message =
            format!("the memory at {addr:?} is in region '{}', which is {}; resume it first", self.tag, phase.doing());
        Err(Error::new(Status::Paused, message))
    }

    /// Waits until no transition is under way; returns the lasting state.
    pub(crate) fn settled_state(&self) -> State {
        let mut gate = lock(&self.gate);
        loop {
            match gate.phase {
                Phase::Resident => return State::Resident,
                Phase::Paused | Phase::Releasing => return State::Paused,
                Phase::Pausing | Phase::Resuming => gate = wait(&self.changed, gate),
            }
        }
    }

    /// The lasting state; of a region in transition, the one it comes from.
    pub(crate) fn state(&self) -> State {
        let gate = lock(&self.gate);
        let is_moving = matches!(gate.phase, Phase::Pausing | Phase::Resuming);
        let lasting = if is_moving { gate.before } else { gate.phase };
        if lasting == Phase::Resident { State::Resident } else { State::Paused }
    }

    /// Closes the gate for a transition to `target` (`Paused` or `Resident`). Returns the phase it had, or
    /// `None` if there is nothing to do.
    pub(crate) fn close(&self, target: Phase) -> Result<Option<Phase>> {
        let mut gate = self.when_released();
        if !self.would_close(&gate, target)? {
            return Ok(None);
        }
        let next = if target == Phase::Paused { Phase::Pausing } else { Phase::Resuming };
        self.door.store(false, Ordering::SeqCst);
        gate.before = std::mem::replace(&mut gate.phase, next);
        Ok(Some(gate.before))
    }

    /// The gate, once nobody is giving lazily held memory back: a few driver calls.
    fn when_released(&self) -> MutexGuard<'_, Gate> {
        let mut gate = lock(&self.gate);
        while gate.phase == Phase::Releasing {
            gate = wait(&self.changed, gate);
        }
        gate
    }

    /// Begins to give lazily held memory back; false if there is none (any more).
    pub(crate) fn begin_release(&self) -> bool {
        let mut gate = self.when_released();
        let begins = gate.phase == Phase::Paused && gate.left.lazy;
        if begins {
            gate.phase = Phase::Releasing;
        }
        begins
    }

    /// Notes that a pause has more to do, if it is paused still.
    pub(crate) fn note_left_over(&self) -> bool {
        let mut gate = self.when_released();
        let paused = gate.phase == Phase::Paused;
        gate.left.over |= paused;
        paused
    }

    /// Whether it is paused, and its memory is still there until somebody needs it.
    pub(crate) fn is_lazy(&self) -> bool {
        let gate = lock(&self.gate);
        gate.left.lazy && matches!(gate.phase, Phase::Paused | Phase::Releasing)
    }

    /// Whether it held memory lazily when the transition that is under way began.
    pub(crate) fn was_lazy(&self) -> bool {
        lock(&self.gate).left.lazy
    }

    /// Fails where [`Region::close`] would fail now. The gate stays as it is. Memory that is being mapped is waited for a moment.
    pub(crate) fn check(&self, target: Phase) -> Result<()> {
        let mut gate = lock(&self.gate);
        let deadline = clock::now() + MAPPING;
        while target == Phase::Paused && gate.in_hand > 0 {
            match wait_until(&self.changed, gate, deadline) {
                Some(again) => gate = again,
                None => return self.would_close(&lock(&self.gate), target).map(drop),
            }
        }
        self.would_close(&gate, target).map(drop)
    }

    fn would_close(&self, gate: &Gate, target: Phase) -> Result<bool> {
        let was = if gate.phase == Phase::Releasing { Phase::Paused } else { gate.phase };
        if matches!(was, Phase::Pausing | Phase::Resuming) {
            let message =
                format!("region '{}' is {} by another thread; try again when it is done", self.tag, was.doing());
            return Err(Error::new(Status::Busy, message));
        }
        if was == target && !(target == Phase::Paused && gate.left.over) {
            return Ok(false);
        }
        if target == Phase::Paused && !gate.inside.is_empty() {
            return Err(self.occupied(gate.inside.len()));
        }
        if target == Phase::Paused && gate.in_hand > 0 {
            let message = format!(
                "cannot pause region '{}': {} pieces of memory were made in it and are not mapped yet; map or release them",
                self.tag, gate.in_hand
            );
            return Err(Error::new(Status::Busy, message));
        }
        Ok(true)
    }

    fn occupied(&self, threads: usize) -> Error {
        let who = if threads == 1 { "1 thread is".to_owned() } else { format!("{threads} threads are") };
        let message = format!("cannot pause region '{}': {who} inside it; leave the region first", self.tag);
        Error::new(Status::Busy, message)
    }

    /// Waits until the last admitted allocation is done. To be called after `close`.
    pub(crate) fn drain(&self) {
        let mut gate = lock(&self.gate);
        while gate.admitted > 0 {
            gate = wait(&self.changed, gate);
        }
    }

    /// Ends the transition.
    pub(crate) fn open(&self, phase: Phase, left: Left) {
        let mut gate = lock(&self.gate);
        gate.phase = phase;
        gate.left = left;
        self.door.store(phase == Phase::Resident, Ordering::SeqCst);
        drop(gate);
        self.changed.notify_all();
    }

    /// Ends a transition that came to nothing: the region is as it was. What a panic left behind may still hold memory.
    pub(crate) fn reopen(&self, phase: Phase) {
        let left = lock(&self.gate).left;
        self.open(phase, Left { over: left.over || std::thread::panicking(), ..left });
    }

    /// Whether memory of the region may be given out: true while it is resident. From the moment that it is false, a transition may look at what
    /// the region holds, so whoever gives memory out on its word does so under a lock that the transition takes, too.
    pub(crate) fn door(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.door)
    }

    /// Reads or changes the region's history.
    pub(crate) fn history<R>(&self, with: impl FnOnce(&mut History) -> R) -> R {
        with(&mut lock(&self.history))
    }

    /// Begins to make backups while the region stays open, until the result is dropped; `None` if it is paused. A transition does not wait
    /// for that: whoever copies asks [`Region::is_resident`].
    ///
    /// # Errors
    /// `Busy` while a transition is under way, or somebody else does the same.
    pub(crate) fn copy_ahead(self: &Arc<Self>) -> Result<Option<Ahead>> {
        let mut gate = lock(&self.gate);
        let busy = match gate.phase {
            Phase::Paused | Phase::Releasing => return Ok(None),
            Phase::Resident if gate.copied_ahead => "pre-copied",
            Phase::Resident => {
                gate.copied_ahead = true;
                return Ok(Some(Ahead(Arc::clone(self))));
            }
            Phase::Pausing => "paused",
            Phase::Resuming => "resumed",
        };
        let message = format!("region '{}' is being {busy} by another thread; try again when it is done", self.tag);
        Err(Error::new(Status::Busy, message))
    }

    /// Whether it is resident, and no transition has begun.
    pub(crate) fn is_resident(&self) -> bool {
        lock(&self.gate).phase == Phase::Resident
    }

    /// Whether what is backed up now can still be trusted at a pause.
    pub(crate) fn may_copy_ahead(&self) -> bool {
        match self.policy.backup {
            // What no file has, such a region writes anew unless it is declared not to change.
            Backup::File => self.policy.clean == Clean::Declared,
            _ => self.policy.clean != Clean::No,
        }
    }

    /// Whether a backup outlasts a resume.
    pub(crate) fn retains(&self) -> bool {
        self.policy.retain || self.may_be_clean()
    }

    /// Whether a backup may stand for content that has not changed.
    pub(crate) fn may_be_clean(&self) -> bool {
        self.policy.clean != Clean::No || self.policy.backup == Backup::File
    }

    /// How the region's old backups are judged once files have been compared: what a file is proven to hold, it holds.
    pub(crate) fn judged(&self) -> Clean {
        if self.policy.backup == Backup::File { Clean::Declared } else { self.policy.clean }
    }

    /// Whether files of the program's may hold some of its content.
    pub(crate) fn has_files(&self) -> bool {
        self.policy.backup == Backup::File || self.in_files.load(Ordering::Acquire)
    }

    /// From now on they do.
    pub(crate) fn note_files(&self) {
        self.in_files.store(true, Ordering::Release);
    }

    /// Whether the content goes to a tier unless something says otherwise.
    pub(crate) fn keeps(&self) -> bool {
        self.policy.backup != Backup::None
    }
}

/// An allocation that is under way in a region.
#[derive(Debug)]
pub(crate) struct Admission(Arc<Region>);

impl Drop for Admission {
    fn drop(&mut self) {
        let mut gate = lock(&self.0.gate);
        gate.admitted -= 1;
        let last = gate.admitted == 0;
        drop(gate);
        if last {
            self.0.changed.notify_all();
        }
    }
}

/// Backups are being made while the region stays open.
#[derive(Debug)]
pub(crate) struct Ahead(pub(crate) Arc<Region>);

impl Drop for Ahead {
    fn drop(&mut self) {
        lock(&self.0.gate).copied_ahead = false;
    }
}

/// Physical memory that the program holds without a mapping.
#[derive(Debug)]
pub(crate) struct InHand(pub(crate) Arc<Region>);

impl Drop for InHand {
    fn drop(&mut self) {
        let mut gate = lock(&self.0.gate);
        gate.in_hand -= 1;
        let last = gate.in_hand == 0;
        drop(gate);
        if last {
            self.0.changed.notify_all();
        }
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;

    fn status<T: std::fmt::Debug>(result: Result<T>) -> Status {
        result.map_or_else(|e| e.status, |value| unreachable!("{value:?}"))
    }

    #[test]
    fn a_thread_inside_keeps_the_region_open() -> Result<()> {
        let region = Arc::new(Region::new(RegionId(0), "model", Policy::default()));
        region.enter()?;
        region.enter()?;
        region.leave();
        let refused = region.close(Phase::Paused);
        assert!(matches!(&refused, Err(e) if e.status == Status::Busy && e.message.contains("'model'")), "{refused:?}");
        region.leave();
        region.leave();
        assert_eq!(region.close(Phase::Paused)?, Some(Phase::Resident));
        assert_eq!(status(region.enter()), Status::Paused);
        assert_eq!(status(region.close(Phase::Paused)), Status::Busy);
        region.open(Phase::Paused, Left::default());
        assert_eq!(region.close(Phase::Paused)?, None);
        assert_eq!(status(region.admit("allocate in")), Status::Paused);
        Ok(())
    }

    /// A pause that took what an earlier one had left called the region resident.
    #[test]
    fn a_region_in_transition_has_the_state_that_it_comes_from() -> Result<()> {
        let region = Region::new(RegionId(0), "model", Policy::default());
        for before in [State::Resident, State::Paused] {
            region.close(Phase::Paused)?;
            assert_eq!(region.state(), before);
            region.open(Phase::Paused, Left { over: true, lazy: false });
        }
        assert_eq!(region.close(Phase::Resident)?, Some(Phase::Paused));
        assert_eq!(region.state(), State::Paused);
        Ok(())
    }
}
