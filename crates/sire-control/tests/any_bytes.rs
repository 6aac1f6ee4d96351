//! The protocol survives any bytes: the corpus of the fuzz target `control`, and simple changes of it, without a fuzzer.

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
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus");
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let paths = entries.map(|entry| entry.path()).filter(|path| path.extension().is_none());
    paths.filter_map(|path| std::fs::read(path).ok()).collect()
}

#[test]
fn the_corpus_is_read_without_a_panic() {
    let seeds = seeds();
    assert!(seeds.len() >= 7, "the corpus is gone");
    seeds.iter().for_each(|seed| corpus::check(seed));
}

#[test]
fn so_are_its_mutations() {
    let (seeds, mut numbers) = (seeds(), Numbers(0x5eed));
    for _ in 0..20_000 {
        let mut bytes = seeds[numbers.below(seeds.len())].clone();
        for _ in 0..=numbers.below(4) {
            let at = numbers.below(bytes.len());
            match numbers.below(4) {
                0 => bytes.insert(at, numbers.below(256) as u8),
                1 => bytes.truncate(at + 1),
                2 => {
                    let other = &seeds[numbers.below(seeds.len())];
                    bytes.splice(at..at, other[numbers.below(other.len())..].iter().copied());
                }
                _ => bytes[at] = numbers.below(256) as u8,
            }
        }
        corpus::check(&bytes);
    }
}

#[test]
fn a_line_without_an_end_costs_no_more_than_a_line() {
    let mut lines = sire_control::line::Lines::new(4096);
    let flood = vec![b'x'; 1 << 16];
    assert!(lines.push(&flood).is_err());
}
