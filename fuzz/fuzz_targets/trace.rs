//! The reader of traces survives any file: with the bytes as they are, and as payloads whose check sums are right.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sire_core::trace::Reader;

fuzz_target!(|bytes: &[u8]| {
    let _ = Reader::new(bytes).map(Iterator::count);
    let mut file = b"sire-trc".to_vec();
    for payload in std::iter::once(&br#"{"version":1}"#[..]).chain(bytes.chunks(100)) {
        file.push(payload.len() as u8);
        file.extend_from_slice(payload);
        // Two bytes of the sum are kept.
        file.extend_from_slice(&crc32fast::hash(payload).to_le_bytes()[..2]);
    }
    if let Ok(reader) = Reader::new(&file) {
        reader.for_each(drop);
    }
});
