//! A trace as bytes, and back. Pure: no file, no clock.
//!
//! A file is the magic, then frames. A frame is the payload's length (varint), the payload, and the low 16 bits of its CRC-32, little-endian.
//! The first payload is the header as JSON; every other one is a record: kind (one byte), nanoseconds since the start, thread,
//! then the fields of that kind. Numbers are LEB128 varints, texts a length and UTF-8.

use super::{Attachment, Event, Header, Record, SegmentCall, Transition, VERSION, Verb};
use crate::terms::Policy;
use std::fmt;
use std::time::Duration;

/// How every trace begins.
pub(super) const MAGIC: [u8; 8] = *b"sire-trc";
/// No payload is longer: two tags and some numbers, or a tag and a policy.
const LONGEST: usize = 2048;
/// The longest text in a record. Longer tags cannot exist.
const LONGEST_TEXT: usize = 255;
/// The longest name of a file. One that is longer is left out: such a file is found nowhere.
const LONGEST_NAME: usize = 1024;

const REGION: u8 = 1;
const ENTER: u8 = 2;
const LEAVE: u8 = 3;
const ALLOCATE: u8 = 4;
const FREE: u8 = 5;
const OVERRIDE: u8 = 6;
const PEER: u8 = 7;
const TRANSITION: u8 = 8;
const TRIM: u8 = 9;
const CUT: u8 = 10;
const CHANGED: u8 = 11;
const KEEP_RESIDENT: u8 = 12;
const RESERVE: u8 = 13;
const UNRESERVE: u8 = 14;
const CREATE: u8 = 15;
const RELEASE: u8 = 16;
const MAP: u8 = 17;
const UNMAP: u8 = 18;
const GRANT: u8 = 19;
const RETAIN: u8 = 20;
const PEER_GONE: u8 = 21;
const ATTACH: u8 = 22;
const MAPPED: u8 = 23;
const LEND: u8 = 24;
const LEND_RANGE: u8 = 25;

/// More devices than any machine has; a record with all of them is no longer than others.
const MOST_DEVICES: usize = 128;

// ---- writing -------------------------------------------------------------------------------------------------------------

/// The beginning of a file.
pub(super) fn beginning(header: &Header) -> Vec<u8> {
    let mut out = MAGIC.to_vec();
    out.extend(frame(&serde_json::to_vec(header).unwrap_or_default()));
    out
}

/// One record as a frame.
pub(super) fn encode(record: &Record) -> Vec<u8> {
    let mut out = Vec::with_capacity(48);
    out.push(kind(&record.event));
    number(&mut out, nanoseconds(record.time));
    number(&mut out, record.thread.into());
    fields(&mut out, &record.event);
    frame(&out)
}

fn frame(payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(payload.len() + 4);
    number(&mut out, payload.len() as u64);
    out.extend_from_slice(payload);
    out.extend_from_slice(&sum(payload));
    out
}

fn sum(payload: &[u8]) -> [u8; 2] {
    let [low, high, ..] = crc32fast::hash(payload).to_le_bytes();
    [low, high]
}

fn kind(event: &Event) -> u8 {
    match event {
        Event::Region { .. } => REGION,
        Event::Enter { .. } => ENTER,
        Event::Leave { .. } => LEAVE,
        Event::Allocate { .. } => ALLOCATE,
        Event::Free { .. } => FREE,
        Event::Override { .. } => OVERRIDE,
        Event::Changed { .. } => CHANGED,
        Event::Attach(_) => ATTACH,
        Event::KeepResident { .. } => KEEP_RESIDENT,
        Event::Peer { .. } => PEER,
        Event::Segment(call) => segment_kind(call),
        Event::PeerGone { .. } => PEER_GONE,
        Event::Transition(_) => TRANSITION,
        Event::Trim => TRIM,
        Event::Cut => CUT,
        Event::Unknown(kind) => *kind,
    }
}

fn fields(out: &mut Vec<u8>, event: &Event) {
    match event {
        Event::Region { region, tag, policy } => {
            number(out, (*region).into());
            text(out, tag);
            text(out, &serde_json::to_string(policy).unwrap_or_default());
        }
        Event::Enter { region, resume, status } => {
            numbers(out, [(*region).into(), u64::from(*resume), outcome(*status)]);
        }
        Event::Leave { region } => number(out, (*region).into()),
        Event::Allocate { region, device, size, stream, addr, status } => {
            numbers(out, [(*region).into(), (*device).into(), *size, *stream, *addr, outcome(*status)]);
        }
        Event::Free { addr } => number(out, *addr),
        Event::Override { addr, len, keep, status } => {
            numbers(out, [*addr, *len, u64::from(*keep), outcome(*status)]);
        }
        Event::Changed { addr, len, status } => numbers(out, [*addr, *len, outcome(*status)]),
        Event::KeepResident { addr, status } => numbers(out, [*addr, outcome(*status)]),
        Event::Attach(file) => {
            numbers(out, [file.addr, file.len, file.at, file.size, outcome(file.status)]);
            let name = if file.name.len() <= LONGEST_NAME { file.name.as_str() } else { "" };
            number(out, name.len() as u64);
            out.extend_from_slice(name.as_bytes());
        }
        Event::Segment(call) => segment_fields(out, call),
        Event::Peer { device, peer, status } | Event::PeerGone { device, peer, status } => {
            numbers(out, [(*device).into(), (*peer).into(), outcome(*status)]);
        }
        Event::Transition(done) => {
            out.push(done.verb as u8);
            number(out, done.tags.len() as u64);
            done.tags.iter().for_each(|tag| text(out, tag));
            numbers(out, [nanoseconds(done.wait), nanoseconds(done.took), outcome(done.status)]);
            numbers(out, [done.moved, done.copied]);
        }
        Event::Trim | Event::Cut | Event::Unknown(_) => {}
    }
}

const fn segment_kind(call: &SegmentCall) -> u8 {
    match call {
        SegmentCall::Reserve { .. } => RESERVE,
        SegmentCall::Unreserve { .. } => UNRESERVE,
        SegmentCall::Create { .. } => CREATE,
        SegmentCall::Release { .. } => RELEASE,
        SegmentCall::Map { .. } => MAP,
        SegmentCall::Unmap { .. } => UNMAP,
        SegmentCall::Grant { .. } => GRANT,
        SegmentCall::Retain { .. } => RETAIN,
        SegmentCall::Mapped { .. } => MAPPED,
        SegmentCall::Lend { .. } => LEND,
        SegmentCall::LendRange { .. } => LEND_RANGE,
    }
}

fn segment_fields(out: &mut Vec<u8>, call: &SegmentCall) {
    match call {
        SegmentCall::Reserve { addr, size, region } => numbers(out, [*addr, *size, optional(*region)]),
        SegmentCall::Unreserve { addr, size }
        | SegmentCall::Unmap { addr, size }
        | SegmentCall::Mapped { addr, size } => numbers(out, [*addr, *size]),
        SegmentCall::Create { handle, region, device, size, shareable, rdma, status } => {
            numbers(out, [*handle, optional(*region), (*device).into(), *size, (*shareable).into()]);
            numbers(out, [u64::from(*rdma), outcome(*status)]);
        }
        SegmentCall::Release { handle } => number(out, *handle),
        SegmentCall::Map { handle, addr, size, offset, status } => {
            numbers(out, [*handle, *addr, *size, *offset, outcome(*status)]);
        }
        SegmentCall::Grant { addr, size, access, status } => {
            let access = &access[..access.len().min(MOST_DEVICES)];
            numbers(out, [*addr, *size, access.len() as u64]);
            access.iter().for_each(|(device, writable)| numbers(out, [(*device).into(), u64::from(*writable)]));
            number(out, outcome(*status));
        }
        SegmentCall::Retain { addr } => number(out, *addr),
        SegmentCall::Lend { handle, status } => numbers(out, [*handle, outcome(*status)]),
        SegmentCall::LendRange { addr, size, status } => numbers(out, [*addr, *size, outcome(*status)]),
    }
}

/// Nothing is 0, and what is there one more than it is.
fn optional(value: Option<u32>) -> u64 {
    value.map_or(0, |value| u64::from(value) + 1)
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

fn outcome(status: i32) -> u64 {
    u64::from(status.unsigned_abs())
}

fn numbers<const N: usize>(out: &mut Vec<u8>, values: [u64; N]) {
    values.into_iter().for_each(|value| number(out, value));
}

fn number(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// The text, or as much of it as a tag could be.
fn text(out: &mut Vec<u8>, text: &str) {
    let mut len = text.len().min(LONGEST_TEXT);
    while !text.is_char_boundary(len) {
        len -= 1;
    }
    number(out, len as u64);
    out.extend_from_slice(&text.as_bytes()[..len]);
}

// ---- reading -------------------------------------------------------------------------------------------------------------

/// Where a trace stops making sense, and why.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Damage {
    /// Bytes before it are fine.
    pub at: usize,
    /// A sentence.
    pub what: String,
    /// The file simply ends inside a record, as when the writing process was killed.
    pub torn: bool,
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "at byte {}: {}", self.at, self.what)
    }
}

impl std::error::Error for Damage {}

/// The records of a trace, in the order in which they were written. Ends after the first damage.
#[derive(Clone, Debug)]
pub struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    header: Header,
    ended: bool,
}

impl<'a> Reader<'a> {
    /// Reads the beginning of a file.
    ///
    /// # Errors
    /// If it is not a trace, or of a newer version.
    pub fn new(bytes: &'a [u8]) -> Result<Reader<'a>, Damage> {
        let damage = |at, what: &str| Damage { at, what: what.to_owned(), torn: false };
        if !bytes.starts_with(&MAGIC) {
            return Err(damage(0, "this is not a trace of Sire's; SIRE_TRACE=FILE writes one"));
        }
        let mut reader = Reader { bytes, at: MAGIC.len(), header: Header::default(), ended: false };
        let payload = reader.frame()?;
        reader.header = serde_json::from_slice(payload).map_err(|_| damage(MAGIC.len(), "the header is not JSON"))?;
        match reader.header.version {
            1..=VERSION => Ok(reader),
            other => Err(damage(
                MAGIC.len(),
                &format!("the trace has version {other}, this reader knows 1 to {VERSION}; use a newer sire"),
            )),
        }
    }

    /// What the file says about itself.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    fn frame(&mut self) -> Result<&'a [u8], Damage> {
        let damage = |what: &str, torn| Damage { at: self.at, what: what.to_owned(), torn };
        let torn = || damage("the file ends inside a record", true);
        let mut rest = Fields { rest: &self.bytes[self.at..] };
        let len = rest.number().ok_or_else(torn)?;
        let len = usize::try_from(len).ok().filter(|len| *len <= LONGEST);
        let len = len.ok_or_else(|| damage("a record is longer than any can be", false))?;
        let payload = rest.take(len).ok_or_else(torn)?;
        let found = rest.take(2).ok_or_else(torn)?;
        if found != sum(payload) {
            return Err(damage("a record does not match its check sum", false));
        }
        self.at = self.bytes.len() - rest.rest.len();
        Ok(payload)
    }

    fn record(&mut self) -> Result<Record, Damage> {
        let at = self.at;
        let payload = self.frame()?;
        let parsed = Fields { rest: payload }.record();
        parsed.ok_or_else(|| Damage { at, what: "a record's fields make no sense".to_owned(), torn: false })
    }
}

impl Iterator for Reader<'_> {
    type Item = Result<Record, Damage>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended || self.at == self.bytes.len() {
            return None;
        }
        let record = self.record();
        self.ended = record.is_err();
        Some(record)
    }
}

/// What is left of a payload. Bytes after the known fields belong to a later minor version and are passed over.
struct Fields<'a> {
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    fn record(mut self) -> Option<Record> {
        let kind = self.byte()?;
        let time = Duration::from_nanos(self.number()?);
        let thread = self.small()?;
        Some(Record { time, thread, event: self.event(kind)? })
    }

    fn event(&mut self, kind: u8) -> Option<Event> {
        Some(match kind {
            REGION => Event::Region { region: self.small()?, tag: self.text()?.to_owned(), policy: self.policy()? },
            ENTER => Event::Enter { region: self.small()?, resume: self.flag()?, status: self.status()? },
            LEAVE => Event::Leave { region: self.small()? },
            ALLOCATE => Event::Allocate {
                region: self.small()?,
                device: self.small()?,
                size: self.number()?,
                stream: self.number()?,
                addr: self.number()?,
                status: self.status()?,
            },
            FREE => Event::Free { addr: self.number()? },
            OVERRIDE => Event::Override {
                addr: self.number()?,
                len: self.number()?,
                keep: self.flag()?,
                status: self.status()?,
            },
            CHANGED => Event::Changed { addr: self.number()?, len: self.number()?, status: self.status()? },
            KEEP_RESIDENT => Event::KeepResident { addr: self.number()?, status: self.status()? },
            PEER => Event::Peer { device: self.small()?, peer: self.small()?, status: self.status()? },
            PEER_GONE => Event::PeerGone { device: self.small()?, peer: self.small()?, status: self.status()? },
            TRANSITION => return self.transition(),
            TRIM => Event::Trim,
            CUT => Event::Cut,
            ATTACH => Event::Attach(self.attachment()?),
            RESERVE..=RETAIN | MAPPED..=LEND_RANGE => Event::Segment(self.segment(kind)?),
            other => Event::Unknown(other),
        })
    }

    fn segment(&mut self, kind: u8) -> Option<SegmentCall> {
        Some(match kind {
            RESERVE => SegmentCall::Reserve { addr: self.number()?, size: self.number()?, region: self.optional()? },
            UNRESERVE => SegmentCall::Unreserve { addr: self.number()?, size: self.number()? },
            CREATE => SegmentCall::Create {
                handle: self.number()?,
                region: self.optional()?,
                device: self.small()?,
                size: self.number()?,
                shareable: self.small()?,
                rdma: self.flag()?,
                status: self.status()?,
            },
            RELEASE => SegmentCall::Release { handle: self.number()? },
            MAP => SegmentCall::Map {
                handle: self.number()?,
                addr: self.number()?,
                size: self.number()?,
                offset: self.number()?,
                status: self.status()?,
            },
            UNMAP => SegmentCall::Unmap { addr: self.number()?, size: self.number()? },
            GRANT => {
                let (addr, size) = (self.number()?, self.number()?);
                let count = self.number().filter(|count| *count <= MOST_DEVICES as u64)?;
                let access = (0..count).map(|_| Some((self.small()?, self.flag()?))).collect::<Option<_>>()?;
                SegmentCall::Grant { addr, size, access, status: self.status()? }
            }
            RETAIN => SegmentCall::Retain { addr: self.number()? },
            MAPPED => SegmentCall::Mapped { addr: self.number()?, size: self.number()? },
            LEND => SegmentCall::Lend { handle: self.number()?, status: self.status()? },
            LEND_RANGE => SegmentCall::LendRange { addr: self.number()?, size: self.number()?, status: self.status()? },
            _ => return None,
        })
    }

    fn attachment(&mut self) -> Option<Attachment> {
        let (addr, len, at, size, status) =
            (self.number()?, self.number()?, self.number()?, self.number()?, self.status()?);
        let name = self.text_up_to(LONGEST_NAME)?.to_owned();
        Some(Attachment { addr, len, at, size, status, name })
    }

    /// As it was written: None is 0.
    fn optional(&mut self) -> Option<Option<u32>> {
        match self.number()? {
            0 => Some(None),
            value => u32::try_from(value - 1).ok().map(Some),
        }
    }

    /// A verb of a later version is passed over like any other unknown record.
    fn transition(&mut self) -> Option<Event> {
        let Some(verb) = Verb::numbered(self.byte()?) else { return Some(Event::Unknown(TRANSITION)) };
        let count = self.number().filter(|count| *count <= 2)?;
        let tags = (0..count).map(|_| self.text().map(str::to_owned)).collect::<Option<_>>()?;
        Some(Event::Transition(Transition {
            verb,
            tags,
            wait: Duration::from_nanos(self.number()?),
            took: Duration::from_nanos(self.number()?),
            status: self.status()?,
            moved: self.number()?,
            copied: self.number()?,
        }))
    }

    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.rest.split_first()?;
        self.rest = rest;
        Some(*first)
    }

    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(len)?;
        self.rest = rest;
        Some(taken)
    }

    /// A varint of at most 64 bits; None if it is cut off or longer.
    fn number(&mut self) -> Option<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7f);
            if bits << shift >> shift != bits {
                return None;
            }
            value |= bits << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }

    fn small(&mut self) -> Option<u32> {
        self.number()?.try_into().ok()
    }

    fn status(&mut self) -> Option<i32> {
        self.number()?.try_into().ok()
    }

    fn flag(&mut self) -> Option<bool> {
        self.number().map(|value| value != 0)
    }

    fn text(&mut self) -> Option<&'a str> {
        self.text_up_to(LONGEST_TEXT)
    }

    fn text_up_to(&mut self, longest: usize) -> Option<&'a str> {
        let len = self.number().filter(|len| *len <= longest as u64)?;
        std::str::from_utf8(self.take(len as usize)?).ok()
    }

    fn policy(&mut self) -> Option<Policy> {
        serde_json::from_str(self.text()?).ok()
    }
}
