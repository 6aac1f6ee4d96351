//! Preemption by agreement: what this process has marked as reclaimable, and what it does when another one needs it. docs/preemption.md is the contract.
//!
//! A *mark* is the program's consent, about a tag and what is under it. A region belongs to the mark with the longest tag that it lies under, of those to the
//! newest. What a mark means gives way as a whole: at a safe point, by the desk (`sire_control::desk::loans`), backed up as its regions' policies say. When the
//! needer has ended it comes back at a safe point, as if it were the last in the queue of those who reserve memory: never over their heads.

use crate::capture;
use crate::config;
use crate::control;
use crate::lock;
use crate::log;
use crate::process::{self, Process};
use crate::reservation;
use serde_json::{Value, json};
use sire_control::desk::{Back, Part, Terms, Undo};
use sire_control::instance;
use sire_control::place::Place;
use sire_control::preempt::Borrower;
use sire_control::preempt::plan::{Bytes, Mark};
use sire_control::server::Descriptors;
use sire_core::driver::Device;
use sire_core::engine::{Engine, Holding, RegionId, ResumeOptions, Selection, State};
use sire_core::error::{Error, Result, Status};
use sire_ledger::{Ledger, Member, Patience, Want};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, Once};
use std::time::{Duration, Instant};

/// Marks of a process.
const MOST: usize = 256;

/// What the program says about a tag.
#[derive(Clone, Debug)]
pub(crate) struct Wish {
    pub(crate) tag: String,
    pub(crate) priority: i32,
    pub(crate) after_idle: Duration,
    pub(crate) terms: Terms,
    pub(crate) discard: bool,
}

#[derive(Debug)]
struct Consent {
    number: u64,
    wish: Wish,
    /// When it came back from a loan.
    back: Option<Instant>,
}

static MARKS: Mutex<Vec<Consent>> = Mutex::new(Vec::new());
static NEXT: AtomicU64 = AtomicU64::new(1);
/// Whether there are any, for whoever takes no lock.
static ANY: AtomicBool = AtomicBool::new(false);

// ---- the program's side -------------------------------------------------------------------------------------------------

/// Consents, and opens the control socket, unless that is forbidden; the mark's number.
pub(crate) fn open(process: &'static Process, wish: Wish) -> Result<u64> {
    if config::get()?.control_forbidden {
        return Err(Error::new(
            Status::Unsupported,
            "SIRE_CONTROL forbids the control socket, through which other processes would ask for the memory; set it to 1, or unset it",
        ));
    }
    let selection = Selection::Tag(wish.tag.clone());
    observe(&process.engine, &selection)?;
    control::open()?;
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let mut marks = lock(&MARKS);
    if marks.len() >= MOST {
        return Err(Error::new(Status::Unsupported, format!("{MOST} marks are open already; close some")));
    }
    marks.push(Consent { number, wish, back: None });
    ANY.store(true, Ordering::Relaxed);
    drop(marks);
    // Regions that another thread has opened meanwhile; whoever looks at the mark does it again.
    let _ = observe(&process.engine, &selection);
    Ok(number)
}

/// Uses of these regions are noted from now on.
fn observe(engine: &Engine, selection: &Selection) -> Result<()> {
    match engine.observe(selection) {
        // Nothing is there yet.
        Err(error) if error.status == Status::UnknownTag => Ok(()),
        outcome => outcome,
    }
}

/// The program has used what the mark is about for the last time `ago`.
pub(crate) fn used(process: &Process, number: u64, ago: Duration) -> Result<()> {
    let tag = {
        let marks = lock(&MARKS);
        let mark = marks.iter().find(|mark| mark.number == number);
        mark.ok_or_else(|| no_mark(number))?.wish.tag.clone()
    };
    match process.engine.say_used(&Selection::Tag(tag), ago) {
        // Nothing is there yet that could lie idle.
        Err(error) if error.status == Status::UnknownTag => Ok(()),
        outcome => outcome,
    }
}

/// Takes the consent back; `resumed` hears of what comes back by that.
pub(crate) fn close(number: u64, mut resumed: impl FnMut(Option<&str>)) -> Result<()> {
    if process::started().is_none() {
        // A forked child has none, and the locks may be held by threads that do not exist in it.
        return Ok(());
    }
    {
        let mut marks = lock(&MARKS);
        marks.retain(|mark| mark.number != number);
        ANY.store(!marks.is_empty(), Ordering::Relaxed);
    }
    let Some(control) = control::current() else { return Ok(()) };
    control.desk.recall(number, |back| {
        bring(back, ResumeOptions::default())?;
        resumed(back.asked());
        Ok(())
    })
}

/// A region was made, or asked for.
pub(crate) fn region_opened(engine: &Engine, region: RegionId) {
    if ANY.load(Ordering::Relaxed) {
        // Of a region that is there.
        let _ = observe(engine, &Selection::Exact(vec![region]));
    }
}

/// Brings back what a pause has taken, and nothing that is away for another reason by now; refused while a graph is being captured.
pub(crate) fn bring(back: &Back, options: ResumeOptions<'_>) -> Result<sire_core::engine::Report> {
    let options = ResumeOptions { capturing: options.capturing || capture::in_progress(), ..options };
    crate::abi::transition::carry_out(|engine| engine.resume(&selection(engine, back), options))
}

fn selection(engine: &Engine, back: &Back) -> Selection {
    match back {
        Back::Everything => Selection::All,
        Back::Under(tag) => Selection::Tag(tag.clone()),
        Back::Exactly { parts, .. } => Selection::Exact(
            parts.iter().filter(|part| is_away(engine, part)).map(|part| RegionId(part.region)).collect(),
        ),
    }
}

fn is_away(engine: &Engine, part: &Part) -> bool {
    let region = RegionId(part.region);
    let is_paused = engine.state(region).is_ok_and(|state| state == State::Paused);
    is_paused && engine.pauses(region).is_ok_and(|pauses| pauses == part.pauses)
}

/// The program may have resumed something itself: who waits for nothing else goes on.
pub(crate) fn look_at_loans(engine: &Engine) {
    if let Some(control) = control::current()
        && control.desk.is_wanted()
    {
        control.desk.came_back(|part| is_away(engine, part));
    }
}

// ---- the owner's side ---------------------------------------------------------------------------------------------------

/// What the program has agreed to, of a mark that is open.
pub(crate) fn terms(number: u64) -> Option<Terms> {
    lock(&MARKS).iter().find(|mark| mark.number == number).map(|mark| mark.wish.terms)
}

/// All marks, as others may see them; null in a process that has used no device.
pub(crate) fn described() -> Value {
    let Some(process) = process::started().filter(|_| ANY.load(Ordering::Relaxed)) else { return json!([]) };
    json!(describe(process))
}

fn describe(process: &Process) -> Vec<Mark> {
    let lent = control::current().map(|control| control.desk.lent()).unwrap_or_default();
    let all: Vec<(u64, Wish, Option<Instant>)> =
        lock(&MARKS).iter().map(|mark| (mark.number, mark.wish.clone(), mark.back)).collect();
    let wishes: Vec<(u64, &str)> = all.iter().map(|(number, wish, _)| (*number, wish.tag.as_str())).collect();
    let mark = |(number, wish, back): &(u64, Wish, Option<Instant>)| {
        let regions = meant(&process.engine, &wishes, *number, &wish.tag);
        let loan = lent.iter().find(|(mark, _)| mark == number).map(|(_, over)| *over);
        let there = || regions.iter().filter(|each| bytes(each) > 0);
        Mark {
            mark: *number,
            tag: wish.tag.clone(),
            priority: wish.priority,
            after_idle: wish.after_idle.as_secs_f64(),
            resume: wish.terms.returns,
            wait: wish.terms.waits,
            discard: wish.discard,
            gpus: by_gpu(process, &regions),
            idle_seconds: there().map(|each| each.idle).min().unwrap_or_default().as_secs_f64(),
            back_seconds: back.map(|back| back.elapsed().as_secs_f64()),
            state: state(loan, &regions).to_owned(),
            obstacle: why_away(*number).or_else(|| obstacle(wish, &regions)),
        }
    };
    all.iter().map(mark).collect()
}

/// The regions that a mark is about.
fn meant(engine: &Engine, marks: &[(u64, &str)], number: u64, tag: &str) -> Vec<Holding> {
    let selection = Selection::Tag(tag.to_owned());
    // Who is not observed would never be idle. Of a tag that cannot be looked up there are no holdings either.
    let _ = observe(engine, &selection);
    let found = engine.holdings(&selection).unwrap_or_default();
    found.into_iter().filter(|region| mark_of(marks, &region.tag) == Some(number)).collect()
}

/// The mark with the longest tag that `tag` lies under; of those the newest.
fn mark_of(marks: &[(u64, &str)], tag: &str) -> Option<u64> {
    let is_under = |top: &str| tag.strip_prefix(top).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    let concerned = marks.iter().filter(|(_, top)| is_under(top));
    concerned.max_by_key(|(number, top)| (top.len(), *number)).map(|(number, _)| *number)
}

fn bytes(region: &Holding) -> u64 {
    region.resident.values().sum()
}

fn by_gpu(process: &Process, regions: &[Holding]) -> Vec<Bytes> {
    let mut sums: BTreeMap<Device, u64> = BTreeMap::new();
    for (device, bytes) in regions.iter().flat_map(|region| &region.resident) {
        *sums.entry(*device).or_insert(0) += bytes;
    }
    let named = |(device, bytes): (Device, u64)| Some(Bytes { gpu: process.driver.uuid(device).ok()?, bytes });
    sums.into_iter().filter(|(_, bytes)| *bytes > 0).filter_map(named).collect()
}

fn state(loan: Option<bool>, regions: &[Holding]) -> &'static str {
    match loan {
        Some(true) => "returning",
        Some(false) => "lent",
        None if regions.iter().any(|each| each.state == State::Resident && bytes(each) > 0) => "resident",
        None if regions.iter().any(|each| each.state == State::Paused) => "paused",
        None => "empty",
    }
}

/// Why what gave way by it is not back.
fn why_away(number: u64) -> Option<String> {
    let why = control::current()?.desk.why_away(number)?;
    Some(format!("what gave way before could not be brought back: {why}"))
}

/// What is in the way of every need.
fn obstacle(wish: &Wish, regions: &[Holding]) -> Option<String> {
    let mut there = regions.iter().filter(|each| bytes(each) > 0);
    if control::current().is_some_and(|control| control.desk.is_away()) {
        return Some("another process has its turn on the device".to_owned());
    }
    if let Some(region) = there.clone().find(|each| each.in_use) {
        return Some(format!("region '{}' is in use: a thread is inside, or it is leased", region.tag));
    }
    if let Some(region) = there.clone().find(|each| !each.keeps && each.state == State::Resident && !wish.discard) {
        return Some(format!(
            "region '{}' keeps no backup, and the mark does not say that its content may be lost (discard)",
            region.tag
        ));
    }
    let reserved = there.find(|each| each.resident.keys().any(|device| is_reserved(*device)));
    reserved.map(|region| {
        format!("its process has reserved memory of the device, and would keep what region '{}' gives back", region.tag)
    })
}

/// Whether this process has reserved memory of the device, or `sire reserve` has for it.
fn is_reserved(device: Device) -> bool {
    let given = std::env::var("SIRE_RESERVED").unwrap_or_default();
    let uuid = || process::started().and_then(|process| process.driver.uuid(device).ok());
    let is_given = || given.rsplit_once(':').is_some_and(|(gpu, _)| uuid().is_some_and(|uuid| uuid == gpu));
    reservation::is_on(device) || is_given()
}

/// What gives way for a need of this priority, now: the tag and the regions.
pub(crate) fn take(process: &Process, number: u64, priority: i32) -> Result<(String, Vec<RegionId>)> {
    let refused = |why: String| Error::new(Status::Unsupported, why);
    let marks = describe(process);
    let mark = marks.iter().find(|mark| mark.mark == number).ok_or_else(|| no_mark(number))?;
    if let Some(why) = mark.objection(priority) {
        return Err(refused(why));
    }
    let wishes: Vec<(u64, &str)> = marks.iter().map(|mark| (mark.mark, mark.tag.as_str())).collect();
    let regions = meant(&process.engine, &wishes, number, &mark.tag);
    let ids: Vec<RegionId> = regions.iter().filter(|each| bytes(each) > 0).map(|each| each.region).collect();
    if ids.is_empty() {
        return Err(refused(format!("nothing of '{}' is on a device", mark.tag)));
    }
    Ok((mark.tag.clone(), ids))
}

/// Brings back what gave way, unless somebody waits in the queue for memory, or reserved it. `Busy` if this is no moment for it.
pub(crate) fn recover(
    process: &'static Process,
    number: u64,
    undo: &Undo,
    mut resumed: impl FnMut(Option<&str>),
) -> Result<()> {
    if capture::in_progress() {
        return Err(Error::new(Status::Capturing, "a CUDA graph is being captured"));
    }
    for back in undo {
        // A try that failed half-way has brought that one back, and told of it.
        if matches!(back, Back::Exactly { parts, .. } if !parts.iter().any(|part| is_away(&process.engine, part))) {
            continue;
        }
        let holdings = process.engine.holdings(&selection(&process.engine, back))?;
        let _places = places(process, &holdings)?;
        bring(back, ResumeOptions::default())?;
        resumed(back.asked());
    }
    if let Some(mark) = lock(&MARKS).iter_mut().find(|mark| mark.number == number) {
        mark.back = Some(Instant::now());
    }
    Ok(())
}

/// Places in the ledgers for what comes back, until it is there; `Busy` if others came first.
fn places(process: &Process, holdings: &[Holding]) -> Result<Vec<Member>> {
    let mut sums: BTreeMap<Device, u64> = BTreeMap::new();
    for (device, bytes) in holdings.iter().flat_map(|region| &region.away) {
        *sums.entry(*device).or_insert(0) += bytes;
    }
    let mut places = Vec::new();
    for (device, bytes) in sums.into_iter().filter(|(device, bytes)| *bytes > 0 && !is_reserved(*device)) {
        // Where there is no ledger nobody waits in it.
        let Ok(member) = process.driver.uuid(device).map_err(drop).and_then(|gpu| join(&gpu)) else { continue };
        let memory = || reservation::memory(process, device);
        let once = Patience { timeout: Some(Duration::ZERO), cancelled: &|| false };
        match member.reserve(Want::Bytes(bytes), &memory, once) {
            Ok(_) => places.push(member),
            Err(error @ (sire_ledger::Error::TimedOut { .. } | sire_ledger::Error::Stuck)) => {
                return Err(reservation::said(error));
            }
            Err(_) => {}
        }
    }
    Ok(places)
}

fn join(gpu: &str) -> std::result::Result<Member, ()> {
    Ledger::open(&sire_ledger::directory(), gpu).and_then(|ledger| ledger.join()).map_err(drop)
}

fn no_mark(number: u64) -> Error {
    Error::new(Status::InvalidArgument, format!("there is no mark {number}; was it closed?"))
}

// ---- the needer's side --------------------------------------------------------------------------------------------------

/// The connections that hold other processes' memory: a forked child closes its copies, or their loans would outlast this process.
static LENT: Descriptors = Descriptors::new();

/// Somebody who asks others to give way on `device`.
pub(crate) fn borrower(process: &Process, device: Device, priority: i32) -> Result<Borrower> {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: the handler is a plain function of this library, which is linked to stay loaded for good.
        if unsafe { libc::pthread_atfork(None, None, Some(after_fork_in_child)) } != 0 {
            log::warning!(
                "no fork handler could be registered; what others lend is theirs again when forked children end, too"
            );
        }
    });
    let failed =
        |error| Error::new(Status::Unsupported, format!("other processes cannot be asked to give way: {error}"));
    let place = Place::of_this_user().map_err(failed)?;
    let spawn = |name: &str, body: Box<dyn FnOnce() + Send>| control::spawn(name, body).map(drop);
    Ok(Borrower::new(place, &process.driver.uuid(device)?, priority, spawn, Some(&LENT)))
}

/// A store and `close` only.
extern "C" fn after_fork_in_child() {
    instance::forget();
    LENT.close_in_child();
}

#[cfg(test)]
mod tests {
    use super::mark_of;

    #[test]
    fn a_region_belongs_to_the_longest_mark_and_then_to_the_newest() {
        let marks = [(1, "m"), (2, "m/a"), (3, "m"), (4, "ma")];
        assert_eq!(mark_of(&marks, "m/a/x"), Some(2));
        assert_eq!(mark_of(&marks, "m/b"), Some(3));
        assert_eq!(mark_of(&marks, "ma"), Some(4));
        assert_eq!(mark_of(&marks, "mx"), None);
    }
}
