//! Work for streams: copies, fills, host functions and closures, with CUDA's rules about when the host waits.
//!
//! Pinned and registered host memory is copied when the stream gets there. Pageable memory is staged (small
//! copies to the device: the caller may reuse it at once) or waited for (everything else).

use crate::core::{HostFn, Kernel, Work, locked};
use crate::error::{Code, Result};
use crate::machine::Machine;
use crate::stream::Point;
use crate::types::{Copy2d, CopyKind, NodeKind, Pattern, StreamId};
use std::sync::Arc;

/// Largest pageable copy that is staged.
const STAGED: u64 = 4 << 20;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Device,
    Known,
    Pageable,
}

/// When the host may go on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wait {
    /// As the memory requires.
    Auto,
    /// When the copy is done, unless it is from device to device.
    Done,
}

fn flat(dst: u64, src: u64, len: u64) -> Copy2d {
    Copy2d { dst, dst_pitch: len, src, src_pitch: len, width: len, height: 1 }
}

impl Machine {
    /// Puts work on a stream, or into the capture it takes part in; the point to wait for in the first case.
    pub(crate) fn submit(&self, stream: StreamId, kind: NodeKind, work: Work) -> Result<Option<Point>> {
        let target = self.stream(stream)?;
        self.core().check_alive(target.device)?;
        if self.capture_node(stream, kind, &work)? {
            return Ok(None);
        }
        self.refuse_legacy(&target)?;
        self.enqueue(&target, work).map(Some)
    }

    fn place(&self, ptr: u64) -> Place {
        if self.core().space().contains(ptr) {
            Place::Device
        } else if locked(&self.core().host).covers(ptr, 1) {
            Place::Known
        } else {
            Place::Pageable
        }
    }

    fn copy_rows(&self, copy: Copy2d, kind: CopyKind, stream: StreamId, wait: Wait) -> Result<()> {
        self.core().check_alive(self.stream(stream)?.device)?;
        if copy.width == 0 || copy.height == 0 {
            return Ok(());
        }
        if copy.height > 1 && (copy.width > copy.dst_pitch || copy.width > copy.src_pitch) {
            return Err(Code::INVALID_VALUE.because(format!("rows of {} bytes do not fit their pitch", copy.width)));
        }
        let (from, to) = (self.place(copy.src), self.place(copy.dst));
        self.check_kind(copy, kind, from, to)?;
        let staged = from == Place::Pageable && to == Place::Device && copy.width * copy.height <= STAGED;
        let waits = match wait {
            Wait::Done => from != Place::Device || to != Place::Device,
            Wait::Auto => to == Place::Pageable || (from == Place::Pageable && !staged),
        };
        let work = if staged && !waits && !self.is_capturing(stream) {
            Work::Staged { copy, bytes: stage(&copy) }
        } else {
            Work::Copy(copy)
        };
        match self.submit(stream, NodeKind::Memcpy, work)? {
            Some(point) if waits => self.wait_point(&point),
            _ => Ok(()),
        }
    }

    fn check_kind(&self, copy: Copy2d, kind: CopyKind, from: Place, to: Place) -> Result<()> {
        let fits = match kind {
            CopyKind::Default => true,
            CopyKind::HostToHost => from != Place::Device && to != Place::Device,
            CopyKind::HostToDevice => from != Place::Device && to != Place::Pageable,
            CopyKind::DeviceToHost => from != Place::Pageable && to != Place::Device,
            CopyKind::DeviceToDevice => from != Place::Pageable && to != Place::Pageable,
        };
        if copy.src == 0 || copy.dst == 0 || !fits {
            return Err(Code::INVALID_VALUE.because(format!(
                "copy from {:#x} to {:#x}: the addresses are not of the kind {kind:?}",
                copy.src, copy.dst
            )));
        }
        Ok(())
    }
}

/// The rows, one after the other, in memory of our own.
fn stage(copy: &Copy2d) -> Arc<[u8]> {
    let mut bytes = Vec::with_capacity((copy.width * copy.height) as usize);
    for row in 0..copy.height {
        // SAFETY: the caller of the unsafe submitting function vouches for the host rows.
        let row =
            unsafe { std::slice::from_raw_parts((copy.src + row * copy.src_pitch) as *const u8, copy.width as usize) };
        bytes.extend_from_slice(row);
    }
    bytes.into()
}

/// Work.
impl Machine {
    /// `cudaMemcpyAsync`.
    ///
    /// # Safety
    /// Host ranges are valid: during the call if pageable, until the stream has passed the copy if pinned or registered.
    ///
    /// # Errors
    /// `INVALID_VALUE` if an address is not of the kind; capture prohibitions; the device's sticky error.
    pub unsafe fn memcpy_async(&self, dst: u64, src: u64, len: u64, kind: CopyKind, stream: StreamId) -> Result<()> {
        self.copy_rows(flat(dst, src, len), kind, stream, Wait::Auto)
    }

    /// `cudaMemcpy`: on the legacy default stream of `device`, and waits.
    ///
    /// # Safety
    /// Host ranges are valid during the call.
    ///
    /// # Errors
    /// As [`Machine::memcpy_async`].
    pub unsafe fn memcpy(&self, device: u32, dst: u64, src: u64, len: u64, kind: CopyKind) -> Result<()> {
        self.copy_rows(flat(dst, src, len), kind, self.legacy_stream(device)?, Wait::Done)
    }

    /// `cudaMemcpy2DAsync`.
    ///
    /// # Safety
    /// As [`Machine::memcpy_async`], for every row.
    ///
    /// # Errors
    /// As [`Machine::memcpy_async`]; `INVALID_VALUE` for rows wider than their pitch.
    pub unsafe fn memcpy_2d_async(&self, copy: Copy2d, kind: CopyKind, stream: StreamId) -> Result<()> {
        self.copy_rows(copy, kind, stream, Wait::Auto)
    }

    /// `cudaMemcpy2D`.
    ///
    /// # Safety
    /// As [`Machine::memcpy`], for every row.
    ///
    /// # Errors
    /// As [`Machine::memcpy_2d_async`].
    pub unsafe fn memcpy_2d(&self, device: u32, copy: Copy2d, kind: CopyKind) -> Result<()> {
        self.copy_rows(copy, kind, self.legacy_stream(device)?, Wait::Done)
    }

    /// `cudaMemcpyPeerAsync`: between devices, whether or not they may touch each other's memory.
    ///
    /// # Errors
    /// As [`Machine::memcpy_async`]; `INVALID_DEVICE`.
    pub fn memcpy_peer_async(
        &self,
        dst: u64,
        dst_device: u32,
        src: u64,
        src_device: u32,
        len: u64,
        stream: StreamId,
    ) -> Result<()> {
        self.core().check_alive(dst_device)?;
        self.core().check_alive(src_device)?;
        self.copy_rows(flat(dst, src, len), CopyKind::DeviceToDevice, stream, Wait::Auto)
    }

    /// Fills `count` elements.
    ///
    /// # Errors
    /// `INVALID_VALUE` for a misaligned address or pageable memory; capture prohibitions; the device's sticky error.
    pub fn memset_async(&self, dst: u64, pattern: Pattern, count: u64, stream: StreamId) -> Result<()> {
        self.memset_2d_async(dst, count.saturating_mul(pattern.width()), pattern, count, 1, stream)
    }

    /// Fills `height` rows of `width` elements, `pitch` bytes apart.
    ///
    /// # Errors
    /// As [`Machine::memset_async`].
    pub fn memset_2d_async(
        &self,
        dst: u64,
        pitch: u64,
        pattern: Pattern,
        width: u64,
        height: u64,
        stream: StreamId,
    ) -> Result<()> {
        self.core().check_alive(self.stream(stream)?.device)?;
        if width == 0 || height == 0 {
            return Ok(());
        }
        let odd = !dst.is_multiple_of(pattern.width()) || (height > 1 && !pitch.is_multiple_of(pattern.width()));
        if odd || width.checked_mul(pattern.width()).is_none() || self.place(dst) == Place::Pageable {
            return Err(Code::INVALID_VALUE
                .because(format!("fill at {dst:#x}: not device memory, or not aligned to the element")));
        }
        self.submit(stream, NodeKind::Memset, Work::Fill { dst, pitch, pattern, width, height }).map(drop)
    }

    /// `cudaMemset`: on the legacy default stream of `device`; the host waits only if the memory is the host's.
    ///
    /// # Errors
    /// As [`Machine::memset_async`].
    pub fn memset(&self, device: u32, dst: u64, pattern: Pattern, count: u64) -> Result<()> {
        let stream = self.legacy_stream(device)?;
        self.memset_async(dst, pattern, count, stream)?;
        if self.place(dst) == Place::Device { Ok(()) } else { self.stream_synchronize(stream) }
    }

    /// `cudaLaunchHostFunc`. The function must not call the machine.
    ///
    /// # Errors
    /// Capture prohibitions; the device's sticky error.
    pub fn launch_host(&self, stream: StreamId, function: HostFn) -> Result<()> {
        self.submit(stream, NodeKind::Host, Work::Host(function)).map(drop)
    }

    /// Puts hashing on the stream: one digest per `page` bytes of `len` at `src`, written to `out` on the host or the device.
    ///
    /// # Safety
    /// If `out` is no memory of a device, it is host memory with room for the digests until the stream has passed the work.
    ///
    /// # Errors
    /// `INVALID_VALUE` if `src` or `page` is no multiple of 16, or `page` is 0; capture prohibitions; the device's sticky error.
    pub unsafe fn hash(&self, stream: StreamId, src: u64, len: u64, page: u64, out: u64) -> Result<()> {
        self.core().check_alive(self.stream(stream)?.device)?;
        if !src.is_multiple_of(16) || !page.is_multiple_of(16) || page == 0 {
            return Err(
                Code::INVALID_VALUE.because(format!("hashing at {src:#x} by {page} bytes: not multiples of 16"))
            );
        }
        if len == 0 {
            return Ok(());
        }
        self.submit(stream, NodeKind::Kernel, Work::Hash { src, len, page, out }).map(drop)
    }

    /// Puts a closure on the stream, as a kernel launch would be.
    ///
    /// # Errors
    /// Capture prohibitions; the device's sticky error.
    pub fn launch(&self, stream: StreamId, name: &str, kernel: Kernel) -> Result<()> {
        if self.options().log {
            eprintln!("sire-sim: kernel {name} on stream {:#x}", stream.0);
        }
        self.submit(stream, NodeKind::Kernel, Work::Kernel(kernel)).map(drop)
    }
}
