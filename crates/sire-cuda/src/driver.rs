//! The verbs: each is one or two driver calls, a sentence for when they fail, and nothing else.

use crate::context::{Current, PrimaryContext, Relaxed};
use crate::hash::Hashing;
use crate::library::{self, Loaded, Resolver};
use crate::result::{NOT_READY, STREAM_CAPTURE_IMPLICIT, SUCCESS, failure, invalid, unavailable};
use crate::system::runs_under_windows;
use crate::table::{Code, DeviceHandle, EntryPoints, Opaque};
use cudarc::driver::sys::{
    CU_MEMHOSTREGISTER_PORTABLE, CUdevice_attribute, CUevent_flags, CUmemAccess_flags, CUmemAccessDesc,
    CUmemAllocationGranularity_flags, CUmemAllocationHandleType, CUmemAllocationProp, CUmemAllocationType,
    CUmemLocation, CUmemLocationType, CUstream_flags,
};
use sire_core::digest::Digest;
use sire_core::driver::{
    Access, Addr, Device, Driver, DriverError, DriverErrorKind, DriverResult, Event, MemoryInfo, Physical,
    ProgramStream, Properties, Rights, Stream,
};
use std::collections::HashMap;
use std::ffi::{c_int, c_uint, c_void};
use std::fmt;
use std::path::PathBuf;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, RwLock};

/// How a driver is opened.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The library to use (`SIRE_LIBCUDA`); None: found by itself.
    pub path: Option<PathBuf>,
    /// Whether physical memory can be exported as a file descriptor (costs nothing until it is done).
    pub exportable: bool,
}

/// What is asked of a device once, when the driver is opened.
#[derive(Debug)]
struct DeviceFacts {
    handle: DeviceHandle,
    context: PrimaryContext,
    rdma: bool,
    /// Memory can be handed out as a file descriptor.
    descriptors: bool,
    virtual_memory: bool,
    /// 0 where there is no virtual-memory management.
    granularity: u64,
    /// The host's NUMA node that is nearest; `None` where the driver does not know.
    host_node: Option<u32>,
}

/// The real driver.
pub struct CudaDriver {
    loaded: Loaded,
    version: i32,
    exportable: bool,
    /// By ordinal; or why a device cannot be used: the others can.
    devices: Vec<DriverResult<DeviceFacts>>,
    /// The streams and events that are open, and their devices: the driver does not check stale handles.
    streams: RwLock<HashMap<u64, Device>>,
    events: RwLock<HashMap<u64, Device>>,
    /// The device in whose context host memory is registered, chosen at the first registration, and anew when it is lost.
    host_device: Mutex<Option<Device>>,
    hashing: Hashing,
    calls: AtomicU64,
}

impl fmt::Debug for CudaDriver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CudaDriver").field("origin", &self.loaded.origin).field("devices", &self.devices.len()).finish()
    }
}

/// Calls one entry point and turns its code into a result; counts it.
macro_rules! call {
    ($self:ident, $verb:literal, $entry:ident($($argument:expr),* $(,)?), $($what:tt)*) => {{
        let code = $self.raw(|table| {
            // SAFETY: the arguments are of the entry point's types; pointers are to locals or to memory that
            // this verb's caller vouches for.
            unsafe { (table.$entry)($($argument),*) }
        });
        if code == SUCCESS { Ok(()) } else { Err(failure(&$self.loaded.table, $verb, code, &format!($($what)*))) }
    }};
}

impl CudaDriver {
    /// Opens the driver: finds the library, initialises it, and looks at the devices.
    ///
    /// # Errors
    /// `Unavailable`, with what was tried and what to do, if there is no library or no device.
    pub fn open(options: &Options, resolver: Option<Resolver<'_>>) -> DriverResult<CudaDriver> {
        let loaded =
            library::load(options.path.as_deref(), resolver).map_err(|message| unavailable("open", message))?;
        let mut driver = CudaDriver {
            loaded,
            version: 0,
            exportable: options.exportable,
            devices: Vec::new(),
            streams: RwLock::default(),
            events: RwLock::default(),
            host_device: Mutex::default(),
            hashing: Hashing::default(),
            calls: AtomicU64::new(0),
        };
        driver.initialise()?;
        Ok(driver)
    }

    /// Where the driver was found, and its version: one line for people.
    #[must_use]
    pub fn description(&self) -> String {
        format!("CUDA {}.{} from {}", self.version / 1000, self.version % 1000 / 10, self.loaded.origin)
    }

    /// The UUID of the device as NVML spells it, the same in every process whatever ordinal it has there: `GPU-` and five groups of hexadecimal
    /// digits, or `MIG-` and those of the MIG device.
    ///
    /// # Errors
    /// `Invalid` for a device that does not exist; the driver's own.
    pub fn uuid(&self, device: Device) -> DriverResult<String> {
        let handle = self.device("uuid", device)?.handle;
        let (mut own, mut of_gpu) = ([0u8; 16], [0u8; 16]);
        call!(self, "uuid", device_get_uuid(&raw mut own, handle), "asking the UUID of {device}")?;
        call!(self, "uuid", device_get_uuid_of_gpu(&raw mut of_gpu, handle), "asking the UUID of {device}'s GPU")?;
        // The older question is answered with the GPU's also for a part of it: that is how the two can be told apart.
        let kind = if own == of_gpu { "GPU" } else { "MIG" };
        let hex: String = own.iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(format!("{kind}-{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]))
    }

    /// Whether `context` is the primary context of `device`, in which all that this value waits for runs. So is any of a device that cannot be used:
    /// whoever then asks for its memory is told why.
    #[must_use]
    pub fn is_primary_context(&self, device: Device, context: *mut c_void) -> bool {
        let table = &self.loaded.table;
        let _relaxed = Relaxed::enter(table);
        self.device("is_primary_context", device).map_or(true, |facts| facts.context.is(context, table))
    }

    /// Forgets what lives in the device's context, which the program is about to reset: streams, events, the kernel and its buffers, and the context
    /// itself. What is needed again is made anew. To be called while nothing of ours is under way there.
    pub fn forget(&self, device: Device) {
        let Ok(facts) = self.device("forget", device) else { return };
        let streams = forget_all(&self.streams, device);
        forget_all(&self.events, device);
        self.hashing.forget_device(device, &streams);
        let mut host_device = self.host_device.lock().unwrap_or_else(PoisonError::into_inner);
        *host_device = host_device.filter(|chosen| *chosen != device);
        drop(host_device);
        let table = &self.loaded.table;
        let _relaxed = Relaxed::enter(table);
        facts.context.forget(table);
    }

    /// How many driver calls this value has made.
    #[must_use]
    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    pub(crate) fn table(&self) -> &EntryPoints {
        &self.loaded.table
    }

    pub(crate) fn hashing(&self) -> &Hashing {
        &self.hashing
    }

    /// Makes a call that no capture in the program can forbid, and that voids none.
    pub(crate) fn raw(&self, call: impl FnOnce(&EntryPoints) -> Code) -> Code {
        self.calls.fetch_add(1, Ordering::Relaxed);
        let table = &self.loaded.table;
        let _relaxed = Relaxed::enter(table);
        call(table)
    }

    fn initialise(&mut self) -> DriverResult<()> {
        call!(self, "open", init(0), "starting the driver").map_err(unavailable_if_unknown)?;
        let mut version = 0;
        call!(self, "open", driver_get_version(&raw mut version), "asking the driver's version")?;
        self.version = version;
        let mut count = 0;
        call!(self, "open", device_get_count(&raw mut count), "counting the devices")?;
        if count == 0 {
            let origin = &self.loaded.origin;
            return Err(unavailable("open", format!("{origin} sees no device; is CUDA_VISIBLE_DEVICES empty?")));
        }
        for ordinal in 0..count {
            self.devices.push(self.look_at(ordinal));
        }
        Ok(())
    }

    fn look_at(&self, ordinal: c_int) -> DriverResult<DeviceFacts> {
        let mut handle = 0;
        call!(self, "open", device_get(&raw mut handle, ordinal), "opening device {ordinal}")?;
        // `None` for what an old driver does not know.
        let number = |which: CUdevice_attribute| {
            let mut value = 0;
            let asked = call!(
                self,
                "open",
                device_get_attribute(&raw mut value, which as c_int, handle),
                "asking what device {ordinal} can do"
            );
            match asked {
                Err(error) if error.kind == DriverErrorKind::Invalid => Ok(None),
                asked => asked.map(|()| Some(value)),
            }
        };
        let attribute = |which| number(which).map(|value| value.is_some_and(|value| value != 0));
        let mut facts = DeviceFacts {
            handle,
            context: PrimaryContext::new(handle),
            rdma: attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED)?
                && !runs_under_windows(),
            descriptors: attribute(
                CUdevice_attribute::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED,
            )?,
            virtual_memory: attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED)?,
            granularity: 0,
            host_node: number(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID)?
                .and_then(|node| u32::try_from(node).ok()),
        };
        if facts.virtual_memory {
            facts.granularity = self.ask_granularity(&facts, ordinal)?;
        }
        Ok(facts)
    }

    fn ask_granularity(&self, facts: &DeviceFacts, ordinal: c_int) -> DriverResult<u64> {
        let properties = self.properties(facts, ordinal);
        let minimum = CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_MINIMUM as c_uint;
        let mut granularity = 0usize;
        call!(
            self,
            "granularity",
            mem_get_allocation_granularity(&raw mut granularity, &raw const properties, minimum),
            "asking the granularity of device {ordinal}"
        )?;
        Ok(granularity as u64)
    }

    /// The properties of every physical that we make on a device: the same at create and at re-create.
    fn properties(&self, facts: &DeviceFacts, ordinal: c_int) -> CUmemAllocationProp {
        // SAFETY: the struct is plain integers and one pointer; all zeros is its documented empty form.
        let mut properties: CUmemAllocationProp = unsafe { std::mem::zeroed() };
        properties.type_ = CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
        properties.location = location(ordinal);
        properties.allocFlags.gpuDirectRDMACapable = u8::from(facts.rdma);
        if self.exportable && facts.descriptors {
            properties.requestedHandleTypes = CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
        }
        properties
    }

    fn make(&self, device: Device, size: u64, properties: &CUmemAllocationProp) -> DriverResult<Physical> {
        let mut physical = 0;
        call!(
            self,
            "create",
            mem_create(&raw mut physical, size as usize, &raw const *properties, 0),
            "making {size} bytes on {device}"
        )?;
        Ok(Physical(physical))
    }

    /// Whether somebody in this process has made a context on the device.
    #[must_use]
    pub fn is_in_use(&self, device: Device) -> bool {
        self.device("is_in_use", device).is_ok_and(|facts| facts.context.is_active(&self.loaded.table))
    }

    fn device(&self, verb: &'static str, device: Device) -> DriverResult<&DeviceFacts> {
        let known = self.devices.get(device.0 as usize).ok_or_else(|| {
            invalid(verb, format!("{device} was asked for; the process sees {} of them", self.devices.len()))
        })?;
        known.as_ref().map_err(|broken| {
            let message = format!("{device} cannot be used since it failed at the start ({broken}); others can");
            DriverError { kind: DriverErrorKind::Unavailable, verb, code: broken.code, message }
        })
    }

    /// Makes the primary context of `device` current until the guard goes.
    fn enter(&self, verb: &'static str, device: Device) -> DriverResult<Current<'_>> {
        let facts = self.device(verb, device)?;
        let table = &self.loaded.table;
        self.calls.fetch_add(2, Ordering::Relaxed);
        let _relaxed = Relaxed::enter(table);
        facts
            .context
            .retain(table)
            .and_then(|context| Current::push(table, context))
            .map_err(|code| failure(table, verb, code, &format!("making the context of {device} current")))
    }

    /// Does `call` in a context in which host memory can be registered. Registrations are portable, so any will do, and a lost device's is replaced by
    /// another's.
    fn in_host_context(&self, verb: &'static str, call: impl Fn() -> DriverResult<()>) -> DriverResult<()> {
        let within = |device| self.enter(verb, device).and_then(|_current| call());
        let device = self.host_device(None);
        match within(device) {
            Err(error) if error.kind == DriverErrorKind::Lost => {
                let other = self.host_device(Some(device));
                if other == device { Err(error) } else { within(other) }
            }
            done => done,
        }
    }

    /// The device for registrations, which is not the `lost` one if there is another. One whose context exists is taken, because a context costs hundreds
    /// of megabytes of its device.
    fn host_device(&self, lost: Option<Device>) -> Device {
        let chosen = || self.host_device.lock().unwrap_or_else(PoisonError::into_inner);
        let known = *chosen();
        known.filter(|&device| lost != Some(device)).unwrap_or_else(|| {
            let found = self.find_host_device(lost);
            let mut chosen = chosen();
            // Who has chosen meanwhile has chosen for all.
            let device = chosen.filter(|&device| lost != Some(device)).unwrap_or(found);
            *chosen = Some(device);
            device
        })
    }

    fn find_host_device(&self, lost: Option<Device>) -> Device {
        let usable = || {
            let devices = (0u32..)
                .zip(&self.devices)
                .filter_map(|(ordinal, facts)| Some((Device(ordinal), facts.as_ref().ok()?)));
            devices.filter(|(device, _)| lost != Some(*device))
        };
        let active = usable().find(|(_, facts)| facts.context.is_active(&self.loaded.table));
        let found = active.or_else(|| usable().next().filter(|_| lost.is_none()));
        found.map(|(device, _)| device).or(lost).unwrap_or(Device(0))
    }

    fn device_of(&self, verb: &'static str, open: &RwLock<HashMap<u64, Device>>, handle: u64) -> DriverResult<Device> {
        let known = open.read().unwrap_or_else(PoisonError::into_inner).get(&handle).copied();
        known.ok_or_else(|| invalid(verb, format!("{handle:#x} is not open")))
    }

    fn enter_stream(&self, verb: &'static str, stream: Stream) -> DriverResult<Current<'_>> {
        self.enter(verb, self.device_of(verb, &self.streams, stream.0)?)
    }

    fn enter_event(&self, verb: &'static str, event: Event) -> DriverResult<Current<'_>> {
        self.enter(verb, self.device_of(verb, &self.events, event.0)?)
    }
}

/// The kind of handle that memory is to have; CUDA's enumeration has single kinds only.
fn shareable_as(kind: u32) -> DriverResult<CUmemAllocationHandleType> {
    match kind {
        0 => Ok(CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_NONE),
        1 => Ok(CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR),
        8 => Ok(CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_FABRIC),
        other => Err(invalid("create_with", format!("{other:#x} is no kind of handle that can be made again"))),
    }
}

fn location(ordinal: c_int) -> CUmemLocation {
    CUmemLocation { type_: CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: ordinal }
}

/// A driver that cannot even start is as good as none.
fn unavailable_if_unknown(error: DriverError) -> DriverError {
    if error.kind == DriverErrorKind::Other {
        DriverError { kind: DriverErrorKind::Unavailable, ..error }
    } else {
        error
    }
}

fn remember(open: &RwLock<HashMap<u64, Device>>, handle: u64, device: Device) {
    open.write().unwrap_or_else(PoisonError::into_inner).insert(handle, device);
}

/// Takes all handles of a device out.
fn forget_all(open: &RwLock<HashMap<u64, Device>>, device: Device) -> Vec<u64> {
    let mut open = open.write().unwrap_or_else(PoisonError::into_inner);
    open.extract_if(|_, of| *of == device).map(|(handle, _)| handle).collect()
}

/// Takes the handle out, so that exactly one caller closes it.
fn forget(verb: &'static str, open: &RwLock<HashMap<u64, Device>>, handle: u64) -> DriverResult<Device> {
    let known = open.write().unwrap_or_else(PoisonError::into_inner).remove(&handle);
    known.ok_or_else(|| invalid(verb, format!("{handle:#x} is not open")))
}

#[allow(clippy::cast_possible_truncation, reason = "device sizes are u64 and size_t, both 64 bits where CUDA runs")]
impl Driver for CudaDriver {
    fn device_count(&self) -> DriverResult<u32> {
        Ok(self.devices.len() as u32)
    }

    fn granularity(&self, device: Device) -> DriverResult<u64> {
        let facts = self.device("granularity", device)?;
        if facts.virtual_memory {
            return Ok(facts.granularity);
        }
        Err(DriverError {
            kind: DriverErrorKind::Unsupported,
            verb: "granularity",
            code: 0,
            message: format!("{device} has no virtual-memory management (vGPU without it, or an old device)"),
        })
    }

    fn host_node(&self, device: Device) -> Option<u32> {
        self.device("host_node", device).ok().and_then(|facts| facts.host_node)
    }

    fn memory_info(&self, device: Device) -> DriverResult<MemoryInfo> {
        let _current = self.enter("memory_info", device)?;
        let (mut free, mut total) = (0usize, 0usize);
        call!(self, "memory_info", mem_get_info(&raw mut free, &raw mut total), "asking the memory of {device}")?;
        Ok(MemoryInfo { free: free as u64, total: total as u64 })
    }

    fn can_access_peer(&self, device: Device, peer: Device) -> DriverResult<bool> {
        let owner = self.device("can_access_peer", device)?.handle;
        let accessor = self.device("can_access_peer", peer)?.handle;
        if device == peer {
            return Ok(true);
        }
        let mut can = 0;
        call!(
            self,
            "can_access_peer",
            device_can_access_peer(&raw mut can, accessor, owner),
            "asking whether {peer} can access {device}"
        )?;
        Ok(can != 0)
    }

    fn reserve(&self, size: u64, align: u64) -> DriverResult<Addr> {
        let mut address = 0;
        call!(
            self,
            "reserve",
            mem_address_reserve(&raw mut address, size as usize, align as usize, 0, 0),
            "reserving {size} bytes of addresses"
        )?;
        Ok(Addr(address))
    }

    fn unreserve(&self, addr: Addr, size: u64) -> DriverResult<()> {
        call!(self, "unreserve", mem_address_free(addr.0, size as usize), "giving back {size} bytes at {addr:?}")
    }

    fn create(&self, device: Device, size: u64) -> DriverResult<Physical> {
        let facts = self.device("create", device)?;
        if self.exportable && !facts.descriptors {
            return Err(DriverError {
                kind: DriverErrorKind::Unsupported,
                verb: "create",
                code: 0,
                message: format!(
                    "{device} cannot hand out memory as a file descriptor, which SIRE_EXPORTABLE=1 asks for; unset it"
                ),
            });
        }
        self.make(device, size, &self.properties(facts, device.0 as c_int))
    }

    fn create_with(&self, device: Device, size: u64, wanted: Properties) -> DriverResult<Physical> {
        let mut properties = self.properties(self.device("create", device)?, device.0 as c_int);
        properties.allocFlags.gpuDirectRDMACapable = u8::from(wanted.rdma);
        properties.requestedHandleTypes = shareable_as(wanted.shareable)?;
        self.make(device, size, &properties)
    }

    fn release(&self, physical: Physical) -> DriverResult<()> {
        call!(self, "release", mem_release(physical.0), "releasing physical {:#x}", physical.0)
    }

    fn map(&self, addr: Addr, size: u64, physical: Physical) -> DriverResult<()> {
        call!(self, "map", mem_map(addr.0, size as usize, 0, physical.0, 0), "mapping {size} bytes at {addr:?}")
    }

    fn unmap(&self, addr: Addr, size: u64) -> DriverResult<()> {
        call!(self, "unmap", mem_unmap(addr.0, size as usize), "unmapping {size} bytes at {addr:?}")
    }

    fn set_access(&self, addr: Addr, size: u64, access: &[Access]) -> DriverResult<()> {
        let mut wanted = Vec::with_capacity(access.len());
        for one in access {
            self.device("set_access", one.device)?;
            let flags = match one.rights {
                Rights::None => CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_NONE,
                Rights::Read => CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READ,
                Rights::ReadWrite => CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
            };
            wanted.push(CUmemAccessDesc { location: location(one.device.0 as c_int), flags });
        }
        call!(
            self,
            "set_access",
            mem_set_access(addr.0, size as usize, wanted.as_ptr(), wanted.len()),
            "setting what {} devices may do with {size} bytes at {addr:?}",
            wanted.len()
        )
    }

    fn synchronize(&self, device: Device) -> DriverResult<()> {
        let _current = self.enter("synchronize", device)?;
        call!(self, "synchronize", ctx_synchronize(), "waiting for {device}")
    }

    fn is_capturing(&self, device: Device, stream: ProgramStream) -> DriverResult<bool> {
        let _current = self.enter("is_capturing", device)?;
        let mut status = 0;
        let code = self.raw(|table| {
            // SAFETY: the stream is one that the program uses right now; the call writes one int.
            unsafe { (table.stream_is_capturing)(stream.0 as Opaque, &raw mut status) }
        });
        match code {
            SUCCESS => Ok(status != 0),
            STREAM_CAPTURE_IMPLICIT => Ok(true),
            _ => Err(failure(&self.loaded.table, "is_capturing", code, &format!("asking about a stream of {device}"))),
        }
    }

    fn open_stream(&self, device: Device) -> DriverResult<Stream> {
        let _current = self.enter("open_stream", device)?;
        let mut stream: Opaque = ptr::null_mut();
        let flags = CUstream_flags::CU_STREAM_NON_BLOCKING as c_uint;
        call!(self, "open_stream", stream_create(&raw mut stream, flags), "opening a stream on {device}")?;
        remember(&self.streams, stream as u64, device);
        Ok(Stream(stream as u64))
    }

    fn close_stream(&self, stream: Stream) -> DriverResult<()> {
        let device = forget("close_stream", &self.streams, stream.0)?;
        // Before the handle is free: the next stream may have the same.
        let buffer = self.hashing.forget(stream);
        let closed = self.enter("close_stream", device).and_then(|_current| {
            call!(self, "close_stream", stream_destroy(stream.0 as Opaque), "closing a stream of {device}")?;
            if let Some(buffer) = buffer {
                // Waits for what the stream still holds. A buffer that cannot be freed is lost with its context.
                // SAFETY: the buffer came from `mem_alloc`, and no call uses it any more: the stream is closed.
                self.raw(|table| unsafe { (table.mem_free)(buffer) });
            }
            Ok(())
        });
        if closed.is_err() {
            buffer.into_iter().for_each(|buffer| self.hashing.keep(stream, buffer));
            remember(&self.streams, stream.0, device);
        }
        closed
    }

    fn open_event(&self, device: Device) -> DriverResult<Event> {
        let _current = self.enter("open_event", device)?;
        let mut event: Opaque = ptr::null_mut();
        let flags = CUevent_flags::CU_EVENT_DISABLE_TIMING as c_uint;
        call!(self, "open_event", event_create(&raw mut event, flags), "opening an event on {device}")?;
        remember(&self.events, event as u64, device);
        Ok(Event(event as u64))
    }

    fn close_event(&self, event: Event) -> DriverResult<()> {
        let device = forget("close_event", &self.events, event.0)?;
        let closed = self.enter("close_event", device).and_then(|_current| {
            call!(self, "close_event", event_destroy(event.0 as Opaque), "closing an event of {device}")
        });
        if closed.is_err() {
            remember(&self.events, event.0, device);
        }
        closed
    }

    fn record(&self, event: Event, stream: Stream) -> DriverResult<()> {
        self.device_of("record", &self.events, event.0)?;
        let _current = self.enter_stream("record", stream)?;
        call!(self, "record", event_record(event.0 as Opaque, stream.0 as Opaque), "recording an event")
    }

    fn record_on(&self, event: Event, stream: ProgramStream) -> DriverResult<()> {
        let _current = self.enter_event("record_on", event)?;
        let stream = stream.0 as Opaque;
        call!(self, "record_on", event_record(event.0 as Opaque, stream), "recording an event on the program's stream")
    }

    fn wait_on(&self, event: Event, device: Device, stream: ProgramStream) -> DriverResult<()> {
        self.device_of("wait_on", &self.events, event.0)?;
        let _current = self.enter("wait_on", device)?;
        let (stream, event) = (stream.0 as Opaque, event.0 as Opaque);
        call!(self, "wait_on", stream_wait_event(stream, event, 0), "having a stream of {device} wait for an event")
    }

    fn wait(&self, event: Event) -> DriverResult<()> {
        let _current = self.enter_event("wait", event)?;
        call!(self, "wait", event_synchronize(event.0 as Opaque), "waiting for an event")
    }

    fn query(&self, event: Event) -> DriverResult<bool> {
        let _current = self.enter_event("query", event)?;
        let code = self.raw(|table| {
            // SAFETY: the event is open: `enter_event` found it in the table.
            unsafe { (table.event_query)(event.0 as Opaque) }
        });
        match code {
            SUCCESS => Ok(true),
            NOT_READY => Ok(false),
            _ => Err(failure(&self.loaded.table, "query", code, "asking about an event")),
        }
    }

    unsafe fn copy_to_host(&self, stream: Stream, dst: *mut u8, src: Addr, len: u64) -> DriverResult<()> {
        let _current = self.enter_stream("copy_to_host", stream)?;
        call!(
            self,
            "copy_to_host",
            memcpy_dtoh_async(dst.cast::<c_void>(), src.0, len as usize, stream.0 as Opaque),
            "copying {len} bytes from {src:?} to host memory"
        )
    }

    unsafe fn copy_to_device(&self, stream: Stream, dst: Addr, src: *const u8, len: u64) -> DriverResult<()> {
        let _current = self.enter_stream("copy_to_device", stream)?;
        call!(
            self,
            "copy_to_device",
            memcpy_htod_async(dst.0, src.cast::<c_void>(), len as usize, stream.0 as Opaque),
            "copying {len} bytes from host memory to {dst:?}"
        )
    }

    fn fill(&self, stream: Stream, dst: Addr, len: u64, byte: u8) -> DriverResult<()> {
        let _current = self.enter_stream("fill", stream)?;
        call!(
            self,
            "fill",
            memset_d8_async(dst.0, byte, len as usize, stream.0 as Opaque),
            "filling {len} bytes at {dst:?}"
        )
    }

    unsafe fn hash(&self, stream: Stream, src: Addr, len: u64, page: u64, out: *mut Digest) -> DriverResult<()> {
        let device = self.device_of("hash", &self.streams, stream.0)?;
        let _current = self.enter("hash", device)?;
        // SAFETY: the caller's promise is passed on unchanged.
        unsafe { self.hash_pages((stream, device), src, len, page, out) }
    }

    unsafe fn register_host(&self, ptr: *mut u8, len: u64) -> DriverResult<()> {
        let ptr = ptr.cast::<c_void>();
        self.in_host_context("register_host", || {
            call!(
                self,
                "register_host",
                mem_host_register(ptr, len as usize, CU_MEMHOSTREGISTER_PORTABLE),
                "registering {len} bytes of host memory"
            )
        })
    }

    fn unregister_host(&self, ptr: *mut u8) -> DriverResult<()> {
        self.in_host_context("unregister_host", || {
            let code = self.raw(|table| {
                // SAFETY: the driver checks the pointer against its own list of registrations.
                unsafe { (table.mem_host_unregister)(ptr.cast::<c_void>()) }
            });
            match code {
                SUCCESS => Ok(()),
                // "not registered" has its own number.
                713 => Err(invalid("unregister_host", format!("{ptr:p} is not the start of a registered range"))),
                _ => Err(failure(&self.loaded.table, "unregister_host", code, "unregistering host memory")),
            }
        })
    }
}

impl Drop for CudaDriver {
    fn drop(&mut self) {
        let table = self.loaded.table;
        for facts in self.devices.iter_mut().flatten() {
            facts.context.release(&table);
        }
    }
}
