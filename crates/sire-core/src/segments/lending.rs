//! Memory that the program hands out. It is held from before the driver is asked, so that no pause slips in between, and for good only if the
//! driver does as asked: libraries try what a device can do (a fabric handle, a multicast object) and go on without.

use super::{Handle, Mapped, Segments, State, moving, range};
use crate::driver::{Addr, Physical};
use crate::error::{Error, Result, Status};
use crate::heap::mappings::Hold;
use crate::region::InHand;
use crate::sync::lock;
use crate::trace::{SegmentCall, status};
use std::sync::Arc;

/// Memory that is about to be handed out: until this is dropped no pause takes it. See [`Lent::keep`].
#[derive(Debug)]
#[must_use = "dropped at once it holds nothing"]
pub struct Lent<'a> {
    segments: &'a Segments,
    holds: Vec<Hold>,
    /// A handle that was mapped nowhere.
    loose: Option<Handle>,
    /// What a trace is to say of it.
    call: Option<SegmentCall>,
}

impl Lent<'_> {
    /// With what a trace is to say of it once it is handed out.
    pub(super) fn recorded(mut self, call: SegmentCall) -> Self {
        self.call = Some(call);
        self
    }

    /// The memory was handed out: no later pause takes it either.
    pub fn keep(mut self) {
        self.holds.drain(..).for_each(Hold::keep);
        if let Some(handle) = self.loose.take() {
            self.segments.settle(handle, true);
        }
        if let Some(call) = self.call.take() {
            self.segments.record(|| call);
        }
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        if let Some(handle) = self.loose.take() {
            self.segments.settle(handle, false);
        }
    }
}

impl Segments {
    /// The memory behind a handle, for a purpose that nobody can follow. It stays on the device while the caller asks the driver, and after
    /// [`Lent::keep`] for good.
    ///
    /// # Errors
    /// `Paused` or `Busy` if the memory is not there now; `InvalidArgument` for a handle that is not live.
    pub fn lend(&self, handle: Handle, why: &'static str) -> Result<(Physical, Lent<'_>)> {
        let lent = self.hand_out(handle, why);
        if lent.is_err() {
            self.record(|| SegmentCall::Lend { handle: handle.0, status: status(&lent) });
        }
        lent
    }

    fn hand_out(&self, handle: Handle, why: &'static str) -> Result<(Physical, Lent<'_>)> {
        let lent = |holds, loose| self.lent(holds, loose).recorded(SegmentCall::Lend { handle: handle.0, status: 0 });
        let mut table = lock(&self.table);
        let entry = table.live(handle)?;
        let extent = match &entry.state {
            State::Loose(physical, _) => {
                let physical = *physical;
                entry.lending += 1;
                return Ok((physical, lent(Vec::new(), Some(handle))));
            }
            State::Stray(physical) => return Ok((*physical, lent(Vec::new(), None))),
            State::Mapped(extent) => Arc::clone(extent),
            State::Moving => return Err(moving(handle)),
            State::Gone => {
                return Err(Error::new(Status::Paused, format!("the memory of {handle:?} went with a pause")));
            }
        };
        drop(table);
        let (physical, hold) = self.hold(&extent, why)?;
        Ok((physical, lent(vec![hold], None)))
    }

    /// What a call has that may hand out memory; nothing is recorded of it.
    pub(super) fn lent(&self, holds: Vec<Hold>, loose: Option<Handle>) -> Lent<'_> {
        Lent { segments: self, holds, loose, call: None }
    }

    /// Lends the memory of a handle that this call has taken out, and that is mapped nowhere.
    pub(super) fn lend_loose(
        &self,
        handle: Handle,
        physical: Physical,
        in_hand: Option<InHand>,
    ) -> (State, Mapped<'_>) {
        if let Some(entry) = lock(&self.table).entries.get_mut(&handle) {
            entry.lending += 1;
        }
        (State::Loose(physical, in_hand), Ok(Some((physical, self.lent(Vec::new(), Some(handle))))))
    }

    /// A call that may have handed out what was loose has ended. Whoever mapped it meanwhile took it for handed out.
    fn settle(&self, handle: Handle, keeps: bool) {
        let mut table = lock(&self.table);
        let Some(entry) = table.entries.get_mut(&handle) else { return };
        entry.lending -= 1;
        entry.strayed |= keeps && matches!(entry.state, State::Moving);
        let in_hand = if keeps { entry.state.stray() } else { None };
        // The region's lock is not taken under this one.
        drop(table);
        drop(in_hand);
    }

    /// As [`Segments::lend`], for all of ours that lies in a range, whoever mapped it.
    ///
    /// # Errors
    /// As [`Segments::lend`]; then nothing of it is held.
    pub fn lend_range(&self, addr: Addr, size: u64, why: &'static str) -> Result<Lent<'_>> {
        let mapped = self.machine.heap.registry.within(range(addr, size));
        let ours = mapped.iter().filter(|extent| !extent.is_freed());
        let holds: Result<Vec<Hold>> = ours.map(|extent| self.hold(extent, why).map(|(_, hold)| hold)).collect();
        let call = SegmentCall::LendRange { addr: addr.0, size, status: status(&holds) };
        match holds {
            Ok(holds) => {
                let nothing = holds.is_empty();
                let lent = self.lent(holds, None);
                Ok(if nothing { lent } else { lent.recorded(call) })
            }
            Err(error) => {
                self.record(|| call);
                Err(error)
            }
        }
    }
}

impl State {
    /// What is loose has gone astray; its region has it in hand no more.
    pub(super) fn stray(&mut self) -> Option<InHand> {
        let State::Loose(physical, in_hand) = self else { return None };
        let (physical, in_hand) = (*physical, in_hand.take());
        *self = State::Stray(physical);
        in_hand
    }
}
