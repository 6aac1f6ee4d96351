//! Streams and events.
//!
//! A stream is a queue of operations, numbered from 1, and the number of those completed. An operation
//! may depend on a number of another stream; an event is a number of the stream it was recorded on.
//! So the whole of ordering is "wait until stream S has completed N".
//!
//! Who takes operations off the queue is the [`Executor`]'s choice: a worker thread per
//! stream, the submitting thread, or whoever waits. All three take the same step. Who waits for a whole stream may be
//! quicker than its worker, unless the work is to be left to engines ([`Options::engines`](crate::Options::engines)).
//!
//! With a profile, every operation also has a mark on the model clock, made as it is submitted.
//!
//! The legacy default stream of a device waits for all its blocking streams, and they for it.

mod event;
mod queue;

use crate::clock::{Mark, profile};
use crate::core::{Core, Work, locked};
use crate::error::{Code, Result};
use crate::machine::Machine;
use crate::options::Executor;
use crate::types::{EventId, StreamId};
use event::Event;
use queue::Item;
use std::collections::HashMap;
use std::sync::{Arc, Mutex};

pub use queue::{Point, StreamInner};

/// Ids below this are CUDA's special values.
const FIRST_ID: u64 = 0x1000;

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
        found.end_worker();
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
        self.account(|clock| clock.wait(found.end().mark.as_slice(), clock.profile.calls.wait_us));
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

    /// Ends the device's streams, after what they hold, and its events.
    pub(crate) fn end_streams(&self, device: u32) {
        let mut tables = locked(&self.streams().tables);
        let ended = tables.of_device(device);
        tables.streams.retain(|_, stream| stream.device != device);
        tables.destroyed.retain(|stream| stream.device != device);
        tables.legacy.remove(&device);
        tables.per_thread.retain(|(other, _), _| *other != device);
        tables.events.retain(|_, event| event.device != device);
        drop(tables);
        for stream in ended {
            self.abandon_capture(stream.id);
            stream.wait_all(self.core());
            stream.end_worker();
        }
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
        self.account(|clock| clock.wait(point.mark.as_slice(), clock.profile.calls.wait_us));
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
