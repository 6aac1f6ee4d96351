//! Traces: what a program asked of the engine, written to a small file while it runs, and read back to ask it again.
//!
//! [`Event`] is the vocabulary, `code` the bytes (docs/trace.md describes them), `tracer` the part inside the engine that writes, [`Reader`]
//! what reads. No content of memory is ever in a trace: addresses, sizes, tags, names of files, times and outcomes only.

mod code;
#[cfg(all(test, not(feature = "shuttle")))]
mod tests;
mod tracer;

pub use code::{Damage, Reader};
pub(crate) use tracer::{Tracer, allocation, attachment, status};

use crate::settings::Settings;
use crate::terms::{Policy, RegionId, Selection};
use std::time::Duration;

/// The version of the format. A reader refuses newer ones; fields at the end of a record and new kinds of records need no new version.
pub const VERSION: u16 = 1;

/// Where the recording engine came from and how it was set up.
#[derive(Clone, PartialEq, Eq, Debug, Default, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct Header {
    /// [`VERSION`] of the writer.
    pub version: u16,
    /// Version of the library that wrote.
    pub library: String,
    /// Physical chunk size of large allocations, in bytes.
    pub chunk: u64,
    /// Allocations below this went to shared slabs.
    pub small: u64,
    /// Largest copy that was queued at once, in bytes.
    pub copy_piece: u64,
    /// Bytes of device memory that were left free.
    pub margin: u64,
}

impl Header {
    /// For an engine with these settings.
    pub(crate) fn of(settings: &Settings) -> Header {
        Header {
            version: VERSION,
            library: env!("CARGO_PKG_VERSION").to_owned(),
            chunk: settings.chunk,
            small: settings.small,
            copy_piece: settings.copy_piece,
            margin: settings.margin(),
        }
    }
}

/// One call, when it was made and by whom.
#[derive(Clone, PartialEq, Debug)]
pub struct Record {
    /// Since the trace began. When the call ended; for a free, when it began.
    pub time: Duration,
    /// Threads are numbered in the order in which they first appear.
    pub thread: u32,
    /// The call.
    pub event: Event,
}

/// A call of the engine, with its outcome as a number of [`crate::error::Status`] (0: it worked).
///
/// An address is only a name: it says which allocation is meant.
#[derive(Clone, PartialEq, Debug)]
pub enum Event {
    /// A region was opened (again, if it was there).
    Region {
        /// Its number.
        region: u32,
        /// Its tag.
        tag: String,
        /// Its policy.
        policy: Policy,
    },
    /// A thread went inside.
    Enter {
        /// The region.
        region: u32,
        /// Whether a paused region was to be resumed.
        resume: bool,
        /// The outcome.
        status: i32,
    },
    /// A thread came out.
    Leave {
        /// The region.
        region: u32,
    },
    /// Memory was asked for.
    Allocate {
        /// The region.
        region: u32,
        /// The device.
        device: u32,
        /// Bytes.
        size: u64,
        /// The program's stream.
        stream: u64,
        /// The address; 0 if it failed.
        addr: u64,
        /// The outcome.
        status: i32,
    },
    /// Memory is about to be freed: written before the address can be handed out again.
    Free {
        /// Its start.
        addr: u64,
    },
    /// Bytes are to be backed up, or thrown away, whatever their region's policy.
    Override {
        /// First byte.
        addr: u64,
        /// Bytes.
        len: u64,
        /// Backed up, else thrown away.
        keep: bool,
        /// The outcome.
        status: i32,
    },
    /// Bytes that were declared not to change have changed.
    Changed {
        /// First byte.
        addr: u64,
        /// Bytes.
        len: u64,
        /// The outcome.
        status: i32,
    },
    /// A file was said to hold bytes.
    Attach(Attachment),
    /// The allocation that holds an address is to stay on the device.
    KeepResident {
        /// The address.
        addr: u64,
        /// The outcome.
        status: i32,
    },
    /// A device got access to another's memory.
    Peer {
        /// Whose memory.
        device: u32,
        /// Who got access.
        peer: u32,
        /// The outcome.
        status: i32,
    },
    /// A call about memory that the program maps itself.
    Segment(SegmentCall),
    /// It was taken back.
    PeerGone {
        /// Whose memory.
        device: u32,
        /// Whose access.
        peer: u32,
        /// The outcome.
        status: i32,
    },
    /// A pause, a resume, or a relative of theirs.
    Transition(Transition),
    /// What was only cached was given back.
    Trim,
    /// The file's limit was reached: nothing after this was written.
    Cut,
    /// A kind of record that this reader does not know.
    Unknown(u8),
}

/// What a program does with memory that it maps itself (PyTorch's expandable segments): the calls that came to
/// [`crate::segments::Segments`]. Addresses and handles are only names.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SegmentCall {
    /// Addresses were reserved.
    Reserve {
        /// First of them.
        addr: u64,
        /// Bytes.
        size: u64,
        /// The region that the thread was in.
        region: Option<u32>,
    },
    /// A reservation is about to be given back: written before the addresses can be handed out again.
    Unreserve {
        /// Its start.
        addr: u64,
        /// Its bytes.
        size: u64,
    },
    /// Physical memory was asked for.
    Create {
        /// Its handle; 0 if it failed.
        handle: u64,
        /// The region that the thread was in.
        region: Option<u32>,
        /// The device.
        device: u32,
        /// Bytes.
        size: u64,
        /// As what it can be exported: CUDA's bits.
        shareable: u32,
        /// Whether other devices on the bus may reach it.
        rdma: bool,
        /// The outcome.
        status: i32,
    },
    /// A handle lost a reference.
    Release {
        /// The handle.
        handle: u64,
    },
    /// A handle was mapped.
    Map {
        /// The handle.
        handle: u64,
        /// Where.
        addr: u64,
        /// Bytes.
        size: u64,
        /// Where in the handle's memory.
        offset: u64,
        /// The outcome.
        status: i32,
    },
    /// What is mapped in a range is about to be unmapped: written before anything else can be mapped there.
    Unmap {
        /// First byte.
        addr: u64,
        /// Bytes.
        size: u64,
    },
    /// Devices got access to a range.
    Grant {
        /// First byte.
        addr: u64,
        /// Bytes.
        size: u64,
        /// Each device, and whether it may write.
        access: Vec<(u32, bool)>,
        /// The outcome.
        status: i32,
    },
    /// The handle that is mapped at an address got one more reference.
    Retain {
        /// The address.
        addr: u64,
    },
    /// The program has mapped there what the engine does not follow: memory of no region, another process's that it imported, or its own
    /// for a second time or in part.
    Mapped {
        /// Where.
        addr: u64,
        /// Bytes.
        size: u64,
    },
    /// The memory behind a handle was handed out, as to another process (exported): from then on it stays on the device.
    Lend {
        /// The handle.
        handle: u64,
        /// The outcome.
        status: i32,
    },
    /// The same for all memory of ours in a range, whoever mapped it.
    LendRange {
        /// First byte.
        addr: u64,
        /// Bytes.
        size: u64,
        /// The outcome.
        status: i32,
    },
}

/// Bytes of an allocation that a file was said to hold ([`crate::engine::Engine::attach_file`]).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Attachment {
    /// First byte of memory.
    pub addr: u64,
    /// Bytes.
    pub len: u64,
    /// Where they begin in the file.
    pub at: u64,
    /// The file's length; 0 if it could not be opened.
    pub size: u64,
    /// The outcome.
    pub status: i32,
    /// The file's absolute name, for a replay on the same machine. Empty if it is too long for a record.
    pub name: String,
}

/// What a transition was asked for and what it did.
#[derive(Clone, PartialEq, Debug)]
pub struct Transition {
    /// Which.
    pub verb: Verb,
    /// The tags: one, or for a switch first what is paused, then what is resumed. Empty text: everything.
    pub tags: Vec<String>,
    /// How long it was allowed to wait for device memory.
    pub wait: Duration,
    /// How long it took.
    pub took: Duration,
    /// The outcome.
    pub status: i32,
    /// Physical bytes given back or taken.
    pub moved: u64,
    /// Bytes copied to or from backups.
    pub copied: u64,
}

/// Kinds of transitions. Numbers are never reused.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum Verb {
    /// Memory goes away.
    Pause = 0,
    /// Memory comes back.
    Resume = 1,
    /// One goes, another comes, in one call.
    Switch = 2,
    /// A resume that was only started.
    ResumeStart = 3,
    /// Backups were brought nearer.
    Prefetch = 4,
    /// Backups were made while the program went on.
    PreCopy = 5,
    /// A pause that left memory where it is until somebody needs it.
    PauseLazily = 6,
}

impl Verb {
    /// All of them.
    pub const ALL: [Verb; 7] =
        [Verb::Pause, Verb::Resume, Verb::Switch, Verb::ResumeStart, Verb::Prefetch, Verb::PreCopy, Verb::PauseLazily];

    /// Of a pause.
    #[must_use]
    pub const fn of_pause(lazy: bool) -> Verb {
        if lazy { Verb::PauseLazily } else { Verb::Pause }
    }

    /// Whether the tags are paused by it and nothing else happens.
    #[must_use]
    pub const fn is_pause(self) -> bool {
        matches!(self, Verb::Pause | Verb::PauseLazily)
    }

    /// As in figures and reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Verb::Pause => "pause",
            Verb::Resume => "resume",
            Verb::Switch => "switch",
            Verb::ResumeStart => "resume_start",
            Verb::Prefetch => "prefetch",
            Verb::PreCopy => "pre_copy",
            Verb::PauseLazily => "pause_lazily",
        }
    }

    pub(crate) fn numbered(number: u8) -> Option<Verb> {
        Verb::ALL.into_iter().find(|verb| *verb as u8 == number)
    }
}

/// Regions that one text has room for.
const NAMED_AT_ONCE: usize = 20;

/// The texts that stand for a selection: nothing for everything, its tag, or numbers of regions as `/3/7`, which is no tag. Several if there
/// are many regions.
#[must_use]
pub fn texts_of(selection: &Selection) -> Vec<String> {
    match selection {
        Selection::All => vec![String::new()],
        Selection::Tag(tag) => vec![tag.clone()],
        // None of them still takes a place.
        Selection::Exact(regions) if regions.is_empty() => vec!["/".to_owned()],
        Selection::Exact(regions) => regions
            .chunks(NAMED_AT_ONCE)
            .map(|some| some.iter().map(|region| format!("/{}", region.0)).collect())
            .collect(),
    }
}

/// The selection that such a text stands for.
#[must_use]
pub fn selection_of(text: &str) -> Selection {
    match numbers(text) {
        Some(numbers) => Selection::Exact(numbers.map(RegionId).collect()),
        None if text.is_empty() => Selection::All,
        None => Selection::Tag(text.to_owned()),
    }
}

/// Whether such a text means the region of this number and tag.
#[must_use]
pub fn means(text: &str, region: u32, tag: &str) -> bool {
    match numbers(text) {
        Some(mut numbers) => numbers.any(|number| number == region),
        None => text.is_empty() || tag.strip_prefix(text).is_some_and(|rest| rest.is_empty() || rest.starts_with('/')),
    }
}

fn numbers(text: &str) -> Option<impl Iterator<Item = u32>> {
    Some(text.strip_prefix('/')?.split('/').filter_map(|number| number.parse().ok()))
}
