//! Veils over what a pause has thrown away (`Config::dummies`): afterwards the addresses of chunks without a backup lead to one shared dummy, so that a kernel which uses
//! them by mistake reads junk and writes nowhere that matters, and the context lives. Before memory comes back the veils are taken off, behind the device, and whether anything was written
//! there is noted. Veils are an extra: what fails in putting them on is only told, and a chunk without one is as paused as any other.

use super::{Machine, batch::Batch};
use crate::driver::Device;
use crate::error::{Error, Result, Status};
use crate::extent::{Chunk, Claim, Truth};
use crate::heap::veils::Dummy;
use crate::sync::Ordering;
use crate::terms::Backup;
use crate::transfer::Pipe;
use std::collections::BTreeSet;

impl Machine {
    /// Veils what is away and was thrown away. To be called when a transition has ended, before its claims are put back.
    pub(super) fn veil(&self, batch: &Batch, claims: &mut [Claim]) {
        if !self.settings.dummies() {
            return;
        }
        let discards =
            |claim: &Claim| batch.region(claim.extent.region).is_some_and(|r| r.policy.backup == Backup::None);
        for claim in claims.iter_mut().filter(|claim| !claim.extent.is_freed() && discards(claim)) {
            if let Err(error) = self.veil_claim(claim) {
                self.heap.notices.add(format!("paused addresses have no dummy behind them: {error}"));
                return;
            }
        }
    }

    fn veil_claim(&self, claim: &mut Claim) -> Result<()> {
        let Claim { extent, chunks, .. } = claim;
        for chunk in chunks.iter_mut().filter(|chunk| is_bare(chunk)) {
            let dummy = self.heap.use_dummy(extent.device, |dummy| self.clear(extent.device, dummy))?;
            if let Err(error) = self.heap.veil(extent, chunk, dummy) {
                if chunk.veiled == 0 {
                    self.heap.leave_dummy(extent.device);
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// Takes the veils off all claims, once their devices are idle. A refusal leaves everything paused; the call can be repeated.
    pub(super) fn lift<'a>(&self, claims: impl Iterator<Item = &'a mut Claim>) -> Result<()> {
        let mut veiled: Vec<&mut Claim> =
            claims.filter(|claim| claim.chunks.iter().any(|chunk| chunk.veiled > 0)).collect();
        let devices: BTreeSet<Device> = veiled.iter().map(|claim| claim.extent.device).collect();
        self.heap.synchronize_all(&devices)?;
        devices.into_iter().for_each(|device| self.look_for_strays(device));
        for claim in &mut veiled {
            let Claim { extent, chunks, .. } = &mut **claim;
            chunks.iter_mut().try_for_each(|chunk| self.heap.unveil(extent.device, extent.base, chunk))?;
        }
        Ok(())
    }

    /// Counts if something was written to the dummy, and clears it. Best effort: what cannot be looked at is not counted.
    fn look_for_strays(&self, device: Device) {
        let Some(dummy) = self.heap.veils.dummy(device) else { return };
        if self.is_clear(device, dummy).unwrap_or(true) {
            return;
        }
        self.heap.veils.strays.fetch_add(1, Ordering::Relaxed);
        let _ = self.clear(device, dummy);
        self.heap.notices.add(format!(
            "something wrote to paused memory on {device}: a dummy lay there (SIRE_DUMMY); find out who with SIRE_CHECK=1"
        ));
    }

    fn clear(&self, device: Device, dummy: Dummy) -> Result<()> {
        let mut pipe: Pipe<'_, ()> = Pipe::new(&*self.heap.driver, self.lanes.take(device)?);
        let filled = pipe.fill(dummy.home, dummy.size, 0);
        let drained = pipe.drain(&self.lanes);
        Ok(filled.and(drained)?)
    }

    fn is_clear(&self, device: Device, dummy: Dummy) -> Result<bool> {
        let page = self.settings.page();
        let buffers = self.looking_buffers(page)?;
        let mut pipe: Pipe<'_, u64> = Pipe::new(&*self.heap.driver, self.lanes.take(device)?);
        let looked = (0..dummy.size).step_by(page as usize).try_fold(true, |clear, at| {
            let len = page.min(dummy.size - at);
            let short = || Error::new(Status::Internal, "a piece of the dummy is longer than a page");
            let buffer = buffers[pipe.next_place()].part(0, len).ok_or_else(short)?;
            pipe.send_out(dummy.home.offset(at), buffer, len)?;
            let landed = pipe.land()?.and_then(|(_, span)| span);
            Ok::<bool, Error>(clear && landed.is_none_or(|span| span.read(|bytes| bytes.iter().all(|&byte| byte == 0))))
        });
        pipe.drain(&self.lanes)?;
        looked
    }
}

/// Whether nothing is left of the chunk but its addresses.
fn is_bare(chunk: &Chunk) -> bool {
    let away = chunk.truth == Truth::Backup && !chunk.mapped && chunk.physical.is_none();
    away && chunk.segments.is_empty() && chunk.veiled == 0
}
