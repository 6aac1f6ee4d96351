//! Lines out of a stream of bytes, with a limit: how many bytes a peer may make us keep is decided here.

/// A line was longer than allowed; nothing after it can be trusted to begin where a line begins.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TooLong;

/// What has arrived of the line that is not complete yet.
#[derive(Debug)]
pub struct Lines {
    begun: Vec<u8>,
    longest: usize,
}

impl Lines {
    /// Lines of at most `longest` bytes, without the newline.
    #[must_use]
    pub fn new(longest: usize) -> Lines {
        Lines { begun: Vec::new(), longest }
    }

    /// Whether a line has begun and is not complete.
    #[must_use]
    pub fn is_open(&self) -> bool {
        !self.begun.is_empty()
    }

    /// Takes bytes, and gives the lines that they complete, without newlines. Empty lines are left out.
    ///
    /// # Errors
    /// [`TooLong`] as soon as a line cannot fit any more: no more than the limit is ever kept.
    pub fn push(&mut self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, TooLong> {
        let mut complete = Vec::new();
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            let (body, ended) = match piece.strip_suffix(b"\n") {
                Some(body) => (body, true),
                None => (piece, false),
            };
            if self.begun.len() + body.len() > self.longest {
                return Err(TooLong);
            }
            self.begun.extend_from_slice(body);
            if ended && !self.begun.is_empty() {
                complete.push(std::mem::take(&mut self.begun));
            }
        }
        Ok(complete)
    }
}

#[cfg(test)]
mod tests {
    use super::{Lines, TooLong};

    /// The obvious version: everything at once.
    fn naive(all: &[u8]) -> Vec<Vec<u8>> {
        let end = all.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        all[..end].split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).map(<[u8]>::to_vec).collect()
    }

    #[test]
    fn lines_do_not_depend_on_how_the_bytes_arrive() {
        let all = b"one\n\ntwo two\n\n\nthree\nfour";
        for size in 1..=all.len() {
            let mut lines = Lines::new(7);
            let found: Vec<_> = all.chunks(size).flat_map(|piece| lines.push(piece).unwrap_or_default()).collect();
            assert_eq!(found, naive(all), "pieces of {size}");
            assert!(lines.is_open());
        }
    }

    #[test]
    fn a_line_that_cannot_fit_is_refused_at_once() {
        let mut lines = Lines::new(4);
        assert_eq!(lines.push(b"1234\n12"), Ok(vec![b"1234".to_vec()]));
        assert_eq!(lines.push(b"345"), Err(TooLong));
        assert_eq!(Lines::new(4).push(&[0; 1 << 20]), Err(TooLong));
    }
}
