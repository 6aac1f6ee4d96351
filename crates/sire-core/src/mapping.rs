//! A mapping that the program made itself, in addresses that it reserved itself: what an extent of this kind knows besides its one chunk. The program
//! says who may touch it, so that is kept here and replayed; and it may do things with the memory that a pause cannot follow (hand
//! it to another process, map it twice, keep it from the device that it lies on): then the mapping is *held*, and stays on the device.

use crate::driver::{Access, Device, Rights};
use crate::sync::{Mutex, lock};

/// Virtual memory handle: what the program takes for CUDA's.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Handle(pub u64);

#[derive(Debug, Default)]
struct Terms {
    /// At most one entry per device.
    access: Vec<Access>,
    /// What the program has said since, which whoever claims the extent next takes over.
    asked: Vec<Access>,
}

/// See the [module documentation](self).
#[derive(Debug)]
pub(crate) struct Mapping {
    pub(crate) handle: Handle,
    terms: Mutex<Terms>,
}

impl Mapping {
    /// A mapping of `handle` that nobody may touch yet.
    pub(crate) fn of(handle: Handle) -> Mapping {
        Mapping { handle, terms: Mutex::default() }
    }

    /// Who may touch it.
    pub(crate) fn access(&self) -> Vec<Access> {
        lock(&self.terms).access.clone()
    }

    /// Notes who may touch it, besides those who may already, once [`Mapping::take_over`] is called: a transition that has the extent does not
    /// take memory for open that the driver has not opened yet.
    pub(crate) fn allow(&self, more: &[Access]) {
        lock(&self.terms).asked.extend(more);
    }

    /// From now on those may touch it. To be called by whoever has claimed the extent and gives them access, at once or when there is memory. Returns
    /// what was before, for [`Mapping::put_back`].
    pub(crate) fn take_over(&self) -> Vec<Access> {
        let Terms { access, asked, .. } = &mut *lock(&self.terms);
        let before = access.clone();
        for new in asked.drain(..) {
            access.retain(|old| old.device != new.device);
            access.push(new);
        }
        before
    }

    /// The driver has refused what was taken over: nobody is to be given it at the next resume.
    pub(crate) fn put_back(&self, before: Vec<Access>) {
        lock(&self.terms).access = before;
    }

    /// Whether work on `device` may read and write it.
    pub(crate) fn is_open_to(&self, device: Device) -> bool {
        lock(&self.terms).access.iter().any(|access| access.device == device && access.rights == Rights::ReadWrite)
    }
    /// Whether anybody may touch it.
    pub(crate) fn is_open_at_all(&self) -> bool {
        lock(&self.terms).access.iter().any(|access| access.rights != Rights::None)
    }
}
