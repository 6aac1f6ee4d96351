//! The stride of a pass: how long its next piece may be. A caller waits for the pieces that are under way, so they are to be short; but each costs its
//! start, so they are to be long. So a pass begins with pieces of half a `copy_piece`, and while nobody calls they grow as far as the pass has come, as
//! TCP's *slow start* does (RFC 5681); at the first call they are short at once, and stay so until `CALM` has been copied without another. So the first
//! call in a calm waits for two long pieces at most, and those after it for two short ones. Where another thread has called lately, a pass begins with
//! short ones. Where the program goes on beside the pass they do not grow: its own copies wait for ours, and nobody hears of those. Records of tiers are
//! as long as they are.

use crate::callers::Callers;
use crate::settings::{IN_FLIGHT, Settings};

/// So many copy pieces without a caller make calm.
const CALM: u64 = 16;
/// So many copy pieces are under way in a pass that has grown.
const GROWN: u64 = 4;
/// A page of a device's host: pieces begin and end at multiples of it.
const ALIGNMENT: u64 = 4096;

/// What is known of callers when a pass begins.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Begins {
    /// Another thread has called lately.
    Short,
    /// None has.
    InCalm,
}

/// See the [module documentation](self).
#[derive(Debug)]
pub(super) struct Stride<'a> {
    callers: &'a Callers,
    /// How many there were when the last piece was cut.
    seen: u64,
    /// Bytes cut since the last caller; there is calm in them already if none came lately.
    undisturbed: u64,
    copy_piece: u64,
    grows: bool,
}

impl<'a> Stride<'a> {
    /// The stride of a pass that begins now; `grows`: the program waits for it.
    pub(super) fn new(callers: &'a Callers, settings: &Settings, begins: Begins, grows: bool) -> Stride<'a> {
        let copy_piece = settings.copy_piece;
        let undisturbed = if begins == Begins::Short { 0 } else { CALM * copy_piece };
        Stride { callers, seen: callers.count(), undisturbed, copy_piece, grows }
    }

    /// The length of the next piece, of which `left` bytes are left: more than 0 if they are.
    pub(super) fn next(&mut self, left: u64) -> u64 {
        let seen = self.callers.count();
        if seen != self.seen {
            (self.seen, self.undisturbed) = (seen, 0);
        }
        let len = self.longest().min(left);
        self.undisturbed = self.undisturbed.saturating_add(len);
        len
    }

    fn longest(&self) -> u64 {
        let [short, first, grown] = [1, 2, 2 * GROWN].map(|halves| self.share(halves));
        match self.undisturbed.checked_sub(CALM * self.copy_piece) {
            None => short,
            Some(come) if self.grows => (come / first * first).clamp(first, grown),
            Some(_) => first,
        }
    }

    /// The length of each of the pieces that are `halves` halves of a copy piece together.
    fn share(&self, halves: u64) -> u64 {
        (halves * self.copy_piece / 2 / IN_FLIGHT as u64).next_multiple_of(ALIGNMENT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::terms::Config;

    const MIB: u64 = 1 << 20;

    fn settings(copy_piece: u64) -> Settings {
        Settings::new(Config { copy_piece, ..Config::default() })
    }

    /// The lengths, in MiB, of the pieces of so many MiB; a caller comes before the pieces that `calls` names.
    fn lengths(mib: u64, grows: bool, calls: &[usize]) -> Vec<u64> {
        let (callers, settings) = (Callers::new(), settings(4 * MIB));
        let mut stride = Stride::new(&callers, &settings, Begins::InCalm, grows);
        let (mut left, mut lengths) = (mib * MIB, Vec::new());
        while left > 0 {
            if calls.contains(&lengths.len()) {
                callers.note();
            }
            let len = stride.next(left);
            left -= len;
            lengths.push(len / MIB);
        }
        lengths
    }

    #[test]
    fn pieces_grow_as_the_pass_comes_on_while_nobody_calls() {
        assert_eq!(lengths(64, true, &[]), [2, 2, 4, 8, 8, 8, 8, 8, 8, 8]);
        assert_eq!(lengths(23, true, &[]), [2, 2, 4, 8, 7]);
    }

    #[test]
    fn they_begin_short_where_another_thread_has_called_lately() {
        let (callers, settings) = (Callers::new(), settings(4 * MIB));
        let first = |begins| Stride::new(&callers, &settings, begins, true).next(64 * MIB);
        assert_eq!([Begins::InCalm, Begins::Short].map(first), [2 * MIB, MIB]);
    }

    #[test]
    fn at_a_call_they_are_short_at_once_until_it_has_been_calm() {
        let short = [1; 64];
        assert_eq!(lengths(16 + 64 + 16, true, &[4]), [&[2, 2, 4, 8][..], &short, &[2, 2, 4, 8]].concat());
        // A second call in the calm begins it anew, one after it does so again.
        assert_eq!(lengths(63 + 64 + 4, true, &[0, 63]), [&short[..63], &short, &[2, 2]].concat());
        assert_eq!(lengths(64 + 8 + 8, true, &[0, 67]), [&short[..], &[2, 2, 4], &short[..8]].concat());
    }

    #[test]
    fn they_do_not_grow_while_the_program_goes_on() {
        assert_eq!(lengths(16, false, &[]), [2; 8]);
        assert_eq!(lengths(64 + 4, false, &[0]), [&[1; 64][..], &[2, 2]].concat());
    }

    #[test]
    fn every_copy_piece_makes_pieces_that_begin_at_pages_and_come_to_an_end() {
        for copy_piece in [1, 4096, 6000, 12 << 10, 20 << 10, u64::MAX] {
            let (callers, settings) = (Callers::new(), settings(copy_piece));
            let mut stride = Stride::new(&callers, &settings, Begins::InCalm, true);
            for step in 0..200 {
                if step == 100 {
                    callers.note();
                }
                let len = stride.next(u64::MAX);
                assert!(len > 0 && len.is_multiple_of(ALIGNMENT), "{copy_piece}: {len}");
                assert!(len <= GROWN * settings.copy_piece / IN_FLIGHT as u64 + ALIGNMENT, "{copy_piece}: {len}");
            }
            assert_eq!(stride.next(1), 1);
            assert_eq!(stride.next(0), 0);
        }
    }
}
