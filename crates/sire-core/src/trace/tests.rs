//! What is written is what is read, for the kinds of records that programs make rarely: files, and memory that is handed out or comes from elsewhere.

use super::code::{beginning, encode};
use super::*;
use proptest::prelude::*;

fn call() -> impl Strategy<Value = SegmentCall> {
    let (any, status) = (any::<u64>(), 0..=i32::MAX);
    prop_oneof![
        (any, any).prop_map(|(addr, size)| SegmentCall::Mapped { addr, size }),
        (any, status.clone()).prop_map(|(handle, status)| SegmentCall::Lend { handle, status }),
        (any, any, status).prop_map(|(addr, size, status)| SegmentCall::LendRange { addr, size, status }),
    ]
}

fn attachment() -> impl Strategy<Value = Attachment> {
    let any = any::<u64>();
    let name = prop_oneof!["/[a-z/.]{0,40}", "\\PC{0,80}", Just("/x".repeat(512))];
    (any, any, any, any, 0..=i32::MAX, name).prop_map(|(addr, len, at, size, status, name)| Attachment {
        addr,
        len,
        at,
        size,
        status,
        name,
    })
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![call().prop_map(Event::Segment), attachment().prop_map(Event::Attach)]
}

fn file(records: &[Record]) -> Vec<u8> {
    let header = Header { version: VERSION, ..Header::default() };
    [beginning(&header), records.iter().flat_map(encode).collect()].concat()
}

fn read(bytes: &[u8]) -> Vec<Result<Record, Damage>> {
    Reader::new(bytes).map(Iterator::collect).unwrap_or_default()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn rare_records_come_back_as_they_were(events in proptest::collection::vec((event(), any::<u32>()), 0..8)) {
        let record = |(event, thread)| Record { time: Duration::from_nanos(u64::from(thread)), thread, event };
        let written: Vec<Record> = events.into_iter().map(record).collect();
        let found: Result<Vec<_>, _> = read(&file(&written)).into_iter().collect();
        prop_assert_eq!(found, Ok(written));
    }

    /// Cut off anywhere, or with any byte changed, a file gives whole records that were written, and then damage.
    #[test]
    fn damage_hides_in_one_record_at_most(event in event(), at in any::<prop::sample::Index>(), flip in 1..=255u8) {
        let record = Record { time: Duration::ZERO, thread: 1, event };
        let whole = file(&[record.clone(), record.clone(), record.clone()]);
        let mut bytes = whole.clone();
        let at = at.index(bytes.len());
        for found in read(&bytes[..at]) {
            prop_assert!(found.map_or_else(|damage| damage.torn, |found| found == record));
        }
        bytes[at] ^= flip;
        let wrong = read(&bytes).into_iter().flatten().filter(|found| *found != record).count();
        prop_assert!(wrong <= 1, "{} records are others than those that were written", wrong);
    }
}

#[test]
fn a_name_that_is_too_long_is_left_out_and_the_record_stays() {
    let whole = Attachment { addr: 1, len: 2, at: 3, size: 4, status: 0, name: "/long".repeat(1000) };
    let record = Record { time: Duration::ZERO, thread: 0, event: Event::Attach(whole.clone()) };
    let kept = Record { event: Event::Attach(Attachment { name: String::new(), ..whole }), ..record.clone() };
    assert_eq!(read(&file(&[record])), [Ok(kept)]);
}
