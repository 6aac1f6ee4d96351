//! Runs of frames: where in the bitmap there is room, and how single frames make runs. No table, no locks.

use super::Extent;

/// The first run of free frames that is long enough; failing that, the first free runs together.
pub fn choose(bitmap: &[u64], frames: u32, count: u32) -> Vec<Extent> {
    let mut runs = Vec::new();
    let mut index = 0;
    while index < frames {
        let first = next_free(bitmap, index, frames);
        let end = next_used(bitmap, first, frames);
        if end - first >= count {
            return vec![Extent { first, count }];
        }
        if end > first {
            runs.push(Extent { first, count: end - first });
        }
        index = end.max(first + 1);
    }
    let mut missing = count;
    for run in &mut runs {
        run.count = run.count.min(missing);
        missing -= run.count;
    }
    runs.retain(|run| run.count > 0);
    runs
}

/// The first free frame at or after `from`; `frames` if none.
fn next_free(bitmap: &[u64], from: u32, frames: u32) -> u32 {
    next_bit(from, frames, |word| !bitmap[word])
}

/// The first used frame at or after `from`; `frames` if none.
pub fn next_used(bitmap: &[u64], from: u32, frames: u32) -> u32 {
    next_bit(from, frames, |word| bitmap[word])
}

/// The first index at or after `from` whose bit is set in the words that `word` gives; `frames` if none.
fn next_bit(from: u32, frames: u32, word: impl Fn(usize) -> u64) -> u32 {
    let mut index = from;
    while index < frames {
        let bits = word(index as usize / 64) >> (index % 64);
        if bits != 0 {
            return (index + bits.trailing_zeros()).min(frames);
        }
        index = (index / 64 + 1) * 64;
    }
    frames
}

/// Puts the next frame to runs in ascending order.
pub fn join(extents: &mut Vec<Extent>, index: u32) {
    match extents.last_mut() {
        Some(last) if last.first + last.count == index => last.count += 1,
        _ => extents.push(Extent { first: index, count: 1 }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_long_run_is_preferred_to_many_short_ones() {
        // Frames 1 and 5 are used: free runs are [0], [2, 3, 4], [6 ..].
        let bitmap = [0b10_0010u64];
        assert_eq!(choose(&bitmap, 10, 1), [Extent { first: 0, count: 1 }]);
        assert_eq!(choose(&bitmap, 10, 3), [Extent { first: 2, count: 3 }]);
        assert_eq!(choose(&bitmap, 10, 4), [Extent { first: 6, count: 4 }]);
        assert_eq!(choose(&bitmap, 10, 6).iter().map(|run| run.count).sum::<u32>(), 6);
    }

    #[test]
    fn runs_cross_words() {
        let bitmap = [u64::MAX >> 1, 0, 1];
        assert_eq!(choose(&bitmap, 192, 65), [Extent { first: 63, count: 65 }]);
    }
}
