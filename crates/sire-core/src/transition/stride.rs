//! The stride of a pass: how long its next piece may be. A caller waits for the pieces that are under way, so they are to be short; but each costs its
//! start, so they are to be long. So a pass begins with pieces of half a `copy_piece`, and while nobody calls they grow as far as the pass has come, as
//! TCP's *slow start* does (RFC 5681); at the first call they are short at once, and stay so until `CALM` has been copied without another. Nor do they
//! grow within a second of a call of the program's, who will call again. So the first call after a second without waits for two long pieces at most,
//! those that follow it closely for two short ones, and those that come now and then for a copy piece. A pass that begins within a second of another
//! thread's call begins with short ones. Where the program goes on beside the pass they do not grow: its own copies wait for ours, and nobody hears of
//! those. Records of tiers are as long as they are.

use crate::callers::{Callers, Heard, LATELY};
use crate::clock;
use crate::settings::{IN_FLIGHT, Settings};

/// So many copy pieces without a caller make calm.
const CALM: u64 = 16;
/// So many copy pieces are under way in a pass that has grown.
const GROWN: u64 = 4;
/// A page of a device's host: pieces begin and end at multiples of it.
const ALIGNMENT: u64 = 4096;

/// See the [module documentation](self).
#[derive(Debug)]
pub(super) struct Stride<'a> {
    callers: &'a Callers,
    /// What was known of them when the last piece was cut: of the program's, when the last one was heard.
    heard: Heard,
    /// Bytes cut since the last caller; there is calm in them already if none came lately.
    undisturbed: u64,
    copy_piece: u64,
    grows: bool,
}

impl<'a> Stride<'a> {
    /// The stride of a pass of a call; `heard`: when it was made; `grows`: the program waits for it.
    pub(super) fn new(callers: &'a Callers, heard: Heard, settings: &Settings, grows: bool) -> Stride<'a> {
        let copy_piece = settings.copy_piece;
        let undisturbed = if heard.lately.is_some() { 0 } else { CALM * copy_piece };
        Stride { callers, heard, undisturbed, copy_piece, grows }
    }

    /// The length of the next piece, of which `left` bytes are left: more than 0 if they are.
    pub(super) fn next(&mut self, left: u64) -> u64 {
        self.next_at(left, clock::milliseconds())
    }

    fn next_at(&mut self, left: u64, now: u64) -> u64 {
        self.hear(now);
        let lately = self.heard.lately.is_some_and(|last| now.saturating_sub(last) < LATELY);
        let len = self.longest(lately).min(left);
        self.undisturbed = self.undisturbed.saturating_add(len);
        len
    }

    fn hear(&mut self, now: u64) {
        let (all, program) = (self.callers.count(), self.callers.program());
        if all != self.heard.all {
            self.undisturbed = 0;
        }
        let lately = if program == self.heard.program { self.heard.lately } else { Some(now) };
        self.heard = Heard { all, program, lately };
    }

    fn longest(&self, lately: bool) -> u64 {
        let [short, first, grown] = [1, 2, 2 * GROWN].map(|halves| self.share(halves));
        match self.undisturbed.checked_sub(CALM * self.copy_piece) {
            None => short,
            Some(come) if self.grows && !lately => (come / first * first).clamp(first, grown),
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

    /// The lengths, in MiB, of the pieces of so many MiB, each of which takes `each` milliseconds; `caller` comes before the pieces that `calls` names.
    fn lengths_of(mib: u64, each: u64, caller: fn(&Callers), calls: &[usize]) -> Vec<u64> {
        let (callers, settings) = (Callers::new(), settings(4 * MIB));
        let mut stride = Stride::new(&callers, callers.heard(), &settings, true);
        lengths_from(&mut stride, mib, each, |piece| {
            if calls.contains(&piece) {
                caller(&callers);
            }
        })
    }

    fn lengths_from(stride: &mut Stride<'_>, mib: u64, each: u64, before: impl Fn(usize)) -> Vec<u64> {
        let (mut left, mut lengths) = (mib * MIB, Vec::new());
        while left > 0 {
            before(lengths.len());
            let len = stride.next_at(left, each * lengths.len() as u64);
            left -= len;
            lengths.push(len / MIB);
        }
        lengths
    }

    fn lengths(mib: u64, calls: &[usize]) -> Vec<u64> {
        lengths_of(mib, 0, Callers::note, calls)
    }

    #[test]
    fn pieces_grow_as_the_pass_comes_on_while_nobody_calls() {
        assert_eq!(lengths(64, &[]), [2, 2, 4, 8, 8, 8, 8, 8, 8, 8]);
        assert_eq!(lengths(23, &[]), [2, 2, 4, 8, 7]);
    }

    #[test]
    fn they_begin_short_where_another_thread_has_called_lately_and_do_not_grow_until_that_is_a_second_ago() {
        let (callers, settings) = (Callers::new(), settings(4 * MIB));
        let begun = |lately| Stride::new(&callers, Heard { all: 0, program: 0, lately }, &settings, true);
        assert_eq!([None, Some(0)].map(|lately| begun(lately).next_at(64 * MIB, 0)), [2 * MIB, MIB]);
        // The 67th is cut after 990 ms, the 68th after 1005.
        let lengths = lengths_from(&mut begun(Some(0)), 64 + 6 + 24, 15, |_| {});
        assert_eq!(lengths, [&[1; 64][..], &[2, 2, 2], &[6, 8, 8, 2]].concat());
    }

    #[test]
    fn at_a_call_they_are_short_at_once_until_it_has_been_calm_and_do_not_grow_before_a_second() {
        let short = [1; 64];
        assert_eq!(lengths(16 + 64 + 6, &[4]), [&[2, 2, 4, 8][..], &short, &[2, 2, 2]].concat());
        // A second call in the calm begins it anew, one after it does so again.
        assert_eq!(lengths(63 + 64 + 4, &[0, 63]), [&short[..63], &short, &[2, 2]].concat());
        assert_eq!(lengths(64 + 6 + 8, &[0, 67]), [&short[..], &[2, 2, 2], &short[..8]].concat());
        // Each takes 10 ms: one second after the first.
        let slowly = lengths_of(64 + 72 + 16, 10, Callers::note, &[0]);
        assert_eq!(slowly, [&short[..], &[2; 36], &[8, 8]].concat());
    }

    #[test]
    fn what_the_engine_waits_for_makes_them_short_and_says_nothing_of_the_next_second() {
        let short = [1; 64];
        let lengths = lengths_of(4 + 64 + 16, 0, Callers::note_own, &[2]);
        assert_eq!(lengths, [&[2, 2][..], &short, &[2, 2, 4, 8]].concat());
    }

    #[test]
    fn they_do_not_grow_while_the_program_goes_on() {
        let (callers, settings) = (Callers::new(), settings(4 * MIB));
        let behind = |mib, calls: usize| {
            let mut stride = Stride::new(&callers, callers.heard(), &settings, false);
            lengths_from(&mut stride, mib, 0, |piece| {
                if piece < calls {
                    callers.note();
                }
            })
        };
        assert_eq!(behind(16, 0), [2; 8]);
        assert_eq!(behind(64 + 4, 1), [&[1; 64][..], &[2, 2]].concat());
    }

    #[test]
    fn every_copy_piece_makes_pieces_that_begin_at_pages_and_come_to_an_end() {
        for copy_piece in [1, 4096, 6000, 12 << 10, 20 << 10, u64::MAX] {
            let (callers, settings) = (Callers::new(), settings(copy_piece));
            let mut stride = Stride::new(&callers, callers.heard(), &settings, true);
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
