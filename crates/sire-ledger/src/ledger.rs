//! Joining, waiting, holding, leaving. A [`Ledger`] is this process's view of one GPU's file; a [`Member`] is one slot of it, with
//! an open description and a lock of its own, so that a process may be several members and all of them are seen alike.
//! Only taking a reservation needs the desk (a lock that all share); whatever makes room is written at once.

use crate::error::{Error, Result};
use crate::file::{Desk, own_user};
use crate::layout::{self, Record, SLOTS, State};
use crate::turn::{self, Other, Verdict, Want};
use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How long to try to sit down before another process counts as stuck.
const AT_THE_DESK: Duration = Duration::from_secs(5);
/// How often a waiting member looks.
const LOOK: Duration = Duration::from_millis(20);
/// How often to look for a moment in which others and driver agree.
const AGREE: usize = 20;
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
    /// `None`: for ever. Zero: only look once.
    pub timeout: Option<Duration>,
    /// Asked at every look; true ends the wait.
    pub cancelled: &'a dyn Fn() -> bool,
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

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
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
            if desk.take_slot(slot)? {
                // Whatever was written there before, by whomever, is not to be taken for ours.
                desk.wipe(slot)?;
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
            // The record first: if its writer dies in between it is not counted, and a newcomer's is at worst not yet.
            let (record, _) = layout::newest(&self.desk.read(slot)?);
            if let Some(record) = record.filter(|record| record.sequence > 0)
                && self.desk.is_taken(slot)?
            {
                living.push((slot, record));
            }
        }
        Ok(living)
    }

    /// Everybody but `me`, and who of them has fallen silent.
    fn others(&self, me: u32) -> Result<Vec<Other>> {
        let now = Instant::now();
        let mut seen = locked(&self.seen);
        let living = self.living()?.into_iter().filter(|(slot, _)| *slot != me);
        Ok(living
            .map(|(slot, r)| {
                let entry = seen.entry(slot).or_insert((r.ticket, r.looks, now));
                if (entry.0, entry.1) != (r.ticket, r.looks) {
                    *entry = (r.ticket, r.looks, now);
                }
                let silent = now.saturating_duration_since(entry.2) > SILENCE;
                Other { state: r.state, ticket: r.ticket, bytes: r.bytes, owned: r.owned, silent }
            })
            .collect())
    }

    /// Runs `with` at the desk.
    fn at_the_desk<R>(&self, with: impl FnOnce() -> Result<R>) -> Result<R> {
        let _thread = locked(&self.thread);
        let begun = Instant::now();
        while !self.desk.sit_down()? {
            if begun.elapsed() > AT_THE_DESK {
                return Err(Error::Stuck);
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        let result = with();
        self.desk.stand_up();
        result
    }
}

impl Member {
    /// Waits for its turn and for room, and takes what is wanted; returns how many bytes that are. `memory` asks the driver. What the member
    /// held before is let go first.
    ///
    /// # Errors
    /// `TooLarge` at once; `TimedOut`, `Cancelled`, `Stuck`, `Io`, `Forked`: then nothing is reserved.
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
        let total = memory().map_or(u64::MAX, |memory| memory.total);
        let bytes = want.at_least();
        if bytes > total {
            return Err(Error::TooLarge { wanted: bytes, total });
        }
        let begun = Instant::now();
        self.queue(bytes)?;
        let outcome = loop {
            let seen = Instant::now();
            let verdict = match self.look(want, memory) {
                Ok(Verdict::Take(bytes)) => break Ok(bytes),
                Ok(verdict) => verdict,
                Err(error) => break Err(error),
            };
            if (patience.cancelled)() {
                break Err(Error::Cancelled);
            }
            let left = patience.timeout.map_or(LOOK, |timeout| timeout.saturating_sub(begun.elapsed()));
            if left.is_zero() {
                break Err(Error::TimedOut { wanted: bytes, why: explain(verdict) });
            }
            if let Verdict::Short(missing) = verdict {
                short(missing, seen);
            }
            std::thread::sleep(left.min(LOOK));
        };
        if outcome.is_err() {
            self.release()?;
        }
        outcome
    }

    /// Takes the last place in the queue; what the member held is let go by that.
    pub(crate) fn queue(&self, bytes: u64) -> Result<()> {
        self.ledger.at_the_desk(|| {
            let last = self.ledger.living()?.iter().map(|(_, record)| record.ticket).max().unwrap_or(0);
            self.change(|r| {
                *r = Record { state: State::Waiting, ticket: last.saturating_add(1), bytes, owned: 0, ..*r }
            })
        })
    }

    /// Looks once, and takes the bytes if it may.
    fn look(&self, want: Want, memory: &dyn Fn() -> Option<Memory>) -> Result<Verdict> {
        self.ledger.at_the_desk(|| {
            let ticket = locked(&self.record).ticket;
            let (others, free) = self.agreed(memory)?;
            let verdict = turn::verdict(ticket, want, &others, free);
            let (state, bytes) = match verdict {
                Verdict::Take(bytes) => (State::Holding, bytes),
                _ => (State::Waiting, want.at_least()),
            };
            self.change(|r| *r = Record { state, bytes, looks: r.looks.wrapping_add(1), ..*r })?;
            Ok(verdict)
        })
    }

    /// Lets `verdict` decide, from this member's ticket and the others, whether it holds from now on; that counts as a look. Only the taking needs
    /// the desk, where it is decided once more: whoever is stopped while it merely looks holds up nobody.
    pub(crate) fn decide<R>(&self, verdict: impl Fn(u64, &[Other]) -> (R, bool)) -> Result<R> {
        let look = || Ok(verdict(locked(&self.record).ticket, &self.ledger.others(self.slot)?));
        let say = |state| self.change(|r| *r = Record { state, looks: r.looks.wrapping_add(1), ..*r });
        let (result, holds) = look()?;
        if !holds {
            say(State::Waiting)?;
            return Ok(result);
        }
        self.ledger.at_the_desk(|| {
            let (result, holds) = look()?;
            say(if holds { State::Holding } else { State::Waiting })?;
            Ok(result)
        })
    }

    /// Everybody else.
    pub(crate) fn others(&self) -> Result<Vec<Other>> {
        self.ledger.others(self.slot)
    }

    /// What the others say and what the driver says, of the same moment: the others say the same before and after the driver is asked.
    /// With the order that [`Member::note_owned`] asks for, no byte is then counted as free that is promised. If they never rest,
    /// nothing counts as free this time.
    fn agreed(&self, memory: &dyn Fn() -> Option<Memory>) -> Result<(Vec<Other>, u64)> {
        let mut before = self.ledger.others(self.slot)?;
        for _ in 0..AGREE {
            let free = memory().map_or(u64::MAX, |memory| memory.free);
            let after = self.ledger.others(self.slot)?;
            if before == after {
                return Ok((after, free));
            }
            before = after;
        }
        Ok((before, 0))
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

    /// Writes the changed record over the older of its two copies.
    fn change(&self, with: impl FnOnce(&mut Record)) -> Result<()> {
        self.desk.is_ours()?;
        let mut record = locked(&self.record);
        let (found, copy) = layout::newest(&self.desk.read(self.slot)?);
        let mut next = *record;
        with(&mut next);
        next.sequence = found.map_or(0, |found| found.sequence).wrapping_add(1).max(1);
        self.desk.write(self.slot, copy, &layout::encode(&next))?;
        *record = next;
        Ok(())
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        // Best effort: the lock goes with the descriptor, and it is the lock that counts.
        let _ = self.release();
    }
}

fn explain(verdict: Verdict) -> String {
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
