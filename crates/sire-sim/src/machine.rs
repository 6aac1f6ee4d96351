//! The machine: the set of devices of an environment, as one process sees it.
#![allow(unused_variables, clippy::todo, missing_docs, clippy::missing_errors_doc, clippy::missing_safety_doc)]

use crate::error::{Code, Result};
use crate::options::Options;
use crate::types::*;
use std::collections::BTreeMap;
use std::sync::Arc;

/// What device work sees while it runs.
#[derive(Debug)]
pub struct OpContext<'a> {
    device: u32,
    _core: &'a (),
}

impl OpContext<'_> {
    /// The device that runs the work.
    pub fn device(&self) -> u32 { self.device }
    /// Fills device memory (checked: illegal address if the device may not write there).
    pub fn fill(&self, ptr: u64, pattern: Pattern, count: u64) -> std::result::Result<(), Code> { todo!() }
    /// Copies (checked).
    pub fn copy(&self, dst: u64, src: u64, len: u64) -> std::result::Result<(), Code> { todo!() }
    /// Whether the device may touch the range; Err(ILLEGAL_ADDRESS) if not.
    pub fn check(&self, ptr: u64, len: u64, write: bool) -> std::result::Result<(), Code> { todo!() }
}

/// Device work given as a closure; an error it returns becomes the device's sticky error.
/// Runs on a stream's worker thread, perhaps many times (graphs).
pub type Kernel = Arc<dyn Fn(&OpContext<'_>) -> std::result::Result<(), Code> + Send + Sync>;

/// A set of devices. Cheap to clone; all clones are the same machine. All functions may be called from any thread.
#[derive(Clone, Debug)]
pub struct Machine(());

/// Life.
impl Machine {
    pub fn new(options: Options) -> Result<Machine> { todo!() }
    /// Err: a sentence for standard error (a bad variable, or no way to join the environment).
    pub fn from_env() -> Result<Machine> { todo!() }
    pub fn options(&self) -> &Options { todo!() }
    /// Finishes all work, gives back all memory, leaves the environment, writes SIRE_SIM_CENSUS first. Every later call: DEINITIALIZED. Call at exit.
    pub fn shutdown(&self) { todo!() }
    pub fn device_count(&self) -> u32 { todo!() }
    /// The sticky error of the device, if it has one; INVALID_DEVICE; NOT_INITIALIZED in a forked child. Every verb checks this itself.
    pub fn check_alive(&self, device: u32) -> Result<()> { todo!() }
    /// Gives the device a sticky error.
    pub fn lose(&self, device: u32, code: Code) { todo!() }
    /// Forgets the sticky error of the device (cudaDeviceReset).
    pub fn revive(&self, device: u32) { todo!() }
}

/// Faults and counters.
impl Machine {
    /// To be called at the entry of every API function: counts it, and says which error it must return (after delay; a kill does not return).
    /// `bytes`: what the call is about to allocate or copy, 0 if nothing.
    pub fn enter_call(&self, name: &str, bytes: u64) -> Option<Code> { todo!() }
    /// Replaces the fault plan (counts start again). Err: a sentence about the text.
    pub fn set_faults(&self, plan: &str) -> std::result::Result<(), String> { todo!() }
    pub fn call_counts(&self) -> BTreeMap<String, u64> { todo!() }
}

/// Memory figures and peers.
impl Machine {
    /// (free, total) bytes, all processes together.
    pub fn memory_info(&self, device: u32) -> Result<(u64, u64)> { todo!() }
    pub fn granularity(&self, device: u32) -> Result<u64> { todo!() }
    pub fn can_access_peer(&self, device: u32, peer: u32) -> Result<bool> { todo!() }
    /// `device` may from now on touch heap memory of `peer` (cudaDeviceEnablePeerAccess with current = device).
    pub fn enable_peer(&self, device: u32, peer: u32) -> Result<()> { todo!() }
    pub fn disable_peer(&self, device: u32, peer: u32) -> Result<()> { todo!() }
}

/// Virtual memory.
impl Machine {
    /// `align` 0: granularity. `hint` 0: anywhere (a hint may be ignored).
    pub fn reserve(&self, size: u64, align: u64, hint: u64) -> Result<u64> { todo!() }
    pub fn unreserve(&self, addr: u64, size: u64) -> Result<()> { todo!() }
    /// `tag` is given back by `physical_info` and shown in the census.
    pub fn create(&self, device: u32, size: u64, tag: u64) -> Result<PhysicalId> { todo!() }
    pub fn release(&self, physical: PhysicalId) -> Result<()> { todo!() }
    /// cuMemRetainAllocationHandle: any address inside a mapping.
    pub fn retain(&self, addr: u64) -> Result<PhysicalId> { todo!() }
    pub fn physical_info(&self, physical: PhysicalId) -> Result<PhysicalInfo> { todo!() }
    pub fn map(&self, addr: u64, size: u64, offset: u64, physical: PhysicalId) -> Result<()> { todo!() }
    pub fn unmap(&self, addr: u64, size: u64) -> Result<()> { todo!() }
    pub fn set_access(&self, addr: u64, size: u64, access: &[AccessDesc]) -> Result<()> { todo!() }
    pub fn get_access(&self, addr: u64, device: u32) -> Result<Prot> { todo!() }
    /// (base, size) of the allocation or mapping at `addr` (cuMemGetAddressRange).
    pub fn address_range(&self, addr: u64) -> Result<(u64, u64)> { todo!() }
    /// A file descriptor that stands for the physical (this process only); the caller closes it.
    pub fn export_physical(&self, physical: PhysicalId) -> Result<i32> { todo!() }
    pub fn import_physical(&self, fd: i32) -> Result<PhysicalId> { todo!() }
}

/// Heap and host memory. Host and managed addresses can be dereferenced; so can device addresses, for as long as they are mapped with access.
impl Machine {
    pub fn malloc(&self, device: u32, size: u64) -> Result<u64> { todo!() }
    /// Waits for the device first, as cudaFree does. 0 is fine.
    pub fn free(&self, ptr: u64) -> Result<()> { todo!() }
    pub fn malloc_async(&self, device: u32, size: u64, stream: StreamId) -> Result<u64> { todo!() }
    pub fn free_async(&self, ptr: u64, stream: StreamId) -> Result<()> { todo!() }
    pub fn malloc_managed(&self, device: u32, size: u64) -> Result<u64> { todo!() }
    pub fn host_alloc(&self, size: u64, flags: u32) -> Result<u64> { todo!() }
    pub fn host_free(&self, ptr: u64) -> Result<()> { todo!() }
    /// # Safety
    /// The range stays mapped until `host_unregister`.
    pub unsafe fn host_register(&self, ptr: u64, len: u64, flags: u32) -> Result<()> { todo!() }
    pub fn host_unregister(&self, ptr: u64) -> Result<()> { todo!() }
    /// Never fails: unknown pointers are `Pageable`.
    pub fn pointer(&self, ptr: u64) -> PointerInfo { todo!() }
    /// Whether device work on `device` may touch the range; if not, the device gets the sticky error 700, which is returned.
    pub fn check_access(&self, ptr: u64, len: u64, device: u32, write: bool) -> Result<()> { todo!() }
    /// The same question without consequences.
    pub fn accessible(&self, ptr: u64, len: u64, device: u32, write: bool) -> bool { todo!() }
}

/// Streams and events.
impl Machine {
    /// 0 and 1: the device's legacy default stream; 2: the calling thread's own default stream; else the value itself.
    pub fn resolve_stream(&self, device: u32, raw: u64) -> Result<StreamId> { todo!() }
    pub fn legacy_stream(&self, device: u32) -> Result<StreamId> { todo!() }
    /// `blocking`: ordered with the legacy default stream (no cudaStreamNonBlocking).
    pub fn stream_create(&self, device: u32, blocking: bool, priority: i32) -> Result<StreamId> { todo!() }
    /// Queued work still runs.
    pub fn stream_destroy(&self, stream: StreamId) -> Result<()> { todo!() }
    pub fn stream_device(&self, stream: StreamId) -> Result<u32> { todo!() }
    pub fn stream_is_blocking(&self, stream: StreamId) -> Result<bool> { todo!() }
    pub fn stream_priority(&self, stream: StreamId) -> Result<i32> { todo!() }
    pub fn stream_synchronize(&self, stream: StreamId) -> Result<()> { todo!() }
    /// Whether all is done.
    pub fn stream_query(&self, stream: StreamId) -> Result<bool> { todo!() }
    pub fn stream_wait_event(&self, stream: StreamId, event: EventId) -> Result<()> { todo!() }
    pub fn device_synchronize(&self, device: u32) -> Result<()> { todo!() }
    pub fn event_create(&self, device: u32, timing: bool) -> Result<EventId> { todo!() }
    pub fn event_destroy(&self, event: EventId) -> Result<()> { todo!() }
    pub fn event_record(&self, event: EventId, stream: StreamId) -> Result<()> { todo!() }
    pub fn event_query(&self, event: EventId) -> Result<bool> { todo!() }
    pub fn event_synchronize(&self, event: EventId) -> Result<()> { todo!() }
    /// Milliseconds; NOT_READY if one has not passed; INVALID_HANDLE if never recorded or without timing.
    pub fn event_elapsed(&self, start: EventId, end: EventId) -> Result<f32> { todo!() }
}

/// Work.
impl Machine {
    /// # Safety
    /// Host ranges are valid (and until the stream has passed the copy, if pinned or registered).
    pub unsafe fn memcpy_async(&self, dst: u64, src: u64, len: u64, kind: CopyKind, stream: StreamId) -> Result<()> { todo!() }
    /// cudaMemcpy: on the legacy stream of `device`, and waits.
    /// # Safety
    /// Host ranges are valid.
    pub unsafe fn memcpy(&self, device: u32, dst: u64, src: u64, len: u64, kind: CopyKind) -> Result<()> { todo!() }
    /// # Safety
    /// As `memcpy_async`.
    pub unsafe fn memcpy_2d_async(&self, copy: Copy2d, kind: CopyKind, stream: StreamId) -> Result<()> { todo!() }
    /// # Safety
    /// As `memcpy`.
    pub unsafe fn memcpy_2d(&self, device: u32, copy: Copy2d, kind: CopyKind) -> Result<()> { todo!() }
    pub fn memcpy_peer_async(&self, dst: u64, dst_device: u32, src: u64, src_device: u32, len: u64, stream: StreamId) -> Result<()> { todo!() }
    /// `count` elements.
    pub fn memset_async(&self, dst: u64, pattern: Pattern, count: u64, stream: StreamId) -> Result<()> { todo!() }
    pub fn memset_2d_async(&self, dst: u64, pitch: u64, pattern: Pattern, width: u64, height: u64, stream: StreamId) -> Result<()> { todo!() }
    /// cudaMemset: on the legacy stream of `device`; waits only for pinned host memory, as CUDA does.
    pub fn memset(&self, device: u32, dst: u64, pattern: Pattern, count: u64) -> Result<()> { todo!() }
    pub fn launch_host(&self, stream: StreamId, function: Arc<dyn Fn() + Send + Sync>) -> Result<()> { todo!() }
    pub fn launch(&self, stream: StreamId, name: &str, kernel: Kernel) -> Result<()> { todo!() }
}

/// Capture and graphs.
impl Machine {
    pub fn capture_begin(&self, stream: StreamId, mode: CaptureMode) -> Result<()> { todo!() }
    /// Into an existing graph, after `dependencies`.
    pub fn capture_begin_to_graph(&self, stream: StreamId, graph: GraphId, dependencies: &[NodeId], mode: CaptureMode) -> Result<()> { todo!() }
    pub fn capture_end(&self, stream: StreamId) -> Result<GraphId> { todo!() }
    pub fn capture_info(&self, stream: StreamId) -> Result<CaptureInfo> { todo!() }
    /// Sets the calling thread's mode, returns the old one.
    pub fn thread_exchange_mode(&self, mode: CaptureMode) -> CaptureMode { todo!() }
    /// To be called by API functions that CUDA calls "potentially unsafe" during capture (malloc, free, host_alloc... call it themselves):
    /// CAPTURE_UNSUPPORTED, and the capture invalid, where the calling thread's mode forbids them.
    pub fn unsafe_call(&self) -> Result<()> { todo!() }
    pub fn graph_create(&self) -> Result<GraphId> { todo!() }
    pub fn graph_destroy(&self, graph: GraphId) -> Result<()> { todo!() }
    pub fn graph_nodes(&self, graph: GraphId) -> Result<Vec<NodeId>> { todo!() }
    pub fn graph_edges(&self, graph: GraphId) -> Result<Vec<(NodeId, NodeId)>> { todo!() }
    pub fn node_kind(&self, node: NodeId) -> Result<NodeKind> { todo!() }
    pub fn graph_instantiate(&self, graph: GraphId) -> Result<ExecId> { todo!() }
    pub fn exec_destroy(&self, exec: ExecId) -> Result<()> { todo!() }
    pub fn graph_launch(&self, exec: ExecId, stream: StreamId) -> Result<()> { todo!() }
}

/// Census.
impl Machine {
    /// Every frame run of every process: see docs/software-device.md.
    pub fn census_json(&self) -> String { todo!() }
    /// (pid, used bytes) of every live member that holds memory of the device (NVML's process list).
    pub fn processes(&self, device: u32) -> Result<Vec<(u32, u64)>> { todo!() }
}
