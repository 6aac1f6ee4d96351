//! Holds: who uses frames that another member has taken, and who has them when that one lets go.

use super::runs::join;
use super::{Extent, Guard, Layout, Taken};
use std::collections::HashMap;

/// How many there can be, all members together.
pub const MOST: usize = 16_384;

/// One use of the frames of a serial by a member that does not own them.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Hold {
    member: u16, // slot + 1; 0: none
    _reserved: u16,
    serial: u32,
}

impl Hold {
    const NONE: Hold = Hold { member: 0, _reserved: 0, serial: 0 };

    fn of(slot: usize, serial: u32) -> Hold {
        Hold { member: slot as u16 + 1, _reserved: 0, serial }
    }
}

impl Guard<'_> {
    fn holds(&mut self) -> &mut [Hold] {
        let frames = self.ledger.frames;
        self.part(Layout::of(frames).holds, MOST)
    }

    /// How many holds each serial has.
    pub(super) fn held(&mut self) -> HashMap<u32, u32> {
        let mut held = HashMap::new();
        self.holds().iter().filter(|hold| hold.member != 0).for_each(|hold| *held.entry(hold.serial).or_default() += 1);
        held
    }

    /// Nobody holds anything.
    pub(super) fn clear_holds(&mut self) {
        self.holds().fill(Hold::NONE);
        self.header().holds = 0;
    }

    /// Uses what another member has taken, until [`Guard::let_go`]. `None` if it is gone, or nothing more can be held.
    pub fn hold(&mut self, serial: u32) -> Option<Taken> {
        let frames: Vec<u32> =
            self.used_frames().into_iter().filter(|index| self.table()[*index as usize].serial == serial).collect();
        let tag = self.table()[*frames.first()? as usize].tag;
        let hold = Hold::of(self.ledger.slot, serial);
        *self.holds().iter_mut().find(|hold| **hold == Hold::NONE)? = hold;
        self.header().holds += 1;
        let mut extents = Vec::new();
        frames.into_iter().for_each(|index| join(&mut extents, index));
        Some(Taken { extents, serial, tag })
    }

    /// Ends one use of frames that other members may use as well: a hold of this member's, or its having taken them.
    pub fn let_go(&mut self, serial: u32, extents: &[Extent], punch: impl Fn(Extent)) {
        let slot = self.ledger.slot;
        if !self.drop_hold(Hold::of(slot, serial)) {
            self.pass_on(slot, serial, extents, &punch);
        }
    }

    /// Whether there was such a hold.
    fn drop_hold(&mut self, hold: Hold) -> bool {
        if self.header().holds == 0 {
            return false;
        }
        let found = self.holds().iter_mut().find(|found| **found == hold);
        let there = found.map(|found| *found = Hold::NONE).is_some();
        self.header().holds -= u32::from(there);
        there
    }

    /// Frames whose owner `slot` has no use for them any more become those of who holds them, else they are free (after `punch`).
    fn pass_on(&mut self, slot: usize, serial: u32, extents: &[Extent], punch: &dyn Fn(Extent)) {
        let Some(heir) = self.heir(serial) else {
            extents.iter().for_each(|extent| punch(*extent));
            return self.free_of(slot, extents);
        };
        for extent in extents {
            for index in extent.first..extent.first + extent.count {
                self.table()[index as usize].owner = heir as u16 + 1;
            }
            self.count(slot, -i64::from(extent.count));
            self.count(heir, i64::from(extent.count));
        }
        self.ledger.set_refs(extents, 1);
        self.drop_hold(Hold::of(heir, serial));
    }

    /// A live member that holds the frames of a serial.
    fn heir(&mut self, serial: u32) -> Option<usize> {
        if self.header().holds == 0 {
            return None;
        }
        let holders: Vec<usize> = self
            .holds()
            .iter()
            .filter(|hold| hold.member != 0 && hold.serial == serial)
            .map(|hold| usize::from(hold.member) - 1)
            .collect();
        let members = self.members().to_vec();
        holders.into_iter().find(|slot| members[*slot].pid != 0 && self.ledger.is_alive(*slot, members[*slot]))
    }

    /// The holds and marks of members are gone.
    pub(super) fn forget_uses(&mut self, slots: &[usize]) {
        let is_theirs = |member: u16| member != 0 && slots.contains(&(usize::from(member) - 1));
        self.holds().iter_mut().filter(|hold| is_theirs(hold.member)).for_each(|hold| *hold = Hold::NONE);
        self.header().holds = self.holds().iter().filter(|hold| hold.member != 0).count() as u32;
        self.clear_marks(is_theirs);
    }

    /// Frames that `slot` owns are somebody else's, or free.
    pub(super) fn pass_on_all(&mut self, slot: usize, punch: &dyn Fn(Extent)) {
        for (serial, extents) in self.owned(slot) {
            self.pass_on(slot, serial, &extents, punch);
        }
    }
}
