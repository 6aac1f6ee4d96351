//! Joining, waiting, holding, leaving. A [`Ledger`] is this process's view of one GPU's file; a [`Member`] is one slot of it, with
//! an open description and a lock of its own, so that a process may be several members and all of them are seen alike.
//! Only taking a place in the queue or a reservation needs the desk (a lock that all share); whatever makes room is written at once. Whoever
//! is stopped at the desk keeps it, so nobody sits there longer than a few reads and a write take, and the driver is asked before.

use crate::error::{Error, Result};
use crate::file::{Desk, own_user};
use crate::layout::{self, Record, SLOTS, State};
use crate::turn::{self, Other, Verdict, Want};
use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

/// How long to try to sit down before another process counts as stuck.
const AT_THE_DESK: Duration = Duration::from_secs(5);
/// The same for one look of somebody who looks again: so much longer than its time-out may a wait take.
const MOMENT: Duration = Duration::from_millis(100);
/// How often a waiting member looks.
const LOOK: Duration = Duration::from_millis(20);
/// How often to look for a moment in which others and driver agree.
const AGREE: usize = 20;
/// A driver that has said nothing for this long, and never before, will not say anything.
const SPEECHLESS: Duration = Duration::from_secs(1);
/// A waiting member that has not looked for this long is passed by.
const SILENCE: Duration = Duration::from_secs(2);

/// A device's memory in bytes, as the driver reports it now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Bytes that nobody owns.
    pub free: u64,
    /// Bytes that the device has.
    pub total: u64,
}

/// How long a wait may take, and who may end it.
#[derive(Clone, Copy)]
pub struct Patience<'a> {
    /// `None`: for ever. Zero: only look once. A look takes up to a fifth of a second where somebody is stopped at the desk.
    pub timeout: Option<Duration>,
    /// Asked at every look; true ends the wait.
    pub cancelled: &'a dyn Fn() -> bool,
}

impl Patience<'_> {
    /// How long to sleep until the next look, for a wait that began then; `None`: its time is over.
    fn nap(&self, begun: Instant) -> Option<Duration> {
        let left = self.timeout.map_or(LOOK, |timeout| timeout.saturating_sub(begun.elapsed()));
        (!left.is_zero()).then(|| left.min(LOOK))
    }
}

/// A living member, as all users may see it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Entry {
    /// Its slot.
    pub slot: u32,
    /// What it is doing.
    pub state: State,
    /// Its user.
    pub uid: u32,
    /// Its process number, as it sees it (in another container it may be nobody's here).
    pub pid: u32,
    /// When its process started, in clock ticks since boot.
    pub started: u64,
    /// Bytes wanted or reserved.
    pub bytes: u64,
    /// Bytes of the reservation that it owns already.
    pub owned: u64,
    /// Its place in the queue: lower is earlier.
    pub ticket: u64,
}

/// One GPU's ledger. May be used from any thread; a clone is the same one.
#[derive(Clone, Debug)]
pub struct Ledger(Arc<Table>);

/// What a ledger and its members share.
#[derive(Debug)]
struct Table {
    desk: Desk,
    /// For each waiting slot: its last (ticket, looks), and when that changed by our clock.
    seen: Mutex<HashMap<u32, (u64, u32, Instant)>>,
    /// Locks of one description do not keep its own threads apart.
    thread: Mutex<()>,
}

/// One slot of a ledger: what it holds is given back when it is dropped, or its process ends.
#[derive(Debug)]
pub struct Member {
    ledger: Arc<Table>,
    desk: Desk,
    slot: u32,
    record: Mutex<Record>,
}

/// Everybody but one member, at one moment.
#[derive(PartialEq, Eq)]
struct Scene {
    others: Vec<Other>,
    /// Of those who hold: slot and number of the last change. Who changes something and changes it back is not as before: the driver may have been
    /// asked in between.
    changes: Vec<(u32, u64)>,
}

/// What one look says to a member that waits.
enum Look {
    Judged(Verdict),
    /// The driver did not say how much memory is free.
    Blind,
    /// Those who hold changed what they say again and again.
    Restless,
    /// Somebody was at the desk all the time.
    Stuck,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// `None` if another thread has it.
fn try_locked<T>(mutex: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
    match mutex.try_lock() {
        Ok(guard) => Some(guard),
        Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}

impl Ledger {
    /// The ledger of the GPU `gpu` (its UUID) in the directory `dir`, made if there is none. Processes that are to see one another
    /// use the same directory, whoever they are and in whatever container.
    ///
    /// # Errors
    /// `Io`; `Foreign` if something else has the file's name, which is left as it is. A damaged ledger of this layout is made anew if it is the
    /// caller's own and nobody is in it, and `Foreign` otherwise.
    pub fn open(dir: &Path, gpu: &str) -> Result<Ledger> {
        let plain = |c: char| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' };
        let name: String = gpu.chars().map(plain).take(120).collect();
        let desk = Desk::open(&dir.join(format!("sire-ledger-{name}")))?;
        Ok(Ledger(Arc::new(Table { desk, seen: Mutex::default(), thread: Mutex::new(()) })))
    }

    /// Every living member, by slot. Needs no lock and disturbs nobody.
    ///
    /// # Errors
    /// `Io`; `Forked` in a child of the process that opened it.
    pub fn entries(&self) -> Result<Vec<Entry>> {
        let living = self.0.living()?;
        Ok(living
            .into_iter()
            .map(|(slot, r)| Entry {
                slot,
                state: r.state,
                uid: r.uid,
                pid: r.pid,
                started: r.started,
                bytes: r.bytes,
                owned: r.owned,
                ticket: r.ticket,
            })
            .collect())
    }

    /// Takes a slot.
    ///
    /// # Errors
    /// `Full`, `Io`, `Foreign` if the file was replaced meanwhile, `Forked`.
    pub fn join(&self) -> Result<Member> {
        self.0.desk.is_ours()?;
        let desk = self.0.desk.again()?;
        for slot in 0..SLOTS {
            if desk.move_in(slot)? {
                let mine = Record { uid: own_user(), pid: std::process::id(), started: started(), ..Record::default() };
                let member = Member { ledger: Arc::clone(&self.0), desk, slot, record: Mutex::new(mine) };
                member.change(|_| {})?;
                return Ok(member);
            }
        }
        Err(Error::Full { slots: SLOTS })
    }
}

impl Table {
    /// The records of the slots that somebody lives in.
    fn living(&self) -> Result<Vec<(u32, Record)>> {
        self.desk.is_ours()?;
        let mut living = Vec::new();
        for slot in 0..SLOTS {
            // Most slots have none, and are not asked about further.
            if self.record(slot)?.is_none() || !self.desk.is_taken(slot)? {
                continue;
            }
            // Read again, now that somebody has the lock: the slot was wiped before, so this is no dead predecessor's record.
            living.extend(self.record(slot)?.map(|record| (slot, record)));
        }
        Ok(living)
    }

    /// What is written in a slot.
    fn record(&self, slot: u32) -> Result<Option<Record>> {
        let (record, _) = layout::newest(&self.desk.read(slot)?);
        Ok(record.filter(|record| record.sequence > 0))
    }

    /// Everybody but `me`, and who of them has fallen silent.
    fn scene(&self, me: u32) -> Result<Scene> {
        let now = Instant::now();
        let mut seen = locked(&self.seen);
        let mut scene = Scene { others: Vec::new(), changes: Vec::new() };
        for (slot, r) in self.living()?.into_iter().filter(|(slot, _)| *slot != me) {
            let entry = seen.entry(slot).or_insert((r.ticket, r.looks, now));
            if (entry.0, entry.1) != (r.ticket, r.looks) {
                *entry = (r.ticket, r.looks, now);
            }
            let silent = now.saturating_duration_since(entry.2) > SILENCE;
            scene.others.push(Other { state: r.state, ticket: r.ticket, bytes: r.bytes, owned: r.owned, silent });
            scene.changes.extend((r.state == State::Holding).then_some((slot, r.sequence)));
        }
        Ok(scene)
    }

    /// Runs `with` at the desk; `Stuck` if it is not free for so long.
    fn at_the_desk<R>(&self, limit: Duration, with: impl FnOnce() -> Result<R>) -> Result<R> {
        let begun = Instant::now();
        let _thread = loop {
            // Another thread may wait for another process here.
            if let Some(thread) = try_locked(&self.thread)
                && self.desk.sit_down()?
            {
                break thread;
            }
            if begun.elapsed() > limit {
                return Err(Error::Stuck);
            }
            std::thread::sleep(Duration::from_micros(200));
        };
        let result = with();
        self.desk.stand_up();
        result
    }
}

impl Member {
    /// Waits for its turn and for room, and takes what is wanted; returns how many bytes that are. `memory` asks the driver: where it says nothing,
    /// nothing is granted. What the member held before is let go first.
    ///
    /// # Errors
    /// `TooLarge` at once, `Speechless` within a second: then nothing has changed. `TimedOut`, `Cancelled`, `Io`, `Forked`: then nothing is reserved.
    pub fn reserve(&self, want: Want, memory: &dyn Fn() -> Option<Memory>, patience: Patience<'_>) -> Result<u64> {
        self.reserve_asking(want, memory, patience, &|_, _| {})
    }

    /// The same. `short` hears, before each time that the member waits although it is its turn, how many bytes are missing, and when the look
    /// began that found that; it must not wait itself, because a member that does not look is passed by.
    ///
    /// # Errors
    /// As [`Member::reserve`].
    pub fn reserve_asking(
        &self,
        want: Want,
        memory: &dyn Fn() -> Option<Memory>,
        patience: Patience<'_>,
        short: &dyn Fn(u64, Instant),
    ) -> Result<u64> {
        let begun = Instant::now();
        let total = total(memory, patience, begun)?;
        if want.at_least() > total {
            return Err(Error::TooLarge { wanted: want.at_least(), total });
        }
        let outcome = self.wait(want, memory, patience, short, begun);
        if outcome.is_err() {
            // Best effort: the first error is the one that helps, and who cannot leave the queue falls silent in it.
            let _ = self.release();
        }
        outcome
    }

    fn wait(
        &self,
        want: Want,
        memory: &dyn Fn() -> Option<Memory>,
        patience: Patience<'_>,
        short: &dyn Fn(u64, Instant),
        begun: Instant,
    ) -> Result<u64> {
        let mut queued = false;
        loop {
            let seen = Instant::now();
            if !queued {
                queued = self.line_up(want.at_least())?;
            }
            let look = if queued { self.look(want, memory)? } else { Look::Stuck };
            if let Look::Judged(Verdict::Take(bytes)) = look {
                return Ok(bytes);
            }
            if (patience.cancelled)() {
                return Err(Error::Cancelled);
            }
            let Some(nap) = patience.nap(begun) else {
                return Err(Error::TimedOut { wanted: want.at_least(), why: explain(&look) });
            };
            if let Look::Judged(Verdict::Short(missing)) = look {
                short(missing, seen);
            }
            std::thread::sleep(nap);
        }
    }

    /// Takes the last place in the queue; what the member held is let go by that. False if the desk is not to be had now.
    fn line_up(&self, bytes: u64) -> Result<bool> {
        match self.queue(bytes, MOMENT) {
            Err(Error::Stuck) => Ok(false),
            queued => queued.map(|()| true),
        }
    }

    fn queue(&self, bytes: u64, limit: Duration) -> Result<()> {
        self.ledger.at_the_desk(limit, || {
            let last = self.ledger.living()?.iter().map(|(_, record)| record.ticket).max().unwrap_or(0);
            self.change(|r| {
                *r = Record { state: State::Waiting, ticket: last.saturating_add(1), bytes, owned: 0, ..*r }
            })
        })
    }

    /// Looks once, and takes the bytes if it may.
    fn look(&self, want: Want, memory: &dyn Fn() -> Option<Memory>) -> Result<Look> {
        let look = self.judge(want, memory)?;
        if !matches!(look, Look::Judged(Verdict::Take(_))) {
            self.say(State::Waiting, want.at_least())?;
        }
        Ok(look)
    }

    /// What the others say and what the driver says, of the same moment: the others say the same before and after the driver is asked. With
    /// the order that [`Member::note_owned`] asks for, no byte is then counted as free that is promised; and nobody can have been granted any in
    /// between. Only the taking needs the desk: whoever is stopped while it merely looks, or while the driver answers, holds up nobody.
    fn judge(&self, want: Want, memory: &dyn Fn() -> Option<Memory>) -> Result<Look> {
        let ticket = locked(&self.record).ticket;
        for _ in 0..AGREE {
            let scene = self.ledger.scene(self.slot)?;
            let Some(memory) = memory() else { return Ok(Look::Blind) };
            let verdict = turn::verdict(ticket, want, &scene.others, memory.free);
            let agreed = match verdict {
                Verdict::Take(bytes) => self.take(bytes, &scene),
                _ => Ok(self.ledger.scene(self.slot)? == scene),
            };
            match agreed {
                Ok(true) => return Ok(Look::Judged(verdict)),
                Ok(false) => {}
                Err(Error::Stuck) => return Ok(Look::Stuck),
                Err(error) => return Err(error),
            }
        }
        Ok(Look::Restless)
    }

    /// Takes the bytes, unless the others say something else than when that was decided.
    fn take(&self, bytes: u64, seen: &Scene) -> Result<bool> {
        self.ledger.at_the_desk(MOMENT, || {
            let same = self.ledger.scene(self.slot)? == *seen;
            if same {
                self.say(State::Holding, bytes)?;
            }
            Ok(same)
        })
    }

    /// What a look has come to.
    fn say(&self, state: State, bytes: u64) -> Result<()> {
        self.change(|r| *r = Record { state, bytes, looks: r.looks.wrapping_add(1), ..*r })
    }

    /// Takes the last place in the queue of a ledger in which nobody has bytes; gives up what it had there by that.
    pub(crate) fn queue_for_turn(&self) -> Result<()> {
        self.queue(0, AT_THE_DESK)
    }

    /// Lets `verdict` decide, from this member's ticket and the others, whether it holds from now on; that counts as a look. Only the taking needs
    /// the desk, where it is decided once more: whoever is stopped while it merely looks holds up nobody.
    pub(crate) fn decide<R>(&self, verdict: impl Fn(u64, &[Other]) -> (R, bool)) -> Result<R> {
        let look = || Ok(verdict(locked(&self.record).ticket, &self.others()?));
        let (result, holds) = look()?;
        if !holds {
            self.say(State::Waiting, 0)?;
            return Ok(result);
        }
        self.ledger.at_the_desk(AT_THE_DESK, || {
            let (result, holds) = look()?;
            self.say(if holds { State::Holding } else { State::Waiting }, 0)?;
            Ok(result)
        })
    }

    /// Everybody else.
    pub(crate) fn others(&self) -> Result<Vec<Other>> {
        Ok(self.ledger.scene(self.slot)?.others)
    }

    /// Says how many bytes of the reservation this process owns. More is said *after* the memory was allocated, less *before* it is
    /// given back: so what others compute from this and from the driver's figure is never too much.
    ///
    /// # Errors
    /// `Io`, `Forked`.
    pub fn note_owned(&self, owned: u64) -> Result<()> {
        self.change(|r| r.owned = owned)
    }

    /// Reserves less, and owns no more than that of it. More must be asked for anew.
    ///
    /// # Errors
    /// `Io`, `Forked`.
    pub fn shrink(&self, bytes: u64) -> Result<()> {
        self.change(|r| {
            r.bytes = r.bytes.min(bytes);
            r.owned = r.owned.min(bytes);
        })
    }

    /// Takes over what another member of this ledger holds, which is then to be released or dropped: until it is, the bytes count twice, and at no
    /// moment not at all.
    ///
    /// # Errors
    /// `Io`, `Forked`: then nothing has changed.
    pub fn absorb(&self, other: &Member) -> Result<()> {
        let taken = *locked(&other.record);
        self.change(|r| {
            r.bytes = r.bytes.saturating_add(taken.bytes);
            r.owned = r.owned.saturating_add(taken.owned);
        })
    }

    /// What [`Member::note_owned`] was told last, or less.
    #[must_use]
    pub fn owned(&self) -> u64 {
        locked(&self.record).owned
    }

    /// Lets go of the reservation, or leaves the queue.
    ///
    /// # Errors
    /// `Io`, `Forked`.
    pub fn release(&self) -> Result<()> {
        self.change(|r| *r = Record { state: State::Idle, bytes: 0, owned: 0, ..*r })
    }

    /// Bytes reserved now.
    #[must_use]
    pub fn reserved(&self) -> u64 {
        let record = locked(&self.record);
        if record.state == State::Holding { record.bytes } else { 0 }
    }

    /// Writes the changed record over the older of its two copies; and over the other one, too, if that is not what this member wrote last: whatever
    /// somebody else has written here is gone with this. In between, and wherever the second write is cut, one of the two is valid.
    fn change(&self, with: impl FnOnce(&mut Record)) -> Result<()> {
        self.desk.is_ours()?;
        let mut record = locked(&self.record);
        let (found, older) = layout::newest(&self.desk.read(self.slot)?);
        let is_own = found == Some(*record);
        let mut next = *record;
        with(&mut next);
        // Never a number that was found, which may be the last there is.
        next.sequence = record.sequence + 1;
        let bytes = layout::encode(&next);
        self.desk.write(self.slot, older, &bytes)?;
        *record = next;
        if is_own { Ok(()) } else { self.desk.write(self.slot, 1 - older, &bytes) }
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        // Best effort: the lock goes with the descriptor, and it is the lock that counts.
        let _ = self.release();
    }
}

/// How many bytes the device has, as soon as the driver says so.
fn total(memory: &dyn Fn() -> Option<Memory>, patience: Patience<'_>, begun: Instant) -> Result<u64> {
    loop {
        if let Some(memory) = memory() {
            return Ok(memory.total);
        }
        match patience.nap(begun) {
            Some(nap) if begun.elapsed() < SPEECHLESS => std::thread::sleep(nap),
            _ => return Err(Error::Speechless),
        }
    }
}

fn explain(look: &Look) -> String {
    match look {
        Look::Judged(verdict) => explain_verdict(*verdict),
        Look::Blind => "the driver does not say how much memory is free".into(),
        Look::Restless => "those who hold reservations changed what they have all the time".into(),
        Look::Stuck => Error::Stuck.to_string(),
    }
}

fn explain_verdict(verdict: Verdict) -> String {
    match verdict {
        Verdict::Take(_) => "it was granted".into(),
        Verdict::Shared(1) => "one other process holds a reservation".into(),
        Verdict::Shared(others) => format!("{others} other reservations are held"),
        Verdict::Behind(1) => "one other process came first and still waits".into(),
        Verdict::Behind(ahead) => format!("{ahead} other processes came first and still wait"),
        Verdict::Short(missing) => format!("{missing} bytes are missing: others own or have reserved them"),
    }
}

/// When this process started, in clock ticks since boot; 0 if the system does not say. For people, not for decisions.
fn started() -> u64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The second field, the name, may contain anything but its last parenthesis.
    let rest = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
    rest.split(' ').nth(19).and_then(|ticks| ticks.parse().ok()).unwrap_or(0)
}
