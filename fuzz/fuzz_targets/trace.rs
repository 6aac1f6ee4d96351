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
        file.extend_from_slice(&sum(payload));
    }
    if let Ok(reader) = Reader::new(&file) {
        reader.for_each(drop);
    }
});

/// CRC-32, bit by bit.
fn sum(bytes: &[u8]) -> [u8; 2] {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0xEDB8_8320 } else { crc >> 1 };
        }
    }
    let [low, high, ..] = (!crc).to_le_bytes();
    [low, high]
}
