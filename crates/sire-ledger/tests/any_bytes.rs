//! A ledger survives any bytes: the seeds of the fuzz target `ledger`, and simple changes of them, without a fuzzer.

use std::path::Path;

#[path = "corpus/check.rs"]
mod corpus;

/// A small generator of numbers: the same ones each time.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % end.max(1) as u64) as usize
    }
}

fn seeds() -> Vec<Vec<u8>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds/ledger");
    std::fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| std::fs::read(entry.path()).ok())
        .collect()
}

#[test]
fn the_seeds_are_refused_or_read() {
    let seeds = seeds();
    assert!(seeds.len() >= 9, "the corpus is gone");
    seeds.iter().for_each(|seed| corpus::check(seed));
}

#[test]
fn so_are_their_mutations() {
    let (seeds, mut numbers) = (seeds(), Numbers(0x5eed));
    for _ in 0..400 {
        let mut bytes = seeds[numbers.below(seeds.len())].clone();
        for _ in 0..=numbers.below(4) {
            let (at, value) = (numbers.below(bytes.len()), numbers.below(256) as u8);
            match numbers.below(3) {
                0 => bytes.insert(at, value),
                1 => bytes.truncate(at + 1),
                _ => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte = value),
            }
        }
        corpus::check(&bytes);
    }
}
