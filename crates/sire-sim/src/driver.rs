//! [`SimDriver`]: the engine's `Driver` on a [`Machine`]. Every verb enters by the name of the CUDA
//! function that the real driver would call, so that fault plans and counters read the same.
//!
//! Copies are always asynchronous, registered or not: the bargain allows it, and a missing wait shows.

use crate::core::Work;
use crate::error::{Code, SimError};
use crate::machine::Machine;
use crate::options::Options;
use crate::types::{AccessDesc, CaptureStatus, Copy2d, EventId, NodeKind, Pattern, PhysicalId, Prot, StreamId};
use sire_core::digest::Digest;
use sire_core::driver::{
    Access, Addr, Device, Driver, DriverError, DriverErrorKind, DriverResult, Event, MemoryInfo, Physical,
    ProgramStream, Rights, Stream,
};

/// The engine's door to a software device. Cheap to clone; clones share the machine.
#[derive(Clone, Debug)]
pub struct SimDriver {
    machine: Machine,
}

impl SimDriver {
    /// A driver on a machine of its own.
    ///
    /// # Errors
    /// As [`Machine::new`].
    pub fn new(options: Options) -> crate::error::Result<SimDriver> {
        Machine::new(options).map(SimDriver::on)
    }

    /// A driver on a machine that others use as well (for example as "the program").
    #[must_use]
    pub fn on(machine: Machine) -> SimDriver {
        SimDriver { machine }
    }

    /// The machine beneath.
    #[must_use]
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    fn call<T>(
        &self,
        verb: &'static str,
        function: &str,
        bytes: u64,
        body: impl FnOnce(&Machine) -> crate::error::Result<T>,
    ) -> DriverResult<T> {
        if let Some(code) = self.machine.enter_call(function, bytes) {
            return Err(driver_error(verb, &code.because(format!("the fault plan fails this call of {function}"))));
        }
        body(&self.machine).map_err(|error| driver_error(verb, &error))
    }
}

/// The class of failure that a CUDA number belongs to.
#[must_use]
pub fn error_kind(code: Code) -> DriverErrorKind {
    match code.0 {
        1 | 101 | 201 | 400 | 713 => DriverErrorKind::Invalid,
        2 => DriverErrorKind::OutOfMemory,
        3 | 4 | 100 => DriverErrorKind::Unavailable,
        700 | 702 | 709 | 710 | 714..=719 => DriverErrorKind::Lost,
        801 => DriverErrorKind::Unsupported,
        900 | 901 | 906 => DriverErrorKind::Capturing,
        _ => DriverErrorKind::Other,
    }
}

fn driver_error(verb: &'static str, error: &SimError) -> DriverError {
    DriverError { kind: error_kind(error.code), verb, code: error.code.0, message: error.to_string() }
}

/// Queues a copy between the device and host memory at `host`. With a clock, memory that is not registered is waited for, as it
/// would be on a GPU.
fn queue(machine: &Machine, stream: Stream, copy: Work, host: u64, len: u64) -> crate::error::Result<()> {
    let point = machine.submit(StreamId(stream.0), NodeKind::Memcpy, copy)?;
    match point {
        Some(point) if machine.core().clock.is_some() && !machine.core().knows(host, len) => machine.wait_point(&point),
        _ => Ok(()),
    }
}

fn flat(dst: u64, src: u64, len: u64) -> Work {
    Work::Copy(Copy2d { dst, dst_pitch: len, src, src_pitch: len, width: len, height: 1 })
}

impl Driver for SimDriver {
    fn device_count(&self) -> DriverResult<u32> {
        self.call("device_count", "cuDeviceGetCount", 0, |machine| match machine.device_count() {
            0 => Err(Code::NO_DEVICE.because("the machine has no device")),
            count => Ok(count),
        })
    }

    fn granularity(&self, device: Device) -> DriverResult<u64> {
        self.call("granularity", "cuMemGetAllocationGranularity", 0, |machine| machine.granularity(device.0))
    }

    fn memory_info(&self, device: Device) -> DriverResult<MemoryInfo> {
        self.call("memory_info", "cuMemGetInfo", 0, |machine| {
            machine.memory_info(device.0).map(|(free, total)| MemoryInfo { free, total })
        })
    }

    fn can_access_peer(&self, device: Device, peer: Device) -> DriverResult<bool> {
        self.call("can_access_peer", "cuDeviceCanAccessPeer", 0, |machine| machine.can_access_peer(peer.0, device.0))
    }

    fn reserve(&self, size: u64, align: u64) -> DriverResult<Addr> {
        self.call("reserve", "cuMemAddressReserve", size, |machine| machine.reserve(size, align, 0).map(Addr))
    }

    fn unreserve(&self, addr: Addr, size: u64) -> DriverResult<()> {
        self.call("unreserve", "cuMemAddressFree", size, |machine| machine.unreserve(addr.0, size))
    }

    fn create(&self, device: Device, size: u64) -> DriverResult<Physical> {
        let made = |machine: &Machine| machine.create(device.0, size, 0).map(|id| Physical(id.0));
        self.call("create", "cuMemCreate", size, made)
    }

    fn release(&self, physical: Physical) -> DriverResult<()> {
        self.call("release", "cuMemRelease", 0, |machine| machine.release(PhysicalId(physical.0)))
    }

    fn map(&self, addr: Addr, size: u64, physical: Physical) -> DriverResult<()> {
        self.call("map", "cuMemMap", size, |machine| machine.map(addr.0, size, 0, PhysicalId(physical.0)))
    }

    fn unmap(&self, addr: Addr, size: u64) -> DriverResult<()> {
        self.call("unmap", "cuMemUnmap", size, |machine| machine.unmap(addr.0, size))
    }

    fn set_access(&self, addr: Addr, size: u64, access: &[Access]) -> DriverResult<()> {
        let prot = |rights| match rights {
            Rights::None => Prot::None,
            Rights::Read => Prot::Read,
            Rights::ReadWrite => Prot::ReadWrite,
        };
        let access: Vec<_> =
            access.iter().map(|who| AccessDesc { device: who.device.0, prot: prot(who.rights) }).collect();
        self.call("set_access", "cuMemSetAccess", size, |machine| machine.set_access(addr.0, size, &access))
    }

    fn synchronize(&self, device: Device) -> DriverResult<()> {
        self.call("synchronize", "cuCtxSynchronize", 0, |machine| machine.device_synchronize(device.0))
    }

    fn is_capturing(&self, device: Device, stream: ProgramStream) -> DriverResult<bool> {
        self.call("is_capturing", "cuStreamIsCapturing", 0, |machine| {
            machine.check_alive(device.0)?;
            match machine.resolve_stream(device.0, stream.0).and_then(|stream| machine.capture_info(stream)) {
                Ok(info) => Ok(info.status != CaptureStatus::None),
                Err(error) if error.code == Code::CAPTURE_IMPLICIT => Ok(true),
                // A stream that the machine never made (tests invent them) captures nothing.
                Err(error) if error.code == Code::INVALID_HANDLE => Ok(false),
                Err(error) => Err(error),
            }
        })
    }

    fn open_stream(&self, device: Device) -> DriverResult<Stream> {
        let opened = |machine: &Machine| machine.stream_create(device.0, false, 0).map(|id| Stream(id.0));
        self.call("open_stream", "cuStreamCreate", 0, opened)
    }

    fn close_stream(&self, stream: Stream) -> DriverResult<()> {
        self.call("close_stream", "cuStreamDestroy", 0, |machine| machine.stream_destroy(StreamId(stream.0)))
    }

    fn open_event(&self, device: Device) -> DriverResult<Event> {
        let opened = |machine: &Machine| machine.event_create(device.0, false).map(|id| Event(id.0));
        self.call("open_event", "cuEventCreate", 0, opened)
    }

    fn close_event(&self, event: Event) -> DriverResult<()> {
        self.call("close_event", "cuEventDestroy", 0, |machine| machine.event_destroy(EventId(event.0)))
    }

    fn record(&self, event: Event, stream: Stream) -> DriverResult<()> {
        let recorded = |machine: &Machine| machine.event_record(EventId(event.0), StreamId(stream.0));
        self.call("record", "cuEventRecord", 0, recorded)
    }

    fn record_on(&self, event: Event, stream: ProgramStream) -> DriverResult<()> {
        self.call("record_on", "cuEventRecord", 0, |machine| {
            let device = machine.event_device(EventId(event.0))?;
            machine.resolve_stream(device, stream.0).and_then(|stream| machine.event_record(EventId(event.0), stream))
        })
    }

    fn wait_on(&self, event: Event, device: Device, stream: ProgramStream) -> DriverResult<()> {
        self.call("wait_on", "cuStreamWaitEvent", 0, |machine| {
            let stream = machine.resolve_stream(device.0, stream.0)?;
            machine.stream_wait_event(stream, EventId(event.0))
        })
    }

    fn wait(&self, event: Event) -> DriverResult<()> {
        self.call("wait", "cuEventSynchronize", 0, |machine| machine.event_synchronize(EventId(event.0)))
    }

    fn query(&self, event: Event) -> DriverResult<bool> {
        self.call("query", "cuEventQuery", 0, |machine| machine.event_query(EventId(event.0)))
    }

    unsafe fn copy_to_host(&self, stream: Stream, dst: *mut u8, src: Addr, len: u64) -> DriverResult<()> {
        self.call("copy_to_host", "cuMemcpyDtoHAsync", len, |machine| {
            queue(machine, stream, flat(dst as u64, src.0, len), dst as u64, len)
        })
    }

    unsafe fn copy_to_device(&self, stream: Stream, dst: Addr, src: *const u8, len: u64) -> DriverResult<()> {
        self.call("copy_to_device", "cuMemcpyHtoDAsync", len, |machine| {
            queue(machine, stream, flat(dst.0, src as u64, len), src as u64, len)
        })
    }

    fn fill(&self, stream: Stream, dst: Addr, len: u64, byte: u8) -> DriverResult<()> {
        self.call("fill", "cuMemsetD8Async", len, |machine| {
            machine.memset_async(dst.0, Pattern::U8(byte), len, StreamId(stream.0))
        })
    }

    unsafe fn hash(&self, stream: Stream, src: Addr, len: u64, page: u64, out: *mut Digest) -> DriverResult<()> {
        self.call("hash", "cuLaunchKernel", len, |machine| {
            // SAFETY: the caller keeps room for the digests until the stream has passed the work.
            unsafe { machine.hash(StreamId(stream.0), src.0, len, page, out as u64) }
        })
    }

    unsafe fn register_host(&self, ptr: *mut u8, len: u64) -> DriverResult<()> {
        self.call("register_host", "cuMemHostRegister", len, |machine| {
            // SAFETY: the caller keeps the range mapped until `unregister_host`.
            unsafe { machine.host_register(0, ptr as u64, len, 0) }
        })
    }

    fn unregister_host(&self, ptr: *mut u8) -> DriverResult<()> {
        self.call("unregister_host", "cuMemHostUnregister", 0, |machine| machine.host_unregister(ptr as u64))
    }
}
