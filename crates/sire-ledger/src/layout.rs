//! The bytes of a ledger's file. A header of one page says what the file is; then come the slots, each with *two* copies of its
//! record. A change writes the older copy, with the next sequence number and a checksum: whoever is killed in the middle of it
//! leaves the other copy valid. What is read may have been written by anybody, so everything is checked and nothing is trusted:
//! a copy that does not check out does not exist.
//!
//! All numbers are little-endian.
//!
//! | at | bytes | header |
//! |---|---|---|
//! | 0 | 8 | `SIRELDGR` |
//! | 8 | 4 | layout version, 1 |
//! | 12 | 4 | slots |
//! | 16 | 4 | bytes per slot |
//! | 20 | 4 | CRC-32 of the bytes before |
//!
//! | at | bytes | record |
//! |---|---|---|
//! | 0 | 8 | sequence number; the higher of two valid copies counts |
//! | 8 | 4 | state: 0 idle, 1 waiting, 2 holding |
//! | 12 | 4 | uid |
//! | 16 | 4 | pid, as the process itself sees it |
//! | 20 | 4 | how often the member has looked, while waiting |
//! | 24 | 8 | when the process started, in the system's clock ticks since boot |
//! | 32 | 8 | ticket: the place in the queue |
//! | 40 | 8 | bytes wanted (waiting) or reserved (holding) |
//! | 48 | 8 | bytes of the reservation that the process owns already |
//! | 56 | 4 | CRC-32 of the bytes before |

/// The file's first bytes.
pub const MAGIC: &[u8; 8] = b"SIRELDGR";
/// The layout that this code reads and writes.
pub const VERSION: u32 = 1;
/// Slots of a new file.
pub const SLOTS: u32 = 256;
/// Bytes before the first slot.
pub const HEADER: u64 = 4096;
/// Bytes of one slot: two copies.
pub const SLOT: u64 = 128;
/// Bytes of one copy.
pub const COPY: usize = 64;
/// Bytes of a whole file.
pub const FILE: u64 = HEADER + SLOT * SLOTS as u64;

/// Bytes of the header that are used.
pub const HEADER_USED: usize = 24;
const RECORD_SUMMED: usize = 56;

/// What a member is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It has joined, and wants nothing now.
    #[default]
    Idle,
    /// It waits for its turn and for room.
    Waiting,
    /// It has a reservation.
    Holding,
}

/// What a member says about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Record {
    /// Counts the changes of the slot.
    pub sequence: u64,
    /// What it is doing.
    pub state: State,
    /// Its user.
    pub uid: u32,
    /// Its process number, as it sees it.
    pub pid: u32,
    /// How often it has looked, while waiting: a number that stands still belongs to a process that does.
    pub looks: u32,
    /// When its process started, in clock ticks since boot.
    pub started: u64,
    /// Its place in the queue.
    pub ticket: u64,
    /// Bytes wanted or reserved.
    pub bytes: u64,
    /// Bytes of the reservation that it owns already.
    pub owned: u64,
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

/// The header of a file of this layout.
#[must_use]
pub fn header() -> [u8; HEADER_USED] {
    let mut bytes = [0; HEADER_USED];
    bytes[..8].copy_from_slice(MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[12..16].copy_from_slice(&SLOTS.to_le_bytes());
    bytes[16..20].copy_from_slice(&(SLOT as u32).to_le_bytes());
    let sum = crc32fast::hash(&bytes[..20]);
    bytes[20..].copy_from_slice(&sum.to_le_bytes());
    bytes
}

/// Whether these are the first bytes of a file of this layout; if not, what they are.
///
/// # Errors
/// A phrase that says what was found.
pub fn check_header(bytes: &[u8]) -> Result<(), String> {
    if bytes.get(..8) != Some(MAGIC) {
        return Err("it does not begin with SIRELDGR".into());
    }
    match u32_at(bytes, 8) {
        Some(VERSION) => {}
        Some(version) => return Err(format!("its layout is version {version}, not {VERSION}")),
        None => return Err("it ends within the header".into()),
    }
    if bytes.get(..HEADER_USED) == Some(&header()) { Ok(()) } else { Err("its header is damaged".into()) }
}

/// Whether a file that was refused, and begins so, is a damaged ledger of this layout or of an older one, and not somebody else's file or a newer one.
#[must_use]
pub fn is_wreck(bytes: &[u8]) -> bool {
    bytes.get(..8) == Some(MAGIC) && u32_at(bytes, 8).is_none_or(|version| version <= VERSION)
}

/// One copy of a record.
#[must_use]
pub fn encode(record: &Record) -> [u8; COPY] {
    let mut bytes = [0; COPY];
    bytes[..8].copy_from_slice(&record.sequence.to_le_bytes());
    bytes[8..12].copy_from_slice(&(record.state as u32).to_le_bytes());
    bytes[12..16].copy_from_slice(&record.uid.to_le_bytes());
    bytes[16..20].copy_from_slice(&record.pid.to_le_bytes());
    bytes[20..24].copy_from_slice(&record.looks.to_le_bytes());
    for (at, number) in [(24, record.started), (32, record.ticket), (40, record.bytes), (48, record.owned)] {
        bytes[at..at + 8].copy_from_slice(&number.to_le_bytes());
    }
    let sum = crc32fast::hash(&bytes[..RECORD_SUMMED]);
    bytes[RECORD_SUMMED..RECORD_SUMMED + 4].copy_from_slice(&sum.to_le_bytes());
    bytes
}

/// Reads one copy; `None` if it was never written, torn or damaged. (A copy of zeros was never written: its checksum is not 0.)
#[must_use]
pub fn decode(bytes: &[u8]) -> Option<Record> {
    let sum = u32_at(bytes, RECORD_SUMMED)?;
    if crc32fast::hash(bytes.get(..RECORD_SUMMED)?) != sum {
        return None;
    }
    let state = match u32_at(bytes, 8)? {
        0 => State::Idle,
        1 => State::Waiting,
        2 => State::Holding,
        _ => return None,
    };
    Some(Record {
        sequence: u64_at(bytes, 0)?,
        state,
        uid: u32_at(bytes, 12)?,
        pid: u32_at(bytes, 16)?,
        looks: u32_at(bytes, 20)?,
        started: u64_at(bytes, 24)?,
        ticket: u64_at(bytes, 32)?,
        bytes: u64_at(bytes, 40)?,
        owned: u64_at(bytes, 48)?,
    })
}

/// The newest valid copy in a slot's bytes, and which of the two the next change goes to.
#[must_use]
pub fn newest(slot: &[u8]) -> (Option<Record>, usize) {
    let first = slot.get(..COPY).and_then(decode);
    let second = slot.get(COPY..2 * COPY).and_then(decode);
    match (first, second) {
        (Some(a), Some(b)) if a.sequence >= b.sequence => (Some(a), 1),
        (_, Some(b)) => (Some(b), 0),
        (Some(a), None) => (Some(a), 1),
        (None, None) => (None, 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn record() -> impl Strategy<Value = Record> {
        (any::<[u64; 5]>(), any::<[u32; 3]>(), 0..3u8).prop_map(|(n, m, state)| Record {
            sequence: n[0],
            state: [State::Idle, State::Waiting, State::Holding][usize::from(state)],
            uid: m[0],
            pid: m[1],
            looks: m[2],
            started: n[1],
            ticket: n[2],
            bytes: n[3],
            owned: n[4],
        })
    }

    #[test]
    fn what_was_never_written_is_nothing() {
        assert_eq!(decode(&[0; COPY]), None);
        assert_eq!(newest(&[0; 2 * COPY]), (None, 0));
    }

    #[test]
    fn a_header_of_another_version_is_named() {
        let mut bytes = header();
        assert_eq!(check_header(&bytes), Ok(()));
        bytes[8] = 2;
        assert_eq!(check_header(&bytes), Err("its layout is version 2, not 1".into()));
        assert!(check_header(b"SIRELDGR").is_err_and(|found| found.contains("ends")));
        assert!(check_header(b"").is_err());
        let mut bytes = header();
        bytes[13] ^= 1;
        assert!(check_header(&bytes).is_err_and(|found| found.contains("damaged")));
    }

    proptest! {
        #[test]
        fn records_survive(record in record()) {
            prop_assert_eq!(decode(&encode(&record)), Some(record));
        }

        /// Wherever a writer is killed, the slot reads as before its change or as after it.
        #[test]
        fn a_torn_change_leaves_the_record_before_it(old in record(), new in record(), cut in 0..=COPY) {
            let old = Record { sequence: 6, ..old };
            let new = Record { sequence: 7, ..new };
            let mut slot = [0; 2 * COPY];
            slot[..COPY].copy_from_slice(&encode(&Record { sequence: 5, ..old }));
            slot[COPY..].copy_from_slice(&encode(&old));
            prop_assert_eq!(newest(&slot), (Some(old), 0));
            slot[..cut].copy_from_slice(&encode(&new)[..cut]);
            let (found, next) = newest(&slot);
            prop_assert!(found == Some(old) && next == 0 || found == Some(new) && next == 1);
            prop_assert!(cut < COPY || found == Some(new));
        }

        /// Hostile bytes are refused or read, never anything else; one flipped bit is always noticed.
        #[test]
        fn bytes_of_others_are_not_trusted(bytes in proptest::collection::vec(any::<u8>(), 0..300), record in record(), bit in 0..RECORD_SUMMED * 8) {
            let _ = (newest(&bytes), check_header(&bytes), decode(&bytes));
            let mut copy = encode(&record);
            copy[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(decode(&copy), None);
        }
    }
}
