//! The nouns of the machine's interface: handles, kinds and descriptions. No behaviour.

/// Physical memory: `CUmemGenericAllocationHandle`. Counted: `retain` adds one, `release` takes one.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct PhysicalId(pub u64);

/// A stream. The value may be used as a `cudaStream_t`: it is never 0, 1 or 2.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct StreamId(pub u64);

/// An event.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct EventId(pub u64);

/// A graph.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct GraphId(pub u64);

/// An instantiated graph.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct ExecId(pub u64);

/// A node of a graph (unique in the machine).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct NodeId(pub u64);

/// Rights of one device on one mapping; the numbers are `CUmemAccess_flags`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub enum Prot {
    /// No access.
    None = 0,
    /// Reading only.
    Read = 1,
    /// Reading and writing.
    ReadWrite = 3,
}

/// One entry of `set_access`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AccessDesc {
    /// Who.
    pub device: u32,
    /// How.
    pub prot: Prot,
}

/// What a physical is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PhysicalInfo {
    /// Where it lives.
    pub device: u32,
    /// Its bytes.
    pub size: u64,
    /// The number given at `create` (properties that the C layer wants back).
    pub tag: u64,
}

/// What a pointer points to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PointerKind {
    /// Ordinary host memory.
    Pageable,
    /// Host memory that `host_alloc` made.
    Pinned,
    /// Host memory that `host_register` made known.
    Registered,
    /// `malloc`'s, or a mapping of virtual-memory management.
    Device,
    /// `malloc_managed`'s.
    Managed,
}

/// What is known about a pointer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PointerInfo {
    /// Which kind.
    pub kind: PointerKind,
    /// The device it lives on (0 for host memory).
    pub device: u32,
    /// Start of the allocation or mapping (the pointer itself if pageable).
    pub base: u64,
    /// Bytes from `base` (0 if pageable).
    pub size: u64,
    /// Flags given at allocation or registration of host memory.
    pub flags: u32,
    /// Whether it lies in virtual-memory management's mapping (as opposed to `malloc`'s heap).
    pub vmm: bool,
}

/// Direction of a copy; the numbers are `cudaMemcpyKind`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CopyKind {
    /// Host to host.
    HostToHost = 0,
    /// Host to device.
    HostToDevice = 1,
    /// Device to host.
    DeviceToHost = 2,
    /// Device to device.
    DeviceToDevice = 3,
    /// Found from the pointers.
    Default = 4,
}

/// A copy of rows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Copy2d {
    /// First destination byte.
    pub dst: u64,
    /// Bytes from one destination row to the next.
    pub dst_pitch: u64,
    /// First source byte.
    pub src: u64,
    /// Bytes from one source row to the next.
    pub src_pitch: u64,
    /// Bytes per row.
    pub width: u64,
    /// Rows.
    pub height: u64,
}

/// What `memset` repeats.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pattern {
    /// One byte.
    U8(u8),
    /// Two bytes.
    U16(u16),
    /// Four bytes.
    U32(u32),
}

impl Pattern {
    /// Bytes of one element.
    #[must_use]
    pub const fn width(self) -> u64 {
        match self {
            Pattern::U8(_) => 1,
            Pattern::U16(_) => 2,
            Pattern::U32(_) => 4,
        }
    }
}

/// How strict a capture is; the numbers are `cudaStreamCaptureMode`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CaptureMode {
    /// Unsafe calls are refused in every thread.
    Global = 0,
    /// Unsafe calls are refused in the capturing thread.
    ThreadLocal = 1,
    /// Unsafe calls are allowed.
    Relaxed = 2,
}

/// Whether a stream captures; the numbers are `cudaStreamCaptureStatus`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CaptureStatus {
    /// It does not.
    None = 0,
    /// It does.
    Active = 1,
    /// It did, and an error spoilt it; only ending the capture helps.
    Invalidated = 2,
}

/// The capture that a stream takes part in.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CaptureInfo {
    /// Whether there is one.
    pub status: CaptureStatus,
    /// Its number (0 if none).
    pub id: u64,
    /// The graph being built.
    pub graph: Option<GraphId>,
    /// The nodes that the stream's next node would follow.
    pub dependencies: Vec<NodeId>,
}

/// What a graph's node does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NodeKind {
    /// A closure (a kernel).
    Kernel,
    /// A copy.
    Memcpy,
    /// A fill.
    Memset,
    /// A host function.
    Host,
    /// Another graph.
    Graph,
    /// Nothing.
    Empty,
}
