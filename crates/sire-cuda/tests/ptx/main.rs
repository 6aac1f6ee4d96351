//! The committed PTX computes what `sire_core::digest` defines: it is run here, instruction by instruction, by a small interpreter
//! that knows the opcodes it uses, on pages of all awkward lengths. Reads outside the page's 16-byte vectors, reads of what no lane has
//! written, and barriers that some lanes miss are failures.
#![allow(clippy::unwrap_used, clippy::panic)]

mod machine;

use machine::{Kernel, Memory};
use sire_core::digest::Digest;

const PTX: &str = include_str!("../../src/hash.ptx");
const SOURCE: u64 = 0x7000_0000_0000;
const OUT: u64 = 0x7100_0000_0000;
const PART: u64 = 128 << 10;

/// What the kernel finds in `bytes`, by pages of `page`.
fn run(kernel: &Kernel, bytes: &[u8], page: u64) -> Vec<Digest> {
    let len = bytes.len() as u64;
    let pages = len.div_ceil(page);
    let mut padded = bytes.to_vec();
    // What follows the last byte may be read, and must not count.
    padded.resize(bytes.len().next_multiple_of(16), 0xEE);
    let mut memory = Memory::new(vec![(SOURCE, padded), (OUT, vec![0; 32 * pages as usize])]);
    for x in 0..pages {
        for y in 0..page.min(len).div_ceil(PART) {
            kernel.block((x as u32, y as u32), 256, &[SOURCE, len, page, OUT], &mut memory);
        }
    }
    let word = |index: u64| memory.read(OUT + 8 * index);
    let digest = |index: u64| Digest {
        low: word(4 * index),
        high: word(4 * index + 1),
        word: word(4 * index + 2),
        varies: word(4 * index + 3),
    };
    (0..pages).map(digest).collect()
}

fn random(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let next = |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    (0..len).map(next).collect()
}

fn check(kernel: &Kernel, bytes: &[u8], page: u64) {
    let found = run(kernel, bytes, page);
    let wanted: Vec<Digest> = bytes.chunks(page as usize).map(Digest::of).collect();
    for (index, (found, wanted)) in found.iter().zip(&wanted).enumerate() {
        let halves = |digest: &Digest| (digest.low, digest.high, digest.word);
        assert_eq!(halves(found), halves(wanted), "page {index} of {} bytes by {page}", bytes.len());
        assert_eq!(found.varies == 0, wanted.varies == 0, "page {index} of {} bytes by {page}", bytes.len());
    }
    assert_eq!(found.len(), wanted.len());
}

#[test]
fn the_kernel_computes_the_digest() {
    let kernel = Kernel::parse(PTX, "sire_hash_1");
    for len in [1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 255 * 16, 4096, 4097, 4096 * 2 + 5] {
        check(&kernel, &random(len, len as u64), 1 << 20);
    }
    for (len, page) in
        [(100, 16), (5000, 1024), (PART as usize + 1, 1 << 21), (2 * PART as usize - 3, PART), (300_000, 200_016)]
    {
        check(&kernel, &random(len, 5), page);
    }
}

#[test]
fn the_kernel_sees_what_repeats() {
    let kernel = Kernel::parse(PTX, "sire_hash_1");
    for len in [3, 8, 12, 16, 20, 24, 4100, PART as usize + 24] {
        let mut page: Vec<u8> = b"constant".iter().copied().cycle().take(len).collect();
        assert_eq!(run(&kernel, &page, 1 << 21)[0].varies, 0, "{len} bytes");
        check(&kernel, &page, 1 << 21);
        if len > 8 {
            *page.last_mut().unwrap() ^= 0x40;
            check(&kernel, &page, 1 << 21);
        }
    }
}

#[test]
fn the_interpreter_notices_what_a_device_would_not_forgive() {
    let kernel = Kernel::parse(PTX, "sire_hash_1");
    let outside = std::panic::catch_unwind(|| {
        let mut memory = Memory::new(vec![(SOURCE, vec![0; 16]), (OUT, vec![0; 32])]);
        kernel.block((0, 0), 256, &[SOURCE, 17, 32, OUT], &mut memory);
    });
    assert!(outside.is_err(), "a read beyond the memory");
}
