//! The driver: what the engine asks of a GPU, and nothing else.
//!
//! This trait is the only door between the engine and a device. It speaks CUDA's
//! virtual-memory nouns (a *reservation* is a range of addresses, a *physical* is
//! memory, a *mapping* joins the two) but contains no CUDA type, so the engine can
//! be run, failed and model-checked without a GPU.
//!
//! # The bargain
//!
//! What every implementation guarantees, and what the conformance suite checks:
//!
//! * **Errors change nothing.** A verb that returns `Err` has had no effect, and may be
//!   called again. (A copy or fill that fails may have written part of its *destination*.)
//! * **Granularity.** Sizes and addresses of `reserve`, `create`, `map`, `unmap` and
//!   `set_access` are multiples of [`Driver::granularity`]. A violation is
//!   [`DriverErrorKind::Invalid`].
//! * **Mappings are whole.** `map` maps a whole physical; `unmap` takes exactly the range of one
//!   earlier `map`. A new mapping has no access until `set_access`.
//! * **Physicals are counted.** `release` of a mapped physical succeeds; its memory goes back
//!   when the last mapping goes. The handle value is dead after `release`.
//! * **Streams.** Work on one stream runs in order. A stream of ours never waits for the program's
//!   streams, nor they for ours: `synchronize` and events are the only order between them.
//! * **Host memory.** A copy is asynchronous if its host range is registered, and may be
//!   synchronous if it is not; either way its host range must stay valid until the stream has passed it.
//! * **Hashes.** `hash` gives the digests that [`Digest::of`] defines. A driver may do without it (`Unsupported`).
//! * **Threads.** Every verb may be called from any thread, with or without a current
//!   context, and leaves the thread's current context as it found it.
//!
//! What callers guarantee: handles come from the same driver, are not used after
//! `release`/`close_*`, and nothing on the device uses a range that is being unmapped.

use crate::digest::Digest;
use std::fmt;

/// A device ordinal as the process sees it (after `CUDA_VISIBLE_DEVICES`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, serde::Serialize)]
#[serde(transparent)]
pub struct Device(pub u32);

/// A device virtual address. Never dereferenced by the engine.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
#[serde(transparent)]
pub struct Addr(pub u64);

impl Addr {
    /// The address `bytes` further on.
    #[must_use]
    pub const fn offset(self, bytes: u64) -> Addr {
        Addr(self.0 + bytes)
    }
}

impl fmt::Debug for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "device {}", self.0)
    }
}

/// Physical memory that `create` made: CUDA's `CUmemGenericAllocationHandle`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Physical(pub u64);

/// What a program asked of physical memory besides its size, so that memory which takes its place can do the same.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Properties {
    /// The kinds of handle that it can be exported as: CUDA's bits.
    pub shareable: u32,
    /// Whether other devices on the bus may reach it (GPUDirect RDMA).
    pub rdma: bool,
}

/// One of Sire's own streams; belongs to the device it was opened on.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Stream(pub u64);

/// A point in a stream.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Event(pub u64);

/// One of the *program's* streams (a `cudaStream_t` value); 0 is the legacy default stream.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct ProgramStream(pub u64);

/// Who may touch a mapping, and how.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Access {
    /// Who it is about.
    pub device: Device,
    /// What it may do from now on.
    pub rights: Rights,
}

/// What a device may do with a mapping.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Rights {
    /// Nothing, as before anybody said anything.
    None,
    /// Read.
    Read,
    /// Read and write.
    ReadWrite,
}

/// Physical memory of a device, in bytes, as the driver reports it (all processes together).
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
pub struct MemoryInfo {
    /// Bytes that a `create` could still get.
    pub free: u64,
    /// Bytes that the device has.
    pub total: u64,
}

/// The classes of failure that the engine treats differently.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum DriverErrorKind {
    /// The device has not enough physical memory (`CUDA_ERROR_OUT_OF_MEMORY`). Worth a retry later.
    OutOfMemory,
    /// The arguments break the bargain above: a bug in the caller.
    Invalid,
    /// The driver, or the device, does not offer this.
    Unsupported,
    /// No driver, no device, or the driver is shutting down.
    Unavailable,
    /// The context is lost (for example `CUDA_ERROR_ILLEGAL_ADDRESS`): every later call fails too.
    Lost,
    /// The program captures a graph, so that this cannot be done now. It may have voided the capture.
    Capturing,
    /// Anything else.
    Other,
}

/// A driver call that failed: which one, why, and the driver's own number.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DriverError {
    /// The class of failure.
    pub kind: DriverErrorKind,
    /// The verb of [`Driver`] that failed.
    pub verb: &'static str,
    /// The driver's number (a `CUresult`), or 0 if there is none.
    pub code: i32,
    /// A sentence: what was asked and what the driver said.
    pub message: String,
}

impl fmt::Display for DriverError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} failed: {} (driver code {})", self.verb, self.message, self.code)
    }
}

impl std::error::Error for DriverError {}

/// What a driver verb returns.
pub type DriverResult<T> = Result<T, DriverError>;

/// The verbs. See the [module documentation](self) for the bargain.
// Declaring an unsafe verb is not using one: calls are in `raw.rs` alone.
#[allow(unsafe_code)]
pub trait Driver: Send + Sync + fmt::Debug + 'static {
    /// How many devices the process sees.
    ///
    /// # Errors
    /// `Unavailable` if there is no driver or no device.
    fn device_count(&self) -> DriverResult<u32>;

    /// The granularity of virtual-memory verbs on `device`, in bytes: a power of two.
    ///
    /// # Errors
    /// `Invalid` for a device that does not exist; `Unsupported` without virtual-memory management.
    fn granularity(&self, device: Device) -> DriverResult<u64>;

    /// Free and total physical memory of `device`.
    ///
    /// # Errors
    /// `Invalid` for a device that does not exist.
    fn memory_info(&self, device: Device) -> DriverResult<MemoryInfo>;

    /// The NUMA node of the host that is nearest to `device`; `None` if the driver cannot say. Asks nobody: what the driver knew when it
    /// was opened.
    fn host_node(&self, _device: Device) -> Option<u32> {
        None
    }

    /// Whether `peer` can be given access to memory that lives on `device`.
    ///
    /// # Errors
    /// `Invalid` for a device that does not exist.
    fn can_access_peer(&self, device: Device, peer: Device) -> DriverResult<bool>;

    /// Reserves `size` bytes of addresses, aligned to `align` bytes (0: the granularity). No memory is used.
    ///
    /// # Errors
    /// `OutOfMemory` if the address space is exhausted.
    fn reserve(&self, size: u64, align: u64) -> DriverResult<Addr>;

    /// Gives back a whole reservation. Nothing may be mapped in it.
    ///
    /// # Errors
    /// `Invalid` if `(addr, size)` is not a reservation, or something is mapped there.
    fn unreserve(&self, addr: Addr, size: u64) -> DriverResult<()>;

    /// Makes `size` bytes of physical memory on `device`. Its content is undefined.
    ///
    /// # Errors
    /// `OutOfMemory` if the device has not enough left.
    fn create(&self, device: Device, size: u64) -> DriverResult<Physical>;

    /// As `create`, with these properties. A driver that knows none makes what `create` makes.
    ///
    /// # Errors
    /// As for `create`; the driver's own if the device cannot make such memory.
    fn create_with(&self, device: Device, size: u64, properties: Properties) -> DriverResult<Physical> {
        let _ = properties;
        self.create(device, size)
    }

    /// Drops the handle. The memory goes back to the device when no mapping is left.
    ///
    /// # Errors
    /// `Invalid` if `physical` is not live.
    fn release(&self, physical: Physical) -> DriverResult<()>;

    /// Maps the whole of `physical` (`size` bytes) at `addr`, inside one reservation where nothing is mapped.
    ///
    /// # Errors
    /// `Invalid` as the bargain says.
    fn map(&self, addr: Addr, size: u64, physical: Physical) -> DriverResult<()>;

    /// Removes the mapping that `map(addr, size, _)` made.
    ///
    /// # Errors
    /// `Invalid` if `(addr, size)` is not exactly one mapping.
    fn unmap(&self, addr: Addr, size: u64) -> DriverResult<()>;

    /// Sets who may touch `[addr, addr + size)`, which must be mapped throughout; may span several mappings. Devices that are
    /// not named keep what they have.
    ///
    /// # Errors
    /// `Invalid` as the bargain says.
    fn set_access(&self, addr: Addr, size: u64, access: &[Access]) -> DriverResult<()>;

    /// Waits until everything submitted to `device`, by anyone in this process, is done.
    /// Never to be called while the program captures a graph on that device: it would void the capture.
    ///
    /// # Errors
    /// `Lost` if the device faulted.
    fn synchronize(&self, device: Device) -> DriverResult<()>;

    /// Whether the program is capturing a graph on `stream` of `device`. Allowed during a capture.
    ///
    /// # Errors
    /// `Lost` if the device faulted.
    fn is_capturing(&self, device: Device, stream: ProgramStream) -> DriverResult<bool>;

    /// Opens a stream of ours on `device` (non-blocking: no order with the legacy default stream).
    ///
    /// # Errors
    /// `Unavailable`, or the driver's own.
    fn open_stream(&self, device: Device) -> DriverResult<Stream>;

    /// Closes it, after what is queued there.
    ///
    /// # Errors
    /// `Invalid` if the stream is not open.
    fn close_stream(&self, stream: Stream) -> DriverResult<()>;

    /// Opens an event on `device`. An event that was never recorded counts as passed.
    ///
    /// # Errors
    /// `Unavailable`, or the driver's own.
    fn open_event(&self, device: Device) -> DriverResult<Event>;

    /// Closes an event.
    ///
    /// # Errors
    /// `Invalid` if the event is not open.
    fn close_event(&self, event: Event) -> DriverResult<()>;

    /// Puts `event` behind what `stream` holds now. Recording again moves it.
    ///
    /// # Errors
    /// `Lost` if the device faulted.
    fn record(&self, event: Event, stream: Stream) -> DriverResult<()>;

    /// Puts `event` behind what the program's `stream` holds now, on the device of the event. Not to be called while the program captures that stream.
    ///
    /// # Errors
    /// `Unsupported` if the driver cannot look at the program's streams; the driver's own if there is no such stream.
    fn record_on(&self, event: Event, stream: ProgramStream) -> DriverResult<()> {
        let _ = event;
        let message = format!("this driver does not record events on the program's streams ({:#x})", stream.0);
        Err(DriverError { kind: DriverErrorKind::Unsupported, verb: "record_on", code: 0, message })
    }

    /// Has the program's `stream` of `device` wait for `event`: what is put there from now on runs once `event` has passed, as it was recorded last.
    /// The caller goes on at once. The event may be of another device. Not to be called while the program captures that stream.
    ///
    /// # Errors
    /// `Unsupported` if the driver cannot make the program's streams wait: callers wait themselves. The driver's own if there is no such stream.
    fn wait_on(&self, event: Event, device: Device, stream: ProgramStream) -> DriverResult<()> {
        let _ = event;
        let message = format!("this driver does not make the program's streams wait ({:#x} of {device})", stream.0);
        Err(DriverError { kind: DriverErrorKind::Unsupported, verb: "wait_on", code: 0, message })
    }

    /// Blocks the calling thread until `event` has passed.
    ///
    /// # Errors
    /// `Lost` if the device faulted: then it is unknown which work before the event was done.
    fn wait(&self, event: Event) -> DriverResult<()>;

    /// Whether `event` has passed; never blocks.
    ///
    /// # Errors
    /// `Lost` if the device faulted.
    fn query(&self, event: Event) -> DriverResult<bool>;

    /// Queues a copy of `len` bytes from the device to host memory.
    ///
    /// # Safety
    /// `[dst, dst + len)` is valid for writes, and nobody else touches it, until `stream` has passed the copy.
    ///
    /// # Errors
    /// `Invalid` if the device range is not mapped with access (a driver may also report that later, as `Lost`).
    unsafe fn copy_to_host(&self, stream: Stream, dst: *mut u8, src: Addr, len: u64) -> DriverResult<()>;

    /// Queues a copy of `len` bytes from host memory to the device.
    ///
    /// # Safety
    /// `[src, src + len)` is valid for reads, and nobody writes to it, until `stream` has passed the copy.
    ///
    /// # Errors
    /// `Invalid` if the device range is not mapped with access (a driver may also report that later, as `Lost`).
    unsafe fn copy_to_device(&self, stream: Stream, dst: Addr, src: *const u8, len: u64) -> DriverResult<()>;

    /// Queues a fill of `len` bytes with `byte`.
    ///
    /// # Errors
    /// As for copies.
    fn fill(&self, stream: Stream, dst: Addr, len: u64, byte: u8) -> DriverResult<()>;

    /// Queues hashing of `len` bytes on the device, in pages of `page` bytes (the last may be shorter): `out` gets one digest
    /// per page. `src` and `page` are multiples of 16. With a `len` of 0 only what hashing needs is made ready (code and buffers on the
    /// device), so that it is there when memory is short. Bytes up to the next multiple of 16 may be read, and do not count.
    ///
    /// # Safety
    /// As many digests as there are pages can be written at `out`, and nobody else touches them, until `stream` has passed the work.
    ///
    /// # Errors
    /// `Unsupported` if the driver cannot hash on that device, now or ever: callers copy and compare. `Invalid` for a bad alignment, or if
    /// the device range is not mapped with access (a driver may also report that later, as `Lost`).
    unsafe fn hash(&self, stream: Stream, src: Addr, len: u64, page: u64, out: *mut Digest) -> DriverResult<()> {
        let _ = (stream, src, len, page, out);
        let message = "this driver does not hash".to_owned();
        Err(DriverError { kind: DriverErrorKind::Unsupported, verb: "hash", code: 0, message })
    }

    /// Makes a host range known to the driver ("pins" it), so that copies are asynchronous and fast.
    ///
    /// # Safety
    /// The range stays mapped until `unregister_host`.
    ///
    /// # Errors
    /// Any: registration is an optimisation, and callers carry on without it.
    unsafe fn register_host(&self, ptr: *mut u8, len: u64) -> DriverResult<()>;

    /// Undoes `register_host`; `ptr` is the start of a registered range.
    ///
    /// # Errors
    /// `Invalid` if `ptr` was not registered.
    fn unregister_host(&self, ptr: *mut u8) -> DriverResult<()>;
}
