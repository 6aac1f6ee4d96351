//! Digests: what tells one page of content from another. This module is the definition of the algorithm, for whoever implements
//! [`Driver::hash`](crate::driver::Driver::hash): devices give the same digest for the same bytes as [`Digest::of`], to the last bit.
//!
//! # The algorithm, version 1
//!
//! It is made for a GPU: nothing but 64-bit multiplications, exclusive ors and shifts, every byte read once, no order between
//! *parts* of 128 KiB, and none between the 256 *lanes* of a part. All sums and products are modulo 2^64, words are little-endian.
//!
//! * `mix(s, w, p) = m ^ (m >> 32)` where `m = (s ^ w) * p`.
//! * A page of `n` bytes is cut into parts, and a part into vectors of 16 bytes: two words `x` and `y`. The last vector is filled up with zeros.
//!   Lane `t` of a part takes its vectors `t`, `t + 256`, `t + 512`, and so on.
//! * Lane `t` of part `q` has the number `i = 256 * q + t + 1`. It begins with `a = i * P5 ^ n` and `b = i * P6 ^ n`. A vector makes them
//!   `a = mix(mix(a, x, P1), y, P2)` and `b = mix(mix(b, y, P3), x, P4)`.
//! * `low` is the sum of `mix(mix(a, i, P5), n, P6)` over all lanes of all parts, `high` that of `mix(mix(b, i, P6), n, P5)`.
//! * `word` is the first word of the page, and `varies` is not 0 if any word differs from it (of a last word of fewer than 8 bytes, in
//!   those bytes). So a page with `varies == 0` is its first word repeated.
//!
//! `P1` to `P6` are 64-bit pieces of the fraction of pi, made odd. Every step is a bijection of the lane's state, so that a change of one word
//! always changes `a` and `b`. The digest finds changes and equal pages; it is not made to withstand somebody who constructs collisions.

/// The multipliers.
const P: [u64; 6] = [
    0x243f_6a88_85a3_08d3,
    0x1319_8a2e_0370_7345,
    0xa409_3822_299f_31d1,
    0x082e_fa98_ec4e_6c89,
    0x4528_21e6_38d0_1377,
    0xbe54_66cf_34e9_0c6d,
];
/// Lanes of a part.
const LANES: usize = 256;
/// Bytes of a part.
const PART: usize = 128 << 10;
const VECTOR: usize = 16;

/// What is found out about a page of content. The layout is part of the bargain: four words.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Digest {
    /// The first half of the hash.
    pub low: u64,
    /// The second half.
    pub high: u64,
    /// The first 8 bytes, little-endian.
    pub word: u64,
    /// 0 if the page is `word` repeated.
    pub varies: u64,
}

fn mix(state: u64, word: u64, factor: u64) -> u64 {
    let product = (state ^ word).wrapping_mul(factor);
    product ^ (product >> 32)
}

fn word(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    let len = bytes.len().min(8);
    word[..len].copy_from_slice(&bytes[..len]);
    u64::from_le_bytes(word)
}

/// The words of a vector; fewer than 16 bytes are filled up with zeros.
fn vector(bytes: &[u8]) -> (u64, u64) {
    (word(bytes), word(bytes.get(8..).unwrap_or_default()))
}

/// Both words of `first` repeated, as far as `len` bytes go.
fn repeated(first: u64, len: usize) -> (u64, u64) {
    let bytes = u128::from(first) << 64 | u128::from(first);
    let kept = if len < VECTOR { bytes & ((1 << (8 * len)) - 1) } else { bytes };
    (kept as u64, (kept >> 64) as u64)
}

impl Digest {
    /// The digest of a page.
    #[must_use]
    pub fn of(page: &[u8]) -> Digest {
        let mut digest = Digest { word: word(page), ..Digest::default() };
        for (index, part) in page.chunks(PART).enumerate() {
            digest.add(part, index * LANES + 1, page.len() as u64);
        }
        digest
    }

    fn add(&mut self, part: &[u8], first: usize, len: u64) {
        let number = |lane: usize| (first + lane) as u64;
        let mut states = [(0, 0); LANES];
        for (lane, state) in states.iter_mut().enumerate() {
            *state = (number(lane).wrapping_mul(P[4]) ^ len, number(lane).wrapping_mul(P[5]) ^ len);
        }
        for row in part.chunks(LANES * VECTOR) {
            for (bytes, state) in row.chunks(VECTOR).zip(&mut states) {
                let (x, y) = vector(bytes);
                *state = (mix(mix(state.0, x, P[0]), y, P[1]), mix(mix(state.1, y, P[2]), x, P[3]));
                let same = repeated(self.word, bytes.len());
                self.varies |= (x ^ same.0) | (y ^ same.1);
            }
        }
        for (lane, &(a, b)) in states.iter().enumerate() {
            self.low = self.low.wrapping_add(mix(mix(a, number(lane), P[4]), len, P[5]));
            self.high = self.high.wrapping_add(mix(mix(b, number(lane), P[5]), len, P[4]));
        }
    }

    /// The word that the page repeats, if it does.
    #[must_use]
    pub fn constant(&self) -> Option<u64> {
        (self.varies == 0).then_some(self.word)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn bytes(len: usize, seed: u64) -> Vec<u8> {
        let mut state = seed;
        let next = |_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 56) as u8
        };
        (0..len).map(next).collect()
    }

    #[test]
    fn the_algorithm_stays_what_it_is() {
        // Digests may be kept, and PTX cannot be changed by accident: these values are version 1.
        let found: Vec<Digest> = [0, 1, 16, 4096, 131_072 + 24].map(|len| Digest::of(&bytes(len, 7))).to_vec();
        let halves: Vec<(u64, u64)> = found.iter().map(|digest| (digest.low, digest.high)).collect();
        assert_eq!(halves, VERSION_1);
    }

    const VERSION_1: [(u64, u64); 5] = [
        (0, 0),
        (4_108_654_001_597_364_139, 12_456_254_919_265_150_897),
        (17_844_215_441_751_393_040, 1_552_017_459_034_991_427),
        (18_129_178_925_022_373_225, 6_807_941_810_055_609_773),
        (8_460_925_962_078_830_845, 15_285_639_997_380_135_401),
    ];

    #[test]
    fn every_byte_every_place_and_the_length_count() {
        let page = bytes(131_072 + 4096 + 5, 1);
        let mut seen = HashSet::from([halves(&page)]);
        for at in (0..page.len()).step_by(977).chain(page.len() - 5..page.len()) {
            for change in [1, 0x80] {
                let mut other = page.clone();
                other[at] ^= change;
                assert!(seen.insert(halves(&other)), "byte {at} ^ {change} makes no difference");
            }
        }
        for len in page.len() - 20..page.len() {
            assert!(seen.insert(halves(&page[..len])), "length {len} makes no difference");
        }
        for (one, other) in [(0, 1), (0, 16), (16, 4096), (4096, 131_072)] {
            let mut swapped = page.clone();
            (0..16).for_each(|byte| swapped.swap(one * 16 % 4096 + byte, (other * 16 % 131_072) + 16 * 256 + byte));
            assert!(seen.insert(halves(&swapped)), "vectors {one} and {other} are not told apart");
        }
        let mut zeros = HashSet::new();
        assert!((0..2000).all(|len| zeros.insert(halves(&vec![0; len]))), "zeros of two lengths are not told apart");
    }

    fn halves(page: &[u8]) -> (u64, u64) {
        let digest = Digest::of(page);
        (digest.low, digest.high)
    }

    #[test]
    fn repeated_words_are_seen() {
        let mut page: Vec<u8> = b"constant".repeat(700);
        for len in [1, 7, 8, 9, 16, 23, 4096, 5600] {
            assert_eq!(Digest::of(&page[..len]).constant(), Some(word(&page[..len])), "{len} bytes");
        }
        for at in [8, 15, 4000, 5599] {
            page[at] ^= 4;
            assert_eq!(Digest::of(&page).constant(), None, "byte {at} is different");
            page[at] ^= 4;
        }
        assert_eq!(Digest::of(&[0; 4096]).constant(), Some(0));
    }
}
