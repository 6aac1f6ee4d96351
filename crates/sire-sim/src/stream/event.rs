//! Events: points of streams that have a handle, and a time.

use super::{Item, Point};
use crate::clock::seconds;
use crate::core::{Work, locked};
use crate::error::{Code, Result};
use crate::ipc::SharedEvent;
use crate::machine::Machine;
use crate::types::{EventId, StreamId};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

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
pub(super) struct Event {
    timing: bool,
    pub(super) device: u32,
    recorded: Recorded,
    /// If other processes can know of it: all that happens to it happens there.
    shared: Option<Arc<SharedEvent>>,
}

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
    /// `INVALID_HANDLE`, also if they are of different devices; capture prohibitions; the device's sticky error.
    pub fn event_record(&self, event: EventId, stream: StreamId) -> Result<()> {
        let target = self.live_stream(stream)?;
        self.recorded(event)?;
        same_device("recording an event", self.event_device(event)?, target.device)?;
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
        self.maybe_unsafe_call()?;
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
    /// `INVALID_HANDLE` if one was never recorded or has no timing, or they are of different devices; `NOT_READY` if one has not passed.
    pub fn event_elapsed(&self, start: EventId, end: EventId) -> Result<f32> {
        let (first, second) = (self.stamp(start)?, self.stamp(end)?);
        same_device("the time between events", self.event_device(start)?, self.event_device(end)?)?;
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

fn same_device(what: &str, event: u32, other: u32) -> Result<()> {
    if event == other {
        return Ok(());
    }
    Err(Code::INVALID_HANDLE.because(format!("{what}: one is of device {event}, the other of device {other}")))
}

fn no_event(event: EventId) -> crate::error::SimError {
    Code::INVALID_HANDLE.because(format!("there is no event {:#x}", event.0))
}
