//! Streams and events.
//!
//! A stream is a queue of operations, numbered from 1, and the number of those completed. An operation
//! may depend on a number of another stream; an event is a number of the stream it was recorded on.
//! So the whole of ordering is "wait until stream S has completed N".
//!
//! Who takes operations off the queue is the [`Executor`]'s choice: a worker thread per
//! stream, the submitting thread, or whoever waits. All three take the same step ([`StreamInner::step`]).
//!
//! With a profile, every operation also has a mark on the model clock, made as it is submitted.
//!
//! The legacy default stream of a device waits for all its blocking streams, and they for it.

use crate::clock::{Clock, Mark, Step, profile, seconds};
use crate::core::{Core, Work, locked};
use crate::error::{Code, Result};
use crate::ipc::SharedEvent;
use crate::machine::Machine;
use crate::options::Executor;
use crate::types::{EventId, StreamId};
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

/// Ids below this are CUDA's special values.
const FIRST_ID: u64 = 0x1000;

/// A point in a stream.
#[derive(Clone, Debug)]
pub struct Point {
    stream: Arc<StreamInner>,
    number: u64,
    mark: Option<Mark>,
}

#[derive(Debug)]
struct Item {
    after: Vec<Point>,
    work: Work,
    stamp: Option<Arc<OnceLock<Instant>>>,
}

#[derive(Debug, Default)]
struct Queue {
    items: VecDeque<Item>,
    submitted: u64,
    completed: u64,
    /// The mark of the last operation.
    mark: Option<Mark>,
    running: bool,
    closing: bool,
    worker: Option<JoinHandle<()>>,
}

/// One stream. See the module's documentation.
#[derive(Debug)]
pub struct StreamInner {
    /// Its handle.
    pub id: StreamId,
    /// Its device.
    pub device: u32,
    /// Whether it is ordered with the legacy stream.
    pub blocking: bool,
    /// Whether it is the legacy stream.
    pub legacy: bool,
    priority: i32,
    queue: Mutex<Queue>,
    changed: Condvar,
}

impl StreamInner {
    fn new(id: StreamId, device: u32, blocking: bool, legacy: bool, priority: i32) -> StreamInner {
        StreamInner { id, device, blocking, legacy, priority, queue: Mutex::default(), changed: Condvar::new() }
    }

    fn submitted(&self) -> u64 {
        locked(&self.queue).submitted
    }

    /// The point behind all that was submitted.
    fn end(self: &Arc<Self>) -> Point {
        let queue = locked(&self.queue);
        Point { stream: Arc::clone(self), number: queue.submitted, mark: queue.mark.clone() }
    }

    /// Whether nobody can wait for anything here any more, in real or virtual time.
    fn is_over(&self) -> bool {
        let queue = locked(&self.queue);
        queue.completed >= queue.submitted && queue.mark.as_ref().is_none_or(|mark| mark.settled().is_some())
    }

    fn is_done(&self, number: u64) -> bool {
        locked(&self.queue).completed >= number
    }

    fn push(self: &Arc<Self>, core: &Arc<Core>, item: Item) -> Point {
        let steps = core.steps(self.device, &item.work);
        let marker =
            matches!(item.work, Work::Empty) && item.after.iter().all(|point| point.stream.is_done(point.number));
        let mut queue = locked(&self.queue);
        queue.mark = core.clock.as_ref().map(|clock| mark(clock, queue.mark.take(), &item, &steps));
        let point =
            |queue: &Queue| Point { stream: Arc::clone(self), number: queue.submitted, mark: queue.mark.clone() };
        if marker && queue.completed == queue.submitted {
            // An event behind nothing has passed at once; no worker is woken for it.
            (queue.submitted, queue.completed) = (queue.submitted + 1, queue.completed + 1);
            if let Some(stamp) = &item.stamp {
                let _ = stamp.set(Instant::now());
            }
            return point(&queue);
        }
        queue.items.push_back(item);
        queue.submitted += 1;
        let point = point(&queue);
        if core.options.executor == Executor::Threads && queue.worker.is_none() {
            queue.worker = self.start_worker(core);
        }
        drop(queue);
        self.changed.notify_all();
        if core.options.executor == Executor::Inline {
            self.wait(core, point.number);
        }
        point
    }

    fn start_worker(self: &Arc<Self>, core: &Arc<Core>) -> Option<JoinHandle<()>> {
        let (stream, core) = (Arc::clone(self), Arc::clone(core));
        let name = format!("sim-stream-{:x}", self.id.0);
        // Without a thread (limits), waiters run the queue themselves.
        std::thread::Builder::new().name(name).spawn(move || stream.work(&core)).ok()
    }

    fn work(&self, core: &Core) {
        loop {
            let mut queue = locked(&self.queue);
            while queue.items.is_empty() || queue.running {
                if queue.closing && queue.items.is_empty() {
                    return;
                }
                queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
            }
            drop(queue);
            self.step(core);
        }
    }

    /// Takes and carries out the first operation, if there is one and nobody else is at it.
    fn step(&self, core: &Core) {
        let mut queue = locked(&self.queue);
        if queue.running {
            return;
        }
        let Some(item) = queue.items.pop_front() else { return };
        queue.running = true;
        drop(queue);
        item.after.iter().for_each(|point| point.stream.wait(core, point.number));
        self.carry_out(core, &item);
        drop(item);
        let mut queue = locked(&self.queue);
        queue.running = false;
        queue.completed += 1;
        drop(queue);
        self.changed.notify_all();
    }

    fn carry_out(&self, core: &Core, item: &Item) {
        if core.lost(self.device) == Code::SUCCESS {
            let run = std::panic::AssertUnwindSafe(|| core.run(self.device, &item.work));
            match std::panic::catch_unwind(run) {
                Ok(Ok(())) => {}
                Ok(Err(code)) => core.lose(self.device, code),
                Err(_) => core.lose(self.device, Code::LAUNCH_FAILED),
            }
        }
        if let Some(stamp) = &item.stamp {
            let _ = stamp.set(Instant::now());
        }
    }

    /// Waits until operation `number` is completed. While nobody is at the queue, the waiter works on it
    /// itself: that saves two changes of thread where a worker exists, and is the only way where none does.
    fn wait(&self, core: &Core, number: u64) {
        loop {
            let queue = locked(&self.queue);
            if queue.completed >= number || queue.submitted < number {
                return;
            }
            if queue.running {
                drop(self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner));
            } else {
                drop(queue);
                self.step(core);
            }
        }
    }

    fn wait_all(&self, core: &Core) {
        self.wait(core, self.submitted());
    }

    /// Whether `number` is completed. A deferred queue takes one step, so that polling gets there.
    fn poll(&self, core: &Core, number: u64) -> bool {
        if core.options.executor == Executor::Deferred && !self.is_done(number) {
            let first = locked(&self.queue).items.front().map(|item| item.after.clone());
            match first.into_iter().flatten().find(|point| !point.stream.is_done(point.number)) {
                Some(point) => drop(point.stream.poll(core, point.number)),
                None => self.step(core),
            }
        }
        self.is_done(number)
    }

    fn close(&self) -> Option<JoinHandle<()>> {
        let mut queue = locked(&self.queue);
        queue.closing = true;
        let worker = queue.worker.take();
        drop(queue);
        self.changed.notify_all();
        worker
    }
}

/// The mark of an operation that is about to be pushed behind `before`.
fn mark(clock: &Clock, before: Option<Mark>, item: &Item, steps: &[Step]) -> Mark {
    let after = item.after.iter().filter_map(|point| point.mark.clone()).chain(before).collect();
    let calls = &clock.profile.calls;
    let cost = if matches!(item.work, Work::Empty) { calls.record_us } else { calls.submit_us };
    clock.submit(steps, after, cost)
}

/// What an event knows.
#[derive(Clone, Debug)]
pub enum Recorded {
    /// Never recorded: counts as passed.
    Never,
    /// Behind a point, with the time when it was passed.
    At(Point, Arc<OnceLock<Instant>>),
    /// Recorded in a capture: the nodes it stands for.
    Captured(u64, Vec<crate::types::NodeId>),
}

#[derive(Debug)]
struct Event {
    timing: bool,
    device: u32,
    recorded: Recorded,
    /// If other processes can know of it: all that happens to it happens there.
    shared: Option<Arc<SharedEvent>>,
}

/// All streams and events of a machine.
#[derive(Debug, Default)]
pub struct Streams {
    tables: Mutex<Tables>,
    /// Held while an operation is put on a blocking or legacy stream, so that their order is one order.
    order: Mutex<()>,
}

#[derive(Debug, Default)]
struct Tables {
    streams: HashMap<StreamId, Arc<StreamInner>>,
    destroyed: Vec<Arc<StreamInner>>,
    legacy: HashMap<u32, Arc<StreamInner>>,
    per_thread: HashMap<(u32, std::thread::ThreadId), StreamId>,
    events: HashMap<EventId, Event>,
    last: u64,
}

impl Tables {
    fn next_id(&mut self) -> u64 {
        self.last += 1;
        FIRST_ID + self.last * 16
    }

    fn add(&mut self, device: u32, blocking: bool, legacy: bool, priority: i32) -> Arc<StreamInner> {
        let id = StreamId(self.next_id());
        let stream = Arc::new(StreamInner::new(id, device, blocking, legacy, priority));
        self.streams.insert(id, Arc::clone(&stream));
        stream
    }

    fn blocking_of(&self, device: u32) -> impl Iterator<Item = &Arc<StreamInner>> {
        let alive = self.streams.values().chain(&self.destroyed);
        alive.filter(move |stream| stream.blocking && stream.device == device)
    }

    fn of_device(&self, device: u32) -> Vec<Arc<StreamInner>> {
        let alive = self.streams.values().chain(&self.destroyed);
        alive.filter(|stream| stream.device == device).cloned().collect()
    }
}

impl Streams {
    /// Stops all workers after their queues, and waits for them.
    pub fn shutdown(&self, core: &Core) {
        let mut tables = locked(&self.tables);
        let mut streams: Vec<_> = tables.streams.drain().map(|(_, stream)| stream).collect();
        streams.append(&mut tables.destroyed);
        tables.legacy.clear();
        tables.events.clear();
        drop(tables);
        streams.iter().for_each(|stream| stream.wait_all(core));
        let workers: Vec<_> = streams.iter().filter_map(|stream| stream.close()).collect();
        let here = std::thread::current().id();
        for worker in workers.into_iter().filter(|worker| worker.thread().id() != here) {
            // A worker that panicked has stopped, which is what is wanted.
            let _ = worker.join();
        }
    }
}

/// Streams.
impl Machine {
    /// The stream behind a handle.
    pub(crate) fn stream(&self, stream: StreamId) -> Result<Arc<StreamInner>> {
        self.core().check_open()?;
        let found = locked(&self.streams().tables).streams.get(&stream).cloned();
        found.ok_or_else(|| Code::INVALID_HANDLE.because(format!("there is no stream {:#x}", stream.0)))
    }

    fn live_stream(&self, stream: StreamId) -> Result<Arc<StreamInner>> {
        let found = self.stream(stream)?;
        self.core().check_alive(found.device)?;
        Ok(found)
    }

    /// What a `cudaStream_t` value means on `device`: 0 and 1 the legacy default stream, 2 the calling thread's, else itself.
    ///
    /// # Errors
    /// `INVALID_DEVICE`.
    pub fn resolve_stream(&self, device: u32, raw: u64) -> Result<StreamId> {
        match raw {
            0 | 1 => self.legacy_stream(device),
            2 => self.per_thread_stream(device),
            other => Ok(StreamId(other)),
        }
    }

    /// The device's legacy default stream.
    ///
    /// # Errors
    /// `INVALID_DEVICE`.
    pub fn legacy_stream(&self, device: u32) -> Result<StreamId> {
        self.core().check_open()?;
        self.core().memory(device)?;
        let mut tables = locked(&self.streams().tables);
        if let Some(stream) = tables.legacy.get(&device) {
            return Ok(stream.id);
        }
        let stream = tables.add(device, false, true, 0);
        let id = stream.id;
        tables.legacy.insert(device, stream);
        Ok(id)
    }

    fn per_thread_stream(&self, device: u32) -> Result<StreamId> {
        self.core().check_open()?;
        self.core().memory(device)?;
        let key = (device, std::thread::current().id());
        let mut tables = locked(&self.streams().tables);
        if let Some(id) = tables.per_thread.get(&key) {
            return Ok(*id);
        }
        let id = tables.add(device, true, false, 0).id;
        tables.per_thread.insert(key, id);
        Ok(id)
    }

    /// Makes a stream. `blocking`: ordered with the legacy default stream (no `cudaStreamNonBlocking`).
    ///
    /// # Errors
    /// `INVALID_DEVICE`, the device's sticky error.
    pub fn stream_create(&self, device: u32, blocking: bool, priority: i32) -> Result<StreamId> {
        self.core().check_alive(device)?;
        Ok(locked(&self.streams().tables).add(device, blocking, false, priority).id)
    }

    /// Gives the handle up; queued work still runs.
    ///
    /// # Errors
    /// `INVALID_HANDLE`.
    pub fn stream_destroy(&self, stream: StreamId) -> Result<()> {
        let found = self.stream(stream)?;
        if found.legacy {
            return Err(Code::INVALID_HANDLE.because("the legacy default stream cannot be destroyed"));
        }
        self.abandon_capture(stream);
        let mut tables = locked(&self.streams().tables);
        tables.streams.remove(&stream);
        tables.destroyed.retain(|stream| !stream.is_over());
        if !found.is_over() {
            tables.destroyed.push(Arc::clone(&found));
        }
        drop(tables);
        // The worker sees `closing`, finishes its queue and ends by itself.
        locked(&found.queue).closing = true;
        found.changed.notify_all();
        Ok(())
    }

    /// The stream's device.
    ///
    /// # Errors
    /// `INVALID_HANDLE`.
    pub fn stream_device(&self, stream: StreamId) -> Result<u32> {
        Ok(self.stream(stream)?.device)
    }

    /// Whether it is ordered with the legacy default stream (which counts as ordered with itself).
    ///
    /// # Errors
    /// `INVALID_HANDLE`.
    pub fn stream_is_blocking(&self, stream: StreamId) -> Result<bool> {
        self.stream(stream).map(|stream| stream.blocking || stream.legacy)
    }

    /// The priority it was made with.
    ///
    /// # Errors
    /// `INVALID_HANDLE`.
    pub fn stream_priority(&self, stream: StreamId) -> Result<i32> {
        Ok(self.stream(stream)?.priority)
    }

    /// Waits until everything in the stream is done.
    ///
    /// # Errors
    /// Capture prohibitions; the device's sticky error.
    pub fn stream_synchronize(&self, stream: StreamId) -> Result<()> {
        let found = self.live_stream(stream)?;
        self.refuse_capturing(stream)?;
        self.refuse_legacy(&found)?;
        found.wait_all(self.core());
        self.account(|clock| clock.wait(&found.end().mark, clock.profile.calls.wait_us));
        self.core().check_alive(found.device)
    }

    /// Whether everything in the stream is done.
    ///
    /// # Errors
    /// Capture prohibitions; the device's sticky error.
    pub fn stream_query(&self, stream: StreamId) -> Result<bool> {
        let found = self.live_stream(stream)?;
        self.refuse_capturing(stream)?;
        self.refuse_legacy(&found)?;
        let done = self.poll_point(&found.end());
        self.core().check_alive(found.device)?;
        Ok(done)
    }

    /// Waits until everything on the device is done.
    ///
    /// # Errors
    /// `CAPTURE_UNSUPPORTED`, and every capture there void, while a stream of the device captures; the device's sticky error.
    pub fn device_synchronize(&self, device: u32) -> Result<()> {
        self.core().check_alive(device)?;
        self.refuse_device_capturing(device)?;
        self.drain(device);
        self.core().check_alive(device)
    }

    /// Waits for the device without asking whether that is allowed.
    pub(crate) fn drain(&self, device: u32) {
        let streams = locked(&self.streams().tables).of_device(device);
        streams.iter().for_each(|stream| stream.wait_all(self.core()));
        self.account(|clock| {
            let marks: Vec<Mark> = streams.iter().filter_map(|stream| stream.end().mark).collect();
            clock.wait(&marks, clock.profile.calls.synchronize_us);
        });
    }

    /// Waits for all devices.
    pub(crate) fn drain_devices(&self) {
        (0..self.device_count()).for_each(|device| self.drain(device));
    }

    /// Puts work on a stream that does not capture; the point behind it.
    pub(crate) fn enqueue(&self, stream: &Arc<StreamInner>, work: Work) -> Result<Point> {
        self.enqueue_item(stream, Item { after: Vec::new(), work, stamp: None })
    }

    fn enqueue_item(&self, stream: &Arc<StreamInner>, mut item: Item) -> Result<Point> {
        if !stream.blocking && !stream.legacy {
            return Ok(stream.push(self.core(), item));
        }
        let order = locked(&self.streams().order);
        let tables = locked(&self.streams().tables);
        // What is idle in real time may be busy in virtual time.
        let pending = |other: &&Arc<StreamInner>| !other.is_over();
        let others: Vec<Arc<StreamInner>> = match stream.legacy {
            true => tables.blocking_of(stream.device).filter(pending).cloned().collect(),
            false => tables.legacy.get(&stream.device).filter(pending).cloned().into_iter().collect(),
        };
        drop(tables);
        item.after.extend(others.iter().map(StreamInner::end));
        if self.core().options.executor == Executor::Inline {
            drop(order);
            return Ok(stream.push(self.core(), item));
        }
        let point = stream.push(self.core(), item);
        drop(order);
        Ok(point)
    }

    /// Waits for a point of a stream.
    pub(crate) fn wait_point(&self, point: &Point) -> Result<()> {
        point.stream.wait(self.core(), point.number);
        self.account(|clock| clock.wait(&point.mark, clock.profile.calls.wait_us));
        self.core().check_alive(point.stream.device)
    }

    /// Whether a point has been passed: in real time, and by the calling thread's virtual time if there is a clock. An answer that
    /// only real time makes a no costs no virtual time, so that the number of such answers does not count.
    fn poll_point(&self, point: &Point) -> bool {
        let done = point.stream.poll(self.core(), point.number);
        let (Some(clock), Some(mark)) = (&self.core().clock, &point.mark) else { return done };
        let passed = clock.has_passed(mark);
        if done || !passed {
            clock.spend(profile::picos(clock.profile.calls.query_us));
        }
        done && passed
    }
}

/// Events.
impl Machine {
    /// Makes an event. `timing`: whether [`Machine::event_elapsed`] may use it.
    ///
    /// # Errors
    /// `INVALID_DEVICE`, the device's sticky error.
    pub fn event_create(&self, device: u32, timing: bool) -> Result<EventId> {
        self.core().check_alive(device)?;
        let mut tables = locked(&self.streams().tables);
        let id = EventId(tables.next_id());
        tables.events.insert(id, Event { timing, device, recorded: Recorded::Never, shared: None });
        Ok(id)
    }

    /// An event that lives in the ledger.
    pub(crate) fn insert_shared(&self, device: u32, shared: SharedEvent) -> Result<EventId> {
        let mut tables = locked(&self.streams().tables);
        let id = EventId(tables.next_id());
        let shared = Some(Arc::new(shared));
        tables.events.insert(id, Event { timing: false, device, recorded: Recorded::Never, shared });
        Ok(id)
    }

    /// What other processes know of the event, if they can.
    pub(crate) fn shared_event(&self, event: EventId) -> Result<Option<Arc<SharedEvent>>> {
        self.core().check_open()?;
        let tables = locked(&self.streams().tables);
        tables.events.get(&event).map(|event| event.shared.clone()).ok_or_else(|| no_event(event))
    }

    /// Gives the event up; who waits for it still does.
    ///
    /// # Errors
    /// `INVALID_HANDLE`.
    pub fn event_destroy(&self, event: EventId) -> Result<()> {
        self.core().check_open()?;
        let removed = locked(&self.streams().tables).events.remove(&event);
        removed.map(drop).ok_or_else(|| no_event(event))
    }

    /// The device that the event was made for.
    ///
    /// # Errors
    /// `INVALID_HANDLE`.
    pub fn event_device(&self, event: EventId) -> Result<u32> {
        locked(&self.streams().tables).events.get(&event).map(|event| event.device).ok_or_else(|| no_event(event))
    }

    fn recorded(&self, event: EventId) -> Result<(Recorded, bool)> {
        self.core().check_open()?;
        let tables = locked(&self.streams().tables);
        let found = tables.events.get(&event).ok_or_else(|| no_event(event))?;
        let (recorded, timing, device) = (found.recorded.clone(), found.timing, found.device);
        drop(tables);
        self.core().check_alive(device)?;
        Ok((recorded, timing))
    }

    /// Moves the event behind what the stream holds now.
    ///
    /// # Errors
    /// `INVALID_HANDLE`; capture prohibitions; the device's sticky error.
    pub fn event_record(&self, event: EventId, stream: StreamId) -> Result<()> {
        let target = self.live_stream(stream)?;
        self.recorded(event)?;
        if let Some(shared) = self.shared_event(event)? {
            return self.record_shared(shared, stream);
        }
        let recorded = match self.captured_frontier(stream)? {
            Some((capture, nodes)) => Recorded::Captured(capture, nodes),
            None => {
                self.refuse_legacy(&target)?;
                let stamp = Arc::new(OnceLock::new());
                let item = Item { after: Vec::new(), work: Work::Empty, stamp: Some(Arc::clone(&stamp)) };
                Recorded::At(self.enqueue_item(&target, item)?, stamp)
            }
        };
        match locked(&self.streams().tables).events.get_mut(&event) {
            Some(found) => found.recorded = recorded,
            None => return Err(no_event(event)),
        }
        Ok(())
    }

    /// Makes what is put on the stream from now on wait for the event.
    ///
    /// # Errors
    /// `INVALID_HANDLE`; capture prohibitions; the device's sticky error.
    pub fn stream_wait_event(&self, stream: StreamId, event: EventId) -> Result<()> {
        let target = self.live_stream(stream)?;
        if let Some(shared) = self.shared_event(event)? {
            return self.wait_shared_on(shared, stream);
        }
        match self.recorded(event)?.0 {
            Recorded::Never => Ok(()),
            Recorded::Captured(capture, nodes) => self.join_capture(&target, capture, &nodes),
            Recorded::At(point, _) => {
                self.refuse_isolation(stream)?;
                self.refuse_legacy(&target)?;
                self.enqueue_item(&target, Item { after: vec![point], work: Work::Empty, stamp: None }).map(drop)
            }
        }
    }

    /// Whether the event has passed.
    ///
    /// # Errors
    /// `CAPTURED_EVENT` if it was recorded in a capture; capture prohibitions; the device's sticky error.
    pub fn event_query(&self, event: EventId) -> Result<bool> {
        let (recorded, _) = self.recorded(event)?;
        if let Some(shared) = self.shared_event(event)? {
            return self.query_shared(&shared);
        }
        if let Recorded::Captured(capture, _) = recorded {
            return Err(self.refuse_captured_event(capture));
        }
        self.unsafe_call()?;
        let Recorded::At(point, _) = recorded else { return Ok(true) };
        let done = self.poll_point(&point);
        self.core().check_alive(point.stream.device)?;
        Ok(done)
    }

    /// Waits until the event has passed.
    ///
    /// # Errors
    /// `CAPTURED_EVENT` if it was recorded in a capture; the device's sticky error.
    pub fn event_synchronize(&self, event: EventId) -> Result<()> {
        if let Some(shared) = self.shared_event(event)? {
            return self.wait_shared(&shared);
        }
        match self.recorded(event)?.0 {
            Recorded::Never => Ok(()),
            Recorded::Captured(capture, _) => Err(self.refuse_captured_event(capture)),
            Recorded::At(point, _) => self.wait_point(&point),
        }
    }

    /// Milliseconds from one event to another: virtual ones with a profile.
    ///
    /// # Errors
    /// `INVALID_HANDLE` if one was never recorded or has no timing; `NOT_READY` if one has not passed.
    pub fn event_elapsed(&self, start: EventId, end: EventId) -> Result<f32> {
        let (first, second) = (self.stamp(start)?, self.stamp(end)?);
        if let (Some(first), Some(second)) = (self.virtual_stamp(start)?, self.virtual_stamp(end)?) {
            return Ok(((second - first) * 1e3) as f32);
        }
        let seconds = match second.checked_duration_since(first) {
            Some(forward) => forward.as_secs_f64(),
            None => -first.duration_since(second).as_secs_f64(),
        };
        Ok((seconds * 1e3) as f32)
    }

    /// The event's virtual time in seconds, if there is a clock.
    fn virtual_stamp(&self, event: EventId) -> Result<Option<f64>> {
        let (Some(clock), (Recorded::At(point, _), _)) = (&self.core().clock, self.recorded(event)?) else {
            return Ok(None);
        };
        match point.mark {
            Some(mark) if !clock.has_passed(&mark) => Err(Code::NOT_READY.because("the event has not passed")),
            mark => Ok(mark.map(|mark| seconds(clock.end_of(&mark)))),
        }
    }

    fn stamp(&self, event: EventId) -> Result<Instant> {
        match self.recorded(event)? {
            (Recorded::At(_, stamp), true) => {
                stamp.get().copied().ok_or_else(|| Code::NOT_READY.because("the event has not passed"))
            }
            (Recorded::Captured(capture, _), _) => Err(self.refuse_captured_event(capture)),
            _ => Err(Code::INVALID_HANDLE.because("the event was never recorded, or was made without timing")),
        }
    }
}

fn no_event(event: EventId) -> crate::error::SimError {
    Code::INVALID_HANDLE.because(format!("there is no event {:#x}", event.0))
}
