//! Which devices may touch memory of regions: its own, and the peers that the program has allowed. What it allows or takes back reaches memory that is there at
//! once, or by whoever has claimed it; memory that comes, or comes back, gets what holds then.

use super::Heap;
use crate::driver::{Access, Addr, Device, Rights};
use crate::error::{Error, Result, Status};
use crate::extent::{Claim, Extent};
use crate::sync::{Mutex, lock};
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// For each device its peers, and whether they still may. Who may no more is kept: its work from before may not be done yet.
#[derive(Debug, Default)]
pub(super) struct Peers {
    allowed: Mutex<HashMap<Device, BTreeMap<Device, bool>>>,
    /// Those that the program has given access to single mappings of the device.
    named: Mutex<HashMap<Device, BTreeSet<Device>>>,
}

impl Peers {
    /// The peers of `device`, and whether they may touch its memory now.
    fn of(&self, device: Device) -> Vec<(Device, bool)> {
        lock(&self.allowed).get(&device).into_iter().flatten().map(|(peer, may)| (*peer, *may)).collect()
    }

    /// Whose work may touch memory on `device` besides its own: never fewer than were given access since the start.
    fn users(&self, device: Device) -> BTreeSet<Device> {
        let named = lock(&self.named).get(&device).cloned().unwrap_or_default();
        self.of(device).into_iter().map(|(peer, _)| peer).chain(named).collect()
    }

    fn set(&self, device: Device, peer: Device, may: bool) {
        lock(&self.allowed).entry(device).or_default().insert(peer, may);
    }

    /// The program gives access to a mapping of memory on `device`.
    pub(super) fn name(&self, device: Device, access: &[Access]) {
        let named =
            access.iter().filter(|one| one.rights != Rights::None && one.device != device).map(|one| one.device);
        let named: Vec<Device> = named.collect();
        if !named.is_empty() {
            lock(&self.named).entry(device).or_default().extend(named);
        }
    }
}

impl Heap {
    /// The devices whose work may touch memory on `device`: itself, then its peers, those of before included.
    pub(super) fn users(&self, device: Device) -> Vec<Device> {
        std::iter::once(device).chain(self.peers.users(device)).collect()
    }

    /// Sets access rights on `size` bytes of memory at `addr` that was mapped just now, as in `extent`.
    pub(crate) fn open(&self, extent: &Extent, addr: Addr, size: u64) -> Result<()> {
        self.grant_to(extent, addr, size, |(_, may)| *may)
    }

    /// Sets access rights anew on everything that is mapped; who may touch it no more loses them.
    pub(super) fn renew_access(&self, claim: &Claim) -> Result<()> {
        self.each_mapped(claim, |addr, size| self.grant_to(&claim.extent, addr, size, |_| true))
    }

    /// What the program said of the mapping, or the owner's rights and those of peers that are `meant`.
    fn grant_to(&self, extent: &Extent, addr: Addr, size: u64, meant: impl Fn(&(Device, bool)) -> bool) -> Result<()> {
        let everybody = || {
            let peers = self.peers.of(extent.device).into_iter().filter(meant);
            let rights = |may| if may { Rights::ReadWrite } else { Rights::None };
            let all = std::iter::once((extent.device, true)).chain(peers);
            all.map(|(device, may)| Access { device, rights: rights(may) }).collect()
        };
        let access: Vec<Access> = extent.access().unwrap_or_else(everybody);
        if access.is_empty() { Ok(()) } else { Ok(self.driver.set_access(addr, size, &access)?) }
    }

    /// Gives `peer` access to present and future memory on `device`.
    pub(crate) fn allow_peer(&self, device: Device, peer: Device) -> Result<()> {
        if device == peer {
            return Ok(());
        }
        if !self.driver.can_access_peer(device, peer)? {
            let message = format!("{peer} cannot be given access to memory on {device}");
            return Err(Error::new(Status::Unsupported, message));
        }
        self.peers.set(device, peer, true);
        self.renew_all(device)
    }

    /// Takes it back. A peer that was never given access has none.
    pub(crate) fn refuse_peer(&self, device: Device, peer: Device) -> Result<()> {
        if self.peers.of(device).iter().all(|(known, _)| *known != peer) {
            return Ok(());
        }
        self.peers.set(device, peer, false);
        self.renew_all(device)
    }

    /// All of them, whichever fail; the first error.
    fn renew_all(&self, device: Device) -> Result<()> {
        let mut first = Ok(());
        for extent in self.registry.extents(|extent| extent.device == device && extent.mapping.is_none()) {
            if let Some(claim) = extent.refresh_access() {
                first = first.and(self.renew_access(&claim));
                self.put_back(claim);
            }
        }
        first
    }
}
