//! Pipelined copies between one device and host memory. A *lane* is a stream of ours with two events; a *pipe* keeps
//! at most two pieces under way on a lane, so that one copies while the other is dealt with, and so that
//! nothing of the program ever queues behind more than two pieces; how long they are is the sender's business. Pieces land in the order in which
//! they were sent, each with the ticket it was sent with.

use crate::clock;
use crate::driver::{Addr, Device, Driver, DriverError, DriverResult, Event, Stream};
use crate::error::Result;
use crate::raw::{self, Broken, Flight, Span};
use crate::settings::IN_FLIGHT;
use crate::sync::{Mutex, lock};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

/// How often a pipe tries to find out whether its copies are done before it gives the lane up.
const DRAIN_ATTEMPTS: usize = 3;

/// A stream of ours, and its events.
#[derive(Debug)]
pub(crate) struct Lane {
    device: Device,
    stream: Stream,
    events: [Event; IN_FLIGHT],
    /// Set while it is in use: what the shelf has of all that are.
    in_use: Option<Arc<()>>,
}

/// Idle lanes, kept for the next transition.
#[derive(Debug)]
pub(crate) struct Lanes {
    driver: Arc<dyn Driver>,
    shelf: Mutex<Shelf>,
}

#[derive(Debug, Default)]
struct Shelf {
    idle: HashMap<Device, Vec<Lane>>,
    /// Shared by all lanes that are in use; another one after a reset.
    in_use: Arc<()>,
    /// How many want that no lane is in use.
    held: usize,
}

/// While it lives, no lane is lent.
#[derive(Debug)]
pub(crate) struct Still<'a>(&'a Lanes);

impl Drop for Still<'_> {
    fn drop(&mut self) {
        lock(&self.0.shelf).held -= 1;
    }
}

/// How long a moment is, for whoever waits for lanes: a reset is rare, and takes thousands of these.
const MOMENT: Duration = Duration::from_micros(50);
/// How long a reset waits for lanes.
const PATIENCE: Duration = Duration::from_secs(10);

impl Lanes {
    /// None yet.
    pub(crate) fn new(driver: Arc<dyn Driver>) -> Lanes {
        Lanes { driver, shelf: Mutex::default() }
    }

    /// An idle lane of `device`, or a new one.
    pub(crate) fn take(&self, device: Device) -> Result<Lane> {
        let (idle, in_use) = self.take_idle(device);
        let lane = idle.map_or_else(|| self.open(device), Ok)?;
        Ok(Lane { in_use: Some(in_use), ..lane })
    }

    /// The right to use a lane, and one, if any is idle.
    fn take_idle(&self, device: Device) -> (Option<Lane>, Arc<()>) {
        loop {
            let mut shelf = lock(&self.shelf);
            if shelf.held == 0 {
                return (shelf.idle.get_mut(&device).and_then(Vec::pop), Arc::clone(&shelf.in_use));
            }
            drop(shelf);
            clock::sleep(MOMENT);
        }
    }

    /// Keeps a lane on which nothing is under way, unless a reset did not wait for it.
    pub(crate) fn put(&self, lane: Lane) {
        let mut shelf = lock(&self.shelf);
        if lane.in_use.as_ref().is_some_and(|in_use| Arc::ptr_eq(in_use, &shelf.in_use)) {
            shelf.idle.entry(lane.device).or_default().push(Lane { in_use: None, ..lane });
        }
    }

    /// Waits until no lane is in use, of whatever device, for ten seconds at most: somebody may wait for memory that nobody will give back. Who wants
    /// a lane waits until the result is dropped.
    pub(crate) fn hold_still(&self) -> Still<'_> {
        lock(&self.shelf).held += 1;
        let still = Still(self);
        let deadline = clock::now() + PATIENCE;
        while Arc::strong_count(&lock(&self.shelf).in_use) > 1 && clock::now() < deadline {
            clock::sleep(MOMENT);
        }
        still
    }

    /// Closes the idle lanes of a device that is about to be reset. Best effort: the reset closes what cannot be closed now.
    pub(crate) fn close(&self, device: Device) {
        let mut shelf = lock(&self.shelf);
        shelf.in_use = Arc::default();
        let lanes = shelf.idle.remove(&device).unwrap_or_default();
        drop(shelf);
        for Lane { stream, events, .. } in lanes {
            events.into_iter().for_each(|event| drop(self.driver.close_event(event)));
            let _ = self.driver.close_stream(stream);
        }
    }

    /// Has the driver make ready what hashing on `device` needs. Best effort: what fails here is tried again when it is needed.
    pub(crate) fn prepare_hash(&self, device: Device) {
        if let Ok(lane) = self.take(device) {
            let _ = raw::prepare_hash(&*self.driver, lane.stream);
            self.put(lane);
        }
    }

    fn open(&self, device: Device) -> Result<Lane> {
        let driver = &*self.driver;
        let stream = driver.open_stream(device)?;
        let first = driver.open_event(device).inspect_err(|_| {
            // Best effort: a stream that cannot be closed is lost, but holds no memory of ours.
            let _ = driver.close_stream(stream);
        })?;
        let second = driver.open_event(device).inspect_err(|_| {
            let _ = driver.close_event(first);
            let _ = driver.close_stream(stream);
        })?;
        Ok(Lane { device, stream, events: [first, second], in_use: None })
    }
}

/// Copies under way on a lane, each with a ticket `T`.
#[derive(Debug)]
pub(crate) struct Pipe<'a, T> {
    driver: &'a dyn Driver,
    lane: Lane,
    flying: VecDeque<(usize, Flight, T)>,
    /// Copies that were queued (at least in part), but whose event could not be recorded.
    stray: Vec<Flight>,
    /// Work without an event of its own was queued (a fill).
    unmarked: bool,
    next: usize,
}

impl<'a, T> Pipe<'a, T> {
    /// An empty pipe.
    pub(crate) fn new(driver: &'a dyn Driver, lane: Lane) -> Pipe<'a, T> {
        Pipe { driver, lane, flying: VecDeque::new(), stray: Vec::new(), unmarked: false, next: 0 }
    }

    /// Whether a piece must land before the next can be sent.
    pub(crate) fn is_full(&self) -> bool {
        self.flying.len() >= IN_FLIGHT
    }

    /// Which of the two places the next piece takes.
    pub(crate) fn next_place(&self) -> usize {
        self.next % IN_FLIGHT
    }

    /// Sends a piece from the device; its place in host memory is brought in first. The pipe must not be full.
    pub(crate) fn send_out(&mut self, src: Addr, span: Span, ticket: T) -> Result<()> {
        span.bring_in()?;
        let flight = raw::copy_to_host(self.driver, self.lane.stream, span, src).map_err(|broken| self.keep(broken))?;
        self.mark(flight, ticket)?;
        Ok(())
    }

    /// Sends a piece to the device, and says which event is behind it. It is so until the piece has landed; afterwards a later piece may have the
    /// event, and it stays open for as long as the driver does, or until the device is reset. The pipe must not be full.
    pub(crate) fn send_in(&mut self, dst: Addr, span: Span, ticket: T) -> Result<Event> {
        span.bring_in()?;
        let sent = raw::copy_to_device(self.driver, self.lane.stream, dst, span);
        let flight = sent.map_err(|broken| self.keep(broken))?;
        Ok(self.mark(flight, ticket)?)
    }

    /// What was begun of a piece that could not be sent stays known until it is done.
    fn keep(&mut self, broken: Broken) -> DriverError {
        self.stray.extend(broken.begun);
        broken.error
    }

    /// Sends for the digests of `(src, len)`, one per `page`. The pipe must not be full.
    pub(crate) fn send_hash(&mut self, range: (Addr, u64), page: u64, span: Span, ticket: T) -> DriverResult<()> {
        let flight = raw::hash(self.driver, self.lane.stream, range, page, span)?;
        self.mark(flight, ticket).map(drop)
    }

    fn mark(&mut self, flight: Flight, ticket: T) -> DriverResult<Event> {
        let place = self.next_place();
        let event = self.lane.events[place];
        if let Err(error) = self.driver.record(event, self.lane.stream) {
            self.stray.push(flight);
            return Err(error);
        }
        self.flying.push_back((place, flight, ticket));
        self.next += 1;
        Ok(event)
    }

    /// Fills device memory with a byte.
    pub(crate) fn fill(&mut self, dst: Addr, len: u64, byte: u8) -> DriverResult<()> {
        self.driver.fill(self.lane.stream, dst, len, byte)?;
        self.unmarked = true;
        Ok(())
    }

    /// Waits for the oldest piece; `None` if nothing is under way.
    pub(crate) fn land(&mut self) -> DriverResult<Option<(T, Option<Span>)>> {
        let Some(&(place, ..)) = self.flying.front() else { return Ok(None) };
        self.driver.wait(self.lane.events[place])?;
        Ok(self.flying.pop_front().map(|(_, flight, ticket)| (ticket, flight.land())))
    }

    /// Waits for all that was sent, fills included.
    pub(crate) fn finish(&mut self) -> DriverResult<()> {
        while self.land()?.is_some() {}
        if self.unmarked {
            self.driver.record(self.lane.events[0], self.lane.stream)?;
            self.driver.wait(self.lane.events[0])?;
            self.unmarked = false;
        }
        Ok(())
    }

    /// Makes sure that nothing is under way any more, whatever happened, and gives the lane back. If that cannot be
    /// found out, the lane and the host memory of its copies are given up, and nothing on the device may be unmapped.
    pub(crate) fn drain(mut self, lanes: &Lanes) -> DriverResult<()> {
        let mut outcome = self.try_drain();
        for _ in 1..DRAIN_ATTEMPTS {
            if outcome.is_ok() {
                break;
            }
            outcome = self.driver.synchronize(self.lane.device).map(|()| self.all_landed());
        }
        outcome.inspect(|()| lanes.put(self.lane))
    }

    fn try_drain(&mut self) -> DriverResult<()> {
        self.finish()?;
        if !self.stray.is_empty() {
            self.driver.synchronize(self.lane.device)?;
            self.all_landed();
        }
        Ok(())
    }

    fn all_landed(&mut self) {
        let flying = self.flying.drain(..).map(|(_, flight, _)| flight);
        flying.chain(self.stray.drain(..)).for_each(|flight| drop(flight.land()));
        self.unmarked = false;
    }
}
